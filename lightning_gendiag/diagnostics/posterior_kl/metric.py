"""KL divergence of a VAE's posterior over batches and processes, in constant memory."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.posterior_kl.functional import ACTIVE, PosteriorKLResult, posterior_kl
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better

FULL_COVARIANCE = 512
"""Largest number of dimensions for which the whole covariance of the aggregate posterior is kept, not its diagonal only."""


class PosteriorKL(Diagnostic):
    """KL divergence of a VAE's posterior by dimension, active units, and the aggregate posterior against the prior.

    The values are nats of the posterior itself and do not depend on weights or scales in the loss. Memory: sums of (L,)
    numbers, and of (L, L) numbers for up to 512 dimensions, which do not grow with the number of rows.

    Args:
        latent_dim: L.
        threshold: variance of a dimension's posterior mean over the data above which the dimension is active.
        channels: C of spatial latents (C, ...) whose L dimensions are also summed over positions, channel by channel.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = PosteriorKL(2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.tensor([[-2.0, 0.0], [-2.0, 0.0]]))
        >>> metric.compute().active
        tensor([ True, False])
    """

    plotted = ("dimension_", "channel_", "total")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "total": ScalarInfo("KL divergence of the posterior from N(0, 1), over all dimensions.", unit="nats"),
        "active_units": ScalarInfo(
            "Number of dimensions whose posterior mean varies over the data by more than the threshold."
        ),
        "dead_share": less_is_better("Fraction of the dimensions that are not active."),
        "aggregate_kl": less_is_better(
            "KL divergence of the latents of all data together from N(0, 1), by their first two moments.", unit="nats"
        ),
        "information": more_is_better(
            "Upper bound of the mutual information of data and latents: the total minus the aggregate KL.", unit="nats"
        ),
        "highest": ScalarInfo("Highest KL divergence of a dimension.", unit="nats"),
        "lowest": ScalarInfo("Lowest KL divergence of a dimension.", unit="nats"),
        "invalid": less_is_better("Fraction of the posteriors that contain nan or inf and are left out."),
        "dimension_{i}": ScalarInfo(
            "KL divergence of the posterior from N(0, 1) in the dimension, for up to 20 dimensions.", unit="nats"
        ),
        "channel_{c}": ScalarInfo(
            "KL divergence of the posterior from N(0, 1) in the channel over all positions, for up to 20 channels.",
            unit="nats",
            optional=True,
        ),
    }
    rows_seen: Tensor
    left_out: Tensor
    divergence: Tensor
    means: Tensor
    products: Tensor
    variances: Tensor

    def __init__(
        self, latent_dim: int, *, threshold: float = ACTIVE, channels: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if latent_dim < 1:
            raise ValueError(
                f"latent_dim must be at least 1, got {latent_dim}. To fix this, pass the length of the latents."
            )
        if threshold < 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}. To fix this, pass a number such as 0.01.")
        if channels is not None and (channels < 1 or latent_dim % channels):
            raise ValueError(
                f"channels must divide latent_dim {latent_dim}, got {channels}. To fix this, pass C for latents (C, ...)."
            )
        self.latent_dim, self.threshold, self.channels = latent_dim, threshold, channels
        square = (latent_dim, latent_dim) if latent_dim <= FULL_COVARIANCE else (latent_dim,)
        each = (latent_dim,)
        self.add_sums(rows_seen=(), left_out=(), divergence=each, means=each, products=square, variances=each)
        self.add_configuration(latent_dim=latent_dim, threshold=threshold, channels=channels)

    def update(self, mean: Tensor, log_variance: Tensor, divergence: Tensor | None = None) -> None:
        """Adds the posteriors of images.

        Args:
            mean: (N, L) floats.
            log_variance: (N, L) natural logarithms of the variances. Rows with nan or inf are left out.
            divergence: (N, L) divergences from the prior in nats where the posteriors are no diagonal Gaussians, or their
                prior is not N(0, 1).

        Raises:
            ValueError: if an argument has another shape or type.
        """
        given_divergence = mean if divergence is None else divergence
        for name, given in (("mean", mean), ("log_variance", log_variance), ("divergence", given_divergence)):
            if given.ndim != 2 or given.shape[1] != self.latent_dim or not given.is_floating_point():
                raise ValueError(
                    f"{name} must be (N, {self.latent_dim}) of floats, got {given.dtype} of shape {tuple(given.shape)}. "
                    f"To fix this, flatten it, or create PosteriorKL({given[:1].numel()})."
                )
        divergence = posterior_kl(mean.detach(), log_variance.detach()) if divergence is None else divergence.double()
        finite = divergence.isfinite().all(1)
        # zeros in place of rows that are left out, since the host would wait for the number of rows that are not
        divergence, m, v = (
            values.where(finite[:, None], 0.0)
            for values in (divergence, mean.detach().double(), log_variance.detach().double().exp())
        )
        self.accumulate(
            rows_seen=finite.sum(), left_out=(~finite).sum(), divergence=divergence.sum(0), means=m.sum(0),
            variances=v.sum(0), products=m.T @ m if self.products.ndim == 2 else m.square().sum(0),
        )  # fmt: skip

    def compute(self) -> PosteriorKLResult:
        """Computes the divergences over all rows; nan where there are none."""
        n = self.rows_seen
        mean, inner = self.means / n, self.variances / n
        if self.products.ndim == 2:
            between = self.products / n - mean[:, None] * mean
            covariance = between + inner.diag()
            spread = between.diagonal().clamp(min=0)
            finite = covariance.isfinite().all()
            log_volume = torch.linalg.slogdet(covariance)[1] if finite else torch.full_like(n, math.nan)
        else:
            spread = (self.products / n - mean.square()).clamp(min=0)
            log_volume = (spread + inner).log().sum()
        aggregate = 0.5 * ((spread + inner + mean.square() - 1).sum() - log_volume)
        per_dimension = self.divergence / n
        return PosteriorKLResult(
            per_dimension=per_dimension,
            variance_of_mean=spread,
            aggregate_mean=mean,
            aggregate_variance=spread + inner,
            aggregate_kl=aggregate.clamp(min=0),
            invalid=self.left_out / (n + self.left_out),
            threshold=torch.full_like(n, self.threshold),
            per_channel=per_dimension.view(self.channels, -1).sum(1) if self.channels else per_dimension[:0],
        )
