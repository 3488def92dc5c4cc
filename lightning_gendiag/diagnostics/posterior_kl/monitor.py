"""Monitors the KL divergence of a VAE's posterior while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import Observation, Series, divided
from lightning_gendiag.diagnostics.posterior_kl import plots
from lightning_gendiag.diagnostics.posterior_kl.functional import ACTIVE, MAX_DIMENSION_TAGS, PosteriorKLResult
from lightning_gendiag.diagnostics.posterior_kl.metric import PosteriorKL
from lightning_gendiag.functional.arrays import as_data
from lightning_gendiag.model.isolation import perturbed
from lightning_gendiag.model.outputs import peeled
from lightning_gendiag.model.posterior import (
    POSTERIOR_ADVICE,
    SPREAD_NAMES,
    SPREADS,
    is_of_real_numbers,
    kl_to_prior,
    posterior_in,
    unstated_spread,
)
from lightning_gendiag.model.spreads import scales_in, spread_shown

if TYPE_CHECKING:
    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

IN_USE, TOTAL_IN_USE = 3.0, 1.0
"""Nats: a dimension that carries as much is in use, and so is a latent. It does not matter how much more they carry."""

FLOOR = 0.02
"""Nats: a dimension that carries less is as dead as one that carries none."""

WATCHED = 256
"""Largest number of dimensions that are watched one by one; of more, channels of spatial latents are, or the total."""

TRIALS = 12
"""Number of perturbed copies of an encoder by which logarithms are told from positive numbers."""

CHUNK = 128
"""Largest number of images that go through the encoder at a time."""

MOST_INPUTS = 4
"""Largest number of inputs of parts in a training step that may be augmented data."""

SPREAD_ADVICE = 'If it is another spread, pass PosteriorKLMonitor(spread="std"), or another kind.'

MIN_STD, MIN_DELTA = 0.2, 3.2
"""Octaves: a dimension dies only where it surely carries less than a ninth of what it did, or of three nats. One that a VAE
gives up while it improves often settles at an eighth of a nat, and still changes images half as much as before."""

TOTAL_MIN_STD = 0.1
"""Nats: smaller fluctuations of the total are no news."""

DIMENSION = Series("dimension", "component", "KL in nats", "nats", event="died", min_std=MIN_STD, min_delta=MIN_DELTA)
TOTAL = Series("the latent", "aggregate", "KL in nats", "nats", event="vanished", min_std=TOTAL_MIN_STD, stop="alone")
UNUSED = Series("all of the latent", "rule", "KL in nats", "nats", label=TOTAL.name, progress=0.02, stop="alone")
"""Of the rule that some dimension must be active, unless the total still rises."""

Spread = Literal["auto", "log_variance", "variance", "log_std", "std", "softplus_std", "softplus_variance"]


class PosteriorKLMonitor(Monitor[PosteriorKL, PosteriorKLResult]):
    """Monitors :class:`PosteriorKL` of a VAE's encoder on the reference images.

    A dimension dies when its KL divergence surely falls to less than a ninth of its level, where a level above three
    nats counts as three. Changes above three nats raise no alarm, and so a warm-up of the KL term does not either. The
    latent has collapsed when no dimension has been active for ``patience`` evaluations in a row, which may be from the
    beginning of training. Of more than 256 dimensions the channels of spatial latents are watched, each the sum over its
    positions, and of other latents only the total.

    Args:
        posterior: What gives mean and spread, both (N, L) or (N, C, ...), of images: the name of a method of the module,
            or a callable ``(module, images)``; by default the model's encoder. It returns a pair of tensors, or a
            distribution.
        spread: What the second of the pair is; by default a training step, names and values show it. ``"softplus_std"`` is
            a number whose softplus is the standard deviation.
        threshold: See :class:`PosteriorKL`.
        patience: Number of evaluations without an active dimension after which the latent counts as collapsed.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = PosteriorKLMonitor(spread="std")  # one of the Trainer's callbacks
    """

    name = "posterior_kl"
    metric_class = PosteriorKL
    needs = ()
    _assumes_prior_of = ""
    """What the posterior is, where it is no Gaussian and its prior is not known."""

    def __init__(
        self,
        posterior: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        spread: Spread = "auto",
        threshold: float = ACTIVE,
        patience: int = 6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if spread not in ("auto", *SPREAD_NAMES):
            raise ValueError(f"spread must be {SPREADS}, got {spread!r}.")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}.")
        PosteriorKL(1, threshold=threshold)
        self.posterior, self.spread, self.threshold, self.patience = posterior, spread, threshold, patience
        self._known_spread: str = spread
        self._shown_spread: str | None = None
        self._has_looked = self._is_assumed = False

    def reset(self) -> None:
        """Forgets how the spread was read as well."""
        super().reset()
        self._known_spread, self._shown_spread = self.spread, None
        self._has_looked = self._is_assumed = False

    def shares(self) -> str:
        """What the encoder gives for real images."""
        return "encoded"

    def check(self, view: ModelView) -> None:
        """Looks for the encoder, and for a mean and a variance in what it returns for the first real images."""
        self._encoder(view)
        if view.real.example is not None:
            self._try(view, view.real.example)

    def _encoder(self, view: ModelView) -> Callable[[Tensor], Any]:
        given = view.resolve_named(self.posterior, "posterior")
        if given is None:
            view.find("encode")
            return view.encode
        return given

    def _try(self, view: ModelView, images: Tensor) -> tuple[int, ...]:
        """Returns the shape of the posterior of each of some images or other data, and finds what its spread is."""
        self._look_at_training(view)
        given, encoder = view.as_input(as_data(images)), self._encoder(view)
        with view.isolated(exact=True):
            if self._known_spread == "auto" and not view.subject.in_place:
                # the logarithms of a few images may all be positive, but not with other weights too
                for seed in range(TRIALS):
                    with suppress(ValueError), perturbed(view.module, seed):
                        self._moments(view, encoder(given), len(given))
                        break
            output = encoder(given)
            mean, *_ = self._moments(view, output, len(given))
            is_unstated = unstated_spread(output, len(given), view.parts.stated_length, self._owner(view)) is not None
        self._is_assumed = self.spread == "auto" and self._shown_spread is None and is_unstated
        return tuple(mean.shape[1:])

    def _look_at_training(self, view: ModelView) -> None:
        """Finds out once what a training step on the copy takes the spread for, where the user did not say it."""
        if self.spread != "auto" or self._has_looked or view.real.batch is None or view.subject.in_place:
            return
        self._has_looked = True
        # what cannot be run shows nothing
        with suppress(Exception):
            self._shown_spread = self._spread_in_training(view)
        self._known_spread = self._shown_spread or self._known_spread

    def _spread_in_training(self, view: ModelView) -> str | None:
        encoder, owner = self._encoder(view), self._owner(view)
        with view.isolated(exact=True):
            step = view.parts.training_step()
            found = None if step is None else view.adapter.find_data(step.batch)
            if step is None or found is None:
                return None
            data = view.as_input(as_data(found))
            scales, given = scales_in(step, view.adapter.seed, data.shape)
            # a training step may augment its data
            for images in (data, *given[:MOST_INPUTS]):
                values = unstated_spread(encoder(images), len(images), view.parts.stated_length, owner)
                shown = None if values is None else spread_shown(values, scales)
                if values is None or shown is not None:
                    return shown
        return None

    def _owner(self, view: ModelView) -> str:
        """Name of the class of the encoder, where it is one of the module."""
        return view.parts.way("encode").owner if self.posterior is None else ""

    def _add(self, view: ModelView, output: Any, n: int) -> None:
        """Adds the posteriors in what the encoder returned for n images."""
        mean, log_variance, divergence = self._moments(view, output, n)
        self.metric.update(mean.flatten(1), log_variance.flatten(1), divergence)

    def _moments(self, view: ModelView, output: Any, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns mean and log variance (n, ...) and, where it is not a Gaussian's from N(0, 1), the divergence (n, L).

        Raises:
            ValueError: If the encoder returned no posterior, or one without a closed divergence from its prior.
        """
        argument = "encode" if self.posterior is None else "posterior"
        known, length = self._known_spread, view.parts.stated_length
        posterior = posterior_in(output, n, known, length, self._owner(view), argument)
        if self._known_spread == "auto":
            # later batches alone may not show what the spread is
            self._known_spread = posterior.spread
        mean, std, prior = posterior.mean, posterior.std, view.parts.prior
        if prior is None and not is_of_real_numbers(posterior.distribution):
            raise ValueError(
                f"the prior must be known, since the posterior is {posterior.described} and N(0, 1) is not its prior. "
                f"To fix this, define the prior, a torch distribution, as {type(view.module).__name__}.prior."
            )
        divergence = kl_to_prior(posterior, prior)
        if mean is None or std is None or divergence.shape[1] != mean.flatten(1).shape[1]:
            fix = POSTERIOR_ADVICE if self.posterior is None else "let posterior return (mean, log_variance)"
            raise ValueError(
                f"posterior must have a mean, a variance and a divergence for each dimension, got {posterior.described}. "
                f"To fix this, {fix}."
            )
        is_gaussian = isinstance(
            peeled(posterior.distribution), (Normal, MultivariateNormal, LowRankMultivariateNormal)
        )
        self._assumes_prior_of = "" if is_gaussian or prior is not None else posterior.described
        is_standard = prior is None and isinstance(peeled(posterior.distribution), Normal)
        return mean, 2 * std.log(), None if is_standard else divergence

    def build_metric(self, view: ModelView) -> PosteriorKL:
        """Creates a metric with as many dimensions as the posterior has."""
        self._look_at_training(view)
        self._known_spread, self._shown_spread = view.broadcast(lambda: (self._known_spread, self._shown_spread))
        shape = self._try(view, view.reference.images[:2])
        by_channel = len(shape) > 1 and math.prod(shape) > WATCHED
        if self._assumes_prior_of:
            view.say(
                f"Posterior KL: the posterior is {self._assumes_prior_of}, whose prior is taken to be N(0, 1). If it is "
                f"another, define it as {type(view.module).__name__}.prior, a torch distribution."
            )
        kind = self._known_spread.replace("softplus_", "number whose softplus is the ").replace("_", " ")
        if self._shown_spread not in (None, "log_variance"):
            view.say(f"Posterior KL: training takes what is beside the mean for a {kind}. {SPREAD_ADVICE}")
        if self._is_assumed:
            view.say(
                f"Posterior KL: what is beside the mean is taken for a {kind}, which training does not show. {SPREAD_ADVICE}"
            )
        if by_channel:
            view.say(f"Posterior KL: channels of the latents {shape} are watched, each the sum over its positions.")
        return PosteriorKL(math.prod(shape), threshold=self.threshold, channels=shape[0] if by_channel else None)

    def update(self, view: ModelView) -> None:
        """Adds the posteriors of this rank's rows of the reference."""
        if self.posterior is None:
            for output, size, _ in view.encoded():
                self._add(view, output, size)
            return
        encoder, images = self._encoder(view), view.local_reference().images
        with view.isolated(exact=True):
            for start in range(0, len(images), CHUNK):
                some = view.as_input(as_data(images[start : start + CHUNK]))
                self._add(view, encoder(some), len(some))

    def observations(self, result: PosteriorKLResult) -> list[Observation]:
        """The KL divergence of each dimension or channel and the total, and an alarm where no dimension is active."""
        total, (kind, divergences) = float(result.total), result.components
        series = replace(DIMENSION, name=kind)
        watched = divergences.tolist() if len(divergences) <= WATCHED else []
        unused = not math.isnan(total) and int(result.active_units) == 0
        # an encoder that tells nothing learns the prior, so that a KL far from 0 is rather one of another spread
        unused = unused and not (self._is_assumed and total > TOTAL_IN_USE)
        message = (
            f"the latent collapsed: KL is {total:.3f} nats and none of {len(result.active)} dimensions has been active for "
            "{evaluations} evaluations"
        )
        return [
            *(Observation(series.numbered(i), nats, severity(nats)) for i, nats in enumerate(watched)),
            Observation(TOTAL, total, shortfall(total)),
            Observation(replace(UNUSED, confirm=self.patience), total, math.inf if unused else 0.0, message=message),
        ]

    def contributions(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each dimension's part of the drop of the total."""
        return divided({name: value - after[name] for name, value in before.items()})

    def log_plots(self, result: PosteriorKLResult, context: PlotContext) -> None:
        """Logs the histogram of the dimensions, the charts and the panel."""
        context.logger.log_histogram("per dimension", result.per_dimension)
        kind, values = result.components
        if len(values) <= MAX_DIMENSION_TAGS:
            context.logger.log_chart(f"every {kind}", "Multiline", [f"{kind}_{i}" for i in range(len(values))])
        context.logger.log_chart("active units", "Multiline", ["active_units"])
        context.logger.log_image("panel", plots.panel(result, context.curves[TOTAL.name], context.occasion()))

    def log_alarm(self, alarm: Alarm, result: PosteriorKLResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's dimensions marked."""
        context.logger.log_image("picture", plots.panel(result, context.curves[TOTAL.name], context.occasion(alarm)))


def severity(nats: float) -> float:
    """Returns by how many octaves the divergence of a dimension falls short of three nats; nan stays nan.

    Example:
        >>> severity(5.0), round(severity(0.75), 6), severity(0.0) == severity(FLOOR)
        (0.0, 2.0, True)
    """
    return math.nan if math.isnan(nats) else max(0.0, math.log2(IN_USE) - math.log2(max(nats, FLOOR)))


def shortfall(nats: float) -> float:
    """Returns by how many nats the divergence of the latent falls short of one; nan stays nan."""
    return math.nan if math.isnan(nats) else max(0.0, TOTAL_IN_USE - nats)
