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
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lightning_gendiag
from benchmarks.measuring import repeated
from benchmarks.parts import (
    Call,
    Setting,
    class_features,
    classification,
    compare,
    entropies,
    find_regions,
    fit,
    frechet,
    jacobian,
    k_star,
    real_side,
    sampling,
)
from lightning_gendiag.diagnostics.cosine_mean_similarity.metric import MAP_IMAGES
from lightning_gendiag.diagnostics.manifold_entropy.monitor import NUM_LATENTS
from lightning_gendiag.model.amounts import NUM_REFERENCE

SECONDS, RUNS = 0.4, 20
"""Time for which the runs of a part are repeated, and the largest number of them."""

SLOW = 4.0
"""A part whose first run takes more seconds is not repeated: it is slow for another reason than that it comes first."""

PRODUCTS = {
    "mm", "addmm", "addmm_", "mv", "addmv", "dot", "bmm", "baddbmm", "baddbmm_", "convolution", "convolution_backward",
    "_euclidean_dist",
}  # fmt: skip
"""Operations that count as matrix products; the last one computes distances by one."""

PACKAGE = Path(lightning_gendiag.__file__).parent

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
        first = seconds_of(call)
    seconds = first if first > SLOW else repeated(lambda: seconds_of(call), SECONDS, RUNS)
    waits = sum(places.values())
    return Row(part, own.size, own.samples, 1000 * seconds, 1000 * recording.seconds(), waits, dict(places))


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
