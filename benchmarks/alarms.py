"""Can the alarm be trusted? Planted faults and healthy runs of the example GAN, judged by ``CollapseStopping``.

Runs are recorded once, to files, and judged from there in seconds: ``--record 10`` trains ten GANs on digits (about a
minute each on two cores) and measures, at every epoch from the 24th on, what the monitor would see if a region of
the samples were broken. Without ``--record`` the recorded files are judged and the table is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from example_models.data import digit_batches
from example_models.gan import GAN
from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, CosineMeanSimilarityResult, RegionMap
from lightning_gendiag.diagnostics.cosine_mean_similarity import CosineMeanSimilarity
from lightning_gendiag.monitor import Evaluation

RECORDS = Path(__file__).parent.parent / "tests" / "data" / "recorded_gans.json"
START = 24
FAULTS = ("frozen", "blurred", "dark", "noise", "slide")


def broken(samples: Tensor, inside: Tensor, fault: str, age: int, still: Tensor) -> Tensor:
    """Samples (N, C, H, W) with a fault where ``inside`` (H, W) is true; ``age`` counts evaluations from 0."""
    mean = samples.mean(0, keepdim=True)
    generator = torch.Generator().manual_seed(3)
    within = {
        "frozen": still,
        "blurred": mean,
        "dark": (samples - 1) / 2,
        "noise": torch.rand(samples.shape, generator=generator) * 2 - 1,
        "slide": torch.lerp(samples, mean.expand_as(samples), min(1.0, 0.08 * (age + 1))),
    }[fault]
    return torch.where(inside, within, samples)


class Recorder(Callback):
    """After the monitor's evaluation: what it found, and what it would have found with each fault."""

    def __init__(self, monitor: CosineMeanSimilarityMonitor) -> None:
        self.monitor = monitor
        self.rows: dict[str, list[list[float]]] = defaultdict(list)
        self.still: Tensor | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the samples as they are and with each fault."""
        monitor = self.monitor
        result, metric, regions = monitor.result, monitor.metric, monitor.region_map
        assert isinstance(metric, CosineMeanSimilarity)
        assert regions is not None
        assert monitor.probe is not None
        assert monitor.latest is not None
        self.rows["healthy"].append(_row(result))
        age = trainer.current_epoch - START
        if age < 0:
            return
        samples = monitor.probe.samples(monitor.latest.step).images
        self.still = samples[:1].clone() if self.still is None else self.still
        everywhere = torch.ones(regions.labels.shape, dtype=torch.bool)
        # two regions to a seed, so that all have their turn
        places = [(str(r), regions.mask(r)) for r in {pl_module.seed % 5, (pl_module.seed + 2) % 5}]
        for fault in FAULTS:
            for place, inside in [*places, ("image", everywhere)]:
                if place == "image" and fault != "frozen":
                    continue
                metric.reset()
                metric.update(broken(samples, inside, fault, age, self.still), real=False)
                self.rows[f"{fault} {place}"].append(_row(metric.compute()))


def _row(result: CosineMeanSimilarityResult) -> list[float]:
    return [round(float(value), 6) for value in [*result.regions, result.image]]


def record(seed: int, lr: float, epochs: int = 40) -> dict[str, Any]:
    """Train one healthy GAN and return all series."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    seed_everything(seed, verbose=False)
    model = GAN(lr=lr)
    model.seed = seed
    monitor = CosineMeanSimilarityMonitor(num_regions=5, draw_pictures=False)
    recorder = Recorder(monitor)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[monitor, recorder], logger=False, enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, digit_batches())
    assert monitor.region_map is not None
    result = monitor.result
    return {
        "seed": seed,
        "lr": lr,
        "labels": monitor.region_map.labels.tolist(),
        "null_mean": [round(v, 7) for v in result.null_mean.tolist()],
        "null_std": [round(v, 7) for v in result.null_std.tolist()],
        "series": dict(recorder.rows),
    }


def replay(run: dict[str, Any], name: str, **options: Any) -> tuple[CollapseStopping, RegionMap]:
    """Judge one recorded series; a faulty one follows the healthy one up to the fault."""
    regions = RegionMap(torch.tensor(run["labels"]))
    monitor = CosineMeanSimilarityMonitor(regions)
    stopping = CollapseStopping(**options)
    rows = run["series"]["healthy"]
    rows = rows if name == "healthy" else rows[:START] + run["series"][name]
    null_mean, null_std = torch.tensor(run["null_mean"]), torch.tensor(run["null_std"])
    for epoch, row in enumerate(rows):
        values = torch.tensor(row)
        result = CosineMeanSimilarityResult(
            values[-1], values[:-1], null_mean, null_std, torch.empty(0, len(row)), torch.tensor(0.0)
        )
        stopping.judge(monitor, Evaluation(epoch + 1, epoch, epoch, monitor.readings(result)))
    return stopping, regions


def table(runs: list[dict[str, Any]], **options: Any) -> None:
    """Print what is found, how soon, and how often wrongly."""
    alarms = [(run["seed"], finding) for run in runs for finding in replay(run, "healthy", **options)[0].findings]
    looks = sum(len(run["series"]["healthy"]) for run in runs)
    print(f"healthy: {len(alarms)} false alarms in {len(runs)} runs of {looks} evaluations")
    for seed, finding in alarms:
        print(f"  seed {seed}: {finding}")
    print(f"{'fault':10s} {'runs':>5s} {'found':>6s} {'only it':>8s} {'delay':>6s} {'longest':>8s}")
    names = sorted({name for run in runs for name in run["series"]} - {"healthy"})
    for fault in sorted({name.split()[0] + (" image" if "image" in name else "") for name in names}):
        found, only, delays = 0, 0, []
        cases = [(run, n) for run in runs for n in run["series"] if n == fault or n.rsplit(" ", 1)[0] == fault]
        cases = [(run, n) for run, n in cases if n.endswith("image") == fault.endswith("image")]
        for run, name in cases:
            stopping, regions = replay(run, name, **options)
            place = name.rsplit(" ", 1)[1]
            true = "image" if place == "image" else regions.names[int(place)]
            late = [finding for finding in stopping.findings if finding.epoch >= START]
            right = [finding for finding in late if finding.where == true]
            found += bool(right)
            # what counts is what a run would have been stopped with
            only += bool(right) and all(f.where == true for f in late if f.step <= right[0].step)
            delays += [right[0].epoch - START + 1] if right else []
        delay = statistics.median(delays) if delays else math.nan
        longest = max(delays, default=0)
        print(
            f"{fault:13s} {len(cases):2d} {found / len(cases):6.0%} {only / len(cases):8.0%} {delay:6.1f} {longest:8d}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=int, default=0, help="train so many GANs first")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--file", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.record:
        runs = []
        for seed in range(options.first_seed, options.first_seed + options.record):
            runs.append(record(seed, options.lr))
            options.file.parent.mkdir(parents=True, exist_ok=True)
            options.file.write_text(json.dumps(runs, separators=(",", ":")))
            print(f"recorded seed {seed}", flush=True)
    table(json.loads(options.file.read_text()))


if __name__ == "__main__":
    main()
