"""How much of something is done at each evaluation: as much as fits a time limit, by the time of a small piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch import Trainer

from lightning_gendiag.model.isolation import exits_as_errors

T = TypeVar("T")

NUM_SAMPLES = 1024
"""Number of samples at an evaluation where neither the user nor their cost says otherwise."""

NUM_REFERENCE, LEAST_REFERENCE = 1024, 256
"""Number of real images that are kept where the user does not say otherwise, and the smallest number of large ones."""

SHORT_REFERENCE = 512
"""Number of real images in a short run: setup with twice as many takes more than twice as long."""

REFERENCE_NUMBERS = 1 << 26
"""Largest count of numbers in the real images unless these are fewer than ``LEAST_REFERENCE``: 256 MiB in float32.

Of 3x256x256 these are 341. The first evaluation with 1,024 of them took 46 s of a CPU, that with 341 takes 22 s."""

LEAST_SAMPLES, FEWEST_SAMPLES = 64, 16
"""Smallest number of samples of a slow sampler, and of one that takes longer than ``MOST_SECONDS`` even for these."""

LEAST_ROWS, FEWEST_ROWS = 128, 64
"""Smallest number of real images that a slow encoder gets, and one that takes longer than ``MOST_SECONDS`` for these."""

SAMPLE_SECONDS = 2.0
"""Approximate limit of the time for the samples of an evaluation."""

ROWS_SECONDS = 1.5
"""Approximate limit of the time for encoding real images, and for reconstructing them."""

MOST_SECONDS = 10.0
"""Approximate limit of either where the smallest number does not fit."""

LONGEST = 60.0
"""Seconds that the fewest samples may take; slower samplers are left out unless the user gives a number of samples."""

TIMED = 16
"""Number of images in the piece that is timed."""

MOST_LOAD = 4.0
"""Largest number of times that other processes are assumed to prolong work on a CPU."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that some work takes; 0 where it fails, since it fails again where failures are reported."""
    try:
        with exits_as_errors():
            return timed(work, device)[1]
    except Exception:
        return 0.0


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Returns what some work returns, and the seconds that it takes.

    On a CPU, these are the seconds in which this thread is at work, since the amounts stay for the whole run, and the load of
    other processes does not. Work that waits for something else than a CPU counts as a quarter of its time or more.
    """
    _finish(device)
    started, busy = time.monotonic(), time.thread_time()
    made = work()
    _finish(device)
    passed, busy = time.monotonic() - started, time.thread_time() - busy
    return made, min(passed, max(busy, passed / MOST_LOAD)) if device.type == "cpu" else passed


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference_size(numbers: int) -> int:
    """Returns how many real images are kept where the user does not say otherwise.

    Args:
        numbers: Count of numbers in one of them.

    Example:
        >>> reference_size(3 * 64 * 64), reference_size(3 * 256 * 256), reference_size(3 * 1024 * 1024)
        (1024, 341, 256)
    """
    return max(LEAST_REFERENCE, min(NUM_REFERENCE, REFERENCE_NUMBERS // max(1, numbers)))


def fitting(seconds: float, limit: float, least: int, most: int) -> int:
    """Returns how many pieces of work of some seconds each fit a limit, ``least`` to ``most``.

    Example:
        >>> fitting(0.02, 2.0, 64, 1024), fitting(1.0, 2.0, 64, 1024), fitting(0.0, 2.0, 64, 1024)
        (100, 64, 1024)
    """
    return max(least, min(most, int(limit / max(seconds, 1e-9))))


def run_progress(trainer: Trainer) -> float | None:
    """Returns the share of a run that is done, 0 to 1; None where its length is not known."""
    epochs, steps = trainer.max_epochs or 0, trainer.max_steps
    epoch = trainer.current_epoch + (trainer.fit_loop.epoch_loop.batch_idx + 1) / max(trainer.num_training_batches, 1)
    shares = [epoch / epochs] if epochs > 0 else []
    shares += [trainer.global_step / steps] if steps > 0 else []
    return min(max(shares), 1.0) if shares else None
