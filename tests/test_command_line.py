"""Every option of every callback can be set in a configuration file of LightningCLI."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

import lightning_gendiag
from lightning_gendiag import Monitor

CALLBACKS = [name for name in lightning_gendiag.__all__ if name.endswith("Monitor") and name != "Monitor"]

BASE: dict[str, Any] = {
    "every_n_epochs": 2, "every_n_train_steps": 5, "warmup_epochs": 1, "on_error": "raise", "name": "mine",
    "log_images": False, "max_overhead": 0.1,
    "adapter": {"class_path": "lightning_gendiag.ModelAdapter", "init_args": {"sample": "generator", "num_samples": 50}},
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "AdversaryMonitor": {
        "discriminator": "critic", "threshold": 0.5, "lower_is_real": True, "images": "reconstructions",
    },
    "CodebookUsageMonitor": {"indices": "model.quantizer", "num_codes": [512, 256], "patience": 3},
    "CosineMeanSimilarityMonitor": {
        "num_regions": None, "bandwidth": "image", "unbiased": False, "per_class": True, "map_images": 500, "null_splits": 8,
        "images": "reconstructions",
    },
    "GenerationBalanceMonitor": {
        "classifier": "classify", "space": "features", "images": "samples", "num_classes": 7,
    },
    "KStarMonitor": {"features": "encoder.3", "images": "generated", "distance": "cosine", "max_rows": 100},
    "LatentRegionsMonitor": {"components": 4, "num_points": 50, "max_components": 5, "max_rows": 300},
    "ManifoldEntropyMonitor": {
        "num_latents": 8, "log_volume": "log_volume", "max_dims": 16, "latent_scale": 2.0, "data_scale": 0.5,
        "mode": "forward",
    },
    "MemorizationMonitor": {"ratio": 0.4, "max_side": 8},
    "PosteriorKLMonitor": {"posterior": "encode", "spread": "std", "threshold": 0.1, "patience": 3},
    "RegionalPrimitivesMonitor": {
        "split": "decoder.3", "regions": "grid", "num_regions": 4, "max_regions": 3, "num_images": 1, "penalty": 0.2,
        "max_steps": 5, "batch_size": 8, "max_seconds": 5.0,
    },
    "RoundTripMonitor": {"log_det": "log_volume", "num_regions": 4, "tolerance": 0.1, "patience": 3},
    "TimestepLossMonitor": {"loss": "denoising_loss", "num_bands": 4},
    "TrainingDataMonitor": {"rows": 16},
}  # fmt: skip


def configured(name: str, arguments: dict[str, Any]) -> Any:
    """Returns the callback that a configuration describes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    config = parser.parse_object({"callback": {"class_path": f"lightning_gendiag.{name}", "init_args": arguments}})
    # older versions of jsonargparse call it otherwise
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(config).callback


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_monitor_takes_all_of_its_options(name: str) -> None:
    monitor = configured(name, BASE | OWN[name])
    assert isinstance(monitor, Monitor)
    for argument, value in ({**BASE, **OWN[name]}).items():
        if argument != "adapter":
            assert getattr(monitor, argument) == value, argument
    assert monitor.adapter is not None
    assert (monitor.adapter.sample, monitor.adapter.num_samples) == ("generator", 50)


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_option_is_tested_here(name: str) -> None:
    own = set(inspect.signature(getattr(lightning_gendiag, name).__init__).parameters) - {"self", "kwargs"}
    # maps, networks and callables are given in Python
    assert own - {"regions", "features", "classifier", "every_n_epochs"} <= set(OWN[name])


def test_the_automatic_callback_takes_all_of_its_options() -> None:
    arguments: dict[str, Any] = {
        "action": "warn", "every_n_epochs": 3, "every_n_train_steps": 100, "warmup_epochs": 2, "num_samples": 256,
        "num_reference": 128, "sample": "generator", "encode": "encode", "decode": "decode", "latent_dim": 8,
        "conditional": True, "weights": "raw", "seed": 3, "num_regions": 4, "skip": ["k_star"], "max_overhead": None,
        "log_images": False, "on_error": "raise",
    }  # fmt: skip
    diagnostics = configured("GenerativeDiagnostics", arguments)
    for argument, value in arguments.items():
        assert getattr(diagnostics, argument) == (tuple(value) if argument == "skip" else value), argument
    monitor = diagnostics.monitors["cms"]
    assert (monitor.every_n_epochs, monitor.num_regions, monitor.adapter.num_samples) == (3, 4, 256)
    assert diagnostics.monitors["latent_regions"].every_n_epochs == 15
    assert "k_star" not in diagnostics.monitors


def test_the_stopper_takes_all_of_its_options() -> None:
    stopping = configured(
        "CollapseStopping", {"action": "warn", "false_alarm_rate": 1e-4, "warmup_evaluations": 8, "patience": 2}
    )
    assert repr(stopping) == (
        "CollapseStopping(action='warn', false_alarm_rate=0.0001, warmup_evaluations=8, patience=2)"
    )
