"""The loss of a denoiser by noise level, against that of the best multiple of its input, and what follows from both."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_gendiag.functional.results import loggable

Side = Literal["train", "held_out", "raw"]
"""What predictions are of: training images, images that the model is not trained on, or whichever of both is judged by the raw
weights, where averaged weights are evaluated."""

SIDES: tuple[Side, ...] = get_args(Side)

FEATURES = (
    "rows", "valid", "error", "squared_error", "weighted", "weight", "weightless", "described", "target_square", "product",
    "input_square", "input", "target",
)  # fmt: skip
"""What is summed over the rows of each band."""

MAX_BAND_TAGS = 20
"""Largest number of bands for which each one has a scalar."""

FAILS = 0.25
"""A network fails at a band of noise levels if its error exceeds that of the best multiple of its input by this part of the
targets' mean square."""

SURE = 4.0
"""Number of standard errors by which two losses surely differ."""

OVERFITS = 1.5
"""A network overfits at a band if its loss on held-out images is this many times that on training images."""

LAGS = 1.3
"""Averaged weights lag behind if their loss is this many times that of the raw ones."""

FLOOR = 0.02
"""Part of the targets' mean square that is added to losses before they are compared, since a loss of almost nothing may
double and mean nothing."""

NOISIEST = 3.0
"""Logarithm of the variance of the noise relative to that of the signal above which a schedule ends in almost pure noise: one
twentieth is signal. Published schedules reach 4.6 (Karras et al.) to 10 (DDPM) and more."""


@loggable
class TimestepLossResult(NamedTuple):
    """The loss in B bands of noise levels, from the least noise to the most, on each of the three sides of ``SIDES``."""

    edges: Tensor
    """(B + 1,) noise levels between which the bands lie: minus the log-SNR, or times from data to noise."""
    counts: Tensor
    """(3, B) number of rows."""
    losses: Tensor
    """(3, B) mean squared error of a prediction; nan where there are no finite ones."""
    errors: Tensor
    """(3, B) standard error of each mean."""
    power: Tensor
    """(B,) mean square of the targets; nan where these are not known."""
    linear: Tensor
    """(B,) loss of the best multiple of the input plus a constant; nan where inputs are not known."""
    weights: Tensor
    """(B,) mean weight of the rows in the training loss, relative to all rows; nan where they are not known."""
    weightless: Tensor
    """(B,) fraction of the rows that have no weight in the training loss; nan where weights are not known."""
    invalid: Tensor
    """() fraction of the rows whose prediction contains nan or inf."""
    best: Tensor
    """(B,) lowest loss on the images that are judged at any evaluation so far; that of this one where it is not known."""

    @property
    def judged(self) -> int:
        """Number of the side that is judged: held-out images where there are any, else training images."""
        return SIDES.index("held_out") if bool(self.counts[1].sum() > 0) else SIDES.index("train")

    @property
    def loss(self) -> Tensor:
        """(B,) loss on the images that are judged."""
        return self.losses[self.judged]

    @property
    def rise(self) -> Tensor:
        """(B,) logarithm of the loss relative to the lowest one so far, 0 or above."""
        floor = FLOOR * self.power.nan_to_num(0.0) + 1e-12
        return ((self.loss + floor) / (self.best + floor)).log()

    @property
    def relative(self) -> Tensor:
        """(B,) loss relative to the mean square of the targets, 0 for a perfect prediction and 1 for one of zeros."""
        return self.loss / self.power

    @property
    def excess(self) -> Tensor:
        """(B,) by which part of the targets' mean square the loss exceeds that of the best multiple of the input."""
        return (self.loss - self.linear) / self.power

    @property
    def gap(self) -> Tensor:
        """(B,) loss on held-out images relative to that on training images; nan where one of them is missing."""
        return self.losses[1] / self.losses[0]

    @property
    def fails(self) -> Tensor:
        """(B,) booleans: where no prediction is finite, or a multiple of the input is better and most bands beat theirs."""
        broken = self.loss.isnan() & (self.counts[self.judged] > 0)
        has_learned = (self.excess < 0).sum() >= len(self.excess) / 2
        return (self.excess > FAILS) & has_learned | broken

    @property
    def overfits(self) -> Tensor:
        """(B,) booleans: where the loss on held-out images surely is much larger than on training images."""
        return self._surely_above(1, 0, OVERFITS)

    @property
    def lags(self) -> Tensor:
        """(B,) booleans: where averaged weights have a much larger loss than the raw ones for the same images."""
        floor = FLOOR * self.power.nan_to_num(0.0)
        return self.loss + floor > LAGS * (self.losses[2] + floor)

    @property
    def unweighted(self) -> Tensor:
        """(B,) booleans: where the training loss does not depend on half of the predictions or more."""
        return self.weightless >= 0.5

    @property
    def highest_level(self) -> Tensor:
        """() highest noise level."""
        return self.edges[-1]

    def _surely_above(self, a: int, b: int, ratio: float) -> Tensor:
        difference = self.losses[a] - self.losses[b]
        error = (self.errors[a].square() + self.errors[b].square()).sqrt()
        floor = FLOOR * self.power.nan_to_num(0.0)
        above = self.losses[a] + floor > ratio * (self.losses[b] + floor)
        return (difference > SURE * error) & above

    def scalars(self) -> dict[str, Tensor]:
        """Returns the mean loss and what it is compared with, and the loss of each of up to 20 bands, of shape ()."""
        values = {"loss": _mean(self.loss), "invalid": self.invalid}
        if self.power.isfinite().any():
            values |= {"relative_loss": _mean(self.relative)}
        if self.linear.isfinite().any():
            values |= {"excess": self.excess.nan_to_num(-math.inf).max()}
        if self.judged == SIDES.index("held_out") and bool((self.counts[0] > 0).any()):
            values |= {"train_loss": _mean(self.losses[0]), "gap": _mean(self.gap.log()).exp()}
        if bool((self.counts[2] > 0).any()):
            values |= {"raw_loss": _mean(self.losses[2])}
        values |= {"highest_level": self.highest_level}
        if len(self.loss) <= MAX_BAND_TAGS:
            values |= {f"loss_{b}": value for b, value in enumerate(self.loss)}
        return values


def _mean(values: Tensor) -> Tensor:
    """The mean of all bands that have a value; nan if none has."""
    finite = values.isfinite()
    return values.where(finite, 0.0).sum() / finite.sum()


def band_edges(levels: Tensor, bands: int) -> Tensor:
    """Divides noise levels into bands that hold equally many rows.

    Args:
        levels: (N,) noise levels; those that are not finite are left out.
        bands: Number of bands, B.

    Returns:
        (B + 1,) edges in float64, from the lowest to the highest level; fewer where levels are the same.

    Raises:
        ValueError: If there are no two different levels.

    Example:
        >>> band_edges(torch.arange(9.0), 4)
        tensor([0., 2., 4., 6., 8.], dtype=torch.float64)
    """
    finite = levels[levels.isfinite()].double()
    shares = torch.linspace(0, 1, bands + 1, dtype=torch.float64, device=finite.device)
    edges = torch.quantile(finite, shares) if len(finite) else finite
    edges = edges[torch.cat([torch.ones_like(edges[:1]), edges.diff()]) > 0]
    if len(edges) < 2:
        raise ValueError(
            f"levels must hold at least two different numbers, got {len(edges)}. "
            "To fix this, pass the noise level of each row."
        )
    return edges


def check_edges(edges: Tensor) -> None:
    """Raises ValueError for edges that are not two or more rising numbers."""
    if edges.ndim != 1 or len(edges) < 2 or not edges.isfinite().all() or not (edges.diff() > 0).all():
        raise ValueError(
            f"edges must be (B + 1,) rising numbers, got {edges.tolist() if edges.ndim == 1 else tuple(edges.shape)}. "
            "To fix this, pass the noise levels between which the bands lie, such as band_edges(levels, 8)."
        )


def features_of(
    errors: Tensor, inputs: Tensor | None = None, targets: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Returns what is summed over rows, (N, 13) in float64, in the order of :data:`FEATURES`.

    Args:
        errors: (N,) mean squared error of each row.
        inputs: (N, ...) what the network was given.
        targets: (N, ...) what it should predict.
        weights: (N,) weight of each row in the training loss; nan where it is not known.
    """
    errors = errors.detach().double()
    valid, one, none = errors.isfinite(), torch.ones_like(errors), torch.zeros_like(errors)
    finite = errors.where(valid, 0.0)
    weight = torch.full_like(errors, math.nan) if weights is None else weights.detach().to(errors)
    weighted = weight.isfinite()
    described = none
    x = t = torch.zeros(len(errors), 1, dtype=torch.float64, device=errors.device)
    if targets is not None:
        t = targets.detach().flatten(1).to(errors)
        described = one
    if inputs is not None:
        x = inputs.detach().flatten(1).to(errors)
    columns = [
        one, valid.to(errors), finite, finite.square(), weighted.to(errors), weight.where(weighted, 0.0),
        (weight == 0).to(errors), described, t.square().mean(1), (x * t).mean(1), x.square().mean(1), x.mean(1), t.mean(1),
    ]  # fmt: skip
    return torch.stack(columns, 1)


def summed_by_band(features: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """Returns the sums (B, F) of the features (N, F) of the rows in each band.

    Rows below or above all edges belong to the first and the last band; rows without a finite level to none.
    """
    known = levels.isfinite()
    bands = torch.bucketize(levels.where(known, 0.0).to(edges), edges[1:-1].contiguous())
    sums = features.new_zeros(len(edges) - 1, features.shape[1])
    return sums.index_add_(0, bands, features * known[:, None])


def summarise(sums: Tensor, edges: Tensor) -> TimestepLossResult:
    """Computes a result from the sums (3, B, F) of each side and band.

    The best multiple of the input plus a constant, ``c x + m``, leaves ``var(t) - cov(x, t)^2 / var(x)`` of the targets.
    """
    of = dict(zip(FEATURES, sums.unbind(2), strict=True))
    n = of["valid"]
    losses = of["error"] / n
    variance = (of["squared_error"] / n - losses.square()).clamp(min=0) * n / (n - 1)
    pooled = {name: values[:2].sum(0) for name, values in of.items()}
    known = pooled["described"]
    power, product, square = (pooled[name] / known for name in ("target_square", "product", "input_square"))
    mean_x, mean_t = pooled["input"] / known, pooled["target"] / known
    variance_x, covariance = square - mean_x.square(), product - mean_x * mean_t
    explained = covariance.square() / variance_x
    has_inputs = square > 0
    linear = (power - mean_t.square() - explained.where(variance_x > 0, 0.0)).clamp(min=0)
    rows = of["rows"].sum()
    result = TimestepLossResult(
        edges=edges,
        counts=of["rows"],
        losses=losses,
        errors=(variance / n).sqrt(),
        power=power.where(power > 0, math.nan),
        linear=linear.where(has_inputs & (power > 0), math.nan),
        weights=pooled["weight"] / pooled["weighted"],
        weightless=pooled["weightless"] / pooled["weighted"],
        invalid=(rows - n.sum()) / rows.clamp(min=1),
        best=torch.full_like(power, math.nan),
    )
    return result._replace(best=result.loss)


def timestep_loss(
    predictions: Tensor,
    targets: Tensor,
    levels: Tensor,
    inputs: Tensor | None = None,
    edges: Tensor | int = 8,
) -> TimestepLossResult:
    """Computes the loss of a denoiser by noise level.

    Args:
        predictions: (N, ...) of the noise, the data, or a velocity.
        targets: (N, ...) what they should be.
        levels: (N,) noise levels, such as minus the log-SNR ``2 log(sigma / alpha)``, or times.
        inputs: (N, ...) the noisy data, with which the best multiple of the input is compared.
        edges: (B + 1,) noise levels between which the bands lie, or the number of bands, which then hold equally many rows.

    Returns:
        The result, with all rows on the side ``"train"``.

    Raises:
        ValueError: If an argument has another shape.

    Example:
        >>> noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = timestep_loss(0.9 * noise, noise, torch.linspace(0, 1, 64), edges=2)
        >>> result.relative
        tensor([0.0100, 0.0100], dtype=torch.float64)
    """
    errors = squared_errors(predictions, targets)
    check_rows(errors, levels=levels, inputs=inputs)
    edges = band_edges(levels, edges) if isinstance(edges, int) else edges.double()
    check_edges(edges)
    sums = summed_by_band(features_of(errors, inputs, targets), levels, edges)
    return summarise(torch.stack([sums, torch.zeros_like(sums), torch.zeros_like(sums)]), edges)


def squared_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean squared error (N,) of each row of predictions (N, ...).

    Raises:
        ValueError: If predictions and targets have different shapes.
    """
    if predictions.shape != targets.shape or not predictions.ndim:
        raise ValueError(
            f"predictions must be {tuple(targets.shape)}, as the targets, got {tuple(predictions.shape)}. "
            "To fix this, leave the channels of a learned variance out."
        )
    return (predictions.double() - targets.double()).square().view(len(predictions), -1).mean(1)


def check_rows(errors: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError where errors are not (N,), or others have another number of rows."""
    if errors.ndim != 1:
        raise ValueError(
            f"errors must be (N,), one number for each row, got {tuple(errors.shape)}. "
            "To fix this, average over all axes but the first."
        )
    for name, value in others.items():
        vector = name in ("levels", "weights")
        if value is not None and (value.shape[:1] != errors.shape or (vector and value.ndim != 1)):
            shape = f"({len(errors)},)" if vector else f"({len(errors)}, ...)"
            raise ValueError(f"{name} must be {shape}, one row for each error, got {tuple(value.shape)}.")
