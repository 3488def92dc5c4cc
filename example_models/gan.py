"""A DCGAN on real handwritten digits, watched region by region: ``python -m example_models.gan``.

``--fault`` breaks one region of what the generator draws in the middle of the run, as a broken upsampling layer or a
saturated channel would, so that the alarm has something to find. The fault is planted; the training is real.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from example_models.data import digit_batches
from lightning_gendiag import CollapseStopping, CollapseWarning, CosineMeanSimilarityMonitor

FAULTS = ("frozen", "blurred", "dark", "noise", "slide")


class GAN(LightningModule):
    """A small DCGAN with the non-saturating loss, for 32x32 grey images.

    Args:
        latent_dim: length of the noise.
        width: channels of the widest feature maps' quarter.
        lr: learning rate of both networks.
    """

    def __init__(self, latent_dim: int = 32, width: int = 16, lr: float = 2e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        w = width
        self.generator = nn.Sequential(
            nn.Unflatten(1, (latent_dim, 1, 1)),
            nn.ConvTranspose2d(latent_dim, 4 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
            nn.ConvTranspose2d(w, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, w, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * w, 1, 4, 1, 0), nn.Flatten(),
        )  # fmt: skip
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        """Images (N, 1, 32, 32) in -1..1 from noise (N, latent_dim)."""
        images: Tensor = self.generator(z)
        return images

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of the discriminator, one of the generator."""
        real = batch[0]
        optimizer_d, optimizer_g = self.optimizers()  # type: ignore[attr-defined, misc]
        fake = self(torch.randn(len(real), self.hparams["latent_dim"], device=self.device))

        loss_d = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        optimizer_d.zero_grad()
        self.manual_backward(loss_d)
        optimizer_d.step()

        loss_g = F.softplus(-self.discriminator(fake)).mean()
        optimizer_g.zero_grad()
        self.manual_backward(loss_g)
        optimizer_g.step()
        self.log_dict({"loss_d": loss_d, "loss_g": loss_g}, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for each, as in the DCGAN paper."""
        return [
            torch.optim.Adam(network.parameters(), lr=self.hparams["lr"], betas=(0.5, 0.999))
            for network in (self.discriminator, self.generator)
        ]


class FaultyGAN(GAN):
    """A GAN whose generator breaks inside a box from some epoch on.

    Args:
        fault: ``frozen``: one image there, whatever the noise; ``blurred``: the batch's mean; ``dark``: half as bright;
            ``noise``: uniform noise; ``slide``: blurred more and more, by a tenth each epoch.
        start: the epoch from which on.
        box: top, left, bottom, right of the region, the last two exclusive.
        kwargs: as for :class:`GAN`.
    """

    def __init__(
        self, fault: str = "frozen", start: int = 20, box: tuple[int, int, int, int] = (16, 0, 32, 12), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {fault!r}.")
        self.fault, self.start, self.box = fault, start, box

    def forward(self, z: Tensor) -> Tensor:
        """Images, with the fault in them once it has begun."""
        epoch = self.current_epoch if self._trainer is not None else 0
        if epoch < self.start:
            return super().forward(z)
        # the last image is that of the prior's mean
        images = super().forward(F.pad(z, (0, 0, 0, 1)))
        images, still = images[:-1], images[-1:]
        top, left, bottom, right = self.box
        inside = torch.zeros(images.shape[-2:], dtype=torch.bool, device=images.device)
        inside[top:bottom, left:right] = True
        broken = {
            "frozen": lambda: still.detach().expand_as(images),
            "blurred": lambda: images.mean(0, keepdim=True).expand_as(images),
            "dark": lambda: (images - 1) / 2,
            "noise": lambda: torch.rand_like(images) * 2 - 1,
            "slide": lambda: torch.lerp(
                images, images.mean(0, keepdim=True).expand_as(images), min(1.0, 0.1 * (epoch - self.start + 1))
            ),
        }[self.fault]()
        return torch.where(inside, broken, images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


def main(arguments: list[str] | None = None) -> CollapseStopping:
    """Train, watch, and say how it ended."""
    parser = argparse.ArgumentParser(description="A GAN on handwritten digits, watched region by region.")
    parser.add_argument("--fault", choices=FAULTS, help="break one region in the middle of the run")
    parser.add_argument("--start", type=int, default=20, help="epoch at which it breaks")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that TensorBoard reads")
    options = parser.parse_args(arguments)

    # Lightning's advice on workers and on logging intervals does not help with data that is in memory
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*litlogger.*|.*litmodels.*")
    seed_everything(options.seed, verbose=False)
    model = FaultyGAN(options.fault, options.start, lr=options.lr) if options.fault else GAN(lr=options.lr)
    stopping = CollapseStopping()
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[CosineMeanSimilarityMonitor(num_regions=5), stopping],
        logger=TensorBoardLogger(options.runs, name=f"gan_{options.fault or 'healthy'}"),
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # told below
        warnings.simplefilter("ignore", CollapseWarning)
        trainer.fit(model, digit_batches())

    print()
    if stopping.findings:
        print(f"STOPPED in epoch {stopping.findings[0].epoch}:")
        for finding in stopping.findings:
            print(f"  {finding}")
    else:
        print(f"HEALTHY: {trainer.current_epoch} epochs, and no region of the image fell from its level.")
    if options.fault:
        print(f"The fault was planted: {options.fault} in rows 16-31, columns 0-11, from epoch {options.start} on.")
        print("A run without it: .venv/bin/python -m example_models.gan")
    print(f"See both:         .venv/bin/tensorboard --logdir {options.runs}    (Custom Scalars and Images)")
    return stopping


if __name__ == "__main__":
    main()
