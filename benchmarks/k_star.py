"""Measures time and memory of ``k_star``, and prints k* of several features of real digits."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from benchmarks.measuring import in_own_process, peak_memory, rounded, timed, trained
from example_models.data import digit_batches, digits
from example_models.vae import VAE
from lightning_gendiag import k_star


def clusters(n: int, d: int = 128, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Returns latents (n, d) around a centre for each class, and labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator)
    return centres[labels] + 2 * torch.randn(n, d, generator=generator), labels


def by_sorting(latents: Tensor, labels: Tensor) -> Tensor:
    """Returns k* (N,) by a distance matrix and a sort: the position of the first of another class."""
    order = torch.cdist(latents, latents).argsort(1)
    other = labels[order] != labels[:, None]
    return other.int().argmax(1) / torch.bincount(labels)[labels]


def large(n: int) -> tuple[float, float]:
    """Returns seconds, and GiB beyond the latents, for n latents."""
    latents, labels = clusters(n)
    k_star(latents[:100], labels[:100])
    before = peak_memory()
    return timed(lambda: k_star(latents, labels))[0], peak_memory() - before


def speed() -> dict[str, float]:
    """Prints and returns how fast k* is."""
    seconds, memory = in_own_process(large, 50_000)
    print(f"N = 50,000, D = 128: {seconds:.1f} s, {memory:.2f} GiB more at the peak")
    latents, labels = clusters(10_000)
    ours, result = timed(lambda: k_star(latents, labels))
    slow, expected = timed(lambda: by_sorting(latents, labels))
    same = float(((result.values - expected).abs() < 1e-6).double().mean())
    print(f"N = 10,000, D = 128: {ours:.2f} s against {slow:.2f} s by distance matrix and sort", end="")
    print(f", {slow / ours:.1f} times faster; {same:.2%} of the values are equal (the other sorts rounded distances)")
    return {"seconds_50000": seconds, "gib_50000": memory, "seconds_10000": ours, "ratio": slow / ours}


def digits_table(epochs: int = 30) -> list[dict[str, Any]]:
    """Prints and returns k* of pixels, and of an encoder that is untrained, trained without labels, and with labels."""
    images, labels = digits(32)
    seed_everything(0, verbose=False)
    model = VAE(latent_dim=10)
    features = {"pixels": images.flatten(1)}
    with torch.no_grad():
        features["untrained VAE encoder"] = model.eval().encode(images)[0]
    trained(model.train(), digit_batches(), epochs)
    with torch.no_grad():
        features["trained VAE encoder"] = model.eval().encode(images)[0]
    seed_everything(0, verbose=False)
    classifier = nn.Sequential(VAE(latent_dim=16).encoder, nn.SiLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        features["trained classifier, last layer but one"] = classifier[0](images)
    titles = ("mean k*", "true skewness", "approximate skewness", "fractured, overlapped, clustered")
    print(f"| features of 1,797 digits | {' | '.join(titles)} |\n|---|---|---|---|---|")
    rows = []
    for name, latents in features.items():
        r = k_star(latents, labels)
        row: dict[str, Any] = {
            "features": name, "mean": float(r.values.mean()), "true_skewness": float(r.true_skewness),
            "approximate_skewness": float(r.approximate_skewness),
            "patterns": [r.pattern.count(word) for word in ("fractured", "overlapped", "clustered")],
        }  # fmt: skip
        rows.append(row)
        numbers = f"{row['mean']:.3f} | {row['true_skewness']:.2f} | {row['approximate_skewness']:.2f}"
        print(f"| {name} | {numbers} | {', '.join(map(str, row['patterns']))} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    figures = {**speed(), "digits": digits_table()}
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
