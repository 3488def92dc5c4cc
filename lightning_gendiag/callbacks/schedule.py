"""When monitors evaluate: how often each is due, and how much of the training's time they may take together."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_gendiag.callbacks.monitor import Monitor


EVALUATIONS = 75
"""Number of evaluations in a run of ``max_steps`` within one epoch."""

ENDLESS = 1000
"""Number of steps from one evaluation to the next in a run whose length is not known."""


class TimeBudget:
    """The time that evaluations took, beside the time that passed since training, or the checks before it, began.

    What is due at a step is granted or refused together, as one round, so that monitors share samples. The first round
    sets everything up, so it is written off over the run.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.spent = 0.0
        self.first = 0.0
        self.rounds = 0
        self.ready = False

    @property
    def training(self) -> float:
        """Seconds since training began, without those that checks and evaluations took."""
        return time.monotonic() - self.started - self.spent

    def grants(self, max_overhead: float, progress: float = 1.0) -> bool:
        """Returns whether another round may take place: the first always, a later one if it stays within the limit.

        Args:
            max_overhead: Largest share of the training's time.
            progress: Share of the run that is done, 0 to 1; 1 where its length is not known.
        """
        # rounds in which no monitor had its real images yet do not count
        self.rounds *= self.ready
        later = self.spent - self.first
        # the first round took much longer than others will
        usual = later / (self.rounds - 1) if self.rounds > 1 else self.first / 4
        # one more round, and one in reserve for the end of the run
        return self.rounds == 0 or self.first * progress + later + 2 * usual <= max_overhead * self.training

    def charge(self, seconds: float, ready: bool = True) -> None:
        """Adds the time of an evaluation.

        Args:
            seconds: Its time.
            ready: Whether the monitor had its real images.
        """
        self.spent += seconds
        self.ready |= ready
        if self.rounds <= 1:
            self.first += seconds

    def charge_setup(self, seconds: float) -> None:
        """Adds the time of checks that ended when the clock began, so that its time contains theirs."""
        self.started -= seconds
        self.charge(seconds, ready=False)


class Schedule:
    """Chooses the monitors that evaluate now.

    Args:
        trainer: Whose run it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.budget = TimeBudget()
        self.exceeded = False
        """Whether the budget has refused a round."""
        self._waiting: set[str] = set()
        self._last_round: dict[str, int] = {}

    def choose(self, monitors: Sequence[Monitor[Any, Any]], step: int, epoch_over: bool) -> list[Monitor[Any, Any]]:
        """Returns the monitors that evaluate at a step, the same on every process.

        Args:
            monitors: All that are enabled.
            step: Of ``self.log``.
            epoch_over: Whether a training epoch has ended, or a batch.
        """
        due = [monitor for monitor in monitors if self._is_due(monitor, step, epoch_over)]
        limits = [monitor.max_overhead for monitor in due if monitor.max_overhead is not None]
        if not limits:
            return due
        if not self.budget.ready:
            # rounds in which no monitor had its real images yet do not count
            self._last_round.clear()
        granted = self.budget.grants(min(limits), run_progress(self.trainer))
        if self.trainer.world_size > 1:
            granted = self.trainer.strategy.broadcast(granted)
        self.budget.rounds += granted
        self.exceeded |= not granted
        chosen = []
        for monitor in monitors:
            if monitor.max_overhead is None:
                chosen += [monitor] if monitor in due else []
            elif monitor in due or (monitor.name in self._waiting and _by_steps(monitor) != epoch_over):
                # in proportion: one that is due a tenth as often as another takes part in each tenth round
                rounds = self.budget.rounds - self._last_round.get(monitor.name, 0)
                if granted and rounds >= self._relative_period(monitor, monitors):
                    self._waiting.discard(monitor.name)
                    self._last_round[monitor.name] = self.budget.rounds
                    chosen.append(monitor)
                else:
                    self._waiting.add(monitor.name)
        return chosen

    def _is_due(self, monitor: Monitor[Any, Any], step: int, epoch_over: bool) -> bool:
        epoch = self.trainer.current_epoch
        if monitor.every_n_train_steps is None:
            return epoch_over and (epoch + 1) % monitor.every_n_epochs == 0 and epoch + 1 > monitor.warmup_epochs
        return not epoch_over and (step + 1) % monitor.every_n_train_steps == 0 and epoch >= monitor.warmup_epochs

    def _relative_period(self, monitor: Monitor[Any, Any], monitors: Sequence[Monitor[Any, Any]]) -> int:
        """How many times as often as this monitor the most frequent one is due."""
        periods = [
            _period(other)
            for other in monitors
            if (other is monitor or self.trainer.current_epoch >= other.warmup_epochs)
            and other.max_overhead is not None
            and _by_steps(other) == _by_steps(monitor)
        ]
        return _period(monitor) // min(periods)


def _by_steps(monitor: Monitor[Any, Any]) -> bool:
    return monitor.every_n_train_steps is not None


def _period(monitor: Monitor[Any, Any]) -> int:
    return monitor.every_n_train_steps or monitor.every_n_epochs


def run_progress(trainer: Trainer) -> float:
    """Returns the share of a run that is done, 0 to 1; 1 where its length is not known."""
    epochs, steps = trainer.max_epochs or 0, trainer.max_steps
    epoch = trainer.current_epoch + (trainer.fit_loop.epoch_loop.batch_idx + 1) / max(trainer.num_training_batches, 1)
    shares = [epoch / epochs] if epochs > 0 else []
    shares += [trainer.global_step / steps] if steps > 0 else []
    return min(max(shares, default=1.0), 1.0)


def stream_period(trainer: Trainer) -> int | None:
    """Returns the number of steps between evaluations of a run that would be over, or go on, within its first epoch.

    Returns:
        None for a run with several epochs, which is evaluated at their ends.
    """
    # each of several optimizers counts its own steps
    steps, batches = trainer.max_steps // max(1, len(trainer.optimizers)), trainer.num_training_batches
    if batches == math.inf:
        return max(1, steps // EVALUATIONS) if steps > 0 else ENDLESS
    # within one epoch, whatever number of batches a step takes
    long = 0 < steps * trainer.accumulate_grad_batches <= batches
    return max(1, steps // EVALUATIONS) if long else None
