"""The loss of a denoiser by noise level over batches and processes, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.timestep_loss.functional import (
    FEATURES,
    SIDES,
    Side,
    TimestepLossResult,
    check_edges,
    check_rows,
    features_of,
    summarise,
    summed_by_band,
)
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better


class TimestepLoss(Diagnostic):
    """:func:`timestep_loss` over batches and processes, on training and held-out images, and by raw and averaged weights.

    Memory: 39 numbers for each band, which does not grow with the number of images.

    Args:
        edges: (B + 1,) rising noise levels between which the bands lie.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if ``edges`` are not rising numbers.

    Example:
        >>> metric = TimestepLoss([0.0, 0.5, 1.0])
        >>> metric.update(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.9]))
        >>> metric.compute().loss
        tensor([0.1000, 0.3000], dtype=torch.float64)
    """

    higher_is_better = False
    plotted = ("loss_",)
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "loss": less_is_better(
            "Mean squared error of predictions for the same images and noise, of held-out images where there are any."
        ),
        "invalid": less_is_better("Fraction of the predictions that contain nan or inf and are left out."),
        "relative_loss": less_is_better("The loss relative to the mean square of what is predicted.", optional=True),
        "excess": less_is_better(
            "Largest excess of a band's relative loss over that of the best multiple of its input.", optional=True
        ),
        "train_loss": less_is_better("The loss on training images, where held-out ones are judged.", optional=True),
        "gap": less_is_better("Loss on held-out images relative to that on training images.", optional=True),
        "raw_loss": less_is_better("The loss by the raw weights, where averaged ones are judged.", optional=True),
        "highest_level": ScalarInfo("Highest noise level: minus the log-SNR, or the time.", unit="nats"),
        "loss_{b}": less_is_better("Loss in the band of noise levels, 0 for the least noise.", optional=True),
    }
    sums: Tensor

    def __init__(self, edges: Sequence[float] | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        given = torch.as_tensor(edges, dtype=torch.float64).detach().cpu()
        check_edges(given)
        self.edges = tuple(given.tolist())
        self.add_sums(sums=(len(SIDES), len(given) - 1, len(FEATURES)))
        self.add_configuration(edges=given)

    def update(
        self,
        errors: Tensor,
        levels: Tensor,
        *,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        side: Side = "train",
    ) -> None:
        """Adds predictions.

        Args:
            errors: (N,) mean squared error of each row; nan and inf are counted and left out.
            levels: (N,) noise levels; rows without a finite one are left out.
            inputs: (N, ...) what the network was given.
            targets: (N, ...) what it should predict.
            weights: (N,) weight of each row in the training loss; nan where it is not known.
            side: What the predictions are of; see :data:`Side`.

        Raises:
            ValueError: if an argument has another shape, or the side is none.
        """
        if side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}.")
        check_rows(errors, levels=levels, inputs=inputs, targets=targets, weights=weights)
        inputs, targets, weights = (
            None if x is None else x.detach().to(self.device) for x in (inputs, targets, weights)
        )
        features = features_of(errors.detach().to(self.device), inputs, targets, weights)
        edges = torch.tensor(self.edges, dtype=torch.float64, device=self.device)
        added = torch.zeros_like(self.sums)
        added[SIDES.index(side)] = summed_by_band(features, levels.detach().to(self.device), edges)
        self.accumulate(sums=added)

    def compute(self) -> TimestepLossResult:
        """Computes the loss of each band; nan where there are no rows."""
        return summarise(self.sums, torch.tensor(self.edges, dtype=torch.float64, device=self.sums.device))
