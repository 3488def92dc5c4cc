"""Measures what diagnostics cost: examples trained without any, with torchmetrics' FID, each monitor, and all by default.

Each arm trains in a process of its own, which measures the seconds of ``trainer.fit``, its peak memory and the size of the
event files. Monitors alone evaluate at every epoch; so does FID, from a small network on 1,024 samples. "default" is
``GenerativeDiagnostics()`` with its limit of 5 % of the training's time; another arm is the same without a limit. At its end
the default arm measures FID of as many samples as its own evaluations have, with which one of these is compared: with a
network of InceptionV3's size, whose place random weights take, and with the small one.

The arms train a few epochs in turn, so that a machine that slows down slows all of them; after each turn the others have
emptied the processor's cache, which in other trainings nothing does. All train the same batches, bit for bit, yet two
processes without any callback differ by some per cent: "batches" is the median of each arm's epochs, in seconds, and "none,
again" is a second process without callbacks. For the ratio, an epoch's batches count as the median over all arms, and all
that callbacks take between them counts in full. "share" is what the callbacks report that they took, relative to the
training without, and "s each" the same for each evaluation.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing as mp
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.measuring import peak_memory
from example_models import data, flow
from example_models.diffusion import Diffusion
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    AdversaryMonitor,
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    GenerativeDiagnostics,
    KStarMonitor,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    MemorizationMonitor,
    Monitor,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
    RoundTripMonitor,
    TimestepLossMonitor,
)
from lightning_gendiag.callbacks.session import Session
from lightning_gendiag.model.features import FeatureExtractor

MODELS: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    "gan": lambda: (GAN(), data.digit_batches()),
    "vae": lambda: (VAE(), data.digit_batches()),
    "flow": lambda: (flow.Flow(64, (1, 8, 8), hidden=128), flow.digit_batches()),
    "diffusion": lambda: (Diffusion(), data.digit_batches(size=16)),
}


TURN = 5
"""Number of epochs that an arm trains in turn."""


class Turns(Callback):
    """Waits for this arm's turn, and measures the batches of each epoch.

    It must be the first of the callbacks, so that what others do at the end of an epoch does not count as batches.
    """

    def __init__(self, turns: Connection) -> None:
        self.turns = turns
        self.epochs: list[float] = []
        self.waited = 0.0
        self.started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands over to the other arms where a turn is over, and waits."""
        paused = self.started = time.monotonic()
        if trainer.current_epoch % TURN:
            return
        self.turns.send(None)
        self.turns.recv()
        self.started = time.monotonic()
        self.waited += self.started - paused
        # no training takes place while others have their turn
        Session.of(trainer).schedule.budget.started += self.started - paused

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the seconds of the batches."""
        self.epochs.append(time.monotonic() - self.started)


class OfInceptionSize(nn.Sequential):
    """A network with random weights about as large as the InceptionV3 that FID is defined with, for 2,048 features.

    It has 5.6e9 multiplications for an image of 299x299 and 20 million parameters, InceptionV3 5.7e9 and 22 million. Its
    convolutions are fewer and larger, which a processor computes faster.
    """

    num_features = 2048

    def __init__(self) -> None:
        # channels, kernel, stride, padding of each layer
        layers = (
            (32, 3, 2, 0), (32, 3, 1, 0), (64, 3, 2, 1), (80, 1, 1, 0), (192, 3, 1, 1), (288, 3, 2, 0), (288, 3, 1, 1),
            (768, 3, 2, 0), (768, 3, 1, 1), (1280, 3, 2, 0), (2048, 1, 1, 0),
        )  # fmt: skip
        parts: list[nn.Module] = []
        before = 3
        for channels, kernel, stride, padding in layers:
            parts += [nn.Conv2d(before, channels, kernel, stride, padding), nn.ReLU()]
            before = channels
        super().__init__(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, 2048) of images (N, C, H, W) in 0 to 255."""
        images = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False) / 128 - 1
        return super().forward(x)


class FID(Callback):
    """torchmetrics' FID of some samples at every epoch, by default with features of a small network."""

    def __init__(
        self, images: torch.Tensor, samples: int = 1024, network: nn.Module | None = None, reals: int = 1024
    ) -> None:
        self.samples = samples
        self.images = (images[:reals] + 1).clamp(0, 2) / 2
        network = network or FeatureExtractor((255 * self.images).byte())
        self.metric = FrechetInceptionDistance(network, reset_real_features=False, normalize=True)
        self.metric.update(self.images, real=True)
        self.seconds, self.evaluations = 0.0, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates."""
        started = time.monotonic()
        pl_module.eval()
        with torch.no_grad():
            if hasattr(pl_module, "sample"):
                parts = torch.arange(self.samples).split(128)
                samples = torch.cat([pl_module.sample(len(part)) for part in parts])
            else:
                samples = pl_module(torch.randn(self.samples, pl_module.hparams["latent_dim"]))
            self.metric.update((samples + 1).clamp(0, 2) / 2, real=False)
        pl_module.train()
        value = self.metric.compute()
        self.metric.reset()
        self.seconds, self.evaluations = self.seconds + time.monotonic() - started, self.evaluations + 1
        if trainer.training:
            pl_module.log("fid", value)


def images_of(model: str) -> torch.Tensor:
    """Returns the images of a model's size."""
    return data.digits({"flow": 8, "diffusion": 16}.get(model, 32))[0]


def seconds_of_fid(fid: FID, trainer: Trainer, module: LightningModule, times: int) -> float:
    """Returns the median seconds of FID, after one to warm up."""
    taken = []
    for _ in range(1 + times):
        before = fid.seconds
        fid.on_train_epoch_end(trainer, module)
        taken.append(fid.seconds - before)
    return statistics.median(taken[1:])


ARMS: dict[str, Callable[[str], list[Callback]]] = {
    "none": lambda model: [],
    "none, again": lambda model: [],
    "fid": lambda model: [FID(images_of(model))],
    "cms": lambda model: [CosineMeanSimilarityMonitor()],
    "generation_balance": lambda model: [GenerationBalanceMonitor()],
    "k_star": lambda model: [KStarMonitor("discriminator.7" if model == "gan" else "encode")],
    "manifold_entropy": lambda model: [ManifoldEntropyMonitor()],
    "posterior_kl": lambda model: [PosteriorKLMonitor()],
    "adversary": lambda model: [AdversaryMonitor()],
    "memorization": lambda model: [MemorizationMonitor(every_n_epochs=5)],
    "timestep_loss": lambda model: [TimestepLossMonitor()],
    "latent_regions": lambda model: [LatentRegionsMonitor(every_n_epochs=5)],
    "round_trip": lambda model: [RoundTripMonitor()],
    "regional_primitives": lambda model: [RegionalPrimitivesMonitor(every_n_epochs=10)],
    "default": lambda model: [GenerativeDiagnostics(action="warn")],
    "default, no limit": lambda model: [GenerativeDiagnostics(action="warn", max_overhead=None)],
}
NOT_FOR = {
    "gan": ("posterior_kl", "latent_regions", "round_trip", "timestep_loss"),
    "vae": ("adversary", "timestep_loss"),
    "flow": ("adversary", "posterior_kl", "regional_primitives", "timestep_loss"),
    "diffusion": (
        "adversary",
        "k_star",
        "manifold_entropy",
        "posterior_kl",
        "latent_regions",
        "regional_primitives",
        "round_trip",
    ),
}


def arm(model: str, name: str, epochs: int, turns: Connection) -> None:
    """Trains one model, and sends what was measured."""
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    module, batches = MODELS[model]()
    first = Turns(turns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[first, *ARMS[name](model)], enable_model_summary=False,
            logger=TensorBoardLogger(folder), log_every_n_steps=10, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        started = time.monotonic()
        trainer.fit(module, batches)
        between = time.monotonic() - started - first.waited - sum(first.epochs)
        events = sum(path.stat().st_size for path in Path(folder).rglob("*events*"))
    monitors: list[Any] = [c for c in trainer.callbacks if isinstance(c, (Monitor, FID))]  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitors += callback.monitors.values() if isinstance(callback, GenerativeDiagnostics) else ()
    measured = {
        "batches": statistics.median(first.epochs),
        "between": between,
        "peak_mib": 1024 * peak_memory(),
        "events_mib": events / 2**20,
        "evaluations": max((monitor.evaluations for monitor in monitors), default=0),
        "evaluating": sum(monitor.seconds for monitor in monitors),
    }
    session = Session.of(trainer)
    if session.automatic:
        budget, samples = session.schedule.budget, session.views[0].num_samples or 0
        later = (budget.spent - budget.first) / max(budget.rounds - 1, 1)
        measured |= {
            "evaluating": budget.spent,
            "first": budget.first,
            "later": later,
            "samples": samples,
            "over_small_fid": later / seconds_of_fid(FID(images_of(model), samples), trainer, module, 8),
        }
        # the real side is computed once, so its number does not matter
        inception = FID(images_of(model), samples, OfInceptionSize().eval(), reals=64)
        measured["inception_fid"] = seconds_of_fid(inception, trainer, module, 1)
    turns.send(measured)


def measured(model: str, names: list[str], epochs: int) -> dict[str, dict[str, float]]:
    """Returns what was measured of all arms, each in a process of its own, some epochs in turn."""
    context = mp.get_context("spawn")
    arms: dict[str, Connection] = {}
    for name in names:
        arms[name], theirs = context.Pipe()
        context.Process(target=arm, args=(model, name, epochs, theirs), daemon=True).start()
        # so that reading fails once the process has ended
        theirs.close()
    for turns in arms.values():
        turns.recv()
    for _ in range(math.ceil(epochs / TURN) - 1):
        for turns in arms.values():
            turns.send(None)
            turns.recv()
    found = {}
    for name, turns in arms.items():
        # the last turn ends with the process
        turns.send(None)
        found[name] = turns.recv()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--models", nargs="+", default=["gan"], choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=["none", "none, again", "fid", "default"], help="names, or 'all'")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON, about the first model")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for model in options.models:
        names = list(ARMS) if "all" in options.arms else options.arms
        names = [name for name in names if name not in NOT_FOR[model]]
        titles = ("batches", "seconds", "ratio", "number", "share", "s each", "peak MiB", "ratio", "events MiB")
        print(f"{f'{model}, {options.epochs} epochs':28s}" + "".join(f"{title:>11s}" for title in titles))
        found = measured(model, names, options.epochs)
        batches = statistics.median(own["batches"] for own in found.values())
        for own in found.values():
            own["seconds"] = options.epochs * batches + own["between"]
        for name in names:
            own, none = found[name], found.get("none", found[name])
            share, each = own["evaluating"] / none["seconds"], own["evaluating"] / max(own["evaluations"], 1)
            cells = (
                f"{own['batches']:.2f}", f"{own['seconds']:.1f}", f"{own['seconds'] / none['seconds']:.3f}",
                f"{own['evaluations']:.0f}", f"{share:.1%}", f"{each:.2f}", f"{own['peak_mib']:.0f}",
                f"{own['peak_mib'] / none['peak_mib']:.2f}", f"{own['events_mib']:.2f}",
            )  # fmt: skip
            print(f"  {name:26s}" + "".join(f"{cell:>11s}" for cell in cells), flush=True)
        if not figures and {"none", "fid", "default"} <= set(found):
            none = found["none"]
            figures = {
                "default_over_none": found["default"]["seconds"] / none["seconds"],
                "fid_over_none": found["fid"]["seconds"] / none["seconds"],
                "default_evaluating_share": found["default"]["evaluating"] / none["seconds"],
                "fid_evaluating_share": found["fid"]["evaluating"] / none["seconds"],
                "fid_evaluations": found["fid"]["evaluations"],
                "fid_evaluation_s": found["fid"]["evaluating"] / max(found["fid"]["evaluations"], 1),
                "fid_memory_ratio": found["fid"]["peak_mib"] / none["peak_mib"],
                "later_evaluation_s": found["default"]["later"],
                "evaluations": found["default"]["evaluations"],
                "samples": found["default"]["samples"],
                "first_evaluation_s": found["default"]["first"],
                "evaluation_over_fid": found["default"]["later"] / found["default"]["inception_fid"],
                "inception_fid_s": found["default"]["inception_fid"],
                "evaluation_over_small_fid": found["default"]["over_small_fid"],
                "peak_memory_ratio": found["default"]["peak_mib"] / none["peak_mib"],
                "measured_over_none": 1 + found["default"]["evaluating"] / none["seconds"],
                "none_again_over_none": found.get("none, again", none)["seconds"] / none["seconds"],
                "none_again_memory_ratio": found.get("none, again", none)["peak_mib"] / none["peak_mib"],
                **{f"{name}_events_mib": found[name]["events_mib"] for name in ("none", "fid", "default")},
            }
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
