"""Feature components of a generator's regions while it trains, and their pictures."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostics.regional_primitives.mathematics import (
    MAX_REGIONS,
    check_regions,
    decompose,
    importance,
    largest_first,
    memberships,
    minimal_features,
    or_interactions,
)
from lightning_gendiag.diagnostics.regional_primitives.metric import RegionalPrimitives, RegionalPrimitivesResult
from lightning_gendiag.functional import pieces, tensor_of
from lightning_gendiag.monitor import DiagnosticWarning, Monitor, Reading
from lightning_gendiag.regions import RegionMap

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

DEPTH = 4
"""By default the generator is split where its features have a quarter of the image's height, or a little more."""

NUMBERS = 1 << 19
"""Numbers of the images that are optimised together."""

BASELINE = 256
"""Codes over which the baseline is the mean."""

SHOWN = 8
"""Components in the panel."""


class RegionalPrimitivesMonitor(Monitor):
    """Follow :class:`RegionalPrimitives` of a generator or decoder while it trains: what draws which regions together.

    For a few seeded codes the feature at a split point is taken apart into components for sets of regions. On
    TensorBoard: scalars, and a panel with the largest components and what they draw, the image growing component by
    component, the sorted norms, and which regions are drawn together.

    Dear: 2^n features are optimised for each image, seconds to minutes. So it looks every tenth epoch by default, and
    begins no further image once ``max_seconds`` have passed.

    Args:
        split: path of the submodule whose output is taken apart (``"generator.6"``); by default the last layer whose
            features have about a quarter of the image's height.
        regions: (H, W) labels (negative ones do not count), a :class:`RegionMap` or a saved map's path; ``"grid"`` for
            3 x 3 cells; by default found in the reference images.
        num_regions: how many to find.
        max_regions: of more regions than these those that change most from the baseline are kept, and it is said so.
        num_images: codes to an evaluation, over all processes.
        penalty: see :func:`minimal_features`.
        max_steps: see :func:`minimal_features`.
        batch_size: sets that are optimised together, the bound on memory; by default so many that their images have half
            a million numbers: 512 of 32x32, 42 of 3x64x64.
        max_seconds: time budget of an evaluation on each process.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [RegionalPrimitivesMonitor(split="generator.6")]  # of a Trainer
    """

    stem = "regional_primitives"
    needs = ("decode",)
    # a third more or less is no news
    grain = 0.3
    question = "strength of its components"
    labels: Tensor | None
    names: list[str]

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
        max_seconds: float = 60.0,
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
        self.split, self.num_regions, self.max_regions = split, num_regions, max_regions
        self.given_split = split
        self.grid: Literal["grid"] | None = "grid" if isinstance(regions, str) and regions == "grid" else None
        self.labels, self.names = None, []
        if regions is not None and self.grid is None:
            self._take_regions(regions)
        self.num_images, self.penalty, self.max_steps = num_images, penalty, max_steps
        self.batch_size, self.max_seconds = batch_size, max_seconds
        self.needs_regions = regions is None
        self.together = 1
        self._shown: dict[str, Tensor] = {}

    # what is collected from batches is needed only where regions are found in it
    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether regions are found in real images."""
        return self.needs_regions

    def _take_regions(self, regions: RegionMap | Tensor | str) -> None:
        if (
            isinstance(regions, Tensor)
            and regions.ndim == 2
            and not regions.is_floating_point()
            and (regions < 0).any()
        ):
            # a map covers all of an image: here some of it may be left out
            check_regions(regions)
            self.labels = regions.long()
            self.names = [f"region {r}" for r in range(int(regions.max()) + 1)]
            return
        found = RegionMap.of(regions)
        self.labels, self.names = found.labels, list(found.names)

    def check(self, probe: Probe) -> None:
        """The split point must be there, and the decoder must make images."""
        z = next(probe.latents(2, all_ranks=True))
        with probe.looking(parameters=True, exact=True):
            image = probe.decoded_images(z[:1])
            self.together = self.batch_size or max(1, min(512, NUMBERS // image[0].numel()))
            if self.labels is not None and image.shape[2:] != self.labels.shape:
                raise ValueError(
                    f"regions must be {tuple(image.shape[2:])}, as the images are, got {tuple(self.labels.shape)}."
                )
            self.split = self.split or self._found_split(probe, z[:1])
            self._feature(probe, z[:1])

    def forget(self) -> None:
        """The layer, too, if it was found."""
        super().forget()
        self.split = self.given_split

    # ---- the generator in two halves ----

    def _found_split(self, probe: Probe, z: Tensor) -> str:
        """The last layer of those with the smallest features that have a quarter of the image's height or more."""
        seen: list[tuple[str, int]] = []
        handles = [
            part.register_forward_hook(partial(_note_height, seen, name.replace("_orig_mod.", "")))
            for name, part in probe.module.named_modules()
            if name and not list(part.children())
        ]
        try:
            height = tensor_of(probe.decoder(z), 1).shape[2]
        finally:
            for handle in handles:
                handle.remove()
        tall = [(name, h) for name, h in seen if height / DEPTH <= h < height]
        if not tall:
            middle = repr(seen[len(seen) // 2][0]) if seen else "..."
            raise ValueError(
                "split must be given for a decoder without a layer whose features have a quarter of the image's height. "
                f"To fix this, pass RegionalPrimitivesMonitor(split={middle}), or the path of another layer."
            )
        least = min(h for _, h in tall)
        return [name for name, h in tall if h == least][-1]

    def _split_module(self, probe: Probe) -> nn.Module:
        target: Any = probe.module
        for name in str(self.split).split("."):
            target = getattr(getattr(target, "_orig_mod", target), name, None)
        if not isinstance(target, nn.Module):
            known = ", ".join(name for name, _ in probe.module.named_children())
            raise ValueError(
                f"split must be the path of a submodule of {type(probe.module).__name__}, got {self.split!r}. "
                f"Its children are {known}."
            )
        inner = getattr(target, "_orig_mod", target)
        assert isinstance(inner, nn.Module)
        return inner

    def _feature(self, probe: Probe, z: Tensor) -> Tensor:
        """Features (n, ...) at the split for codes (n, L)."""
        heard: list[Any] = []
        handle = self._split_module(probe).register_forward_hook(lambda module, inputs, output: heard.append(output))
        try:
            probe.decoder(z)
        finally:
            handle.remove()
        if not heard or not isinstance(heard[0], Tensor) or len(heard[0]) != len(z):
            got = type(heard[0]).__name__ if heard else "no call of it"
            raise ValueError(
                f"split must name a module that the decoder runs and that gives a tensor (N, ...), got {got}."
            )
        return heard[0].detach()

    @contextmanager
    def _tail(self, probe: Probe, z: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """A callable from features (n, ...) to images, the rest of the code ``z`` (1, L) held.

        The first call of the split module gets them in the place of its output, others are left alone.
        """
        given: list[Tensor] = []
        handle = self._split_module(probe).register_forward_hook(
            lambda module, inputs, output: given.pop() if given else None
        )

        def tail(features: Tensor) -> Tensor:
            given[:] = [features]
            return tensor_of(probe.decoder(z.expand(len(features), -1)), len(features))

        try:
            yield tail
        finally:
            handle.remove()

    # ---- one evaluation ----

    def build(self, probe: Probe) -> RegionalPrimitives:
        """Find the regions, or take the most important ones."""
        if self.labels is None and self.grid is None:
            self._take_regions(self.found_regions(probe, self.num_regions, 1000))
        z = next(probe.latents(8, all_ranks=True))
        with probe.looking(exact=True):
            if self.labels is None:
                height, width = tensor_of(probe.decoder(z[:1]), 1).shape[2:]
                self.labels = grid(height, width)
                self.names = [f"row {r // 3 + 1}, column {r % 3 + 1}" for r in range(9)]
            if len(self.names) > self.max_regions:
                self._keep_important(probe, z)
        return RegionalPrimitives(len(self.names))

    def _keep_important(self, probe: Probe, z: Tensor) -> None:
        assert self.labels is not None
        features = self._feature(probe, z)
        shares = torch.zeros(len(self.names), device=features.device)
        for code, feature in zip(z, features, strict=True):
            with self._tail(probe, code[None]) as tail:
                shares += importance(tail, feature, features.mean(0), self.labels)
        kept = shares.topk(self.max_regions).indices.sort().values.tolist()
        left = len(self.names) - len(kept)
        table = torch.full((len(self.names) + 1,), -1, dtype=torch.long)
        table[torch.tensor(kept)] = torch.arange(len(kept))
        self.labels, self.names = table[self.labels], [self.names[r] for r in kept]
        warnings.warn(
            f"of {left + len(kept)} regions the {len(kept)} that change most are looked at, for 2^n sets are optimised",
            DiagnosticWarning,
            stacklevel=2,
        )

    def feed(self, probe: Probe, step: int) -> None:
        """Take apart this rank's images."""
        assert self.metric is not None
        assert self.labels is not None
        rank, world = probe.trainer.global_rank, probe.trainer.world_size
        begun = time.monotonic()
        with probe.looking(exact=True):
            codes = torch.cat(list(probe.latents(max(BASELINE, self.num_images), all_ranks=True)))
            baseline = torch.cat([self._feature(probe, some) for some in pieces(codes, 64)]).mean(0)
            for number in range(rank, self.num_images, world):
                if number >= world and time.monotonic() - begun > self.max_seconds:
                    break
                code = codes[number : number + 1]
                feature = self._feature(probe, code)[0]
                with self._tail(probe, code) as tail:
                    # from nothing each time: from where the last look ended, components that are gone linger
                    minimal = minimal_features(
                        tail, feature, baseline, self.labels, penalty=self.penalty, max_steps=self.max_steps,
                        batch_size=self.together,
                    )  # fmt: skip
                    found = decompose(tail, feature, self.labels, minimal, self.together)
                    self.metric.update(*found)
                    if number == 0 and self.draw_pictures:
                        self._shown = _pictures(tail, feature, or_interactions(minimal.features), found.norms)

    def readings(self, result: RegionalPrimitivesResult) -> dict[str, Reading]:
        """Each region by the strength of its components and by their leakage."""
        readings = {}
        for name, strength, leakage in zip(self.names, result.strength.tolist(), result.leakage.tolist(), strict=True):
            readings[name] = Reading(strength, -math.log(max(strength, 1e-6)) if strength == strength else math.nan)
            readings[f"{name} outside"] = Reading(
                leakage,
                math.log(leakage + 0.1) if leakage == leakage else math.nan,
                "other",
                where=f"the components of {name}",
                question="share of their effect outside their regions",
                fault="leak into the rest of the image",
            )
        whole = float(result.strength.mean())
        readings["image"] = Reading(whole, -math.log(max(whole, 1e-6)) if whole == whole else math.nan, "whole")
        return readings

    def kept(self) -> dict[str, Any]:
        """The regions, and where features are split."""
        return {"labels": self.labels, "names": list(self.names), "split": self.split}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`."""
        self.labels, self.names, self.split = state["labels"], list(state["names"]), state["split"]

    # ---- pictures ----

    def draw(self, result: RegionalPrimitivesResult, board: Board) -> None:
        """Charts, table and panel."""
        n = len(self.names)
        board.chart("strength of every region", "Multiline", [f"strength_{r}" for r in range(n)])
        board.chart("leakage of every region", "Multiline", [f"leakage_{r}" for r in range(n)])
        board.text("components", self._table(result))
        board.picture("panel", self._panel(result, board.step, []))

    def _said(self, mask: int) -> str:
        return " + ".join(name for r, name in enumerate(self.names) if mask >> r & 1)

    def _table(self, result: RegionalPrimitivesResult) -> str:
        outside = (result.effects * ~result.members).sum(1) / result.effects.sum(1)
        rows = [
            f"| {self._said(mask)} | {float(result.norms[mask]):.3f} | {float(outside[mask]):.0%} |"
            for mask in result.order[:16].tolist()
        ]
        head = [f"Features of `{self.split}`.", "", "| component | norm | of its effect outside |", "|---|---|---|"]
        return "\n".join(head + rows)

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The panel with the regions marked."""
        marked = [r for r, name in enumerate(self.names) if {name, f"{name} outside"} & set(finding.names)]
        board.picture("picture", self._panel(self.result, finding.step, marked, str(finding)))

    def _panel(self, result: RegionalPrimitivesResult, step: int, marked: list[int], note: str = "") -> Tensor:
        assert self.labels is not None
        tiles = []
        if self._shown:
            tiles.append(panels.Tile("image, baseline, largest alone", self._largest(marked)))
            tiles.append(panels.Tile("with 0, 1, 2, 4 ... components", panels.contact_sheet(self._shown["growth"])))
        norms = result.norms[result.order].tolist()
        tiles.append(
            panels.Tile(
                "norms, sorted", panels.bars(norms[:64], [""] * len(norms[:64]), [False] * len(norms[:64]), floor=0.0)
            )
        )
        tiles.append(panels.Tile("drawn together (regions)", panels.matrix(result.together.cpu(), most=1.0)))
        count, leak = f"{float(result.components):.0f}", result.leakage
        worst = int(leak.nan_to_num(-1.0).argmax())
        pair = int(result.together.argmax())
        i, j = pair // len(self.names), pair % len(self.names)
        rows = [
            panels.Row(panels.INK, f"most together: {self.names[i]} and {self.names[j]}, {float(result.together[i, j]):.0%}"),
            panels.Row(panels.INK, f"most leakage: {self.names[worst]}, {float(leak[worst]):.0%} outside"),
        ]  # fmt: skip
        if float(result.converged) < 0.9:
            rows.append(panels.Row(panels.FAINT, f"{float(result.converged):.0%} of the optimisations converged"))
        title = f"{count} of {len(norms)} components carry nine tenths (step {step})"
        return panels.panel(title, tiles, rows, note)

    def _largest(self, marked: list[int]) -> Tensor:
        """Image, baseline and what the largest components draw, each with its regions outlined."""
        assert self.labels is not None
        low, high = float(self._shown["images"].min()), float(self._shown["images"].max())
        cells = []
        for picture, mask in zip(self._shown["images"], self._shown["masks"].tolist(), strict=True):
            size = panels.TILE // 3 - 2
            image = panels.enlarged(panels.as_rgb(picture, low, high), size)
            labels = panels.enlarged_labels(self.labels.cpu(), size)
            inside = memberships(len(self.names))[mask]
            own = torch.where(labels >= 0, inside[labels.clamp(min=0)].long(), 0)
            colour = panels.ALARM if any(inside[r] for r in marked) else panels.REGION_COLOURS[1]
            if mask:
                image[panels.edges(own, 1)] = torch.tensor(colour, dtype=torch.uint8)
            cells.append(torch.nn.functional.pad(image, (0, 0, 1, 1, 1, 1), value=255))
        rows = [torch.cat(cells[at : at + 3], 1) for at in range(0, len(cells) // 3 * 3, 3)]
        return torch.cat(rows)


def _pictures(
    tail: Callable[[Tensor], Tensor], feature: Tensor, interactions: Tensor, norms: Tensor
) -> dict[str, Tensor]:
    """What the panel shows of one image."""
    baseline, order = interactions[0], largest_first(norms)
    first = order[: SHOWN - 1]
    counts = [0, *(2**k for k in range(10) if 2**k < len(order)), len(order)]
    grown = torch.stack([baseline + interactions[order[:count]].sum(0) for count in counts])
    images = tail(torch.cat([feature[None], baseline[None], baseline + interactions[first]])).detach().cpu()
    growth = tail(torch.cat([grown, feature[None]])).detach().cpu()
    width = math.ceil(len(growth) / 3)
    blank = torch.full((3 * width - len(growth), *growth.shape[1:]), float(growth.min()))
    return {
        "images": images,
        "masks": torch.cat([torch.zeros(2, dtype=torch.long), first.cpu()]),
        "growth": torch.cat([growth, blank]).view(3, width, *growth.shape[1:]),
    }


def grid(height: int, width: int, cells: int = 3) -> Tensor:
    """(H, W) labels of cells x cells equal cells, row by row."""
    rows, columns = torch.arange(height) * cells // height, torch.arange(width) * cells // width
    return rows[:, None] * cells + columns


def _note_height(seen: list[tuple[str, int]], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        seen.append((name, output.shape[2] if output.ndim == 4 else 0))
