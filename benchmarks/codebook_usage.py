"""How often ``CodebookUsage`` finds codebooks that collapse, and how often healthy ones raise alarms.

``python -m benchmarks.codebook_usage`` trains small tokenizers of digits, ten seeds of each of three collapses, and healthy
ones with two kinds of quantizers, and prints a line for each run. It takes about five minutes of one core.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import trained
from benchmarks.planted_runs import Begun, Outcome, Unit, options_of, outcome, outcomes_of
from example_models.data import digits
from lightning_gendiag import CodebookUsageMonitor, CollapseStopping
from tests.helpers.codebooks import MovingAverage, Planted, Straight, named_codes

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


def few_batches() -> DataLoader[tuple[Tensor, ...]]:
    """Returns shuffled batches of digits (1, 16, 16) drawn at random, and their labels."""
    images, labels = digits(16)
    rows = torch.randperm(len(images))[:IMAGES]
    return DataLoader(TensorDataset(images[rows], labels[rows]), 32, shuffle=True)


def outcome_of(unit: Unit) -> Outcome:
    """Trains one model, and returns what happened."""
    started, kind = time.process_time(), KINDS[unit.name]
    seed_everything(unit.seed, verbose=False)
    batches = few_batches()
    monitor, stopping = CodebookUsageMonitor(on_error="raise", log_images=False), CollapseStopping("warn")
    begun = Begun(monitor, lambda trainer: trainer.current_epoch >= kind.start)
    trained(Planted(kind.fault, kind.start, kind.quantizer), batches, kind.epochs, begun, monitor, stopping)
    assert monitor.result is not None
    dead = set(monitor.result.dead[0].nonzero()[:, 0].tolist())
    return outcome(
        unit,
        stopping.alarms,
        begun,
        lambda after: set(named_codes(after[0])) <= dead,
        time.process_time() - started,
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the figures of all runs with a fault, of each fault, and of all healthy runs."""
    figures: dict[str, Any] = {"faults": {}}
    for name, runs in itertools.groupby(outcomes, key=lambda outcome: outcome.name):
        own = list(runs)
        delays = [int(run.delay) for run in own if math.isfinite(run.delay)]
        if KINDS[name].fault:
            figures["faults"][KINDS[name].fault] = {
                "runs": len(own),
                "found": sum(run.is_found for run in own),
                "named": sum(run.is_found and run.is_named for run in own),
                "earliest": min(delays, default=None),
                "latest": max(delays, default=None),
            }
    for part in ("runs", "found", "named"):
        figures[part] = sum(own[part] for own in figures["faults"].values())
    healthy = [run for run in outcomes if not KINDS[run.name].fault]
    figures["healthy"] = {
        "runs": len(healthy),
        "alarms": sum(bool(run.alarms) for run in healthy),
        "evaluations": sum(run.evaluations for run in healthy),
    }
    return figures


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__, arguments)
    outcomes = outcomes_of(KINDS, outcome_of, options)
    figures = summary(outcomes)
    for fault, own in figures["faults"].items():
        print(f"{fault}: {own['found']} of {own['runs']} found, {own['named']} named")
    print("healthy: {alarms} of {runs} with an alarm, {evaluations} evaluations".format(**figures["healthy"]))
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
