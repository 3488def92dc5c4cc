"""Pictures of results: tensors in, uint8 pictures (H, W, 3) out; drawn with Pillow, which does not block a loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

TILE = 232
"""Height of a tile in screen pixels, about."""

INK: Colour = (32, 33, 36)
FAINT: Colour = (95, 99, 104)
ALARM: Colour = (217, 48, 37)

REGION_COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
    (127, 127, 127), (148, 103, 189), (23, 190, 207), (188, 189, 34), (140, 86, 75),
)  # fmt: skip
"""Okabe and Ito's colours, told apart by most eyes, and some more; they repeat beyond twelve regions."""

_HEAT = np.array([[245, 245, 240], [253, 212, 158], [239, 101, 72], [127, 0, 0]], dtype=float)


class Tile(NamedTuple):
    """One picture of a panel and the line above it."""

    caption: str
    picture: Tensor  # (H, W, 3) uint8


class Row(NamedTuple):
    """One line of a legend."""

    colour: Colour
    text: str
    strong: bool = False


def region_colour(region: int) -> Colour:
    """The colour of a region's number."""
    return REGION_COLOURS[region % len(REGION_COLOURS)]


def heat(magnitude: float, most: float = 1000.0) -> Colour:
    """White-ish up to 1, through orange, to dark red at ``most``, by the logarithm.

    Example:
        >>> heat(0.5), heat(1000.0)
        ((245, 245, 240), (127, 0, 0))
    """
    if not np.isfinite(magnitude):
        return (60, 60, 60)
    place = np.clip(np.log(max(magnitude, 1.0)) / np.log(most), 0, 1) * (len(_HEAT) - 1)
    red, green, blue = (int(np.interp(place, range(len(_HEAT)), _HEAT[:, channel])) for channel in range(3))
    return red, green, blue


def as_rgb(image: Tensor, low: float, high: float) -> Tensor:
    """Images (..., C, H, W) as (..., H, W, 3) uint8, ``low`` black and ``high`` white; other than 3 channels become grey."""
    image = image.detach().float().cpu()
    scaled = ((image - low) / max(high - low, 1e-12)).nan_to_num(0.0)
    if image.shape[-3] != 3:
        scaled = scaled.mean(-3, keepdim=True)
    bytes_ = (scaled.clamp(0, 1) * 255).round().byte()
    return bytes_.movedim(-3, -1).expand(*image.shape[:-3], *image.shape[-2:], 3)


def enlarged(picture: Tensor, height: int = TILE) -> Tensor:
    """A picture (H, W, 3) enlarged by a whole factor, without blur, to about a height; larger ones are reduced."""
    h = picture.shape[0]
    if h > height:
        shape = (height, max(1, picture.shape[1] * height // h))
        small = F.interpolate(picture.permute(2, 0, 1)[None].float(), size=shape, mode="area")
        return small[0].permute(1, 2, 0).round().byte()
    factor = max(1, height // h)
    return picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def enlarged_labels(labels: Tensor, height: int = TILE) -> Tensor:
    """Labels (H, W) at the size of :func:`enlarged`."""
    h, w = labels.shape
    if h > height:
        rows = torch.arange(height) * h // height
        columns = torch.arange(max(1, w * height // h)) * h // height
        return labels[rows][:, columns.clamp(max=w - 1)]
    factor = max(1, height // h)
    return labels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def edges(labels: Tensor, thickness: int = 1) -> Tensor:
    """(H, W) bool: where neighbours have different labels, ``thickness`` pixels to each side."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    if thickness > 1:
        grown = F.max_pool2d(edge[None].float(), 2 * thickness - 1, stride=1, padding=thickness - 1)
        edge = grown[0] > 0
    return edge


def outlined(picture: Tensor, labels: Tensor, chosen: int | None = None) -> Tensor:
    """A picture and labels of one size: thin grey lines between regions, a thick red one around the chosen."""
    picture = picture.clone()
    picture[edges(labels)] = torch.tensor((128, 134, 139), dtype=torch.uint8)
    if chosen is not None:
        # a frame of another label closes the line at the image's border
        inside = F.pad((labels == chosen).long(), (1, 1, 1, 1))
        picture[edges(inside, 2)[1:-1, 1:-1] | _rim(labels, chosen)] = torch.tensor(ALARM, dtype=torch.uint8)
    return picture


def _rim(labels: Tensor, chosen: int) -> Tensor:
    rim = torch.zeros(labels.shape, dtype=torch.bool)
    rim[:2], rim[-2:], rim[:, :2], rim[:, -2:] = True, True, True, True
    return rim & (labels == chosen)


def filled(labels: Tensor, colours: Sequence[Colour], names: Sequence[str] = ()) -> Tensor:
    """Each region in its colour, its name written at its innermost point."""
    from scipy.ndimage import distance_transform_edt

    table = torch.tensor(list(colours), dtype=torch.uint8)
    picture = outlined(table[labels], labels)
    if not names:
        return picture
    image = Image.fromarray(picture.numpy())
    draw = ImageDraw.Draw(image)
    for region, name in enumerate(names):
        inner = distance_transform_edt(np.pad((labels == region).numpy(), 1))[1:-1, 1:-1]
        y, x = np.unravel_index(inner.argmax(), inner.shape)
        half = draw.textlength(name, font=_font(13)) / 2 + 2
        x = float(np.clip(x, half, labels.shape[1] - half))
        light = sum(colours[region]) > 380
        draw.text((x, float(y)), name, fill=INK if light else (255, 255, 255), font=_font(13), anchor="mm")
    return torch.from_numpy(np.asarray(image).copy())


def tinted(picture: Tensor, labels: Tensor, colours: Sequence[Colour], strength: float = 0.55) -> Tensor:
    """A picture with each region's colour laid over it."""
    tint = torch.tensor(list(colours), dtype=torch.float)[labels]
    return (picture.float() * (1 - strength) + tint * strength).round().byte()


def curves(series: Sequence[Sequence[float]], steps: Sequence[int], strong: int | None = None) -> Tensor:
    """Curves of numbers up to 1 in the regions' colours, on an axis that spreads out what is near to 1.

    Args:
        series: R sequences of one length; nan leaves a gap.
        steps: where their values lie.
        strong: the series that is drawn in the colour of an alarm.
    """
    size, left, bottom = TILE, 38, 20
    image = Image.new("RGB", (size, size), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    places = [[-np.log10(np.clip(1 - value, 1e-4, 1.0)) for value in values] for values in series]
    top = max([1.2, *(place * 1.08 for values in places for place in values if not np.isnan(place))])
    span = max(steps[-1] - steps[0], 1)

    def at(step: int, place: float) -> tuple[float, float]:
        x = left + (step - steps[0]) / span * (size - left - 5)
        return x, size - bottom - place / top * (size - bottom - 6)

    for value in (0.0, 0.5, 0.9, 0.99, 0.999):
        x, y = at(steps[0], -np.log10(1 - value))
        if y >= 4:
            draw.line((left, y, size, y), fill=(218, 220, 224))
            draw.text((left - 4, y), f"{value:g}", fill=FAINT, font=_font(12), anchor="rm")
    draw.text((left, size - 2), str(steps[0]), fill=FAINT, font=_font(12), anchor="lb")
    draw.text((size - 2, size - 2), f"step {steps[-1]}", fill=FAINT, font=_font(12), anchor="rb")
    # the alarming one last, on top of the others
    for number in sorted(range(len(series)), key=lambda n: n == strong):
        colour, width = (ALARM, 4) if number == strong else (region_colour(number), 2)
        points = [None if np.isnan(p) else at(step, p) for step, p in zip(steps, places[number], strict=True)]
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
    """Bars in the order given, from a floor or from a quarter of the axis below the lowest; names where they fit.

    Args:
        values: one to a bar.
        names: written below.
        strong: which are drawn in the colour of an alarm.
        floor: where the axis begins.
        targets: where a line across each bar says it should end.
        intervals: (low, high) of each bar's whisker.
    """
    image, draw = _sheet()
    finite = [value for value in (*values, *(targets or ())) if np.isfinite(value)] or [0.0]
    # a dead dimension lies far below: it must not squeeze the others
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
            (left - 4, y), f"{value:.1f}" if abs(high) >= 2 else f"{value:.2f}", fill=FAINT, font=_font(12), anchor="rm"
        )
    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        clipped = float(np.clip(value, low, high)) if np.isfinite(value) else low
        x, y = left + number * width, 8 + (high - clipped) / (high - low) * (TILE - bottom - 8)
        colour = ALARM if strong[number] else REGION_COLOURS[0]
        if np.isfinite(value):
            draw.rectangle((x + 0.1 * width, min(y, TILE - bottom - 2), x + 0.9 * width, TILE - bottom), fill=colour)
        elif width >= 8:
            draw.text((x + width / 2, TILE - bottom - 2), "?", fill=colour, font=_font(12), anchor="mb")
        if width >= draw.textlength(name, font=_font(12)) + 2 or (strong[number] and len(values) <= 64):
            draw.text((x + width / 2, TILE - 2), name, fill=FAINT, font=_font(12), anchor="mb")

        def place(at: float) -> float:
            return 8 + (high - float(np.clip(at, low, high))) / (high - low) * (TILE - bottom - 8)

        if intervals is not None:
            middle, (least, most) = x + width / 2, intervals[number]
            draw.line((middle, place(least), middle, place(most)), fill=FAINT, width=2)
        if targets is not None:
            draw.line((x, place(targets[number]), x + width, place(targets[number])), fill=INK, width=3)
    return torch.from_numpy(np.asarray(image).copy())


def violins(groups: Sequence[Tensor], names: Sequence[str], marked: Sequence[int]) -> Tensor:
    """The distribution of each group's values in 0..1 as a mirrored histogram, with a line at its mean."""
    image, draw = _sheet()
    left, bottom, bins = 30, 20, 16
    width = (TILE - left - 4) / max(len(groups), 1)
    for value in (0.0, 0.5, 1.0):
        y = 8 + (1 - value) * (TILE - bottom - 8)
        draw.line((left, y, TILE, y), fill=(218, 220, 224))
        draw.text((left - 4, y), f"{value:g}", fill=FAINT, font=_font(12), anchor="rm")
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        middle = left + (number + 0.5) * width
        colour = ALARM if number in marked else region_colour(number)
        if len(group):
            heights = torch.histc(group.double(), bins, 0, 1)
            for place, height in enumerate((heights / heights.max()).tolist()):
                top = 8 + (1 - (place + 1) / bins) * (TILE - bottom - 8)
                half = height * width * 0.45
                if half > 0:
                    draw.rectangle((middle - half, top, middle + half, top + (TILE - bottom - 8) / bins), fill=colour)
            y = 8 + (1 - float(group.mean())) * (TILE - bottom - 8)
            draw.line((middle - width * 0.45, y, middle + width * 0.45, y), fill=INK, width=2)
        if width >= 8 * len(name) + 2:
            draw.text((middle, TILE - 2), name, fill=FAINT, font=_font(12), anchor="mb")
    return torch.from_numpy(np.asarray(image).copy())


def matrix(values: Tensor, most: float) -> Tensor:
    """A matrix (L, L) of numbers from 0, white, to ``most`` or more, dark red."""
    place = (values.nan_to_num(0.0).clamp(0, most) / most).numpy() * (len(_HEAT) - 1)
    channels = [np.interp(place, range(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)]
    picture = torch.from_numpy(np.stack(channels, -1)).round().byte()
    return _centred(enlarged(picture))


def contact_sheet(images: Tensor) -> Tensor:
    """Images (rows, columns, C, H, W) side by side, on one scale of values."""
    low, high = float(images.min()), float(images.max())
    cells = F.pad(as_rgb(images, low, high), (0, 0, 0, 1, 0, 1), value=255)  # (r, c, H + 1, W + 1, 3)
    sheet = cells.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    size = max(sheet.shape[:2])
    scale = TILE / size
    shape = (max(1, round(sheet.shape[0] * scale)), max(1, round(sheet.shape[1] * scale)))
    resized = F.interpolate(sheet.permute(2, 0, 1)[None].float(), size=shape, mode="area" if scale < 1 else "nearest")
    return _centred(resized[0].permute(1, 2, 0).round().byte())


class Scatter:
    """A square of the plane around the origin, points and rings drawn into it in turn.

    Args:
        reach: half its side.
    """

    def __init__(self, reach: float) -> None:
        self.reach = reach
        self._image, self._draw = _sheet()

    def _at(self, point: Tensor) -> tuple[float, float]:
        x, y = (point / self.reach).tolist()
        return (x + 1) / 2 * TILE, (1 - y) / 2 * TILE

    def points(self, points: Tensor, colours: Sequence[Colour], radius: int) -> None:
        """Spots at points (N, 2)."""
        for point, colour in zip(points, colours, strict=True):
            x, y = self._at(point)
            self._draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def ring(self, mean: Tensor, covariance: Tensor) -> None:
        """The line at two standard deviations around a mean (2,), for a covariance (2, 2)."""
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
        angle = torch.linspace(0, 2 * torch.pi, 49, dtype=root.dtype)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        self._draw.line([self._at(point) for point in mean + 2 * circle @ root.T], fill=INK, width=1)

    def picture(self) -> Tensor:
        """All that was drawn, (H, W, 3) uint8."""
        return torch.from_numpy(np.asarray(self._image).copy())


def line(values: Sequence[float], steps: Sequence[int], most: float) -> Tensor:
    """One curve from 0 to ``most``."""
    image, draw = _sheet()
    left, bottom = 38, 20
    span = max(steps[-1] - steps[0], 1)
    for value in (0.0, most / 2, most):
        y = TILE - bottom - value / most * (TILE - bottom - 8)
        draw.line((left, y, TILE, y), fill=(218, 220, 224))
        draw.text((left - 4, y), f"{value:.3g}", fill=FAINT, font=_font(12), anchor="rm")
    draw.text((left, TILE - 2), str(steps[0]), fill=FAINT, font=_font(12), anchor="lb")
    draw.text((TILE - 2, TILE - 2), f"step {steps[-1]}", fill=FAINT, font=_font(12), anchor="rb")
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


def _sheet() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (TILE, TILE), (255, 255, 255))
    return image, ImageDraw.Draw(image)


def _centred(picture: Tensor) -> Tensor:
    """A picture of at most TILE by TILE on a white tile."""
    h, w = (min(size, TILE) for size in picture.shape[:2])
    tile = torch.full((TILE, TILE, 3), 255, dtype=torch.uint8)
    tile[:h, :w] = picture[:h, :w]
    return tile


def panel(title: str, tiles: Sequence[Tile], rows: Sequence[Row] = (), note: str = "") -> Tensor:
    """Tiles two by two, with a title above, a legend and a note below: legible on TensorBoard's narrow cards."""
    margin, gap, line = 10, 10, 22
    cells = [(tile.picture.shape[1], tile.picture.shape[0]) for tile in tiles]
    wide, tall = max(w for w, _ in cells), max(h for _, h in cells)
    width = 2 * margin + gap + 2 * wide
    titles, notes = _wrapped(title, 18, width - 2 * margin), _wrapped(note, 14, width - 2 * margin)
    top = margin + 24 * len(titles)
    grid = (len(tiles) + 1) // 2 * (tall + 22 + gap)
    image = Image.new("RGB", (width, top + grid + line * len(rows) + 18 * len(notes) + margin), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for number, words in enumerate(titles):
        draw.text((margin, margin + 24 * number), words, fill=INK, font=_font(18))
    for number, tile in enumerate(tiles):
        x, y = margin + number % 2 * (wide + gap), top + number // 2 * (tall + 22 + gap)
        draw.text((x, y), tile.caption, fill=FAINT, font=_font(15))
        image.paste(Image.fromarray(tile.picture.numpy()), (x, y + 22))
    y = top + grid
    for row in rows:
        draw.rectangle((margin, y + 3, margin + 14, y + 17), fill=row.colour, outline=FAINT)
        draw.text((margin + 22, y), row.text, fill=ALARM if row.strong else INK, font=_font(15))
        y += line
    for words in notes:
        draw.text((margin, y), words, fill=FAINT, font=_font(14))
        y += 18
    return torch.from_numpy(np.asarray(image).copy())


def _wrapped(words: str, size: int, width: int) -> list[str]:
    """Lines that fit a width in screen pixels."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure.textlength(longer, font=_font(size)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
