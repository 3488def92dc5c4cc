"""How large evaluations are and how often they take place, chosen once by what they cost, and said in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_gendiag.callbacks.schedule import limit_of
from lightning_gendiag.detection.alarm import counted
from lightning_gendiag.model.amounts import run_progress

if TYPE_CHECKING:
    from lightning_gendiag.callbacks.monitor import Monitor
    from lightning_gendiag.callbacks.session import Session
    from lightning_gendiag.model.view import ModelView

SIZES = (64, 128, 256, 512, 1024)
"""Numbers of samples that an evaluation may have where the time is limited."""

SHORT = 15.0
"""A run is short where the limit allows fewer seconds than these over all of it."""

SLOW = 0.2
"""Samples that took so many seconds are not drawn once more to measure their time without what takes place once."""

REVISED, OTHER = 6, 4 / 3
"""After so many evaluations, or a third of them all, the plan is said once more if their number will be smaller or larger by
this factor. Evaluations among training steps take longer than those that were measured one after another."""


def is_short(session: Session, monitors: Sequence[Monitor[Any, Any]]) -> bool:
    """Returns whether a run is so short that setup and evaluations must be small.

    Args:
        session: The session.
        monitors: Those with a limit.
    """
    progress = run_progress(session.trainer)
    return bool(progress) and limit_of(monitors) * session.schedule.budget.training < SHORT * (progress or 1.0)


def rehearse(
    session: Session, chosen: Sequence[Monitor[Any, Any]], step: int, epoch_over: bool
) -> list[Monitor[Any, Any]]:
    """Sets up the monitors with a limit, measures what they cost, and chooses how many samples they compare.

    There are more samples as long as so many evaluations as are worth having fit the limit. Every process must call it at
    the same time.

    Args:
        session: The session.
        chosen: The monitors that are to evaluate now.
        step: On the loggers' axis.
        epoch_over: Whether a training epoch has ended, or a batch.

    Returns:
        The monitors that evaluate now: all but those that failed.
    """

    def seconds_of(monitor: Monitor[Any, Any]) -> float:
        seconds = session.timed(monitor, step, epoch_over, "rehearsal") or 0.0
        # the same on all processes
        return session.view_of(monitor).broadcast(lambda: seconds)

    # what passes in batches is seen once
    limited = [m for m in chosen if m.max_overhead is not None and not m.watches_batches]
    views = [view for view in session.views if _is_planned(session, view)]
    for view in views:
        view.plan(SIZES[0])
    for monitor in limited:
        seconds_of(monitor)
    measured = good = [monitor for monitor in limited if not monitor.failed]
    if not good:
        for view in views:
            view.plan(None)
    comparing = [m for m in good if session.view_of(m) in views and m.shares() == "samples"]
    for smaller, size in zip((None, *SIZES), SIZES, strict=False):
        slow = [view for view in session.views if size == SIZES[0] and view.sampling_seconds > SLOW]
        drawn = {view: view.sampling_seconds for view in slow}
        if not slow:
            # a copy of the module is a part of each evaluation
            session.subject.expire()
        for view in session.views:
            if view not in slow:
                view.expire()
        for view in views:
            view.plan(size)
        before = [session.schedule.cost(monitor) for monitor in measured]
        for monitor in measured:
            # the first that compares samples draws them
            drawing = drawn.pop(session.view_of(monitor), 0.0) if monitor.shares() == "samples" else 0.0
            session.schedule.note(monitor, seconds_of(monitor) + drawing, anew=True)
        if smaller is not None and not session.schedule.affords(comparing, session.limited):
            for view in views:
                view.plan(smaller)
                view.expire()
            for monitor, seconds in zip(measured, before, strict=True):
                session.schedule.note(monitor, seconds, anew=True)
            break
        measured = comparing
        if not views or not comparing or not session.schedule.affords(comparing, session.limited):
            break
    return [monitor for monitor in chosen if monitor not in limited or monitor in good]


def _is_planned(session: Session, view: ModelView) -> bool:
    """Whether it is ours to choose how many samples the monitors of a view compare: not once it has been chosen."""
    comparing = [m for m in session.monitors if m.enabled and session.view_of(m) is view and m.shares() == "samples"]
    return (
        view.adapter.num_samples is None
        and "planned" not in view.amounts
        and bool(comparing)
        and all(monitor.max_overhead is not None for monitor in comparing)
    )


def main_of(session: Session) -> Monitor[Any, Any]:
    """Returns the monitor whose evaluations the plan counts: of those with a limit, one that compares samples.

    Without samples it is the most frequent one that evaluates the module, and that of the data only if there is no other.
    """
    periods = session.schedule.periods(session.limited)
    comparing = next((m for m in session.limited if m.shares() == "samples"), None)
    others = [m for m in session.limited if not m.watches_batches] or session.limited
    return comparing or min(others, key=lambda m: periods[m.name])


def planned(session: Session) -> float:
    """Returns the number of evaluations of the main monitor by the end of the run; inf where its length is not known."""
    main, schedule = main_of(session), session.schedule
    return max(main.evaluations, 1) + schedule.coming // schedule.periods(session.limited)[main.name]


def is_off(session: Session, said: float) -> bool | None:
    """Returns whether there will be far fewer or more evaluations than were said; None as long as that is not known.

    It is known after some evaluations, or a third of a few, and never where the length of the run is not.
    """
    number = planned(session)
    if not math.isfinite(number) or main_of(session).evaluations < min(REVISED, number / 3):
        return None
    return not said / OTHER <= number <= said * OTHER


def in_words(session: Session, anew: bool = False) -> str:
    """Returns the plan in a line: how many evaluations of how many samples, their cost, and when an alarm is possible.

    Args:
        session: After its first evaluations.
        anew: Whether another plan was said before.
    """
    schedule, trainer = session.schedule, session.trainer
    limited, limit = session.limited, limit_of(session.limited)
    periods, coming = schedule.periods(limited), schedule.coming
    main = main_of(session)
    often, done = periods[main.name], max(main.evaluations, 1)
    samples = session.view_of(main).num_samples if main.shares() == "samples" else None
    of = f" of {samples:,} samples" if samples else ""
    number = planned(session)
    if coming == math.inf:
        text = f"Plan: evaluations{of}, at most {limit:.0%} of the training time"
    else:
        seconds = schedule.budget.spent + sum(coming // periods[m.name] * schedule.cost(m) for m in limited)
        share = min(seconds / schedule.budget.training / (1 + coming / schedule.dues), limit)
        text = f"Plan: about {counted(int(number), 'evaluation')}{of}, {share:.0%} of the training time"
    if anew:
        text = f"Plan, by what evaluations have taken so far{text.removeprefix('Plan')}"
    rarer = [_how_often(session, m, periods[m.name], main, often) for m in limited if periods[m.name] > often]
    text += f" ({', '.join(rarer)})" * bool(rarer)
    needed = max((listener.needed(main.name) for listener in session.listeners), default=0)
    advice = "To evaluate whenever it is due, pass max_overhead=None."
    if needed > number:
        return f"{text}; no alarm is possible, since it takes {needed} evaluations. {advice}"
    if needed > done:
        later = (needed - done) * often
        by_steps = main.every_n_train_steps
        unit, count = ("epoch", trainer.current_epoch + 1 + later * main.every_n_epochs)
        if by_steps:
            unit, count = "step", (schedule.dues + later) * by_steps
        text += f"; the first alarm is possible after {unit} {math.ceil(count):,}"
    return f"{text}. {advice}"


def _how_often(
    session: Session, monitor: Monitor[Any, Any], period: float, main: Monitor[Any, Any], often: float
) -> str:
    """Says how often a monitor is evaluated that is so more rarely than the main one, and why if that is once or never."""
    schedule, coming = session.schedule, session.schedule.coming
    if coming == math.inf:
        return f"{monitor.name} at one of {period / often:.2g} evaluations"
    # one that did not take part in the first round waits for its period from the beginning
    begun = monitor.latest is not None
    number = int(max(monitor.evaluations, 1) + coming // period if begun else (schedule.dues + coming) // period)
    if number > 1:
        return f"{monitor.name} {number:,} times"
    rarely = schedule.relative_period(monitor, session.limited)
    why = f"since it may take {schedule.cost(monitor):.2g} s"
    if rarely > 1 and schedule.cost(monitor) <= schedule.cost(main):
        why = f"since it takes part in one of {rarely} evaluations"
    return f"{monitor.name} {'once' if number else 'never'}, {why}"
