"""Decides which observations of a monitor are alarms, and which part of the model each alarm names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from lightning_gendiag.detection.alarm import Alarm, listed, of_several
from lightning_gendiag.detection.contributions import explaining
from lightning_gendiag.detection.detector import Detection, Detector, evaluations_needed
from lightning_gendiag.detection.history import SHARE_OF_NAN, STOPS, Entry, Evaluation, History, Observation, Series

BEFORE, SINCE = 8, 3
"""Largest numbers of evaluations before and since a change whose medians say whether the whole became worse."""

WORSE = 2.0
"""Images became worse if their similarity fell by more than so many times what it fluctuates; that of a healthy GAN falls and
rises again by that much. For other aggregates, once what they fluctuate is enough."""

MOVING = 24
"""Number of the newest evaluations over which a value must move to show that a model is learning. What has been wrong since
the first evaluation stops a run only once it has lasted for so many."""

GROWING = 2.0
"""A model is learning as well where a value that is to rise has become so many times as large."""

LEAST_BEFORE = 3
"""With fewer evaluations before a change, nothing is said about the whole."""

DATA = "training_data"
"""Name of the monitor whose alarms are about the training data."""

EXPLAINED = 0.9
"""Of components that fall together, the fewest are named that account for this share of the drop."""

FAR = 4.5
"""Standard deviations over its level from which on a series is said to have changed as well."""

MERGED = 3
"""More components than these that fall at the same evaluation are reported as one alarm."""

Contributions = Callable[[dict[str, float], dict[str, float]], dict[str, float]]
"""From the components' values before and after to each one's contribution to the overall drop."""


class Snapshot(NamedTuple):
    """What is taken back where an evaluation is replaced."""

    detectors: dict[str, dict[str, Any]]
    """State of each series' detector."""
    alarms: list[tuple[Alarm, int | None]]
    """All alarms, and when each recovered."""


class Judge:
    """Judges each series against its own level and its own fluctuation, at every evaluation once.

    Components that fall together are merged into one alarm; where three quarters of them fall, the aggregate is named.

    Whether something changed and whether it matters are two questions: an alarm answers the first, and :meth:`stopping`
    the second.

    Args:
        false_alarm_rate: Probability of a false alarm at one evaluation of one monitor, over all its series.
        warmup: Number of evaluations to learn from before the first judgement.
        patience: Number of further evaluations that an alarm must last to stop a run; by default each series' own.

    Attributes:
        alarms: All alarms in the order in which they were raised.
        evaluations: Number of the newest evaluation of each monitor.
    """

    def __init__(self, false_alarm_rate: float, warmup: int, patience: int | None = None) -> None:
        # refuses wrong arguments now and not at the first evaluation
        Detector(false_alarm_rate, warmup=warmup)
        self.false_alarm_rate, self.warmup, self.patience = false_alarm_rate, warmup, patience
        self.alarms: list[Alarm] = []
        self.evaluations: dict[str, int] = {}
        self._detectors: dict[str, dict[str, Detector]] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._deviations: dict[str, dict[str, float]] = {}
        self._latest: dict[str, Evaluation] = {}

    def update(
        self, monitor: str, evaluation: Evaluation, history: History, contributions: Contributions = lambda *_: {}
    ) -> list[Alarm]:
        """Judges one evaluation and returns the alarms that it raises, equal on every process.

        Args:
            monitor: Name of the monitor.
            evaluation: Later than all before; already in the history.
            history: All values so far.
            contributions: Divides a drop of the aggregate among the components.

        Returns:
            New alarms, those first that account for most of the drop; they are also added to ``alarms``.
        """
        self.evaluations[monitor] = evaluation.number
        self._latest[monitor] = evaluation
        judged = {o.series.name: o for o in evaluation.observations if o.series.role != "record"}
        count = sum(o.series.role != "rule" for o in judged.values())
        detections = {
            name: self._detection(monitor, evaluation.number, observation, count, history)
            for name, observation in judged.items()
        }
        for alarm in self.open_alarms(monitor):
            detection = detections.get(alarm.series)
            if detection is not None and detection.closed:
                alarm.recovered = evaluation.step
        self._deviations[monitor] = {name: detection.deviation for name, detection in detections.items()}
        known = {name for alarm in self.open_alarms(monitor) for name in alarm.names}
        detectors = self._detectors.get(monitor, {})
        raised = _Grouping(monitor, evaluation, history, contributions, judged, detections, known, detectors).alarms()
        raised.sort(key=lambda alarm: -alarm.contributions.get(alarm.names[0], 1.0))
        causes = self.open_alarms()
        new: list[Alarm] = []
        for alarm in raised:
            if not any(_follows(alarm, cause) for cause in [*causes, *new]):
                new.append(alarm)
        self.alarms += new
        return new

    def snapshot(self, monitor: str) -> Snapshot:
        """Returns what the next evaluation of a monitor may change."""
        detectors = {name: detector.state_dict() for name, detector in self._detectors.get(monitor, {}).items()}
        return Snapshot(detectors, [(alarm, alarm.recovered) for alarm in self.alarms])

    def restore(self, monitor: str, snapshot: Snapshot) -> None:
        """Takes the newest evaluation of a monitor back, so that another can take its place."""
        self._detectors.pop(monitor, None)
        self._states[monitor] = dict(snapshot.detectors)
        self.alarms[:] = [alarm for alarm, _ in snapshot.alarms]
        for alarm, recovered in snapshot.alarms:
            alarm.recovered = recovered

    def stopping(self, history: History) -> list[Alarm]:
        """Returns the alarms that stop the run now, each once; to be called after all monitors' evaluations of a step.

        An alarm stops a run if it has lasted for its patience and, unless it may stop a run by itself, if what measures
        the quality of the whole is worse than before the change.
        """
        moved = self.data_moved()
        critical = []
        for alarm in self.open_alarms():
            alarm.data = moved if alarm.diagnostic != DATA else ""
            lasted = self.evaluations.get(alarm.diagnostic, 0) - alarm.number
            if not alarm.is_critical and lasted >= self.patience_of(alarm) and self._matters(alarm, history):
                alarm.is_critical = True
                critical.append(alarm)
        return critical

    def patience_of(self, alarm: Alarm) -> int:
        """Returns the number of further evaluations that an alarm must last to stop the run."""
        return alarm.patience if self.patience is None else self.patience

    def _matters(self, alarm: Alarm, history: History) -> bool:
        """Whether an alarm may stop a run by itself, or the whole became worse."""
        if alarm.stop != "whole":
            return alarm.stop == "alone"
        if alarm.rule:
            # a rule about the whole did not hold before
            entries = history.entries(alarm.diagnostic, alarm.series)
            return sum(entry.step < alarm.since and entry.severity == 0 for entry in entries) >= LEAST_BEFORE
        latest = [(monitor, o.series) for monitor, newest in self._latest.items() for o in newest.observations]
        wholes = [(monitor, series) for monitor, series in latest if series.is_quality] or [
            (monitor, series)
            for monitor, series in latest
            if monitor == alarm.diagnostic and series.role == "aggregate"
        ]
        return any(_is_worse(history.entries(monitor, series.name), alarm.since, series) for monitor, series in wholes)

    def data_moved(self) -> str:
        """Returns in a sentence whether the training data changed; empty where they are not monitored."""
        if DATA not in self.evaluations:
            return ""
        moved = [alarm.rule or f"{alarm.label} {alarm.event}" for alarm in self.open_alarms(DATA)]
        return f"The training data changed as well: {listed(moved)}." if moved else "The training data did not change."

    def bad_now(self) -> dict[str, int]:
        """Returns what is bad in itself at the newest evaluations, the worst first, with the steps of these."""
        return {
            # what a rule calls it may be a sentence
            f"{o.title}: {o.series.quantity} is {o.value:.3f}"
            if o.label and o.message.startswith(o.label)
            else f"{o.series.quantity} of {o.title} is {o.value:.3f}": latest.step
            for latest in self._latest.values()
            for o in sorted(latest.observations, key=lambda o: -o.severity)
            if o.is_bad
        }

    def open_alarms(self, monitor: str | None = None) -> list[Alarm]:
        """Returns the alarms, of one monitor or of all, that have not recovered."""
        return [a for a in self.alarms if a.recovered is None and monitor in (None, a.diagnostic)]

    def needed(self, monitor: str) -> int:
        """Returns the number of evaluations of a monitor with which an alarm is possible."""
        rates = [detector.false_alarm_rate for detector in self._detectors.get(monitor, {}).values()]
        return evaluations_needed(min(rates, default=self.false_alarm_rate), self.warmup)

    def also_changed(self, alarm: Alarm, most: int = 6) -> list[str]:
        """Returns the other series that lie far from their level now, as ``diagnostic: series``."""
        far = [
            (deviation, f"{monitor}: {name}")
            for monitor, series in self._deviations.items()
            for name, deviation in series.items()
            if deviation > FAR and not (monitor == alarm.diagnostic and name in alarm.names)
        ]
        return [text for _, text in sorted(far, reverse=True)[:most]]

    def clear(self, monitor: str | None = None) -> None:
        """Forgets what was learned of one monitor, or everything."""
        if monitor is None:
            self.alarms.clear()
        for held in (self._detectors, self._states, self._deviations, self._latest, self.evaluations):
            if monitor is None:
                held.clear()
            else:
                held.pop(monitor, None)

    def _detection(
        self, monitor: str, number: int, observation: Observation, count: int, history: History
    ) -> Detection:
        """The state of a series' detector after an observation."""
        detector = self._detector(monitor, observation, count)
        severity, series = observation.severity, observation.series
        if severity == math.inf:
            in_a_row = history.in_a_row(monitor, series.name)
            entries = history.entries(monitor, series.name)[-in_a_row:]
            if in_a_row < series.confirm or (not detector.active and _moves(entries, series.progress)):
                severity = 0.0
            elif not detector.values:
                # what is wrong from the beginning needs no level to compare with
                detector.update(number - 1, 0.0)
        return detector.update(number, severity)

    def _detector(self, monitor: str, observation: Observation, count: int) -> Detector:
        series, held = observation.series, self._detectors.setdefault(monitor, {})
        if series.name not in held:
            # Bonferroni's correction for many series
            rate = self.false_alarm_rate / max(count, 1)
            detector = Detector(
                rate,
                warmup=self.warmup,
                # of a rule, the evaluations in a row are counted
                shortest=2 if series.role == "rule" else max(2, series.confirm),
                min_std=series.min_std,
                min_delta=series.min_delta,
                small=series.small,
            )
            state = self._states.get(monitor, {}).pop(series.name, None)
            if state is not None:
                detector.load_state_dict(state)
            held[series.name] = detector
        return held[series.name]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers, strings, lists and dictionaries."""
        states = {monitor: dict(held) for monitor, held in self._states.items()}
        for monitor, held in self._detectors.items():
            states.setdefault(monitor, {}).update({name: detector.state_dict() for name, detector in held.items()})
        return {
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "evaluations": dict(self.evaluations),
            "detectors": states,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; detectors are made when their series are next observed."""
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.evaluations = dict(state["evaluations"])
        self._detectors = {}
        self._states = {monitor: dict(held) for monitor, held in state["detectors"].items()}


def _follows(alarm: Alarm, cause: Alarm) -> bool:
    """Whether an alarm says no more than that its numbers are nan or inf, and another says so that may stop a run as well."""
    says_so = cause.quantity == SHARE_OF_NAN or not math.isfinite(cause.after)
    stops = STOPS.index(cause.stop) <= STOPS.index(alarm.stop)
    return not math.isfinite(alarm.after) and not alarm.rule and says_so and stops


def _moves(entries: list[Entry], progress: float) -> bool:
    """Whether values move by more than ``progress``, or grow by a factor, from the first third of the newest to the last."""
    values = [entry.value for entry in entries[-MOVING:]]
    third = len(values) // 3
    if progress == 0 or third == 0:
        return False
    first, last = median(values[:third]), median(values[-third:])
    return (last - first) / progress > 1 or (progress > 0 and last > GROWING * first > 0)


def _is_worse(entries: list[Entry], since: int, whole: Series) -> bool:
    """Whether the median severity since a step exceeds that from before by more than the fluctuation from before."""
    before = [entry.severity for entry in entries if entry.step < since and math.isfinite(entry.severity)][-BEFORE:]
    after = [entry.severity for entry in entries if entry.step >= since][-SINCE:]
    if len(before) < LEAST_BEFORE or not after:
        return False
    level = median(before)
    # the standard deviation of normal values by their median distance from the median, whatever a few of them are
    fluctuation = 1.4826 * median(abs(value - level) for value in before)
    least = (WORSE if whole.is_quality else 1.0) * max(whole.min_std, fluctuation)
    return not all(map(math.isfinite, after)) or median(after) > level + least


@dataclass
class _Grouping:
    """Groups the detections of one evaluation into alarms."""

    monitor: str
    evaluation: Evaluation
    history: History
    contributions: Contributions
    judged: dict[str, Observation]
    detections: dict[str, Detection]
    known: set[str]
    """Names of the series that open alarms are about."""
    detectors: dict[str, Detector]
    """That of each series, which knows the evaluations that make its level: not those of an earlier collapse."""

    def alarms(self) -> list[Alarm]:
        """Returns what this evaluation newly shows."""
        detections = self.detections
        components = [name for name, o in self.judged.items() if o.series.role == "component"]
        aggregate = next((name for name, o in self.judged.items() if o.series.role == "aggregate"), None)
        alone = [n for n, o in self.judged.items() if o.series.role == "standalone" and detections[n].opened]
        alone += self._rules()
        opened = [name for name in components if detections[name].opened]
        alarms = [self._alarm([name], name) for name in alone if name not in self.known]
        if aggregate in self.known or any(math.isinf(detections[name].score) for name in alone):
            # what the components show then is a consequence
            return alarms
        # a fault of the whole may show in one component an evaluation before it does in the others
        fallen = [
            name
            for name in components
            if detections[name].active or detections[name].pending or detections[name].deviation > FAR
        ]
        if aggregate is not None and opened and len(components) > 1 and len(fallen) >= 0.75 * len(components):
            by = aggregate if detections[aggregate].active else max(opened, key=lambda name: detections[name].score)
            return [*alarms, self._alarm([aggregate, *fallen], by)]
        new = [name for name in opened if name not in self.known]
        if len(new) > 1:
            new.sort(key=lambda name: -detections[name].score)
            needed = explaining(self._alarm(new, new[0]).contributions, EXPLAINED)
            new = [name for name in new if name in needed] or new
        if len(new) > MERGED:
            alarms.append(self._alarm(new, new[0]))
        else:
            alarms += [self._alarm([name], name) for name in new]
        if aggregate is not None and detections[aggregate].opened and not opened:
            alarms += self._alarm_of_aggregate(aggregate)
        return alarms

    def _rules(self) -> list[str]:
        """Names of the rules that newly hold; one explains others, except those that may stop a run by themselves."""
        rules = {name: o.series for name, o in self.judged.items() if o.series.role == "rule"}
        holding = [n for n, series in rules.items() if self.detections[n].active and series.stop == "alone"]
        if not any(name in self.known for name in rules):
            holding += [name for name in rules if self.detections[name].active and name not in holding][:1]
        return holding

    def _alarm_of_aggregate(self, aggregate: str) -> list[Alarm]:
        """The aggregate may show a drop before a component's own fluctuation lets it: then that component is named."""
        alarm = self._alarm([aggregate], aggregate)
        parts = alarm.contributions
        lead = max(parts, key=parts.__getitem__) if parts else aggregate
        if sum(parts.get(name, 0.0) for name in self.known) >= 0.5:
            return []
        return [self._alarm([lead], aggregate) if parts.get(lead, 0.0) >= 0.5 else alarm]

    def _alarm(self, names: list[str], by: str) -> Alarm:
        """An alarm about series, raised by the detector of one of them."""
        detection, first = self.detections[by], self.judged[names[0]]
        since = self.evaluation.number if detection.since is None else detection.since
        in_a_row = self.history.in_a_row(self.monitor, names[0])
        if first.series.role == "rule":
            since = self.evaluation.number - max(0, in_a_row - 1)
        before = {name: self._level(name, since) for name in self.judged}
        after = {name: observation.value for name, observation in self.judged.items()}
        components = [
            name
            for name, o in self.judged.items()
            if o.series.role == "component" and math.isfinite(before[name]) and math.isfinite(after[name])
        ]
        about = [self.judged[name] for name in names]
        # an aggregate stands for its components
        called = about[:1] if first.series.role == "aggregate" else about
        decided_by_rule = first.severity == math.inf and first.message
        steps = {entry.number: entry.step for entry in self.history.entries(self.monitor, by)}
        patience = first.series.patience
        if first.series.role == "rule" and first.series.confirm > 1 and in_a_row == self.evaluation.number:
            # a model that is not trained yet may recover from what takes several evaluations to tell
            patience = max(patience, MOVING - in_a_row)
        return Alarm(
            step=self.evaluation.step,
            epoch=self.evaluation.epoch,
            diagnostic=self.monitor,
            label=listed([o.title for o in called]),
            before=before[names[0]],
            after=after[names[0]],
            score=detection.score,
            since=steps.get(since, self.evaluation.step),
            evaluations_to_false_alarm=detection.evaluations_to_false_alarm,
            quantity=first.series.quantity,
            event=first.series.event if len(called) == 1 else of_several(first.series.event),
            contributions=self.contributions(
                {name: before[name] for name in components}, {name: after[name] for name in components}
            ),
            series=by,
            names=names,
            indices=[o.series.index for o in about if o.series.index is not None],
            rule=first.message.replace("{evaluations}", str(in_a_row)) if decided_by_rule else "",
            number=self.evaluation.number,
            stop=first.series.stop,
            patience=patience,
        )

    def _level(self, name: str, since: int) -> float:
        """The median of the newest values from before the change."""
        entries = self.history.entries(self.monitor, name)
        earlier = [entry for entry in entries if entry.number < since and math.isfinite(entry.value)]
        detector = self.detectors[name]
        if not (detector.active and detector.since is not None and detector.since < since):
            # after a relapse, not the level of the first fall; what had fallen already adds nothing to this change
            healthy = set(detector.positions)
            earlier = [entry for entry in earlier if entry.number in healthy] or earlier
        return median([entry.value for entry in earlier[-16:]] or [math.nan])
