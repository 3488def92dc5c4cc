"""Minimal features of an image's regions, and the OR interactions between them: what a generator draws together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional import exact_matmul, pieces, plain_attention

MAX_REGIONS = 12
"""2^n minimal features are optimised: beyond this many regions nobody waits for them."""

FAINT = 0.01
"""Share of an image's change that is too small to ask what part of it is right, or where it leaks."""

INNER = 6
"""Iterations of conjugate gradients to a Gauss-Newton step: few, since the next step sees a new curvature."""


def or_interactions(minimal_features: Tensor) -> Tensor:
    """The feature component of each set of regions, from the minimal features of all sets.

    ``I(S) = - sum over T in S of (-1)^(|S|-|T|) u(all without T)``: a Moebius transform, n 2^n additions. Complete:
    ``u(T) = u(none) + sum over S that meet T of I(S)`` for every T.

    Source: Chen, Cheng, Ding, Zhang, arXiv 2410.04421.

    Args:
        minimal_features: (2^n, ...); the index is a bit mask, bit i for region i; entry 0 is the baseline.

    Returns:
        (2^n, ...) in the same order; entry 0 the baseline.

    Raises:
        ValueError: if the number of entries is no power of two.

    Example:
        >>> or_interactions(torch.tensor([0.0, 3.0, 5.0, 6.0]))  # 3 and 5 alone, 6 together: 2 of it are shared
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
    """The inverse of :func:`or_interactions`: ``u(T) = u(none) + sum over S that meet T of I(S)``.

    Args:
        interactions: (2^n, ...); entry 0 the baseline.

    Returns:
        (2^n, ...)

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
    # now the sum over subsets of T; what meets T is all but the subsets of its complement
    return baseline + values[-1] - values.flip(0)


def number_of_regions(entries: int) -> int:
    """N of 2^n.

    Raises:
        ValueError: if it is no power of two.
    """
    if entries < 1 or entries & (entries - 1):
        raise ValueError(f"there must be 2^n entries, one for each set of n regions, got {entries}.")
    return entries.bit_length() - 1


def memberships(n: int, device: torch.device | str = "cpu") -> Tensor:
    """(2^n, n) bool: whether a region is in a set.

    Example:
        >>> memberships(2).long().tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return (torch.arange(2**n, device=device)[:, None] >> torch.arange(n, device=device)) & 1 > 0


class MinimalFeatures(NamedTuple):
    """The features that draw each set of regions, and how well they were found."""

    features: Tensor
    """(2^n, ...) by bit mask; entry 0 is the baseline."""
    objective: Tensor
    """(2^n,) reached; 0 is perfect, 1 about what the baseline has for all regions."""
    converged: Tensor
    """(2^n,) bool: the last step lowered the objective by less than the tolerance."""
    steps: int
    """Gauss-Newton steps that were made."""


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
    """For each set of regions the feature nearest to a baseline that still draws these regions as the image's own does.

    Minimises ``sum over i in S of |image_i(u) - image_i(f)|^2 / |image(f) - image(f0)|^2 + penalty |u - f0|^2 / |f - f0|^2``
    for all S at once: damped Gauss-Newton steps by conjugate gradients, one forward and one backward pass of the whole
    batch to an iteration; sets that converged leave the batch. Samples of a batch must not influence each other.

    Source: Chen, Cheng, Ding, Zhang, arXiv 2410.04421, with a least-squares solver in the place of 2^n optimisations.

    Args:
        tail: features (N, ...) to images (N, C, H, W); differentiable.
        feature: (...) f, of the image.
        baseline: (...) f0, such as the mean over many images.
        regions: (H, W) integers, 0 to n - 1; negative where the image does not count.
        penalty: weight of the distance to the baseline.
        tolerance: a step that lowers the objective by less than this share of it ends the search.
        max_steps: bound on the Gauss-Newton steps.
        batch_size: sets that are optimised together, which bounds the memory.
        start: (2^n, ...) features to begin with, such as those of the same image before; by default the baseline.
        subsets: (m,) bit masks, if only some sets are wanted.

    Returns:
        All of (2^n,), or of (m,) where subsets were given.

    Raises:
        ValueError: if shapes do not match or there are too many regions.

    Example:
        >>> pixels = lambda features: features.view(-1, 1, 1, 2)  # a generator that draws each number in a pixel
        >>> found = minimal_features(pixels, torch.ones(2), torch.zeros(2), torch.tensor([[0, 1]]), penalty=1e-6)
        >>> found.features.round(decimals=3)  # of no region, the first, the second, both
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.],
                [1., 1.]])
    """
    regions = regions.to(feature.device)
    n = check_regions(regions)
    if feature.shape != baseline.shape:
        raise ValueError(f"baseline must have the feature's shape {tuple(feature.shape)}, got {tuple(baseline.shape)}.")
    masks = torch.arange(2**n, device=feature.device) if subsets is None else subsets.to(feature.device)
    members = memberships(n, feature.device)[masks].to(feature.dtype)  # (m, n)
    with torch.no_grad():
        both = tail(torch.stack([feature, baseline]))
    if both.ndim != 4 or both.shape[2:] != regions.shape:
        raise ValueError(
            f"tail must make images (N, C, {regions.shape[0]}, {regions.shape[1]}), got {tuple(both.shape)}."
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
    return MinimalFeatures(
        features,
        objective,
        torch.cat([part.converged for part in parts]) | (masks == 0),
        max(part.steps for part in parts),
    )


def check_regions(regions: Tensor) -> int:
    """N of a map of regions.

    Raises:
        ValueError: in words, if it is none.
    """
    if regions.ndim != 2 or regions.is_floating_point() or int(regions.max()) < 0:
        raise ValueError(
            f"regions must be (H, W) integers from 0, got {regions.dtype} of shape {tuple(regions.shape)}."
        )
    n = int(regions.max()) + 1
    missing = sorted(set(range(n)) - set(torch.unique(regions).tolist()))
    if missing:
        raise ValueError(f"regions must have each number from 0 to {n - 1}, got none of {missing}.")
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
    """Damped Gauss-Newton for a batch of sets; see :func:`minimal_features`."""
    m = len(u)

    def errors(image: Tensor, at: Tensor, w: Tensor) -> Tensor:
        return (w * (image - target).square()).flatten(1).sum(1) + penalty * (at - baseline).square().flatten(1).sum(1)

    with torch.no_grad():
        objective = errors(tail(u), u, weight)
    damping = torch.full((m,), 1e-3, device=u.device, dtype=u.dtype)
    converged = torch.zeros(m, dtype=torch.bool, device=u.device)
    steps = 0
    while steps < max_steps and not converged.all():
        steps += 1
        active = (~converged).nonzero()[:, 0]
        at, w = u[active], weight[active]
        image, pull = torch.func.vjp(tail, at)[:2]

        def push(v: Tensor, at: Tensor = at) -> Tensor:
            out: Tensor = torch.func.jvp(tail, (at,), (v,))[1]
            return out

        drawn = pull(w * (image - target))[0]
        if steps == 1 and not drawn.any() and bool((w * (image - target)).any()):
            raise ValueError(
                "tail must depend on the features by operations that can be differentiated, but its derivative is zero. "
                "To fix this, take torch.no_grad or detach out of the decoder, or choose another layer."
            )
        gradient = drawn + penalty * (at - baseline)
        # damping is relative to the curvature along the gradient, so that it has no unit
        pushed = push(gradient)
        curvature = _dot(w * pushed, pushed) / _dot(gradient, gradient).clamp(min=1e-30)
        extra = penalty + damping[active] * curvature

        def hessian(v: Tensor, w: Tensor = w, extra: Tensor = extra, push: Any = push, pull: Any = pull) -> Tensor:
            product: Tensor = pull(w * push(v))[0] + _wide(extra, v) * v
            return product

        move = _conjugate_gradients(hessian, -gradient)
        with torch.no_grad():
            trial = at + move
            value = errors(tail(trial), trial, w)
        old = objective[active]
        better = value < old
        gained = (old - value) / old.clamp(min=1e-30)
        u[active] = torch.where(_wide(better, at), trial, at)
        objective[active] = torch.where(better, value, old)
        damping[active] = torch.where(better, damping[active] / 5, damping[active] * 10)
        # a failed step is tried again with more damping, until there is nothing left to gain
        converged[active] = torch.where(better, gained < tolerance, damping[active] > 1e3)
    return MinimalFeatures(u.detach(), objective, converged, steps)


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """About the solution of ``A x = b`` for each row of a batch, A symmetric and positive."""
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
    return (a * b).flatten(1).sum(1)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """(m,) as (m, 1, 1, ...)."""
    return rows.view(-1, *[1] * (like.ndim - 1))


class Decomposition(NamedTuple):
    """One image taken apart; n regions, components by bit mask."""

    norms: Tensor
    """(2^n,) of the feature components, over that of ``f - f0``; entry 0 is 0."""
    effects: Tensor
    """(2^n, n) squared change of each region when a component is added to the baseline, over the whole image's from the
    baseline to the image."""
    curve: Tensor
    """(2^n,) squared error of the image after so many components, the largest first; 1 with none."""
    relevant: Tensor
    """(n,) squared error of a region drawn by the components that cover it, over its change from the baseline."""
    irrelevant: Tensor
    """(n,) squared change of a region by all other components, over the same."""
    converged: Tensor
    """() share of the sets whose optimisation converged."""

    @property
    def order(self) -> Tensor:
        """(2^n - 1,) bit masks of the components, the largest norm first."""
        return largest_first(self.norms)


def largest_first(norms: Tensor) -> Tensor:
    """(2^n - 1,) bit masks by falling norm, without the baseline."""
    return norms[1:].argsort(descending=True, stable=True) + 1


def decompose(
    tail: Callable[[Tensor], Tensor], feature: Tensor, regions: Tensor, minimal: MinimalFeatures, batch_size: int = 512
) -> Decomposition:
    """What the components of one image draw, and where.

    Args:
        tail: see :func:`minimal_features`.
        feature: (...) of the image.
        regions: (H, W)
        minimal: of all sets of regions.
        batch_size: images at a time.

    Returns:
        Norms, effects and errors by component.

    Example:
        >>> pixels = lambda features: features.view(-1, 1, 1, 2)
        >>> regions = torch.tensor([[0, 1]])
        >>> found = minimal_features(pixels, torch.ones(2), torch.zeros(2), regions, penalty=1e-6)
        >>> decompose(pixels, torch.ones(2), regions, found).norms.round(decimals=3)  # nothing is drawn together
        tensor([0.0000, 0.7070, 0.7070, 0.0000])
    """
    regions = regions.to(feature.device)
    n = check_regions(regions)
    interactions = or_interactions(minimal.features)
    baseline = interactions[0]
    cover = torch.nn.functional.one_hot(regions + 1, n + 1)[..., 1:].to(feature.dtype).flatten(0, 1)  # (P, n)
    meets = memberships(n, feature.device)

    def images(features: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([tail(some) for some in pieces(features, batch_size)])

    def by_region(difference: Tensor) -> Tensor:
        """(m, n) squared sums of (m, C, H, W)."""
        return difference.square().sum(1).flatten(1) @ cover

    own, empty = images(torch.stack([feature, baseline]))
    change = by_region((own - empty)[None])[0]
    # a region that is the same in both is no measure of what changes in it
    change = change.clamp(min=max(FAINT / n * float(change.sum()), 1e-12))
    norms = interactions.flatten(1).norm(dim=1) / (feature - baseline).norm().clamp(min=1e-12)
    norms[0] = 0
    effects = (
        torch.cat([by_region(images(baseline + some) - empty) for some in pieces(interactions, batch_size)])
        / change.sum()
    )
    effects[0] = 0
    running, curve = baseline.clone(), [own.new_ones(())]
    for some in pieces(largest_first(norms), batch_size):
        steps = running + interactions[some].cumsum(0)
        curve.append(by_region(images(steps) - own).sum(1) / change.sum())
        running = steps[-1]
    # by completeness the components that cover region i add up to its own minimal feature
    alone = minimal.features[2 ** torch.arange(n, device=feature.device)]
    relevant = by_region(images(alone) - own).diagonal() / change
    others = torch.stack([baseline + interactions[1:][~meets[1:, i]].sum(0) for i in range(n)])
    irrelevant = by_region(images(others) - empty).diagonal() / change
    return Decomposition(
        norms, effects, torch.cat([part.view(-1) for part in curve]), relevant, irrelevant,
        minimal.converged.double().mean(),
    )  # fmt: skip


def importance(tail: Callable[[Tensor], Tensor], feature: Tensor, baseline: Tensor, regions: Tensor) -> Tensor:
    """(n,) share of the image's change from the baseline that lies in each region; of any number of regions."""
    n = int(regions.max()) + 1
    with torch.no_grad():
        own, empty = tail(torch.stack([feature, baseline]))
    change = (own - empty).square().sum(0).flatten()
    flat = regions.flatten().to(change.device)
    inside = flat >= 0
    shares = torch.zeros(n, dtype=change.dtype, device=change.device).index_add_(0, flat[inside], change[inside])
    return shares / shares.sum().clamp(min=math.ulp(0.0))
