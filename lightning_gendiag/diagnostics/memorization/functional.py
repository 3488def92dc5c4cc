"""Nearest training images of samples, compared with how near real images are to each other, in exact blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.functional.arrays import as_data, canonical_order, exact_matmul, kth_smallest, pieces
from lightning_gendiag.functional.distances import squared_distances
from lightning_gendiag.functional.intervals import binomial_interval
from lightning_gendiag.functional.results import loggable

RATIO = 0.5
"""A sample copies a training image if it is closer to it than this part of the image's distance from its nearest other one. Of
held-out digits 0.2 % are, and no sample of the example GAN, VAE, flow or diffusion model, of whose samples nine in ten have a
closeness above 1; of a generator that memorises 50 digits, two fifths are."""

REPEATED = 0.125
"""Two samples are near-duplicates if they are closer than this part of the distance that 99 % of the real images keep from
all others. Of 1,000 samples of the example VAE with two latent dimensions, which lie on a surface, 70 % are; with ten, none."""

QUANTILE = 0.01
"""Share of the real images that may be closer to another one than this distance."""

SAME = 0.003
"""Two training images count as one where they are closer than this part of the usual distance of two of them. Rounding in
float32 makes a fifth of it."""

CONFIDENCE = 0.99
"""Confidence of the statement that more samples than real images are copies."""

LEAST_HELD_OUT = 32
"""Fewer held-out images do not take the place of training images that are left out in turn."""

VENDI = 128
"""Largest number of images whose Vendi score is computed: the eigenvalues of the kernel matrix take 2 ms."""

SHOWN = 8
"""Largest number of pairs that a result holds."""

CELLS = 1 << 18
"""Largest number of distances that are held at a time, unless a single row has more: 1 MiB in float32. Larger blocks are no
faster."""


@loggable
class MemorizationResult(NamedTuple):
    """Copies of training images and repetitions among samples, by pixels and, where there are any, by features (S = 1 or 2).

    The closeness of an image is its distance from its nearest training image, divided by the distance of that image from its
    own nearest other one. Shares are 0 to 1. They are nan without samples, and without two different training images.
    """

    copied: Tensor
    """(S,) share of the samples that copy a training image: closeness below the ratio."""
    interval: Tensor
    """(S, 2) binomial confidence bounds of this share."""
    real_copied: Tensor
    """(S,) the same share among real images."""
    real_interval: Tensor
    """(S, 2) binomial confidence bounds of the share among real images."""
    closer: Tensor
    """(S,) share of the samples with a closeness below 1."""
    real_closer: Tensor
    """(S,) the same share among real images."""
    copying_z: Tensor
    """(S,) rank sum of the samples' distances from training images among those of held-out images, in standard deviations;
    negative where samples are closer. nan without held-out images."""
    repeated: Tensor
    """(S,) share of the samples that have a near-duplicate among the samples."""
    repeated_interval: Tensor
    """(S, 2) binomial confidence bounds of this share."""
    vendi: Tensor
    """(S,) Vendi score of up to 128 samples: as many different images are equally diverse."""
    real_vendi: Tensor
    """(S,) that of as many training images."""
    closeness: Tensor
    """(S, M) closeness of the samples, in rising order."""
    real_closeness: Tensor
    """(S, V) closeness of real images, in rising order: of V held-out ones, or of training images that are left out in turn."""
    images_copied: Tensor
    """(S,) number of different training images that are copied."""
    copies: Tensor
    """(P, 2, C, H, W) samples and the training images that they are closest to, each training image once, the closest
    first."""
    copy_index: Tensor
    """(P,) numbers of these training images among those that are held."""
    copy_closeness: Tensor
    """(P,) closeness of these pairs."""
    twins: Tensor
    """(Q, 2, C, H, W) pairs of samples that are near-duplicates, the closest first."""
    num_training: Tensor
    """() number of different training images that are held."""
    duplicates: Tensor
    """() share of the held training images that are the same as another one, and count once."""
    num_held_out: Tensor
    """() number of held-out images; 0 where training images are left out in turn instead."""
    invalid: Tensor
    """() share of the samples that contain nan or inf and are left out."""

    @property
    def authenticity(self) -> Tensor:
        """(S,) share of the samples that are no closer to a training image than that image is to its nearest other one."""
        return 1 - self.closer

    @property
    def diversity(self) -> Tensor:
        """(S,) Vendi score of the samples relative to that of as many real images; about 1 where both are as diverse."""
        return self.vendi / self.real_vendi

    @property
    def surely_copied(self) -> Tensor:
        """(S,) booleans, true where surely more samples than real images are copies."""
        return self.interval[:, 0] > self.real_interval[:, 1]

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of pixels and, with features, those of features, each of shape ()."""
        values = {
            "duplicates": self.duplicates,
            "invalid": self.invalid,
        }
        for space, prefix in zip(range(len(self.copied)), ("", "feature_"), strict=False):
            values |= {
                f"{prefix}copied": self.copied[space],
                f"{prefix}real_copied": self.real_copied[space],
                f"{prefix}images_copied": self.images_copied[space],
                f"{prefix}authenticity": self.authenticity[space],
                f"{prefix}real_authenticity": 1 - self.real_closer[space],
                f"{prefix}repeated": self.repeated[space],
                f"{prefix}vendi": self.vendi[space],
                f"{prefix}diversity": self.diversity[space],
            }
            if float(self.num_held_out):
                values[f"{prefix}copying_z"] = self.copying_z[space]
        return values


class Neighbours(NamedTuple):
    """The nearest rows of each row, the nearest first."""

    distances: Tensor  # (M, k) Euclidean; inf where there are fewer rows
    indices: Tensor  # (M, k)


def nearest(x: Tensor, y: Tensor | None = None, k: int = 1) -> Neighbours:
    """Finds the k nearest rows of each row, by blocks of exact distances.

    Neighbours are chosen by one matrix product for each block, and their distances are computed anew from differences, which
    keep their digits also where two rows nearly coincide.

    Args:
        x: (M, D) centred rows.
        y: (N, D) rows, centred in the same way; by default the other rows of ``x``.
        k: number of neighbours.
    """
    others = x if y is None else y
    k = min(k, len(others))
    indices = torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    size = max(1, CELLS // max(1, len(others)))
    with exact_matmul():
        for start in range(0, len(x), size):
            block = squared_distances(x[start : start + size], others)  # (B, N)
            if y is None:
                # the last of all, but before those that were found
                _own(block, start).fill_(torch.finfo(block.dtype).max)
            for place in range(k):
                found = block.argmin(1, keepdim=True)
                indices[start : start + size, place] = found[:, 0]
                # the next one is the nearest of the others
                block.scatter_(1, found, math.inf)
    distances = torch.stack([_distances(x, others[indices[:, place]]) for place in range(k)], 1)
    if y is None:
        # a single row has no other
        distances[indices == torch.arange(len(x), device=x.device)[:, None]] = math.inf
    if k > 1:
        # the product may order two that are about as near wrongly
        distances, order = distances.sort(dim=1, stable=True)
        indices = indices.gather(1, order)
    return Neighbours(distances, indices)


def _own(block: Tensor, start: int) -> Tensor:
    """Returns the view (B,) of the distances of rows from themselves in a block (B, N) that begins at a row."""
    return block[:, start : start + len(block)].diagonal()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns the Euclidean distances (N,) of rows (N, D) in pairs."""
    return torch.cat([(a - b).square().sum(1).sqrt() for a, b in zip(pieces(x, 256), pieces(y, 256), strict=True)])


def repeats(rows: Tensor, tolerance: float) -> Tensor:
    """Returns (N,) booleans, true for rows (N, D) that lie within a squared distance of a row before them."""
    repeated = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    size = max(1, CELLS // max(1, len(rows)))
    with exact_matmul():
        for start in range(0, len(rows), size):
            block = squared_distances(rows[start : start + size], rows[: start + size])
            repeated[start : start + size] = (block <= tolerance).tril(start - 1).any(1)
    return repeated


def vendi_score(similarities: Tensor) -> Tensor:
    """Computes the Vendi score, the effective number of different items.

    It is ``exp(-sum_i l_i log l_i)``, where l are the eigenvalues of the matrix divided by n.

    Source: Friedman and Dieng, *The Vendi Score*, 2023, arXiv 2210.02410.

    Args:
        similarities: (n, n) positive semi-definite matrix with ones on its diagonal.

    Returns:
        () float64, 1 where all items are the same, to n where no two are similar; nan without items.

    Raises:
        ValueError: if the matrix is not square.

    Example:
        >>> [round(float(vendi_score(similarities)), 6) for similarities in (torch.eye(3), torch.ones(3, 3))]
        [3.0, 1.0]
    """
    n = len(similarities)
    if similarities.shape != (n, n):
        raise ValueError(
            f"similarities must be (n, n), got {tuple(similarities.shape)}. To fix this, compare all items with all."
        )
    if n == 0 or not similarities.isfinite().all():
        return torch.full((), math.nan, dtype=torch.float64, device=similarities.device)
    values = torch.linalg.eigvalsh(similarities.double() / n).clamp(min=0)
    score: Tensor = torch.special.entr(values).sum().exp()
    return score


def rank_sum(x: Tensor, y: Tensor) -> Tensor:
    """Computes by how many standard deviations the values of x rank above those of y (Mann-Whitney).

    Args:
        x: (M,) values.
        y: (N,) values.

    Returns:
        () float64, about standard normal where both are of one continuous distribution; nan where a side is empty.

    Example:
        >>> rank_sum(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))
        tensor(-1.7321, dtype=torch.float64)
    """
    m, n = len(x), len(y)
    if not m or not n:
        return torch.full((), math.nan, dtype=torch.float64, device=x.device)
    ordered = y.sort().values
    below, up_to = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    u = (below + up_to).double().sum() / 2
    return (u - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12)


class TrainingSide(NamedTuple):
    """All that depends on real images alone, in one space."""

    centre: Tensor  # (D,)
    rows: Tensor  # (U, D) different training images, centred
    numbers: Tensor  # (U,) their numbers among all training images
    own: Tensor  # (U,) distance from the nearest other one
    null: Tensor  # (V,) closeness of real images
    null_distances: Tensor  # (V',) distances of held-out images from training images; empty without held-out ones
    spread: float  # distance that 99 % of the training images keep from all others


def as_rows(images: Tensor, max_side: int | None) -> Tensor:
    """Returns images (N, C, H, W) averaged to at most ``max_side`` pixels along each axis, or other data, as rows (N, D)."""
    return as_data(shrunk(images, max_side)).flatten(1)


def shrunk(images: Tensor, max_side: int | None) -> Tensor:
    """Returns images (N, C, H, W) averaged to at most ``max_side`` pixels along each axis; other data as they are."""
    if max_side is None or images.ndim != 4 or max(images.shape[2:]) <= max_side or min(images.shape[2:]) == 1:
        return images
    size = min(max_side, images.shape[2]), min(max_side, images.shape[3])
    return torch.cat([F.adaptive_avg_pool2d(as_data(some), size) for some in pieces(images, 256)])


def training_side(training: Tensor, held_out: Tensor | None = None) -> TrainingSide:
    """Compares real images with each other.

    Args:
        training: (N, D) rows of training images.
        held_out: (V, D) rows of real images that are no training images. Those that are the same as one are left out; fewer
            than 32 are not used.

    Returns:
        What :func:`compare` takes.
    """
    centre = training.mean(0, dtype=torch.float64).to(training)
    rows = training - centre
    # of two rows that are far from each other, the mean squared distance
    usual = 2 * float(rows.square().sum(1).mean()) if len(rows) else 0.0
    numbers, empty = torch.arange(len(rows), device=rows.device), rows.new_empty(0)
    near = nearest(rows, k=2) if len(rows) else None
    if near is not None and (near.distances[:, 0] <= SAME * math.sqrt(usual)).any():
        numbers = (~repeats(rows, SAME**2 * usual)).nonzero()[:, 0]
        rows = rows[numbers]
        near = nearest(rows, k=2)
    if near is None or len(rows) < 2:
        return TrainingSide(centre, rows, numbers, empty, empty, empty, math.nan)
    own = near.distances[:, 0]
    spread = float(kth_smallest(own, int(QUANTILE * len(own))))
    if held_out is not None and len(held_out):
        others = nearest(held_out - centre, rows)
        distances, place = others.distances[:, 0], others.indices[:, 0]
        fresh = distances > SAME * math.sqrt(usual)
        if int(fresh.sum()) >= LEAST_HELD_OUT:
            return TrainingSide(centre, rows, numbers, own, (distances / own[place])[fresh], distances[fresh], spread)
    if len(rows) < 3:
        return TrainingSide(centre, rows, numbers, own, empty, empty, spread)
    # without the image itself, its neighbour's own neighbour may be the next one
    place = near.indices[:, 0]
    mutual = near.indices[place, 0] == torch.arange(len(rows), device=rows.device)
    without = torch.where(mutual, near.distances[place, 1], own[place])
    return TrainingSide(centre, rows, numbers, own, own / without, empty, spread)


class Compared(NamedTuple):
    """Samples compared with the training images, in one space."""

    distances: Tensor  # (M,) from the nearest training image
    closeness: Tensor  # (M,)
    place: Tensor  # (M,) nearest different training image
    repeat: Tensor  # (M,) distance from the nearest other sample
    other: Tensor  # (M,) that sample
    vendi: Tensor  # (2,) Vendi score of samples and of as many training images


def compare(generated: Tensor, real: TrainingSide) -> Compared:
    """Compares samples (M, D) with at least two different training images."""
    rows = generated - real.centre
    near, among = nearest(rows, real.rows), nearest(rows)
    place = near.indices[:, 0]
    n = min(VENDI, len(rows), len(real.rows))
    width = float(kth_smallest(real.own, len(real.own) // 2))
    vendi = torch.stack([_vendi(rows, n, width), _vendi(real.rows, n, width)])
    distances = near.distances[:, 0]
    return Compared(distances, distances / real.own[place], place, among.distances[:, 0], among.indices[:, 0], vendi)


def _vendi(rows: Tensor, n: int, width: float) -> Tensor:
    """Returns the Vendi score of n of some rows, under a Gaussian kernel of a width."""
    some = rows[torch.linspace(0, len(rows) - 1, n, device=rows.device).round().long()]
    with exact_matmul():
        squares = squared_distances(some, some).fill_diagonal_(0)
    return vendi_score((squares.double() / (-2 * width**2)).exp())


def summarise(
    generated: Tensor,
    training: Tensor,
    sides: list[TrainingSide],
    rows: list[Tensor],
    ratio: float,
    invalid: Tensor,
) -> MemorizationResult:
    """Compares samples with training images in each space.

    Args:
        generated: (M, ...) samples.
        training: (N, ...) training images.
        sides: of each space, at least one.
        rows: of each space (M, D) samples.
        ratio: see :func:`memorization`.
        invalid: () share of samples that were left out, passed on to the result.

    Returns:
        The result; nan where there is nothing to compare.
    """
    m, n = len(generated), len(training)
    device = training.device if n else generated.device
    if not m or any(len(side.rows) < 2 for side in sides):
        return _undefined(generated, sides, m, n, invalid)
    compared = [compare(of_samples, side) for of_samples, side in zip(rows, sides, strict=True)]
    tail = (1 - CONFIDENCE) / (2 * len(sides))
    closeness = torch.stack([space.closeness for space in compared])
    repeated = torch.stack([
        space.repeat < REPEATED * side.spread for space, side in zip(compared, sides, strict=True)
    ])  # fmt: skip
    # which are shown: those by pixels, or by features where only these are alike
    shown = 0 if len(sides) == 1 or (closeness[0] < ratio).any() or not (closeness[1] < ratio).any() else 1
    first, places = _closest(compared[shown])
    numbers = sides[shown].numbers[places]
    twin, other = _twins(compared, repeated)
    nulls = [side.null for side in sides]
    vendi = torch.stack([space.vendi for space in compared])
    return MemorizationResult(
        copied=_share(closeness < ratio),
        interval=torch.stack([_interval(own < ratio, tail) for own in closeness]),
        real_copied=torch.stack([_share(null < ratio) for null in nulls]),
        real_interval=torch.stack([
            _interval(null < ratio, tail, independent=len(side.null_distances) > 0)
            for null, side in zip(nulls, sides, strict=True)
        ]),
        closer=_share(closeness < 1),
        real_closer=torch.stack([_share(null < 1) for null in nulls]),
        copying_z=torch.stack([
            rank_sum(space.distances, side.null_distances) for space, side in zip(compared, sides, strict=True)
        ]),
        repeated=_share(repeated) if m > 1 else vendi.new_full((len(sides),), math.nan),
        repeated_interval=torch.stack([_interval(own, tail) for own in repeated]),
        vendi=vendi[:, 0],
        real_vendi=vendi[:, 1],
        closeness=closeness.sort(1).values,
        real_closeness=_stacked(nulls),
        images_copied=torch.stack([
            vendi.new_full((), float(len(torch.unique(space.place[space.closeness < ratio])))) for space in compared
        ]),
        copies=torch.stack([as_data(generated[first]), as_data(training[numbers]).to(generated.device)], 1),
        copy_index=numbers,
        copy_closeness=closeness[shown][first],
        twins=torch.stack([as_data(generated[twin]), as_data(generated[other])], 1),
        num_training=vendi.new_full((), float(len(sides[0].rows))),
        duplicates=vendi.new_full((), 1 - len(sides[0].rows) / n),
        num_held_out=vendi.new_full((), float(len(sides[0].null_distances))),
        invalid=invalid.to(device),
    )  # fmt: skip


def _share(holds: Tensor) -> Tensor:
    """Returns the share of the last axis for which something holds, in float64; nan where it is empty."""
    return holds.double().mean(-1)


def _interval(holds: Tensor, tail: float, independent: bool = True) -> Tensor:
    """Returns the bounds (2,) of the share of items (N,) for which something holds; 0 to 1 without items."""
    # of two images that are nearest to each other, both or neither are copies
    number = len(holds) if independent else len(holds) / 2
    count = holds.double().mean() * number if len(holds) else holds.new_zeros((), dtype=torch.float64)
    return binomial_interval(torch.stack([count, number - count]), tail)[0]


def _stacked(rows: list[Tensor]) -> Tensor:
    """Returns rows of values (S, V) in rising order; shorter ones end in nan."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row.sort().values, (0, longest - len(row)), value=math.nan) for row in rows])


def _closest(space: Compared) -> tuple[Tensor, Tensor]:
    """Returns the samples (P,) that are closest to a training image, each image once, and the places of the images."""
    order = space.closeness.argsort(stable=True).tolist()
    chosen: dict[int, int] = {}
    places = space.place.tolist()
    for sample in order:
        if len(chosen) == SHOWN:
            break
        chosen.setdefault(places[sample], sample)
    device = space.place.device
    return torch.tensor(list(chosen.values()), device=device), torch.tensor(list(chosen), device=device)


def _twins(spaces: list[Compared], repeated: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the samples (Q,) and (Q,) of pairs that are near-duplicates by pixels, or else by features."""
    shown = 0 if len(spaces) == 1 or repeated[0].any() or not repeated[1].any() else 1
    space = spaces[shown]
    pairs: dict[tuple[int, int], None] = {}
    others, holds = space.other.tolist(), repeated[shown].tolist()
    for sample in space.repeat.argsort(stable=True).tolist():
        if len(pairs) == SHOWN or not holds[sample]:
            break
        pairs.setdefault((min(sample, others[sample]), max(sample, others[sample])))
    found = torch.tensor(list(pairs), dtype=torch.long, device=space.other.device).view(-1, 2)
    return found[:, 0], found[:, 1]


def _undefined(generated: Tensor, sides: list[TrainingSide], m: int, n: int, invalid: Tensor) -> MemorizationResult:
    """Returns a result without comparison."""
    s = len(sides)
    nan = torch.full((s,), math.nan, dtype=torch.float64, device=invalid.device)
    whole = torch.tensor([0.0, 1.0], dtype=torch.float64, device=invalid.device).expand(s, 2)
    none = nan.new_empty(0, 2, *generated.shape[1:]).to(generated.dtype)
    different = max((len(side.rows) for side in sides), default=0)
    return MemorizationResult(
        nan, whole, nan, whole, nan, nan, nan, nan, whole, nan, nan, nan.new_full((s, m), math.nan), nan.new_empty(s, 0),
        nan, none, torch.empty(0, dtype=torch.long, device=invalid.device), nan.new_empty(0), none,
        nan.new_full((), float(different)), nan.new_full((), 1 - different / n if n else math.nan), nan.new_zeros(()),
        invalid,
    )  # fmt: skip


def check_ratio(ratio: float) -> None:
    """Checks a ratio.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}. To fix this, pass a number such as 0.5.")


def memorization(
    generated: Tensor,
    real: Tensor,
    held_out: Tensor | None = None,
    *,
    ratio: float = RATIO,
    max_side: int | None = None,
) -> MemorizationResult:
    """Compares each sample with its nearest training image, and with the other samples.

    The closeness of a sample x with the nearest training image y is ``|x - y| / |y - z|``, where z is the training image that
    is nearest to y. Samples with a closeness below 1 are not authentic (Alaa et al.), which holds for about half of all fresh
    real images too; those below ``ratio`` are copies, which hardly any real image is. The shares expected of real images
    are those of held-out ones, or of training images that are left out in turn.

    Training images that are the same, up to 0.3 % of the usual distance of two, count once. Distances are exact and
    computed by blocks: memory grows with the number of images and not with that of pairs.

    Sources: arXiv 2102.08921 (authenticity); arXiv 2004.05675 (the rank sum ``copying_z``, over all samples as one cell);
    arXiv 2210.02410 (the Vendi score, here under a Gaussian kernel whose width is the median distance of a training image from
    its nearest other one).

    Args:
        generated: (M, C, H, W) samples, or rows (M, D) such as features.
        real: (N, C, H, W) training images, in the same range of values.
        held_out: (V, C, H, W) real images that were not trained on.
        ratio: closeness below which a sample is a copy, in (0, 1].
        max_side: side to which larger images are averaged before they are compared; None compares all pixels.

    Returns:
        The result, in one space (S = 1).

    Raises:
        ValueError: if shapes do not match, an image is not finite, or an argument is out of its range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> real = torch.rand(100, 1, 8, 8, generator=generator)
        >>> result = memorization(real[:20], real)
        >>> float(result.authenticity), float(result.copied), float(result.images_copied)
        (0.0, 1.0, 20.0)
        >>> float(memorization(torch.rand(20, 1, 8, 8, generator=generator), real).copied)
        0.0
    """
    check_ratio(ratio)
    check_side(max_side)
    for images, name in ((generated, "generated"), (real, "real"), (held_out, "held_out")):
        if images is not None:
            check_images(as_data(images, name), name, tuple(real.shape[1:]))
    generated, real = generated[canonical_order(generated)], real[canonical_order(real)]
    others = None if held_out is None else as_rows(held_out, max_side)
    side = training_side(as_rows(real, max_side), others)
    rows, zero = as_rows(generated, max_side), torch.zeros((), device=real.device)
    return summarise(generated, real, [side], [rows], ratio, zero)


def check_side(max_side: int | None) -> None:
    """Checks the side to which images are averaged.

    Raises:
        ValueError: if it is below 1.
    """
    if max_side is not None and max_side < 1:
        raise ValueError(
            f"max_side must be at least 1, got {max_side}. To fix this, pass a number such as 16, or None."
        )


def check_images(images: Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Checks that images have a shape (C, H, W) and are finite.

    Raises:
        ValueError: if they have another shape, or contain nan or inf.
    """
    if tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"{name} must be (N, {', '.join(map(str, shape))}) as the training images, got {tuple(images.shape)}. "
            "To fix this, resize the images."
        )
    if not images.isfinite().all():
        raise ValueError(f"{name} must be finite, got nan or inf. To fix this, leave such images out.")
