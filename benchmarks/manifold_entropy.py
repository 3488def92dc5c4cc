"""Gram matrices of a decoder's Jacobian against ``torch.func``'s Jacobians, and what growing beta does to a VAE.

Each way runs in a process of its own, one after the other, so that peak memory is its own. ``--beta`` trains the VAEs
of the second table, some minutes.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing as mp
import resource
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gendiag import ManifoldEntropy, decoder_gram, manifold_entropy

LATENT, SAMPLES = 100, 64


def dcgan(width: int = 32) -> nn.Module:
    """A DCGAN's generator for 3x64x64."""
    w = width
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (LATENT, 1, 1)),
        nn.ConvTranspose2d(LATENT, 8 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * w), nn.ReLU(),
        nn.ConvTranspose2d(8 * w, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w), nn.ReLU(),
        nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.ReLU(),
        nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
        nn.ConvTranspose2d(w, 3, 4, 2, 1), nn.Tanh(),
    ).eval()  # fmt: skip


def measured(way: str, queue: Any) -> None:
    """Seconds, memory beyond the model's own in bytes, and the mean Gram matrix."""
    torch.set_num_threads(2)
    decode = dcgan().requires_grad_(False)
    # reverse mode over 12,288 outputs is timed on one latent
    z = torch.randn(SAMPLES, LATENT, generator=torch.Generator().manual_seed(1))[: 1 if way == "jacrev" else SAMPLES]
    flat = lambda x: decode(x[None])[0].flatten()  # noqa: E731
    # what is loaded at the first use belongs to no way
    decoder_gram(decode, z[:1], dims=torch.zeros(1, dtype=torch.long))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with torch.no_grad():
        if way == "decoder_gram":
            gram = decoder_gram(decode, z)
        else:
            transform = torch.func.jacfwd(flat) if way == "jacfwd" else torch.func.jacrev(flat, chunk_size=512)
            jacobian = torch.func.vmap(transform)(z)
            gram = (jacobian.mT @ jacobian).double()
    seconds = (time.perf_counter() - started) * SAMPLES / len(z)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    queue.put((seconds, peak, gram[0].numpy()))


def speed() -> None:
    """The first table."""
    context = mp.get_context("spawn")
    results = {}
    for way in ("decoder_gram", "jacfwd", "jacrev"):
        queue = context.Queue()
        process = context.Process(target=measured, args=(way, queue))
        process.start()
        results[way] = queue.get()
        process.join()
    stored = SAMPLES * LATENT * 3 * 64 * 64 * 4
    ours = results["decoder_gram"]
    print(f"DCGAN for 3x64x64, L = {LATENT}, {SAMPLES} latents; J of the batch is {stored / 2**20:.0f} MiB")
    for way, (seconds, peak, gram) in results.items():
        difference = (
            abs(torch.from_numpy(gram) - torch.from_numpy(ours[2])).max() / abs(torch.from_numpy(ours[2])).max()
        )
        note = " (timed on one latent)" if way == "jacrev" else ""
        print(
            f"  {way:13s} {seconds:8.1f} s ({seconds / ours[0]:6.1f} x), {peak / 2**20:6.0f} MiB more at the peak "
            f"({peak / stored:.2f} of J), differs by {float(difference):.0e}{note}"
        )


def wide() -> None:
    """Mutual information of many dimensions."""
    metric = ManifoldEntropy(784)
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(8, 1000, 784, generator=generator)
    gram = (j.mT @ j).double()
    started = time.perf_counter()
    metric.update(gram)
    metric.compute()
    ours = (time.perf_counter() - started) / len(gram)
    g, pairs = gram[0], [(i, k) for i in range(40) for k in range(i)]
    started = time.perf_counter()
    for i, k in pairs:
        _ = -0.5 * torch.log(1 - g[i, k] ** 2 / (g[i, i] * g[k, k]))
    loop = (time.perf_counter() - started) / len(pairs) * 784 * 783 / 2
    print(f"L = 784: {ours * 1e3:.0f} ms a latent, all entropies; a loop over pairs {loop:.1f} s ({loop / ours:.0f} x)")


def betas(latent_dims: tuple[int, ...] = (10, 32), epochs: int = 30) -> None:
    """The second table: the effective number of dimensions falls as beta grows."""
    from lightning.pytorch import Trainer, seed_everything

    from example_models.data import digit_batches
    from example_models.vae import VAE

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    values = (0.1, 1.0, 10.0, 30.0, 60.0, 100.0)
    print("beta-VAE on digits: effective dimensions / dead dimensions, and total correlation in nats")
    print("     L " + "".join(f"   beta {beta:<9g}" for beta in values))
    for latent_dim in latent_dims:
        cells = []
        for beta in values:
            seed_everything(0, verbose=False)
            model = VAE(latent_dim, beta)
            trainer = Trainer(
                max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(model, digit_batches())
            model.eval()
            metric = ManifoldEntropy(latent_dim)
            metric.update(
                decoder_gram(model.decode, torch.randn(128, latent_dim, generator=torch.Generator().manual_seed(0)))
            )
            r = metric.compute()
            cells.append(
                f"{float(r.effective_dimensions):5.1f}/{int(r.dead.sum()):<2d} {float(r.total_correlation):5.1f}  "
            )
        print(f"{latent_dim:6d} " + "  ".join(cells), flush=True)


def twin(samples: Tensor) -> float:
    """The largest difference between the metric's entropies and those of stored Jacobians."""
    decode = dcgan(4).requires_grad_(False)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda x: decode(x[None])[0].flatten()))(samples)
    metric = ManifoldEntropy(LATENT)
    metric.update(decoder_gram(decode, samples))
    return float((metric.compute().entropy - manifold_entropy(jacobian).entropy).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beta", action="store_true", help="train VAEs of growing beta")
    options = parser.parse_args()
    speed()
    wide()
    print(f"entropies against stored Jacobians differ by {twin(torch.randn(4, LATENT)):.0e} nats")
    if options.beta:
        betas()


if __name__ == "__main__":
    main()
