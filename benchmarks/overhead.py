"""What does it cost to look? Examples trained with nothing, with torchmetrics' FID, with each monitor, with the default set.

Each arm trains in a process of its own, one after the other, and is measured there: seconds of ``trainer.fit``, peak memory,
and the size of the event files. Monitors alone look at every epoch; FID, from a small network on as many samples, too. The
default set is ``GenerativeDiagnostics()`` with its limit of 5 % of the training's time, which a long run keeps to, and without.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torchmetrics.image.fid import FrechetInceptionDistance

from example_models import data, flow
from example_models.diffusion import Diffusion
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    GenerativeDiagnostics,
    KStarMonitor,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
)
from lightning_gendiag.judges import FeatureNetwork

MODELS: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    "gan": lambda: (GAN(), data.digit_batches()),
    "vae": lambda: (VAE(), data.digit_batches()),
    "flow": lambda: (flow.Flow(64, (1, 8, 8), hidden=128), flow.digit_batches()),
    "diffusion": lambda: (Diffusion(), data.digit_batches(size=16)),
}


class FID(Callback):
    """torchmetrics' FID of 1,024 samples at every epoch, with features of a small network."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = (images[:1024] + 1).clamp(0, 2) / 2
        network = FeatureNetwork((255 * self.images).byte())
        self.metric = FrechetInceptionDistance(network, reset_real_features=False, normalize=True)
        self.metric.update(self.images, real=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        pl_module.eval()
        with torch.no_grad():
            if hasattr(pl_module, "sample"):
                samples = torch.cat([pl_module.sample(128) for _ in range(8)])
            else:
                samples = pl_module(torch.randn(1024, pl_module.hparams["latent_dim"]))
            self.metric.update((samples + 1).clamp(0, 2) / 2, real=False)
        pl_module.train()
        self.log("fid", self.metric.compute())
        self.metric.reset()


ARMS: dict[str, Callable[[str], list[Callback]]] = {
    "none": lambda model: [],
    "fid": lambda model: [FID(data.digits({"flow": 8, "diffusion": 16}.get(model, 32))[0])],
    "cms": lambda model: [CosineMeanSimilarityMonitor()],
    "generation_balance": lambda model: [GenerationBalanceMonitor()],
    "k_star": lambda model: [KStarMonitor("discriminator.7" if model == "gan" else "encode")],
    "manifold_entropy": lambda model: [ManifoldEntropyMonitor()],
    "posterior_kl": lambda model: [PosteriorKLMonitor()],
    "latent_regions": lambda model: [LatentRegionsMonitor(every_n_epochs=5)],
    "regional_primitives": lambda model: [RegionalPrimitivesMonitor(every_n_epochs=10)],
    "default": lambda model: [GenerativeDiagnostics(action="warn")],
    "default, no limit": lambda model: [GenerativeDiagnostics(action="warn", max_share=None)],
}
NOT_FOR = {
    "gan": ("posterior_kl", "latent_regions"),
    "vae": (),
    "flow": ("posterior_kl", "regional_primitives"),
    "diffusion": ("k_star", "manifold_entropy", "posterior_kl", "latent_regions", "regional_primitives"),
}


def arm(model: str, name: str, epochs: int) -> dict[str, float]:
    """Train one and measure."""
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    module, batches = MODELS[model]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=ARMS[name](model), enable_model_summary=False,
            logger=TensorBoardLogger(folder), log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        started = time.monotonic()
        trainer.fit(module, batches)
        seconds = time.monotonic() - started
        events = sum(path.stat().st_size for path in Path(folder).rglob("*events*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "events_mib": events / 2**20}


def measured(model: str, name: str, epochs: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--arm", model, name, "--epochs", str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def least(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of several measurements of one thing, what was least disturbed."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--models", nargs="+", default=["gan"], choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=["none", "fid", "default"], help="names, or 'all'")
    parser.add_argument("--repeats", type=int, default=2, help="of each arm, of which the fastest counts")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON, about the first model")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(arm(*options.arm, options.epochs)))
        return
    figures: dict[str, float] = {}
    for model in options.models:
        names = list(ARMS) if "all" in options.arms else options.arms
        names = [name for name in names if name not in NOT_FOR[model]]
        titles = f"{'seconds':>8s} {'ratio':>6s} {'peak MiB':>9s} {'ratio':>6s} {'events MiB':>11s}"
        print(f"{f'{model}, {options.epochs} epochs':28s} {titles}")
        runs = [{name: measured(model, name, options.epochs) for name in names} for _ in range(options.repeats)]
        found = {name: least([run[name] for run in runs]) for name in names}
        for name in names:
            own, none = found[name], found.get("none", found[name])
            print(
                f"  {name:26s} {own['seconds']:8.1f} {own['seconds'] / none['seconds']:6.2f} {own['peak_mib']:9.0f} "
                f"{own['peak_mib'] / none['peak_mib']:6.2f} {own['events_mib']:11.2f}",
                flush=True,
            )
        if not figures and {"none", "fid", "default"} <= set(found):
            none = found["none"]
            figures = {
                "default_over_none": found["default"]["seconds"] / none["seconds"],
                "fid_over_none": found["fid"]["seconds"] / none["seconds"],
                "peak_memory_ratio": found["default"]["peak_mib"] / none["peak_mib"],
            }
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
