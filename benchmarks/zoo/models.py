"""Small generative models of many kinds, in the manner of well-known tutorials.

Each makes its images through ``self.picture``, which does nothing, so that faults of the output have a place.
"""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type"

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.zoo.data import Data

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


# ---- GANs ----


class Adversarial(LightningModule):
    """A generator and a discriminator with one Adam each.

    Args:
        generator: Makes images.
        discriminator: Judges them.
        lr: Learning rate of both.
    """

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
            torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.5, 0.999))
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

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns one Adam each, as in the paper."""
        return [
            torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.0, 0.9))
            for network in (self.discriminator, self.generator)
        ]


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

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the loss of the discriminator with its penalty."""
        real = real.clone().requires_grad_()
        of_real = self.discriminator(real)
        slopes = torch.autograd.grad(of_real.sum(), real, create_graph=True)[0].flatten(1)
        loss = F.softplus(-of_real).mean() + F.softplus(self.discriminator(fake)).mean()
        return loss + 0.5 * slopes.square().sum(1).mean()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns one Adam each, without momentum."""
        return [
            torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.0, 0.99))
            for network in (self.discriminator, self.generator)
        ]


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


# ---- autoencoders ----


class VAE(LightningModule):
    """A variational autoencoder with the squared error.

    Args:
        encoder: From images to (N, 2 L).
        decoder: From latents (N, L) to images.
        latent_dim: L.
        lr: Learning rate.
        beta: Weight of the KL term.
        warmup: Number of steps in which this weight rises from 0.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, lr: float, beta: float = 1.0, warmup: int = 0
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.picture = nn.Identity()
        self.latent_dim, self.lr, self.beta, self.warmup = latent_dim, lr, beta, warmup

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance, (N, L) each."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        return self.picture(self.decoder(z))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructions, mean and log variance."""
        mu, logvar = self.encode(x)
        return self.decode(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), mu, logvar

    def sample(self, n: int) -> Tensor:
        """Returns n images."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative lower bound."""
        x, _ = batch
        recon, mu, logvar = self(x)
        error = F.mse_loss(recon, x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
        weight = self.beta * (min(1.0, (self.global_step + 1) / self.warmup) if self.warmup else 1.0)
        return error + weight * kl

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ConditionalVAE(VAE):
    """A VAE whose two networks are given the class, as one hot.

    Args:
        encoder: From images and classes, flat, to (N, 2 L).
        decoder: From latents and classes to images.
        latent_dim: L.
        lr: Learning rate.
        num_classes: K.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, lr: float, num_classes: int) -> None:
        super().__init__(encoder, decoder, latent_dim, lr)
        self.num_classes = num_classes

    def hot(self, labels: Tensor) -> Tensor:
        """Returns (N, K)."""
        return F.one_hot(labels, self.num_classes).float()

    def encode(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns mean and log variance, (N, L) each."""
        mu, logvar = self.encoder(torch.cat([x.flatten(1), self.hot(labels)], 1)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Returns images of these classes."""
        return self.picture(self.decoder(torch.cat([z, self.hot(labels)], 1)))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Returns reconstructions, mean and log variance."""
        mu, logvar = self.encode(x, labels)
        return self.decode(mu + torch.randn_like(mu) * (0.5 * logvar).exp(), labels), mu, logvar

    def sample(self, n: int, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Returns n images of these classes."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative lower bound."""
        x, labels = batch
        recon, mu, logvar = self(x, labels)
        error = F.mse_loss(recon, x, reduction="sum") / len(x)
        return error - self.beta * 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()


class WAE(LightningModule):
    """A Wasserstein autoencoder: latents of a plain encoder are drawn towards N(0, 1) by their mean discrepancy.

    Args:
        encoder: From images to (N, L).
        decoder: From latents (N, L) to images.
        latent_dim: L.
        lr: Learning rate.
        weight: Of the discrepancy.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, lr: float, weight: float = 50.0
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.picture = nn.Identity()
        self.latent_dim, self.lr, self.weight = latent_dim, lr, weight

    def encode(self, x: Tensor) -> Tensor:
        """Returns latents (N, L)."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        return self.picture(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        """Returns reconstructions."""
        return self.decode(self.encode(x))

    def sample(self, n: int) -> Tensor:
        """Returns n images."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the squared error and the discrepancy."""
        x, _ = batch
        z, prior = self.encode(x), torch.randn(len(x), self.latent_dim, device=self.device)
        error = F.mse_loss(self.decode(z), x, reduction="sum") / len(x)
        alike = [self._similarity(z, z), self._similarity(prior, prior), self._similarity(z, prior)]
        return error + self.weight * (alike[0] + alike[1] - 2 * alike[2])

    def _similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean of the inverse multiquadratic kernel."""
        scale = 2.0 * self.latent_dim
        return (scale / (scale + torch.cdist(x, y).square())).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class VQVAE(LightningModule):
    """An autoencoder whose latents are vectors of a codebook.

    Args:
        width: Number of channels.
        lr: Learning rate.
        codes: Number of vectors.
        length: Of each vector.
    """

    def __init__(self, width: int, lr: float, codes: int = 48, length: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1), nn.ReLU(),
            # without it, all latents may begin next to one vector, and stay there
            nn.Conv2d(width, length, 1), nn.BatchNorm2d(length),
        )  # fmt: skip
        self.codebook = nn.Embedding(codes, length)
        self.decoder = nn.Sequential(
            nn.Conv2d(length, width, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(width, width, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.picture = nn.Identity()
        self.lr = lr

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the nearest vectors (N, C, h, w) with the gradient of z, and the loss of the codebook."""
        rows = z.movedim(1, -1)
        nearest = (
            self.codebook(torch.cdist(rows.flatten(0, 2), self.codebook.weight).argmin(1)).view_as(rows).movedim(-1, 1)
        )
        loss = F.mse_loss(nearest, z.detach()) + 0.25 * F.mse_loss(z, nearest.detach())
        return z + (nearest - z).detach(), loss

    def forward(self, x: Tensor) -> Tensor:
        """Returns reconstructions."""
        return self.picture(self.decoder(self.quantize(self.encoder(x))[0]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the squared error and the loss of the codebook."""
        x, _ = batch
        quantized, loss = self.quantize(self.encoder(x))
        return F.mse_loss(self.picture(self.decoder(quantized)), x) + loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# ---- flows and diffusion ----


class Coupling(nn.Module):
    """An affine coupling: half of the numbers are scaled and shifted by what a network makes of the other half.

    Args:
        mask: (D,), 1 for what stays.
        width: Of the network.
    """

    def __init__(self, mask: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.net = mlp(len(mask), width, width, 2 * len(mask))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logarithms of scales, and shifts."""
        scale, shift = self.net(x * self.mask).chunk(2, dim=1)
        return torch.tanh(scale) * 2 * (1 - self.mask), shift * (1 - self.mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result (N, D) and the logarithm of the determinant (N,)."""
        scale, shift = self.terms(x)
        return x * scale.exp() + shift, scale.sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """Returns what ``forward`` was given."""
        scale, shift = self.terms(y)
        return (y - shift) * (-scale).exp()


class RealNVP(LightningModule):
    """A normalizing flow of affine couplings.

    Args:
        shape: Of images.
        width: Of the networks.
        lr: Learning rate.
        layers: Number of couplings.
    """

    def __init__(self, shape: Shape, width: int, lr: float, layers: int = 6) -> None:
        super().__init__()
        self.shape, self.lr = shape, lr
        self.latent_dim = math.prod(shape)
        board = torch.arange(self.latent_dim) % 2
        rows = torch.arange(self.latent_dim) // shape[2] % 2
        masks = [board, 1 - board, rows, 1 - rows]
        self.layers = nn.ModuleList(Coupling(masks[number % 4].float(), width) for number in range(layers))
        self.picture = nn.Identity()

    def encode(self, x: Tensor) -> Tensor:
        """Returns latents (N, D)."""
        return self.transform(x)[0]

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns latents (N, D) and the logarithm of the determinant (N,)."""
        z, total = x.flatten(1), torch.zeros(len(x), device=x.device)
        for layer in self.layers:
            z, determinant = layer(z)
            total = total + determinant
        return z, total

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return self.picture(z.view(-1, *self.shape))

    def sample(self, n: int) -> Tensor:
        """Returns n images."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative logarithm of the density, for each number of an image."""
        z, determinant = self.transform(batch[0])
        return (0.5 * z.square().sum(1) - determinant).mean() / self.latent_dim

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class GlowStep(nn.Module):
    """A learnt scale and shift of channels, a rotation of them, and a convolutional affine coupling.

    Args:
        channels: C.
        width: Number of channels of the coupling's network.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(channels, channels))[0])
        half = channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(half, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, 2 * half, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logarithms of scales, and shifts, of the second half of the channels."""
        scale, shift = self.net(x).chunk(2, dim=1)
        return torch.tanh(scale), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the result (N, C, H, W) and the logarithm of the determinant (N,)."""
        x = torch.einsum("ij,njhw->nihw", self.rotation, x * self.log_scale.exp() + self.shift)
        first, second = x.chunk(2, dim=1)
        scale, shift = self.terms(first)
        area = x.shape[2] * x.shape[3]
        return torch.cat([first, second * scale.exp() + shift], 1), scale.flatten(1).sum(
            1
        ) + area * self.log_scale.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """Returns what ``forward`` was given."""
        first, second = y.chunk(2, dim=1)
        scale, shift = self.terms(first)
        x = torch.cat([first, (second - shift) * (-scale).exp()], 1)
        return (torch.einsum("ji,njhw->nihw", self.rotation, x) - self.shift) * (-self.log_scale).exp()


class Glow(LightningModule):
    """A normalizing flow of convolutional couplings on blocks of 2x2 pixels.

    Args:
        shape: Of images.
        width: Of the networks.
        lr: Learning rate.
        layers: Number of steps.
    """

    def __init__(self, shape: Shape, width: int, lr: float, layers: int = 8) -> None:
        super().__init__()
        self.shape, self.lr, self.latent_dim = shape, lr, math.prod(shape)
        self.layers = nn.ModuleList(GlowStep(4 * shape[0], width) for _ in range(layers))
        self.picture = nn.Identity()

    def encode(self, x: Tensor) -> Tensor:
        """Returns latents (N, D)."""
        return self.transform(x)[0]

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns latents (N, D) and the logarithm of the determinant (N,)."""
        z, total = F.pixel_unshuffle(x, 2), torch.zeros(len(x), device=x.device)
        for layer in self.layers:
            z, determinant = layer(z)
            total = total + determinant
        return z.flatten(1), total

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        channels, height, width = self.shape
        z = z.view(-1, 4 * channels, height // 2, width // 2)
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return self.picture(F.pixel_shuffle(z, 2))

    def sample(self, n: int) -> Tensor:
        """Returns n images."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative logarithm of the density, for each number of an image."""
        z, determinant = self.transform(batch[0])
        return (0.5 * z.square().sum(1) - determinant).mean() / self.latent_dim

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def angles(times: Tensor, length: int) -> Tensor:
    """Returns sines and cosines (N, length) of times (N,) in 0..1."""
    frequencies = torch.exp(torch.linspace(0, math.log(200), length // 2, device=times.device))
    phases = times[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], 1)


class Denoiser(nn.Module):
    """A residual network of linear layers that is given the time.

    Args:
        shape: Of images.
        width: Of the layers.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.inside, self.outside = nn.Linear(math.prod(shape), width), nn.Linear(width, math.prod(shape))
        self.time, self.scale = mlp(32, width, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), mlp(width, width, width)) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns noise (N, C, H, W) in images at times (N,) in 0..1."""
        h, time = self.inside(x.flatten(1)), self.time(angles(t, 32))
        for block in self.blocks:
            h = h + block(h + time)
        # noise has more dimensions than the layers are wide, and most of it is in the images as it is
        return self.outside(h).view(-1, *self.shape) + self.scale(time)[:, :, None, None] * x


class DDPM(LightningModule):
    """A denoising diffusion model that samples by an average of its weights.

    Args:
        shape: Of images.
        width: Of the network.
        lr: Learning rate.
        decay: Of the average.
        timesteps: Number of steps of noise.
    """

    def __init__(self, shape: Shape, width: int, lr: float, decay: float = 0.98, timesteps: int = 200) -> None:
        super().__init__()
        self.net = Denoiser(shape, width)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.shape, self.lr, self.decay, self.timesteps = shape, lr, decay, timesteps
        self.picture = nn.Identity()
        self.register_buffer("alpha", torch.cumprod(1 - torch.linspace(5e-4, 0.1, timesteps), 0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the squared error of the noise."""
        x, _ = batch
        t = torch.randint(self.timesteps, (len(x),), device=self.device)
        noise, alpha = torch.randn_like(x), self.alpha[t][:, None, None, None]
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        return F.mse_loss(self.net(noisy, t / self.timesteps), noise)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Updates the average."""
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.lerp_(weight, 1 - self.decay)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Returns n images after 16 deterministic steps."""
        x = torch.randn(n, *self.shape, device=self.device)
        times = torch.linspace(self.timesteps - 1, 0, 17, device=self.device).long()
        for now, then in itertools.pairwise(times):
            alpha, later = self.alpha[now], self.alpha[then]
            noise = self.ema(x, torch.full((n,), float(now) / self.timesteps, device=self.device))
            clean = ((x - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1.2, 1.2)
            noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            x = later.sqrt() * clean + (1 - later).sqrt() * noise
        return self.picture(clean)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)


class Field(nn.Module):
    """A small convolutional network of two scales that is given the time.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Conv2d(1, width, 3, padding=1)
        self.time = mlp(32, 2 * width, 2 * width)
        self.down, self.middle = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.far = nn.Sequential(nn.Flatten(), nn.Linear(32 * width, 64), nn.SiLU(), nn.Linear(64, 32 * width))
        self.up, self.outside = nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns velocities (N, 1, 8, 8) at times (N,) in 0..1."""
        fine = F.silu(self.inside(x))
        coarse = F.silu(self.down(fine) + self.time(angles(t, 32))[:, :, None, None])
        coarse = F.silu(coarse + self.middle(coarse) + self.far(coarse).view_as(coarse))
        return self.outside(torch.cat([fine, F.silu(self.up(coarse))], 1))


class FlowMatching(LightningModule):
    """A model of the straight paths from noise to images.

    Args:
        shape: Of images.
        width: Number of channels.
        lr: Learning rate.
    """

    def __init__(self, shape: Shape, width: int, lr: float) -> None:
        super().__init__()
        self.net = Field(width)
        self.picture = nn.Identity()
        self.shape, self.lr = shape, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the squared error of the velocity."""
        x, _ = batch
        t, noise = torch.rand(len(x), device=self.device), torch.randn_like(x)
        return F.mse_loss(self.net(torch.lerp(noise, x, t[:, None, None, None]), t), x - noise)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Returns n images after 8 steps."""
        x = torch.randn(n, *self.shape, device=self.device)
        for step in range(8):
            x = x + self.net(x, torch.full((n,), step / 8, device=self.device)) / 8
        return self.picture(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class UNet(nn.Module):
    """A convolutional network of three scales that is given the time.

    Args:
        width: Number of channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Conv2d(1, width, 3, padding=1)
        self.time = mlp(32, 2 * width, 2 * width)
        self.down = nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.deeper = nn.Conv2d(2 * width, 2 * width, 4, 2, 1)
        self.middle = nn.Sequential(
            nn.GroupNorm(4, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        )
        self.far = nn.Sequential(nn.Flatten(), nn.Linear(32 * width, 96), nn.SiLU(), nn.Linear(96, 32 * width))
        self.higher = nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, 1)
        self.up = nn.ConvTranspose2d(4 * width, width, 4, 2, 1)
        self.outside = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns (N, 1, 16, 16) for images at times (N,) in 0..1."""
        time = self.time(angles(t, 32))[:, :, None, None]
        fine = F.silu(self.inside(x))
        half = F.silu(self.down(fine) + time)
        coarse = self.deeper(half) + time
        coarse = coarse + self.middle(coarse) + self.far(coarse).view_as(coarse)
        half = torch.cat([half, F.silu(self.higher(coarse))], 1)
        return self.outside(torch.cat([fine, F.silu(self.up(half))], 1))


class VDiffusion(LightningModule):
    """A diffusion model with a cosine schedule that predicts the velocity between images and noise.

    Args:
        shape: Of images.
        width: Number of channels.
        lr: Learning rate.
    """

    def __init__(self, shape: Shape, width: int, lr: float) -> None:
        super().__init__()
        self.net = UNet(width)
        self.picture = nn.Identity()
        self.shape, self.lr = shape, lr

    @staticmethod
    def parts(t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how much of the image and of the noise there is at times (N,), (N, 1, 1, 1) each."""
        angle = t[:, None, None, None] * (math.pi / 2)
        return angle.cos(), angle.sin()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the squared error of the velocity."""
        x, _ = batch
        t, noise = torch.rand(len(x), device=self.device), torch.randn_like(x)
        signal, spread = self.parts(t)
        return F.mse_loss(self.net(signal * x + spread * noise, t), signal * noise - spread * x)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Returns n images after 12 deterministic steps."""
        x = torch.randn(n, *self.shape, device=self.device)
        times = torch.linspace(1, 0, 13, device=self.device)
        for now, then in itertools.pairwise(times):
            signal, spread = self.parts(now.expand(n))
            velocity = self.net(x, now.expand(n))
            clean = (signal * x - spread * velocity).clamp(-1.2, 1.2)
            noise = spread * x + signal * velocity
            signal, spread = self.parts(then.expand(n))
            x = signal * clean + spread * noise
        return self.picture(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


# ---- the kinds ----


def _mlp_gan(shape: Shape, num_classes: int, width: int, lr: float) -> GAN:
    pixels = math.prod(shape)
    generator = nn.Sequential(mlp(32, width, 2 * width, pixels, norm=True), nn.Tanh(), nn.Unflatten(1, shape))
    return GAN(generator, nn.Sequential(nn.Flatten(), mlp(pixels, 2 * width, width, 1)), 32, lr)


def _dcgan(shape: Shape, num_classes: int, width: int, lr: float) -> GAN:
    return GAN(convolutional_generator(24, width), convolutional_critic(width, nn.BatchNorm2d), 24, lr)


def _wgan_gp(shape: Shape, num_classes: int, width: int, lr: float) -> GAN:
    return WGANGP(convolutional_generator(24, width), convolutional_critic(width), 24, lr)


def _hinge_gan(shape: Shape, num_classes: int, width: int, lr: float) -> GAN:
    critic = convolutional_critic(width)
    for layer in critic:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spectral_norm(layer)
    return HingeGAN(convolutional_generator(24, width), critic, 24, lr)


def _vae(latent_dim: int, beta: float) -> Callable[[Shape, int, int, float], LightningModule]:
    def make(shape: Shape, num_classes: int, width: int, lr: float) -> VAE:
        pixels = math.prod(shape)
        encoder = nn.Sequential(nn.Flatten(), mlp(pixels, 2 * width, width, 2 * latent_dim))
        decoder = nn.Sequential(mlp(latent_dim, width, 2 * width, pixels), nn.Tanh(), nn.Unflatten(1, shape))
        return VAE(encoder, decoder, latent_dim, lr, beta)

    return make


def _convolutional_vae(shape: Shape, num_classes: int, width: int, lr: float) -> VAE:
    encoder = nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * width, 24),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(12, 32 * width), nn.ReLU(), nn.Unflatten(1, (2 * width, 4, 4)),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    return VAE(encoder, decoder, 12, lr, warmup=600)


def _lsgan(shape: Shape, num_classes: int, width: int, lr: float) -> LSGAN:
    generator = nn.Sequential(
        nn.Linear(32, 64 * width), nn.Unflatten(1, (4 * width, 4, 4)), nn.BatchNorm2d(4 * width), nn.Upsample(scale_factor=2),
        nn.Conv2d(4 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, 1, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    critic = nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25),
        nn.Conv2d(width, 4 * width, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25), nn.Flatten(), nn.Linear(64 * width, 1),
    )  # fmt: skip
    return LSGAN(generator, critic, 32, lr)


def _r1_gan(shape: Shape, num_classes: int, width: int, lr: float) -> R1GAN:
    generator = nn.Sequential(
        nn.Linear(32, 64 * width), nn.Unflatten(1, (4 * width, 4, 4)), Residual(4 * width, 2 * width),
        Residual(2 * width, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1), nn.Tanh(),
    )  # fmt: skip
    return R1GAN(generator, convolutional_critic(width), 32, lr)


def _wae(shape: Shape, num_classes: int, width: int, lr: float) -> WAE:
    pixels = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), mlp(pixels, 2 * width, width, 8, norm=True))
    decoder = nn.Sequential(mlp(8, width, 2 * width, pixels), nn.Tanh(), nn.Unflatten(1, shape))
    return WAE(encoder, decoder, 8, lr)


def _conditional_vae(shape: Shape, num_classes: int, width: int, lr: float) -> ConditionalVAE:
    pixels = math.prod(shape)
    decoder = nn.Sequential(mlp(8 + num_classes, width, 2 * width, pixels), nn.Tanh(), nn.Unflatten(1, shape))
    return ConditionalVAE(mlp(pixels + num_classes, 2 * width, width, 16), decoder, 8, lr, num_classes)


@dataclass(frozen=True)
class Kind:
    """A kind of model, and how its runs vary."""

    make: Callable[[Shape, int, int, float], LightningModule]
    """From the shape of images, the number of classes, a width and a learning rate to a module."""
    data: tuple[str, ...]
    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    family: str
    """``"gan"``, ``"vae"``, ``"wae"``, ``"autoencoder"``, ``"flow"`` or ``"diffusion"``."""
    held_out: bool
    """Whether rules were chosen on none of its runs."""
    spacing: tuple[int, int] = (8, 100)
    """Smallest and largest number of steps between evaluations."""
    most_samples: int = 1024
    """Of the product, at an evaluation; the referee draws twice as many."""
    noise: float = 0.0
    """Standard deviation of noise on the data."""
    conditional: bool = False
    """Whether samples are of given classes."""

    @property
    def network(self) -> str:
        """Name of the network that is given latents; empty where there is none."""
        return {"gan": "generator", "vae": "decoder", "wae": "decoder"}.get(self.family, "")


def _vq_vae(shape: Shape, num_classes: int, width: int, lr: float) -> VQVAE:
    return VQVAE(width, lr)


def _of_shape(kind: Any) -> Callable[[Shape, int, int, float], LightningModule]:
    """From a class whose arguments are shape, width and learning rate."""
    return lambda shape, num_classes, width, lr: kind(shape, width, lr)


KINDS: dict[str, Kind] = {
    "mlp_gan": Kind(_mlp_gan, ("mnist", "digits", "mnist28"), (64, 128), (2e-4, 5e-4), "gan", False),
    "wgan_gp": Kind(_wgan_gp, ("mnist", "digits", "textures"), (8, 12), (5e-4, 1e-3), "gan", False, (12, 40), 512),
    "mlp_vae": Kind(_vae(12, 1.0), ("mnist", "digits", "mnist28"), (64, 128), (1e-3, 3e-3), "vae", False),
    "flow_matching": Kind(
        _of_shape(FlowMatching), ("digits8",), (12, 16), (2e-3, 4e-3), "diffusion", False, (8, 60), 256
    ),
    "dcgan": Kind(_dcgan, ("mnist", "digits"), (8, 12), (3e-4, 6e-4), "gan", False, (8, 40), 512),
    "hinge_gan": Kind(_hinge_gan, ("mnist", "textures"), (8, 12), (6e-4, 1e-3), "gan", False, (12, 40), 512),
    "ddpm": Kind(_of_shape(DDPM), ("mnist", "digits8"), (96, 160), (1e-3, 2e-3), "diffusion", False, (8, 100), 256),
    "convolutional_vae": Kind(
        _convolutional_vae, ("mnist", "faces", "textures"), (8, 12), (2e-3, 4e-3), "vae", False, (8, 40), 512
    ),
    "beta_vae": Kind(_vae(10, 4.0), ("mnist", "faces"), (64, 128), (1e-3, 3e-3), "vae", False),
    "face_dcgan": Kind(_dcgan, ("faces",), (12, 16), (6e-4, 1e-3), "gan", False, (16, 40), 512),
    "realnvp": Kind(
        _of_shape(RealNVP), ("digits8",), (96, 128), (1e-3, 2e-3), "flow", False, (8, 60), 512, noise=1 / 16
    ),
    "conditional_gan": Kind(
        ConditionalGAN, ("mnist", "digits"), (64, 128), (2e-4, 5e-4), "gan", False, conditional=True
    ),
    "vq_vae": Kind(_vq_vae, ("mnist", "textures"), (12, 16), (1e-3, 2e-3), "autoencoder", False, (8, 40), 512),
    "lsgan": Kind(_lsgan, ("mnist", "digits", "faces"), (8, 12), (3e-4, 6e-4), "gan", True, (8, 40), 512),
    "conditional_vae": Kind(
        _conditional_vae, ("mnist", "digits", "textures"), (64, 128), (1e-3, 3e-3), "vae", True, conditional=True
    ),
    "v_diffusion": Kind(
        _of_shape(VDiffusion), ("mnist", "textures"), (8, 12), (1e-3, 2e-3), "diffusion", True, (8, 60), 256
    ),
    "r1_gan": Kind(_r1_gan, ("mnist", "textures"), (8, 12), (6e-4, 1e-3), "gan", True, (12, 40), 512),
    "wae": Kind(_wae, ("mnist", "digits", "faces"), (64, 128), (1e-3, 2e-3), "wae", True),
    "glow": Kind(_of_shape(Glow), ("digits8",), (24, 32), (1e-3, 2e-3), "flow", True, (8, 60), 512, noise=1 / 16),
}


# ---- what the referee asks of a model ----


@contextmanager
def at_rest(module: LightningModule, seed: int) -> Iterator[None]:
    """Puts a module into evaluation mode, with random numbers of its own, and back again."""
    modes = [(part, part.training) for part in module.modules()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


def drawn(module: LightningModule, data: Data, n: int) -> Tensor:
    """Returns n samples, or reconstructions where nothing samples."""
    rows = torch.randint(len(data.labels), (n,))
    if isinstance(module, (ConditionalGAN, ConditionalVAE)):
        return module.sample(n, data.labels[rows])
    if isinstance(module, VQVAE):
        return module(data.images[rows])
    if isinstance(module, GAN):
        return module(torch.randn(n, module.latent_dim))
    return module.sample(n)


def influences(module: LightningModule, n: int = 48) -> list[float] | None:
    """Returns how far images move when one latent dimension is drawn anew, for each; None without such latents."""
    if isinstance(module, ConditionalVAE) or not isinstance(module, (GAN, VAE, WAE)):
        return None
    decode = module if isinstance(module, GAN) else module.decode
    length = int(module.latent_dim)
    z = torch.randn(n, length)
    changed = z.repeat(length, 1, 1)
    changed[torch.arange(length), :, torch.arange(length)] = torch.randn(length, n)
    moved = decode(changed.flatten(0, 1)).view(length, n, -1) - decode(z).view(n, -1)
    return moved.square().mean((1, 2)).sqrt().tolist()


def probe(module: LightningModule, data: Data, n: int = 1000) -> list[float] | None:
    """Returns the share of each class that ridge regression recognises by latents; None where nothing encodes."""
    if not isinstance(module, (VAE, WAE, RealNVP, Glow)):
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(data.labels), generator=generator)[: 2 * n]
    given = (data.images[rows], data.labels[rows]) if isinstance(module, ConditionalVAE) else (data.images[rows],)
    latents = module.encode(*given)
    latents = latents[0] if isinstance(latents, tuple) else latents
    if not latents.isfinite().all():
        return [math.nan] * data.num_classes
    latents = torch.cat([latents, torch.ones(len(latents), 1)], 1).double()
    labels = data.labels[rows]
    half = len(rows) // 2
    x, y = latents[:half], F.one_hot(labels[:half], data.num_classes).double()
    weights = torch.linalg.solve(x.T @ x + 1e-2 * half * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    right = (latents[half:] @ weights).argmax(1) == labels[half:]
    return [float(right[labels[half:] == c].double().mean()) for c in range(data.num_classes)]
