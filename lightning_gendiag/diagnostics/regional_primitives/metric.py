"""Feature components of regions, averaged over images and processes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.regional_primitives.functional import (
    MAX_REGIONS,
    RegionalPrimitivesResult,
)
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better


class RegionalPrimitives(Diagnostic):
    """Means over images of the results of :func:`decompose`, over batches and processes.

    Memory: sums of (2^n, n) float64 numbers, which do not grow with the number of images.

    Args:
        num_regions: n.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if ``num_regions`` is out of its range.

    Example:
        >>> import torch
        >>> from lightning_gendiag import decompose, minimal_features
        >>> regions, tail = torch.tensor([[0, 1]]), lambda u: u[:, None, None]  # each number draws a pixel
        >>> feature, baseline = torch.tensor([2.0, 1.0]), torch.zeros(2)
        >>> minimal = minimal_features(tail, feature, baseline, regions, penalty=1e-6)
        >>> metric = RegionalPrimitives(2)
        >>> metric.update(*decompose(tail, feature, regions, minimal))
        >>> [round(norm, 3) for norm in metric.compute().norms.tolist()]  # no region, the first, the second, both
        [0.0, 0.894, 0.447, 0.0]
    """

    plotted = ("strength_", "leakage_")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "components": less_is_better("Number of feature components that carry nine tenths of all squared norms."),
        "sparsity": less_is_better("Fraction of all feature components that carry nine tenths of all squared norms."),
        "leakage": less_is_better(
            "Fraction of the effect of a region's components that lies outside their regions, mean over regions."
        ),
        "relevant": less_is_better(
            "Squared error of a region drawn by its own components, over its change from the mean feature."
        ),
        "irrelevant": less_is_better(
            "Squared change of a region by all other components, over its change from the mean feature."
        ),
        "error_after_tenth": less_is_better(
            "Squared error of the image drawn by the largest tenth of the components, 1 with none."
        ),
        "converged": more_is_better("Fraction of the optimisations that converged."),
        "images": ScalarInfo("Number of images that were decomposed."),
        "invalid": less_is_better("Fraction of the images that contain nan or inf and are left out."),
        "strength_{r}": ScalarInfo(
            "Strength of the components that draw the region: the root of the sum of their squared norms."
        ),
        "leakage_{r}": less_is_better(
            "Fraction of the effect of the region's components that lies outside their regions."
        ),
    }
    images: Tensor
    left_out: Tensor

    def __init__(self, num_regions: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= num_regions <= MAX_REGIONS:
            raise ValueError(
                f"num_regions must be 1 to {MAX_REGIONS}, got {num_regions}. To fix this, merge regions or leave some out."
            )
        self.num_regions = num_regions
        sets = 2**num_regions
        self.shapes = {"norms": (sets,), "effects": (sets, num_regions), "curve": (sets,), "relevant": (num_regions,),
                       "irrelevant": (num_regions,), "converged": ()}  # fmt: skip
        self.add_sums(**self.shapes, images=(), left_out=())
        self.add_configuration(num_regions=num_regions)

    def update(
        self, norms: Tensor, effects: Tensor, curve: Tensor, relevant: Tensor, irrelevant: Tensor, converged: Tensor
    ) -> None:
        """Adds one image, as ``metric.update(*decompose(...))``. An image with nan or inf is left out.

        Args:
            norms: (2^n,), see :class:`Decomposition`.
            effects: (2^n, n), see :class:`Decomposition`.
            curve: (2^n,), see :class:`Decomposition`.
            relevant: (n,), see :class:`Decomposition`.
            irrelevant: (n,), see :class:`Decomposition`.
            converged: (), see :class:`Decomposition`.

        Raises:
            ValueError: if an argument has another shape.
        """
        given = dict(zip(self.shapes, (norms, effects, curve, relevant, irrelevant, converged), strict=True))
        for name, shape in self.shapes.items():
            if given[name].shape != shape:
                raise ValueError(
                    f"{name} must be {tuple(shape)} for {self.num_regions} regions, got {tuple(given[name].shape)}. "
                    "To fix this, pass the result of decompose on the same regions: metric.update(*decompose(...))."
                )
        finite = torch.stack([value.isfinite().all() for value in given.values()]).all()
        added = {name: value.detach().double().where(finite, 0.0) for name, value in given.items()}
        self.accumulate(images=finite, left_out=~finite, **added)

    def compute(self) -> RegionalPrimitivesResult:
        """Computes the means over all images; nan where there are none."""
        means = {name: getattr(self, name) / self.images for name in self.shapes}
        seen = self.images + self.left_out
        return RegionalPrimitivesResult(**means, images=self.images, invalid=self.left_out / seen.clamp(min=1))
