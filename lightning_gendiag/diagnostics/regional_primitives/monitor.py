"""Monitors the feature components of a generator's regions while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_gendiag.callbacks.monitor import DiagnosticWarning, Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series
from lightning_gendiag.diagnostics.regional_primitives import plots
from lightning_gendiag.diagnostics.regional_primitives.functional import (
    MAX_REGIONS,
    RegionalPrimitivesResult,
    check_regions,
    decompose,
    importance,
    largest_first,
    minimal_features,
    or_interactions,
)
from lightning_gendiag.diagnostics.regional_primitives.metric import RegionalPrimitives
from lightning_gendiag.functional.arrays import pieces
from lightning_gendiag.model.amounts import fitting
from lightning_gendiag.model.warning import warn
from lightning_gendiag.regions.region_map import RegionMap
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

DEPTH = 4
"""By default the generator is split where its features have at least one ``DEPTH``-th of the image's height."""

INVERTED = 0.01
"""Error of latents that are decoded and encoded, relative to their norm, below which they come back, as those of a flow do."""

NUMBERS = 1 << 19
"""Largest count of numbers in the images that are optimised together by default."""

BASELINE, LEAST_BASELINE = 256, 32
"""Number of latents over which the baseline is the mean, and the smallest number of them."""

LEAST_STEPS = 4
"""Smallest number of Gauss-Newton steps, however long they take."""

LEAST_REGIONS = 3
"""Smallest number of regions that are left, however long a step takes."""

MIN_STD = 0.3
"""A third more or less is a usual fluctuation."""

REGION = Series("region", "component", "strength of its components", min_std=MIN_STD)
IMAGE = Series("image", "aggregate", "strength of its components", min_std=MIN_STD)


def _leakage_series(name: str, index: int) -> Series:
    """Returns the series of how much the components of a region change the rest of the image."""
    return Series(
        f"{name} outside", "standalone", "share of their effect outside their regions", index=index, min_std=MIN_STD,
        label=f"the components of {name}", event="leak into the rest of the image",
    )  # fmt: skip


class RegionalPrimitivesMonitor(Monitor[RegionalPrimitives, RegionalPrimitivesResult]):
    """Monitors :class:`RegionalPrimitives` of a generator or decoder: what draws which regions together.

    For a few seeded latents, the features at a split point are decomposed into components of sets of regions. TensorBoard
    shows scalars, and a panel with the largest components and what they draw, the image as components are added, the
    sorted norms, and which regions are drawn together.

    An evaluation optimises 2^n features for each image and takes seconds to minutes. So by default it takes place every
    tenth epoch, and the first one times a step, by which it chooses once how much of the following fits ``max_seconds``:
    the number of steps, at least 4, of images, and of regions, at least 3, unless regions were given.

    Args:
        split: Path of the submodule whose output is decomposed (``"generator.6"``); by default the last layer whose
            features have about a quarter of the image's height.
        regions: (H, W) labels (negative ones are left out), a :class:`RegionMap` or the path of a saved map; ``"grid"``
            for 3 x 3 cells; by default found in the reference.
        num_regions: Number of regions to find, including a background that never varies, which is left out.
        max_regions: Largest number of regions; of more, those are kept that change most from the baseline, with a warning.
        num_images: Number of latents per evaluation, over all processes.
        penalty: See :func:`minimal_features`.
        max_steps: See :func:`minimal_features`.
        batch_size: Number of sets that are optimised together, which bounds the memory; by default as many as have images
            of half a million numbers: 512 of 32x32, 42 of 3x64x64.
        max_seconds: Approximate limit of the time of an evaluation on each process.
        every_n_epochs: Number of epochs from one evaluation to the next.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = RegionalPrimitivesMonitor(split="generator.6")  # one of the Trainer's callbacks
    """

    name = "regional_primitives"
    metric_class = RegionalPrimitives
    needs = ("decode",)
    needs_images = True
    period_multiplier = 10
    layer: str
    """Path of the submodule whose output is decomposed; empty before it is found."""
    labels: Tensor
    """(H, W) numbers of the regions, negative where the image is left out; empty before they are found, as ``names``."""
    names: list[str]
    _amounts: dict[str, int]
    """The numbers of steps, images and latents of the baseline; empty before the first evaluation."""
    _batch_size: int
    _drawn: plots.Drawn | None = None

    def __init__(
        self,
        split: str | None = None,
        regions: RegionMap | Tensor | str | None = None,
        *,
        num_regions: int = 5,
        max_regions: int = 9,
        num_images: int = 2,
        penalty: float = 0.1,
        max_steps: int = 20,
        batch_size: int | None = None,
        max_seconds: float = 20.0,
        every_n_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(every_n_epochs=every_n_epochs, **kwargs)
        if not 1 <= max_regions <= MAX_REGIONS:
            raise ValueError(f"max_regions must be 1 to {MAX_REGIONS}, got {max_regions}.")
        for name, value in (("num_images", num_images), ("max_steps", max_steps), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if penalty <= 0 or max_seconds <= 0:
            raise ValueError(f"penalty and max_seconds must be above 0, got {penalty} and {max_seconds}.")
        self.split, self.regions, self.num_regions, self.max_regions = split, regions, num_regions, max_regions
        self.num_images, self.penalty, self.max_steps = num_images, penalty, max_steps
        self.batch_size, self.max_seconds = batch_size, max_seconds
        self._given_regions = _regions_in(regions)
        self._amounts = {}
        self.layer, (self.labels, self.names) = split or "", self._given_regions

    def reset(self) -> None:
        """Forgets the layer and the regions as well, unless they were given."""
        super().reset()
        self._amounts = {}
        self.layer, (self.labels, self.names) = self.split or "", self._given_regions

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether regions are found in real images, or latents are of these."""
        return self.regions is None or (self._session is not None and not self.view.has_prior)

    @property
    def expected_seconds(self) -> float:  # type: ignore[override]
        """The limit of its own."""
        return self.max_seconds

    def check(self, view: ModelView) -> None:
        """Decodes a latent, finds the layer, and compares the regions with the image."""
        z = next(view.prior_latents(2, all_ranks=True))[:1]
        with view.isolated(exact=True):
            size = view.decoded_images(z).shape[2:]
            if self.names and size != self.labels.shape:
                raise ValueError(f"regions must be {tuple(size)}, as the images are, got {tuple(self.labels.shape)}.")
            self._features(view, z)

    # ---- the generator in two halves ----

    def _submodule(self, view: ModelView) -> nn.Module:
        try:
            return view.module.get_submodule(self.layer)
        except AttributeError:
            known = ", ".join(name for name, _ in view.module.named_children())
            raise ValueError(
                f"split must be the path of a submodule of {type(view.module).__name__}, got {self.layer!r}. "
                f"Its children are {known}."
            ) from None

    def _features(self, view: ModelView, z: Tensor) -> Tensor:
        """Features (n, ...) at the split point for latents (n, L); finds the layer where it is not known."""
        self.layer = self.layer or _found_layer(view, z[:1])
        outputs: list[Any] = []
        with self._submodule(view).register_forward_hook(lambda module, inputs, output: outputs.append(output)):
            view.decode(z)
        if not outputs or not isinstance(outputs[0], Tensor) or len(outputs[0]) != len(z):
            got = type(outputs[0]).__name__ if outputs else "no call of it"
            raise ValueError(
                f"split must name a module that the decoder runs and that returns a tensor (N, ...), got {got}."
            )
        return outputs[0].detach()

    @contextmanager
    def _tail(self, view: ModelView, z: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Gives a callable from features (n, ...) to images, with all else as for the latent ``z`` (1, L).

        The features take the place of the output of the split module's first call; further calls are left alone.
        """
        given: list[Tensor] = []

        def tail(features: Tensor) -> Tensor:
            given[:] = [features]
            return view.decoded_images(z.expand(len(features), -1))

        with self._submodule(view).register_forward_hook(lambda *_: given.pop() if given else None):
            yield tail

    # ---- one evaluation ----

    def build_metric(self, view: ModelView) -> RegionalPrimitives:
        """Finds the regions, or keeps the most important of those that were given."""
        if not self.names and self.regions is None:
            self.labels, self.names = _regions_in(self.find_regions(view, self.num_regions, 1000))
        z = next(view.prior_latents(8, all_ranks=True))
        with view.isolated(exact=True):
            image = view.decoded_images(z[:1])[0]
            self._batch_size = self.batch_size or max(1, min(512, NUMBERS // image.numel()))
            if not self.names:
                self.labels = grid(*image.shape[1:])
                self.names = [f"row {r // 3 + 1}, column {r % 3 + 1}" for r in range(9)]
            if len(self.names) > self.max_regions:
                self._keep_most_important(view, z, self.max_regions, "To evaluate more, raise max_regions.")
            if not self._amounts:
                self._choose(view, z)
        return RegionalPrimitives(len(self.names))

    def _choose(self, view: ModelView, z: Tensor) -> None:
        """Chooses how much is done by the time of two Gauss-Newton steps of two sets, and of the features of latents."""
        feature, own, count = self._features(view, z), z[:1], len(self.names)
        subsets = torch.tensor([1, 2**count - 1])
        with self._tail(view, own) as tail:
            each = view.seconds_of(
                lambda: minimal_features(
                    tail, feature[0], feature.mean(0), self.labels, penalty=self.penalty, tolerance=0.0, max_steps=2,
                    subsets=subsets,
                )
            ) / (2 * len(subsets))  # fmt: skip
        one = view.seconds_of(lambda: self._features(view, z)) / len(z)
        fits = fitting(each, self.max_seconds, 2**LEAST_REGIONS * LEAST_STEPS, 1 << 40)
        regions = count
        if self.regions is None and fits < 2**count * LEAST_STEPS:
            regions = (fits // LEAST_STEPS).bit_length() - 1
            advice = f"An evaluation of more would take longer than max_seconds={self.max_seconds:g}."
            self._keep_most_important(view, z, regions, advice)
        steps = min(self.max_steps, max(LEAST_STEPS, fits // 2**regions))
        images = min(self.num_images, max(1, fits // (2**regions * steps)) * view.world_size)
        baseline = fitting(one, self.max_seconds / 10, LEAST_BASELINE, BASELINE)
        self._amounts = {"steps": steps, "images": images, "baseline": baseline}
        if (steps, images) != (self.max_steps, self.num_images):
            rank_zero_info(
                f"Regional primitives: {images} images and at most {steps} steps at each evaluation, since a step takes "
                f"{each * 2**regions:.2g} s. To allow more, pass RegionalPrimitivesMonitor(max_seconds=...)."
            )

    def _keep_most_important(self, view: ModelView, z: Tensor, most: int, advice: str) -> None:
        features, count = self._features(view, z), len(self.names)
        shares = torch.zeros(count, device=features.device)
        for latent, feature in zip(z, features, strict=True):
            with self._tail(view, latent[None]) as tail:
                shares += importance(tail, feature, features.mean(0), self.labels)
        kept = shares.topk(most).indices.sort().values.tolist()
        # label -1 takes the last entry and stays -1
        table = torch.full((count + 1,), -1, dtype=torch.long)
        table[torch.tensor(kept)] = torch.arange(len(kept))
        self.labels, self.names = table[self.labels], [self.names[r] for r in kept]
        warn(
            f"Of {count} regions, only the {len(kept)} that change most are evaluated, since a feature is optimised for "
            f"each of their 2^n sets. {advice}",
            category=DiagnosticWarning,
        )

    def update(self, view: ModelView) -> None:
        """Decomposes this rank's images."""
        steps, number_of_images, count = (self._amounts[name] for name in ("steps", "images", "baseline"))
        with view.isolated(exact=True):
            latents = torch.cat(list(view.prior_latents(max(count, number_of_images), all_ranks=True)))
            baseline = torch.cat([self._features(view, some) for some in pieces(latents, 64)]).mean(0)
            for number in range(view.rank, number_of_images, view.world_size):
                z = latents[number : number + 1]
                feature = self._features(view, z)[0]
                with self._tail(view, z) as tail:
                    # from the baseline each time: from the last evaluation's features, components that are gone linger
                    minimal = minimal_features(
                        tail, feature, baseline, self.labels, penalty=self.penalty, max_steps=steps,
                        batch_size=self._batch_size,
                    )  # fmt: skip
                    found = decompose(tail, feature, self.labels, minimal, self._batch_size)
                    self.metric.update(*found)
                    if number == 0 and self.log_images:
                        self._drawn = _drawn_by(tail, feature, or_interactions(minimal.features), found.norms)

    def observations(self, result: RegionalPrimitivesResult) -> list[Observation]:
        """The strength of each region's components and their leakage, and the mean strength."""
        observations = []
        regions = zip(self.names, result.strength.tolist(), result.leakage.tolist(), strict=True)
        for index, (name, strength, leakage) in enumerate(regions):
            observations += [
                Observation(REGION.numbered(index, name), strength, _weakness(strength)),
                Observation(_leakage_series(name, index), leakage, math.log(leakage + 0.1)),
            ]
        mean = float(result.strength.mean())
        return [*observations, Observation(IMAGE, mean, _weakness(mean))]

    def get_extra_state(self) -> dict[str, Any]:
        """The regions, the layer that is split, and how much is done."""
        return {"labels": self.labels, "names": list(self.names), "layer": self.layer, "amounts": dict(self._amounts)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the regions, how much is done, and the layer unless another one was given."""
        self._amounts = dict(state["amounts"])
        self.labels, self.names, self.layer = state["labels"], list(state["names"]), self.split or state["layer"]

    def page_setup(self) -> Record:
        """The regions."""
        return Record({"regions": list(self.names)})

    def page_frame(self, result: RegionalPrimitivesResult) -> Record:
        """What the largest components of one image draw, and how the error falls as components are added."""
        names, strip = plots.page_strip(self._drawn, self.names)
        return Record({"names": names}, {"curve": result.curve.half().numpy()}, strip)

    def log_plots(self, result: RegionalPrimitivesResult, context: PlotContext) -> None:
        """Logs the charts, the table of components and the panel."""
        regions = range(len(self.names))
        context.logger.log_chart("strength of every region", "Multiline", [f"strength_{r}" for r in regions])
        context.logger.log_chart("leakage of every region", "Multiline", [f"leakage_{r}" for r in regions])
        context.logger.log_text("components", plots.table(result, self.names, self.layer))
        picture = plots.panel(result, self.labels, self.names, self._drawn, context.occasion())
        context.logger.log_image("panel", picture)

    def log_alarm(self, alarm: Alarm, result: RegionalPrimitivesResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's regions marked."""
        picture = plots.panel(result, self.labels, self.names, self._drawn, context.occasion(alarm))
        context.logger.log_image("picture", picture)


def grid(height: int, width: int, cells: int = 3) -> Tensor:
    """(H, W) labels of cells x cells equal cells, row by row."""
    rows, columns = torch.arange(height) * cells // height, torch.arange(width) * cells // width
    return rows[:, None] * cells + columns


def _regions_in(given: RegionMap | Tensor | str | None) -> tuple[Tensor, list[str]]:
    """Returns labels and names of regions; empty ones where they are not known yet."""
    if given is None or (isinstance(given, str) and given == "grid"):
        return torch.empty(0, 0, dtype=torch.long), []
    if isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point() and (given < 0).any():
        # a RegionMap covers all of an image; here a part may be left out
        return given.long().cpu(), [f"region {r}" for r in range(check_regions(given))]
    found = RegionMap.of(given)
    kept = [r for r in range(found.num_regions) if r != found.background]
    number = torch.full((found.num_regions,), -1)
    # where real images never vary there is nothing to draw
    number[kept] = torch.arange(len(kept))
    return number[found.labels], [found.names[r] for r in kept]


def _found_layer(view: ModelView, z: Tensor) -> str:
    """Returns the last layer of those with the smallest features that have a quarter of the image's height or more.

    Raises:
        ValueError: If there is none.
    """
    seen: list[tuple[str, int]] = []
    with ExitStack() as hooks:
        for name, part in view.module.named_modules():
            if name and not list(part.children()):
                hooks.enter_context(part.register_forward_hook(partial(_note_height, seen, name)))
        images = view.decoded_images(z)
    # its coupled layers pass most of the data around the networks inside them
    if _is_inverted(view, z, images):
        raise ValueError(
            "split must be given for a flow, whose latents have as many numbers as its images, since none of its layers has "
            "smaller features of the whole image. To fix this, pass RegionalPrimitivesMonitor(split=...)."
        )
    height = images.shape[2]
    heights = [h for _, h in seen if height / DEPTH <= h < height]
    if not heights:
        middle = repr(seen[len(seen) // 2][0]) if seen else "..."
        raise ValueError(
            "split must be given for a decoder without a layer whose features have a quarter of the image's height. "
            f"To fix this, pass RegionalPrimitivesMonitor(split={middle}), or the path of another layer."
        )
    return [name for name, h in seen if h == min(heights)][-1]


def _is_inverted(view: ModelView, z: Tensor, images: Tensor) -> bool:
    """Whether what latents (1, L) are decoded to has the same latents, as in a flow; inside ``view.isolated``."""
    if not view.parts.has("encode") or images.numel() != z.numel():
        return False
    with suppress(Exception):
        return float((view.latents_of(images) - z).norm()) < INVERTED * float(z.norm())
    return False


def _note_height(seen: list[tuple[str, int]], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        seen.append((name, output.shape[2] if output.ndim == 4 else 0))


def _weakness(strength: float) -> float:
    """Returns the severity of a strength; nan stays nan."""
    return -math.log(max(strength, 1e-6))


def _drawn_by(tail: Callable[[Tensor], Tensor], feature: Tensor, interactions: Tensor, norms: Tensor) -> plots.Drawn:
    """Returns what the largest components of one image draw, and the image as components are added."""
    baseline, order = interactions[0], largest_first(norms)
    first = order[: plots.SHOWN - 1]
    counts = [0, *(2**k for k in range(10) if 2**k < len(order)), len(order)]
    sums = torch.stack([baseline + interactions[order[:count]].sum(0) for count in counts])
    return plots.Drawn(
        images=tail(torch.cat([feature[None], baseline[None], baseline + interactions[first]])).detach().cpu(),
        masks=torch.cat([torch.zeros(2, dtype=torch.long), first.cpu()]),
        growth=tail(torch.cat([sums, feature[None]])).detach().cpu(),
    )
