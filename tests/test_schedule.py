from __future__ import annotations

import itertools
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gendiag import CosineMeanSimilarityMonitor, GenerativeDiagnostics, ModelAdapter
from lightning_gendiag.callbacks import schedule
from lightning_gendiag.callbacks.schedule import TimeBudget
from lightning_gendiag.model.view import ModelView
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, trainer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def evaluate(budget: TimeBudget, share: float, progress: float = 1.0) -> bool:
    """Asks whether to evaluate, and counts the evaluation, as the schedule does."""
    answer = budget.grants(share, progress)
    budget.rounds += answer
    return answer


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_overhead_stays_below_the_limit_after_the_first_evaluation_is_paid_off(clock: Clock, share: float) -> None:
    budget, evaluations = TimeBudget(), 0
    for _ in range(1000):
        clock.now += 1.0
        if evaluate(budget, share):
            evaluations += 1
            # the first evaluation takes longer
            seconds = 5.0 if evaluations == 1 else 0.4
            clock.now += seconds
            budget.charge(seconds)
    assert budget.spent <= share * budget.training
    # the time that is permitted is used
    assert budget.spent > 0.9 * min(share * budget.training, 5 + 999 * 0.4)


@pytest.mark.parametrize("known", [True, False])
def test_the_setup_is_spread_over_a_run_of_known_length(clock: Clock, known: bool) -> None:
    budget, evaluations = TimeBudget(), []
    for step in range(400):
        clock.now += 1.0
        if evaluate(budget, 0.05, (step + 1) / 400 if known else 1.0):
            evaluations.append(step)
            seconds = 5.0 if len(evaluations) == 1 else 0.4
            clock.now += seconds
            budget.charge(seconds)
    assert budget.spent <= 0.05 * budget.training
    # with a known length, the setup is spread over the run; otherwise 100 more steps must pay for it first
    assert (evaluations[1] < 75) == known
    assert evaluations[1] < 160
    assert max(b - a for a, b in itertools.pairwise(evaluations[1:])) <= 25


def test_attempts_without_real_images_are_not_counted_as_evaluations(clock: Clock) -> None:
    budget, evaluations = TimeBudget(), []
    for step in range(100):
        clock.now += 1.0
        if evaluate(budget, 0.1, (step + 1) / 100):
            ready = step >= 12
            evaluations += [step] * ready
            seconds = 0.001 if not ready else 5.0 if len(evaluations) == 1 else 0.4
            clock.now += seconds
            budget.charge(seconds, ready)
    # the first evaluation sets everything up, which is spread over the run: 0.05 t + 5 / 4 <= 0.098 t
    assert evaluations[:2] == [12, 26]


class Slow(CosineMeanSimilarityMonitor):
    """A monitor whose evaluations take at least 30 ms."""

    def update(self, view: ModelView) -> None:
        super().update(view)
        time.sleep(0.03)


class Steady(ScriptedGenerator):
    """A model whose training steps take at least 10 ms."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def run_with(max_overhead: float | None, epochs: int = 30) -> tuple[Slow, Slow, Any]:
    adapter = ModelAdapter(num_samples=32, num_reference=64)
    often = Slow(adapter=adapter, num_regions=2, max_overhead=max_overhead, log_images=False)
    rarely = Slow(
        adapter=adapter, num_regions=2, max_overhead=max_overhead, log_images=False, name="rare", every_n_epochs=3
    )
    own = trainer(often, rarely, max_epochs=epochs)
    own.fit(Steady(size=8), batches(8, 64))
    return often, rarely, own


def test_without_a_limit_no_evaluation_is_skipped() -> None:
    often, rarely, _ = run_with(None)
    assert (often.evaluations, rarely.evaluations) == (30, 10)


def test_slow_evaluations_are_rarer_in_proportion_and_the_plan_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        often, rarely, own = run_with(0.2, 60)
    assert 1 <= often.evaluations < 25
    # the monitor that is due every third epoch is evaluated a third as often
    assert abs(rarely.evaluations - often.evaluations // 3) <= 1
    assert own.current_epoch == 60
    logged = [record.message for record in caplog.records if record.message.startswith("Plan: ")]
    assert len(logged) == 1
    assert re.search(r"of 32 samples, (1\d|20)% of the training time", logged[0])


@pytest.mark.parametrize("options", [{"warmup_epochs": 100}, {}])
def test_a_rare_monitor_does_not_wait_for_one_that_is_disabled(options: dict[str, Any]) -> None:
    adapter = ModelAdapter(num_samples=32, num_reference=64)
    often = CosineMeanSimilarityMonitor(num_regions=2, adapter=adapter, max_overhead=1.0, **options)
    rarely = CosineMeanSimilarityMonitor(
        num_regions=2, adapter=adapter, max_overhead=1.0, every_n_epochs=4, name="rare"
    )
    own = trainer(often, rarely, max_epochs=12)
    often.enabled = bool(options)
    own.fit(ScriptedGenerator(size=8), batches(8, 64))
    assert often.evaluations == 0
    assert rarely.evaluations >= 1


def test_an_invalid_overhead_raises_an_error() -> None:
    with pytest.raises(ValueError, match="max_overhead must be in"):
        CosineMeanSimilarityMonitor(max_overhead=0)
    assert all(monitor.max_overhead == 0.05 for monitor in GenerativeDiagnostics().monitors.values())


def test_seconds_before_training_belong_to_the_time_in_which_they_passed(clock: Clock) -> None:
    budget = TimeBudget()
    budget.charge_setup(4.0)
    assert (budget.spent, budget.training) == (4.0, 0.0)
    clock.now += 10.0
    budget.charge(2.0)
    # four seconds of checks, two of an evaluation and eight of training make fourteen
    assert (budget.spent, budget.training) == (6.0, 8.0)
