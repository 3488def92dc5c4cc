"""A sequential change-point test: does a series of numbers rise above its own level by more than it fluctuates?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

INDEPENDENT_SPLITS = 3.0
"""The maximum over all splits of a series exceeds a threshold as often as that of this many independent values, by
simulation on normal noise."""

LARGEST_DEVIATION, LONE_DEVIATION = 6.0, 4.5
"""Where a series has not fluctuated, or less than ``min_std``, a value counts for at most so many standard deviations: for
the first number if both of the newest two values are high, and else for the second."""

HIGH = 3.0
"""A value is high from so many standard deviations above the level on."""

PRIOR_CORRELATION, PRIOR_VALUES = 0.5, 5.0
"""The correlation of successive values that is assumed beforehand, and the number of values that it is worth. Series of
real runs lie between 0 and 0.7."""

LARGEST_CORRELATION = 0.85
"""A larger correlation cannot be told from a trend."""

FORGETTING, RECENT_STD = 8.0, 1.04
"""The fluctuation is at least the recent one, with weights that fall by the factor e in so many values; and a margin."""

CALIBRATION = (0.38, 1.05, 9.0)
"""The threshold is multiplied by a + b * correlation + c / number of values, which holds the rate where the correlation
must be estimated; ``python -m benchmarks.detector --calibrate`` shows what other constants give."""

KNOWN, UNKNOWN = 0.4, 3.0
"""Where the series fluctuates by no more than ``min_std``, which was measured on many runs, this part of the threshold holds
for its own fluctuation, since what is known beforehand decides; and all of it from this many times ``min_std`` on."""

LEAST_RISES = (4.2, 2.4, 1.25)
"""Least mean of the lower half of 2, 3 and at least 4 values after a rise, in standard deviations, at the rate 3e-4. A
rise lifts all values, but noise that grows lifts some, so this tells one from the other."""

SURE = 2.0
"""A rise exceeds ``min_delta`` if the mean of the newest two values does so by this many standard errors."""

FIRST_BLOCK, BLOCK, DIFFERENT = 12, 4, 3.0
"""Older values are left out, in blocks, from the first whose median lies so many standard deviations from the mean of the
newer ones: at the start of a run a series may have been far from where it has settled."""

IMPROVING = 2.5
"""A fall of a series by so many standard errors is a trend."""

MOST_FREEDOM = 31
"""Largest number of degrees of freedom, with which a Student t value is nearly a normal one."""

REACHED = 5
"""Newest values of a series that improves, whose median is its level; older ones lie where it no longer is."""

HELD, STAYS = 3, 0.8
"""A small rise is an alarm once it was found so many times without a break, each time at a value of at least this part of the
mean of the last two. What a GAN loses for a moment comes back before."""

CERTAIN = 1.5
"""A small rise is an alarm at once where its significance against the series' own fluctuation exceeds this many thresholds."""

LIMIT_FACTOR, LIMIT_MARGIN = 4.0, 1.0
"""A value after a rise counts for at most this many times the mean of the two smallest, and this many standard deviations
more."""


RELAPSED, LOST, SURELY_WORSE, FAR_WORSE = 4, 0.4, 4.0, 8.0
"""A series relapses where so many values in a row are worse than all since it was best, by this part of all that it had
improved, by so many times the range of the values since, and by so many standard deviations of its noise."""

BEST, EARLY = 3, 40
"""Number of values in a row whose mean says when a series was best, and largest number of values with which it relapses."""

NOISE_OF_BEND = 1 / (0.6745 * math.sqrt(6))
"""Standard deviation of white noise for the median size of its second differences."""


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
    """Distance of the newest value from the level, in standard deviations of the series; 0 while learning, and for rises
    up to ``min_delta``."""
    pending: bool = False
    """Whether a rise was found that is too small to be an alarm yet."""

    @property
    def evaluations_to_false_alarm(self) -> float:
        """Mean number of healthy evaluations of this series before chance alone reaches this score."""
        return 1 / max(INDEPENDENT_SPLITS * _normal_tail(self.score), 1e-12)


class Detector:
    """Detects when a series rises above its own level and stays there.

    The series is modelled as a level with autocorrelated noise, AR(1). For each split of the series, the last 2 to
    ``recent`` values are compared with those before. A split counts as a rise if all of these hold:

    1. The generalized least-squares estimate of the step is significant: its t value, given the correlation and the
       standard deviation of the values before, exceeds a threshold that was calibrated by simulation. The correlation is
       corrected for its bias, drawn towards what real runs have, and varied within its error; the worse result counts.
    2. The lower half of the values is high. A larger variance lifts some values, and a rise lifts all.
    3. There are enough values, and the rise is large compared with ``min_std``. For this, a value counts for at most 6
       standard deviations, and for at most 4.5 unless the last two are both high. Where the series fluctuates by no more
       than ``min_std``, condition 1 is less strict.
    4. The last two values both lie a standard deviation above what was expected, and above the median of the last 16 before
       the rise, so that a single one is no alarm. A rise up to ``small`` must last for two more, unless the series hardly
       fluctuated before.

    Early in a run too little is known of the fluctuation. There a series also relapses, without any of these conditions, if
    four values in a row, or ``shortest``, are worse than all since it was best: by 40 % of all that it had improved, by four
    times the range of the values in between, and by eight times ``min_std`` and its noise, as its second differences show
    it.

    The most significant split is the change point. It is an alarm if the rise also exceeds ``min_delta``. A sudden rise
    shows in the shortest splits, a slow one in the longer ones. A rising trend that has lasted is expected to go on, and
    the level of a series that improves is the end of a parabola, or the median of its newest values if that is higher. An
    alarm ends when two values in a row lie within a standard deviation, or half of ``min_delta``, of the level from before
    it.

    Sources: Hawkins, Qiu and Kang, *The changepoint model for statistical process control*, 2003, for the comparison of
    all splits; Kendall, *Note on bias in the estimation of autocorrelation*, 1954; Lu and Reynolds, *Control charts for
    monitoring the mean and variance of autocorrelated processes*, 1999, for the test on the residuals of AR(1).

    Args:
        false_alarm_rate: Probability of a false alarm at one evaluation of this series, in (0, 0.1].
        warmup: Number of values to learn from before the first judgement, at least 4.
        baseline: Largest number of values that make the level.
        recent: Largest number of values that make the rise.
        shortest: Smallest number of values that make the rise, 2 to ``recent``.
        memory: Largest number of values before the rise that make the fluctuation.
        min_std: Lower bound of the fluctuation, in the unit of the series.
        min_delta: Least rise that matters, in the unit of the series. It does not change how significant a rise is.
        small: Rises up to this, in the unit of the series, must last for two more values.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> detector = Detector(false_alarm_rate=1e-3)
        >>> series = [0.0, 0.3, -0.2, 0.1, -0.3, 0.2, 0.0, 0.1, -0.1, 0.2, 2.0, 0.1, -0.2, 0.1, 0.0, 4.0, 4.1]
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
        baseline: int = 40,
        recent: int = 14,
        shortest: int = 2,
        memory: int = 64,
        min_std: float = 0.0,
        min_delta: float = 0.0,
        small: float = 0.0,
    ) -> None:
        if not 0 < false_alarm_rate <= 0.1:
            raise ValueError(f"false_alarm_rate must be in (0, 0.1], got {false_alarm_rate}.")
        if warmup < 4:
            raise ValueError(f"warmup must be at least 4 evaluations, got {warmup}.")
        if shortest < 2:
            raise ValueError(f"shortest must be at least 2 values, got {shortest}.")
        if recent < shortest:
            raise ValueError(f"recent must be at least shortest, {shortest} values, got {recent}.")
        self.false_alarm_rate = false_alarm_rate
        self.warmup, self.baseline, self.recent, self.memory = warmup, baseline, recent, memory
        self.min_std, self.min_delta, self.small, self.shortest = min_std, min_delta, small, shortest
        self.threshold = _normal_quantile(false_alarm_rate / INDEPENDENT_SPLITS)
        # thresholds of deviations grow with that of the significance
        strictness = self.threshold / _normal_quantile(3e-4 / INDEPENDENT_SPLITS)
        self.least_rises = tuple(strictness * least for least in LEAST_RISES)
        self.positions: list[int] = []
        self.values: list[float] = []
        self.active = False
        self.since: int | None = None
        self.calm = self.held = 0
        self._pasts: dict[int, _Past] = {}

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
            deviation = self._deviation(self._past(len(self.values) - 1))
        rise, self.since = self._rise()
        relapsed = None if rise.alarming else self._relapse()
        if relapsed is not None:
            self.active, self.since, self.calm, self.held = True, relapsed, 0, HELD
            return Detection(True, True, False, self.since, max(rise.score, self.threshold), deviation)
        self.calm = 0
        self.held = self.held + (rise.newest >= STAYS * rise.height) if rise.alarming else 0
        lasts = rise.height > self.small or rise.statistic > CERTAIN * self.threshold or self.held >= HELD
        self.active, pending = rise.alarming and lasts, rise.alarming and not lasts
        return Detection(self.active, self.active, False, self.since, rise.score, deviation, pending)

    def _while_active(self) -> Detection:
        healthy = sum(position < (self.since or 0) for position in self.positions)
        deviation, above = 0.0, -math.inf
        if healthy >= 3:
            past = self._past(healthy)
            deviation, above = self._deviation(past), self.values[-1] - past.expected(0)
            above /= max(past.unit, self.min_delta / 2)
        self.calm = self.calm + 1 if above < 1 else 0
        # values of the collapse are no example of health, but the last two may be those that end it
        del self.positions[healthy:-2], self.values[healthy:-2]
        if self.calm < 2:
            return Detection(True, False, False, self.since, deviation, deviation)
        self.active, self.since, self.calm, self.held = False, None, 0, 0
        return Detection(False, False, True, None, deviation, deviation)

    def _relapse(self) -> int | None:
        """Returns the position of the first of the newest values, if these lost much of what the series had improved.

        It needs no level and no correlation, of which too little is known while a model still improves fast.
        """
        values, end = self.values, len(self.values) - max(RELAPSED, self.shortest)
        if end < 2 * BEST or len(values) > EARLY:
            return None
        means = [fmean(values[start : start + BEST]) for start in range(BEST, end - BEST + 1)]
        best = min(means)
        since, newest = values[BEST + means.index(best) : end], values[end:]
        bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:end], values[2:end], strict=False)]
        noise = max(NOISE_OF_BEND * median(bends), self.min_std)
        improved, fall = max(values[:BEST]) - best, min(newest) - best
        least = max(LOST * improved, SURELY_WORSE * (max(since) - min(since)), FAR_WORSE * noise, self.min_delta)
        return self.positions[end] if fall > least and min(newest) > max(since) else None

    def _rise(self) -> tuple[_Rise, int | None]:
        """Returns the most significant rise and the position of its first value; None where there is no rise."""
        best, since = _Rise(False, -math.inf, -math.inf, 0.0, 0.0), None
        for length in range(self.shortest, self.recent + 1):
            end = len(self.values) - length
            if end < self.warmup:
                break
            past = self._past(end)
            # decides most series at most times, at little cost
            if min(self.values[-2:]) < past.least:
                continue
            rise = self._compared(past, self.values[end:])
            if rise is not None and rise[:2] > best[:2]:
                best, since = rise, self.positions[end]
        return best, since

    def _compared(self, past: _Past, values: list[float]) -> _Rise | None:
        """Returns the rise from the past to these values, or None where one of the conditions does not hold."""
        length = len(values)
        heights = [value - past.expected(ahead) for ahead, value in enumerate(values)]
        if min(heights[-2:]) < past.unit:
            return None
        # against the level of a longer past, with the standard deviation of the series itself
        rises = [(value - past.mean_expected(ahead)) / past.std for ahead, value in enumerate(values)]
        lowest = sorted(rises)
        if fmean(lowest[: max(2, length // 2)]) < self.least_rises[min(length - 2, len(self.least_rises) - 1)]:
            return None
        limit = LIMIT_FACTOR * max(fmean(lowest[:2]), 0.0) + LIMIT_MARGIN
        limited = [min(rise, limit) for rise in rises]
        error = past.error_of(length)
        smallest = max(self.min_std, 1e-12)
        freedom = past.freedom_with(length)
        most = LARGEST_DEVIATION if min(heights[-2:]) > HIGH * past.unit else LONE_DEVIATION
        floor = _normal_deviation(fmean(min(h / smallest, most) for h in heights) / error, freedom)
        statistic, score = math.inf, _normal_deviation(fmean(heights) / smallest / error, freedom)
        for correlation in past.correlations:
            calibration = CALIBRATION[0] + CALIBRATION[1] * correlation + CALIBRATION[2] / past.count
            calibration *= past.strictness
            statistic = min(statistic, self._calibrated(past.step(limited, correlation), past.count - 2, calibration))
            score = min(score, self._calibrated(past.step(rises, correlation), past.count - 2, calibration))
        height = fmean(heights[-2:])
        surely = height - SURE * past.error_of(2) * past.unit
        matters = not self.min_delta or surely > self.min_delta
        alarming = matters and min(statistic, floor) > self.threshold
        return _Rise(alarming, statistic, max(min(statistic, floor), score), height, heights[-1])

    def _calibrated(self, student: float, freedom: int, calibration: float) -> float:
        """Returns the normal deviation that exceeds the threshold as soon as t exceeds the calibrated quantile.

        Beyond the threshold it grows no faster than t does.
        """
        critical = calibration * _student_quantile(self.threshold, freedom)
        if student <= critical:
            return self.threshold * student / critical
        return (
            max(self.threshold, 0.0)
            + _normal_deviation(student / max(calibration, 1.0), freedom)
            - _normal_deviation(critical / max(calibration, 1.0), freedom)
        )

    def _deviation(self, past: _Past) -> float:
        """Returns how far the newest value lies above the level, in standard deviations."""
        height = self.values[-1] - past.expected(0)
        return 0.0 if 0 < height <= self.min_delta else height / past.unit

    def _past(self, end: int) -> _Past:
        """Returns what the values before an index show; the last ones are needed again at the next values."""
        position = self.positions[end - 1]
        if position not in self._pasts:
            if len(self._pasts) > 2 * self.recent:
                used = set(self.positions[-self.recent - 2 :])
                self._pasts = {key: past for key, past in self._pasts.items() if key in used}
            self._pasts[position] = _Past(self.values[max(0, end - self.memory) : end], self.baseline, self.min_std)
        return self._pasts[position]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists."""
        return {
            "positions": list(self.positions),
            "values": list(self.values),
            "active": self.active,
            "since": self.since,
            "calm": self.calm,
            "held": self.held,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of another detector with the same arguments."""
        self.positions, self.values = list(state["positions"]), list(state["values"])
        self.active, self.since = state["active"], state["since"]
        # states of earlier versions hold no rise
        self.calm, self.held = state["calm"], state.get("held", 0)
        self._pasts = {}


class _Rise(NamedTuple):
    """A step between two parts of a series."""

    alarming: bool
    statistic: float
    """Significance against the fluctuation of the series, as a normal deviation, with single values limited."""
    score: float
    """Significance against that and against ``min_std``, without the limits."""
    height: float
    """Mean of the newest two values over the level, in the unit of the series."""
    newest: float
    """The newest value over the level, in the unit of the series."""


class _Past:
    """Level, trend, fluctuation and correlation of the values before a rise.

    Args:
        values: At least 3.
        baseline: Number of the newest ones that make the level.
        min_std: Lower bound of the fluctuation.
    """

    RECENT = 16
    """The newest values, whose median is the level that later values are compared with in their own unit."""

    def __init__(self, values: list[float], baseline: int, min_std: float) -> None:
        self.total = len(values)
        recent = values[-self.RECENT :]
        values = _alike(values)
        self.count = len(values)
        self.newest = values[-1]
        base = values[-baseline:]
        self.size, self.recent_size = len(base), len(recent)
        self.level, self.is_known = median(recent), False
        # the mean of the middle half hardly depends on outliers, and its variance is 1.2 times that of a mean
        quarter = len(base) // 4
        self.mean = fmean(sorted(base)[quarter : len(base) - quarter])
        self.variance_factor = 1.2
        residuals, trend = _detrended(values)
        improves, bent = False, residuals
        if trend < 0 and self.count > 5:
            # the residuals of a line hide the trend of a series that bends
            bent = [r - p for r, p in zip(residuals, _bent(residuals), strict=True)]
            self._set_fluctuation(bent, 3)
            improves = trend < -IMPROVING * self._error_of_slope()
        if improves:
            self._set_reached(values, values[-1] - bent[-1], min_std)
        else:
            self._set_fluctuation(residuals, 2)
        self.unit = max(self.std, min_std)
        self.strictness = min(1.0, max(KNOWN, self.std / (UNKNOWN * max(min_std, 1e-12))))
        # a series that has been rising all along, and still is, is expected to go on
        slope, newest = min(_slope(recent), _slope(values)), _slope(recent[-max(4, len(recent) // 2) :])
        self.slope = slope if slope > 0 and newest > slope / 10 else 0.0
        self.least = max(self.expected(0), median(recent)) + self.unit
        """What both of the newest two values exceed in a rise: what is no worse than some values ago is none."""

    def _error_of_slope(self) -> float:
        correlation = self.correlations[0]
        return self.std * math.sqrt(12 / self.count**3 * (1 + correlation) / (1 - correlation))

    def _set_reached(self, values: list[float], end: float, min_std: float) -> None:
        """Sets the level of a series that improves, whose parabola ends at ``end``: an old mean or median is none."""
        self.mean, self.size = end, self.count
        # of the variance of a mean
        self.variance_factor = 9.0
        reached = max(end, median(values[-REACHED:]))
        if reached < self.level:
            self.level, self.recent_size = reached, REACHED
            self.is_known = self.std <= min_std

    def _set_fluctuation(self, residuals: list[float], parameters: int) -> None:
        """Sets standard deviation and correlations by the residuals of a polynomial with so many parameters."""
        n, squares = self.count, math.fsum(r * r for r in residuals)
        correlation = math.fsum(a * b for a, b in pairwise(residuals)) / squares if squares > 0 else 0.0
        # the bias of a correlation about a polynomial; Kendall (1954)
        used = parameters + 2
        correlation = (correlation * n + parameters) / (n - used) if n > used else 0.0
        correlation = (correlation * n + PRIOR_CORRELATION * PRIOR_VALUES) / (n + PRIOR_VALUES)
        error = math.sqrt(max(1 - min(max(correlation, 0.0), 0.95) ** 2, 0.1) / n)
        self.correlations = [min(max(c, 0.0), LARGEST_CORRELATION) for c in (correlation, correlation + error)]
        # the polynomial takes as much of the variance as so many means do
        left = max(1 - parameters * _variance_of_mean(n, self.correlations[0]), 0.15)
        weights = _forgetting(n)
        lately = math.fsum(w * r * r for w, r in zip(weights, residuals, strict=True)) / math.fsum(weights)
        self.std = max(math.sqrt(squares / max(n - parameters, 1) / left), RECENT_STD * math.sqrt(lately), 1e-12)

    def expected(self, ahead: int) -> float:
        """Returns the value that is expected so many values after the next."""
        return self.level + self.slope * ((self.recent_size + 1) / 2 + ahead)

    def error_of(self, length: int) -> float:
        """Returns the standard error of the mean height of so many values, in standard deviations."""
        # the variance of a median is pi / 2 times that of a mean
        return math.sqrt(1 / length + math.pi / 2 / self.recent_size)

    def freedom_with(self, length: int) -> int:
        """Returns the degrees of freedom of a comparison with so many values in units of ``min_std``.

        Of a series that improves, few values are left as its level, and ``min_std`` was measured on many runs.
        """
        return MOST_FREEDOM if self.is_known else min(self.total + length - 2, MOST_FREEDOM)

    def mean_expected(self, ahead: int) -> float:
        """Returns the same from the mean of a longer past."""
        return self.mean + self.slope * ((self.size + 1) / 2 + ahead)

    def step(self, rises: list[float], correlation: float) -> float:
        """Returns the t value of a step, estimated by generalized least squares given the correlation of AR(1)."""
        rest = 1 - correlation
        before = max((self.newest - self.mean_expected(-1)) / self.std, -1.0)
        innovations = [after - correlation * earlier for earlier, after in zip([before, *rises], rises, strict=False)]
        information = 1 + (len(rises) - 1) * rest**2
        step = (innovations[0] + rest * math.fsum(innovations[1:])) / information
        # an error of the mean moves all innovations
        weight = (rest + (len(rises) - 1) * rest**2) / information
        error = (1 - correlation**2) / information + weight**2 * self.variance_factor * _variance_of_mean(
            self.size, correlation
        )
        return step / math.sqrt(error)


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
        9
    """
    total = warmup + 2
    while not any(_alarms(false_alarm_rate, warmup, healthy, total) for healthy in range(warmup, total - 1)):
        total += 1
    return total


def _alarms(false_alarm_rate: float, warmup: int, healthy: int, total: int) -> bool:
    """Whether a rise without bound after so many healthy values raises an alarm."""
    detector = Detector(false_alarm_rate, warmup=warmup)
    return any(detector.update(i, float(i >= healthy)).active for i in range(total))


@lru_cache(maxsize=64)
def _forgetting(count: int) -> list[float]:
    """Returns weights that fall from the newest value to the oldest."""
    return [math.exp((i + 1 - count) / FORGETTING) for i in range(count)]


@lru_cache(maxsize=256)
def _student_quantile(deviation: float, freedom: int) -> float:
    """Returns the Student t value that is as rare as a normal deviation."""
    from scipy.special import stdtrit

    return -float(stdtrit(max(freedom, 1), _normal_tail(deviation)))


def _variance_of_mean(count: int, correlation: float) -> float:
    """Returns the variance of the mean of values of AR(1) with variance 1."""
    rest = 1 - correlation
    return ((1 + correlation) / rest - 2 * correlation * (1 - correlation**count) / (count * rest**2)) / count


def _alike(values: list[float]) -> list[float]:
    """Returns the newest values, back to where the series was at another level or fell steeply, at least 12."""
    start = len(values) - FIRST_BLOCK
    while start > 0:
        newer, older = values[start:], values[max(0, start - BLOCK) : start]
        mean = fmean(newer)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in newer) / (len(newer) - 1))
        if abs(median(older) - mean) > DIFFERENT * std:
            break
        start -= BLOCK
    return values[max(0, start) :]


def _detrended(values: list[float]) -> tuple[list[float], float]:
    """Returns the residuals from the line of least squares, and its slope."""
    middle, mean = (len(values) - 1) / 2, fmean(values)
    moments = math.fsum((i - middle) * value for i, value in enumerate(values))
    slope = moments * 12 / (len(values) * (len(values) ** 2 - 1))
    return [value - mean - slope * (i - middle) for i, value in enumerate(values)], slope


def _bent(residuals: list[float]) -> list[float]:
    """Returns what the parabola of least squares adds to a line, from the residuals of the line."""
    n, middle = len(residuals), (len(residuals) - 1) / 2
    bend = [(i - middle) ** 2 - (n**2 - 1) / 12 for i in range(n)]
    factor = math.fsum(b * r for b, r in zip(bend, residuals, strict=True)) / math.fsum(b * b for b in bend)
    return [factor * b for b in bend]


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
