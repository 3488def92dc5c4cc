"""How much of a run's time diagnostics may take."""

from __future__ import annotations

import time
from weakref import WeakKeyDictionary


class Budget:
    """Wall time that the monitors of a trainer took, beside the time that passed since training began.

    All that is due at a step is granted or refused together, a round, so that monitors share what they draw. The first
    round sets everything up, so it is written off in the course of the run.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.spent = 0.0
        self.first = 0.0
        self.rounds = 0
        self.ready = False
        self.step: int | None = None
        self.granted = False
        self.told = False

    @property
    def training(self) -> float:
        """Seconds since training began, without those that monitors took."""
        return time.monotonic() - self.started - self.spent

    def ask(self, step: int, share: float, progress: float = 1.0) -> bool:
        """Whether monitors may look at a step: the first time, and when one more round stays within a share.

        Args:
            step: of the run; asked again at the same step the answer is the same.
            share: of the training's time.
            progress: how much of the run is done, 0 to 1; 1 where its length is not known.
        """
        if step != self.step:
            self.step = step
            # rounds in which none had its real images yet are no rounds
            self.rounds *= self.ready
            later = self.spent - self.first
            # the first round took much longer than others will
            usual = later / (self.rounds - 1) if self.rounds > 1 else self.first / 4
            # one more round, and one in reserve for the end of the run
            self.granted = self.rounds == 0 or self.first * progress + later + 2 * usual <= share * self.training
            self.rounds += self.granted
        return self.granted

    def pay(self, seconds: float, ready: bool = True) -> None:
        """Add what a monitor took, and whether it could look."""
        self.spent += seconds
        self.ready |= ready
        if self.rounds <= 1:
            self.first += seconds


_BUDGETS: WeakKeyDictionary[object, Budget] = WeakKeyDictionary()


def budget_of(trainer: object, anew: bool = False) -> Budget:
    """The budget of a trainer, or a new one where training begins."""
    if anew or trainer not in _BUDGETS:
        _BUDGETS[trainer] = Budget()
    return _BUDGETS[trainer]
