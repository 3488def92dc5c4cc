"""Measures how many alarms of single diagnostics are false, and how soon planted faults are found.

Runs are recorded once and judged from the files in seconds. ``--record 10`` trains ten models of each kind first, and writes
what the monitor observes at every epoch, and what it would observe with each fault from some epoch on. One seed of all kinds
takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.measuring import trained
from benchmarks.planting import ProvokedVAE
from example_models import flow
from example_models.data import digit_batches, digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CosineMeanSimilarityMonitor,
    CosineMeanSimilarityResult,
    GenerationBalanceMonitor,
    KStarMonitor,
    KStarResult,
    ManifoldEntropy,
    ManifoldEntropyMonitor,
    ManifoldEntropyResult,
    ModelAdapter,
    Monitor,
    PosteriorKLMonitor,
    decoder_gram,
    k_star,
)
from lightning_gendiag.functional.results import Result
from tests.helpers.recorded_runs import (
    DATA,
    RecordedBalance,
    RecordedClasses,
    RecordedCosines,
    RecordedDimensions,
    RecordedPosteriors,
    RecordedRun,
)

Plant = Callable[[Any, int], dict[str, Callable[[int], Result]]]
"""From a monitor at the first evaluation with faults, and the seed, to the results with each fault, by the number of
evaluations since then."""


class Case(NamedTuple):
    """A diagnostic, and how its runs are recorded."""

    run: type[RecordedRun]
    """How a recorded row becomes a result, and what a right name is."""
    models: dict[str, Callable[[], LightningModule]]
    monitor: Callable[[str], Monitor[Any, Any]]
    """From the name of a model to its monitor."""
    row: Callable[[Any], list[Any]]
    """From a result to what is recorded of it."""
    plant: Plant = lambda monitor, seed: {}
    after: int = 0
    """Number of evaluations with faults."""
    once: Callable[[Any], dict[str, Any]] = lambda monitor: {}
    """What is recorded once, at the end."""
    epochs: int = 30


# ---- faults ----


def broken(samples: Tensor, inside: Tensor, fault: str, age: int, still: Tensor) -> Tensor:
    """Returns samples (N, C, H, W) with a fault where ``inside`` (H, W) is true; ``age`` counts evaluations from 0."""
    mean = samples.mean(0, keepdim=True)
    within = {
        "frozen": still,
        "blurred": mean,
        "dark": (samples - 1) / 2,
        "noise": torch.rand(samples.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1,
        "slide": torch.lerp(samples, mean.expand_as(samples), min(1.0, 0.08 * (age + 1))),
    }[fault]
    return torch.where(inside, within, samples)


def in_regions(monitor: CosineMeanSimilarityMonitor, seed: int) -> dict[str, Callable[[int], Result]]:
    """Faults of two regions, which depend on the seed so that all have their turn, and of the image."""
    view, regions = monitor.view, monitor.region_map
    still = view.samples().images[:1].clone()

    def measured(fault: str, inside: Tensor, age: int) -> CosineMeanSimilarityResult:
        monitor.metric.reset()
        monitor.metric.update(broken(view.samples().images, inside, fault, age, still), real=False)
        return monitor.metric.compute()

    planted = {
        f"{fault} {r}": partial(measured, fault, regions.mask(r))
        for fault in ("frozen", "blurred", "dark", "noise", "slide")
        for r in (seed % 5, (seed + 2) % 5)
    }
    everywhere = torch.ones(regions.labels.shape, dtype=torch.bool)
    return {**planted, "frozen image": partial(measured, "frozen", everywhere)}


def mixing(fault: str, length: int) -> Tensor:
    """Returns (L, L), applied to latents: dimension 3 dead, 7 doing what 3 does, or only the first tenth of them left."""
    matrix = torch.eye(length)
    if fault == "dead":
        matrix[3, 3] = 0
    elif fault == "entangled":
        matrix[7, 7], matrix[7, 3] = 0.2, 1
    else:
        weak = torch.arange(length) >= max(1, length // 10)
        matrix[weak, weak] = 0.02
    return matrix


def in_dimensions(monitor: ManifoldEntropyMonitor, seed: int) -> dict[str, Callable[[int], Result]]:
    """Faults of latent dimensions."""
    view = monitor.view

    def measured(matrix: Tensor, age: int) -> ManifoldEntropyResult:
        metric = ManifoldEntropy(view.latent_dim)
        with view.isolated(exact=True):
            for z in view.prior_latents(monitor.num_latents):
                metric.update(decoder_gram(lambda x: view.decode(x @ matrix), z))
        return metric.compute()

    return {fault: partial(measured, mixing(fault, view.latent_dim)) for fault in ("dead", "entangled", "collapse")}


def in_classes(monitor: KStarMonitor, seed: int) -> dict[str, Callable[[int], Result]]:
    """Two thirds of class 7 moved among classes 1, 4 and 9."""

    def measured(age: int) -> KStarResult:
        latents, labels = monitor.metric.rows("latents").clone(), monitor.metric.rows("labels")
        own = (labels == 7).nonzero()[:, 0]
        centre = latents[own].mean(0)
        shifts = [latents[labels == other].mean(0) - centre for other in (1, 4, 9)]
        for piece, shift in zip(([0, 3], [1], [2]), shifts, strict=True):
            latents[own[[k for k in range(len(own)) if k % 5 in piece]]] += shift
        return k_star(latents, labels)

    return {"fractured": measured}


# ---- the cases ----


def of_digits() -> dict[str, Any]:
    """Returns the options of monitors that compare with all digits."""
    return {"adapter": ModelAdapter(reference=digits(32)), "log_images": False}


CASES: dict[str, Case] = {
    "cms": Case(
        RecordedCosines,
        {"gan": GAN},
        lambda model: CosineMeanSimilarityMonitor(num_regions=5, log_images=False),
        lambda result: [*result.regions.tolist(), float(result.image)],
        in_regions,
        after=16,
        once=lambda monitor: {
            "labels": monitor.region_map.labels.tolist(),
            "null_mean": monitor.result.null_mean.tolist(),
            "null_std": monitor.result.null_std.tolist(),
        },
        epochs=40,
    ),
    "manifold_entropy": Case(
        RecordedDimensions,
        {"vae": VAE, "flow": lambda: flow.Flow(64, (1, 8, 8), hidden=128), "gan": GAN},
        lambda model: ManifoldEntropyMonitor(log_images=False),
        lambda result: [
            *result.entropy.tolist(),
            float(result.mutual_information[result.strongest_pair]),
            *result.strongest_pair,
        ],
        in_dimensions,
        after=6,
    ),
    "k_star": Case(
        RecordedClasses,
        {"vae": VAE, "gan": GAN},
        lambda model: KStarMonitor({"vae": "encode", "gan": "discriminator.7"}[model], **of_digits()),
        lambda result: [*result.mean.tolist(), *result.nearest_rival.tolist(), float(result.values.mean())],
        in_classes,
        after=8,
    ),
    "posterior_kl": Case(
        RecordedPosteriors,
        {
            "healthy": VAE,
            "healthy, warm-up of 15 epochs": lambda: VAE(warmup=15),
            "healthy, L = 32, warm-up of 15 epochs": lambda: VAE(32, warmup=15),
            "healthy, L = 2, warm-up of 15 epochs": lambda: VAE(2, warmup=15),
            "beta 10,000 from the start": lambda: ProvokedVAE("beta"),
            "beta 10,000 from epoch 20": lambda: ProvokedVAE("beta", 20),
            "z ignored from the start": lambda: ProvokedVAE("ignored"),
            "z ignored from epoch 20": lambda: ProvokedVAE("ignored", 20),
            "dimension 3 ignored from epoch 20": lambda: ProvokedVAE("dimension", 20),
        },
        lambda model: PosteriorKLMonitor(**of_digits()),
        lambda result: [result.per_dimension.tolist(), result.variance_of_mean.tolist()],
        epochs=40,
    ),
    "generation_balance": Case(
        RecordedBalance,
        {"gan": GAN, "vae": VAE},
        # only classes matter, so any features do
        lambda model: GenerationBalanceMonitor(
            features=lambda module, images: images[:, 0, ::16, ::16].flatten(1), **of_digits()
        ),
        lambda result: result.generated_count.long().tolist(),
        once=lambda monitor: {"real": monitor.result.real_count.long().tolist()},
    ),
}


# ---- recording ----


class Recorder(Callback):
    """Records after each evaluation what the monitor found, and what it would have found with each fault."""

    def __init__(self, case: Case, monitor: Monitor[Any, Any], seed: int) -> None:
        self.case, self.monitor, self.seed = case, monitor, seed
        self.planted: dict[str, Callable[[int], Result]] = {}
        self.series: dict[str, list[Any]] = defaultdict(list)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records one evaluation."""
        self.series["healthy"].append(_rounded(self.case.row(self.monitor.result)))
        age = trainer.current_epoch - self.case.run.start
        if age == 0:
            self.planted = self.case.plant(self.monitor, self.seed)
        for fault, measured in self.planted.items() if age < self.case.after else ():
            self.series[fault].append(_rounded(self.case.row(measured(age))))


def _rounded(value: Any) -> Any:
    return [_rounded(part) for part in value] if isinstance(value, list) else float(f"{value:.6g}")


def record(case: Case, model: str, seed: int) -> dict[str, Any]:
    """Trains one model and returns all series."""
    seed_everything(seed, verbose=False)
    module = case.models[model]()
    monitor = case.monitor(model)
    recorder = Recorder(case, monitor, seed)
    batches = flow.digit_batches() if isinstance(module, flow.Flow) else digit_batches()
    trained(module, batches, case.epochs, monitor, recorder)
    return {"kind": model, "seed": seed, "series": dict(recorder.series), **case.once(monitor)}


# ---- the table ----


def summary(diagnostic: str, runs: Sequence[RecordedRun]) -> Iterator[dict[str, Any]]:
    """Yields the figures of each model and fault, and of each model without faults."""
    series = [(run, fault) for run in runs for fault in run.series]
    for model, title in dict.fromkeys((run.model, run.title(fault)) for run, fault in series):
        some = [(run, fault) for run, fault in series if (run.model, run.title(fault)) == (model, title)]
        alarms = [run.alarms(fault) for run, fault in some]
        row = {"diagnostic": diagnostic, "model": model, "fault": title, "runs": len(some)}
        if title == "healthy":
            messages = [
                f"seed {run.seed}: {alarm}" for (run, _), own in zip(some, alarms, strict=True) for alarm in own
            ]
            yield {**row, "evaluations": sum(len(run.rows(fault)) for run, fault in some), "false_alarms": messages}
            continue
        found, first, delays = 0, 0, []
        for (run, fault), own in zip(some, alarms, strict=True):
            begin = run.begin(fault)
            right = [alarm for alarm in own if alarm.epoch >= begin and run.is_right(fault, alarm)]
            found += bool(right)
            first += right[:1] == own[:1] != []
            delays += [alarm.epoch - begin + 1 for alarm in right[:1]]
        delay = statistics.median(delays) if delays else math.nan
        yield {**row, "named": found, "first": first, "delay": delay, "longest": max(delays, default=math.nan)}


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints what is found, how soon, and how many alarms are false."""
    titles = f"{'runs':>5s} {'named':>6s} {'first':>6s} {'delay':>6s} {'longest':>8s}"
    print(f"{'diagnostic':19s} {'model':38s} {'fault':34s} {titles}")
    for row in rows:
        line = f"{row['diagnostic']:19s} {row['model']:38s} {row['fault']:34s} {row['runs']:5d} "
        if "evaluations" in row:
            print(f"{line} {len(row['false_alarms'])} false alarms in {row['evaluations']} evaluations")
            for message in row["false_alarms"]:
                print(f"  {message}")
        else:
            print(f"{line}{row['named']:6d} {row['first']:6d} {row['delay']:6.1f} {row['longest']:8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=int, default=0, help="train this number of each model first")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--only", choices=CASES, help="one diagnostic")
    parser.add_argument("--folder", type=Path, default=DATA, help="where the recorded runs are")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for diagnostic, case in CASES.items() if chosen.only is None else [(chosen.only, CASES[chosen.only])]:
        if chosen.record:
            seeds = range(chosen.first_seed, chosen.first_seed + chosen.record)
            runs = [record(case, model, seed) for seed in seeds for model in case.models]
            chosen.folder.mkdir(parents=True, exist_ok=True)
            (chosen.folder / case.run.file).write_text(json.dumps(runs, separators=(",", ":")))
        rows += summary(diagnostic, case.run.read(chosen.folder))
    print(json.dumps(rows, indent=1)) if chosen.json else table(rows)


if __name__ == "__main__":
    main()
