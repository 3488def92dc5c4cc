"""Two runs compared: which regions, classes and dimensions are surely better or worse in one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Literal, NamedTuple

from lightning_gendiag.detection.alarm import listed

WINDOW = 20
"""Number of the newest evaluations that are compared."""

LEAST = 4
"""With fewer evaluations of a run, nothing can be said."""

PRIOR_CORRELATION, PRIOR_VALUES, LARGEST_CORRELATION = 0.5, 5.0, 0.85
"""The correlation of successive evaluations that is assumed beforehand, what it is worth, and the largest one."""

TINY = 1e-18
"""Smallest variance, so that values that are all equal can be compared."""

CONFIDENCE = 0.95
"""Confidence of all statements about the series of one diagnostic together."""

Verdict = Literal["better", "worse", "no sure difference", "not compared"]


class Track(NamedTuple):
    """The evaluations of one series in one run."""

    values: Sequence[float]
    """The numbers as people know them."""
    severities: Sequence[float]
    """The same on a scale on which larger is worse, one for each value."""
    quantity: str = ""
    """What is measured."""
    min_std: float = 0.0
    """Fluctuations of the severity below this are never news."""
    min_delta: float = 0.0
    """Differences of the severity up to this are no news."""


class Change(NamedTuple):
    """How one series differs between two runs."""

    name: str
    quantity: str
    first: float
    """Mean of the newest values in the first run."""
    second: float
    """The same in the second run."""
    difference: float
    """How much worse the second run is, on the scale of the severity."""
    margin: float
    """Half the width of the interval of this difference."""
    verdict: Verdict
    """Of the second run against the first."""


def compared(first: Mapping[str, Track], second: Mapping[str, Track], confidence: float = CONFIDENCE) -> list[Change]:
    """Compares the newest evaluations of the series that two runs have.

    The mean severity of the newest evaluations is compared by Welch's t interval. An evaluation depends on those before, so
    the error of the mean is computed for AR(1) noise. The level of confidence holds for all series together (Bonferroni).

    Args:
        first: Series of the first run, by name.
        second: Series of the second run.
        confidence: Confidence of all statements together, in (0, 1).

    Returns:
        One change for each series of both, in the order of the first run.

    Example:
        >>> calm = [0.90, 0.91, 0.89, 0.90, 0.92, 0.90, 0.91, 0.90]
        >>> broken = [value - 0.5 for value in calm]
        >>> tracks = [{"top": Track(run, [-value for value in run], min_std=0.01)} for run in (calm, broken)]
        >>> [change.verdict for change in compared(*tracks)]
        ['worse']
    """
    # such as samples in one run and reconstructions in the other
    both = [name for name in first if name in second and first[name].quantity == second[name].quantity]
    return [_change(name, first[name], second[name], (1 - confidence) / max(len(both), 1)) for name in both]


class _Mean(NamedTuple):
    """Mean of correlated values."""

    mean: float
    variance: float
    """Of the mean."""
    freedom: float


def _change(name: str, first: Track, second: Track, alpha: float) -> Change:
    from scipy.special import stdtrit

    means = [_mean(track) for track in (first, second)]
    before, after = (fmean(_newest(track.values) or [math.nan]) for track in (first, second))
    broken = [len(track.severities) >= LEAST and not math.isfinite(track.severities[-1]) for track in (first, second)]
    if broken[0] != broken[1]:
        verdict: Verdict = "worse" if broken[1] else "better"
        shown = (math.nan, after) if broken[0] else (before, math.nan)
        return Change(name, first.quantity, *shown, math.inf if broken[1] else -math.inf, 0.0, verdict)
    one, other = means
    if one is None or other is None:
        return Change(name, first.quantity, before, after, math.nan, math.nan, "not compared")
    variance = one.variance + other.variance
    # Welch and Satterthwaite
    freedom = variance**2 / sum(mean.variance**2 / mean.freedom for mean in (one, other))
    margin = float(stdtrit(freedom, 1 - alpha / 2)) * math.sqrt(variance)
    difference = other.mean - one.mean
    verdict = "no sure difference"
    if abs(difference) - margin > max(first.min_delta, second.min_delta):
        verdict = "worse" if difference > 0 else "better"
    return Change(name, first.quantity, before, after, difference, margin, verdict)


def _newest(values: Sequence[float]) -> list[float]:
    return [value for value in values[-WINDOW:] if math.isfinite(value)]


def _mean(track: Track) -> _Mean | None:
    """The mean severity of the newest evaluations; None with too few."""
    values = _newest(track.severities)
    n = len(values)
    if n < LEAST:
        return None
    mean = fmean(values)
    away = [value - mean for value in values]
    squares = math.fsum(a * a for a in away)
    found = math.fsum(a * b for a, b in pairwise(away)) / squares if squares > 0 else 0.0
    # the bias of a correlation about a mean; Kendall (1954)
    found = (found * n + 1) / (n - 3)
    correlation = (found * n + PRIOR_CORRELATION * PRIOR_VALUES) / (n + PRIOR_VALUES)
    correlation = min(max(correlation, 0.0), LARGEST_CORRELATION)
    # so many independent values say as much about the mean
    worth = max(n * (1 - correlation) / (1 + correlation), 1.5)
    # the mean takes its part of the variance
    variance = max(squares / (n * (1 - 1 / worth)), track.min_std**2, TINY)
    return _Mean(mean, variance / worth, max(worth - 1, 1.0))


def _shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "nan or inf"


def in_words(changes: Mapping[str, Sequence[Change]]) -> str:
    """Returns the changes of each diagnostic as sentences, what is worse first.

    Args:
        changes: By the name of the diagnostic.

    Example:
        >>> in_words({"cms": [Change("top", "cosine mean similarity", 0.9, 0.4, 0.5, 0.1, "worse")]})
        'Worse: top (cosine mean similarity 0.400, was 0.900).'
    """
    sentences = []
    for verdict in ("worse", "better"):
        some = [change for group in changes.values() for change in group if change.verdict == verdict]
        some.sort(key=lambda change: -abs(change.difference) / max(change.margin, 1e-12))
        named = [f"{one.name} ({one.quantity} {_shown(one.second)}, was {_shown(one.first)})" for one in some]
        if named:
            sentences.append(f"{verdict.capitalize()}: {listed(named, 8)}.")
    same = sum(change.verdict == "no sure difference" for group in changes.values() for change in group)
    unknown = sum(change.verdict == "not compared" for group in changes.values() for change in group)
    if same:
        sentences.append(f"No sure difference in {same} {'other ' if sentences else ''}series.")
    if unknown:
        sentences.append(f"{unknown} series have too few evaluations, or none that is finite.")
    return " ".join(sentences) or "The runs have no series in common."
