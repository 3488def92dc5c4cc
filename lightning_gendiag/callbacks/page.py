"""What one monitor writes for the tab of TensorBoard: its series once, values at each evaluation, pictures at some of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_gendiag.detection.history import Evaluation
from lightning_gendiag.tensorboard.records import Record, frame_tag, setup_tag, values_tag

if TYPE_CHECKING:
    from lightning_gendiag.callbacks.logging import DiagnosticLogger

ALL_FRAMES, FRAME_GROWTH = 5, 0.25
"""So many evaluations all have pictures, then each time their number has grown by this share: 33 of 2,000. TensorBoard's
writer takes 0.1 ms for each kilobyte, in which training waits for it."""

DESCRIBED = ("name", "role", "quantity", "unit", "label", "index", "min_std", "min_delta")
"""What the tab, and the comparison of two runs, need to know of a series."""

COMPARED = ("component", "aggregate", "standalone")
"""Roles of the series whose severities are written."""


class Page:
    """Writes what the tab shows of one monitor.

    Args:
        name: Of the monitor.
        diagnostic: Name of its metric's class.
    """

    def __init__(self, name: str, diagnostic: str) -> None:
        self.name, self.diagnostic = name, diagnostic
        self._next_frame = 0
        self._last_frame: Evaluation | None = None
        self._series: dict[str, dict[str, Any]] = {}
        self._fit, self._written = f"{time.time_ns():x}", 0

    def is_due(self, number: int) -> bool:
        """Returns whether pictures are written at an evaluation with this number."""
        return number <= ALL_FRAMES or number >= self._next_frame

    def write_values(
        self, evaluation: Evaluation, setup: Callable[[], Record], extra: Mapping[str, Any], logger: DiagnosticLogger
    ) -> None:
        """Writes the values of an evaluation; before the first one, and where there are new series, the setup.

        Args:
            evaluation: The evaluation.
            setup: Returns what does not change, beside the series.
            extra: Lists of numbers that the series do not hold.
            logger: At the step of the evaluation.
        """
        series = {o.series.name: o.series for o in evaluation.observations}
        if not self._series.keys() >= series.keys() or not self._series:
            self._series |= {name: {key: getattr(one, key) for key in DESCRIBED} for name, one in series.items()}
            record = setup()
            fields = {"diagnostic": self.diagnostic, "series": list(self._series.values()), **record.fields}
            logger.log_record(setup_tag(self.name), record._replace(fields=fields))
        values = {o.series.name: o.value for o in evaluation.observations}
        severities = {o.series.name: o.severity for o in evaluation.observations if o.series.role in COMPARED}
        fields = {
            **_place(evaluation), "averaged": evaluation.averaged, "values": values, "severities": severities, "extra": extra,
        }  # fmt: skip
        logger.log_record(values_tag(self.name, self._written, self._fit), Record(fields))
        self._written += 1

    def write_frame(self, evaluation: Evaluation, frame: Record, logger: DiagnosticLogger) -> None:
        """Writes the pictures and larger arrays of an evaluation."""
        number, self._last_frame = evaluation.number, evaluation
        self._next_frame = number + max(1, int(number * FRAME_GROWTH))
        record = frame._replace(fields={**_place(evaluation), **frame.fields})
        logger.log_record(frame_tag(self.name, number), record)

    def has_frame(self, evaluation: Evaluation) -> bool:
        """Returns whether the pictures of an evaluation were written."""
        return self._last_frame is evaluation


def _place(evaluation: Evaluation) -> dict[str, Any]:
    return {"step": evaluation.step, "epoch": evaluation.epoch, "number": evaluation.number}
