"""The panel of the loss by noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.timestep_loss.functional import TimestepLossResult
from lightning_gendiag.plots import canvas, charts, pictures


def panel(
    result: TimestepLossResult, labels: Sequence[str], histories: Sequence[Curve], occasion: canvas.Occasion
) -> Tensor:
    """Draws the loss of each band of noise levels, its ratio to that on training images, and both over time.

    Args:
        result: Of the evaluation.
        labels: (B,) noise levels of each band in words.
        histories: (B,) losses of each band over time.
        occasion: When it is drawn, and what an alarm adds.

    Returns:
        (H, W, 3) uint8.
    """
    known = bool(result.power.isfinite().all())
    unit = result.power if known else torch.ones_like(result.power)
    names = [str(b) for b in range(len(labels))]
    marked = [b in occasion.marked for b in range(len(labels))]
    heights, lines = (result.loss / unit).tolist(), (result.linear / unit).tolist()
    targets = lines if all(map(math.isfinite, lines)) else None
    what = "% of the target's square" if known else "loss by noise level"
    times = 100 if known else 1
    scaled = None if targets is None else [times * value for value in targets]
    tiles = [
        canvas.Tile(
            what,
            charts.bars([times * value for value in heights], names, marked, floor=0.0, targets=scaled),
        )
    ]
    if result.gap.isfinite().any():
        ratios = charts.bars(result.gap.tolist(), names, marked, floor=0.0, targets=[1.0] * len(names))
        tiles.append(canvas.Tile("held-out / training loss", ratios))
    tiles.append(canvas.Tile("change of each band over time", _changes(histories)))
    means = [_mean([curve.values[at] for curve in histories]) for at in range(len(histories[0].steps))]
    finite = [value for value in means if math.isfinite(value)]
    tiles.append(canvas.Tile("mean loss", charts.line(means, histories[0].steps, max([*finite, 1e-9]) * 1.05)))
    rows = [
        canvas.Row(canvas.ALARM if marked[b] else canvas.region_colour(0), f"{b}: {label}", strong=marked[b])
        for b, label in enumerate(labels)
    ]
    if targets is not None:
        rows.append(canvas.Row(canvas.INK, "lines: the best multiple of the input"))
    of = "held-out" if result.judged == 1 else "training"
    title = f"Loss by noise level: {of} mean {_mean(result.loss.tolist()):.3g} (step {occasion.step})"
    return canvas.panel(title, tiles, rows, occasion.note)


def _changes(histories: Sequence[Curve]) -> Tensor:
    """A row for each band and a column for each evaluation, the redder the more the loss is above its lowest until then."""
    losses = torch.tensor([curve.values for curve in histories], dtype=torch.float64)
    best = losses.nan_to_num(math.inf).cummin(1).values
    # white at its lowest value, red at twice that or where it is not finite
    rise = (losses / best).log2().clamp(0, 1).nan_to_num(1.0)
    low, high = (torch.tensor(colour, dtype=torch.float64) for colour in ((245, 245, 240), canvas.ALARM))
    return canvas.on_white_tile(pictures.enlarged((low + rise[..., None] * (high - low)).round().byte()))


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; nan without any."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
