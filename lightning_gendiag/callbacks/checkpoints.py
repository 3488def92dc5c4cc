"""Checkpoints that a trainer has written, by the step that they were written at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_gendiag.model.warning import warn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def checkpoints(trainer: Trainer) -> Iterator[tuple[int, str]]:
    """Yields steps, on the loggers' axis, and paths of the checkpoints that the trainer's callbacks have written."""
    folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks}
    paths = {path for folder in folders if folder and Path(folder).is_dir() for path in Path(folder).rglob("*.ckpt")}
    for path in sorted(path for path in paths if path.is_file()):
        step = _step_of(path)
        if step is not None:
            yield step, str(path)


def _step_of(path: Path) -> int | None:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(held["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"])
    except Exception as error:
        # another program's file, or one that holds more than tensors
        warn(f"{path} was skipped, since its step cannot be read: {error}", category=UserWarning)
        return None


def last_good_checkpoint(trainer: Trainer, since: int) -> str | None:
    """Returns the path of the newest checkpoint from before a step; None where there is none."""
    good = [(step, path) for step, path in checkpoints(trainer) if step <= since]
    return max(good)[1] if good else None
