"""Small GANs in the manner of well-known tutorials."""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type"

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""(C, H, W)"""


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Returns linear layers with leaky ReLUs between them, and BatchNorm where it is asked for."""
    layers: list[nn.Module] = []
    for number, (one, other) in enumerate(itertools.pairwise(widths)):
        if number:
            layers += [*([nn.BatchNorm1d(one)] if norm and number > 1 else []), nn.LeakyReLU(0.2)]
        layers.append(nn.Linear(one, other))
    return nn.Sequential(*layers)


def convolutional_generator(latent_dim: int, width: int) -> nn.Sequential:
    """Returns the generator of a DCGAN for 16x16 images."""
    return nn.Sequential(
        nn.Unflatten(1, (latent_dim, 1, 1)),
        nn.ConvTranspose2d(latent_dim, 4 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


def convolutional_critic(
    width: int, norm: Callable[[int], nn.Module] = lambda channels: nn.Identity()
) -> nn.Sequential:
    """Returns a discriminator for 16x16 images."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), norm(2 * width), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(32 * width, 1),
    )  # fmt: skip


class Adversarial(LightningModule):
    """A generator and a discriminator with one Adam each.

    Args:
        generator: Makes images.
        discriminator: Judges them.
        lr: Learning rate of both.

    Attributes:
        betas: Of both.
    """

    betas = 0.5, 0.999

    def __init__(self, generator: nn.Module, discriminator: nn.Module, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.lr = generator, discriminator, lr
        self.picture = nn.Identity()

    def step_each(self, loss_d: Callable[[], Tensor], loss_g: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Takes one step of each network; the generator's loss is computed after the discriminator's step."""
        losses = []
        for optimizer, loss_of in zip(self.optimizers(), (loss_d, loss_g), strict=True):
            losses.append(loss_of())
            optimizer.zero_grad()
            self.manual_backward(losses[-1])
            optimizer.step()
        return {"loss": losses[-1].detach()}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns one Adam each."""
        return [
            torch.optim.Adam(network.parameters(), lr=self.lr, betas=self.betas)
            for network in (self.discriminator, self.generator)
        ]


class GAN(Adversarial):
    """An unconditional GAN with the non-saturating loss.

    Args:
        generator: From noise (N, L) to images.
        discriminator: From images to (N, 1).
        latent_dim: L.
        lr: Learning rate of both.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent_dim: int, lr: float) -> None:
        super().__init__(generator, discriminator, lr)
        self.latent_dim = latent_dim

    def forward(self, z: Tensor) -> Tensor:
        """Returns images from noise."""
        return self.picture(self.generator(z))

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the loss of the discriminator."""
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def loss_g(self, fake: Tensor) -> Tensor:
        """Returns the loss of the generator."""
        return F.softplus(-self.discriminator(fake)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Takes one step of each network."""
        real, _ = batch
        fake = self(torch.randn(len(real), self.latent_dim, device=self.device))
        return self.step_each(lambda: self.loss_d(real, fake.detach()), lambda: self.loss_g(fake))


class HingeGAN(GAN):
    """A GAN with the hinge loss."""

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the hinge loss of the discriminator."""
        return F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()

    def loss_g(self, fake: Tensor) -> Tensor:
        """Returns the loss of the generator."""
        return -self.discriminator(fake).mean()


class WGANGP(GAN):
    """A Wasserstein GAN with a gradient penalty, whose generator steps at every third batch."""

    betas = 0.0, 0.9
    last = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Takes a step of the critic, and sometimes one of the generator."""
        real, _ = batch
        optimizer_d, optimizer_g = self.optimizers()
        fake = self(torch.randn(len(real), self.latent_dim, device=self.device))
        mixed = torch.lerp(real, fake.detach(), torch.rand(len(real), 1, 1, 1, device=self.device)).requires_grad_()
        slopes = (
            torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)[0].flatten(1).norm(dim=1)
        )
        loss_d = self.discriminator(fake.detach()).mean() - self.discriminator(real).mean()
        optimizer_d.zero_grad()
        self.manual_backward(loss_d + 10 * (slopes - 1).square().mean())
        optimizer_d.step()
        if batch_idx % 3 == 0:
            loss_g = -self.discriminator(fake).mean()
            optimizer_g.zero_grad()
            self.manual_backward(loss_g)
            optimizer_g.step()
            self.last = float(loss_g.detach())
        return {"loss": torch.tensor(self.last)}


class LSGAN(GAN):
    """A GAN with least squares in place of logarithms."""

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the squared distance of the discriminator's outputs from 1 and 0."""
        return 0.5 * ((self.discriminator(real) - 1).square().mean() + self.discriminator(fake).square().mean())

    def loss_g(self, fake: Tensor) -> Tensor:
        """Returns the squared distance of the discriminator's outputs from 1."""
        return 0.5 * (self.discriminator(fake) - 1).square().mean()


class R1GAN(GAN):
    """A GAN with the non-saturating loss and a penalty on the discriminator's gradient at real images."""

    betas = 0.0, 0.99

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the loss of the discriminator with its penalty."""
        real = real.clone().requires_grad_()
        of_real = self.discriminator(real)
        slopes = torch.autograd.grad(of_real.sum(), real, create_graph=True)[0].flatten(1)
        loss = F.softplus(-of_real).mean() + F.softplus(self.discriminator(fake)).mean()
        return loss + 0.5 * slopes.square().sum(1).mean()


class Residual(nn.Module):
    """Two convolutions beside a shortcut, after an upsampling by 2.

    Args:
        inside: Number of channels before.
        outside: Number of channels after.
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.shortcut = nn.Conv2d(inside, outside, 1)
        self.body = nn.Sequential(
            nn.GroupNorm(4, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1),
            nn.GroupNorm(4, outside), nn.SiLU(), nn.Conv2d(outside, outside, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, outside, 2 H, 2 W)."""
        x = self.up(x)
        return self.shortcut(x) + self.body(x)


class ConditionalGAN(Adversarial):
    """An MLP GAN whose networks are given the class, as one hot.

    Args:
        shape: Of images.
        num_classes: K.
        width: Of hidden layers.
        lr: Learning rate of both networks.
        latent_dim: L.
    """

    def __init__(self, shape: Shape, num_classes: int, width: int, lr: float, latent_dim: int = 24) -> None:
        pixels = math.prod(shape)
        generator = nn.Sequential(
            mlp(latent_dim + num_classes, width, 2 * width, pixels, norm=True), nn.Tanh(), nn.Unflatten(1, shape)
        )
        super().__init__(generator, mlp(pixels + num_classes, 2 * width, width, 1), lr)
        self.latent_dim, self.num_classes = latent_dim, num_classes

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Returns images of these classes."""
        return self.picture(self.generator(torch.cat([z, self.hot(labels)], 1)))

    def sample(self, n: int, labels: Tensor) -> Tensor:
        """Returns n images of these classes."""
        return self(torch.randn(n, self.latent_dim, device=self.device), labels)

    def hot(self, labels: Tensor) -> Tensor:
        """Returns (N, K)."""
        return F.one_hot(labels, self.num_classes).float()

    def real_or_not(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns (N, 1), large for real images."""
        return self.discriminator(torch.cat([images.flatten(1), self.hot(labels)], 1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Takes one step of each network."""
        real, labels = batch
        fake = self.sample(len(real), labels)

        def loss_d() -> Tensor:
            of_real = F.softplus(-self.real_or_not(real, labels)).mean()
            return of_real + F.softplus(self.real_or_not(fake.detach(), labels)).mean()

        return self.step_each(loss_d, lambda: F.softplus(-self.real_or_not(fake, labels)).mean())
