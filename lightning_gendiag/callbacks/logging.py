"""Where results are shown: TensorBoard in full, other loggers as far as they go, none without complaint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_gendiag.model.compat import file_writer, is_board, log_metrics
from lightning_gendiag.model.warning import warn
from lightning_gendiag.tensorboard.records import Record, image_summary, packed, summary

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

PREFIX = "gendiag"
"""First part of all tags."""

LARGEST_FILES = 64 << 20
"""Bytes of event files that are read to find the charts that the user wrote."""

Layout = dict[str, dict[str, list[Any]]]
"""Charts of TensorBoard's Custom Scalars page: category, title, kind and tags."""


class DiagnosticWarning(UserWarning):
    """A diagnostic failed, or its numbers are doubtful."""


class DiagnosticLogger:
    """Logs one evaluation to the loggers of a trainer; silent on ranks above 0, and where there is no logger.

    Args:
        trainer: Whose loggers.
        step: Position on the axis that ``self.log`` uses.
        name: Of the monitor, after ``gendiag/``; empty for what is of none.
        layout: The charts of all monitors, shared by their loggers: TensorBoard shows the layout written last and no
            other.
    """

    def __init__(self, trainer: Trainer, step: int, name: str = "", layout: Layout | None = None) -> None:
        self.trainer, self.step, self.layout = trainer, step, {} if layout is None else layout
        self.prefix = f"{PREFIX}/{name}" if name else PREFIX
        self.has_new_charts = False
        """Whether charts were added that :meth:`write_layout` has not written."""

    def log_scalars(self, values: dict[str, float]) -> None:
        """Logs numbers to every logger at once, and not only every ``log_every_n_steps``."""
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                log_metrics(logger, {f"{self.prefix}/{name}": value for name, value in values.items()}, self.step)

    def log_image(self, name: str, picture: Tensor) -> None:
        """Logs a picture (H, W, 3) uint8 to TensorBoard and to loggers with ``log_image(key, images, step)``."""
        for writer in self._writers():
            file_writer(writer).add_summary(image_summary(f"{self.prefix}/{name}", picture.cpu().numpy()), self.step)
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                log_image = getattr(logger, "log_image", None)
                if callable(log_image):
                    log_image(key=f"{self.prefix}/{name}", images=[picture.numpy()], step=self.step)

    def log_text(self, name: str, markdown: str) -> None:
        """Logs text to TensorBoard; warns where it cannot be written."""
        try:
            for writer in self._writers():
                writer.add_text(f"{self.prefix}/{name}", markdown, self.step)
        except Exception as error:
            warn(f"{self.prefix}/{name} could not be logged: {error}", category=DiagnosticWarning)

    def log_record(self, tag: str, record: Record) -> None:
        """Logs what the tab of TensorBoard shows."""
        parts: list[bytes] = []
        for writer in self._writers():
            parts = parts or packed(record)
            file_writer(writer).add_summary(summary(tag, parts), self.step)

    def log_histogram(self, name: str, values: Tensor) -> None:
        """Logs a histogram of the finite values to TensorBoard; nothing where there are none."""
        values = values[values.isfinite()]
        if values.numel():
            for writer in self._writers():
                writer.add_histogram(f"{self.prefix}/{name}", values, self.step)

    def log_chart(self, title: str, kind: Literal["Multiline", "Margin"], names: Sequence[str]) -> None:
        """Adds a chart with several curves to TensorBoard's Custom Scalars page, which :meth:`write_layout` writes.

        Args:
            title: Of the chart.
            kind: ``"Multiline"``, or ``"Margin"`` with three names: value, lower and upper bound.
            names: Of scalars of this monitor.
        """
        tags = [f"{self.prefix}/{name}" for name in names]
        if kind == "Multiline":
            # regular expressions that match prefixes: region_1 would show region_10 as well
            tags = [f"{re.escape(tag)}$" for tag in tags]
        category = self.layout.setdefault(self.prefix, {})
        if category.get(title) != [kind, tags]:
            category[title] = [kind, tags]
            self.has_new_charts = True

    def write_layout(self, only_merged: bool = False) -> None:
        """Writes all charts together with those of the user, unless TensorBoard shows them already.

        Args:
            only_merged: Whether to leave the charts as they are where those of the user cannot be read.
        """
        self.has_new_charts = False
        if not self.layout:
            return
        for writer in self._writers():
            written = _written_layout(writer)
            if written is None and only_merged:
                continue
            merged = {category: charts for category, charts in (written or {}).items() if category not in self.layout}
            if merged | self.layout != written:
                writer.add_custom_scalars(merged | self.layout)

    @property
    def has_board(self) -> bool:
        """Whether there is a TensorBoard to write to, on this rank; a logger that cannot be reached is none."""
        try:
            return next(self._writers(), None) is not None
        except Exception:
            return False

    def flush(self) -> None:
        """Writes to disk what was logged; TensorBoard's writer waits up to two minutes."""
        for writer in self._writers():
            writer.flush()

    def _writers(self) -> Iterator[Any]:
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                experiment = getattr(logger, "experiment", None)
                if is_board(experiment):
                    yield experiment


def _written_layout(writer: Any) -> Layout | None:
    """Returns the layout that TensorBoard would show now for a writer's folder; None where it cannot be read."""
    try:
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata

        writer.flush()
        newest = layout_pb2.Layout()
        paths = sorted(Path(writer.log_dir).glob("*tfevents*"))
        if sum(path.stat().st_size for path in paths) > LARGEST_FILES:
            return None
        for path in paths:
            for value in _summaries(path, metadata.CONFIG_SUMMARY_TAG):
                newest = layout_pb2.Layout.FromString(value.tensor.string_val[0])
        return {category.title: _charts(category) for category in newest.category}
    except Exception:
        return None


def _summaries(path: Path, tag: str) -> Iterator[Any]:
    """Yields what an event file holds under a tag.

    TensorBoard's own loader checks and parses each record in Python, which takes seconds for 10 MB.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    with path.open("rb") as file:
        # a record is its length, a checksum of that, the event, and a checksum of this
        while len(head := file.read(12)) == 12:
            content = file.read(int.from_bytes(head[:8], "little"))
            file.seek(4, os.SEEK_CUR)
            if tag.encode() in content:
                yield from (value for value in Event.FromString(content).summary.value if value.tag == tag)


def _charts(category: Any) -> dict[str, list[Any]]:
    charts: dict[str, list[Any]] = {}
    for chart in category.chart:
        if chart.WhichOneof("content") == "margin":
            series = chart.margin.series[0]
            charts[chart.title] = ["Margin", [series.value, series.lower, series.upper]]
        else:
            charts[chart.title] = ["Multiline", list(chart.multiline.tag)]
    return charts
