"""The base of every diagnostic's callback: when to look, what to log, and how its own failures are contained."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from lightning_gendiag.board import Board
from lightning_gendiag.budget import budget_of
from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.functional import as_images
from lightning_gendiag.probe import Probe, shared_probe
from lightning_gendiag.regions import RegionMap, find_regions

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

FAILURES = 3
"""So many failures in a row switch a monitor off."""

CURVE = 400
"""A panel's curve has at most so many points; beyond, each second one is left out."""


class DiagnosticWarning(UserWarning):
    """A diagnostic failed, or sees something that makes its numbers doubtful."""


class Reading(NamedTuple):
    """One number of an evaluation, for detectors."""

    value: float
    """As people know it."""
    badness: float
    """The same on a scale on which larger is worse and fluctuations are about equally large everywhere."""
    kind: Literal["part", "whole", "other"] = "part"
    """A fall of the whole is divided among the parts; others stand for themselves."""
    where: str | None = None
    """What a finding names, if not the name of the series."""
    question: str | None = None
    """What is measured, if not what the monitor's other series measure."""
    fault: str = "collapsed"
    """What a finding says happened, as a verb."""
    words: str = ""
    """What a finding says instead, where badness is inf by a rule and no fluctuation."""


class Evaluation(NamedTuple):
    """What a monitor found at one step."""

    number: int
    """Counts the monitor's evaluations from 1, over resumes too."""
    step: int
    epoch: int
    readings: dict[str, Reading]
    """By series: a region's name, a class, a dimension, or the whole."""


def run_progress(trainer: Trainer) -> float:
    """How much of a run is done, 0 to 1; 1 where its length is not known."""
    epochs, steps = trainer.max_epochs or 0, trainer.max_steps
    epoch = trainer.current_epoch + (trainer.fit_loop.epoch_loop.batch_idx + 1) / max(trainer.num_training_batches, 1)
    shares = [epoch / epochs] if epochs > 0 else []
    shares += [trainer.global_step / steps] if steps > 0 else []
    return min(max(shares, default=1.0), 1.0)


def tell(board: Board, name: str, words: str) -> None:
    """Text on a board; a warning where it cannot be written, and never an error."""
    try:
        board.text(name, words)
    except Exception as error:
        warnings.warn(f"{name} could not be logged: {error}", DiagnosticWarning, stacklevel=2)


def batch_step(trainer: Trainer, epoch_over: bool) -> int:
    """The step that ``self.log`` writes at: batches that led to an optimizer step."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped) - int(epoch_over)


class Monitor(Callback):
    """A diagnostic attached to training: looks on a schedule, logs, draws, and never ends a run by an error of its own.

    A subclass says what it ``needs`` of the module, builds a metric, feeds it, and tells readings and pictures.
    Evaluations run at the end of training epochs, or after training batches, on the module's raw weights, or averaged
    ones where the probe finds them.

    Args:
        probe: how the module is looked at; by default one probe that all monitors of the trainer share.
        every_n_epochs: evaluate at the end of each n-th epoch.
        every_n_train_steps: evaluate after each n-th batch that stepped an optimizer, instead of at epochs' ends.
        warmup_epochs: no evaluation before so many epochs are over.
        on_error: ``"warn"``: a failure is named in a warning and the run goes on, and after three in a row the monitor
            is switched off; ``"raise"``: for those who debug.
        name: of this monitor in tags and checkpoints, for two of one kind on a trainer.
        draw_pictures: whether panels are drawn beside the scalars: at each of the first twenty evaluations, then whenever
            there are a tenth more, and at the end; not where nothing has changed.
        max_share: of the training's time that all monitors of the trainer which have such a limit may take together after
            the first look, which sets them up, in (0, 1]: where they take more, all look less often in proportion; by
            default each looks whenever it is due.
    """

    stem: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("sample",)
    needs_reference: ClassVar[bool] = True
    """Whether it compares with real images."""
    grain: ClassVar[float] = 0.0
    """Fluctuations of badness below this are never news."""
    tolerance: ClassVar[Mapping[str, float]] = {}
    """By kind of reading: rises of badness up to this are no news, however lasting."""
    lasting: ClassVar[int] = 0
    """So many further evaluations a part's finding must last before it stops a run; it is told at once."""
    question: ClassVar[str] = ""
    """What is measured, in words that fit before "of the centre fell"."""

    def __init__(
        self,
        *,
        probe: Probe | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        warmup_epochs: int = 0,
        on_error: Literal["warn", "raise"] = "warn",
        name: str | None = None,
        draw_pictures: bool = True,
        max_share: float | None = None,
    ) -> None:
        super().__init__()
        if every_n_epochs < 1 or (every_n_train_steps is not None and every_n_train_steps < 1):
            raise ValueError(
                f"every_n_epochs and every_n_train_steps must be at least 1, got {every_n_epochs} and "
                f"{every_n_train_steps}."
            )
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}.")
        if max_share is not None and not 0 < max_share <= 1:
            raise ValueError(f"max_share must be in (0, 1] or None, got {max_share}.")
        self.max_share = max_share
        self.given_probe = probe
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.warmup_epochs, self.on_error, self.draw_pictures = warmup_epochs, on_error, draw_pictures
        self.name = name or self.stem
        self.probe: Probe | None = None
        self.metric: Diagnostic | None = None
        self.latest: Evaluation | None = None
        self.result: Any = None
        self.evaluations = 0
        self.seconds = 0.0
        self.enabled = True
        self._failures = 0
        self._loaded: dict[str, Any] | None = None
        self._last_step: int | None = None
        self._unreadable: Exception | None = None
        self._module: LightningModule | None = None
        self.checked = False
        """Whether :meth:`check` has passed already."""
        self._waiting = False
        self._round = 0
        self._next_picture = 0
        self._drawn: dict[str, Reading] | None = None
        self._curve: list[list[float]] = []

    # ---- what a subclass says ----

    def build(self, probe: Probe) -> Diagnostic:
        """The metric, made once when the reference is there; on every rank alike."""
        raise NotImplementedError

    def feed(self, probe: Probe, step: int) -> None:
        """Give ``self.metric`` this rank's share."""
        raise NotImplementedError

    def follow(self, probe: Probe, result: Any) -> Any:
        """The result, with what can be looked at only once it is there; on every rank alike."""
        return result

    def readings(self, result: Any) -> dict[str, Reading]:
        """What detectors watch."""
        return {}

    def shares(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """How a change of the whole divides among the parts, adding to one; empty where it does not."""
        return {}

    def scalars(self, result: Any) -> dict[str, Tensor]:
        """What is logged, by name."""
        named: dict[str, Tensor] = result.scalars()
        return named

    def curve(self, result: Any) -> list[float]:
        """Numbers that the panel draws over time."""
        return []

    def draw(self, result: Any, board: Board) -> None:
        """Pictures and charts; on rank 0 only, and not at every evaluation."""

    def draw_finding(self, finding: Any, board: Board) -> None:
        """A picture of where the fault lies; on rank 0 only."""

    def check(self, probe: Probe) -> None:
        """Refuse in words, before training, what cannot work.

        Raises:
            ValueError: for a configuration that cannot work.
        """
        if "sample" in self.needs:
            probe.try_out()

    # ---- Lightning's hooks ----

    @property
    def state_key(self) -> str:
        """One for each name, so that two monitors of a kind can be on one trainer."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage != "fit":
            return
        given = [c.given_probe for c in trainer.callbacks if isinstance(c, Monitor) and c.given_probe]  # type: ignore[attr-defined]
        self.probe = self.given_probe or shared_probe(trainer, given)
        self.probe.attach(trainer, pl_module, self.needs)
        self.checked = False
        if self._module is not pl_module:
            if self._module is not None:
                self.forget()
            self._module = pl_module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up a checkpoint's state and try the sampler, once the module is on its device."""
        assert self.probe is not None
        self._take_up(self.probe)
        if not self.checked:
            self.check(self.probe)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the time; take up a checkpoint's state where the strategy loads it late."""
        budget_of(trainer, anew=True)
        self._round = 0
        if self.probe is not None:
            self._take_up(self.probe)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let go of what was drawn: it was of the module as it is no more."""
        if self.probe is not None:
            self.probe.forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the reference, and evaluate where the schedule counts steps."""
        if not self.enabled or self.probe is None:
            return
        try:
            if self.needs_reference:
                self.probe.collect(batch, (trainer.current_epoch, batch_idx))
        except Exception as error:
            if self.on_error == "raise":
                raise
            # told at the next evaluation, where all ranks can agree on it
            self._unreadable = error
        step = batch_step(trainer, epoch_over=False)
        due = (
            self.every_n_train_steps is not None
            and (step + 1) % self.every_n_train_steps == 0
            and step != self._last_step
            and trainer.current_epoch >= self.warmup_epochs
        )
        if self.every_n_train_steps is not None and self._granted(trainer, step, due):
            self._evaluate(trainer, pl_module, step, epoch_over=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate where the schedule counts epochs."""
        if not self.enabled or self.probe is None:
            return
        epoch = trainer.current_epoch
        step = batch_step(trainer, epoch_over=True)
        due = (
            self.every_n_train_steps is None
            and (epoch + 1) % self.every_n_epochs == 0
            and epoch + 1 > self.warmup_epochs
        )
        if self.every_n_train_steps is None and self._granted(trainer, step, due):
            self._evaluate(trainer, pl_module, step, epoch_over=True)
        else:
            self.probe.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was found last, if it was not."""
        latest = self.latest
        if latest is not None and self._is_news(latest.readings) and self._draws(trainer):
            self._draw(trainer, Board(trainer, latest.step, f"gendiag/{self.name}"))

    def state_dict(self) -> dict[str, Any]:
        """Counts, what the subclass keeps, and the probe's reference if this monitor owns it."""
        state: dict[str, Any] = {"evaluations": self.evaluations, "seconds": self.seconds, **self.kept()}
        state["curve"] = [list(row) for row in self._curve]
        if self.probe is not None:
            # the first of those that share it
            others = (c for c in self.probe.trainer.callbacks if isinstance(c, Monitor) and c.probe is self.probe)  # type: ignore[attr-defined]
            if next(others, self) is self:
                state["probe"] = self.probe.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a checkpoint's state until the probe is there."""
        self._loaded = dict(state_dict)

    def kept(self) -> dict[str, Any]:
        """What a subclass wants in the checkpoint: plain Python and tensors."""
        return {}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`."""

    def forget(self) -> None:
        """Let go of what holds parts of a module, or was learned of it, since another one is looked at."""
        self.metric, self.enabled, self._failures = None, True, 0

    def moves(self, probe: Probe) -> bool:
        """Whether the metric holds what changes with the module, and must be built at each look."""
        return False

    def _take_up(self, probe: Probe) -> None:
        state, self._loaded = self._loaded, None
        if state is None:
            return
        try:
            self.evaluations, self.seconds = state["evaluations"], state["seconds"]
            self._curve = [list(row) for row in state["curve"]]
            if "probe" in state:
                probe.load_state_dict(state["probe"])
            self.take_up(state)
        except Exception as error:
            if self.on_error == "raise":
                raise
            words = f"{type(self).__name__} begins anew: what a checkpoint holds of it could not be read"
            warnings.warn(f"{words}: {type(error).__name__}: {error}", DiagnosticWarning, stacklevel=2)

    # ---- one evaluation ----

    def _granted(self, trainer: Trainer, step: int, due: bool) -> bool:
        """Whether to look now: when it is due, or was, and the time that all may take allows it; agreed by all ranks."""
        if self.max_share is None:
            return due
        budget = budget_of(trainer)
        # what waits goes along with the others
        if not due and not (self._waiting and budget.step == step):
            return False
        if budget.step != step:
            granted = budget.ask(step, self.max_share, run_progress(trainer))
            if trainer.world_size > 1:
                budget.granted = trainer.strategy.broadcast(granted)
                budget.rounds += budget.granted - granted
        # in proportion: one that looks a tenth as often as another goes along with each tenth round
        self._waiting = not budget.granted or budget.rounds - self._round < self._rarity(trainer)
        if not budget.granted and not budget.told:
            budget.told = True
            words = (
                f"The monitors took {budget.spent:.1f} s of the first {budget.training + budget.spent:.0f} s. From now on they "
                f"look less often, so that they take at most {self.max_share:.0%}; max_share=None lets them look whenever "
                "they are due."
            )
            rank_zero_info(words)
            tell(Board(trainer, step, "gendiag"), "budget", words)
        return not self._waiting

    def _rarity(self, trainer: Trainer) -> int:
        """How many times as often as this one the monitor that looks most often looks; 1 where that is not to be said."""
        by_steps = self.every_n_train_steps is not None
        periods = [
            monitor.every_n_train_steps or monitor.every_n_epochs
            for monitor in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(monitor, Monitor)
            and (monitor is self or (monitor.enabled and trainer.current_epoch >= monitor.warmup_epochs))
            and monitor.max_share is not None
            and (monitor.every_n_train_steps is not None) == by_steps
        ]
        return (self.every_n_train_steps or self.every_n_epochs) // min(periods)

    def _evaluate(self, trainer: Trainer, module: LightningModule, step: int, epoch_over: bool) -> None:
        started = time.monotonic()
        self._last_step, self._waiting = step, False
        self._round, ready = budget_of(trainer).rounds, True
        try:
            ready = self._look(trainer, module, step, epoch_over, started)
        finally:
            if self.max_share is not None:
                budget_of(trainer).pay(time.monotonic() - started, ready)

    def _look(self, trainer: Trainer, module: LightningModule, step: int, epoch_over: bool, started: float) -> bool:
        """One evaluation; whether there was anything to look at."""
        probe = self.probe
        assert probe is not None
        error: Exception | None = None
        ready = True
        unreadable, self._unreadable = self._unreadable, None
        try:
            # all ranks ask together, whatever one of them could not read
            ready = not self.needs_reference or probe.ready(epoch_over)
            if unreadable is not None and not ready:
                raise unreadable
            if ready:
                held = None if self.moves(probe) else self.metric
                self.metric = (held or self.build(probe)).to(module.device)
                self.metric.reset()
                self.feed(probe, step)
        except Exception as caught:
            error = unreadable or caught
        if not self._agreed(error, trainer) or not ready:
            return ready
        readings: dict[str, Reading] = {}
        scalars: dict[str, float] = {}
        curve: list[float] = []
        try:
            assert self.metric is not None
            self.result = self.follow(probe, self.metric.compute())
            readings = self.readings(self.result)
            scalars = {name: float(value) for name, value in self.scalars(self.result).items()}
            curve = self.curve(self.result)
        except Exception as caught:
            error = caught
        if not self._agreed(error, trainer):
            return ready
        self._failures = 0
        self.evaluations += 1
        self.latest = Evaluation(self.evaluations, step, trainer.current_epoch, readings)
        if curve:
            self._curve.append([float(step), *curve])
            if len(self._curve) > CURVE:
                self._curve = self._curve[::2]
        for name, value in scalars.items():
            # loggers are served below: through self.log they would see only every log_every_n_steps
            tag = f"gendiag/{self.name}/{name}"
            module.log(tag, value, logger=False, on_step=not epoch_over, on_epoch=epoch_over, batch_size=1)
        self._publish(trainer, scalars, started)
        return ready

    def _agreed(self, error: Exception | None, trainer: Trainer) -> bool:
        """Whether no rank failed: one that did must not leave the others waiting inside a collective."""
        if trainer.strategy.reduce_boolean_decision(error is None, all=True):
            return True
        self._contain(error or RuntimeError("the diagnostic failed on another process"), trainer)
        return False

    def _publish(self, trainer: Trainer, scalars: dict[str, float], started: float) -> None:
        """Pictures and numbers of the latest evaluation, for the loggers."""
        assert self.latest is not None
        board = Board(trainer, self.latest.step, f"gendiag/{self.name}")
        if self.evaluations >= self._next_picture and self._is_news(self.latest.readings) and self._draws(trainer):
            self._draw(trainer, board)
        seconds = time.monotonic() - started
        self.seconds += seconds
        try:
            board.scalars(scalars | {"seconds": seconds})
        except Exception as caught:
            # on rank 0 alone, so no matter for the others
            self._contain(caught, trainer, counts=False)

    def _draws(self, trainer: Trainer) -> bool:
        return self.draw_pictures and trainer.is_global_zero

    def _is_news(self, readings: dict[str, Reading]) -> bool:
        """Whether they are others than those that were drawn."""
        return not readings or readings != self._drawn

    def _draw(self, trainer: Trainer, board: Board) -> None:
        """Pictures of the latest evaluation, fewer and fewer: TensorBoard keeps ten of a tag."""
        assert self.latest is not None
        self._next_picture = self.evaluations + max(1, self.evaluations // 10)
        self._drawn = self.latest.readings
        try:
            self.draw(self.result, board)
        except Exception as caught:
            # on rank 0 alone, so no matter for the others
            self.draw_pictures = False
            self._contain(caught, trainer, counts=False)

    def _contain(self, error: Exception, trainer: Trainer, counts: bool = True) -> None:
        if self.on_error == "raise":
            raise error
        self._failures += counts
        off = self._failures >= FAILURES
        self.enabled = self.enabled and not off
        words = (
            f"{type(self).__name__} failed at step {self._last_step or 0} and the run goes on without it"
            f"{' from now on' if off else ' this time' if counts else ', with its pictures switched off'}: "
            f"{type(error).__name__}: {error}"
        )
        if off or not counts or self._failures == 1:
            warnings.warn(words, DiagnosticWarning, stacklevel=2)
            tell(Board(trainer, self._last_step or 0, f"gendiag/{self.name}"), "failure", words)

    def found_regions(self, probe: Probe, num_regions: int | None, images: int) -> RegionMap:
        """The regions of the reference's first images, found once for all monitors and all ranks."""
        assert probe.reference is not None
        if (num_regions, images) not in probe.maps:
            reference = as_images(probe.reference.images[:images])
            state = self.broadcast(
                probe.trainer, lambda: find_regions(reference.to(probe.module.device), num_regions).state_dict()
            )
            probe.maps[num_regions, images] = RegionMap.from_state_dict(state)
        return probe.maps[num_regions, images]

    def broadcast(self, trainer: Trainer, make: Any) -> Any:
        """What ``make()`` returns on rank 0, on every rank; its exception too."""
        made: tuple[Any, str | None] = (None, None)
        if trainer.is_global_zero:
            try:
                made = make(), None
            except Exception as error:
                made = None, f"{type(error).__name__}: {error}"
        value, failure = trainer.strategy.broadcast(made) if trainer.world_size > 1 else made
        if failure is not None:
            raise ValueError(failure)
        return value
