"""Can the alarm on latent dimensions be trusted? Planted faults and healthy runs of the example VAE, flow and GAN.

``--record 10`` trains ten of each and writes what the monitor sees at every epoch, and what it would see if the decoder
misused its latents from the 20th on; without it the recorded files are judged. A minute for three runs on two cores.
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

from example_models import data, flow
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    ManifoldEntropy,
    ManifoldEntropyMonitor,
    ManifoldEntropyResult,
    decoder_gram,
)
from lightning_gendiag.monitor import Evaluation

RECORDS = Path(__file__).parent.parent / "tests" / "data" / "recorded_dimensions.json"
START, EPOCHS, AFTER = 20, 30, 6
FAULTS = ("dead", "entangled", "collapse")


def mixing(fault: str, length: int) -> Tensor:
    """(L, L), applied to latents: dimension 3 dead, 7 doing what 3 does, or only the first tenth of them left."""
    matrix = torch.eye(length)
    if fault == "dead":
        matrix[3, 3] = 0
    elif fault == "entangled":
        matrix[7, 7], matrix[7, 3] = 0.2, 1
    else:
        weak = torch.arange(length) >= max(1, length // 10)
        matrix[weak, weak] = 0.02
    return matrix


def model(kind: str) -> tuple[LightningModule, Any]:
    """An example and its data."""
    if kind == "vae":
        return VAE(), data.digit_batches()
    if kind == "flow":
        return flow.Flow(64, (1, 8, 8), hidden=128), flow.digit_batches()
    return GAN(), data.digit_batches()


class Recorder(Callback):
    """After the monitor's evaluation: what it found, and what it would have found with each fault."""

    def __init__(self, monitor: ManifoldEntropyMonitor) -> None:
        self.monitor = monitor
        self.rows: dict[str, list[list[float]]] = defaultdict(list)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the decoder as it is and with each fault."""
        probe = self.monitor.probe
        assert probe is not None
        self.rows["healthy"].append(_row(self.monitor.result))
        if not START <= trainer.current_epoch < START + AFTER:
            return
        for fault in FAULTS:
            matrix = mixing(fault, probe.noise_length)
            metric = ManifoldEntropy(probe.noise_length)
            with probe.looking(exact=True):
                for z in probe.latents(self.monitor.num_latents):
                    metric.update(decoder_gram(lambda x, m=matrix: probe.decoder(x @ m), z))
            self.rows[fault].append(_row(metric.compute()))


def _row(result: ManifoldEntropyResult) -> list[float]:
    i, j = result.strongest_pair
    return [round(float(v), 3) for v in [*result.entropy, result.mutual_information[i, j], i, j]]


def record(kind: str, seed: int) -> dict[str, Any]:
    """Train one healthy model and return all series."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    seed_everything(seed, verbose=False)
    module, batches = model(kind)
    monitor = ManifoldEntropyMonitor(draw_pictures=False)
    recorder = Recorder(monitor)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[monitor, recorder], logger=False, enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    return {"kind": kind, "seed": seed, "series": dict(recorder.rows)}


def replay(run: dict[str, Any], name: str, **options: Any) -> CollapseStopping:
    """Judge one recorded series; a faulty one follows the healthy one up to the fault."""
    monitor, stopping = ManifoldEntropyMonitor(), CollapseStopping(**options)
    rows = run["series"]["healthy"]
    rows = rows if name == "healthy" else rows[:START] + run["series"][name]
    for epoch, row in enumerate(rows):
        entropy = torch.tensor(row[:-3], dtype=torch.float64)
        length = len(entropy)
        shared = torch.zeros(length, length, dtype=torch.float64)
        i, j = int(row[-2]), int(row[-1])
        shared[i, j] = shared[j, i] = row[-3]
        nan = torch.full((length,), math.nan)
        result = ManifoldEntropyResult(
            entropy, nan[0], nan[0], shared, nan, nan, entropy.argsort(descending=True), nan[:0], nan[0], nan[0]
        )
        monitor.dims = torch.arange(length)
        stopping.judge(monitor, Evaluation(epoch + 1, epoch, epoch, monitor.readings(result)))
    return stopping


def rightly_named(run: dict[str, Any], fault: str, where: str) -> bool:
    """Whether a finding names what was planted."""
    if fault == "collapse":
        return where.startswith(("all dimensions", "dimension"))
    return where == {"dead": "dimension 3", "entangled": "dimension 3 with dimension 7"}[fault]


def table(runs: list[dict[str, Any]], **options: Any) -> None:
    """Print what is found, how soon, and how often wrongly."""
    for kind in ("vae", "flow", "gan"):
        some = [run for run in runs if run["kind"] == kind]
        healthy = [(run["seed"], f) for run in some for f in replay(run, "healthy", **options).findings]
        looks = sum(len(run["series"]["healthy"]) for run in some)
        print(f"{kind}: {len(healthy)} false alarms in {len(some)} runs of {looks} evaluations")
        for seed, finding in healthy:
            print(f"  seed {seed}: {finding}")
        for fault in FAULTS:
            first = [replay(run, fault, **options).findings[:1] for run in some]
            right = [f[0] for run, f in zip(some, first, strict=True) if f and rightly_named(run, fault, f[0].where)]
            delay = statistics.median([f.epoch - START + 1 for f in right]) if right else math.nan
            print(f"  {fault:10s} found and rightly named {len(right)}/{len(some)}, after {delay} evaluations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=int, default=0, help="train so many of each first")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--file", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.record:
        runs = []
        for kind in ("vae", "flow", "gan"):
            for seed in range(options.first_seed, options.first_seed + options.record):
                runs.append(record(kind, seed))
                options.file.parent.mkdir(parents=True, exist_ok=True)
                options.file.write_text(json.dumps(runs, separators=(",", ":")))
                print(f"recorded {kind} {seed}", flush=True)
    table(json.loads(options.file.read_text()))


if __name__ == "__main__":
    main()
