"""How often the adversary's alarms find and name planted failures of GANs, and how often healthy GANs raise any.

``python -m benchmarks.adversary`` trains small GANs in the manner of well-known tutorials, ten seeds of each failure and of
each healthy kind. What it prints is described in ``benchmarks.planted_runs``; a run with a failure ends with its first alarm,
which must name the failure. It takes about 30 minutes of one core.
"""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type"

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import trained
from benchmarks.planted_runs import Begun, Outcome, Unit, main_of, outcome
from benchmarks.zoo.data import load
from benchmarks.zoo.gans import GAN
from benchmarks.zoo.models import KINDS
from lightning_gendiag import AdversaryMonitor, CollapseStopping

STEPS, START, EVERY = 600, 250, 10
"""Number of training steps, the step at which failures begin, and the number of steps between two evaluations."""

HELD_OUT = 300
"""Number of images of the validation loader."""


class Saturating(GAN):
    """A GAN with the loss of the minimax game, whose generator learns little from a discriminator that is sure."""

    def loss_g(self, fake: Tensor) -> Tensor:
        """Returns the mean logarithm of the probability of being generated."""
        return -F.softplus(self.discriminator(fake)).mean()


class Changed(Callback):
    """Multiplies something of one network from a step on.

    Args:
        network: 0 for the discriminator, 1 for the generator.
        factor: By which it is multiplied.
        start: The step.
    """

    def __init__(self, network: int, factor: float, start: int) -> None:
        self.network, self.factor, self.start = network, factor, start


class Rates(Changed):
    """Changes the learning rate: 0 lets the weights stay."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Changes the rate once."""
        if trainer.fit_loop.total_batch_idx == self.start:
            for group in trainer.optimizers[self.network].param_groups:
                group["lr"] *= self.factor


class UntilAlarm(Callback):
    """Ends a run once there is an alarm.

    Args:
        stopping: What raises alarms.
    """

    def __init__(self, stopping: CollapseStopping) -> None:
        self.stopping = stopping

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks the trainer to stop."""
        trainer.should_stop = trainer.should_stop or bool(self.stopping.alarms)


class Scaled(Changed):
    """Changes the gradient, as a loss of a wrong scale does."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Multiplies the gradients that the optimizer is about to use."""
        if trainer.fit_loop.total_batch_idx >= self.start and optimizer is trainer.optimizers[self.network]:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                if weight.grad is not None:
                    weight.grad.mul_(self.factor)


class Failure(NamedTuple):
    """A planted failure, and how its alarm names it."""

    named: str
    """What the message contains."""
    planted: tuple[Callable[[], Callback], ...] = ()
    images: int | None = None
    """Number of training images."""
    saturating: bool = False
    kinds: tuple[str, ...] = ("mlp_gan", "dcgan", "hinge_gan", "wgan_gp", "conditional_gan")
    start: int = START
    steps: int = STEPS


FAILURES: dict[str, Failure] = {
    "discriminator frozen": Failure("the discriminator is frozen", (lambda: Rates(0, 0.0, START),)),
    "discriminator frozen from the start": Failure(
        "the discriminator is frozen: none of its weights has ever changed", (lambda: Rates(0, 0.0, 0),), start=0
    ),
    "generator frozen": Failure("the generator is frozen", (lambda: Rates(1, 0.0, START),)),
    "too strong": Failure(
        "the discriminator is too strong",
        (lambda: Rates(0, 20.0, 0),),
        saturating=True,
        kinds=("mlp_gan", "dcgan"),
        start=0,
        steps=1200,
    ),
    # those with a penalty or spectral normalization learn them by heart more slowly
    "overfits": Failure(
        "the discriminator overfits", images=50, start=0, steps=1200, kinds=("mlp_gan", "dcgan", "conditional_gan")
    ),
    "discriminator explodes": Failure("gradients of the discriminator exploded", (lambda: Scaled(0, 1e3, START),)),
    "generator explodes": Failure("gradients of the generator exploded", (lambda: Scaled(1, 1e4, START),)),
}

HEALTHY = {
    "MLP": "mlp_gan",
    "DCGAN": "dcgan",
    "WGAN-GP": "wgan_gp",
    "hinge loss": "hinge_gan",
    "R1": "r1_gan",
    "conditional": "conditional_gan",
    "LSGAN": "lsgan",
}
"""Healthy kinds, by the name of a kind of the zoo."""


def outcome_of(unit: Unit) -> Outcome:
    """Trains a GAN of a kind of the zoo with the monitor, and returns what happened."""
    started, seed, failure = time.monotonic(), unit.seed, FAILURES.get(unit.name)
    kind = HEALTHY[unit.name] if failure is None else failure.kinds[seed % len(failure.kinds)]
    made = KINDS[kind]
    seed_everything(seed, verbose=False)
    data = load(made.data[seed % len(made.data)])
    order = torch.randperm(len(data.labels))
    images, labels = data.images[order], data.labels[order]
    n = len(images) - HELD_OUT if failure is None or failure.images is None else failure.images
    shape = images.shape[1], images.shape[2], images.shape[3]
    rate = made.lrs[seed % 2]
    module = made.make(shape, data.num_classes, made.widths[seed % len(made.widths)], rate)
    if failure is not None and failure.saturating:
        module = Saturating(module.generator, module.discriminator, module.latent_dim, rate)
    monitor = AdversaryMonitor(every_n_train_steps=EVERY, on_error="raise", log_images=False)
    stopping = CollapseStopping("warn")
    start = 0 if failure is None else failure.start
    begun = Begun(monitor, lambda trainer: trainer.fit_loop.total_batch_idx >= start)
    callbacks: list[Callback] = [begun, monitor, stopping]
    if failure is not None:
        callbacks = [*(make() for make in failure.planted), *callbacks, UntilAlarm(stopping)]
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign, misc]
    train = DataLoader(TensorDataset(images[:n], labels[:n]), min(64, n), shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(images[-HELD_OUT:], labels[-HELD_OUT:]), 100)
    steps = STEPS if failure is None else failure.steps
    # each optimizer counts its own steps
    limits = {"limit_train_batches": min(len(train), steps), "check_val_every_n_epoch": 1000}
    epochs = math.ceil(steps / len(train))
    trained(module, train, epochs, *callbacks, limits=limits, val_dataloaders=held_out)
    return outcome(
        unit,
        stopping.alarms,
        begun,
        lambda after: failure is not None and failure.named in str(after[0]),
        time.monotonic() - started,
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each run, and the tables."""
    main_of(__doc__, FAILURES, HEALTHY, outcome_of, arguments)


if __name__ == "__main__":
    main()
