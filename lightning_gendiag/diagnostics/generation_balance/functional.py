"""Shares of classes, corrected for the errors of a classifier, with their confidence intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gendiag.functional.intervals import binomial_interval, normal_quantile
from lightning_gendiag.functional.results import MAX_CLASS_TAGS, loggable

FACTOR = 2.0
"""A class is dropped where its share is surely smaller than the real one by this factor, and dominates where larger."""

CONFIDENCE = 0.999
"""Default confidence of all statements about classes together."""

COVERED = 0.1
"""A class counts as covered where its share is at least this fraction of the real one."""


LEAST_SINGULAR = 1e-4
"""Smaller singular values of the error rates stand for classes that cannot be told apart."""

MAX_STEPS = 1000
"""Largest number of steps of the iteration that corrects shares."""

MAX_CLASSES = 1000
"""Largest number of classes that are monitored: memory grows with its square, and the time of a result with its cube."""

NO_SHARE = 1e-6
"""Smaller corrected shares count as 0, which the iteration approaches and does not reach."""


@loggable
class GenerationBalanceResult(NamedTuple):
    """How often each class is generated compared with real images, and how well."""

    real_count: Tensor
    """(K,) number of real images of each class."""
    generated_count: Tensor
    """(K,) number of generated images that the classifier assigns to each class."""
    generated_share: Tensor
    """(K,) shares of the classes among generated images, corrected for the errors of the classifier, adding to one."""
    real_interval: Tensor
    """(K, 2) exact binomial confidence bounds of the real shares."""
    interval: Tensor
    """(K, 2) confidence bounds of the corrected shares; they include the errors of the classifier."""
    classifier_error: Tensor
    """(K,) standard error that the classifier alone adds to the share of each class among as many images as its errors
    were measured on, with classes as frequent as among real images; 0 where its errors were not measured, and inf for a
    class to which it assigns images of other classes no less often than its own."""
    fid: Tensor
    """(K,) Fréchet distance of real and generated features within the class; nan with fewer than two of either."""
    invalid: Tensor
    """() fraction of the generated images that are not finite, or whose features are not, and that are left out."""
    accuracy: Tensor
    """() accuracy of the classifier on real images, 0 to 1; nan where it is not known."""
    classes: Tensor
    """(K,) numbers of the classes, ascending."""

    @property
    def real_share(self) -> Tensor:
        """(K,) shares of the classes among real images, adding to one."""
        return self.real_count / self.real_count.sum()

    @property
    def assigned_share(self) -> Tensor:
        """(K,) shares of the generated images that the classifier assigns to each class, without correction."""
        return self.generated_count / self.generated_count.sum()

    @property
    def undetermined(self) -> Tensor:
        """(K,) booleans, true where the classifier is too often wrong to tell a class from half of it."""
        return self.classifier_error * FACTOR > self.real_share

    @property
    def imbalance(self) -> Tensor:
        """() total variation distance of the shares, 0 to 1: the fraction of images that would have to change class.

        Classes that the classifier cannot determine count together as one; nan where it can determine none.
        """
        change, unknown = self.generated_share - self.real_share, self.undetermined
        distance = (change[~unknown].abs().sum() + change[unknown].sum().abs()) / 2
        return torch.full_like(distance, math.nan) if unknown.all() else distance

    @property
    def divergence(self) -> Tensor:
        """() KL(generated | real) of the shares in nats; inf where a class is generated that has no real images.

        Classes that the classifier cannot determine count together as one; nan where it can determine none.
        """
        unknown = self.undetermined
        g, r = (torch.cat([s[~unknown], s[unknown].sum()[None]]) for s in (self.generated_share, self.real_share))
        divergence = torch.where(g > 0, g * (g / r).log(), g).sum()
        return torch.full_like(divergence, math.nan) if unknown.all() else divergence

    @property
    def dropped(self) -> Tensor:
        """(K,) booleans, true where the class is surely less than half as frequent as among real images."""
        return (self.interval[:, 1] * FACTOR < self.real_interval[:, 0]) & ~self.undetermined

    @property
    def dominating(self) -> Tensor:
        """(K,) booleans, true where the class is surely more than twice as frequent as among real images."""
        return (self.interval[:, 0] > self.real_interval[:, 1] * FACTOR) & ~self.undetermined

    @property
    def coverage(self) -> Tensor:
        """() fraction of the real classes that are generated with at least a tenth of their real share.

        Classes that the classifier cannot determine are left out.
        """
        occurs = (self.real_count > 0) & ~self.undetermined
        return (self.generated_share[occurs] >= COVERED * self.real_share[occurs]).double().mean()

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all classes together and, for up to 20 classes, of each class, each of shape ()."""
        known = self.fid[~self.fid.isnan()]
        values = {
            "imbalance": self.imbalance,
            "divergence": self.divergence,
            "dropped": self.dropped.sum().double(),
            "dominating": self.dominating.sum().double(),
            "undetermined": (self.undetermined & (self.real_count > 0)).sum().double(),
            "coverage": self.coverage,
            "invalid": self.invalid,
        }
        if len(known):
            values |= {"fid_mean": known.mean(), "fid_worst": known.max()}
        if not self.accuracy.isnan():
            values["accuracy"] = self.accuracy
        if len(self.fid) <= MAX_CLASS_TAGS:
            numbers = self.classes.tolist()
            values |= {f"class_{c}": share for c, share in zip(numbers, self.generated_share, strict=True)}
            if len(known):
                values |= {f"fid_class_{c}": value for c, value in zip(numbers, self.fid, strict=True)}
        return values


def error_rates(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how often each class is assigned to each class, and the number of images from which this is known.

    One image is added to each class, which is assigned correctly as often as images of all classes are, so that a class
    with few or no images has no rate of exactly 0 or 1.

    Args:
        confusion: (K, K) number of real images by their true class (rows) and the class they were assigned to (columns).

    Returns:
        (K, K) rates, of which each row adds to one, and (K,) numbers of images, both in float64.

    Example:
        >>> error_rates(torch.tensor([[9.0, 1.0], [0.0, 10.0]]))[0]
        tensor([[0.9048, 0.0952],
                [0.0043, 0.9957]], dtype=torch.float64)
    """
    counts = confusion.double()
    number, k = counts.sum(1) + 1, len(counts)
    accuracy = (counts.trace() + 1) / (counts.sum() + 1)
    typical = torch.full_like(counts, float(1 - accuracy) / max(k - 1, 1)).fill_diagonal_(float(accuracy))
    return (counts + typical) / number[:, None], number


def corrected_shares(assigned: Tensor, rates: Tensor, start: Tensor | None = None) -> Tensor:
    """Computes the most likely shares of the true classes, given the shares that a classifier assigned.

    The assigned shares are expected to be q = C^T p. Of all shares p of at least 0 that add to one, those are returned that
    maximise the likelihood of the assigned ones, by expectation maximisation. Where classes cannot be told apart, their
    shares stay in proportion as at the start.

    Source: Saerens, Latinne and Decaestecker, *Adjusting the outputs of a classifier to new a priori probabilities*, 2002,
    for a classifier that returns classes.

    Args:
        assigned: (K,) shares or counts of the classes that the classifier assigned.
        rates: (K, K) probability C with which a class (rows) is assigned to each class (columns).
        start: (K,) shares to start from; by default all equal.

    Returns:
        (K,) shares in float64; nan where nothing was assigned.

    Example:
        >>> rates = torch.tensor([[0.8, 0.2], [0.1, 0.9]])
        >>> corrected_shares(torch.tensor([0.45, 0.55]), rates)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    # few numbers, in many small steps
    q, c = assigned.double().cpu().numpy(), rates.double().cpu().numpy()
    p = np.full(len(q), 1.0) if start is None else start.double().cpu().numpy() + 1e-6
    with np.errstate(invalid="ignore"):
        q, p = q / q.sum(), p / p.sum()
        for _ in range(MAX_STEPS):
            after = p * (c @ (q / np.maximum(p @ c, 1e-300)))
            change, p = np.abs(after - p).sum(), after
            if not change > 1e-10:
                break
        p = np.where(p < NO_SHARE, 0.0, p)
        return torch.from_numpy(p / p.sum()).to(assigned.device)


def share_variance(shares: Tensor, rates: Tensor, number: Tensor, samples: float) -> Tensor:
    """Computes the variance of corrected shares by the delta method.

    With A the inverse of C^T, it is the diagonal of A (V(q) / samples + sum_i p_i^2 V(C_i) / n_i) A^T, where V(q) is
    diag(q) - q q^T: the first term is the sampling of the generated images, the second one that of the real images from
    which the rates are known.

    Args:
        shares: (K,) shares p of the true classes.
        rates: (K, K) rates C, see :func:`error_rates`.
        number: (K,) number of images n_i from which each row of C is known.
        samples: number of generated images.

    Returns:
        (K,) variances in float64; very large where C has no inverse.
    """
    p, c = shares.double(), rates.double()

    def spread(q: Tensor) -> Tensor:
        return q.diag() - q[:, None] * q

    weight = p.square() / number
    rows = (weight[:, None] * c).sum(0).diag() - (c * weight[:, None]).T @ c
    inverse = _inverse(c.T)
    variance: Tensor = ((inverse @ (spread(c.T @ p) / samples + rows)) * inverse).sum(1)
    return variance.clamp(min=0)


def _inverse(a: Tensor) -> Tensor:
    """Returns the inverse of a matrix (K, K), in which no singular value counts as smaller than ``LEAST_SINGULAR``."""
    inverse: Tensor
    inverse, failed = torch.linalg.inv_ex(a)
    # the Frobenius norm bounds the inverse of the smallest singular value, whose decomposition takes six times as long
    if not failed and float(inverse.norm()) * LEAST_SINGULAR <= 1:
        return inverse
    u, s, vh = torch.linalg.svd(a)
    inverse = vh.T @ (u / s.clamp(min=LEAST_SINGULAR)).T
    return inverse


def classifier_variance(shares: Tensor, rates: Tensor, number: Tensor, samples: float) -> Tensor:
    """Returns what the errors of a classifier add to the binomial variance of shares: (K,), at least 0."""
    p = shares.double()
    return (share_variance(p, rates, number, samples) - p * (1 - p) / samples).clamp(min=0)


def share_error(shares: Tensor, confusion: Tensor) -> Tensor:
    """Computes the standard error that a classifier adds to shares among as many images as its errors were measured on.

    Args:
        shares: (K,) shares of the true classes.
        confusion: (K, K), see :func:`error_rates`.

    Returns:
        (K,) standard errors in float64; inf for a class to which images of other classes are assigned no less often than its
        own. Cross-validation of a classifier that has learned nothing can be wrong more often than by chance, which would
        otherwise count as knowledge.
    """
    rates, number = error_rates(confusion)
    error = classifier_variance(shares, rates, number, max(float(confusion.sum()), 1.0)).sqrt()
    return error.masked_fill(_is_confused(rates), math.inf)


def _is_confused(rates: Tensor) -> Tensor:
    """(K,) whether images of other classes are assigned to a class no less often than its own."""
    own = rates.diag()
    is_clear: Tensor = own > (rates.sum(0) - own) / (len(rates) - 1)
    return ~is_clear


def corrected_interval(counts: Tensor, shares: Tensor, confusion: Tensor, tail: float) -> Tensor:
    """Computes confidence bounds of corrected shares.

    The exact binomial interval of the sampled images and the normal one of the classifier's errors are independent, and
    their distances from the share are added as squares. With a classifier without errors, it is the exact binomial one.

    Source: Zou and Donner, *Construction of confidence limits about effect measures*, 2008.

    Args:
        counts: (K,) number of generated images that were assigned to each class.
        shares: (K,) corrected shares.
        confusion: (K, K), see :func:`error_rates`.
        tail: probability with which each bound is wrong.

    Returns:
        (K, 2) lower and upper bounds in float64.
    """
    n, z = float(counts.sum()), normal_quantile(tail)
    if n == 0:
        return torch.stack([torch.zeros_like(shares), torch.ones_like(shares)], 1)
    exact = binomial_interval(shares * n, tail)
    # counts of errors are skewed: z^2 / 4 more of them, by class, make their standard error that of Wilson's bounds
    rates, number = error_rates(confusion.double() + z**2 / 4 / len(shares))
    # a share of 0 has errors too: those of the classes that are mistaken for it
    smoothed = (shares * n + z**2 / len(shares)) / (n + z**2)
    added = z * classifier_variance(smoothed, rates, number, n).sqrt()
    low = shares - ((shares - exact[:, 0]).square() + added.square()).sqrt()
    high = shares + ((exact[:, 1] - shares).square() + added.square()).sqrt()
    unknown = _is_confused(error_rates(confusion)[0])
    return torch.stack([low.clamp(min=0).masked_fill(unknown, 0), high.clamp(max=1).masked_fill(unknown, 1)], 1)
