"""Cosine mean similarity over batches and processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.cosine_mean_similarity.functional import (
    Bandwidth,
    CosineMeanSimilarityResult,
    RealSide,
    check_bandwidth,
    check_shape,
    compare,
    real_side,
)
from lightning_gendiag.functional.arrays import as_images, canonical_order
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better
from lightning_gendiag.regions.clustering import check_num_regions, find_regions
from lightning_gendiag.regions.region_map import RegionMap

MAP_IMAGES = 1000
"""Largest number of real images in which regions are found."""


class CosineMeanSimilarity(Diagnostic):
    """:func:`cosine_mean_similarity` over batches and processes.

    Either the regions are given, or their number, and the first ``compute`` that has images of both sides finds them in
    the real images by :func:`find_regions`. Regions that were found are kept until the real images are reset.

    Memory: all images of both sides in the type in which they come (uint8 stays uint8), and once more in floating point.
    The real images in floating point, their kernel sums and their null are kept until the real images change.

    Args:
        regions: (H, W) integers 0..R-1, a :class:`RegionMap`, or the path of a saved one.
        bandwidth: see :func:`cosine_mean_similarity`.
        unbiased: see :func:`cosine_mean_similarity`.
        num_regions: R, the number of regions to find in the real images, instead of ``regions``. At most 1,000 images are
            used, a seeded selection that is the same on every process.
        num_classes: K, to compare within classes too; ``update`` then requires labels.
        null_splits: number of seeded splits of the real images into halves for the real-against-real null; 0 for none.
        reset_real_features: whether ``reset`` drops the real images, and the regions found in them.
        seed: seed of the splits and of the images in which regions are found.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is invalid, or not exactly one of ``regions`` and ``num_regions`` is given.

    Example:
        >>> metric = CosineMeanSimilarity(torch.arange(4).repeat(4, 1) // 2)
        >>> generator = torch.Generator().manual_seed(0)
        >>> metric.update(torch.rand(256, 1, 4, 4, generator=generator), real=True)
        >>> metric.update(torch.rand(256, 1, 4, 4, generator=generator) ** 2, real=False)
        >>> metric.compute().image
        tensor(0.7445)
    """

    higher_is_better = True
    plotted = ("image", "product", "region_")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "region_{r}": more_is_better("Cosine of the mean embeddings of generated and real images in the region."),
        "worst": more_is_better("Lowest cosine of the regions."),
        "median": more_is_better("Median cosine of the regions."),
        "best": more_is_better("Highest cosine of the regions."),
        "image": more_is_better("Cosine of the mean embeddings of generated and real images over the whole image."),
        "product": more_is_better(
            "Product of the regions' cosines, which equals the image's cosine where regions are independent."
        ),
        "residual": ScalarInfo(
            "Logarithm of the image's cosine minus the sum of the regions' logarithms, 0 where regions are independent."
        ),
        "z_worst": more_is_better(
            "Lowest distance of a region's cosine from that of real images against real ones, 0 where both are alike.",
            unit="standard deviations",
            optional=True,
        ),
        "z_image": more_is_better(
            "Distance of the image's cosine from that of real images against real ones, 0 where both are alike.",
            unit="standard deviations",
            optional=True,
        ),
        "worst_class": more_is_better("Lowest cosine of the whole image within a class.", optional=True),
        "class_{c}": more_is_better("Cosine of the whole image within the class, for up to 20 classes.", optional=True),
        "invalid": less_is_better("Fraction of the generated images that contain nan or inf and are left out."),
        "spread": ScalarInfo(
            "Variance of the generated images relative to that of the real ones, about 1 where they vary as much."
        ),
        "unreached": less_is_better("Fraction of the real values that lie outside the range of the generated ones."),
    }
    real: list[Tensor]
    generated: list[Tensor]
    real_labels: list[Tensor]
    generated_labels: list[Tensor]
    invalid: Tensor
    region_map: RegionMap | None
    """The regions; None until they are found where ``num_regions`` was given."""

    def __init__(
        self,
        regions: Tensor | RegionMap | str | Path | None = None,
        bandwidth: Bandwidth = "region",
        unbiased: bool = True,
        *,
        num_regions: int | None = None,
        num_classes: int | None = None,
        null_splits: int = 64,
        reset_real_features: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_bandwidth(bandwidth)
        if regions is not None and num_regions is not None:
            raise ValueError(
                f"num_regions must be None where regions are given, got {num_regions}. "
                "To fix this, pass only one of regions and num_regions."
            )
        if regions is not None:
            self.region_map = RegionMap.of(regions)
            self.num_regions = self.region_map.num_regions
        elif num_regions is None:
            raise ValueError(
                "regions must be a map where num_regions is not given, got None. "
                "To fix this, pass (H, W) labels, or num_regions=5 to find five regions in the real images."
            )
        elif num_regions < 1:
            raise ValueError(
                f"num_regions must be at least 1, got {num_regions}. To fix this, pass the number of regions to find."
            )
        else:
            self.region_map, self.num_regions = None, num_regions
        self._finds_regions = regions is None
        self.bandwidth, self.unbiased = bandwidth, unbiased
        self.num_classes, self.null_splits, self.seed = num_classes or 0, null_splits, seed
        self.reset_real_features = reset_real_features
        for state in ("real", "generated", "real_labels", "generated_labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.add_sums(invalid=(2,))
        self.add_configuration(
            regions=None if self.region_map is None else self.region_map.labels,
            background=None if self.region_map is None else self.region_map.background, num_regions=num_regions,
            bandwidth=bandwidth, unbiased=unbiased, num_classes=self.num_classes, null_splits=null_splits,
            reset_real_features=reset_real_features, seed=seed,
        )  # fmt: skip
        self._real_side: tuple[Tensor, RealSide] | None = None

    def update(self, images: Tensor, real: bool, labels: Tensor | None = None) -> None:
        """Adds images of one side.

        Args:
            images: (N, C, H, W), floating-point or uint8, which stands for 0..1 in steps of 1 / 255. Generated images with
                nan or inf are counted and left out.
            real: whether the images are real.
            labels: (N,) integers 0..K-1, required where ``num_classes`` is given.

        Raises:
            ValueError: if images or labels have another shape or type than expected, or a real image is not finite.
        """
        name = "real" if real else "generated"
        if not isinstance(images, Tensor) or images.ndim != 4 or images.dtype != torch.uint8:
            images = as_images(images, name)
        self._check_images(images, name)
        if self.num_classes:
            labels = self._checked_labels(labels, len(images))
        finite = images.flatten(1).isfinite().all(1)
        if not finite.all():
            if real:
                raise ValueError(
                    f"real must be finite, got nan or inf in {int((~finite).sum())} of {len(images)} images. "
                    "To fix this, leave such images out."
                )
            images = images[finite]
            labels = None if labels is None else labels[finite]
        if not real:
            counts = torch.stack([(~finite).sum(), torch.tensor(len(finite)).to(finite.device)])
            self.accumulate(invalid=counts.to(self.invalid))
        getattr(self, name).append(images.detach())
        if self.num_classes and labels is not None:
            getattr(self, f"{name}_labels").append(labels)

    def _check_images(self, images: Tensor, name: str) -> None:
        """Checks the shape of images against the map and against the images that the metric has already."""
        held = next(iter([*self.real, *self.generated]), None)
        own = next(iter(self.real if name == "real" else self.generated), None)
        if self.region_map is not None:
            check_shape(images, name, self.region_map, None if held is None else held.shape[1])
        elif held is None:
            check_num_regions(self.num_regions, *images.shape[2:])
        elif images.shape[1:] != held.shape[1:]:
            c, h, w = held.shape[1:]
            raise ValueError(
                f"{name} must be (N, {c}, {h}, {w}) as the images before, got {tuple(images.shape)}. "
                "To fix this, resize the images, or call reset() before passing images of another size."
            )
        if own is not None and (own.dtype == torch.uint8) != (images.dtype == torch.uint8):
            expected = "uint8" if own.dtype == torch.uint8 else "floating-point"
            raise ValueError(
                f"{name} must be {expected} as before, got {images.dtype}. To fix this, convert all images in one way."
            )

    def _checked_labels(self, labels: Tensor | None, n: int) -> Tensor:
        """Returns labels (n,) as int64."""
        if labels is None or labels.shape != (n,) or labels.is_floating_point():
            got = None if labels is None else (labels.dtype, tuple(labels.shape))
            raise ValueError(
                f"labels must be ({n},) integers where num_classes is given, got {got}. "
                "To fix this, pass one class number per image."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be between 0 and {self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}. "
                "To fix this, pass a larger num_classes, or number the classes from 0."
            )
        return labels.detach().long()

    def compute(self) -> CosineMeanSimilarityResult:
        """Computes the cosines over all images of both sides.

        Returns:
            The cosines; nan where a side has no image, or where regions are to be found in fewer than two real images.
        """
        real, generated = self.rows("real"), self.rows("generated")
        if len(real) == 0 or len(generated) == 0:
            return self._undefined()
        # sums show whether the real images are those of the last time
        known = real.flatten(1).sum(1)
        if self._real_side is None or not _same(self._real_side[0], known):
            # neither the null nor the regions may depend on the order in which processes bring the images
            order = canonical_order(real)
            real = real[order]
            regions = self._regions_for(real)
            if regions is None:
                return self._undefined()
            real_labels = self.rows("real_labels")[order] if self.num_classes else None
            side = real_side(
                real, real_labels, self.num_classes, regions, self.bandwidth, self.unbiased, self.null_splits, self.seed
            )
            self._real_side = (known, side)
        invalid = (self.invalid[0] / self.invalid[1]).float()
        return compare(generated, self.rows("generated_labels"), self._real_side[1], invalid)

    def _regions_for(self, real: Tensor) -> RegionMap | None:
        """Returns the map, found in real images (N, C, H, W) in canonical order if need be; None for fewer than two."""
        if self.region_map is None and len(real) > 1:
            # shuffled, since images that are neighbours in canonical order vary less than others
            shuffled = torch.randperm(len(real), generator=torch.Generator().manual_seed(self.seed))
            images = real[shuffled[:MAP_IMAGES].to(real.device)]
            self.region_map = find_regions(images, self.num_regions, progress=False)
        return self.region_map

    def _undefined(self) -> CosineMeanSimilarityResult:
        nan = torch.full((self.num_regions + 1,), math.nan, device=self.device)
        invalid = (self.invalid[0] / self.invalid[1].clamp(min=1)).float()
        classes = nan.expand(self.num_classes, -1)
        return CosineMeanSimilarityResult(nan[0], nan[:-1], nan, nan, classes, invalid, *nan[:1].expand(4))

    def reset(self) -> None:
        """Drops the generated images, and the real ones and what was found in them unless ``reset_real_features=False``."""
        held = (list(self.real), list(self.real_labels))
        super().reset()
        if self.reset_real_features:
            self._real_side = None
            if self._finds_regions:
                self.region_map = None
        else:
            self.real, self.real_labels = held


def _same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are equal in values, type and device."""
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
