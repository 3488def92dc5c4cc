"""The panels of round trips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.round_trip.functional import RoundTripResult
from lightning_gendiag.plots import canvas, charts, pictures
from lightning_gendiag.regions.region_map import RegionMap

MOST_BARS = 64
"""Largest number of bars; of more dimensions, the worst of neighbouring ones share a bar."""

DECADES = 8
"""Errors are drawn on a logarithmic scale that begins at 10 to the minus so many."""

LARGE = 0.01
"""Error from which on a layer is drawn in the colour of an alarm."""

NAMED = 6
"""Largest number of layers that are named below the panel, the worst first."""


def flow_panel(
    result: RoundTripResult, layers: Sequence[str], shape: Sequence[int], errors: Curve, occasion: canvas.Occasion
) -> Tensor:
    """Draws the errors of a flow's round trips by position, latent dimension and layer, and over time.

    Args:
        result: Of the evaluation.
        layers: Names of the layers.
        shape: Of the data.
        errors: The error of decoded latents of data over time.
        occasion: When it is drawn, and what an alarm adds.

    Returns:
        (H, W, 3) uint8.
    """
    tiles = [
        _positions("error of data, decades", result.data_error, shape),
        _bars("error of latents, decades", result.latent_error),
        _bars("error of each layer, decades", result.layer_error.where(result.layer_invalid == 0, math.nan)),
        canvas.Tile("error of data, decades", _line([_decades(value) for value in errors.values], errors.steps)),
    ]
    rows = [canvas.Row(canvas.INK, f"decades above 10^-{DECADES}: {DECADES - 2} is an error of 1 %; ? is nan or inf")]
    for k in result.layer_error.nan_to_num(math.inf).argsort(descending=True)[:NAMED].tolist():
        of_volume = f", log-det off by {float(result.layer_log_det_error[k]):.1g}" * (k in result.wrong_layers)
        strong = bool(of_volume) or not float(result.layer_error[k]) < LARGE
        text = f"{k}: {layers[k]}, error {float(result.layer_error[k]):.1g}{of_volume}"
        rows.append(canvas.Row(canvas.ALARM if strong else canvas.region_colour(0), text, strong))
    off = float(result.log_det_error)
    if math.isfinite(off):
        strong = result.is_volume_wrong
        text = f"log-determinant off by {off:.1g} nats for each dimension"
        rows.append(canvas.Row(canvas.ALARM if strong else canvas.INK, text, strong))
    condition = result.scalars().get("condition")
    text = "" if condition is None else f", condition number {float(condition):.1g}"
    return canvas.panel(f"Inverse of the flow{text} (step {occasion.step})", tiles, rows, occasion.note)


def autoencoder_panel(
    result: RoundTripResult,
    regions: RegionMap | None,
    shape: Sequence[int],
    lost: Curve,
    occasion: canvas.Occasion,
) -> Tensor:
    """Draws the fraction of the variance that reconstructions lose by position, region and latent dimension, and over time.

    Args:
        result: Of the evaluation.
        regions: The R regions; None of data that have none.
        shape: Of the data.
        lost: The fraction over time.
        occasion: When it is drawn, and what an alarm adds.

    Returns:
        (H, W, 3) uint8.
    """
    values = result.unexplained.tolist()
    tiles = [_positions("error of data, decades", result.data_error, shape)]
    if regions is not None:
        labels = pictures.enlarged_labels(regions.labels)
        colours = [canvas.heat(1000 ** min(value, 1.0) if math.isfinite(value) else value) for value in values]
        tiles.append(
            canvas.Tile("% of variance lost", pictures.filled(labels, colours, [f"{100 * v:.0f}" for v in values]))
        )
    strong = [r in occasion.marked for r in range(len(values))]
    shown = [f"{r}" for r in range(len(values))]
    held_out = result.held_out_unexplained.tolist()
    targets = [100 * v for v in held_out] if all(map(math.isfinite, held_out)) else None
    caption = "% lost by region" + (", line = validation" if targets else "")
    bars = charts.bars([100 * v for v in values], shown, strong, floor=0.0, targets=targets)
    tiles.append(canvas.Tile(caption, bars))
    latents = _grouped(100 * result.latent_unexplained)
    if not result.latent_unexplained.isnan().all():
        numbers = [str(d) for d in range(len(latents))]
        picture = charts.bars(latents, numbers, [False] * len(latents), floor=0.0)
        tiles.append(canvas.Tile("% lost by latent dimension", picture))
    most = max([value for value in lost.values if math.isfinite(value)] or [1.0]) * 105
    tiles.append(canvas.Tile("% of variance lost", charts.line([100 * v for v in lost.values], lost.steps, most)))
    names = [] if regions is None else list(regions.names)
    rows = [
        canvas.Row(canvas.region_colour(0), f"{r}: {name}, {values[r]:.0%} of the variance is lost", strong[r])
        for r, name in enumerate(names)
    ]
    whole = float(result.unexplained.nanmean())
    title = f"Reconstructions lose {whole:.0%} of the variance (step {occasion.step})"
    return canvas.panel(title, tiles, rows, occasion.note)


def _positions(caption: str, errors: Tensor, shape: Sequence[int]) -> canvas.Tile:
    """A map of errors of images, or bars of those of other data."""
    if len(shape) < 3 or errors.numel() != math.prod(shape[-2:]):
        return _bars(caption, errors)
    values = torch.tensor([_decades(value) for value in errors.tolist()], dtype=torch.float64)
    cells = torch.tensor([canvas.heat(1000 ** (v / DECADES) if math.isfinite(v) else v) for v in values.tolist()])
    picture = pictures.enlarged(cells.view(*shape[-2:], 3).byte())
    known = values[values.isfinite()]
    span = f", {float(known.min()):.1f} to {float(known.max()):.1f}" if len(known) else ""
    return canvas.Tile(caption + span, picture)


def _bars(caption: str, errors: Tensor) -> canvas.Tile:
    values = [_decades(value) for value in _grouped(errors)]
    names = [str(number) for number in range(len(values))]
    picture = charts.bars(values, names, [False] * len(values), floor=0.0)
    return canvas.Tile(caption, picture)


def _grouped(values: Tensor) -> list[float]:
    """The largest value of each group of neighbouring ones, of which there are so many that the bars fit."""
    size = max(1, math.ceil(len(values) / MOST_BARS))
    return [float(group.max()) for group in torch.split(values, size)] if len(values) else [math.nan]


def _decades(error: float) -> float:
    """By how many decades an error lies above the smallest that is drawn; nan and inf stay nan."""
    return math.log10(max(error, 10.0**-DECADES)) + DECADES if math.isfinite(error) else math.nan


def _line(values: Sequence[float], steps: Sequence[int]) -> Tensor:
    most = max([value for value in values if math.isfinite(value)] or [1.0])
    return charts.line(values, steps, max(most, 1.0) * 1.05)
