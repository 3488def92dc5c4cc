from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    CosineMeanSimilarityMonitor,
    ModelAdapter,
    TrainingDataMonitor,
)
from lightning_gendiag.callbacks.checkpoints import checkpoints, last_good_checkpoint
from lightning_gendiag.detection.report import FILE, report
from tests.helpers.alarms import alarm
from tests.helpers.faults import planted, run_with_fault
from tests.helpers.logs import events
from tests.helpers.models import SmallVAE
from tests.helpers.running import batches, trainer


def test_a_collapse_ends_in_a_summary_json_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", every_n_epochs=4, save_top_k=-1)
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")]
    with pytest.warns(CollapseWarning, match="bottom right collapsed"):
        own, stopping = run_with_fault(
            planted("frozen", "bottom right", 14), checkpoint, logger=loggers, enable_checkpointing=True
        )
    alarm = stopping.alarms[0]
    steps = {path: step for step, path in checkpoints(own)}
    assert len(steps) >= 3
    state = stopping.report(own)
    good = state["last_good_checkpoint"]
    assert good is not None
    assert steps[good] == max(step for step in steps.values() if step <= alarm.since)
    assert last_good_checkpoint(own, -1) is None
    assert state["state"] == "unhealthy"
    assert state["alarms"][0]["label"] == "bottom right"
    assert str(alarm) in state["summary"]
    assert f"The last good checkpoint is {good}." in state["summary"]
    assert "See gendiag/alarm_1/picture, gendiag/cms/panel in TensorBoard." in state["summary"]
    for logger in loggers:
        written = json.loads((Path(logger.log_dir) / FILE).read_text())
        assert written["summary"] == state["summary"]
        assert written["evaluations"] == {"cms": alarm.epoch + 1}
    assert "gendiag/report/text_summary" in events(loggers[0].log_dir).Tags()["tensors"]


def test_the_report_of_a_healthy_run_says_so(tmp_path: Path) -> None:
    own, stopping = run_with_fault(None, epochs=15, logger=CSVLogger(tmp_path))
    written = json.loads((Path(own.logger.log_dir) / FILE).read_text())
    assert written["state"] == "healthy"
    assert written["alarms"] == []
    assert written["summary"] == (
        "Healthy: no series of cms left its level in 15 evaluations, and none is bad in itself."
    )
    assert written["last_good_checkpoint"] is None
    assert stopping.report() == written


def test_too_few_evaluations_are_not_judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        own, stopping = run_with_fault(None, epochs=8, logger=CSVLogger(tmp_path))
    written = json.loads((Path(own.logger.log_dir) / FILE).read_text())
    assert written["state"] == "not judged"
    assert written["summary"].startswith("Not judged: there were 8 evaluations, and an alarm needs 10. ")
    assert stopping.report() == written
    logged = [record.message for record in caplog.records if record.message.startswith("Not judged")]
    assert len(logged) == 1
    assert logged[0].endswith(f"{FILE}.")


def test_a_single_evaluation_is_reported_in_the_singular() -> None:
    assert report([], {"cms": 1}, {"cms": 15})["summary"].startswith("Not judged: there was 1 evaluation, and an alarm")
    # of the most frequent one, as the plan counts them
    of_two = report([], {"cms": 2, "memorization": 1}, {"cms": 10, "memorization": 9})
    assert of_two["summary"].startswith("Not judged: there were 2 evaluations, and an alarm needs 10.")
    assert report([], {"cms": 1}, {"cms": 1})["summary"].endswith(
        "left its level in 1 evaluation, and none is bad in itself."
    )


@pytest.mark.parametrize(
    ("evaluations", "summary"),
    [
        ({"cms": 9, "training_data": 10}, "Not judged: there were 9 evaluations, and an alarm needs 10."),
        (
            {"cms": 0, "training_data": 10},
            "Not judged: there was no evaluation of the model, only of its training data.",
        ),
        ({"training_data": 10}, "Not judged: there was no evaluation of the model, only of its training data."),
        ({"cms": 0, "training_data": 0}, "Not judged: there was no evaluation."),
        (
            {"cms": 9, "k_star": 12, "memorization": 1, "training_data": 14},
            "Healthy: no series of k_star, training_data left its level in 14 evaluations, and none is bad in itself. "
            "Not judged yet: cms (9 evaluations, it takes 10), memorization (1 evaluation, it takes 10).",
        ),
    ],
)
def test_a_model_is_healthy_only_if_a_diagnostic_of_its_own_was_judged(
    evaluations: dict[str, int], summary: str
) -> None:
    found = report([], evaluations, dict.fromkeys(evaluations, 10))
    assert found["summary"].startswith(summary)
    # what was alarmed by a rule and is over is no judgement either
    recovered = report([alarm(recovered=9)], evaluations, dict.fromkeys(evaluations, 10))
    assert recovered["state"] == found["state"] == summary.partition(":")[0].lower()
    assert alarm().message in recovered["summary"]


def test_what_an_alarm_needs_is_said_of_diagnostics_that_were_evaluated() -> None:
    found = report([], {"cms": 3, "memorization": 0}, {"cms": 10, "memorization": 9})
    assert found["summary"].startswith("Not judged: there were 3 evaluations, and an alarm needs 10.")


@pytest.mark.parametrize(("of_model", "state"), [(1, "not judged"), (5, "not judged"), (6, "unhealthy")])
def test_a_model_that_has_begun_to_learn_is_not_unhealthy_however_often_its_data_were_evaluated(
    of_model: int, state: str
) -> None:
    evaluations = {"cms": of_model, "memorization": 0, "training_data": 40}
    found = report([], evaluations, dict.fromkeys(evaluations, 10), bad={"similarity is 0.02": 35})
    assert found["state"] == state
    assert "The newest evaluation, at step 35, was bad: similarity is 0.02." in found["summary"]


def test_monitors_of_the_training_data_are_known_by_what_they_watch() -> None:
    stopping = CollapseStopping()
    data = TrainingDataMonitor(name="data")
    late = CosineMeanSimilarityMonitor(warmup_epochs=99, adapter=ModelAdapter(num_samples=16))
    trainer(data, late, stopping, max_epochs=12).fit(SmallVAE(), batches())
    state = stopping.report()
    assert state["evaluations"] == {"data": 12, "cms": 0}
    assert state["state"] == "not judged"


def test_without_a_logger_no_file_is_written_and_an_unreadable_checkpoint_is_skipped(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_epochs=5)
    with pytest.warns(CollapseWarning, match="top left collapsed"):
        own, stopping = run_with_fault(planted("noise", "top left", 12), checkpoint, enable_checkpointing=True)
    (tmp_path / "kept" / "other.ckpt").write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning, match=r"other.ckpt was skipped"):
        assert str(stopping.report(own)["last_good_checkpoint"]).endswith(".ckpt")
    assert not list(tmp_path.rglob(FILE))


def test_a_report_of_open_alarms_names_what_else_changed() -> None:
    one = alarm(also_changed=["k_star: class 3", "cms: centre"], tags=["gendiag/alarm_1/picture"], is_critical=True)
    healthy = alarm(recovered=9)
    state = report([one, healthy], {"cms": 20}, needed={"cms": 15}, checkpoint="a.ckpt")
    assert state["state"] == "unhealthy"
    assert state["summary"] == (
        "Unhealthy: centre collapsed: cosine mean similarity fell from 0.900 to 0.400 since step 4, detected at epoch 1, "
        "step 5 (7.0 σ beyond its usual fluctuation; fewer than 1 false alarm expected in 10⁶ evaluations). "
        "Also changed: k_star: class 3. See gendiag/alarm_1/picture in TensorBoard. The last good checkpoint is a.ckpt."
    )
    assert [a["recovered"] for a in state["alarms"]] == [None, 9]
    assert report([healthy], {"cms": 20}, needed={"cms": 15})["state"] == "healthy"


def test_a_message_gives_the_odds_and_the_contribution() -> None:
    one = alarm(evaluations_to_false_alarm=12345.0, contributions={"centre": 0.7, "border": 0.3})
    assert "1 false alarm expected in 12,345 evaluations" in one.message
    assert one.message.endswith("It accounts for 70% of the overall drop.")


def test_a_message_may_report_nan_or_a_rule() -> None:
    assert alarm(after=math.nan, score=math.inf).message == (
        "centre collapsed: cosine mean similarity was 0.900 and is nan or inf at epoch 1, step 5."
    )
    assert alarm(rule="samples collapsed").message == "samples collapsed, detected at epoch 1, step 5."
