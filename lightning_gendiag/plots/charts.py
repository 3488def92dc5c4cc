"""Charts of one tile, as uint8 pictures (H, W, 3): curves, a line, bars, violins, matrices and scatter plots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_gendiag.plots.canvas import (
    ALARM,
    FAINT,
    HEAT,
    INK,
    REGION_COLOURS,
    TILE,
    Colour,
    blank_tile,
    font,
    on_white_tile,
    region_colour,
)
from lightning_gendiag.plots.pictures import enlarged


def curves(series: Sequence[Sequence[float]], steps: Sequence[int], strong: int | None = None) -> Tensor:
    """Draws one curve for each region, on an axis that magnifies values near 1.

    Args:
        series: R sequences of values up to 1, all of one length; a nan leaves a gap.
        steps: The step of each value.
        strong: The number of the series that is drawn in the colour of an alarm.
    """
    size, left, bottom = TILE, 38, 20
    image = Image.new("RGB", (size, size), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    positions = [[-np.log10(np.clip(1 - value, 1e-4, 1.0)) for value in values] for values in series]
    top = max([1.2, *(position * 1.08 for values in positions for position in values if not np.isnan(position))])
    span = max(steps[-1] - steps[0], 1)

    def at(step: int, position: float) -> tuple[float, float]:
        x = left + (step - steps[0]) / span * (size - left - 5)
        return x, size - bottom - position / top * (size - bottom - 6)

    for value in (0.0, 0.5, 0.9, 0.99, 0.999):
        x, y = at(steps[0], -np.log10(1 - value))
        if y >= 4:
            draw.line((left, y, size, y), fill=(218, 220, 224))
            draw.text((left - 4, y), f"{value:g}", fill=FAINT, font=font(12), anchor="rm")
    draw.text((left, size - 2), str(steps[0]), fill=FAINT, font=font(12), anchor="lb")
    draw.text((size - 2, size - 2), f"step {steps[-1]}", fill=FAINT, font=font(12), anchor="rb")
    # the highlighted curve is drawn last, so that no other covers it
    for number in sorted(range(len(series)), key=lambda n: n == strong):
        colour, width = (ALARM, 4) if number == strong else (region_colour(number), 2)
        points = [None if np.isnan(p) else at(step, p) for step, p in zip(steps, positions[number], strict=True)]
        for before, after in pairwise(points):
            if before is not None and after is not None:
                draw.line((*before, *after), fill=colour, width=width)
        if points[-1] is not None:
            x, y = points[-1]
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    return torch.from_numpy(np.asarray(image).copy())


def bars(
    values: Sequence[float],
    names: Sequence[str],
    strong: Sequence[bool],
    floor: float | None = None,
    targets: Sequence[float] | None = None,
    intervals: Sequence[Sequence[float]] | None = None,
) -> Tensor:
    """Draws one bar for each value, in the given order.

    Args:
        values: The height of each bar; a question mark stands for nan and inf.
        names: The name below each bar, which is left out where it does not fit.
        strong: Whether each bar is drawn in the colour of an alarm.
        floor: The lower end of the axis; by default it lies below the lowest value, by a quarter of the range.
        targets: The expected height of each bar, drawn as a line across it.
        intervals: The interval (low, high) of each bar, drawn as a whisker.
    """
    image, draw = blank_tile()
    finite = [value for value in (*values, *(targets or ())) if np.isfinite(value)] or [0.0]
    # the axis ends 10 below the highest value, since a dead dimension would make the differences of the others invisible
    high = max(finite)
    low = max(min(finite), high - 10)
    low -= max(high - low, 1.0) / 4
    if floor is not None:
        low, high = floor, max(high, floor + 1e-3)
    left, bottom = 38, 20
    width = (TILE - left - 4) / max(len(values), 1)
    for value in (high, (high + low) / 2, low):
        y = 8 + (high - value) / (high - low) * (TILE - bottom - 8)
        draw.line((left, y, TILE, y), fill=(218, 220, 224))
        draw.text(
            (left - 4, y), f"{value:.1f}" if abs(high) >= 2 else f"{value:.2f}", fill=FAINT, font=font(12), anchor="rm"
        )
    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        clipped = float(np.clip(value, low, high)) if np.isfinite(value) else low
        x, y = left + number * width, 8 + (high - clipped) / (high - low) * (TILE - bottom - 8)
        colour = ALARM if strong[number] else REGION_COLOURS[0]
        if np.isfinite(value):
            draw.rectangle((x + 0.1 * width, min(y, TILE - bottom - 2), x + 0.9 * width, TILE - bottom), fill=colour)
        elif width >= 8:
            draw.text((x + width / 2, TILE - bottom - 2), "?", fill=colour, font=font(12), anchor="mb")
        if width >= draw.textlength(name, font=font(12)) + 2 or (strong[number] and len(values) <= 64):
            draw.text((x + width / 2, TILE - 2), name, fill=FAINT, font=font(12), anchor="mb")

        def height(at: float) -> float:
            return 8 + (high - float(np.clip(at, low, high))) / (high - low) * (TILE - bottom - 8)

        if intervals is not None:
            middle, (least, most) = x + width / 2, intervals[number]
            draw.line((middle, height(least), middle, height(most)), fill=FAINT, width=2)
        if targets is not None:
            draw.line((x, height(targets[number]), x + width, height(targets[number])), fill=INK, width=3)
    return torch.from_numpy(np.asarray(image).copy())


def violins(groups: Sequence[Tensor], names: Sequence[str], marked: Sequence[int]) -> Tensor:
    """Draws the distribution of each group as a mirrored histogram, with a line at its mean.

    Args:
        groups: The values in 0..1 of each group.
        names: The name below each group, which is left out where it does not fit.
        marked: The numbers of the groups that are drawn in the colour of an alarm.
    """
    image, draw = blank_tile()
    left, bottom, bins = 30, 20, 16
    width = (TILE - left - 4) / max(len(groups), 1)
    for value in (0.0, 0.5, 1.0):
        y = 8 + (1 - value) * (TILE - bottom - 8)
        draw.line((left, y, TILE, y), fill=(218, 220, 224))
        draw.text((left - 4, y), f"{value:g}", fill=FAINT, font=font(12), anchor="rm")
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        middle = left + (number + 0.5) * width
        colour = ALARM if number in marked else region_colour(number)
        if len(group):
            heights = torch.histc(group.double(), bins, 0, 1)
            for position, height in enumerate((heights / heights.max()).tolist()):
                top = 8 + (1 - (position + 1) / bins) * (TILE - bottom - 8)
                half = height * width * 0.45
                if half > 0:
                    draw.rectangle((middle - half, top, middle + half, top + (TILE - bottom - 8) / bins), fill=colour)
            y = 8 + (1 - float(group.mean())) * (TILE - bottom - 8)
            draw.line((middle - width * 0.45, y, middle + width * 0.45, y), fill=INK, width=2)
        if width >= 8 * len(name) + 2:
            draw.text((middle, TILE - 2), name, fill=FAINT, font=font(12), anchor="mb")
    return torch.from_numpy(np.asarray(image).copy())


def matrix(values: Tensor, most: float) -> Tensor:
    """Draws a matrix (L, L) as coloured cells, from almost white at 0 to dark red at ``most`` and above."""
    position = (values.nan_to_num(0.0).clamp(0, most) / most).numpy() * (len(HEAT) - 1)
    channels = [np.interp(position, range(len(HEAT)), HEAT[:, channel]) for channel in range(3)]
    picture = torch.from_numpy(np.stack(channels, -1)).round().byte()
    return on_white_tile(enlarged(picture))


class Scatter:
    """A scatter plot of a square around the origin, into which points and ellipses are drawn one after another.

    Args:
        reach: Half the side of the square, in the units of the data.
    """

    def __init__(self, reach: float) -> None:
        self.reach = reach
        self._image, self._draw = blank_tile()

    def _at(self, point: Tensor) -> tuple[float, float]:
        x, y = (point / self.reach).tolist()
        return (x + 1) / 2 * TILE, (1 - y) / 2 * TILE

    def points(self, points: Tensor, colours: Sequence[Colour], radius: int) -> None:
        """Draws a square of a radius in pixels at each point (N, 2)."""
        for point, colour in zip(points, colours, strict=True):
            x, y = self._at(point)
            self._draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def ring(self, mean: Tensor, covariance: Tensor) -> None:
        """Draws the ellipse at two standard deviations around a mean (2,), for a covariance (2, 2)."""
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
        angle = torch.linspace(0, 2 * torch.pi, 49, dtype=root.dtype)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        self._draw.line([self._at(point) for point in mean + 2 * circle @ root.T], fill=INK, width=1)

    def picture(self) -> Tensor:
        """Returns the plot as a picture (H, W, 3) uint8."""
        return torch.from_numpy(np.asarray(self._image).copy())


def line(values: Sequence[float], steps: Sequence[int], most: float) -> Tensor:
    """Draws one curve on an axis from 0 to ``most``; values that are not finite are left out."""
    image, draw = blank_tile()
    left, bottom = 38, 20
    span = max(steps[-1] - steps[0], 1)
    for value in (0.0, most / 2, most):
        y = TILE - bottom - value / most * (TILE - bottom - 8)
        draw.line((left, y, TILE, y), fill=(218, 220, 224))
        draw.text((left - 4, y), f"{value:.3g}", fill=FAINT, font=font(12), anchor="rm")
    draw.text((left, TILE - 2), str(steps[0]), fill=FAINT, font=font(12), anchor="lb")
    draw.text((TILE - 2, TILE - 2), f"step {steps[-1]}", fill=FAINT, font=font(12), anchor="rb")
    points = [
        (left + (step - steps[0]) / span * (TILE - left - 6), TILE - bottom - value / most * (TILE - bottom - 8))
        for step, value in zip(steps, values, strict=True)
        if np.isfinite(value)
    ]
    if len(points) > 1:
        draw.line(points, fill=REGION_COLOURS[0], width=3)
    if points:
        x, y = points[-1]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=REGION_COLOURS[0])
    return torch.from_numpy(np.asarray(image).copy())
