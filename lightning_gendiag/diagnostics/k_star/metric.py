"""k* over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.diagnostics.k_star.mathematics import Distance, KStarResult, check, k_star


class KStar(Diagnostic):
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
        >>> metric = KStar()
        >>> metric.update(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().mean
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    higher_is_better = None
    plotted = ("class_",)
    latents: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self, distance: Distance = "euclidean", *, max_rows: int | None = None, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if distance not in ("euclidean", "cosine"):
            raise ValueError(f"distance must be 'euclidean' or 'cosine', got {distance!r}.")
        if max_rows is not None and max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, got {max_rows}.")
        self.distance, self.max_rows, self.seed = distance, max_rows, seed
        self.add_state("latents", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            latents: (N, D), any floating-point type.
            labels: (N,) integers.
        """
        check(latents, labels, self.distance)
        if self.latents and self.latents[0].shape[1:] != latents.shape[1:]:
            raise ValueError(f"latents must be (N, {self.latents[0].shape[1]}) as before, got {tuple(latents.shape)}.")
        self.latents.append(latents.detach())
        self.labels.append(labels.detach().long())
        if self.max_rows is not None and sum(len(rows) for rows in self.latents) > 2 * self.max_rows:
            kept = self._kept(self.rows("latents"), self.rows("labels"))
            self.latents, self.labels = [kept[0]], [kept[1]]

    def compute(self) -> KStarResult:
        """k* of all rows, in an order that depends on the rows alone."""
        latents, labels = self.rows("latents"), self.rows("labels")
        if len(labels) == 0:
            return k_star(torch.zeros(0, 1, device=self.device), torch.zeros(0, dtype=torch.long, device=self.device))
        return k_star(*self._kept(latents, labels), distance=self.distance)

    def _kept(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        order = _keys(latents, labels, self.seed).argsort(stable=True)
        order = order if self.max_rows is None else order[: self.max_rows]
        return latents[order], labels[order]


def _keys(latents: Tensor, labels: Tensor, seed: int) -> Tensor:
    """(N,) int64 hashes of rows: exact integer arithmetic, so that a row has one key wherever it is met."""
    wide = latents.double()
    bits = (wide + 0.0).view(torch.int64)  # -0.0 and 0.0 are one number
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (latents.shape[1] + 1,), generator=generator).to(bits.device) * 2 + 1
    key = (bits * odd[:-1]).sum(1) + labels * odd[-1]
    for shift in (33, 29, 32):
        # mixes high bits into low ones, as SplitMix does; products wrap around
        key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * -49064778989728563
    return key
