"""Compares ``pixel_cka`` with a loop over pairs of pixels, and measures the time of a region map.

The images are 400 grey ones of 64x64 pixels, as many as in the authors' study of CelebA. The loop is timed on random pairs
and extrapolated to all of them, since it would take days.
"""

from __future__ import annotations

import argparse
import json
import random

import torch
from torch import Tensor

from benchmarks.measuring import peak_memory, rounded, timed
from lightning_gendiag import find_regions, pixel_cka

BATCH, PAIRS = 100, 300


def loop_cka(x: Tensor, i: int, j: int, gamma: float) -> float:
    """Returns the CKA of one pair of pixels by its formula: the normalised product of centred kernel matrices."""
    total, batches = 0.0, len(x) // BATCH
    centring = torch.eye(BATCH, dtype=x.dtype) - 1 / BATCH
    for batch in x.flatten(2).split(BATCH):
        k, m = (
            centring @ torch.exp(-gamma * (batch[:, :, p][:, None] - batch[:, :, p][None]).square().sum(-1)) @ centring
            for p in (i, j)
        )
        total += float((k * m).sum() / (k.norm() * m.norm()))
    return total / batches


def smooth_images(n: int, size: int) -> Tensor:
    """Returns random images (n, 1, size, size) of low frequencies, as photographs have them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 1, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (smooth + 0.1 * torch.randn(n, 1, size, size, generator=generator)).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    x = smooth_images(400, 64)
    single = x.float()
    positions = 64 * 64
    gamma = 1 / float(torch.cdist(x.flatten(1), x.flatten(1)).square().median())
    fast, cka = timed(lambda: pixel_cka(single, gamma, BATCH, progress=False))
    source = random.Random(0)
    pairs = [(source.randrange(positions), source.randrange(positions)) for _ in range(PAIRS)]
    one = timed(lambda: [loop_cka(single, i, j, gamma) for i, j in pairs])[0] / PAIRS
    # both are timed in float32, and compared in float64
    error = max(abs(float(cka[i, j]) - loop_cka(x, i, j, gamma)) for i, j in pairs)
    every = positions * (positions - 1) / 2
    print(f"pixel_cka, 400 images of 64x64, all {every:,.0f} pairs: {fast:.1f} s")
    print(f"loop over pairs, {PAIRS} of them timed: {one * 1e3:.2f} ms each, {one * every / 3600:.1f} h for all")
    print(f"ratio: {one * every / fast:,.0f}    largest difference on those pairs: {error:.1e}")
    seconds, regions = timed(lambda: find_regions(single, 5, progress=False))
    print(f"find_regions, the same images: {seconds:.1f} s, peak memory of the process {peak_memory():.2f} GiB")
    print(regions)
    if options.json:
        print(
            json.dumps(rounded({"seconds": fast, "hours_of_the_loop": one * every / 3600, "ratio": one * every / fast}))
        )


if __name__ == "__main__":
    main()
