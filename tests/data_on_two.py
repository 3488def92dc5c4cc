"""Watches data that lose a class, on one or two processes: ``python -m tests.data_on_two FOLDER PROCESSES``."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import CollapseStopping, TrainingDataMonitor
from tests.helpers.models import SmallVAE
from tests.helpers.running import trainer


class ClassRemoved(SmallVAE):
    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = (rows[:1200] for rows in digits(8))
        kept = labels != 3 if self.current_epoch >= 2 else labels >= 0
        return DataLoader(TensorDataset(images[kept], labels[kept]), batch_size=32, shuffle=True)


def main(folder: Path, processes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    monitor, stopping = TrainingDataMonitor(on_error="raise"), CollapseStopping("warn")
    own = trainer(
        monitor, stopping, max_epochs=4, reload_dataloaders_every_n_epochs=1, devices=processes,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        own.fit(ClassRemoved())
    assert monitor.result is not None
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "alarms": [(alarm.epoch, alarm.message) for alarm in stopping.alarms],
        "moved": monitor.moved,
        "warned": [str(w.message) for w in warned if re.search("gendiag/|metric TrainingData", str(w.message))],
        "scalars": {name: float(value) for name, value in monitor.result.scalars().items()},
    }
    torch.save(report, folder / f"report_{own.global_rank}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
