"""The cosines of a generator's samples while it trains, and their pictures."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostics.cosine_mean_similarity.mathematics import (
    Bandwidth,
    CosineMeanSimilarityResult,
    check_bandwidth,
    check_shape,
)
from lightning_gendiag.diagnostics.cosine_mean_similarity.metric import CosineMeanSimilarity
from lightning_gendiag.functional import as_images
from lightning_gendiag.monitor import DiagnosticWarning, Monitor, Reading
from lightning_gendiag.regions import RegionMap

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe


class CosineMeanSimilarityMonitor(Monitor):
    """Follow :class:`CosineMeanSimilarity` of a generator's samples, region by region, while it trains.

    On TensorBoard: a curve for each region, one chart with all of them and one with the worst, middle and best
    (Custom Scalars), the region map, and a panel of the mean real and mean generated image beside the regions'
    distances from real in real-against-real standard deviations.

    Args:
        regions: (H, W) labels, a :class:`RegionMap` or a saved map's path; by default found in the reference images.
        num_regions: how many to find; None lets the data choose.
        bandwidth: see :func:`cosine_mean_similarity`.
        unbiased: see :func:`cosine_mean_similarity`.
        per_class: compare within classes too, where the probe is conditional and batches have labels.
        map_images: at most this many reference images are looked at to find regions.
        null_splits: seeded splits of the reference in halves for the real-against-real null.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [CosineMeanSimilarityMonitor(num_regions=5, every_n_epochs=2)]  # of a Trainer
    """

    stem = "cms"
    needs = ("sample",)
    # a quarter more or less of the distance from 1 is no news: in a GAN it comes and goes by as much
    grain = 0.25
    question = "cosine mean similarity"

    def __init__(
        self,
        regions: RegionMap | Tensor | str | None = None,
        num_regions: int | None = 5,
        bandwidth: Bandwidth = "region",
        unbiased: bool = True,
        *,
        per_class: bool = False,
        map_images: int = 1000,
        null_splits: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_bandwidth(bandwidth)
        if null_splits < 2:
            raise ValueError(f"null_splits must be at least 2, got {null_splits}.")
        self.region_map = None if regions is None else RegionMap.of(regions)
        self.num_regions, self.bandwidth, self.unbiased = num_regions, bandwidth, unbiased
        self.per_class, self.map_images, self.null_splits = per_class, map_images, null_splits
        self._map_drawn = False

    _real: tuple[Tensor, float, float]
    """Mean real image, and the values that are drawn black and white."""

    def check(self, probe: Probe) -> None:
        """Two samples must have the size that the map, and the reference if it was given, have."""
        if self.per_class and not probe.conditional:
            raise ValueError(
                "per_class must go with a sampler that takes labels. "
                "To fix this, pass Probe(sample=lambda module, n, labels: ..., conditional=True)."
            )
        sampled = probe.try_out().images
        if self.region_map is not None:
            check_shape(sampled, "generated", self.region_map, None)
        if probe.reference is not None:
            held = probe.reference.images
            if self.region_map is not None:
                check_shape(held, "the reference", self.region_map, None)
            if held.shape[1:] != sampled.shape[1:]:
                raise ValueError(
                    f"generated must have the reference's shape {tuple(held.shape[1:])}, got {tuple(sampled.shape[1:])}. "
                    "To fix this, pass Probe(sample=...) or Probe(images=...) that bring both to one size."
                )

    def build(self, probe: Probe) -> CosineMeanSimilarity:
        """Find the regions once, for all ranks, and take in the reference."""
        assert probe.reference is not None
        if self.region_map is None:
            self.region_map = self.found_regions(probe, self.num_regions, self.map_images)
        labels = probe.reference.labels
        classes = int(labels.max()) + 1 if self.per_class and labels is not None else None
        metric = CosineMeanSimilarity(
            self.region_map, self.bandwidth, self.unbiased, num_classes=classes, null_splits=self.null_splits,
            reset_real_features=False,
        ).to(probe.module.device)  # fmt: skip
        real = probe.real_share()
        metric.update(real.images.to(probe.module.device), real=True, labels=_to(real.labels, probe.module.device))
        images = as_images(probe.reference.images)
        least, most = images.amin(0), images.amax(0)
        self._real = images.mean(0), float(least.min()), float(most.max())
        varies = (most > least).any(0)
        still = [name for r, name in enumerate(self.region_map.names) if not varies[self.region_map.mask(r)].any()]
        if still:
            warnings.warn(
                f"the reference images never vary in {', '.join(still)}: there any variation of the model counts",
                DiagnosticWarning,
                stacklevel=2,
            )
        return metric

    def feed(self, probe: Probe, step: int) -> None:
        """This rank's samples."""
        assert self.metric is not None
        drawn = probe.samples(step)
        self.metric.update(drawn.images, real=False, labels=drawn.labels)
        finite = drawn.images[drawn.images.flatten(1).isfinite().all(1)]
        self._mean_generated = finite.mean(0) if len(finite) else drawn.images.new_zeros(drawn.images.shape[1:])

    def readings(self, result: CosineMeanSimilarityResult) -> dict[str, Reading]:
        """Regions and image by their distance from 1, on a log scale that ends where real images differ."""
        assert self.region_map is not None
        values = [*result.regions.tolist(), float(result.image)]
        floors = [3 * std if std == std else 1e-3 for std in result.null_std.tolist()]
        badness = [
            math.log(max(1 - value, 0.0) + floor) if value == value else math.nan
            for value, floor in zip(values, floors, strict=True)
        ]
        # a single sample with nan is news, and no fluctuation
        invalid = float(result.invalid)
        return {
            **{name: Reading(values[r], badness[r]) for r, name in enumerate(self.region_map.names)},
            "image": Reading(values[-1], badness[-1], "whole"),
            "samples": Reading(
                invalid,
                0.0 if invalid == 0 else math.inf,
                "other",
                words=f"samples collapsed: share with nan or inf is {invalid:.1%}",
            ),
        }

    def shares(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Each region's part of the fall of the regions' product, which is the image's where they are independent."""
        assert self.region_map is not None
        falls = {
            name: math.log(max(before[name], 1e-12)) - math.log(max(after[name], 1e-12))
            for name in self.region_map.names
            if math.isfinite(before[name]) and math.isfinite(after[name])
        }
        total = sum(falls.values())
        return {name: fall / total for name, fall in falls.items()} if total > 0 else {}

    def kept(self) -> dict[str, Any]:
        """The map, which must not change under a run."""
        return {"regions": None if self.region_map is None else self.region_map.state_dict()}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`; a map that the user gives now wins."""
        if self.region_map is None and state["regions"] is not None:
            self.region_map = RegionMap.from_state_dict(state["regions"])
        if self.region_map is not None and any(len(row) != self.region_map.num_regions + 1 for row in self._curve):
            self._curve = []

    # ---- pictures ----

    def curve(self, result: CosineMeanSimilarityResult) -> list[float]:
        """Each region's."""
        return result.regions.tolist()

    def draw(self, result: CosineMeanSimilarityResult, board: Board) -> None:
        """The map once, the panel each time."""
        assert self.region_map is not None
        names = [f"region_{r}" for r in range(self.region_map.num_regions)]
        board.chart("every region", "Multiline", names)
        board.chart("worst, middle and best region", "Margin", ["median", "worst", "best"])
        if not self._map_drawn:
            self._map_drawn = True
            board.picture("regions", self._map_panel())
            board.text("regions", self._map_table())
        board.picture("panel", self._panel(result, board))

    def _map_panel(self) -> Tensor:
        regions = self.region_map
        assert regions is not None
        labels = panels.enlarged_labels(regions.labels)
        colours = [panels.region_colour(r) for r in range(regions.num_regions)]
        grey = panels.enlarged(panels.as_rgb(*self._real))
        rows = [
            panels.Row(
                colours[r],
                f"{r}  {name}: {int(regions.sizes[r]) / regions.labels.numel():.0%} of the image"
                + (f", CKA within {regions.alignment[r, r]:.2f}" if not regions.alignment[r, r].isnan() else ""),  # type: ignore[index]
            )
            for r, name in enumerate(regions.names)
        ]
        note = ""
        if not math.isnan(regions.dependence):
            note = f"mean CKA between regions {regions.dependence:.2f} (0 independent, 1 the same)"
        if not math.isnan(regions.stability):
            note += f"; maps of two halves of the images agree at {regions.stability:.2f} (1 the same, 0 by chance)"
        return panels.panel(
            f"{regions.num_regions} regions of the image",
            [
                panels.Tile("regions", panels.filled(labels, colours, [str(r) for r in range(regions.num_regions)])),
                panels.Tile("over the mean real image", panels.tinted(grey, labels, colours)),
            ],
            rows,
            note,
        )

    def _map_table(self) -> str:
        regions = self.region_map
        assert regions is not None
        lines = [
            f"**{regions}**",
            "",
            "| scalar | region | pixels | box (top, left, bottom, right) |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| region_{r} | {name} | {int(regions.sizes[r])} | {tuple(regions.boxes[r].tolist())} |"
            for r, name in enumerate(regions.names)
        ]
        return "\n".join(lines)

    def _panel(self, result: CosineMeanSimilarityResult, board: Board) -> Tensor:
        regions, z = self.region_map, result.z.tolist()
        assert regions is not None
        assert self.probe is not None
        labels = panels.enlarged_labels(regions.labels)
        real, low, high = self._real
        far = [-value if value == value else math.inf for value in z]
        worst = max(range(len(far)), key=far.__getitem__)
        values = result.regions.tolist()
        weights = ", averaged weights" if self.probe.averaged else ""
        heats = [panels.heat(value) for value in far]
        steps = [int(row[0]) for row in self._curve]
        history = list(zip(*(row[1:] for row in self._curve), strict=True))
        return panels.panel(
            f"{regions.names[worst]} is furthest from real, at {values[worst]:.3f} (step {board.step}{weights})",
            [
                panels.Tile(
                    "mean real image", panels.outlined(panels.enlarged(panels.as_rgb(real, low, high)), labels)
                ),
                panels.Tile(
                    "mean generated image",
                    panels.outlined(panels.enlarged(panels.as_rgb(self._mean_generated, low, high)), labels, worst),
                ),
                panels.Tile("deviations below real", panels.filled(labels, heats, [f"{value:.0f}" for value in far])),
                panels.Tile("similarity, 1 = as real", panels.curves(history, steps, worst)),
            ],
            [
                panels.Row(
                    panels.ALARM if r == worst else panels.region_colour(r),
                    f"{name}: {values[r]:.3f}, {far[r]:.0f} deviations below real",
                    strong=r == worst,
                )
                for r, name in enumerate(regions.names)
            ],
            f"image {float(result.image):.3f}. A deviation is the spread among real images; dark red is 1000 of them.",
        )

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The mean images with the region outlined."""
        regions = self.region_map
        assert regions is not None
        real, low, high = self._real
        labels = panels.enlarged_labels(regions.labels)
        chosen = next((r for r, name in enumerate(regions.names) if name in finding.names), None)
        tiles = []
        for caption, image in (("mean real image", real), ("mean generated image", self._mean_generated)):
            picture = panels.enlarged(panels.as_rgb(image, low, high))
            if chosen is not None:
                dim = (picture.float() * 0.45 + 255 * 0.55).byte()
                picture = torch.where((labels == chosen)[..., None], picture, dim)
            tiles.append(panels.Tile(caption, panels.outlined(picture, labels, chosen)))
        board.picture("picture", panels.panel(f"{finding.where} collapsed", tiles, note=str(finding)))


def _to(labels: Tensor | None, device: torch.device) -> Tensor | None:
    return None if labels is None else labels.to(device)
