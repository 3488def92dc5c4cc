"""The host does not wait for the device inside loops over blocks, chunks, classes, regions or dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from lightning_gendiag import (
    KStar,
    PosteriorKL,
    RegionalPrimitives,
    RegionMap,
    decoder_gram,
    decompose,
    k_star,
    minimal_features,
)
from lightning_gendiag.diagnostics.k_star import functional
from lightning_gendiag.diagnostics.regional_primitives.functional import Decomposition, importance
from lightning_gendiag.functional.arrays import median
from tests.helpers.waits import waits


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda: normal(3, 3).sum().item(), 1),
        (lambda: normal(9)[normal(9) > 0], 1),
        (lambda: bool((normal(9) > 0).any()), 1),
        (lambda: normal(9).where(normal(9) > 0, 0.0)[torch.arange(3)], 0),
    ],
)
def test_the_helper_counts_what_reads_values(call: Callable[[], object], number: int) -> None:
    assert waits(call) == number


def test_k_star_waits_no_more_often_for_more_classes_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, labels = normal(400, 8), torch.arange(400)
    few = waits(partial(k_star, latents, labels % 2))
    monkeypatch.setattr(functional, "CELLS", 400 * 7)
    assert waits(partial(k_star, latents, labels % 40)) == few


def test_metrics_add_batches_without_a_wait() -> None:
    divergence, kept, primitives = PosteriorKL(4), KStar(), RegionalPrimitives(2)
    one = Decomposition(normal(4), normal(4, 2), normal(4), normal(2), normal(2), torch.ones(()))
    assert waits(lambda: divergence.update(normal(9, 4), normal(9, 4))) == 0
    assert waits(lambda: kept.update(normal(9, 4), torch.arange(9))) == 0
    assert waits(lambda: primitives.update(*one)) == 0


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_gram_matrices_wait_for_no_dimension(mode: Literal["forward", "reverse"]) -> None:
    counts = []
    for length in (2, 20):
        decode = nn.Sequential(nn.Linear(length, 6), nn.Tanh())
        counts.append(waits(partial(decoder_gram, decode, normal(3, length), mode=mode)))
    assert counts[0] == counts[1]


def test_a_median_is_computed_without_a_wait() -> None:
    assert waits(lambda: median(normal(8))) == 0
    assert median(torch.tensor([5.0, 1.0, 1.0, 7.0])) == 3
    assert median(torch.ones(4)) == 1


def test_components_wait_for_no_region() -> None:
    counts = []
    for number in (2, 4):
        regions, feature = RegionMap(torch.arange(number)[None]).labels, normal(number)

        def tail(features: Tensor, number: int = number) -> Tensor:
            return features.view(-1, 1, 1, number)

        found = minimal_features(tail, feature, torch.zeros(number), regions)
        counts.append(waits(partial(decompose, tail, feature, regions, found)))
        assert waits(partial(importance, tail, feature, torch.zeros(number), regions)) == 1
    assert counts[0] == counts[1]
