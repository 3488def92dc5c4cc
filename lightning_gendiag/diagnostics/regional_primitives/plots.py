"""The panel and the table of regional primitives."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.regional_primitives.functional import RegionalPrimitivesResult, memberships
from lightning_gendiag.plots import canvas, charts, pictures
from lightning_gendiag.tensorboard import records

SHOWN = 8
"""Number of pictures of single components in the panel, with that of the baseline."""


LARGEST = 64
"""Largest side of an image in the tab; pixels."""


class Drawn(NamedTuple):
    """What one image's components draw."""

    images: Tensor
    """(k, C, H, W) the image, the baseline, and the baseline with each of the largest components alone."""
    masks: Tensor
    """(k,) bit masks of their regions, 0 for the first two."""
    growth: Tensor
    """(m, C, H, W) the baseline with more and more components, and the image last."""


def panel(
    result: RegionalPrimitivesResult,
    labels: Tensor,
    names: Sequence[str],
    drawn: Drawn | None,
    occasion: canvas.Occasion,
) -> Tensor:
    """Draws the largest components of an image, the image as they are added, their norms, and regions drawn together.

    Args:
        result: Of the evaluation.
        labels: (H, W) numbers of the n regions, negative where the image is left out.
        names: Of the regions.
        drawn: What the components of one image draw, if known.
        occasion: When it is drawn, and what an alarm marks in it.

    Returns:
        (H, W, 3) uint8.
    """
    norms, together, leakage = result.norms[result.order].tolist(), result.together.cpu(), result.leakage.tolist()
    tiles = []
    if drawn is not None:
        largest = _largest(drawn, labels.cpu(), len(names), occasion.marked)
        tiles.append(canvas.Tile("image, baseline, largest alone", largest))
        tiles.append(canvas.Tile("with 0, 1, 2, 4 ... components", pictures.contact_sheet(_in_rows(drawn.growth))))
    shown = len(norms[:64])
    bars = charts.bars(norms[:shown], [""] * shown, [False] * shown, floor=0.0)
    tiles += [
        canvas.Tile("norms, sorted", bars),
        canvas.Tile("drawn together (regions)", charts.matrix(together, most=1.0)),
    ]
    i, j = divmod(int(together.argmax()), len(names))
    worst = int(result.leakage.nan_to_num(-1.0).argmax())
    rows = [
        canvas.Row(canvas.INK, f"drawn together most: {names[i]} and {names[j]}, {float(together[i, j]):.0%}"),
        canvas.Row(canvas.INK, f"largest leakage: {names[worst]}, {leakage[worst]:.0%} outside"),
    ]
    if float(result.converged) < 0.9:
        rows.append(canvas.Row(canvas.FAINT, f"{float(result.converged):.0%} of the optimisations converged"))
    count = f"{float(result.components):.0f} of {len(norms)} components"
    return canvas.panel(f"{count} carry 90 % of the energy (step {occasion.step})", tiles, rows, occasion.note)


def page_strip(drawn: Drawn | None, names: Sequence[str]) -> tuple[list[str], dict[str, records.Picture]]:
    """Returns what the tab shows of one image: what is in each column of a picture, and the picture; empty where unknown."""
    if drawn is None:
        return [], {}
    low, high = float(drawn.images.min()), float(drawn.images.max())
    small = pictures.shrunk(drawn.images, LARGEST)
    strip = records.picture(pictures.pixels(pictures.grid(small, len(small)), low, high))
    sets = [" + ".join(name for r, name in enumerate(names) if mask >> r & 1) for mask in drawn.masks.tolist()[2:]]
    return ["image", "baseline", *sets], {"strip": strip}


def table(result: RegionalPrimitivesResult, names: Sequence[str], layer: str) -> str:
    """Returns the largest components of the features of a layer as markdown."""
    outside = (result.effects * ~result.members).sum(1) / result.effects.sum(1)
    lines = [f"Features of `{layer}`.", "", "| component | norm | share of its effect outside |", "|---|---|---|"]
    for mask in result.order[:16].tolist():
        component = " + ".join(name for r, name in enumerate(names) if mask >> r & 1)
        lines.append(f"| {component} | {float(result.norms[mask]):.3f} | {float(outside[mask]):.0%} |")
    return "\n".join(lines)


def _largest(drawn: Drawn, labels: Tensor, num_regions: int, marked: Collection[int]) -> Tensor:
    """Image, baseline and what the largest components draw, each with its regions outlined, three in a row."""
    low, high = float(drawn.images.min()), float(drawn.images.max())
    size = canvas.TILE // 3 - 2
    labels = pictures.enlarged_labels(labels, size)
    cells = []
    for picture, mask in zip(drawn.images, drawn.masks.tolist(), strict=True):
        image = pictures.enlarged(pictures.as_rgb(picture, low, high), size)
        inside = memberships(num_regions)[mask]
        own = torch.where(labels >= 0, inside[labels.clamp(min=0)].long(), 0)
        colour = canvas.ALARM if any(inside[r] for r in marked) else canvas.REGION_COLOURS[1]
        if mask:
            image[pictures.edges(own, 1)] = torch.tensor(colour, dtype=torch.uint8)
        cells.append(torch.nn.functional.pad(image, (0, 0, 1, 1, 1, 1), value=255))
    rows = [torch.cat(cells[at : at + 3], 1) for at in range(0, len(cells) // 3 * 3, 3)]
    return torch.cat(rows)


def _in_rows(images: Tensor) -> Tensor:
    """Images (m, C, H, W) in three rows (3, w, C, H, W), the last filled up with blank ones."""
    width = math.ceil(len(images) / 3)
    blank = torch.full((3 * width - len(images), *images.shape[1:]), float(images.min()))
    return torch.cat([images, blank]).view(3, width, *images.shape[1:])
