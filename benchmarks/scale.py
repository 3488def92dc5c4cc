"""Measures seconds and memory for large images and many of them, and how good region maps of cells are.

Each size is measured in a process of its own, so that its peak memory is its own. At 64x64, maps of cells are compared with
the exact map, beside the maps of two halves of the images: no map can be closer to the exact one than it is to itself.

``--exponents`` measures how the time of each part grows instead: resolution, samples, latents, classes and regions vary alone
around a base case. An exponent is the slope of log seconds over log amount in the upper half of the amounts. It takes less
than three minutes of one core.
With ``--against COMMIT`` each size is measured with the package of today and with that of a commit in turn, and the results
are compared::

    python -m benchmarks.scale --against fbed8ff --only find_regions
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import parts
from benchmarks.measuring import in_own_process, package_at, peak_memory, repeated, rounded, timed_anew, trained
from benchmarks.parts import Setting
from benchmarks.pixel_cka import smooth_images
from example_models.data import digit_batches, digits, mnist, scenes
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CosineMeanSimilarity,
    LatentRegionsMonitor,
    RegionMap,
    find_regions,
    k_star,
    latent_regions,
    minimal_features,
)
from lightning_gendiag.functional.distances import adjusted_rand_index

COARSE = (1024, 256)
"""Numbers of cells, of 2x2 and of 4x4 pixels, that take the place of 4,096 pixels."""

CPU = torch.device("cpu")
IMAGES, LATENTS = Setting(32, 512, CPU, dims=32), Setting(32, 8, CPU, dims=32)
"""The base case of parts that take images, and of those that take latents."""

FEW = IMAGES._replace(samples=200)
"""Images in which regions are found."""

SIZES_OF_IMAGES, SAMPLES = [16, 32, 64, 128], [128, 256, 512, 1024, 2048]
LENGTHS, NUMBERS = [8, 16, 32, 64, 128], [2, 5, 10, 20, 50]

AXES: dict[tuple[str, str], tuple[list[int], dict[str, tuple[Callable[[Setting], parts.Call], Setting]]]] = {
    ("resolution", "size"): (
        SIZES_OF_IMAGES,
        {
            "sampling": (parts.sampling, IMAGES),
            "cosine mean similarity, real side": (parts.real_side, IMAGES),
            "cosine mean similarity, compare": (parts.compare, IMAGES),
            "class features": (parts.class_features, IMAGES),
            "classification": (parts.classification, IMAGES),
            "Jacobian Gram matrices": (parts.jacobian, LATENTS),
            "find_regions": (parts.find_regions, FEW),
        },
    ),
    ("samples", "samples"): (
        SAMPLES,
        {
            "sampling": (parts.sampling, IMAGES),
            "cosine mean similarity, real side": (parts.real_side, IMAGES),
            "cosine mean similarity, compare": (parts.compare, IMAGES),
            "class features": (parts.class_features, IMAGES),
            "classification": (parts.classification, IMAGES),
            "shares, Fréchet distance by class": (parts.frechet, IMAGES),
            "k*": (parts.k_star, IMAGES),
            "find_regions": (parts.find_regions, IMAGES._replace(size=16)),
        },
    ),
    ("latent dimensions", "dims"): (
        LENGTHS,
        {
            "k*": (parts.k_star, IMAGES),
            "Jacobian Gram matrices": (parts.jacobian, LATENTS),
            "manifold entropy of these": (parts.entropies, LATENTS),
        },
    ),
    ("latents", "samples"): (
        [4, 8, 16, 32, 64],
        {
            "Jacobian Gram matrices": (parts.jacobian, LATENTS),
            "manifold entropy of these": (parts.entropies, LATENTS),
        },
    ),
    ("classes", "classes"): (
        NUMBERS,
        {
            "classification": (parts.classification, IMAGES),
            "shares, Fréchet distance by class": (parts.frechet, IMAGES),
            "k*": (parts.k_star, IMAGES),
        },
    ),
    ("regions", "regions"): (
        NUMBERS,
        {
            "cosine mean similarity, real side": (parts.real_side, IMAGES),
            "cosine mean similarity, compare": (parts.compare, IMAGES),
            "find_regions": (parts.find_regions, FEW),
        },
    ),
}
"""By the name of an amount and the field of the setting that it is: its values, and the parts with their base cases."""
ROUNDS = 3
"""Measurements of each size with each of two packages."""


def coloured(n: int, size: int, seed: int = 0) -> Tensor:
    """Returns (n, 3, size, size) bytes, as a loader of photographs holds them."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(64, 3, 8, 8, generator=generator) for _ in range(n // 64)]
    return torch.cat([(255 * F.interpolate(part, size=(size, size), mode="bilinear")).byte() for part in parts])


def region_map(size: int, channels: int = 1) -> Callable[[], RegionMap]:
    images = smooth_images(400, size).float().repeat(1, channels, 1, 1)
    return lambda: find_regions(images, 5, progress=False)


def map_of_a_monitor() -> Callable[[], RegionMap]:
    images = digits(32)[0][:1000]
    return lambda: find_regions(images, 5, max_pixels=1024, progress=False)


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


def latents() -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(9, 10, generator=generator)[torch.arange(1024) % 9] + torch.randn(1024, 10, generator=generator)

    def regions() -> list[Tensor]:
        result = latent_regions(z)
        generator = torch.Generator().manual_seed(0)
        return [*result, *(result.sample(kind, 500, generator) for kind in ("cluster", "margin", "grey"))]

    return regions


def evaluations() -> Callable[[], float]:
    def seconds() -> float:
        seed_everything(0, verbose=False)
        monitor = LatentRegionsMonitor(every_n_epochs=1, max_overhead=None)
        trained(VAE(), digit_batches(), 4, monitor)
        return monitor.seconds / monitor.evaluations

    return seconds


def minimal() -> Callable[[], Any]:
    seed_everything(0, verbose=False)
    model = GAN().eval().requires_grad_(False)
    features = model.generator[:7](torch.randn(256, int(model.hparams["latent_dim"])))
    thirds = torch.arange(32) * 3 // 32
    return lambda: minimal_features(model.generator[7:], features[0], features.mean(0), thirds[:, None] * 3 + thirds)


SIZES: dict[str, Callable[[], Callable[[], Any]]] = {
    **{f"find_regions, 400 of 1x{size}x{size}": partial(region_map, size) for size in (32, 64, 128, 256, 512)},
    "find_regions, 400 of 3x256x256": lambda: region_map(256, 3),
    "find_regions, 1,000 of 1x32x32": map_of_a_monitor,
    "latent_regions, 1,024 of 10": latents,
    "LatentRegionsMonitor, an evaluation": evaluations,
    "minimal_features, 512 sets": minimal,
    "CosineMeanSimilarity, 1,024 of 3x64x64": lambda: cosines(1024, 64),
    "CosineMeanSimilarity, 8,192 of 3x64x64": lambda: cosines(8192, 64),
    "CosineMeanSimilarity, 1,024 of 3x256x256": lambda: cosines(1024, 256),
    "k_star, 10,000 of 128": lambda: neighbours(10_000),
    "k_star, 50,000 of 128": lambda: neighbours(50_000),
}


def measured(name: str) -> tuple[float, float, float, list[NDArray[Any]]]:
    """Returns seconds, GiB at the peak, the GiB before, which libraries and images take, and the numbers of the result."""
    prepared = SIZES[name]()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize() / 2**30
    del prepared
    # prepared anew, since a metric computes its result once
    seconds, result = timed_anew(SIZES[name])
    if isinstance(result, float):
        # the seconds of a part of the call
        return result, peak_memory(), before, []
    parts = (result.labels, result.alignment) if isinstance(result, RegionMap) else result
    return seconds, peak_memory(), before, [part.numpy() for part in parts if isinstance(part, Tensor)]


def against(commit: str, names: list[str]) -> None:
    """Prints the seconds of each size with the package of a commit and with that of today, and how the results differ."""
    print(f"{'':44s} {commit:>10s} {'today':>8s} {'ratio':>6s} {'largest difference of the results':>34s}")
    for name in names:
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(ROUNDS):
            with package_at(commit):
                before, *_, expected = in_own_process(measured, name)
            today, *_, found = in_own_process(measured, name)
            seconds[0].append(before)
            seconds[1].append(today)
        ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
        differ = (np.abs(a.astype(float) - b) for a, b in zip(expected, found, strict=True) if a.size)
        most = max((float(np.nan_to_num(part).max()) for part in differ), default=float("nan"))
        print(f"{name:44s} {min(seconds[0]):10.2f} {min(seconds[1]):8.2f} {ratio:6.2f} {most:34.1e}", flush=True)


def agreement(folder: Path | None) -> dict[str, dict[str, float]]:
    """Prints and returns how well maps of cells agree with the exact one, at 64x64."""
    n, size = 1600, 64
    kinds = {"scenes of 5 regions": scenes(n, 5, 32)[0], "digits, from 8x8": digits(size)[0][:n]}
    if folder is not None:
        kinds["MNIST"] = mnist(folder)[0][:n]
    titles = "".join(f"{f'{count} cells':>12s}" for count in COARSE)
    print(f"\n{'adjusted Rand index, 1 = the same map, 64x64':46s} {'two halves':>10s}{titles}")
    figures = {}
    for name, held in kinds.items():
        x = F.interpolate(held, size=(size, size), mode="bilinear", align_corners=False)
        halves = [find_regions(half, 5, progress=False).labels.flatten() for half in (x[0::2], x[1::2])]
        exact = find_regions(x, 5, progress=False).labels.flatten()
        cells = [find_regions(x, 5, max_pixels=count, progress=False).labels.flatten() for count in COARSE]
        values = [adjusted_rand_index(*halves), *(adjusted_rand_index(exact, found) for found in cells)]
        print(f"  {name:44s} {values[0]:10.2f}" + "".join(f"{value:12.2f}" for value in values[1:]), flush=True)
        figures[name.partition(" ")[0].strip(",").lower()] = dict(
            zip(("halves", *map(str, COARSE)), values, strict=True)
        )
    return figures


@torch.no_grad()
def seconds_of(part: Callable[[Setting], parts.Call], own: Setting) -> float:
    """Returns the seconds of a part, after a run to warm up where that is short."""
    call = part(own)

    def run() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    first = run()
    return first if first > 1 else repeated(run, 0.1, 20)


def exponent(amounts: list[int], seconds: list[float]) -> float:
    """Returns the slope of log seconds over log amount in the upper half of the amounts."""
    upper = slice(len(amounts) // 2, None)
    return float(np.polyfit(np.log(amounts[upper]), np.log(seconds[upper]), 1)[0])


def exponents(only: str) -> list[dict[str, Any]]:
    """Prints the table of seconds against amounts, and returns its rows."""
    rows: list[dict[str, Any]] = []
    for (axis, field), (amounts, measured_parts) in AXES.items():
        print(f"\n{f'seconds by {axis}':36s}" + "".join(f"{amount:>9d}" for amount in amounts) + f"{'exponent':>10s}")
        for name, (part, base) in measured_parts.items():
            if only not in name:
                continue
            # the field is one of the integers
            settings = [base._replace(**{field: amount}) for amount in amounts]  # type: ignore[arg-type]
            seconds = [seconds_of(part, own) for own in settings]
            slope = exponent(amounts, seconds)
            print(f"  {name:34s}" + "".join(f"{value:9.4f}" for value in seconds) + f"{slope:10.2f}", flush=True)
            rows.append({"axis": axis, "part": name, "amounts": amounts, "seconds": seconds, "exponent": slope})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure the names that contain this, and no agreement of maps")
    parser.add_argument("--against", metavar="COMMIT", help="measure the package of a commit as well, and no memory")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's test images")
    parser.add_argument("--exponents", action="store_true", help="measure how the time of each part grows")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.exponents:
        rows = exponents(options.only)
        if options.json:
            print(json.dumps(rows))
        return
    if options.against:
        against(options.against, [name for name in SIZES if options.only in name])
        return
    print(f"{'':44s} {'seconds':>8s} {'GiB at the peak':>16s} {'GiB before':>11s}")
    figures: dict[str, Any] = {"sizes": {}, "agreement": {}}
    for name in SIZES:
        if options.only in name:
            seconds, peak, before, _ = in_own_process(measured, name)
            print(f"{name:44s} {seconds:8.1f} {peak:16.2f} {before:11.2f}", flush=True)
            figures["sizes"][name] = {"seconds": seconds, "gib": peak}
    if not options.only:
        figures["agreement"] = agreement(options.mnist)
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
