"""Stops a run when a part of the model collapses, and says which, since when, and how significant it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from lightning_gendiag.callbacks.alerts import Alerts, without_secret
from lightning_gendiag.callbacks.checkpoints import last_good_checkpoint
from lightning_gendiag.callbacks.logging import PREFIX, DiagnosticWarning
from lightning_gendiag.callbacks.session import Member
from lightning_gendiag.detection.alarm import Alarm, counted
from lightning_gendiag.detection.history import Evaluation
from lightning_gendiag.detection.report import FILE, report
from lightning_gendiag.detection.rules import DATA, Judge
from lightning_gendiag.functional.text import representation
from lightning_gendiag.model.warning import warn
from lightning_gendiag.tensorboard.records import REPORT, Record

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.callbacks.monitor import Monitor

REPORT_GROWTH = 0.1
"""The tab gets the report anew each time the number of evaluations has grown by this share, since it names that number."""


class CollapseWarning(UserWarning):
    """A part of the model collapsed."""


class CollapseStopping(Member, EarlyStopping):
    """Watches what the monitors of a trainer observe, and stops the run when a part of the model collapses.

    Each series (each region, class and dimension, and the aggregate) is judged against its own level and its own
    fluctuation by a :class:`~lightning_gendiag.detection.Detector`, once at each evaluation. When several series fall at
    once the components are named, or the aggregate where three quarters of them fall. Each alarm is a warning, and text
    and a picture in TensorBoard under a tag of its own (``gendiag/alarm_1``, ...).

    What stops a run must matter as a whole: an alarm about a region, a class or dimensions stops it only if all that is
    generated became worse too, by the similarity of the whole image where it is monitored. Other alarms are reported.

    Args:
        action: ``"stop"`` sets ``trainer.should_stop``, agreed by all processes; ``"warn"`` only reports.
        false_alarm_rate: Probability of a false alarm at one evaluation of one monitor, over all its series, for
            independent normal fluctuations.
        warmup_evaluations: Number of evaluations to learn from before the first judgement.
        patience: Number of further evaluations that an alarm must last before it stops the run; by default each series'
            own: 4 for single classes, which come and go while a GAN learns, and 0 for all others.
        on_alarm: Called with each alarm when it is raised, and once more if it has lasted long enough to stop the run; on the
            first process.
        webhook: Address to which each alarm is posted as JSON, such as that of a channel of Slack: ``text`` for people,
            ``run``, and ``alarm`` with its fields. At most ten an hour, as with alerts of loggers: an alarm is also an alert
            of W&B's and Trackio's runs.

    Attributes:
        alarms: All alarms, in the order in which they were raised.

    Raises:
        ValueError: If an argument is out of its range; in ``on_fit_start`` if there is no monitor to watch.

    Example:
        >>> stopping = CollapseStopping("warn", false_alarm_rate=1e-4)  # beside monitors, in a Trainer's callbacks
        >>> stopping.alarms
        []
    """

    def __init__(
        self,
        action: Literal["stop", "warn"] = "stop",
        false_alarm_rate: float = 3e-4,
        warmup_evaluations: int = 6,
        patience: int | None = None,
        on_alarm: Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        webhook: str | None = None,
    ) -> None:
        super().__init__(monitor=PREFIX, strict=False, check_on_train_epoch_end=True)
        if action not in ("stop", "warn"):
            raise ValueError(f"action must be 'stop' or 'warn', got {action!r}.")
        if patience is not None and patience < 0:
            raise ValueError(f"patience must be 0 or more, got {patience}.")
        self.action, self.false_alarm_rate, self.warmup_evaluations = action, false_alarm_rate, warmup_evaluations
        self.judge = Judge(false_alarm_rate, warmup_evaluations, patience)
        self.alerts = Alerts(on_alarm, webhook)
        self._shown: object = None
        self._next_shown = 0

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms, in the order in which they were raised."""
        return self.judge.alarms

    @property
    def state_key(self) -> str:
        """One for each action."""
        return f"{type(self).__qualname__}[{self.action}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the trainer's session."""
        if stage == "fit":
            self.join(trainer, pl_module)
            self.session.stopper = self

    def join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the session of a trainer, and begins anew where its module is another than before."""
        if self.enter(trainer, pl_module):
            self.judge.clear()
        # this fit may have another log folder
        self._shown, self._next_shown = None, 0
        if self not in self.session.listeners:
            self.session.listeners.append(self)

    def restart(self, monitor: str) -> None:
        """Forgets what was learned of a monitor, which begins anew with other data."""
        self.judge.clear(monitor)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that there is something to watch."""
        if not self.session.monitors and not self.session.automatic:
            raise ValueError(
                "CollapseStopping must have a monitor to watch, got none among the trainer's callbacks. "
                "To fix this, add CosineMeanSimilarityMonitor()."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: the session calls :meth:`on_evaluations`."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does nothing: no monitor evaluates there."""

    def on_evaluations(self, trainer: Trainer) -> None:
        """Judges what monitors observed since it was last called, and stops the run where that is asked for."""
        raised: list[tuple[Monitor[Any, Any], Alarm]] = []
        for monitor in self.session.monitors:
            latest = monitor.latest
            if latest is not None and latest.number > self.judge.evaluations.get(monitor.name, 0):
                raised += [(monitor, alarm) for alarm in self._judged(monitor, latest)]
        critical = self.judge.stopping(self.session.history)
        for number, (monitor, alarm) in enumerate(raised, len(self.alarms) - len(raised) + 1):
            alarm.also_changed = self.judge.also_changed(alarm)
            alarm.tags = [f"{PREFIX}/alarm_{number}/picture", f"{PREFIX}/{monitor.name}/panel"]
            self._log(trainer, monitor, alarm, number)
        for alarm in critical:
            # one that is new has said so
            if all(alarm is not new for _, new in raised):
                lasted = f"The change has lasted. {self._effect(trainer, alarm)}"
                warn(f"{alarm.message} {lasted}", category=CollapseWarning)
                self.alerts.send(trainer, alarm, lasted)
        if (raised or critical) and trainer.is_global_zero:
            self._write_report(trainer)
        self._show_report(trainer)
        if self.action != "stop" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.strategy.reduce_boolean_decision(bool(critical), all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = " ".join(alarm.message for alarm in critical) or None

    def _judged(self, monitor: Monitor[Any, Any], latest: Evaluation) -> list[Alarm]:
        """Returns the alarms of the newest evaluation; where a small one raises any, a full one follows and decides."""
        history, before = self.session.history, self.judge.snapshot(monitor.name)
        alarms = self.judge.update(monitor.name, latest, history, monitor.contributions)
        if alarms and self.session.look_closer(monitor) and monitor.latest is not None:
            self.judge.restore(monitor.name, before)
            alarms = self.judge.update(monitor.name, monitor.latest, history, monitor.contributions)
        return alarms

    def needed(self, monitor: str) -> int:
        """Returns the number of evaluations of a monitor with which an alarm is possible."""
        return self.judge.needed(monitor)

    def _effect(self, trainer: Trainer, alarm: Alarm) -> str:
        """What an alarm means for the run, in a sentence."""
        if self.action != "stop" or trainer.fast_dev_run or alarm.stop == "never":  # type: ignore[attr-defined]
            return "Training continues."
        if alarm.is_critical:
            return "Training stops."
        patience = self.judge.patience_of(alarm)
        conditions = [f"the change lasts for {counted(patience, 'more evaluation')}"] * bool(patience)
        conditions += ["all that is generated becomes worse as well"] * (alarm.stop == "whole")
        return f"Training continues, and stops if {' and '.join(conditions)}."

    # ---- reporting ----

    def report(self, trainer: Trainer | None = None) -> dict[str, Any]:
        """Returns the state of the run as plain Python that JSON takes.

        Args:
            trainer: To name the last checkpoint from before the first alarm that has not recovered.

        Returns:
            See :func:`lightning_gendiag.detection.report.report`.
        """
        open_alarms = self.judge.open_alarms()
        checkpoint = None
        if trainer is not None and open_alarms:
            checkpoint = last_good_checkpoint(trainer, min(alarm.since for alarm in open_alarms))
        monitors = [] if self._session is None else self._session.monitors
        evaluations = {monitor.name: 0 for monitor in monitors if monitor.enabled} | self.judge.evaluations
        needed = {name: self.judge.needed(name) for name in evaluations}
        of_data = {DATA, *(monitor.name for monitor in monitors if monitor.watches_batches)}
        return report(self.alarms, evaluations, needed, checkpoint, self.judge.bad_now(), of_data)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report of the whole run."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write_report(trainer, over=True)
            self.alerts.finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the report of a run that was interrupted, unless it was before the first evaluation."""
        if self.judge.evaluations and self._session is not None:
            self.on_train_end(trainer, pl_module)

    def _write_report(self, trainer: Trainer, over: bool = False) -> None:
        """Writes the report as JSON beside the loggers' files, and as text to TensorBoard."""
        try:
            state = self.report(trainer)
            paths = []
            for logger in trainer.loggers:
                folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
                if isinstance(folder, (str, Path)) and Path(folder).is_dir():
                    paths.append(Path(folder) / FILE)
                    paths[-1].write_text(json.dumps(state, indent=1, default=str) + "\n")
            board = self.session.logger(max((alarm.step for alarm in self.alarms), default=0))
            board.log_text("report", state["summary"])
            self._show(state)
            board.flush()
            if over:
                written = f" The report is in {', '.join(map(str, paths))}." if paths else ""
                rank_zero_info(f"{state['summary']}{written}")
        except Exception as error:
            warn(f"the report could not be written: {error}", category=DiagnosticWarning)

    def _show_report(self, trainer: Trainer) -> None:
        """Writes the report for the tab of TensorBoard where it says something else than before, and now and then."""
        if not trainer.is_global_zero:
            return
        try:
            # without a search for checkpoints
            count = max(self.judge.evaluations.values(), default=0)
            if self._said(self.report()) != self._shown or count >= self._next_shown:
                self._show(self.report(trainer))
        except Exception as error:
            warn(f"the report could not be written: {error}", category=DiagnosticWarning)

    def _show(self, state: dict[str, Any]) -> None:
        """Writes a report for the tab, and notes what it says."""
        count = max(self.judge.evaluations.values(), default=0)
        self._shown, self._next_shown = self._said(state), count + max(1, int(count * REPORT_GROWTH))
        board = self.session.logger(max((m.last_step or 0 for m in self.session.monitors), default=0))
        if board.has_board:
            board.log_record(REPORT, Record(state))

    def _said(self, state: dict[str, Any]) -> object:
        """What the tab must show anew once it is another, such as an alarm that recovered."""
        return state["state"], state["bad"], [(alarm.recovered, alarm.is_critical) for alarm in self.alarms]

    def _log(self, trainer: Trainer, monitor: Monitor[Any, Any], alarm: Alarm, number: int) -> None:
        if not trainer.is_global_zero:
            return
        effect = self._effect(trainer, alarm)
        warn(f"{alarm.message} {effect}", category=CollapseWarning)
        self.alerts.send(trainer, alarm, effect)
        logger = self.session.logger(alarm.step, f"alarm_{number}")
        try:
            rows = "".join(f"\n| {name} | {share:.0%} |" for name, share in alarm.contributions.items())
            table = f"\n\n| part | contribution to the drop |\n|---|---|{rows}" if rows else ""
            logger.log_text("message", f"**{alarm.message}** {effect}{table}")
            monitor.log_alarm_picture(alarm, logger)
            logger.flush()
        except Exception as error:
            warn(f"the alarm could not be plotted: {error}", category=DiagnosticWarning)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, and Lightning's own."""
        return {**super().state_dict(), **self.judge.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's state."""
        super().load_state_dict(state_dict)
        self.judge.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return representation(
            self,
            patience=self.judge.patience,
            on_alarm=self.alerts.on_alarm,
            webhook=without_secret(self.alerts.webhook),
        )
