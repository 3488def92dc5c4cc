"""How much of data and latents a round trip through a model and its inverse loses, and how a flow changes volumes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable

MAX_TAGS = 20
"""Largest number of regions, or of layers, for which each one has scalars."""

LEAST_VARIANCE = 0.01
"""Variances of regions and of latent dimensions count as at least this part of the mean one, since less is noise."""

VOLUME_TOLERANCE = 1e-3
"""Nats for each dimension by which a reported log-determinant may differ from the Jacobian's. In float32, those of healthy
flows of the tests and benchmarks differ by less than a thousandth of this."""

RESOLVED = 1e7
"""Condition number up to which float32 leaves any digit of an inverse, and the determinant of a Jacobian is known."""

TERMS = ("rows", "invalid", "error", "sum", "square")
"""What is summed for each position: rows that are compared, rows with nan or inf, squared differences, values and squares."""


class Errors(NamedTuple):
    """Differences between values before and after a round trip, by position."""

    mean_square: Tensor
    """(P,) mean squared difference."""
    variance: Tensor
    """(P,) variance of the values before."""
    invalid: Tensor
    """() fraction of the rows with nan or inf, which are left out of all else."""

    @property
    def relative(self) -> Tensor:
        """(P,) root mean squared difference, in standard deviations of the values of all positions."""
        return (self.mean_square / self.variance.mean()).sqrt()

    @property
    def total(self) -> Tensor:
        """() root mean squared difference of all positions, in standard deviations of the values."""
        return (self.mean_square.mean() / self.variance.mean()).sqrt()

    @property
    def unexplained(self) -> Tensor:
        """(P,) fraction of the variance that is lost, 1 where the mean would do as well; of at least 1 % of the mean one."""
        return self.mean_square / self.variance.clamp(min=LEAST_VARIANCE * float(self.variance.mean()))


@loggable
class RoundTripResult(NamedTuple):
    """What a round trip loses, by position of P, region of R, latent dimension of L and layer of K; nan where not measured."""

    data_error: Tensor
    """(P,) root mean squared error of data that are encoded and decoded, in standard deviations of the data."""
    unexplained: Tensor
    """(R,) fraction of the variance of each region that reconstructions lose."""
    held_out_unexplained: Tensor
    """(R,) the same of images that the model was not trained on."""
    latent_error: Tensor
    """(L,) root mean squared error of latents that are decoded and encoded, in standard deviations of the latents."""
    latent_unexplained: Tensor
    """(L,) fraction of the variance of each latent dimension that is lost."""
    latent_share: Tensor
    """(L,) variance of each latent dimension, relative to the mean of all."""
    noise_error: Tensor
    """() as ``data_error``, of noise in the range of the data, in its standard deviations."""
    invalid: Tensor
    """(4,) fraction of the data, held-out data, latents and noise whose round trip has nan or inf."""
    log_det: Tensor
    """(V,) log-determinants that the model reports, in nats."""
    exact_log_det: Tensor
    """(V,) those of the Jacobians, in nats; nan where float32 does not resolve them."""
    condition: Tensor
    """(J,) condition numbers of the Jacobians, 1 or more."""
    dims: Tensor
    """() number of dimensions D of the Jacobians."""
    layer_error: Tensor
    """(K,) as ``data_error``, of what passes each layer, in its standard deviations."""
    layer_invalid: Tensor
    """(K,) fraction of the rows whose round trip through the layer has nan or inf."""
    layer_log_det_error: Tensor
    """(K,) mean absolute difference of the layer's log-determinant from its Jacobian's, in nats for each dimension."""
    layer_condition: Tensor
    """(K,) median condition number of each layer."""
    first_offset: Tensor
    """() ``log_det_offset`` of the first evaluation of a run; nan where it is not known."""
    kept: Tensor
    """(R,) booleans: whether a region was reconstructed at an evaluation before."""
    latents_kept: Tensor
    """(L,) booleans: whether a latent dimension came back at an evaluation before."""

    @property
    def differences(self) -> Tensor:
        """(V,) reported less exact log-determinants, in nats for each dimension."""
        return (self.log_det - self.exact_log_det) / self.dims

    @property
    def log_det_offset(self) -> Tensor:
        """() mean difference of the reported log-determinants from the exact ones, in nats for each dimension."""
        known = self.differences[self.differences.isfinite()]
        return known.mean()

    @property
    def log_det_spread(self) -> Tensor:
        """() root mean squared deviation of the differences from their mean, in nats for each dimension."""
        known = self.differences[self.differences.isfinite()]
        return (known - known.mean()).square().mean().sqrt()

    @property
    def log_det_error(self) -> Tensor:
        """() mean absolute difference, in nats for each dimension."""
        return self.differences[self.differences.isfinite()].abs().mean()

    @property
    def is_volume_wrong(self) -> bool:
        """Whether the reported log-determinants are wrong, other than by what is the same for all images and evaluations.

        Such a constant, as of data that are scaled before the first layer, changes no gradient.
        """
        moved = float((self.log_det_offset - self.first_offset).abs()) > VOLUME_TOLERANCE
        return float(self.log_det_error) > VOLUME_TOLERANCE and (float(self.log_det_spread) > VOLUME_TOLERANCE or moved)

    @property
    def wrong_layers(self) -> list[int]:
        """Numbers of the layers that report another log-determinant than that of their Jacobian."""
        return [k for k, value in enumerate(self.layer_log_det_error.tolist()) if value > VOLUME_TOLERANCE]

    @property
    def has_opposite_sign(self) -> Tensor:
        """() boolean: whether the reported log-determinants are the exact ones with the other sign."""
        known = self.differences.isfinite()
        away = ((self.log_det + self.exact_log_det)[known] / self.dims).abs().mean()
        return away < 0.1 * self.log_det_error

    def worst_positions(self, most: int = 3) -> list[int]:
        """Returns the positions of data with the largest errors, the largest first."""
        return _worst(self.data_error, most)

    def worst_latents(self, most: int = 3) -> list[int]:
        """Returns the latent dimensions with the largest errors, the largest first."""
        return _worst(self.latent_error, most)

    def worst_layer(self) -> int | None:
        """Returns the number of the layer that loses most, where one loses nan or inf the first one; None without layers."""
        if not len(self.layer_error):
            return None
        if (self.layer_invalid > 0).any():
            return int(self.layer_invalid.argmax())
        return int(self.layer_error.nan_to_num(-1.0).argmax())

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of what was measured, of shape ()."""
        values = {
            "data_error": self.data_error.square().mean().sqrt(),
            "invalid": self.invalid.nan_to_num(0.0).max(),
        }
        groups = {"unexplained": self.unexplained, "held_out_unexplained": self.held_out_unexplained}
        for name, regions in groups.items():
            if not regions.isnan().all():
                values[name] = regions.nanmean()
            if not regions.isnan().all() and 1 < len(regions) <= MAX_TAGS:
                values |= {f"{name}_{r}": value for r, value in enumerate(regions)}
        values |= {
            name: value
            for name, value in {
                "latent_error": self.latent_error.square().mean().sqrt(),
                "latent_unexplained": self.latent_unexplained.mean(),
                "noise_error": self.noise_error,
                "condition": self.condition.log().mean().exp(),
                "log_det_error": self.log_det_error,
            }.items()
            if not value.isnan()
        }
        if 0 < len(self.layer_error) <= MAX_TAGS:
            values |= {f"layer_error_{k}": value for k, value in enumerate(self.layer_error)}
            values |= {f"layer_condition_{k}": v for k, v in enumerate(self.layer_condition) if not v.isnan()}
            known = enumerate(self.layer_log_det_error)
            values |= {f"layer_log_det_error_{k}": v for k, v in known if not v.isnan()}
        return values


def _worst(errors: Tensor, most: int) -> list[int]:
    return errors.nan_to_num(-1.0).argsort(descending=True, stable=True)[:most].tolist()


def sums_of(before: Tensor, after: Tensor) -> Tensor:
    """Computes what :func:`errors_of` needs of some rows, so that it can be added over batches.

    Args:
        before: (N, P), or (N, C, ...) whose positions are those behind C; channels are averaged.
        after: the same values after a round trip.

    Returns:
        (5, P) sums of :data:`TERMS` in float64.
    """
    rows = [values.detach().double() for values in (before, after)]
    finite = torch.stack([values.flatten(1).isfinite().all(1) for values in rows]).all(0)
    channels = [values[:, None] if values.ndim == 2 else values.flatten(2) for values in rows]
    x, y = (values.where(finite[:, None, None], 0.0) for values in channels)
    counts = torch.stack([finite.sum(), (~finite).sum()]).to(x)[:, None].expand(2, x.shape[2])
    parts = torch.stack([(y - x).square().mean(1).sum(0), x.mean(1).sum(0), x.square().mean(1).sum(0)])
    return torch.cat([counts, parts])


def errors_of(sums: Tensor) -> Errors:
    """Computes errors by position from sums (5, P); nan where there are no finite rows."""
    n, invalid, error, total, square = sums
    variance = (square / n - (total / n).square()).clamp(min=0)
    # differences below what float64 keeps of the squares are none
    variance = variance.where(variance > 1e-12 * square / n, 0.0).where(n > 0, math.nan)
    return Errors(error / n, variance, (invalid / (n + invalid))[:1].sum())


def round_trip_error(before: Tensor, after: Tensor) -> Tensor:
    """Computes the root mean squared error of a round trip by position, in standard deviations of the values before.

    The unit is one for all positions, the root of their mean variance, so that positions without variance count as others
    do. It is 0 where everything comes back, and about 1.4 where what comes back is independent of what went in.

    Source: Behrmann et al., arXiv 2006.09347.

    Args:
        before: (N, P) values, or (N, C, ...) whose positions are those behind C.
        after: the same values after a round trip.

    Returns:
        (P,) errors, 0 or more, in float64; inf where values that do not vary come back changed. Rows with nan or inf are
        left out.

    Raises:
        ValueError: if the shapes differ or are not (N, P) or (N, C, ...).

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
        >>> round_trip_error(x, x * torch.tensor([1.0, 0.5])).round(decimals=4)
        tensor([0.0000, 0.6325], dtype=torch.float64)
    """
    check_pair(before, after)
    return errors_of(sums_of(before, after)).relative


def check_pair(before: Tensor, after: Tensor) -> None:
    """Raises ValueError unless values before and after a round trip have one shape of two axes or more."""
    if before.ndim < 2 or before.shape != after.shape:
        raise ValueError(
            f"after must be (N, P) or (N, C, ...) as before is, got {tuple(after.shape)} and {tuple(before.shape)}. "
            "To fix this, pass values before and after a round trip, row by row."
        )


def jacobian_volume(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Computes log-determinants and condition numbers of square Jacobians from their Gram matrices ``J'J``.

    Args:
        gram: (N, D, D) symmetric matrices in float64, such as :func:`decoder_gram` returns.

    Returns:
        ``log |det J|`` (N,) in nats, and the ratio of the largest to the smallest singular value (N,), 1 or more. The first
        is nan, and the second inf or above 1e7, where the matrix is singular or float32 does not resolve it.

    Raises:
        ValueError: if the matrices are not square.

    Example:
        >>> log_det, condition = jacobian_volume(torch.diag(torch.tensor([1.0, 4.0]))[None])
        >>> log_det.exp(), condition
        (tensor([2.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2]:
        raise ValueError(
            f"gram must be (N, D, D), got {tuple(gram.shape)}. To fix this, pass the products J'J of square Jacobians."
        )
    gram = gram.double()
    finite = gram.flatten(1).isfinite().all(1)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    values = torch.linalg.eigvalsh(gram.where(finite[:, None, None], identity))
    low, high = values[:, 0].clamp(min=0), values[:, -1].clamp(min=0)
    condition = (high / low).sqrt().where(finite & (low > 0), math.inf)
    log_det = values.clamp(min=torch.finfo(gram.dtype).tiny).log().sum(1) / 2
    return log_det.where(condition < RESOLVED, math.nan), condition
