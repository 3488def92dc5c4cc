"""How often ``Memorization`` finds models that copy their training images, and how often others raise its alarm.

``python -m benchmarks.memorization`` trains small models on 50 digits of scikit-learn, which they copy, ten seeds of each,
and the same models and the examples on all of them. It prints a line for each run, and then for each kind of model: the runs
with an alarm of copies, the number of the evaluation with the first one, and the share of samples that are copies at the end.
``--only`` chooses kinds by a part of their names. It takes about ten minutes of one core.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import computed, rounded, trained
from benchmarks.overhead import MODELS
from benchmarks.pictures import Transport
from benchmarks.planted_runs import Unit, options_of
from benchmarks.zoo.autoencoders import VAE
from benchmarks.zoo.gans import mlp
from example_models.data import digits
from example_models.gan import GAN
from lightning_gendiag import CollapseStopping, MemorizationMonitor, ModelAdapter

SAMPLES, EVERY = 256, 100
"""Samples of an evaluation, and training steps from one to the next where epochs are short."""

FEW, MANY = 50, 1400
"""Training images of models that copy, and of the same models that do not."""


class SmallVAE(VAE):
    """A VAE of images (N, 1, 8, 8) with two latent dimensions and validation batches."""

    def __init__(self) -> None:
        encoder = nn.Sequential(nn.Flatten(), mlp(64, 256, 256, 4))
        decoder = nn.Sequential(mlp(2, 256, 256, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
        super().__init__(encoder, decoder, 2, 1e-3, beta=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing; validation batches are the real images that samples are compared with."""


# ---- runs ----


class Run(NamedTuple):
    """A model, what it is trained on, and when it is evaluated."""

    module: LightningModule
    train: Any
    held_out: Any = None
    epochs: int = 1
    steps: int | None = None
    """Training steps from one evaluation to the next, in place of an epoch."""


def loader(images: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Returns shuffled batches of images with labels of 0."""
    return DataLoader(TensorDataset(images, torch.zeros(len(images)).long()), batch_size, shuffle=True)


def small(make: Callable[[], LightningModule], images: int, steps: int, seed: int) -> Run:
    """Returns a model of 8x8 digits, and so many training images."""
    seed_everything(seed, verbose=False)
    shuffled = digits(8)[0][torch.randperm(1797)]
    train = loader(shuffled[:images], FEW)
    return Run(make(), train, loader(shuffled[MANY:], 200), math.ceil(steps / len(train)), EVERY)


def example(model: str, epochs: int, seed: int) -> Run:
    """Returns an example model with all digits."""
    seed_everything(seed, verbose=False)
    module, batches = MODELS[model]()
    return Run(module, batches, epochs=epochs)


def gan_of_few(steps: int, seed: int) -> Run:
    """Returns the example GAN with few training images."""
    seed_everything(seed, verbose=False)
    images = digits(32)[0][torch.randperm(1797)[:FEW]]
    return Run(GAN(), loader(images, FEW), epochs=steps, steps=EVERY)


class Kind(NamedTuple):
    """A kind of run."""

    make: Callable[[int], Run]
    """From a seed."""
    copies: bool = False
    seeds: int = 3
    """Number of seeds; of those that copy ``--seeds``."""


KINDS: dict[str, Kind] = {
    "generator, 50 images": Kind(partial(small, Transport, FEW, 800), copies=True),
    "VAE, 50 images": Kind(partial(small, SmallVAE, FEW, 1600), copies=True),
    "generator, 1,400 images": Kind(partial(small, Transport, MANY, 800)),
    "VAE, 1,400 images": Kind(partial(small, SmallVAE, MANY, 1600)),
    "example GAN": Kind(partial(example, "gan", 12)),
    "example VAE": Kind(partial(example, "vae", 12)),
    "example flow": Kind(partial(example, "flow", 12), seeds=2),
    "example diffusion model": Kind(partial(example, "diffusion", 12), seeds=2),
    "example GAN, 50 images": Kind(partial(gan_of_few, 1200), seeds=1),
}


class Most(Callback):
    """Notes the largest share of samples that are copies.

    Args:
        monitor: What evaluates.
    """

    def __init__(self, monitor: MemorizationMonitor) -> None:
        self.monitor, self.share = monitor, 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the newest evaluation."""
        if self.monitor.result is not None:
            self.share = max(self.share, float(self.monitor.result.copied[0]))


class Outcome(NamedTuple):
    """What happened in a run."""

    name: str
    seed: int
    first: int | None
    """Number of the evaluation that raised the first alarm of copies, or None."""
    message: str
    evaluations: int
    copied: float
    """Share of the samples of the last evaluation."""
    most: float
    """The largest share of an evaluation."""
    seconds: float


def outcome_of(unit: Unit) -> Outcome:
    """Trains one model, and returns what happened."""
    started = time.process_time()
    run = KINDS[unit.name].make(unit.seed)
    monitor = MemorizationMonitor(
        every_n_train_steps=run.steps, on_error="raise", log_images=False, adapter=ModelAdapter(num_samples=SAMPLES)
    )
    stopping, most = CollapseStopping("warn"), Most(monitor)
    # the check before training shows the held-out images
    limits, held_out = {"check_val_every_n_epoch": 10_000}, run.held_out
    trained(run.module, run.train, run.epochs, monitor, stopping, most, limits=limits, val_dataloaders=held_out)
    assert monitor.result is not None
    copied = float(monitor.result.copied[0])
    alarms = [alarm for alarm in stopping.alarms if "copie" in str(alarm)]
    return Outcome(
        unit.name,
        unit.seed,
        alarms[0].number if alarms else None,
        str(alarms[0]) if alarms else "no alarm",
        monitor.evaluations,
        copied,
        max(most.share, copied),
        time.process_time() - started,
    )


# ---- the table ----


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the figures of each kind of run, and of all healthy ones together."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, own in itertools.groupby(outcomes, key=lambda outcome: outcome.name):
        runs = list(own)
        firsts = [run.first for run in runs if run.first is not None]
        kinds[name] = {
            "runs": len(runs),
            "alarms": len(firsts),
            "first": [min(firsts), statistics.median(firsts), max(firsts)] if firsts else [],
            "copied": [min(run.copied for run in runs), max(run.copied for run in runs)],
            "most": max(run.most for run in runs),
            "evaluations": sum(run.evaluations for run in runs),
        }
    healthy = [outcome for outcome in outcomes if not KINDS[outcome.name].copies]
    return {
        "kinds": kinds,
        "healthy": {
            "runs": len(healthy),
            "alarms": sum(outcome.first is not None for outcome in healthy),
            "evaluations": sum(outcome.evaluations for outcome in healthy),
        },
        "samples": SAMPLES,
    }


def lines(figures: dict[str, Any]) -> Iterable[str]:
    """Yields the table."""
    yield f"{'':28s}{'alarms':>12s}{'first at':>12s}{'copies at the end':>20s}{'most':>8s}"
    for name, own in figures["kinds"].items():
        first = "-" if not own["first"] else "{} to {}".format(own["first"][0], own["first"][-1])
        least, most = own["copied"]
        yield (
            f"{name:28s}{own['alarms']:>5d} of {own['runs']:<3d}{first:>12s}{least:>12.1%} to {most:.1%}{own['most']:>8.1%}"
        )


def main(arguments: list[str] | None = None) -> None:
    options = options_of(__doc__, arguments)
    units = [
        Unit(name, options.first + i)
        for name, kind in KINDS.items()
        if options.only in name
        for i in range(options.seeds if kind.copies else kind.seeds)
    ]
    outcomes = []
    for outcome in computed(outcome_of, units, options.jobs):
        outcomes.append(outcome)
        said = f"{outcome.seconds:.1f} s, {outcome.evaluations} evaluations, {outcome.copied:.1%} copies"
        print(f"{outcome.name}, seed {outcome.seed}, {said}: {outcome.message}", flush=True)
    figures = summary(outcomes)
    for line in lines(figures):
        print(line)
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
