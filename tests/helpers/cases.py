"""The data of the laws and of the two-process test; the test file of each diagnostic declares them as ``CASE``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lightning_gendiag
from lightning_gendiag import Diagnostic

LEFT_AND_RIGHT = torch.arange(8).repeat(8, 1) // 4


class Case(NamedTuple):
    make: Callable[[], Diagnostic]
    updates: list[dict[str, Any]]
    """Keyword arguments of at least eight calls of ``update``."""
    tolerance: float = 1e-6
    """Tolerance for the difference between two processes and one."""


class Arguments(NamedTuple):
    """Arguments of a metric's constructor: valid values, and another value for each argument."""

    valid: dict[str, Any]
    changes: dict[str, dict[str, Any]]


ARGUMENTS = {
    "adversary": Arguments({}, {"threshold": {"threshold": 0.5}, "lower_is_real": {"lower_is_real": True}}),
    "codebook_usage": Arguments({"num_codes": [16, 32]}, {"num_codes": {"num_codes": [32, 16]}}),
    "cosine_mean_similarity": Arguments(
        {"regions": LEFT_AND_RIGHT},
        {
            "regions": {"regions": LEFT_AND_RIGHT.T},
            "bandwidth": {"bandwidth": "image"},
            "unbiased": {"unbiased": False},
            "num_regions": {"regions": None, "num_regions": 2},
            "num_classes": {"num_classes": 10},
            "null_splits": {"null_splits": 8},
            "reset_real_features": {"reset_real_features": False},
            "seed": {"seed": 1},
        },
    ),
    "generation_balance": Arguments(
        {"num_classes": 3},
        {
            "num_classes": {"num_classes": 4},
            "classes": {"classes": torch.tensor([0, 4, 900])},
            "confusion": {"confusion": torch.eye(3)},
            "confidence": {"confidence": 0.9},
        },
    ),
    "k_star": Arguments(
        {"max_rows": 50},
        {"distance": {"distance": "cosine"}, "max_rows": {"max_rows": 100}, "seed": {"seed": 1}},
    ),
    "latent_regions": Arguments(
        {"components": 2, "max_rows": 50},
        {
            "components": {"components": 3},
            "max_components": {"max_components": 5},
            "max_rows": {"max_rows": None},
            "seed": {"seed": 1},
        },
    ),
    "manifold_entropy": Arguments(
        {"latent_dim": 4},
        {
            "latent_dim": {"latent_dim": 5},
            "order": {"order": torch.tensor([1, 0, 2, 3])},
            "partition": {"partition": [[0, 1], [2, 3]]},
            "num_classes": {"num_classes": 3},
        },
    ),
    "memorization": Arguments(
        {},
        {"ratio": {"ratio": 0.3}, "max_side": {"max_side": 4}, "reset_real_features": {"reset_real_features": False}},
    ),
    "timestep_loss": Arguments({"edges": [0.0, 0.5, 1.0]}, {"edges": {"edges": [0.0, 0.4, 1.0]}}),
    "posterior_kl": Arguments(
        {"latent_dim": 5},
        {"latent_dim": {"latent_dim": 6}, "threshold": {"threshold": 0.5}, "channels": {"channels": 1}},
    ),
    "regional_primitives": Arguments({"num_regions": 3}, {"num_regions": {"num_regions": 4}}),
    "round_trip": Arguments(
        {"num_layers": 2}, {"num_layers": {"num_layers": 3}, "regions": {"regions": LEFT_AND_RIGHT}}
    ),
    "training_data": Arguments(
        {"shape": (2, 8, 8)},
        {"shape": {"shape": (3, 8, 8)}, "rows": {"rows": 8}, "confidence": {"confidence": 0.99}},
    ),
}


def cases() -> dict[str, Case]:
    """Returns one case for each folder under ``lightning_gendiag/diagnostics``."""
    folder = Path(lightning_gendiag.__file__).parent / "diagnostics"
    names = sorted(path.stem for path in folder.iterdir() if path.stem not in ("__init__", "__pycache__"))
    return {name: import_module(f"tests.test_{name}").CASE for name in names}


def all_cases() -> dict[str, Case]:
    """Returns the cases of all diagnostics, and those of metrics that are used in a second way."""
    known = cases()
    cms = known["cosine_mean_similarity"]
    found = Case(lambda: type(cms.make())(num_regions=3), cms.updates, cms.tolerance)
    balance, confusion = known["generation_balance"], torch.tensor([[40, 3, 2], [1, 50, 4], [6, 0, 30]])
    corrected = Case(
        lambda: type(balance.make())(num_classes=3, confusion=confusion), balance.updates, balance.tolerance
    )
    return known | {"cosine_mean_similarity, regions found": found, "generation_balance, corrected": corrected}
