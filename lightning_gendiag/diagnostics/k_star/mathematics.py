"""k*: how many neighbours of a sample share its class before the first of another does; by blocks, without a sort."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional import exact_matmul, squared_distances

Distance = Literal["euclidean", "cosine"]

CELLS = 1 << 24
"""Entries of the distance matrix that are held at a time."""

PAIRS = 1 << 20
"""Pairs that are measured anew in float64 at a time."""

FRACTURED, CLUSTERED = 0.5, -0.5
"""Skewness above and below which a class counts as fractured and clustered, as in the papers."""

MAX_CLASS_TAGS = 20
"""Up to so many classes each has scalars of its own."""


class KStarResult(NamedTuple):
    """How far samples see their own class, normalised: 1 where a class lies together and apart from the others."""

    values: Tensor
    """(N,) k* over the class's size, in (0, 1]; nan for latents with nan or inf, and where there is one class only."""
    labels: Tensor
    """(N,) the classes of ``values``."""
    classes: Tensor
    """(K,) the labels that occur, ascending."""
    mean: Tensor
    """(K,) of the class's values."""
    std: Tensor
    """(K,) population standard deviation."""
    skewness: Tensor
    """(K,) Fisher's, population moments; -inf where all values are 1, nan where all are equal otherwise."""
    rivals: Tensor
    """(K, K) share of a class's samples whose first sample of another class is of the other; rows add to one."""
    invalid: Tensor
    """() share of latents with nan or inf, which are left out."""

    @property
    def pattern(self) -> list[str]:
        """Of each class: ``"fractured"``, ``"overlapped"``, ``"clustered"``, or ``"undefined"``."""
        words = []
        for skewness in self.skewness.tolist():
            if math.isnan(skewness):
                words.append("undefined")
            elif skewness > FRACTURED:
                words.append("fractured")
            else:
                words.append("clustered" if skewness < CLUSTERED else "overlapped")
        return words

    @property
    def nearest_rival(self) -> Tensor:
        """(K,) the class that most often comes first; -1 where there is none."""
        place = self.rivals.nan_to_num(0.0)
        return torch.where(place.sum(1) > 0, self.classes[place.argmax(1)], -1) if len(self.classes) else self.classes

    @property
    def true_skewness(self) -> Tensor:
        """() skewness of all values together; lower is better."""
        return _skewness(self.values[~self.values.isnan()])

    @property
    def approximate_skewness(self) -> Tensor:
        """() mean of the classes' finite coefficients; lower is better."""
        finite = self.skewness[self.skewness.isfinite()]
        return finite.mean() if len(finite) else torch.full_like(self.invalid, math.nan)

    @property
    def worst(self) -> int:
        """Place in ``classes`` of the class with the lowest mean."""
        return int(self.mean.nan_to_num(2.0).argmin()) if len(self.classes) else -1

    def scalars(self) -> dict[str, Tensor]:
        """The whole, the worst class, and each class's mean where they are few."""
        nan = torch.full_like(self.invalid, math.nan)
        patterns = self.pattern
        values = {
            "true_skewness": self.true_skewness,
            "approximate_skewness": self.approximate_skewness,
            "mean": self.values[~self.values.isnan()].mean() if len(self.values) else nan,
            "worst_class_mean": self.mean[self.worst] if len(self.classes) else nan,
            "fractured": torch.full_like(self.invalid, float(patterns.count("fractured"))),
            "invalid": self.invalid,
        }
        if len(self.classes) <= MAX_CLASS_TAGS:
            values |= {f"class_{int(c)}": value for c, value in zip(self.classes, self.mean, strict=True)}
        return values


def k_star(latents: Tensor, labels: Tensor, *, distance: Distance = "euclidean") -> KStarResult:
    r"""The k* distribution: for each sample, the number of samples of its class that are nearer than any other class.

    The sample itself counts; a sample of another class at the same distance comes first. Divided by the class's size.
    Exact: distances come from blocks of matrix products, and where two are nearly equal both are measured again in
    float64 from their differences. Time N^2 D, memory one block of rows.

    Source: Kotyan, Ueda, Vargas, *k\\* Distribution: Evaluating the Latent Space of Deep Neural Networks*, 2024, and
    Kotyan, Chen, Vargas, arXiv 2408.09065.

    Args:
        latents: (N, D), any floating-point type; rows with nan or inf are left out and have the value nan.
        labels: (N,) integers.
        distance: ``"euclidean"`` or ``"cosine"``, 1 - cos.

    Returns:
        Values in (0, 1] and what is told of each class; nan, flagged, where there is a single class.

    Raises:
        ValueError: if shapes or types do not match.

    Example:
        >>> line = torch.tensor([[0.0], [1.0], [2.0], [9.0], [10.0]])
        >>> k_star(line, torch.tensor([0, 0, 1, 1, 1])).values
        tensor([1.0000, 0.5000, 0.3333, 1.0000, 1.0000], dtype=torch.float64)
    """
    check(latents, labels, distance)
    x = latents.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    finite = x.isfinite().all(1) if x.shape[1] else torch.ones(len(x), dtype=torch.bool, device=x.device)
    invalid = 1 - finite.double().mean() if len(x) else torch.zeros((), dtype=torch.float64, device=x.device)
    values = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
    labels = labels.long()
    x, known = x[finite], labels[finite]
    # samples of a class side by side, so that a class is a slice of columns
    order = known.argsort(stable=True)
    x, known = x[order], known[order]
    if distance == "cosine":
        x = torch.nn.functional.normalize(x.double(), dim=1).to(x.dtype)
    classes, sizes = torch.unique_consecutive(known, return_counts=True)
    counts = torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device)
    rivals = torch.zeros(len(classes), len(classes), dtype=torch.float64, device=x.device)
    if len(classes) > 1:
        place = torch.repeat_interleave(torch.arange(len(classes), device=x.device), sizes)
        with exact_matmul():
            for rows, count, first in _blocks(x, sizes.tolist()):
                counts[rows] = count.double()
                pairs = place[rows] * len(classes) + place[first]
                rivals += torch.bincount(pairs, minlength=len(classes) ** 2).view_as(rivals)
    normal = counts / torch.repeat_interleave(sizes, sizes)
    values[finite.nonzero()[:, 0][order]] = normal
    parts = normal.split(sizes.tolist())  # type: ignore[no-untyped-call]
    nan = torch.full((0,), math.nan, dtype=torch.float64, device=x.device)
    return KStarResult(
        values=values,
        labels=labels,
        classes=classes,
        mean=torch.stack([part.mean() for part in parts]) if parts and len(classes) else nan,
        std=torch.stack([part.std(correction=0) for part in parts]) if parts and len(classes) else nan,
        skewness=torch.stack([_skewness(part) for part in parts]) if parts and len(classes) else nan,
        rivals=rivals / rivals.sum(1, keepdim=True),
        invalid=invalid,
    )


def check(latents: Tensor, labels: Tensor, distance: str) -> None:
    """Refuse in words what cannot be compared."""
    if latents.ndim != 2 or not latents.is_floating_point():
        raise ValueError(
            f"latents must be (N, D) of floats, got {latents.dtype} of shape {tuple(latents.shape)}. "
            "To fix this, flatten features: latents.flatten(1)."
        )
    if labels.shape != latents.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be ({len(latents)},) integers, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f"distance must be 'euclidean' or 'cosine', got {distance!r}.")


def _blocks(x: Tensor, sizes: list[int]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, the number of their class nearer than any other, and the first of another class, as row numbers."""
    centred = x - x.mean(0)
    squares = centred.square().sum(1)
    # twice the error of a squared distance by a matrix product
    slack = 4 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[1] + 4) * (squares.max() + squares)
    start = 0
    for size in sizes:
        stop = start + size
        step = max(1, CELLS // len(x))
        for begin in range(start, stop, step):
            rows = slice(begin, min(begin + step, stop))
            d = squared_distances(centred[rows], centred)  # (B, N)
            before, after = d[:, :start], d[:, stop:]
            near = torch.full((len(d),), math.inf, dtype=d.dtype, device=d.device)
            first = torch.zeros(len(d), dtype=torch.long, device=d.device)
            for part, offset in ((before, 0), (after, stop)):
                if part.shape[1]:
                    value, index = part.min(1)
                    first = torch.where(value < near, index + offset, first)
                    near = torch.minimum(near, value)
            own, tolerance = d[:, start:stop], slack[rows]
            # the sample itself is always first
            own[:, rows.start - start :].diagonal().fill_(-math.inf)
            surely = (own < (near - tolerance)[:, None]).sum(1)
            perhaps = (own <= (near + tolerance)[:, None]).sum(1)
            for row in _chunks((perhaps > surely).nonzero()[:, 0]):
                surely[row], first[row] = _measured(x, d[row], row + rows.start, start, stop, near[row], tolerance[row])
            yield rows, surely, first
        start = stop


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(rows), 64):
        yield rows[start : start + 64]


def _measured(
    x: Tensor, d: Tensor, rows: Tensor, start: int, stop: int, near: Tensor, tolerance: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for rows in which distances are too close to tell, from differences in float64."""
    column = torch.arange(d.shape[1], device=d.device)
    own = (column >= start) & (column < stop)
    close = (d - near[:, None]).abs() <= 2 * tolerance[:, None]
    exact = torch.full(d.shape, math.inf, dtype=torch.float64, device=d.device)
    i, j = close.nonzero(as_tuple=True)
    for part in range(0, len(i), max(1, PAIRS // max(x.shape[1], 1))):
        some = slice(part, part + max(1, PAIRS // max(x.shape[1], 1)))
        exact[i[some], j[some]] = (x[rows[i[some]]].double() - x[j[some]].double()).square().sum(1)
    nearest, first = exact.masked_fill(own, math.inf).min(1)
    surely = ((d < (near - 2 * tolerance)[:, None]) & own).sum(1)
    closer = ((exact < nearest[:, None]) & own & close).sum(1)
    return surely + closer, first


def _skewness(values: Tensor) -> Tensor:
    """Third standardised moment; -inf where all are one, nan where all are equal otherwise."""
    if len(values) == 0 or values.isnan().any():
        return torch.full((), math.nan, dtype=torch.float64, device=values.device)
    deviation = values - values.mean()
    # equal up to the rounding of their mean
    if (values == values[0]).all():
        return torch.full_like(values[0], -math.inf if float(values[0]) == 1 else math.nan)
    return deviation.pow(3).mean() / deviation.square().mean().pow(1.5)
