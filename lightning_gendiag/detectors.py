"""When a series of numbers means collapse: floats in, a verdict out."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median, stdev
from typing import Any, NamedTuple

LOOKS = 3.0
"""How many independent looks the maximum over all change points is worth, measured by simulation on normal noise."""

LIMIT = 4.5
"""A single value counts for at most this many standard deviations."""


class Verdict(NamedTuple):
    """What a detector says of the newest value of its series."""

    active: bool
    """Whether the series is in alarm."""
    opened: bool
    """Whether this value began the alarm."""
    closed: bool
    """Whether this value ended it."""
    since: int | None
    """Position of the first value of the rise; None while there is none."""
    score: float
    """How clearly the newest values lie above those before, as a standard normal deviation; -inf while learning."""
    deviation: float
    """How far the newest value alone lies above the level, in standard deviations of the series; 0 while learning."""

    @property
    def evaluations_to_false_alarm(self) -> float:
        """Mean number of healthy evaluations of this series before chance alone reaches this score."""
        return 1 / max(LOOKS * _normal_tail(self.score), 1e-12)


class ChangePoint:
    """Does a series rise above its own level by more than its own fluctuation, and stay there?

    The newest values are compared with those before them: for each split, the mean of the last 2 to ``recent`` values
    against the median of up to ``baseline`` values before, in units of the fluctuation that successive differences of
    the latter show, so that a trend does not count as noise and both estimates' errors count. The split that
    separates best is the change point, its Student t value as a normal deviation the score. A sudden fall shows in
    the shortest splits, a slow slide in the longer ones. A swing of a single evaluation never alarms: the last two
    values must both lie at least one standard deviation above the level.

    An alarm ends when two values in a row lie within one standard deviation of the level from before it.

    Source: Hawkins, Qiu, Kang, *The changepoint model for statistical process control*, 2003, one-sided and robust.

    Args:
        false_alarm_rate: chance of a false alarm at one evaluation of this series, for independent normal noise; in
            (0, 0.1].
        warmup: values to learn from before the first judgement, at least 4.
        baseline: at most this many values make the level.
        recent: at most this many values make the rise.
        grain: the fluctuation is taken to be at least this large, in the unit of the series.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> detector = ChangePoint(false_alarm_rate=1e-3)
        >>> series = [0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.0, 0.1, -0.1, 0.2, 2.0, 0.1, -0.2, 0.1, 0.0, 2.0, 2.1]
        >>> [position for position, value in enumerate(series) if detector.update(position, value).active]
        [16]
        >>> detector.since
        15
    """

    def __init__(
        self,
        false_alarm_rate: float,
        *,
        warmup: int = 6,
        baseline: int = 16,
        recent: int = 12,
        grain: float = 0.0,
    ) -> None:
        if not 0 < false_alarm_rate <= 0.1:
            raise ValueError(f"false_alarm_rate must be in (0, 0.1], got {false_alarm_rate}.")
        if warmup < 4:
            raise ValueError(f"warmup must be at least 4 evaluations, got {warmup}.")
        self.threshold = _normal_quantile(false_alarm_rate / LOOKS)
        self.warmup, self.baseline, self.recent, self.grain = warmup, baseline, recent, grain
        self.arguments = {
            "false_alarm_rate": false_alarm_rate,
            "warmup": warmup,
            "baseline": baseline,
            "recent": recent,
            "grain": grain,
        }
        self.positions: list[int] = []
        self.values: list[float] = []
        self.active = False
        self.since: int | None = None
        self.calm = 0

    @property
    def healthy(self) -> list[float]:
        """The values that the level is taken from: those before the rise, or the newest where there is none."""
        values = [v for p, v in zip(self.positions, self.values, strict=True) if self.since is None or p < self.since]
        return values[-self.baseline :]

    def update(self, position: int, value: float) -> Verdict:
        """Take the next value.

        Args:
            position: where it lies, such as a training step; increasing.
            value: larger is worse. One that is not finite is an alarm by itself, once there were finite ones.
        """
        if not math.isfinite(value):
            opened = bool(self.values) and not self.active
            if self.values:
                self.active, self.calm = True, 0
                self.since = position if self.since is None else self.since
            far = math.inf if self.values else -math.inf
            return Verdict(self.active, opened, False, self.since, far, max(far, 0.0))
        self.positions.append(position)
        self.values.append(value)
        verdict = self._while_active() if self.active else self._while_calm()
        if not self.active:
            del self.positions[: -self.baseline - self.recent]
            del self.values[: -self.baseline - self.recent]
        return verdict

    def _while_calm(self) -> Verdict:
        score, clearness, since, deviation = -math.inf, -math.inf, None, 0.0
        if len(self.values) > self.warmup:
            level, spread = self._fluctuation(self.values[:-1][-self.baseline :])
            deviation = (self.values[-1] - level) / spread
        for length in range(2, self.recent + 1):
            before = self.values[:-length][-self.baseline :]
            if len(before) < self.warmup:
                break
            level, spread = self._fluctuation(before)
            rise = [(value - level) / spread for value in self.values[-length:]]
            if min(rise[-2:]) < 1:
                continue
            # the median's error is pi / 2 times that of the mean
            error = math.sqrt(1 / length + math.pi / 2 / len(before))
            candidate = _normal_deviation(sum(min(r, LIMIT) for r in rise) / length / error, len(before) - 1)
            if candidate > score:
                score, since = candidate, self.positions[-length]
                # the limit is for the decision; what is told is what was seen
                clearness = _normal_deviation(sum(rise) / length / error, len(before) - 1)
        self.since = since
        self.active, self.calm = score > self.threshold, 0
        return Verdict(self.active, self.active, False, since, clearness, deviation)

    def _while_active(self) -> Verdict:
        level, spread = self._fluctuation(self.healthy)
        deviation = (self.values[-1] - level) / spread
        self.calm = self.calm + 1 if deviation < 1 else 0
        if self.calm < 2:
            return Verdict(True, False, False, self.since, deviation, deviation)
        # what was collapse is no example of health
        kept = [(p, v) for p, v in zip(self.positions, self.values, strict=True) if p < (self.since or 0)]
        kept += list(zip(self.positions[-2:], self.values[-2:], strict=True))
        self.positions, self.values = [p for p, _ in kept], [v for _, v in kept]
        self.active, self.since, self.calm = False, None, 0
        return Verdict(False, False, True, None, deviation, deviation)

    def _fluctuation(self, values: list[float]) -> tuple[float, float]:
        """Median and standard deviation, the latter from successive differences and at least ``grain``."""
        steps = [after - before for before, after in pairwise(values)]
        spread = stdev(steps) / math.sqrt(2)
        return median(values), max(spread, self.grain, 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "arguments": dict(self.arguments),
            "positions": list(self.positions),
            "values": list(self.values),
            "active": self.active,
            "since": self.since,
            "calm": self.calm,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ChangePoint:
        """A detector that goes on where the other was."""
        detector = cls(**state["arguments"])
        detector.positions, detector.values = list(state["positions"]), list(state["values"])
        detector.active, detector.since, detector.calm = state["active"], state["since"], state["calm"]
        return detector


def _normal_tail(deviation: float) -> float:
    return math.erfc(deviation / math.sqrt(2)) / 2


def _normal_quantile(tail: float) -> float:
    from scipy.stats import norm

    return float(norm.isf(tail))


def _normal_deviation(student: float, freedom: int) -> float:
    """The normal deviation that is as rare as a Student t value."""
    from scipy.stats import norm, t

    # beyond this tail the quantile leaves the range of floats
    return float(norm.isf(max(t.sf(student, freedom), 1e-300)))
