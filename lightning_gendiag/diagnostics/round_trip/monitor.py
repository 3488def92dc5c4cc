"""Monitors whether what a flow or an autoencoder encodes comes back while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.detection.history import ByStep, Observation, Series, divided
from lightning_gendiag.diagnostics.round_trip import plots
from lightning_gendiag.diagnostics.round_trip.functional import (
    MAX_TAGS,
    RESOLVED,
    VOLUME_TOLERANCE,
    RoundTripResult,
    jacobian_volume,
)
from lightning_gendiag.diagnostics.round_trip.metric import Kind, RoundTrip
from lightning_gendiag.functional.arrays import as_data, middle_slices
from lightning_gendiag.functional.jacobian import DERIVATIVE_FAILS, decoder_gram
from lightning_gendiag.model.amounts import FEWEST_ROWS, ROWS_SECONDS, TIMED, fitting
from lightning_gendiag.model.inversion import Layer, Through, latents_in, layers_of, log_det_ways
from lightning_gendiag.model.parts import LARGEST_ERROR
from lightning_gendiag.regions.region_map import RegionMap

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

TOLERANCE = 0.01
"""Standard deviations. In float32, healthy flows of this package's tests and benchmarks lose at most a hundredth of this."""

MOST_ROWS = 128
"""Number of real images, of latents of the prior and of noise images that a flow inverts at an evaluation, and of images of an
autoencoder whose latents are compared, or that are held out."""

LAYER_ROWS = 8
"""Numbers of real images, of samples and of noise images, those with the largest errors, that pass each layer alone."""

JACOBIANS, LAYER_JACOBIANS = 2, 2
"""Number of real images at which the Jacobian of the flow is computed, and of each layer where that of the flow is wrong."""

LARGEST_JACOBIAN = 1024
"""Number of dimensions up to which Jacobians are computed; their time grows with its square and cube."""

MANY_DIMENSIONS = 256
"""Above so many dimensions, the Jacobian is computed at one image, and not for each layer."""

KINDS_OF_ROWS = 3
"""Real images, samples and noise; or real images, latents and validation images."""

ROUNDED = 256
"""Values of data in 8 bits. What decodes to no more different ones rounds, so that latents cannot come back."""

CONFIRM = 3
"""Evaluations in a row in which the inverse or the log-determinant must be wrong."""

LOST, KEPT = 0.9, 0.5
"""Fractions of the variance: a region or a latent dimension that loses the first or more is lost, where half of them lose no
more than the second."""

ACTIVE = 0.25
"""A latent dimension with less variance, relative to the mean of all, may be one that a VAE does not use any more."""

MIN_STD, MIN_DELTA = 0.25, 1.0
"""Octaves of the fraction of the variance that is lost: fluctuations below the first are no news, and it must double."""

FLOOR = 0.02
"""Fraction of the variance below which a region is reconstructed well, whatever it was before."""

REGION = Series(
    "region", "component", "fraction of the variance that reconstructions lose", event="is reconstructed worse",
    min_std=MIN_STD, min_delta=MIN_DELTA,
)  # fmt: skip
IMAGE = replace(REGION, name="image", role="aggregate", label="the image")
HELD_OUT = Series(
    "held-out images", "record", "fraction of the variance that reconstructions of validation images lose"
)
LOST_REGIONS = Series("regions", "rule", REGION.quantity, event="is not reconstructed", progress=-0.05, stop="never")
LOST_LATENTS = Series("latent dimensions", "rule", "fraction of the variance that is lost", event="does not come back",
                      progress=-0.05, stop="never")  # fmt: skip
ONLY_TRAINING = Series("validation images", "rule", HELD_OUT.quantity, event="are not reconstructed", progress=-0.05,
                       stop="never")  # fmt: skip
DATA = Series("data", "rule", "error of decoded latents of data", confirm=CONFIRM, stop="never")
LATENTS = Series("latents", "rule", "error of encoded samples", confirm=CONFIRM, stop="never")
NOISE = Series("noise", "rule", "error of noise in the range of the data", confirm=CONFIRM, stop="never")
VOLUME = Series("log-determinant", "rule", "difference from the Jacobian's", "nats", confirm=CONFIRM, stop="never")
CONDITION = Series("condition", "rule", "logarithm of the condition number", confirm=CONFIRM, stop="never")
"""Rules about flows. None stops a run: a flow can learn a density whose inverse is wrong."""


class Parts(NamedTuple):
    """What is measured of a module, the same on all processes."""

    is_flow: bool
    names: tuple[str, ...] = ()
    """Of the layers."""
    log_det: str = ""
    """Of what reports log-determinants; empty where nothing does."""


class RoundTripMonitor(Monitor[RoundTrip, RoundTripResult]):
    """Monitors :class:`RoundTrip` of a flow, or of an autoencoder.

    Of a flow, whose latents have as many numbers as its data, real images are encoded and decoded, samples decoded and
    encoded, and noise in the range of the data as well; log-determinants are compared with those of Jacobians, and each
    layer that is found is inverted alone. Rules say which dimension and which layer is wrong. None of them stops a run.

    Of an autoencoder, the fraction of the variance that reconstructions lose is monitored by region, also of validation
    images, and how much of each latent dimension comes back when reconstructions are encoded.

    Args:
        log_det: Of a flow, what returns ``log |det dz/dx|`` (N,) in nats: the name of a method of the module, or a callable
            ``(module, images)``, which may also return a pair of latents and log-determinants; by default what returns the
            latents of the encoder and numbers (N,) beside them, if anything does.
        regions: (H, W) labels, a :class:`RegionMap` or the path of a saved map; by default found in the reference.
        num_regions: Number of regions to find; None lets the data choose.
        tolerance: Largest root mean squared error of a flow's round trip, in standard deviations.
        patience: Number of evaluations in which a region of an autoencoder is lost before an alarm; three where it was
            reconstructed before. A latent dimension must have come back before.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = RoundTripMonitor(log_det="log_det_of_images")  # one of the Trainer's callbacks
    """

    name = "round_trip"
    metric_class = RoundTrip
    period_multiplier = 4
    needs = ()
    region_map: RegionMap | None
    """The regions of an autoencoder's data; None before they are found, and of data that have none."""

    def __init__(
        self,
        log_det: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        regions: RegionMap | Tensor | str | None = None,
        num_regions: int | None = 5,
        tolerance: float = TOLERANCE,
        patience: int = 6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not tolerance > 0:
            raise ValueError(
                f"tolerance must be above 0, got {tolerance}. To fix this, pass a number such as {TOLERANCE}."
            )
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}. To fix this, pass a number such as 6.")
        self.log_det, self.regions, self.num_regions = log_det, regions, num_regions
        self.tolerance, self.patience = tolerance, patience
        self._forget()

    def _forget(self) -> None:
        self.region_map = None if self.regions is None else RegionMap.of(self.regions)
        self._parts: Parts | None = None
        self._held_out: list[Tensor] = []
        self._shape: tuple[int, ...] = ()
        self._offsets: dict[int, float] = {}
        self._kept: ByStep[tuple[Tensor, Tensor]] = ByStep()
        self._is_rounded = self._adds_noise = False
        self._most = MOST_ROWS

    def reset(self) -> None:
        """Forgets the regions, the layers and the validation images as well."""
        super().reset()
        self._forget()

    # ---- what is measured ----

    def check(self, view: ModelView) -> None:
        """Looks for what encodes and decodes, or reconstructs."""
        example = view.real.example
        if example is None:
            return
        if self._may_be_flow(view):
            view.find("encode", "decode")
        else:
            view.find("reconstruct")
        view.resolve_named(self.log_det, "log_det")

    def _may_be_flow(self, view: ModelView) -> bool:
        """Whether the latents have as many numbers as the data."""
        parts, example = view.parts, view.real.example
        if example is None or not (parts.has("encode") and parts.has("decode")) or parts.way("encode").takes_labels:
            return False
        images = view.as_input(as_data(example))
        with view.isolated(exact=True):
            view.seed()
            latents = view.latents_of(images)
        return latents[0].numel() == images[0].numel()

    def _found(self, view: ModelView) -> Parts:
        """Finds out whether the module is a flow, its layers, and what reports its log-determinant; else what reconstructs."""
        parts = self._flow_in(view)
        if not parts.is_flow:
            view.find("reconstruct")
        return parts

    def _flow_in(self, view: ModelView) -> Parts:
        if not self._may_be_flow(view):
            return Parts(False)
        images = view.as_input(as_data(view.reference.images[:4]))
        with view.isolated(exact=True):
            view.seed()
            name, _ = self._reports(view, images)
            view.seed()
            layers = self._layers(view, images)
            view.seed()
            again = view.decode(view.as_input(view.latents_of(images))).view_as(images)
        # a flow that cannot invert is one all the same where its layers or determinants show it
        is_flow = bool(name or layers or float((again - images).norm()) < LARGEST_ERROR * float(images.norm()))
        return Parts(is_flow, tuple(layer.name for layer in layers), name) if is_flow else Parts(False)

    def _reports(self, view: ModelView, images: Tensor) -> tuple[str, Through | None]:
        """What reports log-determinants, by its name; inside ``view.isolated``."""
        given = view.resolve_named(self.log_det, "log_det")
        if given is not None:
            return "log_det", lambda x: (x, _volumes_in(given(x), len(x)))
        for name, through in log_det_ways(view.module, view.encode, images, view.seed):
            if self._parts is None or name == self._parts.log_det:
                return name, through
        return "", None

    def _layers(self, view: ModelView, images: Tensor) -> list[Layer]:
        with suppress(Exception):
            return layers_of(view.module, view.encode, view.decode, images)
        return []

    def build_metric(self, view: ModelView) -> RoundTrip:
        """Finds the regions of an autoencoder's data or the layers of a flow, equal on all processes."""
        failure = RuntimeError("the module could not be inverted on another process")
        own = view.on_all(lambda: self._found(view), failure)
        self._parts = view.broadcast(lambda: own)
        data = view.reference.images
        self._shape = tuple(data.shape[1:])
        self._most = self._fitting(view, self._parts)
        if self._parts.is_flow:
            said = f"; log-determinants: {self._parts.log_det}" if self._parts.log_det else ""
            rank_zero_info(f"Round trip: a flow with {len(self._parts.names)} layers that are inverted alone{said}.")
            return RoundTrip(num_layers=len(self._parts.names))
        if self.region_map is None and data.ndim in (4, 5):
            self.region_map = self.find_regions(view, self.num_regions, len(data))
        return RoundTrip(None if self.region_map is None else self.region_map.labels)

    def _fitting(self, view: ModelView, parts: Parts) -> int:
        """Number of rows of each kind for which an evaluation takes about 1.5 s, at most ``MOST_ROWS``."""
        images = view.as_input(as_data(view.reference.images[:TIMED]))
        call = view.parts.way("reconstruct").call if not parts.is_flow else lambda x: self._decoded(view, x)
        with view.isolated(exact=True):
            seconds = view.seconds_of(lambda: call(images)) / len(images)
        return fitting(KINDS_OF_ROWS * seconds / view.world_size, ROWS_SECONDS, FEWEST_ROWS, MOST_ROWS)

    @property
    def wants_held_out(self) -> bool:
        """Of autoencoders, until there are enough images."""
        return not (self._parts is not None and self._parts.is_flow) and self._room > 0

    @property
    def _room(self) -> int:
        """Number of validation images that this process may still hold."""
        return MOST_ROWS // self.view.world_size - sum(map(len, self._held_out))

    def note_held_out(self, view: ModelView, batch: Any) -> None:
        """Keeps images of a validation batch."""
        images = view.adapter.find_data(batch)
        if images is not None and all(images.shape[1:] == held.shape[1:] for held in self._held_out[:1]):
            self._held_out.append(as_data(images[: self._room].detach().to("cpu", copy=True)))

    # ---- an evaluation ----

    def update(self, view: ModelView) -> None:
        """Adds this process's round trips."""
        assert self._parts is not None
        if self._parts.is_flow:
            self._update_flow(view, self._parts)
        else:
            self._update_autoencoder(view)

    def _update_autoencoder(self, view: ModelView) -> None:
        if view.parts.has("sample"):
            images = view.reference.images[: self._most][view.rank :: view.world_size]
            self._update_reconstructions(view, images, "data")
        else:
            # other monitors compare the same reconstructions
            again = view.reconstructions().images
            self.metric.update(self._rows(view.originals().images.to(again)), self._rows(again))
        if view.parts.has("encode") and not view.parts.way("encode").takes_labels:
            with view.isolated(exact=True):
                self._update_latents(view)
        has_held_out = bool(self._held_out) and self._held_out[0].shape[1:] == view.reference.images.shape[1:]
        if view.agreed(has_held_out):
            self._update_reconstructions(view, torch.cat(self._held_out), "held_out")

    def _update_reconstructions(self, view: ModelView, images: Tensor, kind: Kind) -> None:
        """Reconstructs some of this process's images."""
        way = view.parts.way("reconstruct")
        with view.isolated(exact=True):
            view.seed()
            for some in torch.split(as_data(images), view.adapter.chunk_size):
                given = view.as_input(some)
                made = view.parts.reconstructed(way.call(given), given)
                self.metric.update(self._rows(some.to(made)), self._rows(made), kind)

    def _update_latents(self, view: ModelView) -> None:
        """Decodes and encodes latents; inside ``view.isolated``.

        They are those of real images whose dimensions are permuted, each on its own: a dimension that the decoder does not
        use could be told from the others otherwise. Spatial latents and many are left as they are.
        """
        # all processes encode the same images, since a permutation needs them all
        images = as_data(view.reference.images[: self._most])
        z = torch.cat([self._latents(view, some) for some in torch.split(images, view.adapter.chunk_size)])
        decodes = view.parts.has("decode")
        if decodes and z.ndim == 2 and z.shape[1] <= MANY_DIMENSIONS:
            order = torch.rand(z.shape, generator=self._generator(view, 3), dtype=torch.float32).argsort(0).to(z.device)
            z = z.gather(0, order)
        rows = slice(view.rank, None, view.world_size)
        z, images = z[rows], images[rows]
        for latents, given in zip(*(torch.split(part, view.adapter.chunk_size) for part in (z, images)), strict=True):
            view.seed()
            if decodes and z.ndim == 2:
                made = view.decode(view.as_input(latents))
            else:
                x = view.as_input(given)
                made = view.parts.reconstructed(view.parts.way("reconstruct").call(x), x)
            self.metric.update(latents, self._latents(view, as_data(made)), "latents")

    @staticmethod
    def _latents(view: ModelView, data: Tensor) -> Tensor:
        """Latents of data, whose dimensions or channels are the positions that are compared; inside ``view.isolated``."""
        view.seed()
        return _by_channel(view.latents_in(view.encode(view.as_input(data)), len(data), flat=False))

    def _update_flow(self, view: ModelView, parts: Parts) -> None:
        reference = view.reference.images
        real = view.local_reference().images[: self._share(view, self._most)]
        # a process without real images calls the flow all the same, since it may communicate
        images = view.as_input(as_data(real if len(real) else reference[:1]))
        low, high = (float(value) for value in reference.float().aminmax())
        drawn = torch.rand(self._most, *images.shape[1:], generator=self._generator(view, 1), dtype=torch.float32)
        noise = (low + (high - low) * drawn)[view.rank :: view.world_size].to(images)
        with view.isolated(exact=True):
            view.seed()
            self._adds_noise = not _are_alike(*(view.latents_of(images[:2]) for _ in range(2)))
            again = self._decoded(view, images)
            self.metric.update(self._rows(images)[: len(real)], self._rows(again)[: len(real)])
            noise_again = self._decoded(view, noise)
            self.metric.update(self._rows(noise), self._rows(noise_again), "noise")
            samples, z, latents = self._update_prior(view, images)
            self._is_rounded = samples.numel() > 8 * ROUNDED and len(torch.unique(samples)) <= ROUNDED
            dims = images[0].numel()
            share = self._share(view, JACOBIANS if dims <= MANY_DIMENSIONS else 1)
            is_right = True
            if dims <= LARGEST_JACOBIAN and share and len(real):
                is_right = self._update_volume(view, images[:share])
            share = self._share(view, LAYER_ROWS)
            if share:
                # Jacobians of layers are needed only to say which of them is wrong
                jacobians = 0 if is_right or dims > MANY_DIMENSIONS else LAYER_JACOBIANS
                self._update_layers(view, parts, _worst(images, images, again, share), "data", jacobians)
                self._update_layers(view, parts, _worst(samples, z, latents, share), "latents")
                self._update_layers(view, parts, _worst(noise, noise, noise_again, share), "noise")

    @staticmethod
    def _share(view: ModelView, rows: int) -> int:
        """Number of this process's rows, of which all processes have ``rows``."""
        return len(range(view.rank, rows, view.world_size))

    @staticmethod
    def _generator(view: ModelView, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(view.adapter.seed + 7919 * number)

    def _decoded(self, view: ModelView, data: Tensor) -> Tensor:
        """Encodes and decodes data (n, ...); inside ``view.isolated``."""
        made = []
        for some in torch.split(data, view.adapter.chunk_size):
            view.seed()
            made.append(view.decode(view.as_input(view.latents_of(some))).reshape(some.shape).to(some))
        return torch.cat(made)

    def _update_prior(self, view: ModelView, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes and encodes latents of the prior; inside ``view.isolated``.

        Returns:
            Samples (n, ...), and the latents (n, ...) before and after.
        """
        drawn = torch.randn(self._most, images[0].numel(), generator=self._generator(view, 2), dtype=torch.float32)
        made: list[tuple[Tensor, Tensor, Tensor]] = []
        for some in torch.split(drawn[view.rank :: view.world_size], view.adapter.chunk_size):
            z = view.as_input(some)
            view.seed()
            samples = view.decode(z).reshape(len(z), *images.shape[1:]).to(images)
            view.seed()
            latents = view.latents_in(view.encode(samples), len(z), flat=False)
            self.metric.update(_by_channel(z.view_as(latents)), _by_channel(latents), "latents")
            made.append((samples, z.view_as(latents), latents))
        samples, before, after = (torch.cat(parts) for parts in zip(*made, strict=True))
        return samples, before, after

    def _update_layers(self, view: ModelView, parts: Parts, data: Tensor, kind: Kind, jacobians: int = 0) -> None:
        """Inverts each layer alone, and computes its Jacobian at some rows; inside ``view.isolated``."""
        if not parts.names or not len(data):
            return
        view.seed()
        for layer in self._layers(view, data):
            if layer.name not in parts.names:
                continue
            y, volumes = layer.forward(layer.before, None)
            again = layer.inverse(y).reshape(layer.before.shape)
            gram = log_det = None
            if jacobians:
                with suppress(*DERIVATIVE_FAILS):
                    gram = torch.cat([_gram(layer, row) for row in range(min(jacobians, len(data)))])
                    log_det = None if volumes is None else volumes[: len(gram)]
            number = parts.names.index(layer.name)
            self.metric.update(layer.before.flatten(1), again.flatten(1), kind, number, log_det, gram)

    def _update_volume(self, view: ModelView, images: Tensor) -> bool:
        """Compares reported log-determinants with the Jacobian's; inside ``view.isolated``.

        Returns:
            Whether they are the same, and float32 resolves the inverse of the Jacobian.
        """

        def encode(flat: Tensor) -> Tensor:
            return latents_in(view.encode(flat.view(len(flat), *images.shape[1:])), len(flat)).flatten(1)

        view.seed()
        try:
            gram = decoder_gram(encode, images.flatten(1))
        except DERIVATIVE_FAILS:
            # the log-determinant of the whole is then not judged
            return False
        view.seed()
        _, through = self._reports(view, images)
        view.seed()
        log_det = None
        if through is not None:
            (first, log_det), (second, again) = (through(images) for _ in range(2))
            # an estimate, or of noise that is added to the data, for which what is reported may hold the density too
            is_random = not _are_alike(first, second)
            if log_det is None or again is None or is_random or not torch.allclose(log_det, again, equal_nan=True):
                log_det = None
        nothing = images[:0]
        self.metric.update(self._rows(nothing), self._rows(nothing), log_det=log_det, gram=gram)
        exact, _ = jacobian_volume(gram)
        return log_det is not None and bool(((log_det - exact).abs() <= VOLUME_TOLERANCE * gram.shape[1]).all())

    def _rows(self, data: Tensor) -> Tensor:
        """Data as they are compared by position: images or rows, the middle slices of volumes, and series as one row."""
        if data.ndim == 5:
            return middle_slices(data)
        return data if data.ndim in (2, 4) else data.flatten(1)

    def postprocess(self, view: ModelView, result: RoundTripResult) -> RoundTripResult:
        """Adds what earlier evaluations showed, and leaves out latents that decode to rounded data or get noise."""
        result = RoundTripResult(*(value.cpu() for value in result))
        self._adds_noise = view.agreed(self._adds_noise)
        if view.agreed(self._is_rounded) or self._adds_noise:
            result = result._replace(latent_error=torch.full_like(result.latent_error, math.nan))
        step = self.last_step or 0
        kept = self._kept.before(step) or (result.kept, result.latents_kept)
        if [one.shape for one in kept] != [result.kept.shape, result.latents_kept.shape]:
            kept = result.kept, result.latents_kept
        now = kept[0] | (result.unexplained <= KEPT), kept[1] | (result.latent_unexplained <= KEPT)
        self._kept.note(step, now)
        first = min((at for at in self._offsets if at < step), default=None)
        offset = result.first_offset if first is None else result.first_offset.new_tensor(self._offsets[first])
        if first is None and bool(result.log_det_offset.isfinite()):
            self._offsets = {step: float(result.log_det_offset)}
        return result._replace(first_offset=offset, kept=kept[0], latents_kept=kept[1])

    def scalars(self, result: RoundTripResult) -> dict[str, Tensor]:
        """Leaves out fractions of the variance for flows, which lose none."""
        is_flow = self._parts is not None and self._parts.is_flow
        return {name: v for name, v in result.scalars().items() if not (is_flow and "unexplained" in name)}

    # ---- what is judged ----

    def observations(self, result: RoundTripResult) -> list[Observation]:
        """Fractions of the variance that an autoencoder loses, or whether a flow inverts itself, and where it does not."""
        if self._parts is None:
            return []
        return self._of_flow(result, self._parts) if self._parts.is_flow else self._of_autoencoder(result)

    def _of_flow(self, result: RoundTripResult, parts: Parts) -> list[Observation]:
        worst = result.worst_layer()
        layer = "" if worst is None else self._layer_words(result, parts, worst)
        dims = listed([f"{index}" for index in result.worst_latents()])
        positions = listed([self._position(index) for index in result.worst_positions()])
        scalars = result.scalars()
        error, latent = float(scalars["data_error"]), float(scalars.get("latent_error", torch.tensor(math.nan)))
        noise = float(result.noise_error)
        invalid = result.invalid.nan_to_num(0.0).tolist()
        most = self.tolerance
        observations = [
            self._inverse(DATA, error, invalid[0], max(1.0, most) if self._adds_noise else most,
                          f"the inverse of the flow does not return data that it encodes, least of all {positions}", layer),
            self._inverse(NOISE, noise, invalid[3], max(1.0, most),
                          "the inverse of the flow explodes on noise in the range of the data", layer),
        ]  # fmt: skip
        if math.isfinite(latent) or invalid[2]:
            message = f"the flow does not return latents that it decodes, least of all latent dimensions {dims}"
            observations.append(self._inverse(LATENTS, latent, invalid[2], most, message, layer))
        return [*observations, *self._volume(result, parts), *self._condition(result, parts)]

    def _inverse(self, series: Series, error: float, invalid: float, most: float, what: str, layer: str) -> Observation:
        """Whether a round trip loses more than it may."""
        is_wrong = invalid > 0 or not error <= most
        size = f"the error is {error:.2g} standard deviations" if math.isfinite(error) else "the error is nan"
        lost = f" and {invalid:.0%} of the results have nan or inf" if invalid else ""
        message = f"{what}: {size}{lost} for {{evaluations}} evaluations{layer}"
        label = what.partition(",")[0]
        return Observation(series, error, math.inf if is_wrong else 0.0, label, message, is_bad=is_wrong)

    def _layer_words(self, result: RoundTripResult, parts: Parts, worst: int) -> str:
        error, invalid = float(result.layer_error[worst]), float(result.layer_invalid[worst])
        if invalid > 0:
            return f". {parts.names[worst]} alone returns nan or inf"
        if error > self.tolerance:
            return f". {parts.names[worst]} alone has an error of {error:.2g}"
        return ". No layer alone has an error, so that together they lose the digits of float32"

    def _volume(self, result: RoundTripResult, parts: Parts) -> Iterator[Observation]:
        """Whether reported log-determinants are the Jacobian's, of the whole and of each layer."""
        wrong, of_whole, error = result.wrong_layers, result.is_volume_wrong, float(result.log_det_error)
        if math.isnan(error) and result.layer_log_det_error.isnan().all():
            return
        names = listed([parts.names[k] for k in wrong], 3)
        value = max([error if math.isfinite(error) else 0.0, *(float(result.layer_log_det_error[k]) for k in wrong)])
        reason = "has the opposite sign" if of_whole and bool(result.has_opposite_sign) else "is wrong"
        what = f"the log-determinant of {names or parts.log_det} {reason}"
        message = (
            f"{what}: for {{evaluations}} evaluations it has differed from that of the Jacobian by {value:.2g} nats for each "
            "dimension"
        )
        is_wrong = bool(wrong) or of_whole
        yield Observation(VOLUME, value, math.inf if is_wrong else 0.0, what, message, is_bad=is_wrong)

    def _condition(self, result: RoundTripResult, parts: Parts) -> Iterator[Observation]:
        """Whether float32 resolves the inverse of the Jacobian."""
        if not len(result.condition):
            return
        value = float(result.condition.median())
        layers = result.layer_condition.nan_to_num(0.0)
        name = parts.names[int(layers.argmax())] if len(layers) else ""
        of = f". That of {name} alone is {float(layers.max()):.2g}" if name else ""
        message = (
            f"the flow is not invertible in float32: the condition number of its Jacobian has been {value:.2g} for "
            f"{{evaluations}} evaluations{of}"
        )
        is_wrong = not value < RESOLVED
        severity = math.inf if is_wrong else 0.0
        log = math.log10(value) if math.isfinite(value) else value
        yield Observation(CONDITION, log, severity, "the flow", message, is_bad=is_wrong)

    def _of_autoencoder(self, result: RoundTripResult) -> list[Observation]:
        regions = result.unexplained.tolist()
        names = ["the data"] if self.region_map is None else list(self.region_map.names)
        whole = float(result.unexplained.nanmean())
        background = None if self.region_map is None else self.region_map.background
        observations = [Observation(IMAGE, whole, severity(whole))]
        if len(regions) > 1:
            judged = [r for r in range(len(regions)) if r != background]
            observations += [
                Observation(REGION.numbered(r, names[r]), regions[r], severity(regions[r])) for r in judged
            ]
            observations.append(
                self._lost(
                    LOST_REGIONS, [names[r] for r in judged], result.unexplained[judged], result.kept[judged],
                    "is not reconstructed",
                )
            )  # fmt: skip
        # others may be dimensions that a VAE has never used, or does not use any more
        is_used = result.latents_kept & (result.latent_share >= ACTIVE)
        latents = result.latent_unexplained.where(is_used, math.nan)
        if len(latents) > 1:
            labels = [f"latent dimension {index}" for index in range(len(latents))]
            what = "does not come back when it is decoded and encoded"
            observations.append(self._lost(LOST_LATENTS, labels, latents, result.latents_kept, what))
        held_out = float(result.held_out_unexplained.nanmean())
        if math.isfinite(held_out):
            observations.append(Observation(HELD_OUT, held_out, held_out))
            lost = [
                r for r, value in enumerate(result.held_out_unexplained.tolist()) if value > 1 and regions[r] < KEPT
            ]
            message = (
                f"validation {self.data_name} are not reconstructed in {listed([names[r] for r in lost])}, and training "
                f"{self.data_name} are: "
                f"{held_out:.0%} of their variance has been lost for {{evaluations}} evaluations"
            )
            confirmed = replace(ONLY_TRAINING, confirm=self.patience, label=f"validation {self.data_name}")
            observations.append(
                Observation(confirmed, held_out, math.inf if lost else 0.0, message=message, is_bad=bool(lost))
            )
        return observations

    def _lost(self, series: Series, labels: Sequence[str], unexplained: Tensor, kept: Tensor, what: str) -> Observation:
        """Whether some regions or latent dimensions are lost while most are not."""
        known = unexplained[unexplained.isfinite()]
        is_learned = len(known) > 1 and float(known.median()) <= KEPT
        lost = [i for i, value in enumerate(unexplained.tolist()) if is_learned and value >= LOST]
        title = listed([labels[i] for i in lost])
        # worse than the mean is lost and no more: from 174 % to 157 % nothing has come back
        worst = min(max((float(unexplained[i]) for i in lost), default=0.0), 1.0)
        message = f"{title} {what}: {worst:.0%} of the variance has been lost for {{evaluations}} evaluations"
        fallen = any(bool(kept[i]) for i in lost)
        confirmed = replace(series, confirm=min(self.patience, CONFIRM) if fallen else self.patience)
        return Observation(confirmed, worst, math.inf if lost else 0.0, title, message, is_bad=bool(lost))

    def contributions(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each region's part of the rise of what reconstructions lose."""
        return divided({name: after[name] - value for name, value in before.items()})

    def _position(self, index: int) -> str:
        """A position of the data for people."""
        if len(self._shape) < 3:
            return f"dimension {index}"
        width = self._shape[-1]
        return f"pixel ({index // width}, {index % width})"

    # ---- pictures ----

    def log_plots(self, result: RoundTripResult, context: PlotContext) -> None:
        """Logs the charts and the panel."""
        names = [name for name in ("data_error", "latent_error", "noise_error") if name in result.scalars()]
        if self._parts is not None and self._parts.is_flow:
            context.logger.log_chart("errors of round trips", "Multiline", names)
            layers = [f"layer_error_{k}" for k in range(len(result.layer_error))]
            if 0 < len(layers) <= MAX_TAGS:
                context.logger.log_chart("error of every layer", "Multiline", layers)
        else:
            shown = [name for name in ("unexplained", "held_out_unexplained", "latent_unexplained")
                     if name in result.scalars()]  # fmt: skip
            context.logger.log_chart("variance that reconstructions lose", "Multiline", shown)
        context.logger.log_image("panel", self._panel(result, context))

    def log_alarm(self, alarm: Alarm, result: RoundTripResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's text."""
        context.logger.log_image("picture", self._panel(result, context, alarm))

    def _panel(self, result: RoundTripResult, context: PlotContext, alarm: Alarm | None = None) -> Tensor:
        parts = self._parts or Parts(False)
        occasion = context.occasion(alarm)
        if parts.is_flow:
            return plots.flow_panel(result, parts.names, self._shape, context.curves[DATA.name], occasion)
        return plots.autoencoder_panel(result, self.region_map, self._shape, context.curves[IMAGE.name], occasion)

    # ---- checkpoints ----

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the first difference of the log-determinants, and what was reconstructed before."""
        return {"offsets": dict(self._offsets), "kept": {step: list(pair) for step, pair in self._kept.items()}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self._offsets = dict(state["offsets"])
        self._kept = ByStep({step: (pair[0], pair[1]) for step, pair in state["kept"].items()})


def severity(unexplained: float) -> float:
    """Returns the octaves by which the fraction of the variance that is lost lies above a small one; nan stays nan."""
    return math.nan if math.isnan(unexplained) else math.log2(max(unexplained, FLOOR) / FLOOR)


def _by_channel(latents: Tensor) -> Tensor:
    """Returns latents (n, L), or spatial ones (n, C, ...) as (n, positions, C), so that channels are told apart."""
    return latents if latents.ndim == 2 else latents.flatten(2).transpose(1, 2)


def _are_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two calls with other random numbers return the same."""
    return torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)


def _worst(data: Tensor, before: Tensor, after: Tensor, most: int) -> Tensor:
    """Returns the finite rows of data whose round trip, from ``before`` to ``after``, has the largest errors."""
    errors = (after - before).flatten(1).square().sum(1).nan_to_num(math.inf)
    errors = errors.where(data.flatten(1).isfinite().all(1), -math.inf)
    rows = errors.argsort(descending=True, stable=True)[:most]
    return data[rows[errors[rows] > -math.inf]]


def _gram(layer: Layer, row: int) -> Tensor:
    """Computes ``J'J`` (1, D, D) of a layer at one row."""
    before = layer.before[row : row + 1]

    def forward(flat: Tensor) -> Tensor:
        return layer.forward(flat.view(len(flat), *before.shape[1:]), row)[0].flatten(1)

    return decoder_gram(forward, before.flatten(1))


def _volumes_in(output: Any, n: int) -> Tensor:
    """The log-determinants (n,) in what a callable of the user's returned."""
    for tensor in output if isinstance(output, (tuple, list)) else [output]:
        if isinstance(tensor, Tensor) and tensor.shape == (n,):
            return tensor
    raise ValueError(
        f"log_det must return ({n},) log-determinants of {n} images, got {type(output).__name__}. To fix this, pass "
        "RoundTripMonitor(log_det=lambda module, images: ...)."
    )
