"""Shares of classes with their confidence intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable

FACTOR = 2.0
"""A class is dropped where its share is surely smaller than the real one by this factor, and dominates where larger."""

CONFIDENCE = 0.999
"""Default confidence of all statements about classes together."""

COVERED = 0.1
"""A class counts as covered where its share is at least this fraction of the real one."""

MAX_CLASS_TAGS = 20
"""Largest number of classes for which each class has scalars."""


@loggable
class GenerationBalanceResult(NamedTuple):
    """How often each class is generated compared with real images, and how well."""

    real_count: Tensor
    """(K,) number of real images of each class."""
    generated_count: Tensor
    """(K,) number of generated images of each class."""
    real_interval: Tensor
    """(K, 2) exact binomial confidence bounds of the real shares."""
    interval: Tensor
    """(K, 2) exact binomial confidence bounds of the generated shares."""
    fid: Tensor
    """(K,) Fréchet distance of real and generated features within the class; nan with fewer than two of either."""
    invalid: Tensor
    """() fraction of the generated images whose features contain nan or inf and that are left out."""
    accuracy: Tensor
    """() accuracy of the classifier on real images, 0 to 1; nan where it is not known."""

    @property
    def real_share(self) -> Tensor:
        """(K,) shares of the classes among real images, adding to one."""
        return self.real_count / self.real_count.sum()

    @property
    def generated_share(self) -> Tensor:
        """(K,) shares of the classes among generated images, adding to one."""
        return self.generated_count / self.generated_count.sum()

    @property
    def imbalance(self) -> Tensor:
        """() total variation distance of the shares, 0 to 1: the fraction of images that would have to change class."""
        return (self.generated_share - self.real_share).abs().sum() / 2

    @property
    def divergence(self) -> Tensor:
        """() KL(generated | real) of the shares in nats; inf where a class is generated that has no real images."""
        g, r = self.generated_share, self.real_share
        return torch.where(g > 0, g * (g / r).log(), g).sum()

    @property
    def dropped(self) -> Tensor:
        """(K,) booleans, true where the class is surely less than half as frequent as among real images."""
        return self.interval[:, 1] * FACTOR < self.real_interval[:, 0]

    @property
    def dominating(self) -> Tensor:
        """(K,) booleans, true where the class is surely more than twice as frequent as among real images."""
        return self.interval[:, 0] > self.real_interval[:, 1] * FACTOR

    @property
    def coverage(self) -> Tensor:
        """() fraction of the real classes that are generated with at least a tenth of their real share."""
        occurs = self.real_count > 0
        return (self.generated_share[occurs] >= COVERED * self.real_share[occurs]).double().mean()

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all classes together and, for up to 20 classes, of each class, each of shape ()."""
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


def binomial_interval(counts: Tensor, tail: float) -> Tensor:
    """Computes exact binomial confidence bounds of shares.

    Source: Clopper and Pearson, 1934.

    Args:
        counts: (K,) number of items of each class.
        tail: probability with which each bound is wrong, at most.

    Returns:
        (K, 2) lower and upper bounds in float64.

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
