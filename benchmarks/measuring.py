"""What the benchmarks share: silent training, the time of a call, peak memory, and a process of its own for a call."""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing as mp
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.benchmark import Timer

A = TypeVar("A")
T = TypeVar("T")
P = ParamSpec("P")

LONG = 10.0
"""Seconds of a call for which one to warm up changes nothing."""


def be_silent() -> None:
    """Shows neither warnings nor what Lightning says."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def trained(
    module: LightningModule,
    batches: Any,
    epochs: int,
    *callbacks: Any,
    limits: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """Trains on the CPU without output, and returns the trainer.

    Args:
        module: What is trained.
        batches: Training batches.
        epochs: Number of epochs, -1 for as many as it takes.
        callbacks: Of the trainer.
        limits: Further arguments of the trainer.
        options: Of ``Trainer.fit``.
    """
    be_silent()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **(limits or {}),
    )  # fmt: skip
    trainer.fit(module, batches, **options)
    return trainer


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Returns the median seconds of a call after one to warm up, and what it returned.

    In one thread these are seconds of the CPU, which other processes do not lengthen.
    """
    return timed_anew(lambda: call)


def timed_anew(prepare: Callable[[], Callable[[], T]]) -> tuple[float, T]:
    """Does the same for a call that is prepared anew for each measurement, which is not timed.

    A call that takes longer than ``LONG`` is measured once.
    """
    returned: list[T] = []
    threads = torch.get_num_threads()
    timer = Timer(
        "returned.clear(); returned.append(call())",
        # metrics hold themselves, and would count towards the peak memory of the next measurement
        setup="returned.clear(); gc.collect(); call = prepare()",
        globals={"prepare": prepare, "returned": returned, "gc": gc},
        num_threads=threads,
        timer=time.process_time if threads == 1 else time.perf_counter,
    )
    first = float(timer.timeit(1).median)
    return first if first > LONG else float(timer.blocked_autorange().median), returned[0]


def repeated(run: Callable[[], float], seconds: float, most: int) -> float:
    """Returns the median of the seconds that runs take, which are repeated for so long in all, and at most so often."""
    times = [run()]
    while sum(times) < seconds and len(times) < most:
        times.append(run())
    return statistics.median(times)


def peak_memory() -> float:
    """Returns the largest memory of this process so far, in GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # a new process inherits its parent's ru_maxrss
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def rounded(value: Any) -> Any:
    """Returns what a line of JSON holds, with numbers of six digits."""
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Returns what a function of a module returns in a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def computed(function: Callable[[A], T], items: Sequence[A], jobs: int) -> Iterator[T]:
    """Yields what a function of a module returns for each item, in their order.

    Args:
        function: What each item is given to.
        items: Which must be pickled where there are several processes.
        jobs: Number of processes that compute, in one thread each.
    """
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(function, items)
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(jobs, mp.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(function, items)


@contextmanager
def package_at(commit: str) -> Iterator[None]:
    """Lets processes of :func:`in_own_process` import the package as it was at a commit."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit, "lightning_gendiag"], cwd=root, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        # a new process has the paths of this one
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


def plateau(series: Iterable[float], patience: int) -> int | None:
    """Returns the evaluation at which Lightning's ``EarlyStopping`` stops, or None."""
    best, waited = math.inf, 0
    for number, value in enumerate(series):
        waited = 0 if value < best else waited + 1
        if waited >= patience or not math.isfinite(value):
            return number
        best = min(best, value)
    return None
