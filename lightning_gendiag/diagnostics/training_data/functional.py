"""Statistics of training batches: shares of classes, range, cells, repeated images, and whether they moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.diagnostics.training_data.moves import Moves
from lightning_gendiag.functional.results import MAX_CLASS_TAGS, loggable

CONFIDENCE = 0.9999
"""Probability that nothing is wrongly said to have moved at an evaluation, over all tests together."""

ROWS = 8
"""Number of images of a batch whose cells, range and repeats are measured; all labels are counted."""

MORE_ROWS = 4
"""The same is this many times as large for as many batches after an evaluation, so that short epochs are measured too."""

POSITIONS = 1024
"""Approximate largest number of positions of an image that are read; of larger ones every second, third, ... is."""

CELLS = {1: 16, 2: 4, 3: 2}
"""Number of cells along each axis, by the number of axes of an image beside the channels."""

CHANNELS = 4
"""Largest number of channels that have cells of their own; more are averaged."""

MAX_CLASSES = 1000
"""Labels from this one on are counted together and not judged."""

STATISTICS = ("mean", "mean square", "product with the image's mean")
"""What is measured in each cell of an image."""


class Glance(NamedTuple):
    """What is kept of a batch of n images until it is evaluated."""

    rows: Tensor
    """(k, C, ...) some of the images, with every second, third, ... position of large ones"""
    sums: Tensor
    """(n,) sum of each image, which is finite where the image is"""
    labels: Tensor | None
    """(n,) integers"""


def glance(data: Tensor, labels: Tensor | None = None, most: int = ROWS, first: int = 0) -> Glance:
    """Returns copies of some images of a batch, the sums of all, and all labels.

    Args:
        data: (N, ...) of real numbers.
        labels: (N,) integers.
        most: Largest number of images.
        first: Number of the batch; consecutive batches give images at other places.
    """
    data = data.detach()
    step = -(-len(data) // most) or 1
    # equally many of each place, so that batches can be stacked
    rows = data[first % step :: step][: len(data) // step] if step > 1 else data
    if rows.ndim == 2:
        rows = rows[:, None]
    if rows[0].numel() > POSITIONS * min(rows.shape[1], CHANNELS):
        rows = rows[strided(rows.shape)]
    sums = data.flatten(1).sum(1, dtype=torch.float32)
    # copies, since the training step may change a batch in place
    return Glance(rows.clone(), sums, None if labels is None else labels.detach().clone())


def strided(shape: Sequence[int]) -> tuple[slice, ...]:
    """Returns slices of (N, C, ...) that leave about ``POSITIONS`` positions beside the channels.

    Example:
        >>> strided((8, 3, 256, 256))
        (slice(None, None, None), slice(None, None, None), slice(None, None, 8), slice(None, None, 8))
    """
    axes = shape[2:]
    step = max(1, math.ceil((math.prod(axes) / POSITIONS) ** (1 / max(len(axes), 1))))
    return (slice(None), slice(None), *(slice(None, None, step if size > step else 1) for size in axes))


def grid_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the number of channels and of cells along each axis, for the shape (C, ...) or (F,) of one image or row.

    Example:
        >>> grid_of((3, 64, 64)), grid_of((1, 28, 28)), grid_of((200,)), grid_of((2,)), grid_of((64, 100))
        ((3, 4, 4), (1, 4, 4), (1, 16), (1, 2), (1, 16))
    """
    channels, *axes = shape if len(shape) > 1 else (1, *shape)
    if len(axes) not in CELLS:
        axes = [math.prod(axes)]
    return channels if channels <= CHANNELS else 1, *(min(size, CELLS[len(axes)]) for size in axes)


def cell_statistics(rows: Tensor, grid: Sequence[int]) -> Tensor:
    """Computes the mean, the mean square and the product with the whole image's mean, in each cell of each image.

    Args:
        rows: (N, C, ...) finite floats.
        grid: From :func:`grid_of`.

    Returns:
        (N, 3, P) for P cells of all channels.
    """
    channels, *cells = grid
    if rows.ndim - 2 != len(cells):
        rows = rows.flatten(2)
    if rows.shape[1] != channels:
        rows = rows.mean(1, keepdim=True)
    # no more cells than positions, where sizes vary
    pools: list[Any] = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]
    mean, square = (pools[len(cells) - 1](values, cells).flatten(1) for values in (rows, rows.square()))  # (N, P)
    return torch.stack([mean, square, mean * mean.mean(1, keepdim=True)], 1)


def row_hashes(rows: Tensor) -> Tensor:
    """Returns (N,) int64 numbers of images (N, ...): equal for equal images, and other ones for all others.

    They are seeded random projections in exact integer arithmetic, so that they depend neither on the device nor on the
    size of the batch.
    """
    # 32-bit products, which processors compute eight at a time; they wrap around
    bits = rows.flatten(1).float().contiguous().view(torch.int32)
    products = bits * _odd(bits.shape[1], bits.device)
    # pairs of products as one number, which takes a third of the time of a conversion
    return F.pad(products, (0, products.shape[1] % 2)).view(torch.int64).sum(1)


_SEED = 20240917


@lru_cache(maxsize=4)
def _odd(count: int, device: torch.device) -> Tensor:
    """Returns (count,) seeded odd 32-bit integers."""
    generator = torch.Generator().manual_seed(_SEED)
    numbers = torch.randint(-(2**30), 2**30, (count,), generator=generator, dtype=torch.int32)
    return (numbers * 2 + 1).to(device)


_moves_of = lru_cache(maxsize=2)(Moves)
"""Keeps the tests of the newest results, which words, series and scalars use in turn."""


@loggable
class TrainingDataResult(NamedTuple):
    """What the training batches since the last evaluation hold, beside the first ones of the run.

    Of pairs, the first entry is of the batches since the last evaluation and the second of the first batches.
    """

    shape: Tensor
    """(A,) channels, height and width of an image, or the axes of other data, which tell cells and words"""
    images: Tensor
    """(2,) number of images"""
    batches: Tensor
    """(2,) number of batches"""
    invalid_images: Tensor
    """(2,) number of images that contain nan or inf"""
    rows: Tensor
    """(2,) number of finite images whose cells were measured"""
    within: Tensor
    """(2,) number of these that repeat another one of their batch"""
    low: Tensor
    """(2,) least value of these"""
    high: Tensor
    """(2,) largest value of these"""
    edges: Tensor
    """(2, 2) sums of the least and of the largest value of each image"""
    edge_squares: Tensor
    """(2, 2) sums of their squares"""
    edge_batch_squares: Tensor
    """(2, 2) sums over batches of the squared sum in the batch over its number of images"""
    cells: Tensor
    """(2, 3, P) sums of the statistics of each cell, see :data:`STATISTICS`"""
    cell_squares: Tensor
    """(2, 3, P) as ``edge_squares``"""
    cell_batch_squares: Tensor
    """(2, 3, P) as ``edge_batch_squares``"""
    classes: Tensor
    """(2, K) number of images of each class; K is 0 without labels"""
    class_batch_squares: Tensor
    """(2, K) as ``edge_batch_squares``"""
    label_batches: Tensor
    """(2,) number of batches with labels"""
    hashes: Tensor
    """(n,) sorted numbers of the measured images since the last evaluation, equal for equal images"""
    first_hashes: Tensor
    """(m,) the same of the first images"""
    absent: Tensor
    """(K,) number of images since each class was last seen, before these batches; nan where it is not known"""
    confidence: Tensor
    """() probability that nothing is wrongly said to have moved, over all tests together"""
    skipped: Tensor
    """() number of batches since the last evaluation that were not looked at, to save time"""

    # ---- names ----

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of channels and of cells along each axis."""
        return grid_of([int(size) for size in self.shape])

    @property
    def noun(self) -> str:
        """What the data are called."""
        return {2: "series", 3: "images", 4: "volumes"}.get(len(self.shape), "rows")

    # ---- what moved ----

    @property
    def has_classes(self) -> bool:
        """Whether the labels can be classes. Those of which nearly all differ are for example the images' indices."""
        return _moves_of(self).has_classes

    @property
    def is_compared(self) -> bool:
        """Whether there are enough images of both sides."""
        return _moves_of(self).is_compared

    @property
    def is_ordered(self) -> bool:
        """Whether the first batches differ more among each other than shuffled ones do, as sorted data do."""
        return _moves_of(self).is_ordered

    @property
    def range_moved(self) -> float:
        """How far an end of the range surely moved, as a fraction of the width of the first images' range."""
        return _moves_of(self).range_moved

    @property
    def cells_moved(self) -> Tensor:
        """(P,) how far each cell surely moved, in standard deviations of single images."""
        return self._tensor(_moves_of(self).cells_moved)

    @property
    def share(self) -> Tensor:
        """(2, K) shares of the classes, adding to one."""
        return self._tensor(_moves_of(self).share)

    @property
    def moved_classes(self) -> list[int]:
        """Classes whose share surely changed by more than a factor of two, or that are gone."""
        return _moves_of(self).moved_classes

    @property
    def moved_cells(self) -> list[int]:
        """Cells of all channels that surely moved."""
        return _moves_of(self).moved_cells

    @property
    def variety(self) -> float:
        """Number of different images relative to that of the first images, 1 where they repeat as much as those."""
        return _moves_of(self).variety

    def moves(self) -> dict[str, str]:
        """Returns what moved, in words, by ``"invalid"``, ``"range"``, ``"duplicates"``, ``"classes"`` and ``"regions"``.

        What is a consequence of another move is left out, such as cells that move with the range.
        """
        return _moves_of(self).words

    def class_words(self, label: int) -> str:
        """Returns what happened to one class."""
        return _moves_of(self).class_words(label)

    def _tensor(self, values: Any) -> Tensor:
        """Returns numbers in float64, where the result is."""
        return torch.as_tensor(values, dtype=torch.float64, device=self.rows.device)

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all data and, with labels, of up to 20 classes, each of shape ()."""
        moves = _moves_of(self)
        compared = moves.is_compared
        low, high = float(self.low[0]), float(self.high[0])
        values = {
            "images": float(self.images[0]),
            "invalid": float(self.invalid_images[0] / self.images[0]),
            "low": low if math.isfinite(low) else math.nan,
            "high": high if math.isfinite(high) else math.nan,
            "range_shift": moves.range_moved if compared else 0.0,
            "cell_shift": moves.cells_moved.max() if compared else 0.0,
            "moved_cells": len(moves.moved_cells),
            "variety": moves.variety,
            "within": float(self.within[0] / self.rows[0]),
        }
        if moves.has_classes:
            now, first = moves.share
            values["class_distance"] = abs(now - first).sum() / 2 if moves.classes[1].any() else 0.0
            values["moved_classes"] = len(moves.moved_classes)
            if len(now) <= MAX_CLASS_TAGS:
                values |= {f"class_{c}": share for c, share in enumerate(now)}
        return dict(zip(values, self._tensor(list(values.values())), strict=True))
