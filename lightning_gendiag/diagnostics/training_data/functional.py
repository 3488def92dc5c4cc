"""Statistics of training batches: shares of classes, range, cells, repeated images, and whether they moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.functional.intervals import binomial_bounds, normal_quantile
from lightning_gendiag.functional.results import MAX_CLASS_TAGS, loggable

Array = NDArray[np.float64]
P = ParamSpec("P")
T = TypeVar("T")

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

IMAGES_PER_LABEL = 1.5
"""Least mean number of the first images of each label that occurs among them. Of indices it is 1 until an epoch is over, and of
a thousand classes it is 1.6 with a thousand images."""

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


def _quiet(test: Callable[P, T]) -> Callable[P, T]:
    """Lets sides without images give nan, which no comparison calls moved, without a warning."""
    # one context for each, since some call others
    return np.errstate(divide="ignore", invalid="ignore")(test)


class Moves:
    """Tests of a result, each computed once.

    They are many small steps with few numbers, which take NumPy a fifth of the time of torch.

    Args:
        result: The numbers of both sides, on any device. Of pairs, the first entry is of the newest batches.
    """

    def __init__(self, result: TrainingDataResult) -> None:
        self.result = result
        self.rows, self.batches, self.edges, self.classes = map(self._array, ("rows", "batches", "edges", "classes"))
        self.cells, self.cell_squares, self.cell_batch_squares = map(
            self._array, ("cells", "cell_squares", "cell_batch_squares")
        )

    def _array(self, name: str) -> Array:
        """Returns a field of the result."""
        array: Array = getattr(self.result, name).cpu().numpy()
        return array

    # ---- the tests ----

    @cached_property
    def has_classes(self) -> bool:
        """Whether the labels can be classes. Those of which nearly all differ are for example the images' indices."""
        counts = self.classes[1] if self.classes[1].any() else self.classes[0]
        return bool(counts.sum() >= max(1.0, IMAGES_PER_LABEL * np.count_nonzero(counts > 0)))

    @cached_property
    def tail(self) -> float:
        """Probability with which each bound may be wrong, so that all hold together."""
        tests = 8 + 2 * self.cells[0].size + 6 * self.classes.shape[1] * self.has_classes
        tail: float = (1 - float(self.result.confidence)) / tests
        return tail

    @cached_property
    def is_compared(self) -> bool:
        """Whether there are enough images of both sides."""
        return bool((self.rows >= LEAST_ROWS).all())

    def _sure_shift(self, sums: Array, squares: Array, batch_squares: Array) -> tuple[Array, Array]:
        """How far means (2, ...) of single images surely moved, and the standard deviation of the first images."""
        n = self.rows.reshape(2, *[1] * (sums.ndim - 1))
        mean = sums / n
        variance = np.maximum(squares / n - mean**2, 0)
        factor = design_effect(batch_squares - n * mean**2, variance, self.batches, self.tail)
        error = np.sqrt((variance * factor / n).sum(0))
        return np.maximum(np.abs(mean[0] - mean[1]) - normal_quantile(self.tail) * error, 0), np.sqrt(variance[1])

    @cached_property
    @_quiet
    def _width(self) -> tuple[float, float]:
        """Mean distance between the least and the largest value of an image, and their largest mean, of the first ones."""
        least, most = self.edges[1] / self.rows[1]
        return float(most - least), float(np.maximum(abs(least), abs(most)))

    @cached_property
    @_quiet
    def range_moved(self) -> float:
        """How far an end of the range surely moved, as a fraction of the width of the first images' range."""
        shift, _ = self._sure_shift(self.edges, self._array("edge_squares"), self._array("edge_batch_squares"))
        width, largest = self._width
        return float(shift.max() / np.maximum(width, 1e-6 * largest + 1e-12))

    @cached_property
    @_quiet
    def cells_moved(self) -> Array:
        """(P,) how far each cell surely moved, in standard deviations of single images.

        Where neither means nor mean squares moved, products with the image's mean show what changed its sign.
        """
        shift, std = self._sure_shift(self.cells, self.cell_squares, self.cell_batch_squares)
        width, largest = self._width
        width = np.maximum(width, 1e-12)
        square = width * np.maximum(width, largest)
        moved = shift / np.maximum(std, LEAST_STD * np.array([[width], [square], [square]]))
        # the image's mean moves with each cell, so that products tell less of where it was
        alone: Array = moved[:2].max(0)
        if alone.max() > CELL_MOVED:
            return alone
        return np.where(moved[2] >= moved[2].max() / 2, np.maximum(alone, moved[2]), alone)

    @cached_property
    @_quiet
    def share(self) -> Array:
        """(2, K) shares of the classes, adding to one."""
        share: Array = self.classes / self.classes.sum(1, keepdims=True)
        return share

    @cached_property
    def _class_effect(self) -> Array:
        """(2, K) by which factor the variance of each share exceeds that of independent images."""
        n = self.classes.sum(1, keepdims=True)
        between = self._array("class_batch_squares") - n * self.share**2
        return design_effect(between, self.share * (1 - self.share), self._array("label_batches"), self.tail)

    @cached_property
    @_quiet
    def class_interval(self) -> Array:
        """(2, K, 2) bounds of the shares of a source that gives batches like these, exact where they are shuffled."""
        # batches that hold few classes each tell less than as many single images
        fewer = [effect.max(initial=1.0) for effect in self._class_effect]
        return np.stack([binomial_bounds(self.classes[side] / fewer[side], self.tail) for side in (0, 1)])

    @cached_property
    @_quiet
    def class_change(self) -> Array:
        """(K,) natural logarithm of the factor by which the share of each class surely changed, negative where it fell.

        -inf where the class has not been seen for so long that it is surely gone.
        """
        if not self.has_classes or not self.classes.sum(1).min():
            return np.zeros(self.classes.shape[1])
        (low, high), (first_low, first_high) = np.moveaxis(self.class_interval, 2, 1)
        fell, rose = np.minimum(np.log(high / first_low), 0), np.maximum(np.log(low / first_high), 0)
        change = np.where(first_low > 0, fell, 0.0) + np.nan_to_num(rose)
        return np.where(self._gone(first_low), -math.inf, change)

    def _gone(self, first_low: Array) -> Any:
        """(K,) whether each class is surely absent."""
        unseen = np.nan_to_num(self._array("absent")) + self.classes[0].sum()
        log_chance = unseen / self._class_effect[1].max(initial=1.0) * np.log1p(-np.minimum(first_low, 1 - 1e-9))
        return (self.classes[0] == 0) & (self.classes[1] > 0) & (log_chance < math.log(self.tail))

    @cached_property
    def moved_classes(self) -> list[int]:
        """Classes whose share surely changed by more than a factor of two, or that are gone."""
        moved: list[int] = np.flatnonzero(np.abs(self.class_change) > math.log(FACTOR)).tolist()
        return moved

    @cached_property
    def moved_cells(self) -> list[int]:
        """Cells of all channels that surely moved."""
        moved: list[int] = np.flatnonzero(self.cells_moved > CELL_MOVED).tolist() if self.is_compared else []
        return moved

    @cached_property
    @_quiet
    def is_ordered(self) -> bool:
        """Whether the first batches differ more among each other than shuffled ones do, as sorted data do."""
        n = self.rows[1]
        mean = self.cells[1] / n
        variance = np.maximum(self.cell_squares[1] / n - mean**2, 0)
        excess = self.cell_batch_squares[1] - n * mean**2
        parts = [design_effect(excess, variance, self.batches[1], self.tail)]
        if self.classes[1].any():
            parts.append(self._class_effect[1][self.classes[1] > 0])
        return any((part > 1).mean() > 0.25 for part in parts)

    @cached_property
    def distinct(self) -> tuple[float, float]:
        """Expected number of different images in equally many of both sides."""
        sides = self._array("hashes"), self._array("first_hashes")
        size = min(map(len, sides))
        now, first = (distinct_of(hashes, size) for hashes in sides)
        return now, first

    @cached_property
    def variety(self) -> float:
        """Number of different images relative to that of the first images, 1 where they repeat as much as those."""
        if len(self.result.hashes) and not len(self.result.first_hashes):
            # these are the first ones
            return 1.0
        now, first = self.distinct
        return now / first if first else math.nan

    @cached_property
    def repeats(self) -> bool:
        """Whether there are surely fewer than half as many different images as expected."""
        now, first = self.distinct
        if not first or now >= REPEATED * first:
            return False
        # indicators of which images occur are negatively associated, so that Chernoff's bound holds
        ratio = max(now / first, 1e-12)
        return -first * (1 - ratio + ratio * math.log(ratio)) < math.log(self.tail)

    @cached_property
    def has_more_invalid(self) -> bool:
        """Whether there are nan or inf where the first images had none, or surely twice as many as these had."""
        invalid, every = self._array("invalid_images"), self._array("images")
        if not invalid[0] or not every[1]:
            return False
        (low, _), (_, high) = (
            binomial_bounds(np.stack([bad, n - bad]), self.tail)[0] for bad, n in zip(invalid, every, strict=True)
        )
        return bool(not invalid[1] or low > FACTOR * high)

    # ---- in words ----

    @cached_property
    def words(self) -> dict[str, str]:
        """What moved, in words, by ``"invalid"``, ``"range"``, ``"duplicates"``, ``"classes"`` and ``"regions"``.

        What is a consequence of another move is left out, such as cells that move with the range.
        """
        result, found = self.result, dict[str, str]()
        images, noun = int(result.images[0]), f"training {result.noun}"
        if self.has_more_invalid:
            found["invalid"] = f"{int(result.invalid_images[0]):,} of the last {images:,} {noun} contain nan or inf"
        if self.is_compared and self.range_moved > RANGE_MOVED:
            (low, first_low), (high, first_high) = result.low.tolist(), result.high.tolist()
            found["range"] = (
                f"{noun} are in {low:.3g} to {high:.3g} now, and were in {first_low:.3g} to {first_high:.3g}"
            )
        if self.repeats:
            hashes, first_hashes = self._array("hashes"), self._array("first_hashes")
            different, size = len(np.unique(hashes)), min(len(hashes), len(first_hashes))
            found["duplicates"] = (
                f"the last {int(self.batches[0]):,} batches repeat {different:,} {result.noun}: among {size:,} of them "
                f"{self.distinct[0]:,.0f} differ, and {self.distinct[1]:,.0f} did at first"
            )
        # fewer images, each many times, are no sample of classes and cells
        if "duplicates" not in found:
            if self.moved_classes:
                found["classes"] = self._class_words()
            elif self.moved_cells and "range" not in found:
                found["regions"] = self._cell_words()
        return found

    @property
    def _watched(self) -> str:
        return f"training {self.result.noun}{' that were looked at' if float(self.result.skipped) else ''}"

    def _class_words(self) -> str:
        classes, changes = self.moved_classes, self.class_change
        gone = [c for c in classes if not self.classes[0, c]]
        if len(classes) == len(gone) <= 3 or len(classes) == 1:
            return "; ".join(self.class_words(c) for c in classes)
        parts = []
        for verb, some in (
            ("are gone", gone),
            ("became rare", [c for c in classes if c not in gone and changes[c] < 0]),
            ("became frequent", [c for c in classes if changes[c] > 0]),
        ):
            parts += [f"{listed([str(c) for c in some], 12)} {verb}"] if some else []
        return f"the classes of the last {int(self.classes[0].sum()):,} {self._watched} changed: " + "; ".join(parts)

    def class_words(self, label: int) -> str:
        """Returns what happened to one class."""
        total, share = self.classes[0].sum(), self.share[1, label]
        if not self.classes[0, label]:
            unseen = int(total + np.nan_to_num(self._array("absent"))[label])
            return (
                f"class {label} has not been in the last {unseen:,} {self._watched}, of which {unseen * share:,.0f} "
                "were expected"
            )
        return f"class {label} is {self.share[0, label]:.1%} of the last {int(total):,} {self._watched}, and was {share:.1%}"

    def _cell_words(self) -> str:
        channels, *axes = self.result.grid
        per_channel = math.prod(axes)
        cells = sorted({cell % per_channel for cell in self.moved_cells})
        of_all = [c + channel * per_channel for c in cells for channel in range(channels)]
        n = self.rows[:, None]
        mean = self.cells[:, 0, of_all] / n
        std = np.sqrt(np.maximum(self.cells[:, 1, of_all] / n - mean**2, 0).mean(1))
        now, first = mean.mean(1)
        # of short rows each cell is one feature
        kind = "feature" if axes == self.result.shape.tolist() else "cell"
        return (
            f"{place_of(cells, axes, kind)} of the training {self.result.noun} moved: mean {now:.3g} and standard "
            f"deviation {std[0]:.3g} now, {first:.3g} and {std[1]:.3g} at first"
        )


def distinct_of(hashes: Any, size: int) -> float:
    """Computes the expected number of different hashes in a random selection of ``size`` of them (rarefaction).

    Source: Hurlbert, *The nonconcept of species diversity*, 1971.

    Example:
        >>> round(distinct_of([5, 5, 7, 7], 2), 6), round(distinct_of(range(9), 4), 6)
        (1.666667, 4.0)
    """
    from scipy.special import gammaln

    n = len(hashes)
    # how many hashes occur once, twice, ...
    counts, number = np.unique(np.unique(hashes, return_counts=True)[1], return_counts=True)
    # the probability that a selection misses a key that occurs c times is C(n - c, size) / C(n, size)
    left = np.maximum(n - counts - size, 0)
    log_missed = gammaln(n - counts + 1) - gammaln(left + 1) - math.lgamma(n + 1) + math.lgamma(n - size + 1)
    return float((number * (1 - np.where(n - counts >= size, np.exp(log_missed), 0.0))).sum())


@_quiet
def design_effect(between: Array, variance: Array, batches: Array, tail: float) -> Array:
    """Returns by which factor the variance of a mean exceeds that of independent images, 1 unless it surely does.

    Source: Kish, *Survey sampling*, 1965.

    Args:
        between: (2, ...) sum of squares between batches.
        variance: (2, ...) variance of single images.
        batches: (2,) number of batches; or all of these for one side.
        tail: Probability with which shuffled batches may give more than 1.
    """
    freedom = np.maximum(batches - 1, 0)
    freedom = freedom.reshape(*freedom.shape, *[1] * (between.ndim - freedom.ndim))
    ratio = between / (freedom * variance)
    # Wilson and Hilferty's normal approximation of the quantile of chi-squared over its freedom
    spread = 2 / (9 * np.maximum(freedom, 1))
    bound = (1 - spread + normal_quantile(tail) * np.sqrt(spread)) ** 3
    return np.where((freedom > 0) & (ratio > bound), ratio, 1.0)


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
