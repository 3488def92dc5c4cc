"""A coupling flow of two moons or of digits, with monitors of its latent dimensions: ``python -m example_models.flow``.

``--core 1`` adds a reconstruction from the first latent dimension alone to the likelihood. This aligns the latents: one
dimension represents the data, and the other the detail. The example needs zuko, which the extra ``examples`` installs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import zuko
from lightning.pytorch import LightningModule
from sklearn.datasets import make_moons
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from example_models.running import monitored_run, options_parser, print_next_steps, seeded
from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, ManifoldEntropyMonitor, Monitor

FAULTS = ("dead",)


class Flow(LightningModule):
    """Affine coupling layers with a standard normal prior.

    Args:
        features: The length L of the data and of the latents.
        shape: The shape of one datum; images have (1, 8, 8).
        core: The number of leading latent dimensions that alone must reconstruct the data; 0 for no such loss.
        weight: The weight of this reconstruction loss.
        transforms: The number of coupling layers.
        hidden: The width of their networks.
        lr: The learning rate.
    """

    def __init__(
        self,
        features: int = 2,
        shape: tuple[int, ...] = (2,),
        core: int = 0,
        weight: float = 10.0,
        transforms: int = 6,
        hidden: int = 64,
        lr: float = 2e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.latent_dim = features
        self.flow = zuko.flows.NICE(features, transforms=transforms, hidden_features=(hidden, hidden))

    def encode(self, x: Tensor) -> Tensor:
        """Returns the latents (N, L) of data (N, ...)."""
        z: Tensor = self.flow().transform(x.flatten(1))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Returns the data (N, ...) of latents (N, L)."""
        x: Tensor = self.flow().transform.inv(z)
        return x.view(-1, *self.hparams["shape"])

    def log_volume(self, z: Tensor) -> Tensor:
        """Returns ``log |det dx/dz|`` (N,) at latents (N, L)."""
        volume: Tensor = self.flow().transform.inv.call_and_ladj(z)[1]
        return volume

    def sample(self, n: int) -> Tensor:
        """Returns data (n, ...), decoded from latents of the prior."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative log likelihood in nats, plus the weighted reconstruction loss of the core."""
        x = batch[0].flatten(1)
        nll: Tensor = -self.flow().log_prob(x).mean()
        self.log("nll", nll, prog_bar=True)
        core = self.hparams["core"]
        if not core:
            return nll
        z = self.encode(x)
        truncated = torch.cat([z[:, :core], torch.zeros_like(z[:, core:])], 1)
        error = (self.decode(truncated).flatten(1) - x).square().sum(1).mean()
        loss: Tensor = nll + self.hparams["weight"] * error
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class FaultyFlow(Flow):
    """A flow with a planted fault: in evaluation mode, dimension 1 has no effect from epoch ``start`` on."""

    def __init__(self, start: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start = start

    def decode(self, z: Tensor) -> Tensor:
        """Returns data, with the fault in them from its first epoch on."""
        epoch = self.current_epoch if self._trainer is not None else 0
        if not self.training and epoch >= self.start:
            z = z.clone()
            z[:, 1] = 0
        return super().decode(z)


def moon_batches(n: int = 2048, noise: float = 0.1, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Returns a loader of shuffled batches of points (N, 2) on two half circles, standardized."""
    points = torch.from_numpy(make_moons(n, noise=noise, random_state=seed)[0]).float()
    points = (points - points.mean(0)) / points.std(0)
    return DataLoader(TensorDataset(points), batch_size=128, shuffle=True, drop_last=True)


def digit_batches(seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Returns a loader of shuffled batches of 8x8 digits in about -1..1.

    Noise of the size of a grey level is added, since a density of discrete values is unbounded.
    """
    images, labels = digits(8)
    images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) / 16
    return DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True, drop_last=True)


def main(arguments: list[str] | None = None) -> CollapseStopping:
    """Trains the model with its monitors, and prints how the run ended."""
    parser = options_parser("Trains a coupling flow and monitors its latent dimensions.", FAULTS)
    parser.add_argument("--data", choices=("moons", "digits"), default="digits")
    parser.add_argument("--core", type=int, default=0, help="number of dimensions that alone must reconstruct the data")
    options = parser.parse_args(arguments)
    seeded(options.seed)
    kind: Literal["moons", "digits"] = options.data
    own: dict[str, Any] = {"core": options.core}
    monitors: list[Monitor[Any, Any]] = [ManifoldEntropyMonitor(log_volume="log_volume")]
    if kind == "digits":
        own |= {"features": 64, "shape": (1, 8, 8), "hidden": 128}
        monitors.append(CosineMeanSimilarityMonitor(num_regions=4))
    model = FaultyFlow(options.start, **own) if options.fault else Flow(**own)
    data = moon_batches() if kind == "moons" else digit_batches()
    stopping = monitored_run(f"flow_{kind}", model, data, monitors, options)
    print_next_steps("flow", options, "dimension 1 has no effect")
    return stopping


if __name__ == "__main__":
    main()
