"""Centred kernel alignment of pixels: which positions of an image depend on each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_gendiag.functional.arrays import as_images, exact_matmul, median
from lightning_gendiag.functional.distances import squared_distances

WorkT = TypeVar("WorkT")

BANDWIDTH_IMAGES = 2048
"""Largest number of images over which a median distance is taken, spread evenly over those given."""

CACHED = 1 << 18
"""Largest count of numbers in the kernel matrices that are made together on a CPU: larger ones leave its cache."""

KEPT = 1 << 21
"""Largest count of numbers in the kernels of a batch that are kept: 8 MB in float32."""

SERIES = 0.05
"""Largest exponent ``2 g x^2`` for which three terms of the kernel's series replace the kernel."""

NEGLIGIBLE = 5e-5
"""Largest part of an alignment that is left out of the series, in addition to further terms."""

MIRRORED = 512
"""Rows of a matrix that are mirrored at a time."""


def median_bandwidth(x: Tensor) -> Tensor:
    """Computes the RBF bandwidth ``g = 1 / median |x_i - x_j|^2`` over all pairs, including a row with itself.

    Where more than half of the pairs are equal, the mean replaces the median.

    Args:
        x: (N, D) rows, of which at most ``BANDWIDTH_IMAGES`` are used.

    Returns:
        () the bandwidth; inf where all rows are equal.
    """
    if len(x) > BANDWIDTH_IMAGES:
        x = x[torch.linspace(0, len(x) - 1, BANDWIDTH_IMAGES, device=x.device).round().long()]
    # shifted by a row and not by the mean, so that equal rows stay exactly equal
    x = x - x[:1]
    distances = squared_distances(x, x)
    # a matrix product leaves a trace of rounding where rows are equal; the first of them is 0
    noise = 8 * torch.finfo(x.dtype).eps * distances[0].max()
    typical = median(distances)
    # decided on the device, which the host then need not wait for
    typical = torch.where(typical > noise, typical, distances.mean())
    return torch.where(typical > noise, 1 / typical, math.inf)


def pixel_cka(
    images: Tensor,
    gamma: float | None = None,
    batch_size: int = 100,
    *,
    max_bytes: int = 1 << 30,
    progress: bool = True,
) -> Tensor:
    """Computes the centred kernel alignment of every pair of pixels, 0 (independent) to 1 (equal up to the kernel).

    A pixel is the C-vector at one position. Its kernel over a batch of n images is the RBF ``exp(-gamma |x - y|^2)``, and
    ``CKA_ij = <A K_i A, A K_j A> / (|A K_i A| |A K_j A|)`` with the centring matrix A. The result is the mean over all whole
    batches. One matrix product of the flattened and normalised kernel matrices gives the alignments of all pairs. A pixel
    that does not vary in a batch counts as independent of all pixels there, including itself.

    Source: arXiv 2409.01314, section 3.

    Args:
        images: (N, C, H, W), on the device on which to compute.
        gamma: the bandwidth; by default 1 / median squared distance between two whole images.
        batch_size: n. Images beyond the last whole batch are left out; fewer than n images form one batch.
        max_bytes: bound on the working memory, in addition to the result.
        progress: whether to show a progress bar where the work takes more than a few seconds.

    Returns:
        (P, P) alignments with P = H * W, in row-major order of positions.

    Raises:
        ValueError: if fewer than two images are given, or an image is not finite.

    Example:
        >>> images = torch.rand(100, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> images[:, :, :, 1] = 1 - images[:, :, :, 0]  # a pixel and its negative have the same kernel
        >>> pixel_cka(images).round(decimals=6)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """
    batches, gamma = _batches(images, gamma, batch_size)
    total = _no_alignments(batches)
    for batch in _progress(batches, "pixel CKA", progress):
        _batch_cka(batch, gamma, max_bytes, total)
    return _mirror(total).div_(len(batches))


def _progress(work: Sequence[WorkT], description: str, show: bool) -> Iterable[WorkT]:
    """Iterates over work, with a progress bar after three seconds."""
    from tqdm import tqdm

    bar: Iterable[WorkT] = tqdm(work, desc=description, delay=3, leave=False, disable=not show)
    return bar


def _batches(images: Tensor, gamma: float | None, batch_size: int) -> tuple[list[Tensor], float]:
    """Returns whole batches of pixel vectors (n, C, P), and the bandwidth."""
    images = as_images(images)
    if len(images) < 2 or batch_size < 2:
        raise ValueError(
            f"images must be at least 2 in batches of at least 2, got {len(images)} in batches of {batch_size}. "
            "To fix this, collect more images; maps from 400 images or more are steadier."
        )
    # nan becomes both the least and the largest value
    if not torch.stack(images.aminmax()).isfinite().all():
        raise ValueError(
            "images must be finite, got nan or inf. To fix this, leave such images out: images[images.isfinite()"
            ".flatten(1).all(1)]."
        )
    if gamma is None:
        with exact_matmul():
            gamma = float(median_bandwidth(images.flatten(1)))
        if math.isinf(gamma):
            warnings.warn("all images are equal, so every pixel counts as independent of all others", stacklevel=3)
            gamma = 1.0
    size = min(batch_size, len(images))
    whole = len(images) // size * size
    return list(torch.split(images[:whole].flatten(2), size)), gamma


def _no_alignments(batches: Sequence[Tensor]) -> Tensor:
    """Returns zeros (P, P), to which the alignments of batches (n, C, P) are added."""
    positions = batches[0].shape[2]
    return batches[0].new_zeros(positions, positions)


def _kernel_rows(pixels: Tensor, gamma: float) -> Tensor:
    """Returns the centred, normalised kernel matrices of pixels (n, C, B) as rows (B, n (n + 1) / 2).

    The product of two rows is the CKA of the two pixels: a row holds the upper triangle of the symmetric matrix, with
    off-diagonal entries times sqrt(2).
    """
    n, _, count = pixels.shape
    block = max(1, CACHED // n**2) if pixels.device.type == "cpu" else count
    if count <= block:
        return _block_rows(pixels, gamma)
    rows = pixels.new_empty(count, n * (n + 1) // 2)
    for i in range(0, count, block):
        rows[i : i + block] = _block_rows(pixels[..., i : i + block], gamma)
    return rows


def _block_rows(pixels: Tensor, gamma: float) -> Tensor:
    """Computes :func:`_kernel_rows` of a block of pixels (n, C, B)."""
    n = len(pixels)
    x = pixels.permute(2, 0, 1)  # (B, n, C)
    if x.shape[-1] == 1:
        exponents = (x - x.mT).square_().mul_(-gamma)
    else:
        # shifted by a value, so that vectors that never vary stay exactly equal
        x = x - x[:, :1]
        squares = x.square().sum(-1)
        exponents = squares[:, :, None] + squares[:, None, :]
        exponents.baddbmm_(x, x.mT, beta=-gamma, alpha=2 * gamma).clamp_(max=0)  # (B, n, C) @ (B, C, n) -> (B, n, n)
        exponents.diagonal(dim1=1, dim2=2).zero_()
    # centring removes constants, and expm1 keeps the digits that exp would lose beside 1
    kernels = exponents.expm1_()
    mean = kernels.mean(-1)  # (B, n)
    mean -= mean.mean(-1, keepdim=True) / 2
    kernels.sub_(mean[:, :, None]).sub_(mean[:, None, :])
    i, j = torch.triu_indices(n, n, device=x.device)
    rows = kernels.flatten(1).index_select(1, i * n + j)
    rows.mul_((2 - (i == j).to(rows.dtype)).sqrt_())
    norms = rows.norm(dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, math.inf))


def _batch_cka(
    pixels: Tensor, gamma: float, max_bytes: int, total: Tensor, kept: dict[int, Tensor] | None = None
) -> Tensor:
    """Adds the alignments of one batch (n, C, P) to the upper block triangle of ``total`` (P, P), and returns it.

    Where its kernels (P, n (n + 1) / 2) are small, they are kept under the id of the batch.
    """
    n, _, positions = pixels.shape
    element = pixels.element_size()
    # rows are held for all positions if they fit, otherwise for two blocks at a time
    held = n * (n + 1) // 2 * element
    making = 3 * n * n * element
    fits = held * positions + making * 256 <= max_bytes
    block = min(positions, 256 if fits else max(1, max_bytes // (2 * held + making)))
    starts = range(0, positions, block)
    with exact_matmul():
        if fits:
            rows = torch.empty(positions, n * (n + 1) // 2, dtype=pixels.dtype, device=pixels.device)
            for i in starts:
                rows[i : i + block] = _kernel_rows(pixels[..., i : i + block], gamma)
            # a few wide products compute half of the square at the speed of large matrices
            wide = max(block, positions // 8)
            for i in range(0, positions, wide):
                total[i : i + wide, i:].addmm_(rows[i : i + wide], rows[i:].T)
            if kept is not None and rows.numel() <= KEPT:
                kept[id(pixels)] = rows
            return total
        for i in starts:
            a = _kernel_rows(pixels[..., i : i + block], gamma)
            for j in range(i, positions, block):
                b = a if i == j else _kernel_rows(pixels[..., j : j + block], gamma)
                total[i : i + block, j : j + block].addmm_(a, b.T)
    return total


def _series_cka(pixels: Tensor, gamma: float, max_bytes: int, total: Tensor) -> Tensor:
    """Adds the same as ``_batch_cka`` for grey pixels (n, 1, P) that differ little, in an n-th of the time.

    ``<K_i, K_j> = |F_i' F_j|^2`` is a sum of four squares for the features F (n, 2) of :func:`_series_features`. Those that
    are at most ``NEGLIGIBLE`` together for all pairs are left out.
    """
    positions = pixels.shape[2]
    linear, square = _series_features(pixels, gamma)
    most = float(square.square().sum(0).max())
    pairs = [(linear, linear)]
    if 2 * most + most**2 > NEGLIGIBLE:
        pairs += [(linear, square), (square, linear)]
    if most**2 > NEGLIGIBLE:
        pairs += [(square, square)]
    held = CACHED if pixels.device.type == "cpu" else max_bytes // (2 * pixels.element_size())
    block = min(positions, max(1, held // positions))
    with exact_matmul():
        for i in range(0, positions, block):
            for a, b in pairs:
                products = a[:, i : i + block].T @ b[:, i:]  # (B, n) @ (n, P - i) -> (B, P - i)
                total[i : i + block, i:].addcmul_(products, products)
    return total


def _series_features(pixels: Tensor, gamma: float) -> Tensor:
    """Returns features F (2, n, P) of grey pixels (n, 1, P) that differ little, whose products are their kernels.

    Three terms of the Taylor series replace the kernel: ``k(x, y) = sum_k f_k(x) f_k(y)`` with
    ``f_k(x) = exp(-g x^2) x^k sqrt((2 g)^k / k!)``. Of the first and the third, both nearly multiples of ``g x^2``, a rotation
    gives one that is nearly ``sqrt(3) g x^2`` and one of the order ``(g x^2)^2``, which is left out. Features are centred,
    and scaled such that the kernels have norm 1.
    """
    # shifted by a value before the mean is subtracted, so that equal values stay exactly equal
    x = pixels[:, 0] - pixels[:1, 0]
    x = x - x.mean(0)  # (n, P)
    exponent = gamma * x.square()
    change = (-exponent).expm1_()
    features = torch.stack([(2 * gamma) ** 0.5 * x * (1 + change), (2 * exponent * (1 + change) - change) / 3**0.5])
    features -= features.mean(1, keepdim=True)
    squares = features.square().sum(1)  # (2, P)
    norms = (squares.square().sum(0) + 2 * features.prod(0).sum(0).square()).sqrt_().sqrt_()
    return features.div_(torch.where(norms > 0, norms, math.inf))


def _alignments_with(pixels: Tensor, gamma: float, means: Tensor) -> Tensor:
    """Computes the products (P, R) of the kernels of pixels (n, C, P) with mean ones (R, n (n + 1) / 2), given as rows."""
    if not _differ_little([pixels], gamma):
        return _kernel_rows(pixels, gamma) @ means.T
    n = len(pixels)
    i, j = torch.triu_indices(n, n, device=means.device)
    # both entries off the diagonal in one of them, which gives the same quadratic forms
    upper = means.new_zeros(len(means), n, n)
    upper[:, i, j] = means * (2 - (i == j).to(means.dtype)).sqrt_()
    forms = means.new_zeros(len(means), pixels.shape[2])
    for feature in _series_features(pixels, gamma):
        forms += (upper @ feature).mul_(feature).sum(1)  # (R, n, n) @ (n, P) -> (R, n, P)
    return forms.T


def _differ_little(batches: Sequence[Tensor], gamma: float) -> bool:
    """Returns whether pixels are grey and so near to their means that the series is exact to 1e-4."""
    return batches[0].shape[1] == 1 and all(
        2 * gamma * float((batch - batch.mean(0)).square().max()) < SERIES for batch in batches
    )


def _mirror(upper: Tensor) -> Tensor:
    """Makes a matrix symmetric in place by its upper triangle, and returns it."""
    for i in range(0, len(upper), MIRRORED):
        j = i + MIRRORED
        own = upper[i:j, i:j]
        own.copy_(own.triu() + own.triu(1).T)
        upper[j:, i:j] = upper[i:j, j:].T
    return upper
