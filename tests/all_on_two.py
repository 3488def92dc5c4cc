"""Runs all monitors on one or two processes: ``python -m tests.all_on_two FOLDER PROCESSES``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import seed_everything

from example_models.data import digits
from example_models.vae import VAE
from lightning_gendiag import (
    CodebookUsageMonitor,
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    KStarMonitor,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    MemorizationMonitor,
    ModelAdapter,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
    RoundTripMonitor,
)
from tests.helpers.running import batches, trainer


class Still(VAE):
    """A VAE that training does not change, since two processes train on other batches than one process."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def main(folder: Path, processes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    options = {
        "adapter": ModelAdapter(reference=digits(32), num_samples=200, num_reference=301),
        "on_error": "raise", "max_overhead": None,
    }  # fmt: skip
    monitors = [
        CodebookUsageMonitor(lambda module, images: (module.encode(images)[0] > 0).long(), num_codes=2, **options),
        CosineMeanSimilarityMonitor(num_regions=3, null_splits=8, **options),
        GenerationBalanceMonitor(**options),
        KStarMonitor(**options),
        LatentRegionsMonitor(5, num_points=40, **options),
        ManifoldEntropyMonitor(num_latents=8, **options),
        MemorizationMonitor(**options),
        PosteriorKLMonitor(**options),
        RegionalPrimitivesMonitor(num_regions=3, every_n_epochs=1, num_images=3, max_steps=5, **options),
        RoundTripMonitor(num_regions=3, **options),
    ]
    own = trainer(
        *monitors, CollapseStopping(), max_epochs=1, limit_train_batches=2, devices=processes,
        strategy="ddp" if processes > 1 else "auto",
    )  # fmt: skip
    own.fit(Still(3, width=2), batches(32, 128))
    folder.mkdir(parents=True, exist_ok=True)
    report = {monitor.name: {k: float(v) for k, v in monitor.result.scalars().items()} for monitor in monitors}
    torch.save(report, folder / f"report_{own.global_rank}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
