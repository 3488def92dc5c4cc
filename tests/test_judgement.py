"""What an alarm means for a run: what may stop it, what is wrong in itself, and what the report says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from example_models.data import digits
from lightning_gendiag import (
    Alarm,
    CollapseStopping,
    CollapseWarning,
    CosineMeanSimilarity,
    CosineMeanSimilarityMonitor,
    Evaluation,
    ModelAdapter,
    Observation,
    Series,
)
from lightning_gendiag.detection.history import SHARE_OF_NAN, History, divided
from lightning_gendiag.detection.report import report
from lightning_gendiag.detection.rules import Judge
from tests.helpers.alarms import alarm
from tests.helpers.faults import QUADRANTS, run_with_fault
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, trainer

QUALITY = Series("image", "aggregate", "similarity", is_quality=True)
CLASS = Series("class 3", "component", "share", event="was dropped")


def calm(n: int, phase: int = 0) -> list[float]:
    """Returns values that fluctuate about 0."""
    return [((i * 7 + phase * 3) % 11 - 5) / 10 for i in range(n)]


def judged(
    quality: list[float], classes: list[float], series: Series = CLASS, **options: Any
) -> tuple[list[int], Judge]:
    """Returns at which evaluations a run is stopped, given the severities of its image and of a class, and the judge."""
    judge, history, stops = Judge(3e-4, 6, **options), History(), []
    for i, values in enumerate(zip(quality, classes, strict=True)):
        for monitor, of, value in zip(("cms", "generation_balance"), (QUALITY, series), values, strict=True):
            evaluation = Evaluation(i + 1, i, i, [Observation(of, -value, value)])
            history.append(monitor, evaluation)
            judge.update(monitor, evaluation, history)
        stops += [i] * bool(judge.stopping(history))
    return stops, judge


# ---- nan ----


@pytest.mark.parametrize(("stop", "raised"), [("alone", ["cms"]), ("never", ["cms", "generation_balance"])])
def test_what_is_nan_since_samples_are_raises_no_alarm_of_its_own(stop: Any, raised: list[str]) -> None:
    samples = Series("samples", "rule", SHARE_OF_NAN, stop=stop)
    judge, history = Judge(3e-4, 6), History()
    for i, value in enumerate([*calm(10), math.nan, math.nan]):
        broken = math.isnan(value)
        for monitor, observation in (
            ("cms", Observation(samples, float(broken), math.inf if broken else 0.0)),
            ("generation_balance", Observation(CLASS, value, value)),
        ):
            evaluation = Evaluation(i + 1, i, i, [observation])
            history.append(monitor, evaluation)
            judge.update(monitor, evaluation, history)
    assert [one.diagnostic for one in judge.alarms] == raised
    assert all(one.step == 10 for one in judge.alarms)
    assert judge.also_changed(judge.alarms[0]) == ["generation_balance: class 3"]


# ---- what may stop a run ----

FALLEN = [*calm(20, 1), *[9.0] * 20]


def test_a_part_that_had_fallen_before_has_no_share_in_a_later_drop() -> None:
    judge, history = Judge(3e-4, 6), History()
    for i in range(70):
        values = [calm(70)[i] + 9.0 * (i >= 30), calm(70, 1)[i] + 9.0 * (i >= 60), calm(70, 2)[i]]
        observed = [
            Observation(Series("region").numbered(r, name), -value, value)
            for r, (name, value) in enumerate(zip(("left", "right", "centre"), values, strict=True))
        ]
        evaluation = Evaluation(i + 1, i, i, observed)
        history.append("cms", evaluation)
        judge.update(
            "cms", evaluation, history, lambda before, after: divided({k: before[k] - after[k] for k in before})
        )
    left, right = judge.alarms
    assert (left.label, right.label) == ("left", "right")
    assert right.contributions["right"] > 0.9


def test_a_relapse_is_compared_with_the_level_before_the_first_fall() -> None:
    falls = [*calm(20), *[9.0] * 14, *calm(5), *[9.0] * 6]
    _, judge = judged(calm(len(falls)), falls)
    first, second = judge.alarms
    assert first.recovered is not None
    assert [abs(one.before) < 1 for one in (first, second)] == [True, True]
    assert second.after == -9.0


def test_a_class_does_not_stop_a_run_whose_images_become_better() -> None:
    stops, judge = judged([-0.2 * i + value for i, value in enumerate(calm(40))], FALLEN)
    assert stops == []
    assert [(alarm.label, alarm.is_critical) for alarm in judge.alarms] == [("class 3", False)]


def test_a_class_stops_a_run_whose_images_become_worse_with_it() -> None:
    stops, judge = judged([*calm(20), *[5.0] * 20], FALLEN)
    assert stops == [21]
    assert [alarm.is_critical for alarm in judge.alarms if alarm.label == "class 3"] == [True]


RULE = Series("use", "rule", "KL in nats", confirm=6, progress=0.02, stop="alone")


def of_rule(series: Series, values: list[float], holds: list[bool]) -> tuple[list[int], list[int]]:
    """Returns at which evaluations a rule raises an alarm, and at which it stops the run."""
    judge, history, raised, stops = Judge(3e-4, 6), History(), [], []
    for i, (value, wrong) in enumerate(zip(values, holds, strict=True)):
        evaluation = Evaluation(
            i + 1, i, i, [Observation(series, value, math.inf if wrong else 0.0, message="none is used")]
        )
        history.append("posterior_kl", evaluation)
        raised += [i] * bool(judge.update("posterior_kl", evaluation, history))
        stops += [i] * bool(judge.stopping(history))
    return raised, stops


def test_a_rule_that_holds_from_the_first_evaluation_on_stops_the_run_only_once_it_has_lasted() -> None:
    constant = [0.01] * 40
    assert of_rule(RULE, constant, [True] * 40) == ([5], [23])
    # a model that had used it does not recover in a few evaluations
    assert of_rule(RULE, constant, [False, *[True] * 39]) == ([6], [6])
    # one that recovers is not stopped
    assert of_rule(RULE, constant, [*[True] * 20, *[False] * 20]) == ([5], [])
    # nor does what is known at once wait
    assert of_rule(replace(RULE, confirm=1), constant, [True] * 40) == ([0], [0])


def test_a_rule_raises_no_alarm_while_its_value_doubles_or_grows_by_a_fixed_amount() -> None:
    holds = [True] * 30
    small = [1e-4 * 1.3**i for i in range(30)]
    assert small[12] < RULE.progress
    assert of_rule(RULE, small, holds) == ([], [])
    assert of_rule(RULE, [5 + 0.01 * i for i in range(30)], holds) == ([], [])
    assert of_rule(RULE, [1e-4 * (1 + 0.3 * (i % 2)) for i in range(30)], holds)[0] == [5]


def test_an_open_alarm_stops_the_run_when_the_whole_becomes_worse_later() -> None:
    stops, _ = judged([*calm(30), *[5.0] * 10], FALLEN)
    # of the three newest evaluations, or of all since the change, the median counts
    assert stops[0] in (30, 31, 32)


def test_an_alarm_that_may_stop_a_run_alone_needs_no_whole() -> None:
    stops, _ = judged(calm(40), FALLEN, Series("latent", "component", stop="alone"))
    assert stops == [21]


def test_an_alarm_that_may_never_stop_a_run_only_reports() -> None:
    stops, judge = judged([*calm(40)], FALLEN, Series("class 3", "component", stop="never"))
    assert stops == []
    assert len(judge.alarms) == 1


@pytest.mark.parametrize(
    ("event", "one", "several"),
    [
        ("was dropped", "was dropped", "were dropped"),
        ("is reconstructed worse", "is reconstructed worse", "are reconstructed worse"),
        ("collapsed", "collapsed", "collapsed"),
    ],
)
@pytest.mark.parametrize("number", [1, 4])
def test_several_components_are_said_to_have_changed_in_the_plural(
    event: str, one: str, several: str, number: int
) -> None:
    judge, history = Judge(3e-4, 6), History()
    for i, value in enumerate(FALLEN):
        observations = [
            Observation(Series("class", "component", "share", event=event).numbered(c), -worse, worse)
            for c in range(8)
            for worse in [value if c < number else calm(40, c)[i]]
        ]
        evaluation = Evaluation(i + 1, i, i, observations)
        history.append("generation_balance", evaluation)
        judge.update("generation_balance", evaluation, history)
    (alarm,) = judge.alarms
    named = sorted(alarm.label.split(", "))
    assert named == [f"class {c}" for c in range(number)]
    assert alarm.message.startswith(f"{alarm.label} {one if number == 1 else several}: share ")


def test_an_alarm_must_last_for_its_patience() -> None:
    worse = [*calm(20), *[5.0] * 20]
    patient = Series("class 3", "component", patience=8)
    quiet = Series("image", "aggregate")
    assert judged(worse, FALLEN, patient)[0][-1] == 21 + 8
    assert 21 + 2 in judged(worse, FALLEN, patient, patience=2)[0]
    back = [*calm(20, 1), *[9.0] * 4, *calm(16, 1)]
    assert judged(worse, back, patient)[0] == judged(worse, calm(40, 1), quiet)[0]


def test_without_images_the_monitor_s_own_aggregate_decides() -> None:
    judge, history = Judge(3e-4, 6), History()
    stops = []
    for i, value in enumerate(FALLEN):
        observations = [
            Observation(Series("dimension 0", "component"), -value, value),
            *(Observation(Series(f"dimension {d}", "component"), 0.0, calm(40, d)[i]) for d in range(1, 5)),
            Observation(Series("all", "aggregate"), 0.0, calm(40, 6)[i] + 3 * (i >= 30)),
        ]
        evaluation = Evaluation(i + 1, i, i, observations)
        history.append("manifold_entropy", evaluation)
        judge.update("manifold_entropy", evaluation, history)
        stops += [i] * bool(judge.stopping(history))
    assert stops[0] in (30, 31, 32)


def test_every_alarm_says_whether_the_training_data_changed() -> None:
    for moves in (False, True):
        judge, history = Judge(3e-4, 6), History()
        for i, value in enumerate(FALLEN):
            data = Series("class 7", "rule", "share of training images", stop="never")
            wrong = moves and i >= 20
            both = {
                "training_data": Observation(data, 0.0, math.inf if wrong else 0.0, message="class 7 is gone"),
                "generation_balance": Observation(CLASS, -value, value),
            }
            for monitor, observation in both.items():
                evaluation = Evaluation(i + 1, i, i, [observation])
                history.append(monitor, evaluation)
                judge.update(monitor, evaluation, history)
            judge.stopping(history)
        message = next(alarm for alarm in judge.alarms if alarm.label == "class 3").message
        expected = (
            "The training data changed as well: class 7 is gone." if moves else "The training data did not change."
        )
        assert message.endswith(expected)


# ---- what is wrong in itself ----


class Learning(ScriptedGenerator):
    """Has weights that change, though its samples do not depend on them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()


def noise(images: Tensor, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(epoch)
    return torch.rand(images.shape, generator=generator) * 2 - 1


def alike(images: Tensor, epoch: int) -> Tensor:
    return images.mean(0, keepdim=True) + 0.01 * torch.randn_like(images)


def narrow(images: Tensor, epoch: int) -> Tensor:
    return images * 0.4


def still(images: Tensor, epoch: int) -> Tensor:
    return digits(16)[0][: len(images)]


@pytest.mark.parametrize(
    ("script", "name", "words"),
    [
        (noise, "similarity of samples", "not similar to real images anywhere"),
        (alike, "spread of samples", "all samples are alike"),
        (narrow, "range of samples", "does not reach that of real images"),
        (still, "change of samples", "samples do not change"),
    ],
)
def test_what_is_wrong_from_the_beginning_is_found_and_stops_nothing(script: Any, name: str, words: str) -> None:
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, adapter=ModelAdapter(reference=digits(16)[0], num_samples=200))
    stopping = CollapseStopping()
    own = trainer(monitor, stopping, max_epochs=12)
    with pytest.warns(CollapseWarning, match=words):
        own.fit(Learning(script), batches(16, 32))
    assert own.current_epoch == 12
    assert [alarm.names for alarm in stopping.alarms] == [[name]]
    state = stopping.report()
    assert state["state"] == "unhealthy"
    assert words in state["summary"]


class Constant(Learning):
    """Reconstructs all images alike."""

    def __init__(self) -> None:
        super().__init__(alike)

    sample = None

    def reconstruct(self, images: Tensor) -> Tensor:
        return 0.001 * images


def test_a_rule_names_what_it_judges() -> None:
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, adapter=ModelAdapter(reference=digits(16)[0], num_samples=200))
    with pytest.warns(CollapseWarning, match="all reconstructions are alike"):
        trainer(monitor, CollapseStopping("warn"), max_epochs=8).fit(Constant(), batches(16, 32))


def test_a_healthy_run_breaks_no_rule() -> None:
    _, stopping = run_with_fault(None, epochs=16)
    assert stopping.alarms == []
    assert stopping.report()["state"] == "healthy"
    assert stopping.report()["bad"] == []


def test_noise_is_not_called_healthy_before_any_rule_has_held_for_long() -> None:
    _, stopping = run_with_fault(noise, epochs=7)
    assert stopping.alarms == []
    state = stopping.report()
    assert state["state"] == "unhealthy"
    assert "cosine mean similarity of top left is 0." in state["summary"]
    _, stopping = run_with_fault(noise, epochs=3)
    state = stopping.report()
    assert state["state"] == "not judged"
    newest = max(monitor.last_step or 0 for monitor in stopping.session.monitors)
    assert f"The newest evaluation, at step {newest}, was bad: " in state["summary"]


def test_what_is_bad_now_is_said_in_sentences() -> None:
    similarity = Series("region_0", "component", "cosine mean similarity", label="top left")
    volume, sentence = (
        Series("log-determinant", "rule", "error", stop="never"),
        "the log-determinant of self.flow is wrong",
    )
    observations = [
        Observation(similarity, 0.25, 0.0, is_bad=True),
        Observation(volume, 1.5, math.inf, sentence, f"{sentence}: for {{evaluations}} evaluations", is_bad=True),
    ]
    judge, history, evaluation = Judge(3e-4, 6), History(), Evaluation(1, 7, 0, observations)
    history.append("any", evaluation)
    judge.update("any", evaluation, history)
    assert judge.bad_now() == {f"{sentence}: error is 1.500": 7, "cosine mean similarity of top left is 0.250": 7}


def test_the_spread_is_a_ratio_of_variances_and_what_is_unreached_a_share_of_values() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(400, 2, 4, 4, generator=generator, dtype=torch.float64)
    metric = CosineMeanSimilarity(torch.zeros(4, 4, dtype=torch.long))
    metric.update(real, real=True)
    metric.update(real * 0.5 + 0.1, real=False)
    result = metric.compute()
    assert float(result.spread) == pytest.approx(0.25, rel=1e-6)
    # the generated values reach from 0.1 to 0.6, and a twentieth of the real range more on each side
    expected = ((real < 0.05) | (real > 0.65)).double().mean()
    assert float(result.unreached) == pytest.approx(float(expected), abs=0.01)
    assert math.isnan(float(result.unchanged))


# ---- the report ----


@pytest.mark.parametrize(
    ("alarms", "evaluations", "bad", "state"),
    [
        ([], 20, {}, "healthy"),
        ([alarm(recovered=9)], 20, {}, "healthy"),
        ([], 3, {}, "not judged"),
        ([], 3, {"x of y is 0.1": 7}, "not judged"),
        ([], 20, {"x of y is 0.1": 7}, "unhealthy"),
        ([alarm()], 20, {}, "getting worse"),
        ([alarm(is_critical=True)], 20, {}, "unhealthy"),
        ([alarm(rule="all samples are alike")], 20, {}, "unhealthy"),
        ([alarm(recovered=9, is_critical=True)], 20, {}, "healthy"),
    ],
)
def test_a_run_is_in_one_of_four_states(alarms: list[Alarm], evaluations: int, bad: dict[str, int], state: str) -> None:
    found = report(alarms, {"cms": evaluations}, {"cms": 15}, bad=bad)
    assert found["state"] == state
    assert found["summary"].startswith(f"{state.capitalize()}: ")
    assert all(clause in found["summary"] for clause in bad)
    assert ("at step 7" in found["summary"]) is bool(bad)
