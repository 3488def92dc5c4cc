"""Reads images and labels from batches in the usual forms, and pools them over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_gendiag.metric import Diagnostic


class Images(NamedTuple):
    """Images and their labels, which are None where they are unknown."""

    images: Tensor
    """(N, C, H, W)"""
    labels: Tensor | None
    """(N,) integers"""


def images_of(batch: Any) -> Tensor | None:
    """Returns the images (N, C, H, W) of a batch, or None where there are none.

    They are the batch itself, its first entry, or its value under ``image``, ``images``, ``img``, ``x``, ``pixel_values``
    or ``data``.
    """
    if isinstance(batch, Tensor):
        return batch if batch.ndim == 4 else None
    if isinstance(batch, Mapping):
        named = [batch[key] for key in ("image", "images", "img", "x", "pixel_values", "data") if key in batch]
        return images_of(named[0]) if named else None
    if isinstance(batch, (tuple, list)) and batch:
        return images_of(batch[0])
    return None


def labels_of(batch: Any) -> Tensor | None:
    """Returns the labels (N,) of a batch, or None where there are none.

    They are its second entry, or its value under ``label``, ``labels``, ``y``, ``target`` or ``targets``.
    """
    if isinstance(batch, Mapping):
        named = [batch[key] for key in ("label", "labels", "y", "target", "targets") if key in batch]
    elif isinstance(batch, (tuple, list)):
        named = list(batch[1:2])
    else:
        named = []
    labels = named[0] if named else None
    valid = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    return labels if valid else None


class Rows(Diagnostic):
    """Collects images and labels on every process; its synchronization pools them."""

    images: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor, labels: Tensor | None) -> None:
        """Adds images (n, C, H, W) and, where they are known, labels (n,)."""
        self.images.append(images)
        if labels is not None:
            self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns all images and all labels."""
        return self.rows("images"), self.rows("labels")


def known(labels: Tensor | None) -> Tensor:
    """Returns labels (N,), which must be known.

    Raises:
        ValueError: If there are none.
    """
    if labels is None:
        raise ValueError(
            "labels must be known, but the batches have none. To fix this, pass ModelAdapter(labels=lambda batch: ...)."
        )
    return labels


def shape_of(batch: Any) -> str:
    """Returns the structure of a batch as text, such as ``{image: (16, 1, 8, 8), label: (16,)}``."""
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {shape_of(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(shape_of(part) for part in batch) + ")"
    return type(batch).__name__
