"""What the example GAN and VAE draw together: sparsity, leakage, reconstruction; and one batch against 512 optimisations.

Trains both for 30 epochs on digits first, a minute each on two cores.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing as mp
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn

from example_models.data import digit_batches, digits
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import RegionalPrimitives, RegionMap, decompose, find_regions, minimal_features, or_interactions
from lightning_gendiag.diagnostics.regional_primitives.monitor import grid
from lightning_gendiag.panels import as_rgb, enlarged

CODES, IMAGES = 256, 4


def trained(kind: str) -> tuple[nn.Sequential, int]:
    """A trained generator, and the length of its codes."""
    seed_everything(0, verbose=False)
    model = GAN() if kind == "gan" else VAE()
    trainer = Trainer(
        max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, digit_batches())
    model.eval().requires_grad_(False)
    whole = model.generator if isinstance(model, GAN) else model.decoder
    return whole, int(model.hparams["latent_dim"])


def taken_apart(
    kind: str, whole: nn.Sequential, cut: int, length: int, regions: RegionMap, pictures: Path | None
) -> tuple[nn.Module, Tensor, Tensor]:
    """Print what the components of a few images are; return what the timing needs."""
    front, tail = whole[:cut], whole[cut:]
    features = front(torch.randn(CODES, length, generator=torch.Generator().manual_seed(0)))
    baseline = features.mean(0)
    for name, labels in (("found regions", regions.labels), ("3 x 3 grid", grid(32, 32))):
        metric = RegionalPrimitives(int(labels.max()) + 1)
        started = time.perf_counter()
        for feature in features[:IMAGES]:
            minimal = minimal_features(tail, feature, baseline, labels)
            metric.update(*decompose(tail, feature, labels, minimal))
        seconds = (time.perf_counter() - started) / IMAGES
        r = metric.compute()
        curve = ", ".join(f"{float(r.curve[k]):.3f}" for k in (1, 2, 4, 8, 16, len(r.curve) - 1))
        print(
            f"{kind} at {features.shape[2]}x{features.shape[3]}, {name} ({metric.num_regions}), {seconds:.1f} s an image, "
            f"{float(r.converged):.0%} converged\n"
            f"  {int(r.components)} of {len(r.norms) - 1} components carry nine tenths of the squared norm; "
            f"leakage {float(r.leakage.mean()):.1%}\n"
            f"  error of the image with 1, 2, 4, 8, 16 and all of the largest: {curve}\n"
            f"  irrelevant components change a region {float(r.irrelevant.mean()):.4f}, "
            f"relevant ones {float(1 - r.relevant.mean()):.4f} of its change: "
            f"{float((1 - r.relevant.mean()) / r.irrelevant.mean()):.0f} times more"
        )
        if pictures:
            order = r.order
            grown = [
                baseline + or_interactions(minimal.features)[order[:k]].sum(0) for k in (0, 1, 2, 4, 8, 16, len(order))
            ]
            strip = tail(torch.stack([*grown, feature]))
            row = torch.cat([enlarged(as_rgb(image, -1, 1), 96) for image in strip], 1)
            Image.fromarray(row.numpy()).save(pictures / f"{kind}_{cut}_{metric.num_regions}.png")
    return tail, features[0], baseline


def separately(tail: nn.Module, feature: Tensor, baseline: Tensor, steps: int = 200) -> tuple[float, float]:
    """Seconds for 512 optimisations one by one with Adam, measured on 16 of them, and the mean objective they reach."""
    labels = grid(32, 32)
    cover = torch.nn.functional.one_hot(labels).float()
    own, empty = tail(torch.stack([feature, baseline]))
    change, distance = (own - empty).square().sum(), (feature - baseline).square().sum()
    reached, started = [], time.perf_counter()
    masks = range(1, 512, 32)
    for mask in masks:
        weight = sum(cover[..., r] for r in range(9) if mask >> r & 1) / change
        u = baseline[None].clone().requires_grad_()
        optimizer = torch.optim.Adam([u], lr=0.05)
        for _ in range(steps):
            loss = (weight * (tail(u)[0] - own).square()).sum() + 0.1 * (u[0] - baseline).square().sum() / distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reached.append(float(loss.detach()))
    return (time.perf_counter() - started) / len(masks) * 512, sum(reached) / len(reached)


def peak() -> float:
    """The process's peak memory in MiB, on Linux; nan elsewhere."""
    status = Path("/proc/self/status")
    held = (
        [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if status.exists()
        else []
    )
    return int(held[0]) / 1024 if held else float("nan")


def memory(tail: nn.Module, feature: Tensor, baseline: Tensor, batch_size: int, queue: Any) -> None:
    """Peak memory beyond what the process held before, in a process of its own."""
    torch.set_num_threads(2)
    minimal_features(tail, feature, baseline, grid(32, 32), subsets=torch.tensor([1]), max_steps=1)
    before = peak()
    minimal_features(tail, feature, baseline, grid(32, 32), batch_size=batch_size, max_steps=2)
    queue.put(peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder for strips of the image growing by its components")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    regions = find_regions(digits(32)[0][:1000], 5)
    kept = {}
    for kind, cuts in (("gan", (7, 10)), ("vae", (5,))):
        whole, length = trained(kind)
        for cut in cuts:
            kept[kind, cut] = taken_apart(kind, whole, cut, length, regions, options.pictures)

    tail, feature, baseline = kept["gan", 7]
    started = time.perf_counter()
    minimal = minimal_features(tail, feature, baseline, grid(32, 32))
    ours = time.perf_counter() - started
    seconds, reached = separately(tail, feature, baseline)
    mine = float(minimal.objective[1::32].mean())
    print(
        f"n = 9, 512 sets, GAN at 8x8: one batch {ours:.1f} s, objective {mine:.5f}; one by one {seconds:.0f} s "
        f"({seconds / ours:.0f} x), objective {reached:.5f} after 200 steps of Adam"
    )
    context = mp.get_context("spawn")
    for batch_size in (512, 64):
        queue = context.Queue()
        process = context.Process(target=memory, args=(tail, feature, baseline, batch_size, queue))
        process.start()
        print(f"  batch_size={batch_size}: {queue.get():.0f} MiB more at the peak")
        process.join()


if __name__ == "__main__":
    main()
