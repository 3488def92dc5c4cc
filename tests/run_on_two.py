"""Runs a model with a planted fault on one or two processes: ``python -m tests.run_on_two FOLDER FAULT [PROCESSES]``."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from example_models.data import digits
from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, ModelAdapter
from tests.helpers.faults import QUADRANTS, planted
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, trainer


def main(folder: Path, fault: str, processes: int = 2) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, adapter=ModelAdapter(reference=digits(16)[0], num_samples=500))
    stopping = CollapseStopping()
    own = trainer(
        monitor, stopping, max_epochs=30, devices=processes, strategy="ddp" if processes > 1 else "auto",
    )  # fmt: skip
    own.fit(ScriptedGenerator(planted(fault, "bottom right", 14)), batches(16, 64))
    folder.mkdir(parents=True, exist_ok=True)
    assert monitor.latest is not None
    report = {
        "alarms": [asdict(alarm) for alarm in stopping.alarms],
        "epoch": own.current_epoch,
        "observations": {o.series.name: o.value for o in monitor.latest.observations},
    }
    torch.save(report, folder / f"report_{own.global_rank}.pt")
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
