"""Regions of the latent space over batches and processes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.latent_regions.functional import LatentRegionsResult, check, latent_regions
from lightning_gendiag.metric import Reservoir, ScalarInfo, less_is_better, more_is_better


class LatentRegions(Reservoir):
    """:func:`latent_regions` over batches and processes.

    Memory: at most twice ``max_rows`` latents, a seeded random selection that is the same for any order, batch size and
    number of processes; while more than 64 dimensions are reduced, also the products of the rows.

    Args:
        components: number of components of the mixture; None chooses it by the Bayesian information criterion.
        max_components: largest number that is considered.
        max_rows: largest number of latents used, over all processes; None for all of them.
        seed: seed of the selection and of the first guess of the mixture.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = LatentRegions(components=2)
        >>> metric.update(torch.randn(100, 2) - 4, torch.zeros(100, dtype=torch.long))
        >>> metric.update(torch.randn(100, 2) + 4, torch.ones(100, dtype=torch.long))
        >>> metric.compute().class_entropy
        tensor([0., 0.], dtype=torch.float64)
    """

    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "components": ScalarInfo("Number of components of the Gaussian mixture over the latents."),
        "margins": ScalarInfo("Number of pairs of components with a valley of density between them."),
        "margin_width": ScalarInfo("Mean width of the valleys between components.", optional=True),
        "margin_depth": ScalarInfo(
            "Mean depth of the valleys between components, in log density.", unit="nats", optional=True
        ),
        "overlap": less_is_better("Expected fraction of latents whose component is guessed wrongly."),
        "grey_share": less_is_better("Fraction of the latents that lie where components overlap."),
        "spread": ScalarInfo("Standard deviation of the latents over all dimensions, 0 where all latents are equal."),
        "invalid": less_is_better("Fraction of the latents that contain nan or inf and are left out."),
        "class_entropy": less_is_better(
            "Mean entropy of the classes of the latents within a component.", unit="nats", optional=True
        ),
        "decoded_entropy": less_is_better(
            "Mean entropy of the classes that a component decodes to.", unit="nats", optional=True
        ),
        "fid_prior": less_is_better("Fréchet distance of images decoded from the prior to real images.", optional=True),
        "fid_cluster": less_is_better(
            "Fréchet distance of images decoded from inside clusters to real images.", optional=True
        ),
        "fid_margin": less_is_better(
            "Fréchet distance of images decoded from the valleys between clusters to real images.", optional=True
        ),
        "fid_grey": less_is_better(
            "Fréchet distance of images decoded from where components overlap to real images.", optional=True
        ),
        "inception_score_prior": more_is_better(
            "Inception score of images decoded from the prior, by the classifier in use.", optional=True
        ),
        "inception_score_cluster": more_is_better(
            "Inception score of images decoded from inside clusters, by the classifier in use.", optional=True
        ),
        "inception_score_margin": more_is_better(
            "Inception score of images decoded from the valleys between clusters, by the classifier in use.",
            optional=True,
        ),
        "inception_score_grey": more_is_better(
            "Inception score of images decoded from where components overlap, by the classifier in use.", optional=True
        ),
        "gap_margin": less_is_better(
            "Fréchet distance at the valleys over that of the prior, above 1 where features are lost at the valleys.",
            optional=True,
        ),
        "gap_grey": less_is_better(
            "Fréchet distance where components overlap over that of the prior, above 1 where features are lost there.",
            optional=True,
        ),
    }

    def __init__(
        self,
        components: int | None = None,
        *,
        max_components: int = 12,
        max_rows: int | None = 5000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, **kwargs)
        for name, value in (("components", components), ("max_components", max_components)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. To fix this, pass a positive number.")
        self.components, self.max_components = components, max_components
        self.add_configuration(components=components, max_components=max_components)

    def update(self, latents: Tensor, labels: Tensor | None = None) -> None:
        """Adds latents.

        Args:
            latents: (N, D) floats.
            labels: (N,) integers, negative where a class is unknown; None where all are unknown.

        Raises:
            ValueError: if shapes or types do not match.
        """
        check(latents, labels)
        unknown = torch.full((len(latents),), -1, device=latents.device)
        self.append(latents, unknown if labels is None else labels)

    def compute(self) -> LatentRegionsResult:
        """Computes the regions of the selected latents; nan or empty where there are none."""
        result = latent_regions(
            *self.selected(), components=self.components, max_components=self.max_components, seed=self.seed
        )
        return LatentRegionsResult(*(part.to(self.device) for part in result))
