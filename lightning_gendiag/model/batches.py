"""Reads images, other data and labels from batches as people have them, and pools them over processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import groupby
from numbers import Real
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_gendiag.metric import Diagnostic

IMAGE_NAMES = (
    "image", "images", "img", "imgs", "x", "pixel_values", "data", "jpg", "jpeg", "png", "webp", "source", "input",
    "inputs", "sample", "samples",
)  # fmt: skip
"""Names of images and other data in batches, in order of preference and in lower case."""

LABEL_NAMES = (
    "label", "labels", "y", "target", "targets", "cls", "class", "classes", "class_label", "class_labels", "class_id",
    "fine_label", "fine_labels", "category",
)  # fmt: skip
"""Names of labels in batches, in order of preference and in lower case."""

LABELS_ADVICE = "pass labels=lambda batch: ..."
"""What a reason for missing labels advises."""

CHANNELS = (1, 3, 4)
"""Numbers of channels by which the axis of the channels is recognized."""

SMALLEST_SQUARE = 8
"""Side of the smallest square without an axis for channels that is taken for a gray image and not for a series."""

DEPTH = 4
"""Number of containers within each other that are searched."""


class Images(NamedTuple):
    """Images and their labels, which are None where they are unknown."""

    images: Tensor
    """(N, C, H, W), or other data (N, ...) where there are no images"""
    labels: Tensor | None
    """(N,) integers"""


class Labels(NamedTuple):
    """Labels, or the reason why there are none."""

    labels: Tensor | None
    """(N,) int64, 0 or above"""
    reason: str
    """Empty where there are labels."""
    one_hot: int = 0
    """K, where they were given as one-hot rows (N, K)."""
    conditions: Tensor | None = None
    """(N, K) rows or (N,) numbers that are no classes, such as attributes or angles, as a sampler may take them."""


def images_of(batch: Any) -> Tensor | None:
    """Returns the images (N, C, H, W) of a batch, or None where there are none.

    Mappings, objects, tuples and lists are searched for a tensor or an array of four axes, or for a list of single images
    of one shape. What has one of ``IMAGE_NAMES``, or is the first entry of a tuple, goes before all others. Images
    (N, H, W, C) are recognized by 1, 3 or 4 channels. Integers in [0, 255] become uint8, and others float32.
    """
    found = _find_images(list(_walk(batch)))
    return None if found is None else _as_images(found.tensor)


def data_of(batch: Any, squares: bool = True) -> Tensor | None:
    """Returns the data (N, ...) of a batch: its images (N, C, H, W), else rows, series or volumes, or None.

    Data that are no images are the first floating-point tensor of two axes or more with the batch's number of rows, where
    known names go before others, as in :func:`images_of`. A mask of tokens is no data.

    Args:
        batch: The batch.
        squares: Whether squares (N, H, H) are gray images (N, 1, H, H) without an axis for the channel, and no series.
    """
    images, data = images_of(batch), _find_data(list(_walk(batch)))
    if images is not None or data is None:
        return images
    return data.tensor[:, None] if squares and is_square(data.tensor) else data.tensor


def is_square(data: Tensor) -> bool:
    """Returns whether data (N, H, H) are rather gray images than series (N, C, T)."""
    return data.ndim == 3 and data.shape[1] == data.shape[2] >= SMALLEST_SQUARE


def read_labels(batch: Any, images: Tensor | None = None) -> Labels:
    """Returns the labels (N,) of a batch, int64 of at least 0, or the reason why there are none.

    They stand beside the data: under one of ``LABEL_NAMES``, or in the next entry of a tuple. See :func:`judge_labels` for
    what is accepted.

    Args:
        batch: What a dataloader yields.
        images: (N, C, H, W) whose labels are wanted, where they are others than :func:`images_of` finds.
    """
    tensors = list(_walk(batch))
    data = _find_images(tensors) or _find_data(tensors)
    if images is not None:
        data = next((found for found in tensors if found.tensor.data_ptr() == images.data_ptr()), data)
    rows = len(images) if images is not None else len(data.tensor) if data else None
    start = 0 if isinstance(batch, (tuple, list)) else -1
    for container, position in data.around if data else ((batch, start),):
        judged = [judge_labels(value, rows) for value in _beside(container, position)]
        for labels in judged:
            if labels.labels is not None:
                return labels
        if judged:
            # labels further out belong to other data
            return judged[0]
    return judge_labels(None)


def count_of_images(batch: Any) -> int:
    """Returns the number of batches of images of one shape, of which :func:`images_of` takes the first; 0 where it does not.

    A pair of domains, for example, has two.
    """
    tensors = list(_walk(batch))
    images = _find_images(tensors)
    if images is None:
        return 0
    alike = [found for found in tensors if found.tensor.shape == images.tensor.shape]
    # the places of a tensor's containers and its own, the outermost first
    first = min(alike, key=lambda found: [position for _, position in reversed(found.around)])
    return len(alike) if first is images else 0


def holds_others(batch: Any, images: Tensor) -> bool:
    """Returns whether a batch holds other images (N, C, H, W) beside these, such as those of another domain.

    Targets that are the images once more are none.
    """
    if images.ndim != 4:
        return False
    alike = (_as_images(found.tensor) for found in _walk(batch) if found.tensor.ndim == 4)
    return any(other.shape == images.shape and not other.equal(images.to(other)) for other in alike)


def judge_labels(found: Any, rows: int | None = None) -> Labels:
    """Returns class labels as int64, or the reason why what was found is none.

    Args:
        found: (N,) or (N, 1) integers of at least 0, also as floats or Booleans, or one-hot rows (N, K).
        rows: Number of rows of the data, where known.

    Returns:
        The labels; rows (N, K) of other numbers, and fractions (N,) or (N, 1), are ``conditions``.
    """
    labels = _tensor(found)
    if labels is None:
        return _no_labels(
            "the batches hold no labels" if found is None else f"the labels {shape_of(found)} are not numbers"
        )
    name = f"the labels {tuple(labels.shape)}"
    if not 1 <= labels.ndim <= 2:
        return _no_labels(f"{name} have {labels.ndim} axes")
    if rows is not None and len(labels) != rows:
        return _no_labels(f"{name} go with other data than {rows} rows")
    # nan marks what is not known
    conditions = labels if not labels.is_complex() and bool(labels.isfinite().all()) else None
    if labels.is_complex() or (labels.is_floating_point() and not torch.equal(labels, labels.round())):
        return _no_labels(f"{name} are not whole numbers", conditions)
    if labels.dtype != torch.long:
        labels = labels.long()
    if labels.ndim == 2 and labels.shape[1] != 1:
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
            return _no_labels(f"{name} are attributes, not classes", conditions)
        return Labels(labels.argmax(1), "", labels.shape[1])
    if (labels < 0).any():
        return _no_labels(f"{name} have negative values, which are no classes")
    return Labels(labels if labels.ndim == 1 else labels[:, 0], "")


def one_hot_rows(labels: Tensor, classes: int) -> Tensor:
    """Returns one-hot rows (N, K) of labels (N,) from 0.

    Raises:
        ValueError: If a label is too large. On a GPU, torch does not check it, and its failure would end the run.
    """
    largest = int(labels.max()) if len(labels) else 0
    if largest >= classes:
        raise ValueError(f"it takes {classes} classes, got a label {largest}")
    return functional.one_hot(labels, classes)


def known(labels: Tensor | None, reason: str = "") -> Tensor:
    """Returns labels (N,), which must be known.

    Raises:
        ValueError: If there are none; the message shows the reason.
    """
    if labels is None:
        raise ValueError(f"labels must be known, but {reason or judge_labels(None).reason}")
    return labels


def _no_labels(reason: str, conditions: Tensor | None = None) -> Labels:
    return Labels(None, f"{reason}; {LABELS_ADVICE}", conditions=conditions)


class Rows(Diagnostic):
    """Collects images, and what is known of them, on every process; its synchronization pools them."""

    images: list[Tensor]
    labels: list[Tensor]
    conditions: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.add_state("conditions", default=[], dist_reduce_fx="cat")
        # a process may have no images to pool, of which torchmetrics would warn
        self._update_count = 1

    def update(self, images: Tensor, labels: Tensor | None, conditions: Tensor | None = None) -> None:
        """Adds images (n, C, H, W) and, where they are known, labels (n,) or conditions (., K) or (.,) that are no classes."""
        self.images.append(images)
        if labels is not None:
            self.labels.append(labels)
        if conditions is not None:
            self.conditions.append(conditions)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns all images, all labels and all conditions."""
        return self.rows("images"), self.rows("labels"), self.rows("conditions")


def shape_of(batch: Any) -> str:
    """Returns the structure of a batch as text, such as ``{image: (16, 1, 8, 8), label: (16,)}``."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return str(tuple(batch.shape))
    if isinstance(batch, (tuple, list)):
        runs = [(part, len(list(same))) for part, same in groupby(map(shape_of, batch))]
        return "(" + ", ".join(part if n == 1 else f"{n} x {part}" for part, n in runs) + ")"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {shape_of(value)}" for name, value in batch.items()) + "}"
    return type(batch).__name__


# ---- the search ----


class _Found(NamedTuple):
    """A tensor in a batch."""

    tensor: Tensor
    around: tuple[tuple[Any, int], ...]
    """The containers that hold it, innermost first, and its position in each."""
    is_known: bool
    """Whether it has the name or the place of data."""


def _walk(batch: Any, around: tuple[tuple[Any, int], ...] = (), is_named: bool = False) -> Iterator[_Found]:
    """Yields the tensors of a batch, known names first and names of labels last."""
    tensor = _tensor(batch)
    if tensor is not None:
        first = not around or (isinstance(around[0][0], (tuple, list)) and around[0][1] == 0)
        yield _Found(tensor, around, is_named or first)
    elif len(around) < DEPTH and not _is_ragged(batch):
        entries = _entries(batch)
        # a stable order: entries without a known name stay as they are
        for position in sorted(range(len(entries)), key=lambda place: _rank(entries[place][0])):
            name, value = entries[position]
            yield from _walk(value, ((batch, position), *around), is_named or name in IMAGE_NAMES)


def _rank(name: str) -> int:
    return IMAGE_NAMES.index(name) if name in IMAGE_NAMES else len(IMAGE_NAMES) + (name in LABEL_NAMES)


def _entries(batch: Any) -> list[tuple[str, Any]]:
    """Returns names in lower case and values of a container; names of tuples are empty, and leaves have no entries."""
    named: Any = ()
    if isinstance(batch, Mapping):
        named = batch.items()
    elif isinstance(batch, (tuple, list)):
        named = zip(getattr(batch, "_fields", [""] * len(batch)), batch, strict=True)
    elif is_dataclass(batch):
        named = ((field.name, getattr(batch, field.name, None)) for field in fields(batch))
    elif hasattr(batch, "__dict__") and not isinstance(batch, (type, FunctionType)):
        named = vars(batch).items()
    return [(str(name).lower(), value) for name, value in named]


def _tensor(value: Any) -> Tensor | None:
    """Returns a plain tensor of a tensor, an array, or a list of numbers or of single images, or None."""
    if isinstance(value, (tuple, list)) and len(value) > 1 and all(isinstance(part, Real) for part in value):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        try:
            # a copy, since torch reads no negative strides and warns of read-only memory
            return torch.from_numpy(value.copy())
        except (TypeError, ValueError):
            return None
    if isinstance(value, Tensor):
        # subclasses such as MONAI's keep records beside the rows, which slices and sums contradict
        plain = value if type(value) is Tensor else value.as_subclass(Tensor)
        return plain if plain.layout == torch.strided and not plain.is_nested else None
    if isinstance(value, (tuple, list)) and len(value) > 1:
        parts = [_tensor(part) for part in value if isinstance(part, (Tensor, np.ndarray))]
        whole = [part for part in parts if part is not None and (part.ndim == 0 or _is_single_image(part))]
        if len(whole) == len(value) and len({part.shape for part in whole}) == 1:
            return torch.stack(whole)
    return None


def _is_single_image(tensor: Tensor) -> bool:
    """Whether a tensor may be an image (C, H, W) or (H, W, C)."""
    return tensor.ndim == 3 and (tensor.shape[0] in CHANNELS or tensor.shape[2] in CHANNELS)


def _is_ragged(batch: Any) -> bool:
    """Whether a batch is a list of images of several sizes, none of whose entries is a batch."""
    parts = [_tensor(part) for part in batch] if isinstance(batch, (tuple, list)) and len(batch) > 1 else [None]
    return all(part is not None and _is_single_image(part) for part in parts)


def _find_images(tensors: list[_Found]) -> _Found | None:
    images = [found for found in tensors if found.tensor.ndim == 4 and not found.tensor.is_complex()]
    # a mask is no image unless it is called one
    images = [found for found in images if found.is_known or found.tensor.dtype != torch.bool]
    return _first(images)


def _find_data(tensors: list[_Found]) -> _Found | None:
    lengths = Counter(len(found.tensor) for found in tensors if found.tensor.ndim)
    rows = lengths.most_common(1)[0][0] if lengths else 0
    data = [found for found in tensors if found.tensor.ndim >= 2 and found.tensor.is_floating_point()]
    return _first([found for found in data if len(found.tensor) == rows and not _is_mask(found.tensor, tensors)])


def _is_mask(tensor: Tensor, tensors: list[_Found]) -> bool:
    """Whether zeros and ones say which integers of the same shape beside them count, as the mask of tokens does."""
    whole = (found.tensor for found in tensors if not found.tensor.is_floating_point())
    alike = [other for other in whole if other.shape == tensor.shape and other.dtype != torch.bool]
    # integers that are no more than zeros and ones may be the mask themselves
    counts = any(bool((other > 1).any()) for other in alike)
    return counts and bool(((tensor == 0) | (tensor == 1)).all())


def _first(tensors: list[_Found]) -> _Found | None:
    return next((found for found in tensors if found.is_known), tensors[0] if tensors else None)


def _as_images(images: Tensor) -> Tensor:
    """Returns images (N, C, H, W) of any layout and type as floating-point numbers or uint8."""
    _, first, height, last = images.shape
    # (N, 16, 4, 4) are square features rather than images of a width of 4
    if last in CHANNELS and first not in CHANNELS and height != last:
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.is_floating_point() or images.dtype == torch.uint8:
        return images
    values = images.float()
    fits = images.dtype != torch.bool and bool(((values >= 0) & (values <= 255)).all())
    return images.to(torch.uint8) if fits else values


def _beside(container: Any, position: int) -> Iterator[Any]:
    """Yields what may be the labels of the data at a position of a container."""
    entries = _entries(container)
    others = [entry for place, entry in enumerate(entries) if place != position and not _holds_images(entry[1])]
    found = list(_named_labels(others))
    yield from found
    if isinstance(container, (tuple, list)) and not found:
        following = [value for _, value in entries[position + 1 :] if not _holds_images(value)]
        yield from _labels_in(following[0]) if following else ()


def _labels_in(value: Any) -> Iterator[Any]:
    """Yields what may be labels in the entry that holds them: itself, its tensors, or what has a name of labels."""
    if _tensor(value) is not None:
        yield value
    elif isinstance(value, (tuple, list)):
        tensors = [part for part in value if _tensor(part) is not None]
        texts = [value] if value and all(isinstance(part, str) for part in value) else []
        yield from tensors or texts
    else:
        yield from _named_labels(_entries(value))


def _named_labels(entries: list[tuple[str, Any]], depth: int = DEPTH) -> Iterator[Any]:
    """Yields the values that have a name of labels, also in mappings and objects within."""
    for wanted in LABEL_NAMES:
        for name, value in entries:
            if name == wanted:
                yield from _labels_in(value)
    for name, value in entries if depth else ():
        if name not in LABEL_NAMES and not isinstance(value, (tuple, list, Tensor, np.ndarray)):
            yield from _named_labels(_entries(value), depth - 1)


def _holds_images(value: Any) -> bool:
    """Whether an entry is no labels but data, or holds data of its own beside labels."""
    tensor = _tensor(value)
    return any(found.tensor.ndim > 3 for found in _walk(value)) if tensor is None else tensor.ndim > 2


def first_rows(batch: Any, n: int, rows: int, device: torch.device | str = "cpu") -> Any:
    """Returns copies of the first rows of all that a batch of n rows holds, on a device; what has no rows stays.

    Args:
        batch: Tensors in tuples, lists and mappings, as a trainer passes it.
        n: Number of rows of the batch.
        rows: Number of those that are kept.
        device: Of the copies.

    Example:
        >>> first_rows({"x": torch.arange(4), "text": ["a", "b", "c", "d"], "scale": 2.0}, 4, 2)
        {'x': tensor([0, 1]), 'text': ['a', 'b'], 'scale': 2.0}
    """
    if isinstance(batch, Tensor):
        own = batch.detach()
        return (own[:rows] if own.ndim and len(own) == n else own).to(device, copy=True)
    if isinstance(batch, Mapping):
        kept = {key: first_rows(value, n, rows, device) for key, value in batch.items()}
        return kept if type(batch) is dict else type(batch)(kept)  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        # one text or number for each row
        single = len(batch) == n and not any(isinstance(value, (Tensor, Mapping, tuple, list)) for value in batch)
        parts = [first_rows(value, n, rows, device) for value in (batch[:rows] if single else batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
