"""Cosine mean similarity by region and by class, and its real-against-real null, from blocks of kernel matrices."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.functional.arrays import as_images, exact_matmul, in_classes, pieces
from lightning_gendiag.functional.distances import squared_distances
from lightning_gendiag.functional.results import MAX_CLASS_TAGS, loggable
from lightning_gendiag.regions.pixel_cka import median_bandwidth
from lightning_gendiag.regions.region_map import RegionMap

Bandwidth = Literal["region", "image"] | float

BLOCK = 512
"""Rows and columns of a kernel matrix that are held at a time; a megabyte in float32, which stays in the cache."""

PIECE = 64
"""Images that are converted at a time."""

NUMBERS = 1 << 22
"""Numbers of which a variance is computed at a time."""

VALUES = 1 << 16
"""Number of real values that stand for all of them where ranges are compared."""

SLACK = 0.05
"""Real values are out of reach of the generated ones beyond this share of their own range."""


@loggable
class CosineMeanSimilarityResult(NamedTuple):
    """Cosine mean similarities of the image, its regions and its classes.

    Cosines have no unit. They range from 0 to 1, where 1 means that the mean embeddings of generated and real images
    coincide; unbiased ones may exceed 1 slightly. They are nan where a side has no image, or where it has a single one
    under unbiased norms.
    """

    image: Tensor
    """() cosine of the whole image."""
    regions: Tensor
    """(R,) cosine of each region."""
    null_mean: Tensor
    """(R + 1,) mean cosine of real images against real ones, for the regions and last for the image; nan without a null."""
    null_std: Tensor
    """(R + 1,) standard deviation of the same at the sizes compared here; nan without a null."""
    classes: Tensor
    """(K, R + 1) cosines within each class, for the regions and last for the image; (0, R + 1) without classes."""
    invalid: Tensor
    """() fraction of the generated images that contain nan or inf and are left out, 0 to 1."""
    spread: Tensor
    """() variance of the generated images, summed over their values, relative to that of the real ones."""
    unreached: Tensor
    """() fraction of the real values that lie outside the range of the generated ones by more than 5 % of their own."""
    unchanged: Tensor
    """() whether the generated images are those of the evaluation before, 0 or 1; nan where that is not known."""
    never_valid: Tensor
    """() whether generated images have had nan or inf at all evaluations though the weights are finite, 0 or 1; nan where that
    is not known."""

    @property
    def product(self) -> Tensor:
        """() product over the regions, which equals ``image`` where regions are independent (Theorem 1)."""
        return self.regions.prod()

    @property
    def residual(self) -> Tensor:
        """() ``log image - sum of log regions``, 0 where regions are independent."""
        return self.image.log() - self.regions.log().sum()

    @property
    def z(self) -> Tensor:
        """(R,) distance of each region from the null in its standard deviations; about 0 where both sides agree."""
        return (self.regions - self.null_mean[:-1]) / self.null_std[:-1]

    @property
    def image_z(self) -> Tensor:
        """() distance of the image from the null in its standard deviations."""
        return (self.image - self.null_mean[-1]) / self.null_std[-1]

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of the image, of the regions and, with classes, of the classes, each of shape ()."""
        values = {
            "image": self.image,
            "product": self.product,
            "residual": self.residual,
            "worst": self.regions.min(),
            "median": self.regions.median(),
            "best": self.regions.max(),
            "invalid": self.invalid,
            "spread": self.spread,
            "unreached": self.unreached,
        }
        values |= {f"region_{r}": value for r, value in enumerate(self.regions)}
        if not self.null_std.isnan().any():
            values |= {"z_image": self.image_z, "z_worst": self.z.min()}
        if len(self.classes):
            whole = self.classes[:, -1]
            known = whole[~whole.isnan()]
            values["worst_class"] = known.min() if len(known) else whole[0]
            values |= {f"class_{k}": value for k, value in enumerate(whole) if len(whole) <= MAX_CLASS_TAGS}
        return values


class _Scale(NamedTuple):
    """Sorts the values of images by region, subtracts the real mean and multiplies by the root of the bandwidth."""

    order: Tensor  # (D,) positions of the values of an image, region by region
    sizes: list[int]  # (R,) number of values D_r in each region
    centre: Tensor  # (D,) real mean, in this order
    weight: Tensor  # (D,) roots of the bandwidths, in this order

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Returns R tensors (N, D_r) whose squared distances are the exponents of the regions' kernels."""
        rows = self.centre.new_empty(len(images), len(self.order))
        for start in range(0, len(images), PIECE):
            piece = as_images(images[start : start + PIECE]).to(self.centre).flatten(1)
            rows[start : start + PIECE] = (piece.index_select(1, self.order) - self.centre) * self.weight
        return list(torch.split(rows, self.sizes, 1))


def _scale(real: Tensor, regions: RegionMap, bandwidth: Bandwidth) -> tuple[_Scale, list[Tensor]]:
    """Returns the scale with bandwidths from the real images, and the real images scaled by it.

    The background and any other region that never varies get the bandwidth of the image, and an image that never varies
    gets 1 / D.
    """
    channels = real.shape[1]
    labels = regions.labels.to(real.device).flatten().repeat(channels)
    order = labels.argsort(stable=True)
    sizes = (channels * regions.sizes).tolist()
    total = torch.zeros(len(order), dtype=torch.float64, device=real.device)
    for piece in pieces(real, PIECE):
        total += as_images(piece).double().sum(0).flatten()
    dtype = as_images(real[:1]).dtype
    centre = (total / len(real)).to(dtype)[order]
    scale = _Scale(order, sizes, centre, torch.ones_like(centre))
    rows = scale(real)
    if not isinstance(bandwidth, str):
        gammas = [centre.new_tensor(float(bandwidth))] * len(sizes)
    else:
        gammas = [median_bandwidth(part) for part in rows] if bandwidth == "region" else [centre.new_tensor(math.inf)]
        if bandwidth == "region" and regions.background is not None:
            # it varies in a few images at most, whose differences are no scale
            gammas[regions.background] = centre.new_tensor(math.inf)
        if torch.stack(gammas).isinf().any():
            image = median_bandwidth(torch.cat(rows, 1))
            image = torch.where(image.isfinite(), image, 1 / len(order))
            gammas = [torch.where(gamma.isinf(), image, gamma) for gamma in gammas] * (len(sizes) // len(gammas))
    weight = torch.cat([gamma.sqrt().expand(size) for gamma, size in zip(gammas, sizes, strict=True)])
    for part, gamma in zip(rows, gammas, strict=True):
        part *= gamma.sqrt()
    return scale._replace(weight=weight), rows


def _kernels_times(x: list[Tensor], y: list[Tensor], weights: Tensor) -> Tensor:
    """Multiplies the kernel matrix of each region, and last that of the image, by weights.

    The kernel of the image is the product of the kernels of the regions.

    Args:
        x: R tensors (M, D_r).
        y: R tensors (N, D_r); pass ``x`` itself for a symmetric matrix, of which only half is computed.
        weights: (N, S) weights.

    Returns:
        (R + 1, M, S) products in float64.
    """
    m, n, regions = len(x[0]), len(y[0]), len(x)
    total = torch.zeros(regions + 1, m, weights.shape[1], dtype=torch.float64, device=weights.device)
    for i in range(0, m, BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(i if x is y else 0, n, BLOCK):
            columns = slice(j, j + BLOCK)
            exponent = x[0].new_zeros(())
            for r in range(regions + 1):
                if r < regions:
                    distances = squared_distances(x[r][rows], y[r][columns])
                    exponent = exponent + distances
                else:
                    distances = exponent
                kernel = distances.neg_().exp_()
                total[r, rows] += kernel @ weights[columns]  # (B, B) @ (B, S) -> (B, S)
                if x is y and i != j:
                    total[r, columns] += kernel.T @ weights[rows]
    return total


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor, m: Tensor, n: Tensor, unbiased: bool) -> Tensor:
    """Returns cosines (..., S) from kernel sums over all pairs (..., S) and numbers of images (S,)."""

    def norm(own: Tensor, size: Tensor) -> Tensor:
        if not unbiased:
            return own / size.square()
        # the diagonal of an RBF kernel is one; between images that have nothing in common only rounding is left
        return ((own - size) / (size * (size - 1))).clamp(min=1 / size.square()).where(size > 1, math.nan)

    return xy / (m * n) / (norm(xx, m) * norm(yy, n)).sqrt()


class RealSide(NamedTuple):
    """Everything that depends on the real images alone."""

    scale: _Scale
    rows: list[Tensor]  # R of (N, D_r), scaled images
    weights: Tensor  # (N, 1 + K) membership in all images, then in each class
    sums: Tensor  # (R + 1, 1 + K) kernel sums over the pairs of each column
    null_mean: Tensor  # (R + 1,) mean cosine of halves
    null_std: Tensor  # (R + 1,) standard deviation of the same
    unbiased: bool  # whether the norms leave out the similarity of an image with itself
    variance: Tensor  # () summed over the values of an image
    values: Tensor  # (V,) a seeded selection of the values of all images, sorted


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
    """Computes bandwidths, kernel sums and the null of real images.

    Args:
        real: (N, C, H, W) images.
        labels: (N,) classes 0..K-1, required where ``num_classes`` is positive.
        num_classes: K, or 0.
        regions: map of the regions.
        bandwidth: see :func:`cosine_mean_similarity`.
        unbiased: see :func:`cosine_mean_similarity`.
        null_splits: see :func:`cosine_mean_similarity`.
        seed: see :func:`cosine_mean_similarity`.

    Returns:
        The real side, which :func:`compare` takes.
    """
    with exact_matmul():
        scale, rows = _scale(real, regions, bandwidth)
        weights = in_classes(rows[0], labels, num_classes)
        generator = torch.Generator().manual_seed(seed)
        half = len(real) // 2
        splits = [torch.randperm(len(real), generator=generator) < half for _ in range(null_splits)]
        a = torch.stack(splits, 1).to(weights) if splits else weights[:, :0]
        applied = _kernels_times(rows, rows, torch.cat([weights, a], 1))
    classes = weights.shape[1]
    sums = (applied[..., :classes] * weights).sum(1)
    chosen = torch.randint(real.numel(), (min(VALUES, real.numel()),), generator=generator).to(real.device)
    values = as_images(real.flatten()[chosen].view(1, 1, 1, -1)).float().flatten().sort().values
    variance = total_variance(real)
    if null_splits < 2 or half < 2:
        nan = torch.full_like(sums[:, 0], math.nan)
        return RealSide(scale, rows, weights, sums, nan, nan, unbiased, variance, values)
    # of halves a and b = 1 - a: a'Kb = a'K1 - a'Ka and b'Kb = 1'K1 - 2 a'K1 + a'Ka
    aa, a1, whole = (applied[..., classes:] * a).sum(1), (applied[..., :1] * a).sum(1), sums[:, :1]
    m, n = (torch.full((1,), float(size)).to(sums) for size in (half, len(real) - half))
    null = _cosine(a1 - aa, aa, whole - 2 * a1 + aa, m, n, unbiased)
    std = null.std(1)
    if regions.background is not None:
        # real images hardly differ there, so anything else would be thousands of deviations away
        std[regions.background] = std[regions.background].maximum(std[-1])
    return RealSide(scale, rows, weights, sums, null.mean(1), std, unbiased, variance, values)


def total_variance(images: Tensor) -> Tensor:
    """Returns the variance of images (N, C, H, W) over the images, summed over their values, of shape ()."""
    rows = max(1, NUMBERS // max(1, images[:, :, :1].numel()))
    # slices of rows bound the memory
    parts = [
        as_images(part).float().var(0, correction=0).sum(dtype=torch.float64) for part in torch.split(images, rows, 2)
    ]
    return torch.stack(parts).sum()


def unreached_by(values: Tensor, images: Tensor) -> Tensor:
    """Returns the fraction () of sorted values (V,) that lie outside the range of images by more than ``SLACK``."""
    bounds = torch.stack([torch.stack(as_images(piece).float().aminmax()) for piece in pieces(images, PIECE)])
    slack = SLACK * (values[-1] - values[0])
    within = torch.stack([bounds[:, 0].min() - slack, bounds[:, 1].max() + slack])
    # values equal to a bound lie within
    below, above = torch.searchsorted(values, within[0]), torch.searchsorted(values, within[1], right=True)
    return (len(values) - above + below).float() / len(values)


def compare(generated: Tensor, labels: Tensor | None, real: RealSide, invalid: Tensor) -> CosineMeanSimilarityResult:
    """Computes the cosines of generated images with a real side.

    Args:
        generated: (M, C, H, W) images.
        labels: (M,) classes 0..K-1, required where the real side has classes.
        real: what :func:`real_side` returns.
        invalid: () fraction of generated images that were left out, passed on to the result.

    Returns:
        The result.
    """
    with exact_matmul():
        rows = real.scale(generated)
        weights = in_classes(rows[0], labels, real.weights.shape[1] - 1)
        xy = (_kernels_times(rows, real.rows, real.weights) * weights).sum(1)
        xx = (_kernels_times(rows, rows, weights) * weights).sum(1)
    m, n = weights.double().sum(0), real.weights.double().sum(0)
    values = _cosine(xy, xx, real.sums, m, n, real.unbiased).to(real.scale.centre.dtype)
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
        spread=(total_variance(generated) / real.variance).to(values),
        unreached=unreached_by(real.values, generated).to(values),
        unchanged=torch.full_like(invalid, math.nan),
        never_valid=torch.full_like(invalid, math.nan),
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
    """Computes the cosine of the mean embeddings of generated and real images, for each region and for the image.

    The cosine is ``mean k(X, Y) / sqrt(mean k(X, X) mean k(Y, Y))`` over all pairs of images, with an RBF kernel k for
    each region and the product of these kernels for the image. It is exact and computed by blocks of matrix products:
    memory grows with the number of images and not with the number of pairs.

    Source: arXiv 2409.01314, Theorem 1. The authors use ``bandwidth="image", unbiased=False``.

    Args:
        generated: (M, C, H, W) images.
        real: (N, C, H, W) images in the same range of values.
        regions: (H, W) integers 0..R-1, or a map.
        bandwidth: factor g in ``exp(-g |x - y|^2)``. ``"region"`` takes ``1 / median |x - y|^2`` over the real pairs within
            each region, which makes a fault in a single region stand out; ``"image"`` takes one g from whole images, as in
            the paper; a number is g itself, in 1 / squared pixel values.
        unbiased: whether to leave the similarity of an image with itself out of the norms.
        null_splits: number of seeded splits of the real images into halves, from which the real-against-real null is
            estimated; 0 for no null.
        seed: seed of these splits.

    Returns:
        The cosines, 0 to 1; unbiased ones may exceed 1 slightly.

    Raises:
        ValueError: if shapes do not match, an image is not finite, or ``bandwidth`` is invalid.

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
    return compare(generated, None, side, torch.zeros((), device=real.device))


def check_bandwidth(bandwidth: Bandwidth) -> None:
    """Checks a bandwidth.

    Raises:
        ValueError: if it is neither ``"region"``, ``"image"`` nor a positive number.
    """
    good = bandwidth in ("region", "image") if isinstance(bandwidth, str) else 0 < bandwidth < math.inf
    if not good:
        raise ValueError(
            f"bandwidth must be 'region', 'image' or a positive number, got {bandwidth!r}. "
            "To fix this, keep 'region', or pass g of exp(-g |x - y|^2)."
        )


def check_shape(images: Tensor, name: str, regions: RegionMap, channels: int | None) -> None:
    """Checks that images (N, C, H, W) fit a map.

    Args:
        images: the images.
        name: what an error calls them.
        regions: the map.
        channels: C, or None where any number of channels is valid.

    Raises:
        ValueError: if H or W is not that of the map, or C is another number.
    """
    expected = (channels or images.shape[1], regions.height, regions.width)
    if tuple(images.shape[1:]) != expected:
        c, h, w = expected
        raise ValueError(
            f"{name} must be (N, {c}, {h}, {w}) to match the region map and the other side, got {tuple(images.shape)}. "
            "To fix this, resize the images, or find regions on images of this size."
        )
