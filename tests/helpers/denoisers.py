"""Diffusion and flow matching models as people write them, all with one small network."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn


class Network(nn.Module):
    """Two convolutions and a multiple of the input, all of which are given the time."""

    def __init__(self, channels: int = 1, outside: int | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.scale = nn.Conv2d(channels, 12, 3, padding=1), scale
        self.time, self.second = nn.Linear(1, 12), nn.Conv2d(12, outside or channels, 3, padding=1)
        self.multiple = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.float().view(-1, 1) / self.scale
        h = self.second(F.silu(self.first(x) + self.time(time)[:, :, None, None]))
        return h + self.multiple(time)[:, :, None, None] * x.repeat(1, h.shape[1] // x.shape[1], 1, 1)


class Adam(LightningModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Validation batches are held-out images."""


class DDPM(Adam):
    """Discrete times with the betas of Ho et al.; predicts noise, data or a velocity, with some loss."""

    def __init__(self, prediction: str = "noise", loss: str = "squared") -> None:
        super().__init__()
        self.unet, self.prediction, self.kind = Network(scale=1000), prediction, loss
        self.register_buffer("alphas_cumprod", (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0]
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=x.device)
        variance = self.alphas_cumprod[t][:, None, None, None]
        a, b = variance.sqrt(), (1 - variance).sqrt()
        target = {"noise": noise, "data": x, "velocity": a * noise - b * x}[self.prediction]
        out = self.unet(a * x + b * noise, t)
        if self.kind == "huber":
            return F.smooth_l1_loss(out, target, beta=0.1)
        if self.kind == "absolute":
            return F.l1_loss(out, target)
        errors = (out - target).square().mean((1, 2, 3))
        weights = {
            "squared": torch.ones_like(errors),
            "min-SNR": (variance / (1 - variance)).clamp(max=5).flatten(),
            "half": (t < 500).float(),
        }[self.kind]
        return {"loss": (weights * errors).mean()}


class LearnedVariance(Adam):
    """Twice the channels, keyword arguments and an output with attributes, as of diffusers."""

    class Inner(Network):
        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
            return SimpleNamespace(sample=super().forward(sample, timestep))

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"net": self.Inner(1, 2)})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise, t = torch.randn(x.shape), torch.rand(len(x))
        a, b = (t * math.pi / 2).cos()[:, None, None, None], (t * math.pi / 2).sin()[:, None, None, None]
        out = self.model["net"](a * x + b * noise, timestep=t, class_labels=y).sample
        mean, variance = out.chunk(2, dim=1)
        return F.mse_loss(mean, noise) + 1e-3 * variance.square().mean()


class Flow(Adam):
    """Flow matching of Lipman et al., from noise to data; with optimal transport between both if ``paired``."""

    def __init__(self, paired: bool = False, width: float = 0.0) -> None:
        super().__init__()
        self.field, self.paired, self.width = Network(), paired, width

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        z, t = torch.randn_like(x), torch.rand(len(x)).type_as(x)
        if self.paired:
            costs = torch.cdist(x.flatten(1), z.flatten(1))
            z = z[torch.as_tensor(linear_sum_assignment(costs.numpy())[1])]
        time = t[:, None, None, None]
        noisy = time * x + (1 - time) * z
        if self.width:
            noisy = noisy + self.width * torch.randn_like(x)
        return F.mse_loss(self.field(noisy, t), x - z)


class Rows(Adam):
    """Rows with the time as one more column, as torchcfm's MLP takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(65, 32), nn.SiLU(), nn.Linear(32, 64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        z, t = torch.randn_like(x), torch.rand(len(x), 1)
        return F.mse_loss(self.model(torch.cat([t * x + (1 - t) * z, t], 1)), z - x)


class EDM(Adam):
    """Noise is added to data, and the network is preconditioned, as by Karras et al."""

    class Preconditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            s = sigma.view(-1, 1, 1, 1)
            total = s.square() + 0.25
            inner = self.net(x / total.sqrt(), sigma.log() / 4)
            return 0.25 / total * x + 0.5 * s / total.sqrt() * inner

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = self.Preconditioned()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        sigma = (1.2 * torch.randn(len(x)) - 1.2).exp()
        s = sigma.view(-1, 1, 1, 1)
        out = self.denoiser(x + s * torch.randn_like(x), sigma)
        return ((s.square() + 0.25) / (0.5 * s).square() * (out - x).square()).mean()


class Latent(Adam):
    """A diffusion model in the latents of a first stage, which are sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.unet = nn.Conv2d(1, 8, 2, 2).requires_grad_(False), Network(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self.stage(batch[0]).chunk(2, dim=1)
        z = 2 * (mean + torch.randn_like(mean) * (log_variance / 2).exp())
        noise, t = torch.randn_like(z), torch.rand(len(z))
        a, b = (t * math.pi / 2).cos()[:, None, None, None], (t * math.pi / 2).sin()[:, None, None, None]
        return F.mse_loss(self.unet(a * z + b * noise, t), noise)


class WithAverage(Flow):
    """Keeps averaged weights, which are updated with a decay; never with 1."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.ema_field, self.decay = copy.deepcopy(self.field).requires_grad_(False), decay

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for average, weight in zip(self.ema_field.parameters(), self.field.parameters(), strict=True):
                average.lerp_(weight, 1 - self.decay)


class OneLevel(Adam):
    """A denoising autoencoder, whose noise has one level."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        return F.mse_loss(self.net(x + 0.1 * torch.randn_like(x), torch.zeros(len(x))), x)


class Manual(Flow):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
