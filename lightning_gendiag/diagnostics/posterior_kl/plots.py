"""The panel of the posterior's KL divergence."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.posterior_kl.functional import PosteriorKLResult
from lightning_gendiag.plots import canvas, charts


def panel(result: PosteriorKLResult, total: Curve, occasion: canvas.Occasion) -> Tensor:
    """Draws the KL divergence and the standard deviation of each dimension or channel, and the total over time.

    Args:
        result: Of the evaluation.
        total: KL divergence of all dimensions together over time.
        occasion: When it is drawn, and what an alarm marks in it.

    Returns:
        (H, W, 3) uint8.
    """
    kind, values = result.components
    # of a channel, over all positions
    variance = result.aggregate_variance.view(len(values), -1).mean(1)
    active = result.active.view(len(values), -1).any(1)
    order = values.nan_to_num(-1.0).argsort(descending=True, stable=True)
    names, alarmed = [str(dim) for dim in order.tolist()], [dim in occasion.marked for dim in order.tolist()]
    divergences, stds = values[order].tolist(), variance[order].sqrt().tolist()
    most = max([value for value in total.values if math.isfinite(value)] or [1.0]) * 1.05 or 1.0
    tiles = [
        canvas.Tile(f"KL of each {kind}, nats", charts.bars(divergences, names, alarmed, floor=0.0)),
        canvas.Tile("its std over all data, 1 = prior", charts.bars(stds, names, alarmed, floor=0.0)),
        canvas.Tile("total KL, nats", charts.line(total.values, total.steps, most)),
    ]
    nats, mismatch = float(result.total), float(result.aggregate_kl)
    rows = [canvas.Row(canvas.INK, f"total: {nats:.2f} nats, at least {mismatch:.2f} of it mismatch with the prior")]
    inactive = [str(i) for i in (~active).nonzero()[:, 0].tolist()]
    if inactive:
        rows.insert(0, canvas.Row(canvas.ALARM, f"not active: {listed(inactive, 12)}", strong=True))
    title = f"{nats:.1f} nats in {int(result.active_units)} of {len(result.active)} latent dimensions"
    title += f"{f' of {len(names)} channels' * (kind == 'channel')} (step {occasion.step})"
    return canvas.panel(title, tiles, rows, occasion.note)
