from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_gendiag import panels
from lightning_gendiag.board import Board


def events(folder: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}
    )
    accumulator.Reload()
    return accumulator


class ImageLogger(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: list[str] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        assert images[0].shape[-1] == 3
        self.images.append(key)


def boards(tmp_path: Path, zero: bool = True) -> tuple[Any, TensorBoardLogger, ImageLogger]:
    tensorboard, other = TensorBoardLogger(tmp_path / "tb"), ImageLogger(tmp_path / "csv")

    class Fake(SimpleNamespace):
        __hash__ = object.__hash__

    return Fake(is_global_zero=zero, loggers=[tensorboard, other]), tensorboard, other


def layout(accumulator: EventAccumulator) -> layout_pb2.Layout:
    proto = accumulator.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return layout_pb2.Layout.FromString(proto)


def test_everything_arrives_on_the_loggers_that_can_show_it(tmp_path: Path) -> None:
    trainer, tensorboard, other = boards(tmp_path)
    board = Board(trainer, 7, "gendiag/x")
    board.scalars({"a": 0.5})
    board.picture("p", torch.zeros(4, 5, 3, dtype=torch.uint8))
    board.text("t", "words")
    board.histogram("h", torch.tensor([0.0, 1.0, math.nan]))
    board.histogram("empty", torch.tensor([math.nan]))
    board.chart("all", "Multiline", ["region_1", "region_10"])
    Board(trainer, 7, "gendiag/y").chart("margin", "Margin", ["median", "worst", "best"])
    board.flush()
    accumulator = events(tensorboard.log_dir)
    assert accumulator.Scalars("gendiag/x/a")[0].step == 7
    assert accumulator.Images("gendiag/x/p")[0].width == 5
    assert accumulator.Tags()["histograms"] == ["gendiag/x/h"]
    assert "gendiag/x/t/text_summary" in accumulator.Tags()["tensors"]
    # the layout written last is all that TensorBoard shows: it must hold every chart
    found = layout(accumulator)
    assert [category.title for category in found.category] == ["gendiag/x", "gendiag/y"]
    assert list(found.category[0].chart[0].multiline.tag) == ["gendiag/x/region_1$", "gendiag/x/region_10$"]
    assert found.category[1].chart[0].margin.series[0].lower == "gendiag/y/worst"
    assert other.images == ["gendiag/x/p"]
    assert other.experiment.metrics[0]["gendiag/x/a"] == 0.5


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    trainer, _, other = boards(tmp_path, zero=False)
    board = Board(trainer, 0, "gendiag/x")
    board.scalars({"a": 0.5})
    board.picture("p", torch.zeros(4, 5, 3, dtype=torch.uint8))
    board.text("t", "words")
    board.chart("all", "Multiline", ["a"])
    assert other.images == []
    assert not list(tmp_path.rglob("events*"))


def test_pictures_hold_what_they_are_made_of() -> None:
    picture = panels.as_rgb(torch.tensor([[[0.0, 1.0], [math.nan, 2.0]]]), 0.0, 1.0)
    assert picture[..., 0].tolist() == [[0, 255], [0, 255]]
    assert panels.enlarged(picture, 8).shape == (8, 8, 3)
    assert panels.enlarged(torch.zeros(900, 450, 3, dtype=torch.uint8), 90).shape == (90, 45, 3)
    labels = torch.tensor([[0, 0], [0, 1]])
    assert panels.enlarged_labels(labels, 8).shape == (8, 8)
    assert panels.enlarged_labels(labels.repeat(200, 100), 100).shape == (100, 50)
    assert panels.edges(labels).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_number_of_channels_can_be_drawn(channels: int) -> None:
    assert panels.as_rgb(torch.rand(channels, 4, 4), 0, 1).shape == (4, 4, 3)


def test_the_chosen_region_is_outlined_also_at_the_border() -> None:
    labels = torch.zeros(20, 20, dtype=torch.long)
    labels[10:, 10:] = 1
    drawn = panels.outlined(torch.zeros(20, 20, 3, dtype=torch.uint8), labels, chosen=1)
    red = (drawn == torch.tensor(panels.ALARM, dtype=torch.uint8)).all(-1)
    assert red[19, 12:].all()
    assert red[12:, 19].all()
    assert red[10, 12:].all()
    assert not red[:8, :8].any()
    assert not red[13:17, 13:17].any()


def test_panels_survive_many_regions_and_no_numbers() -> None:
    labels = torch.arange(30).view(5, 6)
    enlarged = panels.enlarged_labels(labels)
    colours = [panels.region_colour(r) for r in range(30)]
    filled = panels.filled(enlarged, colours, [str(r) for r in range(30)])
    curves = panels.curves([[math.nan, 0.5, 1.2]] * 30, [0, 5, 9], strong=3)
    drawn = panels.panel(
        "a title that is long enough to be broken into more than one line of the panel, and then some",
        [panels.Tile("map", filled), panels.Tile("curves", curves), panels.Tile("map", filled)],
        [panels.Row(colours[0], "row", True)],
        "note",
    )
    assert drawn.dtype == torch.uint8
    # two tiles wide, so that it can be read on a card of TensorBoard
    assert drawn.shape[1] == filled.shape[1] * 2 + 30
    assert panels.curves([[0.5]], [3]).shape == (panels.TILE, panels.TILE, 3)
    assert panels.heat(math.nan) == (60, 60, 60)
    assert sum(panels.heat(1.0)) > sum(panels.heat(30.0)) > sum(panels.heat(1000.0))
