"""How often ``RoundTrip`` finds and names planted failures of flows and autoencoders, and how often healthy ones raise alarms.

``python -m benchmarks.round_trip`` trains small models on digits of scikit-learn, ten seeds of each failure, and healthy
models of other kinds, widths, learning rates and data. What it prints is described in ``benchmarks.planted_runs``. It takes
about 20 minutes of one core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import zuko
from lightning.pytorch import LightningModule, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import trained
from benchmarks.planted_runs import Begun, Outcome, Unit, main_of, outcome
from benchmarks.zoo.data import Batches, Data, load
from benchmarks.zoo.flows import RealNVP
from benchmarks.zoo.models import KINDS
from lightning_gendiag import CollapseStopping, RoundTripMonitor
from tests.helpers.inversions import (
    LOST,
    NAMED,
    START,
    START_OF_AUTOENCODERS,
    Run,
    Zuko,
    autoencoder_run,
    flow_run,
    is_named,
)

STEPS, EVERY = 500, 20
"""Training steps of a healthy run, at least, and those from one evaluation to the next."""

EPOCHS = 25
"""Epochs of healthy flows that are built as those that fail, which are evaluated after each."""

HELD_OUT = 300
"""Number of validation images of a healthy run."""


# ---- failures ----


class Failure(NamedTuple):
    """A model that fails from an epoch on, and how an alarm names it."""

    make: Callable[[int], Run]
    """From a seed."""
    named: tuple[str, ...]
    """What one alarm must say."""
    start: int
    """The epoch."""


OF_FLOWS = {
    "saturated": "scales near zero before a shift (coupling)",
    "exploding": "scales that explode away from the data (coupling)",
    "shift": "an inverse that leaves out the shift (coupling)",
    "nan": "nan in the inverse (coupling)",
    "scale": "a learnt scale near zero (Glow)",
    "sign": "log-determinant with the wrong sign, of a layer",
    "total": "log-determinant with the wrong sign, of the whole",
    "area": "log-determinant without the number of positions (Glow)",
    "term": "log-determinant without a learnt factor of the data",
}
OF_AUTOENCODERS = {"region": "a region turns black", "latent": "the decoder ignores a latent dimension"}

FAILURES: dict[str, Failure] = {
    **{title: Failure(partial(flow_run, fault), NAMED[fault], START) for fault, title in OF_FLOWS.items()},
    **{
        f"{title} ({kind})": Failure(partial(autoencoder_run, fault, beta=beta), LOST[fault], START_OF_AUTOENCODERS)
        for fault, title in OF_AUTOENCODERS.items()
        for kind, beta in (("autoencoder", 0.0), ("VAE", 1.0))
    },
}


# ---- healthy models ----


def healthy_run(seed: int, make: Callable[[], LightningModule], data: Data, noise: float = 0.0) -> Run:
    """Returns a model that is trained on images with normal noise, and validated on others."""
    seed_everything(seed, verbose=False)
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    train, held_out = (Data(*(values[rows] for values in data)) for rows in (order[HELD_OUT:], order[:HELD_OUT]))
    module = make()
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign, misc]
    module.val_dataloader = lambda: DataLoader(TensorDataset(*held_out[:2]), 100)  # type: ignore[method-assign]
    batches = Batches(train, 64, seed, noise)
    monitor = RoundTripMonitor(every_n_train_steps=EVERY, on_error="raise")
    return Run(module, batches, monitor, math.ceil(STEPS / len(batches)))


def of_zoo(kind: str, seed: int) -> Run:
    """Returns a model of the zoo, whose data, width and learning rate depend on the seed."""
    made, data = KINDS[kind], load(KINDS[kind].data[seed % len(KINDS[kind].data)])
    shape = data.images.shape[1], data.images.shape[2], data.images.shape[3]
    width, rate = made.widths[seed // 2 % len(made.widths)], made.lrs[seed // 4 % len(made.lrs)]
    return healthy_run(seed, lambda: made.make(shape, data.num_classes, width, rate), data, made.noise)


def couplings_of_256(seed: int) -> Run:
    """Returns couplings of images of 16x16 pixels."""
    data = load(("mnist", "faces", "textures")[seed % 3])
    return healthy_run(seed, lambda: RealNVP((1, 16, 16), (96, 192)[seed % 2], 1e-3), data, 1 / 16)


def of_zuko(kind: Any, seed: int) -> Run:
    """Returns a flow of the library zuko."""
    data, rate = load("digits8"), (5e-4, 3e-3)[seed % 2]
    return healthy_run(seed, lambda: Zuko(kind, (32, 64)[seed // 2 % 2], rate), data, 1 / 16)


def planted_without(fault: str, seed: int) -> Run:
    """Returns a flow as those that fail, with other widths and learning rates, and no failure."""
    return flow_run(fault, seed, EPOCHS, width=(24, 96)[seed % 2], lr=(5e-4, 3e-3)[seed // 2 % 2])


def autoencoder_without(beta: float, seed: int) -> Run:
    """Returns an autoencoder as those that fail, with other widths and learning rates, and no failure."""
    return autoencoder_run("", seed, beta, width=(32, 128)[seed % 2], lr=(1e-3, 4e-3)[seed // 2 % 2])


HEALTHY: dict[str, Callable[[int], Run]] = {
    "flow of couplings": partial(planted_without, ""),
    "flow of steps of Glow": partial(planted_without, "glow"),
    "flow with a fixed factor of the data that is not counted": partial(planted_without, "fixed"),
    "flow of the zoo, Real NVP": partial(of_zoo, "realnvp"),
    "flow of the zoo, Glow": partial(of_zoo, "glow"),
    "flow of 256 dimensions, Real NVP": couplings_of_256,
    "flow of zuko, NICE": partial(of_zuko, zuko.flows.NICE),
    "flow of zuko, MAF": partial(of_zuko, zuko.flows.MAF),
    "autoencoder": partial(autoencoder_without, 0.0),
    "VAE": partial(autoencoder_without, 1.0),
    "VAE of the zoo, MLP": partial(of_zoo, "mlp_vae"),
    "VAE of the zoo, convolutional": partial(of_zoo, "convolutional_vae"),
    "VAE of the zoo, beta 4": partial(of_zoo, "beta_vae"),
    "autoencoder of the zoo, Wasserstein": partial(of_zoo, "wae"),
    "autoencoder of the zoo, VQ-VAE": partial(of_zoo, "vq_vae"),
}
"""From a seed to a run without a failure."""


# ---- a run ----


def outcome_of(unit: Unit) -> Outcome:
    """Trains one model, and returns what happened."""
    started = time.monotonic()
    failure = FAILURES.get(unit.name)
    run = HEALTHY[unit.name](unit.seed) if failure is None else failure.make(unit.seed)
    stopping = CollapseStopping("warn")
    start = 0 if failure is None else failure.start
    begun = Begun(run.monitor, lambda trainer: trainer.current_epoch >= start)
    trained(run.module, run.batches, run.epochs, begun, run.monitor, stopping)
    return outcome(
        unit,
        stopping.alarms,
        begun,
        lambda after: failure is not None and is_named(after, failure.named),
        time.monotonic() - started,
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each run, and the tables."""
    main_of(__doc__, FAILURES, HEALTHY, outcome_of, arguments)


if __name__ == "__main__":
    main()
