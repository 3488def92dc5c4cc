from __future__ import annotations

import math
import random

import pytest

from lightning_gendiag.detectors import DETECTORS, ChangePoint, Cusum, Detector, PageHinkley


def normal(n: int, seed: int, sigma: float = 1.0) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(0, sigma) for _ in range(n)]


def alarms(series: list[float], kind: type[Detector] = ChangePoint, **options: float) -> list[int]:
    detector = kind(**({"false_alarm_rate": 1e-3} | options))
    return [i for i, value in enumerate(series) if detector.update(i, value).opened]


@pytest.mark.parametrize("rate", [1e-2, 2e-3])
def test_false_alarms_come_at_most_as_often_as_stated(rate: float) -> None:
    runs, length = 60, 200
    count = sum(len(alarms(normal(length, seed), false_alarm_rate=rate)) for seed in range(runs))
    expected = rate * runs * length
    # three standard deviations of a Poisson count
    assert count < expected + 3 * math.sqrt(expected)
    # and not by never alarming
    assert count > expected / 6


@pytest.mark.parametrize("rise", [6.0, 20.0])
def test_a_sudden_rise_is_found_in_two_evaluations(rise: float) -> None:
    for seed in range(20):
        series = normal(40, seed)
        assert alarms(series) == []
        assert alarms(series[:30] + [value + rise for value in series[30:]])[0] <= 32


@pytest.mark.parametrize("kind", [Cusum, PageHinkley])
def test_cumulative_sums_alarm_about_as_often_as_stated(kind: type[Detector]) -> None:
    rate, runs, length = 5e-3, 60, 200
    # a level that is estimated from few values costs the textbook's threshold a factor
    count = sum(
        len(alarms(normal(length, seed), kind, false_alarm_rate=rate, baseline=64, memory=64)) for seed in range(runs)
    )
    assert 0 < count < 3 * rate * runs * length


@pytest.mark.parametrize("kind", [Cusum, PageHinkley])
def test_cumulative_sums_find_sudden_rises_and_slides(kind: type[Detector]) -> None:
    for seed in range(10):
        series = normal(60, seed)
        sudden = alarms(series[:40] + [value + 6 for value in series[40:]], kind)
        assert 40 <= next(i for i in sudden if i >= 40) <= 44
        slide = alarms([value + max(0.0, 0.5 * (i - 25)) for i, value in enumerate(series)], kind)
        assert any(i > 25 for i in slide)


def test_a_series_that_has_been_rising_all_along_is_expected_to_go_on() -> None:
    wrong = 0
    for seed in range(20):
        rising = [0.07 * i + value for i, value in enumerate(normal(60, seed, 0.03))]
        wrong += bool(alarms(rising, grain=0.2))
        # but not faster
        assert 40 < alarms(rising[:40] + [value + 2 for value in rising[40:]], grain=0.2)[-1] <= 43
    assert wrong <= 1


def test_a_climb_that_has_ended_hides_no_fault() -> None:
    for seed in range(10):
        climb = [10 * (1 - math.exp(-i / 4)) + 0.1 * value for i, value in enumerate(normal(40, seed))]
        assert [i for i in alarms(climb[:30] + [value + 2 for value in climb[30:]]) if i >= 30][:1] in ([31], [32])


def test_rises_that_are_tolerated_are_no_news_however_lasting() -> None:
    for seed in range(10):
        series = normal(30, seed, 0.1) + [0.8 + value for value in normal(60, seed + 100, 0.1)]
        assert alarms(series)
        assert alarms(series, tolerance=0.8) == []
        assert alarms([value + 2 * (i >= 30) for i, value in enumerate(series)], tolerance=0.8)


def test_a_slow_slide_is_found() -> None:
    for seed in range(20):
        series = [value + max(0.0, 0.5 * (i - 25)) for i, value in enumerate(normal(60, seed))]
        found = alarms(series)
        assert found
        assert 25 < found[0] < 42


def test_one_swing_however_large_is_no_alarm() -> None:
    series = normal(40, 3)
    series[30] += 50
    assert alarms(series) == []


def test_an_improving_noisy_run_is_no_alarm() -> None:
    for seed in range(20):
        series = [value - 0.2 * i for i, value in enumerate(normal(60, seed))]
        assert alarms(series) == []


def test_changes_below_the_grain_are_no_news() -> None:
    series = normal(30, 0, 1e-3) + [0.1] * 20
    assert alarms(series) == [31]
    assert alarms(series, grain=0.1) == []


def test_an_alarm_ends_with_recovery_and_can_come_again() -> None:
    calm = normal(30, 1)
    series = calm + [9.0] * 5 + [0.1, -0.1, 0.2, 0.0, 0.1] * 3 + [9.0] * 5
    detector = ChangePoint(1e-3)
    verdicts = [detector.update(i, value) for i, value in enumerate(series)]
    assert [i for i, v in enumerate(verdicts) if v.opened] == [31, 51]
    assert [i for i, v in enumerate(verdicts) if v.closed] == [36]
    assert all(v.active for v in verdicts[31:36])
    assert verdicts[31].since == 30
    assert verdicts[51].since == 50


def test_the_level_is_not_dragged_along_by_a_lasting_fault() -> None:
    detector = ChangePoint(1e-3)
    verdicts = [detector.update(i, value) for i, value in enumerate(normal(30, 1) + [9.0] * 100)]
    assert verdicts[-1].active


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_an_alarm_by_itself_but_not_at_the_start(value: float) -> None:
    detector = ChangePoint(1e-3)
    assert not detector.update(0, value).active
    assert not detector.update(1, 0.0).active
    verdict = detector.update(2, value)
    assert verdict.opened
    assert verdict.since == 2
    assert not detector.update(3, value).opened


@pytest.mark.parametrize("kind", DETECTORS.values())
def test_it_goes_on_where_it_was(kind: type[Detector]) -> None:
    series = [value + max(0.0, 0.5 * (i - 25)) for i, value in enumerate(normal(60, 4))]
    whole = kind(1e-3)
    expected = [whole.update(i, value) for i, value in enumerate(series)]
    for cut in (3, 20, 28, 33, 50):
        first = kind(1e-3)
        verdicts = [first.update(i, value) for i, value in enumerate(series[:cut])]
        second = kind.from_state_dict(first.state_dict())
        verdicts += [second.update(cut + i, value) for i, value in enumerate(series[cut:])]
        assert verdicts == expected


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="false_alarm_rate must be in"):
        ChangePoint(0.5)
    with pytest.raises(ValueError, match="warmup must be at least 4"):
        ChangePoint(1e-3, warmup=2)
