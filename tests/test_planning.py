"""How large evaluations are and how often they take place, on a clock that only the models and monitors of a test move."""

from __future__ import annotations

import itertools
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    GenerativeDiagnostics,
    ModelAdapter,
    TrainingDataMonitor,
)
from lightning_gendiag.callbacks import schedule, session
from lightning_gendiag.callbacks.collapse_stopping import CollapseWarning
from lightning_gendiag.callbacks.monitor import PlotContext
from lightning_gendiag.callbacks.schedule import shared
from lightning_gendiag.model.view import ModelView
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, loading, trainer

NOW = SimpleNamespace(seconds=0.0)
STEP = 1.0
"""Seconds of a training step."""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (schedule, session):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW.seconds))


class Timed(ScriptedGenerator):
    """A model whose training steps take a second of that clock."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        NOW.seconds += STEP
        return super().training_step(batch, batch_idx)


class Priced(CosineMeanSimilarityMonitor):
    """A monitor whose evaluations take ``fixed`` seconds and ``each`` more for each sample."""

    def __init__(self, fixed: float, each: float, once: float = 0.0, **kwargs: Any) -> None:
        super().__init__(num_regions=2, log_images=False, **kwargs)
        self.fixed, self.each, self.once = fixed, each, once
        self.sizes: list[int] = []

    def build_metric(self, view: ModelView) -> Any:
        NOW.seconds += self.once
        return super().build_metric(view)

    def update(self, view: ModelView) -> None:
        super().update(view)
        samples = len(view.samples().images)
        self.sizes.append(samples)
        NOW.seconds += self.fixed + self.each * samples


class Drawn(Priced):
    """One whose panels take twice as long as its evaluations."""

    def __init__(self, fixed: float, **kwargs: Any) -> None:
        super().__init__(fixed, 0.0, **kwargs)
        self.log_images = True
        self.drawn: list[int] = []

    def log_plots(self, result: Any, context: PlotContext) -> None:
        self.drawn.append(context.evaluation.number)
        NOW.seconds += 2 * self.fixed


class PricedData(TrainingDataMonitor):
    """A monitor of the data whose evaluations take some seconds."""

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        super().__init__(log_images=False, **kwargs)
        self.price = seconds

    def update(self, view: ModelView) -> None:
        super().update(view)
        NOW.seconds += self.price


def run(monitor: Priced, epochs: int = 100, *others: Any, script: Any = None) -> Any:
    own = trainer(monitor, *others, max_epochs=epochs)
    own.fit(Timed(script, size=8), batches(8, 64))
    return own


@pytest.mark.parametrize(
    ("fixed", "each", "size", "evaluations"),
    [(0.01, 1e-4, 1024, 100), (0.01, 4e-4, 256, 100), (0.01, 2e-3, 64, 100), (0.6, 1e-3, 64, 27), (60.0, 0.0, 64, 1)],
)
def test_evaluations_are_as_large_as_still_lets_there_be_enough_of_them(
    fixed: float, each: float, size: int, evaluations: int, caplog: pytest.LogCaptureFixture
) -> None:
    # a hundred epochs of four seconds, of which a twentieth is 20 seconds
    monitor = Priced(fixed, each, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        own = run(monitor)
    # all evaluations from the first one on are of one size
    assert set(monitor.sizes[-monitor.evaluations :]) == {size}
    assert monitor.evaluations == pytest.approx(evaluations, rel=0.1)
    budget = monitor.session.schedule.budget
    # hooks at each batch take real time
    assert budget.training == pytest.approx(400 * STEP, rel=1e-3)
    assert budget.spent <= max(0.05 * 400 * STEP, 4 * (fixed + each * size))
    (plan,) = (record.message for record in caplog.records if record.message.startswith("Plan: "))
    said = re.match(r"Plan: about (\d+) evaluations? of ([\d,]+) samples, (\d+)% of the training time", plan)
    assert said is not None
    assert int(said[1]) == pytest.approx(monitor.evaluations, rel=0.15)
    assert said[2] == f"{size:,}"
    assert own.current_epoch == 100


def test_the_plan_says_when_an_alarm_is_possible_and_when_none_is(caplog: pytest.LogCaptureFixture) -> None:
    for fixed in (0.01, 2.0):
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            run(Priced(fixed, 1e-5, adapter=ModelAdapter(num_reference=64), max_overhead=0.05), 100, CollapseStopping())
    possible, impossible = (record.message for record in caplog.records if record.message.startswith("Plan: "))
    # three series are judged: two regions and the image
    assert re.search(r"the first alarm is possible after epoch (?:9|1[01])\.", possible)
    assert re.search(r"no alarm is possible, since it takes 10 evaluations\. .*max_overhead=None", impossible)


class Slower(Priced):
    """A monitor whose evaluations take another time once training goes on."""

    factor = 1.0

    def update(self, view: ModelView) -> None:
        super().update(view)
        if self.latest is not None:
            NOW.seconds += (self.factor - 1) * self.fixed


@pytest.mark.parametrize(
    ("factor", "epochs", "said_again"),
    [(1.0, 200, False), (1.2, 200, False), (4.0, 200, True), (0.25, 200, True), (1.0, 80, False), (8.0, 80, True)],
)
def test_the_plan_is_said_once_more_where_evaluations_take_another_time_than_at_first(
    factor: float, epochs: int, said_again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = Slower(0.4, 0.0, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    monitor.factor = factor
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        run(monitor, epochs, CollapseStopping())
    plans = [record.message for record in caplog.records if record.message.startswith("Plan")]
    assert len(plans) == 1 + said_again
    numbers = [int(re.search(r"about (\d+) evaluations of 64 samples", plan)[1]) for plan in plans]  # type: ignore[index]
    assert numbers[-1] == pytest.approx(monitor.evaluations, rel=0.15 if said_again else 1 / 3, abs=1)
    if said_again:
        assert plans[1].startswith("Plan, by what evaluations have taken so far: about")
        assert not numbers[0] / 1.3 < numbers[1] < numbers[0] * 1.3
    if said_again and numbers[1] < 10:
        assert "no alarm is possible, since it takes 10 evaluations" in plans[1]
    elif said_again:
        # three series are judged: two regions and the image
        first = int(re.search(r"the first alarm is possible after epoch (\d+)\.", plans[1])[1])  # type: ignore[index]
        assert first == pytest.approx(epochs * 10 / monitor.evaluations, rel=0.2)


class Rare(Priced):
    period_multiplier = 5


class Alone(Priced):
    def shares(self) -> str:
        return self.name


@pytest.mark.parametrize(
    ("make", "seconds", "every", "epochs", "said"),
    [
        (Rare, 0.0, 5, 4, "other never, since it takes part in one of 5 evaluations"),
        (Rare, 0.0, 5, 7, "other once, since it takes part in one of 5 evaluations"),
        (Rare, 0.0, 5, 12, "other 2 times"),
        (Alone, 50.0, 1, 4, "other once, since it may take 50 s"),
    ],
)
def test_the_plan_says_how_often_others_are_evaluated_and_why_if_hardly_ever(
    make: type[Priced], seconds: float, every: int, epochs: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"adapter": ModelAdapter(num_reference=64), "max_overhead": 0.05}
    other = make(seconds, 0.0, name="other", every_n_epochs=every, **common)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        run(Priced(0.01, 1e-5, name="often", **common), epochs, other)
    (plan,) = (record.message for record in caplog.records if record.message.startswith("Plan: "))
    assert f"({said})" in plan
    number = {"never": 0, "once": 1}.get(said.split(",")[0].split()[1]) or int(
        re.sub(r"\D", "", said.split(",")[0]) or 0
    )
    assert other.evaluations == pytest.approx(number, abs=0.1 * number)


def test_the_plan_counts_evaluations_of_the_module_and_not_those_of_the_data(caplog: pytest.LogCaptureFixture) -> None:
    # reconstructions share no samples
    own = Alone(1.0, 0.0, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    data = PricedData(0.001, max_overhead=0.05)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        run(own, 100, data)
    (plan,) = (record.message for record in caplog.records if record.message.startswith("Plan: "))
    said = int(re.search(r"about (\d+) evaluations", plan)[1])  # type: ignore[index]
    assert said == pytest.approx(own.evaluations, rel=0.15)
    assert data.evaluations > 3 * own.evaluations


def test_a_setup_that_uses_the_budget_up_leaves_a_part_of_it() -> None:
    # 20 seconds for evaluations, of which the setup takes 19.5 twice
    monitor = Priced(0.05, 0.0, once=39.0, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    run(monitor)
    assert monitor.evaluations > 10


def test_the_number_of_samples_is_the_users_where_one_is_given_or_a_monitor_has_no_limit() -> None:
    given = Priced(0.01, 1e-3, adapter=ModelAdapter(num_samples=48, num_reference=64), max_overhead=0.05)
    run(given, 12)
    assert set(given.sizes) == {48}
    free = Priced(0.01, 1e-3, adapter=ModelAdapter(num_reference=64))
    run(free, 3, CosineMeanSimilarityMonitor(num_regions=2, name="limited", max_overhead=0.05, log_images=False))
    assert set(free.sizes) == {1024}


@pytest.mark.parametrize(("fixed", "price", "together"), [(0.5, 0.5, True), (3.0, 0.5, True), (5.0, 0.05, False)])
def test_the_data_are_evaluated_with_each_second_samples_unless_these_cost_far_more(
    fixed: float, price: float, together: bool
) -> None:
    data = PricedData(price, max_overhead=0.05)
    samples = Priced(fixed, 0.0, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    run(samples, 400, data)
    assert samples.evaluations > 1
    if together:
        assert data.evaluations == pytest.approx(samples.evaluations / 2, abs=2)
    else:
        assert data.evaluations > 3 * samples.evaluations
    assert samples.session.schedule.budget.spent < 0.05 * 1600 * STEP + 2 * fixed


@pytest.mark.parametrize(("epochs", "drawn"), [(60, [50, 60]), (30, [30]), (128, [1, 2, 4, 8, 16, 32, 64, 128])])
def test_panels_of_a_short_run_are_drawn_at_its_end(epochs: int, drawn: list[int]) -> None:
    monitor = Drawn(1e-3, adapter=ModelAdapter(num_samples=64, num_reference=64), max_overhead=0.05)
    run(monitor, epochs)
    assert monitor.evaluations == epochs
    assert monitor.drawn == drawn


@pytest.mark.parametrize("fixed", [0.3, 0.6])
def test_time_is_kept_for_the_panels_at_the_end_of_a_short_run(fixed: float) -> None:
    monitor = Drawn(fixed, adapter=ModelAdapter(num_samples=64, num_reference=64), max_overhead=0.05)
    before = NOW.seconds
    run(monitor, 60)
    assert monitor.drawn == [monitor.evaluations]
    training = 60 * 4 * STEP
    # all that was not training, of which the plan uses most
    spent = NOW.seconds - before - training
    assert 0.9 < spent / (0.05 * training) < 1.001


def test_a_rehearsal_leaves_no_trace() -> None:
    monitor = Priced(0.01, 1e-4, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    run(monitor, 1)
    assert len(monitor.sizes) > 2
    assert monitor.evaluations == 1
    assert {len(curve.steps) for curve in monitor.session.history.curves("cms").values()} == {1}


def test_a_rehearsal_of_the_size_that_is_chosen_is_the_first_evaluation() -> None:
    monitor = Priced(0.6, 1e-3, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    run(monitor, 1)
    # set up, and measured
    assert monitor.sizes == [64, 64]
    assert monitor.evaluations == 1
    alike = Priced(0.6, 1e-3, adapter=ModelAdapter(num_samples=64, num_reference=64))
    run(alike, 1)
    assert alike.sizes == [64]
    curves, expected = (m.session.history.curves("cms") for m in (monitor, alike))
    assert {name: curve.values for name, curve in curves.items()} == {n: c.values for n, c in expected.items()}


def test_a_resumed_run_keeps_the_number_of_samples(tmp_path: Any) -> None:
    before = Priced(0.01, 4e-4, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    own = run(before, 100)
    own.save_checkpoint(tmp_path / "run.ckpt")
    # as if evaluations were cheap now
    after = Priced(0.0, 1e-6, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    trainer(after, max_epochs=110).fit(Timed(size=8), batches(8, 64), ckpt_path=tmp_path / "run.ckpt", **loading(False))
    assert after.evaluations > before.evaluations
    assert set(before.sizes[-before.evaluations :]) == set(after.sizes) == {256}


def broken(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, :, :4] = -1.0
    return images


@pytest.mark.parametrize("is_real", [False, True])
@pytest.mark.filterwarnings("ignore::lightning_gendiag.callbacks.collapse_stopping.CollapseWarning")
def test_where_a_small_evaluation_is_suspicious_a_full_one_decides(is_real: bool) -> None:
    # small evaluations have 64 samples in one call, and full ones 1,024 in calls of 128
    def script(images: Tensor, epoch: int) -> Tensor:
        return broken(images) if epoch >= 40 and (is_real or len(images) == 64) else images

    monitor = Priced(0.01, 2e-3, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    stopping = CollapseStopping("warn")
    run(monitor, 60, stopping, script=script)
    assert 1024 in monitor.sizes
    numbers = [entry.number for entry in monitor.session.history.entries("cms", "image")]
    # a full evaluation takes the place of the small one
    assert numbers == list(range(1, monitor.evaluations + 1))
    assert bool(stopping.alarms) == is_real
    if is_real:
        assert 40 <= stopping.alarms[0].epoch <= 43


@pytest.mark.filterwarnings("ignore:.*the run goes on without it.*", "ignore:generated images span")
def test_a_first_epoch_with_too_few_images_is_no_reason_to_end_the_run() -> None:
    diagnostics = GenerativeDiagnostics("warn", skip=("training_data",))
    own = trainer(diagnostics, max_epochs=80)
    own.fit(Timed(size=8), batches(8, 3))
    assert own.current_epoch == 80
    # of the second epoch there are enough
    assert 70 < diagnostics.monitors["cms"].evaluations < 80


class Still(Timed):
    """A model whose weights change and whose samples do not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        return self.weight.sum()

    def sample(self, n: int) -> Tensor:
        return self.pool[:n].repeat(math.ceil(n / len(self.pool)), 1, 1, 1)[:n]


def test_a_full_evaluation_does_not_hide_that_samples_stay_the_same() -> None:
    monitor = Priced(0.01, 2e-3, adapter=ModelAdapter(num_reference=64), max_overhead=0.05)
    stopping = CollapseStopping("warn")
    with pytest.warns(CollapseWarning, match="samples do not change"):
        trainer(monitor, stopping, max_epochs=100).fit(Still(size=8), batches(8, 64))
    assert 1024 in monitor.sizes


def test_a_run_of_few_epochs_is_evaluated_within_them() -> None:
    diagnostics = GenerativeDiagnostics(None, adapter=ModelAdapter(num_reference=64), skip=("training_data",))
    own = trainer(diagnostics, max_epochs=3)
    own.fit(Timed(size=8), batches(8, 64 * 16, 16))
    # 64 steps an epoch, of which every second one is due
    assert diagnostics.monitors["cms"].every_n_train_steps == 2
    assert diagnostics.monitors["cms"].evaluations > 75
    unlimited = GenerativeDiagnostics(None, adapter=ModelAdapter(num_reference=64, num_samples=32), max_overhead=None)
    trainer(unlimited, max_epochs=3).fit(Timed(size=8), batches(8, 64))
    assert unlimited.monitors["cms"].evaluations == 3


def test_the_time_is_shared_by_what_each_part_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(1, 7, (), generator=generator))
        costs = {str(n): float(10 ** (3 * torch.rand((), generator=generator) - 3)) for n in range(count)}
        least = {name: int(torch.randint(1, 11, (), generator=generator)) for name in costs}
        allowance = float(10 ** (2 * torch.rand((), generator=generator) - 2))
        weights = {name: int(torch.randint(1, 3, (), generator=generator)) for name in costs}
        periods = shared(costs, weights, least, allowance, 1000)
        assert all(periods[name] >= least[name] for name in costs)
        fitting = {name for name, period in periods.items() if period <= 1000}
        assert sum(costs[name] / periods[name] for name in fitting) <= allowance * (1 + 1e-9)
        # what costs more is not evaluated more often
        rank = sorted(fitting, key=lambda name: costs[name] / weights[name])
        assert all(periods[a] <= periods[b] * (1 + 1e-9) or periods[a] == least[a] for a, b in itertools.pairwise(rank))
    # what does not fit once leaves its share to the others
    once = {"a": 1, "b": 1}
    assert shared({"a": 0.1, "b": 100.0}, once, once, 0.11, 50)["a"] == 1
