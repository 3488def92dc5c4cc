"""A collapse as it is reported: what happened, where, since when, and how significant it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gendiag.detection.history import Stop

PLURALS = {"was": "were", "is": "are", "does": "do", "has": "have"}
"""Verbs with a plural of their own."""


@dataclass
class Alarm:
    """A part of the model that became worse, in numbers and in a sentence."""

    step: int
    """Step of the evaluation that raised the alarm, on the loggers' axis."""
    epoch: int
    """Epoch of this evaluation, counted from 0."""
    diagnostic: str
    """Name of the monitor, as in its tags."""
    label: str
    """The region, class, dimension or aggregate that is meant."""
    before: float
    """Value before the alarm: the median of the values that made the level."""
    after: float
    """Value at the alarm."""
    score: float
    """Significance in standard deviations of the series' own fluctuation."""
    since: int
    """Step at which the change began."""
    evaluations_to_false_alarm: float
    """Mean number of healthy evaluations before chance alone shows as much, for independent normal fluctuations."""
    quantity: str = ""
    """What the diagnostic measures."""
    event: str = "collapsed"
    """What happened, a verb phrase."""
    contributions: dict[str, float] = field(default_factory=dict)
    """Each component's contribution to the overall drop; they add to one."""
    series: str = ""
    """Name of the series whose detector raised the alarm."""
    names: list[str] = field(default_factory=list)
    """Names of the series that the alarm is about, the most significant first."""
    indices: list[int] = field(default_factory=list)
    """Their numbers, where they are regions, classes or dimensions."""
    rule: str = ""
    """The sentence that replaces the numbers, where a rule decided and no fluctuation."""
    recovered: int | None = None
    """Step at which the series was back at its level; None while it is not."""
    also_changed: list[str] = field(default_factory=list)
    """Other series that left their level at the same time, as ``diagnostic: series``, the most significant first."""
    number: int = 0
    """Number of the monitor's evaluation that raised the alarm."""
    tags: list[str] = field(default_factory=list)
    """TensorBoard tags that show it."""
    stop: Stop = "whole"
    """When it may stop a run: by itself, only where all that is generated became worse too, or never."""
    patience: int = 0
    """Number of further evaluations that it must last before it may stop a run."""
    is_critical: bool = False
    """Whether it lasted and matters so much that it stops a run with ``action="stop"``."""
    data: str = ""
    """What changed in the training data at that time, in a sentence; empty where they are not monitored."""

    @property
    def message(self) -> str:
        """The alarm as sentences for people."""
        return f"{self._change} {self.data}".rstrip()

    @property
    def _change(self) -> str:
        at = f"epoch {self.epoch}, step {self.step}"
        if self.rule:
            return f"{self.rule}, detected at {at}."
        if not math.isfinite(self.after):
            return f"{self.label} {self.event}: {self.quantity} was {self.before:.3f} and is nan or inf at {at}."
        expected = self.evaluations_to_false_alarm
        odds = (
            f"1 false alarm expected in {expected:,.0f} evaluations"
            if expected < 1e6
            else "fewer than 1 false alarm expected in 10⁶ evaluations"
        )
        message = (
            f"{self.label} {self.event}: {self.quantity} {'fell' if self.after < self.before else 'rose'} from "
            f"{self.before:.3f} to {self.after:.3f} since step {self.since}, detected at {at} "
            f"({self.score:.1f} σ beyond its usual fluctuation; {odds})."
        )
        if [self.label] == self.names[:1] and len(self.names) > 1:
            message += f" It shows in {listed(self.names[1:], 12)}."
        contribution = sum(self.contributions.get(name, 0.0) for name in self.names) if self.names else 0.0
        if contribution > 0 and self.names[0] in self.contributions:
            # more than everything where other components improved meanwhile
            message += f" It accounts for {min(contribution, 1.0):.0%} of the overall drop."
        return message

    def __str__(self) -> str:
        return self.message


def listed(items: Sequence[str], most: int = 6) -> str:
    """Returns items as a list for people; beyond ``most`` the rest is counted.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def of_several(event: str) -> str:
    """Returns a verb phrase as it is said of several components.

    Example:
        >>> of_several("was dropped"), of_several("collapsed")
        ('were dropped', 'collapsed')
    """
    verb, *rest = event.split(" ")
    return " ".join([PLURALS.get(verb, verb), *rest])


def counted(number: int, thing: str) -> str:
    """Returns a number of things for people.

    Example:
        >>> counted(1, "evaluation"), counted(1200, "evaluation")
        ('1 evaluation', '1,200 evaluations')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
