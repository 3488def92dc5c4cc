"""The real data that a model is compared with: collected from training batches, or given, and then fixed.

They are images (N, C, H, W), or rows (N, F), series (N, C, T) or volumes (N, C, D, H, W) where the batches hold no images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_gendiag.functional.arrays import as_data
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.amounts import NUM_REFERENCE, SHORT_REFERENCE, reference_size, run_progress
from lightning_gendiag.model.batch_reader import BatchReader
from lightning_gendiag.model.batches import (
    LABELS_ADVICE,
    Images,
    Labels,
    Rows,
    count_of_images,
    first_rows,
    holds_others,
    images_of,
    known,
    shape_of,
)
from lightning_gendiag.model.generators import seed_all
from lightning_gendiag.model.isolation import contained

COMPARED = 512
"""Number of images of each side that are compared to see whether a later fit brings other data."""

IMAGES_PER_CLASS = 3
"""Least mean number of real images of a class. Of fewer no share is known, and labels may be no classes but, for example,
identities or the images' indices."""

SEEN = 16
"""Number of images that are kept of the first batch, to see what fits them."""

STEP_ROWS = 8
"""Number of rows of the first batch that are kept, with which a training step shows what the module is trained for."""

OTHER_DATA = 6.0
"""Standard errors by which a mean of new images must differ from the reference's to count as other data."""


class InapplicableError(ValueError):
    """The data of the run are such that a diagnostic never applies; the same on every process."""


class Reference:
    """Real images, at most ``most`` over all processes.

    Args:
        adapter: Says where images and labels stand in a batch, and how many are kept.
        trainer: Whose processes share the images.
        device: Of the module.
    """

    def __init__(self, adapter: ModelAdapter, trainer: Trainer, device: torch.device) -> None:
        self.adapter, self.trainer, self.device = adapter, trainer, device
        self.images: Images | None = None
        self.is_short = False
        """Whether the run is so short that setup and evaluations must be small."""
        self._seen: Tensor | None = None
        self._range_of: Tensor | None = None
        self._range = (math.nan, math.nan)
        self.unlabelled = ""
        """Why the batches seen so far hold no labels; empty where all of them do."""
        self.one_hot = 0
        """Number of columns of one-hot labels in the batches; 0 where labels are given otherwise, or there are none."""
        self._most_classes = 0
        self.conditions: Tensor | None = None
        """(M, K) rows or (M,) numbers that stand for labels and are no classes, such as attributes or angles; None where
        there are none. Before the images are complete, they are those of the first batch."""
        self.count = 0
        """Number of batches of images in a training batch, of which the first is taken; 0 where it is not known."""
        self.is_paired = False
        """Whether a training batch holds other images of the same shape."""
        self.is_gray = False
        """Whether the images of the batches are (N, H, H), without an axis for their channel."""
        self.batch: Any = None
        """The first rows of the first batch, as the trainer passes it, on the CPU; None before it."""
        self._rows = Rows()
        self._reader = BatchReader(self._found, adapter.images is not None or adapter.labels is not None)
        self._looked = self._epoch_seen = False
        self._unconfirmed = False

    @property
    def most(self) -> int:
        """Largest number of images: the user's, or by default fewer large ones than small ones."""
        return self._most_like(self._newest)

    def _most_like(self, images: Tensor | None) -> int:
        """The same, of images as large as these; None where none is known yet."""
        return self.adapter.num_reference or (NUM_REFERENCE if images is None else reference_size(images[0].numel()))

    @property
    def share(self) -> int:
        """Number of images that each process collects."""
        return math.ceil(self.most / self.trainer.world_size)

    @property
    def _newest(self) -> Tensor | None:
        """Real images or other data (n, ...); None before the first batch."""
        return self._seen if self.images is None else self.images.images

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of an image or of other data; None before the first batch."""
        return None if self._newest is None else tuple(self._newest.shape[1:])

    @property
    def example(self) -> Tensor | None:
        """Up to two real images or other data (n, ...); None before the first batch."""
        return None if self._newest is None else as_data(self._newest[:2])

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and largest value of some real images; None before the first batch."""
        seen = self._newest
        if seen is None:
            return None
        if self._range_of is not seen:
            least, most = as_data(seen).aminmax()
            self._range_of, self._range = seen, (float(least), float(most))
        return self._range

    @property
    def num_classes(self) -> int:
        """Number of classes by the largest label so far; 0 where there are no labels."""
        labels = None if self.images is None else self.images.labels
        return self.one_hot or max(
            self._most_classes, 0 if labels is None or not len(labels) else int(labels.max()) + 1
        )

    # ---- from training batches ----

    @property
    def is_collecting(self) -> bool:
        """Whether training batches are looked at until there are images."""
        return self.images is None or self._unconfirmed

    def see(self, batch: Any) -> None:
        """Keeps an example of the data of a batch where nothing needs more; a batch without data is no failure."""
        if not self._looked:
            self._looked = True
            with suppress(Exception):
                self.found_in(batch)

    def collect(self, batch: Any) -> Images | None:
        """Keeps images of a training batch until this process has its share, and returns all that it then finds.

        Returns:
            What is found in the batch; None where no more is looked for.

        Raises:
            ValueError: If no images are found in the batch.
        """
        if not self.is_collecting or (room := self.share - self._held) <= 0:
            return None
        found, conditions = self._found_with_conditions(batch)
        part = _finite_part(found, room)
        # the first batch has shown their length
        fits = (
            conditions is not None and self.conditions is not None and conditions.shape[1:] == self.conditions.shape[1:]
        )
        kept = conditions[:room].cpu().clone() if conditions is not None and fits else None
        self._rows.update(part.images.cpu(), None if part.labels is None else part.labels.cpu(), kept)
        self._reader.learn(batch, found)
        return found

    def read_batch(self, batch: Any) -> Images | None:
        """Returns the data and the labels of a training batch, at little cost where it is structured as those before.

        Returns:
            None where a callable of the user's finds them, and has lately taken more than its share of the time.

        Raises:
            ValueError: If no data are found in the batch.
        """
        return self._reader(batch)

    @property
    def _held(self) -> int:
        return sum(len(rows) for rows in self._rows.images)

    def found_in(self, batch: Any) -> tuple[Tensor | None, Labels]:
        """Returns what is found of data and labels in a batch; training does not notice what the user's callables do."""
        with torch.no_grad(), contained(self.device, self.adapter.images, self.adapter.labels):
            images = self.adapter.find_data(batch)
            labels = self.adapter.find_labels(batch, images)
        self.unlabelled = self.unlabelled or labels.reason
        self.one_hot = labels.one_hot
        if self.images is None and labels.labels is not None and len(labels.labels):
            self._most_classes = max(self._most_classes, int(labels.labels.max()) + 1)
        if self.conditions is None and labels.conditions is not None:
            self.conditions = labels.conditions.detach()[:SEEN].cpu().clone()
        self.count = count_of_images(batch) if self.adapter.images is None else 0
        self.is_paired = isinstance(images, Tensor) and holds_others(batch, images)
        found = isinstance(images, Tensor) and images.ndim == 4
        self.is_gray = found and self.adapter.images is None and images_of(batch) is None
        if self._seen is None and isinstance(images, Tensor) and images.isfinite().all():
            self._seen = images.detach()[:SEEN].cpu().clone()
            self.batch = first_rows(batch, len(images), STEP_ROWS)
        return images, labels

    def _part(self, batch: Any, held: int = 0) -> tuple[Images, Tensor | None]:
        """The first finite images of a batch for which there is room beside those held, and its first conditions."""
        found, conditions = self._found_with_conditions(batch)
        room = self.most - held
        return _finite_part(found, room), None if conditions is None else conditions[:room].cpu()

    def _found(self, batch: Any) -> Images:
        """The images and labels of a batch."""
        return self._found_with_conditions(batch)[0]

    def _found_with_conditions(self, batch: Any) -> tuple[Images, Tensor | None]:
        images, labels = self.found_in(batch)
        if images is None:
            raise ValueError(
                f"a batch must hold (N, C, H, W) images or other data (N, ...), got {shape_of(batch)}. "
                f"To fix this, {self.adapter.images_advice}."
            )
        return Images(images, labels.labels), None if labels.conditions is None else labels.conditions.detach()

    def end_epoch(self) -> None:
        """Notes that an epoch passed: what was collected by now is all that there is."""
        self._epoch_seen = True

    def ready(self, epoch_over: bool) -> bool:
        """Returns whether the reference is there; pools it over all processes once each has its share or an epoch is over.

        Every process must call it at the same time.
        """
        if epoch_over:
            self.end_epoch()
        if self.images is not None:
            return True
        full = self._epoch_seen or self._held >= self.share or self._half_over
        if not self.trainer.strategy.reduce_boolean_decision(full, all=True):
            return False
        self._check_sizes()
        # collectives of an accelerator want its tensors
        rows = self._rows.to(self.device)
        images, labels, conditions = rows.compute()
        self._rows = Rows()
        if len(images) < 4:
            # more may come in the next epoch
            self._rows.images = [part.cpu() for part in rows.images]
            self._rows.labels = [part.cpu() for part in rows.labels]
            self._rows.conditions = [part.cpu() for part in rows.conditions]
            raise ValueError(f"the reference must hold at least 4 finite images, got {len(images)}.")
        known = len(labels) == len(images)
        # of the pooled images, since the first batch of another process may be another
        most = self._most_like(images)
        if self.is_short and self.adapter.num_reference is None:
            most = min(most, SHORT_REFERENCE)
        if len(images) > most:
            # a part of its own, so that the rest is freed
            images = images[:most].clone()
        self.images = Images(images.cpu(), labels[:most].cpu() if known else None)
        self.conditions = conditions[:most].cpu() if len(conditions) else None
        self._say_size()
        return True

    def _say_size(self) -> None:
        """Logs where fewer images are kept since they are large."""
        if (
            self.images is not None
            and len(self.images.images) == self.most < NUM_REFERENCE
            and not self.adapter.num_reference
        ):
            size = "x".join(map(str, self.images.images.shape[1:]))
            rank_zero_info(
                f"Real images: {self.most:,} of {size} are kept instead of {NUM_REFERENCE:,}, since they are large. To choose "
                "another number, pass num_reference=...."
            )

    def _check_sizes(self) -> None:
        """Raises ValueError where the images that were collected have several shapes on any process."""
        shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in self._rows.images))
        if not self.trainer.strategy.reduce_boolean_decision(len(shapes) < 2, all=True):
            got = " and ".join(map(str, shapes[:2])) if len(shapes) > 1 else "several on another process"
            raise ValueError(
                f"the real images must have one shape, got {got}. To fix this, resize them in "
                "ModelAdapter(images=...), or pass ModelAdapter(reference=...)."
            )

    @property
    def _half_over(self) -> bool:
        """Whether half of the run has passed, after which the next images would come too late."""
        return (run_progress(self.trainer) or 0.0) >= 0.5

    # ---- whether a later fit brings other data ----

    def doubt(self) -> None:
        """Collects images anew, to see whether a later fit, or a checkpoint, brings the data of the reference."""
        if self.images is not None and self.adapter.reference is None:
            self._unconfirmed, self._epoch_seen, self._rows, self.unlabelled = True, False, Rows(), ""

    def is_of_other_data(self) -> bool:
        """Returns whether the images collected since :meth:`doubt` are of other data than the reference, which then goes.

        Means of random projections, and of their squares, are compared. Every process must call it at the same time.
        """
        if not self._unconfirmed or self.images is None:
            return False
        # as many as the reference was made of, in case the loader brings one class after the other
        enough = self._held >= min(self.share, len(self.images.images) // self.trainer.world_size)
        if not self.trainer.strategy.reduce_boolean_decision(enough or self._epoch_seen, all=True):
            return False
        rows = self._rows.images
        if any(part.shape[1:] != rows[0].shape[1:] for part in rows):
            # images of several sizes are no reference, which the next evaluation says
            new = rows[0][..., :0]
        else:
            new = torch.cat(rows) if rows else self.images.images
        other = self.trainer.strategy.reduce_boolean_decision(_differs(self.images.images, new), all=False)
        self._unconfirmed = False
        if other:
            self.images = self._seen = self.conditions = None
        else:
            self._rows = Rows()
        return bool(other)

    # ---- given by the user ----

    def read(self, given: Any) -> None:
        """Takes the reference from what the user gave, the same on every process.

        Raises:
            ValueError: If it holds no images.
        """
        if isinstance(given, Tensor) or (isinstance(given, (tuple, list)) and isinstance(given[0], Tensor)):
            parts = [self._part(given)]
        elif isinstance(given, (DataLoader, Dataset)):
            # the loader may be the one that trains: its generators, and those of the data, must not move
            data = given.dataset if isinstance(given, DataLoader) else given
            sampler = getattr(given, "sampler", None)
            with contained(self.device, given, data, sampler, getattr(given, "batch_sampler", None)):
                seed_all(self.adapter.seed, self.device)
                parts = list(self._parts(given))
        else:
            raise ValueError(
                "reference must be a tensor, a pair of images and labels, a dataset or a dataloader, got "
                f"{type(given).__name__}."
            )
        images = torch.cat([part.images for part, _ in parts]).cpu() if parts else torch.empty(0)
        if len(images) < 4:
            raise ValueError(f"reference must hold at least 4 finite images, got {len(images)}.")
        labels = [part.labels.cpu() for part, _ in parts if part.labels is not None]
        self.images = Images(images, torch.cat(labels) if len(labels) == len(parts) else None)
        conditions = [rows for _, rows in parts if rows is not None]
        self.conditions = torch.cat(conditions) if conditions else None
        # what was read may be no batch of training
        self._seen = self.batch = None
        self._say_size()

    def _parts(self, given: DataLoader[Any] | Dataset[Any]) -> Iterator[tuple[Images, Tensor | None]]:
        held = 0
        for batch in self._batches(given):
            part = self._part(batch, held)
            yield part
            held += len(part[0].images)
            if held >= self.most:
                return

    def _batches(self, given: DataLoader[Any] | Dataset[Any]) -> Iterator[Any]:
        data = given.dataset if isinstance(given, DataLoader) else given
        if isinstance(data, IterableDataset):
            yield from given if isinstance(given, DataLoader) else DataLoader(data, batch_size=64)
            return
        collate = given.collate_fn if isinstance(given, DataLoader) else torch.utils.data.default_collate
        total = len(data)  # type: ignore[arg-type]
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.adapter.seed)).tolist()
        for start in range(0, total, 64):
            yield collate([data[index] for index in order[start : start + 64]])

    # ---- use ----

    def local(self, rows: slice = slice(None)) -> Images:
        """Returns this process's part of some rows; together the processes have each of these once.

        Args:
            rows: Rows of the images of all processes; by default all of them.

        Raises:
            RuntimeError: If the images are not complete yet.
        """
        if self.images is None:
            raise RuntimeError("the reference is not complete yet.")
        own = slice(self.trainer.global_rank, None, self.trainer.world_size)
        images, labels = self.images
        return Images(images[rows][own], None if labels is None else labels[rows][own])

    def classes(self) -> Tensor:
        """Returns the labels (N,) of all images, which are of two classes or more, numbered with or without gaps.

        Raises:
            ValueError: If there are no labels.
            InapplicableError: If there is one class alone, or there are too few images of each, as where the labels are the
                indices of the images.
        """
        labels = known(None if self.images is None else self.images.labels, self.unlabelled)
        if (labels == labels[0]).all():
            raise InapplicableError(f"labels must have at least two classes, got only class {int(labels[0])}")
        count = len(torch.unique(labels))
        if count * IMAGES_PER_CLASS > len(labels):
            raise InapplicableError(
                f"labels must be classes of {IMAGES_PER_CLASS} real images or more on average, got {count:,} different labels "
                f"of {len(labels):,} real images. To fix this, {LABELS_ADVICE} that returns (N,) classes, or a larger "
                "num_reference=... for more real images of each class"
            )
        return labels

    @property
    def has_classes(self) -> bool:
        """Whether there are labels that can be classes, as :meth:`classes` returns them."""
        try:
            self.classes()
        except ValueError:
            return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the images that were collected; those that were given are read again instead."""
        state: dict[str, Any] = {"epoch_seen": self._epoch_seen, "one_hot": self.one_hot, "count": self.count}
        state["is_paired"] = self.is_paired
        state["is_gray"] = self.is_gray
        if self.adapter.reference is None and self.images is not None:
            state |= {"images": self.images.images, "labels": self.images.labels, "conditions": self.conditions}
        elif self._held and self.trainer.world_size == 1:
            # with several processes each has rows of its own, and one of them writes the checkpoint
            state |= {"rows": torch.cat(self._rows.images)}
            state |= {"row_labels": torch.cat(self._rows.labels) if self._rows.labels else None}
            state |= {"row_conditions": torch.cat(self._rows.conditions) if self._rows.conditions else None}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the images of a checkpoint, which are compared with the batches to come."""
        if self.adapter.reference is not None:
            return
        self._epoch_seen, self.one_hot, self.count = state["epoch_seen"], state["one_hot"], state["count"]
        self.is_paired = state.get("is_paired", False)
        self.is_gray = state.get("is_gray", False)
        if "images" in state:
            self.images, self.conditions = Images(state["images"], state["labels"]), state["conditions"]
            self.doubt()
        elif "rows" in state:
            self._rows = Rows()
            self._rows.update(state["rows"], state["row_labels"], state["row_conditions"])


def _finite_part(found: Images, room: int) -> Images:
    """Copies of the first finite images, and of their labels."""
    images = found.images.detach()[:room]
    if images.dtype != torch.uint8 or images.ndim != 4:
        images = as_data(images, "the batch's images")
    labels = None if found.labels is None else found.labels.detach()[:room]
    finite = images.flatten(1).isfinite().all(1)
    return Images(images[finite].clone(), None if labels is None else labels[finite].clone())


def _differs(a: Tensor, b: Tensor) -> bool:
    """Whether two sets of images or other data (N, ...) come from different distributions, by means of seeded projections."""
    if a.shape[1:] != b.shape[1:]:
        return True
    x, y = (as_data(images[:COMPARED]).flatten(1).double() for images in (a, b))
    centre, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-3 * float(x.std(correction=0)) + 1e-12)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], 24, generator=generator, dtype=torch.float64)
    directions = torch.cat([directions, torch.ones(x.shape[1], 1, dtype=torch.float64)], 1) / math.sqrt(x.shape[1])
    p, q = ((images - centre) / scale @ directions for images in (x, y))
    p, q = (torch.cat([values, values.square()], 1) for values in (p, q))
    error = (p.var(0) / len(p) + q.var(0) / len(q)).sqrt().clamp(min=1e-9)
    return bool(((p.mean(0) - q.mean(0)).abs() / error).nan_to_num(0.0).max() > OTHER_DATA)
