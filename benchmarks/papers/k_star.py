r"""Kotyan, Chen, Vargas, *k\* distribution of image encoders*: encoders that learn, and encoders that are made robust."""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.papers.data import Split, split_digits
from benchmarks.papers.study import Finding, Part, holds
from lightning_gendiag import k_star

HELD_OUT = 1000
"""Number of digits of which k* is computed; the other 4,000 are trained on."""


class Classifier(nn.Module):
    """Two convolutions and two linear layers; features are the last layer but one.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * width, 32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, 10)."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


def attacked(model: nn.Module, images: Tensor, labels: Tensor, size: float, steps: int) -> Tensor:
    """Returns images that are changed by at most a size in each pixel, so that the loss grows (projected gradient)."""
    changed = images.clone()
    for _ in range(steps):
        changed.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(changed), labels), changed)
        with torch.no_grad():
            changed = changed + 1.5 * size / steps * gradient.sign()
            changed = (images + (changed - images).clamp(-size, size)).clamp(-1, 1)
    return changed.detach()


def trained_on(
    data: Split, epochs: int, seed: int, attack: float = 0.0, after: Callable[[nn.Module, int], None] | None = None
) -> Classifier:
    """Trains a classifier, on attacked images if a size is given, and calls ``after`` before training and after each epoch."""
    torch.manual_seed(seed)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    images, labels = data[:2]
    for epoch in range(epochs + 1):
        if after:
            after(model, epoch)
        if epoch == epochs:
            break
        for rows in torch.randperm(len(images)).split(64):
            x = attacked(model, images[rows], labels[rows], attack, 3) if attack else images[rows]
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[rows]).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images whose class is right."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def described(model: Classifier, data: Split) -> list[Any]:
    """Returns accuracy, mean k*, both skewness coefficients and the patterns, of held-out images."""
    images, labels = data[2:]
    with torch.no_grad():
        r = k_star(model.encoder(images), labels)
    counts = ", ".join(str(r.pattern.count(word)) for word in ("fractured", "overlapped", "clustered"))
    return [
        accuracy(model, images, labels),
        float(r.values.mean()),
        float(r.true_skewness),
        float(r.approximate_skewness),
        counts,
    ]


MEASURES = ["accuracy", "mean k*", "true skewness", "approximate skewness", "fractured, overlapped, clustered"]


def learning(seed: int) -> Part:
    """An encoder while it learns."""
    data = split_digits(HELD_OUT, seed)
    rows: list[list[Any]] = []

    def look(model: nn.Module, epoch: int) -> None:
        assert isinstance(model, Classifier)
        if epoch in (0, 1, 2, 4, 8):
            rows.append([epoch, *described(model, data)])

    trained_on(data, 8, seed, after=look)
    accuracies, skewness = [row[1] for row in rows], [row[4] for row in rows]
    fractured = [int(row[5].split(",")[0]) for row in rows]
    rank = float(spearmanr(accuracies, skewness).statistic)
    findings = [
        Finding(
            "as models generalise better, concepts fracture less",
            f"{fractured[0]} of 10 classes are fractured before training and {fractured[-1]} after it, at "
            f"accuracies of {accuracies[0]:.0%} and {accuracies[-1]:.0%}",
            holds(fractured[-1] < fractured[0]),
        ),
        Finding(
            "a lower approximate skewness coefficient goes with a better accuracy",
            f"their rank correlation over the epochs is {rank:.2f}; the coefficient falls from "
            f"{skewness[0]:.2f} to {skewness[-1]:.2f}",
            holds(rank < -0.7, skewness[-1] < skewness[0]),
        ),
    ]
    return Part(["epochs", *MEASURES], rows, findings)


SIZES = (0.0, 0.1, 0.3)


def robust(seed: int) -> Part:
    """Encoders that are trained on attacked images."""
    data = split_digits(HELD_OUT, seed)
    rows: list[list[Any]] = []
    for size in SIZES:
        model = trained_on(data, 4, seed, size)
        changed = attacked(model, data[2], data[3], 0.2, 5)
        rows.append([size, accuracy(model, changed, data[3]), *described(model, data)])
    robustness, skewness = [row[1] for row in rows], [row[5] for row in rows]
    rank = float(spearmanr(robustness, skewness).statistic)
    findings = [
        Finding(
            "as models become more robust, they cluster concepts better",
            f"the rank correlation of robust accuracy and approximate skewness is {rank:.2f}: robust accuracy "
            f"rises from {robustness[0]:.0%} to "
            f"{max(robustness):.0%}, and skewness goes from {skewness[0]:.2f} to "
            f"{skewness[robustness.index(max(robustness))]:.2f}",
            holds(rank < 0, rank < -0.7),
        )
    ]
    return Part(["size of attacks in training", "accuracy on attacked images", *MEASURES], rows, findings)


PARTS = {"learning": learning, "robust": robust}
