"""Minimal features of the regions of an image, and the OR interactions between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.arrays import exact_matmul, pieces
from lightning_gendiag.functional.jacobian import DERIVATIVE_FAILS, plain_attention
from lightning_gendiag.functional.results import loggable

MAX_REGIONS = 12
"""Largest number of regions n, since 2^n minimal features are optimised."""

FAINT = 0.01
"""Smallest fraction of the change of an image by which errors and leakage are divided."""

INNER = 6
"""Iterations of conjugate gradients in a Gauss-Newton step; few, since the next step has another curvature."""

CARRIED = 0.9
"""Fraction of all squared norms that the counted components carry."""


def or_interactions(minimal_features: Tensor) -> Tensor:
    """Computes the feature component of each set of regions from the minimal features of all sets.

    ``I(S) = - sum over T in S of (-1)^(|S|-|T|) u(all without T)`` is a Moebius transform of n 2^n additions. It is complete:
    ``u(T) = u(none) + sum over S that meet T of I(S)`` for every T.

    Source: Chen, Cheng, Ding, Zhang, arXiv 2410.04421.

    Args:
        minimal_features: (2^n, ...) features; the index is a bit mask with bit i for region i, and entry 0 is the baseline.

    Returns:
        (2^n, ...) components in the same order; entry 0 is the baseline.

    Raises:
        ValueError: if the number of entries is not a power of two.

    Example:
        >>> or_interactions(torch.tensor([0.0, 3.0, 5.0, 6.0]))  # 3 and 5 alone, 6 together, so 2 are shared
        tensor([0., 1., 3., 2.])
    """
    n = number_of_regions(len(minimal_features))
    # u(all without T), by T
    values = minimal_features.flip(0).clone()
    for bit in range(n):
        pairs = values.view(-1, 2, 2**bit, *values.shape[1:])
        pairs[:, 1] -= pairs[:, 0]
    values.neg_()
    values[0] = minimal_features[0]
    return values


def minimal_features_of(interactions: Tensor) -> Tensor:
    """Computes minimal features from components, as the inverse of :func:`or_interactions`.

    ``u(T) = u(none) + sum over S that meet T of I(S)``.

    Args:
        interactions: (2^n, ...) components; entry 0 is the baseline.

    Returns:
        (2^n, ...) minimal features in the same order.

    Example:
        >>> minimal_features_of(torch.tensor([0.0, 1.0, 3.0, 2.0]))
        tensor([0., 3., 5., 6.])
    """
    n = number_of_regions(len(interactions))
    baseline = interactions[0]
    values = interactions.clone()
    values[0] = 0
    for bit in range(n):
        pairs = values.view(-1, 2, 2**bit, *values.shape[1:])
        pairs[:, 1] += pairs[:, 0]
    # values are sums over the subsets of T; the sets that meet T are all but the subsets of its complement
    return baseline + values[-1] - values.flip(0)


def number_of_regions(entries: int) -> int:
    """Returns n for 2^n entries.

    Raises:
        ValueError: if the number of entries is not a power of two.
    """
    if entries < 1 or entries & (entries - 1):
        raise ValueError(
            f"there must be 2^n entries, one for each set of n regions, got {entries}. "
            "To fix this, pass the entries of all sets, with that of no region first."
        )
    return entries.bit_length() - 1


def memberships(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns booleans (2^n, n), true where a region belongs to a set.

    Example:
        >>> memberships(2).long().tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return (torch.arange(2**n, device=device)[:, None] >> torch.arange(n, device=device)) & 1 > 0


class MinimalFeatures(NamedTuple):
    """The features that draw each set of regions, and the quality of the optimisation."""

    features: Tensor
    """(2^n, ...) features by bit mask; entry 0 is the baseline."""
    objective: Tensor
    """(2^n,) final objective; 0 is perfect, and that of the baseline is about 1 for all regions."""
    converged: Tensor
    """(2^n,) booleans, true where the last step lowered the objective by less than the tolerance."""
    steps: int
    """Number of Gauss-Newton steps."""


def minimal_features(
    tail: Callable[[Tensor], Tensor],
    feature: Tensor,
    baseline: Tensor,
    regions: Tensor,
    *,
    penalty: float = 0.1,
    tolerance: float = 1e-2,
    max_steps: int = 20,
    batch_size: int = 512,
    start: Tensor | None = None,
    subsets: Tensor | None = None,
) -> MinimalFeatures:
    """Finds, for each set of regions, the feature nearest to a baseline that draws these regions as the original does.

    Minimises ``sum over i in S of |image_i(u) - image_i(f)|^2 / |image(f) - image(f0)|^2 + penalty |u - f0|^2 / |f - f0|^2``
    for all sets S at once by damped Gauss-Newton steps with conjugate gradients. An iteration takes one forward and one
    backward pass of the whole batch, and sets that have converged leave the batch. Samples of a batch must not influence
    each other.

    Source: Chen, Cheng, Ding, Zhang, arXiv 2410.04421. A least-squares solver replaces their 2^n optimisations.

    Args:
        tail: differentiable map from features (N, ...) to images (N, C, H, W).
        feature: (...) f, the feature of the image.
        baseline: (...) f0, such as the mean over many images.
        regions: (H, W) integers 0..n-1, negative where the image does not count.
        penalty: weight of the distance to the baseline.
        tolerance: fraction of the objective; a step that lowers it by less ends the search.
        max_steps: largest number of Gauss-Newton steps.
        batch_size: number of sets that are optimised together, which bounds the memory.
        start: (2^n, ...) features to begin with, such as those of the same image before; by default the baseline.
        subsets: (m,) bit masks of the sets to optimise; None for all sets.

    Returns:
        Features of all 2^n sets, or of the m given ones.

    Raises:
        ValueError: if shapes do not match, there are too many regions, or ``tail`` is not differentiable.

    Example:
        >>> pixels = lambda features: features.view(-1, 1, 1, 2)  # a generator that draws each number in a pixel
        >>> found = minimal_features(pixels, torch.ones(2), torch.zeros(2), torch.tensor([[0, 1]]), penalty=1e-6)
        >>> found.features.round(decimals=3)  # no region, the first, the second, both
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.],
                [1., 1.]])
    """
    n = check_regions(regions)
    regions = regions.to(feature.device)
    if feature.shape != baseline.shape:
        raise ValueError(
            f"baseline must have the feature's shape {tuple(feature.shape)}, got {tuple(baseline.shape)}. "
            "To fix this, pass a feature of the same layer without a batch axis."
        )
    masks = torch.arange(2**n, device=feature.device) if subsets is None else subsets.to(feature.device)
    members = memberships(n, feature.device)[masks].to(feature.dtype)  # (m, n)
    with torch.no_grad():
        both = tail(torch.stack([feature, baseline]))
    if both.ndim != 4 or both.shape[2:] != regions.shape:
        raise ValueError(
            f"tail must make images (N, C, {regions.shape[0]}, {regions.shape[1]}), got {tuple(both.shape)}. "
            "To fix this, pass regions of the size of the images."
        )
    cover = torch.nn.functional.one_hot(regions + 1, n + 1)[..., 1:].to(feature.dtype)  # (H, W, n)
    change = (both[0] - both[1]).square().sum().clamp(min=1e-12)
    distance = (feature - baseline).square().sum().clamp(min=1e-12)
    begin = baseline.expand(len(masks), *baseline.shape) if start is None else start[masks].to(feature)
    parts = []
    with torch.no_grad(), exact_matmul(), plain_attention():
        for some in range(0, len(masks), batch_size):
            rows = slice(some, some + batch_size)
            # (m, 1, H, W) weights of the pixels' squared errors
            weight = (members[rows] @ cover.flatten(0, 1).T).view(-1, 1, *regions.shape) / change
            parts.append(
                _solve(tail, both[0], baseline, weight, penalty / distance, begin[rows].clone(), tolerance, max_steps)
            )
    features = torch.cat([part.features for part in parts])
    features[masks == 0] = baseline
    objective = torch.cat([part.objective for part in parts])
    objective[masks == 0] = 0
    converged = torch.cat([part.converged for part in parts]) | (masks == 0)
    return MinimalFeatures(features, objective, converged, max(part.steps for part in parts))


def check_regions(regions: Tensor) -> int:
    """Checks (H, W) labels of regions and returns their number n.

    Raises:
        ValueError: if they are not integers of this shape, leave a number out, or there are too many regions.
    """
    if regions.ndim != 2 or regions.is_floating_point() or int(regions.max()) < 0:
        raise ValueError(
            f"regions must be (H, W) integers from 0, got {regions.dtype} of shape {tuple(regions.shape)}. "
            "To fix this, pass the number of the region for each position."
        )
    n = int(regions.max()) + 1
    missing = sorted(set(range(n)) - set(torch.unique(regions).tolist()))
    if missing:
        raise ValueError(
            f"regions must have each number from 0 to {n - 1}, got none of {missing}. To fix this, renumber the regions."
        )
    if n > MAX_REGIONS:
        raise ValueError(
            f"regions must be at most {MAX_REGIONS}, since 2^n sets of them are optimised, got {n}. "
            "To fix this, set the less important ones to -1."
        )
    return n


def _solve(
    tail: Callable[[Tensor], Tensor],
    target: Tensor,
    baseline: Tensor,
    weight: Tensor,
    penalty: Tensor,
    u: Tensor,
    tolerance: float,
    max_steps: int,
) -> MinimalFeatures:
    """Solves for a batch of sets by damped Gauss-Newton steps, without gradients; see :func:`minimal_features`."""

    def errors(image: Tensor, at: Tensor, w: Tensor) -> Tensor:
        return (w * (image - target).square()).flatten(1).sum(1) + penalty * (at - baseline).square().flatten(1).sum(1)

    def move(at: Tensor, w: Tensor, damping: Tensor, first: bool) -> Tensor:
        image, pull = torch.func.vjp(tail, at)[:2]

        # J v is what J' y, which is linear in y, pulls v back to: one pass, where forward mode would take two
        pushed_by = torch.func.vjp(lambda y: pull(y)[0], torch.zeros_like(image))[1]

        def push(v: Tensor) -> Tensor:
            try:
                out: Tensor = pushed_by(v)[0]
            except DERIVATIVE_FAILS:
                # an operation cannot be differentiated twice
                out = torch.func.jvp(tail, (at,), (v,))[1]
            return out

        drawn = pull(w * (image - target))[0]
        if first and not drawn.any() and bool((w * (image - target)).any()):
            raise ValueError(
                "tail must depend on the features by operations that can be differentiated, but its derivative is zero. "
                "To fix this, remove torch.no_grad or detach from the decoder, or choose another layer."
            )
        gradient = drawn + penalty * (at - baseline)
        # damping is relative to the curvature along the gradient, so that it does not depend on scales
        pushed = push(gradient)
        curvature = _dot(w * pushed, pushed) / _dot(gradient, gradient).clamp(min=1e-30)
        extra = _wide(penalty + damping * curvature, at)
        return _conjugate_gradients(lambda v: pull(w * push(v))[0] + extra * v, -gradient)

    objective = errors(tail(u), u, weight)
    damping = u.new_full((len(u),), 1e-3)
    converged = u.new_zeros(len(u), dtype=torch.bool)
    steps = 0
    while steps < max_steps and not converged.all():
        steps += 1
        active = (~converged).nonzero()[:, 0]
        at, w, old = u[active], weight[active], objective[active]
        trial = at + move(at, w, damping[active], steps == 1)
        value = errors(tail(trial), trial, w)
        better = value < old
        gained = (old - value) / old.clamp(min=1e-30)
        u[active] = torch.where(_wide(better, at), trial, at)
        objective[active] = torch.where(better, value, old)
        damping[active] = torch.where(better, damping[active] / 5, damping[active] * 10)
        # a failed step is repeated with more damping, until nothing can be gained
        converged[active] = torch.where(better, gained < tolerance, damping[active] > 1e3)
    return MinimalFeatures(u, objective, converged, steps)


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Solves ``A x = b`` approximately for each row of a batch, with symmetric positive A."""
    x, r, p = torch.zeros_like(b), b, b
    old = first = _dot(r, r)
    for _ in range(INNER):
        ap = apply(p)
        alpha = old / _dot(p, ap).clamp(min=1e-30)
        x, r = x + _wide(alpha, p) * p, r - _wide(alpha, p) * ap
        new = _dot(r, r)
        if bool((new <= 1e-10 * first).all()):
            break
        p = r + _wide(new / old.clamp(min=1e-30), p) * p
        old = new
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Computes the (m,) inner products of rows (m, ...)."""
    return (a * b).flatten(1).sum(1)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """Returns (m,) numbers as (m, 1, 1, ...), with as many axes as ``like``."""
    return rows.view(-1, *[1] * (like.ndim - 1))


class Decomposition(NamedTuple):
    """The components of one image with n regions, by bit mask."""

    norms: Tensor
    """(2^n,) norms of the feature components over that of ``f - f0``; entry 0 is 0."""
    effects: Tensor
    """(2^n, n) squared change of each region when a component is added to the baseline, over the squared change of the
    whole image from the baseline."""
    curve: Tensor
    """(2^n,) squared error of the image drawn by the largest 0, 1, 2, ... components, over the same; 1 with none."""
    relevant: Tensor
    """(n,) squared error of a region drawn by the components that cover it, over its change from the baseline."""
    irrelevant: Tensor
    """(n,) squared change of a region by all other components, over the same."""
    converged: Tensor
    """() fraction of the sets whose optimisation converged."""

    @property
    def order(self) -> Tensor:
        """(2^n - 1,) bit masks of the components, the largest norm first."""
        return largest_first(self.norms)


def largest_first(norms: Tensor) -> Tensor:
    """Returns the (2^n - 1,) bit masks by falling norm (2^n,), without that of the baseline."""
    return norms[1:].argsort(descending=True, stable=True) + 1


def decompose(
    tail: Callable[[Tensor], Tensor], feature: Tensor, regions: Tensor, minimal: MinimalFeatures, batch_size: int = 512
) -> Decomposition:
    """Measures what each component of one image draws, and in which regions.

    Args:
        tail: see :func:`minimal_features`.
        feature: (...) feature of the image.
        regions: (H, W) integers, see :func:`minimal_features`.
        minimal: minimal features of all sets of regions.
        batch_size: number of images that are drawn at a time.

    Returns:
        Norms, effects and errors by component.

    Example:
        >>> pixels = lambda features: features.view(-1, 1, 1, 2)
        >>> regions = torch.tensor([[0, 1]])
        >>> found = minimal_features(pixels, torch.ones(2), torch.zeros(2), regions, penalty=1e-6)
        >>> decompose(pixels, torch.ones(2), regions, found).norms.round(decimals=3)  # nothing is drawn together
        tensor([0.0000, 0.7070, 0.7070, 0.0000])
    """
    n = check_regions(regions)
    regions = regions.to(feature.device)
    interactions = or_interactions(minimal.features)
    baseline = interactions[0]
    cover = torch.nn.functional.one_hot(regions + 1, n + 1)[..., 1:].to(feature.dtype).flatten(0, 1)  # (P, n)
    meets = memberships(n, feature.device)

    def images(features: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([tail(some) for some in pieces(features, batch_size)])

    def by_region(difference: Tensor) -> Tensor:
        """Computes the sums of squares (m, n) within regions of (m, C, H, W)."""
        return difference.square().sum(1).flatten(1) @ cover

    own, empty = images(torch.stack([feature, baseline]))
    change = by_region((own - empty)[None])[0]
    # a region that is the same in both would make every change in it infinitely large
    change = change.clamp(min=max(FAINT / n * float(change.sum()), 1e-12))
    norms = interactions.flatten(1).norm(dim=1) / (feature - baseline).norm().clamp(min=1e-12)
    norms[0] = 0
    drawn = [by_region(images(baseline + some) - empty) for some in pieces(interactions, batch_size)]
    effects = torch.cat(drawn) / change.sum()
    effects[0] = 0
    running, curve = baseline.clone(), [own.new_ones(())]
    for some in pieces(largest_first(norms), batch_size):
        steps = running + interactions[some].cumsum(0)
        curve.append(by_region(images(steps) - own).sum(1) / change.sum())
        running = steps[-1]
    # by completeness the components that cover region i add up to its own minimal feature
    alone = minimal.features[2 ** torch.arange(n, device=feature.device)]
    relevant = by_region(images(alone) - own).diagonal() / change
    apart = [interactions[1:].where(_wide(~meets[1:, i], interactions), 0.0).sum(0) for i in range(n)]
    others = baseline + torch.stack(apart)
    irrelevant = by_region(images(others) - empty).diagonal() / change
    return Decomposition(
        norms, effects, torch.cat([part.view(-1) for part in curve]), relevant, irrelevant,
        minimal.converged.double().mean(),
    )  # fmt: skip


def importance(tail: Callable[[Tensor], Tensor], feature: Tensor, baseline: Tensor, regions: Tensor) -> Tensor:
    """Computes the fraction (n,) of an image's squared change from the baseline that lies in each region.

    Unlike :func:`minimal_features` it takes any number of regions; for the arguments see there.
    """
    n = int(regions.max()) + 1
    with torch.no_grad():
        own, empty = tail(torch.stack([feature, baseline]))
    change = (own - empty).square().sum(0).flatten()
    # one entry more for what is in no region
    places = regions.flatten().to(change.device).clamp(min=-1) + 1
    shares = torch.zeros(n + 1, dtype=change.dtype, device=change.device).index_add_(0, places, change)[1:]
    return shares / shares.sum().clamp(min=math.ulp(0.0))


@loggable
class RegionalPrimitivesResult(NamedTuple):
    """Means over images of the components of n regions, by bit mask; nan where there are no images."""

    norms: Tensor
    """(2^n,) norms of the feature components over the distance of the whole feature from the baseline."""
    effects: Tensor
    """(2^n, n) squared change of each region by a component, over the squared change of the whole image from the baseline."""
    curve: Tensor
    """(2^n,) squared error of the image drawn by the largest 0, 1, 2, ... components, over the same; 1 with none."""
    relevant: Tensor
    """(n,) squared error of a region drawn by the components that cover it, over its change from the baseline."""
    irrelevant: Tensor
    """(n,) squared change of a region by all other components, over the same."""
    converged: Tensor
    """() fraction of the optimisations that converged."""
    images: Tensor
    """() number of images."""
    invalid: Tensor
    """() fraction of the images that contain nan or inf and are left out."""

    @property
    def order(self) -> Tensor:
        """(2^n - 1,) bit masks of the components, the largest mean norm first."""
        return largest_first(self.norms)

    @property
    def members(self) -> Tensor:
        """(2^n, n) booleans, true for the regions that a component covers."""
        return memberships(len(self.relevant), self.norms.device)

    @property
    def components(self) -> Tensor:
        """() number of components that carry nine tenths of all squared norms; nan where there are none."""
        squares = self.norms[self.order].square()
        carried = squares.cumsum(0) / squares.sum()
        return torch.where(carried[-1].isnan(), carried[-1], (carried < CARRIED).sum() + 1.0)

    @property
    def sparsity(self) -> Tensor:
        """() ``components`` as a fraction of all components; lower is sparser."""
        return self.components / (len(self.norms) - 1)

    @property
    def leakage(self) -> Tensor:
        """(n,) fraction of the effect of the components that cover a region that lies outside their regions, 0 to 1."""
        outside = (self.effects * ~self.members).sum(1)
        # components that hardly draw anything count as not leaking
        return (self.members.T * outside).sum(1) / ((self.members.T * self.effects.sum(1)).sum(1) + FAINT)

    @property
    def strength(self) -> Tensor:
        """(n,) root of the sum of the squared norms of the components that cover a region, each divided among its regions."""
        sizes = self.members.sum(1).clamp(min=1)
        return ((self.norms.square() / sizes)[:, None] * self.members).sum(0).sqrt()

    @property
    def together(self) -> Tensor:
        """(n, n) fraction of the norms of components that cover either region that cover both; the diagonal is 0."""
        m = self.members.to(self.norms.dtype)
        both = m.T @ (self.norms[:, None] * m)
        own = both.diagonal()
        shares = both / (own[:, None] + own - both)
        return shares - shares.diagonal().diag()

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all components together and of each region, each of shape ()."""
        values = {
            "components": self.components.to(self.norms),
            "sparsity": self.sparsity,
            "leakage": self.leakage.mean(),
            "relevant": self.relevant.mean(),
            "irrelevant": self.irrelevant.mean(),
            "error_after_tenth": self.curve[max(1, (len(self.curve) - 1) // 10)],
            "converged": self.converged,
            "images": self.images,
            "invalid": self.invalid,
        }
        values |= {f"strength_{r}": value for r, value in enumerate(self.strength)}
        return values | {f"leakage_{r}": value for r, value in enumerate(self.leakage)}
