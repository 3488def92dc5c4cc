"""Evaluates a flow matching model on one or two processes: ``python -m tests.timesteps_on_two FOLDER PROCESSES``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from lightning_gendiag import TimestepLoss, TimestepLossMonitor
from tests.helpers.denoisers import Flow
from tests.helpers.running import batches, trainer


class Noted(TimestepLoss):
    """Keeps what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[tuple[Tensor, Tensor, str]] = []

    def update(self, errors: Tensor, levels: Tensor, **kwargs: Any) -> None:
        super().update(errors, levels, **kwargs)
        self.given.append((errors, levels, kwargs["side"]))


class NotedMonitor(TimestepLossMonitor):
    def build_metric(self, view: Any) -> TimestepLoss:
        return Noted(super().build_metric(view).edges)


def main(folder: Path, processes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    monitor = NotedMonitor(on_error="raise")
    own = trainer(
        monitor, max_epochs=1, limit_train_batches=2, devices=processes, strategy="ddp" if processes > 1 else "auto"
    )
    own.fit(Flow(), batches(8, 128), batches(8, 64, shuffle=False))
    assert isinstance(monitor.metric, Noted)
    assert monitor.result is not None
    folder.mkdir(parents=True, exist_ok=True)
    report = {"edges": list(monitor.metric.edges), "given": monitor.metric.given, "losses": monitor.result.losses}
    torch.save(report, folder / f"report_{own.global_rank}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
