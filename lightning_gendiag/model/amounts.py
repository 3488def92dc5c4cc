"""How much of something is done at each evaluation: as much as fits a time limit, by the time of a small piece."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

NUM_SAMPLES = 1024
"""Number of samples at an evaluation where neither the user nor their cost says otherwise."""

NUM_REFERENCE = 1024
"""Number of real images that are kept where the user does not say otherwise."""

LEAST_SAMPLES = 64
"""Smallest number of samples, however slow the sampler is."""

LEAST_ROWS = 128
"""Smallest number of real images that an encoder gets, however slow it is."""

SAMPLE_SECONDS = 2.0
"""Approximate limit of the time for the samples of an evaluation."""

ROWS_SECONDS = 1.5
"""Approximate limit of the time for encoding real images, and for reconstructing them."""

TIMED = 16
"""Number of images in the piece that is timed."""

MOST_LOAD = 4.0
"""Largest number of times that other processes are assumed to prolong work on a CPU."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds that some work takes; 0 where it fails, since it fails again where failures are reported.

    On a CPU, these are the seconds in which this thread is at work, since the amounts stay for the whole run, and the load of
    other processes does not. Work that waits for something else than a CPU counts as a quarter of its time or more.
    """
    _finish(device)
    started, busy = time.monotonic(), time.thread_time()
    try:
        work()
        _finish(device)
    except Exception:
        return 0.0
    passed, busy = time.monotonic() - started, time.thread_time() - busy
    return min(passed, max(busy, passed / MOST_LOAD)) if device.type == "cpu" else passed


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fitting(seconds: float, limit: float, least: int, most: int) -> int:
    """Returns how many pieces of work of some seconds each fit a limit, ``least`` to ``most``.

    Example:
        >>> fitting(0.02, 2.0, 64, 1024), fitting(1.0, 2.0, 64, 1024), fitting(0.0, 2.0, 64, 1024)
        (100, 64, 1024)
    """
    return max(least, min(most, int(limit / max(seconds, 1e-9))))
