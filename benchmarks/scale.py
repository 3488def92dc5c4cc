"""What do large images and many of them cost, in seconds and memory, and how good are maps by cells?

Each size is measured in a process of its own, so that its peak is its own. Maps by cells are compared with the exact map
at 64x64, beside two exact maps of two halves of the images, since no map can be nearer to it than it is to itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pixel_cka import images as smooth_images
from example_models.data import digits, mnist, scenes
from lightning_gendiag import CosineMeanSimilarity, RegionMap, find_regions, k_star
from lightning_gendiag.functional import adjusted_rand_index

COARSE = (1024, 256)
"""Cells that take the place of the 4,096 pixels: of 2x2 and of 4x4 pixels."""


def coloured(n: int, size: int, seed: int = 0) -> Tensor:
    """(n, 3, size, size) bytes, as a loader of photographs would hold them."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(64, 3, 8, 8, generator=generator) for _ in range(n // 64)]
    return torch.cat([(255 * F.interpolate(part, size=(size, size), mode="bilinear")).byte() for part in parts])


def map_of(size: int, channels: int = 1) -> Callable[[], None]:
    held = smooth_images(400, size).float().repeat(1, channels, 1, 1)
    return lambda: print(find_regions(held, 5, progress=False), file=sys.stderr)


def cosines(n: int, size: int) -> Callable[[], None]:
    real, generated = coloured(n, size), coloured(n, size, 1)
    rows = torch.arange(size) * 2 // size
    metric = CosineMeanSimilarity(RegionMap(rows[:, None] * 2 + rows), reset_real_features=False)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return lambda: print(metric.compute().image, file=sys.stderr)


def neighbours(n: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (n,), generator=generator)
    latents = torch.randn(10, 128, generator=generator)[labels] + 2 * torch.randn(n, 128, generator=generator)
    return lambda: print(k_star(latents, labels).mean, file=sys.stderr)


SIZES: dict[str, Callable[[], Callable[[], None]]] = {
    **{f"find_regions, 400 of 1x{size}x{size}": lambda size=size: map_of(size) for size in (32, 64, 128, 256, 512)},
    "find_regions, 400 of 3x256x256": lambda: map_of(256, 3),
    "CosineMeanSimilarity, 1,024 of 3x64x64": lambda: cosines(1024, 64),
    "CosineMeanSimilarity, 8,192 of 3x64x64": lambda: cosines(8192, 64),
    "CosineMeanSimilarity, 1,024 of 3x256x256": lambda: cosines(1024, 256),
    "k_star, 10,000 of 128": lambda: neighbours(10_000),
    "k_star, 50,000 of 128": lambda: neighbours(50_000),
}


def measured(name: str) -> tuple[float, float, float]:
    """Seconds, GiB at the peak, and GiB that were held before."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak, before = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak, before


def one(name: str) -> None:
    work = SIZES[name]()
    before = resident()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(json.dumps((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, before)))


def resident() -> float:
    """GiB in memory now, the libraries and the images included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def agreement(folder: Path | None) -> None:
    """Maps by cells beside the exact one, at 64x64."""
    n, size = 1600, 64
    kinds = {"scenes of 5 regions": scenes(n, 5, 32)[0], "digits, from 8x8": digits(size)[0][:n]}
    if folder is not None:
        kinds["MNIST"] = mnist(folder)[0][:n]
    print(f"\n{'adjusted Rand index, 1 = the same map, 64x64':46s} {'two halves':>10s}" + "".join(
        f"{f'{count} cells':>12s}" for count in COARSE
    ))  # fmt: skip
    for name, held in kinds.items():
        x = F.interpolate(held, size=(size, size), mode="bilinear", align_corners=False)
        halves = [find_regions(half, 5, progress=False).labels.flatten() for half in (x[0::2], x[1::2])]
        exact = find_regions(x, 5, progress=False).labels.flatten()
        cells = [find_regions(x, 5, max_pixels=count, progress=False).labels.flatten() for count in COARSE]
        values = [adjusted_rand_index(*halves), *(adjusted_rand_index(exact, found) for found in cells)]
        print(f"  {name:44s} {values[0]:10.2f}" + "".join(f"{value:12.2f}" for value in values[1:]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's test images")
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    print(f"{'':44s} {'seconds':>8s} {'GiB at the peak':>16s} {'GiB before':>11s}")
    for name in SIZES:
        if options.only in name:
            seconds, peak, before = measured(name)
            print(f"{name:44s} {seconds:8.1f} {peak:16.2f} {before:11.2f}", flush=True)
    if not options.only:
        agreement(options.mnist)


if __name__ == "__main__":
    main()
