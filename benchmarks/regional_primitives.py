"""Measures sparsity, leakage and reconstruction of what the example GAN and VAE draw together, and the time that it takes.

All sets of regions are optimised in one batch; that is compared with 512 optimisations one by one. Both models are first
trained for 30 epochs on digits, which takes a minute each on two cores.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor, nn

from benchmarks.measuring import in_own_process, peak_memory, rounded, timed, trained
from example_models.data import digit_batches, digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    Decomposition,
    MinimalFeatures,
    RegionalPrimitives,
    RegionMap,
    decompose,
    find_regions,
    minimal_features,
    or_interactions,
)
from lightning_gendiag.diagnostics.regional_primitives.monitor import grid
from lightning_gendiag.plots.pictures import as_rgb, enlarged

LATENTS, IMAGES = 256, 4


def generator_of(kind: str) -> tuple[nn.Sequential, int]:
    """Returns a trained generator, and the length of its latents."""
    seed_everything(0, verbose=False)
    model = GAN() if kind == "gan" else VAE()
    trained(model, digit_batches(), 30)
    model.eval().requires_grad_(False)
    return model.generator if isinstance(model, GAN) else model.decoder, int(model.hparams["latent_dim"])


def decomposed(
    kind: str, generator: nn.Sequential, cut: int, length: int, regions: RegionMap, folder: Path | None
) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """Prints the components of a few images.

    Returns:
        The layers after the cut, a feature, the baseline, and what was measured for each map of regions.
    """
    figures: dict[str, Any] = {}
    front, tail = generator[:cut], generator[cut:]
    features = front(torch.randn(LATENTS, length, generator=torch.Generator().manual_seed(0)))
    baseline = features.mean(0)
    for name, labels in (("found", regions.labels), ("grid", grid(32, 32))):
        metric = RegionalPrimitives(int(labels.max()) + 1)

        def components(feature: Tensor, labels: Tensor = labels) -> tuple[MinimalFeatures, Decomposition]:
            minimal = minimal_features(tail, feature, baseline, labels)
            return minimal, decompose(tail, feature, labels, minimal)

        seconds, _ = timed(partial(components, features[0]))
        for feature in features[:IMAGES]:
            minimal, decomposition = components(feature)
            metric.update(*decomposition)
        r = metric.compute()
        curve = ", ".join(f"{float(r.curve[k]):.3f}" for k in (1, 2, 4, 8, 16, len(r.curve) - 1))
        figures[name] = {
            "regions": metric.num_regions, "components": int(r.components), "all_components": len(r.norms) - 1,
            "curve": {str(k): float(r.curve[k]) for k in (1, 2, 4, 8, 16)}, "leakage": float(r.leakage.mean()),
            "relevant": float(1 - r.relevant.mean()), "irrelevant": float(r.irrelevant.mean()),
        }  # fmt: skip
        relevant, irrelevant = float(1 - r.relevant.mean()), float(r.irrelevant.mean())
        print(
            f"{kind} at {features.shape[2]}x{features.shape[3]}, {name} ({metric.num_regions}), {seconds:.1f} s an image, "
            f"{float(r.converged):.0%} converged\n"
            f"  {int(r.components)} of {len(r.norms) - 1} components have 90 % of the squared norm; "
            f"leakage {float(r.leakage.mean()):.1%}\n"
            f"  error of the image with 1, 2, 4, 8, 16 and all of the largest: {curve}\n"
            f"  irrelevant components change a region by {irrelevant:.4f}, relevant ones by {relevant:.4f} of its change: "
            f"{relevant / irrelevant:.0f} times more"
        )
        if folder:
            parts = or_interactions(minimal.features)
            grown = [baseline + parts[r.order[:k]].sum(0) for k in (0, 1, 2, 4, 8, 16, len(r.order))]
            strip = tail(torch.stack([*grown, feature]))
            row = torch.cat([enlarged(as_rgb(image, -1, 1), 96) for image in strip], 1)
            Image.fromarray(row.numpy()).save(folder / f"{kind}_{cut}_{metric.num_regions}.png")
    return tail, features[0], baseline, figures


def one_by_one(tail: nn.Module, feature: Tensor, baseline: Tensor, steps: int = 200) -> tuple[float, float]:
    """Returns seconds for 512 optimisations with Adam, measured on 16 of them, and the mean objective that they reach."""
    cover = torch.nn.functional.one_hot(grid(32, 32)).float()
    own, empty = tail(torch.stack([feature, baseline]))
    change, distance = (own - empty).square().sum(), (feature - baseline).square().sum()
    sets = range(1, 512, 32)

    def objective(mask: int) -> float:
        weight = sum(cover[..., r] for r in range(9) if mask >> r & 1) / change
        u = baseline[None].clone().requires_grad_()
        optimizer = torch.optim.Adam([u], lr=0.05)
        for _ in range(steps):
            loss = (weight * (tail(u)[0] - own).square()).sum() + 0.1 * (u[0] - baseline).square().sum() / distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    seconds, reached = timed(lambda: [objective(mask) for mask in sets])
    return seconds / len(sets) * 512, sum(reached) / len(sets)


def memory(tail: nn.Module, feature: Tensor, baseline: Tensor, batch_size: int) -> float:
    """Returns the memory at the peak beyond what the process held before, in MiB."""
    minimal_features(tail, feature, baseline, grid(32, 32), subsets=torch.tensor([1]), max_steps=1)
    before = peak_memory()
    minimal_features(tail, feature, baseline, grid(32, 32), batch_size=batch_size, max_steps=2)
    return (peak_memory() - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder for strips of an image that grows by its components")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    regions = find_regions(digits(32)[0][:1000], 5)
    cuts, figures = {}, dict[str, Any]()
    for kind, places in (("gan", (7, 10)), ("vae", (5,))):
        generator, length = generator_of(kind)
        for cut in places:
            *cuts[kind, cut], found = decomposed(kind, generator, cut, length, regions, options.pictures)
            figures[f"{kind}_{cut}"] = found
    tail, feature, baseline = cuts["gan", 7]
    ours, minimal = timed(lambda: minimal_features(tail, feature, baseline, grid(32, 32)))
    seconds, reached = one_by_one(tail, feature, baseline)
    print(
        f"n = 9, 512 sets, GAN at 8x8: one batch {ours:.1f} s, objective {float(minimal.objective[1::32].mean()):.5f}; "
        f"one by one {seconds:.0f} s ({seconds / ours:.0f} x), objective {reached:.5f} after 200 steps of Adam"
    )
    figures["minimal_features"] = {"seconds": ours, "one_by_one": seconds, "ratio": seconds / ours, "mib": {}}
    for batch_size in (512, 64):
        peak = in_own_process(memory, tail, feature, baseline, batch_size)
        print(f"  batch_size={batch_size}: {peak:.0f} MiB more at the peak")
        figures["minimal_features"]["mib"][str(batch_size)] = peak
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
