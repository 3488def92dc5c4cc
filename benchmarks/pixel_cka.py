"""How fast is ``pixel_cka`` against a loop over pairs of pixels, and how long does a region map take?

Four hundred grey 64x64 images: the size of the authors' CelebA study. The loop is timed on random pairs and scaled to
all of them, since in full it would take days.
"""

from __future__ import annotations

import random
import resource
import time

import torch
from torch import Tensor

from lightning_gendiag import find_regions, pixel_cka

BATCH, PAIRS = 100, 300


def loop_cka(x: Tensor, i: int, j: int, gamma: float) -> float:
    """One pair of pixels as the formula has it: kernel matrices, centred, their normalised product."""
    total, batches = 0.0, len(x) // BATCH
    centring = torch.eye(BATCH, dtype=x.dtype) - 1 / BATCH
    for batch in x.flatten(2).split(BATCH):
        k, m = (
            centring @ torch.exp(-gamma * (batch[:, :, p][:, None] - batch[:, :, p][None]).square().sum(-1)) @ centring
            for p in (i, j)
        )
        total += float((k * m).sum() / (k.norm() * m.norm()))
    return total / batches


def images(n: int, size: int) -> Tensor:
    """Smooth random images: low frequencies, as photographs have them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 1, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(n, 1, size, size, generator=generator)).double()


def main() -> None:
    x = images(400, 64)
    positions = 64 * 64
    distances = torch.cdist(x.flatten(1), x.flatten(1)).square()
    gamma = 1 / float(distances.median())
    started = time.perf_counter()
    cka = pixel_cka(x.float(), gamma, BATCH, progress=False)
    fast = time.perf_counter() - started

    source = random.Random(0)
    pairs = [(source.randrange(positions), source.randrange(positions)) for _ in range(PAIRS)]
    started = time.perf_counter()
    for i, j in pairs:
        loop_cka(x.float(), i, j, gamma)
    one = (time.perf_counter() - started) / PAIRS
    # timed in float32, as the other; compared in float64
    error = max(abs(float(cka[i, j]) - loop_cka(x, i, j, gamma)) for i, j in pairs)
    every = positions * (positions - 1) / 2
    print(f"pixel_cka, 400 images of 64x64, all {every:,.0f} pairs: {fast:.1f} s")
    print(f"loop over pairs, {PAIRS} of them timed: {one * 1e3:.2f} ms each, {one * every / 3600:.1f} h for all")
    print(f"ratio: {one * every / fast:,.0f}    largest difference on those pairs: {error:.1e}")

    started = time.perf_counter()
    regions = find_regions(x.float(), 5, progress=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"find_regions, the same images: {seconds:.1f} s, peak memory of the process {peak:.2f} GiB")
    print(regions)


if __name__ == "__main__":
    main()
