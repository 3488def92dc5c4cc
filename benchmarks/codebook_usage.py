"""How often ``CodebookUsage`` finds codebooks that collapse, and how often healthy ones raise alarms.

``python -m benchmarks.codebook_usage`` trains small tokenizers of digits, ten seeds of each of three collapses, and healthy
ones with two kinds of quantizers, and prints a line for each run. It takes about five minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import computed, trained
from example_models.data import digits
from lightning_gendiag import CodebookUsageMonitor, CollapseStopping
from tests.helpers.codebooks import MovingAverage, Planted, Straight, named_codes

FIRST = 100
"""The first seed; the tests use smaller ones."""

START = 12
"""Epoch at which codebooks collapse that do not lie far from the data from the beginning."""

IMAGES = 256
"""Number of training images."""


class Kind(NamedTuple):
    """A kind of run."""

    fault: str
    epochs: int
    quantizer: Callable[[], nn.Module] = Straight
    start: int = START


KINDS = {
    "latents at one point": Kind("point", 18),
    "codes far away": Kind("killed", 18),
    "codes far away from the start": Kind("far", 12, start=0),
    "healthy": Kind("", 40),
    "healthy, moving averages": Kind("", 40, MovingAverage),
}


class Unit(NamedTuple):
    """A run to be trained."""

    name: str
    seed: int


class Outcome(NamedTuple):
    """What happened in a run, which is evaluated after each epoch."""

    name: str
    seed: int
    first: int | None
    """Number of evaluations from the beginning of the fault to the first alarm, or None."""
    is_named: bool
    """Whether the alarm names dead codes alone."""
    is_early: bool
    """Whether an alarm came before the fault."""
    evaluations: int
    message: str
    seconds: float


def outcome_of(unit: Unit) -> Outcome:
    """Trains one model, and returns what happened."""
    started, kind = time.process_time(), KINDS[unit.name]
    seed_everything(unit.seed, verbose=False)
    images, labels = digits(16)
    rows = torch.randperm(len(images))[:IMAGES]
    batches = DataLoader(TensorDataset(images[rows], labels[rows]), 32, shuffle=True)
    monitor, stopping = CodebookUsageMonitor(on_error="raise", log_images=False), CollapseStopping("warn")
    trained(Planted(kind.fault, kind.start, kind.quantizer), batches, kind.epochs, monitor, stopping)
    alarms = stopping.alarms
    after = [alarm for alarm in alarms if alarm.number > kind.start]
    assert monitor.result is not None
    dead = set(monitor.result.dead[0].nonzero()[:, 0].tolist())
    return Outcome(
        unit.name,
        unit.seed,
        after[0].number - kind.start if after else None,
        bool(after) and set(named_codes(after[0])) <= dead,
        len(after) < len(alarms),
        monitor.evaluations,
        str(alarms[0]) if alarms else "no alarm",
        time.process_time() - started,
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the figures of all runs with a fault, of each fault, and of all healthy runs."""
    figures: dict[str, Any] = {"faults": {}}
    for name, runs in itertools.groupby(outcomes, key=lambda outcome: outcome.name):
        own = list(runs)
        firsts = [run.first for run in own if run.first is not None]
        if KINDS[name].fault:
            figures["faults"][KINDS[name].fault] = {
                "runs": len(own),
                "found": sum(run.first is not None and not run.is_early for run in own),
                "named": sum(run.is_named and not run.is_early for run in own),
                "earliest": min(firsts, default=None),
                "latest": max(firsts, default=None),
            }
    for part in ("runs", "found", "named"):
        figures[part] = sum(own[part] for own in figures["faults"].values())
    healthy = [run for run in outcomes if not KINDS[run.name].fault]
    figures["healthy"] = {
        "runs": len(healthy),
        "alarms": sum(run.message != "no alarm" for run in healthy),
        "evaluations": sum(run.evaluations for run in healthy),
    }
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--only", default="", help="part of the names of kinds")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, each of one thread")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    seeds = range(options.first, options.first + options.seeds)
    units = [Unit(name, seed) for name in KINDS if options.only in name for seed in seeds]
    outcomes = []
    for outcome in computed(outcome_of, units, options.jobs):
        outcomes.append(outcome)
        print(f"{outcome.name}, seed {outcome.seed}, {outcome.seconds:.1f} s, first {outcome.first}: {outcome.message}")
    figures = summary(outcomes)
    for fault, own in figures["faults"].items():
        print(f"{fault}: {own['found']} of {own['runs']} found, {own['named']} named")
    print("healthy: {alarms} of {runs} with an alarm, {evaluations} evaluations".format(**figures["healthy"]))
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
