"""The kinds of models of the zoo, and what the referee asks of a model.

Each makes its images through ``self.picture``, which does nothing, so that faults of the output have a place.
"""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type"

from __future__ import annotations

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

from benchmarks.zoo.autoencoders import VAE, VQVAE, WAE, Autoencoder, ConditionalVAE
from benchmarks.zoo.data import Data
from benchmarks.zoo.flows import DDPM, Flow, FlowMatching, Glow, RealNVP, VDiffusion
from benchmarks.zoo.gans import (
    GAN,
    LSGAN,
    R1GAN,
    WGANGP,
    ConditionalGAN,
    HingeGAN,
    Residual,
    Shape,
    convolutional_critic,
    convolutional_generator,
    mlp,
)


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


def influences(module: LightningModule) -> list[float] | None:
    """Returns how far images move when one latent dimension is drawn anew, for each; None without such latents."""
    if isinstance(module, ConditionalVAE) or not isinstance(module, (GAN, Autoencoder)):
        return None
    return influences_in(module if isinstance(module, GAN) else module.decode, int(module.latent_dim))


def influences_in(decode: Callable[[Tensor], Tensor], length: int, n: int = 48) -> list[float]:
    """Returns how far images move when one of ``length`` latent dimensions is drawn anew, for each."""
    z = torch.randn(n, length)
    changed = z.repeat(length, 1, 1)
    changed[torch.arange(length), :, torch.arange(length)] = torch.randn(length, n)
    moved = decode(changed.flatten(0, 1)).view(length, n, -1) - decode(z).view(n, -1)
    return moved.square().mean((1, 2)).sqrt().tolist()


def probe(module: LightningModule, data: Data, n: int = 1000) -> list[float] | None:
    """Returns the share of each class that ridge regression recognises by latents; None where nothing encodes."""
    if not isinstance(module, (Autoencoder, Flow)):
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
