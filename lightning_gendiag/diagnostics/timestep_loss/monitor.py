"""Monitors the loss of a diffusion or flow matching model by noise level while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_gendiag.callbacks.monitor import Monitor, PlotContext
from lightning_gendiag.detection.alarm import listed
from lightning_gendiag.detection.history import ByStep, Observation, Series
from lightning_gendiag.diagnostics.timestep_loss import plots
from lightning_gendiag.diagnostics.timestep_loss.functional import (
    MAX_BAND_TAGS,
    NOISIEST,
    Side,
    TimestepLossResult,
    band_edges,
    squared_errors,
)
from lightning_gendiag.diagnostics.timestep_loss.metric import TimestepLoss
from lightning_gendiag.functional.arrays import as_data
from lightning_gendiag.model.amounts import fitting
from lightning_gendiag.model.batches import first_rows
from lightning_gendiag.model.denoising import (
    LOSS_ADVICE,
    Denoiser,
    NoisyBatch,
    TrainingStep,
    find_denoiser,
    predict,
    prediction_in,
    record,
    takes_times,
)
from lightning_gendiag.model.generators import seed_all
from lightning_gendiag.model.isolation import contained

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.detection.alarm import Alarm
    from lightning_gendiag.model.view import ModelView

NUM_BANDS = 8
"""Number of bands of noise levels, which hold equally many of the levels that training draws."""

IMAGES = 64
"""Number of images of each side that are held, over all processes."""

ROWS = 512
"""Number of predictions of each side at an evaluation, over all processes: each image at eight noise levels."""

LEAST_CALLS = 2
"""Smallest number of calls of a slow network on each side."""

SECONDS = 0.15
"""Approximate limit of the time of each side's calls."""

HELD_NUMBERS = 1 << 22
"""Largest count of numbers in the noisy images of each side, which are held twice beside their targets: 48 MiB in float32."""

LEAST_ROWS = 4
"""Smallest number of rows of a batch in which several noise levels show."""

SEED_STEP = 7919
"""Distance between the seeds of two recorded training steps."""

RANK_SEED = 104_729
"""Distance between the seeds of two processes."""

HELD_OUT_SEED = 15_485_863
"""Distance between the seeds of both sides, whose noise is independent."""

MIN_STD = 0.05
"""Of the logarithm of the loss: a twentieth more or less is never news."""

MIN_DELTA = math.log(1.3)
"""A loss that rises by a third is news; those of healthy models fluctuate by a tenth to a fifth."""

BAND_SERIES: dict[str, Any] = {"quantity": "loss", "event": "became worse", "min_std": MIN_STD, "min_delta": MIN_DELTA}
BAND = Series("band", "component", **BAND_SERIES)
WHOLE = Series("all noise levels", "aggregate", **BAND_SERIES)
UNWEIGHTED = Series(
    "levels without weight", "rule", "bands without weight", label="noise levels", confirm=2, stop="never"
)
UNREACHED = Series("pure noise", "rule", "highest noise level", label="the noise schedule", confirm=2, stop="never")
LAGGING = Series(
    "averaged weights",
    "rule",
    "logarithm of the loss",
    label="averaged weights",
    confirm=4,
    progress=-0.02,
    stop="never",
)
"""Averaged weights are no alarm while their loss falls by a fiftieth or more within the newest evaluations."""
FAILING = Series(
    "failing levels", "rule", "excess of the loss", label="noise levels", confirm=8, progress=-0.02, stop="never"
)
"""Of the rule that predictions must be better than a multiple of the input, unless the network is learning that."""
OVERFITTING = Series("overfitted levels", "rule", "gap", label="noise levels", confirm=3, stop="never")


class TimestepLossMonitor(Monitor[TimestepLoss, TimestepLossResult]):
    """Monitors :class:`TimestepLoss`: the loss of a diffusion or flow matching model in bands of noise levels.

    The network and what it is trained to predict are found by watching one ``training_step`` on the isolated copy, for
    predictions of noise, data, velocities or anything else that a loss compares with a target. The noisy inputs of some
    training steps, with noise levels spread evenly over those that training draws, are then kept, so that each evaluation
    predicts from the same images, noise and levels. If there are validation batches before the first evaluation, their
    images are judged, and training images are what they are compared with.

    A band becomes worse when its loss rises lastingly to 1.3 times its lowest value or more, also while the mean falls. Rules
    report bands in which predictions are worse than a multiple of the input, in which the training loss has no weight, or in
    which the model overfits; a schedule that ends before pure noise; and averaged weights that predict worse than the raw
    ones. The rules stop no run.

    Args:
        loss: What gives the squared errors (N,) or (N, ...) of images, for modules in which nothing is found: a callable
            ``(module, images, times, noise)``, or the name of a method ``(images, times, noise)``. Times (N,) rise from 0
            for data to 1 for noise, and noise has the shape of the images.
        num_bands: Number of bands.
        kwargs: Arguments of :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the module cannot be monitored.

    Example:
        >>> monitor = TimestepLossMonitor(every_n_epochs=1)  # one of the Trainer's callbacks
    """

    name = "timestep_loss"
    metric_class = TimestepLoss
    period_multiplier = 2
    notes_batches = True
    needs = ()
    needs_reference = False

    def __init__(
        self,
        loss: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        num_bands: int = NUM_BANDS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_bands < 2:
            raise ValueError(f"num_bands must be at least 2, got {num_bands}.")
        if loss is not None and not isinstance(loss, str) and not callable(loss):
            raise ValueError(
                f"loss must be a callable or name a method, got {loss!r}. To fix this, pass {LOSS_ADVICE}."
            )
        self.loss, self.num_bands = loss, num_bands
        self._edges: list[float] | None = None
        self._forget()

    def _forget(self) -> None:
        self._batches: dict[Side, list[tuple[Any, int]]] = {"train": [], "held_out": []}
        self._recorded: dict[Side, list[NoisyBatch]] = {}
        self._denoiser: Denoiser | None = None
        self._template: Any = None
        self._unreadable: Exception | None = None
        self._times: list[tuple[float, float]] = []
        self._best: ByStep[Tensor] = ByStep()

    def reset(self) -> None:
        """Forgets the images and the bands as well."""
        super().reset()
        self._edges = None
        self._forget()

    # ---- batches ----

    def note_batch(self, view: ModelView, batch: Any, side: Side = "train") -> None:
        """Keeps the first rows of batches until there are enough; their images need not be found."""
        held = self._batches[side]
        most = math.ceil(IMAGES / view.world_size)
        if self._recorded or sum(rows for _, rows in held) >= most:
            return
        try:
            with torch.no_grad(), contained(view.device, view.adapter.images, view.adapter.labels):
                data = view.adapter.find_data(batch)
            if data is None or len(data) < LEAST_ROWS:
                got = "none" if data is None else f"{len(data)}"
                raise ValueError(f"a batch must hold at least {LEAST_ROWS} images or other rows of data, got {got}.")
            rows = min(len(data), most, max(LEAST_ROWS, HELD_NUMBERS // (data[0].numel() * LEAST_CALLS)))
            held.append((first_rows(batch, len(data), rows), rows))
            self._unreadable = None
        except Exception as error:
            # raised at the next evaluation, where all processes can agree on it
            self._unreadable = error if side == "train" and not held else self._unreadable

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps rows of validation batches, which training does not see."""
        if self._session is not None and dataloader_idx == 0:
            self.note_batch(self.view, batch, "held_out")

    # ---- finding ----

    def check(self, view: ModelView) -> None:
        """Looks for the network, in a training step once there is a batch."""
        if self.loss is not None:
            self._given(view)
        elif self._batches["train"] or self._unreadable is not None:
            self._find(view)
        else:
            self._check_kind(view)

    def _check_kind(self, view: ModelView) -> None:
        """Checks what shows before a training step is run."""
        trained = view.subject.trained
        fix = f"To fix this, pass {LOSS_ADVICE}."
        if not takes_times(trained):
            raise ValueError(
                f"the module must be a diffusion or flow matching model, but no name says that a part of "
                f"{type(trained).__name__} takes times or levels of noise. {fix}"
            )
        if not trained.automatic_optimization:
            raise ValueError(
                f"training_step must be watched, but that of {type(trained).__name__} steps its optimizers itself. {fix}"
            )
        if view.subject.in_place:
            raise ValueError(f"training_step must run on a copy of the module, which cannot be made. {fix}")

    def _given(self, view: ModelView) -> Callable[[Tensor, Tensor, Tensor], Any]:
        """The user's loss on the copy."""
        if isinstance(self.loss, str):
            found = getattr(view.module, self.loss, None)
            if not callable(found):
                raise ValueError(
                    f"loss must be a callable or name a method of {type(view.module).__name__}, got {self.loss!r}. "
                    f"To fix this, pass {LOSS_ADVICE}."
                )
            named: Callable[[Tensor, Tensor, Tensor], Any] = found
            return named
        given = view.subject.counterpart(self.loss)
        return lambda images, times, noise: given(view.module, images, times, noise)

    def _step(self, view: ModelView, batch: Any, rows: int) -> TrainingStep:
        """The training step of the copy for a batch; inside ``isolated``."""
        moved = first_rows(batch, rows, rows, view.device)

        def seed(number: int) -> None:
            # a training step may make generators of its own, which the view has not seen
            seed_all(number, view.device, view.module, view.adapter, *view.subject.surrounding)

        return TrainingStep(view.module, moved, rows, seed)

    def _find(self, view: ModelView) -> Denoiser:
        """The network; what it predicts is looked for once."""
        self._check_kind(view)
        if self._unreadable is not None:
            raise self._unreadable
        if self._denoiser is None:
            batch, rows = self._batches["train"][0]
            with view.isolated(exact=True):
                self._denoiser, self._template = find_denoiser(self._step(view, batch, rows), view.adapter.seed)
            of = self._denoiser.prediction or "the target of training_step"
            schedule = f" on a {self._denoiser.schedule} schedule" if self._denoiser.schedule else ""
            view.say(
                f"Timestep loss: {self._denoiser.name} predicts {of}{schedule}. To choose another, pass {LOSS_ADVICE}."
            )
        return self._denoiser

    # ---- recording ----

    def build_metric(self, view: ModelView) -> TimestepLoss:
        """Records the inputs of training steps, and divides their noise levels into bands."""
        recorded: dict[Side, list[NoisyBatch]] = {"train": self._recorded_side(view, "train")}
        reason = "there were no validation batches"
        if view.agreed(bool(self._batches["held_out"])):
            try:
                recorded["held_out"] = self._recorded_side(view, "held_out")
            except Exception as error:
                # training images can be judged instead
                reason = f"training_step does not take validation batches ({type(error).__name__}: {error})"
        self._recorded = recorded
        levels = torch.cat([batch.levels for batches in recorded.values() for batch in batches])
        self._edges = view.broadcast(lambda: self._edges or band_edges(levels, self.num_bands).tolist())
        self._times = view.broadcast(lambda: self._times_of(recorded["train"]))
        held_out = "held_out" in recorded
        of = f"validation {self.data_name}" if held_out else f"training {self.data_name}, since {reason}"
        number = len(levels) * view.world_size
        view.say(f"Timestep loss: about {number:,} predictions at each evaluation; the loss is of {of}.")
        return TimestepLoss(self._edges)

    def _recorded_side(self, view: ModelView, side: Side) -> list[NoisyBatch]:
        """Calls of the network for one side's images, on the CPU, as many as fit the limits of time and memory."""
        failure = RuntimeError("training steps could not be recorded on another process")
        first = view.on_all(lambda: self._record(view, side, 0), failure)
        if self.loss is None:
            self._denoiser = view.broadcast(lambda: self._denoiser)
        with view.isolated(exact=True):
            calls = self._number_of_calls(view, first)
        return [first, *view.on_all(lambda: [self._record(view, side, n) for n in range(1, calls)], failure)]

    def _record(self, view: ModelView, side: Side, number: int) -> NoisyBatch:
        """One call of the network for one side's images."""
        batches = self._batches[side]
        if not batches:
            raise self._unreadable or ValueError("training_step must have had a batch before the first evaluation.")
        batch, rows = batches[number % len(batches)]
        seed = (
            view.adapter.seed + HELD_OUT_SEED * (side == "held_out") + RANK_SEED * view.rank + SEED_STEP * (number + 1)
        )
        if self.loss is not None:
            return self._drawn(view, batch, seed)
        found = self._find(view)
        with view.isolated(exact=True):
            return record(self._step(view, batch, rows), found, seed, self._template).to(torch.device("cpu"))

    def _number_of_calls(self, view: ModelView, batch: NoisyBatch) -> int:
        """How many calls fit, the same on all processes; inside ``isolated``."""
        given = batch.to(view.device)
        seconds = view.seconds_of(lambda: self._errors(view, given))
        rows = len(batch.levels)
        wanted = math.ceil(math.ceil(ROWS / view.world_size) / rows)
        fits = HELD_NUMBERS // max(1, batch.inputs.numel())
        return view.broadcast(lambda: fitting(seconds, SECONDS, LEAST_CALLS, max(LEAST_CALLS, min(wanted, fits))))

    def _drawn(self, view: ModelView, batch: Any, seed: int) -> NoisyBatch:
        """Images, times and noise for a loss of the user's, where the time stands for the level; on the CPU."""
        data = view.adapter.find_data(batch)
        assert data is not None
        images = as_data(data).float()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        # one time in each of as many parts of the schedule, in any order
        order = torch.randperm(len(images), generator=generator)
        within = torch.rand(len(images), generator=generator, dtype=images.dtype)
        times = ((order + within) / len(images)).clamp(1e-6, 1 - 1e-6)
        unknown = torch.full((len(images),), math.nan, dtype=torch.float64)
        return NoisyBatch((times,), {}, images, noise, times.double(), times.double(), unknown)

    def _times_of(self, batches: Sequence[NoisyBatch]) -> list[tuple[float, float]]:
        """The lowest and the highest time that the network is given in each band; empty where times are not known."""
        if any(batch.times is None for batch in batches) or self._edges is None:
            return []
        times = torch.cat([batch.times for batch in batches if batch.times is not None])
        levels = torch.cat([batch.levels for batch in batches])
        bands = torch.bucketize(levels, torch.tensor(self._edges[1:-1], dtype=levels.dtype))
        groups = [times[(bands == b) & levels.isfinite()] for b in range(len(self._edges) - 1)]
        return [(float(group.min()), float(group.max())) for group in groups] if all(map(len, groups)) else []

    # ---- an evaluation ----

    def _errors(self, view: ModelView, batch: NoisyBatch, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Squared errors (N,) of a recorded call, with the copy's weights or others; inside ``isolated``."""
        found = self._denoiser
        if found is None:
            errors = self._given(view)(
                view.as_input(batch.inputs), view.as_input(batch.levels), view.as_input(batch.targets)
            )
            if not isinstance(errors, Tensor) or errors.shape[:1] != batch.levels.shape:
                got = tuple(errors.shape) if isinstance(errors, Tensor) else type(errors).__name__
                raise ValueError(
                    f"loss must return squared errors ({len(batch.levels)},) or ({len(batch.levels)}, ...), got {got}. "
                    "To fix this, do not average over the images."
                )
            return errors.double().view(len(errors), -1).mean(1)
        if weights is None:
            return squared_errors(predict(view.module, found, batch), batch.targets)
        part = view.module.get_submodule(found.path)
        output = functional_call(part, dict(weights), batch.args, dict(batch.kwargs))
        return squared_errors(prediction_in(output, batch.inputs), batch.targets)

    def _raw_weights(self, view: ModelView) -> dict[str, Tensor] | None:
        """Raw parameters of the network and copies of its buffers, where the copy has averaged ones."""
        if not view.averaged or self._denoiser is None or view.subject.in_place:
            return None
        part = view.subject.trained.get_submodule(self._denoiser.path)
        parameters = {name: p.detach() for name, p in part.named_parameters()}
        return parameters | {name: b.detach().clone() for name, b in part.named_buffers()}

    def update(self, view: ModelView) -> None:
        """Adds the predictions of this process's recorded calls."""
        judged = "held_out" if "held_out" in self._recorded else "train"
        raw = self._raw_weights(view)
        with view.isolated(exact=True):
            view.seed()
            for side, batches in self._recorded.items():
                for held in batches:
                    batch = held.to(view.device)
                    errors = self._errors(view, batch)
                    of: dict[str, Any] = (
                        {} if self._denoiser is None else {"inputs": batch.inputs, "targets": batch.targets}
                    )
                    self.metric.update(errors, batch.levels, side=side, weights=batch.weights, **of)
                    if raw is not None and side == judged:
                        self.metric.update(self._errors(view, batch, raw), batch.levels, side="raw")

    def label(self, result: TimestepLossResult, first: int, last: int | None = None) -> str:
        """Returns the noise levels of one band, or from one band to another, in words.

        Args:
            result: Of any evaluation.
            first: Number of the band with the least noise.
            last: Number of the band with the most noise; by default the same.
        """
        last = first if last is None else last
        low, high = float(result.edges[first]), float(result.edges[last + 1])
        if self.loss is not None:
            return f"times {low:.2f} to {high:.2f}"
        snr = f"log-SNR {-low:.1f} to {-high:.1f}"
        if last >= len(self._times):
            return snr
        times = sorted([*self._times[first], *self._times[last]])
        digits = 0 if all(time.is_integer() for times in self._times for time in times) else 2
        return f"times {times[0]:.{digits}f} to {times[-1]:.{digits}f} ({snr})"

    def observations(self, result: TimestepLossResult) -> list[Observation]:
        """The loss of each band and of all, and rules about what is wrong in itself."""
        losses, rises = result.loss.tolist(), result.rise
        observations = [
            Observation(BAND.numbered(b), value, float(rises[b]), self.label(result, b))
            for b, value in enumerate(losses)
        ]
        whole = Observation(WHOLE, float(result.scalars()["loss"]), float(rises.mean()))
        return [*observations, whole, *self._rules(result)]

    def postprocess(self, view: ModelView, result: TimestepLossResult) -> TimestepLossResult:
        """Adds the lowest loss of each band so far: that of a model which learns falls, and has no level to compare with."""
        step = self.last_step or 0
        now, before = result.loss.cpu(), self._best.before(step)
        best = now if before is None else now.fmin(before)
        self._best.note(step, best)
        return result._replace(best=best.to(result.loss))

    def _rules(self, result: TimestepLossResult) -> list[Observation]:
        """What is wrong in itself, the causes before their consequences."""
        lags = result.lags & (result.counts[2] > 0)
        fails, level = result.fails, float(result.highest_level)
        # of the user's own loss, levels are times; where noise is only added, what is left of the signal depends on the
        # variance of the data, and Langevin dynamics starts from anything
        schedule = "" if self._denoiser is None else self._denoiser.schedule
        ends_early = schedule not in ("", "variance-exploding") and level < NOISIEST
        noisiest = torch.arange(len(result.loss)) == len(result.loss) - 1
        signal = 1 / (1 + math.exp(min(level, 700.0)))
        return [
            self._rule(
                UNWEIGHTED, float(result.unweighted.sum()), result, result.unweighted,
                "training does not weigh {bands}: its loss does not depend on what is predicted there",
            ),
            self._rule(
                UNREACHED, level, result, noisiest & ends_early,
                f"training never reaches pure noise, from which samples start: in {{bands}}, {signal:.0%} of the variance "
                "of the noisiest inputs is still signal",
            ),
            self._rule(
                LAGGING, float((result.loss + 1e-12).log().mean()), result, lags,
                "the averaged (EMA) weights are worse than the raw ones in {bands}, with a loss of "
                f"{_values(result.loss, lags)} and {_values(result.losses[2], lags)}: they are not updated, or too slowly",
            ),
            self._rule(
                FAILING, float(result.excess.nan_to_num(1.0).max()), result, fails,
                f"the network fails in {{bands}}: its loss is {_values(result.loss, fails)}, and that of a multiple of its "
                f"input is {_values(result.linear, fails)}",
            ),
            self._rule(
                OVERFITTING, float(result.scalars().get("gap", torch.tensor(math.nan))), result, result.overfits,
                f"the model overfits in {{bands}}: the loss is {_values(result.losses[1], result.overfits)} on held-out "
                f"{self.data_name} and {_values(result.losses[0], result.overfits)} on training {self.data_name}",
            ),
        ]  # fmt: skip

    def _rule(
        self, series: Series, value: float, result: TimestepLossResult, bands: Tensor, message: str
    ) -> Observation:
        """Whether a rule holds in any band, and the sentence that names these."""
        chosen = bands.nonzero()[:, 0].tolist()
        # neighbours are one range
        starts = [band for band in chosen if band - 1 not in chosen]
        ends = [band for band in chosen if band + 1 not in chosen]
        ranges = [self.label(result, first, last) for first, last in zip(starts, ends, strict=True)]
        words = f"the noise levels of {listed(ranges, 3)}" if ranges else series.label
        text = f"{message.replace('{bands}', words)}, for {{evaluations}} evaluations"
        return Observation(series, value, math.inf if chosen else 0.0, words, text)

    # ---- pictures ----

    def page_numbers(self, result: TimestepLossResult) -> dict[str, Any]:
        """The loss of each band on both sides, and that of the best multiple of the input."""
        return {
            "edges": result.edges.tolist(), "train": result.losses[0].tolist(), "held_out": result.losses[1].tolist(),
            "linear": result.linear.tolist(), "power": result.power.tolist(),
        }  # fmt: skip

    def log_plots(self, result: TimestepLossResult, context: PlotContext) -> None:
        """Logs the charts and the panel."""
        context.logger.log_chart("loss", "Multiline", ["loss", "train_loss"])
        if len(result.loss) <= MAX_BAND_TAGS:
            context.logger.log_chart("loss by noise level", "Multiline", [f"loss_{b}" for b in range(len(result.loss))])
        context.logger.log_image("panel", self._panel(result, context))

    def log_alarm(self, alarm: Alarm, result: TimestepLossResult, context: PlotContext) -> None:
        """Logs the panel with the alarm's bands marked."""
        context.logger.log_image("picture", self._panel(result, context, alarm))

    def _panel(self, result: TimestepLossResult, context: PlotContext, alarm: Alarm | None = None) -> Tensor:
        labels = [self.label(result, b) for b in range(len(result.loss))]
        histories = [context.curves[BAND.numbered(b).name] for b in range(len(labels))]
        occasion = context.occasion(alarm)
        of_rules = {
            UNWEIGHTED.name: result.unweighted, LAGGING.name: result.lags, FAILING.name: result.fails,
            OVERFITTING.name: result.overfits,
        }  # fmt: skip
        if alarm is not None and alarm.series in of_rules:
            occasion = occasion._replace(marked=of_rules[alarm.series].nonzero()[:, 0].tolist())
        return plots.panel(result, labels, histories, occasion)

    # ---- checkpoints ----

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the edges of the bands and their times."""
        return {"edges": self._edges, "times": [list(times) for times in self._times]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self._edges = state["edges"]
        self._times = [(first, last) for first, last in state["times"]]


def _values(values: Tensor, bands: Tensor) -> str:
    """The values of some bands for people."""
    return listed([f"{value:.3g}" for value in values[bands].tolist()], 3)
