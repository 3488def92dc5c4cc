"""The panel of copies and repetitions."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.memorization.functional import MemorizationResult
from lightning_gendiag.plots import canvas, charts, pictures

BINS, REACH = 12, 3.0
"""Number of bars of the histogram of the closeness, and where it ends; larger values are in the last bar."""

COLUMNS = 2
"""Pairs beside each other in the panel."""


def panel(result: MemorizationResult, ratio: float, copied: Curve, occasion: canvas.Occasion) -> Tensor:
    """Draws how close samples and real images are to training images, the closest pairs, near-duplicates, and the history.

    Args:
        result: Of the evaluation.
        ratio: Closeness below which a sample is a copy.
        copied: Share of the samples that are copies over time.
        occasion: When it is drawn, and what an alarm adds to it.

    Returns:
        (H, W, 3) uint8.
    """
    made, real = (histogram(values[0]) for values in (result.closeness, result.real_closeness))
    edges = [REACH * position / BINS for position in range(BINS)]
    names = [f"{edge:g}" if edge == int(edge) else "" for edge in edges]
    bars = charts.bars(made, names, [edge < ratio for edge in edges], floor=0.0, targets=real)
    tiles = [canvas.Tile("closeness of samples, line = real", bars)]
    if len(result.copies):
        tiles.append(canvas.Tile("closest: sample | training image", sheet(result.copies)))
    most = max([value for value in copied.values if value == value], default=0.0)
    tiles.append(
        canvas.Tile("share of samples that are copies", charts.line(copied.values, copied.steps, max(most, 0.05)))
    )
    if len(result.twins):
        tiles.append(canvas.Tile("samples that are alike", sheet(result.twins)))
    return canvas.panel(f"{title(result)} (step {occasion.step})", tiles, legend(result, ratio), occasion.note)


def title(result: MemorizationResult) -> str:
    """Returns what the newest evaluation says, in a sentence without its full stop."""
    if result.copied.isnan().all():
        return "Nothing can be compared"
    for space, by in zip(range(len(result.copied)), ("", ", by features"), strict=False):
        if result.surely_copied[space]:
            share, images = float(result.copied[space]), int(result.images_copied[space])
            held = int(result.num_training)
            return f"{share:.0%} of the samples copy {images:,} of the {held:,} training images held{by}"
    share, real = float(result.copied[0]), float(result.real_copied[0])
    return f"No sign of copies: {share:.1%} of the samples, {real:.1%} of real images"


def legend(result: MemorizationResult, ratio: float) -> list[canvas.Row]:
    """Returns the lines below the tiles."""
    by = "held-out images" if float(result.num_held_out) else "training images left out in turn"
    rows = []
    if len(result.copies):
        near = [
            str(i) for i, x in zip(result.copy_index.tolist(), result.copy_closeness.tolist(), strict=True) if x < ratio
        ]
        if near:
            rows.append(canvas.Row(canvas.ALARM, f"copied: {', '.join(near)} of those held", strong=True))
    rows += [
        canvas.Row(
            canvas.INK,
            f"closer than its neighbours: {float(result.closer[0]):.0%}, real {float(result.real_closer[0]):.0%}",
        ),
        canvas.Row(canvas.INK, f"real: {by}"),
        canvas.Row(
            canvas.INK,
            f"near-duplicates: {float(result.repeated[0]):.0%}; diversity: {float(result.diversity[0]):.2f} of real",
        ),
    ]
    if float(result.duplicates) > 0:
        rows.append(canvas.Row(canvas.INK, f"training images that repeat others: {float(result.duplicates):.0%}"))
    return rows


def histogram(values: Tensor) -> list[float]:
    """Returns the share of values (N,) in each bar; nan values are left out."""
    values = values[~values.isnan()].clamp(max=REACH * (1 - 1e-6)).cpu()
    counts = (values / REACH * BINS).long().bincount(minlength=BINS)
    return (counts / max(1, len(values))).tolist()


def sheet(pairs: Tensor) -> Tensor:
    """Returns a tile of pairs of images (P, 2, C, H, W), two pairs in a row."""
    if pairs.ndim != 5:
        # rows and series are one line of pixels
        pairs = pairs.flatten(2)[:, :, None, None]
    blank = pairs.new_full((-len(pairs) % COLUMNS, *pairs.shape[1:]), float(pairs.min()))
    return pictures.contact_sheet(torch.cat([pairs, blank]).view(-1, 2 * COLUMNS, *pairs.shape[2:]))
