"""Every monitor runs in every precision of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from example_models.vae import VAE
from lightning_gendiag import (
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    KStarMonitor,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    ModelAdapter,
    Monitor,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
)
from lightning_gendiag.functional.arrays import canonical_order
from lightning_gendiag.model.features import FeatureExtractor
from tests.helpers.running import batches, trainer
from tests.helpers.versions import needs_bfloat16

MONITORS = {
    "cms": lambda: CosineMeanSimilarityMonitor(num_regions=2, null_splits=4),
    "generation_balance": lambda: GenerationBalanceMonitor(),
    "classifier": lambda: GenerationBalanceMonitor(lambda module, images: module.encode(images)[0]),
    "k_star": lambda: KStarMonitor(),
    "latent_regions": lambda: LatentRegionsMonitor(num_points=20),
    "manifold_entropy": lambda: ManifoldEntropyMonitor(num_latents=4),
    "posterior_kl": lambda: PosteriorKLMonitor(),
    "regional_primitives": lambda: RegionalPrimitivesMonitor(
        regions="grid", max_regions=2, num_images=1, every_n_epochs=1
    ),
}


@pytest.mark.filterwarnings("ignore:Of 9 regions, only the 2 that change most")
@pytest.mark.parametrize("precision", [pytest.param("bf16-true", marks=needs_bfloat16), "bf16-mixed", "64-true"])
@pytest.mark.parametrize("make", MONITORS.values(), ids=MONITORS.keys())
def test_every_monitor_runs_in_every_precision(make: type[Monitor[Any, Any]], precision: str) -> None:
    monitor = make()
    monitor.on_error = "raise"
    monitor.adapter = ModelAdapter(num_samples=64, num_reference=64)
    model = VAE(10, width=2)
    trainer(monitor, max_epochs=1, precision=precision).fit(model, batches(32))
    assert monitor.evaluations == 1
    # the weights keep their precision
    expected = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "64-true": torch.float64}[precision]
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.filterwarnings("ignore:Of 9 regions, only the 2 that change most")
@pytest.mark.parametrize("make", MONITORS.values(), ids=MONITORS.keys())
def test_every_monitor_runs_where_torch_makes_float64(make: type[Monitor[Any, Any]]) -> None:
    monitor = make()
    monitor.on_error = "raise"
    monitor.adapter = ModelAdapter(num_samples=64, num_reference=64)
    images, labels = digits(32)
    loader = DataLoader(TensorDataset(images[:64].double(), labels[:64]), batch_size=16)
    trainer(monitor, max_epochs=1).fit(VAE(10, width=2), loader)
    assert monitor.evaluations == 1


def test_what_is_drawn_does_not_depend_on_what_torch_makes_by_default(float64_by_default: None) -> None:
    images = digits(8)[0][:64].float()
    found = FeatureExtractor(images), canonical_order(images)
    torch.set_default_dtype(torch.float32)
    expected = FeatureExtractor(images), canonical_order(images)
    assert found[0].first.dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        a, b = (part if isinstance(part, Tensor) else part(images) for part in (a, b))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
