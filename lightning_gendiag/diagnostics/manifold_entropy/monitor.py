"""Monitors the manifold entropies of a decoder while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series, divided
from lightning_gendiag.diagnostics.manifold_entropy import plots
from lightning_gendiag.diagnostics.manifold_entropy.functional import MAX_DIMENSION_TAGS, ManifoldEntropyResult
from lightning_gendiag.diagnostics.manifold_entropy.metric import ManifoldEntropy
from lightning_gendiag.functional.arrays import middle_slices, tensor_of
from lightning_gendiag.functional.jacobian import Mode, active_dims, check_derivative, decoder_gram
from lightning_gendiag.model import compat
from lightning_gendiag.model.amounts import fitting
from lightning_gendiag.tensorboard.records import Record

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView
    from lightning_gendiag.plots.canvas import Occasion

T = TypeVar("T")

MAX_BYTES = {"cpu": 6 << 20}
"""Approximate working memory of an evaluation, by the kind of device: on a processor more is not faster."""

MAX_BYTES_ON_OTHERS = 1 << 26
"""The same on other kinds, where the number of calls counts."""

NUM_LATENTS, LIMITED_LATENTS, SHORT_LATENTS = 32, 8, 4
"""Number of latents where neither the user nor their cost says otherwise: without a limit of the time, with one, and with one
in a short run.

Standard errors of 4, 8, 16 and 32 latents, on the example GAN (32 dimensions), VAE (10) and flow (64):

- entropy of a dimension: 0.06 to 0.13, 0.05 to 0.09, 0.03 to 0.07 and 0.02 to 0.05 nats
- mutual information of a pair, of 8, 16 and 32: 0.01 to 0.03, 0.01 to 0.02 and 0.004 to 0.013 nats; the largest one of the
  flow 0.07, 0.05 and 0.03
- dimensions in use, of 8, 16 and 32: 0.3 to 1.3 %, 0.3 to 1.4 % and 0.2 to 1.0 %

Since they are the same latents at every evaluation, an entropy fluctuates little by their number: from one epoch to the next
the error changes by 0.004 to 0.05 nats with 8 latents, and the entropy itself by 0.06 to 0.11. The time is in proportion.
"""

MAX_DIMS = 128
"""Largest number of dimensions where neither the user nor their cost says otherwise."""

LEAST_LATENTS, LEAST_DIMS = 8, 16
"""Smallest numbers of them by ``SECONDS``, unless even these take longer than ``MOST_SECONDS``: then there are fewer latents,
at least 2."""

SECONDS = 1.2
"""Approximate limit of the time for the Gram matrices of an evaluation, by which these numbers are chosen."""

MOST_SECONDS = 20.0
"""Approximate limit of the time where the smallest numbers do not fit ``SECONDS``."""

TRAVERSED = 6
"""Number of latent directions that the panel traverses, each at seven places; of a very slow decoder one."""

MIN_STD = 0.2
"""A fifth more or less movement of the data is a usual fluctuation."""

MIN_DELTA, MEAN_MIN_DELTA = 1.0, 0.5
"""Nats. A dimension that moves the data a third as much, and all that do so 0.6 times as much, are no news, however long it
lasts: a flow learns which directions of the data are noise."""

DIMENSION = Series("dimension", "component", "entropy in nats", "nats", min_std=MIN_STD, min_delta=MIN_DELTA)
MEAN = Series(
    "all dimensions",
    "aggregate",
    "mean entropy of a dimension in nats",
    "nats",
    min_std=MIN_STD,
    min_delta=MEAN_MIN_DELTA,
)

ENTANGLED, PAIR_MIN_STD = 1.0, 0.1
"""Nats. Pairs that share no more are no news: in healthy models of many kinds the strongest pair shares 0.3 to 1, and
fluctuates by 0.01 to 0.13. At 1 the effects of two dimensions have a correlation of 0.93, and at 1.5 of 0.97."""

BEND = 0.3
"""Nats over which the severity of a pair bends from none to what it shares beyond ``ENTANGLED``. A generator begins with
pairs that share 0.1 and may come to 2 in one smooth rise; a severity with a corner would show it as a sudden change."""

PAIR = Series(
    "pair",
    "standalone",
    "mutual information in nats",
    "nats",
    event="became entangled",
    min_std=PAIR_MIN_STD,
    # the severity of a pair that shares as much as is no news
    min_delta=BEND * math.log(2),
)
IN_USE = Series("dimensions in use", "record", "dimensions in use")

MOST_ON_PAGE = 64
"""Largest number of dimensions whose mutual information the tab shows."""


class ManifoldEntropyMonitor(Monitor[ManifoldEntropy, ManifoldEntropyResult]):
    """Monitors :class:`ManifoldEntropy` of a decoder: which latent dimensions it uses, and how much they share.

    Works for VAE decoders, flows and GAN generators: ``decode(z)``, ``decoder``, ``generator``, or ``forward`` from
    noise. TensorBoard shows scalars, the spectrum as a histogram over time, and a panel with the sorted spectrum, the
    mutual information of dimensions, images along the strongest directions, and the number of dimensions in use.

    Args:
        num_latents: Number of draws of the prior per evaluation, over all processes, or of latents of real images where
            nothing shows that N(0, 1) is their prior. They are the same at every evaluation, so few are enough; by default
            32, with ``max_overhead`` 8, or 4 in a run of minutes; fewer where they would take longer than about a second: at
            least 8, or 2 where 8 would take longer than about 20 seconds.
        log_volume: A flow's own ``log |det J|``: the name of a method of the module, or a callable ``(module, z)`` from
            (N, L) to (N,). By default it follows from the Gram matrix.
        max_dims: Largest number of dimensions that are monitored; by default 128, or fewer where 8 latents would take too
            long, at least 16. Of a larger latent space, those are chosen that move the data most at the first evaluation;
            their entropies are exact.
        latent_scale: Standard deviation of each latent, see :func:`decoder_gram`.
        data_scale: Standard deviation that the data were divided by, see :func:`decoder_gram`.
        mode: ``"auto"``, ``"forward"`` or ``"reverse"``, see :func:`decoder_gram`.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = ManifoldEntropyMonitor(every_n_train_steps=500)  # one of the Trainer's callbacks
    """

    name = "manifold_entropy"
    metric_class = ManifoldEntropy
    needs = ("decode",)
    dims: Tensor
    """(l,) numbers of the dimensions that are monitored; empty before the first evaluation."""
    _chosen_latents: int | None = None
    _traversal: Tensor | None = None
    _uncompiled = True

    def __init__(
        self,
        num_latents: int | None = None,
        *,
        log_volume: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        max_dims: int | None = None,
        latent_scale: float = 1.0,
        data_scale: float = 1.0,
        mode: Mode = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if any(number is not None and number < 2 for number in (num_latents, max_dims)):
            raise ValueError(f"num_latents and max_dims must be at least 2, got {num_latents} and {max_dims}.")
        if mode not in ("auto", "forward", "reverse"):
            raise ValueError(f"mode must be 'auto', 'forward' or 'reverse', got {mode!r}.")
        self.num_latents, self.log_volume, self.max_dims = num_latents, log_volume, max_dims
        self.latent_scale, self.data_scale, self.mode = latent_scale, data_scale, mode
        self.dims = self._order = torch.empty(0, dtype=torch.long)

    def reset(self) -> None:
        """Forgets the dimensions, their order and the number of latents as well."""
        super().reset()
        self._chosen_latents = None
        self.dims = self._order = torch.empty(0, dtype=torch.long)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether latents are of real images, since they have no prior."""
        return self._session is not None and not self.view.has_prior

    def check(self, view: ModelView) -> None:
        """Takes the derivative of the decoder at one latent, and finds ``log_volume``."""
        z = next(view.prior_latents(2, all_ranks=True))
        try:
            with view.isolated(exact=True):
                self._in_mode(lambda mode: check_derivative(view.decode, z, mode=mode))
        except RuntimeError as error:
            # as for all that a module lacks
            raise ValueError(str(error)) from error
        view.resolve_named(self.log_volume, "log_volume")

    def build_metric(self, view: ModelView) -> ManifoldEntropy:
        """Chooses the dimensions that are monitored, and their first order."""
        z = next(view.prior_latents(16, all_ranks=True))
        with view.isolated(exact=True):
            if not len(self.dims) or self._chosen_latents is None:
                self._choose(view, z)
            if not len(self._order):
                pilot = ManifoldEntropy(len(self.dims))
                pilot.update(self._grams(view, z[: max(1, min(8, self._latents // 4))]).cpu())
                self._order = pilot.compute().order
        return ManifoldEntropy(len(self.dims), order=self._order)

    @property
    def _latents(self) -> int:
        return self.num_latents or self._chosen_latents or NUM_LATENTS

    def _choose(self, view: ModelView, z: Tensor) -> None:
        """Chooses the numbers of latents and of dimensions by the time of one latent's Gram matrix, and the dimensions."""
        length, max_dims = z.shape[1], self.max_dims or MAX_DIMS
        limited = SHORT_LATENTS if view.real.is_short else LIMITED_LATENTS
        most = NUM_LATENTS if self.max_overhead is None else limited
        if self.num_latents is None or self.max_dims is None:
            wanted = min(length, max_dims)
            seconds = self._seconds_of_a_direction(view, z, wanted * (self.num_latents or most)) / view.world_size
            if self.num_latents is None:
                least = fitting(seconds * min(LEAST_DIMS, wanted), MOST_SECONDS, 2, LEAST_LATENTS)
                self._chosen_latents = fitting(seconds * wanted, SECONDS, min(least, most), most)
            if self.max_dims is None:
                max_dims = fitting(seconds * self._latents, SECONDS, min(LEAST_DIMS, wanted), wanted)
            if self._latents < (self.num_latents or most) or max_dims < wanted:
                rank_zero_info(
                    f"Manifold entropy: {self._latents} latents and {min(max_dims, length)} of {length} dimensions, since "
                    f"a Jacobian takes {seconds * wanted:.2g} s. To choose others, pass "
                    "ManifoldEntropyMonitor(num_latents=..., max_dims=...)."
                )
        self._chosen_latents = self._latents
        self.dims = torch.arange(length)
        if length > max_dims:
            few = max(2, self._latents // 2)
            self.dims = active_dims(view.decode, z[:few], max_dims, probes=min(16, few), seed=view.adapter.seed).cpu()

    def _seconds_of_a_direction(self, view: ModelView, z: Tensor, most: int) -> float:
        """Returns the seconds that one latent and one dimension take, at most; nothing depends on them if ``most`` fit."""
        self.dims = torch.zeros(1, dtype=torch.long)
        seconds = view.seconds_of(lambda: self._grams(view, z[:1]))
        few = min(z.shape[1], LEAST_DIMS)
        if seconds * few > SECONDS or seconds * most < SECONDS:
            return seconds
        # several at a time take less each
        self.dims = torch.arange(few)
        return view.seconds_of(lambda: self._grams(view, z[:1])) / few

    def _grams(self, view: ModelView, z: Tensor) -> Tensor:
        max_bytes = MAX_BYTES.get(view.device.type, MAX_BYTES_ON_OTHERS)
        return self._in_mode(
            lambda mode: decoder_gram(
                view.decode, z, dims=self.dims, latent_scale=self.latent_scale, data_scale=self.data_scale, mode=mode,
                max_bytes=max_bytes,
            )
        )  # fmt: skip

    def _in_mode(self, derive: Callable[[Mode], T]) -> T:
        """Takes a derivative in this monitor's mode; torch compiles rules for it only once they are needed."""
        if self.mode == "auto" and self._uncompiled:
            with suppress(RuntimeError), compat.forward_mode_uncompiled():
                return derive("forward")
            self._uncompiled = False
        return derive(self.mode)

    def update(self, view: ModelView) -> None:
        """Adds the Gram matrices of this rank's latents, in full precision."""
        self.metric.order = self._order.to(view.device)
        volume = view.resolve_named(self.log_volume, "log_volume")
        with view.isolated(exact=True):
            for z in view.prior_latents(self._latents):
                self.metric.update(self._grams(view, z), None if volume is None else volume(z))
            # on all ranks, since the model may communicate in each call
            self._traversal = self._traverse(view) if self.log_images and view.thorough else None

    def _traverse(self, view: ModelView) -> Tensor | None:
        """(d, 7, C, H, W): images from the latents' mean along the strongest directions; None where data are no images."""
        is_slow = self.num_latents is None and self._latents < SHORT_LATENTS
        strongest = self.dims[self._order[: 1 if is_slow else TRAVERSED]]
        mean, std = (make(view.latent_dim, dtype=torch.float32) for make in (torch.zeros, torch.ones))
        if not view.has_prior:
            some = next(view.prior_latents(16, all_ranks=True)).cpu()
            mean, std = some.mean(0), some.std(0)
        z = view.as_input(mean.repeat(len(strongest), 7, 1))
        for row, dim in enumerate(strongest.tolist()):
            z[row, :, dim] += std[dim] * torch.linspace(-2, 2, 7).to(z)
        images = tensor_of(view.decode(z.flatten(0, 1)), z[..., 0].numel())
        if images.ndim not in (4, 5):
            return None
        images = middle_slices(images)
        return images.view(*z.shape[:2], *images.shape[1:]).cpu()

    def postprocess(self, view: ModelView, result: ManifoldEntropyResult) -> ManifoldEntropyResult:
        """Keeps the order of falling entropy for core and detail at the next evaluation, since one pass cannot know it."""
        self._order = result.entropy.nan_to_num(0.0).argsort(descending=True, stable=True).cpu()
        return result

    def scalars(self, result: ManifoldEntropyResult) -> dict[str, Tensor]:
        """The metric's scalars, with the dimensions numbered as in the latent space where only some are monitored."""
        numbered = {f"dimension_{place}": f"dimension_{dim}" for place, dim in enumerate(self.dims.tolist())}
        return {numbered.get(name, name): value for name, value in result.scalars().items()}

    def observations(self, result: ManifoldEntropyResult) -> list[Observation]:
        """The entropy of each dimension, their mean, the pair that shares most, and the number of dimensions in use."""
        i, j = result.strongest_pair
        shared, mean = float(result.mutual_information[i, j]), float(result.entropy.mean())
        pair = f"dimension {int(self.dims[i])} with dimension {int(self.dims[j])}"
        dimensions = zip(self.dims.tolist(), result.entropy.tolist(), strict=True)
        return [
            *(Observation(DIMENSION.numbered(dim), entropy, -entropy) for dim, entropy in dimensions),
            Observation(MEAN, mean, -mean),
            Observation(PAIR, shared, entanglement(shared), label=pair),
            Observation(IN_USE, float(result.effective_dimensions), 0.0),
        ]

    def contributions(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each dimension's part of the drop of their mean entropy."""
        return divided({name: value - after[name] for name, value in before.items()})

    def get_extra_state(self) -> dict[str, Any]:
        """The dimensions that are monitored, their order, and the number of latents."""
        return {"dims": self.dims, "order": self._order, "latents": self._chosen_latents}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the dimensions, their order, and the number of latents."""
        self.dims, self._order, self._chosen_latents = state["dims"], state["order"], state["latents"]

    def page_frame(self, result: ManifoldEntropyResult) -> Record:
        """The mutual information of the dimensions, or of those with the most entropy."""
        chosen = result.order[:MOST_ON_PAGE].sort().values
        shared = result.mutual_information[chosen][:, chosen]
        fields = {"dimensions": self.dims[chosen].tolist()}
        return Record(fields, {"mutual_information": shared.half().numpy()})

    def log_plots(self, result: ManifoldEntropyResult, context: PlotContext) -> None:
        """Logs the spectrum over time, the charts and the panel."""
        context.logger.log_histogram("spectrum", result.entropy)
        if len(self.dims) <= MAX_DIMENSION_TAGS:
            context.logger.log_chart("every dimension", "Multiline", [f"dimension_{dim}" for dim in self.dims.tolist()])
        context.logger.log_chart("dimensions in use", "Multiline", ["effective_dimensions"])
        context.logger.log_image("panel", self._panel(result, context, context.occasion()))

    def log_alarm(self, alarm: Alarm, result: ManifoldEntropyResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's dimensions marked."""
        pair = self.dims[list(result.strongest_pair)].tolist() if PAIR.name in alarm.names else []
        occasion = context.occasion(alarm)._replace(marked=[*alarm.indices, *pair])
        context.logger.log_image("picture", self._panel(result, context, occasion))

    def _panel(self, result: ManifoldEntropyResult, context: PlotContext, occasion: Occasion) -> Tensor:
        in_use = context.curves[IN_USE.name]
        return plots.panel(result, self.dims, self._traversal, in_use, occasion, self.view.has_prior)


def entanglement(shared: float) -> float:
    """Returns about how much more than a nat two dimensions share, and nearly 0 for less; nan stays nan."""
    beyond = (shared - ENTANGLED) / BEND
    return BEND * (max(beyond, 0.0) + math.log1p(math.exp(-abs(beyond))))
