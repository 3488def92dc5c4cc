"""The cosine of mean embeddings, its null and its cosines within classes; all by blocks of kernel matrices."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.functional import as_images, exact_matmul, pieces, squared_distances
from lightning_gendiag.regions import RegionMap, median_bandwidth

Bandwidth = Literal["region", "image"] | float

MAX_CLASS_TAGS = 20
"""Up to so many classes each has a scalar of its own."""

BLOCK = 2048
"""Rows and columns of a kernel matrix that are held at a time."""

PIECE = 64
"""Images that are converted at a time."""


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
        if len(self.classes):
            whole = self.classes[:, -1]
            known = whole[~whole.isnan()]
            values["worst_class"] = known.min() if len(known) else whole[0]
            # few tags: beyond some classes the worst must do
            values |= {f"class_{k}": value for k, value in enumerate(whole) if len(whole) <= MAX_CLASS_TAGS}
        return values


class _Scale(NamedTuple):
    """How images are prepared: their numbers sorted by region, less the real mean, times the root of the bandwidth."""

    order: Tensor  # (D,) of the numbers of an image, region by region
    sizes: list[int]  # (R,) D_r, how many belong to each
    centre: Tensor  # (D,) sorted
    weight: Tensor  # (D,) sorted

    def __call__(self, images: Tensor) -> list[Tensor]:
        """R tensors (N, D_r) whose squared distances are the exponents of the regions' kernels."""
        rows = self.centre.new_empty(len(images), len(self.order))
        for start in range(0, len(images), PIECE):
            piece = as_images(images[start : start + PIECE]).to(self.centre).flatten(1)
            rows[start : start + PIECE] = (piece.index_select(1, self.order) - self.centre) * self.weight
        return list(torch.split(rows, self.sizes, 1))


def _scale(real: Tensor, regions: RegionMap, bandwidth: Bandwidth) -> tuple[_Scale, list[Tensor]]:
    """Bandwidths from the real images, and these by them; a region that never varies takes the image's, an image 1 / D."""
    channels = real.shape[1]
    labels = regions.labels.to(real.device).flatten().repeat(channels)
    order = labels.argsort(stable=True)
    sizes = (channels * regions.sizes).tolist()
    total = sum(as_images(piece).double().sum(0).flatten() for piece in pieces(real, PIECE))
    assert isinstance(total, Tensor)
    dtype = as_images(real[:1]).dtype
    centre = (total / len(real)).to(dtype)[order]
    scale = _Scale(order, sizes, centre, torch.ones_like(centre))
    rows = scale(real)
    if not isinstance(bandwidth, str):
        gammas = [centre.new_tensor(float(bandwidth))] * len(sizes)
    else:
        gammas = [median_bandwidth(part) for part in rows] if bandwidth == "region" else [centre.new_tensor(math.inf)]
        if any(gamma.isinf() for gamma in gammas):
            image = median_bandwidth(torch.cat(rows, 1))
            image = image if image.isfinite() else torch.full_like(image, 1 / len(order))
            gammas = [image if gamma.isinf() else gamma for gamma in gammas] * (len(sizes) // len(gammas))
    weight = torch.cat([gamma.sqrt().expand(size) for gamma, size in zip(gammas, sizes, strict=True)])
    for part, gamma in zip(rows, gammas, strict=True):
        part *= gamma.sqrt()
    return scale._replace(weight=weight), rows


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

    def norm(own: Tensor, size: Tensor) -> Tensor:
        if not unbiased:
            return own / size.square()
        # the diagonal of an RBF kernel is one; images that have nothing in common leave no more than rounding
        return ((own - size) / (size * (size - 1))).clamp(min=1 / size.square()).where(size > 1, math.nan)

    return xy / (m * n) / (norm(xx, m) * norm(yy, n)).sqrt()


def canonical_order(images: Tensor) -> Tensor:
    """(N,) an order that depends on the images alone and not on how they came."""
    direction = torch.randn(images[0].numel(), generator=torch.Generator().manual_seed(0)).to(images.device)
    keys = [(as_images(piece).flatten(1) * direction).sum(1, dtype=torch.float64) for piece in pieces(images, PIECE)]
    return torch.cat(keys).argsort()


class RealSide(NamedTuple):
    """All that the real images alone decide."""

    scale: _Scale
    rows: list[Tensor]  # R of (N, D_r)
    weights: Tensor  # (N, 1 + K) all images, then each class
    sums: Tensor  # (R + 1, 1 + K) kernel sums over the pairs of each column
    null_mean: Tensor  # (R + 1,) of halves
    null_std: Tensor  # (R + 1,) of halves


def _columns(rows: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """(N, 1 + K) weights: all images, then those of each class."""
    columns = rows.new_ones(len(rows), 1)
    if not num_classes:
        return columns
    assert labels is not None
    return torch.cat([columns, F.one_hot(labels, num_classes).to(rows)], 1)


def real_side(
    real: Tensor,
    labels: Tensor | None,
    num_classes: int,
    regions: RegionMap,
    bandwidth: Bandwidth,
    unbiased: bool,
    null_splits: int,
    seed: int,
) -> RealSide:
    """Bandwidths, kernel sums and the null of real images (N, C, H, W); labels (N,) where there are classes."""
    with exact_matmul():
        scale, rows = _scale(real, regions, bandwidth)
        weights = _columns(rows[0], labels, num_classes)
        generator = torch.Generator().manual_seed(seed)
        half = len(real) // 2
        splits = [torch.randperm(len(real), generator=generator) < half for _ in range(null_splits)]
        a = torch.stack(splits, 1).to(weights) if splits else weights[:, :0]
        applied = _kernels_times(rows, rows, torch.cat([weights, a], 1))
    classes = weights.shape[1]
    sums = (applied[..., :classes] * weights).sum(1)
    if null_splits < 2 or half < 2:
        nan = torch.full_like(sums[:, 0], math.nan)
        return RealSide(scale, rows, weights, sums, nan, nan)
    # of halves a and b = 1 - a: a'Kb = a'K1 - a'Ka and b'Kb = 1'K1 - 2 a'K1 + a'Ka
    aa, a1, whole = (applied[..., classes:] * a).sum(1), (applied[..., :1] * a).sum(1), sums[:, :1]
    m, n = (torch.full((1,), float(size)).to(sums) for size in (half, len(real) - half))
    null = _cosine(a1 - aa, aa, whole - 2 * a1 + aa, m, n, unbiased)
    return RealSide(scale, rows, weights, sums, null.mean(1), null.std(1))


def compare(
    generated: Tensor, labels: Tensor | None, real: RealSide, unbiased: bool, invalid: Tensor
) -> CosineMeanSimilarityResult:
    """The cosines of generated images (M, C, H, W) with a real side."""
    with exact_matmul():
        rows = real.scale(generated)
        weights = _columns(rows[0], labels, real.weights.shape[1] - 1)
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
    check_bandwidth(bandwidth)
    generated, real = as_images(generated, "generated"), as_images(real, "real")
    for images, name in ((generated, "generated"), (real, "real")):
        check_shape(images, name, regions, real.shape[1])
        if not images.isfinite().all():
            raise ValueError(f"{name} must be finite, got nan or inf. To fix this, leave such images out.")
    side = real_side(real, None, 0, regions, bandwidth, unbiased, null_splits, seed)
    return compare(generated, None, side, unbiased, torch.zeros((), device=real.device))


def check_bandwidth(bandwidth: Bandwidth) -> None:
    """Refuse in words what is no bandwidth."""
    good = bandwidth in ("region", "image") if isinstance(bandwidth, str) else 0 < bandwidth < math.inf
    if not good:
        raise ValueError(
            f"bandwidth must be 'region', 'image' or a positive number, got {bandwidth!r}. "
            "To fix this, leave it at 'region', or give g of exp(-g |x - y|^2)."
        )


def check_shape(images: Tensor, name: str, regions: RegionMap, channels: int | None) -> None:
    """Refuse in words images that do not fit the map, or have another number of channels than is known."""
    expected = (channels or images.shape[1], regions.height, regions.width)
    if tuple(images.shape[1:]) != expected:
        c, h, w = expected
        raise ValueError(
            f"{name} must be (N, {c}, {h}, {w}) to match the region map and the other side, got {tuple(images.shape)}. "
            "To fix this, resize the images, or find regions on images of this size."
        )
