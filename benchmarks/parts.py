"""The parts of the diagnostics that are measured on their own: each prepares its data and returns what is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gendiag import CosineMeanSimilarity, GenerationBalance, ManifoldEntropy, RegionMap, decoder_gram
from lightning_gendiag import find_regions as regions_found_in
from lightning_gendiag import k_star as k_star_of
from lightning_gendiag.diagnostics.generation_balance.monitor import FEATURE_WIDTH, PIXEL_WIDTH
from lightning_gendiag.diagnostics.manifold_entropy.monitor import MAX_BYTES, MAX_BYTES_ON_OTHERS, MAX_DIMS
from lightning_gendiag.functional.arrays import pieces
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.amounts import NUM_REFERENCE
from lightning_gendiag.model.features import FeatureExtractor, KernelClassifier, averaged_pixels, in_chunks

FEATURES = 64
"""Number of features."""

Call = Callable[[], object]


class Setting(NamedTuple):
    """The amount that a part is measured with."""

    size: int
    """Height and width of the images."""
    samples: int
    """Number of images or latents."""
    device: torch.device
    classes: int = 10
    regions: int = 5
    dims: int = MAX_DIMS
    """Number of latent dimensions."""

    def images(self, seed: int) -> Tensor:
        """Returns smooth images (N, 3, H, W) in 0..1."""
        generator = torch.Generator(self.device).manual_seed(seed)
        images = torch.empty(self.samples, 3, self.size, self.size, device=self.device)
        for some in pieces(images, 256):
            coarse = torch.rand(len(some), 3, 8, 8, device=self.device, generator=generator)
            some.copy_(F.interpolate(coarse, size=(self.size, self.size), mode="bilinear"))
        return images

    def reference(self) -> Setting:
        """Returns the setting of as many real images as are kept by default."""
        return self._replace(samples=min(self.samples, NUM_REFERENCE))

    def numbers(self, length: int, seed: int = 0) -> Tensor:
        """Returns normal numbers (N, length)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.samples, length, device=self.device, generator=generator)

    def labels(self) -> Tensor:
        """Returns classes (N,)."""
        return torch.arange(self.samples, device=self.device) % self.classes

    def region_map(self) -> RegionMap:
        """Returns a map of equal parts, row by row."""
        positions = self.size**2
        return RegionMap((torch.arange(positions) * self.regions // positions).view(self.size, self.size))


# ---- the parts ----


@cache
def network(size: int, dims: int, device: torch.device) -> nn.Sequential:
    """Returns a convolutional generator or decoder from latents (N, L) to images (N, 3, size, size)."""
    torch.manual_seed(0)
    wide = 4 * size
    layers: list[nn.Module] = [nn.Unflatten(1, (dims, 1, 1)), nn.ConvTranspose2d(dims, wide, 4)]
    for _ in range((size // 4).bit_length() - 1):
        layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1)]
        wide //= 2
    layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, 3, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers).to(device).eval().requires_grad_(False)


@cache
def judges(own: Setting) -> tuple[FeatureExtractor, KernelClassifier]:
    """Returns the feature extractor and the classifier of :func:`fitted`."""
    return fitted(own.images(0), own.labels())


def fitted(images: Tensor, labels: Tensor) -> tuple[FeatureExtractor, KernelClassifier]:
    """Returns the default feature extractor and classifier of generation balance."""
    extractor = FeatureExtractor(images, FEATURES)

    def responses(some: Tensor) -> Tensor:
        return extractor.responses(some).sqrt()

    known = [None, extractor.reference_responses.sqrt()]
    return extractor, KernelClassifier(
        images, labels, [(averaged_pixels, PIXEL_WIDTH), (responses, FEATURE_WIDTH)], known
    )


def sampling(own: Setting) -> Call:
    made, latents = network(own.size, own.dims, own.device), own.numbers(own.dims)
    return lambda: torch.cat([made(some) for some in pieces(latents, ModelAdapter().chunk_size)])


def compared(own: Setting, real: Tensor) -> CosineMeanSimilarity:
    """Returns a metric that has real images, and too few generated ones to take time."""
    metric = CosineMeanSimilarity(own.region_map(), reset_real_features=False).to(own.device)
    metric.update(real, real=True)
    metric.update(own._replace(samples=2).images(1), real=False)
    return metric


def real_side(own: Setting) -> Call:
    real = own.images(0)
    return lambda: compared(own, real).compute()


def compare(own: Setting) -> Call:
    metric, generated = compared(own, own.images(0)), own.images(1)
    # the real side is kept
    metric.compute()

    def call() -> object:
        metric.reset()
        metric.update(generated, real=False)
        return metric.compute()

    return call


def class_features(own: Setting) -> Call:
    extractor, images = judges(own.reference())[0], own.images(1)
    return lambda: in_chunks(extractor, images)


def classification(own: Setting) -> Call:
    classifier, images = judges(own.reference())[1], own.images(1)
    return lambda: classifier(images)


def frechet(own: Setting) -> Call:
    real, generated, labels = own.numbers(FEATURES), own.numbers(FEATURES, 1), own.labels()
    confusion = torch.ones(own.classes, own.classes) + 90 * torch.eye(own.classes)

    def call() -> object:
        metric = GenerationBalance(own.classes, confusion=confusion).to(own.device)
        metric.update(labels, real=True, features=real)
        metric.update(labels, real=False, features=generated)
        return metric.compute()

    return call


def k_star(own: Setting) -> Call:
    labels = own.labels()
    latents = own._replace(samples=own.classes).numbers(own.dims)[labels] + 2 * own.numbers(own.dims, 1)
    return lambda: k_star_of(latents, labels)


def jacobian(own: Setting) -> Call:
    decode, latents = network(own.size, own.dims, own.device), own.numbers(own.dims)
    max_bytes = MAX_BYTES.get(own.device.type, MAX_BYTES_ON_OTHERS)
    return lambda: decoder_gram(decode, latents, max_bytes=max_bytes)


def entropies(own: Setting) -> Call:
    jacobians = own._replace(samples=own.samples * 2 * own.dims).numbers(own.dims).double()
    jacobians = jacobians.view(own.samples, -1, own.dims)
    grams, order = jacobians.mT @ jacobians, torch.arange(own.dims)

    def call() -> object:
        metric = ManifoldEntropy(own.dims, order=order).to(own.device)
        metric.update(grams)
        return metric.compute()

    return call


def fit(own: Setting) -> Call:
    images, labels = own.images(0), own.labels()
    return lambda: fitted(images, labels)


def find_regions(own: Setting) -> Call:
    images = own.images(0)
    return lambda: regions_found_in(images, own.regions, progress=False)
