"""False alarms, faults found and costs of the diagnostic of the training data: ``python -m benchmarks.training_data``.

Healthy runs are of the 1,797 digits of scikit-learn, or of some of them, in shuffled epochs; they vary in the number of
images, the size of batches, whether the last one is dropped, the spacing of evaluations, and whether a weighted sampler
draws the images. With a fault, each run goes on with other data from one evaluation on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import rounded
from example_models.data import digits
from lightning_gendiag import Evaluation, TrainingData, TrainingDataMonitor
from lightning_gendiag.detection.history import History
from lightning_gendiag.detection.rules import Judge
from lightning_gendiag.diagnostics.training_data.functional import MORE_ROWS, glance
from lightning_gendiag.model.batches import Images

IMAGES, LABELS = digits(8)

FAULTS = ("class", "range", "region", "repeat", "nan")


def faulty(fault: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the data with a fault: a class removed, another normalisation, an inverted region, few images, one nan."""
    if fault == "class":
        most = int(labels.bincount().argmax())
        return images[labels != most], labels[labels != most]
    if fault == "range":
        return (images + 1) / 2, labels
    if fault == "repeat":
        return images[:16].repeat(len(images) // 16, 1, 1, 1), labels[:16].repeat(len(images) // 16)
    changed = images.clone()
    if fault == "region":
        changed[:, :, :4, :4] *= -1
    else:
        changed[0, 0, 0, 0] = torch.nan
    return changed, labels


def batches(
    images: Tensor, labels: Tensor, size: int, drop: bool, weights: Tensor | None, generator: torch.Generator
) -> Iterator[Images]:
    """Yields the batches of one epoch."""
    n = len(images)
    order = (
        torch.randperm(n, generator=generator)
        if weights is None
        else torch.multinomial(weights[:n], n, replacement=True, generator=generator)
    )
    for some in order.split(size):
        if len(some) == size or not drop:
            yield Images(images[some], labels[some])


def run(seed: int, evaluations: int, fault: str = "") -> list[tuple[int, str]]:
    """Returns number and message of each alarm of one run; faults are planted after half of the evaluations."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    n, size, drop = chosen(200, 600, 1797), chosen(16, 64, 128), chosen(True, False)
    weights = chosen(None, None, torch.rand(1797, generator=generator) ** 3)
    every = chosen(0, 10, 50)
    some = torch.randperm(1797, generator=generator)[:n]
    images, labels = IMAGES[some], LABELS[some]
    judge, history, monitor = Judge(3e-4, 6), History(), TrainingDataMonitor()
    metric, seen, number = TrainingData((1, 8, 8), rows=monitor.rows), [], 0
    alarms: list[tuple[int, str]] = []
    while number < evaluations:
        data = faulty(fault, images, labels) if fault and number >= evaluations // 2 else (images, labels)
        for batch in batches(*data, size, drop, weights, generator):
            more = MORE_ROWS if len(seen) < MORE_ROWS else 1
            seen.append(glance(*batch, monitor.rows * more, first=len(seen)))
            if every and len(seen) == every:
                number += 1
                alarms += evaluated(monitor, metric, seen, number, judge, history)
        if not every:
            number += 1
            alarms += evaluated(monitor, metric, seen, number, judge, history)
    return alarms


def evaluated(
    monitor: TrainingDataMonitor, metric: TrainingData, seen: list[Any], number: int, judge: Judge, history: History
) -> list[tuple[int, str]]:
    """Evaluates what was seen as the monitor does, and returns the alarms."""
    metric.reset()
    metric.update(glances=seen)
    seen.clear()
    if monitor.first is not None:
        metric.add_first(monitor.first)
    result = monitor.noted(metric.compute())
    evaluation = Evaluation(number, number, number, monitor.observations(result))
    history.append(monitor.name, evaluation)
    return [(number, alarm.message) for alarm in judge.update(monitor.name, evaluation, history)]


def costs() -> dict[str, float]:
    """Prints and returns the processor's milliseconds of one batch, by the shape of an image."""
    found = {}
    for shape in ((1, 28, 28), (3, 64, 64)):
        images, labels, monitor = torch.rand(64, *shape), torch.randint(10, (64,)), TrainingDataMonitor()
        times = []
        for _ in range(9):
            started = time.process_time()
            for _ in range(128):
                monitor.see(None, Images(images, labels))  # type: ignore[arg-type]  # no model is looked at
            times.append((time.process_time() - started) / 128)
        found["x".join(map(str, shape))] = 1e3 * min(times)
        print(f"64 images of {shape}: {min(times) * 1e6:.0f} µs a batch")
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="number of healthy runs")
    parser.add_argument("--faulty", type=int, default=20, help="number of runs with each fault")
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"batch_ms": costs()}
    wrong = {seed: alarms for seed in range(options.runs) if (alarms := run(seed, options.evaluations))}
    print(f"{options.runs} healthy runs, {options.runs * options.evaluations} evaluations: {len(wrong)} with an alarm")
    for seed, alarms in wrong.items():
        print(f"  seed {seed}: {alarms[0]}")
    figures["healthy"] = {
        "runs": options.runs, "evaluations": options.runs * options.evaluations, "with_alarm": len(wrong),
    }  # fmt: skip
    figures["faults"] = {}
    for fault in FAULTS:
        at: Counter[str] = Counter()
        for seed in range(1000, 1000 + options.faulty):
            alarms = run(seed, options.evaluations, fault)
            after = [number - options.evaluations // 2 for number, _ in alarms]
            at[str(after[0]) if after else "none"] += 1
        print(f"{fault}: evaluation of the first alarm after the fault {dict(sorted(at.items()))}", flush=True)
        figures["faults"][fault] = {"runs": options.faulty, "at": dict(sorted(at.items()))}
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
