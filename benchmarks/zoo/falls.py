"""Whether a fall back to where a run began is found early in it, while the model still improves fast.

``python -m benchmarks.zoo --falls`` replaces the later evaluations of each healthy run by its first three, in turn, as if the
model had lost all that it had learned. Runs count whose FID, by the referee, had at least halved before.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.zoo.judging import bounds, evaluations_of, judged
from benchmarks.zoo.recording import Record
from lightning_gendiag import Evaluation

BEGINNINGS = (8, 12, 16, 24)
"""Numbers of evaluations before the fall."""

FIRST, WITHIN, SOON = 3, 8, 3
"""Number of evaluations that come again, and within how many after the fall it is found, or found soon."""

LEARNT = 0.5
"""Largest FID before the fall, relative to the first ones."""


class Fall(NamedTuple):
    """What happened to a run that fell back."""

    at: int
    """Number of evaluations before the fall."""
    delay: int | None
    """Evaluations until an alarm; None where there was none."""


def fallen(run: Record, at: int) -> list[dict[str, Evaluation]]:
    """Returns the evaluations of a run whose later ones are the first ones again."""
    rows = evaluations_of(run, run)
    made: list[dict[str, Evaluation]] = []
    counts: dict[str, int] = {}
    for place in range(at + WITHIN):
        row = {}
        for monitor, evaluation in rows[place if place < at else (place - at) % FIRST].items():
            counts[monitor] = counts.get(monitor, 0) + 1
            row[monitor] = evaluation._replace(
                number=counts[monitor], step=run["steps"][place], epoch=run["epochs"][place]
            )
        made.append(row)
    return made


def falls_of(run: Record) -> list[Fall]:
    """Judges the falls of a healthy run."""
    fid, found = run["truth"]["fid"], []
    for at in BEGINNINGS:
        if at + WITHIN > len(fid) or statistics.median(fid[at - FIRST : at]) > LEARNT * statistics.median(fid[:FIRST]):
            continue
        played = judged(fallen(run, at), run["steps"])
        found.append(Fall(at, min((raised.at - at + 1 for raised in played.raised if raised.at >= at), default=None)))
    return found


def judge_falls(runs: Iterable[Record]) -> dict[str, Any]:
    """Judges the falls of all runs, prints the table and returns the figures."""
    all_falls = [fall for run in runs if not run["fault"] for fall in falls_of(run)]
    figures: dict[str, Any] = {}
    for at in BEGINNINGS:
        delays = [fall.delay for fall in all_falls if fall.at == at]
        found = sum(delay is not None for delay in delays)
        soon = sum(delay is not None and delay <= SOON for delay in delays)
        low, high = bounds(found, len(delays))
        figures[str(at)] = {"runs": len(delays), "found": found, "soon": soon, "bounds": (low, high)}
        print(
            f"after {at} evaluations: found {found} of {len(delays)} ({low:.0%} to {high:.0%}), "
            f"within {SOON} evaluations {soon}"
        )
    return figures
