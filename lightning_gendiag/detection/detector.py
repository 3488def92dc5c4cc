"""A sequential change-point test: does a series of numbers rise above its own level by more than it fluctuates?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

INDEPENDENT_SPLITS = 3.0
"""The maximum over all splits of a series exceeds a threshold as often as that of this many independent values, by
simulation on normal noise."""

LARGEST_DEVIATION = 4.5
"""A single value counts for at most this many standard deviations."""


class Detection(NamedTuple):
    """The state of a detector after the newest value of its series."""

    active: bool
    """Whether the series is in alarm."""
    opened: bool
    """Whether this value began the alarm."""
    closed: bool
    """Whether this value ended the alarm."""
    since: int | None
    """Position of the first value of the rise; None while there is none."""
    score: float
    """Significance of the rise as a standard normal deviation; -inf while the detector is learning."""
    deviation: float
    """Distance of the newest value from the level, in standard deviations of the series; 0 while learning."""

    @property
    def evaluations_to_false_alarm(self) -> float:
        """Mean number of healthy evaluations of this series before chance alone reaches this score."""
        return 1 / max(INDEPENDENT_SPLITS * _normal_tail(self.score), 1e-12)


class Detector:
    """Detects when a series rises above its own level and stays there.

    For each split of the series, the mean of the last 2 to ``recent`` values is compared with the level before the split
    in units of the fluctuation, with the errors of both estimates. The split that separates best is the change point,
    and its Student t value, as a normal deviation, is the statistic. A sudden rise shows in the shortest splits, a slow
    one in the longer ones.

    The level is the median of up to ``baseline`` values before the rise. A trend that has lasted is expected to go on.
    The fluctuation is the standard deviation of up to ``memory`` values, estimated from successive differences, so that
    a trend does not count as noise. A swing of a single evaluation never raises an alarm: the last two values must both
    lie at least one standard deviation above what was expected. An alarm ends when two values in a row lie within one
    standard deviation of the level from before it.

    Source: Hawkins, Qiu and Kang, *The changepoint model for statistical process control*, 2003, one-sided and robust.

    Args:
        false_alarm_rate: Probability of a false alarm at one evaluation of this series, for independent normal noise, in
            (0, 0.1].
        warmup: Number of values to learn from before the first judgement, at least 4.
        baseline: Largest number of values that make the level.
        recent: Largest number of values that make the rise.
        memory: Largest number of values before the rise that make the fluctuation.
        min_std: Lower bound of the fluctuation, in the unit of the series.
        min_delta: Only what exceeds this counts as a rise, in the unit of the series.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> detector = Detector(false_alarm_rate=1e-3)
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
        memory: int = 32,
        min_std: float = 0.0,
        min_delta: float = 0.0,
    ) -> None:
        if not 0 < false_alarm_rate <= 0.1:
            raise ValueError(f"false_alarm_rate must be in (0, 0.1], got {false_alarm_rate}.")
        if warmup < 4:
            raise ValueError(f"warmup must be at least 4 evaluations, got {warmup}.")
        self.false_alarm_rate = false_alarm_rate
        self.warmup, self.baseline, self.recent, self.memory = warmup, baseline, recent, memory
        self.min_std, self.min_delta = min_std, min_delta
        self.threshold = _normal_quantile(false_alarm_rate / INDEPENDENT_SPLITS)
        self.positions: list[int] = []
        self.values: list[float] = []
        self.active = False
        self.since: int | None = None
        self.calm = 0

    @property
    def healthy(self) -> list[float]:
        """The values that the level is taken from: those before the rise, or the newest where there is none."""
        values = [v for p, v in zip(self.positions, self.values, strict=True) if self.since is None or p < self.since]
        return values[-self.memory :]

    def update(self, position: int, value: float) -> Detection:
        """Adds the next value and returns the new state.

        Args:
            position: Place of the value, such as a training step; increasing.
            value: Larger is worse. A value that is not finite is an alarm by itself, once there were finite ones.
        """
        if not math.isfinite(value):
            opened = bool(self.values) and not self.active
            if self.values:
                self.active, self.calm = True, 0
                self.since = position if self.since is None else self.since
            far = math.inf if self.values else -math.inf
            return Detection(self.active, opened, False, self.since, far, max(far, 0.0))
        self.positions.append(position)
        self.values.append(value)
        detection = self._while_active() if self.active else self._while_calm()
        if not self.active:
            del self.positions[: -self.memory - self.recent]
            del self.values[: -self.memory - self.recent]
        return detection

    def _while_calm(self) -> Detection:
        deviation = 0.0
        if len(self.values) > self.warmup:
            (deviation,) = self._deviations(self.values[-1:], self.values[:-1][-self.memory :])
        statistic, score, since = self._rise()
        self.since = since
        self.active, self.calm = statistic > self.threshold, 0
        return Detection(self.active, self.active, False, since, score, deviation)

    def _while_active(self) -> Detection:
        (deviation,) = self._deviations(self.values[-1:], self.healthy)
        self.calm = self.calm + 1 if deviation < 1 else 0
        # values of the collapse are no example of health, but the last two may be those that end it
        healthy = sum(position < (self.since or 0) for position in self.positions)
        del self.positions[healthy:-2], self.values[healthy:-2]
        if self.calm < 2:
            return Detection(True, False, False, self.since, deviation, deviation)
        self.active, self.since, self.calm = False, None, 0
        return Detection(False, False, True, None, deviation, deviation)

    def _rise(self) -> tuple[float, float, int | None]:
        """Returns the statistic, its score without the limit on single values, and the position where the rise begins."""
        statistic, score, since = -math.inf, -math.inf, None
        for length in range(2, self.recent + 1):
            before = self.values[:-length][-self.memory :]
            if len(before) < self.warmup:
                break
            if min(self.values[-2:]) - median(before[-self.baseline :]) < self.min_std:
                # decides most series at most times, at little cost
                continue
            rise = self._deviations(self.values[-length:], before)
            if min(rise[-2:]) < 1:
                continue
            # the variance of a median is pi / 2 times that of a mean
            error = math.sqrt(1 / length + math.pi / 2 / min(len(before), self.baseline))
            limited = sum(min(r, LARGEST_DEVIATION) for r in rise)
            candidate = _normal_deviation(limited / length / error, len(before) - 1)
            if candidate > statistic:
                statistic, since = candidate, self.positions[-length]
                score = _normal_deviation(sum(rise) / length / error, len(before) - 1)
        return statistic, score, since

    def _level_and_std(self, values: list[float]) -> tuple[float, float]:
        """Returns the median of the newest ``baseline`` values, and the standard deviation of all by their differences."""
        steps = [after - before for before, after in pairwise(values)]
        mean = math.fsum(steps) / len(steps)
        std = math.sqrt(math.fsum((step - mean) ** 2 for step in steps) / (len(steps) - 1) / 2)
        return median(values[-self.baseline :]), max(std, self.min_std, 1e-12)

    def _deviations(self, values: list[float], before: list[float]) -> list[float]:
        """Returns how far values lie above the level of those before, beyond ``min_delta``, in standard deviations."""
        if len(before) < 3:
            return [0.0] * len(values)
        level, std = self._level_and_std(before)
        before = before[-self.baseline :]
        # a series that has been rising all along, and still is, is expected to go on
        slope, recent_slope = _slope(before), _slope(before[-max(4, len(before) // 2) :])
        slope = slope if slope > 0 and recent_slope > slope / 10 else 0.0
        rises = [value - level - slope * ((len(before) + 1) / 2 + ahead) for ahead, value in enumerate(values)]
        # min_delta is taken from rises only
        return [(max(rise - self.min_delta, 0.0) if rise > 0 else rise) / std for rise in rises]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists."""
        return {
            "positions": list(self.positions),
            "values": list(self.values),
            "active": self.active,
            "since": self.since,
            "calm": self.calm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of another detector with the same arguments."""
        self.positions, self.values = list(state["positions"]), list(state["values"])
        self.active, self.since, self.calm = state["active"], state["since"], state["calm"]


def alarm_positions(values: Iterable[float], false_alarm_rate: float = 3e-4) -> list[int]:
    """Returns the positions at which the default detector opens an alarm.

    Args:
        values: The series; larger is worse.
        false_alarm_rate: See :class:`Detector`.

    Example:
        >>> calm = [0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.0, 0.1, -0.1, 0.2]
        >>> alarm_positions([*calm, *calm, 2.0, 2.1])
        [21]
    """
    detector = Detector(false_alarm_rate)
    return [position for position, value in enumerate(values) if detector.update(position, value).opened]


@lru_cache
def evaluations_needed(false_alarm_rate: float, warmup: int) -> int:
    """Returns the smallest number of evaluations with which an alarm is possible, however large the rise.

    Args:
        false_alarm_rate: See :class:`Detector`.
        warmup: See :class:`Detector`.

    Example:
        >>> evaluations_needed(3e-4, 6)
        13
    """
    total = warmup + 2
    while not any(_alarms(false_alarm_rate, warmup, healthy, total) for healthy in range(warmup, total - 1)):
        total += 1
    return total


def _alarms(false_alarm_rate: float, warmup: int, healthy: int, total: int) -> bool:
    """Whether a rise without bound after so many healthy values raises an alarm."""
    detector = Detector(false_alarm_rate, warmup=warmup)
    return any(detector.update(i, float(i >= healthy)).active for i in range(total))


def _slope(values: list[float]) -> float:
    """Returns the median slope between values half the series apart (Theil's incomplete method)."""
    half = len(values) // 2
    rises = [after - before for before, after in zip(values, values[-half:], strict=False)]
    return median(rises) / (len(values) - half)


def _normal_tail(deviation: float) -> float:
    return math.erfc(deviation / math.sqrt(2)) / 2


def _normal_quantile(tail: float) -> float:
    from scipy.special import ndtri

    return -float(ndtri(tail))


def _normal_deviation(student: float, freedom: int) -> float:
    """Returns the normal deviation that is as rare as a Student t value."""
    from scipy.special import stdtr

    # beyond this tail the quantile leaves the range of floats
    return _normal_quantile(max(float(stdtr(freedom, -student)), 1e-300))
