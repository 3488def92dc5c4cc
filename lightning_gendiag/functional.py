"""Mathematics that several diagnostics share: tensors in, tensors out, no model and no trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Matrix products at the full precision of their type, whatever the training loop has chosen.

    A training script may lower ``torch.set_float32_matmul_precision`` or run under autocast; differences of
    nearly equal squared norms do not survive that.
    """
    # a script that chose by the newer setting may not be asked by the older one
    newer = torch.backends.cuda.matmul if hasattr(torch.backends.cuda.matmul, "fp32_precision") else None
    chosen = None if newer is None else newer.fp32_precision
    try:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        precision = None
        assert newer is not None
        newer.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        elif newer is not None:
            newer.fp32_precision = chosen


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by plain matrix products: the fused kernels have no forward derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def as_images(images: Tensor, name: str = "images") -> Tensor:
    """Images as floating-point (N, C, H, W) in float32 or float64; uint8 becomes 0..1.

    Raises:
        ValueError: if the shape or the type is another.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{name} must be an (N, C, H, W) tensor, got {got}. "
            "To fix this, stack single images with torch.stack and give grey ones a channel: images[:, None]."
        )
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating-point or uint8, got {images.dtype}. To fix this, call .float().")
    return images if images.dtype in (torch.float32, torch.float64) else images.float()


def tensor_of(output: Any, n: int) -> Tensor:
    """The data (n, ...) in what a decoder returns."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) and isinstance(getattr(output, "mean", None), Tensor):
        output = output.mean
    if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != n:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"decode must return ({n}, ...) for ({n}, L) latents, got {got}. "
            "To fix this, pass Probe(decode=lambda module, z: ...)."
        )
    return output


def pieces(rows: Tensor, size: int) -> Iterator[Tensor]:
    """A tensor's rows, at most ``size`` at a time; at least one piece, if an empty one.

    Example:
        >>> [len(piece) for piece in pieces(torch.zeros(5, 2), 2)]
        [2, 2, 1]
    """
    for start in range(0, max(len(rows), 1), size):
        yield rows[start : start + size]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between rows by one matrix product, at least 0.

    Rows should be centred first: the error is that of ``|x|^2 + |y|^2``, not of the distance.

    Args:
        x: (M, D)
        y: (N, D)

    Returns:
        (M, N)

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)  # (M, D) @ (D, N) -> (M, N)


def median(values: Tensor) -> Tensor:
    """The median of all entries, the mean of the middle two where their number is even.

    ``torch.median`` returns the lower of the two.

    Example:
        >>> median(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        tensor(3.)
    """
    values = values.flatten()
    lower = values.median()
    half = len(values) // 2
    if len(values) % 2 or (values <= lower).sum() > half:
        return lower
    return (lower + values[values > lower].min()) / 2


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """Agreement of two partitions of the same items: 1 equal, about 0 by chance, -0.5 at the least.

    Hubert and Arabie, *Comparing partitions*, 1985.

    Args:
        a: integer labels, any shape.
        b: integer labels, of the same shape.

    Example:
        >>> adjusted_rand_index(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
        1.0
    """
    _, a = torch.unique(a.flatten(), return_inverse=True)
    _, b = torch.unique(b.flatten(), return_inverse=True)
    counts = torch.bincount(a * (int(b.max()) + 1) + b).double()

    def pairs(n: Tensor) -> float:
        return float((n * (n - 1) / 2).sum())

    together = pairs(counts)
    in_a, in_b = pairs(torch.bincount(a).double()), pairs(torch.bincount(b).double())
    every = len(a) * (len(a) - 1) / 2
    chance = in_a * in_b / every if every else 0.0
    most = (in_a + in_b) / 2
    # two partitions into one set, or into single items, agree
    return 1.0 if most == chance else (together - chance) / (most - chance)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Squared Fréchet distance of two Gaussians: ``|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2)``.

    By symmetric eigenvalue problems, so that singular covariances do no harm. Dowson and Landau, 1982.

    Args:
        mean_a: (..., F)
        covariance_a: (..., F, F)
        mean_b: (..., F)
        covariance_b: (..., F, F)

    Returns:
        (...), 0 or more up to rounding.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> frechet_distance(torch.zeros(2), one, torch.ones(2), 4 * one)
        tensor(4., dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    inner = root @ covariance_b @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    traces = (covariance_a + covariance_b).diagonal(dim1=-2, dim2=-1).sum(-1)
    distance: Tensor = (mean_a - mean_b).square().sum(-1) + traces - 2 * cross
    return distance
