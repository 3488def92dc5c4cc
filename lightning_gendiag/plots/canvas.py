"""Colours and fonts of all pictures, and ``panel``, which arranges tiles above a legend and a note."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
"""Red, green and blue, each in 0..255."""

TILE = 232
"""Height and width of a tile in pixels; enlarged images may be a little smaller."""

INK: Colour = (32, 33, 36)
"""Colour of titles, legends and lines."""

FAINT: Colour = (95, 99, 104)
"""Colour of captions, notes and the labels of axes."""

ALARM: Colour = (217, 48, 37)
"""Colour of what an alarm is about."""

REGION_COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66),
    (127, 127, 127), (148, 103, 189), (23, 190, 207), (188, 189, 34), (140, 86, 75),
)  # fmt: skip
"""The palette of Okabe and Ito, which colour-blind people can distinguish, and more; it repeats after twelve regions."""

HEAT = np.array([[245, 245, 240], [253, 212, 158], [239, 101, 72], [127, 0, 0]], dtype=float)
"""The colour map of ``heat`` and of matrices, from light to dark red."""


class Tile(NamedTuple):
    """A picture of a panel, and the caption above it."""

    caption: str
    picture: Tensor  # (H, W, 3) uint8


class Row(NamedTuple):
    """A line of the legend; a strong line is drawn in the colour of an alarm."""

    colour: Colour
    text: str
    strong: bool = False


class Occasion(NamedTuple):
    """When a panel is drawn, and what an alarm adds to it."""

    step: int
    """Of the evaluation."""
    marked: Collection[int] = ()
    """Numbers of the regions, classes or dimensions that are drawn in the colour of an alarm."""
    note: str = ""
    """Text below the panel."""


def region_colour(region: int) -> Colour:
    """Returns the colour of a region, given its number."""
    return REGION_COLOURS[region % len(REGION_COLOURS)]


def heat(magnitude: float, most: float = 1000.0) -> Colour:
    """Returns the colour of a magnitude on a logarithmic scale, from almost white at 1 to dark red at ``most``.

    Args:
        magnitude: Values up to 1 have the lightest colour; nan and inf are dark grey.
        most: The value from which on the colour is the darkest.

    Example:
        >>> heat(0.5), heat(1000.0)
        ((245, 245, 240), (127, 0, 0))
    """
    if not np.isfinite(magnitude):
        return (60, 60, 60)
    position = np.clip(np.log(max(magnitude, 1.0)) / np.log(most), 0, 1) * (len(HEAT) - 1)
    red, green, blue = (int(np.interp(position, range(len(HEAT)), HEAT[:, channel])) for channel in range(3))
    return red, green, blue


def blank_tile() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Returns a white tile and the object that draws on it."""
    image = Image.new("RGB", (TILE, TILE), (255, 255, 255))
    return image, ImageDraw.Draw(image)


def picture_of(image: Image.Image) -> Tensor:
    """Returns what was drawn on an image as a picture (H, W, 3) uint8."""
    return torch.from_numpy(np.asarray(image).copy())


def on_white_tile(picture: Tensor) -> Tensor:
    """Returns a tile with a picture (H, W, 3) in its top left corner, cropped where it is larger than the tile."""
    h, w = (min(size, TILE) for size in picture.shape[:2])
    tile = torch.full((TILE, TILE, 3), 255, dtype=torch.uint8)
    tile[:h, :w] = picture[:h, :w]
    return tile


def panel(title: str, tiles: Sequence[Tile], rows: Sequence[Row] = (), note: str = "") -> Tensor:
    """Draws a panel, which is two tiles wide so that it is legible on the narrow cards of TensorBoard.

    Args:
        title: The text above the tiles; long titles are wrapped.
        tiles: The pictures, with at least one.
        rows: The legend below the tiles.
        note: The text at the bottom, in small print.

    Returns:
        The picture (H, W, 3) uint8.
    """
    margin, gap, line = 10, 10, 22
    cells = [(tile.picture.shape[1], tile.picture.shape[0]) for tile in tiles]
    wide, tall = max(w for w, _ in cells), max(h for _, h in cells)
    width = 2 * margin + gap + 2 * wide
    titles, notes = _wrapped(title, 18, width - 2 * margin), _wrapped(note, 14, width - 2 * margin)
    top = margin + 24 * len(titles)
    grid = (len(tiles) + 1) // 2 * (tall + 22 + gap)
    image = Image.new("RGB", (width, top + grid + line * len(rows) + 18 * len(notes) + margin), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(titles):
        draw.text((margin, margin + 24 * number), text, fill=INK, font=font(18))
    for number, tile in enumerate(tiles):
        x, y = margin + number % 2 * (wide + gap), top + number // 2 * (tall + 22 + gap)
        draw.text((x, y), tile.caption, fill=FAINT, font=font(15))
        image.paste(Image.fromarray(tile.picture.numpy()), (x, y + 22))
    y = top + grid
    for row in rows:
        draw.rectangle((margin, y + 3, margin + 14, y + 17), fill=row.colour, outline=FAINT)
        draw.text((margin + 22, y), row.text, fill=ALARM if row.strong else INK, font=font(15))
        y += line
    for text in notes:
        draw.text((margin, y), text, fill=FAINT, font=font(14))
        y += 18
    return picture_of(image)


PLAIN = str.maketrans({"σ": "std", "⁶": "^6", "×": "x"})
"""Replacements of characters that Pillow's font lacks."""


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Returns a text as lines of at most a width in pixels; a longer word has a line of its own."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = []
    for word in text.translate(PLAIN).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measure.textlength(longer, font=font(size)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)
