"""Monitors the training batches themselves while a model trains."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import SHARE_OF_NAN, Observation, Series
from lightning_gendiag.diagnostics.training_data import plots
from lightning_gendiag.diagnostics.training_data.functional import (
    MORE_ROWS,
    ROWS,
    Glance,
    TrainingDataResult,
    glance,
    grid_of,
)
from lightning_gendiag.diagnostics.training_data.metric import MAX_HASHES, SUMS, TrainingData
from lightning_gendiag.functional.results import MAX_CLASS_TAGS

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.batches import Images
    from lightning_gendiag.model.view import ModelView

HELD = 64
"""Number of batches whose images are held before they are measured together, at most."""

HELD_NUMBERS = {"cpu": 1 << 19}
"""Largest count of numbers in the images that are held, by the kind of device: on a processor as many as its cache holds."""

HELD_ON_OTHERS = 1 << 22
"""The same on other kinds, where the number of calls counts."""

LOOKING, LOOKING_SECONDS = 0.02, 0.03
"""Part of the limit of the time, and seconds beside it, within which all batches are looked at; of more, some are not."""

LEAST_FIRST = 256
"""Number of images from which on the first ones of the run are complete."""

WATCHED = 64
"""Largest number of classes with a series of their own; of more, the most frequent ones."""

ORDERED = 3
"""Number of evaluations in a row in which data that come in an order must have moved before an alarm."""

CLASS = Series("class", "component", "share of training images", event="moved", stop="never")
RANGE = Series("range", "rule", "shift of the range", event="moved", stop="never")
REGIONS = Series("regions", "rule", "shift in standard deviations", event="moved", stop="never")
DUPLICATES = Series("duplicates", "rule", "different images", event="repeats", stop="never")
INVALID = Series("invalid", "rule", SHARE_OF_NAN, event="broke", stop="never")
"""What goes wrong in the data stops a run where what is generated becomes worse by it, which other monitors see."""


class TrainingDataMonitor(Monitor[TrainingData, TrainingDataResult]):
    """Monitors :class:`TrainingData`: whether the training batches still hold what the first ones of the run held.

    It needs no model. Batches are seen as they pass by, and what they hold is compared at each evaluation with all batches
    before the first one.

    Args:
        rows: See :class:`TrainingData`.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> monitor = TrainingDataMonitor()  # one of the Trainer's callbacks
        >>> monitor.moved
        ''
    """

    name = "training_data"
    metric_class = TrainingData
    needs = ()
    watches_batches = True
    expected_seconds = 0.01
    first: dict[str, Tensor] | None = None
    """Sums of the first batches, with which later ones are compared; None before the first evaluation."""
    _absent: Tensor | None = None

    def __init__(self, *, rows: int = ROWS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}.")
        self.rows = rows
        self._forget_batches()

    def _forget_batches(self) -> None:
        self._watched: TrainingData | None = None
        self._held: list[Glance] = []
        self._numbers = self._batches = self._since_evaluation = 0
        # batches of the session before the newest evaluation
        self._before = 0 if self._session is None else self._session.batches
        # seconds of this fit, as those of the time that passed
        self._looking = 0.0

    @property
    def moved(self) -> str:
        """What moved as of the latest evaluation, in a sentence without its full stop; empty where nothing did."""
        return "" if self.result is None else "; ".join(self.result.moves().values())

    def reset(self) -> None:
        """Forgets the first batches of the run."""
        super().reset()
        self.first = self._absent = None

    def prepare(self) -> None:
        """Takes over a checkpoint's state, and forgets batches of a fit before this one."""
        self._forget_batches()
        super().prepare()

    # ---- between two evaluations ----

    @property
    def sees_batches(self) -> bool:
        """Whether the next batch is looked at: of those after the first ones fewer where that takes too much time."""
        return self._since_evaluation < MORE_ROWS or self._has_time()

    def see(self, view: ModelView, data: Images) -> None:
        """Keeps some images of a batch and all labels; they are measured together with those of other batches."""
        images, labels = data
        if not len(images):
            return
        started = time.monotonic()
        self._look(view, images, labels)
        self._looking += time.monotonic() - started

    def _has_time(self) -> bool:
        """Whether looking at batches has taken no more than its part of the limit."""
        if self.max_overhead is None:
            return True
        training = self.session.schedule.budget.training
        return self._looking <= LOOKING_SECONDS + LOOKING * self.max_overhead * training

    def _look(self, view: ModelView, images: Tensor, labels: Tensor | None) -> None:
        if self._watched is None:
            self._watched = TrainingData(images.shape[1:], rows=self.rows).to(images.device)
        if images.ndim < 2 or grid_of(images.shape[1:]) != self._watched.grid:
            raise ValueError(
                f"the data of a batch must be (N, {', '.join(map(str, self._watched.shape))}) as before, got "
                f"{tuple(images.shape)}. To fix this, {view.adapter.images_advice}."
            )
        more = MORE_ROWS if self._since_evaluation < MORE_ROWS else 1
        seen = glance(images, labels, self.rows * more, first=self._batches)
        self._batches += 1
        self._since_evaluation += 1
        self._held.append(seen)
        self._numbers += seen.rows.numel()
        if len(self._held) >= HELD or self._numbers >= HELD_NUMBERS.get(images.device.type, HELD_ON_OTHERS):
            self._measure()

    def _measure(self) -> None:
        if self._watched is not None and self._held:
            self._watched.update(glances=self._held)
        self._held, self._numbers = [], 0

    # ---- at an evaluation ----

    def build_metric(self, view: ModelView) -> TrainingData:
        """Creates the metric for the data of the first batch."""
        own = self._watched
        shape = view.broadcast(lambda: None if own is None else own.shape)
        return TrainingData(shape or view.reference.images.shape[1:], rows=self.rows)

    def update(self, view: ModelView) -> None:
        """Adds what this process has seen since the last evaluation, and the first batches of all processes."""
        self._measure()
        skipped = self.session.batches - self._before - self._since_evaluation
        self._before, self._since_evaluation = self.session.batches, 0
        if self._watched is not None and self._watched.update_called:
            if self._watched.device == view.device and self._watched.shape == self.metric.shape:
                # which has been reset, and sees the next batches
                self._metric, self._watched = self._watched, self._metric
            else:
                self.metric.merge_state(self._watched.to(view.device))
                self._watched.reset()
        self.metric.accumulate(skipped=max(skipped, 0))
        if self.first is not None and view.is_global_zero:
            self.metric.add_first(self.first)

    def postprocess(self, view: ModelView, result: TrainingDataResult) -> TrainingDataResult:
        """Adds for how long each class was absent."""
        return self.noted(result)

    def noted(self, result: TrainingDataResult) -> TrainingDataResult:
        """Notes a result of the newest batches, which are the first ones until there are enough, and returns it on the CPU."""
        result = TrainingDataResult(*(value.cpu() for value in result))
        if self.first is None or float(self.first["images"]) < LEAST_FIRST:
            self.first = _joined(self.first, result)
            return result
        before = torch.zeros_like(result.absent)
        if self._absent is not None:
            before[: len(self._absent)] = self._absent[: len(before)]
        self._absent = torch.where(result.classes[0] > 0, 0.0, before + result.classes[0].sum())
        return result._replace(absent=before)

    def observations(self, result: TrainingDataResult) -> list[Observation]:
        """The share of each class, and how much the range, the cells, the variety and the share of nan moved."""
        moves, compared = result.moves(), result.is_compared
        confirm = ORDERED if result.is_ordered else 1

        def observed(series: Series, value: float) -> Observation:
            words = moves.get(series.name, "")
            once = series in (INVALID, DUPLICATES)
            named = replace(series, label=f"data: {series.name}", confirm=1 if once else confirm)
            return Observation(named, value, math.inf if words else 0.0, message=words)

        shift = float(result.cells_moved.max()) if compared else 0.0
        return [
            *self._classes(result, moves, confirm),
            observed(RANGE, result.range_moved if compared else 0.0),
            observed(REGIONS, shift),
            observed(DUPLICATES, result.variety),
            observed(INVALID, float(result.invalid_images[0] / result.images[0])),
        ]

    def _classes(self, result: TrainingDataResult, moves: dict[str, str], confirm: int) -> list[Observation]:
        if not result.has_classes:
            return []
        classes = result.classes.sum(0).argsort(descending=True, stable=True)[:WATCHED].sort().values.tolist()
        moved = result.moved_classes if "classes" in moves else []
        shares = result.share[0].tolist()
        observations = []
        for c in classes:
            series = replace(CLASS.numbered(c), label=f"data: class {c}", confirm=confirm)
            if c in moved:
                message = result.class_words(c) if len(moved) <= 3 else moves["classes"]
                observations.append(Observation(series, shares[c], math.inf, message=message))
            else:
                observations.append(Observation(series, shares[c], 0.0))
        return observations

    def log_plots(self, result: TrainingDataResult, context: PlotContext) -> None:
        """Logs the charts and the panel."""
        count = result.classes.shape[1]
        if result.has_classes and count <= MAX_CLASS_TAGS:
            context.logger.log_chart("share of every class", "Multiline", [f"class_{c}" for c in range(count)])
        context.logger.log_chart("shifts", "Multiline", ["range_shift", "cell_shift"])
        context.logger.log_image("panel", plots.panel(result, context.occasion()))

    def log_alarm(self, alarm: Alarm, result: TrainingDataResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's classes marked."""
        context.logger.log_image("picture", plots.panel(result, context.occasion(alarm)))

    # ---- checkpoints ----

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the sums of the first batches, and for how long each class was absent."""
        return {"first": None if self.first is None else dict(self.first), "absent": self._absent}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self.first, self._absent = state["first"], state["absent"]


def _joined(first: dict[str, Tensor] | None, result: TrainingDataResult) -> dict[str, Tensor]:
    """Returns the sums of the first batches with those of the batches since the last evaluation."""
    new = {name: getattr(result, name)[0] for name in SUMS}
    new |= {"low": result.low[0], "high": result.high[0], "hashes": result.hashes[: 2 * MAX_HASHES]}
    if first is None:
        return new
    joined = {}
    for name, value in new.items():
        before = first[name]
        if name == "low":
            joined[name] = torch.minimum(before, value)
        elif name == "high":
            joined[name] = torch.maximum(before, value)
        elif name == "hashes":
            joined[name] = torch.cat([before, value])[: 2 * MAX_HASHES]
        elif name.startswith("class"):
            size = max(len(before), len(value))
            joined[name] = pad(before, (0, size - len(before))) + pad(value, (0, size - len(value)))
        else:
            joined[name] = before + value
    return joined
