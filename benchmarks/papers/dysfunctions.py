"""Zhou, Guo, *Recognition and Interpretation in Dysfunctional Image Generation*: VAEs with two and three latent dimensions."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.dysfunctions import THEIR_CLASS_FID, THEIR_FID, THEIR_IS, THEIR_SHARE, Study, study
from benchmarks.measuring import trained
from benchmarks.papers.data import padded_digits
from benchmarks.papers.study import Finding, Part, holds
from example_models.vae import VAE
from lightning_gendiag import posterior_kl

EPOCHS, SAMPLES, KL_EPOCHS = 20, 10_000, 4
"""Epochs of the VAEs, images that are generated, and epochs of each VAE of the last part."""


@cache
def studies(seed: int) -> dict[int, Study]:
    """Returns what is measured of VAEs with two and three dimensions on 5,000 digits of MNIST."""
    images, labels = padded_digits()
    return {dims: study(dims, images, labels, EPOCHS, SAMPLES, seed) for dims in (2, 3)}


def balance(seed: int) -> Part:
    """Table 2: how often each class is generated."""
    found = studies(seed)
    rows: list[list[Any]] = [["real", *(100 * found[2].balance.real_share).tolist()]]
    imbalance = {}
    for dims, s in found.items():
        rows.append([f"{dims}-D", *(100 * s.balance.generated_share).tolist()])
        rows.append([f"{dims}-D, the paper", *(float(share) for share in THEIR_SHARE[dims])])
        imbalance[dims] = float(s.balance.imbalance)
    extremes = {
        dims: (float(s.balance.generated_share.max()), float(s.balance.generated_share.min()))
        for dims, s in found.items()
    }
    findings = [
        Finding(
            "balanced training data give unbalanced samples: 22.2 % and 1.2 % are the extremes in 2-D, 22.7 % "
            "and 2.7 % in 3-D",
            "; ".join(f"{high:.1%} and {low:.1%} in {dims}-D" for dims, (high, low) in extremes.items()),
            holds(all(high > 0.15 and low < 0.05 for high, low in extremes.values())),
        ),
        Finding(
            "the imbalance becomes less with more dimensions",
            f"{imbalance[2]:.0%} of the samples would have to change class in 2-D, {imbalance[3]:.0%} in 3-D",
            holds(imbalance[3] < imbalance[2]),
        ),
    ]
    return Part(["per cent of class", *map(str, range(10))], rows, findings)


def quality(seed: int) -> Part:
    """Table 1: samples of the prior and of margins."""
    rows: list[list[Any]] = []
    findings = []
    found = studies(seed)
    for dims, s in found.items():
        prior, cluster, margin, grey = s.fid.tolist()
        scores = s.inception.tolist()
        rows.append([f"{dims}-D, FID", prior, margin, cluster, grey])
        rows.append([f"{dims}-D, FID, the paper", THEIR_FID[dims]["prior"], THEIR_FID[dims]["margin"], "", ""])
        rows.append([f"{dims}-D, inception score", scores[0], scores[2], scores[1], scores[3]])
        rows.append(
            [f"{dims}-D, inception score, the paper", THEIR_IS[dims]["prior"], THEIR_IS[dims]["margin"], "", ""]
        )
        findings += [
            Finding(
                f"margins are worse than general samples, {dims}-D",
                f"FID {margin:.1f} against {prior:.1f}",
                holds(margin > prior),
            ),
            Finding(
                f"the inception score of margins is higher than that of general samples, {dims}-D",
                f"{scores[2]:.2f} against {scores[0]:.2f}",
                holds(scores[2] > scores[0]),
            ),
            Finding(
                f"features are lost in the grey area, {dims}-D",
                f"FID {grey:.1f} against {cluster:.1f} within clusters",
                holds(grey > cluster),
            ),
        ]
    findings.append(
        Finding(
            "general samples become better with more dimensions",
            f"FID {float(found[2].fid[0]):.1f} in 2-D and {float(found[3].fid[0]):.1f} in 3-D",
            holds(bool(found[3].fid[0] < found[2].fid[0])),
        )
    )
    return Part(["", "prior", "margins", "clusters", "grey area"], rows, findings)


def by_class(seed: int) -> Part:
    """Table 3: FID within each class."""
    found = studies(seed)
    rows: list[list[Any]] = []
    for dims, s in found.items():
        rows.append([f"{dims}-D", *s.balance.fid.tolist()])
        rows.append([f"{dims}-D, the paper", *(float(value) for value in THEIR_CLASS_FID[dims])])
    better = int((found[3].balance.fid < found[2].balance.fid).sum())
    means = [float(found[dims].balance.fid.nanmean()) for dims in (2, 3)]
    findings = [
        Finding(
            "most classes become better with more dimensions: 9 of 10",
            f"{better} of 10; the mean FID within a class is {means[0]:.1f} in 2-D and {means[1]:.1f} in 3-D",
            holds(better > 5, means[1] < means[0]),
        )
    ]
    return Part(["FID within class", *map(str, range(10))], rows, findings)


def vanishing(seed: int) -> Part:
    """The vanishing KL divergence: a VAE whose KL term is weighed more and more."""
    images, labels = padded_digits()
    loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True, drop_last=True)
    rows: list[list[Any]] = []
    for beta in (0.0, 1.0, 30.0, 300.0):
        torch.manual_seed(seed)
        model = VAE(3, beta, noise=0.6)
        trained(model, loader, KL_EPOCHS)
        with torch.no_grad():
            mean, log_variance = model.eval().encode(images[:1000])
            kl = posterior_kl(mean, log_variance).mean(0)
            active = int((mean.var(0) > 0.01).sum())
            spread = float(mean.std(0).mean())
            distance = float((model.decode(mean) - images[:1000]).square().mean())
        rows.append([f"{beta:g}", float(kl.sum()), active, spread, distance])
    totals, errors = [row[1] for row in rows], [row[4] for row in rows]
    findings = [
        Finding(
            "where the KL term vanishes, the latent says nothing about the image",
            f"with beta 300 the KL divergence is {totals[-1]:.2g} nats and the squared error "
            f"{errors[-1] / errors[1]:.1f} times that with beta 1",
            holds(totals[-1] < 0.1, errors[-1] > 1.5 * errors[1]),
        ),
        Finding(
            "where the KL term has no weight, latents leave the prior",
            f"with beta 0 their standard deviation is {rows[0][3]:.1f}, with beta 1 {rows[1][3]:.1f}",
            holds(rows[0][3] > 2 * rows[1][3]),
        ),
    ]
    return Part(
        ["beta", "KL in nats", "active dimensions of 3", "standard deviation of latents", "squared error"],
        rows,
        findings,
    )


PARTS = {"balance": balance, "quality": quality, "classes": by_class, "vanishing": vanishing}
