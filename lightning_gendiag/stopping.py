"""Stop a run when a part of the model collapses, and say which, since when and how sure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from lightning_gendiag.board import Board
from lightning_gendiag.detectors import DETECTORS, LIMIT, Detector, Verdict
from lightning_gendiag.monitor import DiagnosticWarning, Evaluation, Monitor
from lightning_gendiag.verdict import last_good, written

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

MERGED = 3
"""More parts than these that fall at once are told as one finding."""

HISTORY = 64
"""Values that are kept of each series."""


class CollapseWarning(UserWarning):
    """A part of the model collapsed."""


@dataclass
class Finding:
    """A collapse: what, where, since when, how sure."""

    step: int
    """At which it was found, on the axis of the logger."""
    epoch: int
    diagnostic: str
    """The monitor's name, as in its tags."""
    where: str
    """A region, a class, a dimension, or the whole."""
    before: float
    """The diagnostic's value there before the fall: the median of the values that were its level."""
    after: float
    """Its value now."""
    score: float
    """How clearly it fell, in standard deviations of its own fluctuation."""
    since: int
    """The step at which the fall began."""
    evaluations_to_false_alarm: float
    """Mean number of healthy evaluations before chance alone shows as much, for independent normal fluctuations."""
    shares: dict[str, float] = field(default_factory=dict)
    """How the fall of the whole divides among the parts; they add to one."""
    question: str = ""
    """What the diagnostic measures."""
    fault: str = "collapsed"
    """What happened, as a verb."""
    series: str = ""
    """The series whose detector raised the alarm."""
    names: list[str] = field(default_factory=list)
    """The readings that it is about, the clearest first; ``where`` has them in words."""
    words: str = ""
    """What is said instead of how far it fell, where a rule decided and no fluctuation."""
    recovered: int | None = None
    """The step at which it was back at its level; None while it is not."""
    moved: list[str] = field(default_factory=list)
    """What else left its level at the same time, as ``diagnostic: series``; the clearest first."""
    number: int = 0
    """Which of the monitor's evaluations it was found at."""
    look_at: list[str] = field(default_factory=list)
    """Tags on TensorBoard that show it."""

    def __str__(self) -> str:
        at = f"at epoch {self.epoch} (step {self.step})"
        if self.words:
            return f"{self.words}, found {at}."
        if not math.isfinite(self.after):
            return f"{self.where} collapsed: {self.question} is no number any more {at}, after {self.before:.3f}."
        odds = self.evaluations_to_false_alarm
        sure = f"{odds:,.0f}" if odds < 1e6 else "more than a million"
        words = (
            f"{self.where} {self.fault}: {self.question} {'fell' if self.after < self.before else 'rose'} from "
            f"{self.before:.3f} to {self.after:.3f}, found {at}, since step {self.since}. That is {self.score:.1f} "
            f"standard deviations of its own fluctuation; chance alone shows as much once in {sure} evaluations."
        )
        if [self.where] == self.names[:1] and len(self.names) > 1:
            words += f" It shows in {_listed(self.names[1:], 12)}."
        share = sum(self.shares.get(name, 0.0) for name in self.names if self.names[0] in self.shares)
        if share > 0:
            # more than all where other parts improved meanwhile
            words += f" It carries {min(share, 1.0):.0%} of the fall of the whole."
        return words


class CollapseStopping(EarlyStopping):
    """Watch what the monitors of a trainer find, and stop the run when a part of the model collapses.

    Each series (each region, and the whole) is judged against its own level and its own fluctuation by a
    :class:`~lightning_gendiag.detectors.Detector`, at fresh evaluations only. When several series fall at once the
    parts are named, or the whole where three quarters of them fall. Each finding is told in a warning, and as
    text and picture in TensorBoard under a tag of its own (``gendiag/alarm_1``, ...).

    Args:
        action: ``"stop"`` sets ``trainer.should_stop``, agreed by all processes; ``"warn"`` only reports.
        false_alarm_rate: chance of a false alarm at one evaluation of one diagnostic, over all its series, for
            independent normal fluctuations.
        warmup_evaluations: evaluations to learn from before the first judgement.
        detector: of each series: ``"change_point"``, ``"cusum"`` or ``"page_hinkley"``.

    Attributes:
        findings: all that was found, in order.

    Raises:
        ValueError: if an argument is out of its range; before training starts, where there is no monitor to watch.

    Example:
        >>> stopping = CollapseStopping("warn", false_alarm_rate=1e-4)  # after monitors, among a Trainer's callbacks
        >>> stopping.findings
        []
    """

    def __init__(
        self,
        action: Literal["stop", "warn"] = "stop",
        false_alarm_rate: float = 3e-4,
        warmup_evaluations: int = 6,
        detector: Literal["change_point", "cusum", "page_hinkley"] = "change_point",
    ) -> None:
        super().__init__(monitor="gendiag", strict=False, check_on_train_epoch_end=True)
        if action not in ("stop", "warn"):
            raise ValueError(f"action must be 'stop' or 'warn', got {action!r}.")
        if detector not in DETECTORS:
            raise ValueError(f"detector must be one of {', '.join(DETECTORS)}, got {detector!r}.")
        self.detector = detector
        # refused here and not at the first evaluation
        DETECTORS[detector](false_alarm_rate, warmup=warmup_evaluations)
        self.action, self.false_alarm_rate, self.warmup_evaluations = action, false_alarm_rate, warmup_evaluations
        self.findings: list[Finding] = []
        self._seen: dict[str, int] = {}
        self._detectors: dict[str, dict[str, Detector]] = {}
        self._history: dict[str, dict[str, list[tuple[int, int, float]]]] = {}
        self._deviations: dict[str, dict[str, float]] = {}

    @property
    def state_key(self) -> str:
        """One, whatever is monitored."""
        return f"{type(self).__qualname__}[{self.action}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say so where there is nothing to watch."""
        if stage == "fit" and not any(isinstance(c, Monitor) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "CollapseStopping must have a monitor to watch, got none among the trainer's callbacks. "
                "To fix this, add CosineMeanSimilarityMonitor()."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge what monitors on a schedule of steps found."""
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge what monitors on a schedule of epochs found; Lightning calls stoppers after other callbacks."""
        self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: no monitor evaluates there."""

    def _look(self, trainer: Trainer) -> None:
        found: list[tuple[Monitor, Finding]] = []
        fresh: list[Monitor] = []
        for monitor in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(monitor, Monitor) and monitor.latest is not None:
                latest = monitor.latest
                if latest.number > self._seen.get(monitor.state_key, 0):
                    fresh.append(monitor)
                    self._seen[monitor.state_key] = latest.number
                    found += [(monitor, finding) for finding in self.judge(monitor, latest)]
        for number, (monitor, finding) in enumerate(found, len(self.findings) - len(found) + 1):
            finding.moved = self._moved(finding)
            finding.look_at = [f"gendiag/alarm_{number}/picture", f"gendiag/{monitor.name}/panel"]
            self._report(trainer, monitor, finding, number)
        if found and trainer.is_global_zero:
            self._write(trainer)
        if not fresh or self.action != "stop" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        grave = [
            finding
            for monitor in fresh
            for finding in self.findings
            if finding.diagnostic == monitor.name and finding.recovered is None and self._is_time(monitor, finding)
        ]
        if trainer.strategy.reduce_boolean_decision(bool(grave), all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = " ".join(map(str, grave)) or None

    def _is_time(self, monitor: Monitor, finding: Finding) -> bool:
        """Whether a finding stops the run at the monitor's latest evaluation: at once, or when it has lasted."""
        assert monitor.latest is not None
        return monitor.latest.number == finding.number + self._lasting(monitor, finding)

    def _lasting(self, monitor: Monitor, finding: Finding) -> int:
        """How many further evaluations a finding must last to stop the run; the whole's none."""
        assert monitor.latest is not None
        reading = monitor.latest.readings.get(finding.names[0])
        return monitor.lasting if reading is not None and reading.kind == "part" else 0

    # ---- the decision, over floats ----

    def judge(self, monitor: Monitor, evaluation: Evaluation) -> list[Finding]:
        """Take in one evaluation and tell what it newly shows; the same on every process, since the numbers are.

        Args:
            monitor: whose evaluation it is.
            evaluation: later than all before.

        Returns:
            New findings, those first that carry most of the fall; also added to ``findings``.
        """
        key, readings = monitor.state_key, evaluation.readings
        detectors = self._detectors.setdefault(key, {})
        history = self._history.setdefault(key, {})
        verdicts: dict[str, Verdict] = {}
        for where, reading in readings.items():
            if where not in detectors:
                detectors[where] = self._detector(monitor, reading.kind, len(readings))
            verdicts[where] = detectors[where].update(evaluation.number, reading.badness)
            history.setdefault(where, []).append((evaluation.number, evaluation.step, reading.value))
            del history[where][:-HISTORY]
        for finding in self.findings:
            verdict = verdicts.get(finding.series) if finding.diagnostic == monitor.name else None
            if finding.recovered is None and verdict is not None and verdict.closed:
                finding.recovered = evaluation.step
        self._deviations[monitor.name] = {where: verdict.deviation for where, verdict in verdicts.items()}
        found = self._findings(monitor, evaluation, verdicts, history)
        # first the part that carries most of the fall
        found.sort(key=lambda finding: -finding.shares.get(finding.names[0], 1.0))
        self.findings += found
        return found

    def _detector(self, monitor: Monitor, kind: str, series: int) -> Detector:
        # Bonferroni's correction for many series
        rate = self.false_alarm_rate / max(series, 1)
        return DETECTORS[self.detector](
            rate, warmup=self.warmup_evaluations, grain=monitor.grain, tolerance=monitor.tolerance.get(kind, 0.0)
        )

    def _findings(
        self,
        monitor: Monitor,
        evaluation: Evaluation,
        verdicts: dict[str, Verdict],
        history: dict[str, list[tuple[int, int, float]]],
    ) -> list[Finding]:
        readings = evaluation.readings
        parts = [name for name, reading in readings.items() if reading.kind == "part"]
        whole = next((name for name, reading in readings.items() if reading.kind == "whole"), None)
        opened = [name for name in parts if verdicts[name].opened]
        open_now = [f for f in self.findings if f.diagnostic == monitor.name and f.recovered is None]
        known = {name for finding in open_now for name in finding.names}

        def told(names: list[str], series: str) -> Finding:
            verdict, reading = verdicts[series], readings[names[0]]
            since = evaluation.number if verdict.since is None else verdict.since
            before = {
                name: median(
                    [value for number, _, value in held if number < since and math.isfinite(value)][-16:] or [math.nan]
                )
                for name, held in history.items()
            }
            after = {name: reading.value for name, reading in readings.items()}
            return Finding(
                step=evaluation.step,
                epoch=evaluation.epoch,
                diagnostic=monitor.name,
                where=_listed([readings[name].where or name for name in (names if names[0] != whole else [names[0]])]),
                before=before[names[0]],
                after=after[names[0]],
                score=verdict.score,
                since=next((step for number, step, _ in history[series] if number == since), evaluation.step),
                evaluations_to_false_alarm=verdict.evaluations_to_false_alarm,
                shares=monitor.shares(before, after),
                question=reading.question or monitor.question,
                fault=reading.fault,
                words=reading.words if math.isinf(reading.badness) else "",
                series=series,
                names=names,
                number=evaluation.number,
            )

        others = [name for name, r in readings.items() if r.kind == "other" and verdicts[name].opened]
        findings = [told([name], name) for name in others if name not in known]
        if any(not math.isfinite(readings[name].badness) for name in others):
            # what the parts show then is a consequence
            return findings
        # a fault of the whole may show in one part an evaluation before it does in the others
        fallen = [name for name in parts if verdicts[name].active or verdicts[name].deviation > LIMIT]
        if whole is not None and whole in known:
            return findings
        if whole is not None and opened and len(parts) > 1 and len(fallen) >= 0.75 * len(parts):
            series = whole if verdicts[whole].active else max(opened, key=lambda name: verdicts[name].score)
            return [*findings, told([whole, *fallen], series)]
        new = [name for name in opened if name not in known]
        if len(new) > MERGED:
            new.sort(key=lambda name: -verdicts[name].score)
            findings.append(told(new, new[0]))
        else:
            findings += [told([name], name) for name in new]
        if whole is not None and verdicts[whole].opened and not opened:
            finding = told([whole], whole)
            shares = finding.shares
            # the whole may tell before a part's own fluctuation does: then the part that carries the fall is named
            lead = max(shares, key=shares.__getitem__) if shares else whole
            if sum(shares.get(name, 0.0) for name in known) < 0.5:
                findings.append(told([lead], whole) if shares.get(lead, 0.0) >= 0.5 else finding)
        return findings

    def _moved(self, finding: Finding, most: int = 6) -> list[str]:
        """What else lies far from its level now."""
        far = [
            (deviation, f"{name}: {where}")
            for name, series in self._deviations.items()
            for where, deviation in series.items()
            if deviation > LIMIT and not (name == finding.diagnostic and where in finding.names)
        ]
        return [words for _, words in sorted(far, reverse=True)[:most]]

    # ---- telling people ----

    def verdict(self, trainer: Trainer | None = None) -> dict[str, Any]:
        """How things stand, as plain Python that JSON takes.

        Args:
            trainer: to name the last checkpoint from before the first finding that did not recover.

        Returns:
            ``healthy`` (bool, None after too few looks to tell), ``words`` (one paragraph), ``findings`` (a list of
            dictionaries with the fields of :class:`Finding` and their ``words``), ``evaluations`` (by diagnostic),
            ``last_good_checkpoint`` (a path or None).
        """
        open_now = [finding for finding in self.findings if finding.recovered is None]
        good = last_good(trainer, min(f.since for f in open_now)) if trainer is not None and open_now else None
        looks = max(self._seen.values(), default=0)
        judged = bool(self.findings) or looks > self.warmup_evaluations
        if not judged:
            words = (
                f"Not judged: {looks} looks were taken, and {self.warmup_evaluations + 1} are needed to tell a fall. To look "
                "more often, pass max_share=None, or every_n_train_steps."
            )
        elif not self.findings:
            words = f"Healthy: nothing fell from its level in {looks} looks."
        else:
            words = " ".join(str(finding) for finding in open_now or self.findings)
            if not open_now:
                words = f"Healthy: what fell came back to its level. {words}"
            told = {f"{finding.diagnostic}: {name}" for finding in open_now for name in finding.names}
            moved = [name for name in _once(name for f in open_now for name in f.moved) if name not in told]
            words += f" What else moved: {_listed(moved)}." if moved else ""
            words += f" To look at: {_listed(_once(tag for f in open_now for tag in f.look_at))}." if open_now else ""
            words += f" The last good checkpoint is {good}." if good else ""
        return {
            "healthy": not open_now if judged else None,
            "words": words,
            "findings": [{**asdict(finding), "said": str(finding)} for finding in self.findings],
            "evaluations": dict(self._seen),
            "last_good_checkpoint": good,
        }

    def _write(self, trainer: Trainer, over: bool = False) -> None:
        """The verdict as JSON beside the loggers' files, and as text on TensorBoard; once the run is over, told too."""
        try:
            verdict = self.verdict(trainer)
            paths = written(trainer, verdict)
            board = Board(trainer, max((f.step for f in self.findings), default=0), "gendiag")
            board.text("verdict", verdict["words"])
            board.flush()
            if over:
                rank_zero_info(f"Verdict: {verdict['words']}" + f" Written to {', '.join(paths)}." * bool(paths))
        except Exception as error:
            warnings.warn(f"the verdict could not be written: {error}", DiagnosticWarning, stacklevel=2)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the verdict of the whole run."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, over=True)

    def _report(self, trainer: Trainer, monitor: Monitor, finding: Finding, number: int) -> None:
        words = str(finding)
        verb = "Training goes on"
        if self.action == "stop" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            lasting = self._lasting(monitor, finding)
            verb = "Training stops" + (f" if it lasts for {lasting} more looks" if lasting else "")
        if not trainer.is_global_zero:
            return
        warnings.warn(f"{words} {verb}.", CollapseWarning, stacklevel=2)
        board = Board(trainer, finding.step, f"gendiag/alarm_{number}")
        try:
            shares = "".join(f"\n| {where} | {share:.0%} |" for where, share in finding.shares.items())
            table = f"\n\n| part | share of the fall |\n|---|---|{shares}" if shares else ""
            board.text("words", f"**{words}** {verb}.{table}")
            monitor.draw_finding(finding, board)
            board.flush()
        except Exception as error:
            warnings.warn(f"the alarm could not be drawn: {error}", DiagnosticWarning, stacklevel=2)

    # ---- the checkpoint ----

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, and Lightning's own."""
        return {
            **super().state_dict(),
            "findings": [asdict(finding) for finding in self.findings],
            "seen": dict(self._seen),
            "detectors": {
                key: {where: detector.state_dict() for where, detector in held.items()}
                for key, held in self._detectors.items()
            },
            "history": {
                key: {where: [list(entry) for entry in values] for where, values in held.items()}
                for key, held in self._history.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.findings = [Finding(**finding) for finding in state_dict["findings"]]
        self._seen = dict(state_dict["seen"])
        self._history = {
            key: {
                where: [(int(number), int(step), float(value)) for number, step, value in values]
                for where, values in held.items()
            }
            for key, held in state_dict["history"].items()
        }
        self._detectors = {
            key: {where: DETECTORS[self.detector].from_state_dict(state) for where, state in held.items()}
            for key, held in state_dict["detectors"].items()
        }


def _once(words: Iterable[str]) -> list[str]:
    """Each word where it stands first."""
    return list(dict.fromkeys(words))


def _listed(words: list[str], most: int = 6) -> str:
    """Words as a list for people, the last ones counted where they are many."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
