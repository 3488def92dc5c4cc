"""Balance of classes among generated images while a model trains, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostics.generation_balance.metric import COVERED, GenerationBalance, GenerationBalanceResult
from lightning_gendiag.functional import as_images, pieces
from lightning_gendiag.judges import NeighbourClassifier, class_of, in_chunks, judge_of, moves, space_for
from lightning_gendiag.monitor import Monitor, Reading

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

CHUNK = 128
"""Images that the classifier sees together."""

SHOWN = 8
"""Generated images of each class in the panel."""


class GenerationBalanceMonitor(Monitor):
    """Follow :class:`GenerationBalance` while a model trains: which classes it drops, which dominate, which look worst.

    Needs labels in the batches, and scikit-learn for the classifier that it brings.

    Args:
        classifier: what tells the class of generated images: the name of a submodule or method, a module, or a callable
            ``(module, images)``, giving labels (n,) or scores (n, K); by default the nearest neighbours in the
            reference.
        neighbours: of that default.
        space: in which the default compares: ``"pixels"``, ``"features"``, or ``"auto"``: pixels of images of up to
            4,096 numbers.
        features: what gives features (n, F) for the FID of each class: a module that stays as it is, or a callable
            ``(module, images)``, which is asked for the reference's at each look; by default a
            :class:`~lightning_gendiag.judges.FeatureNetwork` fitted on the reference.
        num_classes: K; by default the reference's largest label and one.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [GenerationBalanceMonitor(neighbours=5)]  # of a Trainer
    """

    stem = "generation_balance"
    # a third more or less of a class is no news
    grain = 0.3
    # while a GAN learns a class goes and comes back within some looks
    lasting = 8
    question = "share of generated images"

    def __init__(
        self,
        classifier: str | Callable | None = None,  # type: ignore[type-arg]  # a command line accepts the bare kind only
        *,
        neighbours: int = 3,
        space: Literal["auto", "pixels", "features"] = "auto",
        features: Callable | None = None,  # type: ignore[type-arg]
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}.")
        if space not in ("auto", "pixels", "features"):
            raise ValueError(f"space must be 'auto', 'pixels' or 'features', got {space!r}.")
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        self.classifier, self.neighbours, self.space = classifier, neighbours, space
        self.features, self.num_classes = features, num_classes
        self.accuracy = math.nan
        self._classify: Callable[[Tensor], Tensor] | None = None
        self._featurize: Callable[[Tensor], Tensor] | None = None
        self._real: tuple[Tensor, Tensor] | None = None
        self._sheet: Tensor | None = None

    def check(self, probe: Probe) -> None:
        """The sampler must work, and the classifier be there."""
        super().check(probe)
        self._named(probe)
        if self.classifier is None:
            NeighbourClassifier(torch.zeros(2, 1, 1, 1), torch.arange(2))

    def _named(self, probe: Probe) -> Callable[[Tensor], Any] | None:
        """The user's classifier as a callable of images."""
        given = self.classifier
        if isinstance(given, str):
            found = getattr(probe.module, given, None)
            if not callable(found):
                raise ValueError(
                    f"classifier must be a callable or name a submodule or method of {type(probe.module).__name__}, got "
                    f"{self.classifier!r}."
                )
            return lambda images: found(probe.as_input(images))
        return judge_of(given, probe)

    def build(self, probe: Probe) -> GenerationBalance:
        """Judges and a metric, once the reference is there."""
        assert probe.reference is not None
        images, labels = probe.reference
        if labels is None:
            raise ValueError(
                "labels must be known, but the batches have none. To fix this, pass Probe(labels=lambda batch: ...)."
            )
        device = probe.module.device
        self._featurize = judge_of(self.features or probe.feature_network, probe)
        assert self._featurize is not None
        named, known = self._named(probe), int(labels.max()) + 1
        self._real = None
        if named is None:
            by_features = self._on(device)
            chosen = {"auto": space_for(images, by_features), "pixels": None, "features": by_features}
            space = chosen[self.space]
            with probe.looking(exact=True):
                neighbours = NeighbourClassifier(images, labels, space, self.neighbours)
            self._classify, self.accuracy = neighbours, neighbours.accuracy
        else:
            self._classify = lambda some: class_of(named(some), len(some)).cpu()
            with probe.looking(exact=True):
                told = self._classes(images.to(device))
                scores = named(as_images(images[:2]).to(device))
            self.accuracy = float((told == labels).double().mean())
            known = max(known, int(told.max()) + 1, scores.shape[1] if getattr(scores, "ndim", 0) == 2 else 0)
        return GenerationBalance(self.num_classes or known)

    def moves(self, probe: Probe) -> bool:
        """Whether the reference's features change with the module."""
        return moves(self.features, probe)

    def _on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda images: self._features_of(images.to(device)).cpu()

    def _features_of(self, images: Tensor) -> Tensor:
        assert self._featurize is not None
        return in_chunks(self._featurize, images)

    def _classes(self, images: Tensor) -> Tensor:
        """(n,) on the CPU."""
        assert self._classify is not None
        if len(images) == 0:
            return torch.zeros(0, dtype=torch.long)
        if isinstance(self._classify, NeighbourClassifier):
            return self._classify(images).cpu()
        with torch.no_grad():
            parts = [self._classify(as_images(chunk)) for chunk in pieces(images, CHUNK)]
        return torch.cat(parts)

    def feed(self, probe: Probe, step: int) -> None:
        """This rank's share of the reference and of the samples."""
        assert isinstance(self.metric, GenerationBalance)
        device = probe.module.device
        drawn = probe.samples(step).images
        with probe.looking(exact=True):
            if self._real is None:
                share = probe.real_share()
                assert share.labels is not None
                self._real = share.labels, self._features_of(as_images(share.images).to(device)).cpu()
            labels, features = (part.to(device) for part in self._real)
            self.metric.update(labels, real=True, features=features)
            finite = drawn.flatten(1).isfinite().all(1)
            classes = torch.zeros(len(drawn), dtype=torch.long)
            classes[finite.cpu()] = self._classes(drawn[finite])
            # rows of images that are not finite stay so, and the metric leaves them out
            features = torch.full((len(drawn), features.shape[1]), math.nan, device=device, dtype=features.dtype)
            if finite.any():
                features[finite] = self._features_of(drawn[finite])
            self.metric.update(classes.to(device), real=False, features=features)
            if self.draw_pictures and probe.trainer.is_global_zero:
                self._sheet = _sheet(drawn[finite].cpu(), classes[finite.cpu()], self.metric.num_classes)

    def follow(self, probe: Probe, result: GenerationBalanceResult) -> GenerationBalanceResult:
        """The classifier's accuracy beside what it says."""
        return result._replace(accuracy=torch.full_like(result.invalid, self.accuracy))

    def readings(self, result: GenerationBalanceResult) -> dict[str, Reading]:
        """Each class of the reference by its share, and the imbalance of all."""
        shares, expected = result.generated_share.tolist(), result.real_share.tolist()
        readings = {
            f"class {c}": Reading(
                share,
                # more than its share is no loss, and what is not covered is gone, however little of it is left
                -math.log(min(max(share / real, COVERED), 1.0)) if share == share else math.nan,
                fault="was dropped",
            )
            for c, (share, real) in enumerate(zip(shares, expected, strict=True))
            if real > 0
        }
        imbalance, most = float(result.imbalance), int(result.generated_count.argmax())
        whole = Reading(
            imbalance,
            math.log(imbalance + 0.1) if imbalance == imbalance else math.nan,
            "whole",
            where=f"the balance of classes, with class {most} at {shares[most]:.0%},"
            if result.dominating[most]
            else "the balance of classes",
            question="distance of their shares from the real ones",
            fault="collapsed",
        )
        return readings | {"all classes": whole}

    # ---- pictures ----

    def draw(self, result: GenerationBalanceResult, board: Board) -> None:
        """Chart, table and panel."""
        classes = range(len(result.fid))
        if len(result.fid) <= 20:
            board.chart("share of every class", "Multiline", [f"class_{c}" for c in classes])
            board.chart("FID of every class", "Multiline", [f"fid_class_{c}" for c in classes])
        board.chart("imbalance", "Multiline", ["imbalance"])
        board.text("classes", self._table(result))
        board.picture("panel", self._panel(result, board.step, []))

    def _table(self, result: GenerationBalanceResult) -> str:
        lines = ["| class | real | generated | at least | at most | FID | |", "|---|---|---|---|---|---|---|"]
        columns = (result.real_share, result.generated_share, result.interval, result.fid)
        for c, (real, share, (low, high), fid) in enumerate(zip(*(part.tolist() for part in columns), strict=True)):
            word = "dropped" if result.dropped[c] else "dominates" if result.dominating[c] else ""
            lines.append(f"| {c} | {real:.1%} | {share:.1%} | {low:.1%} | {high:.1%} | {fid:.2f} | {word} |")
        return "\n".join(lines)

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The panel with the classes marked."""
        marked = [int(name.split()[1]) for name in finding.names if name.startswith("class ")]
        board.picture("picture", self._panel(self.result, finding.step, marked, str(finding)))

    def _panel(self, result: GenerationBalanceResult, step: int, marked: list[int], note: str = "") -> Tensor:
        names = [str(c) for c in range(len(result.fid))]
        odd = (result.dropped | result.dominating).tolist()
        alarmed = [bad or c in marked for c, bad in enumerate(odd)]
        told = []
        for word, which in (("dropped", result.dropped), ("dominating", result.dominating)):
            some = which.nonzero()[:, 0].tolist()
            if some:
                told.append(f"{word}: class {', '.join(map(str, some[:12]))}")
        tiles = [
            panels.Tile(
                "share: generated, line = real",
                panels.bars(
                    result.generated_share.tolist(), names, alarmed, floor=0.0, targets=result.real_share.tolist(),
                    intervals=result.interval.tolist(),
                ),
            ),
            panels.Tile("FID within each class", panels.bars(result.fid.tolist(), names, alarmed, floor=0.0)),
        ]  # fmt: skip
        if self._sheet is not None:
            tiles.append(panels.Tile("generated, a row for each class", panels.contact_sheet(self._sheet)))
        rows = [panels.Row(panels.ALARM, words, strong=True) for words in told]
        rows.append(panels.Row(panels.INK, f"{float(result.imbalance):.0%} of the images would have to change class"))
        rows.append(
            panels.Row(panels.INK, f"the classifier is right for {float(result.accuracy):.1%} of held-out images")
        )
        title = "; ".join(told) or "No class is surely dropped or dominating"
        return panels.panel(f"{title[0].upper()}{title[1:]} (step {step})", tiles, rows, note)


def _sheet(images: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """(K, 8, C, H, W): the first images of each class, blank where there are too few; at most ten classes."""
    blank = images.min() if len(images) else torch.zeros(())
    sheet = torch.full((min(num_classes, 10), SHOWN, *images.shape[1:]), float(blank))
    for c in range(len(sheet)):
        own = images[classes == c][:SHOWN]
        sheet[c, : len(own)] = own
    return sheet
