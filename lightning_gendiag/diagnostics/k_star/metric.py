"""k* over batches and processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_gendiag.diagnostic import Reservoir
from lightning_gendiag.diagnostics.k_star.mathematics import Distance, KStarResult, check, k_star


class KStar(Reservoir):
    """:func:`k_star` over batches and processes.

    Memory: the rows as they come, or at most ``max_rows`` of them. Which are kept depends on a seeded hash of the row
    alone, so it is the same choice for any order, batch size and number of processes, and a fair one.

    Args:
        distance: see :func:`k_star`.
        max_rows: bound on the rows kept, over all processes; all by default.
        seed: of the choice.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import torch
        >>> metric = KStar()
        >>> metric.update(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().mean
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    higher_is_better = None
    plotted = ("class_",)

    def __init__(
        self, distance: Distance = "euclidean", *, max_rows: int | None = None, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance must be 'euclidean' or 'cosine', got {distance!r}.")
        self.distance = distance

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            latents: (N, D), any floating-point type.
            labels: (N,) integers.
        """
        check(latents, labels, self.distance)
        self.keep(latents, labels)

    def compute(self) -> KStarResult:
        """k* of all rows, in an order that depends on the rows alone."""
        return k_star(*self.kept(), distance=self.distance)
