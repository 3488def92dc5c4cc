"""Memory is bounded: matrices of N x N or P x P are computed in blocks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gendiag import CosineMeanSimilarity, decoder_gram, find_regions, k_star

GENERATOR = torch.Generator().manual_seed(0)


def gram() -> Callable[[], Any]:
    z = torch.randn(32, 64, generator=GENERATOR)
    decoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 12288))
    return lambda: decoder_gram(decoder, z, max_bytes=1 << 22)


def cosines() -> Callable[[], Any]:
    metric = CosineMeanSimilarity(torch.arange(64).repeat(64, 1) // 16)
    for real in (True, False):
        metric.update((255 * torch.rand(512, 3, 64, 64, generator=GENERATOR)).byte(), real=real)
    return metric.compute


def regions() -> Callable[[], Any]:
    images = torch.rand(100, 1, 128, 128, generator=GENERATOR)
    return lambda: find_regions(images, 5, max_pixels=1024, max_bytes=1 << 26, progress=False)


def neighbours() -> Callable[[], Any]:
    latents, labels = torch.rand(20000, 8, generator=GENERATOR), torch.arange(20000) % 10
    return lambda: k_star(latents, labels)


CASES: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {
    # all Jacobians together take 96 MiB in float32, and their tangents several times as much
    "decoder_gram": (gram, 60),
    # all differences in one region take 3,072 MiB; one set of images takes 24 MiB in float32
    "cosine_mean_similarity": (cosines, 150),
    # all alignments of pixels take 1,024 MiB
    "find_regions": (regions, 250),
    # all distances take 1,526 MiB
    "k_star": (neighbours, 400),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory statistics of Linux")
def test_peaks_of_memory_are_those_of_a_block() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_memory"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    for name, peak in json.loads(done.stdout).items():
        assert peak < CASES[name][1], name


def kibibytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def main() -> None:
    torch.set_num_threads(1)
    # torch imports modules when derivatives are first computed
    decoder_gram(nn.Linear(2, 2), torch.zeros(1, 2))
    peaks = {}
    for name, (make, _) in CASES.items():
        work = make()
        # this resets the peak
        Path("/proc/self/clear_refs").write_text("5")
        before = kibibytes("VmRSS")
        work()
        peaks[name] = (kibibytes("VmHWM") - before) / 1024
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
