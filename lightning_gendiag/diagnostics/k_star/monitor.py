"""k* of a layer's features while a model trains, and its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_gendiag import panels
from lightning_gendiag.board import Board
from lightning_gendiag.diagnostics.k_star.mathematics import Distance, KStarResult
from lightning_gendiag.diagnostics.k_star.metric import KStar
from lightning_gendiag.functional import as_images
from lightning_gendiag.monitor import Monitor, Reading

if TYPE_CHECKING:
    from lightning_gendiag.probe import Probe

CHUNK = 128
"""Images that go through the layer at a time."""


class KStarMonitor(Monitor):
    """Follow :class:`KStar` of a layer's features of labelled images while a model trains.

    On TensorBoard: scalars, a table of the classes, a histogram of all values, and a panel with each class's
    distribution and the matrix of rivals.

    Args:
        features: what makes features of images: ``"encode"`` (the probe's), the path of a submodule whose output is
            taken (``"discriminator.4"``: the first part of the path is called with the images), or a callable
            ``(module, images)``; more than one axis is flattened.
        images: ``"real"``: the labelled images of the reference; ``"generated"``: samples of a conditional sampler.
        distance: see :func:`k_star`.
        max_rows: at most so many images.
        kwargs: as for :class:`Monitor`.

    Raises:
        ValueError: for an argument out of its range; before training starts, in words, for what cannot work.

    Example:
        >>> callbacks = [KStarMonitor("discriminator.7")]  # of a Trainer
    """

    stem = "k_star"
    needs = ()
    # of 1: as far as a flow's latents lose the classes while they are made Gaussian
    grain = 0.02
    tolerance: ClassVar = {"part": 0.08, "whole": 0.08}
    question = "mean k*"

    def __init__(
        self,
        features: str | Any = "encode",
        *,
        images: Literal["real", "generated"] = "real",
        distance: Distance = "euclidean",
        max_rows: int = 2000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if images not in ("real", "generated"):
            raise ValueError(f"images must be 'real' or 'generated', got {images!r}.")
        if not isinstance(features, str) and not callable(features):
            raise ValueError(f"features must be a name or a callable, got {features!r}.")
        KStar(distance, max_rows=max_rows)
        self.features, self.images, self.distance, self.max_rows = features, images, distance, max_rows

    def check(self, probe: Probe) -> None:
        """The layer must be there; generated images must have labels."""
        if self.images == "generated" and not probe.conditional:
            raise ValueError(
                "images='generated' must go with a sampler that takes labels. "
                "To fix this, pass Probe(sample=lambda module, n, labels: ..., conditional=True)."
            )
        if self.features == "encode":
            probe.encoder  # noqa: B018
        elif isinstance(self.features, str):
            self._layer(probe)

    def _layer(self, probe: Probe) -> tuple[nn.Module, nn.Module]:
        """The part that is called and the one that is listened to."""
        target: Any = probe.module
        for name in str(self.features).split("."):
            target = getattr(target, name, None)
        entry = getattr(probe.module, str(self.features).split(".")[0], None)
        if not isinstance(target, nn.Module) or not isinstance(entry, nn.Module):
            layers = [name for name, part in probe.module.named_modules() if name and not list(part.children())]
            known = ", ".join(layers[:40])
            raise ValueError(
                f"features must be 'encode', a callable or the path of a submodule of {type(probe.module).__name__}, got "
                f"{self.features!r}. Its layers are {known}."
            )
        # a compiled module runs the one underneath, and hooks on the outer one stay silent
        return entry, getattr(target, "_orig_mod", target)

    def _features(self, probe: Probe, images: Tensor) -> Tensor:
        """(n, D) of images (n, C, H, W), inside ``looking``."""
        if self.features == "encode":
            return probe.codes(images)
        if callable(self.features):
            return _rows(self.features(probe.module, images), len(images))
        entry, target = self._layer(probe)
        heard: list[Any] = []
        handle = target.register_forward_hook(lambda module, inputs, output: heard.append(output))
        try:
            entry(images)
        finally:
            handle.remove()
        if not heard:
            raise ValueError(
                f"features must name a layer that {self.features.split('.')[0]} runs, got {self.features!r}."
            )
        return _rows(heard[-1], len(images))

    def build(self, probe: Probe) -> KStar:
        """A metric; the labels must be known."""
        assert probe.reference is not None
        if self.images == "real" and probe.reference.labels is None:
            raise ValueError(
                "labels must be known, but the batches have none. To fix this, pass Probe(labels=lambda batch: ...)."
            )
        return KStar(self.distance, max_rows=self.max_rows)

    def feed(self, probe: Probe, step: int) -> None:
        """Features of this rank's images."""
        assert self.metric is not None
        if self.features == "encode" and self.images == "real":
            for part in probe.encoded(step):
                self.metric.update(probe.codes_in(part.output, part.size), part.labels)
            return
        share = probe.real_share() if self.images == "real" else probe.samples(step)
        assert share.labels is not None
        device = probe.module.device
        with probe.looking(exact=True):
            for start in range(0, len(share.images), CHUNK):
                images = probe.as_input(as_images(share.images[start : start + CHUNK]))
                self.metric.update(self._features(probe, images), share.labels[start : start + CHUNK].to(device))

    def readings(self, result: KStarResult) -> dict[str, Reading]:
        """Each class by its mean and its rival, and the whole."""
        names = [f"class {int(c)}" for c in result.classes]
        rivals = result.nearest_rival.tolist()
        readings = {
            name: Reading(
                value,
                -value,
                where=name if rival < 0 else f"{name}, now next to class {rival},",
                fault="fractured",
            )
            for name, value, rival in zip(names, result.mean.tolist(), rivals, strict=True)
        }
        whole = float(result.scalars()["mean"])
        readings["all classes"] = Reading(whole, -whole, "whole", fault="fractured")
        return readings

    # ---- pictures ----

    def draw(self, result: KStarResult, board: Board) -> None:
        """Histogram, table and panel."""
        board.histogram("values", result.values)
        board.text("classes", self._table(result))
        if len(result.classes) <= 20:
            board.chart("every class", "Multiline", [f"class_{int(c)}" for c in result.classes])
        board.chart("skewness", "Multiline", ["true_skewness", "approximate_skewness"])
        board.picture("panel", self._panel(result, board.step, []))

    def _table(self, result: KStarResult) -> str:
        lines = ["| class | mean k* | std | skewness | pattern | nearest rival |", "|---|---|---|---|---|---|"]
        rows = zip(
            result.classes.tolist(), result.mean.tolist(), result.std.tolist(), result.skewness.tolist(), result.pattern,
            result.nearest_rival.tolist(), strict=True,
        )  # fmt: skip
        lines += [f"| {c} | {m:.3f} | {s:.3f} | {k:.2f} | {p} | {r} |" for c, m, s, k, p, r in rows]
        return "\n".join(lines)

    def draw_finding(self, finding: Any, board: Board) -> None:
        """The panel with the classes marked."""
        marked = [c for c, name in enumerate(finding.names) if name.startswith("class ")]
        wanted = {int(finding.names[c].split()[1]) for c in marked}
        places = [k for k, c in enumerate(self.result.classes.tolist()) if c in wanted]
        board.picture("picture", self._panel(self.result, finding.step, places, str(finding)))

    def _panel(self, result: KStarResult, step: int, marked: list[int], note: str = "") -> Tensor:
        names = [str(int(c)) for c in result.classes]
        parts = [result.values[(result.labels == c) & ~result.values.isnan()] for c in result.classes]
        worst = result.worst
        counts = {word: result.pattern.count(word) for word in ("fractured", "overlapped", "clustered")}
        told = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no pattern"
        rows = []
        if worst >= 0:
            rows.append(
                panels.Row(
                    panels.region_colour(worst),
                    f"lowest: class {names[worst]}, mean {float(result.mean[worst]):.2f}, "
                    f"next to class {int(result.nearest_rival[worst])}",
                )
            )
        rows.append(panels.Row(panels.INK, f"skewness {float(result.true_skewness):.2f}, lower is better"))
        return panels.panel(
            f"Of {len(names)} classes {told} (step {step})",
            [
                panels.Tile("k* of each class, 1 = together", panels.violins([p.cpu() for p in parts], names, marked)),
                panels.Tile("first rival (column) of each class", panels.matrix(result.rivals.cpu(), most=1.0)),
            ],
            rows,
            note,
        )


def _rows(output: Any, n: int) -> Tensor:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or len(output) != n or output.ndim < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"features must be ({n}, ...) for {n} images, got {got}.")
    return output.detach().flatten(1).float()
