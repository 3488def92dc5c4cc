"""Can the alarm on classes be trusted? A class that fractures, and healthy runs, of the example VAE and GAN.

``--record 10`` trains ten of each and writes what ``KStarMonitor`` sees at every epoch, and what it would see if two
thirds of class 7 lay among classes 1, 4 and 9; without it the recorded files are judged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from example_models.data import digit_batches, digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import CollapseStopping, KStarMonitor, KStarResult, Probe, k_star
from lightning_gendiag.monitor import Evaluation

RECORDS = Path(__file__).parent.parent / "tests" / "data" / "recorded_classes.json"
START, EPOCHS, AFTER = 20, 30, 8
LAYERS = {"vae": "encode", "gan": "discriminator.7"}


def fractured(latents: Tensor, labels: Tensor) -> Tensor:
    """Two thirds of class 7 moved among classes 1, 4 and 9."""
    moved = latents.clone()
    own = (labels == 7).nonzero()[:, 0]
    centre = latents[own].mean(0)
    for piece, other in enumerate((1, 4, 9)):
        some = own[piece::5] if piece else torch.cat([own[0::5], own[3::5]])
        moved[some] += latents[labels == other].mean(0) - centre
    return moved


class Recorder(Callback):
    """After the monitor's evaluation: what it found, and what it would have found with the fault."""

    def __init__(self, monitor: KStarMonitor) -> None:
        self.monitor = monitor
        self.rows: dict[str, list[list[float]]] = defaultdict(list)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the features as they are and with the fault."""
        self.rows["healthy"].append(_row(self.monitor.result))
        if START <= trainer.current_epoch < START + AFTER:
            metric = self.monitor.metric
            assert metric is not None
            latents, labels = metric.rows("latents"), metric.rows("labels")
            self.rows["fractured"].append(_row(k_star(fractured(latents, labels), labels)))


def _row(result: KStarResult) -> list[float]:
    return [
        round(v, 4) for v in [*result.mean.tolist(), *map(float, result.nearest_rival), float(result.values.mean())]
    ]


def record(kind: str, seed: int) -> dict[str, Any]:
    """Train one healthy model and return its series."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    seed_everything(seed, verbose=False)
    module: LightningModule = VAE() if kind == "vae" else GAN()
    monitor = KStarMonitor(LAYERS[kind], probe=Probe(reference=digits(32)), draw_pictures=False)
    recorder = Recorder(monitor)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[monitor, recorder], logger=False, enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, digit_batches())
    return {"kind": kind, "seed": seed, "series": dict(recorder.rows)}


def replay(run: dict[str, Any], name: str, **options: Any) -> CollapseStopping:
    """Judge one recorded series; a faulty one follows the healthy one up to the fault."""
    monitor, stopping = KStarMonitor(), CollapseStopping(**options)
    rows = run["series"]["healthy"]
    rows = rows if name == "healthy" else rows[:START] + run["series"][name]
    for epoch, row in enumerate(rows):
        mean = torch.tensor(row[:10], dtype=torch.float64)
        rivals = torch.nn.functional.one_hot(torch.tensor(row[10:20]).long(), 10).double()
        values = torch.full((1,), row[20], dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        result = KStarResult(values, torch.zeros(1), torch.arange(10), mean, mean, mean, rivals, zero)
        stopping.judge(monitor, Evaluation(epoch + 1, epoch, epoch, monitor.readings(result)))
    return stopping


def table(runs: list[dict[str, Any]], **options: Any) -> None:
    """Print what is found, how soon, and how often wrongly."""
    for kind in LAYERS:
        some = [run for run in runs if run["kind"] == kind]
        healthy = [(run["seed"], f) for run in some for f in replay(run, "healthy", **options).findings]
        print(f"{kind}: {len(healthy)} false alarms in {len(some)} runs of {len(some) * EPOCHS} evaluations")
        for seed, finding in healthy:
            print(f"  seed {seed}: {finding}")
        named = [[f for f in replay(run, "fractured", **options).findings if "class 7" in f.names] for run in some]
        delays = [found[0].epoch - START + 1 for found in named if found]
        print(
            f"  class 7 fractured: named {len(delays)}/{len(some)}, after {statistics.median(delays or [0])} evaluations"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=int, default=0, help="train so many of each first")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--file", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.record:
        runs = []
        for kind in LAYERS:
            for seed in range(options.first_seed, options.first_seed + options.record):
                runs.append(record(kind, seed))
                options.file.parent.mkdir(parents=True, exist_ok=True)
                options.file.write_text(json.dumps(runs, separators=(",", ":")))
                print(f"recorded {kind} {seed}", flush=True)
    table(json.loads(options.file.read_text()))


if __name__ == "__main__":
    main()
