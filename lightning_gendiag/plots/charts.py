"""Charts of one tile, as uint8 pictures (H, W, 3): curves, a line, bars, violins, matrices and scatter plots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_gendiag.plots import canvas
from lightning_gendiag.plots.pictures import enlarged

GRID: canvas.Colour = (218, 220, 224)
"""Colour of the lines behind a chart."""

BASE = canvas.TILE - 20
"""Height of the lower end of an axis, in pixels from the top."""


class _Axes:
    """A white tile with a vertical axis from ``low`` to ``high``, ``left`` pixels from the left and ``top`` from the top."""

    def __init__(self, low: float, high: float, left: int = 38, top: int = 8) -> None:
        self.low, self.high, self.left, self.top = low, high, left, top
        self.image, self.draw = canvas.blank_tile()

    def y(self, value: float) -> float:
        """Returns the height of a value in pixels from the top."""
        return self.top + (self.high - value) / (self.high - self.low) * (BASE - self.top)

    def write(self, x: float, y: float, text: str, anchor: str, colour: canvas.Colour = canvas.FAINT) -> None:
        """Writes a text in small print."""
        self.draw.text((x, y), text, fill=colour, font=canvas.font(12), anchor=anchor)

    def mark(self, value: float, text: str) -> None:
        """Draws a line at a value, with a text beside it."""
        y = self.y(value)
        self.draw.line((self.left, y, canvas.TILE, y), fill=GRID)
        self.write(self.left - 4, y, text, "rm")

    def along(self, steps: Sequence[int], right: int) -> list[float]:
        """Writes the first and the last step below the axis, and returns where each lies, up to ``right`` from the right."""
        self.write(self.left, canvas.TILE - 2, str(steps[0]), "lb")
        self.write(canvas.TILE - 2, canvas.TILE - 2, f"step {steps[-1]}", "rb")
        span = max(steps[-1] - steps[0], 1)
        return [self.left + (step - steps[0]) / span * (canvas.TILE - self.left - right) for step in steps]

    def curve(self, points: Sequence[tuple[float, float] | None], colour: canvas.Colour, width: int) -> None:
        """Draws lines between points, except where there is none, and a dot at the last one."""
        for before, after in pairwise(points):
            if before is not None and after is not None:
                self.draw.line((*before, *after), fill=colour, width=width)
        if points and points[-1] is not None:
            x, y = points[-1]
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def curves(series: Sequence[Sequence[float]], steps: Sequence[int], strong: int | None = None) -> Tensor:
    """Draws one curve for each region, on an axis that magnifies values near 1.

    Args:
        series: R sequences of values up to 1, all of one length; a nan leaves a gap.
        steps: The step of each value.
        strong: The number of the series that is drawn in the colour of an alarm.
    """
    positions = [[-np.log10(np.clip(1 - value, 1e-4, 1.0)) for value in values] for values in series]
    high = max([1.2, *(position * 1.08 for values in positions for position in values if not np.isnan(position))])
    axes = _Axes(0.0, high, top=6)
    for value in (0.0, 0.5, 0.9, 0.99, 0.999):
        if axes.y(-np.log10(1 - value)) >= 4:
            axes.mark(-np.log10(1 - value), f"{value:g}")
    places = axes.along(steps, right=5)
    # the highlighted curve is drawn last, so that no other covers it
    for number in sorted(range(len(series)), key=lambda n: n == strong):
        colour, width = (canvas.ALARM, 4) if number == strong else (canvas.region_colour(number), 2)
        points = [None if np.isnan(p) else (x, axes.y(p)) for x, p in zip(places, positions[number], strict=True)]
        axes.curve(points, colour, width)
    return canvas.picture_of(axes.image)


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
    finite = [value for value in (*values, *(targets or ())) if np.isfinite(value)] or [0.0]
    # the axis ends 10 below the highest value, since a dead dimension would make the differences of the others invisible
    high = max(finite)
    low = max(min(finite), high - 10)
    low -= max(high - low, 1.0) / 4
    if floor is not None:
        low, high = floor, max(high, floor + 1e-3)
    axes = _Axes(low, high)
    width = (canvas.TILE - axes.left - 4) / max(len(values), 1)
    for value in (high, (high + low) / 2, low):
        axes.mark(value, f"{value:.1f}" if abs(high) >= 2 else f"{value:.2f}")

    def within(value: float) -> float:
        return axes.y(float(np.clip(value, low, high)))

    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        x = axes.left + number * width
        middle = x + width / 2
        colour = canvas.ALARM if strong[number] else canvas.region_colour(0)
        if np.isfinite(value):
            top = min(within(value), BASE - 2)
            axes.draw.rectangle((x + 0.1 * width, top, x + 0.9 * width, BASE), fill=colour)
        elif width >= 8:
            axes.write(middle, BASE - 2, "?", "mb", colour)
        if width >= axes.draw.textlength(name, font=canvas.font(12)) + 2 or (strong[number] and len(values) <= 64):
            axes.write(middle, canvas.TILE - 2, name, "mb")
        if intervals is not None:
            least, most = intervals[number]
            axes.draw.line((middle, within(least), middle, within(most)), fill=canvas.FAINT, width=2)
        if targets is not None:
            y = within(targets[number])
            axes.draw.line((x, y, x + width, y), fill=canvas.INK, width=3)
    return canvas.picture_of(axes.image)


def violins(groups: Sequence[Tensor], names: Sequence[str], marked: Sequence[int]) -> Tensor:
    """Draws the distribution of each group as a mirrored histogram, with a line at its mean.

    Args:
        groups: The values in 0..1 of each group.
        names: The name below each group, which is left out where it does not fit.
        marked: The numbers of the groups that are drawn in the colour of an alarm.
    """
    axes, bins = _Axes(0.0, 1.0, left=30), 16
    width = (canvas.TILE - axes.left - 4) / max(len(groups), 1)
    for value in (0.0, 0.5, 1.0):
        axes.mark(value, f"{value:g}")
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        middle = axes.left + (number + 0.5) * width
        colour = canvas.ALARM if number in marked else canvas.region_colour(number)
        if len(group):
            heights = torch.histc(group.double(), bins, 0, 1)
            for position, height in enumerate((heights / heights.max()).tolist()):
                half = height * width * 0.45
                if half > 0:
                    top, bottom = axes.y((position + 1) / bins), axes.y(position / bins)
                    axes.draw.rectangle((middle - half, top, middle + half, bottom), fill=colour)
            y = axes.y(float(group.mean()))
            axes.draw.line((middle - width * 0.45, y, middle + width * 0.45, y), fill=canvas.INK, width=2)
        if width >= 8 * len(name) + 2:
            axes.write(middle, canvas.TILE - 2, name, "mb")
    return canvas.picture_of(axes.image)


def matrix(values: Tensor, most: float) -> Tensor:
    """Draws a matrix (L, L) as coloured cells, from almost white at 0 to dark red at ``most`` and above."""
    position = (values.nan_to_num(0.0).clamp(0, most) / most).numpy() * (len(canvas.HEAT) - 1)
    channels = [np.interp(position, range(len(canvas.HEAT)), canvas.HEAT[:, channel]) for channel in range(3)]
    picture = torch.from_numpy(np.stack(channels, -1)).round().byte()
    return canvas.on_white_tile(enlarged(picture))


class Scatter:
    """A scatter plot of a square around the origin, into which points and ellipses are drawn one after another.

    Args:
        reach: Half the side of the square, in the units of the data.
    """

    def __init__(self, reach: float) -> None:
        self.reach = reach
        self._image, self._draw = canvas.blank_tile()

    def _at(self, point: Tensor) -> tuple[float, float]:
        x, y = (point / self.reach).tolist()
        return (x + 1) / 2 * canvas.TILE, (1 - y) / 2 * canvas.TILE

    def points(self, points: Tensor, colours: Sequence[canvas.Colour], radius: int) -> None:
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
        self._draw.line([self._at(point) for point in mean + 2 * circle @ root.T], fill=canvas.INK, width=1)

    def picture(self) -> Tensor:
        """Returns the plot as a picture (H, W, 3) uint8."""
        return canvas.picture_of(self._image)


def line(values: Sequence[float], steps: Sequence[int], most: float) -> Tensor:
    """Draws one curve on an axis from 0 to ``most``; values that are not finite are left out."""
    axes = _Axes(0.0, most)
    for value in (0.0, most / 2, most):
        axes.mark(value, f"{value:.3g}")
    places = axes.along(steps, right=6)
    points = [(x, axes.y(value)) for x, value in zip(places, values, strict=True) if np.isfinite(value)]
    axes.curve(points, canvas.region_colour(0), width=3)
    return canvas.picture_of(axes.image)
