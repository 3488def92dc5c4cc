"""When monitors evaluate, and of how many samples: as often as is worth having within a share of the training's time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_gendiag.model.amounts import run_progress

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_gendiag.callbacks.monitor import Monitor


EVALUATIONS = 75
"""Number of evaluations that are worth having: a run of fewer epochs is evaluated within them, and evaluations have more
samples where there are so many all the same."""

HELD_BACK = 0.02
"""Part of the limit that is left for what is not measured, such as what loggers write in threads of their own."""

NEWEST = 5
"""The cost of a monitor is the median of its newest evaluations."""

LEAST_ALLOWANCE = 0.1
"""Where the setup has used the budget up, monitors are due as if this part of it were left."""

JOINED = 0.1
"""Data that cost less than this part of the samples are evaluated more often than these."""

EVERY = 2
"""Data that cost more take part in each second round of samples: an evaluation is of all batches since the one before, and an
alarm on samples, which says whether the data moved as well, takes two evaluations at least."""

PANEL = 2.0
"""The panels at the end of a short run take about so many times as long as an evaluation of each monitor."""

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
        self.noted = 0.0
        """Of the time that was spent, the seconds in which nothing was evaluated, from the first round on."""
        self.rounds = 0
        self.ready = False

    @property
    def training(self) -> float:
        """Seconds since training began, without those that checks and evaluations took."""
        return time.monotonic() - self.started - self.spent

    def grants(self, max_overhead: float, progress: float = 1.0, cost: float | None = None) -> bool:
        """Returns whether another round may take place: the first always, a later one if it stays within the limit.

        Args:
            max_overhead: Largest share of the training's time.
            progress: Share of the run that is done, 0 to 1; 1 where its length is not known.
            cost: Seconds that the round will take; by default those of other rounds.
        """
        # rounds in which no monitor had its real images yet do not count
        self.rounds *= self.ready
        later = self.spent - self.first
        if cost is None:
            # the first round took much longer than others will
            cost = later / (self.rounds - 1) if self.rounds > 1 else self.first / 4
        limit = (1 - HELD_BACK) * max_overhead * self.training
        # as in the plan, the setup leaves a part
        return self.rounds == 0 or later + cost <= max(limit - self.first * progress, LEAST_ALLOWANCE * limit)

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

    def note(self, seconds: float) -> None:
        """Adds the time of a hook that evaluated nothing."""
        self.spent += seconds
        self.noted += seconds * (self.rounds > 0)

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
        self.dues = 0
        """Number of times at which a monitor with a limit was due."""
        self.is_short = False
        """Whether the run is so short that panels are drawn at its end."""
        self._costs: dict[str, deque[float]] = {}
        self._drawing: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._last_due: dict[str, float] = {}

    def choose(self, monitors: Sequence[Monitor[Any, Any]], step: int, epoch_over: bool) -> list[Monitor[Any, Any]]:
        """Returns the monitors that evaluate at a step, the same on every process.

        Args:
            monitors: All that are enabled.
            step: Of ``self.log``.
            epoch_over: Whether a training epoch has ended, or a batch.
        """
        due = [monitor for monitor in monitors if self._is_due(monitor, step, epoch_over)]
        if not due:
            return due
        limited = [monitor for monitor in monitors if monitor.max_overhead is not None]
        if not any(monitor in due for monitor in limited):
            return due
        self.dues += 1
        if not self.budget.ready:
            # rounds in which no monitor had its real images yet do not count
            self._last_due.clear()
        asking = [
            monitor
            for monitor in limited
            if monitor in due or (monitor.name in self._waiting and _by_steps(monitor) != epoch_over)
        ]
        units = self._units(limited)
        periods = self._periods(units)
        # one that is due a tenth as often as another takes part in each tenth round
        wanted = [m for m in asking if self.dues - self._last_due.get(m.name, 0.0) >= periods[m.name]]
        names = self._granted(wanted, units, periods, limit_of(due))
        if self.trainer.world_size > 1:
            names = self.trainer.strategy.broadcast(names)
        self.budget.rounds += bool(names)
        for monitor in asking:
            if monitor.name in names:
                self._waiting.discard(monitor.name)
                # what is due each 2.5 times waits two times and three in turn
                before = self._last_due.get(monitor.name, 0.0)
                self._last_due[monitor.name] = max(before + periods[monitor.name], self.dues - 1 + 1e-6)
            else:
                self._waiting.add(monitor.name)
        return [m for m in monitors if (m in due if m.max_overhead is None else m.name in names)]

    def _granted(
        self,
        wanted: Sequence[Monitor[Any, Any]],
        units: Mapping[Monitor[Any, Any], str],
        periods: Mapping[str, float],
        max_overhead: float,
    ) -> set[str]:
        """Names of the monitors for which there is time, those first that have waited longest for their period."""
        progress, taken, granted = run_progress(self.trainer) or 1.0, 0.0, set()
        waited = {units[m]: (self.dues - self._last_due.get(m.name, 0)) / periods[m.name] for m in wanted}
        for unit in sorted(waited, key=lambda unit: -waited[unit]):
            members = [monitor for monitor in wanted if units[monitor] == unit]
            taken += sum(self.cost(m) + m.draws * self._drawing.get(m.name, 0.0) for m in members)
            if not self.budget.grants(max_overhead, progress, taken or None):
                break
            granted |= {monitor.name for monitor in members}
        return granted

    def _is_due(self, monitor: Monitor[Any, Any], step: int, epoch_over: bool) -> bool:
        if _by_steps(monitor) == epoch_over:
            return False
        if monitor.every_n_train_steps is not None:
            return (step + 1) % monitor.every_n_train_steps == 0 and self.trainer.current_epoch >= monitor.warmup_epochs
        epoch = self.trainer.current_epoch
        return (epoch + 1) % monitor.every_n_epochs == 0 and epoch + 1 > monitor.warmup_epochs

    # ---- what evaluations cost ----

    def note(self, monitor: Monitor[Any, Any], seconds: float, anew: bool = False) -> None:
        """Notes what an evaluation of a monitor took, without its panels and what is done once.

        Args:
            monitor: The monitor.
            seconds: The same on all processes.
            anew: Whether evaluations before were of another size.
        """
        if anew:
            self._costs.pop(monitor.name, None)
        self._costs.setdefault(monitor.name, deque(maxlen=NEWEST)).append(max(seconds, 0.0))

    def note_drawing(self, monitor: Monitor[Any, Any], seconds: float) -> None:
        """Notes what the panels of a monitor took, which are drawn at some evaluations only."""
        self._drawing[monitor.name] = seconds

    def cost(self, monitor: Monitor[Any, Any]) -> float:
        """Returns the seconds that an evaluation of a monitor takes."""
        return median(self._costs.get(monitor.name, [monitor.expected_seconds]))

    @property
    def coming(self) -> float:
        """Number of rounds to come after this one; inf where the length of the run is not known."""
        progress = run_progress(self.trainer)
        return math.inf if progress is None else max(self.dues, 1) * (1 / max(progress, 1e-9) - 1)

    def _allowance(self, max_overhead: float) -> float:
        """The seconds that each round from this one on may take."""
        budget = self.budget
        each = (1 - HELD_BACK) * max_overhead * budget.training / max(self.dues, 1)
        if self.coming == math.inf:
            return each
        # panels are drawn each time the number of evaluations has doubled at least, and once in a short run
        panels = sum(self._drawing.values()) * math.log2(1 + self.coming) / 2
        if self.is_short:
            panels = PANEL * sum(map(median, self._costs.values()))
        hooks = budget.noted / max(self.dues - 1, 1) * self.coming
        left = each * (max(self.dues, 1) + self.coming) - budget.spent - panels - hooks
        return max(left / (self.coming + 1), LEAST_ALLOWANCE * each)

    def periods(self, monitors: Sequence[Monitor[Any, Any]]) -> dict[str, float]:
        """Returns in which number of rounds each monitor takes part once.

        Cheap ones are evaluated whenever they are due, and expensive ones as often as their share of the time allows.

        Args:
            monitors: All with a limit.
        """
        return self._periods(self._units(monitors))

    def _periods(self, units: Mapping[Monitor[Any, Any], str]) -> dict[str, float]:
        monitors = list(units)
        relative = {m: self.relative_period(m, monitors) * self._share(m, units[m]) for m in monitors}
        least = {unit: min(relative[m] for m in monitors if units[m] == unit) for unit in units.values()}
        costs = dict.fromkeys(least, 0.0)
        for monitor, unit in units.items():
            costs[unit] += self.cost(monitor) * least[unit] / relative[monitor]
        weights = {unit: list(units.values()).count(unit) for unit in costs}
        periods = shared(costs, weights, least, self._allowance(limit_of(monitors)), self.coming + 1)
        return {m.name: periods[unit] * relative[m] / least[unit] for m, unit in units.items()}

    def _units(self, monitors: Sequence[Monitor[Any, Any]]) -> dict[Monitor[Any, Any], str]:
        """What is evaluated at the same times: what is drawn once, and the data with the samples, unless these cost far more.

        An alarm on samples says whether the data moved as well.
        """
        units = {monitor: monitor.shares() for monitor in monitors}
        samples = sum(
            self.cost(m) / self.relative_period(m, monitors) for m, unit in units.items() if unit == "samples"
        )
        joining = [m for m in monitors if m.watches_batches and self.cost(m) > JOINED * samples > 0]
        return units | dict.fromkeys(joining, "samples")

    @staticmethod
    def _share(monitor: Monitor[Any, Any], unit: str) -> int:
        """In how many rounds of its unit a monitor takes part once."""
        return EVERY if monitor.watches_batches and unit == "samples" else 1

    def affords(self, monitors: Sequence[Monitor[Any, Any]], among: Sequence[Monitor[Any, Any]]) -> bool:
        """Returns whether monitors evaluate as often as is worth having.

        Args:
            monitors: Those that are asked for.
            among: All with a limit.
        """
        periods, dues = self.periods(among), self.dues + self.coming
        spare = 1 if dues == math.inf else dues // EVALUATIONS
        return all(periods[m.name] <= max(self.relative_period(m, among), spare) for m in monitors)

    def relative_period(self, monitor: Monitor[Any, Any], monitors: Sequence[Monitor[Any, Any]]) -> int:
        """Returns how many times as often as this monitor the most frequent one is due."""
        periods = [
            _period(other)
            for other in monitors
            if (other is monitor or self.trainer.current_epoch >= other.warmup_epochs)
            and other.max_overhead is not None
            and _by_steps(other) == _by_steps(monitor)
        ]
        return _period(monitor) // min(periods)


def limit_of(monitors: Sequence[Monitor[Any, Any]]) -> float:
    """Returns the smallest share of the training's time that any of these monitors allows; at least one must have a limit."""
    return min(monitor.max_overhead for monitor in monitors if monitor.max_overhead is not None)


def _by_steps(monitor: Monitor[Any, Any]) -> bool:
    return monitor.every_n_train_steps is not None


def _period(monitor: Monitor[Any, Any]) -> int:
    return monitor.every_n_train_steps or monitor.every_n_epochs


def shared(
    costs: Mapping[str, float], weights: Mapping[str, int], least: Mapping[str, float], allowance: float, rounds: float
) -> dict[str, float]:
    """Returns in which number of rounds each part takes place once, so that together they take at most an allowance a round.

    Periods go with the square roots of the costs, which makes the mean period least, but no part takes more than an equal
    share, unless others leave some of theirs. What does not fit even once leaves its share to the others.

    Args:
        costs: Seconds of each part.
        weights: Number of monitors in each.
        least: Smallest period of each.
        allowance: Seconds, more than 0.
        rounds: Number of rounds to come, at least 1.

    Example:
        >>> costs = {"regions": 0.01, "entropies": 0.04, "primitives": 2.0}
        >>> once = dict.fromkeys(costs, 1)
        >>> {name: round(period, 1) for name, period in shared(costs, once, once, 0.1, 100).items()}
        {'regions': 1, 'entropies': 1, 'primitives': 40.0}
    """
    left, rest, periods = allowance, dict(costs), dict.fromkeys(costs, 0.0)
    parts = sum(weights[name] for name in costs)
    while rest:
        scale = sum(math.sqrt(cost * weights[name]) for name, cost in rest.items()) / max(left, 1e-9)
        ideal = {name: scale * math.sqrt(cost / weights[name]) for name, cost in rest.items()}
        for name, cost in rest.items():
            periods[name] = max(ideal[name], cost * parts / weights[name] / allowance, least[name])
        # those whose period is another than that of the square root have a share of their own
        settled = [name for name in rest if periods[name] > ideal[name]]
        left -= sum(rest.pop(name) / periods[name] for name in settled)
        if not settled:
            break
    dearest = max(costs, key=costs.__getitem__)
    if len(costs) > 1 and periods[dearest] > max(rounds, least[dearest]):
        others = {name: cost for name, cost in costs.items() if name != dearest}
        return shared(others, weights, least, allowance, rounds) | {dearest: periods[dearest]}
    while free := [name for name in costs if periods[name] > least[name] and costs[name] > 0]:
        taken = sum(costs[name] / periods[name] for name in costs)
        theirs = sum(costs[name] / periods[name] for name in free)
        if taken > (1 - 1e-9) * allowance:
            break
        # what is left goes to all that could take part more often
        factor = theirs / (theirs + allowance - taken)
        periods |= {name: max(factor * periods[name], least[name]) for name in free}
    return periods


def stream_period(trainer: Trainer, within_epochs: bool = False) -> int | None:
    """Returns the number of steps between evaluations of a run that would be over, or go on, within its first epoch.

    Args:
        trainer: The trainer.
        within_epochs: Whether a run of few epochs is evaluated within them as well.

    Returns:
        None for a run with many epochs, which is evaluated at their ends.
    """
    # each of several optimizers counts its own steps
    steps, batches = trainer.max_steps // max(1, len(trainer.optimizers)), trainer.num_training_batches
    if batches == math.inf:
        return max(1, steps // EVALUATIONS) if steps > 0 else ENDLESS
    # an epoch has as many steps, whatever number of batches a step takes
    in_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    if 0 < steps * trainer.accumulate_grad_batches <= batches:
        return max(1, steps // EVALUATIONS)
    epochs = min([n for n in (trainer.max_epochs or 0, steps / max(in_epoch, 1)) if n > 0], default=math.inf)
    if not within_epochs or epochs >= EVALUATIONS:
        return None
    period = max(1, in_epoch // math.ceil(EVALUATIONS / epochs))
    return period if period < in_epoch else None
