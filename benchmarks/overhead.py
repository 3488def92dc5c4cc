"""What does it cost to look? Examples trained with nothing, with torchmetrics' FID, with each monitor, with the default set.

Each arm trains in a process of its own and is measured there: seconds of ``trainer.fit``, peak memory, and the size of the
event files. Monitors alone look at every epoch; FID, from a small network on as many samples, too. The default set is
``GenerativeDiagnostics()`` with its limit of 5 % of the training's time, and without.

The arms take turns, an epoch each, so that a machine that slows down slows all of them. All train the same batches, bit for
bit, and yet two processes without any callback differ by some hundredths: "batches" has the median seconds of each arm's
epochs, "none, again" is a second process without. For the ratio an epoch's batches count as the median over all arms, and
what lies between them, all that callbacks take among it, in full. "looking" is what the callbacks say that they took
themselves, as a share of the training without, and for a look.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
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
    Monitor,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
)
from lightning_gendiag.budget import budget_of
from lightning_gendiag.judges import FeatureNetwork

MODELS: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    "gan": lambda: (GAN(), data.digit_batches()),
    "vae": lambda: (VAE(), data.digit_batches()),
    "flow": lambda: (flow.Flow(64, (1, 8, 8), hidden=128), flow.digit_batches()),
    "diffusion": lambda: (Diffusion(), data.digit_batches(size=16)),
}


class Turns(Callback):
    """Wait for this arm's turn before each epoch; the first of the callbacks, so that other epoch ends are not its batches'."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.waited = 0.0
        self.started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over, and go on when told."""
        paused = time.monotonic()
        print("ready", flush=True)
        sys.stdin.readline()
        self.started = time.monotonic()
        self.waited += self.started - paused
        # no training passes while others have their turn
        budget_of(trainer).started += self.started - paused

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the batches took."""
        self.epochs.append(time.monotonic() - self.started)


class FID(Callback):
    """torchmetrics' FID of 1,024 samples at every epoch, with features of a small network."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = (images[:1024] + 1).clamp(0, 2) / 2
        network = FeatureNetwork((255 * self.images).byte())
        self.metric = FrechetInceptionDistance(network, reset_real_features=False, normalize=True)
        self.metric.update(self.images, real=True)
        self.seconds, self.evaluations = 0.0, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        started = time.monotonic()
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
        self.seconds, self.evaluations = self.seconds + time.monotonic() - started, self.evaluations + 1


ARMS: dict[str, Callable[[str], list[Callback]]] = {
    "none": lambda model: [],
    "none, again": lambda model: [],
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
    turns = Turns()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[turns, *ARMS[name](model)], enable_model_summary=False,
            logger=TensorBoardLogger(folder), log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        started = time.monotonic()
        trainer.fit(module, batches)
        between = time.monotonic() - started - turns.waited - sum(turns.epochs)
        events = sum(path.stat().st_size for path in Path(folder).rglob("*events*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    looking = [callback for callback in trainer.callbacks if isinstance(callback, (Monitor, FID))]  # type: ignore[attr-defined]
    return {
        "batches": statistics.median(turns.epochs),
        "between": between,
        "peak_mib": peak,
        "events_mib": events / 2**20,
        "looks": max((callback.evaluations for callback in looking), default=0),
        "looking": sum(callback.seconds for callback in looking),
    }


def measured(model: str, names: list[str], epochs: int) -> dict[str, dict[str, float]]:
    """All arms, each in a process of its own, an epoch in turn."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--epochs", str(epochs), "--arm", model]
    arms = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    }
    for process in arms.values():
        _answer(process)
    for _ in range(epochs - 1):
        for process in arms.values():
            _go(process)
            _answer(process)
    found = {}
    for name, process in arms.items():
        # the last epoch ends with the process
        _go(process)
        found[name] = json.loads(_answer(process))
        process.wait()
    return found


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"an arm ended with {process.wait()}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--models", nargs="+", default=["gan"], choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=["none", "none, again", "fid", "default"], help="names, or 'all'")
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
        titles = ("batches", "seconds", "ratio", "looks", "looking", "s a look", "peak MiB", "ratio", "events MiB")
        print(f"{f'{model}, {options.epochs} epochs':28s}" + "".join(f"{title:>11s}" for title in titles))
        found = measured(model, names, options.epochs)
        batches = statistics.median(own["batches"] for own in found.values())
        for own in found.values():
            own["seconds"] = options.epochs * batches + own["between"]
        for name in names:
            own, none = found[name], found.get("none", found[name])
            share, each = own["looking"] / none["seconds"], own["looking"] / max(own["looks"], 1)
            cells = (
                f"{own['batches']:.2f}", f"{own['seconds']:.1f}", f"{own['seconds'] / none['seconds']:.3f}",
                f"{own['looks']:.0f}", f"{share:.1%}", f"{each:.2f}", f"{own['peak_mib']:.0f}",
                f"{own['peak_mib'] / none['peak_mib']:.2f}", f"{own['events_mib']:.2f}",
            )  # fmt: skip
            print(f"  {name:26s}" + "".join(f"{cell:>11s}" for cell in cells), flush=True)
        if not figures and {"none", "fid", "default"} <= set(found):
            none = found["none"]
            figures = {
                "default_over_none": found["default"]["seconds"] / none["seconds"],
                "fid_over_none": found["fid"]["seconds"] / none["seconds"],
                "default_looking_share": found["default"]["looking"] / none["seconds"],
                "fid_looking_share": found["fid"]["looking"] / none["seconds"],
                "peak_memory_ratio": found["default"]["peak_mib"] / none["peak_mib"],
            }
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
