"""Measures the parts of the diagnostics on a GPU: their time, that of their matrix products, and how often the host waits.

The images are on the device, and chunks are as large as the library makes them. "products" is the time of the matrix products
and convolutions of a part alone: they are recorded while it runs, and repeated with the same shapes, strides and types. What
a part takes beyond that goes into everything else, such as kernel functions, sums and work of the host. "waits" is the number
of operations for which the host waits for the device, as ``torch.cuda.set_sync_debug_mode`` reports them; their places in the
library follow the table. Without a GPU there are none.

A part that fails is reported, and the others go on. Parts that need a fixed number of images come last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lightning_gendiag
from lightning_gendiag import CosineMeanSimilarity, GenerationBalance, ManifoldEntropy, RegionMap, decoder_gram
from lightning_gendiag import find_regions as regions_found_in
from lightning_gendiag import k_star as k_star_of
from lightning_gendiag.diagnostics.cosine_mean_similarity.metric import MAP_IMAGES
from lightning_gendiag.diagnostics.generation_balance.monitor import FEATURE_WIDTH, PIXEL_WIDTH
from lightning_gendiag.diagnostics.manifold_entropy.monitor import MAX_BYTES, MAX_DIMS, NUM_LATENTS
from lightning_gendiag.functional.arrays import pieces
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.amounts import NUM_REFERENCE
from lightning_gendiag.model.features import FeatureExtractor, KernelClassifier, averaged_pixels, in_chunks

SECONDS, RUNS = 0.4, 20
"""Time for which the runs of a part are repeated, and the largest number of them."""

SLOW = 4.0
"""A part whose first run takes more seconds is not repeated: it is slow for another reason than that it comes first."""

CLASSES, FEATURES, REGIONS = 10, 64, 5
"""Numbers of classes, features and regions."""

PRODUCTS = {
    "mm", "addmm", "addmm_", "mv", "addmv", "dot", "bmm", "baddbmm", "baddbmm_", "convolution", "convolution_backward",
    "_euclidean_dist",
}  # fmt: skip
"""Operations that count as matrix products; the last one computes distances by one."""

PACKAGE = Path(lightning_gendiag.__file__).parent

Call = Callable[[], object]


class Setting(NamedTuple):
    """The amount that a part is measured with."""

    size: int
    """Height and width of the images."""
    samples: int
    """Number of images or latents."""
    device: torch.device

    def images(self, seed: int) -> Tensor:
        """Returns smooth images (N, 3, H, W) in 0..1."""
        generator = torch.Generator(self.device).manual_seed(seed)
        images = torch.empty(self.samples, 3, self.size, self.size, device=self.device)
        for some in pieces(images, 256):
            coarse = torch.rand(len(some), 3, 8, 8, device=self.device, generator=generator)
            some.copy_(F.interpolate(coarse, size=(self.size, self.size), mode="bilinear"))
        return images

    def reference(self) -> Setting:
        """Returns the setting of as many real images as are kept by default."""
        return self._replace(samples=min(self.samples, NUM_REFERENCE))

    def numbers(self, length: int, seed: int = 0) -> Tensor:
        """Returns normal numbers (N, length)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.samples, length, device=self.device, generator=generator)

    def labels(self) -> Tensor:
        """Returns classes (N,)."""
        return torch.arange(self.samples, device=self.device) % CLASSES

    def regions(self) -> RegionMap:
        """Returns a map of equal stripes."""
        return RegionMap((torch.arange(self.size) * REGIONS // self.size)[:, None].expand(-1, self.size))


# ---- the parts: each prepares its data and returns what is timed ----


@cache
def network(size: int, device: torch.device) -> nn.Sequential:
    """Returns a convolutional generator or decoder from latents (N, L) to images (N, 3, size, size)."""
    torch.manual_seed(0)
    wide = 4 * size
    layers: list[nn.Module] = [nn.Unflatten(1, (MAX_DIMS, 1, 1)), nn.ConvTranspose2d(MAX_DIMS, wide, 4)]
    for _ in range((size // 4).bit_length() - 1):
        layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1)]
        wide //= 2
    layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, 3, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers).to(device).eval().requires_grad_(False)


@cache
def judges(own: Setting) -> tuple[FeatureExtractor, KernelClassifier]:
    """Returns the feature extractor and the classifier of :func:`fitted`."""
    return fitted(own.images(0), own.labels())


def fitted(images: Tensor, labels: Tensor) -> tuple[FeatureExtractor, KernelClassifier]:
    """Returns the default feature extractor and classifier of generation balance."""
    extractor = FeatureExtractor(images, FEATURES)

    def responses(some: Tensor) -> Tensor:
        return extractor.responses(some).sqrt()

    known = [None, extractor.reference_responses.sqrt()]
    return extractor, KernelClassifier(
        images, labels, [(averaged_pixels, PIXEL_WIDTH), (responses, FEATURE_WIDTH)], known
    )


def sampling(own: Setting) -> Call:
    made, latents = network(own.size, own.device), own.numbers(MAX_DIMS)
    return lambda: torch.cat([made(some) for some in pieces(latents, ModelAdapter().chunk_size)])


def compared(own: Setting, real: Tensor) -> CosineMeanSimilarity:
    """Returns a metric that has real images, and too few generated ones to take time."""
    metric = CosineMeanSimilarity(own.regions(), reset_real_features=False).to(own.device)
    metric.update(real, real=True)
    metric.update(own._replace(samples=2).images(1), real=False)
    return metric


def real_side(own: Setting) -> Call:
    real = own.images(0)
    return lambda: compared(own, real).compute()


def compare(own: Setting) -> Call:
    metric, generated = compared(own, own.images(0)), own.images(1)
    # the real side is kept
    metric.compute()

    def call() -> object:
        metric.reset()
        metric.update(generated, real=False)
        return metric.compute()

    return call


def class_features(own: Setting) -> Call:
    extractor, images = judges(own.reference())[0], own.images(1)
    return lambda: in_chunks(extractor, images)


def classification(own: Setting) -> Call:
    classifier, images = judges(own.reference())[1], own.images(1)
    return lambda: classifier(images)


def frechet(own: Setting) -> Call:
    real, generated, labels = own.numbers(FEATURES), own.numbers(FEATURES, 1), own.labels()
    confusion = torch.ones(CLASSES, CLASSES) + 90 * torch.eye(CLASSES)

    def call() -> object:
        metric = GenerationBalance(CLASSES, confusion=confusion).to(own.device)
        metric.update(labels, real=True, features=real)
        metric.update(labels, real=False, features=generated)
        return metric.compute()

    return call


def k_star(own: Setting) -> Call:
    labels = own.labels()
    latents = own._replace(samples=CLASSES).numbers(MAX_DIMS)[labels] + 2 * own.numbers(MAX_DIMS, 1)
    return lambda: k_star_of(latents, labels)


def jacobian(own: Setting) -> Call:
    decode, latents = network(own.size, own.device), own.numbers(MAX_DIMS)
    return lambda: decoder_gram(decode, latents, max_bytes=MAX_BYTES)


def entropies(own: Setting) -> Call:
    jacobians = own._replace(samples=own.samples * 2 * MAX_DIMS).numbers(MAX_DIMS).double()
    jacobians = jacobians.view(own.samples, -1, MAX_DIMS)
    grams, order = jacobians.mT @ jacobians, torch.arange(MAX_DIMS)

    def call() -> object:
        metric = ManifoldEntropy(MAX_DIMS, order=order).to(own.device)
        metric.update(grams)
        return metric.compute()

    return call


def fit(own: Setting) -> Call:
    images, labels = own.images(0), own.labels()
    return lambda: fitted(images, labels)


def find_regions(own: Setting) -> Call:
    images = own.images(0)
    return lambda: regions_found_in(images, REGIONS, progress=False)


PARTS: dict[str, Callable[[Setting], Call]] = {
    "sampling": sampling,
    "cosine mean similarity, real side": real_side,
    "cosine mean similarity, compare": compare,
    "class features": class_features,
    "classification": classification,
    "shares, Fréchet distance by class": frechet,
    "k*": k_star,
}
"""Parts that take all images."""

FIXED: dict[str, tuple[Callable[[Setting], Call], int]] = {
    "Jacobian Gram matrices": (jacobian, NUM_LATENTS),
    "manifold entropy of these": (entropies, NUM_LATENTS),
    "features and classifier, fitted": (fit, NUM_REFERENCE),
    "find_regions": (find_regions, MAP_IMAGES),
}
"""Parts for which the library takes a number of images or latents at most."""


# ---- how they are measured ----


class Operand(NamedTuple):
    """What a tensor is recreated from."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        """Returns the operand of a tensor, a tuple of a list, and anything else as it is."""
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.stride(), value.dtype, value.device)
        return tuple(map(cls.of, value)) if isinstance(value, (list, tuple)) else value

    def tensor(self) -> Tensor:
        """Returns such a tensor of ones."""
        numbers = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return torch.ones(max(0, numbers), dtype=self.dtype, device=self.device).as_strided(self.shape, self.stride)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products that are computed inside the context, by their operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Notes the operation if it is a product, and runs it."""
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in PRODUCTS:
            named = tuple((name, Operand.of(value)) for name, value in kwargs.items())
            self.products[func, Operand.of(args), named] += 1
        return func(*args, **kwargs)

    def seconds(self) -> float:
        """Returns the time of all products alone."""
        total = 0.0
        for (func, args, named), count in self.products.items():
            args, named = (
                tree_map(
                    lambda one: one.tensor() if isinstance(one, Operand) else one,
                    given,
                    is_leaf=lambda one: isinstance(one, Operand),
                )
                for given in (args, named)
            )
            func(*args, **dict(named))
            synchronize()
            started = time.perf_counter()
            for _ in range(count):
                func(*args, **dict(named))
            synchronize()
            total += time.perf_counter() - started
        return total


@contextmanager
def noted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts the operations for which the host waits, by their places in the library."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "called a synchronizing" in str(message):
            places[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def place() -> str:
    """Returns the innermost file and line of the library that is running."""
    for frame, line in traceback.walk_stack(None):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{line}"
    return "elsewhere"


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Call) -> float:
    """Returns the time of a run."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


class Row(NamedTuple):
    """What is measured of a part."""

    part: str
    size: int
    samples: int
    ms: float
    products_ms: float
    waits: int
    places: dict[str, int]


@torch.no_grad()
def measured(part: str, prepare: Callable[[Setting], Call], own: Setting) -> Row:
    """Measures a part: the first run, which warms up, counts products and waits; further ones are timed."""
    call = prepare(own)
    with noted_waits(own.device) as places, Recording() as recording:
        times = [seconds_of(call)]
    if times[0] < SLOW:
        times = [seconds_of(call)]
        while sum(times) < SECONDS and len(times) < RUNS:
            times.append(seconds_of(call))
    waits = sum(places.values())
    milliseconds = 1000 * statistics.median(times)
    return Row(part, own.size, own.samples, milliseconds, 1000 * recording.seconds(), waits, dict(places))


def work(sizes: list[int], samples: list[int], device: torch.device) -> Iterator[tuple[str, Any, Setting]]:
    """Yields all parts with what they are measured with."""
    for size in sizes:
        for number in samples:
            for part, prepare in PARTS.items():
                yield part, prepare, Setting(size, number, device)
    for part, (prepare, most) in FIXED.items():
        for size in sizes:
            yield part, prepare, Setting(size, min(most, max(samples)), device)


def main(arguments: list[str] | None = None) -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256], help="heights of the images, powers of two")
    parser.add_argument("--samples", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--only", default="", help="measure the parts whose names contain this")
    parser.add_argument("--limit", type=float, default=45.0, help="seconds after which no part begins")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    name = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    print(f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"{'part':36s}{'size':>6s}{'images':>8s}{'ms':>11s}{'products ms':>13s}{'waits':>7s}")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for part, prepare, own in work(options.sizes, options.samples, device):
        if options.only not in part:
            continue
        title = f"{part:36s}{own.size:6d}{own.samples:8d}"
        if time.monotonic() - started > options.limit:
            failed[title] = "left out, since the time was over"
            print(f"{title}  {failed[title]}", flush=True)
            continue
        try:
            row = measured(part, prepare, own)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            failed[title] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{title}  {failed[title]}", flush=True)
        else:
            rows.append(row)
            print(f"{title}{row.ms:11.2f}{row.products_ms:13.2f}{row.waits:7d}", flush=True)
        if device.type == "cuda":
            # metrics hold themselves, and with them their images
            gc.collect()
            torch.cuda.empty_cache()
    print("\nwhere the host waits, at the largest amount of each part")
    for row in {row.part: row for row in rows}.values():
        for at, count in sorted(row.places.items(), key=lambda item: -item[1]):
            print(f"{row.part:36s}{at:60s}{count:7d}")
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if options.json:
        measurements = [row._asdict() for row in rows]
        print(json.dumps({"card": name, "torch": torch.__version__, "rows": measurements, "failed": failed}))


if __name__ == "__main__":
    # what is imported need not be searched each time that memory is freed
    gc.freeze()
    main()
