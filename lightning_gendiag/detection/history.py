"""The one store of all series that monitors observe; panels, alarms, the report and checkpoints read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, NamedTuple, TypeVar, get_args

T = TypeVar("T")

Role = Literal["component", "aggregate", "standalone", "rule", "record"]

Stop = Literal["alone", "whole", "never"]
"""When an alarm of a series may stop a run: by itself, only where all that is generated became worse too, or never."""

STOPS: tuple[Stop, ...] = get_args(Stop)
"""The one that stops most first."""

SHARE_OF_NAN = "share with nan or inf"
"""Quantity of the series that say of how many samples, or training images, no number can be trusted."""

KEPT_WHOLE = 64
"""The newest values of a series are all kept; of older ones every second is dropped when there are too many."""

LARGEST_LENGTH = 400
"""Largest number of values kept of a series."""


@dataclass(frozen=True)
class Series:
    """What a series of numbers is of, declared once."""

    name: str
    """Unique within its monitor, such as ``"bottom right"``, ``"class 3"``, ``"dimension 2"`` or ``"image"``."""
    role: Role = "component"
    """A drop of the aggregate is divided among the components, a standalone series stands for itself, a rule says by a
    severity of 0 or inf whether something is wrong in itself, and a record is shown in panels but never judged."""
    quantity: str = ""
    """What is measured, as in "<quantity> of <label> fell from"."""
    unit: str = ""
    """Unit of the value, such as ``"nats"``; empty for a number without one."""
    event: str = "collapsed"
    """What an alarm says happened, a verb phrase."""
    label: str = ""
    """What an alarm calls it; the name where empty."""
    index: int | None = None
    """Number of the region, class or dimension."""
    min_std: float = 0.0
    """Fluctuations of the severity below this are never news."""
    min_delta: float = 0.0
    """Lasting rises of the severity up to this are no news."""
    small: float = 0.0
    """Rises of the severity up to this must last longer; see :class:`~lightning_gendiag.detection.detector.Detector`."""
    stop: Stop = "whole"
    """When an alarm may stop a run: by itself, only where all that is generated became worse too, or never."""
    patience: int = 0
    """Number of further evaluations that an alarm must last before it may stop a run."""
    is_quality: bool = False
    """Whether it measures the quality of all that is generated, by which it is decided whether the whole became worse."""
    confirm: int = 1
    """Number of evaluations in a row in which the severity must be inf before a rule raises an alarm, and smallest number of
    them that make a rise of another series; at least two do."""
    progress: float = 0.0
    """No rule raises an alarm while the value moves by more than this, up or, where negative, down: the model is learning."""

    def numbered(self, index: int, name: str = "") -> Series:
        """Returns the series of one of several regions, classes or dimensions.

        Example:
            >>> Series("class", quantity="share").numbered(3).name
            'class 3'
        """
        return replace(self, name=name or f"{self.name} {index}", index=index)


class Observation(NamedTuple):
    """One value of a series."""

    series: Series
    """What the value is of."""
    value: float
    """The number as people know it."""
    severity: float
    """The same on a scale on which larger is worse and fluctuations are about equally large everywhere; inf where a rule
    says that something is wrong."""
    label: str = ""
    """Replaces the series' label at this evaluation."""
    message: str = ""
    """What an alarm says where a rule decided; ``{evaluations}`` stands for how many in a row."""
    is_bad: bool = False
    """Whether the value is bad in itself, whatever it was before."""

    @property
    def title(self) -> str:
        """What an alarm calls it."""
        return self.label or self.series.label or self.series.name


class Evaluation(NamedTuple):
    """What a monitor observed at one step."""

    number: int
    """Counts the monitor's evaluations from 1, over resumed runs too."""
    step: int
    """Position on the loggers' axis."""
    epoch: int
    """Epoch of the evaluation, counted from 0."""
    observations: list[Observation]
    """One value of each series."""
    averaged: bool = False
    """Whether averaged (EMA) weights were evaluated."""


class Entry(NamedTuple):
    """One value of a series in the history."""

    number: int
    step: int
    value: float
    severity: float


class Curve(NamedTuple):
    """The values of one series over time."""

    steps: list[int]
    values: list[float]


class ByStep(dict[int, T]):
    """What evaluations noted, by their steps: that of the newest step, and that of the one before.

    An evaluation of the same step, such as a first one that measures the time, takes the place of the one before.

    Example:
        >>> lowest = ByStep({1: 0.5})
        >>> for step, value in ((2, 0.4), (2, 0.3), (3, 0.2)):
        ...     lowest.note(step, value)
        >>> lowest, lowest.before(3), lowest.before(2)
        ({2: 0.3, 3: 0.2}, 0.3, None)
    """

    def before(self, step: int) -> T | None:
        """Returns what was noted at the newest step before one; None where there is none."""
        earlier = max((at for at in self if at < step), default=None)
        return None if earlier is None else self[earlier]

    def note(self, step: int, value: T) -> None:
        """Notes a value, and forgets those of other steps but the newest one before."""
        newest = max((at for at in self if at < step), default=None)
        for other in [at for at in self if at not in (newest, step)]:
            del self[other]
        self[step] = value


class History:
    """All series of all monitors, by the monitor's name and the series' name, bounded in length."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, list[Entry]]] = {}

    def append(self, monitor: str, evaluation: Evaluation) -> None:
        """Adds one evaluation of a monitor, in place of one of the same number."""
        held = self._entries.setdefault(monitor, {})
        for series, value, severity, *_ in evaluation.observations:
            entries = held.setdefault(series.name, [])
            if entries and entries[-1].number == evaluation.number:
                entries.pop()
            entries.append(Entry(evaluation.number, evaluation.step, value, severity))
            if len(entries) > LARGEST_LENGTH:
                del entries[:-KEPT_WHOLE:2]

    def entries(self, monitor: str, series: str) -> list[Entry]:
        """Returns the values of a series from the oldest to the newest; empty where nothing was observed."""
        return list(self._entries.get(monitor, {}).get(series, ()))

    def curves(self, monitor: str) -> dict[str, Curve]:
        """Returns all series of a monitor by name."""
        return {
            name: Curve([entry.step for entry in entries], [entry.value for entry in entries])
            for name, entries in self._entries.get(monitor, {}).items()
        }

    def in_a_row(self, monitor: str, series: str) -> int:
        """Returns in how many of the newest evaluations in a row the severity was inf."""
        newest_first = reversed(self.entries(monitor, series))
        return len(list(takewhile(lambda entry: entry.severity == math.inf, newest_first)))

    def clear(self, monitor: str | None = None) -> None:
        """Forgets the series of one monitor, or of all."""
        if monitor is None:
            self._entries.clear()
        else:
            self._entries.pop(monitor, None)

    def state_dict(self, monitor: str) -> dict[str, Any]:
        """Returns the series of a monitor as plain lists."""
        return {name: [list(entry) for entry in entries] for name, entries in self._entries.get(monitor, {}).items()}

    def load_state_dict(self, monitor: str, state: Mapping[str, Any]) -> None:
        """Replaces the series of a monitor by those of a checkpoint."""
        self._entries[monitor] = {
            name: [
                Entry(int(number), int(step), float(value), float(severity)) for number, step, value, severity in rows
            ]
            for name, rows in state.items()
        }


def divided(falls: Mapping[str, float]) -> dict[str, float]:
    """Returns each component's contribution to a drop, adding to one; empty where the components did not drop together.

    Example:
        >>> divided({"left": 3.0, "right": 1.0})
        {'left': 0.75, 'right': 0.25}
    """
    total = math.fsum(falls.values())
    return {name: fall / total for name, fall in falls.items()} if total > 0 else {}
