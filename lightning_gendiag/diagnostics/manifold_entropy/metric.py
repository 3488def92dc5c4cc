"""Manifold entropies over batches and processes, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.diagnostics.manifold_entropy.mathematics import (
    ManifoldEntropyResult,
    Sums,
    check_partition,
    entropies,
    gram_sums,
)


class ManifoldEntropy(Diagnostic):
    """:func:`manifold_entropy` over batches and processes: sums only, memory (L, L) however many latents.

    Args:
        latent_dim: L.
        order: (L,) the dimensions in falling importance, for ``core`` and ``detail``; without it these are nan, since a
            single pass cannot know it.
        partition: sets of dimensions for the total correlation; singletons by default.
        num_classes: K, for entropies within classes; ``update`` then takes labels.

    Raises:
        ValueError: in words, for a partition or an order that does not have each dimension once.

    Example:
        >>> metric = ManifoldEntropy(2)
        >>> metric.update(torch.diag(torch.tensor([4.0, 1.0]))[None])
        >>> metric.compute().effective_dimensions
        tensor(1.6494, dtype=torch.float64)
    """

    higher_is_better = None
    left_out: Tensor
    plotted = ("dimension_", "total_correlation", "effective_dimensions")

    def __init__(
        self,
        latent_dim: int,
        *,
        order: Tensor | None = None,
        partition: Sequence[Sequence[int]] | None = None,
        num_classes: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}.")
        check_partition(partition, latent_dim)
        if order is not None:
            check_partition([order.tolist()], latent_dim)
        self.latent_dim, self.partition, self.num_classes = latent_dim, partition, num_classes
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)
        shapes = {
            "latents": (1 + num_classes,),
            "log_norms": (1 + num_classes, latent_dim),
            "log_volume": (),
            "log_parts": (),
            "log_dependence": (latent_dim, latent_dim),
            "leading": (latent_dim,),
            "trailing": (latent_dim,),
            "singular": (),
        }
        for name in Sums._fields:
            self.add_state(name, default=torch.zeros(shapes[name], dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("left_out", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, gram: Tensor, log_volume: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Add latents.

        Args:
            gram: (N, L, L) from :func:`decoder_gram`. Matrices with nan or inf are left out.
            log_volume: (N,) a flow's own ``log |det J|``; for all updates or none.
            labels: (N,) integers 0..K-1, needed where ``num_classes`` was given.
        """
        if gram.ndim != 3 or gram.shape[1:] != (self.latent_dim, self.latent_dim) or not gram.is_floating_point():
            raise ValueError(
                f"gram must be (N, {self.latent_dim}, {self.latent_dim}) of floats, got {gram.dtype} of shape "
                f"{tuple(gram.shape)}. To fix this, pass what decoder_gram returns."
            )
        if log_volume is not None and log_volume.shape != gram.shape[:1]:
            raise ValueError(f"log_volume must be ({len(gram)},), got {tuple(log_volume.shape)}.")
        if self.num_classes and (labels is None or labels.shape != gram.shape[:1]):
            raise ValueError(f"labels must be ({len(gram)},) where num_classes is given, got {labels}.")
        finite = gram.flatten(1).isfinite().all(1)
        if log_volume is not None:
            finite = finite & log_volume.isfinite()
            log_volume = log_volume[finite]
        self.left_out += (~finite).sum()
        if not finite.any():
            return
        labels = labels[finite] if labels is not None else None
        sums = gram_sums(gram[finite], log_volume, labels, self.num_classes, self.order, self.partition)
        for name, value in zip(Sums._fields, sums, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> ManifoldEntropyResult:
        """The entropies over all latents; nan where there was none."""
        return entropies(Sums(*(getattr(self, name) for name in Sums._fields)), self.order)
