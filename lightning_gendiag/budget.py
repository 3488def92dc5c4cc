"""How much of a run's time diagnostics may take."""

from __future__ import annotations

import time
from weakref import WeakKeyDictionary


class Budget:
    """Wall time that the monitors of a trainer took, beside the time that passed since training began.

    All that is due at a step is granted or refused together, so that monitors share what they draw.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.spent = 0.0
        self.cost = 0.0
        self.rounds = 0
        self.step: int | None = None
        self.granted = False
        self.told = False

    @property
    def training(self) -> float:
        """Seconds since training began, without those that monitors took."""
        return time.monotonic() - self.started - self.spent

    def ask(self, step: int, share: float) -> bool:
        """Whether monitors may look at a step: the first time, and when one more look like the last stays within a share."""
        if step != self.step:
            self.step = step
            self.granted = self.rounds == 0 or self.spent + self.cost <= share * self.training
            if self.granted:
                self.rounds, self.cost = self.rounds + 1, 0.0
        return self.granted

    def pay(self, seconds: float) -> None:
        """Add what a monitor took."""
        self.spent += seconds
        self.cost += seconds


_BUDGETS: WeakKeyDictionary[object, Budget] = WeakKeyDictionary()


def budget_of(trainer: object, anew: bool = False) -> Budget:
    """The budget of a trainer, or a new one where training begins."""
    if anew or trainer not in _BUDGETS:
        _BUDGETS[trainer] = Budget()
    return _BUDGETS[trainer]
