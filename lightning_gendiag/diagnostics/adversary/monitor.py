"""Monitors the discriminator of a GAN while it trains: what tells why the generator stalls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.history import ByStep, Observation, Series
from lightning_gendiag.diagnostics.adversary import plots
from lightning_gendiag.diagnostics.adversary.functional import LEAST_SIDE, AdversaryResult, stable_rank
from lightning_gendiag.diagnostics.adversary.metric import Adversary
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapters.own import accepts
from lightning_gendiag.model.batches import Images
from lightning_gendiag.model.discriminators import (
    ADVICE,
    CHUNK,
    Discriminator,
    find_discriminator,
    in_groups,
    scores_in,
    scores_of,
    takes_logits,
    weights_of,
)
from lightning_gendiag.model.gradients import GradientReader, sampled_weights
from lightning_gendiag.model.view import Source, check_source

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

MOST_IMAGES = 256
"""Largest number of images of each kind that are scored, over all processes."""

HELD_NUMBERS = 1 << 23
"""Largest count of numbers in the images of each kind that the monitor holds: 32 MiB in float32."""

MOST_MATRICES, LONGEST_SIDE = 8, 512
"""Stable ranks are measured of so many weight matrices, those with the most numbers whose smaller side is up to this."""

LEAST_SCORED = 32
"""Number of training images and of held-out ones from which on overfitting is judged."""

NETWORKS = ("generator", "discriminator")

LEAST_STEPS = 30
"""Number of steps of one network in which the other must not change before it counts as frozen. Critics of Wasserstein GANs
take up to five steps for each of the generator's."""

SEPARATED = 0.99
"""Probability of ranking a real image above a generated one from which on a discriminator is too strong if gradients vanish."""

VANISHED, LOST, EXPLODED = 1 / 30, 1e-3, 30.0
"""Factors of its highest level: a norm falls below the first where the discriminator is sure, and below the second where it is
not, and rises above the third. In ten healthy runs, norms lay between 0.09 and 3.5 of it, and above 0.29 where it was."""

MEMORIZED, RESEMBLING = 0.8, 0.5
"""A discriminator overfits if, surely, it ranks more than this share of pairs of a training and a held-out image by that, and
held-out images lie at least this far on the way to generated ones."""

CONFIRM, CONFIRM_NEVER = 3, 8
"""Evaluations in a row in which a rule must hold; more for a network that has never changed, since some start late."""

LEAST_SEEN, REVERSED = 5, 0.2
"""From so many evaluations on, gradients may have exploded; and smaller scores are taken to mean real where the mean
probability that a real image has the larger score is below this. That of a Wasserstein critic moves up and down."""

LEVELS = 64
"""Number of the newest evaluations whose highest gradient is the level."""

MIN_STD, MIN_DELTA = 0.05, math.log(1.5)
"""Of the logarithm of the stable rank: a twentieth is never news, a fall by a third is."""

COLLAPSED = 2.0
"""Stable ranks above this are all alike. While a healthy discriminator learns, its rank falls from 40 to as low as 3."""

FROZEN = Series("updates", "rule", "change of the weights", label="the networks", event="are frozen", stop="never")
GRADIENTS = Series("gradients", "rule", "norm of the gradient", label="gradients", event="failed", stop="never")
OVERFITTED = Series(
    "overfitting", "rule", "share of pairs in which a training image looks more real than a held-out one",
    label="the discriminator", event="overfits", stop="never",
)  # fmt: skip
SPECTRUM = Series(
    "stable rank", "standalone", "stable rank", label="the spectrum of the discriminator", event="collapsed",
    min_std=MIN_STD, min_delta=MIN_DELTA, stop="never",
)  # fmt: skip
SEPARATION = Series("auc", "record", "probability that a real image scores higher than a generated one")
HELD_OUT = Series("held-out auc", "record", SEPARATION.quantity)
NORMS = tuple(Series(f"gradient of the {name}", "record", "norm of the gradient") for name in NETWORKS)


class AdversaryMonitor(Monitor[Adversary, AdversaryResult]):
    """Monitors :class:`Adversary` of a GAN's discriminator: whether it is frozen, too strong, or overfitted.

    The discriminator of the isolated copy scores training images, generated ones and, where there is a validation loader,
    images of its batches: at most 256 of each. Layers of BatchNorm take the statistics of each chunk, as in training. Norms
    of gradients are read just before optimizer steps, at the steps 1, 2, 4, 8, ... after an evaluation. Its alarms stop
    no run.

    Args:
        discriminator: What scores images: the path of a part of the module, or a callable ``(module, images)`` or
            ``(module, images, labels)`` that returns one score for each image, or a map of scores; by default it is found by
            its name, or since an optimizer of its own trains it.
        threshold: Score above which the loss takes an image for real, for r_t: 0 for logits, 0.5 for probabilities; None
            for critics without one; by default 0.5 where all scores are in 0 to 1, and 0 where the code of the module names
            a loss of logits, such as ``softplus`` or ``hinge``.
        lower_is_real: Whether smaller scores mean real; by default it shows after some evaluations.
        images: ``"samples"``, ``"reconstructions"``, or ``"auto"`` for reconstructions where nothing samples.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = AdversaryMonitor()  # one of the Trainer's callbacks
    """

    name = "adversary"
    metric_class = Adversary
    period_multiplier = 4
    needs = ()
    _gradients: GradientReader | None = None
    _found: Discriminator | None = None

    def __init__(
        self,
        discriminator: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        threshold: float | Literal["auto"] | None = "auto",
        lower_is_real: bool | None = None,
        images: Source = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_source(images)
        if isinstance(threshold, str) and threshold != "auto":
            raise ValueError(f"threshold must be a number, 'auto' or None, got {threshold!r}.")
        self.discriminator, self.threshold, self.lower_is_real = discriminator, threshold, lower_is_real
        self.images = images
        self._forget()

    def _forget(self) -> None:
        self._found, self._gradients, self._tried = None, None, False
        self._training: list[Images] = []
        self._fresh: list[Images] = []
        self._weights: ByStep[dict[str, Tensor]] = ByStep()
        self._changed_at = dict.fromkeys(NETWORKS, 0)
        self._has_changed = dict.fromkeys(NETWORKS, False)
        self._norms: dict[str, list[float]] = {name: [] for name in NETWORKS}
        self._seen: list[float] = [0, 0.0]
        self._judged_at: int | None = None

    def reset(self) -> None:
        """Forgets the images, the weights and the gradients of before as well."""
        super().reset()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_gradients": None}

    def shares(self) -> str:
        """The samples."""
        return "samples" if self._session is None or self.view.compares_samples(self.images) else self.name

    # ---- which discriminator ----

    def check(self, view: ModelView) -> None:
        """Looks for a discriminator, and for what generates."""
        if callable(self.discriminator):
            view.source(self.images)
            return
        self._found = find_discriminator(view, self.discriminator or "")
        view.source(self.images)
        if self._found is not None and not self._tried:
            self._tried = True
            self._gradients = GradientReader(weights_of(view, self._found, self.images))

    def _given(self, view: ModelView) -> Callable[..., Any]:
        """What the user gave, as it is on the copy."""
        given = view.subject.counterpart(self.discriminator)
        return given if isinstance(given, nn.Module) else lambda *inputs: given(view.module, *inputs)

    # ---- between two evaluations ----

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collects real images, and looks for the discriminator before the first step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._tried and self.enabled and self._session is not None and self.view.real.example is not None:
            # what is not found is said at the first evaluation
            with suppress(Exception):
                self.view.refresh()
                self.check(self.view)
            self._tried = True

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Reads the norms of gradients at some steps."""
        if self._gradients is not None and self.enabled and self._gradients.count(optimizer):
            started = time.monotonic()
            self._gradients.read(optimizer, compat.gradient_scale(trainer, optimizer))
            if self.max_overhead is not None:
                self.session.schedule.budget.note(time.monotonic() - started)

    @property
    def sees_batches(self) -> bool:
        """Where a reference was given, which may hold no training images, until there are enough of these."""
        return self._session is not None and self.view.adapter.reference is not None and len(self._training) == 0

    def see(self, view: ModelView, data: Images) -> None:
        """Keeps images of one batch."""
        self._training.append(_finite(data, self._room(data.images, view)))

    @property
    def wants_held_out(self) -> bool:
        """Until there are enough images."""
        return not self._fresh or self._num_fresh < self._room(self._fresh[0].images, self.view)

    @property
    def _num_fresh(self) -> int:
        return sum(len(part.images) for part in self._fresh)

    def note_held_out(self, view: ModelView, batch: Any) -> None:
        """Keeps images of a validation batch."""
        images = view.adapter.find_data(batch)
        if images is None or self._is_held(images):
            return
        labels = view.adapter.find_labels(batch, images).labels
        self._fresh.append(_finite(Images(images, labels), self._room(images, view) - self._num_fresh))

    def _is_held(self, images: Tensor) -> bool:
        """Whether the images of a batch came before, as in the check before training."""
        some = images[:1].detach().cpu()
        return any(
            part.images.shape[1:] != some.shape[1:] or bool((part.images[:1] == some).all()) for part in self._fresh
        )

    def _room(self, images: Tensor, view: ModelView) -> int:
        """Number of images that this process holds at most."""
        return math.ceil(min(MOST_IMAGES, HELD_NUMBERS // max(1, images[:1].numel())) / view.world_size)

    # ---- an evaluation ----

    def build_metric(self, view: ModelView) -> Adversary:
        """Creates the metric once the discriminator is known on all processes."""
        view.on_all(lambda: self.check(view), RuntimeError("no discriminator was found on another process"))
        self._found = view.broadcast(lambda: self._found)
        return Adversary()

    def update(self, view: ModelView) -> None:
        """Adds the scores of this process's images, and the norms of gradients."""
        most = math.ceil(MOST_IMAGES / view.world_size)
        samples = view.source(self.images) == "samples"
        made = view.training_samples(MOST_IMAGES, CHUNK) if samples else view.reconstructions()
        rows = view.reference.images, view.reference.labels
        real = Images(*(None if part is None else part[view.compared_rows(self.images)] for part in rows))  # type: ignore[arg-type]
        fresh = [part.images for part in self._fresh]
        labels = [part.labels for part in self._fresh if part.labels is not None]
        held_out = Images(torch.cat(fresh) if fresh else real.images[:0], torch.cat(labels) if labels else None)
        if view.adapter.reference is not None and self._training:
            held_out, real = real if not fresh else held_out, self._training[0]
        real, made, held_out = (
            Images(*(None if part is None else part[:most] for part in images))  # type: ignore[arg-type]
            for images in (real, made, held_out)
        )
        scored = {"real": self._scores(view, real), "held_out": self._scores(view, held_out)}
        is_known = made.labels is not None or real.labels is None or not len(real.labels) or not self._takes_labels
        scored["generated"] = self._scores(view, made) if is_known else self._scores_of_any_class(view, made, real)
        norms = {} if self._gradients is None else {f"{n}_gradients": self._gradients.norms(n) for n in NETWORKS}
        self.metric.update(**scored, **norms)

    @property
    def _takes_labels(self) -> bool:
        """Whether the discriminator is given classes."""
        if callable(self.discriminator):
            return _takes_labels(self.discriminator)
        return self._found is not None and self._found.takes_labels

    def _scores_of_any_class(self, view: ModelView, made: Images, real: Images) -> Tensor:
        """One score (n,) for each generated image, whose class is not known; none where the scores depend on it."""
        labels = real.labels
        assert labels is not None
        rows = torch.arange(len(made.images))
        # classes of real images, in two orders
        scores, again = (
            self._scores(view, Images(made.images, labels[(rows + shift) % len(labels)])) for shift in (0, 1)
        )
        if torch.allclose(scores, again, rtol=1e-4, atol=1e-6, equal_nan=True):
            return scores
        view.say(
            "Discriminator: generated images are not scored, since its scores depend on classes, and those of the samples are "
            "not known. To score them, pass ModelAdapter(sample=lambda module, n, labels: ..., conditional=True)."
        )
        return scores[:0]

    def _scores(self, view: ModelView, images: Images) -> Tensor:
        """One score (n,) for each image."""
        if not len(images.images):
            return torch.empty(0)
        if not callable(self.discriminator):
            assert self._found is not None
            return scores_of(view, self._found, images)
        call, takes_labels = self._given(view), self._takes_labels

        def scored(some: Tensor, labels: Tensor | None) -> Tensor:
            scores = scores_in(call(some, labels) if takes_labels else call(some), len(some))
            if scores is None:
                raise ValueError(
                    f"discriminator must return floats ({len(some)},), ({len(some)}, 1) or ({len(some)}, 1, ...). "
                    f"To fix this, pass {ADVICE} with one score for each image."
                )
            return scores

        with view.isolated(exact=True):
            return in_groups(scored, view, images)

    def postprocess(self, view: ModelView, result: AdversaryResult) -> AdversaryResult:
        """Adds what the weights of both networks show, and what their gradients were before."""
        step = self.last_step or 0
        threshold = self._threshold(view, result)
        changes, unchanged = self._changes(step)
        if self._judged_at != step and result.auc.isfinite() and changes[1] != 0:
            # a frozen one learns neither sign
            self._seen = [self._seen[0] + 1, self._seen[1] + float(result.auc)]
        seen, total = self._seen
        lower = seen >= LEAST_SEEN and total < REVERSED * seen if self.lower_is_real is None else self.lower_is_real
        levels, limits = [], []
        for name, norm in zip(NETWORKS, (result.generator_gradient, result.discriminator_gradient), strict=True):
            before = self._norms[name]
            levels.append(max(before, default=math.nan))
            # gradients of the first steps may be small
            limits.append(EXPLODED * levels[-1] if len(before) >= LEAST_SEEN else math.inf)
            # what has exploded makes no level
            if self._judged_at != step and norm.isfinite() and float(norm) <= limits[-1]:
                self._norms[name] = [*before, float(norm)][-LEVELS:]
        self._judged_at = step
        if self._gradients is not None:
            self._gradients.restart()
        return result._replace(
            direction=torch.tensor(-1.0 if lower else 1.0, dtype=torch.float64),
            threshold=torch.tensor(math.nan if threshold is None else threshold, dtype=torch.float64),
            levels=torch.tensor(levels, dtype=torch.float64),
            limits=torch.tensor(limits, dtype=torch.float64),
            changes=changes,
            unchanged=unchanged,
            has_changed=torch.tensor([self._has_changed[name] for name in NETWORKS]),
            stable_ranks=self._stable_ranks(view),
        )

    def _threshold(self, view: ModelView, result: AdversaryResult) -> float | None:
        """The score above which the loss takes an image for real; None where it is not known."""
        if self.threshold != "auto":
            return None if self.threshold is None else float(self.threshold)
        scores = torch.cat([result.real, result.generated, result.held_out])
        if len(scores) and bool((scores.min() >= 0) & (scores.max() <= 1)):
            return 0.5
        if takes_logits(view.module):
            return 0.0
        view.say(
            "Discriminator: r_t is not logged, since it is not known which scores its loss takes for real. To log it, pass "
            "AdversaryMonitor(threshold=0.0) for logits."
        )
        return None

    def _changes(self, step: int) -> tuple[Tensor, Tensor]:
        """The relative change (2,) of each network's weights, and the other's steps (2,) since each last changed."""
        changes, unchanged = torch.full((2,), math.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        if self._gradients is None:
            return changes, unchanged
        now = {name: sampled_weights(self._gradients.weights[name]) for name in NETWORKS}
        before = self._weights.before(step)
        self._weights.note(step, now)
        if before is None:
            return changes, unchanged
        for number, name in enumerate(NETWORKS):
            changes[number] = (now[name] - before[name]).norm() / before[name].norm()
        moves = (changes != 0).tolist()
        steps = self._gradients.steps
        for number, (name, other) in enumerate(zip(NETWORKS, NETWORKS[::-1], strict=True)):
            if moves[number] or not moves[1 - number]:
                self._has_changed[name] |= moves[number]
                self._changed_at[name] = steps[other]
            elif not self._waits(name):
                unchanged[number] = steps[other] - self._changed_at[name]
        return changes, unchanged

    def _waits(self, name: str) -> bool:
        """Whether a network has not begun to learn: its optimizer steps with a gradient of 0, by a loss times 0."""
        norms = torch.empty(0) if self._gradients is None else self._gradients.norms(name)
        return not self._has_changed[name] and len(norms) > 0 and bool((norms == 0).all())

    def _stable_ranks(self, view: ModelView) -> Tensor:
        """Stable ranks (W,) of the matrices by which the discriminator of the copy multiplies."""
        if self._found is None:
            return torch.empty(0, dtype=torch.float64)
        with torch.no_grad(), view.isolated(exact=True):
            matrices = [
                matrix
                for part in self._found.parts(view.module)
                for layer in part.modules()
                if isinstance(matrix := _weight_of(layer), Tensor)
                and matrix.ndim > 1
                and LEAST_SIDE <= min(matrix.flatten(1).shape) <= LONGEST_SIDE
            ]
            largest = sorted(range(len(matrices)), key=lambda number: -matrices[number].numel())[:MOST_MATRICES]
            ranks = [stable_rank(matrices[number]) for number in sorted(largest)]
        return torch.stack(ranks).cpu() if ranks else torch.empty(0, dtype=torch.float64)

    # ---- what is observed ----

    def observations(self, result: AdversaryResult) -> list[Observation]:
        """Rules about the weights, the gradients and overfitting, and the spectrum of the discriminator."""
        auc = float(result.auc)
        observations = [
            self._frozen(result),
            self._gradients_of(result),
            self._overfitted(result),
            Observation(SEPARATION, auc, 0.0),
        ]
        for series, norm in zip(NORMS, (result.generator_gradient, result.discriminator_gradient), strict=True):
            observations.append(Observation(series, float(norm), 0.0))
        if len(result.held_out):
            observations.append(Observation(HELD_OUT, float(result.held_out_auc), 0.0))
        if len(result.stable_ranks) and bool(result.stable_ranks.isfinite().all()):
            rank = float(result.stable_ranks.log().mean().exp())
            observations.append(Observation(SPECTRUM, rank, -math.log(min(rank, COLLAPSED))))
        return observations

    def _frozen(self, result: AdversaryResult) -> Observation:
        """Whether one network does not change while the other does."""
        holding = [number for number, steps in enumerate(result.unchanged.tolist()) if steps >= LEAST_STEPS]
        if not holding:
            return Observation(FROZEN, float(result.changes.nan_to_num(0.0).min()), 0.0)
        name, other = NETWORKS[holding[0]], NETWORKS[1 - holding[0]]
        never = not bool(result.has_changed[holding[0]])
        message = (
            f"the {name} is frozen: none of its weights {'has ever changed' if never else 'changed'} in "
            f"{int(result.unchanged[holding[0]]):,} steps of the {other}, for {{evaluations}} evaluations"
        )
        return _rule(FROZEN, 0.0, True, message, f"the {name}", CONFIRM_NEVER if never else CONFIRM)

    def _gradients_of(self, result: AdversaryResult) -> Observation:
        """Whether gradients are nan, explode or vanish."""
        norms = [float(result.generator_gradient), float(result.discriminator_gradient)]
        levels = result.levels.tolist()
        broken = [
            not bool(found.isfinite().any()) and len(found) > 0
            for found in (result.generator_gradients, result.discriminator_gradients)
        ]
        if float(result.invalid.nan_to_num(0.0)) == 1 or any(broken):
            what = (
                f"gradients of the {NETWORKS[broken.index(True)]}" if any(broken) else "all scores of the discriminator"
            )
            return _rule(
                GRADIENTS, math.nan, True, f"{what} are nan or inf, for {{evaluations}} evaluations", what, CONFIRM - 1
            )
        for name, norm, level, limit in zip(NETWORKS, norms, levels, result.limits.tolist(), strict=True):
            if norm > limit:
                message = f"gradients of the {name} exploded: their norm rose from {level:.3g} to {norm:.3g}"
                return _rule(
                    GRADIENTS, norm, True, f"{message}, for {{evaluations}} evaluations", f"gradients of the {name}",
                    CONFIRM - 1,
                )  # fmt: skip
        norm, level, auc = norms[0], levels[0], float(result.auc)
        fell = (
            f"the norm of the generator's gradient fell from {level:.3g} to {norm:.3g}, for {{evaluations}} evaluations"
        )
        if auc >= SEPARATED and norm < VANISHED * level:
            label = "the discriminator"
            message = (
                f"{label} is too strong: it ranks real {self.data_name} above generated ones in {auc:.1%} of pairs, and "
                f"{fell}"
            )
            return _rule(GRADIENTS, norm, True, message, label, CONFIRM)
        if norm < LOST * level:
            label = "the generator's gradient"
            message = f"{label} vanished: {fell}"
            return _rule(GRADIENTS, norm, True, message, label, CONFIRM)
        return Observation(GRADIENTS, norm, 0.0)

    def _overfitted(self, result: AdversaryResult) -> Observation:
        """Whether the discriminator knows its training images by heart."""
        auc, n, m = float(result.train_auc), len(result.real), len(result.held_out)
        surely = auc - 2 * float(result.train_auc_error) > MEMORIZED
        overfits = min(n, m) >= LEAST_SCORED and surely and float(result.overfitting) > RESEMBLING
        message = (
            f"the discriminator overfits: a training image looks more real to it than a held-out one in {auc:.0%} of "
            f"pairs (50% without overfitting), and held-out images lie {float(result.overfitting):.0%} of the way from "
            "training images to generated ones, for {evaluations} evaluations"
        )
        return _rule(OVERFITTED, auc, overfits, message, "the discriminator", CONFIRM)

    # ---- pictures ----

    def log_plots(self, result: AdversaryResult, context: PlotContext) -> None:
        """Logs the charts and the panel."""
        context.logger.log_chart("told apart", "Multiline", ["auc", "held_out_auc", "train_auc"])
        context.logger.log_chart("norms of gradients", "Multiline", ["generator_gradient", "discriminator_gradient"])
        context.logger.log_chart("overfitting", "Multiline", ["overfitting", "sign"])
        context.logger.log_image("panel", self._panel(result, context))

    def log_alarm(self, alarm: Alarm, result: AdversaryResult, context: PlotContext) -> None:
        """Logs the panel."""
        context.logger.log_image("picture", self._panel(result, context, alarm))

    def _panel(self, result: AdversaryResult, context: PlotContext, alarm: Alarm | None = None) -> Tensor:
        norms = [context.curves[series.name] for series in NORMS]
        held_out = context.curves.get(HELD_OUT.name)
        return plots.panel(result, context.curves[SEPARATION.name], held_out, norms, context.occasion(alarm))

    # ---- checkpoints ----

    def get_extra_state(self) -> dict[str, Any]:
        """Returns what was learned of gradients, the sign of the scores and the networks that changed."""
        return {"norms": dict(self._norms), "seen": list(self._seen), "has_changed": dict(self._has_changed)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self._norms = {name: list(state["norms"][name]) for name in NETWORKS}
        self._seen, self._has_changed = list(state["seen"]), dict(state["has_changed"])


def _rule(series: Series, value: float, holds: bool, message: str, label: str, confirm: int) -> Observation:
    confirmed = replace(series, confirm=confirm, label=label)
    return Observation(confirmed, value, math.inf if holds else 0.0, label, message)


def _takes_labels(call: Callable[..., Any]) -> bool:
    return accepts(call, 3) and not isinstance(call, nn.Module)


def _weight_of(layer: nn.Module) -> Any:
    """The weights by which a layer multiplies; those of spectral normalization before or after it divides them."""
    # its first form sets the weights when the layer is called; the rank is the same without the division
    return getattr(layer, "weight_orig", None) if hasattr(layer, "weight_orig") else getattr(layer, "weight", None)


def _finite(data: Images, most: int) -> Images:
    """The first images that are finite, and their labels, on the CPU."""
    images, labels = data.images[:most].detach(), None if data.labels is None else data.labels[:most]
    kept = images.flatten(1).isfinite().all(1)
    return Images(images[kept].cpu().clone(), None if labels is None else labels[kept.to(labels.device)].cpu())
