"""The panels and the table of cosine mean similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gendiag.detection.history import Curve
from lightning_gendiag.diagnostics.cosine_mean_similarity.functional import CosineMeanSimilarityResult
from lightning_gendiag.plots import canvas, charts, pictures
from lightning_gendiag.regions.region_map import RegionMap
from lightning_gendiag.tensorboard.records import Picture, picture

if TYPE_CHECKING:
    from numpy.typing import NDArray


SHOWN, COLUMNS = 32, 8
"""Numbers of samples that the tab shows, and of those in a row; half as many where they are large."""

SMALL, LARGEST, LARGEST_MAP = 32, 64, 128
"""Sides in pixels: samples up to which all are shown, and larger ones are shrunk to; of the map."""


class RealImages(NamedTuple):
    """What panels show of the real images."""

    mean: Tensor
    """(C, H, W) the mean image."""
    low: float
    """The value that is drawn black."""
    high: float
    """The value that is drawn white."""
    some: Tensor
    """(n, C, H, W) the first images, small."""

    def picture(self, image: Tensor) -> Tensor:
        """Returns an image (C, H, W) as an enlarged picture (H, W, 3) uint8, on the scale of the real images."""
        return pictures.enlarged(pictures.as_rgb(image, self.low, self.high))


def panel(
    result: CosineMeanSimilarityResult,
    regions: RegionMap,
    real: RealImages,
    generated: Tensor,
    history: Sequence[Curve],
    step: int,
    averaged: bool = False,
) -> Tensor:
    """Draws the mean images, each region's distance from real images, and the regions' similarities over time.

    Args:
        result: Of the evaluation.
        regions: The R regions.
        real: The real images.
        generated: (C, H, W) mean generated image.
        history: The similarity of each region over time.
        step: Of the evaluation.
        averaged: Whether averaged weights were evaluated.

    Returns:
        (H, W, 3) uint8.
    """
    labels, values = pictures.enlarged_labels(regions.labels), result.regions.tolist()
    distances = [math.inf if math.isnan(z) else -z for z in result.z.tolist()]
    worst = max(range(len(distances)), key=distances.__getitem__)
    heats = [canvas.heat(distance) for distance in distances]
    # where the regions were changed, those that are new have shorter curves
    length = min(len(curve.steps) for curve in history)
    curves = charts.curves([curve.values[-length:] for curve in history], history[0].steps[-length:], worst)
    tiles = [
        canvas.Tile("mean real image", pictures.outlined(real.picture(real.mean), labels)),
        canvas.Tile("mean generated image", pictures.outlined(real.picture(generated), labels, worst)),
        canvas.Tile("deviations below real", pictures.filled(labels, heats, [f"{far:.0f}" for far in distances])),
        canvas.Tile("similarity, 1 = as real", curves),
    ]
    rows = [
        canvas.Row(
            canvas.ALARM if r == worst else canvas.region_colour(r),
            f"{name}: {values[r]:.3f}, {distances[r]:.0f} deviations below real",
            strong=r == worst,
        )
        for r, name in enumerate(regions.names)
    ]
    weights = ", averaged weights" if averaged else ""
    return canvas.panel(
        f"Furthest from real: {regions.names[worst]}, {values[worst]:.3f} (step {step}{weights})",
        tiles,
        rows,
        f"Whole image: {float(result.image):.3f}. Deviations are standard deviations of real images compared with real "
        "ones; dark red stands for 1000.",
    )


def alarm_panel(
    regions: RegionMap, real: RealImages, generated: Tensor, region: int | None, title: str, note: str
) -> Tensor:
    """Draws the mean real and generated (C, H, W) image with one region outlined, as a picture (H, W, 3) uint8."""
    labels, tiles = pictures.enlarged_labels(regions.labels), []
    for caption, image in (("mean real image", real.mean), ("mean generated image", generated)):
        picture = real.picture(image)
        if region is not None:
            pale = (picture.float() * 0.45 + 255 * 0.55).byte()
            picture = torch.where((labels == region)[..., None], picture, pale)
        tiles.append(canvas.Tile(caption, pictures.outlined(picture, labels, region)))
    return canvas.panel(title, tiles, note=note)


def map_panel(regions: RegionMap, real: RealImages) -> Tensor:
    """Draws the regions alone and over the mean real image, as a picture (H, W, 3) uint8."""
    labels, count = pictures.enlarged_labels(regions.labels), regions.num_regions
    colours = [canvas.region_colour(r) for r in range(count)]
    within = [math.nan] * count if regions.alignment is None else regions.alignment.diagonal().tolist()
    rows = [
        canvas.Row(
            colours[r],
            f"{r}  {name}: {int(regions.sizes[r]) / regions.labels.numel():.0%} of the image"
            + ("" if math.isnan(within[r]) else f", CKA within {within[r]:.2f}"),
        )
        for r, name in enumerate(regions.names)
    ]
    notes = {
        f"Mean CKA between regions: {regions.dependence:.2f} (0 independent, 1 the same).": regions.dependence,
        f"Maps of two halves of the images agree at {regions.stability:.2f} (0 by chance, 1 the same).": regions.stability,
    }
    tiles = [
        canvas.Tile("regions", pictures.filled(labels, colours, [str(r) for r in range(count)])),
        canvas.Tile("over the mean real image", pictures.tinted(real.picture(real.mean), labels, colours)),
    ]
    note = " ".join(text for text, value in notes.items() if not math.isnan(value))
    return canvas.panel(f"{count} regions of the image", tiles, rows, note)


def map_table(regions: RegionMap) -> str:
    """Returns the regions' names, sizes and boxes as markdown."""
    lines = [f"**{regions}**", "", "| scalar | region | pixels | box (top, left, bottom, right) |", "|---|---|---|---|"]
    boxes = zip(regions.names, regions.sizes.tolist(), regions.boxes.tolist(), strict=True)
    lines += [f"| region_{r} | {name} | {size} | {tuple(box)} |" for r, (name, size, box) in enumerate(boxes)]
    return "\n".join(lines)


def some_of(images: Tensor) -> Tensor:
    """Returns the first images (N, C, H, W) as the tab shows them, small and on the CPU, without the memory of the others."""
    return pictures.shrunk(images[:SHOWN].detach(), LARGEST).cpu().clone()


def page_pictures(real: RealImages, images: Mapping[str, Tensor]) -> dict[str, Picture]:
    """Encodes images (N, C, H, W) for the tab, as grids where there are several; rows of features have no pictures."""
    encoded = {}
    for name, some in images.items():
        if some.shape[2] > 1 and len(some):
            small = pictures.shrunk(some.detach().cpu(), LARGEST)
            number = len(small) if max(small.shape[2:]) <= SMALL else min(len(small), SHOWN // 2)
            grid = pictures.grid(small[:number], min(COLUMNS, number))
            encoded[name] = picture(pictures.pixels(grid, real.low, real.high))
    return encoded


def page_labels(labels: Tensor) -> NDArray[np.uint8]:
    """Returns labels (H, W) for the tab, of which no side is longer than ``LARGEST_MAP``."""
    longest = max(labels.shape)
    if longest > LARGEST_MAP:
        rows, columns = (
            torch.arange(max(1, side * LARGEST_MAP // longest)) * longest // LARGEST_MAP for side in labels.shape
        )
        labels = labels[rows][:, columns]
    return labels.cpu().numpy().astype(np.uint8)
