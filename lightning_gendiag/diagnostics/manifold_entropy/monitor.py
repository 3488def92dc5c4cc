"""Manifold entropies of a decoder while it trains, and their pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostics.manifold_entropy.gram import active_dims, decoder_gram
from lightning_gendiag.diagnostics.manifold_entropy.mathematics import (
    MAX_DIMENSION_TAGS,
    ManifoldEntropyResult,
)
from lightning_gendiag.diagnostics.manifold_entropy.metric import ManifoldEntropy
from lightning_gendiag.functional import tensor_of
from lightning_gendiag.monitor import Monitor, Reading

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

MAX_BYTES = 1 << 26
"""Working memory of an evaluation, about: more than for a call of its own, since it is faster."""

TRAVERSED = 6
"""How many directions are shown in the strip of images, each at seven places."""


class ManifoldEntropyMonitor(Monitor):
    """Follow :class:`ManifoldEntropy` of a decoder while it trains: which latent dimensions it uses, and what they share.

    Works for VAE decoders, flows and GAN generators: ``decode(z)``, ``decoder``, ``generator``, or ``forward`` from
    noise. On TensorBoard: scalars, the spectrum as a histogram over time, and a panel with the sorted spectrum, the
    mutual information of dimensions, what the strongest directions do to an image, and the number of dimensions in use.

    Args:
        num_latents: draws of the prior to an evaluation, over all processes; the same ones each time, so few are enough.
        log_volume: what gives a flow's own ``log |det J|``: the name of a method of the module or a callable
            ``(module, z)``, (N,) from (N, L); by default the Gram matrix does.
        max_dims: of a latent space with more dimensions, only so many are followed: those that move the data most at the
            first evaluation. What is told of these is exact.
        latent_scale: standard deviation of each latent, see :func:`decoder_gram`.
        data_scale: standard deviation that the data were divided by, see :func:`decoder_gram`.
        mode: ``"auto"``, ``"forward"`` or ``"reverse"``, see :func:`decoder_gram`.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [ManifoldEntropyMonitor(every_n_train_steps=500)]  # of a Trainer
    """

    stem = "manifold_entropy"
    needs = ("decode",)
    needs_reference = False
    # a fifth more or less movement is no news
    grain = 0.2
    # nor is a third less that lasts, while a flow learns which directions of the data are noise
    tolerance: ClassVar = {"part": 0.4, "whole": 0.4}
    question = "entropy in nats"

    def __init__(
        self,
        num_latents: int = 32,
        *,
        log_volume: Any = None,
        max_dims: int = 128,
        latent_scale: float = 1.0,
        data_scale: float = 1.0,
        mode: Literal["auto", "forward", "reverse"] = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_latents < 2 or max_dims < 2:
            raise ValueError(f"num_latents and max_dims must be at least 2, got {num_latents} and {max_dims}.")
        if mode not in ("auto", "forward", "reverse"):
            raise ValueError(f"mode must be 'auto', 'forward' or 'reverse', got {mode!r}.")
        self.num_latents, self.log_volume, self.max_dims = num_latents, log_volume, max_dims
        self.latent_scale, self.data_scale, self.mode = latent_scale, data_scale, mode
        self.dims: Tensor | None = None
        self._order: Tensor | None = None
        self._strip: Tensor | None = None

    def check(self, probe: Probe) -> None:
        """One latent must go through the decoder."""
        z = next(probe.latents(2, all_ranks=True))
        with probe.looking(parameters=True, exact=True):
            decoder_gram(probe.decoder, z[:1], dims=torch.zeros(1, dtype=torch.long), mode=self.mode)
        if self.log_volume is not None and not callable(self._volume(probe)):
            raise ValueError(
                f"log_volume must be a callable or name a method of {type(probe.module).__name__}, got {self.log_volume!r}."
            )

    def _volume(self, probe: Probe) -> Any:
        if isinstance(self.log_volume, str):
            return getattr(probe.module, self.log_volume, None)
        return lambda z: self.log_volume(probe.module, z)

    def build(self, probe: Probe) -> ManifoldEntropy:
        """A metric for the dimensions that are followed, all or the most active."""
        z = next(probe.latents(16, all_ranks=True))
        if self.dims is None:
            self.dims = torch.arange(z.shape[1])
            if z.shape[1] > self.max_dims:
                with probe.looking(exact=True):
                    self.dims = active_dims(probe.decoder, z, self.max_dims, seed=probe.seed).cpu()
        if self._order is None:
            # core and detail go by the last evaluation's order, and at first by that of a few latents
            pilot = ManifoldEntropy(len(self.dims))
            with probe.looking(exact=True):
                pilot.update(self._grams(probe, z[:8]).cpu())
            self._order = pilot.compute().order
        return ManifoldEntropy(len(self.dims), order=self._order)

    def forget(self) -> None:
        """The dimensions and their order, too."""
        super().forget()
        self.dims = self._order = None

    def _grams(self, probe: Probe, z: Tensor) -> Tensor:
        return decoder_gram(
            probe.decoder,
            z,
            dims=self.dims,
            latent_scale=self.latent_scale,
            data_scale=self.data_scale,
            mode=self.mode,
            max_bytes=MAX_BYTES,
        )

    def feed(self, probe: Probe, step: int) -> None:
        """This rank's latents, through the decoder in evaluation mode and full precision."""
        assert isinstance(self.metric, ManifoldEntropy)
        assert self._order is not None
        self.metric.order = self._order.to(probe.module.device)
        with probe.looking(exact=True):
            for z in probe.latents(self.num_latents):
                volume = None if self.log_volume is None else self._volume(probe)(z)
                self.metric.update(self._grams(probe, z), volume)
            if self.draw_pictures:
                # on all ranks, since a sharded model talks to the others
                self._strip = self._traverse(probe)

    def readings(self, result: ManifoldEntropyResult) -> dict[str, Reading]:
        """Each dimension's entropy, their mean, and the pair that shares most."""
        assert self.dims is not None
        self._order = result.order.cpu()
        names = [f"dimension {int(i)}" for i in self.dims]
        values = result.entropy.tolist()
        i, j = result.strongest_pair
        shared, mean = float(result.mutual_information[i, j]), float(result.entropy.mean())
        readings = {name: Reading(value, -value) for name, value in zip(names, values, strict=True)}
        readings["all dimensions"] = Reading(mean, -mean, "whole", question="mean entropy of a dimension in nats")
        readings["pair"] = Reading(
            shared, math.log(shared + 0.1) if shared == shared else math.nan, "other",
            where=f"{names[i]} with {names[j]}", question="mutual information in nats", fault="entangled",
        )  # fmt: skip
        return readings

    def shares(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each dimension's part of the fall of their mean entropy."""
        falls = {
            name: before[name] - after[name]
            for name in before
            if name.startswith("dimension ")
            and math.isfinite(before[name])
            and math.isfinite(after.get(name, math.nan))
        }
        total = sum(falls.values())
        return {name: fall / total for name, fall in falls.items()} if total > 0 else {}

    def kept(self) -> dict[str, Any]:
        """Which dimensions are followed, and in what order."""
        return {"dims": self.dims, "order": self._order}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`."""
        self.dims, self._order = state["dims"], state["order"]

    # ---- pictures ----

    def _traverse(self, probe: Probe) -> Tensor | None:
        """(d, 7, C, H, W): an image of the prior's mean moved along the strongest directions; None where data are no images."""
        assert self.dims is not None
        assert self._order is not None
        strongest = self.dims[self._order[:TRAVERSED].cpu()]
        z = probe.as_input(torch.zeros(len(strongest), 7, probe.noise_length))
        for row, dim in enumerate(strongest.tolist()):
            z[row, :, dim] = torch.linspace(-2, 2, 7)
        with torch.no_grad():
            images = tensor_of(probe.decoder(z.flatten(0, 1)), z[..., 0].numel())
        return images.view(*z.shape[:2], *images.shape[1:]).cpu() if images.ndim == 4 else None

    def scalars(self, result: ManifoldEntropyResult) -> dict[str, Tensor]:
        """With the latents' own numbers, where some of them are looked at."""
        assert self.dims is not None
        own = {f"dimension_{place}": f"dimension_{i}" for place, i in enumerate(self.dims.tolist())}
        return {own.get(name, name): value for name, value in result.scalars().items()}

    def curve(self, result: ManifoldEntropyResult) -> list[float]:
        """Dimensions in use."""
        return [float(result.effective_dimensions)]

    def draw(self, result: ManifoldEntropyResult, board: Board) -> None:
        """The spectrum over time, the chart of all dimensions, and the panel."""
        assert self.dims is not None
        board.histogram("spectrum", result.entropy)
        if len(self.dims) <= MAX_DIMENSION_TAGS:
            board.chart("every dimension", "Multiline", [f"dimension_{i}" for i in self.dims.tolist()])
        board.chart("dimensions in use", "Multiline", ["effective_dimensions"])
        board.picture("panel", self._panel(result, board.step, []))

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The panel with the dimensions marked."""
        assert self.dims is not None
        words = f"{finding.where} "
        marked = [int(i) for i in self.dims if f"dimension {int(i)} " in words or f"dimension {int(i)}," in words]
        board.picture("picture", self._panel(self.result, finding.step, marked, str(finding)))

    def _panel(self, result: ManifoldEntropyResult, step: int, marked: list[int], note: str = "") -> Tensor:
        assert self.dims is not None
        order = result.entropy.nan_to_num(-1e9).argsort(descending=True, stable=True).cpu()
        dims = self.dims[order].tolist()
        i, j = result.strongest_pair
        alarmed = [dim in marked for dim in dims]
        tiles = [
            panels.Tile(
                "entropy of each dimension, sorted",
                panels.bars(result.entropy.cpu()[order].tolist(), [str(dim) for dim in dims], alarmed),
            ),
            panels.Tile(
                "mutual information, same order",
                panels.matrix(result.mutual_information.cpu()[order][:, order], most=1.0),
            ),
        ]
        if self._strip is not None:
            tiles.append(panels.Tile("strongest directions, -2 to 2", panels.contact_sheet(self._strip)))
        tiles.append(
            panels.Tile(
                "dimensions in use",
                panels.line([row[1] for row in self._curve], [int(row[0]) for row in self._curve], len(dims)),
            )
        )
        dead = [str(int(dim)) for dim, gone in zip(self.dims, result.dead.tolist(), strict=True) if gone]
        rows = [
            panels.Row(panels.INK, f"total correlation {float(result.total_correlation):.2f} nats"),
            panels.Row(
                panels.INK,
                f"most shared: {int(self.dims[i])} with {int(self.dims[j])}, {float(result.mutual_information[i, j]):.2f} nats",
            ),
        ]
        if dead:
            shown = ", ".join(dead[:12]) + (f" and {len(dead) - 12} more" if len(dead) > 12 else "")
            rows.insert(0, panels.Row(panels.ALARM, f"dead: {shown}", strong=True))
        title = f"{float(result.effective_dimensions):.1f} of {len(dims)} latent dimensions are in use (step {step})"
        return panels.panel(title, tiles, rows, note)
