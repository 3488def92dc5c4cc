"""Pictures of images and of regions, as uint8 tensors (H, W, 3): scaled, enlarged, outlined, coloured and in grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_gendiag.plots.canvas import ALARM, INK, TILE, Colour, font, on_white_tile, picture_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDEST = 4
"""Largest width of an enlarged picture as a multiple of its height."""


def as_rgb(image: Tensor, low: float, high: float) -> Tensor:
    """Returns images (..., C, H, W) as (..., H, W, 3) uint8, where ``low`` is black and ``high`` is white.

    Images with other than three channels become grey by the mean over their channels.
    """
    image = image.detach().float().cpu()
    scaled = ((image - low) / max(high - low, 1e-12)).nan_to_num(0.0)
    if image.shape[-3] != 3:
        scaled = scaled.mean(-3, keepdim=True)
    pixels = (scaled.clamp(0, 1) * 255).round().byte()
    return pixels.movedim(-3, -1).expand(*image.shape[:-3], *image.shape[-2:], 3)


def enlarged(picture: Tensor, height: int = TILE) -> Tensor:
    """Returns a picture (H, W, 3) enlarged without blur, by the largest integer factor that fits a height.

    Larger pictures are reduced to this height. The width is a 16th to 4 times of it, so that a signal of one row or column
    is stretched and visible.
    """
    size = _enlarged_size(picture.shape[0], picture.shape[1], height)
    resized = F.interpolate(picture.permute(2, 0, 1)[None].float(), size=size, mode="area")
    return resized[0].permute(1, 2, 0).round().byte()


def enlarged_labels(labels: Tensor, height: int = TILE) -> Tensor:
    """Returns labels (H, W) in the size that :func:`enlarged` gives to a picture of the same height and width."""
    h, w = labels.shape
    rows, columns = _enlarged_size(h, w, height)
    return labels[torch.arange(rows) * h // rows][:, torch.arange(columns) * w // columns]


def _enlarged_size(h: int, w: int, height: int) -> tuple[int, int]:
    rows = height if h > height else h * (height // h)
    return rows, min(max(w * rows // h, rows // 16, 1), WIDEST * rows)


def edges(labels: Tensor, thickness: int = 1) -> Tensor:
    """Returns (H, W) bool, true within ``thickness`` pixels of a border between different labels."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    if thickness > 1:
        grown = F.max_pool2d(edge[None].float(), 2 * thickness - 1, stride=1, padding=thickness - 1)
        edge = grown[0] > 0
    return edge


def outlined(picture: Tensor, labels: Tensor, chosen: int | None = None) -> Tensor:
    """Returns a picture with grey lines between regions, and a thick red line around the chosen region.

    The picture (H, W, 3) and the labels (H, W) have the same size.
    """
    picture = picture.clone()
    picture[edges(labels)] = torch.tensor((128, 134, 139), dtype=torch.uint8)
    if chosen is not None:
        inside = labels == chosen
        # the line is closed within two pixels of the image's border
        rim = inside.clone()
        rim[2:-2, 2:-2] = False
        picture[edges(inside, 2) | rim] = torch.tensor(ALARM, dtype=torch.uint8)
    return picture


def filled(labels: Tensor, colours: Sequence[Colour], names: Sequence[str] = ()) -> Tensor:
    """Returns a map of regions (H, W) in their colours, with the name of each region at its innermost point."""
    from scipy.ndimage import distance_transform_edt

    table = torch.tensor(list(colours), dtype=torch.uint8)
    image = Image.fromarray(outlined(table[labels], labels).numpy())
    draw = ImageDraw.Draw(image)
    for region, name in enumerate(names):
        inner = distance_transform_edt(np.pad((labels == region).numpy(), 1))[1:-1, 1:-1]
        y, x = np.unravel_index(inner.argmax(), inner.shape)
        half = draw.textlength(name, font=font(13)) / 2 + 2
        x = float(np.clip(x, half, labels.shape[1] - half))
        light = sum(colours[region]) > 380
        draw.text((x, float(y)), name, fill=INK if light else (255, 255, 255), font=font(13), anchor="mm")
    return picture_of(image)


def tinted(picture: Tensor, labels: Tensor, colours: Sequence[Colour], strength: float = 0.55) -> Tensor:
    """Returns a picture blended with the colour of each region, which has a weight of ``strength``."""
    tint = torch.tensor(list(colours), dtype=torch.float)[labels]
    return (picture.float() * (1 - strength) + tint * strength).round().byte()


def shrunk(images: Tensor, side: int) -> Tensor:
    """Returns images (N, C, H, W) of which no side is longer than ``side``."""
    longest = max(images.shape[2:])
    if longest <= side:
        return images
    shape = [max(1, round(length * side / longest)) for length in images.shape[2:]]
    return F.interpolate(images.float(), size=shape, mode="area")


def pixels(image: Tensor, low: float, high: float) -> NDArray[np.uint8]:
    """Returns an image (C, H, W) as an array (H, W, 3) uint8, or (H, W) without colours; ``low`` is black."""
    rgb = as_rgb(image, low, high)
    return (rgb if image.shape[0] == 3 else rgb[..., 0]).numpy()


def grid(images: Tensor, columns: int) -> Tensor:
    """Returns images (N, C, H, W) in rows as one image (C, rows H, columns W), without the last ones that fill no row."""
    rows = len(images) // columns
    _, c, h, w = images.shape
    return (
        images[: rows * columns].view(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)
    )


def contact_sheet(images: Tensor) -> Tensor:
    """Returns one tile with a grid of images (rows, columns, C, H, W), which share one scale of values."""
    low, high = float(images.min()), float(images.max())
    cells = F.pad(as_rgb(images, low, high), (0, 0, 0, 1, 0, 1), value=255)  # (r, c, H + 1, W + 1, 3)
    sheet = cells.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    scale = TILE / max(sheet.shape[:2])
    shape = (max(1, round(sheet.shape[0] * scale)), max(1, round(sheet.shape[1] * scale)))
    resized = F.interpolate(sheet.permute(2, 0, 1)[None].float(), size=shape, mode="area" if scale < 1 else "nearest")
    return on_white_tile(resized[0].permute(1, 2, 0).round().byte())
