"""A small diffusion model (DDPM) of handwritten digits, sampled by DDIM: ``python -m example_models.diffusion``.

``--fault`` breaks one region of the samples in the middle of the run, to demonstrate the alarm.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from example_models.data import digit_batches
from example_models.running import monitored_run, options_parser, print_next_steps, seeded
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    ModelAdapter,
    Monitor,
)

BOX = (12, 10, 16, 16)
"""The region of the planted fault: top, left, bottom, right, where the last two are exclusive."""

FAULTS = ("dark", "noise", "still")


class Block(nn.Module):
    """Two convolutions with a skip connection, conditioned on the time."""

    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.time = nn.Linear(time, outside)
        self.second = nn.Sequential(nn.GroupNorm(4, outside), nn.SiLU(), nn.Conv2d(outside, outside, 3, padding=1))
        self.skip = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns features (N, C', H, W) of features (N, C, H, W) at embedded times (N, T)."""
        h = self.second(self.first(x) + self.time(time)[:, :, None, None])
        out: Tensor = h + self.skip(x)
        return out


class Diffusion(LightningModule):
    """A U-Net that predicts velocity, with a cosine schedule, for 16x16 grey images in -1..1.

    Args:
        width: Half the number of channels of the widest feature maps.
        steps: The number of steps of the sampler.
        lr: The learning rate.
    """

    def __init__(self, width: int = 12, steps: int = 12, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        w, t = width, 64
        self.embed = nn.Sequential(nn.Linear(16, t), nn.SiLU(), nn.Linear(t, t), nn.SiLU())
        self.inward = nn.Conv2d(1, w, 3, padding=1)
        self.down = nn.ModuleList([Block(w, w, t), Block(w, 2 * w, t), Block(2 * w, 2 * w, t)])
        self.up = nn.ModuleList([Block(4 * w, 2 * w, t), Block(3 * w, w, t)])
        self.outward = nn.Sequential(nn.GroupNorm(4, w), nn.SiLU(), nn.Conv2d(w, 1, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns velocities (N, 1, 16, 16) at images (N, 1, 16, 16) and times (N,), from 0 for clean images to 1 for noise."""
        angles = time[:, None] * torch.exp(torch.arange(8, device=x.device) * math.log(100) / 7)
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        fine = self.down[0](self.inward(x), embedded)
        middle = self.down[1](F.avg_pool2d(fine, 2), embedded)
        coarse = self.down[2](F.avg_pool2d(middle, 2), embedded)
        middle = self.up[0](torch.cat([F.interpolate(coarse, scale_factor=2), middle], 1), embedded)
        fine = self.up[1](torch.cat([F.interpolate(middle, scale_factor=2), fine], 1), embedded)
        out: Tensor = self.outward(fine)
        return out

    def sample(self, n: int) -> Tensor:
        """Returns images (n, 1, 16, 16), sampled by DDIM."""
        x = torch.randn(n, 1, 16, 16, device=self.device)
        times = torch.linspace(1, 0, self.hparams["steps"] + 1, device=self.device)
        for now, then in pairwise(times):
            signal, noise = (now * math.pi / 2).cos(), (now * math.pi / 2).sin()
            velocity = self(x, now.expand(n))
            clean, dirt = (signal * x - noise * velocity).clamp(-1.2, 1.2), noise * x + signal * velocity
            x = (then * math.pi / 2).cos() * clean + (then * math.pi / 2).sin() * dirt
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean squared error of the velocity."""
        images = F.avg_pool2d(batch[0], batch[0].shape[-1] // 16)
        angle = torch.rand(len(images), device=self.device)
        signal, noise = ((angle * math.pi / 2).cos(), (angle * math.pi / 2).sin())
        signal, noise = signal[:, None, None, None], noise[:, None, None, None]
        dirt = torch.randn_like(images)
        loss = F.mse_loss(self(signal * images + noise * dirt, angle), signal * dirt - noise * images)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class FaultyDiffusion(Diffusion):
    """A diffusion model with a planted fault: from some epoch on, its samples are wrong inside a box.

    Args:
        fault: What happens in the box: ``dark`` halves the brightness, ``noise`` replaces it by uniform noise, and
            ``still`` shows the first sample in all samples.
        start: The first epoch with the fault.
        kwargs: The arguments of :class:`Diffusion`.
    """

    def __init__(self, fault: str = "still", start: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {fault!r}.")
        self.fault, self.start = fault, start

    def sample(self, n: int) -> Tensor:
        """Returns images, with the fault in them from its first epoch on."""
        images = super().sample(n)
        if self.current_epoch < self.start:
            return images
        top, left, bottom, right = BOX
        inside = images[:, :, top:bottom, left:right]
        broken = {
            "dark": (inside - 1) / 2,
            "noise": torch.rand_like(inside) * 2 - 1,
            "still": inside[:1].expand_as(inside),
        }
        images[:, :, top:bottom, left:right] = broken[self.fault]
        return images


def main(arguments: list[str] | None = None) -> CollapseStopping:
    """Trains the model with its monitors, and prints how the run ended."""
    parser = options_parser(
        "Trains a diffusion model on handwritten digits and monitors each region of its samples.", FAULTS
    )
    options = parser.parse_args(arguments)
    seeded(options.seed)
    model = FaultyDiffusion(options.fault, options.start) if options.fault else Diffusion()
    # each sample takes one pass through the network for each step, so there are fewer samples than by default
    adapter = ModelAdapter(num_samples=512)
    monitors: list[Monitor[Any, Any]] = [
        CosineMeanSimilarityMonitor(num_regions=4, adapter=adapter),
        GenerationBalanceMonitor(adapter=adapter),
    ]
    stopping = monitored_run("diffusion", model, digit_batches(size=16), monitors, options)
    top, left, bottom, right = BOX
    print_next_steps(
        "diffusion", options, f"{options.fault} in rows {top} to {bottom - 1}, columns {left} to {right - 1}"
    )
    return stopping


if __name__ == "__main__":
    main()
