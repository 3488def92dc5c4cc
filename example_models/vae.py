"""A VAE of handwritten digits, with monitors of its latents and its images: ``python -m example_models.vae``.

``--latent-dim 2`` or ``3`` gives a latent space that can be plotted: the panels show classes that the prior misses,
margins, and a grey area. ``--beta`` weighs the KL term: large values switch off one latent dimension after the other,
which raises no alarm while it happens at the start of training. ``--fault`` breaks the decoder in the middle of the run,
to demonstrate the alarm.
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
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    Monitor,
    PosteriorKLMonitor,
)

FAULTS = ("dead", "entangled", "collapse", "ignored")


class VAE(LightningModule):
    """A small convolutional VAE with Gaussian latents and a Gaussian likelihood, for 32x32 grey images.

    Args:
        latent_dim: The number of latent dimensions L.
        beta: The weight of the KL term.
        width: Half the number of channels of the widest feature maps.
        lr: The learning rate.
        noise: The standard deviation of the likelihood.
        warmup: The number of epochs in which the weight of the KL term grows from 0 to beta.
    """

    def __init__(
        self,
        latent_dim: int = 10,
        beta: float = 1.0,
        width: int = 16,
        lr: float = 1e-3,
        noise: float = 0.3,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        w = width
        self.encoder = nn.Sequential(
            nn.Conv2d(1, w, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 4, 2, 1), nn.SiLU(), nn.Flatten(),
            nn.Linear(32 * w, 2 * latent_dim),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 32 * w), nn.Unflatten(1, (2 * w, 4, 4)), nn.SiLU(),
            nn.ConvTranspose2d(2 * w, 2 * w, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(w, 1, 4, 2, 1),
        )  # fmt: skip

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the log variance (N, L) of the posterior."""
        mean, log_variance = self.encoder(images).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Returns images (N, 1, 32, 32) from latents (N, L)."""
        images: Tensor = self.decoder(z)
        return images

    def sample(self, n: int) -> Tensor:
        """Returns images (n, 1, 32, 32), decoded from latents of the prior."""
        return self.decode(torch.randn(n, self.hparams["latent_dim"], device=self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the negative evidence lower bound in nats per image, with a weight of beta on the KL term."""
        images = batch[0]
        mean, log_variance = self.encode(images)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        variance = self.hparams["noise"] ** 2
        reconstruction = F.mse_loss(self.decode(z), images, reduction="none").flatten(1).sum(1) / (2 * variance)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        self.log_dict({"reconstruction": reconstruction.mean(), "kl": kl.mean()}, prog_bar=True)
        weight = self.hparams["beta"] * min(1.0, self.current_epoch / max(self.hparams["warmup"], 1e-9))
        loss: Tensor = (reconstruction + weight * kl).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class FaultyVAE(VAE):
    """A VAE with a planted fault: from some epoch on, its decoder misuses the latents.

    The fault occurs in evaluation mode only, except for ``ignored``, which occurs in training too.

    Args:
        fault: What happens: with ``dead``, dimension 1 has no effect; with ``entangled``, it has almost the effect of
            dimension 0; with ``collapse``, all dimensions but the first have a fiftieth of their effect; with
            ``ignored``, the decoder gets zeros as latents, so that the posterior collapses.
        start: The first epoch with the fault.
        kwargs: The arguments of :class:`VAE`.
    """

    def __init__(self, fault: str = "dead", start: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, got {fault!r}.")
        self.fault, self.start = fault, start

    def decode(self, z: Tensor) -> Tensor:
        """Returns images, with the fault in them from its first epoch on."""
        epoch = self.current_epoch if self._trainer is not None else 0
        if epoch >= self.start and self.fault == "ignored":
            return super().decode(z * 0)
        if self.training or epoch < self.start:
            return super().decode(z)
        mixing = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        if self.fault == "dead":
            mixing[1, 1] = 0
        elif self.fault == "entangled":
            mixing[1, 1], mixing[1, 0] = 0.2, 1
        else:
            mixing *= 0.02
            mixing[0, 0] = 1
        return super().decode(z @ mixing)


def main(arguments: list[str] | None = None) -> CollapseStopping:
    """Trains the model with its monitors, and prints how the run ended."""
    parser = options_parser("Trains a VAE on handwritten digits and monitors its latents and images.", FAULTS)
    parser.add_argument("--beta", type=float, default=1.0, help="weight of the KL term")
    parser.add_argument("--latent-dim", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=0, help="epochs in which the weight of the KL term grows to beta")
    options = parser.parse_args(arguments)
    seeded(options.seed)
    own = {"latent_dim": options.latent_dim, "beta": options.beta, "warmup": options.warmup}
    model = FaultyVAE(options.fault, options.start, **own) if options.fault else VAE(**own)
    monitors: list[Monitor[Any, Any]] = [
        ManifoldEntropyMonitor(),
        PosteriorKLMonitor(),
        KStarMonitor(),
        CosineMeanSimilarityMonitor(num_regions=5),
        GenerationBalanceMonitor(),
        LatentRegionsMonitor(every_n_epochs=5),
    ]
    stopping = monitored_run("vae", model, digit_batches(), monitors, options)
    planted = {
        "dead": "dimension 1 has no effect",
        "entangled": "dimension 1 has the effect of dimension 0",
        "collapse": "all dimensions but the first have almost no effect",
        "ignored": "the decoder ignores its latents",
    }
    print_next_steps("vae", options, planted.get(options.fault, ""))
    return stopping


if __name__ == "__main__":
    main()
