"""All diagnostics that apply to a model, for those who do not want to choose."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_gendiag.board import Board
from lightning_gendiag.budget import budget_of
from lightning_gendiag.diagnostics.cosine_mean_similarity import CosineMeanSimilarityMonitor
from lightning_gendiag.diagnostics.generation_balance import GenerationBalanceMonitor
from lightning_gendiag.diagnostics.k_star import KStarMonitor
from lightning_gendiag.diagnostics.latent_regions import LatentRegionsMonitor
from lightning_gendiag.diagnostics.manifold_entropy import ManifoldEntropyMonitor
from lightning_gendiag.diagnostics.posterior_kl import PosteriorKLMonitor
from lightning_gendiag.diagnostics.regional_primitives import RegionalPrimitivesMonitor
from lightning_gendiag.monitor import Monitor, batch_step, tell
from lightning_gendiag.probe import Probe, images_of, is_kind, shared_probe
from lightning_gendiag.stopping import CollapseStopping

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SKLEARN = ("generation_balance", "latent_regions")
"""Diagnostics that need scikit-learn."""

LABELLED = ("generation_balance", "k_star")
"""Diagnostics that need labels in the batches."""

RARE = {"latent_regions": 5, "regional_primitives": 10}
"""Dear ones look every so many times as often as the others."""


class GenerativeDiagnostics(Callback):
    """Attach every diagnostic that applies to the module, and a stopper; say which, and why not the rest.

    It looks at what the module has: a sampler, an encoder, a decoder, a posterior; and at the first batch: images, labels.
    What is attached are ordinary callbacks of the trainer, with one probe for all. Those of a kind that the trainer has
    already are left alone.

    Args:
        action: of the :class:`CollapseStopping` that is added, unless there is one; None adds none.
        probe: how the module is looked at.
        every_n_epochs: of the monitors; latent regions look a fifth, regional primitives a tenth as often.
        every_n_train_steps: the same in steps.
        num_regions: see :class:`CosineMeanSimilarityMonitor`.
        skip: stems of diagnostics that are not wanted, such as ``("k_star",)``.
        max_share: of the training's time that they may take together after the first look, which sets them up: they look
            as often as it allows, and say so. A run of seconds or minutes is looked at more often with ``None``, which
            also finds more.
        kwargs: for all monitors, as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, where nothing can be looked at.

    Example:
        >>> callbacks = [GenerativeDiagnostics("warn", every_n_epochs=2, skip=("k_star",))]  # of a Trainer

    Attributes:
        attached: stems of what was attached.
        left_out: stem to reason of the rest.
    """

    def __init__(
        self,
        action: Literal["stop", "warn"] | None = "stop",
        *,
        probe: Probe | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        num_regions: int | None = 5,
        skip: tuple[str, ...] = (),
        max_share: float | None = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.given_probe = probe
        self.probe = probe or Probe()
        kinds: dict[str, Callable[..., Monitor]] = {
            "cms": lambda **options: CosineMeanSimilarityMonitor(num_regions=num_regions, **options),
            "generation_balance": GenerationBalanceMonitor,
            "k_star": KStarMonitor,
            "manifold_entropy": ManifoldEntropyMonitor,
            "posterior_kl": PosteriorKLMonitor,
            "latent_regions": LatentRegionsMonitor,
            "regional_primitives": RegionalPrimitivesMonitor,
        }
        unknown = set(skip) - set(kinds)
        if unknown:
            raise ValueError(f"skip must name diagnostics out of {', '.join(kinds)}, got {', '.join(sorted(unknown))}.")
        self.monitors = {
            stem: make(
                probe=self.probe,
                every_n_epochs=every_n_epochs * RARE.get(stem, 1),
                max_share=max_share,
                every_n_train_steps=None if every_n_train_steps is None else every_n_train_steps * RARE.get(stem, 1),
                **kwargs,
            )
            for stem, make in kinds.items()
            if stem not in skip
        }
        self.stopping = None if action is None else CollapseStopping(action)
        self.left_out: dict[str, str] = dict.fromkeys(skip, "it was not wanted")
        self.skipped = tuple(skip)
        self._told = False
        self._trying = 0.0

    @property
    def attached(self) -> list[str]:
        """Stems of what looks at the module."""
        return [stem for stem, monitor in self.monitors.items() if stem not in self.left_out and monitor.enabled]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach what the module has the methods for, before the trainer goes on to the callbacks that follow."""
        if stage != "fit":
            return
        self.left_out = dict.fromkeys(self.skipped, "it was not wanted")
        self._told = False
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for monitor in self.monitors.values():
            if monitor in callbacks:
                # of an earlier fit, maybe of another module
                callbacks.remove(monitor)
        others = [callback for callback in callbacks if isinstance(callback, Monitor)]
        if self.given_probe is None:
            self.probe = shared_probe(trainer, [other.given_probe for other in others if other.given_probe])
        present = {callback.stem for callback in others}
        place = callbacks.index(self) + 1
        for stem, monitor in self.monitors.items():
            monitor.given_probe = self.probe
            try:
                if stem in present:
                    raise ValueError("the trainer has one already")
                if stem in SKLEARN and importlib.util.find_spec("sklearn") is None:
                    raise ValueError("it needs scikit-learn: pip install 'lightning_gendiag[latent]'")
                needs = ("encode",) if stem in ("k_star", "posterior_kl") else monitor.needs
                self.probe.attach(trainer, pl_module, needs)
            except ValueError as reason:
                self.left_out[stem] = str(reason)
                continue
            callbacks.insert(place, monitor)
            place += 1
        self._refuse_if_nothing(trainer, pl_module)
        if self.stopping is not None and not any(isinstance(c, CollapseStopping) for c in callbacks):
            # stoppers come after all others, and before those that write checkpoints
            last = [at for at, c in enumerate(callbacks) if is_kind(c, "EarlyStopping", "Checkpoint")]
            callbacks.insert(last[0] if last else len(callbacks), self.stopping)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let each try what it needs; what cannot work leaves before it can stop the run."""
        started = time.monotonic()
        for stem, monitor in self.monitors.items():
            self._try(trainer, stem, partial(monitor.check, self.probe))
            monitor.checked = True
        self._trying = time.monotonic() - started
        self._refuse_if_nothing(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See in the first batch whether there are images and labels, and what the encoder gives; and say so."""
        if self._told:
            return
        self._told, started = True, time.monotonic()
        images: Tensor | None = None
        # once for all, since a callable of the user's may be dear
        seen = cache(lambda: self.probe.reference or self.probe.seen(batch))

        def found() -> None:
            nonlocal images
            images = images_of(seen()[0])
            if images is None:
                raise ValueError("the batches hold no (N, C, H, W) images; pass Probe(images=lambda batch: ...)")

        def labelled() -> None:
            if seen()[1] is None:
                raise ValueError("the batches hold no labels; pass Probe(labels=lambda batch: ...)")

        for stem, monitor in self.monitors.items():
            if monitor.needs_reference:
                self._try(trainer, stem, found)
            if stem in LABELLED:
                self._try(trainer, stem, labelled)
        if images is not None:
            posterior = self.monitors.get("posterior_kl")
            if isinstance(posterior, PosteriorKLMonitor):
                self._try(trainer, "posterior_kl", partial(posterior.try_out, self.probe, images[:2]))
            self._try(trainer, "k_star", partial(self.probe.try_codes, images[:2]))
            self._try(trainer, "latent_regions", partial(self.probe.try_codes, images[:2], decoded=True))
        self._refuse_if_nothing(trainer, pl_module)
        # trying out belongs to what setting up takes
        budget_of(trainer).pay(self._trying + time.monotonic() - started, ready=False)
        self._tell(trainer)

    def _refuse_if_nothing(self, trainer: Trainer, module: LightningModule) -> None:
        if not any(isinstance(callback, Monitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            reason = self.left_out.get("cms") or next(iter(self.left_out.values()))
            raise ValueError(f"GenerativeDiagnostics found nothing to look at in {type(module).__name__}: {reason}")

    def _try(self, trainer: Trainer, stem: str, attempt: Callable[[], Any]) -> None:
        """Take a monitor away, on all processes, if an attempt fails on any."""
        if self.monitors.get(stem) not in trainer.callbacks:  # type: ignore[attr-defined]
            return
        reason: Exception | str | None = None
        try:
            attempt()
        except Exception as error:
            reason = error
        if not trainer.strategy.reduce_boolean_decision(reason is None, all=True):
            self._detach(trainer, stem, reason or "it failed on another process")

    def _detach(self, trainer: Trainer, stem: str, reason: Exception | str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitor = self.monitors.get(stem)
        if monitor in callbacks:
            callbacks.remove(monitor)
            self.left_out[stem] = str(reason)

    def _tell(self, trainer: Trainer) -> None:
        words = [f"GenerativeDiagnostics looks at {', '.join(self.attached) or 'nothing'}."]
        words += [f"Without {stem}: {reason}" for stem, reason in self.left_out.items()]
        if self.left_out.get("k_star", "").startswith("encode"):
            words.append("Any layer that sees images will do for k*: add KStarMonitor('path.of.a.layer') beside this.")
        rank_zero_info("\n".join(words))
        tell(Board(trainer, batch_step(trainer, epoch_over=False), "gendiag"), "attached", "\n\n".join(words))
