"""Latent regions while a model trains: what each kind of point decodes to, and its pictures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostics.latent_regions.mathematics import KINDS, LatentRegionsResult
from lightning_gendiag.diagnostics.latent_regions.metric import LatentRegions
from lightning_gendiag.functional import as_images, pieces, tensor_of
from lightning_gendiag.judges import (
    SKLEARN_MISSING,
    NeighbourClassifier,
    class_of,
    in_chunks,
    judge_of,
    moves,
    space_for,
)
from lightning_gendiag.monitor import Monitor, Reading

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

CHUNK = 128
"""Images or latents that go through the model at a time."""

TO_A_COMPONENT = 32
"""Points inside a component, of which the decoded classes are told."""

SHOWN = 8
"""Decoded images of each kind in the panel."""

PLANE = 58
"""Cells along a side of the class map."""


class LatentRegionsMonitor(Monitor):
    """Follow :class:`LatentRegions` of an encoder and a decoder while they train.

    At each evaluation the reference's latents get a Gaussian mixture; points of each of ``KINDS`` are drawn, decoded and
    compared with the reference by FID and, where labels are known, by inception score and class. The number of
    components, if not given, is chosen anew at the 1st, 2nd, 4th, 8th ... evaluation.

    Needs scikit-learn. All processes do the same work here, apart from the encoding.

    Args:
        components: of the mixture; by default chosen by the Bayesian information criterion.
        num_points: of each kind.
        features: what gives features (n, F) for the FID: a module, or a callable ``(module, images)``; by default a
            :class:`~lightning_gendiag.judges.FeatureNetwork` fitted on the reference.
        classifier: what gives scores (n, K) or labels: a module, or a callable ``(module, images)``; by default the
            nearest neighbours in the reference.
        max_components: see :class:`LatentRegions`.
        max_rows: see :class:`LatentRegions`.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [LatentRegionsMonitor(every_n_epochs=5)]  # of a Trainer
    """

    stem = "latent_regions"
    needs = ("encode", "decode")
    question = "standard deviation of the latents"

    def __init__(
        self,
        components: int | None = None,
        *,
        num_points: int = 500,
        features: Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        classifier: Callable | None = None,  # type: ignore[type-arg]
        max_components: int = 12,
        max_rows: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_points < 10:
            raise ValueError(f"num_points must be at least 10, got {num_points}.")
        LatentRegions(components, max_components=max_components, max_rows=max_rows)
        self.components, self.max_components, self.max_rows = components, max_components, max_rows
        self.num_points, self.features, self.classifier = num_points, features, classifier
        self._chosen: int | None = None
        self._featurize: Callable[[Tensor], Tensor] | None = None
        self._classify: NeighbourClassifier | Callable[[Tensor], Any] | None = None
        self._real: Tensor | None = None
        self._points: list[Tensor] = []
        self._sheet: Tensor | None = None

    def check(self, probe: Probe) -> None:
        """scikit-learn must be there, and the decoder make images."""
        try:
            import sklearn  # noqa: F401
        except ImportError as error:
            raise ValueError(SKLEARN_MISSING.format(who="a Gaussian mixture")) from error
        try:
            z = next(probe.latents(2, all_ranks=True))
        except ValueError:
            # how long latents are is seen in those of the first images
            return
        with probe.looking(parameters=True, exact=True):
            probe.decoded_images(z)

    def build(self, probe: Probe) -> LatentRegions:
        """Judges and a metric, once the reference is there."""
        assert probe.reference is not None
        images, labels = probe.reference
        device = probe.module.device
        self._featurize = judge_of(self.features or probe.feature_network, probe)
        assert self._featurize is not None
        self._classify = judge_of(self.classifier, probe)
        if self._classify is None and labels is not None:
            judge = self._featurize
            space = space_for(images, lambda some: in_chunks(judge, some.to(device)).cpu())
            with probe.looking(exact=True):
                self._classify = NeighbourClassifier(images, labels, space, accuracy=False)
        with probe.looking(exact=True):
            self._real = torch.cat([self._featurize(as_images(some).to(device)) for some in pieces(images, CHUNK)])
        return LatentRegions(self.components, max_components=self.max_components, max_rows=self.max_rows)

    def moves(self, probe: Probe) -> bool:
        """Whether the reference's features change with the module."""
        return moves(self.features, probe)

    def forget(self) -> None:
        """The number of components, too."""
        super().forget()
        self._chosen = None

    def feed(self, probe: Probe, step: int) -> None:
        """Latents of this rank's share of the reference."""
        assert isinstance(self.metric, LatentRegions)
        number = self.evaluations + 1
        anew = number & (number - 1) == 0 or self._chosen is None
        self.metric.components = self.components or (None if anew else self._chosen)
        for part in probe.encoded(step):
            self.metric.update(probe.codes_in(part.output, part.size), part.labels)

    def follow(self, probe: Probe, result: LatentRegionsResult) -> LatentRegionsResult:
        """The result with the quality of what each kind of point decodes to."""
        self._chosen = len(result.weights) or None
        generator = torch.Generator().manual_seed(probe.seed)
        fid, inception = result.fid.clone(), result.inception.clone()
        sheet = []
        with probe.looking(exact=True):
            self._points = [result.sample(kind, self.num_points, generator) for kind in KINDS]
            for k, points in enumerate(self._points):
                images = self._decoded(probe, points)
                sheet.append(images[:SHOWN].cpu())
                # a distance of fewer points than features says little
                if len(images) >= self.num_points // 2:
                    fid[k] = self._fid(images)
                    inception[k] = self._inception(images)
            shares = result.decoded_share.clone()
            for k in range(len(result.weights)):
                images = self._decoded(probe, result.sample("cluster", TO_A_COMPONENT, generator, component=k))
                if len(images) and shares.shape[1]:
                    told = self._scores(images, result.classes.cpu()).argmax(1)
                    shares[k] = torch.bincount(told, minlength=shares.shape[1]).to(shares) / len(told)
        if self.draw_pictures and probe.trainer.is_global_zero:
            self._sheet = _rows_of(sheet)
        return result._replace(fid=fid, inception=inception, decoded_share=shares)

    def _decoded(self, probe: Probe, points: Tensor) -> Tensor:
        """Finite images of points; on the module's device."""
        assert probe.reference is not None
        z = probe.as_input(points)
        if not len(z):
            return as_images(probe.reference.images[:0]).to(z.device)
        images = torch.cat([tensor_of(probe.decoder(some), len(some)) for some in pieces(z, CHUNK)])
        images = as_images(images, "decoded images")
        return images[images.flatten(1).isfinite().all(1)].float()

    def _fid(self, images: Tensor) -> Tensor:
        from torchmetrics.image.fid import FrechetInceptionDistance

        assert self._featurize is not None
        assert self._real is not None
        fid = FrechetInceptionDistance(_Given(self._real.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
        fid.update(self._real.double().cpu(), real=True)
        fid.update(in_chunks(self._featurize, images).double().cpu(), real=False)
        distance: Tensor = fid.compute()
        return distance

    def _inception(self, images: Tensor) -> Tensor:
        from torchmetrics.image.inception import InceptionScore

        scores = self._scores(images, None)
        if scores is None:
            return torch.full((), math.nan)
        with warnings.catch_warnings():
            # that it keeps all features, and that one split has no spread, is no matter here
            warnings.simplefilter("ignore")
            score = InceptionScore(_Given(scores.shape[1]), splits=1, sync_on_compute=False)
            # it takes logits
            score.update(scores.clamp(min=1e-6).log())
            value: Tensor = score.compute()[0]
        return value

    def _scores(self, images: Tensor, classes: Tensor | None) -> Any:
        """(n, K) probabilities of classes on the CPU; only of the classes given, if any; None without a classifier."""
        if self._classify is None:
            return None
        if isinstance(self._classify, NeighbourClassifier):
            probabilities = self._classify.probabilities(images)
            known = torch.from_numpy(self._classify.model.classes_)
            return probabilities if classes is None else probabilities[:, torch.isin(known, classes)]
        with torch.no_grad():
            output = torch.cat([_scored(self._classify(some), len(some)) for some in pieces(images, CHUNK)]).cpu()
        return output if classes is None else output[:, classes]

    def readings(self, result: LatentRegionsResult) -> dict[str, Reading]:
        """Whether the latents are one point."""
        spread = float(result.spread)
        words = f"the latents collapsed: all images have one code, their standard deviation is {spread:.1g}"
        return {"latents": Reading(spread, math.inf if result.collapsed else 0.0, "other", words=words)}

    def kept(self) -> dict[str, Any]:
        """The number of components."""
        return {"components": self._chosen}

    def take_up(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`kept`."""
        self._chosen = state["components"]

    # ---- pictures ----

    def draw(self, result: LatentRegionsResult, board: Board) -> None:
        """Charts, table and panel."""
        board.chart("FID of each kind of point", "Multiline", [f"fid_{kind}" for kind in KINDS])
        board.chart("overlap of components", "Multiline", ["overlap", "grey_share"])
        board.text("components", self._table(result))
        board.picture("panel", self._panel(result, board.step))

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The panel."""
        board.picture("picture", self._panel(self.result, finding.step, str(finding)))

    def _table(self, result: LatentRegionsResult) -> str:
        lines = ["| component | weight | classes of its latents | decodes to |", "|---|---|---|---|"]
        classes = result.classes.tolist()
        for k, weight in enumerate(result.weights.tolist()):
            held, made = (_listed(classes, part[k].tolist()) for part in (result.class_share, result.decoded_share))
            lines.append(f"| {k} | {weight:.1%} | {held} | {made} |")
        if len(classes) and float(result.grey_share) > 0:
            lines.append(f"\nIn the grey area: {_listed(classes, result.grey_classes.tolist(), least=0.01)}.")
        return "\n".join(lines)

    def _panel(self, result: LatentRegionsResult, step: int, note: str = "") -> Tensor:
        assert isinstance(self.metric, LatentRegions)
        latents, labels = (part.cpu() for part in self.metric.kept())
        finite = latents.isfinite().all(1)
        latents, labels = latents[finite].double(), labels[finite]
        axes, centre = _plane(result)
        spots = [(point - centre) @ axes for point in (latents, *self._points[2:])]
        reach = float(spots[0].abs().quantile(0.995)) * 1.15 if len(latents) else 1.0
        rings = [
            (axes.T @ (m - centre), axes.T @ c @ axes)
            for m, c in zip(result.means.cpu(), result.covariances.cpu(), strict=True)
        ]
        plane = panels.Scatter(reach or 1.0)
        plane.points(spots[0], [panels.region_colour(int(c)) if c >= 0 else panels.FAINT for c in labels], 1)
        for mean, covariance in rings:
            plane.ring(mean, covariance)
        for z, colour in zip(spots[1:], (panels.ALARM, panels.INK), strict=True):
            plane.points(z[:120], [colour] * len(z[:120]), 2)
        tiles = [panels.Tile("margins red, grey area black", plane.picture())]
        if len(labels) and (labels >= 0).any():
            tiles.append(panels.Tile("nearest class", self._map(latents, labels, axes, centre, reach or 1.0)))
        if self._sheet is not None:
            tiles.append(panels.Tile(f"decoded: {', '.join(KINDS)}", panels.contact_sheet(self._sheet)))
        values = result.fid.tolist()
        worse = [bool(value > 1.2 * values[0]) for value in values]
        tiles.append(panels.Tile("FID of each kind", panels.bars(values, list(KINDS), worse, floor=0.0)))
        gaps = [
            f"{kind} {value / values[0]:.1f} times"
            for kind, value in zip(KINDS[2:], values[2:], strict=True)
            if value == value
        ]
        rows = [
            panels.Row(
                panels.INK,
                f"{len(result.weights)} components with {len(result.margins)} margins; {float(result.overlap):.0%} overlap",
            )
        ]
        if gaps:
            rows.append(panels.Row(panels.INK, f"FID against the prior's: {', '.join(gaps)}"))
        grey = [
            (float(share), int(c)) for c, share in zip(result.classes, result.grey_classes, strict=True) if share > 0.05
        ]
        if grey:
            named = ", ".join(f"{c} ({share:.0%})" for share, c in sorted(grey, reverse=True)[:5])
            rows.append(panels.Row(panels.INK, f"in the grey area: class {named}"))
        if result.collapsed:
            title = "All images have one code"
        else:
            worst = max(range(4), key=lambda k: values[k] if values[k] == values[k] else -1.0)
            title = f"Points of the {KINDS[worst]} decode worst" if values[worst] == values[worst] else "Latent regions"
        return panels.panel(f"{title} (step {step})", tiles, rows, note)

    def _map(self, latents: Tensor, labels: Tensor, axes: Tensor, centre: Tensor, reach: float) -> Tensor:
        """The plane coloured by the class of the nearest latents."""
        places = torch.linspace(-reach, reach, PLANE, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(places, places.flip(0), indexing="xy"), -1).flatten(0, 1)
        known = labels >= 0
        neighbours = NeighbourClassifier(latents[known][:, :, None, None].float(), labels[known], accuracy=False)
        told = neighbours((centre + grid @ axes.T).float()[:, :, None, None])
        colours = torch.tensor([panels.region_colour(int(c)) for c in told], dtype=torch.uint8)
        return panels.enlarged(colours.view(PLANE, PLANE, 3))


class _Given(nn.Module):
    """Features that were computed already, for torchmetrics' metrics, which call a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """As they are; zeros for the image with which some versions ask how many there are."""
        return features if features.ndim == 2 else torch.zeros(len(features), self.num_features)


def _scored(output: Any, n: int) -> Tensor:
    """Probabilities (n, K) in what a classifier returns, which must be scores here."""
    class_of(output, n)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if output.ndim != 2:
        raise ValueError(f"classifier must return ({n}, K) scores here, got labels of shape {tuple(output.shape)}.")
    inside = bool((output >= 0).all()) and torch.allclose(output.sum(1), torch.ones(n, device=output.device), atol=1e-3)
    scores: Tensor = output.float()
    return scores if inside else scores.softmax(1)


def _plane(result: LatentRegionsResult) -> tuple[Tensor, Tensor]:
    """Axes (D, 2) of the plane that is shown, and its centre (D,): the first two dimensions, or principal components."""
    means, dims = result.means.cpu(), result.means.shape[1]
    if len(means) == 0 or dims <= 2:
        axes = torch.eye(dims, 2, dtype=torch.float64)
        return axes, torch.zeros(dims, dtype=torch.float64)
    centre = (result.weights.cpu()[:, None] * means).sum(0)
    away = means - centre
    total = (result.weights.cpu()[:, None, None] * (result.covariances.cpu() + away[:, :, None] * away[:, None])).sum(0)
    return torch.linalg.eigh(total)[1][:, -2:].flip(1), centre


def _rows_of(sheet: list[Tensor]) -> Tensor | None:
    """(4, 8, C, H, W), blank where a kind has too few points."""
    some = next((images for images in sheet if len(images)), None)
    if some is None:
        return None
    low = min(float(images.min()) for images in sheet if len(images))
    rows = torch.full((len(sheet), SHOWN, *some.shape[1:]), low)
    for row, images in zip(rows, sheet, strict=True):
        row[: len(images)] = images
    return rows


def _listed(classes: list[int], shares: list[float], least: float = 0.1) -> str:
    """The classes that matter, the largest first."""
    some = sorted(((share, c) for c, share in zip(classes, shares, strict=True) if share >= least), reverse=True)
    return ", ".join(f"{c} ({share:.0%})" for share, c in some[:5]) or "-"
