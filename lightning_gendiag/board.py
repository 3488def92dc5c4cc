"""Where results are shown: TensorBoard in full, other loggers as far as they go, none without complaint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_LAYOUTS: WeakKeyDictionary[Any, dict[str, dict[str, list[Any]]]] = WeakKeyDictionary()
"""The charts of each trainer, kept whole: TensorBoard shows the layout written last and no other."""


class Board:
    """One evaluation's place on the loggers of a trainer. Silent on ranks above 0, and where there is no logger.

    Args:
        trainer: whose loggers.
        step: on the axis that ``self.log`` uses.
        prefix: before each name, such as ``"gendiag/cms"``.
    """

    def __init__(self, trainer: Trainer, step: int, prefix: str) -> None:
        self.trainer, self.step, self.prefix = trainer, step, prefix

    def scalars(self, values: dict[str, float]) -> None:
        """Numbers, on every logger, at once and not only every ``log_every_n_steps``."""
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics({f"{self.prefix}/{name}": value for name, value in values.items()}, step=self.step)

    def picture(self, name: str, picture: Tensor) -> None:
        """A picture (H, W, 3) uint8: on TensorBoard, and on loggers with ``log_image(key, images, step)``."""
        for writer in self._writers():
            writer.add_image(f"{self.prefix}/{name}", picture, self.step, dataformats="HWC")
        for logger in self._others("log_image"):
            logger.log_image(key=f"{self.prefix}/{name}", images=[picture.numpy()], step=self.step)

    def text(self, name: str, markdown: str) -> None:
        """Text on TensorBoard."""
        for writer in self._writers():
            writer.add_text(f"{self.prefix}/{name}", markdown, self.step)

    def histogram(self, name: str, values: Tensor) -> None:
        """A histogram of the finite values on TensorBoard; nothing where there are none."""
        values = values[values.isfinite()]
        if values.numel():
            for writer in self._writers():
                writer.add_histogram(f"{self.prefix}/{name}", values, self.step)

    def chart(self, title: str, kind: Literal["Multiline", "Margin"], names: Sequence[str]) -> None:
        """A chart on TensorBoard's Custom Scalars page that holds several curves.

        Args:
            title: of the chart.
            kind: ``"Multiline"``, or ``"Margin"`` with three names: value, lower and upper bound.
            names: of scalars under this prefix.
        """
        tags = [f"{self.prefix}/{name}" for name in names]
        if kind == "Multiline":
            # regular expressions that match prefixes: region_1 would show region_10 as well
            tags = [f"{re.escape(tag)}$" for tag in tags]
        layout = _LAYOUTS.setdefault(self.trainer, {})
        category = layout.setdefault(self.prefix, {})
        if category.get(title) != [kind, tags]:
            category[title] = [kind, tags]
            for writer in self._writers():
                writer.add_custom_scalars(layout)

    def flush(self) -> None:
        """Bring what was written to disk now; TensorBoard's writer waits up to two minutes."""
        for writer in self._writers():
            writer.flush()

    def _writers(self) -> Iterator[Any]:
        from torch.utils.tensorboard import SummaryWriter

        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                experiment = getattr(logger, "experiment", None)
                if isinstance(experiment, SummaryWriter):
                    yield experiment

    def _others(self, method: str) -> Iterator[Any]:
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                if callable(getattr(logger, method, None)):
                    yield logger
