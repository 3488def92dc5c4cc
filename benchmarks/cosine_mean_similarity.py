"""How fast is ``cosine_mean_similarity``, and what does it cost beside the definition with its M x N x D array?"""

from __future__ import annotations

import resource
import time

import torch
from torch import Tensor

from lightning_gendiag import CosineMeanSimilarity, RegionMap, cosine_mean_similarity


def definition(generated: Tensor, real: Tensor, inside: Tensor, gamma: float) -> float:
    """One region, unbiased, with all differences held at once."""
    x, y = generated[:, :, inside].flatten(1), real[:, :, inside].flatten(1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-gamma * (a[:, None] - b[None]).square().sum(-1))

    def norm(a: Tensor) -> Tensor:
        k, n = kernel(a, a), len(a)
        return (k.sum() - n) / (n * (n - 1))

    return float(kernel(x, y).mean() / (norm(x) * norm(y)).sqrt())


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64)[:, None].ge(32).long() * 2 + torch.arange(64).ge(32).long()
    regions = RegionMap(labels)
    real, generated = (torch.rand(2048, 3, 64, 64, generator=generator) for _ in range(2))
    before = peak()
    started = time.perf_counter()
    cosine_mean_similarity(generated, real, regions)
    whole = time.perf_counter() - started
    print(
        f"2048 against 2048 images of 3x64x64, 4 regions: {whole:.1f} s, {peak() - before:.2f} GiB over the images' own"
    )

    metric = CosineMeanSimilarity(regions, reset_real_features=False)
    metric.update(real, real=True)
    times = []
    for _ in range(2):
        metric.reset()
        metric.update(generated, real=False)
        started = time.perf_counter()
        metric.compute()
        times.append(time.perf_counter() - started)
    print(f"as a metric with its null: first evaluation {times[0]:.1f} s, the next, real side cached, {times[1]:.1f} s")

    few = 192
    result = cosine_mean_similarity(generated[:few], real[:few], regions, bandwidth=1e-3)
    started = time.perf_counter()
    for _ in range(3):
        cosine_mean_similarity(generated[:few], real[:few], regions, bandwidth=1e-3)
    ours = (time.perf_counter() - started) / 3
    started = time.perf_counter()
    values = [definition(generated[:few], real[:few], labels == r, 1e-3) for r in range(4)]
    slow = time.perf_counter() - started
    error = max(abs(float(a) - b) for a, b in zip(result.regions, values, strict=True))
    print(
        f"{few} images: {ours * 1e3:.0f} ms against {slow * 1e3:.0f} ms by the definition, {slow / ours:.0f} times faster"
    )
    print(f"largest difference: {error:.1e} (float32)")


if __name__ == "__main__":
    main()
