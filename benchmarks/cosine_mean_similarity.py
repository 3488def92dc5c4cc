"""Measures time and memory of ``cosine_mean_similarity`` beside the definition, which holds an (M, N, D) array."""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import peak_memory, rounded, timed, timed_anew
from lightning_gendiag import CosineMeanSimilarity, CosineMeanSimilarityResult, RegionMap, cosine_mean_similarity

FEW = 192
"""Number of images for which the definition is computed."""


def definition(generated: Tensor, real: Tensor, inside: Tensor, gamma: float) -> float:
    """Returns the unbiased similarity of one region, with all differences in memory at once."""
    x, y = generated[:, :, inside].flatten(1), real[:, :, inside].flatten(1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-gamma * (a[:, None] - b[None]).square().sum(-1))

    def norm(a: Tensor) -> Tensor:
        k, n = kernel(a, a), len(a)
        return (k.sum() - n) / (n * (n - 1))

    return float(kernel(x, y).mean() / (norm(x) * norm(y)).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64)[:, None].ge(32).long() * 2 + torch.arange(64).ge(32).long()
    regions = RegionMap(labels)
    real, generated = (torch.rand(2048, 3, 64, 64, generator=generator) for _ in range(2))
    before = peak_memory()
    whole, _ = timed(lambda: cosine_mean_similarity(generated, real, regions))
    print(f"2048 against 2048 images of 3x64x64, 4 regions: {whole:.1f} s", end="")
    print(f", {peak_memory() - before:.2f} GiB beyond the images")

    def metric_of_real() -> CosineMeanSimilarity:
        metric = CosineMeanSimilarity(regions, reset_real_features=False)
        metric.update(real, real=True)
        return metric

    def evaluate(metric: CosineMeanSimilarity) -> CosineMeanSimilarityResult:
        metric.reset()
        metric.update(generated, real=False)
        return metric.compute()

    first, _ = timed_anew(lambda: partial(evaluate, metric_of_real()))
    later, _ = timed(partial(evaluate, metric_of_real()))
    print(f"as a metric with its null: first evaluation {first:.1f} s, later ones, real side cached, {later:.1f} s")

    x, y = generated[:FEW], real[:FEW]
    ours, result = timed(lambda: cosine_mean_similarity(x, y, regions, bandwidth=1e-3))
    slow, values = timed(lambda: [definition(x, y, labels == r, 1e-3) for r in range(4)])
    error = max(abs(float(a) - b) for a, b in zip(result.regions, values, strict=True))
    print(f"{FEW} images: {ours * 1e3:.0f} ms against {slow * 1e3:.0f} ms by the definition", end="")
    print(f", {slow / ours:.0f} times faster; largest difference: {error:.1e} (float32)")
    if options.json:
        print(json.dumps(rounded({"seconds": whole, "first": first, "later": later, "ratio": slow / ours})))


if __name__ == "__main__":
    main()
