from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from lightning_gendiag.detection import Detector, alarm_positions


def normal(n: int, seed: int, sigma: float = 1.0) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(0, sigma) for _ in range(n)]


def autocorrelated(n: int, seed: int, correlation: float) -> list[float]:
    value, series = 0.0, []
    for innovation in normal(n, seed):
        value = correlation * value + math.sqrt(1 - correlation**2) * innovation
        series.append(value)
    return series


def alarms(series: list[float], **options: float) -> list[int]:
    detector = Detector(**({"false_alarm_rate": 1e-3} | options))
    return [i for i, value in enumerate(series) if detector.update(i, value).opened]


@pytest.mark.parametrize("rate", [1e-2, 2e-3])
def test_the_false_alarm_rate_is_at_most_as_stated(rate: float) -> None:
    runs, length = 60, 200
    count = sum(len(alarms(normal(length, seed), false_alarm_rate=rate)) for seed in range(runs))
    expected = rate * runs * length
    # three standard deviations of a Poisson count
    assert count < expected + 3 * math.sqrt(expected)
    # a detector that raises no alarms at all would pass the first test too
    assert count > expected / 20


@pytest.mark.parametrize("rise", [6.0, 20.0])
def test_a_sudden_rise_is_found_in_two_evaluations(rise: float) -> None:
    for seed in range(20):
        series = normal(40, seed)
        assert alarms(series) == []
        assert alarms(series[:30] + [value + rise for value in series[30:]])[0] <= 32


def test_a_series_that_always_rose_may_continue_to_rise() -> None:
    wrong = 0
    for seed in range(20):
        rising = [0.07 * i + value for i, value in enumerate(normal(60, seed, 0.03))]
        wrong += bool(alarms(rising, min_std=0.2))
        # a faster rise is an alarm
        assert 40 < alarms(rising[:40] + [value + 2 for value in rising[40:]], min_std=0.2)[-1] <= 43
    assert wrong <= 1


def test_a_fault_after_the_end_of_a_climb_is_found() -> None:
    for seed in range(10):
        climb = [10 * (1 - math.exp(-i / 4)) + 0.1 * value for i, value in enumerate(normal(40, seed))]
        assert next(i for i in alarms(climb[:30] + [value + 2 for value in climb[30:]]) if i >= 30) in (30, 31, 32)


def climbs(count: int, shape: str) -> list[float]:
    """A series that improves from 1 to -2."""
    done = {"evenly": lambda x: x, "first": lambda x: 1 - math.exp(-4 * x), "at last": lambda x: x**2}[shape]
    return [1 - 3 * done(i / (count - 1)) for i in range(count)]


@pytest.mark.parametrize("shape", ["evenly", "first", "at last"])
def test_a_fall_back_to_the_start_after_a_steep_climb_is_found(shape: str) -> None:
    found = 0
    for seed in range(50):
        noise = [0.15 * value for value in normal(22, seed)]
        series = [a + b for a, b in zip(climbs(14, shape) + [1.0] * 8, noise, strict=True)]
        found += alarms(series, false_alarm_rate=5e-5, min_std=0.25)[:1] in ([15], [16], [17])
    assert found >= 42


@pytest.mark.parametrize("healthy", [7, 8, 10])
def test_a_model_that_lost_much_of_what_it_had_just_learned_is_found(healthy: int) -> None:
    found = 0
    for seed in range(50):
        noise = [0.01 * value for value in normal(healthy + 6, seed)]
        learned = [0.03 + 0.9 * math.exp(-i) for i in range(healthy)]
        series = [a + b for a, b in zip([*learned, *[0.5] * 6], noise, strict=True)]
        opened = alarms(series, false_alarm_rate=5e-5, min_std=0.01)
        assert all(place >= healthy for place in opened)
        found += opened[:1] == [healthy + 3]
    assert found >= 45


def test_a_relapse_needs_as_many_values_as_are_asked_for() -> None:
    learned = [0.03 + 0.9 * math.exp(-i) for i in range(8)]
    series = [a + 0.01 * b for a, b in zip([*learned, *[0.5] * 12], normal(20, 0), strict=True)]
    assert alarms(series, false_alarm_rate=5e-5, min_std=0.01)[:1] == [11]
    assert alarms(series, false_alarm_rate=5e-5, min_std=0.01, shortest=10)[:1] in ([17], [18])


def test_a_model_that_lost_little_or_came_back_raises_no_alarm() -> None:
    for seed in range(50):
        noise = [0.01 * value for value in normal(16, seed)]
        learned = [0.03 + 0.9 * math.exp(-i) for i in range(8)]
        for later in ([0.35] * 6, [0.5, 0.5, 0.5, 0.04, 0.5, 0.04], [0.5, 0.5, 0.05, 0.05, 0.5, 0.5]):
            series = [a + b for a, b in zip([*learned, *later], noise, strict=False)]
            assert alarms(series, false_alarm_rate=5e-5, min_std=0.01) == []


def test_a_fall_half_way_back_is_no_drop() -> None:
    for seed in range(20):
        noise = [0.05 * value for value in normal(24, seed)]
        series = [a + b for a, b in zip(climbs(14, "evenly") + [-0.6] * 10, noise, strict=True)]
        assert alarms(series, false_alarm_rate=5e-5, min_std=0.25) == []


def test_an_outlier_beside_a_high_value_raises_no_alarm() -> None:
    for seed in range(20):
        series = normal(20, seed)
        assert alarms([*series, 1.5, 1e6, 0.0, 0.0], false_alarm_rate=5e-5, min_std=1.0) == []


def test_small_rises_must_last_unless_the_series_was_steady() -> None:
    noise = torch.randn(60, 60, generator=torch.Generator().manual_seed(3)).double()
    wave, step = torch.zeros(60).double(), torch.zeros(60).double()
    # a wave is back within three values, and a step stays
    wave[40:43] = torch.tensor([1.0, 1.2, 0.4]).double()
    step[40:] = 1.1
    waves, delays = [0, 0], []
    for row in (0.3 * noise).unbind():
        steady, large = (0.05 * row + step).tolist(), (row + 3 * step).tolist()
        assert alarms(steady, min_std=0.05, small=1.4) == alarms(steady, min_std=0.05) == [41]
        assert alarms(large, min_std=0.05, small=1.4) == alarms(large, min_std=0.05)
        found = [alarms((row + step).tolist(), min_std=0.05, small=small) for small in (0.0, 1.4)]
        if all(found):
            delays.append(found[1][0] - found[0][0])
        for number, small in enumerate((0.0, 1.4)):
            waves[number] += bool(alarms((row + wave).tolist(), min_std=0.05, small=small))
    assert len(delays) >= 55
    assert statistics.median(delays) <= 1
    assert sum(delays) > 20
    assert waves[1] < 0.67 * waves[0]


def test_a_rise_that_must_last_is_kept_in_the_state() -> None:
    row = 0.2 * torch.randn(60, generator=torch.Generator().manual_seed(3)).double()
    row[40:] += 1.1
    whole = Detector(3e-4, min_std=0.1, small=1.4)
    found = [position for position, value in enumerate(row.tolist()) if whole.update(position, value).opened]
    parts, again = Detector(3e-4, min_std=0.1, small=1.4), []
    for position, value in enumerate(row.tolist()):
        other = Detector(3e-4, min_std=0.1, small=1.4)
        other.load_state_dict(parts.state_dict())
        parts = other
        again += [position] * parts.update(position, value).opened
    assert found == again != []


def test_lasting_rises_up_to_min_delta_raise_no_alarm() -> None:
    for seed in range(10):
        series = normal(30, seed, 0.1) + [0.6 + value for value in normal(60, seed + 100, 0.1)]
        assert alarms(series)
        assert alarms(series, min_delta=0.8) == []
        assert alarms([value + 2 * (i >= 30) for i, value in enumerate(series)], min_delta=0.8)


def test_a_slow_slide_is_found() -> None:
    for seed in range(20):
        series = [value + max(0.0, 0.5 * (i - 25)) for i, value in enumerate(normal(60, seed))]
        positions = alarms(series)
        assert positions
        assert 25 < positions[0] < 42


def test_an_outlier_of_one_evaluation_raises_no_alarm() -> None:
    series = normal(40, 3)
    series[30] += 50
    assert alarms(series) == []


def test_an_improving_noisy_run_raises_no_alarm() -> None:
    for seed in range(20):
        series = [value - 0.2 * i for i, value in enumerate(normal(60, seed))]
        assert alarms(series) == []


def test_changes_below_min_std_raise_no_alarm() -> None:
    series = normal(30, 0, 1e-3) + [0.1] * 20
    assert alarms(series) == [31]
    assert alarms(series, min_std=0.1) == []


def test_an_alarm_ends_with_recovery_and_may_be_raised_again() -> None:
    calm = normal(30, 1)
    series = calm + [9.0] * 5 + [0.1, -0.1, 0.2, 0.0, 0.1] * 3 + [9.0] * 5
    detector = Detector(1e-3)
    detections = [detector.update(i, value) for i, value in enumerate(series)]
    assert [i for i, v in enumerate(detections) if v.opened] == [31, 51]
    assert [i for i, v in enumerate(detections) if v.closed] == [36]
    assert all(v.active for v in detections[31:36])
    assert detections[31].since == 30
    assert detections[51].since == 50


def test_a_lasting_fault_does_not_shift_the_level() -> None:
    detector = Detector(1e-3)
    detections = [detector.update(i, value) for i, value in enumerate(normal(30, 1) + [9.0] * 100)]
    assert detections[-1].active


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_raise_an_alarm_except_at_the_start(value: float) -> None:
    detector = Detector(1e-3)
    assert not detector.update(0, value).active
    assert not detector.update(1, 0.0).active
    detection = detector.update(2, value)
    assert detection.opened
    assert detection.since == 2
    assert not detector.update(3, value).opened


def test_a_restored_detector_continues_like_the_original() -> None:
    series = [value + max(0.0, 0.5 * (i - 25)) for i, value in enumerate(normal(60, 4))]
    whole = Detector(1e-3)
    expected = [whole.update(i, value) for i, value in enumerate(series)]
    for cut in (3, 20, 28, 33, 50):
        first, second = Detector(1e-3), Detector(1e-3)
        detections = [first.update(i, value) for i, value in enumerate(series[:cut])]
        second.load_state_dict(first.state_dict())
        detections += [second.update(cut + i, value) for i, value in enumerate(series[cut:])]
        assert detections == expected


def test_invalid_arguments_raise_errors() -> None:
    with pytest.raises(ValueError, match="false_alarm_rate must be in"):
        Detector(0.5)
    with pytest.raises(ValueError, match="warmup must be at least 4"):
        Detector(1e-3, warmup=2)


def test_alarm_positions_are_those_of_the_default_detector() -> None:
    series = normal(40, 5) + [9.0] * 5
    assert alarm_positions(series) == alarms(series, false_alarm_rate=3e-4) == [41]
    assert alarm_positions(iter(series), false_alarm_rate=1e-8) == [42]
    assert alarm_positions([]) == []


def test_a_lasting_alarm_takes_bounded_memory_and_ends_as_soon_as_the_series_recovers() -> None:
    series = normal(30, 0) + [20 + value for value in normal(5000, 1)] + normal(10, 2)
    detector = Detector(1e-3)
    detections = [detector.update(position, value) for position, value in enumerate(series)]
    assert [i for i, detection in enumerate(detections) if detection.opened] == [31]
    assert 5031 <= next(i for i, detection in enumerate(detections) if detection.closed) <= 5034
    detector = Detector(1e-3)
    assert max(len(detector.values) for i, v in enumerate(series) if detector.update(i, v)) < 64


@pytest.mark.parametrize("correlation", [0.3, 0.5, 0.7])
def test_autocorrelated_noise_raises_at_most_twice_as_many_alarms_as_stated(correlation: float) -> None:
    rate, count = 3e-3, 0
    for seed in range(60):
        count += len(alarms(autocorrelated(120, seed, correlation)[20:], false_alarm_rate=rate))
    expected = 2 * rate * 60 * 100
    assert count < expected + 3 * math.sqrt(expected)


def test_a_step_in_autocorrelated_noise_is_found() -> None:
    found = 0
    for seed in range(40):
        series = [value + 6 * (at >= 50) for at, value in enumerate(autocorrelated(100, seed, 0.5))]
        first = alarms(series, false_alarm_rate=3e-4)[:1]
        found += first != [] and 50 <= first[0] < 56
    assert found >= 36


def test_noise_that_grows_is_no_rise() -> None:
    runs = [normal(50, seed) + normal(50, seed + 1000, math.sqrt(2)) for seed in range(40)]
    assert sum(len(alarms(series, false_alarm_rate=3e-4)) for series in runs) <= 4


def test_a_rise_needs_as_many_values_as_are_asked_for() -> None:
    series = [*normal(40, 1), *(value + 9 for value in normal(10, 2))]
    assert alarms(series)[0] <= 42
    assert alarms(series, shortest=5)[0] == 44
    assert alarms([*series[:43], *normal(10, 3)], shortest=5) == []
    with pytest.raises(ValueError, match="shortest must be at least 2"):
        Detector(1e-3, shortest=1)
    with pytest.raises(ValueError, match="recent must be at least shortest, 5 values, got 4"):
        Detector(1e-3, shortest=5, recent=4)
