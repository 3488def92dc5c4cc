"""What the benchmarks of single diagnostics share: how alarms of runs with a planted failure and of healthy runs are counted.

Such a script has failures and healthy models by their names, and a function that trains one of them. Its ``main`` prints a
line for each run, and then two tables. Of failures they say in how many runs an alarm was raised once the failure had begun and
none before, in how many of these an alarm named what failed, and the number of evaluations until the first alarm. Of healthy
models they say in how many runs there was an alarm.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.measuring import computed
from lightning_gendiag import Alarm
from lightning_gendiag.callbacks.monitor import Monitor
from lightning_gendiag.functional.intervals import binomial_interval

FIRST = 100
"""The first seed; tests use smaller ones, and thresholds were chosen on them."""

Figures = dict[str, dict[str, dict[str, Any]]]

ALL = "all"
"""Name of the figures of all failures, and of all healthy models."""


class Unit(NamedTuple):
    """A run."""

    name: str
    seed: int


class Begun(Callback):
    """Counts the evaluations before a failure begins.

    Args:
        monitor: What evaluates.
        has_begun: Whether the failure is there in the batch that begins.
    """

    def __init__(self, monitor: Monitor[Any, Any], has_begun: Callable[[Trainer], bool]) -> None:
        self.monitor, self.has_begun = monitor, has_begun
        self.evaluations: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes how many there were."""
        if self.evaluations is None and self.has_begun(trainer):
            self.evaluations = self.monitor.evaluations


class Outcome(NamedTuple):
    """What happened in a run."""

    name: str
    seed: int
    is_early: bool
    """Whether an alarm came before the failure."""
    delay: float
    """Evaluations from the beginning of the failure to the first alarm after it; inf without one."""
    is_named: bool
    alarms: list[str]
    evaluations: int
    seconds: float

    @property
    def is_found(self) -> bool:
        """Whether there is an alarm, and none before the failure."""
        return math.isfinite(self.delay) and not self.is_early


def outcome(
    unit: Unit, alarms: Sequence[Alarm], begun: Begun, is_named: Callable[[list[Alarm]], bool], seconds: float
) -> Outcome:
    """Returns what happened in a run.

    Args:
        unit: The run.
        alarms: Its alarms.
        begun: Counted the evaluations before the failure, or before the first batch without one.
        is_named: Whether the alarms after its beginning, one or more, name it.
        seconds: That it took.
    """
    # a run may end before its failure begins
    before = begun.monitor.evaluations if begun.evaluations is None else begun.evaluations
    after = [alarm for alarm in alarms if alarm.number > before]
    delay = min((alarm.number - before for alarm in after), default=math.inf)
    said = [str(alarm) for alarm in alarms]
    return Outcome(
        *unit,
        len(after) < len(alarms),
        delay,
        bool(after) and is_named(after),
        said,
        begun.monitor.evaluations,
        seconds,
    )


def summary(outcomes: Sequence[Outcome], failures: Collection[str]) -> Figures:
    """Returns the figures of failures and of healthy models by name, those of all of them as ``ALL``."""
    figures: Figures = {}
    for kind, function in (("failures", of_failures), ("healthy", of_healthy)):
        own = [outcome for outcome in outcomes if (outcome.name in failures) == (kind == "failures")]
        names = dict.fromkeys(outcome.name for outcome in own)
        figures[kind] = {name: function([outcome for outcome in own if outcome.name == name]) for name in names}
        if own:
            figures[kind][ALL] = function(own)
    return figures


def of_failures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the figures of runs with a failure."""
    # of runs that are not found, the delay is longer than all others
    delays = [outcome.delay if outcome.is_found else math.inf for outcome in outcomes]
    statistics_of = {"min": min, "median": statistics.median, "max": max}
    delay = {name: function(delays) for name, function in statistics_of.items()}
    return {
        "runs": len(outcomes),
        "found": sum(outcome.is_found for outcome in outcomes),
        "named": sum(outcome.is_found and outcome.is_named for outcome in outcomes),
        "delay": {name: value if math.isfinite(value) else None for name, value in delay.items()},
    }


def of_healthy(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the figures of runs without a failure."""
    runs, alarms = len(outcomes), sum(bool(outcome.alarms) for outcome in outcomes)
    # with 95 % confidence
    bound = binomial_interval(torch.tensor([float(alarms), float(runs - alarms)]), 0.05)[0, 1]
    evaluations = sum(outcome.evaluations for outcome in outcomes)
    return {"runs": runs, "alarms": alarms, "upper_bound": float(bound), "evaluations": evaluations}


def lines(figures: Figures) -> Iterable[str]:
    """Yields the tables."""
    if figures["failures"]:
        yield f"{'failure':60s}{'found':>12s}{'named':>12s}{'delay, min, median, max':>30s}"
    for name, own in figures["failures"].items():
        found, named = (f"{own[key]} of {own['runs']}" for key in ("found", "named"))
        delay = ", ".join("-" if value is None else f"{value:g}" for value in own["delay"].values())
        yield f"{name:60s}{found:>12s}{named:>12s}{delay:>30s}"
    if figures["healthy"]:
        yield f"{'healthy':60s}{'alarms':>12s}{'evaluations':>12s}"
    for name, own in figures["healthy"].items():
        yield f"{name:60s}{own['alarms']:>4d} of {own['runs']:<4d}{own['evaluations']:>12d}"


def options_of(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options of a script that trains over seeds.

    Args:
        description: Of the script.
        arguments: Of the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--only", default="", help="part of the names of failures and healthy models")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, each of one thread")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(arguments)


def outcomes_of(
    names: Iterable[str], outcome_of: Callable[[Unit], Outcome], options: argparse.Namespace
) -> list[Outcome]:
    """Trains what was asked for, prints a line for each run, and returns what happened.

    Args:
        names: Of the failures and healthy models.
        outcome_of: Trains one of them, a function of a module.
        options: From :func:`options_of`.
    """
    seeds = range(options.first, options.first + options.seeds)
    units = [Unit(name, seed) for name in names if options.only in name for seed in seeds]
    outcomes = []
    for one in computed(outcome_of, units, options.jobs):
        outcomes.append(one)
        said = f"{one.seconds:.1f} s, {one.evaluations} evaluations: {' | '.join(one.alarms) or 'no alarm'}"
        print(f"{one.name}, seed {one.seed}, {said}", flush=True)
    return outcomes


def main_of(
    description: str | None,
    failures: Collection[str],
    healthy: Collection[str],
    outcome_of: Callable[[Unit], Outcome],
    arguments: list[str] | None = None,
) -> None:
    """Runs a script: prints a line for each run, and the tables.

    Args:
        description: Of the script.
        failures: Names of the failures.
        healthy: Names of the healthy models.
        outcome_of: Trains one of them, a function of a module.
        arguments: Of the command line.
    """
    options = options_of(description, arguments)
    outcomes = outcomes_of((*failures, *healthy), outcome_of, options)
    figures = summary(outcomes, failures)
    for line in lines(figures):
        print(line)
    if options.json:
        print(json.dumps(figures))
