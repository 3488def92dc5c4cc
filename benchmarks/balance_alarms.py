"""Can the alarm on the balance of classes be trusted? A class that is dropped, and healthy runs of the example GAN and VAE.

``--record 10`` trains ten of each and writes the counts of classes that ``GenerationBalanceMonitor`` sees at every epoch;
without it the recorded files are judged, as they are and with nine tenths of the most frequent class made images of the
others from the 20th epoch on.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from example_models.data import digit_batches, digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    GenerationBalance,
    GenerationBalanceMonitor,
    GenerationBalanceResult,
    Probe,
)
from lightning_gendiag.monitor import Evaluation

RECORDS = Path(__file__).parent.parent / "tests" / "data" / "recorded_balance.json"
START, EPOCHS = 20, 30
KINDS = {"gan": GAN, "vae": VAE}


class Recorder(Callback):
    """The counts of generated classes at each evaluation."""

    def __init__(self, monitor: GenerationBalanceMonitor) -> None:
        self.monitor = monitor
        self.rows: dict[str, list[list[int]]] = defaultdict(list)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep them."""
        result: GenerationBalanceResult = self.monitor.result
        self.rows["healthy"].append([int(count) for count in result.generated_count])
        self.rows["real"] = [[int(count) for count in result.real_count]]


def record(kind: str, seed: int) -> dict[str, Any]:
    """Train one healthy model and return its series."""
    seed_everything(seed, verbose=False)
    # only classes are looked at: any feature does
    monitor = GenerationBalanceMonitor(
        features=lambda module, images: images[:, 0, ::16, ::16].flatten(1), probe=Probe(reference=digits(32)),
        draw_pictures=False,
    )  # fmt: skip
    recorder = Recorder(monitor)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[monitor, recorder], logger=False, enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(KINDS[kind](), digit_batches())
    return {"kind": kind, "seed": seed, "series": dict(recorder.rows)}


def replay(run: dict[str, Any], name: str, **options: Any) -> tuple[CollapseStopping, str]:
    """Judge one recorded series, healthy or with a class dropped; and the class."""
    monitor, stopping = GenerationBalanceMonitor(), CollapseStopping(**options)
    rows = torch.tensor(run["series"]["healthy"], dtype=torch.float64)
    real = torch.tensor(run["series"]["real"][0])
    victim = int(rows[START - 8 : START].sum(0).argmax())
    for epoch, counts in enumerate(rows):
        if name == "dropped" and epoch >= START:
            gone = (counts[victim] * 0.9).floor()
            others = torch.arange(len(counts)) != victim
            counts = counts + others * (gone * counts / counts[others].sum()).round()
            counts[victim] -= gone
        metric = GenerationBalance(len(counts))
        metric.update(torch.repeat_interleave(torch.arange(len(counts)), real), real=True)
        metric.update(torch.repeat_interleave(torch.arange(len(counts)), counts.long()), real=False)
        stopping.judge(monitor, Evaluation(epoch + 1, epoch, epoch, monitor.readings(metric.compute())))
    return stopping, f"class {victim}"


def table(runs: list[dict[str, Any]], **options: Any) -> None:
    """Print what is found, how soon, and how often wrongly."""
    for kind in KINDS:
        some = [run for run in runs if run["kind"] == kind]
        healthy = [(run["seed"], f) for run in some for f in replay(run, "healthy", **options)[0].findings]
        print(f"{kind}: {len(healthy)} false alarms in {len(some)} runs of {len(some) * EPOCHS} evaluations")
        for seed, finding in healthy:
            print(f"  seed {seed}: {finding}")
        named = []
        for run in some:
            stopping, victim = replay(run, "dropped", **options)
            named += [f for f in stopping.findings if victim in f.names and f.epoch >= START][:1]
        delays = [finding.epoch - START + 1 for finding in named]
        print(
            f"  a class dropped: named {len(named)}/{len(some)}, after {statistics.median(delays or [0])} evaluations"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=int, default=0, help="train so many of each first")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--file", type=Path, default=RECORDS)
    options = parser.parse_args()
    if options.record:
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        runs = []
        for seed in range(options.first_seed, options.first_seed + options.record):
            runs += [record(kind, seed) for kind in KINDS]
            options.file.parent.mkdir(parents=True, exist_ok=True)
            options.file.write_text(json.dumps(runs, separators=(",", ":")))
            print(f"recorded seed {seed}", flush=True)
    table(json.loads(options.file.read_text()))


if __name__ == "__main__":
    main()
