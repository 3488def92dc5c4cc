"""Reads batch after batch at little cost: where data and labels stand is remembered from the first ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_gendiag.model.batches import DEPTH, Images

CALLABLE_SHARE = 0.01
"""Largest share of the time that callables of the user's may take to find data in batches after the first one."""

Path = tuple[Callable[[Any], Any], ...]
"""What leads from a batch to a tensor in it."""


class BatchReader:
    """Finds data and labels in batches.

    The whole search takes as long as a small training step, and waits for the device to see whether labels are classes. Where
    it finds tensors of the batch as they are, later batches of the same structure are read at the same places.

    Args:
        find: The whole search.
        has_callables: Whether it calls what the user gave, which may be slow.
    """

    def __init__(self, find: Callable[[Any], Images], has_callables: bool) -> None:
        self.find, self.has_callables = find, has_callables
        self._images: tuple[Path, tuple[int, ...], torch.dtype] | None = None
        self._labels: tuple[Path, torch.dtype] | None = None
        self._started = time.monotonic()
        self._spent = 0.0

    def __call__(self, batch: Any) -> Images | None:
        """Returns the data and labels of a batch; None where they are not looked for since that takes too long."""
        known = None if self._images is None else self._at_known_places(batch)
        if known is not None:
            return known
        started = time.monotonic()
        if self.has_callables and self._spent > CALLABLE_SHARE * (started - self._started):
            return None
        found = self.find(batch)
        self.learn(batch, found)
        self._spent += time.monotonic() - started
        return found

    def learn(self, batch: Any, found: Images) -> None:
        """Remembers where the data and labels of a batch stand."""
        self._images = self._labels = None
        if self.has_callables or found.images.requires_grad:
            return
        leaves = list(_leaves(batch))
        images = next((path for path, leaf in leaves if _is_same(leaf, found.images)), None)
        if images is None:
            return
        if found.labels is not None:
            labels = found.labels
            place = next(
                (
                    (path, leaf.dtype)
                    for path, leaf in leaves
                    if leaf.ndim == 1 and leaf.shape == labels.shape and _is_whole(leaf) and leaf.long().equal(labels)
                ),
                None,
            )
            if place is None:
                return
            self._labels = place
        self._images = images, tuple(found.images.shape[1:]), found.images.dtype

    def _at_known_places(self, batch: Any) -> Images | None:
        assert self._images is not None
        path, shape, dtype = self._images
        try:
            images = _follow(batch, path)
            if type(images) is not Tensor or images.dtype != dtype or images.shape[1:] != shape:
                return None
            if self._labels is None:
                return Images(images, None)
            path, dtype = self._labels
            labels = _follow(batch, path)
            if type(labels) is not Tensor or labels.dtype != dtype or labels.shape != images.shape[:1]:
                return None
        except (KeyError, IndexError, AttributeError, TypeError):
            return None
        return Images(images, labels if dtype == torch.long else labels.long())


def _follow(batch: Any, path: Path) -> Any:
    for step in path:
        batch = step(batch)
    return batch


def _leaves(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yields the tensors of a batch, and the way to each."""
    if isinstance(batch, Tensor):
        yield path, batch
    elif len(path) < DEPTH:
        for step, value in _parts(batch):
            yield from _leaves(value, (*path, step))


def _parts(batch: Any) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    if isinstance(batch, Mapping):
        yield from ((itemgetter(key), value) for key, value in batch.items())
    elif isinstance(batch, (tuple, list)):
        yield from ((itemgetter(number), value) for number, value in enumerate(batch))
    elif is_dataclass(batch):
        yield from ((attrgetter(field.name), getattr(batch, field.name, None)) for field in fields(batch))


def _is_same(leaf: Tensor, found: Tensor) -> bool:
    return (
        type(leaf) is Tensor
        and leaf.layout == torch.strided
        and leaf.shape == found.shape
        and leaf.dtype == found.dtype
        and leaf.stride() == found.stride()
        and leaf.data_ptr() == found.data_ptr()
    )


def _is_whole(leaf: Tensor) -> bool:
    return type(leaf) is Tensor and not leaf.is_floating_point() and not leaf.is_complex()
