"""Pictures of results: tensors in, uint8 pictures (H, W, 3) out; drawn with Pillow, which does not block a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]

TILE = 224
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
    """An image (C, H, W) as (H, W, 3) uint8, ``low`` black and ``high`` white; other than 3 channels become grey."""
    image = image.detach().float().cpu()
    if len(image) != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    scaled = (image - low) / max(high - low, 1e-12)
    return (scaled.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


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


def panel(title: str, tiles: Sequence[Tile], rows: Sequence[Row] = (), note: str = "") -> Tensor:
    """Tiles side by side with a title above, a legend to the right and a note below."""
    margin, gap, line = 14, 12, 22
    top = margin + 26 + 22
    width = margin + sum(tile.picture.shape[1] + gap for tile in tiles)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    if rows:
        longest = max(measure.textlength(row.text, font=_font(14)) for row in rows)
        width += int(longest) + 30
    notes = note.splitlines()
    width = max(width, int(measure.textlength(title, font=_font(18))) + 2 * margin)
    width = max([width, *(int(measure.textlength(words, font=_font(13))) + 2 * margin for words in notes)])
    tall = max([tile.picture.shape[0] for tile in tiles] + [line * len(rows)])
    image = Image.new("RGB", (width, top + tall + margin + 18 * len(notes)), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text((margin, margin), title, fill=INK, font=_font(18))
    x = margin
    for tile in tiles:
        draw.text((x, top - 20), tile.caption, fill=FAINT, font=_font(13))
        image.paste(Image.fromarray(tile.picture.numpy()), (x, top))
        x += tile.picture.shape[1] + gap
    for number, row in enumerate(rows):
        y = top + number * line
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=row.colour, outline=FAINT)
        draw.text((x + 22, y), row.text, fill=ALARM if row.strong else INK, font=_font(14))
    for number, words in enumerate(notes):
        draw.text((margin, top + tall + 8 + 18 * number), words, fill=FAINT, font=_font(13))
    return torch.from_numpy(np.asarray(image).copy())


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
