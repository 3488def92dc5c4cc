"""A DCGAN of handwritten digits, with monitors of each region of its images: ``python -m example_models.gan``.

``--fault`` breaks one region of the generated images in the middle of the run, as a broken upsampling layer or a
saturated channel would, to demonstrate the alarm. The fault is planted; the training is real.
"""

from __future__ import annotations

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
    KStarMonitor,
    Monitor,
    RegionalPrimitivesMonitor,
)

BOX = (24, 20, 32, 32)
"""The region of the planted fault: top, left, bottom, right, where the last two are exclusive."""

FAULTS = ("frozen", "blurred", "dark", "noise", "slide")


class GAN(LightningModule):
    """A small DCGAN with the non-saturating loss, for 32x32 grey images.

    Args:
        latent_dim: The length of the noise.
        width: A quarter of the number of channels of the widest feature maps.
        lr: The learning rate of both networks.
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
        """Returns images (N, 1, 32, 32) in -1..1 from noise (N, latent_dim)."""
        images: Tensor = self.generator(z)
        return images

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Takes one step of the discriminator and one of the generator."""
        real = batch[0]
        optimizer_d, optimizer_g = self.optimizers()  # type: ignore[attr-defined]
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
        """Returns one Adam for each network, as in the DCGAN paper."""
        return [
            torch.optim.Adam(network.parameters(), lr=self.hparams["lr"], betas=(0.5, 0.999))
            for network in (self.discriminator, self.generator)
        ]


class FaultyGAN(GAN):
    """A GAN with a planted fault: in evaluation mode, its images are wrong inside a box from some epoch on.

    Wrong statistics of BatchNorm or a wrong cast at inference have the same effect: training continues and no loss
    changes, since the fault does not occur in training mode.

    Args:
        fault: What happens in the box: ``frozen`` shows one image for all noise, ``blurred`` shows the mean image,
            ``dark`` halves the brightness, ``noise`` shows uniform noise, and ``slide`` blurs by a tenth more each epoch.
        start: The first epoch with the fault.
        box: The top, left, bottom and right of the box, where the last two are exclusive.
        kwargs: The arguments of :class:`GAN`.
    """

    def __init__(
        self, fault: str = "frozen", start: int = 20, box: tuple[int, int, int, int] = BOX, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {fault!r}.")
        self.fault, self.start, self.box = fault, start, box

    def forward(self, z: Tensor) -> Tensor:
        """Returns images, with the fault in them from its first epoch on."""
        images = super().forward(z)
        epoch = self.current_epoch if self._trainer is not None else 0
        if self.training or epoch < self.start:
            return images
        return torch.where(self.planted(), self.broken(images, epoch), images)

    def planted(self) -> Tensor:
        """Returns (32, 32) bool, true inside the box."""
        top, left, bottom, right = self.box
        inside = torch.zeros(32, 32, dtype=torch.bool, device=self.device)
        inside[top:bottom, left:right] = True
        return inside

    def broken(self, images: Tensor, epoch: int) -> Tensor:
        """Returns images of which the box shows the fault."""
        mean = images.mean(0, keepdim=True).expand_as(images)
        if self.fault == "frozen":
            return super().forward(torch.zeros(1, self.hparams["latent_dim"], device=self.device)).expand_as(images)
        if self.fault == "blurred":
            return mean
        if self.fault == "dark":
            return (images - 1) / 2
        if self.fault == "noise":
            return torch.rand_like(images) * 2 - 1
        return torch.lerp(images, mean, min(1.0, 0.1 * (epoch - self.start + 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


def main(arguments: list[str] | None = None) -> CollapseStopping:
    """Trains the model with its monitors, and prints how the run ended."""
    parser = options_parser("Trains a GAN on handwritten digits and monitors each region of its images.", FAULTS)
    parser.add_argument("--lr", type=float, default=2e-4)
    options = parser.parse_args(arguments)
    seeded(options.seed)
    model = FaultyGAN(options.fault, options.start, lr=options.lr) if options.fault else GAN(lr=options.lr)
    monitor = CosineMeanSimilarityMonitor(num_regions=5)
    monitors: list[Monitor[Any, Any]] = [
        monitor,
        GenerationBalanceMonitor(),
        # the last features of the discriminator may separate the ten digits, although it is trained without labels
        KStarMonitor("discriminator.7"),
        RegionalPrimitivesMonitor(),
    ]
    stopping = monitored_run("gan", model, digit_batches(), monitors, options)
    regions = monitor.region_map
    if isinstance(model, FaultyGAN) and regions is not None:
        for alarm in stopping.alarms:
            if alarm.label in regions.names:
                overlap = regions.overlap(regions.names.index(alarm.label), model.planted())
                print(f"The overlap of {alarm.label} with the planted box is {overlap:.2f} (intersection over union).")
    rows, columns = f"rows {BOX[0]} to {BOX[2] - 1}", f"columns {BOX[1]} to {BOX[3] - 1}"
    print_next_steps("gan", options, f"{options.fault} in {rows}, {columns}")
    return stopping


if __name__ == "__main__":
    main()
