"""Flows and autoencoders, one part of which stops coming back in the middle of training."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import zuko
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.zoo.flows import Coupling, Flow, GlowStep
from example_models.data import digits
from lightning_gendiag import Alarm, RoundTripMonitor
from tests.helpers.cases import LEFT_AND_RIGHT


def loader(size: int = 8, noise: float = 1 / 16, n: int = 512, seed: int = 0) -> DataLoader[Any]:
    images, labels = digits(size)
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(images[:n], labels[:n]), 64, shuffle=True)


class Run(NamedTuple):
    """A model, its monitor, and how it is trained."""

    module: LightningModule
    batches: Any
    monitor: RoundTripMonitor
    epochs: int


def is_named(alarms: list[Alarm], words: tuple[str, ...]) -> bool:
    """Whether one alarm says all of these words."""
    return any(all(word in str(alarm) for word in words) for alarm in alarms)


# ---- flows ----


class Zuko(LightningModule):
    def __init__(self, kind: Any = zuko.flows.NICE, width: int = 16, lr: float = 1e-3) -> None:
        super().__init__()
        self.latent_dim, self.flow, self.lr = 64, kind(64, transforms=3, hidden_features=(width,)), lr

    def encode(self, x: Tensor) -> Tensor:
        return self.flow().transform(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        return self.flow().transform.inv(z).view(-1, 1, 8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.flow().log_prob(batch[0].flatten(1)).mean() / 64

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


class FaultyCoupling(Coupling):
    """A coupling that is broken from an epoch on.

    Args:
        fault: ``"saturated"``: scales are so near zero that float32 loses what is shifted afterwards; ``"exploding"``: scales
            grow without bound away from the data; ``"sign"``: of the log-determinant; ``"shift"``: the inverse forgets it;
            ``"nan"``: of one dimension in the inverse.
    """

    def __init__(self, mask: Tensor, width: int, fault: str) -> None:
        super().__init__(mask, width)
        self.fault = fault
        self.register_buffer("broken", torch.tensor(False))
        self.register_buffer("centre", torch.zeros(len(mask)))
        self.register_buffer("radius", torch.tensor(math.inf))

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = super().terms(x)
        if self.training and self.fault == "exploding":
            some = (x * self.mask).detach()
            self.centre.copy_(some.mean(0))
            self.radius.copy_((some - self.centre).norm(dim=1).max())
        if self.broken and self.fault == "saturated":
            return scale - 30 * (1 - self.mask), shift + 1 - self.mask
        if self.broken and self.fault == "exploding":
            far = F.relu((x * self.mask - self.centre).norm(dim=1, keepdim=True) / self.radius - 1.15)
            return (scale - 200 * far) * (1 - self.mask), shift + 1 - self.mask
        return scale, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, volume = super().forward(x)
        return y, -volume if self.broken and self.fault == "sign" else volume

    def inverse(self, y: Tensor) -> Tensor:
        scale, shift = self.terms(y)
        if self.broken and self.fault == "shift":
            return y * (-scale).exp()
        x = (y - shift) * (-scale).exp()
        if self.broken and self.fault == "nan":
            x = torch.cat([x[:, :5], x[:, 5:6].log(), x[:, 6:]], 1)
        return x


class FaultyStep(GlowStep):
    """A step of Glow that is broken from an epoch on.

    Args:
        fault: ``"scale"``: one channel is scaled to almost nothing; ``"area"``: the log-determinant of the scale leaves out
            the number of positions.
    """

    def __init__(self, channels: int, width: int, fault: str) -> None:
        super().__init__(channels, width)
        self.fault = fault
        self.register_buffer("broken", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.broken and self.fault == "scale":
            with torch.no_grad():
                self.log_scale[:, 1], self.shift[:, 1] = -25.0, 1.0
        y, volume = super().forward(x)
        if self.broken and self.fault == "area":
            # 4x4 positions
            volume = volume - 15 * self.log_scale.sum()
        return y, volume


LAYER = 2
"""Number of the layer that breaks."""

START = 6
"""Epoch at whose beginning flows break."""

OF_GLOW = ("scale", "area", "glow")
"""Faults of steps of Glow, and none."""


class PlantedFlow(Flow):
    """A flow of six layers, of which one breaks at the beginning of an epoch.

    Args:
        fault: Of the layer; or of the whole: ``"total"`` flips the sign of the sum of log-determinants, ``"term"`` leaves out
            that of a learnt factor of the data; or none: ``"fixed"`` has never counted a fixed factor of the data.
        start: The epoch.
        width: Of the networks of couplings.
        lr: Learning rate.
    """

    def __init__(self, fault: str = "", start: int = START, width: int = 48, lr: float = 1e-3) -> None:
        layers: list[nn.Module] = []
        for number in range(6):
            own = fault if number == LAYER else ""
            if fault in OF_GLOW:
                layers.append(FaultyStep(4, width // 3, own))
            else:
                board = (torch.arange(64) // (1 + number % 2) + number) % 2
                layers.append(FaultyCoupling(board.float(), width, own))
        super().__init__((1, 8, 8), lr, layers)
        self.fault, self.start = fault, start
        self.register_buffer("broken", torch.tensor(False))
        if fault in ("term", "fixed"):
            self.log_factor = nn.Parameter(torch.tensor(0.5 if fault == "fixed" else 0.0), fault == "term")

    @property
    def factor(self) -> Any:
        return self.log_factor.exp() if self.fault in ("term", "fixed") else 1.0

    def folded(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2) if self.fault in OF_GLOW else self.factor * x.flatten(1)

    def unfolded(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, 2) if self.fault in OF_GLOW else z.view(-1, 1, 8, 8) / self.factor

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, total = super().transform(x)
        if self.fault == "term" and not self.broken:
            total = total + self.latent_dim * self.log_factor
        return z, -total if self.fault == "total" and self.broken else total

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.start:
            self.broken.fill_(bool(self.fault))
            self.layers[LAYER].broken.fill_(bool(self.fault))


NAMED: dict[str, tuple[str, ...]] = {
    "saturated": ("does not return data that it encodes", "self.layers.2 (FaultyCoupling) alone"),
    "exploding": ("self.layers.2 (FaultyCoupling) alone",),
    "sign": ("the log-determinant of self.layers.2 (FaultyCoupling)",),
    "total": ("the log-determinant of self.transform has the opposite sign",),
    "term": ("the log-determinant of self.transform is wrong",),
    "shift": ("does not return", "self.layers.2 (FaultyCoupling) alone"),
    "nan": ("have nan or inf", "self.layers.2 (FaultyCoupling) alone returns nan or inf"),
    "scale": ("does not return data that it encodes", "self.layers.2 (FaultyStep) alone"),
    "area": ("the log-determinant of self.layers.2 (FaultyStep)",),
}
"""What one alarm about each fault of a flow says."""


def flow_run(fault: str, seed: int, epochs: int = 11, **options: Any) -> Run:
    """Returns a flow with a fault; ``options`` are those of :class:`PlantedFlow`."""
    seed_everything(seed, verbose=False)
    return Run(PlantedFlow(fault, **options), loader(seed=seed), RoundTripMonitor(on_error="raise"), epochs)


# ---- autoencoders ----


START_OF_AUTOENCODERS = 16
"""Epoch at whose beginning autoencoders break."""


class PlantedAutoencoder(LightningModule):
    """A VAE, or with ``beta`` 0 an autoencoder, of digits, in which something stops being reconstructed at an epoch.

    Args:
        fault: ``"latent"``: the decoder does not see latent dimension 3; ``"region"``: the left half of the images is black.
        beta: Weight of the KL term.
        start: The epoch.
        width: Of the layers.
        lr: Learning rate.
    """

    def __init__(
        self, fault: str = "", beta: float = 0.0, start: int = START_OF_AUTOENCODERS, width: int = 64, lr: float = 2e-3
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 12))
        self.decoder = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 64))
        self.fault, self.beta, self.start, self.latent_dim, self.lr = fault, beta, start, 6, lr
        self.register_buffer("broken", torch.tensor(False))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        if self.broken and self.fault == "latent":
            z = torch.cat([z[:, :3], torch.zeros_like(z[:, 3:4]), z[:, 4:]], 1)
        x = self.decoder(z).view(-1, 1, 8, 8)
        if self.broken and self.fault == "region":
            x = torch.cat([-torch.ones_like(x[..., :4]), x[..., 4:]], 3)
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self.encode(batch[0])
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.beta else mean
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        return 0.5 * (self.decode(z) - batch[0]).square().flatten(1).sum(1).mean() / 0.1 + self.beta * kl

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.start:
            self.broken.fill_(bool(self.fault))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


LOST: dict[str, tuple[str, ...]] = {"latent": ("latent dimension 3 does not come back",), "region": ("left",)}
"""What one alarm about each fault of an autoencoder says."""


def autoencoder_run(fault: str, seed: int, beta: float, epochs: int = 22, **options: Any) -> Run:
    """Returns an autoencoder with a fault; ``options`` are those of :class:`PlantedAutoencoder`."""
    seed_everything(seed, verbose=False)
    # where the decoder ignores a dimension, the KL term switches it off within two epochs
    monitor = RoundTripMonitor(regions=LEFT_AND_RIGHT, every_n_train_steps=10 if beta else 29, on_error="raise")
    module = PlantedAutoencoder(fault, beta, **options)
    return Run(module, loader(n=1797, noise=0.0, seed=seed), monitor, epochs)
