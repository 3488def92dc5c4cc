"""The panel and the table of latent regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.latent_regions.functional import KINDS, LatentRegionsResult
from lightning_gendiag.model.features import NeighbourClassifier
from lightning_gendiag.plots import canvas, charts, pictures

SHOWN = 8
"""Number of decoded images of each kind in the panel."""

PLANE = 58
"""Number of cells along a side of the class map."""

PLACES = ("of the prior", "in clusters", "in margins", "in the grey area")
"""Where points of each of ``KINDS`` lie."""


def panel(
    result: LatentRegionsResult,
    latents: Tensor,
    labels: Tensor,
    points: Sequence[Tensor],
    decoded: Sequence[Tensor],
    occasion: canvas.Occasion,
) -> Tensor:
    """Draws the latents with their regions and the class map, and the decoded images and their FID where there are any.

    Args:
        result: Of the evaluation.
        latents: (N, D), in the coordinates of the result.
        labels: (N,), negative where not known.
        points: (n, D) for each of ``KINDS``.
        decoded: (n, C, H, W), n up to ``SHOWN``, for each of ``KINDS``.
        occasion: When it is drawn, and what an alarm marks in it.

    Returns:
        (H, W, 3) uint8.
    """
    finite = latents.isfinite().all(1)
    latents, labels = latents[finite].double(), labels[finite]
    plane = _plane_of(result, latents)
    tiles = [canvas.Tile("margins red, grey area black", _scatter(result, latents, labels, points[2:], plane))]
    if (labels >= 0).any():
        tiles.append(canvas.Tile("nearest class", _class_map(latents, labels, plane)))
    if any(len(images) for images in decoded):
        tiles.append(canvas.Tile(f"decoded: {', '.join(KINDS)}", pictures.contact_sheet(_sheet(decoded))))
    fid = result.fid.tolist()
    if not result.fid.isnan().all():
        worse = [value > 1.2 * fid[0] for value in fid]
        tiles.append(canvas.Tile("FID of each kind", charts.bars(fid, list(KINDS), worse, floor=0.0)))
    return canvas.panel(f"{_title(result)} (step {occasion.step})", tiles, _legend(result), occasion.note)


def table(result: LatentRegionsResult) -> str:
    """Returns the components, their classes and what they decode to as markdown."""
    lines = ["| component | weight | classes of its latents | decodes to |", "|---|---|---|---|"]
    classes = result.classes.tolist()
    for k, weight in enumerate(result.weights.tolist()):
        held, made = (_largest(classes, part[k].tolist()) for part in (result.class_share, result.decoded_share))
        lines.append(f"| {k} | {weight:.1%} | {held or '-'} | {made or '-'} |")
    if len(classes) and float(result.grey_share) > 0:
        lines.append(f"\nIn the grey area: {_largest(classes, result.grey_classes.tolist(), least=0.01) or '-'}.")
    return "\n".join(lines)


def _title(result: LatentRegionsResult) -> str:
    if result.collapsed:
        return "All images have the same latents"
    if result.fid.isnan().all():
        return "Latent regions"
    return f"Points {PLACES[int(result.fid.nan_to_num(-1.0).argmax())]} decode worst"


def _legend(result: LatentRegionsResult) -> list[canvas.Row]:
    components, margins = len(result.weights), len(result.margins)
    texts = [f"{components} components, {margins} margins, {float(result.overlap):.0%} overlap"]
    ratios = zip(KINDS[2:], (result.fid / result.fid[0]).tolist()[2:], strict=True)
    known = [f"{kind} {ratio:.1f} times" for kind, ratio in ratios if not math.isnan(ratio)]
    if known:
        texts.append(f"FID relative to the prior's: {', '.join(known)}")
    grey = _largest(result.classes.tolist(), result.grey_classes.tolist(), least=0.05)
    if grey:
        texts.append(f"classes in the grey area: {grey}")
    return [canvas.Row(canvas.INK, text) for text in texts]


class _Plane(NamedTuple):
    """The plane that is shown: the first two dimensions, or principal components."""

    axes: Tensor  # (D, 2)
    centre: Tensor  # (D,)
    reach: float  # half the side of the square that is shown

    def __call__(self, z: Tensor) -> Tensor:
        """Returns places (n, 2) of points (n, D)."""
        return (z - self.centre) @ self.axes


def _scatter(
    result: LatentRegionsResult, latents: Tensor, labels: Tensor, points: Sequence[Tensor], plane: _Plane
) -> Tensor:
    """Latents by class, the components' ellipses, points in margins in red and points in the grey area in black."""
    chart = charts.Scatter(plane.reach)
    colours = [canvas.region_colour(int(c)) if c >= 0 else canvas.FAINT for c in labels]
    chart.points(plane(latents), colours, 1)
    for mean, covariance in zip(result.means.cpu(), result.covariances.cpu(), strict=True):
        chart.ring(plane(mean), plane.axes.T @ covariance @ plane.axes)
    for z, colour in zip(points, (canvas.ALARM, canvas.INK), strict=True):
        chart.points(plane(z[:120]), [colour] * len(z[:120]), 2)
    return chart.picture()


def _class_map(latents: Tensor, labels: Tensor, plane: _Plane) -> Tensor:
    """The plane coloured by the class of the nearest latents."""
    places = torch.linspace(-plane.reach, plane.reach, PLANE, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(places, places.flip(0), indexing="xy"), -1).flatten(0, 1)
    known = labels >= 0
    neighbours = NeighbourClassifier(latents[known][:, :, None, None].float(), labels[known])
    classes = neighbours((plane.centre + grid @ plane.axes.T).float()[:, :, None, None])
    colours = torch.tensor([canvas.region_colour(int(c)) for c in classes], dtype=torch.uint8)
    return pictures.enlarged(colours.view(PLANE, PLANE, 3))


def _plane_of(result: LatentRegionsResult, latents: Tensor) -> _Plane:
    """Returns the plane in which the components and the latents (N, D) are shown."""
    means, dims = result.means.cpu(), result.means.shape[1]
    axes, centre = torch.eye(dims, 2, dtype=torch.float64), torch.zeros(dims, dtype=torch.float64)
    if len(means) and dims > 2:
        weights = result.weights.cpu()
        centre = (weights[:, None] * means).sum(0)
        away = means - centre
        total = (weights[:, None, None] * (result.covariances.cpu() + away[:, :, None] * away[:, None])).sum(0)
        axes = torch.linalg.eigh(total)[1][:, -2:].flip(1)
    reach = float(((latents - centre) @ axes).abs().quantile(0.995)) * 1.15 if len(latents) else 1.0
    return _Plane(axes, centre, reach or 1.0)


def _sheet(decoded: Sequence[Tensor]) -> Tensor:
    """Images (4, 8, C, H, W), blank where a kind has too few points."""
    some = next(images for images in decoded if len(images))
    low = min(float(images.min()) for images in decoded if len(images))
    sheet = torch.full((len(decoded), SHOWN, *some.shape[1:]), low)
    for row, images in zip(sheet, decoded, strict=True):
        row[: len(images)] = images
    return sheet


def _largest(classes: list[int], shares: list[float], least: float = 0.1) -> str:
    """The five largest classes of at least a share, with their shares."""
    some = sorted(((share, c) for c, share in zip(classes, shares, strict=True) if share >= least), reverse=True)
    return ", ".join(f"{c} ({share:.0%})" for share, c in some[:5])
