"""Statistics of training batches: shares of classes, range, cells, repeated images, and whether they moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.functional.intervals import binomial_interval, normal_quantile
from lightning_gendiag.functional.results import MAX_CLASS_TAGS, loggable

CONFIDENCE = 0.9999
"""Probability that nothing is wrongly said to have moved at an evaluation, over all tests together."""

FACTOR = 2.0
"""A class moved where its share surely changed by this factor."""

RANGE_MOVED = 0.25
"""The range moved where an end of it surely did by this fraction of its width."""

CELL_MOVED = 0.5
"""A cell moved where a statistic of it surely did by this many standard deviations of single images."""

LEAST_STD = 0.02
"""Lower bound of these standard deviations as a fraction of the width of the range, for cells that are constant."""

REPEATED = 0.5
"""Images repeat where there are surely fewer different ones than this fraction of what the first images give."""

LEAST_ROWS = 32
"""Number of images of each side from which on cells and the range are compared."""

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

IMAGES_PER_LABEL = 1.5
"""Least mean number of the first images of each label that occurs among them. Of indices it is 1 until an epoch is over, and of
a thousand classes it is 1.6 with a thousand images."""

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


def expected_distinct(hashes: Tensor, size: int) -> float:
    """Computes the expected number of different hashes in a random selection of ``size`` of them (rarefaction).

    Source: Hurlbert, *The nonconcept of species diversity*, 1971.

    Example:
        >>> round(expected_distinct(torch.tensor([5, 5, 7, 7]), 2), 6), round(expected_distinct(torch.arange(9), 4), 6)
        (1.666667, 4.0)
    """
    counts = torch.unique(hashes, return_counts=True)[1].double()
    n = float(len(hashes))
    # the probability that a selection misses a key that occurs c times is C(n - c, size) / C(n, size)
    left = (n - counts - size).clamp(min=0)
    log_missed = torch.lgamma(n - counts + 1) - torch.lgamma(left + 1) - math.lgamma(n + 1) + math.lgamma(n - size + 1)
    missed = torch.where(n - counts >= size, log_missed.exp(), torch.zeros_like(counts))
    return float((1 - missed).sum())


def _once(compute: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Keeps what is computed of the newest results, since words, series and scalars use it in turn."""
    return lru_cache(maxsize=2)(compute)


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

    @property
    def _watched(self) -> str:
        return f"training {self.noun}{' that were looked at' if float(self.skipped) else ''}"

    @property
    def has_classes(self) -> bool:
        """Whether the labels can be classes. Those of which nearly all differ are for example the images' indices."""
        counts = self.classes[1] if float(self.classes[1].sum()) else self.classes[0]
        return float(counts.sum()) >= max(1.0, IMAGES_PER_LABEL * float((counts > 0).sum()))

    # ---- the tests ----

    @property
    def tail(self) -> float:
        """Probability with which each bound may be wrong, so that all hold together."""
        tests = 8 + 2 * self.cells[0].numel() + 6 * self.classes.shape[1] * self.has_classes
        return (1 - float(self.confidence)) / tests

    @property
    def is_compared(self) -> bool:
        """Whether there are enough images of both sides."""
        return bool((self.rows >= LEAST_ROWS).all())

    def _sure_shift(self, sums: Tensor, squares: Tensor, batch_squares: Tensor) -> tuple[Tensor, Tensor]:
        """How far means (2, ...) of single images surely moved, and the standard deviation of the first images."""
        n = self.rows.view(2, *[1] * (sums.ndim - 1))
        mean = sums / n
        variance = (squares / n - mean.square()).clamp(min=0)
        factor = _design_effect(batch_squares - n * mean.square(), variance, self.batches, self.tail)
        error = (variance * factor / n).sum(0).sqrt()
        return ((mean[0] - mean[1]).abs() - normal_quantile(self.tail) * error).clamp(min=0), variance[1].sqrt()

    @property
    def width(self) -> Tensor:
        """() mean distance between the least and the largest value of an image, of the first images."""
        least, most = self.edges[1].unbind()
        return (most - least) / self.rows[1]

    @property
    @_once
    def range_moved(self) -> Tensor:
        """() how far an end of the range surely moved, as a fraction of the width of the first images' range."""
        shift, _ = self._sure_shift(self.edges, self.edge_squares, self.edge_batch_squares)
        largest = (self.edges[1] / self.rows[1]).abs().max()
        width: Tensor = torch.maximum(self.width, 1e-6 * largest + 1e-12)
        return shift.amax() / width

    @property
    @_once
    def cells_moved(self) -> Tensor:
        """(P,) how far each cell surely moved, in standard deviations of single images.

        Where neither means nor mean squares moved, products with the image's mean show what changed its sign.
        """
        shift, std = self._sure_shift(self.cells, self.cell_squares, self.cell_batch_squares)
        width = self.width.clamp(min=1e-12)
        largest = torch.maximum(width, (self.edges[1] / self.rows[1]).abs().max())
        floor = LEAST_STD * torch.stack([width, width * largest, width * largest])[:, None]
        moved = shift / torch.maximum(std, floor)
        # the image's mean moves with each cell, so that products tell less of where it was
        alone = moved[:2].amax(0)
        if float(alone.max()) > CELL_MOVED:
            return alone
        return torch.where(moved[2] >= moved[2].max() / 2, torch.maximum(alone, moved[2]), alone)

    @property
    def share(self) -> Tensor:
        """(2, K) shares of the classes, adding to one."""
        return self.classes / self.classes.sum(1, keepdim=True)

    @property
    @_once
    def class_interval(self) -> Tensor:
        """(2, K, 2) bounds of the shares of a source that gives batches like these, exact where they are shuffled."""
        n = self.classes.sum(1, keepdim=True)
        p = self.classes / n
        factor = _design_effect(self.class_batch_squares - n * p.square(), p * (1 - p), self.label_batches, self.tail)
        # batches that hold few classes each tell less than as many single images
        bounds = []
        for counts, effect in zip(self.classes, factor, strict=True):
            fewer = effect.max() if len(effect) else effect.new_ones(())
            bounds.append(binomial_interval(counts / fewer, self.tail))
        return torch.stack(bounds)

    @property
    @_once
    def class_change(self) -> Tensor:
        """(K,) natural logarithm of the factor by which the share of each class surely changed, negative where it fell.

        -inf where the class has not been seen for so long that it is surely gone.
        """
        if not self.has_classes or not float(self.classes.sum(1).min()):
            return torch.zeros_like(self.absent)
        low, high = self.class_interval[0].unbind(1)
        first_low, first_high = self.class_interval[1].unbind(1)
        fell, rose = (high / first_low).log().clamp(max=0), (low / first_high).log().clamp(min=0)
        change = torch.where(first_low > 0, fell, 0.0) + rose.nan_to_num(0.0, neginf=0.0)
        return torch.where(self._gone(first_low), -math.inf, change)

    def _gone(self, first_low: Tensor) -> Tensor:
        """(K,) whether each class is surely absent."""
        unseen = self.absent.nan_to_num(0.0) + self.classes[0].sum()
        n = self.classes[1].sum()
        p = self.classes[1] / n
        factor = _design_effect(
            self.class_batch_squares - self.classes.sum(1, keepdim=True) * self.share.square(),
            self.share * (1 - self.share), self.label_batches, self.tail,
        )[1]  # fmt: skip
        log_chance = unseen / factor.max().clamp(min=1) * torch.log1p(-first_low.clamp(max=1 - 1e-9))
        return (self.classes[0] == 0) & (p > 0) & (log_chance < math.log(self.tail))

    @property
    def moved_classes(self) -> list[int]:
        """Classes whose share surely changed by more than a factor of two, or that are gone."""
        return (self.class_change.abs() > math.log(FACTOR)).nonzero().flatten().tolist()

    @property
    def moved_cells(self) -> list[int]:
        """Cells of all channels that surely moved."""
        return (self.cells_moved > CELL_MOVED).nonzero().flatten().tolist() if self.is_compared else []

    @property
    def is_ordered(self) -> bool:
        """Whether the first batches differ more among each other than shuffled ones do, as sorted data do."""
        n = self.rows[1]
        mean = self.cells[1] / n
        variance = (self.cell_squares[1] / n - mean.square()).clamp(min=0)
        excess = self.cell_batch_squares[1] - n * mean.square()
        parts = [_design_effect(excess, variance, self.batches[1], self.tail).flatten()]
        if self.classes.shape[1] and float(self.classes[1].sum()):
            total = self.classes[1].sum()
            p = self.classes[1] / total
            excess = self.class_batch_squares[1] - total * p.square()
            parts.append(_design_effect(excess, p * (1 - p), self.label_batches[1], self.tail)[p > 0])
        return any(bool((part > 1).double().mean() > 0.25) for part in parts)

    @property
    @_once
    def distinct(self) -> Tensor:
        """(2,) expected number of different images in equally many of both sides."""
        size = min(len(self.hashes), len(self.first_hashes))
        return self.rows.new_tensor([expected_distinct(hashes, size) for hashes in (self.hashes, self.first_hashes)])

    @property
    def variety(self) -> Tensor:
        """() number of different images relative to that of the first images, 1 where they repeat as much as those."""
        if not len(self.first_hashes) and len(self.hashes):
            # these are the first ones
            return torch.ones_like(self.rows[0])
        now, first = self.distinct.unbind()
        return now / first

    @property
    def repeats(self) -> bool:
        """Whether there are surely fewer than half as many different images as expected."""
        now, first = (float(count) for count in self.distinct)
        if not first or now >= REPEATED * first:
            return False
        # indicators of which images occur are negatively associated, so that Chernoff's bound holds
        ratio = max(now / first, 1e-12)
        return -first * (1 - ratio + ratio * math.log(ratio)) < math.log(self.tail)

    @property
    def has_more_invalid(self) -> bool:
        """Whether there are nan or inf where the first images had none, or surely twice as many as these had."""
        now, first = self.invalid_images.tolist()
        if not now or not float(self.images[1]):
            return False
        (low, _), (_, high) = (
            binomial_interval(torch.stack([bad, every - bad]), self.tail)[0].tolist()
            for bad, every in zip(self.invalid_images, self.images, strict=True)
        )
        return not first or low > FACTOR * high

    # ---- in words ----

    def moves(self) -> dict[str, str]:
        """Returns what moved, in words, by ``"invalid"``, ``"range"``, ``"duplicates"``, ``"classes"`` and ``"regions"``.

        What is a consequence of another move is left out, such as cells that move with the range.
        """
        found: dict[str, str] = {}
        images, noun = int(self.images[0]), f"training {self.noun}"
        if self.has_more_invalid:
            found["invalid"] = f"{int(self.invalid_images[0]):,} of the last {images:,} {noun} contain nan or inf"
        if self.is_compared and float(self.range_moved) > RANGE_MOVED:
            (low, first_low), (high, first_high) = self.low.tolist(), self.high.tolist()
            found["range"] = (
                f"{noun} are in {_number(low)} to {_number(high)} now, and were in {_number(first_low)} to "
                f"{_number(first_high)}"
            )
        if self.repeats:
            different, size = len(torch.unique(self.hashes)), min(len(self.hashes), len(self.first_hashes))
            found["duplicates"] = (
                f"the last {int(self.batches[0]):,} batches repeat {different:,} {self.noun}: among {size:,} of them "
                f"{float(self.distinct[0]):,.0f} differ, and {float(self.distinct[1]):,.0f} did at first"
            )
        # fewer images, each many times, are no sample of classes and cells
        if "duplicates" not in found:
            if self.moved_classes:
                found["classes"] = self._class_words()
            elif self.moved_cells and "range" not in found:
                found["regions"] = self._cell_words()
        return found

    def _class_words(self) -> str:
        classes = self.moved_classes
        gone = [c for c in classes if float(self.classes[0, c]) == 0]
        if len(classes) == len(gone) <= 3 or len(classes) == 1:
            return "; ".join(self.class_words(c) for c in classes)
        parts = []
        changes = self.class_change
        for verb, some in (
            ("are gone", gone),
            ("became rare", [c for c in classes if c not in gone and float(changes[c]) < 0]),
            ("became frequent", [c for c in classes if float(changes[c]) > 0]),
        ):
            parts += [f"{listed([str(c) for c in some], 12)} {verb}"] if some else []
        return f"the classes of the last {int(self.classes[0].sum()):,} {self._watched} changed: " + "; ".join(parts)

    def class_words(self, label: int) -> str:
        """Returns what happened to one class."""
        total, share = self.classes[0].sum(), float(self.share[1, label])
        if float(self.classes[0, label]) == 0:
            unseen = int(total + self.absent.nan_to_num(0.0)[label])
            return (
                f"class {label} has not been in the last {unseen:,} {self._watched}, of which {unseen * share:,.0f} "
                "were expected"
            )
        return (
            f"class {label} is {float(self.share[0, label]):.1%} of the last {int(total):,} {self._watched}, and was "
            f"{share:.1%}"
        )

    def _cell_words(self) -> str:
        channels, *axes = self.grid
        per_channel = math.prod(axes)
        cells = sorted({cell % per_channel for cell in self.moved_cells})
        of_all = [c + channel * per_channel for c in cells for channel in range(channels)]
        n = self.rows[:, None]
        mean = self.cells[:, 0, of_all] / n
        std = (self.cells[:, 1, of_all] / n - mean.square()).clamp(min=0).mean(1).sqrt()
        now, first = mean.mean(1).tolist()
        # of short rows each cell is one feature
        kind = "feature" if tuple(axes) == tuple(self.shape.tolist()) else "cell"
        return (
            f"{place_of(cells, axes, kind)} of the training {self.noun} moved: mean {now:.3g} and standard deviation "
            f"{float(std[0]):.3g} now, {first:.3g} and {float(std[1]):.3g} at first"
        )

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all data and, with labels, of up to 20 classes, each of shape ()."""
        zero = torch.zeros_like(self.rows[0])
        compared = self.is_compared
        values = {
            "images": self.images[0],
            "invalid": self.invalid_images[0] / self.images[0],
            "low": torch.where(self.low[0].isfinite(), self.low[0], math.nan),
            "high": torch.where(self.high[0].isfinite(), self.high[0], math.nan),
            "range_shift": self.range_moved if compared else zero,
            "cell_shift": self.cells_moved.max() if compared else zero,
            "moved_cells": zero + len(self.moved_cells),
            "variety": self.variety,
            "within": self.within[0] / self.rows[0],
        }
        if self.has_classes:
            has_first = bool(self.classes[1].any())
            values["class_distance"] = (self.share[0] - self.share[1]).abs().sum() / 2 if has_first else zero
            values["moved_classes"] = zero + len(self.moved_classes)
            if self.classes.shape[1] <= MAX_CLASS_TAGS:
                values |= {f"class_{c}": share for c, share in enumerate(self.share[0])}
        return values


def place_of(cells: Sequence[int], axes: Sequence[int], kind: str = "cell") -> str:
    """Returns where some cells of a grid lie, in words; along one axis, their numbers.

    Example:
        >>> place_of([0, 1, 4, 5], (4, 4)), place_of([15], (4, 4)), place_of(range(16), (4, 4)), place_of([3, 5], (16,))
        ('the top left', 'the bottom right', 'the whole', 'cells 3 to 5 of 16')
    """
    total = math.prod(axes)
    if len(cells) == total:
        return "the whole"
    if len(axes) == 1:
        low, high = min(cells), max(cells)
        return f"{kind}s {low} to {high} of {total}" if high > low else f"{kind} {low} of {total}"
    words = []
    for axis, (first, middle, last) in zip(
        (-2, -1), (("top", "middle", "bottom"), ("left", "centre", "right")), strict=True
    ):
        size, after = axes[axis], math.prod(axes[axis + 1 :]) if axis < -1 else 1
        at = {cell // after % size for cell in cells}
        if max(at) < size / 2:
            words.append(first)
        elif min(at) >= size / 2:
            words.append(last)
        elif size > 2 and min(at) > 0 and max(at) < size - 1:
            words.append(middle)
    return f"the {' '.join(words)}" if words else f"{len(cells)} of {total} {kind}s"


def _number(value: float) -> str:
    """Returns a number in few digits.

    Example:
        >>> _number(-1.0), _number(0.12345), _number(255.0)
        ('-1', '0.123', '255')
    """
    return f"{value:.3g}"


def _design_effect(between: Tensor, variance: Tensor, batches: Tensor, tail: float) -> Tensor:
    """Returns by which factor the variance of a mean exceeds that of independent images, 1 unless it surely does.

    Source: Kish, *Survey sampling*, 1965.

    Args:
        between: (2, ...) sum of squares between batches.
        variance: (2, ...) variance of single images.
        batches: (2,) number of batches.
        tail: Probability with which shuffled batches may give more than 1.
    """
    freedom = (batches - 1).clamp(min=0)
    freedom = freedom.view(*freedom.shape, *[1] * (between.ndim - freedom.ndim))
    ratio = between / (freedom * variance)
    # Wilson and Hilferty's normal approximation of the quantile of chi-squared over its freedom
    spread = 2 / (9 * freedom.clamp(min=1))
    bound = (1 - spread + normal_quantile(tail) * spread.sqrt()) ** 3
    return torch.where((freedom > 0) & (ratio > bound), ratio, 1.0)
