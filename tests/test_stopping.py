from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from benchmarks.alarms import RECORDS, START, replay
from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    CosineMeanSimilarityMonitor,
    Finding,
    Monitor,
    Probe,
    Reading,
    RegionMap,
)
from lightning_gendiag.monitor import Evaluation
from tests.conftest import ScriptedGenerator, batches, trainer
from tests.test_board_and_panels import events

QUADRANTS = RegionMap(torch.arange(16)[:, None].ge(8).long() * 2 + torch.arange(16).ge(8).long())


def planted(fault: str, where: str, start: int, regions: RegionMap = QUADRANTS) -> Any:
    """A script that breaks a region (or ``"image"``) from an epoch on."""
    everywhere = torch.ones(regions.labels.shape, dtype=torch.bool)
    inside = everywhere if where == "image" else regions.mask(regions.names.index(where))
    still = digits(16)[0][7]

    def script(images: Tensor, epoch: int) -> Tensor:
        if epoch < start:
            return images
        broken = {
            "frozen": still.expand_as(images),
            "blurred": images.mean(0, keepdim=True).expand_as(images),
            "dark": (images - 1) / 2,
            "noise": torch.rand_like(images) * 2 - 1,
            "slide": torch.lerp(images, images.mean(0, keepdim=True).expand_as(images), min(1, 0.08 * (epoch - start))),
            "nan": images / 0 * 0,
        }[fault]
        return torch.where(inside, broken, images)

    return script


def run(script: Any, *more: Any, epochs: int = 30, stopping: CollapseStopping | None = None, **options: Any) -> Any:
    stopping = stopping or CollapseStopping()
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, probe=Probe(reference=digits(16)[0], num_samples=500))
    own = trainer(monitor, stopping, *more, max_epochs=epochs, **options)
    own.fit(ScriptedGenerator(script), batches(16, 32))
    return own, stopping


@pytest.mark.parametrize("where", ["top left", "bottom right"])
@pytest.mark.parametrize("fault", ["frozen", "blurred", "dark", "noise", "slide"])
def test_a_fault_in_a_region_stops_the_run_and_is_named_alone(fault: str, where: str) -> None:
    with pytest.warns(CollapseWarning, match=f"{where} collapsed: cosine mean similarity fell from .* Training stops"):
        own, stopping = run(planted(fault, where, 14))
    assert [finding.where for finding in stopping.findings] == [where]
    finding = stopping.findings[0]
    assert own.current_epoch < 30
    assert finding.epoch <= (16 if fault != "slide" else 24)
    assert finding.after < finding.before
    assert finding.since <= finding.step
    assert finding.score > 3
    assert sum(finding.shares.values()) == pytest.approx(1)
    assert max(finding.shares, key=finding.shares.__getitem__) == where
    assert finding.diagnostic == "cms"
    assert stopping.stopping_reason_message == str(finding)
    assert stopping.stopped_epoch == finding.epoch


def test_a_fault_everywhere_is_named_so() -> None:
    with pytest.warns(CollapseWarning, match="image collapsed"):
        _, stopping = run(planted("frozen", "image", 14))
    assert [finding.where for finding in stopping.findings] == ["image"]


def test_samples_with_nan_are_an_alarm_at_once() -> None:
    with pytest.warns(CollapseWarning, match=r"samples collapsed: share with nan or inf is 100.0%, found at epoch 10"):
        own, stopping = run(planted("nan", "top left", 10))
    assert [finding.where for finding in stopping.findings] == ["samples"]
    assert own.current_epoch == 11


def test_a_healthy_run_goes_to_its_end() -> None:
    own, stopping = run(None)
    assert stopping.findings == []
    assert own.current_epoch == 30


def test_warn_only_reports_and_the_recovery_is_noticed() -> None:
    broken = planted("frozen", "top left", 12)
    with pytest.warns(CollapseWarning, match="Training goes on"):
        own, stopping = run(
            lambda images, epoch: broken(images, epoch) if epoch < 18 else images, stopping=CollapseStopping("warn")
        )
    assert own.current_epoch == 30
    assert len(stopping.findings) == 1
    # two steps an epoch, counted from 0; two good evaluations end it
    assert stopping.findings[0].recovered == 19 * 2 + 1


def test_the_alarm_is_on_the_board_under_a_tag_of_its_own(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(CollapseWarning):
        run(planted("frozen", "top left", 14), logger=logger)
    accumulator = events(logger.log_dir)
    text = accumulator.Tensors("gendiag/alarm_1/words/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "top left collapsed" in text
    assert "| share of the fall |" in text
    assert accumulator.Images("gendiag/alarm_1/picture")[0].width > 300


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("cut", [9, 15, 16])
def test_a_run_resumed_in_the_middle_of_a_slide_alarms_at_the_same_step(tmp_path: Path, cut: int) -> None:
    script = planted("slide", "top left", 14)
    with pytest.warns(CollapseWarning):
        _, whole = run(script)
    assert 16 <= whole.findings[0].epoch <= 18
    _, first = run(script, ModelCheckpoint(tmp_path), epochs=cut, enable_checkpointing=True)
    assert first.findings == []
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, probe=Probe(reference=digits(16)[0], num_samples=500))
    resumed = CollapseStopping()
    with pytest.warns(CollapseWarning):
        trainer(monitor, resumed, ModelCheckpoint(tmp_path / "later"), max_epochs=30, enable_checkpointing=True).fit(
            ScriptedGenerator(script), batches(16, 32), ckpt_path=sorted(tmp_path.glob("*.ckpt"))[0]
        )
    assert resumed.findings == whole.findings


def test_its_state_is_plain(tmp_path: Path) -> None:
    with pytest.warns(CollapseWarning):
        _, stopping = run(planted("frozen", "top left", 14))
    torch.save(stopping.state_dict(), tmp_path / "state.pt")
    other = CollapseStopping()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.findings == stopping.findings
    assert other.state_dict() == stopping.state_dict()


def test_nothing_to_watch_is_refused() -> None:
    with pytest.raises(ValueError, match="CollapseStopping must have a monitor to watch"):
        trainer(CollapseStopping()).fit(ScriptedGenerator(), batches(16, 32))
    with pytest.raises(ValueError, match="action must be 'stop' or 'warn'"):
        CollapseStopping("halt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="false_alarm_rate must be in"):
        CollapseStopping(false_alarm_rate=2)


class Watched(Monitor):
    """Two parts and a whole, with numbers from a table."""

    stem = "watched"
    question = "number"

    def shares(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        falls = {part: before[part] - after[part] for part in ("a", "b") if part in before}
        total = sum(falls.values())
        return {part: fall / total for part, fall in falls.items()} if total > 0 else {}


def judged(**series: list[float]) -> list[Finding]:
    monitor, stopping = Watched(), CollapseStopping()
    for i, row in enumerate(zip(*series.values(), strict=True)):
        readings = {
            where: Reading(-value, value, "whole" if where == "whole" else "part")
            for where, value in zip(series, row, strict=True)
        }
        stopping.judge(monitor, Evaluation(i + 1, i, i, readings))
    return stopping.findings


def calm(n: int, phase: int = 0) -> list[float]:
    return [((i * 7 + phase * 3) % 11 - 5) / 10 for i in range(n)]


def test_the_whole_names_the_part_that_carries_its_fall() -> None:
    # the part's own fluctuation is too large for an alarm of its own
    noisy = [value * 20 for value in calm(20, 1)]
    found = judged(a=[*noisy, 8.0, 9.0], b=calm(22, 2), whole=[*calm(20), 4.0, 4.2])
    assert [finding.where for finding in found] == ["a"]
    assert found[0].series == "whole"
    assert found[0].shares["a"] > 0.5
    # b improves and a only fluctuates, but the whole falls: no part explains it
    found = judged(a=[*calm(20, 1), 0.1, 0.0], b=[*calm(20, 2), -1.0, -1.0], whole=[*calm(20), 4.0, 4.2])
    assert [finding.where for finding in found] == ["whole"]


def test_one_fault_is_told_once() -> None:
    found = judged(a=[*calm(20, 1), *[9.0] * 10], b=calm(30, 2), whole=[*calm(22), *[5.0] * 8])
    assert [finding.where for finding in found] == ["a"]


def test_many_parts_at_once_are_one_finding() -> None:
    monitor, stopping = Watched(), CollapseStopping()
    for i, value in enumerate([*calm(20), 9.0, 9.1]):
        readings = {f"part {p}": Reading(-value, value if p < 5 else calm(30, p)[i]) for p in range(10)}
        stopping.judge(monitor, Evaluation(i + 1, i, i, readings))
    assert [finding.where for finding in stopping.findings] == ["part 0, part 1, part 2, part 3, part 4"]
    assert stopping.findings[0].names == [f"part {p}" for p in range(5)]


def test_stale_evaluations_are_not_counted_twice() -> None:
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, probe=Probe(reference=digits(16)[0]), every_n_epochs=5)
    stopping = CollapseStopping(warmup_evaluations=4)
    trainer(monitor, stopping, max_epochs=12).fit(ScriptedGenerator(), batches(16, 32))
    assert stopping._seen == {monitor.state_key: 2}
    assert all(len(detector.values) == 2 for detector in stopping._detectors[monitor.state_key].values())


class TestRecordedGANs:
    """Ten real GANs on digits, recorded by ``python -m benchmarks.alarms --record 10`` on seeds used for nothing else."""

    runs = json.loads(RECORDS.read_text()) if RECORDS.exists() else []

    def test_there_are_ten_of_them(self) -> None:
        assert len(self.runs) == 10
        assert len({run["seed"] for run in self.runs}) == 10

    def test_ten_healthy_seeds_raise_no_alarm(self) -> None:
        assert [str(f) for run in self.runs for f in replay(run, "healthy")[0].findings] == []

    @pytest.mark.parametrize("fault", ["frozen", "blurred", "dark", "noise", "slide"])
    def test_a_broken_region_is_found_and_only_that_one(self, fault: str) -> None:
        missed, count = [], 0
        for recorded in self.runs:
            for name in recorded["series"]:
                kind, _, place = name.partition(" ")
                if kind != fault or place == "image":
                    continue
                count += 1
                stopping, regions = replay(recorded, name)
                where = [f.where for f in stopping.findings]
                if where != [regions.names[int(place)]] or min(f.epoch for f in stopping.findings) < START:
                    missed.append((recorded["seed"], name, where))
        assert count == 20
        assert missed == []

    def test_a_frozen_image_is_found_as_a_whole(self) -> None:
        for recorded in self.runs:
            stopping, _ = replay(recorded, "frozen image")
            assert [f.where for f in stopping.findings] == ["image"]


def test_the_words_survive_numbers_that_are_none() -> None:
    finding = Finding(
        5, 1, "cms", "centre", 0.9, math.nan, math.inf, 4, math.inf, {}, "cosine mean similarity", "centre"
    )
    assert str(finding) == (
        "centre collapsed: cosine mean similarity is no number any more at epoch 1 (step 5), after 0.900."
    )


def test_callbacks_may_serve_a_second_trainer_whose_steps_begin_anew() -> None:
    stopping = CollapseStopping("warn")
    monitor = CosineMeanSimilarityMonitor(QUADRANTS, probe=Probe(reference=digits(16)[0], num_samples=500))
    for script in (None, planted("frozen", "top left", 10)):
        own = trainer(monitor, stopping, max_epochs=13)
        if script is None:
            own.fit(ScriptedGenerator(), batches(16, 32))
        else:
            with pytest.warns(CollapseWarning, match="top left collapsed"):
                own.fit(ScriptedGenerator(script), batches(16, 32))
    assert [finding.where for finding in stopping.findings] == ["top left"]
    # two steps an epoch, counted from 0
    assert stopping.findings[0].since == 10 * 2 + 1
