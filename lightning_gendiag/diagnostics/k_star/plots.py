"""The panel and the table of the k* distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.k_star.functional import KStarResult
from lightning_gendiag.plots import canvas, charts

BINS = 20
"""Number of bins of the distributions that the tab shows."""


def panel(result: KStarResult, occasion: canvas.Occasion) -> Tensor:
    """Draws the distribution of each class's values, and which other class its samples see first.

    Args:
        result: Of the evaluation.
        occasion: When it is drawn, and what an alarm marks in it.

    Returns:
        (H, W, 3) uint8.
    """
    classes, worst, values = result.classes.tolist(), result.worst, result.values.cpu()
    names, labels = [str(c) for c in classes], result.labels.cpu()
    groups = [values[(labels == c) & ~values.isnan()] for c in classes]
    alarmed = [place for place, c in enumerate(classes) if c in occasion.marked]
    counts = {pattern: result.pattern.count(pattern) for pattern in ("fractured", "overlapped", "clustered")}
    patterns = ", ".join(f"{count} {pattern}" for pattern, count in counts.items() if count) or "no pattern"
    rows = [canvas.Row(canvas.INK, f"skewness: {float(result.true_skewness):.2f} (lower is better)")]
    if worst >= 0:
        text = f"lowest: class {names[worst]}, mean {float(result.mean[worst]):.2f}, "
        text += f"next to class {int(result.nearest_rival[worst])}"
        rows.insert(0, canvas.Row(canvas.region_colour(worst), text))
    tiles = [
        canvas.Tile("k* of each class, 1 = together", charts.violins(groups, names, alarmed)),
        canvas.Tile("first rival (column) of each class", charts.matrix(result.rivals.cpu(), most=1.0)),
    ]
    return canvas.panel(f"{len(names)} classes: {patterns} (step {occasion.step})", tiles, rows, occasion.note)


def histograms(result: KStarResult) -> Tensor:
    """Returns the shares (K, 20) of the values of each class in twenty bins of (0, 1]; nan where a class has none."""
    known = ~result.values.isnan()
    values, labels = result.values[known].cpu(), result.labels[known].cpu()
    places = torch.searchsorted(result.classes.cpu(), labels.contiguous())
    bins = (values * BINS).ceil().long().clamp(1, BINS) - 1
    counts = torch.bincount(places * BINS + bins, minlength=len(result.classes) * BINS).view(-1, BINS).double()
    return counts / counts.sum(1, keepdim=True)


def table(result: KStarResult) -> str:
    """Returns the statistics of each class as markdown."""
    lines = ["| class | mean k* | std | skewness | pattern | nearest rival |", "|---|---|---|---|---|---|"]
    numbers = (result.classes, result.mean, result.std, result.skewness, result.nearest_rival)
    columns = zip(*(part.tolist() for part in numbers), result.pattern, strict=True)
    lines += [f"| {c} | {m:.3f} | {s:.3f} | {k:.2f} | {p} | {r} |" for c, m, s, k, r, p in columns]
    return "\n".join(lines)
