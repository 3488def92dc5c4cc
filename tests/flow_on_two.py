"""Inverts flows on one or two processes: ``python -m tests.flow_on_two FOLDER PROCESSES``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import nn

from example_models.data import digits
from lightning_gendiag import CollapseStopping, ModelAdapter, RoundTripMonitor
from tests.helpers.inversions import PlantedFlow
from tests.helpers.running import batches, trainer

FAULTS = ("", "shift", "sign")


class Still(PlantedFlow):
    """A flow that training does not change, since two processes train on other batches than one process."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault, start=0)
        for layer in self.layers:
            # without training, couplings do nothing
            nn.init.normal_(layer.net[-1].weight, 0.0, 0.1)
            nn.init.normal_(layer.net[-1].bias, 0.0, 0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def report_of(fault: str, processes: int) -> dict[str, Any]:
    """Returns the scalars of the last of four evaluations, and the alarms."""
    seed_everything(0, verbose=False)
    # two processes divide neither the images nor the chunks evenly
    adapter = ModelAdapter(reference=digits(8)[0][:37], num_reference=37, num_samples=50, chunk_size=8)
    monitor, stopping = RoundTripMonitor(adapter=adapter, on_error="raise"), CollapseStopping("warn")
    own = trainer(
        monitor, stopping, max_epochs=4, limit_train_batches=2, devices=processes,
        strategy="ddp" if processes > 1 else "auto",
    )  # fmt: skip
    own.fit(Still(fault), batches())
    scalars = {name: float(value) for name, value in monitor.scalars(monitor.result).items()}
    return {"scalars": scalars, "alarms": [(alarm.epoch, str(alarm)) for alarm in stopping.alarms]}


def main(folder: Path, processes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = {fault: report_of(fault, processes) for fault in FAULTS}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(report, folder / f"report_{os.environ.get('LOCAL_RANK', 0)}.pt")
    # gloo sometimes aborts at the interpreter's exit
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
