"""Which pixels of an image belong together: kernel alignment of pixels, clustered into regions.

Source: Gruber, Ziegler, Buettner, *Disentangling Mean Embeddings for Better Diagnostics of Image Generators*,
2024, arXiv 2409.01314.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.functional import adjusted_rand_index, as_images, exact_matmul, median, squared_distances

BANDWIDTH_IMAGES = 2048
"""Median distances are taken over at most this many images, spread evenly over those given."""


SERIES = 0.05
"""Largest exponent ``2 g x^2`` for which three terms of the kernel's series stand for it."""

ROWS = 512
"""Positions whose distances to the others are held at a time."""

REFINING = 4
"""Batches that pixels at the borders of regions are assigned by."""


@dataclass(frozen=True, eq=False)
class RegionMap:
    """A partition of an image's positions into regions, with what is known about it.

    Bring your own with ``RegionMap(labels)`` or ``RegionMap(labels, names=("face", "hair", "background"))``, or let
    :func:`find_regions` find one in the data.

    Args:
        labels: (H, W) integers 0..R-1, each number used.
        names: R names for people; by default from each region's place ("top left", "centre", "border").
        alignment: (R, R) mean CKA of pixels, within a region on the diagonal and between regions beside it; nan where
            unknown, and on the diagonal of a region of a single pixel.
        dependence: mean CKA over all pairs of pixels in different regions, 0 (independent) to 1; nan where unknown.
        stability: adjusted Rand index of the maps found on two halves of the images, 1 where they are the same;
            nan where unknown.

    Raises:
        ValueError: if labels are no (H, W) integers, leave a number out, or do not match the other arguments.

    Example:
        >>> print(RegionMap(torch.arange(4).repeat(4, 1) // 2))
        2 regions of 4x4: left 50%, right 50%
    """

    labels: Tensor
    names: tuple[str, ...] = ()
    alignment: Tensor | None = None
    dependence: float = math.nan
    stability: float = math.nan
    num_regions: int = field(init=False)

    def __post_init__(self) -> None:
        labels = torch.as_tensor(self.labels).detach().cpu()
        if labels.ndim != 2 or labels.numel() == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be an (H, W) tensor of integers 0..R-1, got {labels.dtype} of shape {tuple(labels.shape)}. "
                "To fix this, give each position the number of its region."
            )
        labels = labels.long()
        present = torch.unique(labels).tolist()
        if present != list(range(len(present))):
            raise ValueError(
                f"labels must use every number 0..R-1, got the numbers {present[:12]}. "
                "To fix this, renumber them: labels.unique(return_inverse=True)[1]."
            )
        names = tuple(self.names) or _names(labels, len(present))
        if len(names) != len(present):
            raise ValueError(f"names must hold one name for each of the {len(present)} regions, got {len(names)}.")
        alignment = torch.full((len(present), len(present)), math.nan) if self.alignment is None else self.alignment
        if tuple(alignment.shape) != (len(present), len(present)):
            raise ValueError(f"alignment must be ({len(present)}, {len(present)}), got {tuple(alignment.shape)}.")
        for name, value in {
            "labels": labels,
            "names": names,
            "alignment": alignment.detach().cpu(),
            "num_regions": len(present),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def height(self) -> int:
        """H, in pixels."""
        return self.labels.shape[0]

    @property
    def width(self) -> int:
        """W, in pixels."""
        return self.labels.shape[1]

    @cached_property
    def sizes(self) -> Tensor:
        """(R,) number of positions in each region."""
        return torch.bincount(self.labels.flatten(), minlength=self.num_regions)

    @cached_property
    def boxes(self) -> Tensor:
        """(R, 4) smallest box around each region: top, left, bottom, right; the last two are exclusive."""
        boxes = []
        for region in range(self.num_regions):
            rows, columns = (self.labels == region).nonzero(as_tuple=True)
            boxes.append([int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1])
        return torch.tensor(boxes)

    def mask(self, region: int) -> Tensor:
        """(H, W) bool, true inside the region."""
        return self.labels == region

    def overlap(self, region: int, mask: Tensor) -> float:
        """Intersection over union of a region with a mask (H, W), 0 to 1."""
        inside = self.mask(region)
        union = (inside | mask.bool().cpu()).sum()
        return float((inside & mask.bool().cpu()).sum() / union)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings, as ``torch.load(weights_only=True)`` takes them."""
        return {
            "labels": self.labels,
            "names": list(self.names),
            "alignment": self.alignment,
            "dependence": self.dependence,
            "stability": self.stability,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RegionMap:
        """The inverse of :meth:`state_dict`."""
        return cls(**{**state, "names": tuple(state["names"])})

    def save(self, path: str | Path) -> None:
        """Write the map to a file that :meth:`load` reads."""
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> RegionMap:
        """Read a map that :meth:`save` wrote."""
        return cls.from_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    @classmethod
    def of(cls, regions: RegionMap | Tensor | str | Path) -> RegionMap:
        """A map from a map, from (H, W) labels, or from the path of a saved map."""
        if isinstance(regions, RegionMap):
            return regions
        if isinstance(regions, (str, Path)):
            return cls.load(regions)
        return cls(regions)

    def __eq__(self, other: object) -> bool:
        """Same labels and same names."""
        if not isinstance(other, RegionMap):
            return NotImplemented
        return self.names == other.names and torch.equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((self.names, self.labels.numpy().tobytes()))

    def __str__(self) -> str:
        total = self.labels.numel()
        parts = ", ".join(
            f"{name} {size / total:.0%}" for name, size in zip(self.names, self.sizes.tolist(), strict=True)
        )
        known = [
            f"{word} {value:.2f}"
            for word, value in (("dependence", self.dependence), ("stability", self.stability))
            if not math.isnan(value)
        ]
        return f"{self.num_regions} regions of {self.height}x{self.width}: {parts}" + "".join(f"; {k}" for k in known)


def _names(labels: Tensor, num_regions: int) -> tuple[str, ...]:
    """Where a person would say that each region is."""
    height, width = labels.shape
    frame = torch.cat([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    names: list[str] = []
    for region in range(num_regions):
        mask = labels == region
        rows, columns = mask.nonzero(as_tuple=True)
        y, x = (float(rows.double().mean()) + 0.5) / height, (float(columns.double().mean()) + 0.5) / width
        vertical = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
        horizontal = "left" if x < 0.4 else "right" if x > 0.6 else ""
        name = f"{vertical} {horizontal}".strip() or "centre"
        if name == "centre" and num_regions > 1 and (frame == region).double().mean() > 0.5:
            inner = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
            name = "most of the image" if inner.double().mean() > 0.3 else "border"
        count = sum(known == name or known.startswith(f"{name} (") for known in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return tuple(names)


def median_bandwidth(x: Tensor) -> Tensor:
    """The RBF bandwidth ``g = 1 / median |x_i - x_j|^2`` over all pairs, a row with itself included.

    Where more than half of the pairs are equal the mean stands in for the median; where all rows are equal the result
    is inf.

    Args:
        x: (N, D), at most ``BANDWIDTH_IMAGES`` of its rows are looked at.

    Returns:
        ()
    """
    if len(x) > BANDWIDTH_IMAGES:
        x = x[torch.linspace(0, len(x) - 1, BANDWIDTH_IMAGES).round().long()]
    # not the mean: the smallest shift that keeps equal rows exactly equal
    x = x - x[:1]
    distances = squared_distances(x, x)
    # a matrix product leaves a trace of rounding where rows are equal
    noise = 8 * torch.finfo(x.dtype).eps * x.square().sum(1).max()
    typical = median(distances)
    if typical <= noise:
        typical = distances.mean()
    return torch.where(typical > noise, 1 / typical, math.inf)


def pixel_cka(
    images: Tensor,
    gamma: float | None = None,
    batch_size: int = 100,
    *,
    max_bytes: int = 1 << 30,
    progress: bool = True,
) -> Tensor:
    """Centred kernel alignment of every pair of pixels, 0 (independent) to 1 (the same up to the kernel).

    A pixel is the C-vector at one position, its kernel over a batch of n images is the RBF ``exp(-gamma |x - y|^2)``,
    and ``CKA_ij = <A K_i A, A K_j A> / (|A K_i A| |A K_j A|)`` with the centring matrix A. The result is the mean over
    all whole batches. No pair is looped over: centred kernel matrices, flattened and normalised, have all alignments
    in one matrix product. A pixel that does not vary in a batch is independent of all others there, itself included.

    Source: arXiv 2409.01314, section 3.

    Args:
        images: (N, C, H, W), on any device; the work is done there.
        gamma: the bandwidth; by default 1 / median squared distance between two whole images.
        batch_size: n. Images beyond the last whole batch are left out; fewer than n images make one batch.
        max_bytes: bound on the working memory beside the result.
        progress: show a bar where the work takes more than a few seconds.

    Returns:
        (P, P) with P = H * W, in row-major order of positions.

    Raises:
        ValueError: if fewer than two images are given, or one is not finite.

    Example:
        >>> images = torch.rand(100, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> images[:, :, :, 1] = 1 - images[:, :, :, 0]  # a pixel and its negative have the same kernel
        >>> pixel_cka(images).round(decimals=6)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """
    batches, gamma = _batches(images, gamma, batch_size)
    total: Tensor | None = None
    for batch in _progress(batches, "pixel CKA", progress):
        total = _batch_cka(batch, gamma, max_bytes, total)
    assert total is not None
    return _mirror(total).div_(len(batches))


def find_regions(
    images: Tensor,
    num_regions: int | None = 5,
    gamma: float | None = None,
    *,
    batch_size: int = 100,
    linkage: str = "average",
    max_pixels: int = 4096,
    max_bytes: int = 1 << 30,
    progress: bool = True,
) -> RegionMap:
    """Find regions of pixels that depend on each other and little on the rest.

    Euclidean distances between the rows of :func:`pixel_cka`, agglomerative clustering, cut at ``num_regions``. Regions
    are numbered by size, the largest first. Where an image has more than ``max_pixels`` positions, square cells of
    pixels take the place of pixels: a cell is a longer vector under the same kernel, so all else holds. Each pixel of
    a cell at a border then goes to that region, out of those that meet there, whose cells are aligned with the regions
    as it is.

    Source: arXiv 2409.01314, section 3. The authors use average linkage, 5 regions for CelebA, 5 or 6 for ChestMNIST.

    Args:
        images: (N, C, H, W), at least two; 400 or more make a steadier map.
        num_regions: R. With None the data choose: the tree is cut at half of its largest merging distance.
        gamma: bandwidth, see :func:`pixel_cka`.
        batch_size: images to a batch, see :func:`pixel_cka`.
        linkage: any method of ``scipy.cluster.hierarchy.linkage``.
        max_pixels: largest number of positions or cells that are clustered.
        max_bytes: bound on the working memory of the alignment beside its (P, P) result.
        progress: show a bar where the work takes more than a few seconds.

    Returns:
        The map, with ``dependence`` and, from two halves of the batches, ``stability``.

    Raises:
        ValueError: if there are fewer than two images, one is not finite, or fewer positions than regions.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> halves = torch.arange(8).repeat(8, 1) // 4  # left, right
        >>> common = torch.randn(200, 1, 2, generator=generator)[:, :, halves]
        >>> print(find_regions(common + 0.3 * torch.randn(200, 1, 8, 8, generator=generator), 2))
        2 regions of 8x8: left 50%, right 50%; dependence 0.01; stability 1.00
    """
    images = as_images(images)
    height, width = images.shape[-2:]
    cell = max(1, math.ceil(math.sqrt(height * width / max_pixels)))
    while math.ceil(height / cell) * math.ceil(width / cell) > max_pixels:
        cell += 1
    if num_regions is not None and not 1 <= num_regions <= math.ceil(height / cell) * math.ceil(width / cell):
        raise ValueError(
            f"num_regions must be between 1 and the number of positions, got {num_regions} for {height}x{width} images."
        )
    if cell > 1:
        padding = (0, -width % cell, 0, -height % cell)
        images = F.pixel_unshuffle(F.pad(images, padding, mode="replicate"), cell)  # (N, C*s*s, H/s, W/s)

    batches, gamma = _batches(images, gamma, batch_size)
    if len(batches) == 1:
        # a single batch has no halves of whole batches; halve it
        halves = [batches[:0], batches[:0]] if len(batches[0]) < 8 else [[half] for half in batches[0].chunk(2)]
    else:
        halves = [batches[0::2], batches[1::2]]
    added = _series_cka if _differ_little(batches, gamma) else _batch_cka
    sums: dict[int, Tensor] = {}
    work = [(index, batch) for index in (0, 1) for batch in halves[index]]
    for index, batch in _progress(work, "finding regions", progress):
        sums[index] = added(batch, gamma, max_bytes, sums.get(index))
    whole = _mirror(added(batches[0], gamma, max_bytes) if len(batches) == 1 else (sums[0] + sums[1]) / len(batches))

    shape = images.shape[-2:]
    labels = _clusters(whole, num_regions, linkage).view(shape)
    stability = math.nan
    if sums:
        a, b = (_clusters(_mirror(sums[half] / len(halves[half])), num_regions, linkage) for half in (0, 1))
        stability = adjusted_rand_index(a, b)
    alignment, dependence = _alignment(whole, labels.flatten())
    if cell > 1:
        labels = _refined(labels, batches[:REFINING], cell, gamma, max_bytes)[:height, :width]
    return RegionMap(labels.contiguous(), alignment=alignment, dependence=dependence, stability=stability)


def _refined(labels: Tensor, batches: Sequence[Tensor], cell: int, gamma: float, max_bytes: int) -> Tensor:
    """Labels of pixels (h * s, w * s) from those of cells (h, w) and the cells' vectors (n, C * s * s, h * w)."""
    height, width = labels.shape
    fine = labels.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    member = F.one_hot(labels.flatten()).to(batches[0])  # (h * w, R)
    there = member.T.view(1, -1, height, width)
    meeting = F.max_pool2d(F.pad(there, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0].flatten(1).T > 0  # (h * w, R)
    border = (meeting.sum(1) > 1).nonzero()[:, 0]
    if len(border) == 0:
        return fine
    n = len(batches[0])
    block = max(1, max_bytes // (4 * n * n * batches[0].element_size()))
    size = member.sum(0)
    pixels_to = torch.zeros(len(border) * cell * cell, len(size), dtype=member.dtype, device=member.device)
    regions_to = torch.zeros(len(size), len(size), dtype=member.dtype, device=member.device)
    with exact_matmul():
        for batch in batches:
            mean = torch.zeros(len(size), n * (n + 1) // 2, dtype=member.dtype, device=member.device)
            for i in range(0, len(member), block):
                mean += member[i : i + block].T @ _kernel_rows(batch[..., i : i + block], gamma)
            mean /= size[:, None]
            regions_to += mean @ mean.T
            # (n, C, border * s * s): the pixels of the cells at borders
            pixels = batch[..., border].reshape(n, -1, cell * cell, len(border)).transpose(2, 3).flatten(2)
            for i in range(0, len(pixels_to), block):
                pixels_to[i : i + block] += _kernel_rows(pixels[..., i : i + block], gamma) @ mean.T
    # mean CKAs with all regions, as long vectors over cells: which region's do the pixel's resemble?
    with exact_matmul():
        likeness = F.normalize(pixels_to * size.sqrt(), dim=1) @ F.normalize(regions_to * size.sqrt(), dim=1).T
    allowed = meeting[border].repeat_interleave(cell * cell, 0)
    best, nearest = likeness.where(allowed, -math.inf).max(1)
    own = labels.flatten()[border.cpu()].repeat_interleave(cell * cell)
    # a pixel that never varies is aligned with nothing
    chosen = nearest.cpu().where(best.cpu() > 0, own)
    within = fine.view(height, cell, width, cell).permute(0, 2, 1, 3).reshape(height * width, cell * cell).clone()
    within[border.cpu()] = chosen.view(-1, cell * cell)
    refined = within.view(height, width, cell, cell).permute(0, 2, 1, 3).reshape(height * cell, width * cell)
    return refined if len(torch.unique(refined)) == len(size) else fine


def _progress(work: Sequence[Any], words: str, show: bool) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(work, desc=words, delay=3, leave=False, disable=not show)
    return bar


def _batches(images: Tensor, gamma: float | None, batch_size: int) -> tuple[list[Tensor], float]:
    """Whole batches of pixel vectors (n, C, P), and the bandwidth."""
    images = as_images(images)
    if len(images) < 2 or batch_size < 2:
        raise ValueError(
            f"images must be at least 2 in batches of at least 2, got {len(images)} in batches of {batch_size}. "
            "To fix this, collect more images; 400 make a steady map."
        )
    if not images.isfinite().all():
        raise ValueError(
            "images must be finite, got nan or inf. To fix this, leave such images out: images[images.isfinite()"
            ".flatten(1).all(1)]."
        )
    if gamma is None:
        with exact_matmul():
            gamma = float(median_bandwidth(images.flatten(1)))
        if math.isinf(gamma):
            warnings.warn("all images are equal: every pixel is independent of all others", stacklevel=3)
            gamma = 1.0
    whole = max(1, len(images) // batch_size) * min(batch_size, len(images))
    size = min(batch_size, len(images))
    pixels = images[:whole].flatten(2)
    return [pixels[i : i + size] for i in range(0, whole, size)], gamma


def _kernel_rows(pixels: Tensor, gamma: float) -> Tensor:
    """Centred, normalised kernel matrices of pixels (n, C, B) as rows (B, n (n + 1) / 2), whose products are CKAs.

    A symmetric matrix is stored as its upper triangle, off-diagonal entries times sqrt(2).
    """
    n = len(pixels)
    x = pixels.permute(2, 0, 1)  # (B, n, C)
    if x.shape[-1] == 1:
        distances = (x - x.mT).square_()
    else:
        distances = torch.zeros(len(x), n, n, dtype=x.dtype, device=x.device)
        for channel in x.unbind(-1):
            distances += (channel[:, :, None] - channel[:, None, :]).square_()
    # centring removes constants, and expm1 keeps the digits that exp would lose beside 1
    kernels = distances.mul_(-gamma).expm1_()
    mean = kernels.mean(-1)  # (B, n)
    kernels.sub_(mean[:, :, None]).sub_(mean[:, None, :]).add_(mean.mean(-1)[:, None, None])
    i, j = torch.triu_indices(n, n, device=x.device)
    rows = kernels.flatten(1).index_select(1, i * n + j)
    rows.mul_((2 - (i == j).to(rows.dtype)).sqrt_())
    norms = rows.norm(dim=1, keepdim=True)
    return rows.div_(torch.where(norms > 0, norms, math.inf))


def _batch_cka(pixels: Tensor, gamma: float, max_bytes: int, total: Tensor | None = None) -> Tensor:
    """Add one batch's alignments to the upper block triangle of ``total`` (P, P)."""
    n, _, positions = pixels.shape
    element = pixels.element_size()
    # rows are held for all positions if they fit, else for two blocks at a time
    held = n * (n + 1) // 2 * element
    making = 3 * n * n * element
    fits = held * positions + making * 256 <= max_bytes
    block = min(positions, 256 if fits else max(1, max_bytes // (2 * held + making)))
    starts = range(0, positions, block)
    if total is None:
        total = torch.zeros(positions, positions, dtype=pixels.dtype, device=pixels.device)

    with exact_matmul():
        if fits:
            rows = torch.empty(positions, n * (n + 1) // 2, dtype=pixels.dtype, device=pixels.device)
            for i in starts:
                rows[i : i + block] = _kernel_rows(pixels[..., i : i + block], gamma)
            # a few wide products: half of the square, at the speed of large matrices
            wide = max(block, positions // 4)
            for i in range(0, positions, wide):
                total[i : i + wide, i:].addmm_(rows[i : i + wide], rows[i:].T)
            return total
        for i in starts:
            a = _kernel_rows(pixels[..., i : i + block], gamma)
            for j in range(i, positions, block):
                b = a if i == j else _kernel_rows(pixels[..., j : j + block], gamma)
                total[i : i + block, j : j + block].addmm_(a, b.T)
    return total


def _series_cka(pixels: Tensor, gamma: float, max_bytes: int, total: Tensor | None = None) -> Tensor:
    """The same for grey pixels (n, 1, P) that differ little, by three terms of the kernel's Taylor series.

    ``k(x, y) = sum_k f_k(x) f_k(y)`` with ``f_k(x) = exp(-g x^2) x^k sqrt((2 g)^k / k!)``, so ``<K_i, K_j> = |F_i' F_j|^2``
    for centred features F (n, 3) of each pixel: an n-th of the work.
    """
    positions = pixels.shape[2]
    # the smallest shift that keeps equal values exactly equal, before the mean
    x = pixels[:, 0] - pixels[:1, 0]
    x = x - x.mean(0)  # (n, P)
    decay = (-gamma * x.square()).expm1_()
    features = torch.stack([decay, (2 * gamma) ** 0.5 * x * (1 + decay), 2**0.5 * gamma * x.square() * (1 + decay)])
    features -= features.mean(1, keepdim=True)  # (3, n, P)
    with exact_matmul():
        norms = torch.einsum("anp,bnp->pab", features, features).flatten(1).norm(dim=1).sqrt_()
    features /= torch.where(norms > 0, norms, math.inf)
    if total is None:
        total = torch.zeros(positions, positions, dtype=pixels.dtype, device=pixels.device)
    block = max(1, min(positions, max_bytes // (4 * positions * pixels.element_size())))
    with exact_matmul():
        for i in range(0, positions, block):
            for a in features:
                for b in features:
                    total[i : i + block, i:] += (a[:, i : i + block].T @ b[:, i:]).square_()
    return total


def _differ_little(batches: Sequence[Tensor], gamma: float) -> bool:
    """Whether grey pixels are so near to their means that the kernel's series is exact to 1e-4 after three terms."""
    return batches[0].shape[1] == 1 and all(
        2 * gamma * float((batch - batch.mean(0)).square().max()) < SERIES for batch in batches
    )


def _mirror(upper: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle, whatever stands below."""
    return torch.triu(upper).add_(torch.triu(upper, 1).T)


def _clusters(cka: Tensor, num_regions: int | None, linkage: str) -> Tensor:
    """(P,) labels 0..R-1 by size, of the clustering of the rows of (P, P)."""
    import numpy as np
    from scipy.cluster import hierarchy

    if len(cka) == 1:
        return torch.zeros(1, dtype=torch.long)
    rows = cka.double()
    rows = rows - rows.mean(0)
    parts = []
    for i in range(0, len(rows), ROWS):
        distances = squared_distances(rows[i : i + ROWS], rows[i:]).sqrt_()
        parts.append(distances[torch.ones_like(distances, dtype=torch.bool).triu_(1)].cpu())
    condensed = torch.cat(parts).numpy()
    tree = hierarchy.linkage(condensed, linkage)
    if num_regions is None:
        found = hierarchy.fcluster(tree, tree[:, 2].max() / 2, "distance")
    else:
        found = hierarchy.fcluster(tree, num_regions, "maxclust")
        if found.max() < num_regions:
            # merging distances tie; the slower cut reaches the number all the same
            found = hierarchy.cut_tree(tree, num_regions)[:, 0]
    found = np.unique(found, return_inverse=True)[1]
    first = np.array([np.argmax(found == label) for label in range(found.max() + 1)])
    order = np.lexsort((first, -np.bincount(found)))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return torch.from_numpy(rank[found].astype(np.int64))


def _alignment(cka: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Mean CKA (R, R) within regions, a pixel with itself left out, and between them; and over all pairs between."""
    member = F.one_hot(labels).to(cka)  # (P, R)
    with exact_matmul():
        sums = (member.T @ cka @ member).double().cpu()
    sizes = torch.bincount(labels).double()
    pairs = sizes[:, None] * sizes[None, :] - torch.diag(sizes)
    sums -= torch.diag((member.T @ cka.diagonal()).double().cpu())
    between = ~torch.eye(len(sizes), dtype=torch.bool)
    dependence = float(sums[between].sum() / pairs[between].sum()) if len(sizes) > 1 else math.nan
    return (sums / pairs).float(), dependence
