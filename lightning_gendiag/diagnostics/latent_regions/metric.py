"""Latent regions over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gendiag.diagnostic import Reservoir
from lightning_gendiag.diagnostics.latent_regions.mathematics import LatentRegionsResult, check, latent_regions


class LatentRegions(Reservoir):
    """:func:`latent_regions` over batches and processes.

    Memory: at most ``max_rows`` latents, a seeded choice that is the same for any order, batch size and number of
    processes.

    Args:
        components: of the mixture; by default the Bayesian information criterion's choice.
        max_components: bound of that choice.
        max_rows: bound on the rows kept, over all processes.
        seed: of the choice of rows and of the mixture's first guess.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = LatentRegions(components=2)
        >>> metric.update(torch.randn(100, 2) - 4, torch.zeros(100, dtype=torch.long))
        >>> metric.update(torch.randn(100, 2) + 4, torch.ones(100, dtype=torch.long))
        >>> metric.compute().class_entropy
        tensor([0., 0.], dtype=torch.float64)
    """

    higher_is_better = None

    def __init__(
        self,
        components: int | None = None,
        *,
        max_components: int = 12,
        max_rows: int = 5000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        for name, value in (("components", components), ("max_components", max_components)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.components, self.max_components = components, max_components

    def update(self, latents: Tensor, labels: Tensor | None = None) -> None:
        """Add latents.

        Args:
            latents: (N, D) floats.
            labels: (N,) integers, negative where not known; none are known without.
        """
        check(latents, labels)
        unknown = torch.full((len(latents),), -1, device=latents.device)
        self.keep(latents, unknown if labels is None else labels)

    def compute(self) -> LatentRegionsResult:
        """The regions of all latents."""
        result = latent_regions(
            *self.kept(), components=self.components, max_components=self.max_components, seed=self.seed
        )
        return LatentRegionsResult(*(part.to(self.device) for part in result))
