"""Lets two processes of which one is slower choose how much they do: ``python -m tests.amounts_on_two FOLDER [LIMIT]``."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lightning_gendiag import CosineMeanSimilarityMonitor, ManifoldEntropyMonitor
from tests.helpers.models import SmallVAE
from tests.helpers.running import batches, trainer


class Uneven(SmallVAE):
    """A VAE whose first process takes 20 ms a sample, and the other one no time."""

    def sample(self, n: int) -> Tensor:
        # at work, since time that a process waits counts for less
        end = time.thread_time() + 0.02 * n * (self.global_rank == 0)
        while time.thread_time() < end:
            pass
        return super().sample(n)


def main(folder: Path, max_overhead: float | None = None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cms = CosineMeanSimilarityMonitor(num_regions=2, max_overhead=max_overhead)
    entropy = ManifoldEntropyMonitor(max_overhead=max_overhead)
    own = trainer(cms, entropy, max_epochs=1 if max_overhead is None else 8, devices=2, strategy="ddp")
    own.fit(Uneven(), batches())
    chosen = cms.view.amounts | {"latents": entropy.get_extra_state()["latents"]}
    chosen |= {monitor.name: monitor.evaluations for monitor in (cms, entropy)}
    torch.save(chosen, folder / f"amounts_{own.global_rank}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(float, sys.argv[2:]))
