"""Monitors the cosine mean similarity of a generator's samples while it trains, region by region."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gendiag.callbacks.monitor import DiagnosticWarning, Monitor, PlotContext
from lightning_gendiag.detection.history import SHARE_OF_NAN, Observation, Series, divided
from lightning_gendiag.diagnostics.cosine_mean_similarity import plots
from lightning_gendiag.diagnostics.cosine_mean_similarity.functional import (
    Bandwidth,
    CosineMeanSimilarityResult,
    check_bandwidth,
    check_shape,
)
from lightning_gendiag.diagnostics.cosine_mean_similarity.metric import CosineMeanSimilarity
from lightning_gendiag.functional.arrays import as_images
from lightning_gendiag.model.reference import InapplicableError
from lightning_gendiag.model.view import Source, check_source
from lightning_gendiag.model.warning import warn
from lightning_gendiag.regions.region_map import RegionMap
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

QUANTITY = "cosine mean similarity"

MAX_CLASSES = 1000
"""Largest number of classes within which images are compared: a kernel matrix has a column of weights for each of them."""

MIN_STD = 0.25
"""A quarter more or less distance from 1 is a usual fluctuation of a GAN."""

BACKGROUND_FLOOR = 0.01
"""Distances of the background from 1 below this, in the bandwidth of the whole image, hardly count: nothing is drawn there."""

SMALL_REGION, SMALL_IMAGE = 1.25, 1.0
"""A GAN at its best loses a region, or the image, for one or two evaluations, to 3.5 or 2.7 times its usual distance from 1."""

REGION = Series("region", "component", QUANTITY, min_std=MIN_STD, small=SMALL_REGION)
IMAGE = Series("image", "aggregate", QUANTITY, min_std=MIN_STD, small=SMALL_IMAGE, is_quality=True)
SAMPLES = Series("samples", "rule", SHARE_OF_NAN, min_std=MIN_STD, stop="alone")
SAMPLING = replace(SAMPLES, name="sampling", event="cannot be sampled", stop="never")
"""Of samples that have been nan from the beginning on although the weights are finite, so that nothing collapsed."""
ALIKE = Series(
    "spread of samples",
    "rule",
    "variance of samples relative to real images",
    label="all samples",
    event="are alike",
    confirm=6,
    progress=0.005,
)
UNCHANGED = Series(
    "change of samples",
    "rule",
    "samples that are those of the evaluation before",
    label="samples",
    event="do not change",
    confirm=5,
    stop="never",
)
UNREACHED = Series(
    "range of samples",
    "rule",
    "share of real values that no sample reaches",
    label="the range of samples",
    event="does not reach that of real images",
    confirm=8,
    progress=-0.02,
    stop="never",
)
FLOOR = Series(
    "similarity of samples",
    "rule",
    "cosine mean similarity of the most similar region",
    label="samples",
    event="are not similar to real images",
    confirm=8,
    progress=0.05,
    stop="never",
)
"""Rules about what is wrong in itself, also from the beginning of training on."""

LEAST_SPREAD = 0.02
"""Samples that vary less, relative to real images, are alike."""

MOST_UNREACHED = 0.1
"""Largest share of the real values outside the range of the samples. Models that have not trained to the end miss the extremes,
up to a tenth; under tanh, data by mean and standard deviation leave a fifth and more out."""

LOW_SIMILARITY = 0.5
"""Regions that are less similar are bad. In the recorded healthy runs all are above 0.85 after 30 evaluations, and uniform
noise reaches 0.2 to 0.4 on digits."""


class CosineMeanSimilarityMonitor(Monitor[CosineMeanSimilarity, CosineMeanSimilarityResult]):
    """Monitors :class:`CosineMeanSimilarity` of a model's samples or reconstructions, region by region.

    Rows (N, F) of at most 1,024 features are compared as images of one row of pixels, whose regions are groups of features,
    and series (N, C, T) as images (N, C, 1, T), whose regions are groups of positions.

    TensorBoard shows a curve for each region, one chart with all of them and one with the worst, median and best (Custom
    Scalars), the region map, and a panel with the mean real and the mean generated image and each region's distance from
    real images, in standard deviations of real images compared with real ones.

    Args:
        regions: (H, W) labels, a :class:`RegionMap` or the path of a saved map; by default found in the reference.
        num_regions: Number of regions to find, including a background that never varies; None lets the data choose.
        bandwidth: See :func:`cosine_mean_similarity`.
        unbiased: See :func:`cosine_mean_similarity`.
        images: ``"samples"``, ``"reconstructions"``, which are compared with other real images than their own, or
            ``"auto"`` for samples, and for reconstructions where nothing samples.
        per_class: Whether to compare within classes too, for a sampler that takes labels and batches that have them.
        map_images: Largest number of reference images in which regions are found.
        null_splits: Number of seeded splits of the reference into halves, for the comparison of real with real images.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = CosineMeanSimilarityMonitor(num_regions=3, every_n_epochs=2)  # one of the Trainer's callbacks
    """

    name = "cms"
    metric_class = CosineMeanSimilarity
    needs_images = takes_rows = True
    region_map: RegionMap | None
    """The regions; None before they are found."""
    _real: plots.RealImages
    _generated: Tensor
    _some: Tensor
    _map_logged = False
    _quantity = QUANTITY
    _whole = ""
    _compared = "samples"
    _before: tuple[float, float] | None = None
    """Sums of the weights and of the generated images at the last evaluation."""
    _is_unchanged = False

    def __init__(
        self,
        regions: RegionMap | Tensor | str | None = None,
        num_regions: int | None = 5,
        bandwidth: Bandwidth = "region",
        unbiased: bool = True,
        *,
        images: Source = "auto",
        per_class: bool = False,
        map_images: int = 1000,
        null_splits: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_bandwidth(bandwidth)
        check_source(images)
        if null_splits < 2:
            raise ValueError(f"null_splits must be at least 2, got {null_splits}.")
        self.regions, self.num_regions, self.bandwidth, self.unbiased = regions, num_regions, bandwidth, unbiased
        self.images, self.per_class, self.map_images, self.null_splits = images, per_class, map_images, null_splits
        self.region_map = None if regions is None else RegionMap.of(regions)

    def reset(self) -> None:
        """Forgets the regions as well, unless they were given."""
        super().reset()
        self._map_logged, self._before = False, None
        if self.regions is None:
            self.region_map = None

    def check(self, view: ModelView) -> None:
        """Compares the size of two samples with the regions."""
        reconstructs = view.source(self.images) == "reconstructions"
        if self.per_class and not reconstructs and not view.parts.way("sample").takes_labels:
            raise ValueError(
                "per_class must go with a sampler that takes labels. "
                "To fix this, pass ModelAdapter(sample=lambda module, n, labels: ..., conditional=True)."
            )
        sampled = None if reconstructs else view.parts.tried
        if self.region_map is not None:
            real = view.as_images(view.reference, rows=True) if view.has_reference else None
            for images, name in ((sampled, "generated"), (real, "the reference")):
                if images is not None and images.images.ndim == 4:
                    check_shape(images.images, name, self.region_map, None)

    def build_metric(self, view: ModelView) -> CosineMeanSimilarity:
        """Finds the regions, equal on all processes, and adds the reference."""
        if self.region_map is None:
            self.region_map = self.find_regions(view, self.num_regions, self.map_images)
        images, labels = as_images(view.as_images(view.reference, rows=True).images), view.reference.labels
        self._whole = {2: "the row", 3: "the series"}.get(view.reference.images.ndim, "")
        low, high = images.amin(0), images.amax(0)
        self._real = plots.RealImages(images.mean(0), float(low.min()), float(high.max()), plots.some_of(images))
        varies = (high > low).any(0)
        constant = [
            name
            for r, name in enumerate(self.region_map.names)
            if r != self.region_map.background and not varies[self.region_map.mask(r)].any()
        ]
        if constant:
            warn(
                f"the reference {self.data_name} never vary in {', '.join(constant)}, so any variation of generated ones "
                "lowers the similarity there.",
                category=DiagnosticWarning,
            )
        classes = int(labels.max()) + 1 if self.per_class and labels is not None else None
        if classes is not None and classes > MAX_CLASSES:
            raise InapplicableError(
                f"labels must be less than {MAX_CLASSES:,} with per_class=True, got {classes - 1:,}. To fix this, pass "
                "labels=lambda batch: ... that returns (N,) classes numbered from 0, or per_class=False"
            )
        metric = CosineMeanSimilarity(
            self.region_map, self.bandwidth, self.unbiased, num_classes=classes, null_splits=self.null_splits,
            reset_real_features=False,
        ).to(view.device)  # fmt: skip
        self._compared = view.source(self.images)
        self._quantity = f"{QUANTITY}{' of reconstructions' * (self._compared == 'reconstructions')}"
        own, classes_of_own = view.compared_with(self.images, rows=True)
        metric.update(
            own.to(view.device), real=True, labels=None if classes_of_own is None else classes_of_own.to(view.device)
        )
        return metric

    def shares(self) -> str:
        """Samples, where these are compared."""
        return "samples" if self.view.compares_samples(self.images) else self.name

    def update(self, view: ModelView) -> None:
        """Adds this rank's samples or reconstructions."""
        images, labels = view.compared(self.images, rows=True)
        self.metric.update(images, real=False, labels=labels)
        finite = images[images.flatten(1).isfinite().all(1)]
        self._generated = finite.mean(0) if len(finite) else images.new_zeros(images.shape[1:])
        if self.log_images and view.is_global_zero:
            self._some = plots.some_of(images)
        if view.is_closer:
            # the samples before are others
            return
        # samples are drawn with the same seeds each time
        before, self._before = self._before, (view.weights_sum(), float(images.sum(dtype=torch.float64)))
        self._is_unchanged = before is not None and before[0] != self._before[0] and before[1] == self._before[1]

    @property
    def _regions(self) -> RegionMap:
        if self.region_map is None:
            raise RuntimeError("the regions are not known before the first evaluation.")
        return self.region_map

    def postprocess(self, view: ModelView, result: CosineMeanSimilarityResult) -> CosineMeanSimilarityResult:
        """Adds what is known of the evaluations before, on all processes."""
        # equal on all processes, as the history is
        never = bool(result.invalid > 0) and all(
            e.value > 0 for e in self.session.history.entries(self.name, SAMPLES.name)
        )
        return result._replace(
            unchanged=torch.full_like(result.invalid, float(view.agreed(self._is_unchanged))),
            never_valid=torch.full_like(result.invalid, float(never and view.agreed(view.has_finite_weights()))),
        )

    def observations(self, result: CosineMeanSimilarityResult) -> list[Observation]:
        """The similarity of each region and of the image, and what is wrong in itself."""
        *stds, image_std = result.null_std.tolist()
        image, invalid, spread = float(result.image), float(result.invalid), float(result.spread)
        unchanged, unreached = float(result.unchanged), float(result.unreached)
        never_valid = float(result.never_valid) == 1
        regions = zip(self._regions.names, result.regions.tolist(), stds, strict=True)
        background = self._regions.background
        region = replace(REGION, quantity=self._quantity)
        whole = replace(IMAGE, quantity=self._quantity, label=self._whole)
        # a border that never varies is similar from the beginning
        best = max([x for r, x in enumerate(result.regions.tolist()) if r != background] or [image])
        made = self._compared
        how = "sampled" if made == "samples" else "reconstructed"
        real = f"real {self.data_name}"
        alike, still, unreaching, unlike = (
            replace(
                series,
                label=series.label.replace("samples", made),
                quantity=series.quantity.replace("real images", real),
                event=series.event.replace("real images", real),
            )
            for series in (ALIKE, UNCHANGED, UNREACHED, FLOOR)
        )
        return [
            *(
                Observation(
                    region.numbered(r, name), x, _distance(x, std, BACKGROUND_FLOOR * (r == background)),
                    is_bad=x < LOW_SIMILARITY,
                )
                for r, (name, x, std) in enumerate(regions)
            ),
            Observation(whole, image, _distance(image, image_std)),
            Observation(
                SAMPLES, invalid, math.inf if invalid and not never_valid else 0.0,
                message=f"{made} collapsed: share with nan or inf is {invalid:.1%}", is_bad=invalid > 0,
            ),
            _rule(
                SAMPLING, invalid, never_valid,
                f"{made} have been nan or inf since the first evaluation, now {invalid:.1%} of them, although the weights are "
                f"finite, so it is how they are {how} that is broken, such as by a division by zero or a low precision",
            ),
            _rule(
                alike, spread, spread < LEAST_SPREAD,
                f"all {made} are alike: they vary {spread:.2g} times as much as {real}, for "
                "{evaluations} evaluations",
            ),
            _rule(
                still, unchanged, unchanged == 1,
                f"{made} do not change: they have been the same in {{evaluations}} evaluations although training went on, so "
                f"what is {how} is not what is trained, such as an average that is never updated",
            ),
            _rule(
                unreaching, unreached, unreached > MOST_UNREACHED,
                f"the range of {made} does not reach that of {real}: {unreached:.0%} of the real "
                "values were outside it in {evaluations} evaluations",
            ),
            _rule(
                unlike, best, best < LOW_SIMILARITY,
                f"{made} are not similar to {real} anywhere: {self._quantity} is at most {best:.2f} in any region, "
                "for {evaluations} evaluations",
            ),
        ]  # fmt: skip

    def page_setup(self) -> Record:
        """The regions, and real images."""
        real = plots.page_pictures(self._real, {"mean_real": self._real.mean[None], "samples_real": self._real.some})
        fields = {"background": self._regions.background, "columns": plots.COLUMNS}
        return Record(fields, {"labels": plots.page_labels(self._regions.labels)}, real)

    def page_numbers(self, result: CosineMeanSimilarityResult) -> dict[str, Any]:
        """The distance of each region from real images, in standard deviations of real images from real ones."""
        return {"distance": (-result.z).tolist()}

    def page_frame(self, result: CosineMeanSimilarityResult) -> Record:
        """The mean and the first generated images."""
        made = {"mean_generated": self._generated[None], "samples": self._some}
        return Record(pictures=plots.page_pictures(self._real, made))

    def contributions(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each region's part of the drop of their product, which is the image's similarity for independent regions."""
        return divided({name: math.log(max(x, 1e-12) / max(after[name], 1e-12)) for name, x in before.items()})

    def get_extra_state(self) -> dict[str, Any]:
        """The regions, which must not change during a run."""
        return {"regions": None if self.region_map is None else self.region_map.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the regions unless others were given."""
        if self.region_map is None and state["regions"] is not None:
            self.region_map = RegionMap.from_state_dict(state["regions"])

    def log_plots(self, result: CosineMeanSimilarityResult, context: PlotContext) -> None:
        """Logs the charts and the panel, and the region map once."""
        regions = self._regions
        context.logger.log_chart("every region", "Multiline", [f"region_{r}" for r in range(regions.num_regions)])
        context.logger.log_chart("worst, middle and best region", "Margin", ["median", "worst", "best"])
        if not self._map_logged:
            self._map_logged = True
            context.logger.log_image("regions", plots.map_panel(regions, self._real))
            context.logger.log_text("regions", plots.map_table(regions))
        history = [context.curves[name] for name in regions.names]
        picture = plots.panel(
            result, regions, self._real, self._generated, history, context.evaluation.step, context.evaluation.averaged
        )
        context.logger.log_image("panel", picture)

    def log_alarm(self, alarm: Alarm, result: CosineMeanSimilarityResult, context: PlotContext) -> None:
        """Logs the mean images with the alarm's region outlined."""
        region = next(iter(alarm.indices), None)
        title = f"{alarm.label} {alarm.event}"
        picture = plots.alarm_panel(self._regions, self._real, self._generated, region, title, str(alarm))
        context.logger.log_image("picture", picture)


def _rule(series: Series, value: float, is_wrong: bool, message: str) -> Observation:
    """An observation of a series that a rule judges, whatever it was before."""
    return Observation(series, value, math.inf if is_wrong else 0.0, message=message)


def _distance(value: float, std: float, least: float = 0.0) -> float:
    """Returns the distance of a similarity from 1 on a log scale that ends where real images differ; nan stays nan."""
    floor = max(least, 1e-3 if math.isnan(std) else max(3 * std, 1e-9))
    return math.nan if math.isnan(value) else math.log(max(1 - value, 0.0) + floor)
