from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_gendiag import CollapseStopping, CollapseWarning
from lightning_gendiag.verdict import FILE, checkpoints, last_good
from tests.test_board_and_panels import events
from tests.test_stopping import planted, run


def test_a_collapse_ends_in_words_json_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", every_n_epochs=4, save_top_k=-1)
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")]
    with pytest.warns(CollapseWarning, match="bottom right collapsed"):
        own, stopping = run(
            planted("frozen", "bottom right", 14), checkpoint, logger=loggers, enable_checkpointing=True
        )
    finding = stopping.findings[0]
    steps = {path: step for step, path in checkpoints(own)}
    assert len(steps) >= 3
    verdict = stopping.verdict(own)
    good = verdict["last_good_checkpoint"]
    assert good is not None
    assert steps[good] == max(step for step in steps.values() if step <= finding.since)
    assert last_good(own, -1) is None
    assert not verdict["healthy"]
    assert verdict["findings"][0]["where"] == "bottom right"
    assert str(finding) in verdict["words"]
    assert f"The last good checkpoint is {good}." in verdict["words"]
    assert "To look at: gendiag/alarm_1/picture, gendiag/cms/panel." in verdict["words"]
    for logger in loggers:
        read = json.loads((Path(logger.log_dir) / FILE).read_text())
        assert read["words"] == verdict["words"]
        assert read["evaluations"] == {"CosineMeanSimilarityMonitor[cms]": finding.epoch + 1}
    assert "gendiag/verdict/text_summary" in events(loggers[0].log_dir).Tags()["tensors"]


def test_a_healthy_run_says_so(tmp_path: Path) -> None:
    own, stopping = run(None, epochs=7, logger=CSVLogger(tmp_path))
    read = json.loads((Path(own.logger.log_dir) / FILE).read_text())
    assert read["healthy"] is True
    assert read["findings"] == []
    assert read["words"] == "Healthy: nothing fell from its level in 7 looks."
    assert read["last_good_checkpoint"] is None
    assert stopping.verdict() == read


def test_too_few_looks_are_no_judgement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        own, stopping = run(None, epochs=6, logger=CSVLogger(tmp_path))
    read = json.loads((Path(own.logger.log_dir) / FILE).read_text())
    assert read["healthy"] is None
    assert read["words"].startswith("Not judged: 6 looks were taken, and 7 are needed to tell a fall.")
    assert stopping.verdict() == read
    told = [record.message for record in caplog.records if record.message.startswith("Verdict: Not judged")]
    assert len(told) == 1
    assert told[0].endswith(f"{FILE}.")


def test_without_a_logger_nothing_is_written_and_a_foreign_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_epochs=5)
    with pytest.warns(CollapseWarning, match="top left collapsed"):
        own, stopping = run(planted("noise", "top left", 12), checkpoint, enable_checkpointing=True)
    (tmp_path / "kept" / "other.ckpt").write_bytes(b"not a checkpoint")
    with pytest.warns(UserWarning, match=r"other.ckpt was passed over"):
        assert str(stopping.verdict(own)["last_good_checkpoint"]).endswith(".ckpt")
    assert not list(tmp_path.rglob(FILE))


def test_what_else_moved_is_told() -> None:
    stopping = CollapseStopping()
    stopping._deviations = {"cms": {"top left": 9.0, "image": 6.0, "centre": 0.3}, "k_star": {"class 3": 7.0}}

    class Found:
        diagnostic, names = "cms", ("top left",)

    found: Any = Found()
    assert stopping._moved(found) == ["k_star: class 3", "cms: image"]
