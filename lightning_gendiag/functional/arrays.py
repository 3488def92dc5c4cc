"""Checks and conversions of images, decoder outputs and rows, and exact matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEWEST_FRAMES = 5
"""Axis 1 is rather of channels where it is shorter, as of scans with four of them."""


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Computes matrix products at the full precision of their type inside the context.

    A training script may lower ``torch.set_float32_matmul_precision`` or run under autocast, in which differences of nearly
    equal squared norms would be lost. Both settings are restored afterwards.
    """
    before = matmul_precision()
    set_matmul_precision("highest" if before in LEGACY else "ieee")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        set_matmul_precision(before)


LEGACY = ("highest", "high", "medium")
"""Values of ``torch.set_float32_matmul_precision``."""


def matmul_precision() -> str:
    """Returns the precision of matrix products in float32, by the setting with which a script has chosen it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to read this setting where a script has chosen by the newer one
        return str(torch.backends.cuda.matmul.fp32_precision)


def set_matmul_precision(value: str) -> None:
    """Sets what :func:`matmul_precision` returned."""
    if value in LEGACY:
        torch.set_float32_matmul_precision(value)
    else:
        torch.backends.cuda.matmul.fp32_precision = value


def as_images(images: Tensor, name: str = "images") -> Tensor:
    """Returns images in float32 or float64, where uint8 is divided by 255.

    Args:
        images: (N, C, H, W), floating-point or uint8.
        name: what an error calls them.

    Returns:
        (N, C, H, W) images.

    Raises:
        ValueError: if the shape or the type is another one.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"{name} must be an (N, C, H, W) tensor, got {got}. "
            "To fix this, stack single images with torch.stack, and add a channel to grey ones: images[:, None]."
        )
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating-point or uint8, got {images.dtype}. To fix this, call .float().")
    return images if images.dtype in (torch.float32, torch.float64) else images.float()


def as_data(data: Tensor, name: str = "data") -> Tensor:
    """Returns data in float32 or float64: images as :func:`as_images` does, other data with the values that they have.

    Args:
        data: (N, C, H, W) images, or rows (N, F), series (N, C, T), volumes (N, C, D, H, W) or the like of real numbers.
        name: what an error calls them.

    Returns:
        (N, ...) data.

    Raises:
        ValueError: if the shape or the type is another one.
    """
    if isinstance(data, Tensor) and data.ndim == 4:
        return as_images(data, name)
    if not isinstance(data, Tensor) or data.ndim < 2 or data.is_complex():
        got = f"{data.dtype} of shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise ValueError(
            f"{name} must be an (N, ...) tensor of real numbers with two axes or more, got {got}. "
            "To fix this, stack single rows with torch.stack."
        )
    return data if data.dtype in (torch.float32, torch.float64) else data.float()


def is_video(data: Tensor) -> bool:
    """Returns whether data are videos (N, T, C, H, W) of five frames or more in one or three channels, and no volumes.

    Example:
        >>> is_video(torch.zeros(2, 16, 3, 8, 8)), is_video(torch.zeros(2, 3, 16, 8, 8))
        (True, False)
    """
    return data.ndim == 5 and data.shape[1] >= FEWEST_FRAMES and data.shape[2] in (1, 3)


def middle_slices(data: Tensor) -> Tensor:
    """Returns images (N, C, H, W) as they are, and the middle slices of volumes (N, C, D, H, W) or frames of videos.

    Example:
        >>> middle_slices(torch.arange(3.0).view(1, 1, 3, 1, 1))
        tensor([[[[1.]]]])
    """
    if is_video(data):
        return data[:, data.shape[1] // 2]
    return data if data.ndim == 4 else data[:, :, data.shape[2] // 2]


def pooled(latents: Tensor, most: int) -> Tensor:
    """Returns latents (N, ...) as rows: flattened, or as means over their positions where they have more numbers.

    Args:
        latents: (N, L) or spatial (N, C, ...).
        most: largest length of flattened spatial latents.

    Returns:
        (N, L) rows, or (N, C) means.

    Example:
        >>> pooled(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]), most=2)
        tensor([[2., 6.]])
    """
    rows = latents.flatten(1)
    return rows if latents.ndim == 2 or rows.shape[1] <= most else latents.flatten(2).mean(2)


def tensor_of(output: Any, n: int) -> Tensor:
    """Returns the data in the output of a decoder.

    Args:
        output: a tensor, a distribution with a ``mean``, or a tuple or list whose first item is either.
        n: number of latents that were decoded.

    Returns:
        (n, ...) data.

    Raises:
        ValueError: if there is no tensor with n rows and at least two axes.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) and isinstance(getattr(output, "mean", None), Tensor):
        output = output.mean
    if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != n:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"decode must return ({n}, ...) for ({n}, L) latents, got {got}. "
            "To fix this, pass ModelAdapter(decode=lambda module, z: ...)."
        )
    return output


def in_classes(rows: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """Returns (N, 1 + K) weights of rows (N, ...) of their type: 1 for all rows, then 1 in the class of each row, else 0.

    Example:
        >>> in_classes(torch.zeros(2, 5), torch.tensor([1, 0]), 2)
        tensor([[1., 0., 1.],
                [1., 1., 0.]])
    """
    weights = rows.new_ones(len(rows), 1)
    if num_classes == 0 or labels is None:
        return weights
    return torch.cat([weights, torch.nn.functional.one_hot(labels, num_classes).to(rows)], 1)


def pieces(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Yields the rows of a tensor, at most ``size`` at a time; an empty tensor gives one empty piece.

    Example:
        >>> [len(piece) for piece in pieces(torch.zeros(5, 2), 2)]
        [2, 2, 1]
    """
    yield from torch.split(rows, size)


def canonical_order(data: Tensor) -> Tensor:
    """Returns the (N,) order of data (N, ...) by a random projection, which does not depend on the order in which they come."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(math.prod(data.shape[1:]), generator=generator, dtype=torch.float32).to(data.device)
    keys = [(as_data(piece).flatten(1) * direction).sum(1, dtype=torch.float64) for piece in pieces(data, 64)]
    return torch.cat(keys).argsort(stable=True)


def median(values: Tensor) -> Tensor:
    """Computes the median of all entries, which is the mean of the middle two where their number is even.

    ``torch.median`` returns the lower of the two instead.

    Example:
        >>> median(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        tensor(3.)
    """
    middle = values.numel() // 2
    upper = kth_smallest(values, middle)
    return upper if values.numel() % 2 else (kth_smallest(values, middle - 1) + upper) / 2


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """Returns the k-th smallest of all entries, counted from 0, of shape ().

    Example:
        >>> kth_smallest(torch.tensor([[5.0, 1.0], [3.0, 3.0]]), 1)
        tensor(3.)
    """
    values = values.detach().flatten()
    if values.device.type == "cpu":
        # numpy selects in a tenth of the time
        return values.new_tensor(np.partition(values.numpy(), k)[k])
    return values.kthvalue(k + 1).values
