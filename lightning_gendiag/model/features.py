"""A feature extractor and a classifier of images that need neither training nor a download, for users who bring none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gendiag.functional.arrays import as_images, exact_matmul, pieces

CHUNK = 256
"""Largest number of images in a chunk."""

POSITIONS = 1 << 22
"""Largest number of pixels in a chunk: 256 images of 128x128, or 16 of 512x512."""

PIXELS = 4096
"""Images with at most this many values are compared by their pixels, larger ones by features."""

SKLEARN_MISSING = "{who} needs scikit-learn: pip install 'lightning_gendiag[latent]'"


class FeatureExtractor(nn.Module):
    """Extracts features with two layers of seeded random filters, whitened by the principal components of the reference.

    Most filters of the first layer have zero mean, so that they respond to edges: blur, noise, shifts and darkness each
    change the distribution of the features. On the reference, the features have mean 0, no correlation, and variance 1,
    or less where they hardly vary. They do not represent objects; a trained network is better where there is one.

    Args:
        images: The reference (N, C, H, W), with at least 4 images.
        num_features: Largest number of features; there are always fewer features than images.
        seed: The seed of the filters.

    Raises:
        ValueError: If there are fewer than 4 images.
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
            raise ValueError(f"images must be at least 4, got {len(images)}. To fix this, pass more real images.")
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
        responses = torch.cat([self._responses(chunk) for chunk in pieces(images, together(images))]).double()
        centre = responses.mean(0)
        self.num_features = min(num_features, len(images) - 1)
        variance, directions = torch.linalg.eigh((responses - centre).T.cov())
        variance, directions = variance.flip(0)[: self.num_features], directions.flip(1)[:, : self.num_features]
        # directions that hardly vary among real images would otherwise amplify noise
        deviation = variance.clamp(min=max(0.04 * float(variance[0]), 1e-12)).sqrt()
        self.register_buffer("centre", centre.float())
        self.register_buffer("components", (directions / deviation).float())

    def _responses(self, images: Tensor) -> Tensor:
        """Returns the pooled responses (N, 1024) of the filters of the second layer."""
        x = (images - self.mean) / self.scale
        x = F.relu(F.conv2d(x, self.first, stride=2, padding=2))
        x = F.relu(F.conv2d(x, self.second, stride=2, padding=2))
        return F.adaptive_avg_pool2d(x, 4).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (N, num_features) of images (N, C, H, W), in float32."""
        with exact_matmul():
            return (self._responses(as_images(images).float()) - self.centre) @ self.components


class NeighbourClassifier:
    """Classifies images by their nearest neighbours in the reference.

    Args:
        images: The reference (N, C, H, W).
        labels: The labels (N,) of the reference, integers.
        features: A callable from images (n, C, H, W) to the features (n, D) that are compared; by default, pixels are.
        neighbours: The number of neighbours.
        accuracy: Whether to measure the accuracy.

    Attributes:
        accuracy: The accuracy on held-out reference images, by five-fold cross-validation; nan if there are fewer than
            10 images or it was not measured.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
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
        # each fold of the cross-validation trains on four fifths of the images
        self.model = KNeighborsClassifier(max(1, min(neighbours, len(x) * 4 // 5)), algorithm="brute")
        self.accuracy = float("nan")
        if accuracy and len(x) >= 10:
            from sklearn.model_selection import KFold

            folds = KFold(5, shuffle=True, random_state=0)
            self.accuracy = float((cross_val_predict(self.model, x, y, cv=folds) == y).mean())
        self.model.fit(x, y)

    def _rows(self, images: Tensor) -> Any:
        """Returns the rows (N, D) of a NumPy array that are compared."""
        images = as_images(images)
        return in_chunks(self.features or (lambda some: some.flatten(1)), images).cpu().numpy()

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the labels (N,) of images (N, C, H, W), which must be finite."""
        if len(images) == 0:
            return torch.zeros(0, dtype=torch.long, device=images.device)
        return torch.from_numpy(self.model.predict(self._rows(images))).long().to(images.device)

    def probabilities(self, images: Tensor) -> Tensor:
        """Returns the fraction (N, K) of the neighbours in each class of the reference."""
        return torch.from_numpy(self.model.predict_proba(self._rows(images)))


def together(images: Tensor) -> int:
    """Returns the number of images (N, C, H, W) that make up a chunk, by their size."""
    return max(1, min(CHUNK, POSITIONS // max(1, images.shape[2] * images.shape[3])))


def space_for(images: Tensor, network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Returns what compares images (N, C, H, W): None, which stands for pixels, if they are small, and the network if not."""
    return None if images[0].numel() <= PIXELS else network


def in_chunks(extract: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Returns the output (N, D) of a network for images (N, C, H, W), in chunks and without gradients."""
    with torch.no_grad():
        parts = [extract(as_images(chunk)).detach() for chunk in pieces(images, together(images))]
    return torch.cat([part.flatten(1) for part in parts])


def class_of(output: Any, n: int) -> Tensor:
    """Returns the labels (n,) in the output of a classifier, which holds labels or one score (n, K) for each class.

    Raises:
        ValueError: If the output is neither.
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
        f"classifier must return ({n},) labels or ({n}, K) scores of two classes or more for {n} images, got {got}. "
        "To fix this, pass a callable that returns one of them."
    )
