"""Measures how good regions are: steady, dependent within, without specks, and able to place a fault.

Two ways to find regions are compared, ``method="balanced"`` and ``method="paper"``, with five regions each, on scikit-learn's
digits, scenes of known regions and, from folders, MNIST and faces. A fault is planted in quarters, rectangles and discs of 5
to 25 % of the picture in otherwise real images::

    python -m benchmarks.regions --mnist FOLDER --faces lfw_subset.npy     with scikit-image's file of 100 faces
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from benchmarks.measuring import rounded, timed
from example_models.data import digits, mnist, scenes
from lightning_gendiag import RegionMap, cosine_mean_similarity, find_regions, pixel_cka

REGIONS, IMAGES, FAULTS = 5, 1000, 36
"""Regions, images in which they are found, and faults for each kind of images."""


def places(height: int, width: int, seed: int) -> Iterator[Tensor]:
    """Yields masks (H, W) of quarters, rectangles and discs in turn."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    while True:
        a, b, c, d = torch.rand(4, generator=generator).tolist()
        yield ((y < height / 2) == (a < 0.5)) & ((x < width / 2) == (b < 0.5))
        area = (0.05 + 0.2 * a) * height * width
        high = min(height, (area * 4 ** (2 * b - 1)) ** 0.5)
        wide = min(width, area / high)
        top, left = c * (height - high), d * (width - wide)
        yield (y >= top) & (y < top + high) & (x >= left) & (x < left + wide)
        radius = (area / torch.pi) ** 0.5
        top, left = radius + d * (height - 2 * radius), radius + c * (width - 2 * radius)
        yield (y - top).square() + (x - left).square() <= radius**2


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "blurred": lambda x: F.avg_pool2d(x, 7, 1, 3, count_include_pad=False),
    "frozen": lambda x: x[:1].expand_as(x),
    "noisy": lambda x: 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1,
}


def placed(regions: RegionMap, real: Tensor, generated: Tensor, way: str) -> list[tuple[float, float, float]]:
    """Returns for each fault the best overlap of a region, that of the region that fell most, and how much it fell."""
    before = cosine_mean_similarity(generated, real, regions).regions
    rows = []
    for fault in islice(places(regions.height, regions.width, 1), FAULTS):
        harmed = torch.where(fault, WAYS[way](generated), generated)
        after = cosine_mean_similarity(harmed, real, regions).regions
        fall = (before / after.clamp(min=1e-9)).log()
        overlaps = [regions.overlap(r, fault) for r in range(regions.num_regions)]
        rows.append((max(overlaps), overlaps[int(fall.argmax())], float(fall.max())))
    return rows


def dependence(cka: Tensor, regions: RegionMap) -> tuple[float, float]:
    """Returns the mean alignment of two pixels in one region, and in two."""
    labels = regions.labels.flatten()
    same, other = labels[:, None] == labels, ~torch.eye(len(labels), dtype=torch.bool)
    return float(cka[same & other].mean()), float(cka[~same].mean())


def images_of(mnist_folder: Path | None, faces: Path | None) -> dict[str, Tensor]:
    """Returns images (N, 1, H, W) by name, shuffled."""
    kinds = {"digits": digits(32)[0], **{f"scenes of {r}": scenes(1800, r, 32, 10 + r)[0] for r in (4, 5, 6)}}
    if mnist_folder is not None:
        kinds["MNIST"] = mnist(mnist_folder)[0][4000:8000]
    if faces is not None:
        kinds["faces"] = torch.from_numpy(np.load(faces)[:100]).float()[:, None] * 2 - 1
    order = torch.Generator().manual_seed(1)
    return {name: x[torch.randperm(len(x), generator=order)] for name, x in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's test images")
    parser.add_argument("--faces", type=Path, help="scikit-image's lfw_subset.npy")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'':24s} {'largest':>8s} {'smallest':>8s} {'parts':>6s} {'agree':>6s} {'within':>7s} "
        f"{'between':>8s} {'best IoU':>9s} "
        + " ".join(f"{way + ' placed':>15s} {'IoU':>5s} {'fall':>6s}" for way in WAYS)
        + f" {'seconds':>8s}"
    )
    for name, x in images_of(options.mnist, options.faces).items():
        size = min(100, len(x) // 2)
        found_in, cka = x[:IMAGES], pixel_cka(x[:IMAGES], batch_size=size, progress=False)
        real, generated = x[: len(x) // 2][:500], x[len(x) // 2 :][:500]
        for method in ("paper", "balanced"):
            seconds, regions = timed(
                lambda m=method, y=found_in, n=size: find_regions(y, REGIONS, method=m, batch_size=n, progress=False)
            )
            shares = (regions.sizes / regions.sizes.sum()).tolist()
            judged = [r for r in range(REGIONS) if r != regions.background]
            parts = max(int(ndimage.label(regions.mask(r).numpy())[1]) for r in judged)
            within, between = dependence(cka, regions)
            ways: dict[str, dict[str, float]] = {}
            for way in WAYS:
                best, overlap, falls = zip(*placed(regions, real, generated, way), strict=True)
                ways[way] = {
                    "placed": statistics.mean(b == o for b, o in zip(best, overlap, strict=True)),
                    "iou": statistics.mean(overlap),
                    "fall": statistics.median(falls),
                }
            row = {
                "images": name, "method": method, "largest": max(shares), "smallest": min(shares[r] for r in judged),
                "largest_is_background": shares.index(max(shares)) == regions.background, "parts": parts,
                "stability": regions.stability, "within": within, "between": between,
                # the best overlap of a fault does not depend on what happens in it
                "iou": statistics.mean(best), "ways": ways,
            }  # fmt: skip
            rows.append(row)
            columns = (f"{own['placed']:15.0%} {own['iou']:5.2f} {own['fall']:6.3f}" for own in ways.values())
            print(
                f"{name + ', ' + method:24s} {row['largest']:8.0%} {row['smallest']:8.0%} {parts:6d} "
                f"{regions.stability:6.2f} {within:7.3f} {between:8.3f} {row['iou']:9.2f} "
                f"{' '.join(columns)} {seconds:8.2f}",
                flush=True,
            )
    if options.json:
        print(json.dumps(rounded(rows)))


if __name__ == "__main__":
    main()
