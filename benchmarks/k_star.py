"""How fast is ``k_star``, in how much memory, and what does it say of real digits?"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_gendiag import KStarResult, k_star


def data(n: int, d: int = 128, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator)
    return centres[labels] + 2 * torch.randn(n, d, generator=generator), labels


def by_sorting(latents: Tensor, labels: Tensor) -> Tensor:
    """Distance matrix and sort: the position of the first of another class."""
    order = torch.cdist(latents, latents).argsort(1)
    other = labels[order] != labels[:, None]
    return other.int().argmax(1) / torch.bincount(labels)[labels]


def large(queue: Any) -> None:
    """N = 50,000 in a process of its own, so that the peak is its own."""
    torch.set_num_threads(2)
    latents, labels = data(50_000)
    k_star(latents[:100], labels[:100])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    k_star(latents, labels)
    queue.put((time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def speed() -> None:
    # first, since a new process starts with its parent's peak
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=large, args=(queue,))
    process.start()
    seconds, kilobytes = queue.get()
    process.join()
    print(f"N = 50,000, D = 128: {seconds:.1f} s, {kilobytes / 2**20:.2f} GiB more at the peak")
    latents, labels = data(10_000)
    started = time.perf_counter()
    found = k_star(latents, labels)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    expected = by_sorting(latents, labels)
    slow = time.perf_counter() - started
    same = float(((found.values - expected).abs() < 1e-6).double().mean())
    print(
        f"N = 10,000, D = 128: {ours:.2f} s against {slow:.2f} s by distance matrix and sort, {slow / ours:.1f} times faster"
    )
    print(f"  {same:.2%} of the values are the same (the other sorts rounded distances)")


def digits_table(epochs: int = 30) -> None:
    """k* of the digits' pixels, of an untrained encoder and of one that was trained with and without labels."""
    from lightning.pytorch import Trainer, seed_everything

    from example_models.data import digit_batches, digits
    from example_models.vae import VAE

    warnings.simplefilter("ignore")
    images, labels = digits(32)
    seed_everything(0, verbose=False)
    model = VAE(latent_dim=10)

    def features(encoder: Any) -> KStarResult:
        model.eval()
        with torch.no_grad():
            return k_star(encoder(images), labels)

    rows = {
        "pixels": k_star(images.flatten(1), labels),
        "untrained VAE encoder": features(lambda x: model.encode(x)[0]),
    }
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, digit_batches())
    rows["trained VAE encoder"] = features(lambda x: model.encode(x)[0])
    seed_everything(0, verbose=False)
    classifier = torch.nn.Sequential(VAE(latent_dim=16).encoder, torch.nn.SiLU(), torch.nn.Linear(32, 10))
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(classifier(images[batch]), labels[batch]).backward()
            optimizer.step()
    rows["trained classifier, last layer but one"] = features(classifier[0])
    print(
        "| features of 1,797 digits | mean k* | true skewness | approximate skewness | fractured, overlapped, clustered |"
    )
    print("|---|---|---|---|---|")
    for name, result in rows.items():
        counts = ", ".join(str(result.pattern.count(word)) for word in ("fractured", "overlapped", "clustered"))
        print(
            f"| {name} | {float(result.values.mean()):.3f} | {float(result.true_skewness):.2f} | "
            f"{float(result.approximate_skewness):.2f} | {counts} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    speed()
    digits_table()


if __name__ == "__main__":
    main()
