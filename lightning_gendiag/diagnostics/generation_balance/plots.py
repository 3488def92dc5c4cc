"""The panel and the table of the balance of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.diagnostics.generation_balance.functional import GenerationBalanceResult
from lightning_gendiag.plots import canvas, charts, pictures

SHOWN = 8
"""Number of generated images of each class in the panel."""

MAX_CLASSES = 10
"""Largest number of classes whose images are in the panel."""


def panel(result: GenerationBalanceResult, images: Tensor | None, occasion: canvas.Occasion) -> Tensor:
    """Draws the share of each class beside the real one, the FID within each class if it is known, and generated images.

    Args:
        result: Of the evaluation.
        images: (K, 8, C, H, W) from :func:`sheet`, if known.
        occasion: When it is drawn, and what an alarm marks in it.

    Returns:
        (H, W, 3) uint8.
    """
    numbers = result.classes.tolist()
    names = [str(c) for c in numbers]
    odd = (result.dropped | result.dominating).tolist()
    alarmed = [is_odd or c in occasion.marked for c, is_odd in zip(numbers, odd, strict=True)]
    changes = []
    for change, classes in (("dropped", result.dropped), ("dominating", result.dominating)):
        some = [str(c) for c in result.classes[classes].tolist()]
        changes += [f"{change}: class {listed(some, 12)}"] if some else []
    shares, targets = result.generated_share.tolist(), result.real_share.tolist()
    intervals, fid = result.interval.tolist(), result.fid.tolist()
    has_fid = not result.fid.isnan().all()
    bars = charts.bars(shares, names, alarmed, floor=0.0, targets=targets, intervals=intervals)
    tiles = [canvas.Tile("share: generated, line = real", bars)]
    if has_fid:
        tiles.append(canvas.Tile("FID within each class", charts.bars(fid, names, alarmed, floor=0.0)))
    if images is not None:
        tiles.append(canvas.Tile("generated, one row per class", pictures.contact_sheet(images)))
    unclear = unknown(result)
    rows = [
        *(canvas.Row(canvas.ALARM, change, strong=True) for change in changes),
        *([canvas.Row(canvas.INK, unclear)] if unclear else []),
        *(
            []
            if result.undetermined.all()
            else [canvas.Row(canvas.INK, f"{float(result.imbalance):.0%} of the images would have to change class")]
        ),
        canvas.Row(canvas.INK, f"accuracy of the classifier on real images: {float(result.accuracy):.1%}"),
    ]
    calm = "cannot tell the classes apart" if result.undetermined.all() else "no class is clearly dropped or dominating"
    title = "; ".join(changes) or calm
    return canvas.panel(f"{title[0].upper()}{title[1:]} (step {occasion.step})", tiles, rows, occasion.note)


def table(result: GenerationBalanceResult) -> str:
    """Returns the shares and the FID of each class as markdown."""
    lines = [
        "| class | real | assigned | corrected | at least | at most | FID | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    numbers = result.classes.tolist()
    columns = (result.real_share, result.assigned_share, result.generated_share, result.interval, result.fid)
    for k, (real, raw, share, (low, high), fid) in enumerate(zip(*(part.tolist() for part in columns), strict=True)):
        change = "dropped" if result.dropped[k] else "dominates" if result.dominating[k] else ""
        change = "cannot tell" if result.undetermined[k] else change
        lines.append(
            f"| {numbers[k]} | {real:.1%} | {raw:.1%} | {share:.1%} | {low:.1%} | {high:.1%} | {fid:.2f} | {change} |"
        )
    return "\n".join(lines)


def unknown(result: GenerationBalanceResult) -> str:
    """Returns which classes the classifier cannot determine, as a sentence without its subject; empty if there are none."""
    classes = result.classes[result.undetermined & (result.real_count > 0)].tolist()
    if not classes:
        return ""
    which = "any class" if result.undetermined.all() else f"class {listed([str(c) for c in classes], 12)}"
    right = f"the classifier is right for {float(result.accuracy):.0%} of the real images"
    return f"cannot tell the share of {which}: {right} and confuses too many classes"


def sheet(images: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Selects the first images (N, C, H, W), with labels (N,), of each of the first ten classes (K,).

    Returns:
        (K, 8, C, H, W), blank where a class has fewer.
    """
    blank = float(images.min()) if len(images) else 0.0
    rows = torch.full((min(len(classes), MAX_CLASSES), SHOWN, *images.shape[1:]), blank)
    for c, row in zip(classes.tolist(), rows, strict=False):
        own = images[labels == c][:SHOWN]
        row[: len(own)] = own
    return rows
