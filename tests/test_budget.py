from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gendiag import CosineMeanSimilarityMonitor, GenerativeDiagnostics, Monitor, Probe
from lightning_gendiag import budget as budgets
from lightning_gendiag.budget import Budget
from tests.conftest import ScriptedGenerator, batches, trainer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budgets, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_share_is_kept_once_the_first_look_is_paid_off(clock: Clock, share: float) -> None:
    budget, looks = Budget(), 0
    for step in range(1000):
        clock.now += 1.0
        if budget.ask(step, share):
            looks += 1
            # the first look costs more
            seconds = 5.0 if looks == 1 else 0.4
            clock.now += seconds
            budget.pay(seconds)
    assert budget.spent <= share * budget.training
    # and it is made use of
    assert budget.spent > 0.9 * min(share * budget.training, 5 + 999 * 0.4)


@pytest.mark.parametrize("known", [True, False])
def test_setting_up_is_written_off_over_a_run_of_known_length(clock: Clock, known: bool) -> None:
    budget, looks = Budget(), []
    for step in range(400):
        clock.now += 1.0
        if budget.ask(step, 0.05, (step + 1) / 400 if known else 1.0):
            looks.append(step)
            seconds = 5.0 if len(looks) == 1 else 0.4
            clock.now += seconds
            budget.pay(seconds)
    assert budget.spent <= 0.05 * budget.training
    # what was set up is made use of soon, where else 100 steps more must pay for it first
    assert (looks[1] < 75) == known
    assert looks[1] < 160
    assert max(b - a for a, b in itertools.pairwise(looks[1:])) <= 25


def test_rounds_without_real_images_are_none(clock: Clock) -> None:
    budget, looks = Budget(), []
    for step in range(100):
        clock.now += 1.0
        if budget.ask(step, 0.1, (step + 1) / 100):
            ready = step >= 12
            looks += [step] * ready
            seconds = 0.001 if not ready else 5.0 if len(looks) == 1 else 0.4
            clock.now += seconds
            budget.pay(seconds, ready)
    # what set everything up is the first, and is written off: 0.05 t + 2 * 5 / 4 <= 0.1 t
    assert looks[:2] == [12, 50]


def test_all_that_is_due_at_a_step_is_granted_together(clock: Clock) -> None:
    budget = Budget()
    clock.now += 1
    assert budget.ask(0, 0.05)
    budget.pay(10)
    assert budget.ask(0, 0.05)
    assert not budget.ask(1, 0.05)


class Slow(CosineMeanSimilarityMonitor):
    """Takes a while."""

    def feed(self, probe: Probe, step: int) -> None:
        super().feed(probe, step)
        time.sleep(0.03)


class Steady(ScriptedGenerator):
    """Takes 10 ms a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def watched(max_share: float | None, epochs: int = 30) -> tuple[Monitor, Monitor, Any]:
    probe = Probe(num_samples=32, num_reference=64)
    often = Slow(probe=probe, num_regions=2, max_share=max_share, draw_pictures=False)
    rarely = Slow(probe=probe, num_regions=2, max_share=max_share, draw_pictures=False, name="rare", every_n_epochs=3)
    own = trainer(often, rarely, max_epochs=epochs)
    own.fit(Steady(size=8), batches(8, 64))
    return often, rarely, own


def test_without_a_limit_every_look_is_taken() -> None:
    often, rarely, _ = watched(None)
    assert (often.evaluations, rarely.evaluations) == (30, 10)


def test_what_would_take_too_long_waits_in_proportion_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        often, rarely, own = watched(0.2, 60)
    assert 1 <= often.evaluations < 25
    # one that is rarely due neither waits for ever nor looks as often as the other
    assert rarely.evaluations == often.evaluations // 3
    assert own.current_epoch == 60
    told = [record.message for record in caplog.records if "look less often" in record.message]
    assert len(told) == 1
    assert "take at most 20%" in told[0]


@pytest.mark.parametrize("options", [{"warmup_epochs": 100}, {}])
def test_one_that_looks_rarely_does_not_wait_for_one_that_does_not_look(options: dict[str, Any]) -> None:
    probe = Probe(num_samples=32, num_reference=64)
    often = CosineMeanSimilarityMonitor(num_regions=2, probe=probe, max_share=1.0, **options)
    rarely = CosineMeanSimilarityMonitor(num_regions=2, probe=probe, max_share=1.0, every_n_epochs=4, name="rare")
    own = trainer(often, rarely, max_epochs=12)
    often.enabled = bool(options)
    own.fit(ScriptedGenerator(size=8), batches(8, 64))
    assert often.evaluations == 0
    assert rarely.evaluations >= 1


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="max_share must be in"):
        CosineMeanSimilarityMonitor(max_share=0)
    assert all(monitor.max_share == 0.05 for monitor in GenerativeDiagnostics().monitors.values())
