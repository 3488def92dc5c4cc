"""Entropies of latent dimensions on the data manifold, from Gram matrices of the decoder's Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.arrays import in_classes
from lightning_gendiag.functional.results import loggable

HALF_LOG_2PIE = 0.5 * (1 + math.log(2 * math.pi))
"""Entropy of a standard normal variable, in nats."""

DEAD = 1e-3
"""A dimension counts as dead where it moves the data less than this fraction of what the strongest one does."""

RIDGE = 1e-14
"""A singular Gram matrix is regularised by this fraction of its largest diagonal entry."""

MAX_DIMENSION_TAGS = 20
"""Largest number of dimensions for which each dimension has a scalar."""


@loggable
class ManifoldEntropyResult(NamedTuple):
    """Entropies, in nats, of the data that latent dimensions generate, and the information that dimensions share."""

    entropy: Tensor
    """(L,) entropy H_i of each dimension, in the order of the decoder; finite, and very low for a dead dimension."""
    total: Tensor
    """() entropy H of all dimensions together, from the log volumes of a flow where they are given."""
    total_correlation: Tensor
    """() sum of H_S over the sets of the partition, by default single dimensions, minus H; at least 0."""
    mutual_information: Tensor
    """(L, L) mutual information I_ij of pairs, at least 0, with a zero diagonal."""
    core: Tensor
    """(L,) entropy of the first 1, 2, ... L dimensions in ``order``; nan where no order is given."""
    detail: Tensor
    """(L,) entropy of the dimensions after the first 0, 1, ... L - 1 in ``order``; nan where no order is given."""
    order: Tensor
    """(L,) order of the dimensions in ``core`` and ``detail``, by default that of falling entropy."""
    classes: Tensor
    """(K, L) entropies within each class; (0, L) without labels."""
    singular: Tensor
    """() fraction of the latents whose Gram matrix is singular, 0 to 1."""
    latents: Tensor
    """() number of latents over which the averages are taken."""

    @property
    def spectrum(self) -> Tensor:
        """(L,) entropies in falling order."""
        return self.entropy.sort(descending=True).values

    @property
    def relative(self) -> Tensor:
        """(L,) how far each dimension moves the data, as a fraction of what the strongest one does, 0 to 1."""
        relative: Tensor = (self.entropy - self.entropy.max()).exp()
        return relative

    @property
    def dead(self) -> Tensor:
        """(L,) booleans, true for dimensions that move the data less than a thousandth of what the strongest one does."""
        return self.relative < DEAD

    @property
    def effective_dimensions(self) -> Tensor:
        """() number of dimensions in use, 1 to L: exp of the Shannon entropy of their shares of squared movement."""
        shares = (2 * (self.entropy - self.entropy.max())).softmax(0)
        effective: Tensor = torch.special.entr(shares).sum().exp()
        return effective

    @property
    def shared(self) -> Tensor:
        """(L - 1,) mutual information of the first 1, 2, ... L - 1 dimensions in ``order`` with the rest."""
        return self.core[:-1] + self.detail[1:] - self.total_by_gram

    @property
    def total_by_gram(self) -> Tensor:
        """() entropy of all dimensions from the Gram matrices; nan where no order is given."""
        return self.core[-1]

    @property
    def strongest_pair(self) -> tuple[int, int]:
        """The two dimensions with the largest mutual information, in ascending order."""
        i, j = divmod(int(self.mutual_information.nan_to_num(-1.0).argmax()), len(self.entropy))
        return min(i, j), max(i, j)

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of all dimensions together and, for up to 20 dimensions, of each, each of shape ()."""
        i, j = self.strongest_pair
        values = {
            "total": self.total,
            "total_correlation": self.total_correlation,
            "effective_dimensions": self.effective_dimensions,
            "dead": self.dead.sum().to(self.entropy),
            "largest_mutual_information": self.mutual_information[i, j],
            "highest": self.entropy.max(),
            "lowest": self.entropy.min(),
            "singular": self.singular,
        }
        if not self.core.isnan().any():
            half = max(1, round(float(self.effective_dimensions))) - 1
            values["core"] = self.core[half]
        if len(self.entropy) <= MAX_DIMENSION_TAGS:
            values |= {f"dimension_{i}": value for i, value in enumerate(self.entropy)}
        return values


class Sums(NamedTuple):
    """Sums over latents, from which the result is computed."""

    latents: Tensor  # (1 + K,) number of all latents, then of those of each class
    log_norms: Tensor  # (1 + K, L) sums of log |J_i|
    log_volume: Tensor  # () sum of 1/2 log det G, or of the log volumes that a flow gives
    log_parts: Tensor  # () sum of 1/2 log det of the blocks of the partition
    log_dependence: Tensor  # (L, L) sums of -1/2 log(1 - G_ij^2 / (G_ii G_jj))
    leading: Tensor  # (L,) sums of 1/2 log det of leading blocks in order
    trailing: Tensor  # (L,) sums of 1/2 log det of trailing blocks in order
    singular: Tensor  # () number of singular Gram matrices


def gram_sums(
    gram: Tensor,
    log_volume: Tensor | None,
    labels: Tensor | None,
    num_classes: int,
    order: Tensor | None,
    partition: Sequence[Sequence[int]] | None,
) -> Sums:
    """Computes sums over Gram matrices in float64.

    A singular matrix is regularised as a whole, so that all relations between entropies hold for it too.

    Args:
        gram: (N, L, L) matrices ``J'J``.
        log_volume: (N,) log volumes of a flow, or None to compute them from the matrices.
        labels: (N,) integers 0..K-1, required where ``num_classes`` is positive.
        num_classes: K, or 0.
        order: (L,) dimensions in falling importance, or None for their natural order.
        partition: sets of dimensions for the total correlation, or None for single dimensions.

    Returns:
        The sums.
    """
    gram = gram.double()
    length = gram.shape[1]
    top = gram.diagonal(dim1=1, dim2=2).amax(1)  # (N,)
    smallest = gram.diagonal(dim1=1, dim2=2).amin(1)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=1, dim2=2).square().amin(1)
    singular = (info != 0) | (smallest <= RIDGE * top) | (pivots <= RIDGE * top)
    if singular.any():
        # an all-zero Jacobian gets the smallest entropy that stays finite
        ridge = (RIDGE * top).clamp(min=1e-300) * singular
        gram = gram + torch.diag_embed(ridge[:, None].expand(-1, length))
    diagonal = gram.diagonal(dim1=1, dim2=2)  # (N, L)
    log_norms = 0.5 * diagonal.log()
    weights = in_classes(log_norms, labels, num_classes)
    order = torch.arange(length, device=gram.device) if order is None else order
    leading, trailing = _log_minors(gram, order), _log_minors(gram, order.flip(0)).flip(1)
    volume = leading[:, -1] if log_volume is None else log_volume.double()
    parts = log_norms.sum(1)
    if partition is not None:
        blocks = [_log_minors(gram, torch.as_tensor(list(p), device=gram.device))[:, -1] for p in partition]
        parts = torch.stack(blocks).sum(0)

    scaled = gram / (diagonal.sqrt()[:, :, None] * diagonal.sqrt()[:, None, :])
    # two columns that are proportional would share infinite information, which is bounded here
    dependence = (-scaled.square()).clamp(min=RIDGE - 1).log1p().mul(-0.5)
    dependence.diagonal(dim1=1, dim2=2).zero_()
    return Sums(
        weights.sum(0), weights.T @ log_norms, volume.sum(), parts.sum(), dependence.sum(0), leading.sum(0),
        trailing.sum(0), singular.sum().double(),
    )  # fmt: skip


def _log_minors(gram: Tensor, order: Tensor) -> Tensor:
    """Computes (N, l) values 1/2 log det of the blocks of the first 1, 2, ... l dimensions in order."""
    factor, _ = torch.linalg.cholesky_ex(gram[:, order][:, :, order])
    minors: Tensor = factor.diagonal(dim1=1, dim2=2).clamp(min=1e-160).log().cumsum(1)
    return minors


def entropies(sums: Sums, order: Tensor | None) -> ManifoldEntropyResult:
    """Computes the result from sums; nan where there are no latents.

    Args:
        sums: what :func:`gram_sums` returns, added over batches.
        order: the order that was passed to it; ``core`` and ``detail`` are nan without one.

    Returns:
        The result.
    """
    count = sums.latents[0]
    length = len(sums.leading)
    sizes = torch.arange(1, length + 1, device=count.device, dtype=torch.float64)
    entropy = HALF_LOG_2PIE + sums.log_norms[0] / count
    total = HALF_LOG_2PIE * length + sums.log_volume / count
    core = HALF_LOG_2PIE * sizes + sums.leading / count
    detail = HALF_LOG_2PIE * sizes.flip(0) + sums.trailing / count
    if order is None:
        core, detail = core * math.nan, detail * math.nan
    return ManifoldEntropyResult(
        entropy=entropy,
        total=total,
        total_correlation=(sums.log_parts - sums.log_volume) / count,
        mutual_information=sums.log_dependence / count,
        core=core,
        detail=detail,
        order=entropy.nan_to_num(0.0).argsort(descending=True, stable=True) if order is None else order,
        classes=HALF_LOG_2PIE + sums.log_norms[1:] / sums.latents[1:, None],
        singular=sums.singular / count,
        latents=count,
    )


def manifold_entropy(
    jacobian: Tensor,
    *,
    log_volume: Tensor | None = None,
    latent_scale: Tensor | float = 1.0,
    data_scale: Tensor | float = 1.0,
    partition: Sequence[Sequence[int]] | None = None,
    labels: Tensor | None = None,
    num_classes: int = 0,
) -> ManifoldEntropyResult:
    """Computes the entropy, in nats, of the data that each latent dimension generates, and what dimensions share.

    With ``G = J'J``, the entropy of a set S of dimensions is ``H_S = |S| / 2 (1 + log 2 pi) + E 1/2 log det G_SS``, so that of
    one dimension is ``H_i = 1/2 (1 + log 2 pi) + E log |J_i|``. The total correlation is ``sum_S H_S - H``, and the mutual
    information of two dimensions is ``-1/2 E log(1 - G_ij^2 / (G_ii G_jj))``.

    Source: Galperin and Koethe, *Analyzing Generative Models by Manifold Entropic Metrics*, 2025, arXiv 2410.19426.

    Args:
        jacobian: (N, X, L), dx/dz at N latents sampled from the prior N(0, 1).
        log_volume: (N,) ``log |det J|`` as a flow computes it, for the total.
        latent_scale: standard deviation of each latent, (L,) or a number.
        data_scale: standard deviation by which the data were divided, (X,) or a number.
        partition: sets of dimensions for the total correlation; None for sets of one dimension each.
        labels: (N,) integers 0..K-1, for the entropies within classes.
        num_classes: K; requires labels.

    Returns:
        The entropies; they are finite for dead dimensions and singular Jacobians, which ``dead`` and ``singular`` count.

    Raises:
        ValueError: if the Jacobian is not (N, X, L) of finite numbers, labels are missing, or the partition is invalid.

    Example:
        >>> rotated = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
        >>> result = manifold_entropy((rotated * torch.tensor([4.0, 1.0, 0.0]))[None])
        >>> (result.entropy - 1.4189).round(decimals=3)[:2], result.dead
        (tensor([1.3860, 0.0000], dtype=torch.float64), tensor([False, False,  True]))
    """
    if jacobian.ndim != 3 or not jacobian.is_floating_point() or not jacobian.isfinite().all():
        raise ValueError(
            f"jacobian must be finite (N, X, L), got {jacobian.dtype} of shape {tuple(jacobian.shape)}. "
            "To fix this, leave latents out whose Jacobian is not finite."
        )
    check_labels(labels, len(jacobian), num_classes)
    rows = torch.as_tensor(data_scale, dtype=torch.float64, device=jacobian.device)
    columns = torch.as_tensor(latent_scale, dtype=torch.float64, device=jacobian.device)
    scaled = jacobian.double() * (rows[:, None] if rows.ndim else rows) * columns
    gram = scaled.mT @ scaled
    check_partition(partition, jacobian.shape[2])
    first = entropies(gram_sums(gram, log_volume, labels, num_classes, None, partition), None)
    return entropies(gram_sums(gram, log_volume, labels, num_classes, first.order, partition), first.order)


def check_labels(labels: Tensor | None, n: int, num_classes: int) -> None:
    """Checks that there are labels of n latents where ``num_classes`` is positive.

    Raises:
        ValueError: if there are none, or of another shape.
    """
    if num_classes and (labels is None or labels.shape != (n,)):
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(
            f"labels must be ({n},) where num_classes is given, got {got}. To fix this, pass one class number per latent."
        )


def check_partition(partition: Sequence[Sequence[int]] | None, length: int, name: str = "partition") -> None:
    """Checks that sets of dimensions contain each dimension once.

    Args:
        partition: the sets; None is valid.
        length: number of dimensions.
        name: what an error calls them.

    Raises:
        ValueError: if a dimension is missing, occurs twice, or does not exist.
    """
    if partition is not None and sorted(i for part in partition for i in part) != list(range(length)):
        raise ValueError(
            f"{name} must hold each of the dimensions 0 to {length - 1} once, got {partition}. "
            "To fix this, add what is missing and remove what is doubled."
        )


def manifold_cross_information(jacobian_a: Tensor, jacobian_b: Tensor) -> Tensor:
    """Computes the mutual information, in nats, of each dimension of one decoder with each dimension of another.

    It is ``-1/2 E log(1 - cos^2)`` of the angle between the columns of the two Jacobians at the same data points, and serves
    to compare a model with a known ground truth.

    Source: Galperin and Koethe, arXiv 2410.19426.

    Args:
        jacobian_a: (N, X, L) Jacobians of one decoder.
        jacobian_b: (N, X, M) Jacobians of the other one, at the latents that generate the same data.

    Returns:
        (L, M) mutual information, at least 0; 0 where a column is zero.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> model = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> truth = torch.tensor([[[1.0], [1.0]]])  # between the two
        >>> manifold_cross_information(model, truth).squeeze()
        tensor([0.3466, 0.3466], dtype=torch.float64)
    """
    if jacobian_a.ndim != 3 or jacobian_b.ndim != 3 or jacobian_a.shape[:2] != jacobian_b.shape[:2]:
        raise ValueError(
            f"jacobian_b must be (N, X, M) at the points of jacobian_a {tuple(jacobian_a.shape)}, "
            f"got {tuple(jacobian_b.shape)}. To fix this, pass Jacobians at the same data points."
        )
    a, b = (torch.nn.functional.normalize(j.double(), dim=1) for j in (jacobian_a, jacobian_b))
    cosine = a.mT @ b  # (N, L, M)
    information: Tensor = (-cosine.square()).clamp(min=RIDGE - 1).log1p().mul(-0.5).mean(0)
    return information


def latent_correlation(latents_a: Tensor, latents_b: Tensor) -> Tensor:
    """Computes the Pearson correlation of each latent of one model with each latent of another, at the same data points.

    Args:
        latents_a: (N, L) latents of one model.
        latents_b: (N, M) latents of the other one.

    Returns:
        (L, M) correlations, -1 to 1; 0 where a latent does not vary.
    """
    a, b = (x.double() - x.double().mean(0) for x in (latents_a, latents_b))
    return torch.nn.functional.normalize(a, dim=0).T @ torch.nn.functional.normalize(b, dim=0)
