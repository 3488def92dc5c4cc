"""Monitors k* of a layer's features while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series
from lightning_gendiag.diagnostics.k_star import plots
from lightning_gendiag.diagnostics.k_star.functional import Distance, KStarResult
from lightning_gendiag.diagnostics.k_star.metric import KStar
from lightning_gendiag.functional.arrays import as_data, pooled
from lightning_gendiag.functional.results import MAX_CLASS_TAGS
from lightning_gendiag.model.batches import known
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

CHUNK = 128
"""Largest number of images that go through the layer at a time."""

MAX_LENGTH = 2048
"""Largest length of spatial features that are compared position by position; of longer ones, means over positions are."""

MOST_NAMED = 10
"""Largest number of classes that a line of the log names."""

MIN_STD = 0.02
"""A change of the mean by this much, out of 1, is a usual fluctuation."""

MIN_DELTA = 0.09
"""So is a lasting drop by this much: a flow's latents lose the classes as they become Gaussian."""

CLASS = Series("class", "component", "mean k*", event="fractured", min_std=MIN_STD, min_delta=MIN_DELTA)
ALL = Series("all classes", "aggregate", "mean k*", event="fractured", min_std=MIN_STD, min_delta=MIN_DELTA)

MOST_ON_PAGE = 50
"""Largest number of classes whose distributions the tab shows."""


class KStarMonitor(Monitor[KStar, KStarResult]):
    """Monitors :class:`KStar` of a layer's features of labelled images.

    TensorBoard shows scalars, a table of the classes, a histogram of all values, and a panel with the distribution of
    each class and the matrix of first rivals.

    Args:
        features: What makes features of images: ``"encode"``, the model's encoder; the path of a submodule whose output
            is taken (``"discriminator.4"``: the first part of the path is called with the images); or a callable
            ``(module, images)``. Features with more than one axis are flattened, or averaged over their positions where
            they hold more than 2,048 numbers.
        images: ``"real"`` for the labelled images of the reference, ``"generated"`` for samples of a sampler that takes
            labels.
        distance: See :func:`k_star`.
        max_rows: Largest number of images.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = KStarMonitor("discriminator.7")  # one of the Trainer's callbacks
    """

    name = "k_star"
    metric_class = KStar
    needs = ()
    needs_labels = True

    def __init__(
        self,
        features: str | Callable = "encode",  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        images: Literal["real", "generated"] = "real",
        distance: Distance = "euclidean",
        max_rows: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if images not in ("real", "generated"):
            raise ValueError(f"images must be 'real' or 'generated', got {images!r}.")
        if not isinstance(features, str) and not callable(features):
            raise ValueError(f"features must be a name or a callable, got {features!r}.")
        KStar(distance, max_rows=max_rows)
        self.features, self.images, self.distance, self.max_rows = features, images, distance, max_rows

    def shares(self) -> str:
        """What the encoder gives for real images, where these are its features."""
        return "encoded" if (self.features, self.images) == ("encode", "real") else self.name

    def check(self, view: ModelView) -> None:
        """Looks for the encoder or the layer, and for a sampler that takes labels where one is needed."""
        if self.images == "generated" and not view.adapter.conditional:
            raise ValueError(
                "images='generated' must go with a sampler that takes labels. "
                "To fix this, pass ModelAdapter(sample=lambda module, n, labels: ..., conditional=True)."
            )
        if self.features == "encode":
            view.find("encode")
        elif isinstance(self.features, str):
            _layer(view, self.features)

    def build_metric(self, view: ModelView) -> KStar:
        """Creates the metric, if labels of several classes with several images each are known."""
        view.real.classes()
        return KStar(self.distance, max_rows=self.max_rows)

    def update(self, view: ModelView) -> None:
        """Adds the features of this rank's images."""
        if self.features == "encode" and self.images == "real":
            for output, size, classes in view.encoded():
                self.metric.update(_rows(view, view.latents_in(output, size, flat=False), size), known(classes))
            return
        images, classes = view.local_reference() if self.images == "real" else view.samples()
        labels = known(classes)
        with view.isolated(exact=True):
            for start in range(0, len(images), CHUNK):
                some = view.as_input(as_data(images[start : start + CHUNK]))
                of_some = labels[start : start + CHUNK].to(view.device)
                self.metric.update(self._features(view, some, of_some), of_some)

    def _features(self, view: ModelView, images: Tensor, labels: Tensor) -> Tensor:
        """Features (n, D) of images (n, C, H, W) or other data with labels (n,); inside ``view.isolated``."""
        if self.features == "encode":
            return _rows(view, view.latents_in(view.encode(images, labels), len(images), flat=False), len(images))
        extract = None if isinstance(self.features, str) else view.resolve_extractor(self.features)
        if extract is not None:
            return _rows(view, extract(images), len(images))
        path = str(self.features)
        entry, layer = _layer(view, path)
        outputs: list[Any] = []
        with layer.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
            entry(images)
        if not outputs:
            raise ValueError(f"features must name a layer that {path.split('.')[0]} runs, got {path!r}.")
        return _rows(view, outputs[-1], len(images))

    def postprocess(self, view: ModelView, result: KStarResult) -> KStarResult:
        """Logs which classes are not measured, since there is a single real image of them."""
        single = result.classes[result.single].tolist()
        if single and self.images == "real":
            named = ", ".join(map(str, single[:MOST_NAMED])) + ", ..." * (len(single) > MOST_NAMED)
            view.say(
                f"k* is not measured for {len(single)} of {len(result.classes)} classes with a single real image: {named}."
            )
        return result

    def observations(self, result: KStarResult) -> list[Observation]:
        """The mean of each class of two images or more, labelled with its nearest rival, and the mean of all classes."""
        observations = []
        columns = (result.classes, result.mean, result.nearest_rival, result.single)
        for c, value, rival, is_single in zip(*(column.tolist() for column in columns), strict=True):
            label = "" if rival < 0 else f"class {c}, now next to class {rival},"
            if not is_single:
                observations.append(Observation(CLASS.numbered(c), value, -value, label))
        mean = float(result.scalars()["mean"])
        return [*observations, Observation(ALL, mean, -mean)]

    def page_frame(self, result: KStarResult) -> Record | None:
        """The distribution within each class, and the nearest other classes."""
        if not 0 < len(result.classes) <= MOST_ON_PAGE:
            return None
        fields = {"classes": result.classes.tolist(), "patterns": list(result.pattern)}
        arrays = {"histogram": plots.histograms(result).half().numpy(), "rivals": result.rivals.half().numpy()}
        return Record(fields, arrays)

    def log_plots(self, result: KStarResult, context: PlotContext) -> None:
        """Logs the histogram of all values, the table, the charts and the panel."""
        context.logger.log_histogram("values", result.values)
        context.logger.log_text("classes", plots.table(result))
        if len(result.classes) <= MAX_CLASS_TAGS:
            classes = result.classes[~result.single].tolist()
            context.logger.log_chart("every class", "Multiline", [f"class_{c}" for c in classes])
        context.logger.log_chart("skewness", "Multiline", ["true_skewness", "approximate_skewness"])
        context.logger.log_image("panel", plots.panel(result, context.occasion()))

    def log_alarm(self, alarm: Alarm, result: KStarResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's classes marked."""
        context.logger.log_image("picture", plots.panel(result, context.occasion(alarm)))


def _layer(view: ModelView, path: str) -> tuple[nn.Module, nn.Module]:
    """Returns the first part of a path, which is called, and the submodule whose output is taken.

    Raises:
        ValueError: If there is no such submodule.
    """
    try:
        return view.module.get_submodule(path.split(".")[0]), view.module.get_submodule(path)
    except AttributeError:
        layers = [name for name, part in view.module.named_modules() if name and not list(part.children())]
        raise ValueError(
            f"features must be 'encode', a callable or the path of a submodule of {type(view.module).__name__}, got "
            f"{path!r}. Its layers are {', '.join(layers[:40])}."
        ) from None


def _rows(view: ModelView, output: Any, n: int) -> Tensor:
    """Returns the features (n, D) in what a layer or a callable returned for n images, averaged where they are long.

    Raises:
        ValueError: If it returned anything else.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or len(output) != n or output.ndim < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"features must be ({n}, ...) for {n} images, got {got}.")
    rows = pooled(output.detach(), MAX_LENGTH).float()
    if rows.shape[1] < output[0].numel():
        view.say(f"k*: features {tuple(output.shape[1:])} are compared by their means over positions.")
    return rows
