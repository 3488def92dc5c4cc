"""Gruber, Ziegler, Buettner, *Disentangling Mean Embeddings for Better Diagnostics of Image Generators*: regions of a DCGAN."""

# modules as users write them, whose parts are of any type to a checker
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from benchmarks.papers.study import Finding, Part, holds
from benchmarks.zoo.data import load
from benchmarks.zoo.gans import convolutional_critic, convolutional_generator
from lightning_gendiag import CosineMeanSimilarityResult, RegionMap, cosine_mean_similarity, find_regions
from lightning_gendiag.detection import alarm_positions
from lightning_gendiag.regions.pixel_cka import median_bandwidth

SETS = ("mnist", "faces")
"""Grey images of 16x16 pixels: handwritten digits, and crops of photographs of faces."""

STEPS, EVERY, GENERATED, REFERENCE = 600, 15, 300, 400
"""Number of training steps, of steps between evaluations, and of images of both sides of an evaluation."""


@cache
def images_of(name: str) -> Tensor:
    """Returns images (N, 1, 16, 16), shuffled; of the faces only those that are faces."""
    data = load(name)
    images = data.images[data.labels == 1] if name == "faces" else data.images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def samples(name: str, lr: float, seed: int) -> Iterator[Tensor]:
    """Trains a DCGAN, and yields generated images at each evaluation."""
    torch.manual_seed(seed)
    real = images_of(name)
    generator, discriminator = convolutional_generator(24, 12), convolutional_critic(12, nn.BatchNorm2d)
    of_d, of_g = (torch.optim.Adam(part.parameters(), lr, betas=(0.5, 0.999)) for part in (discriminator, generator))
    noise = torch.randn(GENERATED, 24, generator=torch.Generator().manual_seed(1))
    for step in range(1, STEPS + 1):
        batch = real[torch.randint(len(real), (64,))]
        fake = generator(torch.randn(64, 24))
        loss_d = F.softplus(-discriminator(batch)).mean() + F.softplus(discriminator(fake.detach())).mean()
        of_d.zero_grad()
        loss_d.backward()
        of_d.step()
        loss_g = F.softplus(-discriminator(fake)).mean()
        of_g.zero_grad()
        loss_g.backward()
        of_g.step()
        if step % EVERY == 0:
            with torch.no_grad():
                yield generator(noise)


def product(result: CosineMeanSimilarityResult) -> float:
    """Returns the product of the similarities of regions."""
    return float(result.regions.prod())


def factors(seed: int) -> Part:
    """The product over 2, 5 and 50 regions against the similarity of the image, while a DCGAN trains."""
    rows: list[list[Any]] = []
    misses: dict[str, dict[int, float]] = {}
    for name in SETS:
        real = images_of(name)[:REFERENCE]
        maps = {r: find_regions(images_of(name)[:1000], r, method="paper", progress=False) for r in (2, 5, 50)}
        drawn = list(samples(name, 2e-4 if name == "mnist" else 5e-4, seed))
        misses[name] = {}
        for r, regions in maps.items():
            results = [cosine_mean_similarity(x, real, regions, "image", unbiased=False) for x in drawn]
            image, products = [float(one.image) for one in results], [product(one) for one in results]
            miss = statistics.mean(abs(math.log(p / i)) for p, i in zip(products, image, strict=True))
            misses[name][r] = miss
            rows.append(
                [
                    name,
                    r,
                    image[0],
                    image[-1],
                    products[-1],
                    miss,
                    statistics.correlation(image, products),
                    regions.dependence,
                ]
            )
    findings = [
        Finding(
            f"the product over 2 and 5 regions follows the similarity of the image closely, that over 50 less ({name})",
            ", ".join(f"{miss:.3f} with {r}" for r, miss in of.items()) + " (mean difference of the logarithms)",
            holds(max(of[2], of[5]) < 0.05, max(of[2], of[5]) < of[50]),
        )
        for name, of in misses.items()
    ]
    columns = [
        "images",
        "regions",
        "image, first",
        "image, last",
        "product, last",
        "mean difference of logarithms",
        "correlation",
        "dependence of regions",
    ]
    return Part(columns, rows, findings)


RATES = (2e-4, 1e-3, 3e-3, 1e-2)
SEEDS = 2
FELL = 0.1
"""A run collapsed if the image's similarity ends this far below its highest value, as a mean over the last evaluations."""


def collapse(seed: int) -> Part:
    """Learning rates at which the training collapses: what names it first, a region or the image."""
    rows: list[list[Any]] = []
    ahead, together, behind, collapsed = 0, 0, 0, 0
    fell_most: list[float] = []
    for name, rate in itertools.product(SETS, RATES):
        real = images_of(name)[:REFERENCE]
        regions = find_regions(images_of(name)[:1000], 5, progress=False)
        falls, firsts, named = [], [], []
        for number in range(SEEDS):
            results = [cosine_mean_similarity(x, real, regions) for x in samples(name, rate, seed + number)]
            image = [float(one.image) for one in results]
            parts = torch.stack([one.regions for one in results])
            best = max(range(len(image)), key=image.__getitem__)
            falls.append(image[best] - statistics.mean(image[-5:]))
            alarms = {regions.names[r]: _alarm(parts[:, r].tolist()) for r in range(5) if r != regions.background}
            first_region, first_image = min(alarms.values()), _alarm(image)
            firsts.append((first_region, first_image))
            if falls[-1] > FELL:
                collapsed += 1
                lost = (parts[best] / parts[-5:].mean(0).clamp(min=1e-6)).log()
                fell_most.append(float(lost.max() / lost.clamp(min=0).sum()))
                named.append(regions.names[int(lost.argmax())])
            ahead += first_region < first_image
            together += first_region == first_image < math.inf
            behind += first_image < first_region
        said = [f"{_at(region)} and {_at(whole)}" for region, whole in firsts]
        rows.append(
            [
                name,
                f"{rate:g}",
                f"{sum(fall > FELL for fall in falls)} of {SEEDS}",
                max(falls),
                "; ".join(said),
                ", ".join(named) or "none",
            ]
        )
    findings = [
        Finding(
            "training of a DCGAN collapses at some learning rates",
            f"{collapsed} of {len(RATES) * SEEDS * len(SETS)} runs lost more than {FELL} of their highest similarity",
            holds(collapsed > 0),
        ),
        Finding(
            "regions are named before the number of the image shows the collapse",
            f"the first alarm was a region's in {ahead} runs, the image's in {behind}, and both came together "
            f"in {together}",
            holds(ahead > behind + together, ahead > 0),
        ),
        Finding(
            "a few regions carry the collapse and are named",
            f"the region that fell most carries {statistics.mean(fell_most):.0%} of the fall of the product "
            "(an even share is 20%)"
            if fell_most
            else "no run collapsed",
            holds(bool(fell_most) and statistics.mean(fell_most) > 0.3),
        ),
    ]
    columns = [
        "images",
        "learning rate",
        "collapsed",
        "largest fall of the image",
        "first alarm of a region and of the image, in evaluations",
        "fell most",
    ]
    return Part(columns, rows, findings)


def _alarm(values: list[float]) -> float:
    """The evaluation at which an alarm about a similarity opens, or inf."""
    found = alarm_positions([-math.log(max(1e-6, value)) for value in values], 3e-4 / 6)
    return found[0] if found else math.inf


def _at(position: float) -> str:
    return f"{position:.0f}" if position < math.inf else "none"


def hybrids(images: Tensor, regions: RegionMap, share: float, seed: int) -> Tensor:
    """Returns images whose regions come each from an image of its own, but for a share that is left as it is."""
    generator = torch.Generator().manual_seed(seed)
    n = len(images)
    whole = torch.rand(n, generator=generator) < share
    mixed = torch.zeros_like(images)
    for r in range(regions.num_regions):
        source = torch.where(whole, torch.arange(n), torch.randperm(n, generator=generator))
        mixed = torch.where(regions.mask(r), images[source], mixed)
    return mixed


def dependence(seed: int) -> Part:
    """Open question: what happens where regions depend on each other."""
    rows: list[list[Any]] = []
    values = []
    for name in SETS:
        images = images_of(name)[:800]
        regions = find_regions(images, 5, progress=False)
        for share in (0.0, 0.5, 1.0):
            mixed = hybrids(images, regions, share, seed)
            real, generated = mixed[:400], mixed[400:]
            # each image is blurred before it is mixed, so that no region holds anything of another one's image
            blurred = hybrids(F.avg_pool2d(images, 5, 1, 2, count_include_pad=False), regions, share, seed)[400:]
            before, whole = (cosine_mean_similarity(x, real, regions) for x in (generated, blurred))
            candidates = [r for r in range(5) if r != regions.background]
            harmed = [
                cosine_mean_similarity(torch.where(regions.mask(r), blurred, generated), real, regions)
                for r in candidates
            ]
            falls = [(before.regions / one.regions).log() for one in harmed]
            right = sum(int(fall.argmax()) == r for r, fall in zip(candidates, falls, strict=True))
            one_by_one = statistics.mean(abs(float(one.residual)) for one in harmed)
            row = [abs(float(before.residual)), one_by_one, abs(float(whole.residual))]
            rows.append([name, share, *row, float(whole.image), f"{right} of {len(candidates)}"])
            values.append((share, *row, right, len(candidates)))
    independent = [v for v in values if v[0] == 0]
    dependent = [v for v in values if v[0] == 1]
    named = sum(v[4] for v in dependent), sum(v[5] for v in dependent)
    most = [max(max(v[1:4]) for v in some) for some in (independent, dependent)]
    findings = [
        Finding(
            "Theorem 1: the image's similarity is the product where regions are independent",
            f"the logarithms differ by at most {most[0]:.3f} where regions of real images are shuffled, and by up to "
            f"{most[1]:.3f} where they are left together",
            holds(most[0] < 0.02, most[0] < most[1] / 2),
        ),
        Finding(
            "open question: what happens when the independence assumption is violated?",
            f"with the dependence of real images, the region that was blurred fell most in {named[0]} of "
            f"{named[1]} cases",
            "answered",
        ),
    ]
    columns = [
        "images",
        "share left together",
        "difference of logarithms, healthy",
        "one region blurred",
        "all regions blurred",
        "similarity of the image, all blurred",
        "blurred region falls most",
    ]
    return Part(columns, rows, findings)


def clustering(seed: int) -> Part:
    """Open question: how sensitive the regions are to the clustering and to the bandwidth."""
    rows: list[list[Any]] = []
    agreements: dict[str, list[float]] = {"clustering": [], "bandwidth": []}
    ways: dict[str, dict[str, Any]] = {
        "average": {"method": "paper"},
        "complete": {"method": "paper", "linkage": "complete"},
        "ward": {"method": "paper", "linkage": "ward"},
        "balanced": {"method": "balanced"},
        "average, bandwidth / 4": {"method": "paper", "factor": 0.25},
        "average, bandwidth x 4": {"method": "paper", "factor": 4.0},
    }
    for name in SETS:
        images = images_of(name)[:1000]
        gamma = float(median_bandwidth(images.flatten(1)))
        first: RegionMap | None = None
        for way, options in ways.items():
            own = dict(options)
            regions = find_regions(images, 5, gamma * own.pop("factor", 1.0), progress=False, **own)
            first = first or regions
            agreement = float(adjusted_rand_score(first.labels.flatten(), regions.labels.flatten()))
            if regions is not first:
                agreements["bandwidth" if "bandwidth" in way else "clustering"].append(agreement)
            largest, smallest = (
                float(size / regions.sizes.sum()) for size in (regions.sizes.max(), regions.sizes.min())
            )
            result = cosine_mean_similarity(images[500:900], images[:500], regions, "image", unbiased=False)
            rows.append([name, way, agreement, regions.stability, largest, smallest, abs(float(result.residual))])
    findings = [
        Finding(
            "open question: how sensitive is the clustering to its choices?",
            "maps of other clusterings agree with average linkage at an adjusted Rand index of "
            f"{min(agreements['clustering']):.2f} to "
            f"{max(agreements['clustering']):.2f}, maps of other bandwidths at "
            f"{min(agreements['bandwidth']):.2f} to {max(agreements['bandwidth']):.2f}",
            "answered",
        )
    ]
    columns = [
        "images",
        "clustering",
        "agreement with the first",
        "agreement of halves",
        "largest region",
        "smallest region",
        "difference of logarithms, real against real",
    ]
    return Part(columns, rows, findings)


def resolution(seed: int) -> Part:
    """Open question: higher resolution. The same digits at several sizes: time, maps, and what a fault shows."""
    digits = load("mnist28").images[torch.randperm(5000, generator=torch.Generator().manual_seed(seed))[:800]]
    rows: list[list[Any]] = []
    deviations = []
    for size in (8, 16, 32, 64):
        images = F.interpolate(
            F.pad(digits, (2, 2, 2, 2), value=-1.0), (size, size), mode="area" if size < 32 else "bilinear"
        )
        started = time.process_time()
        regions = find_regions(images[:400], 5, progress=False)
        seconds = time.process_time() - started
        real, generated = images[:400], images[400:]
        corner = torch.zeros(size, size, dtype=torch.bool)
        corner[size // 4 : size // 2, size // 2 : 3 * size // 4] = True
        frozen = torch.where(corner, generated[:1], generated)
        results = [
            cosine_mean_similarity(frozen, real, regions, bandwidth, null_splits=64)
            for bandwidth in ("region", "image")
        ]
        deviation = [float(-one.z.min()) for one in results]
        deviations.append(deviation[0])
        best = max(range(5), key=lambda r: regions.overlap(r, corner))
        rows.append(
            [
                f"{size}x{size}",
                seconds,
                regions.stability,
                *deviation,
                "yes" if int(results[0].z.argmin()) == best else "no",
            ]
        )
    findings = [
        Finding(
            "open question: how does it scale to higher resolution? (the cost of the map is quadratic in the "
            "number of pixels)",
            f"a map takes {rows[0][1]:.2f} s at 8x8 and {rows[-1][1]:.1f} s at 64x64; a frozen patch lies "
            f"{deviations[0]:.0f} deviations below "
            f"real at 8x8 and {deviations[-1]:.0f} at 64x64",
            "answered",
        )
    ]
    columns = [
        "size",
        "seconds for a map of 400 images",
        "agreement of halves",
        "deviations of a frozen patch",
        "with one bandwidth",
        "its region falls most",
    ]
    return Part(columns, rows, findings)


def conditional(seed: int) -> Part:
    """Open question: conditional models. One class is drawn as another, or in one region only."""
    data = load("mnist")
    images, labels = data.images, data.labels
    regions = find_regions(images[torch.randperm(len(images))[:1000]], 5, progress=False)
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Any]] = []
    right = 0
    low: list[float] = []
    for swapped, other in ((3, 8), (4, 9), (7, 1), (0, 6), (5, 2)):
        values, whole = [], []
        for k in range(10):
            of_class = images[labels == k][torch.randperm(500, generator=generator)]
            source = images[labels == other][torch.randperm(500, generator=generator)] if k == swapped else of_class
            whole.append((source[250:], of_class[:250]))
            values.append(float(cosine_mean_similarity(source[250:], of_class[:250], regions).image))
        everything = cosine_mean_similarity(
            torch.cat([a for a, _ in whole]), torch.cat([b for _, b in whole]), regions, null_splits=64
        )
        lowest = min(range(10), key=values.__getitem__)
        right += lowest == swapped
        low.append(float(everything.image))
        rest = min(value for k, value in enumerate(values) if k != swapped)
        rows.append([f"{swapped} drawn as {other}", float(everything.image), values[swapped], rest, lowest])
    findings = [
        Finding(
            "open question: can it be used for conditional models?",
            f"similarities within classes named the wrong class in {right} of 5 cases, while that of all "
            f"images stayed at {min(low):.3f} or above",
            "answered",
        )
    ]
    return Part(["fault", "all images", "the class", "lowest other class", "class named"], rows, findings)


PARTS: dict[str, Callable[[int], Part]] = {
    "factors": factors,
    "collapse": collapse,
    "dependence": dependence,
    "clustering": clustering,
    "resolution": resolution,
    "conditional": conditional,
}
