"""Runs models that processes see differently on one or two processes: ``python -m tests.ways_on_two FOLDER PROCESSES``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from example_models.data import digits
from lightning_gendiag import CosineMeanSimilarityMonitor, GenerativeDiagnostics, ModelAdapter
from lightning_gendiag.model import compat
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, trainer
from tests.helpers.versions import fully_shard

IMAGES, LABELS = digits(8)
ODD = (IMAGES[:37], LABELS[:37])
"""Real images that neither two processes nor chunks of 8 divide evenly."""


class OnOne(TinyGAN):
    """A GAN whose own sampler fails on the second process only."""

    def sample(self, n: int) -> Tensor:
        if self.global_rank == 1:
            raise RuntimeError("a file is missing")
        return torch.ones(n, 1, 8, 8)


class Gathering(TinyGAN):
    """A GAN whose sampler waits for the other process."""

    def sample(self, n: int) -> Tensor:
        images = self(torch.randn(n, self.latent_dim))
        return self.all_gather(images).flatten(0, 1)[:n] if self.trainer.world_size > 1 else images


class Waiting(TinyGAN):
    """A GAN whose sampler waits for the other process by the trainer's strategy."""

    def sample(self, n: int) -> Tensor:
        self.trainer.strategy.barrier()
        return self(torch.randn(n, self.latent_dim))


class Reducing(TinyGAN):
    """A GAN whose sampler waits for the other process by a function of torch."""

    def sample(self, n: int) -> Tensor:
        images = self(torch.randn(n, self.latent_dim))
        torch.distributed.all_reduce(images)
        return images


class Autoencoder(LightningModule):
    """Training does not change it, since two processes train on other batches than one process."""

    rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 3), nn.Linear(3, 64)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(1))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).view(-1, 1, 8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.decode(self.encode(batch[0])) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class VAEOnOne(Autoencoder):
    """A VAE whose own sampler fails on the second process only."""

    def encode(self, x: Tensor) -> Any:
        mean = self.encoder(x.flatten(1))
        return mean, torch.full_like(mean, -1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.decode(self.encode(batch[0])[0]) - batch[0]).square().mean()

    def sample(self, n: int) -> Tensor:
        return OnOne.sample(self, n)  # type: ignore[arg-type]


class Conditional(Autoencoder):
    def sample(self, n: int, labels: Tensor) -> Tensor:
        return self.decode(torch.randn(n, 3) + labels[:, None] / 10)


class Sharded(Autoencoder):
    rate = 0.1

    def configure_model(self) -> None:
        for part in (self.encoder, self.decoder):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def sample(self, n: int) -> Tensor:
        return self.decode(torch.randn(n, 3))


def scalars_of(module: LightningModule, monitor: CosineMeanSimilarityMonitor, processes: int) -> dict[str, float]:
    """Returns the scalars of the last of two evaluations."""
    strategy = "ddp_find_unused_parameters_true" if processes > 1 else "auto"
    own = trainer(monitor, max_epochs=2, limit_train_batches=2, devices=processes, strategy=strategy)
    own.fit(module, batches())
    assert monitor.evaluations == 2
    return {name: float(value) for name, value in monitor.result.scalars().items()}


def left_out_and_weights(module: type[TinyGAN]) -> tuple[str, list[Tensor], list[Tensor]]:
    """Returns why a sampler is left out, and the weights after training with and without diagnostics."""
    diagnostics = GenerativeDiagnostics(sample="sample", max_overhead=None)
    weights = []
    for callbacks in ([diagnostics], []):
        seed_everything(0, verbose=False)
        own, strategy = module(), "ddp_find_unused_parameters_true"
        trainer(*callbacks, devices=2, strategy=strategy).fit(own, batches(shuffle=False))
        weights.append([parameter.detach() for parameter in own.parameters()])
    return diagnostics.left_out["cms"], weights[0], weights[1]


def sharded(*callbacks: Any) -> Sharded:
    """Returns a sharded module after training."""
    seed_everything(0, verbose=False)
    module = Sharded()
    own = trainer(*callbacks, devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    own.fit(module, batches(shuffle=False))
    return module


def held_by(module: Sharded) -> list[Tensor]:
    """Returns this process's part of the weights."""
    return [parameter.detach().to_local() for parameter in module.parameters()]


def refused(monitor: CosineMeanSimilarityMonitor) -> str:
    """Returns the error of a monitor that is attached to a sharded module."""
    try:
        sharded(monitor)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path, processes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options: dict[str, Any] = {"reference": ODD, "num_reference": 37, "num_samples": 50, "chunk_size": 8}

    def monitor(images: str = "auto", per_class: bool = False, **more: Any) -> CosineMeanSimilarityMonitor:
        return CosineMeanSimilarityMonitor(
            num_regions=3,
            images=images,
            per_class=per_class,
            null_splits=8,
            on_error="raise",
            adapter=ModelAdapter(**options, **more),
        )

    report: dict[str, Any] = {}
    for name, module, own in (
        ("reconstructions", Autoencoder, monitor("reconstructions")),
        ("labels", Conditional, monitor(per_class=True, sample="sample", conditional=True)),
    ):
        seed_everything(0, verbose=False)
        report[name] = scalars_of(module(), own, processes)
    if processes > 1:
        seed_everything(0, verbose=False)
        own = monitor()
        scalars_of(OnOne(), own, processes)
        report["way"] = own.view.parts.way("sample").name
        seed_everything(0, verbose=False)
        own = monitor()
        scalars_of(VAEOnOne(), own, processes)
        report["source"] = own.view.source(), own.view.has_prior, own.view.parts.way("reconstruct").name
        named = GenerativeDiagnostics(sample="sample", max_overhead=None)
        trainer(named, devices=2, strategy="ddp_find_unused_parameters_true").fit(OnOne(), batches())
        for module in (Gathering, Waiting, Reducing):
            report[module.__name__] = left_out_and_weights(module)
        report["named"] = named.attached, named.left_out["cms"]
    if processes > 1 and fully_shard is not None:
        diagnostics = GenerativeDiagnostics(max_overhead=None)
        module = sharded(diagnostics)
        report["with"], report["without"] = held_by(module), held_by(sharded())
        report["sharded"] = diagnostics.attached, diagnostics.left_out
        report["refused"] = refused(monitor())
        report["sharded by"] = compat.sharded_by(trainer(), module)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(report, folder / f"report_{os.environ.get('LOCAL_RANK', 0)}.pt")
    # gloo sometimes aborts at the interpreter's exit
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
