"""Tokenizers whose codebooks collapse in the middle of training, or are of no use from the beginning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_gendiag import Alarm


class Straight(nn.Module):
    """As in taming-transformers: a learned embedding, gradients past it, and flat indices in a tuple."""

    def __init__(self, codes: int = 24, length: int = 6) -> None:
        super().__init__()
        self.n_e, self.embedding = codes, nn.Embedding(codes, length)
        nn.init.uniform_(self.embedding.weight, -1, 1)

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rows = z.permute(0, 2, 3, 1)
        indices = torch.cdist(rows.flatten(0, 2), self.embedding.weight).argmin(1)
        return self.embedding(indices).view(rows.shape).permute(0, 3, 1, 2), indices

    def forward(self, z: Tensor) -> Any:
        quantized, indices = self.nearest(z)
        loss = F.mse_loss(quantized.detach(), z) + F.mse_loss(quantized, z.detach())
        return z + (quantized - z).detach(), loss, (None, None, indices)


class MovingAverage(nn.Module):
    """As in the VQ-VAE-2 of rosinality: a buffer (D, K) that is an average, and the indices come last."""

    def __init__(self, codes: int = 24, length: int = 6) -> None:
        super().__init__()
        self.n_embed = codes
        embed = torch.rand(length, codes) * 2 - 1
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.ones(codes))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, z: Tensor) -> Any:
        rows = z.permute(0, 2, 3, 1)
        flat = rows.flatten(0, 2)
        indices = torch.cdist(flat, self.embed.T).argmin(1)
        if self.training:
            hot = F.one_hot(indices, self.n_embed).float()
            self.cluster_size.mul_(0.9).add_(0.1 * hot.sum(0))
            self.embed_avg.mul_(0.9).add_(0.1 * (flat.T @ hot).detach())
            self.embed.copy_(self.embed_avg / self.cluster_size.clamp(min=1e-3))
        quantized = F.embedding(indices, self.embed.T).view(rows.shape).permute(0, 3, 1, 2)
        return z + (quantized - z).detach(), F.mse_loss(quantized.detach(), z), indices.view(rows.shape[:3])


class Tokenizer(LightningModule):
    """An autoencoder of digits around a quantizer."""

    def __init__(self, quantizer: nn.Module | None = None, width: int = 8, lr: float = 2e-3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 6, 4, 2, 1), nn.BatchNorm2d(6)
        )
        self.quantizer = Straight() if quantizer is None else quantizer
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(6, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()
        )
        self.lr = lr

    def latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.quantizer(self.latents(x))[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        quantized, loss, *_ = self.quantizer(self.latents(batch[0]))
        return F.mse_loss(self.decoder(quantized), batch[0]) + loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Planted(Tokenizer):
    """From an epoch on, latents are at one point ("point"), or all codes but the first two lie far away ("killed").

    With the fault "far", these codes lie far away from the beginning.
    """

    def __init__(self, fault: str = "", start: int = 12, quantizer: Any = Straight) -> None:
        super().__init__(quantizer(), lr=1e-3)
        self.fault, self.start = fault, start
        if fault == "far":
            with torch.no_grad():
                self.quantizer.embedding.weight[2:] += 100

    def latents(self, x: Tensor) -> Tensor:
        z = super().latents(x)
        if self.fault == "point" and self.current_epoch >= self.start:
            return 1e-3 * z + 0.1
        return z

    def on_train_epoch_start(self) -> None:
        if self.fault == "killed" and self.current_epoch == self.start:
            with torch.no_grad():
                self.quantizer.embedding.weight[2:] += 100


def named_codes(alarm: Alarm) -> list[int]:
    """Returns the codes that the label of an alarm names, such as "the codebook, of which codes 2, 5 and 3 more died"."""
    _, _, codes = alarm.label.partition("codes ")
    return [int(code) for code in codes.split(" and ")[0].split(" died")[0].split(", ") if code]
