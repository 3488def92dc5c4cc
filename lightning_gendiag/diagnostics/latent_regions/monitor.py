"""Monitors the latent regions of a model while it trains, and what each kind of point decodes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series
from lightning_gendiag.diagnostics.latent_regions import plots
from lightning_gendiag.diagnostics.latent_regions.functional import (
    KINDS,
    MAX_DIMS,
    LatentRegionsResult,
    inception_score,
)
from lightning_gendiag.diagnostics.latent_regions.metric import LatentRegions
from lightning_gendiag.functional.arrays import as_images, pieces
from lightning_gendiag.functional.distances import frechet_distance
from lightning_gendiag.model.amounts import fitting
from lightning_gendiag.model.features import SKLEARN_MISSING, NeighbourClassifier, class_of, space_for
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView
    from lightning_gendiag.plots.canvas import Occasion

CHUNK = 128
"""Largest number of images or latents that go through the model at a time."""

POINTS_PER_COMPONENT = 32
"""Number of points inside a component whose decoded images are classified."""

NUM_POINTS, LEAST_POINTS = 500, 100
"""Number of points of each kind where neither the user nor their cost says otherwise, and the smallest number of them."""

SECONDS = 4.0
"""Approximate limit of the time for drawing and decoding points, by which their number is chosen."""

TIMED = 16
"""Number of points in the piece that is timed."""

LEAST_PROBABILITY = 1e-6
"""Probability of a class that a classifier rules out, for the inception score."""

SPREAD = Series("latents", "rule", "standard deviation of the latents", stop="alone")

MOST_ON_PAGE = 400
"""Largest number of latents that the tab shows."""


class LatentRegionsMonitor(Monitor[LatentRegions, LatentRegionsResult]):
    """Monitors :class:`LatentRegions` of an encoder and a decoder.

    At each evaluation a Gaussian mixture is fitted to the latents of the reference, or to 64 principal components of
    longer ones. Points of each of ``KINDS`` are drawn, decoded and compared with the reference by FID and, where labels
    are known, by inception score and class, if the data are images or volumes, of which the middle slices are compared.
    There are no points of a prior where nothing shows that normal noise is the prior of the latents. The number
    of components, if it is not given, is chosen anew at the 1st, 2nd, 4th, 8th ... evaluation.

    Needs scikit-learn. All processes do the same work here, except for the encoding.

    Args:
        components: Number of components of the mixture; by default chosen by the Bayesian information criterion.
        num_points: Number of points of each kind; by default 500, or fewer where they would take longer than some seconds,
            at least 100.
        features: Feature extractor for the FID: a module, or a callable ``(module, images)`` that returns (n, F); by
            default a :class:`~lightning_gendiag.model.features.FeatureExtractor` fitted on the reference.
        classifier: A module, or a callable ``(module, images)`` that returns scores (n, K); by default the nearest
            neighbours in the reference.
        max_components: See :class:`LatentRegions`.
        max_rows: See :class:`LatentRegions`.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = LatentRegionsMonitor(every_n_epochs=5)  # one of the Trainer's callbacks
    """

    name = "latent_regions"
    metric_class = LatentRegions
    needs = ("encode", "decode")
    period_multiplier = 5
    expected_seconds = 1.0
    requires = ("sklearn",)
    _chosen: int | None = None
    _chosen_points: int | None = None
    _neighbours: NeighbourClassifier | None = None
    _reference: tuple[Tensor, Tensor] | None = None
    _points: list[Tensor]
    _decoded: list[Tensor]

    def __init__(
        self,
        components: int | None = None,
        *,
        num_points: int | None = None,
        features: Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        classifier: Callable | None = None,  # type: ignore[type-arg]
        max_components: int = 12,
        max_rows: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_points is not None and num_points < 10:
            raise ValueError(f"num_points must be at least 10, got {num_points}.")
        LatentRegions(components, max_components=max_components, max_rows=max_rows)
        self.components, self.max_components, self.max_rows = components, max_components, max_rows
        self.num_points, self.features, self.classifier = num_points, features, classifier

    def reset(self) -> None:
        """Forgets the numbers of components and of points and the classifier as well."""
        super().reset()
        self._chosen = self._chosen_points = self._neighbours = None

    def check(self, view: ModelView) -> None:
        """Looks for scikit-learn, an encoder and, where the data are images, a decoder."""
        if find_spec("sklearn") is None:
            raise ValueError(SKLEARN_MISSING.format(who="a Gaussian mixture"))
        view.find("encode", *(("decode",) if view.has_images else ()))

    def build_metric(self, view: ModelView) -> LatentRegions:
        """Computes the features of the reference, and fits the classifier where none is given."""
        self._neighbours = self._reference = None
        if view.has_images:
            self._assess(view)
        return LatentRegions(self.components, max_components=self.max_components, max_rows=self.max_rows)

    def _assess(self, view: ModelView) -> None:
        images = view.reference_images.images
        extract = view.resolve_features(self.features)
        with view.isolated(exact=True):
            features = view.features_of_reference(self.features)
            if self.classifier is None and view.real.has_classes:
                self._neighbours = NeighbourClassifier(
                    images, view.real.classes(), space_for(images, extract), known=features
                )
        self._reference = _moments(features)

    def depends_on_model(self, view: ModelView) -> bool:
        """Whether the reference's features change with the module."""
        return view.moves_with_model(self.features)

    def update(self, view: ModelView) -> None:
        """Adds the latents of this rank's rows of the reference."""
        is_power_of_two = (self.evaluations + 1).bit_count() == 1
        self.metric.components = self.components or (None if is_power_of_two else self._chosen)
        has_classes = view.real.has_classes
        for output, size, labels in view.encoded():
            latents = view.latents_in(output, size)
            if latents.shape[1] > MAX_DIMS:
                view.say(
                    f"Latent regions: the mixture is fitted to {MAX_DIMS} principal components of the {latents.shape[1]} "
                    "dimensions of the latents."
                )
            self.metric.update(latents, labels if has_classes else None)

    def postprocess(self, view: ModelView, result: LatentRegionsResult) -> LatentRegionsResult:
        """Adds the quality and the classes of what each kind of point decodes to, if these are images."""
        self._chosen = len(result.weights) or None
        generator = torch.Generator().manual_seed(view.adapter.seed)
        fid, inception, decoded_share = result.fid.clone(), result.inception.clone(), result.decoded_share.clone()
        num_points = self.num_points or NUM_POINTS
        if self.num_points is None and self._reference is not None:
            with view.isolated(exact=True):
                num_points = self._choose_points(view, result)
        latents = [result.sample(kind, num_points, generator) for kind in KINDS]
        if not view.has_prior:
            latents[KINDS.index("prior")] = latents[0][:0]
        self._points, self._decoded = [result.project(some).cpu() for some in latents], []
        if self._reference is None:
            return result
        extract = view.resolve_features(self.features)
        with view.isolated(exact=True):
            for k, some in enumerate(latents):
                images, _ = _finite_images(view, some)
                self._decoded.append(images[: plots.SHOWN].cpu())
                # a distance says little with fewer points than features
                if len(images) >= num_points // 2:
                    fid[k] = frechet_distance(*self._reference, *_moments(extract(images))).clamp(min=0)
                    probabilities = self._probabilities(view, images)
                    if probabilities is not None:
                        positive = probabilities.double().clamp(min=LEAST_PROBABILITY)
                        inception[k] = inception_score(positive / positive.sum(1, keepdim=True))
            if len(result.classes) and len(result.weights):
                decoded_share = self._decoded_share(view, result, generator).to(decoded_share)
        return result._replace(fid=fid, inception=inception, decoded_share=decoded_share)

    def _decoded_share(self, view: ModelView, result: LatentRegionsResult, generator: torch.Generator) -> Tensor:
        """(K, C) shares of the classes among images decoded from inside each component; nan where there are none."""
        parts = [
            result.sample("cluster", POINTS_PER_COMPONENT, generator, component=k) for k in range(len(result.weights))
        ]
        component = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        images, finite = _finite_images(view, torch.cat(parts))
        probabilities = self._probabilities(view, images, result.classes.cpu()) if len(images) else None
        counts = torch.zeros(result.decoded_share.shape)
        if probabilities is not None:
            counts.index_put_((component[finite], probabilities.argmax(1)), torch.ones(()), accumulate=True)
        return counts / counts.sum(1, keepdim=True)

    def _choose_points(self, view: ModelView, result: LatentRegionsResult) -> int:
        """Returns the number of points of each kind, chosen once by the time of a few; inside ``view.isolated``."""
        if self._chosen_points is None:
            generator = torch.Generator().manual_seed(view.adapter.seed)
            points = result.sample("prior", TIMED, generator)
            decoding = view.seconds_of(lambda: view.decoded_images(view.as_input(points))) / TIMED
            # a kind whose region is hardly ever hit takes all attempts
            drawing = view.seconds_of(lambda: result.sample("grey", TIMED, generator)) / TIMED
            each = len(KINDS) * decoding + (len(KINDS) - 1) * drawing
            self._chosen_points = fitting(each, SECONDS, LEAST_POINTS, NUM_POINTS)
            if self._chosen_points < NUM_POINTS:
                rank_zero_info(
                    f"Latent regions: {self._chosen_points} points of each kind instead of {NUM_POINTS}, since one of each "
                    f"takes {each:.2g} s. To choose another number, pass LatentRegionsMonitor(num_points=...)."
                )
        return self._chosen_points

    def _probabilities(self, view: ModelView, images: Tensor, classes: Tensor | None = None) -> Tensor | None:
        """(n, K) of images, n > 0, on the CPU, or (n, C) of some classes (C,); None without labels and classifier."""
        classify = view.resolve_extractor(self.classifier)
        if classify is not None:
            parts = [_probabilities_in(classify(some), len(some)) for some in pieces(images, CHUNK)]
            probabilities = torch.cat(parts).cpu()
            known = torch.arange(probabilities.shape[1])
        elif self._neighbours is not None:
            probabilities = self._neighbours.probabilities(images)
            known = torch.from_numpy(self._neighbours.model.classes_)
        else:
            return None
        return probabilities if classes is None else probabilities[:, torch.searchsorted(known, classes.contiguous())]

    def observations(self, result: LatentRegionsResult) -> list[Observation]:
        """The spread of the latents; an alarm where they are one point."""
        spread = float(result.spread)
        message = (
            f"the latents collapsed: all {self.data_name} have the same latents, "
            f"with a standard deviation of {spread:.1g}"
        )
        return [Observation(SPREAD, spread, math.inf if result.collapsed else 0.0, message=message)]

    def get_extra_state(self) -> dict[str, Any]:
        """The numbers of components and of points that were chosen."""
        return {"components": self._chosen, "points": self._chosen_points}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the numbers of components and of points that were chosen."""
        self._chosen, self._chosen_points = state["components"], state["points"]

    def page_frame(self, result: LatentRegionsResult) -> Record | None:
        """The latents, where they have two or three dimensions."""
        latents, labels = self.metric.selected()
        finite = latents.isfinite().all(1)
        points, labels = result.project(latents[finite][:MOST_ON_PAGE]), labels[finite][:MOST_ON_PAGE]
        if not len(points) or points.shape[1] not in (2, 3):
            return None
        arrays = {
            "points": points.half().cpu().numpy(),
            "grey": result.inside("grey", points).cpu().numpy(),
            "means": result.means.half().cpu().numpy(),
        }
        if (labels >= 0).all():
            arrays["classes"] = labels.int().cpu().numpy()
        return Record(arrays=arrays)

    def log_plots(self, result: LatentRegionsResult, context: PlotContext) -> None:
        """Logs the charts, the table of components and the panel."""
        context.logger.log_chart("FID of each kind of point", "Multiline", [f"fid_{kind}" for kind in KINDS])
        context.logger.log_chart("overlap of components", "Multiline", ["overlap", "grey_share"])
        context.logger.log_text("components", plots.table(result))
        context.logger.log_image("panel", self._panel(result, context.occasion()))

    def log_alarm(self, alarm: Alarm, result: LatentRegionsResult, context: PlotContext) -> None:
        """Logs the panel."""
        context.logger.log_image("picture", self._panel(result, context.occasion(alarm)))

    def _panel(self, result: LatentRegionsResult, occasion: Occasion) -> Tensor:
        latents, labels = self.metric.selected()
        points = result.project(latents).cpu()
        return plots.panel(result, points, labels.cpu(), self._points, self._decoded, occasion)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (F,) and the unbiased covariance (F, F) of features (N, F), on the CPU in float64."""
    x = features.detach().double().cpu()
    away = x - x.mean(0)
    return x.mean(0), away.T @ away / (len(x) - 1)  # (F, N) @ (N, F) -> (F, F)


def _probabilities_in(output: Any, n: int) -> Tensor:
    """Returns the probabilities (n, K) in what a classifier returns.

    Raises:
        ValueError: If it returns no scores.
    """
    class_of(output, n)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if output.ndim != 2:
        raise ValueError(f"classifier must return ({n}, K) scores here, got labels of shape {tuple(output.shape)}.")
    inside = bool((output >= 0).all()) and torch.allclose(output.sum(1), torch.ones_like(output[:, 0]), atol=1e-3)
    scores: Tensor = output.float()
    return scores if inside else scores.softmax(1)


def _finite_images(view: ModelView, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the finite ones of the images that latents (n, L) decode to, on the module's device, and which (n,) are."""
    if not len(latents):
        return as_images(view.reference_images.images[:0]).to(view.device), torch.zeros(0, dtype=torch.bool)
    images = torch.cat([view.decoded_images(some) for some in pieces(view.as_input(latents), CHUNK)])
    finite = images.flatten(1).isfinite().all(1)
    return images[finite].float(), finite.cpu()
