"""Repeats the study of VAEs with 2 and 3 latent dimensions by Zhou and Guo, and prints their three tables beside ours.

``--mnist FOLDER`` reads idx files: the 60,000 training images where they are there, else the 10,000 test images. Without it
scikit-learn's digits are used. Absolute FID and IS depend on the feature network (theirs is Inception, ours needs no
download), so the order is compared. The study takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measuring import rounded, trained
from example_models.data import digits, mnist
from example_models.vae import VAE
from lightning_gendiag import (
    GenerationBalanceMonitor,
    GenerationBalanceResult,
    LatentRegionsMonitor,
    LatentRegionsResult,
    ModelAdapter,
)
from lightning_gendiag.diagnostics.latent_regions.functional import KINDS

THEIR_FID = {2: {"prior": 112.9, "margin": 220.9}, 3: {"prior": 107.7, "margin": 188.9}}
THEIR_IS = {2: {"prior": 5.6, "margin": 11.3}, 3: {"prior": 6.3, "margin": 20.9}}
THEIR_SHARE = {
    2: (14.76, 12.62, 8.59, 22.17, 13.92, 1.18, 11.97, 6.69, 1.89, 6.21),
    3: (9.83, 22.74, 4.92, 14.18, 15.84, 8.08, 6.96, 8.94, 5.83, 2.71),
}
"""Percentages of 30,000 images, from the counts that they print."""
THEIR_CLASS_FID = {
    2: (207.5, 171.6, 210.5, 197.6, 191.4, 228.2, 251.2, 258.5, 218.7, 231.8),
    3: (239.7, 127.0, 175.0, 171.9, 134.1, 189.8, 201.1, 142.4, 165.2, 141.6),
}
ROUNDS = 3


class Study(NamedTuple):
    """What is measured of one VAE."""

    balance: GenerationBalanceResult
    regions: list[LatentRegionsResult]
    """One for each round of sampling."""

    @property
    def fid(self) -> Tensor:
        """(4,) means over the rounds."""
        return torch.stack([regions.fid for regions in self.regions]).nanmean(0)

    @property
    def inception(self) -> Tensor:
        """(4,) means over the rounds."""
        return torch.stack([regions.inception for regions in self.regions]).nanmean(0)


def study(latent_dim: int, images: Tensor, labels: Tensor, epochs: int, samples: int, seed: int) -> Study:
    """Trains one VAE and evaluates it once, at the end."""
    seed_everything(seed, verbose=False)
    data = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    size = min(len(images), 5000)
    common: dict[str, Any] = {"every_n_epochs": epochs, "on_error": "raise", "log_images": False}

    def adapter(number: int, **more: Any) -> ModelAdapter:
        return ModelAdapter(reference=(images, labels), num_reference=size, seed=seed + number, **more)

    balance = GenerationBalanceMonitor(adapter=adapter(0, num_samples=samples), **common)
    # a later round has the same latents, and samples other points
    rounds = [LatentRegionsMonitor(10, adapter=adapter(k), name=f"round_{k}", **common) for k in range(ROUNDS)]
    trained(VAE(latent_dim, noise=0.6), data, epochs, balance, *rounds)
    return Study(balance.result, [monitor.result for monitor in rounds])


def row(name: str, values: Any, form: str = "8.2f") -> None:
    print(f"  {name:28s}" + "".join(f"{value:{form}}" for value in values))


def tables(studies: dict[int, Study]) -> None:
    """Prints the three tables, theirs and ours."""
    print("\n1. Quality by kind of point: general (prior), margins; and, not in theirs, clusters and grey area")
    row("", KINDS, ">8s")
    for dims, s in studies.items():
        nan = float("nan")
        row(f"{dims}-D FID", s.fid.tolist())
        row(f"{dims}-D FID, theirs", [THEIR_FID[dims].get(kind, nan) for kind in KINDS])
        row(f"{dims}-D IS", s.inception.tolist())
        row(f"{dims}-D IS, theirs", [THEIR_IS[dims].get(kind, nan) for kind in KINDS])
    first = next(iter(studies.values())).balance
    print(f"\n2. Classes of {int(first.generated_count.sum())} generated images, in per cent")
    row("", range(10), "8d")
    row("real", (100 * first.real_share).tolist())
    for dims, s in studies.items():
        row(f"{dims}-D", (100 * s.balance.generated_share).tolist())
        row(f"{dims}-D, theirs", THEIR_SHARE[dims])
    print("\n3. FID within each class")
    row("", range(10), "8d")
    for dims, s in studies.items():
        row(f"{dims}-D", s.balance.fid.tolist())
        row(f"{dims}-D, theirs", THEIR_CLASS_FID[dims])


def findings(studies: dict[int, Study]) -> None:
    """Prints which of their findings are reproduced."""
    two, three = studies[2], studies[3]

    def report(finding: str, holds: bool, figures: str) -> None:
        print(f"  {'reproduced' if holds else 'NOT reproduced':15s} {finding}: {figures}")

    def named(which: Tensor) -> str:
        return ", ".join(str(int(c)) for c in which.nonzero()[:, 0]) or "none"

    print("\nFindings")
    for dims, s in studies.items():
        b = s.balance
        report(
            f"generation is unbalanced, {dims}-D", bool((b.dropped | b.dominating).any()),
            f"{float(b.imbalance):.0%} would have to change class (theirs {_imbalance(dims, b):.0%}); dropped: "
            f"{named(b.dropped)}; dominating: {named(b.dominating)}",
        )  # fmt: skip
    report(
        "imbalance shrinks with dimension", bool(three.balance.imbalance < two.balance.imbalance),
        f"{float(two.balance.imbalance):.0%} to {float(three.balance.imbalance):.0%}",
    )  # fmt: skip
    for dims, s in studies.items():
        prior, cluster, margin, grey = s.fid.tolist()
        report(
            f"margins are worse than general samples, {dims}-D", margin > prior, f"FID {margin:.1f} against {prior:.1f}"
        )
        report(
            f"margins are worse than clusters, {dims}-D", margin > cluster, f"FID {margin:.1f} against {cluster:.1f}"
        )
        report(
            f"the grey area is worse than clusters, {dims}-D", grey > cluster, f"FID {grey:.1f} against {cluster:.1f}"
        )
        share = torch.stack([r.grey_classes for r in s.regions]).mean(0)
        first = share.topk(3).indices.sort().values.tolist()
        report(
            f"the grey area holds 3, 5 and 8, {dims}-D", first == [3, 5, 8],
            "most are of " + ", ".join(f"{c} ({float(share[c]):.0%} of it)" for c in share.topk(4).indices.tolist()),
        )  # fmt: skip
    better = three.balance.fid < two.balance.fid
    report(
        "most classes improve with dimension", int(better.sum()) > 5,
        f"{int(better.sum())} of 10 (theirs 9), mean FID {float(two.balance.fid.nanmean()):.1f} to "
        f"{float(three.balance.fid.nanmean()):.1f}",
    )  # fmt: skip
    report(
        "general samples improve with dimension",
        bool(three.fid[0] < two.fid[0]),
        f"FID {two.fid[0]:.1f} to {three.fid[0]:.1f}",
    )


def figures(studies: dict[int, Study]) -> dict[str, Any]:
    """Returns what the page shows, by the number of dimensions, and in how many classes more dimensions help."""
    found: dict[str, Any] = {}
    for dims, s in studies.items():
        most = torch.stack([r.grey_classes for r in s.regions]).mean(0).topk(4).indices.tolist()
        theirs = {
            "fid": THEIR_FID[dims], "imbalance": _imbalance(dims, s.balance),
            "class_fid": sum(THEIR_CLASS_FID[dims]) / len(THEIR_CLASS_FID[dims]),
        }  # fmt: skip
        found[str(dims)] = {
            "fid": dict(zip(KINDS, s.fid.tolist(), strict=True)), "imbalance": float(s.balance.imbalance),
            "class_fid": float(s.balance.fid.nanmean()), "grey_classes": most, "theirs": theirs,
        }  # fmt: skip
    return found | {"better": int((studies[3].balance.fid < studies[2].balance.fid).sum())}


def _imbalance(dims: int, b: GenerationBalanceResult) -> float:
    theirs = torch.tensor(THEIR_SHARE[dims], dtype=torch.float64) / 100
    return float((theirs / theirs.sum() - b.real_share).abs().sum() / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's idx files")
    parser.add_argument("--epochs", type=int, default=0, help="30 by default, 60 on digits")
    parser.add_argument("--samples", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.mnist:
        part = "train" if list(options.mnist.glob("train-images*")) else "t10k"
        images, labels = mnist(options.mnist, part)
    else:
        images, labels = digits(32)
    epochs = options.epochs or (30 if options.mnist else 60)
    print(f"{'MNIST' if options.mnist else 'digits'}: {len(images)} images, {epochs} epochs, seed {options.seed}")
    studies = {dims: study(dims, images, labels, epochs, options.samples, options.seed) for dims in (2, 3)}
    for dims, s in studies.items():
        print(
            f"{dims}-D: latents spread to {float(s.regions[0].spread):.1f}, the prior to {dims**0.5:.1f}; classifier correct "
            f"for {float(s.balance.accuracy):.1%} of held-out images; 10 components, {float(s.regions[0].overlap):.0%} overlap"
        )
    tables(studies)
    findings(studies)
    if options.json:
        print(json.dumps(rounded(figures(studies))))


if __name__ == "__main__":
    main()
