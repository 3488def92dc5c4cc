"""The base of every diagnostic's callback: one evaluation from samples to logged numbers, with its failures contained."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_gendiag.callbacks.logging import PREFIX, DiagnosticLogger, DiagnosticWarning
from lightning_gendiag.callbacks.page import Page
from lightning_gendiag.callbacks.session import Member, Purpose
from lightning_gendiag.detection.history import Curve, Evaluation, Observation
from lightning_gendiag.functional.arrays import as_images
from lightning_gendiag.functional.text import representation
from lightning_gendiag.metric import Diagnostic, Result
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.adapters.base import Need
from lightning_gendiag.model.amounts import run_progress
from lightning_gendiag.model.isolation import contained, exits_as_errors
from lightning_gendiag.model.reference import InapplicableError
from lightning_gendiag.model.warning import warn
from lightning_gendiag.plots.canvas import Occasion
from lightning_gendiag.regions.clustering import find_regions
from lightning_gendiag.regions.region_map import RegionMap, features_in
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.batches import Images
    from lightning_gendiag.model.view import ModelView

__all__ = ["DiagnosticWarning", "Monitor", "Need", "PlotContext"]

MAX_CELLS = 1024
"""Largest number of cells of an image that are clustered: the time grows with its square, and cells are refined to pixels."""

SHORT_CELLS = 256
"""The same in a short run. Maps of 256 cells of 2x2 pixels agree as well between halves of the data as maps of pixels do: an
adjusted Rand index of 0.5 to 0.6 on digits, MNIST, faces and textures, and 1 on scenes with known regions."""

MAP_NUMBERS = 1 << 22
"""Largest count of numbers in the images in which regions are found, unless these are fewer than ``LEAST_MAP_IMAGES``."""

LEAST_MAP_IMAGES = 400
"""Number of images from which on maps are steady; in a short run no more are used."""

PANEL_GROWTH, LIMITED_PANEL_GROWTH = 0.1, 1.0
"""Panels are drawn each time the number of evaluations has grown by this share, since TensorBoard keeps ten of a tag; more
rarely where the time is limited, since they take twice as long as an evaluation of few samples."""

SHORT_PANEL = 50
"""In a short run panels are drawn at the evaluation with this number, which a run has time for that comes to it, and at its
end. The tab shows pictures meanwhile."""

FAILURES = 3
"""Number of failures in a row that switch a monitor off."""

MetricT = TypeVar("MetricT", bound=Diagnostic)
ResultT = TypeVar("ResultT", bound=Result)


class PlotContext(NamedTuple):
    """What a monitor's pictures show beside its result, and where they are logged."""

    evaluation: Evaluation
    """The evaluation that gave the result."""
    curves: Mapping[str, Curve]
    """All series of the monitor over time, by name."""
    logger: DiagnosticLogger

    def occasion(self, alarm: Alarm | None = None) -> Occasion:
        """Returns the occasion of a panel, or of the picture of an alarm."""
        step = self.evaluation.step
        return Occasion(step) if alarm is None else Occasion(step, alarm.indices, str(alarm))


class Monitor(Member, Callback, Generic[MetricT, ResultT]):
    """A diagnostic attached to training: evaluates on a schedule, logs numbers and panels, and never ends a run itself.

    A subclass names its metric, builds it, gives it rows, and says what is observed and plotted. Evaluations take place
    at the end of training epochs or after training batches, on an isolated copy of the module with its raw weights, or
    averaged ones where there are any.

    Args:
        adapter: How the module is used; by default one adapter that all monitors of the trainer share.
        every_n_epochs: Number of epochs from one evaluation to the next.
        every_n_train_steps: Number of batches that stepped an optimizer from one evaluation to the next, instead of
            epochs.
        warmup_epochs: Number of epochs before the first evaluation.
        on_error: ``"warn"``: a failure is named in a warning and the run goes on, and after three in a row the monitor is
            switched off; ``"raise"`` for debugging.
        name: Of this monitor in tags and checkpoints, for two of one kind on a trainer.
        log_images: Whether panels are logged beside the scalars: at the first 20 evaluations, then each time their
            number grows by 10 %, and once at the end; with ``max_overhead``, at the first and each time their number
            doubles, or in a run of less than five minutes at the 50th and at the end.
        max_overhead: Largest share of the training's time, in (0, 1], that all monitors with such a limit may take
            together. The first evaluation measures what they cost, and chooses by it how many samples they compare, 64 to
            1,024 unless the adapter says otherwise, and how often each evaluates. By default there is no limit.

    Raises:
        ValueError: If an argument is out of its range; in ``on_fit_start`` for a configuration that cannot work.
    """

    name: str = ""
    metric_class: ClassVar[type[Diagnostic]]
    """The metric that is monitored."""
    needs: ClassVar[tuple[Need, ...]] = ("sample",)
    """What of the module is used."""
    needs_reference: bool = True
    """Whether it needs real images or other data."""
    needs_images: ClassVar[bool] = False
    """Whether these must be images, or volumes, of which the middle slices are images."""
    takes_rows: ClassVar[bool] = False
    """Whether rows (N, F) may take the place of images, as images (N, 1, 1, F)."""
    needs_labels: bool = False
    """Whether it needs labels in the batches."""
    watches_batches: ClassVar[bool] = False
    """Whether it sees all training batches by :meth:`see`, and evaluates these and not the module."""
    notes_batches: ClassVar[bool] = False
    """Whether it is shown each training batch by :meth:`note_batch`."""
    requires: tuple[str, ...] = ()
    """Packages that it needs beyond the dependencies."""
    period_multiplier: ClassVar[int] = 1
    """``GenerativeDiagnostics`` evaluates expensive monitors this many times less often."""
    expected_seconds: float = 0.0
    """What an evaluation may take, as long as none has been measured."""

    def __init__(
        self,
        *,
        adapter: ModelAdapter | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        warmup_epochs: int = 0,
        on_error: Literal["warn", "raise"] = "warn",
        name: str | None = None,
        log_images: bool = True,
        max_overhead: float | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("every_n_epochs", every_n_epochs), ("every_n_train_steps", every_n_train_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}.")
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(f"max_overhead must be in (0, 1] or None, got {max_overhead}.")
        self.adapter, self.max_overhead = adapter, max_overhead
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.warmup_epochs, self.on_error, self.log_images = warmup_epochs, on_error, log_images
        self.name = name or type(self).name
        self.result: ResultT | None = None
        self.latest: Evaluation | None = None
        self.evaluations = 0
        self.seconds = self.drawing_seconds = 0.0
        """Of all evaluations, and of the newest panels."""
        self.enabled = True
        self.last_step: int | None = None
        """Step of the newest evaluation, on the loggers' axis."""
        self._metric: MetricT | None = None
        self._session_state: dict[str, Any] | None = None
        self._begins_anew = False
        self._failures = 0
        self._unseen: Exception | None = None
        self._noted: Any = None
        self._rehearsed: object = None
        """The view's occasion of a rehearsal, after which nothing else was evaluated."""
        self._next_panel = 0
        self._logged: list[Observation] | None = None
        self._page = self._new_page()

    # ---- what a subclass says ----

    def check(self, view: ModelView) -> None:
        """Checks before training that the module can be evaluated.

        Raises:
            ValueError: For a configuration that cannot work.
        """
        view.find(*self.needs)

    def build_metric(self, view: ModelView) -> MetricT:
        """Returns the metric, made once when the reference is there; on every rank alike."""
        raise NotImplementedError

    @property
    def sees_batches(self) -> bool:
        """Whether the next training batch is given to :meth:`see`."""
        return self.watches_batches

    def see(self, view: ModelView, data: Images) -> None:
        """Takes note of this rank's next training batch, where :attr:`sees_batches`; it must cost next to nothing."""

    def note_batch(self, view: ModelView, batch: Any) -> None:
        """Takes note of this rank's next training batch as the trainer passes it, if ``notes_batches``.

        It must cost next to nothing.
        """

    @property
    def wants_held_out(self) -> bool:
        """Whether the next validation batch is given to :meth:`note_held_out`."""
        return False

    def note_held_out(self, view: ModelView, batch: Any) -> None:
        """Takes note of a validation batch, whose images training does not see.

        A batch that fails is left out, since no diagnostic depends on it.
        """

    def update(self, view: ModelView) -> None:
        """Gives the metric this rank's rows."""
        raise NotImplementedError

    def postprocess(self, view: ModelView, result: ResultT) -> ResultT:
        """Returns the result with what can be computed only once it is there; on every rank alike."""
        return result

    def release(self) -> None:
        """Drops what the metric holds and the next evaluation does not need; not after a rehearsal, which it may need."""

    def scalars(self, result: ResultT) -> dict[str, Tensor]:
        """Returns what is logged, by name."""
        return result.scalars()

    def observations(self, result: ResultT) -> list[Observation]:
        """Returns one value for each series; depends on nothing but the result."""
        return []

    def contributions(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Returns each component's contribution to a drop of the aggregate, adding to one; empty where there is none."""
        return {}

    def log_plots(self, result: ResultT, context: PlotContext) -> None:
        """Logs panels, charts and tables; on rank 0 only, and not at every evaluation."""

    def log_alarm(self, alarm: Alarm, result: ResultT, context: PlotContext) -> None:
        """Logs a picture of where an alarm lies; on rank 0 only."""

    def page_setup(self) -> Record:
        """Returns what the tab shows at every evaluation, such as the regions; on rank 0 only."""
        return Record()

    def page_numbers(self, result: ResultT) -> dict[str, Any]:
        """Returns lists of numbers of each evaluation that the tab shows and no series holds; on rank 0 only."""
        return {}

    def page_frame(self, result: ResultT) -> Record | None:
        """Returns pictures and larger arrays that the tab shows, of some evaluations; on rank 0 only."""
        return None

    def shares(self) -> str:
        """Returns what monitors draw once together, and are therefore evaluated at the same times; by default nothing.

        ``"samples"`` of the view, whose number says what an evaluation costs, or what the encoder gives (``"encoded"``).
        """
        return self.name

    def depends_on_model(self, view: ModelView) -> bool:
        """Returns whether the metric holds what changes with the module, and must be built at each evaluation."""
        return False

    def get_extra_state(self) -> dict[str, Any]:
        """Returns what a subclass keeps in checkpoints: plain Python and tensors."""
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""

    def reset(self) -> None:
        """Forgets all that was learned, for another module or other data."""
        self._metric, self.result, self.latest, self.enabled = None, None, None, True
        self.evaluations, self.seconds, self.last_step = 0, 0.0, None
        self._failures, self._next_panel, self._logged, self._unseen = 0, 0, None, None
        self._page = self._new_page()

    def _new_page(self) -> Page | None:
        """What the tab shows of this monitor; None once it could not be written."""
        metric = getattr(type(self), "metric_class", None)
        return Page(self.name, metric.__name__ if metric is not None else type(self).__name__)

    # ---- what a subclass uses ----

    @property
    def metric(self) -> MetricT:
        """The metric.

        Raises:
            RuntimeError: Before the first evaluation.
        """
        if self._metric is None:
            raise RuntimeError(f"{type(self).__name__} has no metric before its first evaluation.")
        return self._metric

    @property
    def view(self) -> ModelView:
        """What the monitor sees of the module."""
        return self.session.view_of(self)

    @property
    def data_name(self) -> str:
        """What messages call the data: ``"images"``, or ``"data"`` where they are rows or series."""
        return "images" if self._session is None or self.view.has_images else "data"

    def find_regions(self, view: ModelView, num_regions: int | None, num_images: int) -> RegionMap:
        """Returns the regions of the reference's first images, found once for all monitors and all ranks."""
        key = num_regions, num_images
        if key not in view.region_maps:
            what = {2: "feature", 3: "position"}.get(view.reference.images.ndim, "") if self.takes_rows else ""
            data = view.as_images(view.reference, self.takes_rows).images
            most = max(LEAST_MAP_IMAGES, 0 if view.real.is_short else MAP_NUMBERS // data[0].numel())
            images = as_images(data[: min(num_images, most)]).to(view.device)
            positions = images[0, 0].numel()
            if num_regions is not None and num_regions > positions:
                those = f"{'data' if what else 'images'} have no more {what or 'position'}s"
                view.say(f"Regions: {positions} in place of {num_regions}, since the {those}.")
                num_regions = positions
            cells = max(SHORT_CELLS if view.real.is_short else MAX_CELLS, num_regions or 1)
            state = view.broadcast(
                lambda: find_regions(images, num_regions, connected=not what, max_pixels=cells).state_dict()
            )
            names = {"names": features_in(state["labels"][0], what)} if what else {}
            view.region_maps[key] = RegionMap.from_state_dict(state | names)
        return view.region_maps[key]

    def known_scalars(self) -> list[str]:
        """Returns the names of the scalars that are logged at every evaluation of any model."""
        info = getattr(getattr(type(self), "metric_class", None), "scalar_info", {})
        return [name for name, scalar in info.items() if not scalar.optional and "{" not in name]

    # ---- Lightning's hooks ----

    @property
    def state_key(self) -> str:
        """One for each name, so that two monitors of a kind can be on one trainer."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the trainer's session."""
        if stage == "fit":
            self.join(trainer, pl_module)

    def join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the session of a trainer, and begins anew where its module is another than before."""
        before = self._session
        is_other = self.enter(trainer, pl_module)
        self.session.join(self)
        if is_other:
            self.reset()
        elif before is not None and before is not self.session:
            # another trainer goes on with the same module
            self._session_state = before.state_dict(self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over a checkpoint's state, and checks the configuration once the module is on its device."""
        self.prepare()
        self.view.agree(*self.needs)
        self.check(self.view)

    def prepare(self) -> None:
        """Takes over a checkpoint's state, and reads a reference that was given."""
        self._load_session_state()
        # this fit may have another log folder
        self._page = self._new_page()
        self.view.attach(whole=not self.watches_batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count the time; takes over a checkpoint's state where the strategy loads it late."""
        self._load_session_state()
        if self.session.leads(self):
            self.session.on_train_start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collects real images."""
        if self.session.leads(self):
            self.session.on_train_batch_start(batch)
        if not self.notes_batches:
            return
        if self.enabled and self._noted is not batch:
            started = time.monotonic()
            self.note_batch(self.view, batch)
            self.session.schedule.budget.note(time.monotonic() - started)
        self._noted = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Shows validation batches as long as they are wanted."""
        if self._session is not None and self.enabled and self.wants_held_out:
            with (
                suppress(Exception),
                torch.no_grad(),
                contained(self.view.device, self.view.adapter.images, self.view.adapter.labels),
            ):
                self.note_held_out(self.view, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates where the schedule counts steps."""
        if self.session.leads(self):
            self.session.on_train_batch_end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates where the schedule counts epochs."""
        if self.session.leads(self):
            self.session.on_train_epoch_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the panels of the last evaluation."""
        if self.session.leads(self):
            self.session.on_train_end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the fit."""
        if stage == "fit" and self._session is not None:
            self._session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the fit."""
        if self._session is not None:
            self._session.end()

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, the subclass's own state, the series of this monitor and the real images."""
        state: dict[str, Any] = {"evaluations": self.evaluations, "seconds": self.seconds, **self.get_extra_state()}
        return state if self._session is None else state | {"session": self._session.state_dict(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's state; begins anew where it cannot be read."""
        # an evaluation of the run before is none of the one that goes on
        self.latest, self.result, self._logged, self._next_panel = None, None, None, 0
        try:
            self.set_extra_state(state_dict)
            # before the first fit there is no session, as where a tuner saves the state: evaluations since then are of trials
            self._begins_anew = "session" not in state_dict and self.evaluations > 0
            self.evaluations, self.seconds = state_dict["evaluations"], state_dict["seconds"]
            self._session_state = state_dict.get("session")
        except Exception as error:
            self._cannot_read(error)

    def _load_session_state(self) -> None:
        state, self._session_state = self._session_state, None
        if state is not None:
            try:
                self.session.load_state_dict(self, state)
            except Exception as error:
                self._cannot_read(error)
        if self._begins_anew:
            # now that listeners too have taken over what the checkpoint holds
            self._begins_anew = False
            self.session.restart(self)

    def _cannot_read(self, error: Exception) -> None:
        if self.on_error == "raise":
            raise error
        self.reset()
        self._begins_anew, self._session_state = True, None
        warn(
            f"{type(self).__name__} begins anew, since its state in the checkpoint cannot be read: "
            f"{type(error).__name__}: {error}",
            category=DiagnosticWarning,
        )

    def __repr__(self) -> str:
        return representation(self, name=None if self.name == type(self).name else self.name)

    def acts_in(self, hook: str) -> bool:
        """Returns whether a hook of Lightning's does something here: in the session's first monitor, and in its own way."""
        takes_note = hook == "on_train_batch_start" and self.notes_batches
        return takes_note or self.session.leads(self) or getattr(type(self), hook) is not getattr(Monitor, hook)

    # ---- one evaluation ----

    def note_first_batch(self, view: ModelView, batch: Any) -> None:
        """Lets the monitor take note of a batch before it is checked, and not once more when training takes the batch."""
        self._noted = batch
        self.note_batch(view, batch)

    def watch(self, view: ModelView, data: Images) -> None:
        """Sees a batch; a failure is raised at the next evaluation, where all processes can agree on it."""
        if self._unseen is None:
            try:
                self.see(view, data)
            except Exception as error:
                if self.on_error == "raise":
                    raise
                self._unseen = error

    @property
    def failed(self) -> bool:
        """Whether the newest attempt to evaluate failed."""
        return self._failures > 0

    @property
    def draws(self) -> bool:
        """Whether panels are drawn of the next evaluation; the same on all ranks."""
        is_last = run_progress(self.session.trainer) == 1
        is_short = self.max_overhead is not None and self.view.real.is_short
        number = self.evaluations + 1
        due = number == SHORT_PANEL if is_short else number >= self._next_panel
        return self.log_images and (due or is_last)

    def evaluate(
        self,
        view: ModelView,
        step: int,
        epoch_over: bool,
        unreadable: Exception | None = None,
        purpose: Purpose = "series",
    ) -> bool:
        """Evaluates the module once, and returns whether there was anything to evaluate.

        A rank that fails must not leave the others waiting in a collective, so all agree after each part.

        Args:
            view: The module as it is now.
            step: On the loggers' axis.
            epoch_over: Whether a training epoch has ended, or a batch.
            unreadable: Why a batch could not be read, if one could not.
            purpose: ``"series"`` for the next value of all series, ``"rehearsal"`` to measure the time, so that nothing is
                noted, ``"decision"`` to replace the newest value by one that is less uncertain.
        """
        started, self.drawing_seconds = time.monotonic(), 0.0
        self.last_step = step
        error: Exception | None = None
        ready = True
        try:
            # all ranks ask together, whether or not one of them failed before
            ready = not self.needs_reference or view.real.ready(epoch_over)
            if unreadable is not None and not ready:
                raise unreadable
            if ready:
                unseen, self._unseen = self._unseen, None
                if unseen is not None:
                    raise unseen
                # a rehearsal of the same size has added the same already, but for what is only shown
                if purpose != "series" or view.thorough or self._rehearsed is not view.occasion:
                    self._fill_metric(view)
        except Exception as caught:
            error = unreadable or caught
        if not self._agreed(error) or not ready:
            return ready
        evaluation: Evaluation | None = None
        scalars: dict[str, float] = {}
        try:
            # moved at once, since each number that is read on an accelerator would wait for it
            with exits_as_errors():
                computed = self.postprocess(view, self.metric.compute())
            self.result = apply_to_collection(computed, Tensor, Tensor.cpu)
            scalars = {name: float(value) for name, value in self.scalars(self.result).items()}
            observations = self.observations(self.result)
            epoch = self.session.trainer.current_epoch
            number = self.evaluations + (purpose != "decision")
            evaluation = Evaluation(number, step, epoch, observations, view.averaged)
        except Exception as caught:
            error = caught
        if not self._agreed(error) or evaluation is None:
            return ready
        self._failures = 0
        self._rehearsed = view.occasion if purpose == "rehearsal" else None
        if purpose == "rehearsal":
            return ready
        self.release()
        draws = self.draws
        self.evaluations, self.latest = evaluation.number, evaluation
        self.session.history.append(self.name, evaluation)
        if purpose == "decision":
            # its numbers were logged at this step
            logger = self.session.logger(evaluation.step, self.name)
            self._log_panels(evaluation, logger)
            self._write_page(evaluation, logger)
            return ready
        tags = {f"{PREFIX}/{self.name}/{name}": value for name, value in scalars.items()}
        compat.log_values(view.subject.trained, tags)
        self.session.note_evaluation(tags)
        self._write_page(evaluation, self.session.logger(evaluation.step, self.name))
        self._publish(evaluation, scalars, draws, started)
        return ready

    def _fill_metric(self, view: ModelView) -> None:
        """Adds what the module generates now to the metric, which is made where there is none."""
        view.agree(*self.needs)
        held = None if self.depends_on_model(view) else self._metric
        metric = held or self.build_metric(view)
        # to move it to where it is takes a millisecond
        self._metric = metric if metric is held and held.device == view.device else metric.to(view.device)
        self._metric.reset()
        with exits_as_errors():
            self.update(view)

    def _agreed(self, error: Exception | None) -> bool:
        """Whether no rank failed."""
        if self.session.trainer.strategy.reduce_boolean_decision(error is None, all=True):
            return True
        self._contain(error or RuntimeError("the diagnostic failed on another process"))
        return False

    def _publish(self, evaluation: Evaluation, scalars: dict[str, float], draws: bool, started: float) -> None:
        """Logs numbers of an evaluation, and panels where they are drawn."""
        logger = self.session.logger(evaluation.step, self.name)
        if draws:
            growth = PANEL_GROWTH if self.max_overhead is None else LIMITED_PANEL_GROWTH
            self._next_panel = evaluation.number + max(1, int(evaluation.number * growth))
            self._log_panels(evaluation, logger)
        seconds = time.monotonic() - started
        self.seconds += seconds
        try:
            logger.log_scalars(scalars | {"seconds": seconds})
        except Exception as error:
            # on rank 0 alone, so the others need not agree
            self._contain(error, counts=False)

    def _write_page(self, evaluation: Evaluation, logger: DiagnosticLogger) -> None:
        """Writes what the tab shows of the newest evaluation."""
        with self._showing(logger) as page:
            if page is not None and self.result is not None:
                page.write_values(evaluation, self.page_setup, self.page_numbers(self.result), logger)
        if self._page is not None and self._page.is_due(evaluation.number):
            self._write_frame(evaluation, logger)

    def _write_frame(self, evaluation: Evaluation, logger: DiagnosticLogger) -> None:
        """Writes the pictures that the tab shows of the newest evaluation, if they were not written."""
        with self._showing(logger) as page:
            wanted = page is not None and self.log_images and not page.has_frame(evaluation)
            frame = self.page_frame(self.result) if wanted and self.result is not None else None
            if page is not None and frame is not None:
                page.write_frame(evaluation, frame, logger)

    @contextmanager
    def _showing(self, logger: DiagnosticLogger) -> Iterator[Page | None]:
        """Gives what writes for the tab, None where there is no TensorBoard; what fails once is not tried again."""
        try:
            yield self._page if logger.has_board else None
        except Exception as error:
            self._page = None
            self._contain(error, counts=False, lost="part of the tab")

    def log_last(self) -> bool:
        """Logs the panels of the newest evaluation, if they were not logged, and returns whether there are new charts."""
        if self.latest is None:
            return False
        logger = self.session.logger(self.latest.step, self.name)
        self._log_panels(self.latest, logger, writes_layout=False)
        self._write_frame(self.latest, logger)
        return logger.has_new_charts

    def _log_panels(self, evaluation: Evaluation, logger: DiagnosticLogger, writes_layout: bool = True) -> None:
        """Logs the panels, but not where nothing has changed."""
        unchanged = bool(evaluation.observations) and evaluation.observations == self._logged
        if not self.log_images or not self.session.trainer.is_global_zero or unchanged or self.result is None:
            return
        self._logged, started = evaluation.observations, time.monotonic()
        try:
            self.log_plots(self.result, PlotContext(evaluation, self.session.history.curves(self.name), logger))
            if writes_layout and logger.has_new_charts:
                logger.write_layout()
            self.drawing_seconds = time.monotonic() - started
        except Exception as error:
            self.log_images = False
            self._contain(error, counts=False)

    def log_alarm_picture(self, alarm: Alarm, logger: DiagnosticLogger) -> None:
        """Logs a picture of an alarm of the newest evaluation."""
        if self.result is not None and self.latest is not None:
            self._write_frame(self.latest, logger)
            context = PlotContext(self.latest, self.session.history.curves(self.name), logger)
            self.log_alarm(alarm, self.result, context)

    def _contain(self, error: Exception, counts: bool = True, lost: str = "panels") -> None:
        """Names a failure in a warning; switches the monitor off after three in a row, or else what is ``lost``."""
        if self.on_error == "raise":
            raise error
        self._failures += counts
        off = self._failures >= FAILURES or isinstance(error, InapplicableError)
        self.enabled = self.enabled and not off
        effect = "from now on" if off else "this time" if counts else f"with its {lost} switched off"
        text = (
            f"{type(self).__name__} failed at step {self.last_step or 0} and the run goes on without it {effect}: "
            if counts
            else f"{type(self).__name__} failed at step {self.last_step or 0} and goes on {effect}: "
        ) + f"{type(error).__name__}: {error}"
        if off or not counts or self._failures == 1:
            warn(text, category=DiagnosticWarning)
            self.session.logger(self.last_step or 0, self.name).log_text("failure", text)
