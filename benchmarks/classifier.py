"""Measures the default classifier of generation balance beside nearest neighbours: accuracy, balance, and time.

The images are held out, clean or degraded in ways in which generated images are: blurred, noisy, projected on eight principal
components, faded to the mean image. Faces, textures and photographs are those of scikit-image where it is installed; MNIST
is read from a folder. With MNIST, a VAE is also sampled after each of its first epochs, and the shares of its samples are
compared with those of a convolutional network that was trained on the rest of MNIST.

Run: ``python -m benchmarks.classifier --mnist FOLDER``
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.measuring import rounded
from example_models.data import digits, mnist
from lightning_gendiag.diagnostics.generation_balance.functional import corrected_shares, error_rates
from lightning_gendiag.diagnostics.generation_balance.monitor import FEATURE_WIDTH, PIXEL_WIDTH
from lightning_gendiag.model.features import FeatureExtractor, KernelClassifier, NeighbourClassifier, averaged_pixels

Classifier = Callable[[Tensor], Tensor]

SETS, IMAGES_OF_SET = 100, 512
"""Sets of images by which the correction of shares is judged, and the images of each."""

TEXTURES = "brick grass gravel camera coins page moon text"
PHOTOGRAPHS = "astronaut coffee chelsea retina ihc hubble_deep_field rocket"


def patches(folder: Path, names: str, size: int, step: int, gray: bool) -> tuple[Tensor, Tensor]:
    """Returns 300 patches of each picture, (N, C, 32, 32) in -1..1, and the number of the picture."""
    generator, images, labels = np.random.default_rng(0), [], []
    for i, name in enumerate(names.split()):
        with Image.open(next(folder.glob(f"{name}.*"))) as picture:
            pixels = np.array(picture.convert("L" if gray else "RGB"), dtype=np.float32).reshape(
                *picture.size[::-1], -1
            )
        for _ in range(300):
            top, left = generator.integers(pixels.shape[0] - size), generator.integers(pixels.shape[1] - size)
            images.append(pixels[top : top + size : step, left : left + size : step])
            labels.append(i)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)


def data_sets(folder: Path | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields the name, the images and the labels of each data set, in random order."""
    sets = [("digits", *digits(32))]
    if folder is not None:
        sets.append(("MNIST", *mnist(folder)))
    spec = find_spec("skimage")
    if spec is not None and spec.origin is not None:
        data = Path(spec.origin).parent / "data"
        faces = torch.from_numpy(np.load(data / "lfw_subset.npy")).float()[:, None] * 2 - 1
        sets.append(("faces", F.interpolate(faces, (32, 32), mode="bilinear"), (torch.arange(200) >= 100).long()))
        sets.append(("textures", *patches(data, TEXTURES, 32, 1, gray=True)))
        sets.append(("photographs", *patches(data, PHOTOGRAPHS, 64, 2, gray=False)))
    for name, images, labels in sets:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        yield name, images[order], labels[order]


def kernel(images: Tensor, labels: Tensor) -> KernelClassifier:
    """Returns the default classifier of generation balance."""
    filters = FeatureExtractor(images).responses
    return KernelClassifier(
        images, labels, [(averaged_pixels, PIXEL_WIDTH), (lambda some: filters(some).sqrt(), FEATURE_WIDTH)]
    )


def confusion_of(classifier: KernelClassifier, labels: Tensor, k: int) -> Tensor:
    """Returns the confusion matrix (K, K) on held-out images of the reference."""
    return torch.bincount(labels * k + classifier.held_out, minlength=k * k).view(k, k)


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the total variation distance of two vectors (K,) of shares."""
    return float((a - b).abs().sum() / 2)


def degraded(images: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Returns images (N, C, H, W) degraded in each way."""
    mean = real.mean(0)
    _, _, components = torch.pca_lowrank((real - mean).flatten(1), 8, center=False)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    projected = ((images - mean).flatten(1) @ components @ components.T).view_as(images) + mean
    return {
        "clean": images, "blurred": F.avg_pool2d(images, 5, 1, 2), "noisy": images + 0.5 * noise,
        "8 components": projected, "faded": (images + mean) / 2,
    }  # fmt: skip


def compare(name: str, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Prints and returns accuracy and distance of the shares for each classifier and way of degrading."""
    figures: dict[str, Any] = {}
    k, n = int(labels.max()) + 1, min(1024, len(images) * 7 // 10)
    real, known, held, true = images[:n], labels[:n], images[n : n + 1500], labels[n : n + 1500]
    target = torch.bincount(true, minlength=k) / len(true)
    makers: dict[str, Callable[[Tensor, Tensor], Classifier]] = {"kernel": kernel, "neighbours": NeighbourClassifier}
    for kind, make in makers.items():
        started = time.perf_counter()
        classifier = make(real, known)
        fitted = time.perf_counter()
        classifier(held[:512])
        seconds = time.perf_counter() - fitted, fitted - started
        cells, ways = [], {}
        for way, some in degraded(held, real).items():
            found = classifier(some)
            share = torch.bincount(found, minlength=k) / len(found)
            accuracy = float((found == true).double().mean())
            ways[way] = {"accuracy": accuracy, "distance": distance(share, target)}
            cells.append(f"{way} {accuracy:.3f} ({distance(share, target):.3f}")
            if isinstance(classifier, KernelClassifier):
                rates = error_rates(confusion_of(classifier, known, k))[0]
                cells[-1] += f", corrected {distance(corrected_shares(share, rates), target):.3f}"
            cells[-1] += ")"
        print(f"{name:11s} {kind:10s} fit {seconds[1]:.2f} s, 512 images {seconds[0]:.3f} s: {', '.join(cells)}")
        figures[kind] = ways
    return figures


def correction(name: str, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Prints and returns the mean distance of assigned and of corrected shares from the true ones, over sets of images.

    The images of each set are drawn from those that the classifier has not seen, with random shares (any shares are equally
    likely), and with equal ones.
    """
    k, n = int(labels.max()) + 1, min(1024, len(images) * 7 // 10)
    classifier, held, true = kernel(images[:n], labels[:n]), images[n:], labels[n:]
    rates, found = error_rates(confusion_of(classifier, labels[:n], k))[0], classifier(held)
    generator = np.random.default_rng(0)
    figures: dict[str, Any] = {"accuracy": float((found == true).double().mean())}
    for kind, concentration in (("random", 1.0), ("equal", np.inf)):
        distances = []
        for _ in range(SETS):
            shares = np.full(k, 1 / k) if np.isinf(concentration) else generator.dirichlet(np.full(k, concentration))
            weights = shares[true] / np.bincount(true, minlength=k)[true]
            rows = torch.from_numpy(generator.choice(len(held), IMAGES_OF_SET, p=weights / weights.sum()))
            actual, assigned = (torch.bincount(some[rows], minlength=k) / IMAGES_OF_SET for some in (true, found))
            distances.append((distance(assigned, actual), distance(corrected_shares(assigned, rates), actual)))
        figures[kind] = torch.tensor(distances).mean(0).tolist()
        without, corrected = figures[kind]
        print(f"{name:11s} {SETS} sets of {kind} shares: distance {without:.3f}, corrected {corrected:.3f}")
    return figures


class Autoencoder(nn.Module):
    """A small VAE of images (N, 1, 32, 32) in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(1024, 400), nn.ReLU(), nn.Linear(400, 32))
        self.decode = nn.Sequential(nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 1024), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        """Returns the loss."""
        mean, log_var = self.encode(images).chunk(2, 1)
        decoded = self.decode(mean + torch.randn_like(mean) * (log_var / 2).exp())
        kl = (mean.square() + log_var.exp() - log_var - 1).sum(1) / 2
        return ((decoded - images.flatten(1)).square().sum(1) / 2 + kl).mean()


def train(loss: Callable[[Tensor, Tensor], Tensor], module: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Trains for one epoch."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for rows in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        loss(images[rows], labels[rows]).backward()
        optimizer.step()


def while_training(images: Tensor, labels: Tensor, epochs: int = 8) -> dict[str, list[float]]:
    """Prints how far shares of samples of a VAE lie from those by a convolutional network, while the VAE trains.

    Returns:
        These distances after each epoch, by the classifier.
    """
    torch.manual_seed(0)
    real, known, rest, others = images[:1024], labels[:1024], images[1024:], labels[1024:]
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)
    )
    for _ in range(6):
        # blurred too, since samples of a VAE are
        train(lambda x, y: F.cross_entropy(judge(x), y) + F.cross_entropy(judge(F.avg_pool2d(x, 3, 1, 1)), y),
              judge, rest, others)  # fmt: skip
    classifiers: dict[str, Classifier] = {"kernel": kernel(real, known), "neighbours": NeighbourClassifier(real, known)}
    rates = error_rates(confusion_of(kernel(real, known), known, 10))[0]
    model, distances = Autoencoder(), dict[str, list[float]]()
    for epoch in range(epochs):
        train(lambda x, _: model(x), model, rest, others)
        with torch.no_grad():
            samples = model.decode(torch.randn(2048, 16)).view(-1, 1, 32, 32)
            by_network = torch.bincount(judge(samples).argmax(1), minlength=10) / 2048
        share = {kind: torch.bincount(c(samples), minlength=10) / 2048 for kind, c in classifiers.items()}
        found = share | {"kernel, corrected": corrected_shares(share["kernel"], rates)}
        cells = [
            f"{kind} {distance(some, by_network):.3f}, most {float(some.max()):.2f}" for kind, some in found.items()
        ]
        print(f"VAE, epoch {epoch + 1}: largest share by the network {float(by_network.max()):.2f}; {'; '.join(cells)}")
        for kind, some in found.items():
            distances.setdefault(kind, []).append(distance(some, by_network))
    return distances


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, help="folder of the files t10k-*-ubyte.gz")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    folder = options.mnist
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"held_out": {}, "correction": {}}
    for name, images, labels in data_sets(folder):
        figures["held_out"][name] = compare(name, images, labels)
        figures["correction"][name] = correction(name, images, labels)
        if name == "MNIST":
            figures["while_training"] = while_training(images, labels)
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
