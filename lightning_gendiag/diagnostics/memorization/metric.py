"""Copies of training images and repetitions among samples over batches and processes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gendiag.diagnostics.memorization.functional import (
    RATIO,
    MemorizationResult,
    TrainingSide,
    as_rows,
    check_images,
    check_ratio,
    check_side,
    summarise,
    training_side,
)
from lightning_gendiag.functional.arrays import as_data, canonical_order
from lightning_gendiag.metric import Diagnostic, ScalarInfo, less_is_better, more_is_better

SIDES = ("generated", "real", "held_out")
"""Of which images are held, and their features as ``<side>_features``."""


class Memorization(Diagnostic):
    """:func:`memorization` over batches and processes, by pixels and, where they are given, by features.

    Memory: all images, where half precision stays what it is, and the pixels that are compared of training images and of the
    samples once more in float32. What depends on real images alone is kept until these change.

    Args:
        ratio: see :func:`memorization`.
        max_side: see :func:`memorization`.
        reset_real_features: whether ``reset`` drops the training images and the held-out ones.
        kwargs: arguments of torchmetrics' ``Metric``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> metric = Memorization()
        >>> images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> metric.update(images, real=True)
        >>> metric.update(images[[3, 3, 5]] + 0.01, real=False)
        >>> result = metric.compute()
        >>> float(result.copied), float(result.images_copied), float(result.repeated.round(decimals=2))
        (1.0, 2.0, 0.67)
    """

    higher_is_better = False
    plotted = ("copied", "real_copied", "repeated", "feature_copied", "feature_repeated")
    scalar_info: ClassVar[dict[str, ScalarInfo]] = {
        "copied": less_is_better("Fraction of the samples that copy a training image."),
        "real_copied": ScalarInfo("Fraction of fresh real images that would count as copies."),
        "images_copied": less_is_better("Number of different training images that are copied."),
        "authenticity": more_is_better(
            "Fraction of the samples that are no closer to a training image than it is to its nearest other one."
        ),
        "real_authenticity": ScalarInfo("The same fraction of fresh real images."),
        "repeated": less_is_better("Fraction of the samples that have a near-duplicate among the samples."),
        "vendi": more_is_better("Vendi score of up to 128 samples, the effective number of different ones."),
        "diversity": more_is_better(
            "Vendi score of the samples relative to that of as many real images, about 1 where both are as diverse."
        ),
        "copying_z": more_is_better(
            "Rank sum of the samples' distances from training images among those of held-out images.",
            unit="standard deviations",
            optional=True,
        ),
        "duplicates": ScalarInfo("Fraction of the held training images that repeat another one, and count once."),
        "invalid": less_is_better("Fraction of the samples that contain nan or inf and are left out."),
        "feature_copied": less_is_better(
            "Fraction of the samples that copy a training image, by features.", optional=True
        ),
        "feature_real_copied": ScalarInfo(
            "Fraction of fresh real images that would count as copies, by features.", optional=True
        ),
        "feature_images_copied": less_is_better(
            "Number of different training images that are copied, by features.", optional=True
        ),
        "feature_authenticity": more_is_better(
            "Fraction of the samples that are no closer to a training image than it is to others, by features.",
            optional=True,
        ),
        "feature_real_authenticity": ScalarInfo("The same fraction of fresh real images.", optional=True),
        "feature_repeated": less_is_better(
            "Fraction of the samples that have a near-duplicate among the samples, by features.", optional=True
        ),
        "feature_vendi": more_is_better("Vendi score of up to 128 samples, by features.", optional=True),
        "feature_diversity": more_is_better(
            "Vendi score of the samples relative to that of as many real images, by features.", optional=True
        ),
        "feature_copying_z": more_is_better(
            "Rank sum of the samples' distances in features from training images among those of held-out images.",
            unit="standard deviations",
            optional=True,
        ),
    }
    generated: list[Tensor]
    real: list[Tensor]
    held_out: list[Tensor]
    generated_features: list[Tensor]
    real_features: list[Tensor]
    held_out_features: list[Tensor]
    invalid: Tensor

    def __init__(
        self, ratio: float = RATIO, max_side: int | None = None, *, reset_real_features: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_ratio(ratio)
        check_side(max_side)
        self.ratio, self.max_side, self.reset_real_features = ratio, max_side, reset_real_features
        for side in SIDES:
            self.add_state(side, default=[], dist_reduce_fx="cat")
            self.add_state(f"{side}_features", default=[], dist_reduce_fx="cat")
        self.add_sums(invalid=(2,))
        self.add_configuration(ratio=ratio, max_side=max_side, reset_real_features=reset_real_features)
        self._sides: tuple[Tensor, list[TrainingSide]] | None = None

    def update(self, images: Tensor, real: bool, held_out: bool = False, features: Tensor | None = None) -> None:
        """Adds images.

        Args:
            images: (N, C, H, W) or other data (N, ...), floating-point, or uint8 images, which stand for 0..1 in steps of
                1 / 255. Samples with nan or inf, also in their features, are counted and left out.
            real: whether the images are real.
            held_out: whether real images are none that the model was trained on.
            features: (N, F) features of the images, either of all images or of none.

        Raises:
            ValueError: if images or features have another shape than expected, or a real image is not finite.
        """
        name = "generated" if not real else "held_out" if held_out else "real"
        images = images.detach() if images.dtype == torch.half and images.ndim > 1 else as_data(images, name).detach()
        held = next((part for side in SIDES for part in getattr(self, side)), images)
        self._check_features(images, name, features)
        parts = [images] if features is None else [images, features.detach()]
        finite = torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
        if real:
            for part in parts:
                check_images(part, name, tuple((held if part is images else part).shape[1:]))
        else:
            check_images(images[:0], name, tuple(held.shape[1:]))
            counts = torch.stack([(~finite).sum(), torch.tensor(len(finite), device=finite.device)])
            self.accumulate(invalid=counts.to(self.invalid))
            parts = parts if finite.all() else [part[finite] for part in parts]
        for state, part in zip((name, f"{name}_features"), parts, strict=False):
            # metrics of one compute group hold the same list
            setattr(self, state, [*getattr(self, state), part])

    def _check_features(self, images: Tensor, name: str, features: Tensor | None) -> None:
        """Checks the features of images against those that the metric has already."""
        known = next((part for side in SIDES for part in getattr(self, f"{side}_features")), None)
        has_images = any(getattr(self, side) for side in SIDES)
        if features is None:
            if known is not None:
                raise ValueError(
                    f"features of {name} must be given as before, got None. To fix this, pass features at each update."
                )
            return
        if has_images and known is None:
            raise ValueError(
                f"features of {name} must be None as before, got {tuple(features.shape)}. "
                "To fix this, pass features at each update."
            )
        length = features.shape[-1] if known is None else known.shape[1]
        if features.shape != (len(images), length) or not features.is_floating_point():
            raise ValueError(
                f"features must be ({len(images)}, {'F' if known is None else length}) of floats, got {features.dtype} of "
                f"shape {tuple(features.shape)}. To fix this, pass one row of features per image."
            )

    @property
    def training_images(self) -> Tensor:
        """The training images (N, ...) of this process, in the order by which results number them."""
        images = self.rows("real")
        return as_data(images[canonical_order(images)]) if len(images) else images

    def compute(self) -> MemorizationResult:
        """Compares all samples with all training images.

        Returns:
            The shares; nan where there are no samples or no two different training images.
        """
        generated, training = self.rows("generated"), self.rows("real")
        invalid = self.invalid[0] / self.invalid[1].clamp(min=1)
        order = canonical_order(training) if len(training) else torch.empty(0, dtype=torch.long, device=self.device)
        training = training[order]
        sides = self._training_sides(training, order)
        by_samples = canonical_order(generated) if len(generated) else order[:0]
        generated = generated[by_samples]
        rows = [as_rows(generated, self.max_side)] if len(generated) else []
        features = self.rows("generated_features")
        rows += [features[by_samples]] if len(features) else []
        return summarise(generated, training, sides, rows, self.ratio, invalid)

    def _training_sides(self, training: Tensor, order: Tensor) -> list[TrainingSide]:
        """What depends on real images alone, by pixels and by features, computed anew where they changed."""
        held_out = self.rows("held_out")
        # sums show whether the real images are those of the last time
        known = torch.cat(
            [images.flatten(1).sum(1, dtype=torch.float32) for images in (training, held_out) if len(images)] or [order]
        )
        if self._sides is None or not _same(self._sides[0], known):
            sides = []
            features, others = self.rows("real_features"), self.rows("held_out_features")
            for of_training, of_held_out in ((training, held_out), (features, others)):
                if of_training is training or len(of_training):
                    images = of_training if of_training is training else of_training[order]
                    own = as_rows(images, self.max_side) if len(images) else images.new_zeros(0, 1)
                    other = as_rows(of_held_out, self.max_side) if len(of_held_out) else None
                    sides.append(training_side(own, other))
            self._sides = known, sides
        return self._sides[1]

    def reset(self) -> None:
        """Drops the samples, and the real images unless ``reset_real_features=False``."""
        states = [f"{side}{part}" for side in SIDES[1:] for part in ("", "_features")]
        held = {state: list(getattr(self, state)) for state in states}
        super().reset()
        if self.reset_real_features:
            self._sides = None
        else:
            for state, rows in held.items():
                setattr(self, state, rows)


def _same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are equal in values, type and device."""
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
