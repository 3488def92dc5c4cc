"""What benchmarks measure with: operations that are counted and repeated."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from benchmarks import codebook_usage, defaults, evaluation, memorization, round_trip
from benchmarks.gpu import Recording, main


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


def test_runs_of_round_trips_are_counted() -> None:
    def ran(name: str, delay: float, is_named: bool = True, is_early: bool = False, alarms: int = 1) -> Any:
        return round_trip.Outcome(name, 0, is_early, delay, is_named, ["an alarm"] * alarms, 11, 1.0)

    first, second, *_ = round_trip.FAILURES
    healthy = next(iter(round_trip.HEALTHY))
    outcomes = [
        ran(first, 3), ran(first, 5, is_named=False), ran(first, 4, is_early=True), ran(second, math.inf, False),
        ran(healthy, math.inf, False, alarms=0), ran(healthy, 2.0, False, alarms=3),
    ]  # fmt: skip
    figures = round_trip.summary(outcomes)
    assert figures["failures"] == {
        first: {"runs": 3, "found": 2, "named": 1, "delay": 4},
        second: {"runs": 1, "found": 0, "named": 0, "delay": None},
    }
    assert figures["healthy"] == {healthy: {"runs": 2, "alarms": 1, "evaluations": 22}}
    assert sum("2 of 3" in line and "1 of 3" in line for line in round_trip.lines(figures)) == 1
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_benchmark_of_round_trips_measures_the_delay_of_a_failure(
    capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    round_trip.main(["--seeds", "1", "--only", "of the whole", "--jobs", jobs, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # three evaluations confirm it
    expected = {"runs": 1, "found": 1, "named": 1, "delay": 3}
    assert found == {"failures": {"log-determinant with the wrong sign, of the whole": expected}, "healthy": {}}


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
