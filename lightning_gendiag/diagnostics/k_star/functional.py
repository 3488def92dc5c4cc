"""The k* distribution, computed by blocks of the distance matrix and without sorting."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.arrays import exact_matmul
from lightning_gendiag.functional.distances import squared_distances
from lightning_gendiag.functional.results import MAX_CLASS_TAGS, loggable

Distance = Literal["euclidean", "cosine"]

CELLS = 1 << 24
"""Entries of the distance matrix that are held at a time."""

PAIRS = 1 << 20
"""Pairs whose distances are computed again in float64 at a time."""

UNSURE = 256
"""Samples whose distances are computed again at a time."""

FRACTURED, CLUSTERED = 0.5, -0.5
"""Skewness above and below which a class counts as fractured and clustered, as in the papers."""


@loggable
class KStarResult(NamedTuple):
    """The k* distribution of samples and its moments within each class.

    Since ``values`` is a field, the result has no method ``values()``; ``dict(result)`` gives all scalars.
    """

    values: Tensor
    """(N,) k* over the size of the class, in (0, 1]; 1 where all of the class is nearer to the sample than any other class.
    nan for latents with nan or inf, for the only sample of a class, and where there is one class only."""
    labels: Tensor
    """(N,) classes of ``values``."""
    classes: Tensor
    """(K,) labels that occur, ascending."""
    mean: Tensor
    """(K,) mean of the values of each class; nan where it has one sample only."""
    std: Tensor
    """(K,) population standard deviation of the values of each class."""
    skewness: Tensor
    """(K,) Fisher's skewness from population moments; -inf where all values are 1, nan where all are equal otherwise."""
    rivals: Tensor
    """(K, K) fraction of the samples of a class whose nearest sample of another class is of the class of the column; rows
    add to one."""
    invalid: Tensor
    """() fraction of the latents that contain nan or inf and are left out."""

    @property
    def single(self) -> Tensor:
        """(K,) whether a class has one sample only, among several classes. Its k* would be 1 wherever the sample lies."""
        return self.mean.isnan() & (len(self.classes) > 1)

    @property
    def pattern(self) -> list[str]:
        """The pattern of each class: ``"fractured"``, ``"overlapped"``, ``"clustered"``, or ``"undefined"``."""
        patterns = []
        for skewness in self.skewness.tolist():
            if math.isnan(skewness):
                patterns.append("undefined")
            elif skewness > FRACTURED:
                patterns.append("fractured")
            else:
                patterns.append("clustered" if skewness < CLUSTERED else "overlapped")
        return patterns

    @property
    def nearest_rival(self) -> Tensor:
        """(K,) class that is most often the nearest other class; -1 where there is none."""
        frequency = self.rivals.nan_to_num(0.0)
        if len(self.classes) == 0:
            return self.classes
        return torch.where(frequency.sum(1) > 0, self.classes[frequency.argmax(1)], -1)

    @property
    def true_skewness(self) -> Tensor:
        """() skewness of all values together; lower is better."""
        return _skewness(self.values[~self.values.isnan()])

    @property
    def approximate_skewness(self) -> Tensor:
        """() mean of the skewness of the classes, over those where it is finite; lower is better."""
        return self.skewness[self.skewness.isfinite()].mean()

    @property
    def worst(self) -> int:
        """Position in ``classes`` of the class with the lowest mean; -1 where no class has one."""
        return -1 if self.mean.isnan().all() else int(self.mean.nan_to_num(2.0).argmin())

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all samples, of the worst class and, for up to 20 classes, of each that is measured."""
        values = {
            "true_skewness": self.true_skewness,
            "approximate_skewness": self.approximate_skewness,
            "mean": self.values[~self.values.isnan()].mean(),
            "worst_class_mean": self.mean[self.worst] if len(self.classes) else self.invalid.new_tensor(math.nan),
            "fractured": torch.full_like(self.invalid, float(self.pattern.count("fractured"))),
            "invalid": self.invalid,
        }
        if len(self.classes) <= MAX_CLASS_TAGS:
            classes = zip(self.classes.tolist(), self.mean, self.single.tolist(), strict=True)
            values |= {f"class_{c}": value for c, value, is_single in classes if not is_single}
        return values


def k_star(latents: Tensor, labels: Tensor, *, distance: Distance = "euclidean") -> KStarResult:
    r"""Computes the k* distribution: the fraction of a sample's class that is nearer to it than any other class.

    The number of samples of the class that are nearer than the nearest sample of any other class, including the sample
    itself, is divided by the size of the class. At equal distances the sample of the other class comes first. The result is
    exact: distances come from blocks of matrix products, and nearly equal ones are computed again in float64 from the
    differences. The time grows with N^2 D, and memory holds one block of rows.

    Source: Kotyan, Ueda, Vargas, *k\\* Distribution: Evaluating the Latent Space of Deep Neural Networks*, 2024, and
    Kotyan, Chen, Vargas, arXiv 2408.09065.

    Args:
        latents: (N, D), any floating-point type; rows with nan or inf are left out and have the value nan.
        labels: (N,) integers.
        distance: ``"euclidean"``, or ``"cosine"`` for 1 - cos.

    Returns:
        Values in (0, 1] and their moments within each class; nan where there is a single class, and for a class of a single
        sample, which is all of its class wherever it lies.

    Raises:
        ValueError: if shapes or types do not match.

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> k_star(line, torch.tensor([0, 0, 1, 1, 1])).values
        tensor([1.0000, 0.5000, 0.3333, 1.0000, 1.0000], dtype=torch.float64)
    """
    check(latents, labels)
    check_distance(distance)
    x = latents.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    finite = x.isfinite().all(1)
    invalid = 1 - finite.double().mean() if len(x) else torch.zeros((), dtype=torch.float64, device=x.device)
    values = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
    labels = labels.long()
    # samples are sorted by class, so that a class is a slice of columns
    order = finite.nonzero()[:, 0]
    order = order[labels[order].argsort(stable=True)]
    x, known = x[order], labels[order]
    if distance == "cosine":
        x = torch.nn.functional.normalize(x.double(), dim=1).to(x.dtype)
    classes, place, sizes = torch.unique_consecutive(known, return_inverse=True, return_counts=True)
    of_class = sizes.tolist()
    counts = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
    rivals = torch.zeros(len(classes), len(classes), dtype=torch.float64, device=x.device)
    if len(classes) > 1:
        with exact_matmul():
            counts, first = _nearer(x, place, of_class)
        pairs = place * len(classes) + place[first]
        rivals += torch.bincount(pairs, minlength=len(classes) ** 2).view_as(rivals)
    size = sizes[place]
    normal = (counts / size).masked_fill(size == 1, math.nan)
    values[order] = normal
    parts = torch.split(normal, of_class)
    moments = [torch.stack([part.mean(), part.std(correction=0), _skewness(part)]) for part in parts]
    mean, std, skewness = torch.stack(moments, 1) if len(classes) else normal.new_zeros(3, 0)
    rivals = rivals / rivals.sum(1, keepdim=True)
    return KStarResult(values, labels, classes, mean, std, skewness, rivals, invalid)


def check(latents: Tensor, labels: Tensor) -> None:
    """Checks latents and labels.

    Raises:
        ValueError: if shapes or types do not match.
    """
    if latents.ndim != 2 or not latents.is_floating_point():
        raise ValueError(
            f"latents must be (N, D) of floats, got {latents.dtype} of shape {tuple(latents.shape)}. "
            "To fix this, flatten features: latents.flatten(1)."
        )
    if labels.shape != latents.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be ({len(latents)},) integers, got {labels.dtype} of shape {tuple(labels.shape)}. "
            "To fix this, pass one class number per latent."
        )


def check_distance(distance: str) -> None:
    """Checks a distance.

    Raises:
        ValueError: if it is unknown.
    """
    if distance not in ("euclidean", "cosine"):
        raise ValueError(
            f"distance must be 'euclidean' or 'cosine', got {distance!r}. To fix this, pass one of the two."
        )


def _nearer(x: Tensor, place: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Returns how many of its class are nearer to each row than any other class, and the nearest sample of another class.

    No block is waited for: rows whose distances are too close to compare are collected, and computed again at the end.

    Args:
        x: (N, D) rows, sorted by class.
        place: (N,) numbers of their classes, 0..K-1.
        sizes: numbers of samples of the K classes.

    Returns:
        (N,) counts in float64, which include the row itself, and (N,) numbers of rows.
    """
    centred = x - x.mean(0)
    squares = centred.square().sum(1)
    # twice the rounding error of a squared distance from a matrix product
    slack = 4 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[1] + 4) * (squares.max() + squares)
    counts, firsts = torch.empty_like(slack, dtype=torch.float64), torch.empty_like(place)
    unsure = torch.empty_like(place, dtype=torch.bool)
    start, step = 0, max(1, CELLS // len(x))
    for size in sizes:
        stop = start + size
        for begin in range(start, stop, step):
            rows = slice(begin, min(begin + step, stop))
            d = squared_distances(centred[rows], centred)  # (B, N)
            own, tolerance = d[:, start:stop].clone(), slack[rows]
            d[:, start:stop] = math.inf
            near, firsts[rows] = d.min(1)
            # the sample itself is always first
            own[:, rows.start - start :].diagonal().fill_(-math.inf)
            surely = (own < (near - tolerance)[:, None]).sum(1)
            counts[rows] = surely.double()
            unsure[rows] = (own <= (near + tolerance)[:, None]).sum(1) > surely
        start = stop
    for again in torch.split(unsure.nonzero()[:, 0], UNSURE):
        d = squared_distances(centred[again], centred)
        counts[again], firsts[again] = _measured(x, d, again, place, slack[again])
    return counts, firsts


def _measured(x: Tensor, d: Tensor, rows: Tensor, place: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the same for rows whose distances (B, N) are too close to compare, from differences in float64."""
    own = place[rows][:, None] == place
    near = d.masked_fill(own, math.inf).amin(1)
    d.scatter_(1, rows[:, None], -math.inf)
    close = (d - near[:, None]).abs() <= 2 * tolerance[:, None]
    exact = torch.full(d.shape, math.inf, dtype=torch.float64, device=d.device)
    i, j = close.nonzero(as_tuple=True)
    size = max(1, PAIRS // max(x.shape[1], 1))
    for a, b in zip(torch.split(i, size), torch.split(j, size), strict=True):
        exact[a, b] = (x[rows[a]].double() - x[b].double()).square().sum(1)
    nearest, first = exact.masked_fill(own, math.inf).min(1)
    surely = ((d < (near - 2 * tolerance)[:, None]) & own).sum(1)
    closer = ((exact < nearest[:, None]) & own & close).sum(1)
    return (surely + closer).double(), first


def _skewness(values: Tensor) -> Tensor:
    """Computes the third standardised moment; -inf where all values are one, nan where all are equal otherwise."""
    if len(values) == 0:
        return torch.full((), math.nan, dtype=torch.float64, device=values.device)
    deviation = values - values.mean()
    skewness = deviation.pow(3).mean() / deviation.square().mean().pow(1.5)
    # values that are all equal differ from their mean by rounding only
    of_equal = torch.where(values[0] == 1, -math.inf, math.nan)
    return torch.where((values == values[0]).all(), of_equal, skewness)
