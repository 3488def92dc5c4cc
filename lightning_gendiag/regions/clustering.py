"""Regions of the image: pixels clustered by the alignment of their kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gendiag.functional.arrays import as_images, exact_matmul
from lightning_gendiag.functional.distances import adjusted_rand_index, squared_distances
from lightning_gendiag.regions.balanced import balanced_clusters
from lightning_gendiag.regions.pixel_cka import (
    _alignments_with,
    _batch_cka,
    _batches,
    _differ_little,
    _kernel_rows,
    _mirror,
    _no_alignments,
    _progress,
    _series_cka,
)
from lightning_gendiag.regions.region_map import RegionMap

ROWS = 512
"""Positions whose distances to the others are held at a time."""

REFINING = 2
"""Number of batches by which pixels at the borders of regions are assigned."""

MAX_PIXELS = 4096
"""Largest number of positions, or of square cells of them, that are clustered by default."""


def find_regions(
    images: Tensor,
    num_regions: int | None = 5,
    gamma: float | None = None,
    *,
    method: Literal["balanced", "paper"] = "balanced",
    connected: bool = True,
    batch_size: int = 100,
    linkage: str = "average",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = 1 << 30,
    progress: bool = True,
) -> RegionMap:
    """Finds regions of pixels that depend on each other and little on the rest.

    With ``method="balanced"``, areas that never vary, such as a black margin, are a region of their own, the last one, which
    is named "background". The other pixels are divided into connected regions of at least ``1 / (4 R)`` of them each, whose
    pixels are aligned, by :func:`pixel_cka`, and near each other. With ``method="paper"`` the rows of the alignments are
    clustered by their Euclidean distances, and the tree is cut at ``num_regions``; regions may then be scattered or single
    pixels. Regions are numbered by size, the largest first.

    Where an image has more than ``max_pixels`` positions, square cells of pixels are clustered instead: a cell is a longer
    vector under the same kernel. Each pixel of a cell at a border is then assigned to the region, out of those that meet
    there, whose alignment with all regions is most like its own.

    Source: arXiv 2409.01314, section 3. The authors use average linkage, 5 regions for CelebA, 5 or 6 for ChestMNIST.

    Args:
        images: (N, C, H, W), at least two; maps from 400 images or more are steadier.
        num_regions: R, including the background. None lets the data decide: the tree is cut at half of its largest merging
            distance.
        gamma: bandwidth, see :func:`pixel_cka`.
        method: ``"balanced"``, or ``"paper"`` for the authors' clustering.
        connected: whether regions are connected and their pixels near each other, for ``method="balanced"``; False for rows
            of features in any order.
        batch_size: number of images in a batch, see :func:`pixel_cka`.
        linkage: any method of ``scipy.cluster.hierarchy.linkage``, for ``method="paper"``.
        max_pixels: largest number of positions or cells that are clustered.
        max_bytes: bound on the working memory of the alignment, in addition to its (P, P) result.
        progress: whether to show a progress bar where the work takes more than a few seconds.

    Returns:
        The map, with ``dependence`` and, from two halves of the batches, ``stability``.

    Raises:
        ValueError: if there are fewer than two images, an image is not finite, there are fewer positions than regions, or
            there is no such method.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> halves = torch.arange(8).repeat(8, 1) // 4  # left, right
        >>> common = torch.randn(200, 1, 2, generator=generator)[:, :, halves]
        >>> print(find_regions(common + 0.3 * torch.randn(200, 1, 8, 8, generator=generator), 2))
        2 regions of 8x8: left 50%, right 50%; dependence 0.01; stability 1.00
    """
    if method not in ("balanced", "paper"):
        raise ValueError(f"method must be 'balanced' or 'paper', got {method!r}. To fix this, leave it out.")
    images = as_images(images)
    height, width = images.shape[-2:]
    cell = _cell_size(height, width, max_pixels)
    if num_regions is not None:
        check_num_regions(num_regions, height, width, max_pixels)
    if cell > 1:
        if width % cell or height % cell:
            images = F.pad(images, (0, -width % cell, 0, -height % cell), mode="replicate")
        images = F.pixel_unshuffle(images, cell)  # (N, C*s*s, H/s, W/s)

    batches, gamma = _batches(images, gamma, batch_size)
    halves = [batches[0::2], batches[1::2]]
    if len(batches) == 1:
        # a single batch has no halves of whole batches; halve it where it is large enough
        halves = [[half] for half in batches[0].chunk(2)] if len(batches[0]) >= 8 else []
    # of the batches by which borders are refined
    kept: dict[int, Tensor] = {}
    refining = batches[:REFINING] if cell > 1 else []
    differ_little = _differ_little(batches, gamma)

    def add(batch: Tensor, total: Tensor) -> Tensor:
        if differ_little:
            return _series_cka(batch, gamma, max_bytes, total)
        is_refining = any(batch is other for other in refining)
        return _batch_cka(batch, gamma, max_bytes, total, kept if is_refining else None)

    sums = [_no_alignments(batches) for _ in halves]
    work = [(total, batch) for total, half in zip(sums, halves, strict=True) for batch in half]
    for total, batch in _progress(work, "finding regions", progress):
        add(batch, total)
    whole = sums[0] + sums[1] if len(batches) > 1 else add(batches[0], _no_alignments(batches))
    whole = _mirror(whole.div_(len(batches)))

    def clusters(cka: Tensor) -> tuple[Tensor, int | None]:
        if method == "paper":
            return _clusters(cka, num_regions, linkage), None
        high, wide = images.shape[-2:]
        found, background = balanced_clusters(cka.cpu().numpy(), high, wide, num_regions, connected)
        return torch.from_numpy(found), background

    labels, background = clusters(whole)
    alignment, dependence = _alignment(whole, labels)
    labels = labels.view(images.shape[-2:])
    # before the halves are clustered, which takes as much memory again
    del whole
    stability = math.nan
    if halves:
        found = (_mirror(total.div_(len(half))) for total, half in zip(sums, halves, strict=True))
        stability = adjusted_rand_index(*(clusters(cka)[0] for cka in found))
    if cell > 1:
        labels = _refined(labels, refining, cell, gamma, max_bytes, kept)[:height, :width]
    return RegionMap(
        labels.contiguous(), alignment=alignment, dependence=dependence, stability=stability, background=background
    )


def check_num_regions(num_regions: int, height: int, width: int, max_pixels: int = MAX_PIXELS) -> None:
    """Checks that images of H x W pixels can be divided into so many regions.

    Raises:
        ValueError: if ``num_regions`` is not between 1 and the number of positions, or of cells, that are clustered.
    """
    cell = _cell_size(height, width, max_pixels)
    most = math.ceil(height / cell) * math.ceil(width / cell)
    if not 1 <= num_regions <= most:
        raise ValueError(
            f"num_regions must be between 1 and the number of positions, got {num_regions} for {height}x{width} images. "
            f"To fix this, pass at most {most}."
        )


def _cell_size(height: int, width: int, max_pixels: int) -> int:
    """Returns the side of the smallest square cells of which at most ``max_pixels`` cover an image."""
    cell = max(1, math.ceil(math.sqrt(height * width / max_pixels)))
    while math.ceil(height / cell) * math.ceil(width / cell) > max_pixels:
        cell += 1
    return cell


def _refined(
    labels: Tensor, batches: Sequence[Tensor], cell: int, gamma: float, max_bytes: int, kept: Mapping[int, Tensor]
) -> Tensor:
    """Returns labels of pixels (h * s, w * s) from those of cells (h, w).

    The batches hold the vectors of the cells, (n, C * s * s, h * w). Their kernels are kept by the id of the batch, or not.
    """
    height, width = labels.shape
    fine = labels.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    member = F.one_hot(labels.flatten()).to(batches[0])  # (h * w, R)
    there = member.T.view(1, -1, height, width)
    meeting = F.max_pool2d(there, 3, stride=1, padding=1)[0].flatten(1).T > 0  # (h * w, R)
    border = (meeting.sum(1) > 1).nonzero()[:, 0]
    if len(border) == 0:
        return fine
    n = len(batches[0])
    block = max(1, max_bytes // (4 * n * n * batches[0].element_size()))
    size = member.sum(0)
    pixels_to = member.new_zeros(len(border) * cell * cell, len(size))
    regions_to = member.new_zeros(len(size), len(size))
    with exact_matmul():
        for batch in batches:
            mean = member.new_zeros(len(size), n * (n + 1) // 2)
            for i in range(0, len(member), block):
                rows = (
                    kept[id(batch)][i : i + block]
                    if id(batch) in kept
                    else _kernel_rows(batch[..., i : i + block], gamma)
                )
                mean += member[i : i + block].T @ rows
            mean /= size[:, None]
            regions_to += mean @ mean.T
            # (n, C, border * s * s): the pixels of the cells at borders
            pixels = batch[..., border].reshape(n, -1, cell * cell, len(border)).transpose(2, 3).flatten(2)
            for i in range(0, len(pixels_to), block):
                pixels_to[i : i + block] += _alignments_with(pixels[..., i : i + block], gamma, mean)
        # cosines between the mean CKAs of a pixel with all regions and those of each region
        likeness = F.normalize(pixels_to * size.sqrt(), dim=1) @ F.normalize(regions_to * size.sqrt(), dim=1).T
    allowed = meeting[border].repeat_interleave(cell * cell, 0)
    best, nearest = likeness.where(allowed, -math.inf).max(1)
    within = labels.flatten()[:, None].repeat(1, cell * cell)  # (h * w, s * s)
    own = within[border.cpu()]
    # a pixel that never varies is aligned with nothing
    within[border.cpu()] = nearest.cpu().view_as(own).where(best.cpu().view_as(own) > 0, own)
    refined = F.pixel_shuffle(within.T.reshape(cell * cell, height, width), cell)[0]
    return refined if len(torch.unique(refined)) == len(size) else fine


def _clusters(cka: Tensor, num_regions: int | None, linkage: str) -> Tensor:
    """Clusters the rows of a matrix (P, P) and returns labels (P,), 0..R-1 by falling size."""
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
            # merging distances tie, but the slower cut still reaches the number
            found = hierarchy.cut_tree(tree, num_regions)[:, 0]
    _, first, found, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    rank = np.lexsort((first, -sizes)).argsort()
    return torch.from_numpy(rank[found].astype(np.int64))


def _alignment(cka: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Returns the mean CKA (R, R) of pixels within and between regions, and over all pairs in different regions.

    Pairs of a pixel with itself are left out.
    """
    member = F.one_hot(labels).to(cka)  # (P, R)
    with exact_matmul():
        sums = (member.T @ cka @ member).double().cpu()
    sizes = torch.bincount(labels).double()
    pairs = sizes[:, None] * sizes[None, :] - torch.diag(sizes)
    sums -= torch.diag((member.T @ cka.diagonal()).double().cpu())
    between = ~torch.eye(len(sizes), dtype=torch.bool)
    dependence = float(sums[between].sum() / pairs[between].sum()) if len(sizes) > 1 else math.nan
    return (sums / pairs).float(), dependence
