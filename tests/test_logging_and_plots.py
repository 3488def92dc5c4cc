from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_gendiag.callbacks.logging import DiagnosticLogger, Layout
from lightning_gendiag.plots import canvas, charts, pictures
from tests.helpers.logs import events, written_events, written_layout


class ImageLogger(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: list[str] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        assert images[0].shape[-1] == 3
        self.images.append(key)


def loggers(tmp_path: Path, zero: bool = True) -> tuple[Any, TensorBoardLogger, ImageLogger]:
    tensorboard, other = TensorBoardLogger(tmp_path / "tb"), ImageLogger(tmp_path / "csv")

    class Fake(SimpleNamespace):
        __hash__ = object.__hash__

    return Fake(is_global_zero=zero, loggers=[tensorboard, other]), tensorboard, other


def test_each_logger_gets_everything_that_it_supports(tmp_path: Path) -> None:
    trainer, tensorboard, other = loggers(tmp_path)
    layout: Layout = {}
    logger = DiagnosticLogger(trainer, 7, "x", layout)
    logger.log_scalars({"a": 0.5})
    logger.log_image("p", torch.zeros(4, 5, 3, dtype=torch.uint8))
    logger.log_text("t", "summary")
    logger.log_histogram("h", torch.tensor([0.0, 1.0, math.nan]))
    logger.log_histogram("empty", torch.tensor([math.nan]))
    logger.log_chart("all", "Multiline", ["region_1", "region_10"])
    DiagnosticLogger(trainer, 7, "y", layout).log_chart("margin", "Margin", ["median", "worst", "best"])
    assert logger.has_new_charts
    logger.write_layout()
    logger.flush()
    accumulator = events(tensorboard.log_dir)
    assert accumulator.Scalars("gendiag/x/a")[0].step == 7
    assert accumulator.Images("gendiag/x/p")[0].width == 5
    assert accumulator.Tags()["histograms"] == ["gendiag/x/h"]
    assert "gendiag/x/t/text_summary" in accumulator.Tags()["tensors"]
    # TensorBoard shows only the layout that was written last, so it must have every chart
    found = written_layout(accumulator)
    assert [category.title for category in found.category] == ["gendiag/x", "gendiag/y"]
    assert list(found.category[0].chart[0].multiline.tag) == ["gendiag/x/region_1$", "gendiag/x/region_10$"]
    assert found.category[1].chart[0].margin.series[0].lower == "gendiag/y/worst"
    assert other.images == ["gendiag/x/p"]
    assert other.experiment.metrics[0]["gendiag/x/a"] == 0.5


@pytest.mark.parametrize("prefix", ["", "run"])
def test_all_numbers_of_an_evaluation_are_one_record_of_tensorboard(tmp_path: Path, prefix: str) -> None:
    values = {f"region_{r}": r / 8 for r in range(30)} | {"worst": math.nan}
    ours, lightnings = (TensorBoardLogger(tmp_path / name, prefix=prefix) for name in ("ours", "lightnings"))
    DiagnosticLogger(SimpleNamespace(is_global_zero=True, loggers=[ours]), 3, "x").log_scalars(values)  # type: ignore[arg-type]
    lightnings.log_metrics({f"gendiag/x/{name}": value for name, value in values.items()}, step=3)
    found = []
    for board in (ours, lightnings):
        board.experiment.flush()
        events_of = [event for event in written_events(board.log_dir) if event.HasField("summary")]
        found.append([(v.tag, str(v.simple_value), event.step) for event in events_of for v in event.summary.value])
        assert len(events_of) == (1 if board is ours else len(values))
    assert found[0] == found[1]


def test_a_logger_with_its_own_way_to_log_numbers_keeps_it(tmp_path: Path) -> None:
    class Own(TensorBoardLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.append((dict(metrics), step))

    logged: list[Any] = []
    trainer = SimpleNamespace(is_global_zero=True, loggers=[Own(tmp_path)])
    DiagnosticLogger(trainer, 3, "x").log_scalars({"a": 0.5})  # type: ignore[arg-type]
    assert logged == [({"gendiag/x/a": 0.5}, 3)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layout_of_the_user_is_preserved(tmp_path: Path, when: str) -> None:
    trainer, tensorboard, _ = loggers(tmp_path)
    logger = DiagnosticLogger(trainer, 0, "x", {})
    own = {"mine": {"losses": ["Multiline", ["loss_g", "loss_d"]], "band": ["Margin", ["a", "b", "c"]]}}
    if when == "after":
        logger.log_chart("all", "Multiline", ["region_1"])
        logger.write_layout()
    tensorboard.experiment.add_custom_scalars(own)
    if when == "before":
        logger.log_chart("all", "Multiline", ["region_1"])
    # as at the end of training
    logger.write_layout()
    logger.flush()
    found = written_layout(events(tensorboard.log_dir))
    assert [category.title for category in found.category] == ["mine", "gendiag/x"]
    assert list(found.category[0].chart[0].multiline.tag) == ["loss_g", "loss_d"]
    assert found.category[0].chart[1].margin.series[0].upper == "c"


def test_charts_of_the_user_are_found_where_a_run_was_cut_off_while_it_wrote(tmp_path: Path) -> None:
    trainer, tensorboard, _ = loggers(tmp_path)
    with SummaryWriter(tensorboard.log_dir) as before:
        before.add_custom_scalars({"mine": {"losses": ["Multiline", ["loss_g", "loss_d"]]}})
        for step in range(100):
            before.add_scalar("loss_g", 1.0, step)
    (path,) = Path(tensorboard.log_dir).glob("*tfevents*")
    # TensorBoard reads files in the order of their names
    path = path.rename(path.with_name("events.out.tfevents.0000000000.before"))
    path.write_bytes(path.read_bytes()[:-7])
    logger = DiagnosticLogger(trainer, 0, "x", {})
    logger.log_chart("all", "Multiline", ["region_1"])
    logger.write_layout()
    tensorboard.experiment.flush()
    found = written_layout(events(tensorboard.log_dir))
    assert [category.title for category in found.category] == ["mine", "gendiag/x"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    trainer, _, other = loggers(tmp_path, zero=False)
    layout: Layout = {}
    logger = DiagnosticLogger(trainer, 0, "x", layout)
    logger.log_scalars({"a": 0.5})
    logger.log_image("p", torch.zeros(4, 5, 3, dtype=torch.uint8))
    logger.log_text("t", "summary")
    logger.log_chart("all", "Multiline", ["a"])
    assert other.images == []
    assert not list(tmp_path.rglob("events*"))


def test_pictures_have_the_values_and_sizes_of_their_inputs() -> None:
    picture = pictures.as_rgb(torch.tensor([[[0.0, 1.0], [math.nan, 2.0]]]), 0.0, 1.0)
    assert picture[..., 0].tolist() == [[0, 255], [0, 255]]
    assert pictures.enlarged(picture, 8).shape == (8, 8, 3)
    assert pictures.enlarged(torch.zeros(900, 450, 3, dtype=torch.uint8), 90).shape == (90, 45, 3)
    labels = torch.tensor([[0, 0], [0, 1]])
    assert pictures.enlarged_labels(labels, 8).shape == (8, 8)
    assert pictures.enlarged_labels(labels.repeat(200, 100), 100).shape == (100, 50)
    assert pictures.edges(labels).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_with_any_number_of_channels_can_be_shown(channels: int) -> None:
    assert pictures.as_rgb(torch.rand(channels, 4, 4), 0, 1).shape == (4, 4, 3)


def test_the_chosen_region_is_outlined_also_at_the_border() -> None:
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[10:, 10:] = 1
    picture = pictures.outlined(torch.zeros(20, 20, 3, dtype=torch.uint8), labels, chosen=1)
    red = (picture == torch.tensor(canvas.ALARM, dtype=torch.uint8)).all(-1)
    assert red[19, 12:].all()
    assert red[12:, 19].all()
    assert red[10, 12:].all()
    assert not red[:8, :8].any()
    assert not red[13:17, 13:17].any()


def test_panels_support_many_regions_and_nan() -> None:
    labels = torch.arange(30).view(5, 6)
    enlarged = pictures.enlarged_labels(labels)
    colours = [canvas.region_colour(r) for r in range(30)]
    filled = pictures.filled(enlarged, colours, [str(r) for r in range(30)])
    curves = charts.curves([[math.nan, 0.5, 1.2]] * 30, [0, 5, 9], strong=3)
    picture = canvas.panel(
        "a title that is long enough to be broken into more than one line of the panel, and then some",
        [canvas.Tile("map", filled), canvas.Tile("curves", curves), canvas.Tile("map", filled)],
        [canvas.Row(colours[0], "row", True)],
        "note",
    )
    assert picture.dtype == torch.uint8
    # a panel is two tiles wide, so that it is legible on a card of TensorBoard
    assert picture.shape[1] == filled.shape[1] * 2 + 30
    assert charts.curves([[0.5]], [3]).shape == (canvas.TILE, canvas.TILE, 3)
    assert canvas.heat(math.nan) == (60, 60, 60)
    assert sum(canvas.heat(1.0)) > sum(canvas.heat(30.0)) > sum(canvas.heat(1000.0))
