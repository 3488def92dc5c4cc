"""Statistics of training batches over batches and processes, in constant memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.training_data.functional import (
    CONFIDENCE,
    MAX_CLASSES,
    Glance,
    TrainingDataResult,
    cell_statistics,
    glance,
    grid_of,
    row_hashes,
)
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better

MAX_HASHES = 4096
"""Largest number of images of each side, and of a process, that are kept to see repeats; the newest ones."""

NOT_FINITE = -(2**63) + 1
"""Stands for the number of an image with nan or inf."""

SUMS = (
    "images", "batches", "invalid_images", "rows", "within", "edges", "edge_squares", "edge_batch_squares", "cells",
    "cell_squares", "cell_batch_squares", "classes", "class_batch_squares", "label_batches",
)  # fmt: skip
"""Fields of the result that are sums."""


class TrainingData(Diagnostic):
    """Whether training batches differ from the first ones of the run: classes, range, cells, repeats, nan and inf.

    All labels are counted and all images are searched for nan and inf; the other numbers are of some images of each batch.
    Memory: sums of about 40 numbers for each cell of an image and 6 for each class, and up to 8,192 numbers for repeats.

    Args:
        shape: (C, H, W) of an image, (C, T) of a series, (C, D, H, W) of a volume or (F,) of a row.
        rows: Largest number of images of a batch whose cells, range and repeats are measured.
        confidence: Probability that nothing is wrongly said to have moved, over all tests of a result together.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> metric = TrainingData((1, 8, 8))
        >>> images, labels = torch.rand(500, 1, 8, 8), torch.arange(10).repeat(50)
        >>> metric.update(images, labels, first=True)
        >>> metric.update(images[labels != 3], labels[labels != 3])
        >>> metric.compute().moves()["classes"]
        'class 3 has not been in the last 450 training images, of which 45 were expected'
    """

    plotted = ("class_", "range_shift", "cell_shift", "variety", "within")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "images": ScalarInfo("Number of training images since the last evaluation."),
        "invalid": less_is_better("Fraction of the training images that contain nan or inf."),
        "low": ScalarInfo("Least value of the training images."),
        "high": ScalarInfo("Largest value of the training images."),
        "range_shift": less_is_better(
            "Distance that an end of the range surely moved since the first images, as a fraction of its width."
        ),
        "cell_shift": less_is_better(
            "Largest distance that a cell surely moved since the first images, in deviations of single images.",
            unit="standard deviations",
        ),
        "moved_cells": less_is_better("Number of cells that surely moved by more than half a standard deviation."),
        "variety": more_is_better("Number of different images over that of as many of the first images."),
        "within": less_is_better("Fraction of the images that repeat another one of their batch."),
        "class_distance": less_is_better(
            "Fraction of the images that would have to change class to match the first ones.", optional=True
        ),
        "moved_classes": less_is_better(
            "Number of classes that are gone or whose share surely changed by more than a factor of two.", optional=True
        ),
        "class_{c}": ScalarInfo(
            "Fraction of the training images that are of the class, for up to 20 classes.", optional=True
        ),
    }
    images: Tensor
    batches: Tensor
    invalid_images: Tensor
    rows_seen: Tensor
    within: Tensor
    edges: Tensor
    edge_squares: Tensor
    edge_batch_squares: Tensor
    cells: Tensor
    cell_squares: Tensor
    cell_batch_squares: Tensor
    classes: Tensor
    class_batch_squares: Tensor
    label_batches: Tensor
    skipped: Tensor
    hashes: list[Tensor]
    first_hashes: list[Tensor]
    low: Tensor
    high: Tensor

    def __init__(self, shape: Sequence[int], *, rows: int = 64, confidence: float = CONFIDENCE, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"shape must be one or more positive sizes, got {self.shape}. To fix this, pass images.shape[1:]."
            )
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}. To fix this, pass a number such as 8.")
        if not 0.5 < confidence < 1:
            raise ValueError(
                f"confidence must be in (0.5, 1), got {confidence}. To fix this, pass a number such as 0.9999."
            )
        self.most, self.confidence, self.grid = rows, confidence, grid_of(self.shape)
        pair, cells, classes = (2,), (2, 3, math.prod(self.grid)), (2, MAX_CLASSES + 1)
        self.add_sums(
            images=pair, batches=pair, invalid_images=pair, rows_seen=pair, within=pair, label_batches=pair, skipped=(),
            edges=(2, 2), edge_squares=(2, 2), edge_batch_squares=(2, 2),
            cells=cells, cell_squares=cells, cell_batch_squares=cells, classes=classes, class_batch_squares=classes,
        )  # fmt: skip
        self.add_state("low", default=torch.full(pair, math.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("high", default=torch.full(pair, -math.inf, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("hashes", default=[], dist_reduce_fx="cat")
        self.add_state("first_hashes", default=[], dist_reduce_fx="cat")
        self.add_configuration(shape=self.shape, rows=rows, confidence=confidence)

    def update(
        self,
        data: Tensor | None = None,
        labels: Tensor | None = None,
        first: bool = False,
        glances: Sequence[Glance] = (),
    ) -> None:
        """Adds a batch, or what :func:`glance` kept of several.

        Args:
            data: (N, C, H, W) images, or other data (N, ...) of real numbers, of the shape that was declared.
            labels: (N,) integers; negative ones are left out.
            first: Whether they are among the first images of the run, which later ones are compared with.
            glances: Of batches, in place of ``data``.

        Raises:
            ValueError: If data or labels have another shape than expected.
        """
        if data is not None:
            if grid_of(data.shape[1:] if data.ndim > 1 else (1, 1, 1, 1, 1)) != self.grid or data.is_complex():
                raise ValueError(
                    f"data must be (N, {', '.join(map(str, self.shape))}) real numbers, got {data.dtype} of shape "
                    f"{tuple(data.shape)}. To fix this, create TrainingData(data.shape[1:])."
                )
            if labels is not None and labels.shape != data.shape[:1]:
                raise ValueError(
                    f"labels must be ({len(data)},) integers, got shape {tuple(labels.shape)}. "
                    "To fix this, pass one class number per image."
                )
            glances = [*glances, glance(data, labels, self.most)] if len(data) else glances
        alike: dict[tuple[int, ...], list[Glance]] = defaultdict(list)
        for seen in glances:
            alike[tuple(seen.rows.shape)].append(seen)
        side = self.images.new_tensor([not first, first])
        for group in alike.values():
            self._add_rows(torch.stack([seen.rows for seen in group]), side, first)
        if glances:
            self._add_counts(glances, side)

    def _add_rows(self, stacked: Tensor, side: Tensor, first: bool) -> None:
        """Adds measured images (B, k, C, ...) of B batches; no value is read, so that no device is waited for."""
        batches, k = stacked.shape[:2]
        rows = stacked.flatten(0, 1)
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        # the sum of an image is finite where all of it is, and takes a pass less
        finite = rows.flatten(1).sum(1).isfinite()  # (B k,)
        hashes = torch.where(finite, row_hashes(rows), NOT_FINITE)
        self._add_hashes(hashes, first)
        # aminmax takes twenty times as long along an axis
        least, most = rows.flatten(1).amin(1), rows.flatten(1).amax(1)
        edges = torch.stack([least, most], 1).double()  # (B k, 2)
        cells = cell_statistics(rows, self.grid).double()  # (B k, 3, P)
        in_order = hashes.view(batches, k).sort(1).values
        repeated = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NOT_FINITE)).sum()
        self.accumulate(rows_seen=side * finite.sum(), within=side * repeated)
        for name, values in (("edge", edges), ("cell", cells)):
            values = torch.where(finite.view(-1, *[1] * (values.ndim - 1)), values, 0.0)
            of_batch = values.view(batches, k, *values.shape[1:]).sum(1)
            count = finite.view(batches, k).sum(1).clamp(min=1).view(-1, *[1] * (values.ndim - 1))
            sides = side.view(2, *[1] * (values.ndim - 1))
            self.accumulate(
                **{
                    f"{name}s": sides * of_batch.sum(0),
                    f"{name}_squares": sides * values.square().sum(0),
                    f"{name}_batch_squares": sides * (of_batch.square() / count).sum(0),
                }
            )
        low = torch.where(finite, least, math.inf).min().double()
        high = torch.where(finite, most, -math.inf).max().double()
        self.low = torch.minimum(self.low, torch.where(side > 0, low, math.inf))
        self.high = torch.maximum(self.high, torch.where(side > 0, high, -math.inf))

    def _add_hashes(self, hashes: Tensor, first: bool) -> None:
        """Adds numbers of images; those of images that are not finite are left out when the result is computed."""
        name = "first_hashes" if first else "hashes"
        held = [*getattr(self, name), hashes]
        if sum(map(len, held)) > 2 * MAX_HASHES:
            held = [torch.cat(held)[-MAX_HASHES:]]
        setattr(self, name, held)

    def _add_counts(self, glances: Sequence[Glance], side: Tensor) -> None:
        """Adds the numbers of images, of those that are not finite, and of those of each class."""
        sums = torch.cat([seen.sums for seen in glances])
        self.accumulate(
            images=side * len(sums), batches=side * len(glances), invalid_images=side * (~sums.isfinite()).sum()
        )
        labelled = [seen.labels for seen in glances if seen.labels is not None]
        if not labelled:
            return
        labels = torch.cat(labelled)
        sizes = torch.tensor([len(some) for some in labelled])
        number = torch.repeat_interleave(torch.arange(len(labelled)), sizes).to(labels.device, non_blocking=True)
        counts = torch.zeros(len(labelled), MAX_CLASSES + 1, dtype=torch.float64, device=labels.device)
        known = (labels >= 0).double()
        counts.index_put_((number, labels.clamp(0, MAX_CLASSES)), known, accumulate=True)
        size = counts.sum(1, keepdim=True).clamp(min=1)
        self.accumulate(
            classes=side[:, None] * counts.sum(0),
            class_batch_squares=side[:, None] * (counts.square() / size).sum(0),
            label_batches=side * len(labelled),
        )

    def add_first(self, first: dict[str, Tensor]) -> None:
        """Adds the sums of first images, by the names of the result's fields; of several processes, one adds them."""
        for name in SUMS:
            state = "rows_seen" if name == "rows" else name
            held = getattr(self, state).clone()
            value = first[name].to(held)
            if value.ndim:
                held[1][tuple(slice(size) for size in value.shape)] += value
            else:
                held[1] += value
            setattr(self, state, held)
        self.low = torch.stack([self.low[0], torch.minimum(self.low[1], first["low"].to(self.low))])
        self.high = torch.stack([self.high[0], torch.maximum(self.high[1], first["high"].to(self.high))])
        self.first_hashes = [*self.first_hashes, first["hashes"].to(self.device)]

    def compute(self) -> TrainingDataResult:
        """Returns the numbers of both sides."""
        seen = self.classes[:, :MAX_CLASSES].sum(0).nonzero()
        count = int(seen[-1]) + 1 if len(seen) else 0
        hashes, first_hashes = (self._finite_hashes(name) for name in ("hashes", "first_hashes"))
        return TrainingDataResult(
            shape=torch.tensor(self.shape, device=self.device),
            images=self.images,
            batches=self.batches,
            invalid_images=self.invalid_images,
            rows=self.rows_seen,
            within=self.within,
            low=self.low,
            high=self.high,
            edges=self.edges,
            edge_squares=self.edge_squares,
            edge_batch_squares=self.edge_batch_squares,
            cells=self.cells,
            cell_squares=self.cell_squares,
            cell_batch_squares=self.cell_batch_squares,
            classes=self.classes[:, :count],
            class_batch_squares=self.class_batch_squares[:, :count],
            label_batches=self.label_batches,
            hashes=hashes,
            first_hashes=first_hashes,
            absent=self.images.new_full((count,), math.nan),
            confidence=self.images.new_tensor(self.confidence),
            skipped=self.skipped,
        )

    def _finite_hashes(self, name: str) -> Tensor:
        hashes = self.rows(name).long()
        return hashes[hashes != NOT_FINITE].sort().values
