"""What judges images where a diagnostic needs features or classes and the user gave none: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gendiag.functional import as_images, exact_matmul, pieces

CHUNK = 256
"""Images that are looked at together, at most."""

POSITIONS = 1 << 22
"""Positions of images that are looked at together: 256 images of 128x128, 16 of 512x512."""

PIXELS = 4096
"""Images of up to so many numbers are compared by their pixels, larger ones by features."""

SKLEARN_MISSING = "{who} needs scikit-learn: pip install 'lightning_gendiag[latent]'"


class FeatureNetwork(nn.Module):
    """Features of small images from two layers of seeded random filters, whitened by the reference's principal components.

    Most first filters have zero mean, so that they answer to edges: blur, noise, shifts and darkness each move the
    distribution of the features. On the reference they have mean 0, no correlation, and variance 1, or less where they
    hardly vary. It knows nothing of objects; where a trained network is at hand it is the better judge.

    Args:
        images: the reference (N, C, H, W), at least 4.
        num_features: at most so many, and fewer than there are images.
        seed: of the filters.

    Raises:
        ValueError: if there are too few images.
    """

    mean: Tensor
    scale: Tensor
    first: Tensor
    second: Tensor
    centre: Tensor
    components: Tensor

    def __init__(self, images: Tensor, num_features: int = 64, seed: int = 0) -> None:
        super().__init__()
        images = as_images(images).float()
        if len(images) < 4:
            raise ValueError(f"images must be at least 4, got {len(images)}.")
        generator = torch.Generator().manual_seed(seed)
        channels = images.shape[1]
        first = torch.randn(32, channels, 5, 5, generator=generator)
        first[8:] -= first[8:].mean((1, 2, 3), keepdim=True)
        second = torch.randn(64, 32, 5, 5, generator=generator)
        self.register_buffer("mean", images.mean().cpu())
        self.register_buffer("scale", images.std().clamp(min=1e-6).cpu())
        self.register_buffer("first", first / (25 * channels) ** 0.5)
        self.register_buffer("second", second / (25 * 32) ** 0.5)
        self.to(images.device)
        answers = torch.cat([self._answers(chunk) for chunk in pieces(images, together(images))]).double()
        centre = answers.mean(0)
        kept = min(num_features, len(images) - 1)
        variance, directions = torch.linalg.eigh((answers - centre).T.cov())
        variance, directions = variance.flip(0)[:kept], directions.flip(1)[:, :kept]
        # what hardly varies among real images is not blown up
        deviation = variance.clamp(min=max(0.04 * float(variance[0]), 1e-12)).sqrt()
        self.register_buffer("centre", centre.float())
        self.register_buffer("components", (directions / deviation).float())
        self.num_features = kept

    def _answers(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.scale
        x = F.relu(F.conv2d(x, self.first, stride=2, padding=2))
        x = F.relu(F.conv2d(x, self.second, stride=2, padding=2))
        return F.adaptive_avg_pool2d(x, 4).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, num_features), float32."""
        with exact_matmul():
            return (self._answers(as_images(images).float()) - self.centre) @ self.components


class NeighbourClassifier:
    """Classes of images by their nearest neighbours in the reference.

    Args:
        images: the reference (N, C, H, W).
        labels: (N,) integers.
        features: what is compared, callable from images to (n, F); pixels by default.
        neighbours: k.
        accuracy: whether to measure it.

    Attributes:
        accuracy: on held-out reference images, by five-fold cross-validation; nan with fewer than 10 images, or where
            not asked for.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        features: Callable[[Tensor], Tensor] | None = None,
        neighbours: int = 3,
        accuracy: bool = True,
    ) -> None:
        try:
            from sklearn.model_selection import cross_val_predict
            from sklearn.neighbors import KNeighborsClassifier
        except ImportError as error:
            raise ModuleNotFoundError(SKLEARN_MISSING.format(who="a nearest-neighbour classifier")) from error
        self.features = features
        x, y = self._rows(images), labels.cpu().numpy()
        # the folds that measure the accuracy hold four fifths
        self.model = KNeighborsClassifier(max(1, min(neighbours, len(x) * 4 // 5)), algorithm="brute")
        self.accuracy = float("nan")
        if accuracy and len(x) >= 10:
            from sklearn.model_selection import KFold

            folds = KFold(5, shuffle=True, random_state=0)
            self.accuracy = float((cross_val_predict(self.model, x, y, cv=folds) == y).mean())
        self.model.fit(x, y)

    def _rows(self, images: Tensor) -> Any:
        images = as_images(images)
        return in_chunks(self.features or (lambda some: some.flatten(1)), images).cpu().numpy()

    def __call__(self, images: Tensor) -> Tensor:
        """(N,) labels; images must be finite."""
        if len(images) == 0:
            return torch.zeros(0, dtype=torch.long, device=images.device)
        return torch.from_numpy(self.model.predict(self._rows(images))).long().to(images.device)

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, K) share of each of the reference's classes among the neighbours."""
        return torch.from_numpy(self.model.predict_proba(self._rows(images)))


def together(images: Tensor) -> int:
    """How many images (N, C, H, W) are looked at together."""
    return max(1, min(CHUNK, POSITIONS // max(1, images.shape[2] * images.shape[3])))


def space_for(images: Tensor, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    """What nearest neighbours are found by: None, the pixels, for small images (N, C, H, W), a network for large ones."""
    return None if images[0].numel() <= PIXELS else network


def in_chunks(judge: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a judge says of images, some at a time, without gradients, as (N, F)."""
    with torch.no_grad():
        parts = [judge(as_images(chunk)).detach() for chunk in pieces(images, together(images))]
    return torch.cat([part.flatten(1) for part in parts])


def judge_of(given: Any, probe: Any) -> Callable[[Tensor], Any] | None:
    """A module as it is, a callable with the model as its first argument, None as None."""
    if given is None:
        return None
    if isinstance(given, nn.Module):
        if any(part is given for part in probe.module.modules()):
            # its modes are kept by the probe
            return lambda images: given(probe.as_input(images))
        return given.to(probe.module.device).eval()
    return lambda images: given(probe.module, probe.as_input(images))


def moves(given: Any, probe: Any) -> bool:
    """Whether what a judge says may change as the model trains: a callable's, or a part of the model's."""
    if isinstance(given, nn.Module):
        return any(part is given for part in probe.module.modules())
    return given is not None


def class_of(output: Any, n: int) -> Tensor:
    """Labels (n,) in what a classifier returns: labels, or a score (n, K) for each class.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and len(output) == n:
        if output.ndim == 1 and not output.is_floating_point():
            return output.long()
        if output.ndim == 2 and output.shape[1] > 1:
            return output.argmax(1)
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"classifier must return ({n},) labels or ({n}, K) scores of two classes or more for {n} images, got {got}."
    )
