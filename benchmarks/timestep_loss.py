"""Measures how often ``TimestepLoss`` finds and names planted faults, and raises alarms in healthy runs.

``python -m benchmarks.timestep_loss`` trains small diffusion and flow matching models on 8x8 digits, each with one fault or
none, over ten seeds. What it prints is described in ``benchmarks.planted_runs``; an alarm names a fault if it says what is
wrong and at which noise levels. It takes about 15 minutes of one core.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import trained
from benchmarks.planted_runs import Begun, Outcome, Unit, main_of, outcome
from benchmarks.zoo.flows import Field
from example_models.data import digits
from lightning_gendiag import CollapseStopping, TimestepLossMonitor

STEPS, EVERY = 416, 16
"""Training steps of a run, and those from one evaluation to the next."""

BEGIN = 256
"""Step at which faults begin that do not begin with the run."""


class Faulty(nn.Module):
    """A network with a fault in some of its times, once it is ``broken``.

    Args:
        width: Number of channels.
        fault: What happens with an input (n, 1, 8, 8), times (n,) in 0..1 and the network.
    """

    def __init__(self, width: int, fault: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.fault, self.broken = Field(width), fault, False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns predictions (n, 1, 8, 8)."""
        out: Tensor = self.fault(self.inner, x, t) if self.broken else self.inner(x, t)
        return out


class Denoising(LightningModule):
    """A small network that is trained to predict noise, data, or a velocity.

    Args:
        prediction: ``"noise"``, ``"data"``, ``"velocity"`` or ``"flow"``.
        width: Number of channels.
        lr: Learning rate.
        discrete: Whether times are the 1,000 steps of DDPM, and not numbers in 0..1.
        fault: See :class:`Faulty`.
        begin: Step at which the fault begins.
    """

    def __init__(
        self,
        prediction: str,
        width: int = 12,
        lr: float = 2e-3,
        discrete: bool = False,
        fault: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
        begin: int = BEGIN,
    ) -> None:
        super().__init__()
        self.net = Field(width) if fault is None else Faulty(width, fault)
        self.begin = begin
        self.prediction, self.lr, self.discrete = prediction, lr, discrete
        self.register_buffer("alphas_cumprod", (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))

    def drawn_times(self, n: int) -> Tensor:
        """Returns times (n,), integers where they are discrete."""
        if self.discrete:
            return torch.randint(0, 1000, (n,), device=self.device)
        return torch.rand(n, device=self.device)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scales (n, 1, 1, 1) of signal and noise."""
        if self.discrete:
            variance: Tensor = self.alphas_cumprod[t]
            a, b = variance.sqrt(), (1 - variance).sqrt()
        elif self.prediction == "flow":
            a, b = 1 - t, t
        else:
            a, b = (t * math.pi / 2).cos(), (t * math.pi / 2).sin()
        return a[:, None, None, None], b[:, None, None, None]

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns predictions (n, 1, 8, 8)."""
        out: Tensor = self.net(x, t / 1000 if self.discrete else t)
        return out

    def weights(self, t: Tensor) -> Tensor:
        """Returns the weights (n,) of the loss."""
        return torch.ones_like(t, dtype=torch.float32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the weighted squared error."""
        x = batch[0]
        t, noise = self.drawn_times(len(x)), torch.randn_like(x)
        a, b = self.scales(t)
        targets = {"noise": noise, "data": x, "velocity": a * noise - b * x, "flow": noise - x}
        errors = F.mse_loss(self.predict(a * x + b * noise, t), targets[self.prediction], reduction="none")
        return (self.weights(t) * errors.mean((1, 2, 3))).mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Lets the fault begin."""
        if isinstance(self.net, Faulty):
            self.net.broken = self.global_step >= self.begin

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing; validation batches are the images on which predictions are judged."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Unweighted(Denoising):
    """The loss has no weight from time 0.4 to 0.6."""

    def weights(self, t: Tensor) -> Tensor:
        """Returns weights of 0 and 1."""
        return ((t < 0.4) | (t > 0.6)).float()


class ShortSchedule(Denoising):
    """Training draws no times above 0.6."""

    def drawn_times(self, n: int) -> Tensor:
        """Returns times (n,) in 0..0.6."""
        return 0.6 * super().drawn_times(n)


def dead(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Predictions at times above 0.8 are 0, as of units that died."""
    out: Tensor = net(x, t)
    return out.where((t < 0.8)[:, None, None, None], 0.0)


def clipped(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Predictions at times below 0.25 are clipped to -0.3..0.3."""
    out: Tensor = net(x, t)
    return torch.where((t < 0.25)[:, None, None, None], out.clamp(-0.3, 0.3), out)


def of_wrong_sign(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Predictions at times of 0.5 to 0.65 have the wrong sign, and learn nothing."""
    out: Tensor = net(x, t)
    return torch.where(((t > 0.5) & (t < 0.65))[:, None, None, None], -out.detach(), out)


class WithEMA(Denoising):
    """An average of the weights that the module keeps inside itself, as most diffusion models do.

    Args:
        decay: Of the average, 1 for one that is never updated.
        kwargs: Of :class:`Denoising`.
    """

    def __init__(self, decay: float = 0.98, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ema_net, self.decay = copy.deepcopy(self.net).requires_grad_(False), decay

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Moves the average."""
        with torch.no_grad():
            for average, weight in zip(self.ema_net.parameters(), self.net.parameters(), strict=True):
                average.lerp_(weight, 1 - self.decay)


class Case(NamedTuple):
    """A kind of model, and how its fault is recognised."""

    make: Callable[[], LightningModule]
    images: int = 1400
    words: tuple[str, ...] = ()
    """What one alarm must say; empty for healthy models."""
    levels: tuple[float, float] = (0.0, 1.0)
    """Times of the fault: an alarm must name levels that overlap with these."""
    begin: int = 0
    """Step at which the fault begins."""


WORSE = ("became worse", "fails")

HEALTHY = {
    "noise": Case(lambda: Denoising("noise")),
    "noise, DDPM": Case(lambda: Denoising("noise", discrete=True)),
    "data": Case(lambda: Denoising("data")),
    "velocity, EMA": Case(lambda: WithEMA(prediction="velocity")),
    "flow": Case(lambda: Denoising("flow")),
    "flow, large steps": Case(lambda: Denoising("flow", lr=8e-3)),
}
"""Models without a fault."""

FAULTS = {
    "no weight in a band": Case(lambda: Unweighted("velocity"), words=("does not weigh",), levels=(0.4, 0.6)),
    "short schedule": Case(lambda: ShortSchedule("noise"), words=("never reaches pure noise",), levels=(0.5, 0.6)),
    "dead at high noise": Case(lambda: Denoising("velocity", fault=dead), words=WORSE, levels=(0.8, 1.0), begin=BEGIN),
    "dead at high noise, flow": Case(
        lambda: Denoising("flow", fault=dead), words=WORSE, levels=(0.8, 1.0), begin=BEGIN
    ),
    "clipped at low noise": Case(
        lambda: Denoising("noise", fault=clipped), words=WORSE, levels=(0.0, 0.25), begin=BEGIN
    ),
    "wrong sign in a band": Case(
        lambda: Denoising("flow", fault=of_wrong_sign, begin=0), words=("fails", "does not weigh"), levels=(0.5, 0.65)
    ),
    "few images": Case(lambda: Denoising("velocity", width=32, lr=4e-3), 24, ("overfits",), (0.0, 0.6)),
    "EMA never updated": Case(lambda: WithEMA(1.0, prediction="velocity"), words=("averaged (EMA) weights are worse",)),
    "EMA far too slow": Case(lambda: WithEMA(0.9999, prediction="noise"), words=("averaged (EMA) weights are worse",)),
}
"""Models with a fault."""


def names(case: Case, text: str) -> bool:
    """Returns whether an alarm names the fault and, by their times, its noise levels."""
    if not any(word in text for word in case.words):
        return False
    ranges = [part.split(" (")[0].split(" to ") for part in text.split("times ")[1:]]
    low, high = case.levels
    return not ranges or any(float(first) < high and float(last) > low for first, last in ranges)


def outcome_of(unit: Unit) -> Outcome:
    """Trains a model, and returns what happened."""
    started, case = time.monotonic(), FAULTS.get(unit.name) or HEALTHY[unit.name]
    seed_everything(unit.seed, verbose=False)
    images = digits(8)[0][torch.randperm(1797, generator=torch.Generator().manual_seed(unit.seed))]
    monitor, stopping = TimestepLossMonitor(every_n_train_steps=EVERY, log_images=False), CollapseStopping("warn")
    train = DataLoader(TensorDataset(images[: case.images]), 48, shuffle=True)
    held_out = DataLoader(TensorDataset(images[1400:]), 64)
    begun = Begun(monitor, lambda trainer: trainer.global_step >= case.begin)
    limits = {"max_steps": STEPS, "check_val_every_n_epoch": 10_000}
    trained(case.make(), train, -1, begun, monitor, stopping, limits=limits, val_dataloaders=held_out)
    return outcome(
        unit,
        stopping.alarms,
        begun,
        lambda after: any(names(case, str(alarm)) for alarm in after),
        time.monotonic() - started,
    )


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each run, and the tables."""
    main_of(__doc__, FAULTS, HEALTHY, outcome_of, arguments)


if __name__ == "__main__":
    main()
