"""Shares of classes in real and generated images, and the Fréchet distance within each, in constant memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.functional import frechet_distance

FACTOR = 2.0
"""A class is dropped, or dominates, where its share is surely less than the reference's by this factor, or more."""

CONFIDENCE = 0.999
"""Of all statements about classes together."""

COVERED = 0.1
"""A class counts as covered where its share is at least so much of the reference's."""

MAX_CLASS_TAGS = 20
"""Up to so many classes each has scalars of its own."""


class GenerationBalanceResult(NamedTuple):
    """Which classes are generated too rarely, too often, or badly."""

    real_count: Tensor
    """(K,) real images of each class."""
    generated_count: Tensor
    """(K,) generated images of each class."""
    real_interval: Tensor
    """(K, 2) exact binomial confidence bounds of the real shares."""
    interval: Tensor
    """(K, 2) exact binomial confidence bounds of the generated shares."""
    fid: Tensor
    """(K,) Fréchet distance of real and generated features of the class; nan with fewer than two of either."""
    invalid: Tensor
    """() share of generated images with nan or inf, which are left out."""
    accuracy: Tensor
    """() of the classifier, 0 to 1: nearest neighbours on held-out reference images, the user's own on the reference; nan
    where it is not known."""

    @property
    def real_share(self) -> Tensor:
        """(K,) adding to one."""
        return self.real_count / self.real_count.sum()

    @property
    def generated_share(self) -> Tensor:
        """(K,) adding to one."""
        return self.generated_count / self.generated_count.sum()

    @property
    def imbalance(self) -> Tensor:
        """() total variation distance of the shares: how many images would have to change class, 0 to 1."""
        return (self.generated_share - self.real_share).abs().sum() / 2

    @property
    def divergence(self) -> Tensor:
        """() KL(generated | real) of the shares in nats; inf where a class is generated that is not in the reference."""
        g, r = self.generated_share, self.real_share
        return torch.where(g > 0, g * (g / r).log(), g).sum()

    @property
    def dropped(self) -> Tensor:
        """(K,) bool: surely less than half as often as in the reference."""
        return self.interval[:, 1] * FACTOR < self.real_interval[:, 0]

    @property
    def dominating(self) -> Tensor:
        """(K,) bool: surely more than twice as often as in the reference."""
        return self.interval[:, 0] > self.real_interval[:, 1] * FACTOR

    @property
    def coverage(self) -> Tensor:
        """() share of the reference's classes that are generated with at least a tenth of their share."""
        there = self.real_count > 0
        return (self.generated_share[there] >= COVERED * self.real_share[there]).double().mean()

    def scalars(self) -> dict[str, Tensor]:
        """The whole, and each class where they are few."""
        known = self.fid[~self.fid.isnan()]
        nan = torch.full_like(self.invalid, math.nan)
        values = {
            "imbalance": self.imbalance,
            "divergence": self.divergence,
            "dropped": self.dropped.sum().double(),
            "dominating": self.dominating.sum().double(),
            "coverage": self.coverage,
            "fid_mean": known.mean() if len(known) else nan,
            "fid_worst": known.max() if len(known) else nan,
            "invalid": self.invalid,
        }
        if not self.accuracy.isnan():
            values["accuracy"] = self.accuracy
        if len(self.fid) <= MAX_CLASS_TAGS:
            values |= {f"class_{c}": share for c, share in enumerate(self.generated_share)}
            if len(known):
                values |= {f"fid_class_{c}": value for c, value in enumerate(self.fid)}
        return values


class GenerationBalance(Diagnostic):
    """Shares of classes among real and generated images, and the FID within each class.

    Memory: counts, and with features of length F sums of K F (F + 1) float64 on either side, however many images:
    0.7 MB for 10 classes of 64 features, 670 MB for 10 of 2,048.

    Args:
        num_classes: K.
        confidence: that no class is wrongly named dropped or dominating, over all classes together.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = GenerationBalance(2)
        >>> metric.update(torch.tensor([0, 1]).repeat(50), real=True)
        >>> metric.update(torch.tensor([0, 0]).repeat(50), real=False)
        >>> result = metric.compute()
        >>> float(result.imbalance), result.dropped.tolist()
        (0.5, [False, True])
    """

    higher_is_better = None
    plotted = ("class_", "fid_class_")
    counts: Tensor
    featured: Tensor
    sums: Tensor
    products: Tensor
    left_out: Tensor

    def __init__(self, num_classes: int, *, confidence: float = CONFIDENCE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        if not 0.5 < confidence < 1:
            raise ValueError(f"confidence must be in (0.5, 1), got {confidence}.")
        self.num_classes, self.confidence = num_classes, confidence
        # first axis: generated, real. The features' length is not known yet: sums grow from 1 to it by broadcasting
        for name, shape in (
            ("counts", (2, num_classes)),
            ("featured", (2, num_classes)),
            ("sums", (2, num_classes, 1)),
            ("products", (2, num_classes, 1, 1)),
            ("left_out", (2,)),
        ):
            self.add_state(name, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, real: bool, features: Tensor | None = None) -> None:
        """Add images by their classes.

        Args:
            labels: (N,) integers 0..K-1: true ones of real images, a classifier's of generated ones.
            real: whether the images are real.
            features: (N, F) of the images, for the FID of each class. Rows with nan or inf are left out.
        """
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be (N,) integers, got {labels.dtype} of shape {tuple(labels.shape)}.")
        labels = labels.detach().long()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be 0 to {self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}. "
                "To fix this, pass a larger num_classes, or number the classes from 0."
            )
        side = int(real)
        if features is not None:
            f = self._checked(features, len(labels))
            finite = f.isfinite().all(1)
            labels, f = labels[finite], f[finite]
            self.left_out[side] += (~finite).sum()
            sums = f.new_zeros(2, self.num_classes, f.shape[1])
            products = f.new_zeros(2, self.num_classes, f.shape[1], f.shape[1])
            for c in torch.unique(labels):
                own = f[labels == c]
                sums[side, c], products[side, c] = own.sum(0), own.T @ own
            self.sums, self.products = self.sums + sums, self.products + products
            self.featured[side] += self._counted(labels)
        self.counts[side] += self._counted(labels)

    def _checked(self, features: Tensor, n: int) -> Tensor:
        known = self.sums.shape[2] if float(self.featured.sum()) else None
        if features.ndim != 2 or len(features) != n or known not in (None, features.shape[1]):
            raise ValueError(f"features must be ({n}, {known or 'F'}), got {tuple(features.shape)}.")
        return features.detach().double()

    def _counted(self, labels: Tensor) -> Tensor:
        return torch.bincount(labels, minlength=self.num_classes).double()

    def compute(self) -> GenerationBalanceResult:
        """Of all images together; shares are nan where there are none of one side."""
        # all bounds hold together: two sides of two shares of K classes
        tail = (1 - self.confidence) / (4 * self.num_classes)
        n = self.featured[..., None]
        mean = self.sums / n
        covariance = (self.products - n[..., None] * mean[..., None] * mean[..., None, :]) / (n[..., None] - 1)
        fid = torch.full_like(self.counts[0], math.nan)
        enough = (self.featured >= 2).all(0)
        if enough.any():
            fid[enough] = frechet_distance(
                mean[0, enough], covariance[0, enough], mean[1, enough], covariance[1, enough]
            ).clamp(min=0)
        seen = self.counts[0].sum() + self.left_out[0]
        return GenerationBalanceResult(
            real_count=self.counts[1],
            generated_count=self.counts[0],
            real_interval=binomial_interval(self.counts[1], tail),
            interval=binomial_interval(self.counts[0], tail),
            fid=fid,
            invalid=self.left_out[0] / seen if float(seen) else torch.zeros_like(seen),
            accuracy=torch.full_like(seen, math.nan),
        )


def binomial_interval(counts: Tensor, tail: float) -> Tensor:
    """(K, 2) bounds of shares, each wrong with a chance of at most ``tail``. Clopper and Pearson, 1934.

    Example:
        >>> binomial_interval(torch.tensor([0.0, 100.0]), 0.025)[0]
        tensor([0.0000, 0.0362], dtype=torch.float64)
    """
    from scipy.stats import beta

    k = counts.double().cpu()
    n = k.sum()
    low = torch.from_numpy(beta.ppf(tail, k, n - k + 1)).nan_to_num(0.0)
    high = torch.from_numpy(beta.isf(tail, k + 1, n - k)).nan_to_num(1.0)
    return torch.stack([low, high], 1).to(counts.device)
