"""What the monitors of one trainer share: the module's copy, real images, schedule, loggers, and the history of all series."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import ReferenceType, WeakValueDictionary, ref

from lightning.pytorch.utilities import rank_zero_info

from lightning_gendiag.callbacks.logging import PREFIX, DiagnosticLogger, DiagnosticWarning, Layout
from lightning_gendiag.callbacks.planning import in_words, is_off, is_short, planned, rehearse
from lightning_gendiag.callbacks.schedule import Schedule
from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.detection.history import History
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.view import ModelView
from lightning_gendiag.model.warning import warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.callbacks.monitor import Monitor
    from lightning_gendiag.model.batches import Images


Purpose = Literal["series", "rehearsal", "decision"]
"""What an evaluation is for: the next value of all series, to measure its time, or to look closer at the newest value."""


class Listener(Protocol):
    """What is notified after evaluations, wherever it stands among the trainer's callbacks."""

    def on_evaluations(self, trainer: Trainer) -> None:
        """Acts on what monitors observed."""
        ...

    def restart(self, monitor: str) -> None:
        """Forgets what was learned of a monitor."""
        ...

    def needed(self, monitor: str) -> int:
        """Returns the number of evaluations of a monitor with which an alarm is possible."""
        ...


_SESSIONS: WeakValueDictionary[int, Session] = WeakValueDictionary()


class Session:
    """One trainer's monitors and what they share. Its first monitor hands Lightning's hooks over to it.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.monitors: list[Monitor[Any, Any]] = []
        self.listeners: list[Listener] = []
        self.default_adapter: ModelAdapter | None = None
        """The adapter of monitors that were given none, if no monitor was given one."""
        self.stopper: object | None = None
        """The ``CollapseStopping`` that the user added to the trainer."""
        self.automatic = False
        """Whether the trainer has a ``GenerativeDiagnostics``."""
        self.history = History()
        self.layout: Layout = {}
        self.schedule = Schedule(trainer)
        self._subject: Subject | None = None
        self._views: dict[ModelAdapter, ModelView] = {}
        self._chosen: dict[Monitor[Any, Any], ModelView] = {}
        self._unreadable: dict[ModelAdapter, Exception] = {}
        self.batches = 0
        """Number of training batches that began."""
        self._evaluated_at: dict[str, int] = {}
        self._followers: list[compat.Follower] = []
        self._planned = False
        self._said: float | None = None
        """Number of evaluations that the plan said, as long as it may be another."""
        self._defined = False
        self._ended = False

    @staticmethod
    def of(trainer: Trainer) -> Session:
        """Returns the session of a trainer, made when it is first asked for."""
        session = _SESSIONS.get(id(trainer))
        if session is None or session.trainer is not trainer:
            session = _SESSIONS[id(trainer)] = Session(trainer)
        return session

    # ---- joining ----

    def begin(self, module: LightningModule) -> None:
        """Prepares for a fit of a module; called by every callback of ours when it is set up, the first one decides."""
        if self._ended:
            # a second fit: who takes part says so again
            self._ended = False
            self.monitors, self.listeners, self.stopper, self.automatic = [], [], None, False
            self._chosen = {}
            for view in self._views.values():
                view.real.doubt()
        if self._subject is None or self._subject.trained is not module:
            self._subject = Subject(module, self.trainer)
            self._views, self._chosen, self.history, self._evaluated_at = {}, {}, History(), {}

    def join(self, monitor: Monitor[Any, Any]) -> None:
        """Adds a monitor.

        Raises:
            ValueError: If another monitor has its name.
        """
        if monitor in self.monitors:
            # the fit before this one was ended by an error
            self._ended = True
            self.begin(self.subject.trained)
        if any(other.name == monitor.name for other in self.monitors):
            raise ValueError(
                f"name must be unique among the monitors of a trainer, got {monitor.name!r} twice. "
                f"To fix this, pass {type(monitor).__name__}(name=...)."
            )
        self.monitors.append(monitor)
        self._chosen = {}

    def leave(self, monitor: Monitor[Any, Any]) -> None:
        """Removes a monitor that cannot work here."""
        if monitor in self.monitors:
            self.monitors.remove(monitor)
            self._chosen = {}

    def end(self) -> None:
        """Ends the fit: lets callbacks of others go on as they were."""
        self._ended = True
        for follower in self._followers:
            follower.undo()
        self._followers = []
        self._unreadable.clear()
        for view in self._views.values():
            view.expire()
        if self._subject is not None:
            self._subject.release()

    def leads(self, monitor: Monitor[Any, Any]) -> bool:
        """Returns whether a monitor hands the hooks over."""
        return bool(self.monitors) and self.monitors[0] is monitor

    @property
    def subject(self) -> Subject:
        """The module that is trained, and its copy."""
        if self._subject is None:
            raise RuntimeError("the session has no module before the trainer sets its callbacks up.")
        return self._subject

    def view_of(self, monitor: Monitor[Any, Any]) -> ModelView:
        """Returns the view of a monitor: of its adapter, or of the first one that another monitor was given."""
        if monitor not in self._chosen:
            self._chosen[monitor] = self._choose_view(monitor)
        return self._chosen[monitor]

    def _choose_view(self, monitor: Monitor[Any, Any]) -> ModelView:
        adapter = monitor.adapter or next((m.adapter for m in self.monitors if m.adapter), None)
        if adapter is None:
            adapter = self.default_adapter = self.default_adapter or ModelAdapter()
        if adapter not in self._views:
            self._views[adapter] = ModelView(adapter, self.subject, self.trainer)
        return self._views[adapter]

    @property
    def views(self) -> list[ModelView]:
        """All views."""
        return list(self._views.values())

    @property
    def limited(self) -> list[Monitor[Any, Any]]:
        """The enabled monitors whose time is limited."""
        return [monitor for monitor in self.monitors if monitor.enabled and monitor.max_overhead is not None]

    # ---- hooks, handed over by the first monitor ----

    def on_train_start(self) -> None:
        """Begins to count the time, and prepares Lightning for our keys."""
        self.subject.begin()
        self.schedule, self._planned, self._said, self._defined = Schedule(self.trainer), False, None, False
        found = (
            compat.following(callback, f"{PREFIX}/", self.is_fresh) for callback in compat.callbacks_of(self.trainer)
        )
        self._followers += [follower for follower in found if follower is not None]

    def on_train_batch_start(self, batch: Any) -> None:
        """Collects and shows real images before the training step can change them; what was drawn is outdated now."""
        started = time.monotonic()
        self.batches += 1
        self.subject.expire()
        watching = [monitor for monitor in self.monitors if monitor.enabled and monitor.sees_batches]
        for view in self._views.values():
            view.expire()
            own = [monitor for monitor in watching if self.view_of(monitor) is view]
            if own or view.real.is_collecting:
                self._read(view, batch, own)
        self.schedule.budget.note(time.monotonic() - started)

    def _read(self, view: ModelView, batch: Any, watching: list[Monitor[Any, Any]]) -> None:
        """Collects the real data of a batch, and shows them to the monitors that see it."""
        try:
            data = self._collect(view, batch) if view.real.is_collecting else None
            if data is None and watching:
                data = view.real.read_batch(batch)
            if data is not None:
                for monitor in watching:
                    monitor.watch(view, data)
        except Exception as error:
            if any(monitor.on_error == "raise" for monitor in self._users(view)):
                raise
            # raised at the next evaluation, where all processes can agree on it
            self._unreadable[view.adapter] = error

    def _collect(self, view: ModelView, batch: Any) -> Images | None:
        """Collects the real data of a batch, and returns them, unless nothing needs them or there are enough."""
        if not self._users(view):
            # which may show that latents have no prior, so that real data are needed
            view.real.see(batch)
        return view.real.collect(batch) if self._users(view) else None

    def _users(self, view: ModelView) -> list[Monitor[Any, Any]]:
        """The monitors that need the real data of a view."""
        return [m for m in self.monitors if m.enabled and m.needs_reference and self.view_of(m) is view]

    def on_train_batch_end(self) -> None:
        """Evaluates what is due by steps."""
        if not self._defined:
            self._defined = True
            self._define_keys()
        by_steps = any(monitor.every_n_train_steps is not None for monitor in self.monitors)
        if by_steps and compat.has_stepped(self.trainer):
            self._evaluate(compat.batch_step(self.trainer, epoch_over=False), epoch_over=False)

    def on_train_epoch_end(self) -> None:
        """Evaluates what is due by epochs."""
        self._evaluate(compat.batch_step(self.trainer, epoch_over=True), epoch_over=True)
        for view in self._views.values():
            view.real.end_epoch()

    def on_train_end(self) -> None:
        """Logs the panels of the last evaluation, and the charts where the user wrote others meanwhile.

        A ``ModelCheckpoint`` that was to follow evaluations and has saved nothing is named in a warning.
        """
        # once for all monitors, since what the user wrote is read from the files
        has_new_charts = [monitor.log_last() for monitor in self.monitors]
        for follower in self._followers:
            if follower.lacks_checkpoint() and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._say_unsaved(follower.key)
        try:
            self.logger(0).write_layout(only_merged=not any(has_new_charts))
        except Exception as error:
            warn(f"the charts could not be written: {error}", category=DiagnosticWarning)

    def _say_unsaved(self, key: str) -> None:
        """Warns that a metric was monitored for checkpoints and none was saved."""
        known = listed(sorted(self._evaluated_at))
        if key in self._evaluated_at:
            reason = "none of its evaluations came when it saves"
            advice = (
                "pass it neither every_n_train_steps, train_time_interval nor every_n_epochs, so that it follows them"
            )
        else:
            reason = "the metric was not evaluated"
            advice = (
                f"monitor another one, such as {known}" if known else "evaluate earlier, with every_n_train_steps=..."
            )
        warn(
            f"ModelCheckpoint(monitor={key!r}) saved no checkpoint, since {reason}. To fix this, {advice}.",
            category=DiagnosticWarning,
        )

    # ---- evaluating ----

    def _evaluate(self, step: int, epoch_over: bool) -> None:
        enabled, started = [monitor for monitor in self.monitors if monitor.enabled], time.monotonic()
        chosen = self.schedule.choose(enabled, step, epoch_over)
        if not chosen:
            self.schedule.budget.note(time.monotonic() - started)
            return
        self.schedule.budget.charge(time.monotonic() - started, ready=False)
        for view in {id(view): view for view in map(self.view_of, chosen)}.values():
            if view.real.is_of_other_data():
                self._restart(view)
            if any(self.view_of(monitor) is view for monitor in chosen if not monitor.watches_batches):
                view.agree_on_prior()
        limited = [monitor for monitor in chosen if monitor.max_overhead is not None]
        plans = bool(limited) and not self._planned
        if plans and not self._is_ready(limited, epoch_over):
            # together, once all have their real images
            plans, chosen = False, [monitor for monitor in chosen if monitor not in limited]
        if plans:
            chosen = rehearse(self, chosen, step, epoch_over)
            plans = any(monitor in limited for monitor in chosen)
        for monitor in chosen:
            is_first = monitor.latest is None
            seconds = self.timed(monitor, step, epoch_over)
            if seconds is not None and not is_first:
                self.schedule.note(monitor, seconds)
        for monitor in chosen:
            self._unreadable.pop(self.view_of(monitor).adapter, None)
        started, spent = time.monotonic(), self.schedule.budget.spent
        for listener in self.listeners:
            listener.on_evaluations(self.trainer)
        # without full evaluations that they asked for, which are charged already
        closer = self.schedule.budget.spent - spent
        self.schedule.budget.charge(time.monotonic() - started - closer, ready=False)
        if plans:
            self._planned = True
            self._say_plan(step)
        elif self._said is not None and limited and (off := is_off(self, self._said)) is not None:
            if off:
                self._say_plan(step, anew=True)
            self._said = None
        evaluated = tuple(f"{PREFIX}/{monitor.name}/" for monitor in chosen)
        for follower in self._followers:
            if follower.act is not None and follower.key.startswith(evaluated) and self.is_fresh(follower.key):
                follower.act(self.trainer)

    def _is_ready(self, monitors: list[Monitor[Any, Any]], epoch_over: bool) -> bool:
        """Whether all monitors have their real images, or images that cannot be read, on any process."""
        short = is_short(self, monitors)
        short = self.trainer.strategy.broadcast(short) if self.trainer.world_size > 1 else short
        self.schedule.is_short = short
        for view in self.views:
            view.real.is_short = short
        try:
            # all processes ask together
            ready = [self.view_of(monitor).real.ready(epoch_over) for monitor in monitors if monitor.needs_reference]
        except Exception:
            # raised again where each monitor contains it
            return True
        unreadable = any(self.view_of(monitor).adapter in self._unreadable for monitor in monitors)
        return all(ready) or not self.trainer.strategy.reduce_boolean_decision(not unreadable, all=True)

    def timed(
        self, monitor: Monitor[Any, Any], step: int, epoch_over: bool, purpose: Purpose = "series"
    ) -> float | None:
        """Lets a monitor evaluate, and returns the seconds without panels; None if there was nothing to evaluate."""
        started = time.monotonic()
        view, ready = self.view_of(monitor), True
        draws = purpose == "series" and (monitor.max_overhead is None or monitor.draws)
        view.thorough = draws or purpose == "decision"
        try:
            if not monitor.watches_batches:
                view.refresh()
            ready = monitor.evaluate(view, step, epoch_over, self._unreadable.get(view.adapter), purpose)
        finally:
            seconds = time.monotonic() - started
            if monitor.max_overhead is not None:
                self.schedule.budget.charge(seconds, ready)
                if monitor.drawing_seconds:
                    self.schedule.note_drawing(monitor, monitor.drawing_seconds)
        return seconds - monitor.drawing_seconds if ready else None

    def look_closer(self, monitor: Monitor[Any, Any]) -> bool:
        """Lets a monitor with a limit evaluate once more, in place of its newest evaluation, without that limit.

        Returns:
            Whether the newest evaluation is another now.
        """
        if monitor.max_overhead is None or monitor.watches_batches:
            return False
        latest = monitor.latest
        with self.view_of(monitor).looking_closer():
            self.timed(monitor, monitor.last_step or 0, False, "decision")
        return monitor.latest is not latest

    def note_evaluation(self, keys: Iterable[str]) -> None:
        """Notes which keys were evaluated for the weights that the module has now."""
        self._evaluated_at.update(dict.fromkeys(keys, self.batches))

    def is_fresh(self, key: str) -> bool:
        """Returns whether a key of ours was evaluated for the weights that the module has now."""
        return self._evaluated_at.get(key) == self.batches

    def _define_keys(self) -> None:
        """Puts the keys that are known into ``trainer.callback_metrics`` as nan, so that callbacks find them at any time."""
        for monitor in self.monitors:
            names = monitor.known_scalars() if monitor.enabled else []
            tags = dict.fromkeys((f"{PREFIX}/{monitor.name}/{name}" for name in names), float("nan"))
            compat.log_values(self.subject.trained, tags)

    def restart(self, monitor: Monitor[Any, Any]) -> None:
        """Forgets what was learned of a monitor, everywhere."""
        monitor.reset()
        self.history.clear(monitor.name)
        for listener in self.listeners:
            listener.restart(monitor.name)

    def _restart(self, view: ModelView) -> None:
        """Begins anew with the data that this fit brings."""
        view.forget_reference()
        self._planned = False
        for monitor in self.monitors:
            if self.view_of(monitor) is view:
                self.restart(monitor)
        rank_zero_info("The training data are others than before: the diagnostics begin anew with these.")

    def _say_plan(self, step: int, anew: bool = False) -> None:
        text, self._said = in_words(self, anew), planned(self)
        rank_zero_info(text)
        self.logger(step).log_text("plan", text)

    def logger(self, step: int, name: str = "") -> DiagnosticLogger:
        """Returns a logger for a monitor, or for what is of none."""
        return DiagnosticLogger(self.trainer, step, name, self.layout)

    # ---- checkpoints ----

    def state_dict(self, monitor: Monitor[Any, Any]) -> dict[str, Any]:
        """Returns what a monitor's checkpoint holds of the session; images that monitors share are stored once."""
        view = self.view_of(monitor)
        history = self.history.state_dict(monitor.name)
        return {"reference": view.real.state_dict(), "history": history, "amounts": dict(view.amounts)}

    def load_state_dict(self, monitor: Monitor[Any, Any], state: dict[str, Any]) -> None:
        """Takes over the images and the series of a checkpoint."""
        self.history.load_state_dict(monitor.name, state["history"])
        view = self.view_of(monitor)
        view.real.load_state_dict(state["reference"])
        view.amounts = dict(state["amounts"])


class Member:
    """What takes part in a trainer's session; a copy of it, in memory or in a file, takes part in none."""

    _session: Session | None = None
    _module: ReferenceType[LightningModule] | None = None

    @property
    def session(self) -> Session:
        """What the monitors of the trainer share.

        Raises:
            RuntimeError: Before the trainer has set its callbacks up.
        """
        if self._session is None:
            raise RuntimeError(f"{type(self).__name__} is not attached to a trainer yet.")
        return self._session

    def enter(self, trainer: Trainer, module: LightningModule) -> bool:
        """Takes part in the session of a trainer, and returns whether its module is another than before."""
        self._session = Session.of(trainer)
        self._session.begin(module)
        is_other = self._module is not None and self._module() is not module
        self._module = ref(module)
        return is_other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_session", "_module")}
