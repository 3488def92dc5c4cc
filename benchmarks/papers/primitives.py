"""Chen, Cheng, Ding, Lin, Zhang, *Disentangling Regional Primitives for Image Generation*: components that appear in turn."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from benchmarks.measuring import trained
from benchmarks.papers.study import Finding, Part, holds
from example_models.data import digit_batches, digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import decompose, find_regions, minimal_features, or_interactions
from lightning_gendiag.diagnostics.regional_primitives.monitor import grid

EPOCHS, LATENTS, IMAGES = 15, 256, 3


def generators(seed: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Returns the layers of a GAN and a VAE of digits after features of 8x8 positions, and such features (N, C, 8, 8)."""
    found = {}
    for kind, model, cut in (("GAN", GAN(), 7), ("VAE", VAE(), 5)):
        seed_everything(seed, verbose=False)
        trained(model, digit_batches(), EPOCHS)
        layers = (model.generator if isinstance(model, GAN) else model.decoder).eval().requires_grad_(False)
        latents = torch.randn(LATENTS, int(model.hparams["latent_dim"]), generator=torch.Generator().manual_seed(seed))
        found[kind] = layers[cut:], layers[:cut](latents)
    return found


def errors_by_region(images: Tensor, target: Tensor, empty: Tensor, regions: Tensor) -> Tensor:
    """Returns the squared errors (K, R) of images in each region, relative to that of the empty image."""
    masks = torch.nn.functional.one_hot(regions.flatten()).float()
    errors, scale = (((x - target).flatten(1).square() @ masks) for x in (images, empty))
    return errors / scale.clamp(min=1e-9)


def parts_of(seed: int) -> Part:
    """Components ranked by norm: what each draws, what it leaves alone, and in which order regions appear."""
    rows: list[list[Any]] = []
    largest_rest, sums, appear, ratios, shares = [], [], [], [], []
    maps = {"5 found": find_regions(digits(32)[0][:1000], 5, progress=False).labels, "3 x 3 grid": grid(32, 32)}
    for kind, (tail, features) in generators(seed).items():
        baseline = features.mean(0)
        for name, labels in maps.items():
            n = int(labels.max()) + 1
            curves, order_of, needed, leaks, complete = [], [], [], [], []
            for feature in features[:IMAGES]:
                minimal = minimal_features(tail, feature, baseline, labels)
                parts = or_interactions(minimal.features)
                found = decompose(tail, feature, labels, minimal)
                complete.append(
                    float((parts.sum(0) - minimal.features[-1]).norm() / (minimal.features[-1] - baseline).norm())
                )
                steps = baseline + parts[found.order].cumsum(0)
                own, empty = tail(torch.stack([feature, baseline]))
                with torch.no_grad():
                    errors = errors_by_region(tail(steps), own[None], empty[None], labels)
                # the number of components after which a region stays within a tenth of its change
                away = torch.cat([torch.ones_like(errors[:1]), errors]) > 0.1
                late = away.int().cumsum(0).argmax(0) + 1
                order_of.append(late.float().sort().values)
                squares = found.norms[found.order].square()
                needed.append(int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1)
                curves.append(found.curve)
                leaks.append((float(1 - found.relevant.mean()), float(found.irrelevant.mean())))
            curve = torch.stack(curves).mean(0)
            relevant, irrelevant = (statistics.mean(values) for values in zip(*leaks, strict=True))
            when = torch.stack(order_of).mean(0)
            rows.append(
                [kind, name, 2**n - 1, statistics.mean(needed), float(curve[1]), float(curve[4]), float(curve[8]),
                 relevant, irrelevant, float(when[0]), float(when[-1])]
            )  # fmt: skip
            largest_rest.append(max(complete))
            appear.append(float(when[-1] - when[0]))
            ratios.append(relevant / irrelevant)
            shares.append(statistics.mean(needed) / (2**n - 1))
            sums.append(float(curve[-1]))
    names = [f"{row[0]}, {row[1]}" for row in rows]
    findings = [
        Finding(
            "completeness: the components add up to the feature of the image",
            f"the sum differs by at most {max(largest_rest):.0e} of the feature's change",
            holds(max(largest_rest) < 1e-3),
        ),
        Finding(
            "regions appear one after another as their components are added",
            "the first and the last region stay within a tenth of their change after "
            + "; ".join(
                f"{row[9]:.0f} and {row[10]:.0f} components ({name})" for row, name in zip(rows, names, strict=True)
            ),
            holds(all(gap >= 1 for gap in appear), any(gap >= 1 for gap in appear)),
        ),
        Finding(
            "components that do not cover a region do not affect its generation",
            "those that cover it change it "
            + "; ".join(f"{ratio:.0f} times as much ({name})" for ratio, name in zip(ratios, names, strict=True)),
            holds(min(ratios) > 10, max(ratios) > 10),
        ),
        Finding(
            "sparsity: few components carry the norm",
            "nine tenths of the squared norm are carried by "
            + "; ".join(f"{share:.0%} of all ({name})" for share, name in zip(shares, names, strict=True)),
            holds(max(shares) < 0.35, min(shares) < 0.35),
        ),
    ]
    columns = [
        "generator",
        "regions",
        "components",
        "with 9/10 of the squared norm",
        "error with 1",
        "with 4",
        "with 8",
        "change of a region by its own components",
        "by all others",
        "first region appears after",
        "last region",
    ]
    return Part(columns, rows, findings)


PARTS = {"components": parts_of}
