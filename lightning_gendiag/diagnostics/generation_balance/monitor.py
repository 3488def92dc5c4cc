"""Monitors the balance of classes among generated images while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series
from lightning_gendiag.diagnostics.generation_balance import plots
from lightning_gendiag.diagnostics.generation_balance.functional import MAX_CLASSES, GenerationBalanceResult
from lightning_gendiag.diagnostics.generation_balance.metric import GenerationBalance
from lightning_gendiag.functional.arrays import as_images, pieces
from lightning_gendiag.functional.results import MAX_CLASS_TAGS
from lightning_gendiag.model.features import (
    FeatureExtractor,
    KernelClassifier,
    averaged_pixels,
    class_of,
    in_chunks,
)
from lightning_gendiag.model.reference import InapplicableError
from lightning_gendiag.model.view import Source, check_source
from lightning_gendiag.plots import pictures
from lightning_gendiag.tensorboard.records import Record, picture

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

CHUNK = 128
"""Largest number of images that are classified at a time."""

LARGEST_SAMPLE = 48
"""Largest side of a sample in the tab; pixels."""

Space = tuple[Callable[[Tensor], Tensor], float]
"""What a classifier compares of images, and the width of its kernel."""

PIXEL_WIDTH, FEATURE_WIDTH = 0.3, 0.1
"""Widths of the kernels of the default classifier. Of 0.1, 0.15 and 0.3 for filters, the narrowest was the most accurate on
blurred and noisy images, and up to 0.014 less accurate than the widest on clean ones."""

FLOOR = 4.0
"""Number of images that are added to each class in the severity. The logarithm of a count of mean 1 to 50 then fluctuates
by 0.2 to 0.36 octaves."""

MIN_STD = 0.55
"""Half as much of a class again, or a third less, is a usual fluctuation; octaves. With 0.5, a third more classes of healthy
GANs were called dropped that an independent classifier still saw; with 0.6, fewer classes were found that a generator draws
as another class."""

MOST = 1.25
"""A share that falls to this many times that of real images is an improvement. A class that is generated too often can still
be seen to be dropped, since shares are corrected for the classifier's errors."""

BALANCE_MIN_STD = 0.3
"""Of the logarithm of the distance of the shares."""

MIN_DELTA = 0.8
"""Octaves. A class is dropped only where its share surely fell to less than six tenths."""

CONFIRM, PATIENCE = 10, 4
"""While a GAN learns, a class may be dropped and come back within some evaluations, and while images are poor, the classifier
assigns them to one class at this evaluation and to another at the next."""

CLASS = Series(
    "class", "component", "share of generated images", event="was dropped", min_std=MIN_STD, min_delta=MIN_DELTA,
    confirm=CONFIRM, patience=PATIENCE,
)  # fmt: skip
BALANCE = Series(
    "all classes", "aggregate", "distance of their shares from the real ones", label="the balance of classes",
    min_std=BALANCE_MIN_STD,
)  # fmt: skip


class GenerationBalanceMonitor(Monitor[GenerationBalance, GenerationBalanceResult]):
    """Monitors :class:`GenerationBalance`: which classes a model drops, which dominate, and which have the worst images.

    Where nothing samples, these are the classes of reconstructions.

    Needs labels in the batches, of at most 1,000 classes with three real images or more on average. The classifier's errors
    are measured on real images, and shares are corrected for them. A class counts as dropped if its share falls below its
    own level in this run by more than it fluctuates. A class that the classifier cannot determine is recorded and never
    judged.

    Args:
        classifier: What classifies images: the name of a submodule or method, a module, or a callable
            ``(module, images)``, which returns labels (n,) or scores (n, K). Its errors are those on the reference, which
            are too few if it was trained on these images. By default a
            :class:`~lightning_gendiag.model.features.KernelClassifier` that is fitted on the reference.
        space: What the default classifier compares: ``"pixels"``, ``"features"``, or ``"auto"`` for both. Features are
            those of ``features`` where it does not change with the model, and responses of random filters otherwise.
        features: Feature extractor for the FID within each class, at full evaluations: a module, or a callable
            ``(module, images)`` that returns (n, F), which is then called with the reference too; by default a
            :class:`~lightning_gendiag.model.features.FeatureExtractor` fitted on the reference.
        images: See :class:`CosineMeanSimilarityMonitor`.
        num_classes: K, where the classes are 0..K-1; by default they are the labels in the reference, or of a
            ``classifier`` all that it can return.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = GenerationBalanceMonitor(space="pixels")  # one of the Trainer's callbacks
    """

    name = "generation_balance"
    metric_class = GenerationBalance
    needs = ()
    needs_images = needs_labels = True
    _kernel: KernelClassifier | None = None
    _newest: tuple[Tensor, Tensor] | None = None
    """Images of the newest evaluation and their classes, on rank 0."""
    _made = "generated"
    _said = False

    def __init__(
        self,
        classifier: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        space: Literal["auto", "pixels", "features"] = "auto",
        features: Callable | None = None,  # type: ignore[type-arg]
        images: Source = "auto",
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_source(images)
        if space not in ("auto", "pixels", "features"):
            raise ValueError(f"space must be 'auto', 'pixels' or 'features', got {space!r}.")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        if num_classes is not None and num_classes > MAX_CLASSES:
            raise ValueError(
                f"num_classes must be at most {MAX_CLASSES:,}, got {num_classes:,}. To fix this, pass labels=lambda batch: ... "
                "that returns coarser classes."
            )
        self.classifier, self.space = classifier, space
        self.features, self.images, self.num_classes = features, images, num_classes

    def reset(self) -> None:
        """Forgets the classifier and the images as well."""
        super().reset()
        self._kernel = self._newest = None
        self._said = False

    def check(self, view: ModelView) -> None:
        """Finds what makes images, and the classifier."""
        view.source(self.images)
        self._classifier(view)

    def _classifier(self, view: ModelView) -> Callable[[Tensor], Any] | None:
        """The user's classifier as a callable of images."""
        return view.resolve_named(self.classifier, "classifier", "submodule or method")

    def build_metric(self, view: ModelView) -> GenerationBalance:
        """Fits or assesses the classifier."""
        labels = view.real.classes().cpu().long()
        images, classify, scored = view.reference_images.images, self._classifier(view), 0
        self._check_number(len(torch.unique(labels)))
        self._made = "reconstructed" if view.source(self.images) == "reconstructions" else "generated"
        with view.isolated(exact=True):
            if classify is None:
                if self._kernel is None or (self.space == "features" and view.moves_with_model(self.features)):
                    self._kernel = KernelClassifier(images, labels, *self._spaces(view))
                assigned = self._kernel.held_out
            else:
                assigned = self._by(classify, images.to(view.device))
                scores = classify(as_images(images[:2]).to(view.device))
                scored = scores.shape[1] if isinstance(scores, Tensor) and scores.ndim == 2 else 0
                self._check_number(scored)
        classes = self._numbers(torch.cat([labels, assigned]), scored)
        self._check_number(k := len(classes))
        true, assigned = (torch.searchsorted(classes, some.contiguous()) for some in (labels, assigned))
        confusion = torch.bincount(true * k + assigned, minlength=k**2).view(k, k)
        return GenerationBalance(k, classes=classes, confusion=confusion)

    def _check_number(self, num_classes: int) -> None:
        """Raises InapplicableError for more than ``MAX_CLASSES`` classes, before anything grows with their square."""
        if num_classes > MAX_CLASSES:
            raise InapplicableError(
                f"labels must be of at most {MAX_CLASSES:,} classes, got {num_classes:,}. To fix this, "
                "pass labels=lambda batch: ... that returns coarser classes"
            )

    def _numbers(self, found: Tensor, scored: int) -> Tensor:
        """Returns the numbers (K,) of the classes, given all labels that were found, and the number of classes scored."""
        largest = int(found.max())
        if self.num_classes is not None:
            if largest >= self.num_classes:
                raise ValueError(
                    f"num_classes must be more than the largest label, {largest}, got {self.num_classes}. "
                    f"To fix this, pass num_classes={largest + 1}, one more than the largest label, or leave it out."
                )
            return torch.arange(self.num_classes)
        most = max(largest + 1, scored)
        # a classifier may find a class in generated images that no real image has; the default one cannot
        return torch.arange(most) if self.classifier is not None and most <= MAX_CLASSES else torch.unique(found)

    def _spaces(self, view: ModelView) -> tuple[list[Space], list[Tensor | None]]:
        """What the default classifier compares, with the widths of the kernels, and what is known of the reference."""
        pixels: Space = averaged_pixels, PIXEL_WIDTH
        if self.space == "pixels":
            return [pixels], [None]
        extract, reference = self._compared_features(view)
        if self.space == "features":
            # a space that decides alone needs the wider kernel
            return [(extract, PIXEL_WIDTH)], [reference]
        return [pixels, (extract, FEATURE_WIDTH)], [None, reference]

    def _compared_features(self, view: ModelView) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The features that the default classifier compares, and those of the reference."""
        if self._compares_responses(view):
            extractor = view.feature_extractor
            return partial(_rooted, extractor), extractor.reference_responses.sqrt()
        return view.resolve_features(self.features), view.features_of_reference(self.features)

    def _compares_responses(self, view: ModelView) -> bool:
        """Whether the default classifier compares responses of random filters instead of features that were given."""
        # a callable may change with the model, which a classifier should not
        return self.features is None or (self.space != "features" and view.moves_with_model(self.features))

    def depends_on_model(self, view: ModelView) -> bool:
        """Whether the classifier's errors change with the module."""
        compares = self.classifier is None and self.space == "features" and view.moves_with_model(self.features)
        return compares or view.moves_with_model(self.classifier)

    def _by(self, classify: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Classes (n,) of finite images, n > 0, by the user's classifier, on the CPU; inside ``view.isolated``."""
        return torch.cat([class_of(classify(as_images(some)), len(some)).cpu() for some in pieces(images, CHUNK)])

    def shares(self) -> str:
        """Samples, where these are compared."""
        return "samples" if self.view.compares_samples(self.images) else self.name

    def _classes_and_features(self, view: ModelView, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Classes (n,) of finite images, n > 0, and at full evaluations their features (n, F); inside ``view.isolated``.

        What the default classifier and the features have in common is computed once.
        """
        classify, of_filters = self._classifier(view), self._compares_responses(view)
        compared: Tensor | None = None
        if classify is None and self.space != "pixels":
            extract = partial(in_chunks, view.feature_extractor.responses)
            compared = extract(images) if of_filters else view.resolve_features(self.features)(images)
        features: Tensor | None = None
        if view.thorough:
            if compared is None or of_filters != (self.features is None):
                features = view.resolve_features(self.features)(images)
            else:
                features = view.feature_extractor.projected(compared) if of_filters else compared
        if classify is not None:
            return self._by(classify, images), features
        assert self._kernel is not None
        if compared is None:
            return self._kernel(images), features
        known = compared.sqrt() if of_filters else compared
        return self._kernel(images, [None, known] if self.space == "auto" else [known]), features

    def update(self, view: ModelView) -> None:
        """Adds this rank's real and generated images by their classes, and at full evaluations by their features."""
        rows, images = view.compared_rows(self.images), view.compared(self.images).images
        finite = images.flatten(1).isfinite().all(1)
        labels = view.real.classes()[rows].to(view.device)
        # what is not finite counts nowhere, but has a class
        classes = self.metric.classes[:1].to(view.device).repeat(len(images))
        real: Tensor | None = None
        features: Tensor | None = None
        with view.isolated(exact=True):
            if view.thorough:
                real = view.features_of_reference(self.features, rows)
                features = real.new_full((len(images), real.shape[1]), math.nan)
            if finite.any():
                own, of_own = self._classes_and_features(view, images[finite])
                classes[finite] = own.to(view.device)
                if features is not None and of_own is not None:
                    features[finite] = of_own
        self.metric.update(labels, real=True, features=real)
        self.metric.update(classes, real=False, features=features, finite=finite)
        if self.log_images and view.is_global_zero:
            self._newest = images[finite].cpu(), classes[finite].cpu()

    @property
    def _sheet(self) -> Tensor | None:
        """(K, 8, C, H, W) generated images of each class."""
        return None if self._newest is None else plots.sheet(*self._newest, self.metric.classes)

    def postprocess(self, view: ModelView, result: GenerationBalanceResult) -> GenerationBalanceResult:
        """Says which classes the classifier cannot determine."""
        unknown = plots.unknown(result)
        if unknown and not self._said:
            self._said = True
            view.say(f"Generation balance {unknown}. These shares are recorded and not judged.")
        return result

    def observations(self, result: GenerationBalanceResult) -> list[Observation]:
        """The share of each class that the reference has, and the imbalance of all."""
        shares, imbalance = result.generated_share.tolist(), float(result.imbalance)
        numbers, most = result.classes.tolist(), max(range(len(shares)), key=shares.__getitem__)
        label = f"{BALANCE.label}, with class {numbers[most]} at {shares[most]:.0%}," if result.dominating[most] else ""
        number, unknown = float(result.generated_count.sum()), result.undetermined.tolist()
        series = replace(CLASS, quantity=f"share of {self._made} images")
        observations = []
        columns = (numbers, shares, result.real_share.tolist(), unknown)
        for c, share, real, is_unknown in zip(*columns, strict=True):
            if real > 0:
                own = replace(series, role="record") if is_unknown else series
                observations.append(Observation(own.numbered(c), share, severity(share, number, real)))
        whole = replace(BALANCE, role="record") if all(unknown) else BALANCE
        return [*observations, Observation(whole, imbalance, math.log(imbalance + 0.1), label=label)]

    def page_setup(self) -> Record:
        """The numbers of the classes, and the real shares."""
        real = self.metric.counts[1].cpu()
        shares, classes = (real / real.sum()).tolist(), self.metric.classes.tolist()
        return Record({"columns": plots.SHOWN, "real": shares, "classes": classes})

    def page_numbers(self, result: GenerationBalanceResult) -> dict[str, Any]:
        """The interval of each share."""
        return {"intervals": result.interval.tolist()}

    def page_frame(self, result: GenerationBalanceResult) -> Record | None:
        """Generated images of each class."""
        sheet = self._sheet
        if sheet is None:
            return None
        classes, columns = sheet.shape[:2]
        small = pictures.shrunk(sheet.flatten(0, 1), LARGEST_SAMPLE)
        grid = pictures.grid(small, columns)
        shown = picture(pictures.pixels(grid, float(grid.min()), float(grid.max())))
        return Record({"classes": result.classes[:classes].tolist()}, pictures={"classes": shown})

    def log_plots(self, result: GenerationBalanceResult, context: PlotContext) -> None:
        """Logs the charts, the table and the panel."""
        classes = result.classes.tolist()
        if len(classes) <= MAX_CLASS_TAGS:
            context.logger.log_chart("share of every class", "Multiline", [f"class_{c}" for c in classes])
            context.logger.log_chart("FID of every class", "Multiline", [f"fid_class_{c}" for c in classes])
        context.logger.log_chart("imbalance", "Multiline", ["imbalance"])
        context.logger.log_text("classes", plots.table(result))
        context.logger.log_image("panel", plots.panel(result, self._sheet, context.occasion()))

    def log_alarm(self, alarm: Alarm, result: GenerationBalanceResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's classes marked."""
        context.logger.log_image("picture", plots.panel(result, self._sheet, context.occasion(alarm)))


def severity(share: float, number: float, real: float) -> float:
    """Returns how small a share of so many images is, in octaves: the share halves where it rises by about 1.

    The logarithm is that of the share with a few images added, so that sampling makes it fluctuate about equally for
    frequent and for rare classes. A class that is generated somewhat too often can be dropped as well; how much more than
    ``MOST`` times its share among real images does not count, since it is better to have less of it. nan stays nan.
    """
    return -math.log2(min(share, MOST * real) + FLOOR / number) if number and share == share else math.nan


def _rooted(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Returns the filter responses of images, whose root makes strong and weak responses fluctuate alike."""
    responses: Tensor = extractor.responses(images.to(extractor.mean.device))
    return responses.sqrt()
