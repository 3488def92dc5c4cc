"""The cosines over batches and processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.diagnostics.cosine_mean_similarity.mathematics import (
    Bandwidth,
    CosineMeanSimilarityResult,
    RealSide,
    canonical_order,
    check_bandwidth,
    check_shape,
    compare,
    real_side,
)
from lightning_gendiag.functional import as_images
from lightning_gendiag.regions import RegionMap


class CosineMeanSimilarity(Diagnostic):
    """:func:`cosine_mean_similarity` over batches and processes.

    Memory: all images of both sides as they come (uint8 stays uint8), and once more in floating point; the real side's
    are kept with its sums and its null until its images change.

    Args:
        regions: (H, W) integers 0..R-1, a :class:`RegionMap`, or the path of a saved one.
        bandwidth: see :func:`cosine_mean_similarity`.
        unbiased: see :func:`cosine_mean_similarity`.
        num_classes: K, to compare within classes too; ``update`` then takes labels.
        null_splits: seeded splits of the real images in halves for the real-against-real null; 0 for none.
        reset_real_features: with False, ``reset`` keeps the real side.
        seed: of the splits.

    Raises:
        ValueError: in words, for regions or a bandwidth that are none; in ``update``, for images that do not match.

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
    real: list[Tensor]
    generated: list[Tensor]
    real_labels: list[Tensor]
    generated_labels: list[Tensor]
    invalid: Tensor

    def __init__(
        self,
        regions: Tensor | RegionMap | str,
        bandwidth: Bandwidth = "region",
        unbiased: bool = True,
        *,
        num_classes: int | None = None,
        null_splits: int = 64,
        reset_real_features: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_bandwidth(bandwidth)
        self.region_map = RegionMap.of(regions)
        self.bandwidth, self.unbiased = bandwidth, unbiased
        self.num_classes, self.null_splits, self.seed = num_classes or 0, null_splits, seed
        self.reset_real_features = reset_real_features
        for state in ("real", "generated", "real_labels", "generated_labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.add_state("invalid", default=torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self._real_side: tuple[Tensor, RealSide] | None = None

    def update(self, images: Tensor, real: bool, labels: Tensor | None = None) -> None:
        """Take images of one side.

        Args:
            images: (N, C, H, W), floating-point or uint8 (as 0..1). Generated ones with nan or inf are counted and left out.
            real: whether they are real.
            labels: (N,) integers 0..K-1, needed where ``num_classes`` was given.
        """
        name = "real" if real else "generated"
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            images = as_images(images, name)
        held = next(iter([*self.real, *self.generated]), None)
        check_shape(images, name, self.region_map, None if held is None else held.shape[1])
        if self.num_classes:
            if labels is None or labels.shape != images.shape[:1] or labels.is_floating_point():
                got = None if labels is None else (labels.dtype, tuple(labels.shape))
                raise ValueError(f"labels must be ({len(images)},) integers where num_classes is given, got {got}.")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"labels must be between 0 and {self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}."
                )
        finite = images.flatten(1).isfinite().all(1)
        if not finite.all():
            if real:
                raise ValueError(
                    f"real must be finite, got nan or inf in {int((~finite).sum())} of {len(images)} images."
                )
            images = images[finite]
            labels = None if labels is None else labels[finite]
        if not real:
            self.invalid += torch.stack([(~finite).sum(), torch.tensor(len(finite)).to(finite.device)]).to(self.invalid)
        getattr(self, name).append(images.detach())
        if self.num_classes:
            assert labels is not None
            getattr(self, f"{name}_labels").append(labels.detach().long())

    def compute(self) -> CosineMeanSimilarityResult:
        """The cosines over all images of both sides; nan where a side has none."""
        real, generated = self.rows("real"), self.rows("generated")
        if len(real) == 0 or len(generated) == 0:
            return self._nothing()
        labels = self.rows("generated_labels")
        # sums tell whether the images are those of last time
        known = real.flatten(1).sum(1)
        if self._real_side is None or not _same(self._real_side[0], known):
            # the null's halves must not depend on the order in which processes bring the images
            order = canonical_order(real)
            real_labels = self.rows("real_labels")[order] if self.num_classes else None
            side = real_side(
                real[order], real_labels, self.num_classes, self.region_map, self.bandwidth, self.unbiased,
                self.null_splits, self.seed,
            )  # fmt: skip
            self._real_side = (known, side)
        invalid = (self.invalid[0] / self.invalid[1]).float()
        return compare(generated, labels, self._real_side[1], self.unbiased, invalid)

    def _nothing(self) -> CosineMeanSimilarityResult:
        regions = torch.full((self.region_map.num_regions,), math.nan, device=self.device)
        both = torch.full((self.region_map.num_regions + 1,), math.nan, device=self.device)
        classes = both.expand(self.num_classes, -1)
        share = self.invalid[0] / self.invalid[1].clamp(min=1)
        return CosineMeanSimilarityResult(both[0], regions, both, both, classes, share.float())

    def reset(self) -> None:
        """Forget the generated images, and the real ones unless ``reset_real_features=False``."""
        kept = (list(self.real), list(self.real_labels))
        super().reset()
        if self.reset_real_features:
            self._real_side = None
        else:
            self.real, self.real_labels = kept


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
