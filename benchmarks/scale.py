"""Measures seconds and memory for large images and many of them, and how good region maps of cells are.

Each size is measured in a process of its own, so that its peak memory is its own. At 64x64, maps of cells are compared with
the exact map, beside the maps of two halves of the images: no map can be closer to the exact one than it is to itself.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import in_own_process, peak_memory, timed_anew
from benchmarks.pixel_cka import smooth_images
from example_models.data import digits, mnist, scenes
from lightning_gendiag import CosineMeanSimilarity, RegionMap, find_regions, k_star
from lightning_gendiag.functional.distances import adjusted_rand_index

COARSE = (1024, 256)
"""Numbers of cells, of 2x2 and of 4x4 pixels, that take the place of 4,096 pixels."""


def coloured(n: int, size: int, seed: int = 0) -> Tensor:
    """Returns (n, 3, size, size) bytes, as a loader of photographs holds them."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(64, 3, 8, 8, generator=generator) for _ in range(n // 64)]
    return torch.cat([(255 * F.interpolate(part, size=(size, size), mode="bilinear")).byte() for part in parts])


def region_map(size: int, channels: int = 1) -> Callable[[], RegionMap]:
    images = smooth_images(400, size).float().repeat(1, channels, 1, 1)
    return lambda: find_regions(images, 5, progress=False)


def cosines(n: int, size: int) -> Callable[[], Any]:
    rows = torch.arange(size) * 2 // size
    metric = CosineMeanSimilarity(RegionMap(rows[:, None] * 2 + rows), reset_real_features=False)
    metric.update(coloured(n, size), real=True)
    metric.update(coloured(n, size, 1), real=False)
    return metric.compute


def neighbours(n: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (n,), generator=generator)
    latents = torch.randn(10, 128, generator=generator)[labels] + 2 * torch.randn(n, 128, generator=generator)
    return lambda: k_star(latents, labels)


SIZES: dict[str, Callable[[], Callable[[], Any]]] = {
    **{f"find_regions, 400 of 1x{size}x{size}": partial(region_map, size) for size in (32, 64, 128, 256, 512)},
    "find_regions, 400 of 3x256x256": lambda: region_map(256, 3),
    "CosineMeanSimilarity, 1,024 of 3x64x64": lambda: cosines(1024, 64),
    "CosineMeanSimilarity, 8,192 of 3x64x64": lambda: cosines(8192, 64),
    "CosineMeanSimilarity, 1,024 of 3x256x256": lambda: cosines(1024, 256),
    "k_star, 10,000 of 128": lambda: neighbours(10_000),
    "k_star, 50,000 of 128": lambda: neighbours(50_000),
}


def measured(name: str) -> tuple[float, float, float]:
    """Returns seconds, GiB at the peak, and the GiB before, which libraries and images take."""
    prepared = SIZES[name]()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize() / 2**30
    del prepared
    # prepared anew, since a metric computes its result once
    seconds, _ = timed_anew(SIZES[name])
    return seconds, peak_memory(), before


def agreement(folder: Path | None) -> None:
    """Prints how well maps of cells agree with the exact one, at 64x64."""
    n, size = 1600, 64
    kinds = {"scenes of 5 regions": scenes(n, 5, 32)[0], "digits, from 8x8": digits(size)[0][:n]}
    if folder is not None:
        kinds["MNIST"] = mnist(folder)[0][:n]
    titles = "".join(f"{f'{count} cells':>12s}" for count in COARSE)
    print(f"\n{'adjusted Rand index, 1 = the same map, 64x64':46s} {'two halves':>10s}{titles}")
    for name, held in kinds.items():
        x = F.interpolate(held, size=(size, size), mode="bilinear", align_corners=False)
        halves = [find_regions(half, 5, progress=False).labels.flatten() for half in (x[0::2], x[1::2])]
        exact = find_regions(x, 5, progress=False).labels.flatten()
        cells = [find_regions(x, 5, max_pixels=count, progress=False).labels.flatten() for count in COARSE]
        values = [adjusted_rand_index(*halves), *(adjusted_rand_index(exact, found) for found in cells)]
        print(f"  {name:44s} {values[0]:10.2f}" + "".join(f"{value:12.2f}" for value in values[1:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure the names that contain this, and no agreement of maps")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's test images")
    options = parser.parse_args()
    print(f"{'':44s} {'seconds':>8s} {'GiB at the peak':>16s} {'GiB before':>11s}")
    for name in SIZES:
        if options.only in name:
            seconds, peak, before = in_own_process(measured, name)
            print(f"{name:44s} {seconds:8.1f} {peak:16.2f} {before:11.2f}", flush=True)
    if not options.only:
        agreement(options.mnist)


if __name__ == "__main__":
    main()
