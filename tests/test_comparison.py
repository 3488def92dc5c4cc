"""Two runs compared."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_gendiag.detection.comparison import LEAST, WINDOW, Track, compared, in_words


def noise(runs: int, correlation: float, seed: int = 0, length: int = 30) -> torch.Tensor:
    """(runs, length) of AR(1) with variance 1."""
    innovations = torch.randn(runs, length + 50, generator=torch.Generator().manual_seed(seed)).double()
    value, series = torch.zeros(runs).double(), []
    for column in innovations.T:
        value = correlation * value + math.sqrt(1 - correlation**2) * column
        series.append(value)
    return torch.stack(series[50:], 1)


def track(values: torch.Tensor, **options: float) -> Track:
    return Track([-value for value in values.tolist()], values.tolist(), "quantity", **options)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_runs_that_differ_by_chance_alone_are_rarely_told_apart(correlation: float) -> None:
    names, pairs = ["a", "b", "c"], 500
    rows = noise(2 * pairs * len(names), correlation).view(pairs, 2, len(names), -1)
    wrong = 0
    for first, second in rows:
        changes = compared(*(dict(zip(names, map(track, run), strict=True)) for run in (first, second)))
        wrong += any(change.verdict != "no sure difference" for change in changes)
    # the stated rate is 5 % over all series
    assert wrong <= 0.05 * pairs + 3 * math.sqrt(0.05 * pairs)
    # a comparison that never tells anything apart would pass too
    found = [compared({"a": track(one)}, {"a": track(other + 6)})[0].verdict for one, other in rows[:, :, 0]]
    assert found.count("worse") >= 0.9 * pairs


def test_the_interval_is_that_of_welch_where_values_do_not_depend_on_each_other() -> None:
    # alternating values have no positive correlation beyond what is assumed beforehand
    one, other = noise(2, 0.0, seed=4, length=WINDOW)
    [change] = compared({"a": track(one)}, {"a": track(other)}, confidence=0.9)
    test = stats.ttest_ind(other, one, equal_var=False)
    assert change.difference == pytest.approx(float(other.mean() - one.mean()))
    low, high = test.confidence_interval(0.9)
    # wider, since successive evaluations of real runs depend on each other
    assert (high - low) / 2 < change.margin < 3.5 * (high - low) / 2


def test_what_does_not_matter_or_is_not_known_is_no_difference() -> None:
    calm = torch.zeros(20).double()
    assert compared({"a": track(calm)}, {"a": track(calm + 0.1)})[0].verdict == "worse"
    assert compared({"a": track(calm)}, {"a": track(calm - 0.1)})[0].verdict == "better"
    assert compared({"a": track(calm, min_delta=0.2)}, {"a": track(calm + 0.1)})[0].verdict == "no sure difference"
    assert compared({"a": track(calm, min_std=0.2)}, {"a": track(calm + 0.1)})[0].verdict == "no sure difference"
    short = compared({"a": track(calm)}, {"a": track(calm[: LEAST - 1])})[0]
    assert short.verdict == "not compared"
    assert math.isnan(short.difference)
    broken = compared({"a": track(calm)}, {"a": track(calm * math.nan)})[0]
    assert broken.verdict == "not compared"
    assert math.isnan(broken.second)
    assert compared({"a": track(calm)}, {"b": track(calm)}) == []


def test_only_the_newest_evaluations_count() -> None:
    values = torch.zeros(40).double()
    values[:-WINDOW] = 9
    [change] = compared({"a": track(values)}, {"a": track(values * 0)})
    assert change.verdict == "no sure difference"


def test_the_words_name_what_is_worst_first() -> None:
    calm = 0.01 * noise(1, 0.0)[0]
    tracks = {name: track(calm) for name in ("left", "right", "top", "bottom")}
    other = {"left": track(calm + 1), "right": track(calm + 3), "top": track(calm - 1), "bottom": track(calm)}
    words = in_words({"cms": compared(tracks, other)})
    assert words.index("Worse: right (quantity") < words.index("left (quantity") < words.index("Better: top")
    assert words.endswith("No sure difference in 1 other series.")
    assert in_words({}) == "The runs have no series in common."
    assert in_words({"cms": compared(tracks, {name: track(calm[:2]) for name in tracks})}) == (
        "4 series have fewer than 4 evaluations."
    )
