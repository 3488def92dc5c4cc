"""Compares ``decoder_gram`` with ``torch.func``'s Jacobians, and measures what a growing beta does to a VAE.

Each way runs in a process of its own, one after the other, so that its peak memory is its own. ``--beta`` trains the VAEs
of the second table, which takes some minutes.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from benchmarks.measuring import in_own_process, peak_memory, rounded, timed, trained
from example_models.data import digit_batches
from example_models.vae import VAE
from lightning_gendiag import ManifoldEntropy, decoder_gram, manifold_entropy

LATENT, SAMPLES = 100, 64


def dcgan(width: int = 32) -> nn.Module:
    """Returns a DCGAN's generator of 3x64x64 images, without gradients of its weights."""
    w = width
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (LATENT, 1, 1)),
        nn.ConvTranspose2d(LATENT, 8 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * w), nn.ReLU(),
        nn.ConvTranspose2d(8 * w, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
        nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
        nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
        nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Tanh(),
    ).eval().requires_grad_(False)  # fmt: skip


def jacobian(decode: nn.Module, z: Tensor, way: str = "jacfwd") -> Tensor:
    """Returns the Jacobians (N, D, L) that ``torch.func`` gives."""
    flat = lambda x: decode(x[None])[0].flatten()  # noqa: E731
    transform = torch.func.jacfwd(flat) if way == "jacfwd" else torch.func.jacrev(flat, chunk_size=512)
    stacked: Tensor = torch.func.vmap(transform)(z)
    return stacked


@torch.no_grad()
def measured(way: str) -> tuple[float, float, Tensor]:
    """Returns seconds, memory beyond the model's own in MiB, and the Gram matrix (L, L) of the first latent."""
    decode = dcgan()
    # reverse mode over 12,288 outputs is timed on one latent
    z = torch.randn(SAMPLES, LATENT, generator=torch.Generator().manual_seed(1))[: 1 if way == "jacrev" else SAMPLES]
    # what is loaded at the first use belongs to no way
    decoder_gram(decode, z[:1], dims=torch.zeros(1, dtype=torch.long))
    before = peak_memory()

    def gram() -> Tensor:
        if way == "decoder_gram":
            return decoder_gram(decode, z)[0]
        j = jacobian(decode, z, way)
        return (j.mT @ j).double()[0]

    seconds, found = timed(gram)
    return seconds * SAMPLES / len(z), (peak_memory() - before) * 1024, found


def speed() -> dict[str, dict[str, float]]:
    """Prints and returns the first table."""
    figures = {}
    stored = SAMPLES * LATENT * 3 * 64 * 64 * 4 / 2**20
    print(f"DCGAN for 3x64x64, L = {LATENT}, {SAMPLES} latents; J of the batch is {stored:.0f} MiB")
    ours, _, expected = first = in_own_process(measured, "decoder_gram")
    for way in ("decoder_gram", "jacfwd", "jacrev"):
        seconds, peak, gram = first if way == "decoder_gram" else in_own_process(measured, way)
        difference = float((gram - expected).abs().max() / expected.abs().max())
        figures[way] = {"seconds": seconds, "ratio": seconds / ours, "mib": peak}
        note = " (timed on one latent)" if way == "jacrev" else ""
        print(
            f"  {way:13s} {seconds:8.1f} s ({seconds / ours:6.1f} x), {peak:6.0f} MiB more at the peak "
            f"({peak / stored:.2f} of J), differs by {difference:.0e}{note}"
        )
    return figures


def wide() -> float:
    """Measures the mutual information of many dimensions, and returns how many times as long a loop takes."""
    j = torch.randn(8, 1000, 784, generator=torch.Generator().manual_seed(0))
    gram = (j.mT @ j).double()
    metric = ManifoldEntropy(784)

    def entropies() -> object:
        metric.reset()
        metric.update(gram)
        return metric.compute()

    g, pairs = gram[0], [(i, k) for i in range(40) for k in range(i)]
    ours = timed(entropies)[0] / len(gram)
    one = timed(lambda: [-0.5 * torch.log(1 - g[i, k] ** 2 / (g[i, i] * g[k, k])) for i, k in pairs])[0] / len(pairs)
    loop = one * 784 * 783 / 2
    print(f"L = 784: {ours * 1e3:.0f} ms a latent, all entropies; a loop over pairs {loop:.1f} s ({loop / ours:.0f} x)")
    return loop / ours


def betas(latent_dims: tuple[int, ...] = (10, 32), epochs: int = 30) -> list[dict[str, Any]]:
    """Prints and returns the second table: the number of effective dimensions falls as beta grows."""
    values = (0.1, 1.0, 10.0, 30.0, 60.0, 100.0)
    print("beta-VAE on digits: effective dimensions / dead dimensions, and total correlation in nats")
    print("     L " + "".join(f"   beta {beta:<9g}" for beta in values))
    rows = []
    for latent_dim in latent_dims:
        cells, row = [], dict[str, list[float]]()
        for beta in values:
            seed_everything(0, verbose=False)
            model = VAE(latent_dim, beta)
            trained(model, digit_batches(), epochs)
            metric = ManifoldEntropy(latent_dim)
            z = torch.randn(128, latent_dim, generator=torch.Generator().manual_seed(0))
            metric.update(decoder_gram(model.eval().decode, z))
            r = metric.compute()
            row[f"{beta:g}"] = [float(r.effective_dimensions), float(r.total_correlation)]
            dimensions = f"{float(r.effective_dimensions):5.1f}/{int(r.dead.sum()):<2d}"
            cells.append(f"{dimensions} {float(r.total_correlation):5.1f}  ")
        print(f"{latent_dim:6d} " + "  ".join(cells), flush=True)
        rows.append({"latent_dim": latent_dim, "betas": row})
    return rows


def difference(z: Tensor) -> float:
    """Returns the largest difference between the metric's entropies and those of stored Jacobians, in nats."""
    decode = dcgan(4)
    metric = ManifoldEntropy(LATENT)
    metric.update(decoder_gram(decode, z))
    return float((metric.compute().entropy - manifold_entropy(jacobian(decode, z)).entropy).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", action="store_true", help="train VAEs of growing beta")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    figures: dict[str, Any] = {**speed(), "mutual_information_ratio": wide()}
    print(f"entropies differ from those of stored Jacobians by {difference(torch.randn(4, LATENT)):.0e} nats")
    if options.beta:
        figures["beta"] = betas()
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
