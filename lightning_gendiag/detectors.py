"""When a series of numbers means collapse: floats in, a verdict out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

LOOKS = 3.0
"""How many independent looks the maximum over all change points is worth, measured by simulation on normal noise."""

LIMIT = 4.5
"""A single value counts for at most this many standard deviations."""

ALLOWANCE = 0.5
"""Half the rise that a cumulative sum is made for, in standard deviations."""


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


class Detector(ABC):
    """Does a series rise above its own level by more than its own fluctuation, and stay there?

    The level is the median of up to ``baseline`` values before the rise, and the trend of a series that has been rising
    all along is expected to go on. The fluctuation is the standard deviation of up to ``memory`` values, as successive
    differences show it, so that a trend does not count as noise. A swing of a single evaluation never alarms: the last
    two values must both lie at least one standard deviation above what was expected. An alarm ends when two values in a
    row lie within one standard deviation of the level from before it.

    Args:
        false_alarm_rate: chance of a false alarm at one evaluation of this series, for independent normal noise; in
            (0, 0.1].
        warmup: values to learn from before the first judgement, at least 4.
        baseline: at most this many values make the level.
        recent: at most this many values make the rise.
        memory: at most this many values before the rise tell the fluctuation.
        grain: the fluctuation is taken to be at least this large, in the unit of the series.
        tolerance: a rise is what exceeds this, in the unit of the series: smaller ones are no news however lasting.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        false_alarm_rate: float,
        *,
        warmup: int = 6,
        baseline: int = 16,
        recent: int = 12,
        memory: int = 32,
        grain: float = 0.0,
        tolerance: float = 0.0,
    ) -> None:
        if not 0 < false_alarm_rate <= 0.1:
            raise ValueError(f"false_alarm_rate must be in (0, 0.1], got {false_alarm_rate}.")
        if warmup < 4:
            raise ValueError(f"warmup must be at least 4 evaluations, got {warmup}.")
        self.warmup, self.baseline, self.recent, self.memory = warmup, baseline, recent, memory
        self.grain, self.tolerance = grain, tolerance
        self.arguments = {
            "false_alarm_rate": false_alarm_rate,
            "warmup": warmup,
            "baseline": baseline,
            "recent": recent,
            "memory": memory,
            "grain": grain,
            "tolerance": tolerance,
        }
        self.threshold = self._threshold(false_alarm_rate)
        self.positions: list[int] = []
        self.values: list[float] = []
        self.active = False
        self.since: int | None = None
        self.calm = 0
        self.sum = 0.0

    @staticmethod
    @abstractmethod
    def _threshold(false_alarm_rate: float) -> float:
        """What a score must exceed."""

    @abstractmethod
    def _rise(self) -> tuple[float, float, int | None]:
        """The statistic, how clear it is as a standard normal deviation, and the position of the first value of the rise."""

    @property
    def healthy(self) -> list[float]:
        """The values that the level is taken from: those before the rise, or the newest where there is none."""
        values = [v for p, v in zip(self.positions, self.values, strict=True) if self.since is None or p < self.since]
        return values[-self.memory :]

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
            del self.positions[: -self.memory - self.recent]
            del self.values[: -self.memory - self.recent]
        return verdict

    def _while_calm(self) -> Verdict:
        deviation = 0.0
        if len(self.values) > self.warmup:
            (deviation,) = self._above(self.values[-1:], self.values[:-1][-self.memory :])
        statistic, clearness, since = self._rise()
        self.since = since
        self.active, self.calm = statistic > self.threshold, 0
        return Verdict(self.active, self.active, False, since, clearness, deviation)

    def _while_active(self) -> Verdict:
        (deviation,) = self._above(self.values[-1:], self.healthy)
        self.calm = self.calm + 1 if deviation < 1 else 0
        if self.calm < 2:
            return Verdict(True, False, False, self.since, deviation, deviation)
        # what was collapse is no example of health
        kept = [(p, v) for p, v in zip(self.positions, self.values, strict=True) if p < (self.since or 0)]
        kept += list(zip(self.positions[-2:], self.values[-2:], strict=True))
        self.positions, self.values = [p for p, _ in kept], [v for _, v in kept]
        self.active, self.since, self.calm, self.sum = False, None, 0, 0.0
        return Verdict(False, False, True, None, deviation, deviation)

    def _fluctuation(self, values: list[float]) -> tuple[float, float]:
        """Level: the median of the newest ``baseline`` values; and standard deviation, from successive differences of all."""
        steps = [after - before for before, after in pairwise(values)]
        mean = math.fsum(steps) / len(steps)
        spread = math.sqrt(math.fsum((step - mean) ** 2 for step in steps) / (len(steps) - 1) / 2)
        return median(values[-self.baseline :]), max(spread, self.grain, 1e-12)

    def _above(self, values: list[float], before: list[float]) -> list[float]:
        """How far values lie above the level of those before by more than is tolerated, in their standard deviations."""
        if len(before) < 3:
            return [0.0] * len(values)
        level, spread = self._fluctuation(before)
        before = before[-self.baseline :]
        # a series that has been rising all along, and still is, is expected to go on
        slope, recently = _slope(before), _slope(before[-max(4, len(before) // 2) :])
        slope = slope if slope > 0 and recently > slope / 10 else 0.0
        rises = [value - level - slope * ((len(before) + 1) / 2 + ahead) for ahead, value in enumerate(values)]
        # a fall is not tolerated away, and what is tolerated is no rise
        return [(max(rise - self.tolerance, 0.0) if rise > 0 else rise) / spread for rise in rises]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "arguments": dict(self.arguments),
            "positions": list(self.positions),
            "values": list(self.values),
            "active": self.active,
            "since": self.since,
            "calm": self.calm,
            "sum": self.sum,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """A detector that goes on where the other was."""
        detector = cls(**state["arguments"])
        detector.positions, detector.values = list(state["positions"]), list(state["values"])
        detector.active, detector.since, detector.calm = state["active"], state["since"], state["calm"]
        detector.sum = state["sum"]
        return detector


class ChangePoint(Detector):
    """The change-point model: where do the newest values separate best from those before them?

    For each split, the mean of the last 2 to ``recent`` values is compared with the level before, in units of the
    fluctuation, with both estimates' errors. The split that separates best is the change point, its Student t value as a
    normal deviation the statistic. A sudden fall shows in the shortest splits, a slow slide in the longer ones.

    Source: Hawkins, Qiu, Kang, *The changepoint model for statistical process control*, 2003, one-sided and robust.

    Example:
        >>> detector = ChangePoint(false_alarm_rate=1e-3)
        >>> series = [0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.0, 0.1, -0.1, 0.2, 2.0, 0.1, -0.2, 0.1, 0.0, 2.0, 2.1]
        >>> [position for position, value in enumerate(series) if detector.update(position, value).active]
        [16]
        >>> detector.since
        15
    """

    @staticmethod
    def _threshold(false_alarm_rate: float) -> float:
        return _normal_quantile(false_alarm_rate / LOOKS)

    def _rise(self) -> tuple[float, float, int | None]:
        score, clearness, since = -math.inf, -math.inf, None
        for length in range(2, self.recent + 1):
            before = self.values[:-length][-self.memory :]
            if len(before) < self.warmup:
                break
            if min(self.values[-2:]) - median(before[-self.baseline :]) < self.grain:
                # most series at most times, at little cost
                continue
            rise = self._above(self.values[-length:], before)
            if min(rise[-2:]) < 1:
                continue
            # the median's error is pi / 2 times that of the mean
            error = math.sqrt(1 / length + math.pi / 2 / min(len(before), self.baseline))
            candidate = _normal_deviation(sum(min(r, LIMIT) for r in rise) / length / error, len(before) - 1)
            if candidate > score:
                score, since = candidate, self.positions[-length]
                # the limit is for the decision; what is told is what was seen
                clearness = _normal_deviation(sum(rise) / length / error, len(before) - 1)
        return score, clearness, since


class Cusum(Detector):
    """The self-starting cumulative sum: deviations from the level add up, less half a standard deviation each.

    Each value is compared with those before the sum last was 0, and counts as the normal deviation that is as rare as
    its Student t value. The threshold is Siegmund's, for the stated mean number of evaluations to a false alarm.

    Sources: Page, *Continuous inspection schemes*, 1954; Hawkins, *Self-starting CUSUM charts*, 1987; Siegmund,
    *Sequential analysis*, 1985.

    Example:
        >>> detector = Cusum(false_alarm_rate=1e-3)
        >>> series = [0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.0, 0.1, -0.1, 0.2, 0.1, 0.1, -0.2, 0.1, 0.0, 2.0, 2.1, 1.9]
        >>> [position for position, value in enumerate(series) if detector.update(position, value).active]
        [16, 17]
    """

    @staticmethod
    def _threshold(false_alarm_rate: float) -> float:
        return _siegmund_threshold(1 / false_alarm_rate)

    def _reference(self) -> list[float]:
        before = [v for p, v in zip(self.positions, self.values, strict=True) if self.since is None or p < self.since]
        return (before[:-1] if self.since is None else before)[-self.memory :]

    def _deviation(self, before: list[float]) -> float:
        error = math.sqrt(1 + math.pi / 2 / min(len(before), self.baseline))
        (latest,) = self._above(self.values[-1:], before)
        return _normal_deviation(min(latest, LIMIT) / error, len(before) - 1)

    def _rise(self) -> tuple[float, float, int | None]:
        before = self._reference()
        if len(before) < self.warmup:
            return -math.inf, -math.inf, None
        self.sum = max(0.0, self.sum + self._deviation(before) - ALLOWANCE)
        if self.sum == 0:
            return 0.0, 0.0, None
        since = self.positions[-1] if self.since is None else self.since
        # a rise of a single evaluation is none
        lasting = min(self._above(self.values[-2:], before)) >= 1
        clearness = _normal_quantile(1 / (LOOKS * _siegmund_length(self.sum)))
        return self.sum if lasting else 0.0, clearness, since


class PageHinkley(Cusum):
    """The Page-Hinkley test: deviations from the mean of all values so far add up, less half a standard deviation each.

    Source: Hinkley, *Inference about the change-point from cumulative sum tests*, 1971. The threshold is Siegmund's.
    """

    def _reference(self) -> list[float]:
        return self.values[:-1]

    def _deviation(self, before: list[float]) -> float:
        _, spread = self._fluctuation(before)
        return (self.values[-1] - fmean(self.values) - self.tolerance) / spread


DETECTORS: dict[str, type[Detector]] = {"change_point": ChangePoint, "cusum": Cusum, "page_hinkley": PageHinkley}
"""By the name that :class:`~lightning_gendiag.CollapseStopping` knows them by."""


def _siegmund_length(threshold: float) -> float:
    """Mean number of normal values before a cumulative sum exceeds a threshold by chance."""
    far = 2 * ALLOWANCE * (threshold + 1.166)
    return (math.exp(min(far, 700.0)) - far - 1) / (2 * ALLOWANCE**2)


def _siegmund_threshold(length: float) -> float:
    """Its inverse."""
    from scipy.optimize import brentq

    return float(brentq(lambda threshold: math.log(_siegmund_length(threshold) / length), -1.0, 300.0))


def _slope(values: list[float]) -> float:
    """By Theil's incomplete method: the median slope between values half the series apart."""
    half = len(values) // 2
    rises = [after - before for before, after in zip(values, values[-half:], strict=False)]
    return median(rises) / (len(values) - half)


def _normal_tail(deviation: float) -> float:
    return math.erfc(deviation / math.sqrt(2)) / 2


def _normal_quantile(tail: float) -> float:
    from scipy.special import ndtri

    return -float(ndtri(tail))


def _normal_deviation(student: float, freedom: int) -> float:
    """The normal deviation that is as rare as a Student t value."""
    from scipy.special import stdtr

    # beyond this tail the quantile leaves the range of floats
    return _normal_quantile(max(float(stdtr(freedom, -student)), 1e-300))
