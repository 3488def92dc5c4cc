"""Monitors the balance of classes among generated images while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series
from lightning_gendiag.diagnostics.generation_balance import plots
from lightning_gendiag.diagnostics.generation_balance.functional import COVERED, MAX_CLASS_TAGS, GenerationBalanceResult
from lightning_gendiag.diagnostics.generation_balance.metric import GenerationBalance
from lightning_gendiag.functional.arrays import as_images, pieces
from lightning_gendiag.model.batches import known
from lightning_gendiag.model.features import SKLEARN_MISSING, NeighbourClassifier, class_of, space_for
from lightning_gendiag.model.view import Source, check_source

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

CHUNK = 128
"""Largest number of images that are classified at a time."""

MIN_STD = 0.3
"""A third more or less of a class is a usual fluctuation."""

PATIENCE = 8
"""While a GAN learns, a class may be dropped and come back within some evaluations."""

CLASS = Series(
    "class", "component", "share of generated images", event="was dropped", min_std=MIN_STD, patience=PATIENCE
)
BALANCE = Series(
    "all classes", "aggregate", "distance of their shares from the real ones", label="the balance of classes",
    min_std=MIN_STD,
)  # fmt: skip


class GenerationBalanceMonitor(Monitor[GenerationBalance, GenerationBalanceResult]):
    """Monitors :class:`GenerationBalance`: which classes a model drops, which dominate, and which have the worst images.

    Where nothing samples, these are the classes of reconstructions.

    Needs labels in the batches, and scikit-learn unless a classifier is given.

    Args:
        classifier: What classifies images: the name of a submodule or method, a module, or a callable
            ``(module, images)``, which returns labels (n,) or scores (n, K); by default the nearest neighbours in the
            reference.
        neighbours: Number of nearest neighbours.
        space: In which neighbours are found: ``"pixels"``, ``"features"``, or ``"auto"`` for pixels of images of up to
            4,096 numbers and features of larger ones.
        features: Feature extractor for the FID within each class: a module, or a callable ``(module, images)`` that
            returns (n, F), which is called with the reference at each evaluation; by default a
            :class:`~lightning_gendiag.model.features.FeatureExtractor` fitted on the reference.
        images: See :class:`CosineMeanSimilarityMonitor`.
        num_classes: K; by default one more than the largest label in the reference.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = GenerationBalanceMonitor(neighbours=5)  # one of the Trainer's callbacks
    """

    name = "generation_balance"
    metric_class = GenerationBalance
    needs = ()
    needs_images = needs_labels = True
    requires: tuple[str, ...] = ("sklearn",)
    accuracy = math.nan
    """Of the classifier on real images; nan before the first evaluation."""
    _neighbours: NeighbourClassifier
    _real: tuple[Tensor, Tensor]
    _images: Tensor | None = None
    _made = "generated"

    def __init__(
        self,
        classifier: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        neighbours: int = 3,
        space: Literal["auto", "pixels", "features"] = "auto",
        features: Callable | None = None,  # type: ignore[type-arg]
        images: Source = "auto",
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_source(images)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}.")
        if space not in ("auto", "pixels", "features"):
            raise ValueError(f"space must be 'auto', 'pixels' or 'features', got {space!r}.")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        self.classifier, self.neighbours, self.space = classifier, neighbours, space
        self.features, self.images, self.num_classes = features, images, num_classes
        if classifier is not None:
            self.requires = ()

    def reset(self) -> None:
        """Forgets the classifier's accuracy and the images as well."""
        super().reset()
        self.accuracy, self._images = math.nan, None

    def check(self, view: ModelView) -> None:
        """Finds what makes images, and the classifier."""
        view.source(self.images)
        if self._classifier(view) is None and find_spec("sklearn") is None:
            raise ValueError(SKLEARN_MISSING.format(who="a nearest-neighbour classifier"))

    def _classifier(self, view: ModelView) -> Callable[[Tensor], Any] | None:
        """The user's classifier as a callable of images."""
        return view.resolve_named(self.classifier, "classifier", "submodule or method")

    def build_metric(self, view: ModelView) -> GenerationBalance:
        """Computes the features of this rank's real images, and fits or assesses the classifier."""
        images, labels = view.reference_images.images, view.real.classes()
        own, extract = view.compared_with(self.images), view.resolve_features(self.features)
        num_classes, classify = int(labels.max()) + 1, self._classifier(view)
        self._made = "reconstructed" if view.source(self.images) == "reconstructions" else "generated"
        with view.isolated(exact=True):
            self._real = known(own.labels), extract(as_images(own.images)).cpu()
            if classify is None:
                spaces = {"auto": space_for(images, extract), "pixels": None, "features": extract}
                self._neighbours = NeighbourClassifier(images, labels, spaces[self.space], self.neighbours)
                self.accuracy = self._neighbours.accuracy
            else:
                classes = self._classes(view, images.to(view.device))
                scores = classify(as_images(images[:2]).to(view.device))
                self.accuracy = float((classes == labels).double().mean())
                scored = scores.shape[1] if isinstance(scores, Tensor) and scores.ndim == 2 else 0
                num_classes = max(num_classes, int(classes.max()) + 1, scored)
        return GenerationBalance(self.num_classes or num_classes)

    def depends_on_model(self, view: ModelView) -> bool:
        """Whether the reference's features change with the module."""
        return view.moves_with_model(self.features)

    def _classes(self, view: ModelView, images: Tensor) -> Tensor:
        """Classes (n,) of finite images, n > 0, on the CPU; inside ``view.isolated``."""
        classify = self._classifier(view)
        if classify is None:
            return self._neighbours(images).cpu()
        return torch.cat([class_of(classify(as_images(some)), len(some)).cpu() for some in pieces(images, CHUNK)])

    def update(self, view: ModelView) -> None:
        """Adds this rank's real and generated images by their classes and features."""
        images, extract = view.compared(self.images).images, view.resolve_features(self.features)
        labels, real = (part.to(view.device) for part in self._real)
        self.metric.update(labels, real=True, features=real)
        finite = images.flatten(1).isfinite().all(1)
        classes = torch.zeros(len(images), dtype=torch.long, device=view.device)
        # rows of images that are not finite stay nan, and the metric leaves them out
        features = torch.full((len(images), real.shape[1]), math.nan, device=view.device, dtype=real.dtype)
        if finite.any():
            with view.isolated(exact=True):
                classes[finite] = self._classes(view, images[finite]).to(view.device)
                features[finite] = extract(images[finite])
        self.metric.update(classes, real=False, features=features)
        if self.log_images and view.is_global_zero:
            self._images = plots.sheet(images[finite].cpu(), classes[finite].cpu(), self.metric.num_classes)

    def postprocess(self, view: ModelView, result: GenerationBalanceResult) -> GenerationBalanceResult:
        """Adds the accuracy of the classifier."""
        return result._replace(accuracy=torch.full_like(result.invalid, self.accuracy))

    def observations(self, result: GenerationBalanceResult) -> list[Observation]:
        """The share of each class that the reference has, and the imbalance of all."""
        shares, imbalance = result.generated_share.tolist(), float(result.imbalance)
        most = int(result.generated_count.argmax())
        label = f"{BALANCE.label}, with class {most} at {shares[most]:.0%}," if result.dominating[most] else ""
        classes = enumerate(zip(shares, result.real_share.tolist(), strict=True))
        series = replace(CLASS, quantity=f"share of {self._made} images")
        return [
            *(
                Observation(series.numbered(c), share, _severity(share, real))
                for c, (share, real) in classes
                if real > 0
            ),
            Observation(BALANCE, imbalance, math.log(imbalance + 0.1), label=label),
        ]

    def log_plots(self, result: GenerationBalanceResult, context: PlotContext) -> None:
        """Logs the charts, the table and the panel."""
        classes = range(len(result.fid))
        if len(classes) <= MAX_CLASS_TAGS:
            context.logger.log_chart("share of every class", "Multiline", [f"class_{c}" for c in classes])
            context.logger.log_chart("FID of every class", "Multiline", [f"fid_class_{c}" for c in classes])
        context.logger.log_chart("imbalance", "Multiline", ["imbalance"])
        context.logger.log_text("classes", plots.table(result))
        context.logger.log_image("panel", plots.panel(result, self._images, context.occasion()))

    def log_alarm(self, alarm: Alarm, result: GenerationBalanceResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's classes marked."""
        context.logger.log_image("picture", plots.panel(result, self._images, context.occasion(alarm)))


def _severity(share: float, real: float) -> float:
    """Returns the logarithm of how much smaller a share is than the real one; nan stays nan.

    More than the real share is no loss, and a class that is not covered is gone, however little of it is left.
    """
    return math.nan if math.isnan(share) else -math.log(min(max(share / real, COVERED), 1.0))
