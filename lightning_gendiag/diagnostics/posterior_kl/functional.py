"""KL divergence of a Gaussian posterior from its prior, by dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable

ACTIVE = 0.01
"""Variance of a dimension's posterior mean over the data above which it counts as active, as in the source."""

MAX_DIMENSION_TAGS = 20
"""Largest number of dimensions for which each dimension has a scalar."""


@loggable
class PosteriorKLResult(NamedTuple):
    """KL divergences of a Gaussian posterior, in nats, and the moments that they depend on."""

    per_dimension: Tensor
    """(L,) mean over the data of KL(q(z_i | x) | N(0, 1)), 0 or more."""
    variance_of_mean: Tensor
    """(L,) variance of the posterior's mean over the data; 0 where the dimension does not depend on the image."""
    aggregate_mean: Tensor
    """(L,) mean of the aggregate posterior, 0 where it matches the prior."""
    aggregate_variance: Tensor
    """(L,) variance of the aggregate posterior, 1 where it matches the prior."""
    aggregate_kl: Tensor
    """() KL divergence from the prior of the Gaussian with the moments of the aggregate posterior, a lower bound of that of
    the aggregate posterior itself."""
    invalid: Tensor
    """() fraction of the rows that contain nan or inf and are left out."""
    threshold: Tensor
    """() value of ``variance_of_mean`` above which a dimension is active."""
    per_channel: Tensor = torch.empty(0)
    """(C,) divergences of the channels of spatial latents, summed over positions; (0,) where none are told apart."""

    @property
    def total(self) -> Tensor:
        """() KL divergence of all dimensions together."""
        return self.per_dimension.sum()

    @property
    def components(self) -> tuple[str, Tensor]:
        """Kind and divergences of what is watched: the channels where they are told apart, else the dimensions."""
        return ("channel", self.per_channel) if len(self.per_channel) else ("dimension", self.per_dimension)

    @property
    def active(self) -> Tensor:
        """(L,) booleans, true for active dimensions."""
        return self.variance_of_mean > self.threshold

    @property
    def active_units(self) -> Tensor:
        """() number of active dimensions."""
        return self.active.sum()

    @property
    def dead_share(self) -> Tensor:
        """() fraction of the dimensions that are not active, 0 to 1."""
        return 1 - self.active.double().mean()

    @property
    def information(self) -> Tensor:
        """() upper bound of the mutual information of image and latent: the total minus the aggregate KL, at least 0."""
        return (self.total - self.aggregate_kl).clamp(min=0)

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all dimensions together and, for up to 20 dimensions or channels, of each, of shape ()."""
        values = {
            "total": self.total,
            "active_units": self.active_units.double(),
            "dead_share": self.dead_share,
            "aggregate_kl": self.aggregate_kl,
            "information": self.information,
            "highest": self.per_dimension.max(),
            "lowest": self.per_dimension.min(),
            "invalid": self.invalid,
        }
        if len(self.per_dimension) <= MAX_DIMENSION_TAGS:
            values |= {f"dimension_{i}": value for i, value in enumerate(self.per_dimension)}
        if len(self.per_channel) <= MAX_DIMENSION_TAGS:
            values |= {f"channel_{c}": value for c, value in enumerate(self.per_channel)}
        return values


def posterior_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Computes KL(N(mean, variance) | N(0, 1)) of each element, in nats.

    The divergence is ``(mean^2 + variance - 1 - log variance) / 2``, computed in float64.

    Args:
        mean: (...) means.
        log_variance: (...) natural logarithms of the variances, of the same shape.

    Returns:
        (...) divergences in float64, 0 or more.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> posterior_kl(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor([0., 2.], dtype=torch.float64)
    """
    if mean.shape != log_variance.shape:
        raise ValueError(
            f"log_variance must have the shape of mean, {tuple(mean.shape)}, got {tuple(log_variance.shape)}. "
            "To fix this, pass one log variance per mean."
        )
    m, v = mean.double(), log_variance.double()
    # expm1 keeps the digits of posteriors that are close to the prior
    return 0.5 * (m.square() + torch.expm1(v) - v)
