"""Measures the detector on simulated series: how often it is wrong, and how soon it finds a lasting step.

    python -m benchmarks.detector                     2,000 series of each kind (minutes)
    python -m benchmarks.detector --series 500        fewer
    python -m benchmarks.detector --calibrate         the same with other constants, on seeds that are not reported

Series have 100 values and a standard deviation of 1 where nothing else is said; steps come at the 51st value.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lightning_gendiag.detection import alarm_positions, detector

LENGTH, STEP, RATE = 100, 50, 3e-4
"""Number of values of a series, place of a step, and stated rate of false alarms."""

REPORTED, CALIBRATED = 1, 2
"""Seeds."""

Series = NDArray[np.float64]


def autocorrelated(source: Generator, count: int, correlation: float) -> Series:
    """Returns stationary AR(1) series (count, LENGTH) with variance 1."""
    series = source.standard_normal((count, LENGTH))
    for at in range(1, LENGTH):
        series[:, at] = correlation * series[:, at - 1] + np.sqrt(1 - correlation**2) * series[:, at]
    return series


def _widening(source: Generator, count: int, factor: float) -> Series:
    """Returns independent normal series whose variance is multiplied half-way."""
    return source.standard_normal((count, LENGTH)) * np.where(np.arange(LENGTH) < STEP, 1.0, np.sqrt(factor))


def _improving(source: Generator, count: int, size: float) -> Series:
    """Returns independent normal series that fall smoothly."""
    return size * np.exp(-np.arange(LENGTH) / 15) + source.standard_normal((count, LENGTH))


HEALTHY: dict[str, Callable[[Generator, int], Series]] = {
    "independent": lambda source, count: source.standard_normal((count, LENGTH)),
    "AR(1) of 0.3": lambda source, count: autocorrelated(source, count, 0.3),
    "AR(1) of 0.5": lambda source, count: autocorrelated(source, count, 0.5),
    "AR(1) of 0.7": lambda source, count: autocorrelated(source, count, 0.7),
    "Student t, 3 degrees": lambda source, count: source.standard_t(3, (count, LENGTH)),
    "variance doubles half-way": lambda source, count: _widening(source, count, 2.0),
    "standard deviation doubles": lambda source, count: _widening(source, count, 4.0),
    "improves by 5": lambda source, count: _improving(source, count, 5.0),
    "improves by 30": lambda source, count: _improving(source, count, 30.0),
}
"""Series in which nothing happens."""


class Step(NamedTuple):
    """A lasting step, and within how many values which share of them should be found."""

    correlation: float
    size: float
    within: int
    wanted: float


STEPS = (Step(0.0, 6.0, 3, 0.95), Step(0.5, 6.0, 6, 0.9), Step(0.0, 3.0, 4, 0.8), Step(0.5, 3.0, 15, 0.6))


def rate_of_alarms(series: Series) -> float:
    """Returns the number of alarms per value, as a multiple of the stated rate."""
    return sum(len(alarm_positions(values, RATE)) for values in _rows(series)) / series.size / RATE


def share_found(step: Step, source: Generator, count: int) -> float:
    """Returns the share of series in which a step is found in time, without an alarm before it."""
    series = autocorrelated(source, count, step.correlation) + step.size * (np.arange(LENGTH) >= STEP)
    firsts = [next(iter(alarm_positions(values, RATE)), -1) for values in _rows(series)]
    return sum(STEP <= first < STEP + step.within for first in firsts) / count


def _rows(series: Series) -> list[list[float]]:
    rows: list[list[float]] = series.tolist()
    return rows


def table(count: int, seed: int) -> dict[str, float]:
    """Prints and returns all figures."""
    found = {}
    print(f"{'series':36s} {'alarms per value over the stated rate':>38s}")
    for number, (kind, make) in enumerate(HEALTHY.items()):
        found[kind] = rate_of_alarms(make(np.random.default_rng([seed, number]), count))
        print(f"{kind:36s} {found[kind]:38.2f}", flush=True)
    print(f"{'lasting step':36s} {'found':>19s} {'wanted':>18s}")
    for number, step in enumerate(STEPS):
        name = f"of {step.size:g}, AR(1) of {step.correlation:g}, in {step.within}"
        found[name] = share_found(step, np.random.default_rng([seed, 100 + number]), count)
        print(f"{name:36s} {found[name]:19.1%} {step.wanted:18.0%}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=2000, help="number of series of each kind")
    parser.add_argument("--calibrate", action="store_true", help="try other constants")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.calibrate:
        chosen = detector.CALIBRATION
        a, b, c = chosen
        for constants in (chosen, (a - 0.1, b, c), (a + 0.1, b, c), (a, b - 0.2, c), (a, b + 0.2, c), (a, b, c / 2)):
            print(f"constants {constants}")
            detector.CALIBRATION = constants
            table(options.series, CALIBRATED)
        detector.CALIBRATION = chosen
        return
    found = table(options.series, REPORTED)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
