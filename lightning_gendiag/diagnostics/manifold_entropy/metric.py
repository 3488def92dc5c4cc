"""Manifold entropies over batches and processes, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_gendiag.diagnostics.manifold_entropy.functional import (
    ManifoldEntropyResult,
    Sums,
    check_labels,
    check_partition,
    entropies,
    gram_sums,
)
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better


class ManifoldEntropy(Diagnostic):
    """:func:`manifold_entropy` over batches and processes.

    Memory: sums of (L, L) float64 numbers, which do not grow with the number of latents.

    Args:
        latent_dim: L.
        order: (L,) the dimensions in falling importance, for ``core`` and ``detail``, which are nan without an order.
        partition: sets of dimensions for the total correlation; None for sets of one dimension each.
        num_classes: K, for entropies within classes; ``update`` then requires labels.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if ``partition`` or ``order`` does not contain each dimension once.

    Example:
        >>> import torch
        >>> metric = ManifoldEntropy(2)
        >>> metric.update(torch.diag(torch.tensor([4.0, 1.0]))[None])
        >>> metric.compute().effective_dimensions
        tensor(1.6494, dtype=torch.float64)
    """

    plotted = ("dimension_", "total_correlation", "effective_dimensions")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "total": ScalarInfo(
            "Entropy of all dimensions together, from the volume that a flow reports where it reports one.", unit="nats"
        ),
        "total_correlation": less_is_better(
            "Sum of the dimensions' entropies minus the total entropy, 0 where dimensions do not overlap.", unit="nats"
        ),
        "effective_dimensions": ScalarInfo(
            "Number of dimensions in use: exponential of the Shannon entropy of their shares of squared movement."
        ),
        "dead": less_is_better(
            "Number of dimensions that move the data less than a thousandth of what the strongest one does."
        ),
        "largest_mutual_information": less_is_better("Largest mutual information of two dimensions.", unit="nats"),
        "highest": ScalarInfo("Highest entropy of a dimension.", unit="nats"),
        "lowest": ScalarInfo("Lowest entropy of a dimension.", unit="nats"),
        "singular": less_is_better("Fraction of the latents at which the Jacobian is rank deficient."),
        "core": ScalarInfo(
            "Entropy of the most important dimensions, as many as are in use.", unit="nats", optional=True
        ),
        "dimension_{i}": ScalarInfo(
            "Entropy of the data that the dimension generates, for up to 20 dimensions.", unit="nats"
        ),
    }
    order: Tensor | None
    left_out: Tensor

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
            raise ValueError(
                f"latent_dim must be at least 1, got {latent_dim}. To fix this, pass the length of the latents."
            )
        check_partition(partition, latent_dim)
        if order is not None:
            check_partition([order.tolist()], latent_dim, "order")
        self.latent_dim, self.partition, self.num_classes = latent_dim, partition, num_classes
        self.register_buffer("order", order, persistent=False)
        # those of Sums, and one more
        self.add_sums(
            latents=(1 + num_classes,), log_norms=(1 + num_classes, latent_dim), log_volume=(), log_parts=(),
            log_dependence=(latent_dim, latent_dim), leading=(latent_dim,), trailing=(latent_dim,), singular=(),
            left_out=(),
        )  # fmt: skip
        self.add_configuration(latent_dim=latent_dim, order=order, partition=partition, num_classes=num_classes)

    def update(self, gram: Tensor, log_volume: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Adds latents.

        Args:
            gram: (N, L, L) from :func:`decoder_gram`. Matrices with nan or inf are left out.
            log_volume: (N,) ``log |det J|`` as a flow computes it; pass it at all updates or at none.
            labels: (N,) integers 0..K-1, required where ``num_classes`` is given.

        Raises:
            ValueError: if shapes or types do not match.
        """
        if gram.ndim != 3 or gram.shape[1:] != (self.latent_dim, self.latent_dim) or not gram.is_floating_point():
            raise ValueError(
                f"gram must be (N, {self.latent_dim}, {self.latent_dim}) of floats, got {gram.dtype} of shape "
                f"{tuple(gram.shape)}. To fix this, pass what decoder_gram returns."
            )
        gram = gram.detach()
        if log_volume is not None and log_volume.shape != gram.shape[:1]:
            raise ValueError(
                f"log_volume must be ({len(gram)},), got {tuple(log_volume.shape)}. "
                "To fix this, pass one number per latent."
            )
        check_labels(labels, len(gram), self.num_classes)
        finite = gram.flatten(1).isfinite().all(1)
        if log_volume is not None:
            finite = finite & log_volume.isfinite()
            log_volume = log_volume.detach()[finite]
        labels = None if labels is None else labels[finite]
        if finite.any():
            sums = gram_sums(gram[finite], log_volume, labels, self.num_classes, self.order, self.partition)
            self.accumulate(**sums._asdict())
        self.accumulate(left_out=(~finite).sum())

    def compute(self) -> ManifoldEntropyResult:
        """Computes the entropies over all latents; nan where there are none."""
        return entropies(Sums(*(getattr(self, name) for name in Sums._fields)), self.order)
