"""A feature extractor and a classifier of images that need neither training nor a download, for users who bring none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gendiag.functional.arrays import as_images, exact_matmul, kth_smallest, pieces
from lightning_gendiag.functional.distances import squared_distances

CHUNK = 128
"""Largest number of images in a chunk."""

POSITIONS = 1 << 22
"""Largest number of pixels in a chunk: 64 images of 256x256, or 16 of 512x512."""

CACHED = {"cpu": 1 << 16}
"""Largest number of pixels that filters see together, by the kind of device: more leave a processor's cache."""

PIXELS = 4096
"""Images with at most this many values are compared by their pixels, larger ones by features."""

LEARNED = 2048
"""Largest number of images that a classifier learns from; more take seconds."""

RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridges of the kernel regression that are tried."""

FOLDS = 10
"""Number of parts of the reference that are left out in turn."""

ITERATIONS = 3
"""Number of steps of the subspace iteration."""

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

    Attributes:
        reference_responses: The responses (N, 1024) of the filters to the reference, on the CPU.

    Raises:
        ValueError: If there are fewer than 4 images.
    """

    mean: Tensor
    scale: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, images: Tensor, num_features: int = 64, seed: int = 0) -> None:
        super().__init__()
        images = as_images(images).float()
        if len(images) < 4:
            raise ValueError(f"images must be at least 4, got {len(images)}. To fix this, pass more real images.")
        generator = torch.Generator().manual_seed(seed)
        channels = images.shape[1]
        first = torch.randn(32, channels, 5, 5, generator=generator, dtype=torch.float32)
        first[8:] -= first[8:].mean((1, 2, 3), keepdim=True)
        second = torch.randn(64, 32, 5, 5, generator=generator, dtype=torch.float32)
        self.register_buffer("mean", images.mean().cpu())
        self.register_buffer("scale", images.std().clamp(min=1e-6).cpu())
        self.register_buffer("first", first / (25 * channels) ** 0.5)
        self.register_buffer("second", second / (25 * 32) ** 0.5)
        self.to(images.device)
        self.reference_responses = in_chunks(self.responses, images).cpu()
        self.num_features = min(num_features, len(images) - 1)

    @cached_property
    def _projection(self) -> tuple[Tensor, Tensor]:
        """The mean (1024,) of the responses and the components (1024, num_features), computed where they are first needed."""
        responses = self.reference_responses.to(self.mean.device)
        centre = responses.mean(0, dtype=torch.float64).float()
        variance, directions = principal_components(responses - centre, self.num_features)
        # directions that hardly vary among real images would otherwise amplify noise
        deviation = variance.clamp(min=max(0.04 * float(variance[0]), 1e-12)).sqrt()
        return centre, (directions / deviation).float()

    def responses(self, images: Tensor) -> Tensor:
        """Returns the pooled responses (N, 1024) of the filters to images (N, C, H, W), at least 0, in float32."""
        images = as_images(images)
        size = CACHED.get(images.device.type, POSITIONS) // (images.shape[2] * images.shape[3])
        return torch.cat([self._responses(some) for some in pieces(images, max(1, size))])

    def _responses(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.scale
        x = F.conv2d(x, self.first, stride=2, padding=2).relu_()
        x = F.conv2d(x, self.second, stride=2, padding=2).relu_()
        return F.adaptive_avg_pool2d(x, 4).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (N, num_features) of images (N, C, H, W), in float32."""
        return self.projected(self.responses(images))

    def of_reference(self, rows: slice = slice(None)) -> Tensor:
        """Returns the features (n, num_features) of some images of the reference, which are not computed again."""
        return self.projected(self.reference_responses[rows].to(self.mean.device))

    def projected(self, responses: Tensor) -> Tensor:
        """Returns the features (N, num_features) of the images with these responses (N, 1024)."""
        centre, components = (part.to(responses.device) for part in self._projection)
        with exact_matmul():
            return (responses - centre) @ components


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Computes the first principal components by subspace iteration with as many vectors again.

    Their variances are those of the rows along them, and they are not correlated. The variances fall short of the exact ones
    by less than 0.1 % in sum on filter responses, at a tenth of the time of an eigendecomposition.

    Source: Halko, Martinsson and Tropp, *Finding structure with randomness*, 2011.

    Args:
        rows: (N, D) centred rows in float32.
        count: Number of components.

    Returns:
        (count,) variances in falling order and (D, count) orthonormal directions, in float64.
    """
    size = min(2 * count, *rows.shape)
    basis = torch.randn(rows.shape[1], size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(rows)
    with exact_matmul():
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        reduced, basis = (rows @ basis).double(), basis.double()
    variance, directions = torch.linalg.eigh(reduced.T @ reduced / (len(rows) - 1))
    return variance.flip(0)[:count], basis @ directions.flip(1)[:, :count]


class KernelClassifier:
    """Classifies images by kernel ridge regression on the reference, without training.

    The kernel is a mean of Gaussian kernels, by default of two: of pixels averaged to at most 16x16, and of the responses of
    the filters of a :class:`FeatureExtractor`, which is narrower, so that filters decide only where there are similar real
    images. The ridge is the one with the smallest error on images that are left out. Distances are computed in float32 and
    the regression in float64.

    Accuracy on held-out images with 1,024 real ones (140 faces), beside three nearest neighbours by pixels: MNIST 0.93 and
    0.89, digits 0.99 and 0.98, faces 0.97 and 0.93, textures 0.83 and 0.51, patches of photographs 0.94 and 0.77. It takes
    about a second to fit and 0.1 s for 512 images on one core; ``benchmarks/classifier.py`` measures it.

    Args:
        images: The reference (N, C, H, W), of which up to 2,048 are learned from.
        labels: The labels (N,) of the reference, integers from 0.
        spaces: Pairs of a callable from images (n, C, H, W) to what is compared (n, D), and the width of its kernel: the
            variance as a fraction of the median squared distance of two images.
        known: For each space what is compared of the reference (N, D) where it is known, else None.

    Attributes:
        held_out: The labels (N,) that it assigns to each image of the reference when it has learned from nine tenths of the
            others only.

    Example:
        >>> images = torch.tensor([-1.0, 1.0]).repeat(8)[:, None, None, None].expand(16, 1, 4, 4)
        >>> classifier = KernelClassifier(images, torch.arange(16) % 2, [(averaged_pixels, 0.3)])
        >>> classifier(images[:4])
        tensor([0, 1, 0, 1])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        spaces: Sequence[tuple[Callable[[Tensor], Tensor], float]],
        known: Sequence[Tensor | None] = (),
    ) -> None:
        labels = labels.cpu().long()
        self.spaces = [space for space, _ in spaces]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        learned, rest = order[:LEARNED], order[LEARNED:]
        self._rows = self._compared(images[learned], [part if part is None else part[learned] for part in known])
        self._centres = [part.mean(0) for part in self._rows]
        for part, centre in zip(self._rows, self._centres, strict=True):
            part -= centre
        squares = [squared_distances(part, part).fill_diagonal_(0) for part in self._rows]
        # the median of two different images; the distances of an image from itself are the smallest
        middle = len(learned) + (len(learned) * (len(learned) - 1) - 1) // 2
        self._variances = [
            max(float(kth_smallest(square, middle)) * width, 1e-12)
            for square, (_, width) in zip(squares, spaces, strict=True)
        ]
        self._numbers, places = torch.unique(labels[learned], return_inverse=True)
        targets = F.one_hot(places).double()
        kernel = self._kernel(squares)
        fits = (_fit(kernel, targets, ridge) for ridge in RIDGES)
        _, self._weights, without_fold = min(fits, key=lambda fit: fit[0])
        self.held_out = torch.empty_like(labels)
        self.held_out[learned] = self._numbers[without_fold]
        if len(rest):
            others = self._compared(images[rest], [part if part is None else part[rest] for part in known])
            self.held_out[rest] = self._classes(others)

    def _compared(self, images: Tensor, known: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Returns what is compared of images (n, C, H, W), (n, D) in float32 on the CPU for each space."""
        with exact_matmul():
            parts = zip(self.spaces, known or [None] * len(self.spaces), strict=True)
            return [(in_chunks(space, images) if part is None else part).cpu().float() for space, part in parts]

    def _kernel(self, squares: list[Tensor]) -> Tensor:
        """Returns the kernel (n, m) of squared distances (n, m) in each space, which it overwrites and empties."""
        kernel = torch.zeros_like(squares[0])
        for variance in self._variances:
            kernel += squares.pop(0).mul_(-0.5 / variance).exp_()
        return kernel.div_(len(self._variances))

    def __call__(self, images: Tensor, known: Sequence[Tensor | None] = ()) -> Tensor:
        """Returns the labels (N,) of images (N, C, H, W), which must be finite.

        Args:
            images: The images.
            known: For each space what is compared of the images (N, D) where it is known, else None.
        """
        return self._classes(self._compared(images, known)).to(images.device)

    def _classes(self, rows: list[Tensor]) -> Tensor:
        """Returns the labels (N,) of what is compared of images."""
        classes = []
        for some in zip(*(torch.split(part, CHUNK) for part in rows), strict=True):
            parts = zip(some, self._centres, self._rows, strict=True)
            squares = [squared_distances(part - centre, held) for part, centre, held in parts]
            classes.append((self._kernel(squares).double() @ self._weights).argmax(1))
        numbers: Tensor = self._numbers[torch.cat(classes)]
        return numbers


def _fit(kernel: Tensor, targets: Tensor, ridge: float) -> tuple[float, Tensor, Tensor]:
    """Fits a kernel regression in float64.

    Args:
        kernel: (N, N) kernel matrix.
        targets: (N, K), 1 where a row is of a class.
        ridge: What is added to the diagonal.

    Returns:
        The sum of the squared errors on each row of a regression without it, the weights (N, K), and the classes (N,) that
        :func:`_without_folds` returns.
    """
    # column by column, since LAPACK then works in place: these are the largest matrices of an evaluation
    inverse = kernel.double().mT
    inverse.diagonal().add_(ridge)
    torch.linalg.cholesky(inverse, out=inverse)
    torch.cholesky_inverse(inverse, out=inverse)
    weights = inverse @ targets
    # in closed form (Allen's PRESS)
    error = float((weights / inverse.diagonal()[:, None]).square().sum())
    return error, weights, _without_folds(targets, weights, inverse)


def _without_folds(targets: Tensor, weights: Tensor, inverse: Tensor) -> Tensor:
    """Returns the class (N,) that a kernel regression assigns to each row when it is fitted without the row's fold.

    Each fold has its part of every class. If single rows were left out, the class of each would be rarer among the others,
    and a classifier that only guesses would seem to be always wrong.

    Args:
        targets: (N, K), 1 where a row is of a class.
        weights: (N, K) of the regression on all rows.
        inverse: (N, N) inverse of the kernel matrix with its ridge.
    """
    held_out = torch.empty(len(targets), dtype=torch.long)
    order = targets.argmax(1).argsort(stable=True)
    for first in range(FOLDS):
        fold = order[first::FOLDS]
        errors = torch.linalg.solve(inverse[fold[:, None], fold], weights[fold])
        held_out[fold] = (targets[fold] - errors).argmax(1)
    return held_out


def averaged_pixels(images: Tensor) -> Tensor:
    """Returns the pixels (N, D) of images (N, C, H, W), averaged to at most 16x16."""
    images = as_images(images).float()
    return F.adaptive_avg_pool2d(images, (min(16, images.shape[2]), min(16, images.shape[3]))).flatten(1)


class NeighbourClassifier:
    """Classifies images by their nearest neighbours in the reference.

    Args:
        images: The reference (N, C, H, W).
        labels: The labels (N,) of the reference, integers.
        features: A callable from images (n, C, H, W) to the features (n, D) that are compared; by default, pixels are.
        neighbours: The number of neighbours.
        known: The features (N, D) of the reference where they are known.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        features: Callable[[Tensor], Tensor] | None = None,
        neighbours: int = 3,
        known: Tensor | None = None,
    ) -> None:
        try:
            from sklearn.neighbors import KNeighborsClassifier
        except ImportError as error:
            raise ModuleNotFoundError(SKLEARN_MISSING.format(who="a nearest-neighbour classifier")) from error
        self.features = features
        x = self._rows(images) if features is None or known is None else known.cpu().numpy()
        y = labels.cpu().numpy()
        self.model = KNeighborsClassifier(min(neighbours, len(x)), algorithm="brute").fit(x, y)

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
