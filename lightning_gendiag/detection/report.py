"""The state of a run in one paragraph and one dictionary: what went wrong, where, since when, and where to go back to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning_gendiag.detection.alarm import Alarm, counted, listed
from lightning_gendiag.detection.rules import DATA

FILE = "gendiag_report.json"
"""Name of the file in the logger's folder."""

LEAST_EVALUATIONS = 6
"""What is bad before as many evaluations of the model says little, since it has only begun to learn."""


def report(
    alarms: Sequence[Alarm],
    evaluations: Mapping[str, int],
    needed: Mapping[str, int],
    checkpoint: str | None = None,
    bad: Mapping[str, int] | None = None,
    of_data: Collection[str] = (DATA,),
) -> dict[str, Any]:
    """Returns the state of a run as plain Python that JSON takes.

    The state is the first of these that holds:

    - ``"unhealthy"``: something is bad in itself, or an alarm is open that a rule raised or that matters enough to stop
      a run.
    - ``"getting worse"``: another alarm is open.
    - ``"not judged"``: there were too few evaluations for any alarm about the model itself.
    - ``"healthy"``.

    Args:
        alarms: All alarms of the run.
        evaluations: Number of evaluations of each monitor.
        needed: Number of evaluations of each monitor with which an alarm is possible.
        checkpoint: Path of the newest checkpoint from before the first alarm that has not recovered.
        bad: What is bad in itself at the newest evaluation, in clauses, with the step of that evaluation.
        of_data: Names of the monitors that watch the training data and not the model.

    Returns:
        ``state``, ``summary`` (one paragraph), ``alarms`` (a list of dictionaries with the fields of :class:`Alarm` and its
        ``message``), ``bad`` (a list of clauses), ``evaluations`` (by monitor) and ``last_good_checkpoint`` (a path or
        None).
    """
    open_alarms = [alarm for alarm in alarms if alarm.recovered is None]
    of_model = {name: count for name, count in evaluations.items() if name not in of_data}
    judged = [name for name, count in evaluations.items() if count >= needed[name]]
    most = max(of_model.values(), default=0)
    # the data may be evaluated often before the model is for the second time
    is_bad = bool(bad) and most >= LEAST_EVALUATIONS
    messages = " ".join(alarm.message for alarm in alarms)
    bad = bad or {}
    now = f" The newest evaluation, at step {max(bad.values()):,}, was bad: {listed(list(bad))}." if bad else ""
    if open_alarms or is_bad:
        matters = is_bad or any(alarm.is_critical or alarm.rule for alarm in open_alarms)
        state = "unhealthy" if matters else "getting worse"
        summary = _details(open_alarms, checkpoint) + now
    elif not any(name in judged for name in of_model):
        state = "not judged"
        # as the plan says, which counts the evaluations of the most frequent one
        least = next((needed[name] for name, count in of_model.items() if count == most), 0)
        if most:
            summary = (
                f"there {'was' if most == 1 else 'were'} {counted(most, 'evaluation')}, and an alarm needs {least}. "
                f"For more of them, train longer, or pass max_overhead=None or every_n_train_steps.{now}"
            )
        elif any(evaluations.values()):
            summary = "there was no evaluation of the model, only of its training data."
        else:
            summary = "there was no evaluation."
        summary += f" All alarms have recovered: {messages}" if alarms else ""
    else:
        state = "healthy"
        counts = counted(max(evaluations[name] for name in judged), "evaluation")
        summary = (
            f"every series that changed is back at its level. {messages}"
            if alarms
            else f"no series of {listed(judged)} left its level in {counts}, and none is bad in itself."
        )
        unjudged = [
            f"{name} ({counted(count, 'evaluation')}, it takes {needed[name]})"
            for name, count in evaluations.items()
            if name not in judged
        ]
        summary += f" Not judged yet: {listed(unjudged)}." if unjudged else ""
    return {
        "state": state,
        "summary": f"{state.capitalize()}: {summary.strip()}",
        "alarms": [{**asdict(alarm), "message": alarm.message} for alarm in alarms],
        "bad": list(bad),
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
