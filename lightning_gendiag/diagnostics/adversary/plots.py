"""The panel of the adversary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.adversary.functional import AdversaryResult
from lightning_gendiag.plots import canvas, charts

BINS = 16
"""Number of bars of a histogram of scores."""


def panel(
    result: AdversaryResult, auc: Curve, held_out: Curve | None, norms: Sequence[Curve], occasion: canvas.Occasion
) -> Tensor:
    """Draws the scores of real and of generated images, and over time how they are told apart and the norms of gradients.

    Args:
        result: Of the evaluation.
        auc: Probability over time that a training image scores higher than a generated one.
        held_out: The same of held-out images, where there are any.
        norms: Norms of the generator's and of the discriminator's gradient over time.
        occasion: When it is drawn, and what an alarm adds.

    Returns:
        (H, W, 3) uint8.
    """
    low, high = _range(result)
    kinds = [("training images", result.real)]
    kinds += [("generated images", result.generated)] if len(result.generated) else []
    kinds += [("held-out images", result.held_out)] if len(result.held_out) else []
    tiles = [canvas.Tile(f"% of {name}, by score", _histogram(scores, low, high)) for name, scores in kinds]
    tiles.append(canvas.Tile("real above generated, %", charts.line([100 * v for v in auc.values], auc.steps, 100.0)))
    if held_out is not None:
        values = [100 * value for value in held_out.values]
        tiles.append(canvas.Tile("held-out above generated, %", charts.line(values, held_out.steps, 100.0)))
    for name, curve in zip(("generator", "discriminator"), norms, strict=True):
        logs = [math.log10(value) if value > 0 else math.nan for value in curve.values]
        finite = [value for value in logs if math.isfinite(value)]
        if finite:
            # the axis begins at the lowest norm
            floor = math.floor(min(finite))
            shifted = [value - floor for value in logs]
            caption = f"{name}: gradient / {10.0**floor:g}, log10"
            tiles.append(canvas.Tile(caption, charts.line(shifted, curve.steps, max(max(finite) - floor, 1.0))))
    told = f"Real images score above generated ones in {float(result.auc):.0%} of pairs"
    title = told if len(result.generated) else "Scores of real images; generated ones have none"
    return canvas.panel(f"{title} (step {occasion.step})", tiles, list(_rows(result)), occasion.note)


def _rows(result: AdversaryResult) -> list[canvas.Row]:
    rows = []
    if len(result.held_out):
        overfitting = float(result.overfitting)
        r_v = f"; r_v {overfitting:.2f}" if len(result.generated) else ""
        rows.append(canvas.Row(canvas.INK, f"training above held-out: {float(result.train_auc):.0%}{r_v}"))
    else:
        rows.append(canvas.Row(canvas.FAINT, "no held-out images: overfitting is not judged"))
    sign = float(result.sign)
    known = f"r_t {sign:.2f}" if math.isfinite(sign) else "the scores have no known threshold, so there is no r_t"
    rows.append(canvas.Row(canvas.INK, known))
    for name, change in zip(("generator", "discriminator"), result.changes.tolist(), strict=True):
        if math.isfinite(change):
            frozen = change == 0
            text = f"{name}: weights changed by {change:.2%}"
            rows.append(canvas.Row(canvas.ALARM if frozen else canvas.INK, text, strong=frozen))
    if len(result.stable_ranks):
        ranks = ", ".join(f"{rank:.1f}" for rank in result.stable_ranks[:8].tolist())
        rows.append(canvas.Row(canvas.INK, f"stable ranks of the discriminator: {ranks}"))
    return rows


def _range(result: AdversaryResult) -> tuple[float, float]:
    scores = torch.cat([result.real, result.generated, result.held_out])
    if not len(scores):
        return 0.0, 1.0
    low, high = float(scores.min()), float(scores.max())
    return low, high if high > low else low + 1


def _histogram(scores: Tensor, low: float, high: float) -> Tensor:
    """Shares of scores in even bins."""
    counts = torch.histc(scores, BINS, low, high) if len(scores) else torch.zeros(BINS)
    shares = 100 * counts / max(len(scores), 1)
    names = [f"{low:.2g}", *[""] * (BINS - 2), f"{high:.2g}"]
    return charts.bars(shares.tolist(), names, [False] * BINS, floor=0.0)
