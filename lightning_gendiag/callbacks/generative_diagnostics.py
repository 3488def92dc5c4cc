"""All diagnostics that apply to a model, for those who do not want to choose."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gendiag.callbacks.alerts import without_secret
from lightning_gendiag.callbacks.collapse_stopping import CollapseStopping
from lightning_gendiag.callbacks.logging import DiagnosticWarning
from lightning_gendiag.callbacks.monitor import Monitor
from lightning_gendiag.callbacks.schedule import ENDLESS, stream_period
from lightning_gendiag.callbacks.session import Member, Session
from lightning_gendiag.diagnostics.adversary.monitor import AdversaryMonitor
from lightning_gendiag.diagnostics.codebook_usage.monitor import CodebookUsageMonitor
from lightning_gendiag.diagnostics.cosine_mean_similarity.monitor import CosineMeanSimilarityMonitor
from lightning_gendiag.diagnostics.generation_balance.monitor import GenerationBalanceMonitor
from lightning_gendiag.diagnostics.k_star.monitor import KStarMonitor
from lightning_gendiag.diagnostics.latent_regions.monitor import LatentRegionsMonitor
from lightning_gendiag.diagnostics.manifold_entropy.monitor import ManifoldEntropyMonitor
from lightning_gendiag.diagnostics.memorization.monitor import MemorizationMonitor
from lightning_gendiag.diagnostics.posterior_kl.monitor import PosteriorKLMonitor
from lightning_gendiag.diagnostics.regional_primitives.monitor import RegionalPrimitivesMonitor
from lightning_gendiag.diagnostics.round_trip.monitor import RoundTripMonitor
from lightning_gendiag.diagnostics.timestep_loss.monitor import TimestepLossMonitor
from lightning_gendiag.diagnostics.training_data.monitor import TrainingDataMonitor
from lightning_gendiag.functional.text import representation
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapter import ModelAdapter
from lightning_gendiag.model.isolation import exits_as_errors
from lightning_gendiag.model.reference import Reference
from lightning_gendiag.model.view import LONGEST_ROW, has_short_rows
from lightning_gendiag.model.warning import warn

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gendiag.model.view import ModelView

MONITORS: tuple[type[Monitor[Any, Any]], ...] = (
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    KStarMonitor,
    ManifoldEntropyMonitor,
    PosteriorKLMonitor,
    CodebookUsageMonitor,
    LatentRegionsMonitor,
    RoundTripMonitor,
    RegionalPrimitivesMonitor,
    TimestepLossMonitor,
    MemorizationMonitor,
    AdversaryMonitor,
    TrainingDataMonitor,
)

BATCH_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
"""Hooks that are called so often that they are handed to those monitors only that do something in them."""


class GenerativeDiagnostics(Member, Callback):
    """Enables every diagnostic that applies to a module, with one stopper, and logs which were left out and why.

    It inspects the module for a sampler, an encoder, a decoder and a posterior, and the first batch for images and labels.
    Where nothing applies it warns, and training goes on. A diagnostic that the trainer has a monitor of already is left to
    that monitor, and so is a :class:`CollapseStopping`.

    Args:
        action: Of the :class:`CollapseStopping` that is added, unless there is one; None adds none.
        every_n_epochs: Number of epochs from one evaluation to the next, by default 1; losses by noise level are evaluated
            half, the adversary and round trips a quarter, latent regions and memorization a fifth, and regional primitives
            a tenth as often. By default, a run of fewer than 75 epochs, one of ``max_steps`` within one epoch, and one of
            endless epochs are evaluated by steps instead.
        every_n_train_steps: The same in batches that stepped an optimizer.
        warmup_epochs: See :class:`Monitor`.
        num_samples: See :class:`ModelAdapter`; by default as many as fit ``max_overhead``, 64 to 1,024.
        num_reference: See :class:`ModelAdapter`.
        reference: See :class:`ModelAdapter`.
        sample: See :class:`ModelAdapter`.
        encode: See :class:`ModelAdapter`.
        decode: See :class:`ModelAdapter`.
        reconstruct: See :class:`ModelAdapter`.
        latent_dim: See :class:`ModelAdapter`.
        conditional: See :class:`ModelAdapter`.
        images: See :class:`ModelAdapter`.
        labels: See :class:`ModelAdapter`.
        weights: See :class:`ModelAdapter`.
        seed: See :class:`ModelAdapter`.
        adapter: An adapter in place of all these.
        num_regions: See :class:`CosineMeanSimilarityMonitor`.
        skip: Names of diagnostics that are not wanted, such as ``("k_star",)``.
        max_overhead: Largest share of the training's time that the diagnostics may take together. The first evaluation
            measures what they cost, and chooses by it the number of samples and how often each diagnostic is evaluated; the
            log says what was chosen. With ``None``, each is evaluated whenever it is due, with 1,024 samples.
        on_alarm: See :class:`CollapseStopping`.
        webhook: See :class:`CollapseStopping`.
        log_images: See :class:`Monitor`.
        on_error: See :class:`Monitor`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> GenerativeDiagnostics("warn", every_n_epochs=2, skip=("k_star",))  # among a Trainer's callbacks
        GenerativeDiagnostics(action='warn', every_n_epochs=2, skip=('k_star',))

    Attributes:
        attached: Names of the diagnostics that evaluate the module.
        left_out: Name and reason of the others.
        stopping: The :class:`CollapseStopping`, or None.
    """

    def __init__(
        self,
        action: Literal["stop", "warn"] | None = "stop",
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        warmup_epochs: int = 0,
        num_samples: int | None = None,
        num_reference: int | None = None,
        reference: Any = None,
        sample: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        encode: str | Callable | None = None,  # type: ignore[type-arg]
        decode: str | Callable | None = None,  # type: ignore[type-arg]
        reconstruct: str | Callable | None = None,  # type: ignore[type-arg]
        latent_dim: int | None = None,
        conditional: bool = False,
        images: Callable | None = None,  # type: ignore[type-arg]
        labels: Callable | None = None,  # type: ignore[type-arg]
        weights: Literal["auto", "raw", "ema"] = "auto",
        seed: int = 0,
        adapter: ModelAdapter | None = None,
        num_regions: int | None = 5,
        skip: tuple[str, ...] = (),
        max_overhead: float | None = 0.05,
        on_alarm: Callable | None = None,  # type: ignore[type-arg]
        webhook: str | None = None,
        log_images: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        own = ModelAdapter(
            sample, encode, decode, num_samples, seed, weights, reconstruct=reconstruct, reference=reference,
            num_reference=num_reference, latent_dim=latent_dim, conditional=conditional, images=images, labels=labels,
        )  # fmt: skip
        chosen = repr(own) != repr(ModelAdapter())
        if adapter is not None and chosen:
            raise ValueError(
                f"adapter must be given alone, got {own!r} beside it. To fix this, pass these arguments to ModelAdapter."
            )
        if action is None and (on_alarm is not None or webhook is not None):
            raise ValueError(
                "on_alarm and webhook must go with an action, got None. To fix this, pass action='warn', which stops nothing."
            )
        names = [kind.name for kind in MONITORS]
        unknown = sorted(set(skip) - set(names))
        if unknown:
            raise ValueError(f"skip must name diagnostics out of {', '.join(names)}, got {', '.join(unknown)}.")
        self.action, self.every_n_epochs, self.every_n_train_steps = action, every_n_epochs, every_n_train_steps
        self.warmup_epochs, self.num_samples, self.num_reference = warmup_epochs, num_samples, num_reference
        self.reference, self.reconstruct = reference, reconstruct
        self.sample, self.encode, self.decode = sample, encode, decode
        self.latent_dim, self.conditional, self.images, self.labels = latent_dim, conditional, images, labels
        self.weights, self.seed, self.adapter, self.num_regions, self.skip = weights, seed, adapter, num_regions, skip
        self.max_overhead, self.log_images, self.on_error = max_overhead, log_images, on_error
        self.on_alarm, self.webhook = on_alarm, webhook
        # without a choice of its own it takes the adapter of another monitor of the trainer
        self._adapter = adapter or (own if chosen else None)
        self.monitors = {kind.name: self._monitor(kind) for kind in MONITORS if kind.name not in skip}
        self.stopping = None if action is None else CollapseStopping(action, on_alarm=on_alarm, webhook=webhook)
        self.left_out: dict[str, str] = {}
        self._stops = False
        self._inspected = False
        self._acting: dict[str, list[Monitor[Any, Any]]] = {}
        self._of_unknown_length = False
        self._checking = 0.0

    def _monitor(self, kind: type[Monitor[Any, Any]]) -> Monitor[Any, Any]:
        times, steps = kind.period_multiplier, self.every_n_train_steps
        epochs = 1 if self.every_n_epochs is None else self.every_n_epochs
        regions: dict[str, Any] = {"num_regions": self.num_regions} if kind is CosineMeanSimilarityMonitor else {}
        return kind(
            adapter=self._adapter,
            every_n_epochs=epochs * times,
            every_n_train_steps=None if steps is None else steps * times,
            warmup_epochs=self.warmup_epochs,
            on_error=self.on_error,
            log_images=self.log_images,
            max_overhead=self.max_overhead,
            **regions,
        )

    @property
    def attached(self) -> list[str]:
        """Names of the diagnostics that evaluate the module; none before the first batch, which shows what applies."""
        known = self.monitors.items() if self._inspected else ()
        return [name for name, monitor in known if name not in self.left_out and monitor.enabled]

    @property
    def _active(self) -> list[Monitor[Any, Any]]:
        return [monitor for name, monitor in self.monitors.items() if name not in self.left_out]

    def _choose_acting(self) -> None:
        """Chooses, once it is known what is left out, the monitors in which the hooks of each batch do something."""
        self._acting = {hook: [m for m in self._active if m.acts_in(hook)] for hook in BATCH_HOOKS}

    # ---- choosing ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Joins the trainer's session, before it is known which monitors the user has added."""
        if stage == "fit":
            self.enter(trainer, pl_module)
            self.session.automatic = True
            self._inspected = False
            self.left_out = dict.fromkeys(self.skip, "it is in skip")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets each monitor join, and leaves out those that cannot work."""
        started = time.monotonic()
        session = self.session
        present = {type(monitor) for monitor in session.monitors}
        for name, monitor in self.monitors.items():
            missing = [package for package in monitor.requires if importlib.util.find_spec(package) is None]
            if type(monitor) in present:
                self.left_out[name] = "the trainer has a monitor of it"
            elif missing:
                self.left_out[name] = f"it needs {', '.join(missing)}: pip install 'lightning_gendiag[latent]'"
            elif name not in self.left_out:
                monitor.join(trainer, pl_module)
                self._try(trainer, name, monitor.prepare)
        self._stops = self.stopping is not None and session.stopper is None
        if self.stopping is not None and self._stops:
            self.stopping.join(trainer, pl_module)
        elif self.on_alarm is not None or self.webhook is not None:
            warn(
                "on_alarm and webhook are not used, since the trainer has a CollapseStopping. To fix this, pass them to it.",
                category=DiagnosticWarning,
            )
        self._checking = time.monotonic() - started

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count the time, and chooses a schedule by steps where epochs are too long."""
        for monitor in self._active:
            monitor.on_train_start(trainer, pl_module)
        self.session.schedule.budget.charge_setup(self._checking)
        if self.every_n_epochs is None and self.every_n_train_steps is None:
            self._choose_steps(trainer)

    def _choose_steps(self, trainer: Trainer) -> None:
        steps = stream_period(trainer, within_epochs=self.max_overhead is not None)
        self._set_steps(steps)
        unknown = trainer.num_training_batches == math.inf
        # whether such an epoch ends is seen when it does
        self._of_unknown_length = unknown and trainer.max_steps <= 0
        if steps is not None and self._active:
            reason = "the length of an epoch is not known" if unknown else "the run does not end its first epoch"
            if stream_period(trainer) is None:
                reason = "epochs are few"
            rank_zero_info(
                f"Diagnostics evaluate every {steps:,} training steps, since {reason}. "
                "To choose another schedule, pass every_n_train_steps=... or every_n_epochs=...."
            )

    def _set_steps(self, steps: int | None) -> None:
        for monitor in self.monitors.values():
            monitor.every_n_train_steps = None if steps is None else steps * monitor.period_multiplier

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Inspects the first batch, and collects real images."""
        if not self._inspected:
            self._inspected = True
            self._inspect(trainer, batch)
        for monitor in self._acting["on_train_batch_start"]:
            monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _inspect(self, trainer: Trainer, batch: Any) -> None:
        """Leaves out what the first batch has no images or labels for, or what its images show not to work."""
        started = time.monotonic()
        session = self.session
        # once for all monitors, since a callable of the user's may be slow
        found_in = cache(partial(_found_in, batch))
        for name, monitor in self.monitors.items():
            if name not in self.left_out:
                view = session.view_of(monitor)
                if not monitor.watches_batches:
                    # parts that were made when training started are there now
                    view.refresh()
                self._try(trainer, name, partial(_check_batch, monitor, view, found_in))
            if name not in self.left_out:
                monitor.note_first_batch(view, batch)
                view.agree(*monitor.needs)
                self._try(trainer, name, partial(monitor.check, view))
        self._choose_acting()
        # what is left out before the first evaluation belongs to the time of setup
        session.schedule.budget.charge(time.monotonic() - started, ready=False)
        self._say(session, trainer)

    def _try(self, trainer: Trainer, name: str, attempt: Callable[[], None]) -> None:
        """Leaves a monitor out, on all processes, if an attempt fails on any."""
        reason = ""
        try:
            with exits_as_errors():
                attempt()
        except Exception as error:
            reason = str(error) or type(error).__name__
        if not trainer.strategy.reduce_boolean_decision(not reason, all=True):
            self.left_out[name] = reason or "it failed on another process"
            self.session.leave(self.monitors[name])

    def _say(self, session: Session, trainer: Trainer) -> None:
        lines = [f"Diagnostics: {', '.join(self.attached) or 'none'}."]
        # one line for each reason
        for reason in dict.fromkeys(self.left_out.values()):
            names = ", ".join(name for name in self.left_out if self.left_out[name] == reason)
            lines.append(f"Left out: {names}, since {reason}")
        if self.left_out.get("k_star", "").startswith("encode"):
            lines.append("k* takes the features of any layer: add KStarMonitor('path.of.a.layer') to the callbacks.")
        if not all(monitor.watches_batches for monitor in session.monitors):
            rank_zero_info("\n".join(lines))
        else:
            module = type(session.subject.trained).__name__
            warn(
                (
                    f"GenerativeDiagnostics watches the training data only, since no diagnostic of {module} itself applies. "
                    if session.monitors
                    else f"GenerativeDiagnostics found nothing to evaluate in {module}, and training goes on without it. "
                )
                + "\n".join(lines[1:]),
                category=DiagnosticWarning,
            )
        session.logger(compat.batch_step(trainer, epoch_over=False)).log_text("attached", "\n\n".join(lines))

    # ---- hooks that are handed over ----

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates where the schedule counts steps."""
        for monitor in self._acting["on_train_batch_end"]:
            monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluates where the schedule counts epochs, as it does from the end of a stream's first epoch on if that is short."""
        if self._of_unknown_length:
            self._of_unknown_length = False
            short = trainer.fit_loop.epoch_loop.batch_idx < ENDLESS
            if trainer.strategy.reduce_boolean_decision(short, all=True) and self._active:
                self._set_steps(None)
                rank_zero_info("Diagnostics evaluate at the ends of epochs, since the first one had an end.")
        for monitor in self._active:
            monitor.on_train_epoch_end(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Lets monitors read gradients."""
        for monitor in self._acting["on_before_optimizer_step"]:
            monitor.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Shows validation batches to the monitors that compare them."""
        for monitor in self._active:
            monitor.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the panels of the last evaluation, and writes the report."""
        for monitor in self._active:
            monitor.on_train_end(trainer, pl_module)
        if self.stopping is not None and self._stops:
            self.stopping.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the fit."""
        if stage == "fit":
            self.session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the report of a run that was interrupted, and ends the fit."""
        if self.stopping is not None and self._stops:
            self.stopping.on_exception(trainer, pl_module, exception)
        if self._session is not None:
            self._session.end()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the monitors that are attached, and of the stopper."""
        state: dict[str, Any] = {"monitors": {name: self.monitors[name].state_dict() for name in self.attached}}
        return state | ({"stopping": self.stopping.state_dict()} if self.stopping is not None and self._stops else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a checkpoint's state."""
        for name, state in state_dict["monitors"].items():
            if name in self.monitors:
                self.monitors[name].load_state_dict(state)
        if self.stopping is not None and "stopping" in state_dict:
            self.stopping.load_state_dict(state_dict["stopping"])

    def __repr__(self) -> str:
        return representation(self, webhook=without_secret(self.webhook))


def _found_in(batch: Any, reference: Reference) -> tuple[Tensor | None, str]:
    """Data of the reference that was given, or of a batch, and why there are no labels, if there are none."""
    if reference.images is None:
        images, labels = reference.found_in(batch)
        return images, labels.reason
    try:
        reference.classes()
    except ValueError as error:
        return reference.images.images, str(error)
    return reference.images.images, ""


def _check_batch(
    monitor: Monitor[Any, Any], view: ModelView, found_in: Callable[[Reference], tuple[Tensor | None, str]]
) -> None:
    """Raises ValueError where the first batch shows that a monitor cannot work."""
    data, unlabelled = None, ""
    # data show whether latents have a prior, also to monitors that do not need them
    with suppress(*(() if monitor.needs_reference or monitor.needs_labels else (Exception,))):
        data, unlabelled = found_in(view.real)
    if monitor.needs_reference and data is None:
        raise ValueError(f"the batches hold no images or other floating-point data; {view.adapter.images_advice}")
    is_row = monitor.takes_rows and data is not None and (data.ndim == 3 or has_short_rows(data))
    if monitor.needs_images and data is not None and data.ndim not in (4, 5) and not is_row:
        rows = f", or series (N, C, T) or rows (N, F) of at most {LONGEST_ROW:,} features" if monitor.takes_rows else ""
        raise ValueError(
            f"it needs images (N, C, H, W) or volumes (N, C, D, H, W){rows}, and the data are {tuple(data.shape)}"
        )
    if monitor.needs_labels and unlabelled:
        raise ValueError(unlabelled)
