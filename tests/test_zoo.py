from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from benchmarks.measuring import plateau
from benchmarks.zoo.data import Batches, Data, load
from benchmarks.zoo.falls import fallen, falls_of, judge_falls
from benchmarks.zoo.faults import FAULTS, FROM_THE_START, Planting
from benchmarks.zoo.judging import (
    as_line,
    baselines,
    bounds,
    evaluations_of,
    figures,
    is_held_out,
    judged_faulty,
    judged_healthy,
    replay,
)
from benchmarks.zoo.models import KINDS, at_rest, drawn, influences
from benchmarks.zoo.recording import Track, Unit, forks_of, read, setting_of, write
from benchmarks.zoo.running import units
from benchmarks.zoo.truth import frechet, has_learnt, is_right, numbers_in, quadrants_of
from lightning_gendiag import Alarm, Evaluation, Observation, Series

REGIONS = {"labels": [[0, 0, 1, 1]] * 4, "names": ["left", "right"]}
IMAGE, LEFT, RIGHT = Series("image", "aggregate", "similarity"), Series("left"), Series("right")
STEADY = {"fid": 10.0, "diversity": 1.0, "finite": 1, "shares": [0.5, 0.5], "regions": [0.1, 0.1]}


def track(count: int, first: int = 0, left: float = 0.0, declared: dict[str, int] | None = None, **truth: Any) -> Track:
    """A stretch of training in which severities waver around 0, and around ``left`` in the left region."""
    made = Track({} if declared is None else declared, first)
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(first)) / 10
    for at, (a, b, c) in enumerate(noise.tolist()):
        rows = [
            Observation(LEFT, -(a + left), a + left),
            Observation(RIGHT, 1 - b, b),
            Observation(IMAGE, c + left, c + left),
        ]
        made.add("cms", Evaluation(first + at + 1, 10 * (first + at + 1), 0, rows))
        made.steps.append(10 * (first + at + 1))
        made.epochs.append(0)
        made.loss.append(1 / (first + at + 1))
        for name, value in {**STEADY, **truth}.items():
            made.truth[name].append(value)
    return made


def recorded(*faults: tuple[str, dict[str, Any]], left: float = 0.0, **truth: Any) -> dict[str, Any]:
    """A record of 60 evaluations, of which the last 20 have another level of the left region, with forks at the 40th."""
    declared: dict[str, int] = {}
    healthy = track(40, declared=declared).packed()
    tail = track(20, 40, left, declared, **truth).packed()
    for name in ("steps", "epochs", "loss"):
        healthy[name] = healthy[name] + tail[name]
    healthy["truth"] = {name: values + tail["truth"][name] for name, values in healthy["truth"].items()}
    held, more = healthy["monitors"]["cms"], tail["monitors"]["cms"]
    held["at"], held["number"] = list(range(60)), list(range(1, 61))
    for number, column in held["columns"].items():
        other = more["columns"][number]
        column["value"] = column["value"] + other["value"]
        if not isinstance(column["severity"], str):
            column["severity"] = column["severity"] + other["severity"]
    return {
        "kind": "mlp_gan", "seed": 1000, "fault": "", "spacing": 10, "regions": REGIONS, "real_shares": [0.5, 0.5],
        "declared": [{"name": s.name, "role": s.role, "quantity": s.quantity} for s in (LEFT, RIGHT, IMAGE)], **healthy,
        "faults": [
            {"name": name, **about, **track(10, 40, 3.0, declared, fid=40.0).packed()} for name, about in faults
        ],
    }  # fmt: skip


def alarm(names: list[str], diagnostic: str = "cms", after: float = 0.0) -> Alarm:
    return Alarm(100, 0, diagnostic, names[0], 1.0, after, 9.0, 90, 1e9, names=names)


# ---- records ----


def test_what_monitors_observe_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = Track({}, 0)
    late = Series("pair", "standalone", "information", min_std=0.2)
    for at in range(3):
        rows = [Observation(LEFT, 0.5 - at, at - 0.5), Observation(IMAGE, 0.123456, math.inf, message="it is gone")]
        rows += [Observation(late, 2.0, 7.0, "one with two")] * (at == 2)
        made.add("other", Evaluation(at + 1, 10 * at, 0, rows))
        made.steps.append(10 * at)
        made.epochs.append(0)
    declared = [{"name": "left"}, {"name": "image", "role": "aggregate", "quantity": "similarity"}]
    declared.append({"name": "pair", "role": "standalone", "quantity": "information", "min_std": 0.2})
    write({"declared": declared, "real_shares": [], **made.packed()}, tmp_path / "run.json.xz")
    run = read(tmp_path / "run.json.xz")
    first, _, last = (row["other"] for row in evaluations_of(run, run))
    assert first.observations == [
        Observation(LEFT, 0.5, -0.5),
        Observation(IMAGE, 0.1235, math.inf, message="it is gone"),
    ]
    assert last.observations[0] == Observation(LEFT, -1.5, 1.5)
    assert last.observations[2] == Observation(late, 2.0, 7.0, "one with two")
    assert (last.number, last.step) == (3, 20)


def test_each_beginning_of_the_list_of_runs_is_balanced() -> None:
    listed = units(320)
    assert len(set(listed)) == len(listed)
    assert sum(not unit.fault for unit in listed) == 320
    beginning = listed[: len(listed) // 3]
    counts = [sum(unit.kind == kind and not unit.fault for unit in beginning) for kind in KINDS]
    assert max(counts) - min(counts) <= 1
    assert {unit.fault for unit in beginning} == {"", *FROM_THE_START}


def test_every_fault_forks_from_some_run_of_the_kinds_it_applies_to() -> None:
    for name, kind in KINDS.items():
        module = kind.make((1, 8, 8) if kind.data == ("digits8",) else (1, 16, 16), 10, 8, 1e-3)
        forks = [forks_of(Unit(name, seed), module) for seed in range(1000, 1024)]
        planted = {fault for fork in forks for faults in fork.values() for fault in faults}
        assert planted == {fault for fault, it in FAULTS.items() if it.applies(kind, module)}


def test_a_run_draws_what_its_kind_allows_and_always_the_same() -> None:
    for name, kind in KINDS.items():
        for seed in range(20):
            setting = setting_of(Unit(name, seed))
            assert setting == setting_of(Unit(name, seed, "beta x200"))
            assert kind.spacing[0] <= setting.spacing <= kind.spacing[1]
            assert 128 <= setting.num_samples <= kind.most_samples
            assert setting.data in kind.data


# ---- judging ----


def test_a_fall_back_to_the_first_evaluations_is_found_where_a_run_had_learnt() -> None:
    run = recorded()
    assert falls_of(run) == []
    run["truth"]["fid"] = [100.0 - 4 * at if at < 15 else 40.0 for at in range(60)]
    for column in run["monitors"]["cms"]["columns"].values():
        higher = [4.0 - 0.4 * min(at, 10) for at in range(60)]
        column["value"] = [a - b for a, b in zip(column["value"], higher, strict=True)]
        if not isinstance(column["severity"], str):
            column["severity"] = [a + b for a, b in zip(column["severity"], higher, strict=True)]
    rows = fallen(run, 16)
    first, again = rows[1]["cms"], rows[17]["cms"]
    assert again.observations == first.observations
    assert (again.number, again.step) == (18, run["steps"][17])
    falls = falls_of(run)
    assert [fall.at for fall in falls] == [16, 24]
    assert all(fall.delay is not None and fall.delay <= 3 for fall in falls)
    assert judge_falls([run])["24"] | {"bounds": ()} == {"runs": 1, "found": 1, "soon": 1, "bounds": ()}


def test_a_steady_run_is_healthy_and_a_drop_stops_it() -> None:
    assert replay(recorded()) == ([], None, [], "healthy")
    played = replay(recorded(left=3.0))
    assert played.stopped == played.raised[0].at
    assert 40 <= played.stopped <= 43
    assert played.raised[0].since == 40
    assert played.by == [played.raised[0].alarm]


def test_an_alarm_is_wrong_unless_what_it_names_got_worse() -> None:
    wrong = judged_healthy(recorded(left=3.0))
    assert wrong.wrong
    assert wrong.wrongly_stopped
    assert wrong.late == {15: False, 40: True}
    for truth in ({"fid": 16.0}, {"regions": [0.2, 0.1]}, {"diversity": 0.2}):
        right = judged_healthy(recorded(left=3.0, **truth))
        assert not right.wrong
        assert not right.wrongly_stopped
        assert right.stopped is not None


def test_a_fault_is_found_named_and_compared_with_chance() -> None:
    run = recorded(
        ("region frozen", {"quadrant": 2}), ("region blurred", {"quadrant": 1}), ("class removed", {"class": 0})
    )
    frozen, blurred, removed = (judged_faulty(run, fault) for fault in run["faults"])
    assert frozen.found
    assert frozen.named
    assert frozen.visible
    assert 1 <= frozen.delay <= 4
    assert blurred.found
    assert not blurred.named
    assert not removed.named
    assert not removed.as_data
    found = figures([judged_healthy(run)], [frozen, blurred, removed])
    assert (found["healthy_runs"], found["stopped"], found["faults"], found["found"]) == (1, 0, 3, 1)
    assert found["named"] == pytest.approx(1 / 3)
    assert found["data_found"] == 0
    assert '"start_found": null' in as_line(found)


@pytest.mark.parametrize(
    ("what", "truth", "right"),
    [
        (alarm(["class 1"], "generation_balance"), {"shares": [0.9, 0.1]}, True),
        (alarm(["class 0"], "generation_balance"), {"shares": [0.9, 0.1]}, False),
        (alarm(["all classes"], "generation_balance"), {"shares": [0.9, 0.1]}, True),
        (alarm(["all classes"], "generation_balance"), {}, False),
        (alarm(["class 1"], "k_star"), {"probe": [0.9, 0.7]}, True),
        (alarm(["class 0"], "k_star"), {"probe": [0.9, 0.7]}, False),
        (alarm(["dimension 1"], "manifold_entropy"), {"influence": [0.3, 0.1]}, True),
        (alarm(["dimension 0"], "manifold_entropy"), {"influence": [0.3, 0.1], "fid": 99.0}, False),
        (alarm(["left"]), {"regions": [0.3, 0.1]}, True),
        (alarm(["right"]), {"regions": [0.3, 0.1]}, False),
        (alarm(["image"]), {"fid": 16.0}, True),
        (alarm(["image"]), {"fid": 14.0}, False),
        (alarm(["samples"], after=math.nan), {"finite": 0.9}, True),
        (alarm(["samples"], after=math.nan), {}, False),
        (alarm(["class 1"], "training_data"), {"shares": [0.9, 0.1]}, False),
    ],
)
def test_the_truth_of_an_alarm(what: Alarm, truth: dict[str, Any], right: bool) -> None:
    usual = {**STEADY, "probe": [0.9, 0.9], "influence": [0.3, 0.3]}
    series = {name: [value] * 20 + [truth.get(name, value)] * 3 for name, value in usual.items()}
    run = {"regions": REGIONS, "real_shares": [0.5, 0.5]}
    assert is_right(what, run, series, since=20, at=22) is right


def test_a_run_that_did_not_learn_is_not_healthy() -> None:
    assert has_learnt({"fid": [100.0, *[60.0] * 20]})
    assert not has_learnt({"fid": [100.0, 60.0, *[90.0] * 20]})
    assert not has_learnt({"fid": [math.nan] * 20})


def test_quadrants_and_numbers_of_names() -> None:
    assert quadrants_of(REGIONS, "left") == [0, 2]
    assert quadrants_of(REGIONS, "image") == []
    assert numbers_in(["dimension 3 with dimension 12", "class 4"], "dimension") == [3, 12]


def test_baselines_stop_as_people_stop_runs_today() -> None:
    assert plateau([3, 2, 1, 1, 1, 1], patience=3) == 5
    assert plateau([3, 2, math.nan], patience=3) == 2
    assert plateau([5, 4, 3, 2, 1], patience=3) is None
    stopped = baselines(recorded(("region frozen", {"quadrant": 0}), left=3.0))
    assert stopped["EarlyStopping on the loss"] is None
    assert stopped["z-score above 3"] is not None


def test_the_bounds_of_a_share_have_a_closed_form_at_its_ends() -> None:
    assert bounds(0, 50) == pytest.approx((0, 1 - 0.025 ** (1 / 50)))
    assert bounds(50, 50) == pytest.approx((0.025 ** (1 / 50), 1))


def test_the_frechet_distance_of_diagonal_covariances() -> None:
    mean, other = torch.zeros(3, dtype=torch.double), torch.ones(3, dtype=torch.double)
    cov, other_cov = torch.diag(torch.tensor([1.0, 4, 9])).double(), torch.eye(3).double()
    assert frechet((mean, cov), (other, other_cov)) == pytest.approx(3 + 0 + 1 + 4)


# ---- models, data and faults ----


def planting(name: str = "mlp_vae") -> Planting:
    data, kind = load("digits"), KINDS[name]
    module: LightningModule = kind.make((1, 16, 16), 10, 8, 1e-3)
    return Planting(module, None, Batches(data, 16, 0), kind, seed=1003)


def test_the_loader_does_what_faults_of_the_data_ask_for() -> None:
    run = planting()
    FAULTS["class removed"].plant(run)
    assert not (torch.cat([labels for _, labels in run.batches]) == 3).any()
    run = planting()
    FAULTS["one batch for ever"].plant(run)
    first, *others = (images for images, _ in run.batches)
    assert all(images.equal(first) for images in others)
    run = planting()
    FAULTS["other normalisation"].plant(run)
    assert all(images.min() >= 0 for images, _ in run.batches)


def test_faults_of_the_model_change_what_they_name() -> None:
    run = planting()
    with at_rest(run.module, 0):
        healthy = drawn(run.module, run.batches.data, 8)
    FAULTS["region inverted"].plant(run)
    with at_rest(run.module, 0):
        faulty = drawn(run.module, run.batches.data, 8)
    assert faulty[:, :, 8:, 8:].equal(-healthy[:, :, 8:, 8:])
    assert faulty[:, :, :8].equal(healthy[:, :, :8])
    FAULTS["dead dimensions"].plant(run)
    with at_rest(run.module, 0):
        moved = influences(run.module)
    assert moved is not None
    assert sum(influence == 0 for influence in moved) == 4


def test_every_kind_makes_images_and_training_does_not_notice() -> None:
    for name, kind in KINDS.items():
        size = 8 if kind.data == ("digits8",) else 16
        data = Data(torch.rand(40, 1, size, size) * 2 - 1, torch.arange(40) % 10, torch.arange(40) % 10)
        module = kind.make((1, size, size), 10, 8, 1e-3)
        state = torch.get_rng_state()
        with at_rest(module, 3):
            images = drawn(module, data, 12)
        assert images.shape == (12, 1, size, size), name
        assert torch.get_rng_state().equal(state), name
        assert module.training, name


def test_rules_were_chosen_on_none_of_the_runs_that_are_reported() -> None:
    assert all(is_held_out(unit._asdict()) for unit in units(100))
    assert not any(is_held_out(unit._asdict()) for unit in units(100, first=1000))
    # of some kinds, no run was seen at all
    assert sum(kind.held_out for kind in KINDS.values()) >= 6
