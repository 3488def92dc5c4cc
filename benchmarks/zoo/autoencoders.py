"""Small variational and other autoencoders in the manner of well-known tutorials."""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-any-return, attr-defined, operator, index, arg-type"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Autoencoder(LightningModule):
    """An encoder, and a decoder of normal noise.

    Args:
        encoder: From images.
        decoder: From latents (N, L) to images.
        latent_dim: L.
        lr: Learning rate.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, lr: float) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.picture = nn.Identity()
        self.latent_dim, self.lr = latent_dim, lr

    def decode(self, z: Tensor) -> Tensor:
        """Returns images."""
        return self.picture(self.decoder(z))

    def sample(self, n: int) -> Tensor:
        """Returns n images."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class VAE(Autoencoder):
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
        super().__init__(encoder, decoder, latent_dim, lr)
        self.beta, self.warmup = beta, warmup

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance, (N, L) each."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructions, mean and log variance."""
        mu, logvar = self.encode(x)
        return self.decode(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), mu, logvar

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative lower bound."""
        x, _ = batch
        return self.bound(x, *self(x))

    def bound(self, x: Tensor, recon: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """Returns the negative lower bound."""
        error = F.mse_loss(recon, x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
        weight = self.beta * (min(1.0, (self.global_step + 1) / self.warmup) if self.warmup else 1.0)
        return error + weight * kl


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
        return self.bound(x, *self(x, labels))


class WAE(Autoencoder):
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
        super().__init__(encoder, decoder, latent_dim, lr)
        self.weight = weight

    def encode(self, x: Tensor) -> Tensor:
        """Returns latents (N, L)."""
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns reconstructions."""
        return self.decode(self.encode(x))

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
