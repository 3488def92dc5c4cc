"""Finds images and rows in what samplers, decoders and ``forward`` return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent

DATA_NAMES = (
    "sample", "samples", "image", "images", "x", "x_hat", "x_recon", "recon", "recon_x", "reconstruction", "prev_sample",
    "pred", "out", "output",
)  # fmt: skip
"""Fields of an output that hold its images, best first; other fields come after these, and ``logits`` come last."""

SCALES = ((0.0, 1.0, -math.inf), (-1.0, 1.0, -math.inf), (0.0, 255.0, 13.0))
"""Ranges of real images, of which the first that fits is taken, and the value that their highest must exceed.

The last keeps standardized images, such as MNIST's in -0.42 to 2.82, from passing for nearly black ones in 0 to 255.
"""

SLACK = 0.05
"""Fraction of its width by which resized images may leave a range."""

MAX_DEPTH = 3
"""Number of containers inside each other that are opened."""


def data_in(output: Any, n: int, shape: tuple[int, ...] | None, what: str = "sample") -> Tensor:
    """Returns the images or rows in what a sampler, a decoder or ``forward`` returned.

    They are the first tensor that fits, also as channels last, as flat rows, or without an axis for one channel where
    ``shape`` says so. Fields with names such as ``samples`` come first. A distribution over data gives its mean, or one
    sample where it has no mean; a distribution of one sample gives n samples. Integers stay integers.

    Args:
        output: A tensor, an array, a list of pictures, a distribution, or a container of these.
        n: Number of samples that were asked for.
        shape: Shape of one image or row; None where it is not known.
        what: What returned the output, for the message.

    Returns:
        (n, *shape) data, or (n, ...) where the shape is not known; a plain tensor of the output's type.

    Raises:
        ValueError: If nothing fits, or the output is nothing but several tensors that fit. The message names the shapes;
            the line that fixes it depends on the call, which the caller knows.

    Example:
        >>> data_in({"loss": torch.zeros(()), "recon": torch.zeros(2, 64)}, 2, (1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """
    found = []
    for tensor in _tensors(output, n):
        fitted = _fitted(tensor, n, shape)
        if fitted is None:
            found.append(tuple(tensor.shape))
            continue
        if (alike := number_alike(output)) > 1 and _fitted(output[0], n, shape) is not None:
            raise ValueError(f"{what} must return one batch of data, got {alike} of {tuple(output[0].shape)}.")
        return fitted
    expected = ", ".join(map(str, (n, *(("...",) if shape is None else shape))))
    got = " and ".join(map(str, found[:4])) or type(output).__name__
    raise ValueError(f"{what} must return ({expected}) data when asked for {n}, got {got}.")


def lacks_channels(output: Any, n: int, shape: tuple[int, ...]) -> bool:
    """Returns whether :func:`data_in` takes data (N, H, W) without an axis for their channel.

    Args:
        output: A tensor, or a container of tensors.
        n: Number of samples that were asked for.
        shape: Shape of one image, (1, H, W).

    Example:
        >>> lacks_channels(torch.zeros(2, 8, 8), 2, (1, 8, 8)), lacks_channels(torch.zeros(2, 64), 2, (1, 8, 8))
        (True, False)
    """
    taken = next((tensor for tensor in _tensors(output, n) if _fitted(tensor, n, shape) is not None), None)
    return taken is not None and tuple(taken.shape[1:]) == shape[1:]


def scaled_like(images: Tensor, low: float, high: float) -> Tensor:
    """Returns 8-bit images in the range of the real images, which is 0 to 1, -1 to 1 or 0 to 255.

    Args:
        images: (N, ...) images. Floats stay as they are, as do integers of 0 and 1 where the real images are in 0 to 1.
        low: Smallest value of the real images.
        high: Largest value of the real images.

    Returns:
        (N, ...) floats.

    Raises:
        ValueError: If integers are not in 0 to 255, or the real images are in another range.

    Example:
        >>> scaled_like(torch.tensor([0, 255], dtype=torch.uint8), -0.98, 0.99)
        tensor([-1.,  1.])
    """
    if images.is_floating_point():
        return images
    if images.dtype == torch.bool or not images.numel():
        return images.float()
    least, most = (int(value) for value in images.aminmax())
    if least < 0 or most > 255:
        raise ValueError(
            f"integer images must be in 0 to 255, got {least} to {most}. To fix this, return floats in the range of the "
            "real images."
        )
    for start, end, exceeded in SCALES:
        slack = SLACK * (end - start)
        if start - slack <= low and exceeded < high <= end + slack:
            # black and white, as samplers of binary images return, and not two of 256 nearly black values
            binary = images.dtype != torch.uint8 and most <= 1 and end - start == 1
            return images.float() if binary else images.float() / 255 * (end - start) + start
    raise ValueError(
        f"real images must be in 0 to 1, -1 to 1 or 0 to 255 where generated ones have 8 bits, got {low:.3g} to "
        f"{high:.3g}. To fix this, return floats in the range of the real images."
    )


def fields_of(output: Any) -> dict[str, Any]:
    """Returns the named values of a mapping, a named tuple, a dataclass or another plain object; empty where none are."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return dict(output._asdict())
    own = type(output)
    if (
        isinstance(output, (Tensor, nn.Module, Distribution))
        or own.__module__ in ("builtins", "numpy")
        or callable(output)
    ):
        return {}
    slots = [name for name in dir(own) if inspect.isdatadescriptor(getattr(own, name, None))]
    fields = dict(getattr(output, "__dict__", {}))
    for name in slots:
        # a property may need what is not there
        with suppress(Exception):
            fields[name] = getattr(output, name)
    return {name: value for name, value in fields.items() if not name.startswith("_")}


def peeled(distribution: Distribution) -> Distribution:
    """Returns a distribution without the layers that only declare its axes independent."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def moment_of(distribution: Distribution, name: str) -> Tensor | None:
    """Returns the ``mean`` or ``stddev`` of a distribution, or None where it has none."""
    # torch states moments of nan for categories
    if not isinstance(peeled(distribution), Categorical):
        with suppress(NotImplementedError):
            moment: Tensor = getattr(distribution, name)
            return moment
    return None


def number_alike(output: Any) -> int:
    """Returns the number of tensors of a plain tuple or list that holds nothing but tensors of one shape, else 0."""
    plain = type(output) in (tuple, list) and all(isinstance(part, Tensor) for part in output)
    return len(output) if plain and len({part.shape for part in output}) == 1 else 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields all tensors in mappings, tuples and lists within each other, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def _tensors(output: Any, n: int, depth: int = 0) -> Iterator[Tensor]:
    """Yields what may be the data, best first."""
    if isinstance(output, Tensor):
        # of a subclass, such as an image with metadata, only the values are taken
        yield output if type(output) is Tensor else output.as_subclass(Tensor)
    elif isinstance(output, Distribution):
        yield from _of_distribution(output, n)
    elif hasattr(output, "__array_interface__"):
        if (array := np.asarray(output)).dtype.kind in "biuf":
            # a copy, since a picture's values are read-only
            yield torch.tensor(array)
    elif depth < MAX_DEPTH and output is not None:
        fields = fields_of(output)
        parts = [fields[name] for name in _by_preference(fields)]
        if not fields and isinstance(output, (tuple, list)):
            parts = list(output)
        for part in parts:
            yield from _tensors(part, n, depth + 1)
        if isinstance(output, list) and len(output) == n:
            yield from _stacked(output, n)
        if callable(getattr(output, "sample", None)):
            # a posterior or a flow of someone's own
            with suppress(TypeError):
                yield from _tensors(output.sample(), n, depth + 1)


def _by_preference(fields: Mapping[str, Any]) -> list[str]:
    known = [name for name in (*DATA_NAMES, "mean") if name in fields]
    return known + sorted((name for name in fields if name not in known), key="logits".__eq__)


def _of_distribution(distribution: Distribution, n: int) -> Iterator[Tensor]:
    if len(distribution.batch_shape):
        mean = moment_of(distribution, "mean")
        yield distribution.sample() if mean is None else mean
    yield distribution.sample(torch.Size((n,)))


def _stacked(items: list[Any], n: int) -> Iterator[Tensor]:
    """Yields the batch (n, ...) that a list of single images of one shape makes."""
    singles = [next(_tensors(item, n, MAX_DEPTH), None) for item in items]
    tensors = [single for single in singles if single is not None]
    if len(tensors) == n and len({tensor.shape for tensor in tensors}) == 1:
        yield torch.stack(tensors)


def _fitted(data: Tensor, n: int, shape: tuple[int, ...] | None) -> Tensor | None:
    """Returns data as (n, *shape), or None where it does not fit."""
    got = tuple(data.shape[1:])
    if data.ndim < 2 or len(data) != n:
        return None
    if shape is None or got == shape:
        return data
    if len(shape) > 1 and got == (*shape[1:], shape[0]):
        return data.movedim(-1, 1)
    if shape[0] == 1 and got == shape[1:]:
        return data[:, None]
    if got == (math.prod(shape),):
        return data.reshape(n, *shape)
    return None
