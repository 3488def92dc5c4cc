"""Samplers that make as many samples of each class, and so only multiples of the number of classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import GenerativeDiagnostics, ModelAdapter
from lightning_gendiag.model.view import ModelView
from tests.helpers.running import attached, trainer

pytestmark = pytest.mark.filterwarnings("ignore:generated images span")

IMAGES, LABELS = digits(8)
IMAGES, LABELS = IMAGES[:96], LABELS[:96]
NAME = "self.sample(n) for multiples of the number of classes"


class InTurn(LightningModule):
    """Draws all classes in turn; the value of its images is their class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (batch[0].mean() - self.weight).square()

    def classes(self, n: int) -> Tensor:
        return torch.arange(10).repeat(n // 10)

    def sample(self, n: int) -> Tensor:
        return torch.zeros(n, 1, 8, 8) + self.classes(n).view(-1, 1, 1, 1) + self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Sorted(InTurn):
    def classes(self, n: int) -> Tensor:
        return torch.arange(10).repeat_interleave(n // 10)


class InATuple(InTurn):
    def sample(self, n: int) -> Any:
        return super().sample(n), self.classes(n)


class OneRound(InTurn):
    """Always returns one sample of each class."""

    def sample(self, n: int) -> Tensor:
        return super().sample(10)


class Pairs(InTurn):
    """Works as it is."""

    def sample(self, n: int) -> Tensor:
        return torch.zeros(n, 1, 8, 8) + self.weight


def view_of(module: LightningModule, *data: Tensor) -> ModelView:
    return attached(module, ModelAdapter(reference=data if len(data) > 1 else data[0]))


@pytest.mark.parametrize("make", [InTurn, Sorted, InATuple])
@pytest.mark.parametrize("n", [2, 12, 40])
def test_samples_are_evenly_spaced_among_those_of_all_classes(make: Any, n: int) -> None:
    way = view_of(make(), IMAGES, LABELS).parts.way("sample")
    assert way.name == NAME
    output = way.call(n)
    images = output[0] if isinstance(output, tuple) else output
    assert len(images) == n
    counts = images[:, 0, 0, 0].round().long().bincount(minlength=10)
    assert counts.max() <= -(-n // 10) + 1


def test_what_works_is_called_as_before() -> None:
    assert view_of(Pairs(), IMAGES, LABELS).parts.way("sample").name == "self.sample(n)"


@pytest.mark.parametrize(("make", "labels"), [(OneRound, LABELS), (InTurn, 20 * LABELS), (InTurn, None)])
def test_the_message_of_a_failure_is_no_longer(make: Any, labels: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"self\.sample\(n\) fails") as error:
        view_of(make(), IMAGES, *(() if labels is None else (labels,)))
    assert "multiples" not in str(error.value)


def test_the_number_of_classes_is_that_of_the_first_batch_at_first() -> None:
    diagnostics = GenerativeDiagnostics("warn", max_overhead=None, num_samples=32, log_images=False)
    trainer(diagnostics, max_epochs=2).fit(InTurn(), DataLoader(TensorDataset(IMAGES, LABELS), 48))
    assert "cms" in diagnostics.attached
