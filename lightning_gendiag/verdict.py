"""How a run ended, in one paragraph and one JSON: what went wrong, where, since when, how sure, and where to go back to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

FILE = "gendiag_verdict.json"
"""Name of the file in the logger's folder."""


def checkpoints(trainer: Trainer) -> Iterator[tuple[int, str]]:
    """Steps, on the loggers' axis, and paths of the checkpoints that the trainer's callbacks have written."""
    seen = set()
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        found = sorted(Path(folder).rglob("*.ckpt")) if folder and Path(folder).is_dir() else []
        for path in found:
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                loop = held["loops"]["fit_loop"]["epoch_loop.state_dict"]
                yield int(loop["_batches_that_stepped"]), str(path)
            except Exception as error:
                # another program's file, or one that holds more than tensors
                warnings.warn(f"{path} was passed over, for its step could not be read: {error}", stacklevel=2)


def last_good(trainer: Trainer, since: int) -> str | None:
    """Path of the newest checkpoint from before a step; None where there is none."""
    good = [(step, path) for step, path in checkpoints(trainer) if step <= since]
    return max(good)[1] if good else None


def written(trainer: Trainer, verdict: dict[str, Any]) -> list[str]:
    """Write a verdict beside each logger's files that has a folder; the paths."""
    paths = []
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
        if isinstance(folder, (str, Path)) and Path(folder).is_dir():
            path = Path(folder) / FILE
            path.write_text(json.dumps(verdict, indent=1, default=str) + "\n")
            paths.append(str(path))
    return paths
