"""Data of the examples: the 1,797 digits of scikit-learn, MNIST from a folder, and synthetic scenes with known regions."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def digits(size: int = 32) -> tuple[Tensor, Tensor]:
    """Returns images (1797, 1, size, size) in -1..1, enlarged from 8x8, and their labels (1797,)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(data.target).long()


def digit_batches(batch_size: int = 64, size: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    """Returns a loader of shuffled batches of digits, as pairs of images and labels."""
    return DataLoader(TensorDataset(*digits(size)), batch_size=batch_size, shuffle=True, drop_last=True)


def scenes(n: int, num_regions: int = 4, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns images with known regions, which are rectangles that vary independently of one another.

    Each rectangle contains a wave with its own direction and length; its phase and amplitude are random in each image,
    so that all pixels of a rectangle vary together.

    Args:
        n: The number of images.
        num_regions: The number of regions R, 2 to 8.
        size: The height and width of the images: 8, 16 or 32.
        seed: The seed of the rectangles and of the images.

    Returns:
        Images (n, 1, size, size) in -1..1, and the regions (size, size) int64 in 0..R-1.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    # the largest rectangle on a grid of 4x4 cells is cut across its longer side until there are enough rectangles
    boxes = [(0, 0, 4, 4)]
    while len(boxes) < num_regions:
        boxes.sort(key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        top, left, bottom, right = boxes.pop()
        across = bottom - top > right - left
        cut = 1 + int(uniform() * (max(bottom - top, right - left) - 1))
        boxes += (
            [(top, left, top + cut, right), (top + cut, left, bottom, right)]
            if across
            else [(top, left, bottom, left + cut), (top, left + cut, bottom, right)]
        )
    fine = 32
    labels = torch.zeros(fine, fine, dtype=torch.long)
    images = torch.zeros(n, fine, fine)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, fine), torch.linspace(0, 1, fine), indexing="ij")
    for region, box in enumerate(boxes):
        top, left, bottom, right = (8 * edge for edge in box)
        labels[top:bottom, left:right] = region
        angle, waves = uniform() * math.pi, 1 + uniform()
        along = 2 * math.pi * waves * (angle.cos() * columns + angle.sin() * rows)
        wave = (0.4 + 0.6 * uniform(n, 1, 1)) * torch.cos(along + 2 * math.pi * uniform(n, 1, 1))
        images = torch.where(labels == region, wave, images)
    step = fine // size
    return F.avg_pool2d(images[:, None], step), labels[::step, ::step]


def mnist(folder: Path | str, part: str = "t10k") -> tuple[Tensor, Tensor]:
    """Returns images (N, 1, 32, 32) in -1..1, padded from 28x28, and their labels (N,), read from idx files.

    Args:
        folder: The folder of ``<part>-images-idx3-ubyte`` and ``<part>-labels-idx1-ubyte``, which may end in ``.gz``.
        part: ``"train"`` or ``"t10k"``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not an idx file of bytes.
    """
    images = _idx(Path(folder), f"{part}-images-idx3-ubyte").float()[:, None] / 127.5 - 1
    return F.pad(images, (2, 2, 2, 2), value=-1.0), _idx(Path(folder), f"{part}-labels-idx1-ubyte").long()


def _idx(folder: Path, name: str) -> Tensor:
    """Returns the array of bytes in an idx file, gzipped or not."""
    packed, plain = folder / f"{name}.gz", folder / name
    if not packed.exists() and not plain.exists():
        raise FileNotFoundError(f"folder must hold {name} or {name}.gz, got {folder}.")
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} must be an idx file of bytes, got one that begins with {content[:4]!r}.")
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(content[3])]
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
