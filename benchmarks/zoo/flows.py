"""Small normalizing flows and diffusion models in the manner of well-known tutorials."""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type"

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from benchmarks.zoo.gans import Shape, mlp


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


class Flow(LightningModule):
    """A normalizing flow of layers that return the logarithm of their determinant as well.

    Args:
        shape: Of images.
        lr: Learning rate.
        layers: Each with ``forward`` and ``inverse``.
    """

    def __init__(self, shape: Shape, lr: float, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.shape, self.lr, self.latent_dim = shape, lr, math.prod(shape)
        self.layers = nn.ModuleList(layers)
        self.picture = nn.Identity()

    def folded(self, x: Tensor) -> Tensor:
        """Returns images in the form in which layers take them."""
        raise NotImplementedError

    def unfolded(self, z: Tensor) -> Tensor:
        """Returns images of what :meth:`folded` returned."""
        raise NotImplementedError

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns latents (N, D) and the logarithm of the determinant (N,)."""
        z, total = self.folded(x), torch.zeros(len(x), device=x.device)
        for layer in self.layers:
            z, determinant = layer(z)
            total = total + determinant
        return z.flatten(1), total

    def encode(self, x: Tensor) -> Tensor:
        """Returns latents (N, D)."""
        return self.transform(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        # latents have the order of folded images, whose shape one image shows
        z = z.view(-1, *self.folded(torch.empty(1, *self.shape)).shape[1:])
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return self.picture(self.unfolded(z))

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


class RealNVP(Flow):
    """A normalizing flow of affine couplings.

    Args:
        shape: Of images.
        width: Of the networks.
        lr: Learning rate.
        layers: Number of couplings.
    """

    def __init__(self, shape: Shape, width: int, lr: float, layers: int = 6) -> None:
        pixels = torch.arange(math.prod(shape))
        board, rows = pixels % 2, pixels // shape[2] % 2
        masks = [board, 1 - board, rows, 1 - rows]
        super().__init__(shape, lr, (Coupling(masks[number % 4].float(), width) for number in range(layers)))

    def folded(self, x: Tensor) -> Tensor:
        """Returns rows (N, D)."""
        return x.flatten(1)

    def unfolded(self, z: Tensor) -> Tensor:
        """Returns images of rows (N, D)."""
        return z.view(-1, *self.shape)


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
        determinant = scale.flatten(1).sum(1) + area * self.log_scale.sum()
        return torch.cat([first, second * scale.exp() + shift], 1), determinant

    def inverse(self, y: Tensor) -> Tensor:
        """Returns what ``forward`` was given."""
        first, second = y.chunk(2, dim=1)
        scale, shift = self.terms(first)
        x = torch.cat([first, (second - shift) * (-scale).exp()], 1)
        return (torch.einsum("ji,njhw->nihw", self.rotation, x) - self.shift) * (-self.log_scale).exp()


class Glow(Flow):
    """A normalizing flow of convolutional couplings on blocks of 2x2 pixels.

    Args:
        shape: Of images.
        width: Of the networks.
        lr: Learning rate.
        layers: Number of steps.
    """

    def __init__(self, shape: Shape, width: int, lr: float, layers: int = 8) -> None:
        super().__init__(shape, lr, (GlowStep(4 * shape[0], width) for _ in range(layers)))

    def folded(self, x: Tensor) -> Tensor:
        """Returns images (N, 4 C, H / 2, W / 2) of blocks."""
        return F.pixel_unshuffle(x, 2)

    def unfolded(self, z: Tensor) -> Tensor:
        """Returns images of blocks."""
        return F.pixel_shuffle(z, 2)


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
