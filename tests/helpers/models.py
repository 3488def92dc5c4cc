"""Small models that tests train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from example_models.data import digits


class TinyGAN(LightningModule):
    """A GAN with everything that an evaluation can disturb: BatchNorm, dropout, a frozen part and two optimizers."""

    def __init__(self, size: int = 8, latent_dim: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.latent_dim, self.size = latent_dim, size
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.1),
            nn.ReLU(),
            nn.Linear(16, size * size),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 16), nn.LeakyReLU(), nn.Linear(16, 1))
        self.still = nn.BatchNorm1d(3).eval()

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).view(-1, 1, self.size, self.size)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0] if isinstance(batch, (list, tuple)) else batch["image"] if isinstance(batch, dict) else batch
        d, g = self.optimizers()
        fake = self(torch.randn(len(real), self.latent_dim, device=self.device))
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        d.zero_grad()
        self.manual_backward(loss)
        d.step()
        loss = F.softplus(-self.discriminator(fake)).mean()
        g.zero_grad()
        self.manual_backward(loss)
        g.step()
        self.log("loss_g", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.discriminator, self.generator)]


class ScriptedGenerator(LightningModule):
    """Returns real digits as samples, changed by ``script(images, epoch)``, so that the truth about a fault is known."""

    def __init__(self, script: Any = None, size: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = script
        self.pool = digits(size)[0]

    def sample(self, n: int) -> Tensor:
        # each epoch has other images, so that a healthy run fluctuates
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + self.current_epoch)
        images = self.pool[torch.randint(len(self.pool), (n,), generator=generator)]
        return images if self.script is None else self.script(images, self.current_epoch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight * 0).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SmallVAE(LightningModule):
    """A small VAE with convolutions, of which each subclass changes one part."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim = 3
        self.encoder_net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder_net = nn.Sequential(
            nn.Linear(3, 32), nn.ReLU(), nn.Unflatten(1, (2, 4, 4)), nn.BatchNorm2d(2), nn.Dropout(0.1),
            nn.ConvTranspose2d(2, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder_net(images).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder_net(z)

    def sample(self, n: int) -> Tensor:
        return self.decode(self.noise(n, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self.encode(batch[0])
        images = self.decode(mean + (log_variance / 2).exp() * self.noise(*mean.shape))
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return (images - batch[0]).square().flatten(1).sum(1).mean() + 0.05 * kl

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)
