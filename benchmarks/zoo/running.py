"""Chooses what is trained, in which order, and trains it in parallel processes."""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from lightning.pytorch import LightningModule

from benchmarks.zoo.faults import FROM_THE_START
from benchmarks.zoo.models import KINDS
from benchmarks.zoo.recording import Unit, record, write
from benchmarks.zoo.truth import referee

HELD_OUT_SEED = 8000
"""Rules were chosen on runs with smaller seeds only."""


def units(healthy: int, only: Sequence[str] = (), first: int = HELD_OUT_SEED) -> list[Unit]:
    """Returns all runs from a seed on, in an order of which each beginning is balanced.

    Kinds take turns, and every fourth healthy run is followed by one with a fault from the start.
    """
    kinds = [kind for kind in KINDS if not only or kind in only]
    possible = [
        (kind, fault)
        for fault, planted in FROM_THE_START.items()
        for kind in kinds
        if planted.applies(KINDS[kind], _example(kind))
    ]
    # faults in turn, and for each fault the kinds in turn
    faults = list(dict.fromkeys(fault for _, fault in possible))
    by_fault = {fault: [kind for kind, other in possible if other == fault] for fault in faults}
    listed: list[Unit] = []
    for number in range(healthy):
        seed, place = first + number // len(kinds), number % len(kinds)
        listed.append(Unit(kinds[place], seed))
        if number % 4 == 3 and faults:
            count = number // 4
            fault, turn = faults[count % len(faults)], count // len(faults)
            kind = by_fault[fault][turn % len(by_fault[fault])]
            listed.append(Unit(kind, first + 500 + turn, fault))
    return list(dict.fromkeys(listed))


def _example(kind: str) -> LightningModule:
    """Returns a module of a kind, to ask which faults apply."""
    made = KINDS[kind]
    size = 8 if made.data == ("digits8",) else 16
    return made.make((1, size, size), 10, made.widths[0], made.lrs[0])


def recorded(unit: Unit, folder: Path) -> tuple[Unit, float]:
    """Records one run in a process of its own, and returns the seconds of one core that it took."""
    run = record(unit)
    write(run, folder / unit.file)
    return unit, run["seconds"]


def record_all(wanted: Sequence[Unit], folder: Path, jobs: int, seconds: float) -> None:
    """Records what is not recorded yet; begins no run after some seconds."""
    started = time.monotonic()
    missing = [unit for unit in wanted if not (folder / unit.file).exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are recorded", flush=True)
    context = mp.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        names = dict.fromkeys(name for unit in missing for name in KINDS[unit.kind].data)
        list(pool.map(referee_of, names))
        waiting = iter(missing)
        running = {pool.submit(recorded, unit, folder) for _, unit in zip(range(jobs), waiting, strict=False)}
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            done = finished.pop()
            running.remove(done)
            if time.monotonic() - started < seconds and (unit := next(waiting, None)) is not None:
                running.add(pool.submit(recorded, unit, folder))
            try:
                unit, took = done.result()
                print(f"{time.monotonic() - started:6.0f} s: {unit.file}, {took:.0f} s", flush=True)
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)


def referee_of(name: str) -> float:
    """Trains the classifier of a data set, and returns its accuracy."""
    return referee(name).accuracy
