"""Shares of classes and the Fréchet distance within each class, over batches and processes, in constant memory."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.generation_balance.functional import (
    CONFIDENCE,
    GenerationBalanceResult,
    corrected_interval,
    corrected_shares,
    error_rates,
    share_error,
)
from lightning_gendiag.functional.distances import frechet_distance
from lightning_gendiag.functional.intervals import binomial_interval
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better


class _Known(NamedTuple):
    """What depends on the real images and the classifier alone."""

    counts: Tensor  # (K,) number of real images of each class
    share: Tensor  # (K,) their shares; without images all are equal
    interval: Tensor  # (K, 2) confidence bounds of these
    rates: Tensor  # (K, K) how often each class (rows) is assigned to each
    error: Tensor  # (K,) standard error that the classifier adds to each share


class GenerationBalance(Diagnostic):
    """Shares of classes among real and generated images, and the Fréchet distance (FID) within each class.

    Memory does not grow with the number of images: counts, and with features of length F sums of K F (F + 1) float64
    numbers for real and for generated images. That is 0.7 MB for 10 classes of 64 features and 670 MB for 10 of 2,048.

    Args:
        num_classes: K.
        classes: (K,) numbers of the classes, ascending, where these are not 0..K-1.
        confusion: (K, K) number of real images by their true class (rows) and the class that the classifier assigned
            (columns), from images that it was not trained on. Shares of generated images are corrected by it; by default
            the classifier is taken to make no errors.
        confidence: probability that no class is wrongly called dropped or dominating, over all classes together.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = GenerationBalance(2)
        >>> metric.update(torch.tensor([0, 1]).repeat(50), real=True)
        >>> metric.update(torch.tensor([0, 0]).repeat(50), real=False)
        >>> result = metric.compute()
        >>> float(result.imbalance), result.dropped.tolist()
        (0.5, [False, True])
    """

    plotted = ("class_", "fid_class_")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "imbalance": less_is_better(
            "Fraction of generated images that would have to change class to match the real shares (total variation)."
        ),
        "divergence": less_is_better("KL divergence of the generated from the real shares of classes.", unit="nats"),
        "dropped": less_is_better("Number of classes that are surely less than half as frequent as among real images."),
        "dominating": less_is_better(
            "Number of classes that are surely more than twice as frequent as among real images."
        ),
        "undetermined": less_is_better(
            "Number of classes whose share the classifier cannot determine, since it is too often wrong."
        ),
        "coverage": more_is_better(
            "Fraction of the real classes that are generated with at least a tenth of their real share."
        ),
        "fid_mean": less_is_better("Mean Fréchet distance within classes.", optional=True),
        "fid_worst": less_is_better("Largest Fréchet distance within a class.", optional=True),
        "invalid": less_is_better(
            "Fraction of the generated images that are not finite, or whose features are not, and that are left out."
        ),
        "accuracy": more_is_better(
            "Accuracy of the classifier on real images that it was not trained on.", optional=True
        ),
        "class_{c}": ScalarInfo(
            "Fraction of generated images of the class, corrected for the classifier's errors, for up to 20 classes."
        ),
        "fid_class_{c}": less_is_better(
            "Fréchet distance of real and generated features within the class, for up to 20 classes.", optional=True
        ),
    }
    counts: Tensor
    featured: Tensor
    sums: Tensor
    products: Tensor
    left_out: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        classes: Tensor | None = None,
        confusion: Tensor | None = None,
        confidence: float = CONFIDENCE,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(
                f"num_classes must be at least 2, got {num_classes}. To fix this, pass the number of classes of the labels."
            )
        if not 0.5 < confidence < 1:
            raise ValueError(
                f"confidence must be in (0.5, 1), got {confidence}. To fix this, pass a number such as 0.999."
            )
        if classes is None:
            classes = torch.arange(num_classes)
        elif classes.shape != (num_classes,) or classes.is_floating_point() or not (classes.diff() > 0).all():
            raise ValueError(
                f"classes must be ({num_classes},) ascending integers, got {classes.dtype} of shape {tuple(classes.shape)}. "
                "To fix this, pass labels.unique() and its length as num_classes."
            )
        if confusion is not None:
            confusion = confusion.detach().double().cpu()
            shape = (num_classes, num_classes)
            if confusion.shape != shape or not (confusion.isfinite() & (confusion >= 0)).all():
                raise ValueError(
                    f"confusion must be {shape} counts of at least 0, got {tuple(confusion.shape)}. "
                    "To fix this, count real images by their true class (rows) and the class assigned (columns)."
                )
        self.num_classes, self.confidence, self.confusion = num_classes, confidence, confusion
        self._known: _Known | None = None
        self.classes = classes.detach().long().cpu()
        # the first axis is generated, real; the length of the features is not known yet, and sums grow to it from 1
        pair = (2, num_classes)
        self.add_sums(counts=pair, featured=pair, sums=(*pair, 1), products=(*pair, 1, 1), left_out=(2,))
        self.add_configuration(
            num_classes=num_classes, classes=self.classes, confidence=confidence, confusion=confusion
        )

    def update(self, labels: Tensor, real: bool, features: Tensor | None = None, finite: Tensor | None = None) -> None:
        """Adds images by their classes.

        Args:
            labels: (N,) integers, each the number of a class: the true one of a real image and that of a classifier for a
                generated one.
            real: whether the images are real.
            features: (N, F) features of the images, for the Fréchet distance within each class, from which images whose
                features contain nan or inf are left out.
            finite: (N,) booleans, false for images that are left out of everything and counted as invalid; by default
                those whose features contain nan or inf.

        Raises:
            ValueError: if an argument has another shape, type or range than expected.
        """
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be (N,) integers, got {labels.dtype} of shape {tuple(labels.shape)}. "
                "To fix this, pass one class number per image, such as scores.argmax(1)."
            )
        labels = self._positions(labels.detach().long())
        if finite is not None and (finite.shape != labels.shape or finite.dtype != torch.bool):
            raise ValueError(
                f"finite must be ({len(labels)},) booleans, got {finite.dtype} of shape {tuple(finite.shape)}. "
                "To fix this, pass images.flatten(1).isfinite().all(1)."
            )
        side = self.counts.new_tensor([not real, real])
        if features is not None:
            f = self._checked(features, len(labels))
            has_features = f.isfinite().all(1)
            finite = has_features if finite is None else finite
            self._add_features(labels[finite & has_features], f[finite & has_features], side)
        if finite is not None:
            self.accumulate(left_out=side * (~finite).sum())
            labels = labels[finite]
        self.accumulate(counts=side[:, None] * torch.bincount(labels, minlength=self.num_classes))

    def _positions(self, labels: Tensor) -> Tensor:
        """Returns the positions 0..K-1 of labels (N,) among the classes."""
        classes = self.classes.to(labels.device)
        positions = torch.searchsorted(classes, labels.contiguous()).clamp(max=self.num_classes - 1)
        if (classes[positions] != labels).any():
            low, high = labels.aminmax()
            is_range = int(classes[-1]) - int(classes[0]) == self.num_classes - 1
            wanted = f"{int(classes[0])} to {int(classes[-1])}" if is_range else f"of {self.num_classes} given classes"
            raise ValueError(
                f"labels must be {wanted}, got {int(low)} to {int(high)}. "
                "To fix this, pass a larger num_classes, or classes=labels.unique() of all labels."
            )
        return positions

    def _add_features(self, labels: Tensor, features: Tensor, side: Tensor) -> None:
        """Adds the sums of finite features (n, F) of each class."""
        sums = features.new_zeros(self.num_classes, features.shape[1])
        products = features.new_zeros(self.num_classes, features.shape[1], features.shape[1])
        counts = torch.bincount(labels, minlength=self.num_classes)
        # read once, so that the host waits for no class
        for c, own in enumerate(torch.split(features[labels.argsort(stable=True)], counts.tolist())):
            if len(own):
                sums[c], products[c] = own.sum(0), own.T @ own
        self.accumulate(
            featured=side[:, None] * counts,
            sums=side[:, None, None] * sums,
            products=side[:, None, None, None] * products,
        )

    def _checked(self, features: Tensor, n: int) -> Tensor:
        """Returns features (n, F) in float64."""
        known = self.sums.shape[2] if float(self.featured.sum()) else None
        if features.ndim != 2 or len(features) != n or known not in (None, features.shape[1]):
            raise ValueError(
                f"features must be ({n}, {known or 'F'}), got {tuple(features.shape)}. "
                "To fix this, pass one row of features per label, of the same length at each update."
            )
        return features.detach().double()

    def compute(self) -> GenerationBalanceResult:
        """Computes shares, intervals and distances over all images; shares are nan for a side without images."""
        # all bounds hold together: two sides of two shares of K classes
        tail = (1 - self.confidence) / (4 * self.num_classes)
        device = self.counts.device
        # few numbers, in many small steps
        (generated, real), left_out = self.counts.cpu(), self.left_out.cpu()
        seen = generated.sum() + left_out[0]
        share, interval = generated / generated.sum(), binomial_interval(generated, tail)
        known, accuracy = self._known_of(real, tail), torch.full_like(seen, math.nan)
        if self.confusion is not None:
            accuracy = self.confusion.trace() / self.confusion.sum()
            if float(generated.sum()):
                share = corrected_shares(share, known.rates, known.share)
                interval = corrected_interval(generated, share, self.confusion, tail)
        result = GenerationBalanceResult(
            real_count=real,
            generated_count=generated,
            generated_share=share,
            real_interval=known.interval,
            interval=interval,
            classifier_error=known.error,
            fid=self._distances(),
            invalid=left_out[0] / seen if float(seen) else torch.zeros_like(seen),
            accuracy=accuracy,
            classes=self.classes,
        )
        return GenerationBalanceResult(*(value.to(device) for value in result))

    def _known_of(self, counts: Tensor, tail: float) -> _Known:
        """What depends on the counts (K,) of real images alone, kept as long as these are the same."""
        if self._known is None or not torch.equal(self._known.counts, counts):
            share = counts / counts.sum() if float(counts.sum()) else torch.full_like(counts, 1 / self.num_classes)
            rates, error = torch.eye(self.num_classes, dtype=counts.dtype), torch.zeros_like(counts)
            if self.confusion is not None:
                rates, error = error_rates(self.confusion)[0], share_error(share, self.confusion)
            self._known = _Known(counts.clone(), share, binomial_interval(counts, tail), rates, error)
        return self._known

    def _distances(self) -> Tensor:
        """Returns the Fréchet distance (K,) within each class; nan where a side has fewer than two images of it."""
        n, enough = self.featured[..., None], (self.featured >= 2).all(0)
        if not enough.any():
            return torch.full_like(self.featured[0], math.nan)
        mean = self.sums / n
        covariance = (self.products - n[..., None] * mean[..., None] * mean[..., None, :]) / (n[..., None] - 1)
        mean = mean.where(enough[:, None], 0.0)
        covariance = covariance.where(enough[:, None, None], 0.0)
        distances = frechet_distance(mean[0], covariance[0], mean[1], covariance[1]).clamp(min=0)
        return distances.where(enough, math.nan)
