"""Can the alarm on the posterior be trusted? Collapse that is provoked in training, and healthy VAEs with a KL warm-up.

``--record 10`` trains ten of each kind and writes what ``PosteriorKLMonitor`` sees at every epoch; without it the recorded
files are judged. Three minutes for one seed of all kinds on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from example_models.data import digit_batches, digits
from example_models.vae import VAE
from lightning_gendiag import CollapseStopping, PosteriorKLMonitor, PosteriorKLResult, Probe
from lightning_gendiag.monitor import Evaluation

RECORDS = Path(__file__).parent.parent / "tests" / "data" / "recorded_posteriors.json"
START, EPOCHS = 20, 30


class ProvokedVAE(VAE):
    """A VAE that comes to harm in training itself.

    Args:
        harm: ``beta``: the KL term counts ten thousandfold; ``ignored``: the decoder gets zeros for its latents;
            ``dimension``: it gets zeros for dimension 3.
        start: the epoch from which on.
        kwargs: as for :class:`VAE`.
    """

    def __init__(self, harm: str = "beta", start: int = START, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.harm, self.start = harm, start

    def decode(self, z: Tensor) -> Tensor:
        """Images, of latents that are lost once it has begun."""
        if self.harm != "beta" and self.current_epoch >= self.start:
            kept = torch.ones(z.shape[1], device=z.device)
            kept[slice(None) if self.harm == "ignored" else 3] = 0
            z = z * kept
        return super().decode(z)

    def on_train_epoch_start(self) -> None:
        """Switch the weight of the KL term."""
        if self.harm == "beta" and self.current_epoch >= self.start:
            self.hparams["beta"] = 1e4


KINDS: dict[str, Any] = {
    "healthy": lambda: VAE(),
    "healthy, warm-up of 15 epochs": lambda: VAE(warmup=15),
    "healthy, L = 32, warm-up of 15 epochs": lambda: VAE(32, warmup=15),
    "healthy, L = 2, warm-up of 15 epochs": lambda: VAE(2, warmup=15),
    "beta 10,000 from the start": lambda: ProvokedVAE("beta", 0),
    "beta 10,000 from epoch 20": lambda: ProvokedVAE("beta"),
    "z ignored from the start": lambda: ProvokedVAE("ignored", 0),
    "z ignored from epoch 20": lambda: ProvokedVAE("ignored"),
    "dimension 3 ignored from epoch 20": lambda: ProvokedVAE("dimension"),
}


class Recorder(Callback):
    """What the monitor found at each evaluation."""

    def __init__(self, monitor: PosteriorKLMonitor) -> None:
        self.monitor = monitor
        self.rows: list[list[list[float]]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep KL and variance of the mean."""
        result = self.monitor.result
        self.rows.append(
            [[round(v, 4) for v in part.tolist()] for part in (result.per_dimension, result.variance_of_mean)]
        )


def record(kind: str, seed: int) -> dict[str, Any]:
    """Train one and return its series."""
    seed_everything(seed, verbose=False)
    monitor = PosteriorKLMonitor(probe=Probe(reference=digits(32)), draw_pictures=False)
    recorder = Recorder(monitor)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[monitor, recorder], logger=False, enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(KINDS[kind](), digit_batches())
    return {"kind": kind, "seed": seed, "rows": recorder.rows}


def replay(run: dict[str, Any], **options: Any) -> CollapseStopping:
    """Judge one recorded series."""
    monitor, stopping = PosteriorKLMonitor(), CollapseStopping(**options)
    for epoch, (kl, spread) in enumerate(run["rows"]):
        kl, spread = torch.tensor(kl, dtype=torch.float64), torch.tensor(spread, dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        result = PosteriorKLResult(kl, spread, kl * 0, kl * 0 + 1, zero, zero, zero + monitor.threshold)
        stopping.judge(monitor, Evaluation(epoch + 1, epoch, epoch, monitor.readings(result)))
    return stopping


def rightly(kind: str, stopping: CollapseStopping) -> Any:
    """The first finding that names what was provoked."""
    wanted = "dimension 3" if "dimension" in kind else "the latent"
    return next((f for f in stopping.findings if wanted in (f.names[0], f.where) or wanted in f.words), None)


def table(runs: list[dict[str, Any]], **options: Any) -> None:
    """Print what is found, how soon, and how often wrongly."""
    for kind in KINDS:
        some = [run for run in runs if run["kind"] == kind]
        judged = [(run["seed"], replay(run, **options)) for run in some]
        if kind.startswith("healthy"):
            wrong = [(seed, f) for seed, stopping in judged for f in stopping.findings]
            print(f"{kind}: {len(wrong)} false alarms in {len(some)} runs of {len(some) * EPOCHS} evaluations")
            for seed, finding in wrong:
                print(f"  seed {seed}: {finding}")
            continue
        found = [rightly(kind, stopping) for _, stopping in judged]
        begun = START if "epoch" in kind else 0
        delays = [f.epoch - begun + 1 for f in found if f]
        first = sum(f is not None and f is stopping.findings[0] for f, (_, stopping) in zip(found, judged, strict=True))
        print(
            f"{kind}: named {len(delays)}/{len(some)} (first {first}), after {statistics.median(delays or [0])} evaluations"
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
