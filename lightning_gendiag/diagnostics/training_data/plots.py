"""The panel of the training data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.training_data.functional import CELL_MOVED, TrainingDataResult
from lightning_gendiag.plots import canvas, charts, pictures

MAX_BARS = 32
"""Largest number of classes that have a bar."""


def panel(result: TrainingDataResult, occasion: canvas.Occasion) -> Tensor:
    """Draws the share of each class and the mean of each cell beside those of the first images, and what moved.

    Args:
        result: Of the evaluation.
        occasion: When it is drawn, and what an alarm marks in it.

    Returns:
        (H, W, 3) uint8.
    """
    moves = result.moves()
    bars_of_classes = []
    count = result.classes.shape[1]
    if result.has_classes and count <= MAX_BARS and float(result.classes[0].sum()):
        moved = {*occasion.marked, *result.moved_classes}
        now, first = result.share.nan_to_num(0.0).tolist()
        targets = first if float(result.classes[1].sum()) else None
        names = [str(c) for c in range(count)]
        bars = charts.bars(now, names, [c in moved for c in range(count)], floor=0.0, targets=targets)
        bars_of_classes.append(canvas.Tile("share of each class, line = at first", bars))
    tiles = [*_cells(result), *bars_of_classes]
    strong = [canvas.Row(canvas.ALARM, text, strong=True) for text in moves.values() if len(text) <= 62]
    rows = [
        *strong,
        canvas.Row(canvas.INK, f"{int(result.images[0]):,} {result.noun} in {int(result.batches[0]):,} batches"),
        canvas.Row(canvas.INK, _range(result)),
    ]
    if result.is_compared:
        rows.append(canvas.Row(canvas.INK, f"different {result.noun}: {result.variety:.0%} of those at first"))
    title = "; ".join(moves.values()) or (
        "the training data are as at first" if result.is_compared else "the first training data of the run"
    )
    if not tiles:
        tiles = [canvas.Tile("no finite data", canvas.picture_of(canvas.blank_tile()[0]))]
    return canvas.panel(f"{title[0].upper()}{title[1:]} (step {occasion.step})", tiles, rows, occasion.note)


def _range(result: TrainingDataResult) -> str:
    (low, first_low), (high, first_high) = result.low.tolist(), result.high.tolist()
    text = f"values: {low:.3g} to {high:.3g}"
    return text + (f", {first_low:.3g} to {first_high:.3g} at first" if math.isfinite(first_low) else "")


def _cells(result: TrainingDataResult) -> list[canvas.Tile]:
    """The mean of each cell as a picture where the data are images, else as bars."""
    channels, *axes = result.grid
    mean = result.cells[:, 0] / result.rows[:, None]
    now, first = mean.view(2, channels, -1)
    moved = torch.zeros(channels, now.shape[1], dtype=torch.bool)
    moved.view(-1)[result.moved_cells] = True
    marked, compared = moved.any(0), result.is_compared
    if not float(result.rows[0]):
        return []
    if len(axes) == 2:
        shown = mean.view(2, channels, *axes) if compared else now.view(1, channels, *axes)
        low, high = float(shown.min()), float(shown.max())
        captions = ("mean of each cell", "the same at first")
        labels = pictures.enlarged_labels(marked.view(*axes).long())
        tiles = []
        for caption, cells, outline in zip(captions, shown, (True, False), strict=False):
            picture = pictures.enlarged(pictures.as_rgb(cells, low, high))
            if outline and marked.any() and not marked.all():
                picture = pictures.outlined(picture, labels, 1)
            tiles.append(canvas.Tile(caption, canvas.on_white_tile(picture)))
        tiles += _shifts(result) if compared else []
        return tiles
    names = [str(cell) for cell in range(now.shape[1])]
    targets = first.mean(0).tolist() if compared else None
    return [
        canvas.Tile(
            "mean of each cell, line = at first",
            charts.bars(now.mean(0).tolist(), names, marked.tolist(), targets=targets),
        )
    ]


def _shifts(result: TrainingDataResult) -> list[canvas.Tile]:
    channels, *axes = result.grid
    shift = result.cells_moved.view(channels, *axes).amax(0)
    return [canvas.Tile(f"sure shift, 0 to {CELL_MOVED * 2:g} std of images", charts.matrix(shift, CELL_MOVED * 2))]
