"""How close are generated images to real ones, region by region?

The cosine of the two mean embeddings in the space of an RBF kernel, per region of the image. Where regions are
independent the image's cosine is the product of the regions' (Theorem 1), so a fall of the whole divides among them.

Source: Gruber, Ziegler, Buettner, *Disentangling Mean Embeddings for Better Diagnostics of Image Generators*, 2024,
arXiv 2409.01314.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostic import Diagnostic
from lightning_gendiag.functional import as_images, exact_matmul, squared_distances
from lightning_gendiag.monitor import DiagnosticWarning, Monitor, Reading
from lightning_gendiag.regions import RegionMap, find_regions, median_bandwidth

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

Bandwidth = Literal["region", "image"] | float

BLOCK = 2048
"""Rows and columns of a kernel matrix that are held at a time."""


class CosineMeanSimilarityResult(NamedTuple):
    """Cosines without unit, 0 to 1 (unbiased ones may pass 1 slightly): 1 where the two mean embeddings coincide.

    nan where a side has no finite image, or a single one under unbiased norms.
    """

    image: Tensor
    """() the whole image's cosine."""
    regions: Tensor
    """(R,) each region's cosine."""
    null_mean: Tensor
    """(R + 1,) what real images score against real ones, the regions' and last the image's; nan if not asked for."""
    null_std: Tensor
    """(R + 1,) their standard deviation at the sizes compared here; nan if not asked for."""
    classes: Tensor
    """(K, R + 1) the same cosines within each class, regions and last the image; (0, R + 1) without labels."""
    invalid: Tensor
    """() share of the generated images left out for nan or inf, 0 to 1."""

    @property
    def product(self) -> Tensor:
        """() product over the regions; the image's cosine where they are independent (Theorem 1)."""
        return self.regions.prod()

    @property
    def residual(self) -> Tensor:
        """() ``log image - sum log regions``: 0 where regions are independent."""
        return self.image.log() - self.regions.log().sum()

    @property
    def z(self) -> Tensor:
        """(R,) each region in real-against-real standard deviations; about 0 where generated and real agree."""
        return (self.regions - self.null_mean[:-1]) / self.null_std[:-1]

    @property
    def image_z(self) -> Tensor:
        """() the image in real-against-real standard deviations."""
        return (self.image - self.null_mean[-1]) / self.null_std[-1]

    def scalars(self) -> dict[str, Tensor]:
        """Whole, worst, middle and best region, and each of them."""
        values = {
            "image": self.image,
            "product": self.product,
            "residual": self.residual,
            "worst": self.regions.min(),
            "median": self.regions.median(),
            "best": self.regions.max(),
            "invalid": self.invalid,
        }
        values |= {f"region_{r}": value for r, value in enumerate(self.regions)}
        if not self.null_std.isnan().any():
            values |= {"z_image": self.image_z, "z_worst": self.z.min()}
        return values


class _Scale(NamedTuple):
    """How images are prepared: less the real mean, each pixel times the root of its bandwidth."""

    labels: Tensor  # (H, W)
    gammas: Tensor  # (R,)
    centre: Tensor  # (1, C, H, W)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """R tensors (N, D_r) whose squared distances are the exponents of the regions' kernels."""
        x = images.to(self.centre) - self.centre
        return [x[:, :, self.labels == r].flatten(1) * gamma.sqrt() for r, gamma in enumerate(self.gammas)]


def _scale(real: Tensor, regions: RegionMap, bandwidth: Bandwidth) -> _Scale:
    """Bandwidths from the real images; a region that never varies takes the image's, an image that never varies 1 / D."""
    labels = regions.labels.to(real.device)
    centre = real.mean(0, keepdim=True)
    if not isinstance(bandwidth, str):
        return _Scale(labels, centre.new_full((regions.num_regions,), float(bandwidth)), centre)
    x = real - centre
    image = median_bandwidth(x.flatten(1))
    if image.isinf():
        image = torch.full_like(image, 1 / x[0].numel())
    gammas = [image] * regions.num_regions
    if bandwidth == "region":
        own = [median_bandwidth(x[:, :, labels == r].flatten(1)) for r in range(regions.num_regions)]
        gammas = [image if gamma.isinf() else gamma for gamma in own]
    return _Scale(labels, torch.stack(gammas), centre)


def _kernels_times(x: list[Tensor], y: list[Tensor], weights: Tensor) -> Tensor:
    """Each region's kernel matrix, and last the image's, which is their product, times weights.

    Args:
        x: R tensors (M, D_r).
        y: R tensors (N, D_r); the same object as ``x`` for a symmetric matrix, of which only half is computed.
        weights: (N, S)

    Returns:
        (R + 1, M, S) in float64.
    """
    m, n, regions = len(x[0]), len(y[0]), len(x)
    total = torch.zeros(regions + 1, m, weights.shape[1], dtype=torch.float64, device=weights.device)
    for i in range(0, m, BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(i if x is y else 0, n, BLOCK):
            columns = slice(j, j + BLOCK)
            exponent: Tensor | float = 0.0
            for r in range(regions + 1):
                if r < regions:
                    distances = squared_distances(x[r][rows], y[r][columns])
                    exponent = exponent + distances
                else:
                    assert isinstance(exponent, Tensor)
                    distances = exponent
                kernel = distances.neg_().exp_()
                total[r, rows] += kernel @ weights[columns]  # (B, B) @ (B, S) -> (B, S)
                if x is y and i != j:
                    total[r, columns] += kernel.T @ weights[rows]
    return total


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor, m: Tensor, n: Tensor, unbiased: bool) -> Tensor:
    """Cosines from kernel sums over all pairs (..., S) and numbers of images (S,)."""
    # the diagonal of an RBF kernel is one
    own_x = (xx - m) / (m * (m - 1)) if unbiased else xx / m.square()
    own_y = (yy - n) / (n * (n - 1)) if unbiased else yy / n.square()
    norms = own_x * own_y
    # few images in a wide kernel can leave an unbiased norm at or below zero
    return xy / (m * n) / norms.sqrt().where(norms > 0, math.nan)


def _order(images: Tensor) -> Tensor:
    """(N,) an order that depends on the images alone and not on how they came."""
    flat = images.flatten(1)
    direction = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat)
    return (flat * direction).sum(1, dtype=torch.float64).argsort()


class _Real(NamedTuple):
    """All that the real images alone decide."""

    scale: _Scale
    rows: list[Tensor]  # R of (N, D_r)
    weights: Tensor  # (N, 1 + K) all images, then each class
    sums: Tensor  # (R + 1, 1 + K) kernel sums over the pairs of each column
    null_mean: Tensor  # (R + 1,) of halves
    null_std: Tensor  # (R + 1,) of halves


def _columns(images: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """(N, 1 + K) weights: all images, then those of each class."""
    columns = torch.ones(len(images), 1).to(images)
    if not num_classes:
        return columns
    assert labels is not None
    return torch.cat([columns, F.one_hot(labels, num_classes).to(images)], 1)


def _real_side(
    real: Tensor,
    labels: Tensor | None,
    num_classes: int,
    regions: RegionMap,
    bandwidth: Bandwidth,
    unbiased: bool,
    null_splits: int,
    seed: int,
) -> _Real:
    with exact_matmul():
        scale = _scale(real, regions, bandwidth)
        rows = scale(real)
        weights = _columns(real, labels, num_classes)
        generator = torch.Generator().manual_seed(seed)
        half = len(real) // 2
        splits = [torch.randperm(len(real), generator=generator) < half for _ in range(null_splits)]
        a = torch.stack(splits, 1).to(weights) if splits else weights[:, :0]
        applied = _kernels_times(rows, rows, torch.cat([weights, a], 1))
    classes = weights.shape[1]
    sums = (applied[..., :classes] * weights).sum(1)
    if null_splits < 2 or half < 2:
        nan = torch.full_like(sums[:, 0], math.nan)
        return _Real(scale, rows, weights, sums, nan, nan)
    # of halves a and b = 1 - a: a'Kb = a'K1 - a'Ka and b'Kb = 1'K1 - 2 a'K1 + a'Ka
    aa, a1, whole = (applied[..., classes:] * a).sum(1), (applied[..., :1] * a).sum(1), sums[:, :1]
    m, n = (torch.full((1,), float(size)).to(sums) for size in (half, len(real) - half))
    null = _cosine(a1 - aa, aa, whole - 2 * a1 + aa, m, n, unbiased)
    return _Real(scale, rows, weights, sums, null.mean(1), null.std(1))


def _compare(
    generated: Tensor, labels: Tensor | None, real: _Real, unbiased: bool, invalid: Tensor
) -> CosineMeanSimilarityResult:
    with exact_matmul():
        rows = real.scale(generated)
        weights = _columns(generated.to(real.weights), labels, real.weights.shape[1] - 1)
        xy = (_kernels_times(rows, real.rows, real.weights) * weights).sum(1)
        xx = (_kernels_times(rows, rows, weights) * weights).sum(1)
    m, n = weights.double().sum(0), real.weights.double().sum(0)
    values = _cosine(xy, xx, real.sums, m, n, unbiased).to(real.scale.centre.dtype)
    # a cosine of equal distributions falls short of one by a quadratic form of the two means' errors, so its mean
    # and its spread both go with 1 / M + 1 / N, here against two halves of N
    half = len(real.weights) // 2
    ratio = (1 / m[0] + 1 / n[0]) / (1 / half + 1 / (n[0] - half)) if half else torch.nan
    return CosineMeanSimilarityResult(
        image=values[-1, 0],
        regions=values[:-1, 0],
        null_mean=(1 - (1 - real.null_mean) * ratio).to(values),
        null_std=(real.null_std * ratio).clamp(min=1e-6).to(values),
        classes=values[:, 1:].T,
        invalid=invalid,
    )


def cosine_mean_similarity(
    generated: Tensor,
    real: Tensor,
    regions: Tensor | RegionMap,
    bandwidth: Bandwidth = "region",
    unbiased: bool = True,
    *,
    null_splits: int = 0,
    seed: int = 0,
) -> CosineMeanSimilarityResult:
    """Cosine of the mean embeddings of generated and real images, for each region and for the image.

    ``mean k(X, Y) / sqrt(mean k(X, X) mean k(Y, Y))`` over all pairs, with an RBF kernel per region and their product
    for the image. Exact, by blocks of matrix products; memory grows with the images and not with the pairs.

    Source: arXiv 2409.01314, Theorem 1. The authors use ``bandwidth="image", unbiased=False``.

    Args:
        generated: (M, C, H, W)
        real: (N, C, H, W), in the same range of values.
        regions: (H, W) integers 0..R-1, or a map.
        bandwidth: ``"region"``: each region has ``g_r = 1 / median |x - y|^2`` over the region's real pairs, which makes
            a single region's faults stand out; ``"image"``: one g from whole images, as in the paper; or g itself, in
            1 / squared pixel values.
        unbiased: leave an image's similarity with itself out of the norms.
        null_splits: how many seeded splits of the real images in halves tell what real scores against real.
        seed: of these splits.

    Returns:
        The cosines, 0 to 1; unbiased ones may pass 1 slightly.

    Raises:
        ValueError: if shapes do not match, an image is not finite, or ``bandwidth`` is none.

    Example:
        >>> images = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> halves = torch.arange(4).repeat(4, 1) // 2  # left, right
        >>> broken = images[100:].clone()
        >>> broken[..., 2:] = 0  # the right half is black
        >>> cosine_mean_similarity(broken, images[:100], halves).regions
        tensor([1.0052, 0.2668])
    """
    regions = RegionMap.of(regions)
    _check_bandwidth(bandwidth)
    generated, real = as_images(generated, "generated"), as_images(real, "real")
    for images, name in ((generated, "generated"), (real, "real")):
        _check_shape(images, name, regions, real.shape[1])
        if not images.isfinite().all():
            raise ValueError(f"{name} must be finite, got nan or inf. To fix this, leave such images out.")
    side = _real_side(real, None, 0, regions, bandwidth, unbiased, null_splits, seed)
    return _compare(generated, None, side, unbiased, torch.zeros((), device=real.device))


def _check_bandwidth(bandwidth: Bandwidth) -> None:
    good = bandwidth in ("region", "image") if isinstance(bandwidth, str) else 0 < bandwidth < math.inf
    if not good:
        raise ValueError(
            f"bandwidth must be 'region', 'image' or a positive number, got {bandwidth!r}. "
            "To fix this, leave it at 'region', or give g of exp(-g |x - y|^2)."
        )


def _check_shape(images: Tensor, name: str, regions: RegionMap, channels: int | None) -> None:
    expected = (channels or images.shape[1], regions.height, regions.width)
    if tuple(images.shape[1:]) != expected:
        c, h, w = expected
        raise ValueError(
            f"{name} must be (N, {c}, {h}, {w}) to match the region map and the other side, got {tuple(images.shape)}. "
            "To fix this, resize the images, or find regions on images of this size."
        )


class CosineMeanSimilarity(Diagnostic):
    """:func:`cosine_mean_similarity` over batches and processes.

    Memory: all images of both sides as they come (uint8 stays uint8 until ``compute``); the real side's own sums and
    its null are computed once and kept until its images change.

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
        _check_bandwidth(bandwidth)
        self.region_map = RegionMap.of(regions)
        self.bandwidth, self.unbiased = bandwidth, unbiased
        self.num_classes, self.null_splits, self.seed = num_classes or 0, null_splits, seed
        self.reset_real_features = reset_real_features
        for state in ("real", "generated", "real_labels", "generated_labels"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.add_state("invalid", default=torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self._real_side: tuple[Any, _Real] | None = None

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
        _check_shape(images, name, self.region_map, None if held is None else held.shape[1])
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
        real, generated = as_images(real), as_images(generated)
        real_labels, labels = self.rows("real_labels"), self.rows("generated_labels")
        # the null's halves must not depend on the order in which processes bring the images
        order = _order(real)
        real = real[order]
        real_labels = real_labels[order] if self.num_classes else real_labels
        # a sum tells whether the images are those of last time
        key = (real.shape, real.dtype, real.device, float(real.double().sum()))
        if self._real_side is None or self._real_side[0] != key:
            side = _real_side(
                real, real_labels, self.num_classes, self.region_map, self.bandwidth, self.unbiased,
                self.null_splits, self.seed,
            )  # fmt: skip
            self._real_side = (key, side)
        invalid = (self.invalid[0] / self.invalid[1]).float()
        return _compare(generated, labels, self._real_side[1], self.unbiased, invalid)

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


class CosineMeanSimilarityMonitor(Monitor):
    """Follow :class:`CosineMeanSimilarity` of a generator's samples, region by region, while it trains.

    On TensorBoard: a curve for each region, one chart with all of them and one with the worst, middle and best
    (Custom Scalars), the region map, and a panel of the mean real and mean generated image beside the regions'
    distances from real in real-against-real standard deviations.

    Args:
        regions: (H, W) labels, a :class:`RegionMap` or a saved map's path; by default found in the reference images.
        num_regions: how many to find; None lets the data choose.
        bandwidth: see :func:`cosine_mean_similarity`.
        unbiased: see :func:`cosine_mean_similarity`.
        per_class: compare within classes too, where the probe is conditional and batches have labels.
        map_images: at most this many reference images are looked at to find regions.
        null_splits: seeded splits of the reference in halves for the real-against-real null.
        kwargs: as for :class:`Monitor`.
    """

    stem = "cms"
    needs = ("sample",)
    whole = "image"
    # changes of the distance from 1 by less than a seventh
    grain = 0.15
    question = "cosine mean similarity"
    max_class_scalars: ClassVar[int] = 20

    def __init__(
        self,
        regions: RegionMap | Tensor | str | None = None,
        num_regions: int | None = 5,
        bandwidth: Bandwidth = "region",
        unbiased: bool = True,
        *,
        per_class: bool = False,
        map_images: int = 1000,
        null_splits: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_bandwidth(bandwidth)
        if null_splits < 2:
            raise ValueError(f"null_splits must be at least 2, got {null_splits}.")
        self.region_map = None if regions is None else RegionMap.of(regions)
        self.num_regions, self.bandwidth, self.unbiased = num_regions, bandwidth, unbiased
        self.per_class, self.map_images, self.null_splits = per_class, map_images, null_splits
        self._map_drawn = False
        self._history: list[list[float]] = []

    def check(self, probe: Probe) -> None:
        """Two samples must have the size that the map, and the reference if it was given, have."""
        if self.per_class and not probe.conditional:
            raise ValueError(
                "per_class must go with a sampler that takes labels. "
                "To fix this, pass Probe(sample=lambda module, n, labels: ..., conditional=True)."
            )
        sampled = probe.try_out().images
        if self.region_map is not None:
            _check_shape(sampled, "generated", self.region_map, None)
        if probe.reference is not None:
            held = probe.reference.images
            if self.region_map is not None:
                _check_shape(held, "the reference", self.region_map, None)
            if held.shape[1:] != sampled.shape[1:]:
                raise ValueError(
                    f"generated must have the reference's shape {tuple(held.shape[1:])}, got {tuple(sampled.shape[1:])}. "
                    "To fix this, pass Probe(sample=...) or Probe(images=...) that bring both to one size."
                )

    def build(self, probe: Probe) -> CosineMeanSimilarity:
        """Find the regions once, for all ranks, and take in the reference."""
        assert probe.reference is not None
        if self.region_map is None:
            images = as_images(probe.reference.images[: self.map_images])
            state = self.broadcast(
                probe.trainer, lambda: find_regions(images.to(probe.module.device), self.num_regions).state_dict()
            )
            self.region_map = RegionMap.from_state_dict(state)
        labels = probe.reference.labels
        classes = int(labels.max()) + 1 if self.per_class and labels is not None else None
        metric = CosineMeanSimilarity(
            self.region_map, self.bandwidth, self.unbiased, num_classes=classes, null_splits=self.null_splits,
            reset_real_features=False,
        ).to(probe.module.device)  # fmt: skip
        real = probe.real_share()
        metric.update(real.images.to(probe.module.device), real=True, labels=_to(real.labels, probe.module.device))
        varies = as_images(probe.reference.images).flatten(2).amax(0) > as_images(probe.reference.images).flatten(
            2
        ).amin(0)
        still = [
            name for r, name in enumerate(self.region_map.names)
            if not varies[:, self.region_map.mask(r).flatten()].any()
        ]  # fmt: skip
        if still:
            warnings.warn(
                f"the reference images never vary in {', '.join(still)}: there any variation of the model counts",
                DiagnosticWarning,
                stacklevel=2,
            )
        return metric

    def feed(self, probe: Probe, step: int) -> None:
        """This rank's samples."""
        assert self.metric is not None
        drawn = probe.samples(step)
        self.metric.update(drawn.images, real=False, labels=drawn.labels)
        probe.check_range(drawn.images)
        finite = drawn.images[drawn.images.flatten(1).isfinite().all(1)]
        self._mean_generated = finite.mean(0) if len(finite) else torch.zeros_like(drawn.images[0])

    def readings(self, result: CosineMeanSimilarityResult) -> dict[str, Reading]:
        """Regions and image by their distance from 1, on a log scale that ends where real images differ."""
        assert self.region_map is not None
        values = [*result.regions.tolist(), float(result.image)]
        floors = [3 * std if std == std else 1e-3 for std in result.null_std.tolist()]
        readings = {
            where: Reading(value, math.log(max(1 - value, 0.0) + floor) if value == value else math.nan)
            for where, value, floor in zip([*self.region_map.names, "image"], values, floors, strict=True)
        }
        # a single sample with nan is news, and no fluctuation
        invalid = float(result.invalid)
        return readings | {"samples": Reading(invalid, 0.0 if invalid == 0 else math.nan)}

    def shares(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each region's part of the fall of the regions' product, which is the image's where they are independent."""
        assert self.region_map is not None
        falls = {
            name: math.log(max(before[name], 1e-12)) - math.log(max(after[name], 1e-12))
            for name in self.region_map.names
            if math.isfinite(before[name]) and math.isfinite(after[name])
        }
        total = sum(falls.values())
        return {name: fall / total for name, fall in falls.items()} if total > 0 else {}

    def kept(self) -> dict[str, Any]:
        """The map, which must not change under a run, and the curves of the panel."""
        regions = None if self.region_map is None else self.region_map.state_dict()
        return {"regions": regions, "history": [list(row) for row in self._history]}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`; a map that the user gives now wins."""
        if self.region_map is None and state["regions"] is not None:
            self.region_map = RegionMap.from_state_dict(state["regions"])
        if self.region_map is not None and all(len(row) == self.region_map.num_regions + 1 for row in state["history"]):
            self._history = [list(row) for row in state["history"]]

    # ---- pictures ----

    def draw(self, result: CosineMeanSimilarityResult, board: Board) -> None:
        """The map once, the panel each time."""
        assert self.region_map is not None
        names = [f"region_{r}" for r in range(self.region_map.num_regions)]
        board.chart("every region", "Multiline", names)
        board.chart("worst, middle and best region", "Margin", ["median", "worst", "best"])
        if not self._map_drawn:
            self._map_drawn = True
            board.picture("regions", self._map_panel())
            board.text("regions", self._map_table())
        self._history.append([float(board.step), *result.regions.tolist()])
        if len(self._history) > 400:
            # half as fine, and all of the run
            self._history = self._history[::2]
        board.picture("panel", self._panel(result, board))

    def _real(self) -> tuple[Tensor, float, float]:
        """Mean real image, and the values that are drawn black and white."""
        assert self.probe is not None
        assert self.probe.reference is not None
        images = as_images(self.probe.reference.images)
        return images.mean(0), float(images.min()), float(images.max())

    def _map_panel(self) -> Tensor:
        regions = self.region_map
        assert regions is not None
        labels = panels.enlarged_labels(regions.labels)
        colours = [panels.region_colour(r) for r in range(regions.num_regions)]
        grey = panels.enlarged(panels.as_rgb(*self._real()))
        rows = [
            panels.Row(
                colours[r],
                f"{r}  {name}: {int(regions.sizes[r]) / regions.labels.numel():.0%} of the image"
                + (f", CKA within {regions.alignment[r, r]:.2f}" if not regions.alignment[r, r].isnan() else ""),  # type: ignore[index]
            )
            for r, name in enumerate(regions.names)
        ]
        note = ""
        if not math.isnan(regions.dependence):
            note = f"mean CKA between regions {regions.dependence:.2f} (0 independent, 1 the same)"
        if not math.isnan(regions.stability):
            note += f"; maps of two halves of the images agree at {regions.stability:.2f} (1 the same, 0 by chance)"
        return panels.panel(
            f"{regions.num_regions} regions of the image",
            [
                panels.Tile("regions", panels.filled(labels, colours, [str(r) for r in range(regions.num_regions)])),
                panels.Tile("over the mean real image", panels.tinted(grey, labels, colours)),
            ],
            rows,
            note,
        )

    def _map_table(self) -> str:
        regions = self.region_map
        assert regions is not None
        lines = [
            f"**{regions}**",
            "",
            "| scalar | region | pixels | box (top, left, bottom, right) |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| region_{r} | {name} | {int(regions.sizes[r])} | {tuple(regions.boxes[r].tolist())} |"
            for r, name in enumerate(regions.names)
        ]
        return "\n".join(lines)

    def _panel(self, result: CosineMeanSimilarityResult, board: Board) -> Tensor:
        regions, z = self.region_map, result.z.tolist()
        assert regions is not None
        assert self.probe is not None
        labels = panels.enlarged_labels(regions.labels)
        real, low, high = self._real()
        far = [-value if value == value else math.inf for value in z]
        worst = max(range(len(far)), key=far.__getitem__)
        values = result.regions.tolist()
        weights = ", averaged weights" if self.probe.averaged else ""
        heats = [panels.heat(value) for value in far]
        steps = [int(row[0]) for row in self._history]
        history = list(zip(*(row[1:] for row in self._history), strict=True))
        return panels.panel(
            f"{regions.names[worst]} is furthest from real, at {values[worst]:.3f} (step {board.step}{weights})",
            [
                panels.Tile(
                    "mean real image", panels.outlined(panels.enlarged(panels.as_rgb(real, low, high)), labels)
                ),
                panels.Tile(
                    "mean generated image",
                    panels.outlined(panels.enlarged(panels.as_rgb(self._mean_generated, low, high)), labels, worst),
                ),
                panels.Tile("deviations below real", panels.filled(labels, heats, [f"{value:.0f}" for value in far])),
                panels.Tile("similarity, 1 = as real", panels.curves(history, steps, worst)),
            ],
            [
                panels.Row(
                    panels.ALARM if r == worst else panels.region_colour(r),
                    f"{name}: {values[r]:.3f}, {far[r]:.0f} deviations below real",
                    strong=r == worst,
                )
                for r, name in enumerate(regions.names)
            ],
            f"image {float(result.image):.3f}. A deviation is the spread among real images; dark red is 1000 of them.",
        )

    def draw_finding(self, where: str, words: str, board: Board) -> None:
        """The mean images with the region outlined."""
        regions = self.region_map
        assert regions is not None
        real, low, high = self._real()
        labels = panels.enlarged_labels(regions.labels)
        chosen = regions.names.index(where) if where in regions.names else None
        tiles = []
        for caption, image in (("mean real image", real), ("mean generated image", self._mean_generated)):
            picture = panels.enlarged(panels.as_rgb(image, low, high))
            if chosen is not None:
                dim = (picture.float() * 0.45 + 255 * 0.55).byte()
                picture = torch.where((labels == chosen)[..., None], picture, dim)
            tiles.append(panels.Tile(caption, panels.outlined(picture, labels, chosen)))
        board.picture("picture", panels.panel(f"{where} collapsed", tiles, note=words))


def _to(labels: Tensor | None, device: torch.device) -> Tensor | None:
    return None if labels is None else labels.to(device)
