"""A coupling flow on two moons or on real digits, watched by its latent dimensions: ``python -m example_models.flow``.

``--core 1`` adds a reconstruction from the first latent dimension alone to the likelihood, which aligns the latents:
one dimension carries the data, the other the detail. Needs zuko, in the extra ``examples``.
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
from example_models.running import closing_words, options_parser, seeded, watched_run
from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, ManifoldEntropyMonitor, Monitor

FAULTS = ("dead",)


class Flow(LightningModule):
    """Affine coupling layers with a standard normal prior.

    Args:
        features: length of the data and of the latents.
        shape: of one datum; (1, 8, 8) makes images.
        core: with a number, that many first latent dimensions alone must reconstruct the data.
        weight: of that reconstruction.
        transforms: number of coupling layers.
        hidden: width of their networks.
        lr: learning rate.
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
        """Latents (N, L) of data."""
        z: Tensor = self.flow().transform(x.flatten(1))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Data (N, ...) of latents (N, L)."""
        x: Tensor = self.flow().transform.inv(z)
        return x.view(-1, *self.hparams["shape"])

    def log_volume(self, z: Tensor) -> Tensor:
        """``log |det dx/dz|`` (N,)."""
        volume: Tensor = self.flow().transform.inv.call_and_ladj(z)[1]
        return volume

    def sample(self, n: int) -> Tensor:
        """Data of the prior."""
        return self.decode(torch.randn(n, self.latent_dim, device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Negative log likelihood in nats, and the core's reconstruction."""
        x = batch[0].flatten(1)
        nll: Tensor = -self.flow().log_prob(x).mean()
        self.log("nll", nll, prog_bar=True)
        core = self.hparams["core"]
        if not core:
            return nll
        z = self.encode(x)
        kept = torch.cat([z[:, :core], torch.zeros_like(z[:, core:])], 1)
        error = (self.decode(kept).flatten(1) - x).square().sum(1).mean()
        loss: Tensor = nll + self.hparams["weight"] * error
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class FaultyFlow(Flow):
    """A flow whose dimension 1 does nothing from some epoch on, in evaluation mode only."""

    def __init__(self, start: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start = start

    def decode(self, z: Tensor) -> Tensor:
        """Data, with the fault in them once it has begun."""
        epoch = self.current_epoch if self._trainer is not None else 0
        if not self.training and epoch >= self.start:
            z = z.clone()
            z[:, 1] = 0
        return super().decode(z)


def moon_batches(n: int = 2048, noise: float = 0.1, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches of points (N, 2) on two half circles, standardised."""
    points = torch.from_numpy(make_moons(n, noise=noise, random_state=seed)[0]).float()
    points = (points - points.mean(0)) / points.std(0)
    return DataLoader(TensorDataset(points), batch_size=128, shuffle=True, drop_last=True)


def digit_batches(seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches of 8x8 digits in about -1..1, with noise of the size of a grey level, which densities need."""
    images, labels = digits(8)
    images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) / 16
    return DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True, drop_last=True)


def main(arguments: list[str] | None = None) -> CollapseStopping:
    """Train, watch, and say how it ended."""
    parser = options_parser("A coupling flow, watched by its latent dimensions.", FAULTS)
    parser.add_argument("--data", choices=("moons", "digits"), default="digits")
    parser.add_argument("--core", type=int, default=0, help="so many dimensions alone must reconstruct the data")
    options = parser.parse_args(arguments)
    seeded(options.seed)
    kind: Literal["moons", "digits"] = options.data
    own: dict[str, Any] = {"core": options.core}
    monitors: list[Monitor] = [ManifoldEntropyMonitor(log_volume="log_volume")]
    if kind == "digits":
        own |= {"features": 64, "shape": (1, 8, 8), "hidden": 128}
        monitors.append(CosineMeanSimilarityMonitor(num_regions=4))
    model = FaultyFlow(options.start, **own) if options.fault else Flow(**own)
    data = moon_batches() if kind == "moons" else digit_batches()
    stopping = watched_run(f"flow_{kind}", model, data, monitors, options)
    closing_words("flow", options, "dimension 1 dead")
    return stopping


if __name__ == "__main__":
    main()
