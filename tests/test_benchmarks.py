"""What benchmarks measure with: operations that are counted and repeated."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    adversary,
    codebook_usage,
    defaults,
    evaluation,
    field,
    field_models,
    memorization,
    planted_runs,
    round_trip,
    timestep_loss,
)
from benchmarks.gpu import Recording, main
from benchmarks.planted_runs import Outcome
from lightning_gendiag import Alarm
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS


def test_products_are_counted_by_their_operands_and_repeated() -> None:
    a, b, kernels = torch.rand(3, 4), torch.rand(5, 4), torch.rand(2, 1, 3, 3)
    with Recording() as recording:
        for _ in range(3):
            torch.addmm(torch.ones(3, 1).expand(3, 5), a, b.T, alpha=-2).exp().sum()
        torch.nn.functional.conv2d(torch.rand(1, 1, 8, 8), kernels)
        torch.func.vmap(lambda x: x @ b.T)(torch.rand(2, 3, 4))
    names = [call[0].overloadpacket.__name__ for call in recording.products.elements()]
    assert Counter(names) == {"addmm": 3, "convolution": 1, "mm": 1}
    assert 0 < recording.seconds() < 1


@pytest.mark.parametrize(("only", "parts"), [("cosine", 2), ("Jacobian", 1)])
def test_the_benchmark_of_gpus_runs_on_a_cpu(capsys: pytest.CaptureFixture[str], only: str, parts: int) -> None:
    main(["--device", "cpu", "--sizes", "16", "--samples", "16", "--only", only, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["failed"]
    assert len(found["rows"]) == parts
    assert all(row["ms"] > row["products_ms"] > 0 for row in found["rows"])


def test_consecutive_seeds_plant_all_faults() -> None:
    for model, example in defaults.EXAMPLES.items():
        units = [defaults.Unit(model, seed, None, 2.0, 6, 280.0) for seed in range(5000, 5003)]
        assert {name for unit in units for name in unit.chosen()} == set(example.faults())
        assert all(len(set(unit.chosen())) == 6 for unit in units)


def test_the_field_declares_to_which_models_each_diagnostic_belongs() -> None:
    assert list(field_models.NEEDS) == [kind.name for kind in MONITORS]
    needed = {part for needs in field_models.NEEDS.values() for some in needs for part in some}
    assert needed == field_models.PARTS.keys()
    expected = {entry.name: entry.expected for entry in field_models.MODELS}
    assert set().union(*expected.values()) == field_models.NEEDS.keys()
    assert expected["mixture_of_rows"] == ["cms", "memorization", "training_data"]
    rows = {
        "first": field.Row(attached=["cms", "k_star"], misses=["adversary"], extra=["k_star"]),
        "second": field.Row(attached=["cms", "adversary"]),
    }
    assert field.of_diagnostic("adversary", rows) == {"models": 2, "attached": 1, "missed": ["first"], "extra": []}
    assert field.of_diagnostic("k_star", rows) == {"models": 0, "attached": 0, "missed": [], "extra": ["first"]}


def test_faults_that_are_not_found_delay_for_ever() -> None:
    def fault(*evaluations: int) -> dict[str, Any]:
        alarms = [{"evaluation": number, "seconds": 2.0 * number} for number in evaluations]
        return {
            "name": "nan weight",
            "counts": True,
            "found": bool(alarms),
            "named": bool(alarms),
            "cut": False,
            "alarms": alarms,
        }

    failed, minor = {"name": "nan weight", "error": "no result"}, fault() | {"counts": False, "name": "region blurred"}
    run = {"model": "gan", "samples": None, "healthy": None, "faults": [fault(1), fault(4, 9), fault(8), failed, minor]}
    found, power = defaults.summary([run]), defaults.power([run])
    assert (found.faults, found.found, found.runs) == (3, 1.0, 0)
    assert found.within_3 == pytest.approx(1 / 3)
    assert (found.delay, found.seconds) == (4, 8.0)
    # of three, one is found later than within six evaluations
    assert power.found == pytest.approx(2 / 3)
    assert power.seconds == 8.0
    assert math.isnan(power.seconds_90)
    assert defaults.figures([run])["power"]["planned"]["seconds_90"] is None


def ran(name: str, delay: float, is_named: bool = True, is_early: bool = False, alarms: int = 1) -> Outcome:
    return Outcome(name, 0, is_early, delay, is_named, ["an alarm"] * alarms, 11, 1.0)


def test_runs_with_planted_failures_and_without_are_counted() -> None:
    outcomes = [
        ran("first", 3), ran("first", 5, is_named=False), ran("first", 8), ran("second", 4),
        ran("second", 4, is_early=True), ran("second", math.inf, False, alarms=0),
        ran("healthy", math.inf, False, alarms=0), ran("healthy", 2.0, False, alarms=3),
    ]  # fmt: skip
    figures = planted_runs.summary(outcomes, ("first", "second"))
    assert figures["failures"] == {
        "first": {"runs": 3, "found": 3, "named": 2, "delay": {"min": 3, "median": 5, "max": 8}},
        "second": {"runs": 3, "found": 1, "named": 1, "delay": {"min": 4, "median": None, "max": None}},
        "all": {"runs": 6, "found": 4, "named": 3, "delay": {"min": 3, "median": 6.5, "max": None}},
    }
    of_healthy = figures["healthy"]["healthy"]
    # 1 - (1 - 0.05) ** (1 / 2) bounds no alarm in two runs, and this one in two
    assert of_healthy.pop("upper_bound") == pytest.approx(0.95**0.5)
    assert of_healthy == {"runs": 2, "alarms": 1, "evaluations": 22}
    assert sum("3 of 3" in line and "2 of 3" in line for line in planted_runs.lines(figures)) == 1
    assert json.loads(json.dumps(figures)) == figures


def test_an_alarm_before_a_failure_is_early_and_its_delay_counts_from_the_failure() -> None:
    def at(number: int) -> Any:
        return Alarm(0, 0, "cms", "x", 0.0, 0.0, 0.0, 0, 0.0, number=number)

    def counted(numbers: list[int], begun: int | None) -> tuple[bool, float, bool]:
        unit = planted_runs.Unit("x", 0)
        before = planted_runs.Begun(SimpleNamespace(evaluations=9), lambda trainer: True)  # type: ignore[arg-type]
        before.evaluations = begun
        made = planted_runs.outcome(
            unit, [at(number) for number in numbers], before, lambda after: len(after) == 2, 1.0
        )
        return made.is_early, made.delay, made.is_named

    assert counted([5, 7], 4) == (False, 1, True)
    assert counted([4, 6, 7], 4) == (True, 2, True)
    assert counted([4], 4) == (True, math.inf, False)
    assert counted([], 0) == (False, math.inf, False)
    # the run ended before the failure began
    assert counted([3], None) == (True, math.inf, False)


def found_by(main: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    main(["--seeds", "1", "--json", *arguments])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_benchmark_of_round_trips_measures_the_delay_of_a_failure(
    capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    found = found_by(round_trip.main, capsys, "--only", "of the whole", "--jobs", jobs)
    # three evaluations confirm it
    expected = {"runs": 1, "found": 1, "named": 1, "delay": dict.fromkeys(("min", "median", "max"), 3)}
    name = "log-determinant with the wrong sign, of the whole"
    assert found == {"failures": {name: expected, "all": expected}, "healthy": {}}


def test_the_benchmark_of_the_adversary_measures_the_delay_of_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = adversary.Failure(
        "exploded", (lambda: adversary.Scaled(0, 1e3, 60),), kinds=("mlp_gan",), start=60, steps=120
    )
    monkeypatch.setattr(adversary, "FAILURES", {"explodes": failure})
    monkeypatch.setattr(adversary, "STEPS", 30)
    monkeypatch.setattr(adversary, "HEALTHY", {"MLP": "mlp_gan"})
    found = found_by(adversary.main, capsys)
    delay = found["failures"]["explodes"].pop("delay")
    # two evaluations confirm it
    assert 2 <= delay["min"] == delay["median"] == delay["max"] <= 4
    assert found["failures"]["explodes"] == {"runs": 1, "found": 1, "named": 1}
    healthy = found["healthy"]["MLP"]
    assert (healthy["runs"], healthy["alarms"]) == (1, 0)
    assert healthy["evaluations"] > 1


def test_the_benchmark_of_timestep_losses_measures_the_delay_of_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timestep_loss, "STEPS", 96)
    found = found_by(timestep_loss.main, capsys, "--only", "no weight in a band")
    # two evaluations confirm it
    expected = {"runs": 1, "found": 1, "named": 1, "delay": dict.fromkeys(("min", "median", "max"), 2)}
    assert found["failures"]["all"] == expected


def test_runs_that_copy_and_healthy_ones_are_counted_apart() -> None:
    def ran(name: str, first: int | None, copied: float) -> Any:
        return memorization.Outcome(name, 0, first, "", 8, copied, copied, 1.0)

    copying, healthy = (
        next(name for name, kind in memorization.KINDS.items() if kind.copies is c) for c in (True, False)
    )
    outcomes = [ran(copying, 4, 0.3), ran(copying, None, 0.1), ran(copying, 6, 0.2), ran(healthy, None, 0.0)]
    figures = memorization.summary(outcomes)
    assert figures["kinds"][copying] == {
        "runs": 3, "alarms": 2, "first": [4, 5, 6], "copied": [0.1, 0.3], "most": 0.3, "evaluations": 24,
    }  # fmt: skip
    assert figures["healthy"] == {"runs": 1, "alarms": 0, "evaluations": 8}
    assert sum("2 of 3" in line and "4 to 6" in line for line in memorization.lines(figures)) == 1


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_the_benchmark_of_codebooks_finds_and_names_a_collapse(capsys: pytest.CaptureFixture[str]) -> None:
    codebook_usage.main(["--seeds", "1", "--only", "one point", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["runs"], found["found"], found["named"]) == (1, 1, 1)
    assert 1 <= found["faults"]["point"]["latest"] <= 5
    assert found["healthy"] == {"runs": 0, "alarms": 0, "evaluations": 0}


def test_a_later_evaluation_is_the_median_and_setup_what_the_first_takes_beyond_it() -> None:
    def own(update: float, samples: float, panels: float = 0.0) -> evaluation.Parts:
        seconds = {"update": update, "samples": samples, "panels": panels}
        return defaultdict(float, {("cms", part): value for part, value in seconds.items()} | {("all", "copy"): 1e-3})

    rounds = [own(0.5, 0.01, 0.2), own(0.1, 0.02), own(0.2, 0.04, 0.03), own(0.3, 0.03)]
    figures = evaluation.summary(["cms"], rounds)
    # panels are drawn at some evaluations only
    assert figures["cms"] == pytest.approx({"later": 200, "setup": 300, "panel": 30})
    assert figures["shared"] == pytest.approx({"later": 31, "setup": 0})
