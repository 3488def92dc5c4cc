"""The k* distribution over batches and processes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_gendiag.diagnostics.k_star.functional import Distance, KStarResult, check, check_distance, k_star
from lightning_gendiag.metric import Reservoir, ScalarInfo, less_is_better, more_is_better


class KStar(Reservoir):
    """:func:`k_star` over batches and processes.

    Memory: all rows, or between ``max_rows`` and twice as many of them. Whether a row is selected depends on a seeded hash
    of the row, so the selection is random, and the same for any order, batch size and number of processes.

    Args:
        distance: see :func:`k_star`.
        max_rows: largest number of rows used, over all processes; None for all rows.
        seed: seed of the selection.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import torch
        >>> metric = KStar()
        >>> metric.update(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().mean
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    plotted = ("class_",)
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "true_skewness": less_is_better("Skewness of the k* values of all samples together."),
        "approximate_skewness": less_is_better("Mean of the classes' skewness, over the classes where it is finite."),
        "mean": more_is_better(
            "Mean k* over all samples: the fraction of a sample's class that is nearer than any other class."
        ),
        "worst_class_mean": more_is_better("Lowest mean k* of a class."),
        "fractured": less_is_better("Number of classes whose skewness is above 0.5."),
        "invalid": less_is_better("Fraction of the latents that contain nan or inf and are left out."),
        "class_{c}": more_is_better("Mean k* of the class, for up to 20 classes."),
    }

    def __init__(
        self, distance: Distance = "euclidean", *, max_rows: int | None = None, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        check_distance(distance)
        self.distance = distance
        self.add_configuration(distance=distance)

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Adds samples.

        Args:
            latents: (N, D), any floating-point type.
            labels: (N,) integers.

        Raises:
            ValueError: if shapes or types do not match.
        """
        check(latents, labels)
        self.append(latents, labels)

    def compute(self) -> KStarResult:
        """Computes k* of the selected rows, in an order that depends on the rows alone."""
        return k_star(*self.selected(), distance=self.distance)
