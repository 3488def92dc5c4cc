"""Models that are always trained with the classes of their data, and samplers that may leave these out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import CosineMeanSimilarityMonitor
from tests.helpers.running import state_after_training, trainer

pytestmark = pytest.mark.filterwarnings("ignore:generated images span")

IMAGES, LABELS = digits(8)
IMAGES, LABELS = IMAGES[:96], LABELS[:96]
NULL = 10


class Embedder(nn.Module):
    """Embeds classes, and drops some of them while it trains."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop, self.table = drop, nn.Embedding(NULL + 1, 64)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.drop:
            y = torch.where(torch.rand(len(y)) < self.drop, NULL, y)
        return self.table(y)


class Network(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.embedder, self.norm, self.last = Embedder(drop), nn.BatchNorm1d(64), nn.Linear(64, 64)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        h = x.flatten(1) / (1 + sigma[:, None])
        if class_labels is not None:
            h = h + (
                self.embedder(class_labels)
                if class_labels.ndim == 1
                else class_labels @ self.embedder.table.weight[:NULL]
            )
        return self.last(self.norm(h)).view_as(x)


class Denoising(LightningModule):
    """Adds noise, and gives its network classes in some way."""

    drop = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.net = Network(self.drop)

    def given(self, y: Tensor) -> Tensor | None:
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        sigma = torch.rand(len(x)) + 0.1
        noisy = x + sigma[:, None, None, None] * torch.randn_like(x)
        return F.mse_loss(self.net(noisy, sigma, self.given(y)), x)

    def sample(self, n: int, class_labels: Tensor | None = None) -> Tensor:
        return self.net(torch.randn(n, 1, 8, 8), torch.ones(n), class_labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class OneHot(Denoising):
    """Classes are joined with data as one-hot rows, which the sampler takes as a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64 + 10, 4), nn.Linear(4 + 10, 64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        c = F.one_hot(y, 10).float()
        z = self.encoder(torch.cat([x.flatten(1), c], 1))
        return F.mse_loss(self.decoder(torch.cat([z + torch.randn_like(z), c], 1)), x.flatten(1))

    def sample(self, n: int, cond: Tensor | None = None) -> Tensor:  # type: ignore[override]
        cond = torch.zeros(n, 10) if cond is None else cond
        return self.decoder(torch.cat([torch.randn(n, 4), cond], 1)).view(n, 1, 8, 8)


class Required(Denoising):
    def sample(self, n: int, cond: Tensor | None) -> Tensor:  # type: ignore[override]
        return super().sample(n, cond)


class DropsRows(Denoising):
    def given(self, y: Tensor) -> Tensor | None:
        return torch.where(torch.rand(len(y)) < 0.1, NULL, y)


class DropsBatches(Denoising):
    def given(self, y: Tensor) -> Tensor | None:
        return None if random.random() < 0.2 else y


class DropsInside(Denoising):
    drop = 0.1


class AlsoWithout(Denoising):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return super().training_step(batch, batch_idx) + F.mse_loss(self.net(x, torch.ones(len(x))), x)


class Without(Denoising):
    """Classes are known to a loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()

    def given(self, y: Tensor) -> Tensor | None:
        self.criterion(torch.zeros(len(y), 10), y)
        return None


class Fails(Denoising):
    """A sampler that takes no classes of this kind works without, as before."""

    def sample(self, n: int, cond: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().sample(n) if cond is None else super().sample(n) + cond["text"]


def sampler_of(module: LightningModule, *data: Tensor) -> str:
    monitor = CosineMeanSimilarityMonitor(on_error="raise", log_images=False)
    trainer(monitor, max_epochs=1).fit(module, DataLoader(TensorDataset(*data), 32))
    return monitor.view.parts.way("sample").name


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Denoising, "self.sample(n, labels)"),
        (OneHot, "self.sample(n, labels) as one-hot rows"),
        (Required, "self.sample(n, labels)"),
    ],
)
def test_classes_that_training_always_gives_are_given_to_samplers(make: Any, name: str) -> None:
    assert sampler_of(make(), IMAGES, LABELS) == name


@pytest.mark.parametrize("make", [DropsRows, DropsBatches, DropsInside, AlsoWithout, Without, Fails])
def test_where_training_drops_classes_samplers_need_none(make: Any) -> None:
    assert sampler_of(make(), IMAGES, LABELS) == "self.sample(n)"


def test_of_batches_with_one_class_nothing_is_known() -> None:
    assert sampler_of(Denoising(), IMAGES, torch.zeros_like(LABELS)) == "self.sample(n)"


@pytest.mark.parametrize("make", [Denoising, DropsInside])
def test_training_that_is_looked_at_stays_the_same(make: Any) -> None:
    without, beside = (
        state_after_training(*callbacks, module=make)
        for callbacks in ((), (CosineMeanSimilarityMonitor(on_error="raise", log_images=False),))
    )
    for a, b in zip(without, beside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
