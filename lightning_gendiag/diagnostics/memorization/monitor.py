"""Monitors copies of training images and repetitions among samples while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series
from lightning_gendiag.diagnostics.memorization import plots
from lightning_gendiag.diagnostics.memorization.functional import (
    LEAST_HELD_OUT,
    RATIO,
    MemorizationResult,
    check_ratio,
    check_side,
    shrunk,
)
from lightning_gendiag.diagnostics.memorization.metric import Memorization
from lightning_gendiag.functional.arrays import as_data
from lightning_gendiag.model.batches import Images
from lightning_gendiag.plots import pictures
from lightning_gendiag.tensorboard.records import Record, picture

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

HELD_BYTES = 1 << 23
"""Largest size of the training images that are held, over all processes: 4,096 grey images of 32x32 or 1,365 in colour."""

MOST_IMAGES, SHORT_IMAGES = 2048, 1024
"""Largest number of training images that are held, and that in a short run. To compare 2,048 of 1x32x32 with each other,
which is done once, takes 0.05 s of a CPU core, and a quarter of it with half as many."""

MOST_HELD_OUT = 512
"""Largest number of validation images that are held."""

HELD_SIDE = 32
"""Images are averaged to this side before they are held, or to the one at which they are compared if that is larger."""

EXACT = 1e-3
"""Images are held in half precision if that moves no number by more than this part of their standard deviation."""

MAX_SIDE = 16
"""Images are averaged to this side before they are compared, as by the classifier of generation balance; of 3x32x32 that takes
a quarter of the time, and noise hides less."""

LARGEST_SAMPLE = 48
"""Largest side of an image in the tab; pixels."""

NAMED = 6
"""Number of training images that an alarm names."""

FLOOR = 0.01
"""Share that is added to others in the severity, so that a few samples more or less do not count."""

MIN_STD = 0.5
"""Two fifths more or less of a share are a usual fluctuation; octaves."""

MIN_DELTA = 1.0
"""Octaves: a share must surely double."""

MUCH_REPEATED, MOST_REPEATED = 0.25, 0.9
"""Shares of samples that have a near-duplicate count alike up to the first, since models with few latent dimensions have
some, and are wrong in themselves above the second."""

CONFIRM, CONFIRM_REPEATS = 3, 8
"""Evaluations in a row in which each rule must hold. Memorization stays where it has begun, and is evaluated rarely; samples of
a model that has hardly learned anything may all be alike."""

COPIES = Series(
    "copies", "standalone", "share of samples that are copies", label="training images", event="are copied more often",
    min_std=MIN_STD, min_delta=MIN_DELTA, stop="never",
)  # fmt: skip
REPEATS = Series(
    "repeats", "standalone", "share of samples that have a near-duplicate", label="samples",
    event="repeat each other more often", min_std=MIN_STD, min_delta=MIN_DELTA, stop="never",
)  # fmt: skip
MEMORIZES = Series(
    "memorization", "rule", COPIES.quantity, label="training images", event="are copied", confirm=CONFIRM, stop="never"
)
REPETITIVE = Series(
    "repetition", "rule", REPEATS.quantity, label="samples", event="repeat each other", confirm=CONFIRM_REPEATS,
    progress=-0.02, stop="never",
)  # fmt: skip
"""Rules about what is wrong in itself, also from the beginning of training on."""


class MemorizationMonitor(Monitor[Memorization, MemorizationResult]):
    """Monitors :class:`Memorization`: whether samples copy training images, or each other.

    Training images are those of the batches before the first evaluation, within one epoch: at most 2,048, and 1,365 in
    colour, which are held in half precision at 32 pixels a side and take 8 MiB at most; or the reference where that is
    larger. Fresh real images, with which samples are compared, are those of validation batches before the first evaluation;
    else a reference that was given, as far as its images are not among the training images held; else training images that
    are left out in turn. Its alarms stop no run.

    Args:
        features: Feature extractor by which images are compared as well as by pixels: a module, or a callable
            ``(module, images)`` that returns (n, F), which is then called with the training images at each evaluation too.
            It gets images of full size, so that fewer are held. By default, pixels alone are compared.
        ratio: See :func:`memorization`.
        max_side: See :func:`memorization`.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = MemorizationMonitor(every_n_epochs=5)  # one of the Trainer's callbacks
    """

    name = "memorization"
    metric_class = Memorization
    needs_images = takes_rows = True
    period_multiplier = 5

    def __init__(
        self,
        features: Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        ratio: float = RATIO,
        max_side: int | None = MAX_SIDE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_ratio(ratio)
        check_side(max_side)
        self.features, self.ratio, self.max_side = features, ratio, max_side
        self._forget()

    def _forget(self) -> None:
        self._collected: list[Tensor] = []
        self._fresh: list[Tensor] = []
        self._epoch: int | None = None
        self._is_full = False
        self._training: Tensor | None = None
        self._held_out: Tensor | None = None

    def reset(self) -> None:
        """Forgets the images as well."""
        super().reset()
        self._forget()

    def shares(self) -> str:
        """The samples."""
        return "samples"

    def depends_on_model(self, view: ModelView) -> bool:
        """Whether the features change with the module."""
        return view.moves_with_model(self.features)

    @property
    def training_images(self) -> Tensor:
        """The training images (N, ...) that are held, in the order by which they are numbered; of one process, all of them.

        Raises:
            RuntimeError: Before the first evaluation.
        """
        return self.metric.training_images

    # ---- between two evaluations ----

    @property
    def sees_batches(self) -> bool:
        """Until the training images are complete."""
        return self._training is None and not self._is_full

    def see(self, view: ModelView, data: Images) -> None:
        """Keeps images of a batch until there are enough, or the epoch is over, after which the same ones come again."""
        epoch = view.trainer.current_epoch
        self._epoch = epoch if self._epoch is None else self._epoch
        most = SHORT_IMAGES if view.real.is_short else MOST_IMAGES
        self._is_full = epoch != self._epoch or not self._keep(view, data.images, self._collected, most)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps images of validation batches."""
        if batch_idx == dataloader_idx == 0 and not trainer.sanity_checking and self.wants_held_out:
            # the same ones come again as in the check before training, and in later epochs
            self._fresh = []
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @property
    def wants_held_out(self) -> bool:
        """Until it is decided which images are compared."""
        return self._training is None

    def note_held_out(self, view: ModelView, batch: Any) -> None:
        """Keeps images of a validation batch."""
        images = view.adapter.find_data(batch)
        if images is not None:
            self._keep(view, images, self._fresh, MOST_HELD_OUT)

    def _keep(self, view: ModelView, images: Tensor, held: list[Tensor], most: int) -> bool:
        """Adds copies of the finite ones of some images to those that this process holds, all of one shape.

        Returns:
            Whether there was room for any.
        """
        # what is compared of one image, which shows its size
        one = self._compared(view, images[:1])
        if one is None or (held and held[0].shape[1:] != one.shape[1:]):
            return False
        room = self._room(compacted(one), most, view) - sum(map(len, held))
        images = images.detach()[: max(room, 0)].cpu()
        compared = self._compared(view, images[images.flatten(1).isfinite().all(1)])
        if room > 0 and compared is not None:
            held.append(compacted(compared))
        return room > 0

    @staticmethod
    def _room(one: Tensor, most: int, view: ModelView) -> int:
        """Number of images like one (1, ...) that each process may hold."""
        return math.ceil(min(most, HELD_BYTES // max(1, one.nbytes)) / view.world_size)

    @property
    def _held_side(self) -> int | None:
        """Side to which images are averaged before they are held; None where all their pixels are needed."""
        return None if self.features is not None or self.max_side is None else max(HELD_SIDE, self.max_side)

    def _compared(self, view: ModelView, images: Tensor) -> Tensor | None:
        """Returns data of batches, a reference or samples as they are compared; None where they are no images."""
        with suppress(ValueError):
            return as_data(shrunk(as_data(view.as_images(Images(images, None), rows=True).images), self._held_side))
        return None

    # ---- at an evaluation ----

    def build_metric(self, view: ModelView) -> Memorization:
        """Creates the metric with the training images and the held-out ones, on all processes."""
        training = self._settle(view) if self._training is None else self._training
        metric = Memorization(self.ratio, self.max_side, reset_real_features=False).to(view.device)
        for images, held_out in ((training, False), (self._held_out, True)):
            if images is not None and len(images):
                with view.isolated(exact=True):
                    features = self._features(view, images)
                metric.update(images.to(view.device), real=True, held_out=held_out, features=features)
        return metric

    def _settle(self, view: ModelView) -> Tensor:
        """Decides which images are compared, alike on all processes, and returns this process's training images."""
        own = torch.cat(self._collected) if self._collected else None
        given = view.as_images(view.local_reference(), rows=True).images
        reference = compacted(as_data(shrunk(given, self._held_side)))
        reference = reference[: self._room(reference[:1], MOST_IMAGES, view)]
        shape = reference.shape[1:]
        # few batches may have passed since a run was resumed; once an epoch is over, there are no others
        enough = own is not None and own.shape[1:] == shape and (self._is_full or len(own) >= len(reference))
        if view.agreed(enough) and own is not None:
            training = own
            if view.real.is_short:
                # a part of its own, so that the rest is freed
                training = own[: math.ceil(SHORT_IMAGES / view.world_size)].clone()
            others = reference if view.adapter.reference is not None else reference[:0]
        else:
            training, others = reference, reference[:0]
        fresh = torch.cat(self._fresh) if self._fresh else None
        usable = fresh is not None and fresh.shape[1:] == shape and len(fresh) * view.world_size >= LEAST_HELD_OUT
        held_out = fresh if view.agreed(usable) and fresh is not None else others
        # processes gather rows of one type
        if not view.agreed(training.dtype == held_out.dtype == torch.half):
            training, held_out = training.float(), held_out.float()
        self._training, self._held_out = training, held_out
        self._collected, self._fresh = [], []
        rank_zero_info(
            f"Memorization: samples are compared with about {len(training) * view.world_size:,} training images; fresh real "
            f"images are {'held out' if len(held_out) else 'training images that are left out in turn'}."
        )
        return training

    def _features(self, view: ModelView, images: Tensor) -> Tensor | None:
        """Features (n, F) of images by the user's network, if there is one; inside ``view.isolated``."""
        if self.features is None or view.reference.images.ndim not in (4, 5):
            return None
        # a network of the user's may not take an empty batch
        given = as_data(images if len(images) else view.reference_images.images[:1])
        features = view.resolve_features(self.features)(given)
        return features[: len(images)].float()

    def update(self, view: ModelView) -> None:
        """Adds this rank's samples."""
        given = view.as_images(view.samples(), rows=True).images
        images = as_data(shrunk(given, self._held_side)).to(view.device)
        finite = images.flatten(1).isfinite().all(1)
        with view.isolated(exact=True):
            # of what is left out, nothing is read
            features = self._features(view, images.where(finite.view(-1, *[1] * (images.ndim - 1)), 0.0))
        self.metric.update(images, real=False, features=features)

    def release(self) -> None:
        """Drops the samples, which would be held until the next evaluation."""
        self.metric.reset()

    def observations(self, result: MemorizationResult) -> list[Observation]:
        """The shares of copies and of near-duplicates, and rules about each."""
        # by features where there are any
        space = len(result.copied) - 1
        copied, repeated = float(result.copied[space]), float(result.repeated[space])
        certain = float(result.real_interval[space, 1])
        copying = bool(result.surely_copied[space])
        repetitive = bool(result.repeated_interval[space, 0] > MOST_REPEATED)
        return [
            Observation(COPIES, copied, severity(copied, certain)),
            Observation(REPEATS, repeated, severity(repeated, MUCH_REPEATED)),
            _rule(MEMORIZES, copied, copying, self._copies_in_words(result, space)),
            _rule(
                REPETITIVE, repeated, repetitive,
                f"the model repeats images: {repeated:.0%} of {result.closeness.shape[1]:,} samples have a near-duplicate "
                "among the samples, for {evaluations} evaluations",
            ),
        ]  # fmt: skip

    def _copies_in_words(self, result: MemorizationResult, space: int) -> str:
        """What an alarm says."""
        numbers = [str(number) for number in result.copy_index[result.copy_closeness < self.ratio].tolist()]
        images, held = int(result.images_copied[space].nan_to_num(0.0)), int(result.num_training)
        return (
            f"the model copies training images: {float(result.copied[space]):.0%} of {result.closeness.shape[1]:,} samples are "
            f"copies of {images:,} of the {held:,} training images held (such as number {', '.join(numbers[:NAMED])}), "
            f"and {float(result.real_copied[space]):.1%} of fresh real images would be, for {{evaluations}} evaluations"
        )

    def page_setup(self) -> Record:
        """Below which closeness a sample is a copy."""
        return Record({"ratio": self.ratio})

    def page_numbers(self, result: MemorizationResult) -> dict[str, Any]:
        """The interval of the share of copies, that of real images, and how many of the training images are copied."""
        space = len(result.copied) - 1
        return {
            "interval": result.interval[space].tolist(),
            "real": [float(result.real_copied[space]), *result.real_interval[space].tolist()],
            "images": [float(result.images_copied[space]), float(result.num_training)],
        }

    def page_frame(self, result: MemorizationResult) -> Record | None:
        """The closest samples above their training images, and samples that are alike above each other."""
        sheets = {}
        for name, pairs in (("copies", result.copies), ("twins", result.twins)):
            if len(pairs) and pairs.ndim == 5:
                small = pictures.shrunk(as_data(pairs.transpose(0, 1).flatten(0, 1)), LARGEST_SAMPLE)
                grid = pictures.grid(small, len(pairs))
                sheets[name] = picture(pictures.pixels(grid, float(grid.min()), float(grid.max())))
        fields = {"numbers": result.copy_index.tolist(), "closeness": result.copy_closeness.tolist()}
        return Record(fields, pictures=sheets)

    def log_plots(self, result: MemorizationResult, context: PlotContext) -> None:
        """Logs the charts and the panel."""
        context.logger.log_chart("copies", "Multiline", ["copied", "real_copied"])
        context.logger.log_chart("near-duplicates", "Multiline", ["repeated"])
        context.logger.log_image("panel", self._panel(result, context))

    def log_alarm(self, alarm: Alarm, result: MemorizationResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's text."""
        context.logger.log_image("picture", self._panel(result, context, alarm))

    def _panel(self, result: MemorizationResult, context: PlotContext, alarm: Alarm | None = None) -> Tensor:
        return plots.panel(result, self.ratio, context.curves[COPIES.name], context.occasion(alarm))


def severity(share: float, usual: float) -> float:
    """Returns by how many octaves a share exceeds a usual one, about; shares up to that count alike, and nan stays nan."""
    return math.nan if math.isnan(share) else math.log2(max(share, usual) + FLOOR)


def _rule(series: Series, value: float, is_wrong: bool, message: str) -> Observation:
    """An observation of a series that a rule judges, whatever it was before."""
    return Observation(series, value, math.inf if is_wrong else 0.0, message=message, is_bad=is_wrong)


def compacted(images: Tensor) -> Tensor:
    """Returns copies of images (N, ...), in half precision where that keeps their digits.

    Example:
        >>> [compacted(torch.tensor(values)[:, None]).dtype for values in ([0.1, 0.7], [1000.1, 1000.2])]
        [torch.float16, torch.float32]
    """
    if not len(images):
        return images.half()
    halves = images.half()
    moved = float((halves - images).abs().max())
    return halves if moved <= EXACT * float(images.std(correction=0)) else images.clone()
