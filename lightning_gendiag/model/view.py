"""What a monitor sees of a model at one evaluation: an isolated copy, its samples and latents, and the real images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.functional.arrays import as_data, as_images, is_video, middle_slices
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.adapters.base import Need, Way
from lightning_gendiag.model.amounts import (
    FEWEST_ROWS,
    FEWEST_SAMPLES,
    LEAST_ROWS,
    LEAST_SAMPLES,
    LONGEST,
    MOST_SECONDS,
    NUM_SAMPLES,
    ROWS_SECONDS,
    SAMPLE_SECONDS,
    TIMED,
    fitting,
    seconds_of,
)
from lightning_gendiag.model.averages import has_own_average
from lightning_gendiag.model.batches import Images
from lightning_gendiag.model.features import FeatureExtractor, in_chunks
from lightning_gendiag.model.generators import Generator, own_generators, seed_all
from lightning_gendiag.model.isolation import (
    BATCH_NORMS,
    contained,
    evaluating,
    exits_as_errors,
    in_full_precision,
    isolated_in_place,
    normalizing_by_batch,
    not_called,
    without_bars,
    without_collectives,
)
from lightning_gendiag.model.parts import ARE_LOGITS, ModelParts
from lightning_gendiag.model.quantizers import Codebook, CodebookReader, is_of_frozen, quantizers_in, settled
from lightning_gendiag.model.reference import InapplicableError, Reference
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.warning import warn
from lightning_gendiag.regions.region_map import RegionMap

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

T = TypeVar("T")

Use = Literal["encode", "reconstruct", "codes"]
"""What real images are given to the model for."""

LOGGED: dict[Need | Use, str] = {
    "sample": "Samples", "encode": "Latents", "decode": "Decoded", "reconstruct": "Reconstructions", "codes": "Codes",
}  # fmt: skip
"""What a line of the log calls the results of each way."""

Source = Literal["auto", "samples", "reconstructions"]
"""What is compared with real images; by default samples, or reconstructions where nothing samples."""

CODES_ADVICE = "CodebookUsageMonitor(indices=lambda module, images: ...)"

EIGHT_BITS = 13.0
"""Real images with values above this are in 0 to 255, or those above 255 in another range of integers."""

WITHIN = 3
"""Number of evaluations in which the ranges of generated and real images must differ before a warning."""

BULK = 0.98
"""Share of the generated values that must lie in another range than real ones: a flow or a diffusion model has outliers."""

SHRINKS = 0.7
"""What lies outside of the real range and becomes narrower by this factor meanwhile is what a model has not learned yet."""

LONGEST_ROW = 1024
"""Largest number of features of rows that are compared feature by feature; of more, neighbours have nothing in common."""

PRIOR_CHUNK = 16
"""Number of latents of the prior that are drawn with one seed."""


COMPARED, RECONSTRUCTED = slice(0, None, 2), slice(1, None, 2)
"""Rows of the reference that reconstructions are compared with, and those that are reconstructed."""


def check_source(images: str) -> None:
    """Raises ValueError for an argument that is no :data:`Source`."""
    if images not in ("auto", "samples", "reconstructions"):
        raise ValueError(f"images must be 'auto', 'samples' or 'reconstructions', got {images!r}.")


class Piece(NamedTuple):
    """Some real images as the model takes them."""

    given: Tensor
    """(size, ...); one of another process where no row is left for this one."""
    size: int
    """Number of images, 0 where no row is left."""
    labels: Tensor | None
    """(size,) on the module's device."""


class Encoded(NamedTuple):
    """What the encoder returned for some real images."""

    output: Any
    size: int
    """Number of images."""
    labels: Tensor | None
    """(size,) on the module's device."""


class ModelView:
    """One adapter's view of the module of a trainer; what it draws is shared by all monitors with that adapter.

    Args:
        adapter: The user's choices.
        subject: The module, and the isolated copy of it.
        trainer: The trainer.
    """

    def __init__(self, adapter: ModelAdapter, subject: Subject, trainer: Trainer) -> None:
        self.adapter, self.subject, self.trainer = adapter, subject, trainer
        self.real = Reference(adapter, trainer, subject.trained.device)
        self.parts = ModelParts(adapter, subject, self.real, self.isolated)
        self.region_maps: dict[tuple[int | None, int], RegionMap] = {}
        self.amounts: dict[str, int] = {}
        """Chosen once by the time that they take, and kept: ``samples``, the largest number of them that fit; ``planned``, how
        many of them an evaluation has; and of which number of real images one is given to ``encode`` and ``reconstruct``."""
        self.averaged = False
        """Whether averaged weights are evaluated."""
        self.thorough = True
        """Whether this evaluation is a full one, with what is only shown, such as Fréchet distances within classes."""
        self.is_closer = False
        """Whether the newest evaluation is repeated with all samples that fit the time limit of one."""
        self._lacks_average = False
        self._said_weights = self._warned_weights = False
        self.sampling_seconds = 0.0
        """What the newest samples took."""
        self.occasion = object()
        """Another one each time that what was drawn is forgotten."""
        self._samples: dict[bool, Images] = {}
        self._timed_samples: Images | None = None
        self._reconstructions: Images | None = None
        self._encoded: list[Encoded] | None = None
        self._codes: dict[CodebookReader, list[list[Tensor]] | Exception] = {}
        """Codes of each piece of real images, for each way to read them that was asked for, or why there are none."""
        self._readers: list[CodebookReader] = []
        self._generators: list[Generator] | None = None
        """Those of the module and the adapter, which are looked for once between two batches."""
        self._copied_generators: list[Generator] | None = None
        """Those of the copy and the adapter."""
        self._said: set[str] = set()
        self._has_prior: bool | None = None
        self._is_agreed = False
        self._extractor: FeatureExtractor | None = None
        self._reference_features: dict[nn.Module, Tensor] = {}
        self._warned_range, self._within = False, 0
        self._outside: list[float] = []
        self._checked_at: int | None = None

    # ---- what there is ----

    @property
    def module(self) -> LightningModule:
        """An isolated copy of the module that is trained; the module itself where no copy can be made."""
        return self.subject.module

    @property
    def device(self) -> torch.device:
        """The module's device."""
        return self.subject.trained.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.trainer.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes to loggers."""
        return self.trainer.is_global_zero

    @property
    def has_reference(self) -> bool:
        """Whether the real images are complete."""
        return self.real.images is not None

    @property
    def reference(self) -> Images:
        """The real images of all processes.

        Raises:
            RuntimeError: If they are not complete yet.
        """
        if self.real.images is None:
            raise RuntimeError("the reference is not complete yet.")
        return self.real.images

    @property
    def has_images(self) -> bool:
        """Whether the real data are images, or volumes whose slices are; also before the first batch shows it."""
        return self.real.example is None or self.real.example.ndim in (4, 5)

    @property
    def reference_images(self) -> Images:
        """The real images of all processes, which are middle slices where the data are volumes.

        Raises:
            RuntimeError: If they are not complete yet.
            InapplicableError: If the data are neither.
        """
        return self.as_images(self.reference)

    def as_images(self, data: Images, rows: bool = False) -> Images:
        """Returns images, or the middle slices of volumes.

        Where ``rows`` are taken, images (N, 1, 1, F) of rows (N, F), and (N, C, 1, T) of series (N, C, T), as well.

        Raises:
            InapplicableError: If the data are anything else.
        """
        if rows and has_short_rows(data.images):
            self.say(
                f"Rows of {data.images.shape[1]} features are compared by groups of features. If they are flattened images, "
                f"{self.adapter.images_advice}."
            )
            return Images(data.images[:, None, None], data.labels)
        if rows and data.images.ndim == 3:
            self.say(
                "Series (C, T) are compared by groups of positions along the last axis. If they are flattened images, "
                f"{self.adapter.images_advice}."
            )
            return Images(data.images[:, :, None], data.labels)
        if data.images.ndim not in (4, 5):
            raise InapplicableError(
                f"the data must be images (N, C, H, W) or volumes (N, C, D, H, W), got {tuple(data.images.shape)}. "
                f"To fix this, {self.adapter.images_advice}."
            )
        if is_video(data.images):
            self.say("Videos: the middle frame is the image of a video (T, C, H, W) in regions and pictures.")
        elif data.images.ndim == 5:
            self.say("Volumes: the middle slice along D is the image of a volume (C, D, H, W) in regions and pictures.")
        return Images(middle_slices(data.images), data.labels)

    def local_reference(self) -> Images:
        """Returns this process's rows of the reference; together the processes have each row once."""
        return self.real.local()

    @property
    def latent_dim(self) -> int:
        """L, the length of the prior's noise.

        Raises:
            ValueError: If it is not known.
        """
        return self.parts.latent_dim

    @property
    def feature_extractor(self) -> FeatureExtractor:
        """Features of images for those who bring no network, fitted on the reference once for all monitors."""
        if self._extractor is None:
            self._extractor = FeatureExtractor(as_images(self.reference_images.images).to(self.device))
        return self._extractor

    # ---- the life of a view ----

    def attach(self, whole: bool = True) -> None:
        """Reads a reference that was given.

        Args:
            whole: Whether every process must have the whole module.

        Raises:
            ValueError: If it holds no images, or the module is sharded over processes and must be whole.
        """
        # a way that fails on one process would let the others wait, and to restore what FSDP2 has gathered ends training
        sharded_by = compat.sharded_by(self.trainer, self.subject.trained) if whole else None
        if sharded_by is not None:
            raise ValueError(
                f"the module must be whole on every process to be evaluated, got one that is sharded by {sharded_by}. "
                "To fix this, train with strategy='ddp' if it fits, or pass samples of a checkpoint to the metrics."
            )
        if self.adapter.reference is not None and self.real.images is None:
            self.real.read(self.adapter.reference)

    def expire(self) -> None:
        """Forgets what was drawn and found, since the module may have changed."""
        self.occasion = object()
        self._samples.clear()
        self._codes.clear()
        self._reconstructions = self._encoded = self._generators = self._copied_generators = None

    def refresh(self) -> None:
        """Takes up a copy of the module as it is now, with averaged weights where they are to be evaluated."""
        average = self._average()
        self.subject.refresh(average, own=self.adapter.weights != "raw")
        self.averaged = average is not None or self.subject.own_average is not None
        wants = self.adapter.weights == "ema" and not self.averaged
        # not before training, since a module may make its average as late as on_train_start
        self._lacks_average = (
            wants and compat.averaging_of(self.trainer) is None and not has_own_average(self.subject.trained)
        )
        if (wants or self.averaged) and not self._lacks_average:
            self._say_weights()

    def forget_reference(self) -> None:
        """Forgets what was derived from a reference that is gone."""
        self.region_maps.clear()
        self.amounts.clear()
        self._reference_features.clear()
        self._extractor = self._reconstructions = self._encoded = self._has_prior = None
        self._samples.clear()
        self._codes.clear()
        self._is_agreed = False

    def _average(self) -> nn.Module | None:
        """The averaged model to be evaluated, if any."""
        averaging = None if self.adapter.weights == "raw" else compat.averaging_of(self.trainer)
        average = None if averaging is None else compat.average_model(averaging)
        if average is None:
            return None
        started = int(average.n_averaged) > 0  # type: ignore[arg-type]
        return average if self.adapter.weights == "ema" or started else None

    def _say_weights(self) -> None:
        """Logs once whose averaged weights are evaluated, and warns where those that were asked for cannot be used."""
        if self.averaged and not self._said_weights:
            self._said_weights = True
            name = self.subject.own_average or f"the {type(compat.averaging_of(self.trainer)).__name__} callback"
            rank_zero_info(f"Evaluations use the EMA weights of {name}. To use the raw weights, pass weights='raw'.")
        elif not self.averaged and not self._warned_weights:
            self._warned_weights = True
            warn(
                "The averaged weights of the module were not updated yet, or it is not clear which part they average, so "
                "the raw weights are evaluated. To fix this, pass ModelAdapter(sample=lambda module, n: ...).",
                category=UserWarning,
            )

    @contextmanager
    def isolated(self, exact: bool = False) -> Iterator[None]:
        """Runs the copy in evaluation mode, without gradients, and in the trainer's precision.

        Args:
            exact: Whether to run in float32 or better, independently of the trainer's precision.

        Raises:
            ValueError: If averaged weights are to be evaluated where there are none.
        """
        if self._lacks_average:
            raise ValueError(
                "weights must be 'raw' or 'auto' where neither a callback nor the module averages weights, got 'ema'. "
                "To fix this, add lightning.pytorch.callbacks.WeightAveraging to the trainer."
            )
        with ExitStack() as stack:
            if self._generators is None:
                self._generators = own_generators((*self.subject.generators, self.adapter))
            stack.enter_context(contained(self.device, *self._generators))
            stack.enter_context(without_bars())
            if self.world_size > 1:
                stack.enter_context(without_collectives())
            if self.subject.in_place:
                averaging = compat.averaging_of(self.trainer) if self.averaged else None
                if averaging is not None:
                    compat.swap_average(averaging, self.module)
                    stack.callback(compat.swap_average, averaging, self.module)
                stack.enter_context(isolated_in_place(self.module))
            else:
                stack.enter_context(not_called(self.subject.trained))
                stack.enter_context(evaluating(self.module))
            if exact:
                stack.enter_context(in_full_precision(self.module))
            else:
                stack.enter_context(self.trainer.precision_plugin.forward_context())
            yield

    # ---- samples ----

    def find(self, *needs: Need) -> None:
        """Finds how the module does what is needed, and logs it once for each way that is chosen.

        Raises:
            ValueError: If the module lacks what is needed.
        """
        if self.device.type == "meta":
            raise ValueError("the module must be on a real device before it can be evaluated, got 'meta'.")
        for need in needs:
            way = self.parts.way(need)
            if getattr(self.adapter, need) is None:
                passed = self.parts.failed_sampler if need in ("sample", "reconstruct") else ""
                reason = ARE_LOGITS if way.activation else passed
                since = f", since {reason}" if reason else ""
                self.say(f"{LOGGED[need]}: {way.name}{since}. To choose another, pass {need}=....")

    def say(self, text: str) -> None:
        """Logs a line, once for all monitors."""
        if text not in self._said:
            self._said.add(text)
            rank_zero_info(text)

    def agree(self, *needs: Need) -> None:
        """Chooses the same ways on all processes: those that fail on any are left out on all.

        Every process must call it at the same time.

        Args:
            needs: What a way is chosen for, beside what was asked for before.
        """
        if self.world_size == 1:
            return
        strategy = self.trainer.strategy
        while True:
            first: dict[Need, str] = strategy.broadcast(self.parts.choices(needs))
            needs = tuple(first)
            own = {need: name for need, name in self.parts.choices(needs).items() if need in first}
            if strategy.reduce_boolean_decision(own == first, all=True):
                return
            answers = [strategy.broadcast((own, self.parts.failed), src=rank) for rank in range(self.world_size)]
            self.parts.settle(answers)

    def source(self, wanted: Source = "auto") -> Source:
        """Returns what is compared with real images: samples, or reconstructions where nothing samples.

        Raises:
            ValueError: If the module has neither, or not what is wanted.
        """
        free = wanted == "auto" and self.adapter.sample is None
        if wanted == "reconstructions" or (free and not self.parts.has("sample") and self.parts.has("reconstruct")):
            self.find("reconstruct")
            return "reconstructions"
        self.find("sample")
        return "samples"

    def compared(self, wanted: Source, rows: bool = False) -> Images:
        """Returns this process's generated images of this evaluation: samples or reconstructions, as :meth:`as_images`."""
        return self.as_images(self.samples() if self.source(wanted) == "samples" else self.reconstructions(), rows)

    def compared_with(self, wanted: Source, rows: bool = False) -> Images:
        """Returns this process's real images that they are compared with.

        Images are not compared with their own reconstructions, which would be more alike than two independent samples.
        """
        return self.as_images(self.real.local(self._compared_part(wanted)), rows)

    def compared_rows(self, wanted: Source) -> slice:
        """Returns the rows of the reference of all processes that :meth:`compared_with` returns."""
        own = range(len(self.reference.images))[self._compared_part(wanted)][self.rank :: self.world_size]
        return slice(own.start, own.stop, own.step)

    def _compared_part(self, wanted: Source) -> slice:
        """The rows of the reference that are compared: all with samples, and others than are reconstructed."""
        return slice(None) if self.source(wanted) == "samples" else COMPARED

    def reconstructions(self) -> Images:
        """Returns reconstructions of this process's rows of every second image of the reference, computed once."""
        if self._reconstructions is None:
            way, made = self.parts.way("reconstruct"), []
            readers = self._forgotten("reconstruct")
            with self.isolated(exact=True):
                pieces = self._real_pieces("reconstruct", RECONSTRUCTED, way.call)
                self.seed()
                for given, size, labels in pieces:
                    output = self._read(readers, partial(way.call, given), len(given), size)
                    images = self.parts.reconstructed(output, given)[:size]
                    made.append(Images(images, labels))
            self._reconstructions = _joined(made)
        return self._reconstructions

    def originals(self) -> Images:
        """Returns the real images of this process that :meth:`reconstructions` reconstructs, row by row."""
        count = len(self.reconstructions().images)
        images, labels = self.real.local(RECONSTRUCTED)
        every = self.amounts.get("reconstruct", 1)
        return Images(images[::every][:count], None if labels is None else labels[::every][:count])

    def _real_pieces(self, use: Use, rows: slice, call: Callable[[Tensor], Any]) -> Iterator[Piece]:
        """Returns this process's real images out of some rows, in pieces as the model takes them; inside :meth:`isolated`.

        Every process gets equally many pieces, since it may communicate in each call, as for samples.

        Args:
            use: What they are for.
            rows: Rows of the reference.
            call: What is called with them, whose time says how many there are.
        """
        total = len(range(len(self.reference.images))[rows])
        every = self._every(use, total, call)
        images, labels = (None if part is None else part[::every] for part in self.real.local(rows))
        assert images is not None
        most = max(1, math.ceil(math.ceil(total / self.world_size) / every))
        # pieces of about one size, so that the last does not have a single image
        size = math.ceil(most / math.ceil(most / self.adapter.chunk_size))

        def piece(start: int) -> Piece:
            some = images[start : start + size]
            given = self.as_input(as_data(some if len(some) else self.reference.images[:1]))
            return Piece(given, len(some), None if labels is None else labels[start : start + size].to(self.device))

        return map(piece, range(0, most, size))

    def samples(self) -> Images:
        """Returns this process's samples of this evaluation, drawn once and shared by all monitors."""
        if self.is_closer not in self._samples:
            size, world, started = self.adapter.chunk_size, self.world_size, time.monotonic()
            drawn = []
            with self.isolated():
                total = self._num_samples()
                chunks = math.ceil(total / size)
                # every process calls the model equally often, since it may communicate in each call
                for index in range(self.rank, math.ceil(chunks / world) * world, world):
                    n = min(size, total - index * size)
                    # of a batch of one, layers that normalize over the batch have no statistics
                    chunk = self._timed_samples or self._chunk(index, max(n, 2))
                    self._timed_samples = None
                    drawn.append(Images(*(None if x is None else x[: max(n, 0)] for x in chunk)))  # type: ignore[arg-type]
            self._samples[self.is_closer] = _joined(drawn)
            self.sampling_seconds = time.monotonic() - started
            self._check_range(self._samples[self.is_closer].images, self.trainer.global_step)
        return self._samples[self.is_closer]

    def training_samples(self, most: int, size: int) -> Images:
        """Returns this process's samples as a discriminator meets them, whose BatchNorm takes the statistics of each chunk.

        Those of :meth:`samples` are the same where there are no such layers, or averaged weights are evaluated.

        Args:
            most: Largest number of samples over all processes.
            size: Largest number in a chunk.
        """
        if self.averaged or not any(isinstance(layer, BATCH_NORMS) for layer in self.module.modules()):
            images, labels = self.samples()
            own = math.ceil(most / self.world_size)
            return Images(images[:own], None if labels is None else labels[:own])
        with self.isolated(), normalizing_by_batch(self.module):
            number = min(most, self._num_samples())
            size = min(size, max(2, math.ceil(number / self.world_size)))
            # every process calls the model equally often, since it may communicate in each call
            rounds = range(math.ceil(number / size / self.world_size))
            return _joined([self._chunk(self.rank + self.world_size * turn, size) for turn in rounds])

    @property
    def num_samples(self) -> int | None:
        """Number of samples of an evaluation over all processes; None before it is known."""
        most = self.adapter.num_samples or self.amounts.get("samples")
        return most if most is None or self.is_closer else min(self.amounts.get("planned", most), most)

    def compares_samples(self, wanted: Source = "auto") -> bool:
        """Returns whether samples are compared with real images, and not reconstructions."""
        return wanted != "reconstructions" and (self.adapter.sample is not None or self.parts.has("sample"))

    def plan(self, samples: int | None) -> None:
        """Lets evaluations have at most so many samples from now on; None for as many as fit the time limit of one."""
        if samples is None:
            self.amounts.pop("planned", None)
        else:
            self.amounts["planned"] = samples

    @contextmanager
    def looking_closer(self) -> Iterator[None]:
        """Lets an evaluation have all samples that fit the time limit of one."""
        self.is_closer = True
        try:
            yield
        finally:
            self.is_closer = False

    def _num_samples(self) -> int:
        """Number of samples over all processes: the user's, or as many as fit the time limits; inside :meth:`isolated`.

        Raises:
            InapplicableError: If even the fewest take too long.
        """
        if self.adapter.num_samples is not None:
            return self.adapter.num_samples
        if "samples" not in self.amounts:
            self._refuse_slow_sampler()
            drawn: list[Images] = []
            seconds = self.seconds_of(lambda: drawn.append(self._chunk(0, TIMED))) / TIMED
            # so few are of one chunk, which one process draws
            least = fitting(seconds, MOST_SECONDS, FEWEST_SAMPLES, LEAST_SAMPLES)
            number = fitting(seconds / self.world_size, SAMPLE_SECONDS, least, NUM_SAMPLES)
            self.amounts["samples"] = number
            if number == TIMED and self.world_size == 1:
                # a slow sampler need not draw them again
                self._timed_samples = drawn[0]
            if number < NUM_SAMPLES:
                rank_zero_info(
                    f"Samples: {number:,} at each evaluation instead of {NUM_SAMPLES:,}, since one takes {seconds:.2g} s. "
                    "To choose another number, pass num_samples=...."
                )
        chosen = self.num_samples
        assert chosen is not None
        return chosen

    def _refuse_slow_sampler(self) -> None:
        """Raises InapplicableError where the time of two samples shows that the fewest take too long."""
        two = self.broadcast(lambda: self.parts.seconds_of_two)
        # what waits for steps of an accelerator takes about as long for a few samples as for two
        least = two * FEWEST_SAMPLES / 2 if self.device.type == "cpu" else two
        if least > LONGEST:
            raise InapplicableError(
                f"sampling must take at most {LONGEST:.0f} s for {FEWEST_SAMPLES} images, but two took {two:.2g} s. "
                f"To evaluate samples all the same, pass num_samples={FEWEST_SAMPLES}, or a faster sampler as sample=...."
            )

    def _every(self, use: Use, images: int, call: Callable[[Tensor], Any]) -> int:
        """Of which number of a rank's real images one is encoded or reconstructed; inside :meth:`isolated`.

        Args:
            use: What they are for.
            images: Number of images over all processes.
            call: What is timed.
        """
        if self.adapter.num_reference is not None or images <= LEAST_ROWS:
            return 1
        if use not in self.amounts:
            piece = self.as_input(as_data(self.reference.images[:TIMED]))
            seconds = self.seconds_of(lambda: call(piece)) / len(piece)
            least = fitting(seconds / self.world_size, MOST_SECONDS, FEWEST_ROWS, LEAST_ROWS)
            number = fitting(seconds / self.world_size, ROWS_SECONDS, least, images)
            self.amounts[use] = every = images // number
            if every > 1:
                rank_zero_info(
                    f"{LOGGED[use]}: of {images // every:,} real images instead of {images:,}, since one takes "
                    f"{seconds:.2g} s. To choose another number, pass num_reference=...."
                )
        return self.amounts[use]

    def seconds_of(self, work: Callable[[], object]) -> float:
        """Returns the seconds that work takes on rank 0, the same on every rank, each of which does it."""
        seconds = seconds_of(work, self.device)
        return self.broadcast(lambda: seconds)

    def _chunk(self, index: int, n: int) -> Images:
        """One seeded call of the sampler, as float32 images; inside :meth:`isolated`."""
        way = self.parts.way("sample")
        self.seed(self.adapter.seed + 7919 * index)
        labels = self.parts.sample_labels(n) if way.takes_labels else None
        try:
            output = way.call(n) if labels is None else way.call(n, labels)
            return Images(self.parts.images_in(output, n), None if self.parts.has_conditions else labels)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(
                f"sample must make {n} images, but {way.name} raised {type(error).__name__}: {error}. "
                f"To fix this, {self.parts.advice('sample')}."
            ) from error

    def seed(self, seed: int | None = None) -> None:
        """Seeds the global generators, and those of the copy and of the adapter; inside :meth:`isolated`.

        Args:
            seed: By default the adapter's, so that they are alike at each evaluation.
        """
        if self._copied_generators is None:
            self._copied_generators = own_generators((self.module, self.adapter, *self.subject.surrounding))
        seed_all(self.adapter.seed if seed is None else seed, self.device, *self._copied_generators)

    def _check_range(self, generated: Tensor, step: int) -> None:
        """Warns once where generated and real images seem to have different ranges of values."""
        real = self.real.range
        if self._warned_range or real is None or not self.has_reference or not self.has_images:
            return
        if step == self._checked_at:
            return
        finite = generated[generated.isfinite()]
        if not finite.numel():
            return
        self._checked_at = step
        (least, most), (low, high) = torch.stack(finite.aminmax()).tolist(), real
        slack, bounded = (high - low) / 4, least >= -1 and most <= 1
        lacks_half = low < -slack and least >= 0 and most > slack
        is_other, outside = False, max(low - least, most - high)
        if high > low and (outside > slack or lacks_half):
            # torch's quantile takes 16 million numbers at most
            some = finite[:: 1 + finite.numel() // (1 << 20)].float()
            edges = some.quantile(
                torch.tensor([(1 - BULK) / 2, (1 + BULK) / 2], dtype=some.dtype, device=some.device)
            ).tolist()
            outside = max(low - edges[0], edges[1] - high)
            is_other = outside > slack or lacks_half
        self._outside = [*self._outside, max(outside, 0.0)] if is_other else []
        reason = ""
        if bounded and low >= 0 and high > EIGHT_BITS:
            reason = "To fix this, divide the real images by 255"
            if high > 255:
                reason = "To fix this, scale the real images as the training step does"
        elif len(self._outside) >= WITHIN and self._outside[-1] >= SHRINKS * self._outside[0]:
            reason = "To fix this, bring both to one range"
        # a generator that ends in tanh or sigmoid
        self._within += bounded and max(high - 1, -1 - low) > slack / 2
        if not reason and self._within >= WITHIN:
            reason = (
                f"In {WITHIN} evaluations no value left -1 to 1, so a generator that ends in tanh or sigmoid may not reach "
                "the others. To fix this, normalize the real images to the same range"
            )
        if reason:
            self._warned_range = True
            warn(
                f"generated images span {least:.3g} to {most:.3g}, real ones {low:.3g} to {high:.3g}. {reason}, with "
                "ModelAdapter(sample=...) or ModelAdapter(images=...).",
                category=UserWarning,
            )

    # ---- latents ----

    @property
    def has_prior(self) -> bool:
        """Whether normal noise is the prior of the latents, as far as the module and the first real images show it."""
        if self._has_prior is not None:
            return self._has_prior
        with self.isolated(exact=True):
            found = self.parts.has_prior
        if self.real.example is not None:
            # it stays, however well the module reconstructs later
            self._has_prior = found
        return found

    def agree_on_prior(self) -> None:
        """Lets all processes agree on whether there is a prior; every process must call it at the same time."""
        if self.world_size > 1 and not self._is_agreed:
            self._has_prior = self.agreed(self.has_prior)
            self._is_agreed = True

    def prior_latents(self, n: int, all_ranks: bool = False) -> Iterator[Tensor]:
        """Yields seeded draws (., L) of the prior N(0, 1) in float32, in chunks.

        Where normal noise is not the prior, they are latents of real images in a seeded order, which repeats after the
        last; of two images before the reference is complete.

        Args:
            n: Number of draws over all processes.
            all_ranks: Whether each process gets all of them, instead of its share.
        """
        rank, world = (0, 1) if all_ranks else (self.rank, self.world_size)
        size = min(self.adapter.chunk_size, PRIOR_CHUNK)
        for index in range(rank, math.ceil(n / size), world):
            count = min(size, n - index * size)
            if not self.has_prior:
                yield self._real_latents(index * size, count)
                continue
            generator = torch.Generator().manual_seed(self.adapter.seed + 7919 * index)
            yield self.as_input(torch.randn(count, self.latent_dim, generator=generator, dtype=torch.float32))

    def _real_latents(self, start: int, count: int) -> Tensor:
        """Latents (count, L) of real images from a position of the seeded order on."""
        # what does not decode is the first reason
        self.parts.way("decode")
        if not self.parts.has("encode"):
            raise ValueError(
                f"the prior of the latents must be known, but {self.parts.why_no_prior}. "
                "To fix this, pass ModelAdapter(latent_dim=...) if it is N(0, 1), or ModelAdapter(encode=...)."
            )
        data = self.real.example if self.real.images is None else self.real.images.images
        assert data is not None
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.adapter.seed))
        rows = order[torch.arange(start, start + count) % len(order)]
        with self.isolated(exact=True):
            labels = None if self.real.images is None else self.real.images.labels
            classes = None if labels is None else labels[rows].to(self.device)
            latents = self.as_input(self.latents_of(self.as_input(as_data(data[rows])), classes))
        self.say("Latents of real images are decoded, since nothing shows that normal noise is their prior.")
        return latents

    def as_input(self, x: Tensor) -> Tensor:
        """Returns images or latents as the module takes them in ``isolated(exact=True)``: on its device, float64 if it is."""
        return self.parts.as_input(x)

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Returns what the encoder gives for images (n, C, H, W), with labels (n,) if it takes any; inside :meth:`isolated`."""
        return self.parts.encode(images, labels)

    def latents_of(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Returns latents (n, L) of images, the posterior's mean where there is one; inside :meth:`isolated`."""
        return self.parts.latents_of(images, labels)

    def latents_in(self, output: Any, n: int, flat: bool = True) -> Tensor:
        """Returns the latents (n, L) in what the encoder gave for n images; spatial ones as they are if not ``flat``."""
        return self.parts.latents_in(output, n, flat)

    def encoded(self) -> list[Encoded]:
        """Returns what the encoder gives for this process's share of the reference, computed once for all monitors."""
        if self._encoded is None:
            encoded = []
            readers = self._forgotten("encode")
            with self.isolated(exact=True):
                for given, size, labels in self._real_pieces("encode", slice(None), self.encode):
                    encode = partial(self.encode, given, labels if size == len(given) else None)
                    output = self._read(readers, encode, len(given), size)
                    encoded += [Encoded(output, size, labels)] if size else []
            self._encoded = encoded
        return self._encoded

    # ---- codes ----

    def find_codebooks(self, path: str = "", size: int | None = None) -> CodebookReader | None:
        """Finds how to read which codes the module's quantizers choose; None before the first batch shows it.

        Args:
            path: Of a quantizer; empty for all that are found.
            size: Number of codes of each; by default the quantizers say it.

        Raises:
            ValueError: If the module has no quantizer, or none that is called for real images.
        """
        own = type(self.module).__name__
        sized = quantizers_in(self.module, path, size)
        chains = sized or quantizers_in(self.module, path, size, unsized=True)
        unknown = ValueError(
            f"indices must be known, but {own} has no quantizer whose codebook or number of codes is known. "
            f"To fix this, pass {CODES_ADVICE}."
        )
        if not chains:
            raise unknown
        frozen = [] if path else [chain for chain in chains if is_of_frozen(self.module, chain)]
        chains = [chain for chain in chains if chain not in frozen]
        if not chains:
            paths = listed([f"self.{chain.codebook.path}" for chain in frozen], 4)
            raise ValueError(
                f"indices must be known, but the codes of {paths} are of a part that is not trained. "
                f"To fix this, pass {CODES_ADVICE}."
            )
        if self.real.example is None:
            return None
        images = self.as_input(as_data(self.real.example))
        tried: list[str] = []
        called: set[str] = set()
        for of_output, need, way in self._passes():
            call = self.encode if need == "encode" and way.takes_labels else way.call
            codebooks: list[Codebook] = []
            # a way that was not chosen may fail in any way
            with suppress(Exception), self.isolated(exact=True):
                self.seed()
                codebooks = settled(chains, self.module, partial(call, images), len(images), called, of_output)
            if codebooks:
                reader = CodebookReader(tuple(codebooks), need, way.name)
                sizes = ", ".join(f"{size:,}" for size in dict.fromkeys(reader.sizes))
                self.say(
                    f"Codes: {sizes} of {reader.name}, read while {way.name} runs. To choose others, pass {CODES_ADVICE}."
                )
                return reader
            tried += [way.name] if way.name not in tried else []
        if not sized:
            raise unknown
        paths = ", ".join(f"self.{chain.codebook.path}".rstrip(".") for chain in chains[:4])
        reason = f"{listed(tried, 4)} show none" if tried else "nothing encodes or reconstructs images"
        raise ValueError(
            f"indices must be known, but of the codes of {paths} {reason}. To fix this, pass {CODES_ADVICE}."
        )

    def _passes(self) -> Iterator[tuple[bool, Need, Way]]:
        """Yields the ways in which real images may pass a quantizer, and whether what a way returns stands for its vectors.

        Those that were chosen for other monitors come first, since these share what they compute.
        """
        needs: tuple[Need, Need] = ("encode", "reconstruct")
        chosen = [(False, need, self.parts.way(need)) for need in needs if self.parts.has(need)]
        yield from chosen
        for need in needs:
            with suppress(ValueError):
                yield from ((False, need, way) for way in self.parts.ways(need) if not way.takes_labels)
        yield from ((True, need, way) for _, need, way in chosen if need == "encode")

    def codes(self, reader: CodebookReader) -> list[Tensor]:
        """Returns the codes (n, P) of each codebook for this process's real images, of which half where it reconstructs."""
        if reader not in self._readers:
            self._readers.append(reader)
        if reader not in self._codes:
            if not self._is_chosen(reader):
                self._read_alone(reader)
            elif reader.need == "encode":
                self._encoded = None
                self.encoded()
            else:
                self._reconstructions = None
                self.reconstructions()
        codes = self._codes[reader]
        if isinstance(codes, Exception):
            raise codes
        return [torch.cat(parts) for parts in zip(*codes, strict=True)]

    def _is_chosen(self, reader: CodebookReader) -> bool:
        """Whether other monitors use the way in which codes are read."""
        return self.parts.has(reader.need) and self.parts.way(reader.need).name == reader.way

    def _read_alone(self, reader: CodebookReader) -> None:
        way = next((way for way in self.parts.ways(reader.need) if way.name == reader.way), None)
        if way is None:
            raise ValueError(f"{reader.way} is not there any more.")
        with self.isolated(exact=True):
            pieces = self._real_pieces("codes", RECONSTRUCTED, way.call)
            self.seed()
            for given, size, _ in pieces:
                self._read([reader], partial(way.call, given), len(given), size)

    def _forgotten(self, need: Need) -> list[CodebookReader]:
        """Forgets the codes that are read in the way that was chosen for a need, and returns what reads them."""
        readers = [reader for reader in self._readers if reader.need == need and self._is_chosen(reader)]
        for reader in readers:
            self._codes.pop(reader, None)
        return readers

    def _read(self, readers: Sequence[CodebookReader], call: Callable[[], T], n: int, size: int) -> T:
        """Calls what encodes or reconstructs n images, of which the first ``size`` count, and reads the codes meanwhile."""
        with ExitStack() as stack:
            finish = {reader: stack.enter_context(reader.reading(self.module, n)) for reader in readers}
            output = call()
        for reader, finished in finish.items():
            held = self._codes.setdefault(reader, [])
            try:
                if not isinstance(held, Exception):
                    held.append([codes[:size] for codes in finished(output)])
            except ValueError as error:
                # other monitors need the output all the same
                self._codes[reader] = error
        return output

    @property
    def decode(self) -> Callable[[Tensor], Any]:
        """The callable from latents (n, L) to data; inside :meth:`isolated`."""
        return self.parts.decode

    def decoded_images(self, z: Tensor) -> Tensor:
        """Returns images (n, C, H, W), or middle slices of volumes, of latents (n, L); inside :meth:`isolated`.

        Raises:
            ValueError: If what decodes returns no images.
        """
        return self.parts.decoded_images(z)

    # ---- networks that the user gave ----

    def resolve_extractor(self, given: nn.Module | Callable[..., Any] | None) -> Callable[[Tensor], Any] | None:
        """Returns a feature extractor or classifier as a callable of images.

        Args:
            given: A module, which is used as it is, or as it is on the copy where it is a part of the model; a callable
                ``(module, images)``; or None.
        """
        if given is None:
            return None
        if isinstance(given, nn.Module):
            if self.moves_with_model(given):
                return lambda images: self.subject.counterpart(given)(self.as_input(images))
            return given.to(self.device).eval()
        return lambda images: self.subject.counterpart(given)(self.module, self.as_input(images))

    def resolve_named(
        self, given: str | nn.Module | Callable[..., Any] | None, argument: str, kinds: str = "method"
    ) -> Callable[[Tensor], Any] | None:
        """Returns what :meth:`resolve_extractor` does, where a part of the module may be given by its name too.

        Args:
            given: The name, or what :meth:`resolve_extractor` takes.
            argument: What an error calls it.
            kinds: What may be named.

        Raises:
            ValueError: If there is nothing of this name, or what is given cannot be called.
        """
        if given is None:
            return None
        found = getattr(self.module, given, None) if isinstance(given, str) else given
        if not callable(found):
            raise ValueError(
                f"{argument} must be a callable or name a {kinds} of {type(self.module).__name__}, got {given!r}."
            )
        return (lambda x: found(self.as_input(x))) if isinstance(given, str) else self.resolve_extractor(given)

    def resolve_features(self, given: nn.Module | Callable[..., Any] | None) -> Callable[[Tensor], Tensor]:
        """Returns a callable from images on any device to features (n, F) on the module's, in chunks.

        Args:
            given: What :meth:`resolve_extractor` takes; None for :attr:`feature_extractor`.
        """
        found = self.resolve_extractor(given)
        extract = self.feature_extractor if found is None else found
        return lambda images: in_chunks(lambda some: extract(some.to(self.device)), images)

    def features_of_reference(self, given: nn.Module | Callable[..., Any] | None, rows: slice = slice(None)) -> Tensor:
        """Returns features (n, F) of some rows of the reference on the module's device; inside :meth:`isolated`.

        They are computed once for all monitors where they do not change with the model.

        Args:
            given: What :meth:`resolve_features` takes.
            rows: Rows of the reference of all processes.
        """
        if given is None:
            return self.feature_extractor.of_reference(rows)
        if not isinstance(given, nn.Module) or self.moves_with_model(given):
            return self.resolve_features(given)(self.reference_images.images[rows])
        if given not in self._reference_features:
            self._reference_features[given] = self.resolve_features(given)(self.reference_images.images).cpu()
        return self._reference_features[given][rows].to(self.device)

    def moves_with_model(self, given: str | nn.Module | Callable[..., Any] | None) -> bool:
        """Returns whether what a network gives may change as the model trains: a callable, a name or a part of the model."""
        if isinstance(given, nn.Module):
            return any(part is given for part in self.subject.trained.modules())
        return given is not None

    # ---- processes ----

    def weights_sum(self) -> float:
        """Returns the sum of all weights that are trained, by which it shows whether training changed them."""
        weights = [p for p in self.subject.trained.parameters() if p.requires_grad and not nn.parameter.is_lazy(p)]
        sums = [weight.detach().sum(dtype=torch.float64) for weight in weights]
        return float(torch.stack(sums).sum()) if sums else 0.0

    def has_finite_weights(self) -> bool:
        """Returns whether no weight that is evaluated is nan or inf, and no buffer nan, where inf may be meant as in masks."""
        weights, buffers = self.module.parameters(), self.module.buffers()
        return all(bool(p.isfinite().all()) for p in weights) and not any(bool(b.isnan().any()) for b in buffers)

    def agreed(self, holds: bool) -> bool:
        """Returns whether something holds on all processes; every process must call it at the same time."""
        return bool(self.trainer.strategy.reduce_boolean_decision(holds, all=True))

    def on_all(self, make: Callable[[], T], failure: Exception) -> T:
        """Returns what ``make()`` returns on this process, or raises an error on all where it fails on any.

        Args:
            make: Called once, on every process at the same time.
            failure: What is raised where it failed on another process only.
        """
        error: Exception | None = None
        try:
            with exits_as_errors():
                made = make()
        except Exception as caught:
            error = caught
        if not self.agreed(error is None):
            raise error or failure
        return made

    def broadcast(self, make: Callable[[], T]) -> T:
        """Returns what ``make()`` returns on rank 0, on every rank; its exception too."""
        made: tuple[Any, str | None] = (None, None)
        if self.is_global_zero:
            try:
                with exits_as_errors():
                    made = make(), None
            except Exception as error:
                made = None, f"{type(error).__name__}: {error}"
        value, failure = self.trainer.strategy.broadcast(made) if self.world_size > 1 else made
        if failure is not None:
            raise ValueError(failure)
        result: T = value
        return result


def has_short_rows(data: Tensor) -> bool:
    """Returns whether data are rows (N, F) that can be compared feature by feature."""
    return data.ndim == 2 and data.shape[1] <= LONGEST_ROW


def _joined(parts: Sequence[Images]) -> Images:
    """Returns the images of all parts, and their labels where the parts have any."""
    labels = [part.labels for part in parts if part.labels is not None]
    return Images(torch.cat([part.images for part in parts]), torch.cat(labels) if labels else None)
