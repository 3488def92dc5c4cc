"""The state of a run in one paragraph and one dictionary: what went wrong, where, since when, and where to go back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning_gendiag.detection.alarm import Alarm, counted, listed

FILE = "gendiag_report.json"
"""Name of the file in the logger's folder."""


def report(
    alarms: Sequence[Alarm], evaluations: Mapping[str, int], needed: Mapping[str, int], checkpoint: str | None = None
) -> dict[str, Any]:
    """Returns the state of a run as plain Python that JSON takes.

    Args:
        alarms: All alarms of the run.
        evaluations: Number of evaluations of each monitor.
        needed: Number of evaluations of each monitor with which an alarm is possible.
        checkpoint: Path of the newest checkpoint from before the first alarm that has not recovered.

    Returns:
        ``state`` (``"healthy"``, ``"unhealthy"`` or ``"not judged"``), ``summary`` (one paragraph), ``alarms`` (a list of
        dictionaries with the fields of :class:`Alarm` and its ``message``), ``evaluations`` (by monitor) and
        ``last_good_checkpoint`` (a path or None).
    """
    open_alarms = [alarm for alarm in alarms if alarm.recovered is None]
    judged = [name for name, count in evaluations.items() if count >= needed[name]]
    if open_alarms:
        state, summary = "unhealthy", _details(open_alarms, checkpoint)
    elif not judged and not alarms:
        state = "not judged"
        most, least = max(evaluations.values(), default=0), min(needed.values(), default=0)
        summary = (
            f"Not judged: there {'was' if most == 1 else 'were'} {counted(most, 'evaluation')}, and an alarm needs {least}. "
            "To evaluate more often, pass max_overhead=None or every_n_train_steps."
            if evaluations
            else "Not judged: there was no evaluation."
        )
    else:
        state = "healthy"
        summary = (
            f"Healthy: every series that changed is back at its level. {' '.join(alarm.message for alarm in alarms)}"
            if alarms
            else f"Healthy: no series of {listed(judged)} left its level in {counted(max(evaluations.values()), 'evaluation')}."
        )
    return {
        "state": state,
        "summary": summary,
        "alarms": [{**asdict(alarm), "message": alarm.message} for alarm in alarms],
        "evaluations": dict(evaluations),
        "last_good_checkpoint": checkpoint,
    }


def _details(alarms: Sequence[Alarm], checkpoint: str | None) -> str:
    text = " ".join(alarm.message for alarm in alarms)
    about = {f"{alarm.diagnostic}: {name}" for alarm in alarms for name in alarm.names}
    # each once, in their order
    changed = dict.fromkeys(item for alarm in alarms for item in alarm.also_changed)
    others = [item for item in changed if item not in about]
    text += f" Also changed: {listed(others)}." if others else ""
    tags = list(dict.fromkeys(tag for alarm in alarms for tag in alarm.tags))
    text += f" See {listed(tags)} in TensorBoard." if tags else ""
    return text + (f" The last good checkpoint is {checkpoint}." if checkpoint else "")
