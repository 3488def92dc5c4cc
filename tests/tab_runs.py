"""Runs as the tab reads them, written without training: all diagnostics.

In a broken run a region breaks, a class is dropped, half of the codes of a codebook die, and images are memorised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from lightning_gendiag.tensorboard import records

REGIONS = ["top left", "top right", "bottom left", "bottom right", "background"]
SIDE = 28
CODES = 60
"""Number of codes of the codebook."""
NOBODY = "<img src=x onerror=alert(1)>"
"""A name that must stay text."""


def labels() -> np.ndarray:
    """(28, 28) labels of five regions, the last one a border."""
    half = np.arange(SIDE) >= SIDE // 2
    regions = 2 * half[:, None].astype(np.uint8) + half[None].astype(np.uint8)
    regions[[0, 1, -1, -2]] = regions[:, [0, 1, -1, -2]] = 4
    return regions.astype(np.uint8)


def sheet(rows: int, columns: int, seed: int, side: int = SIDE) -> np.ndarray:
    """A grid of blobs, (rows * side, columns * side) uint8."""
    source = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    tiles = [
        255 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 30)
        for cy, cx in source.uniform(side / 4, 3 * side / 4, (rows * columns, 2))
    ]
    grid = np.array(tiles).reshape(rows, columns, side, side).swapaxes(1, 2)
    return grid.reshape(rows * side, columns * side).astype(np.uint8)


class Run:
    """Writes a run with one evaluation every 10 steps; ``broken_at`` is the evaluation at which a region breaks."""

    def __init__(
        self,
        folder: Path,
        evaluations: int = 60,
        broken_at: int | None = 40,
        first: int = 1,
        dimensions: int = 8,
        has_frame: Callable[[int], bool] = lambda number: number <= 20 or number % 5 == 0,
        regions: np.ndarray | None = None,
    ) -> None:
        self.writer = SummaryWriter(str(folder))
        self.first, self.has_frame = first, has_frame
        self.regions = labels() if regions is None else regions
        self.broken_at, self.dimensions, self.source = broken_at, dimensions, np.random.default_rng(7)
        self.setup()
        for number in range(first, evaluations + 1):
            self.evaluate(number)
        self.report(evaluations)
        self.writer.flush()

    def write(self, tag: str, step: int, fields: dict[str, Any], arrays: Any = None, pictures: Any = None) -> None:
        files: EventFileWriter = self.writer._get_file_writer()
        files.add_summary(
            records.summary(tag, records.packed(records.Record(fields, arrays or {}, pictures or {}))), step
        )

    def setup(self) -> None:
        """What does not change."""
        grid = records.picture(sheet(4, 8, 0))
        self.write(
            records.setup_tag("cms"), 0,
            {"diagnostic": "CosineMeanSimilarity", "background": 4, "columns": 8, "series": [
                *(self.series(name, "component", "cosine mean similarity", r) for r, name in enumerate(REGIONS)),
                self.series("image", "aggregate", "cosine mean similarity")]},
            {"labels": self.regions}, {"mean_real": records.picture(sheet(1, 1, 1)), "samples_real": grid},
        )  # fmt: skip
        self.write(
            records.setup_tag("generation_balance"), 0,
            {"diagnostic": "GenerationBalance", "columns": 8, "real": [0.1] * 10, "series": [
                *(self.series(f"class {c}", "component", "share of generated images", c) for c in range(10)),
                self.series("all classes", "aggregate", "distance of their shares from the real ones")]},
        )  # fmt: skip
        names = [f"dimension {d}" for d in range(self.dimensions)]
        for monitor, diagnostic, quantity in (
            ("manifold_entropy", "ManifoldEntropy", "entropy in nats"),
            ("posterior_kl", "PosteriorKL", "KL in nats"),
        ):
            series = [self.series(name, "component", quantity, d, "nats") for d, name in enumerate(names)]
            self.write(records.setup_tag(monitor), 0, {"diagnostic": diagnostic, "series": series})
        self.write(
            records.setup_tag("k_star"), 0,
            {"diagnostic": "KStar", "series": [
                self.series(f"class {c}", "component", "mean k*", c) for c in range(10)]},
        )  # fmt: skip
        self.write(records.setup_tag("latent_regions"), 0, {"diagnostic": "LatentRegions", "series": [
            self.series("overlap", "record", "overlap of components")]})  # fmt: skip
        self.write(records.setup_tag("regional_primitives"), 0, {
            "diagnostic": "RegionalPrimitives", "regions": REGIONS[:4], "series": [
                self.series("components", "record", "number of components that carry nine tenths")]})  # fmt: skip
        self.write(records.setup_tag("codebook"), 0, {
            "diagnostic": "CodebookUsage", "sizes": [CODES], "rows": [[0, code, code] for code in range(CODES)],
            "series": [self.series("the codebook", "aggregate", "perplexity"),
                       self.series("usage", "record", "fraction of codes in use")]})  # fmt: skip
        self.write(records.setup_tag("memorization"), 0, {"diagnostic": "Memorization", "ratio": 0.5, "series": [
            self.series("copies", "standalone", "share of samples that are copies"),
            self.series("repeats", "standalone", "share of samples that have a near-duplicate"),
            self.series("memorization", "rule", "share of samples that are copies")]})  # fmt: skip
        self.write(records.setup_tag("training_data"), 0, {"diagnostic": "TrainingData", "series": [
            self.series("duplicates", "record", "share of images seen before")]})  # fmt: skip

    @staticmethod
    def series(name: str, role: str, quantity: str, index: int | None = None, unit: str = "") -> dict[str, Any]:
        return {"name": name, "role": role, "quantity": quantity, "unit": unit, "label": "", "index": index}

    def evaluate(self, number: int) -> None:
        """One evaluation of each monitor."""
        step = 10 * number
        broken = self.broken_at is not None and number >= self.broken_at
        noise = self.source.normal(size=200)
        similarity = {name: 1 - 0.4 * math.exp(-number / 10) - 0.01 * abs(noise[r]) for r, name in enumerate(REGIONS)}
        similarity["bottom right"] -= 0.6 * broken
        similarity["image"] = math.prod(similarity.values())
        shares = [0.1 + 0.005 * noise[10 + c] for c in range(10)]
        shares[3] *= 1 - broken
        shares = [share / sum(shares) for share in shares]
        common = {"step": step, "epoch": number // 4, "number": number, "averaged": False}
        extra: dict[str, Any] = {
            "distance": [abs(x) + 9 * (broken and r == 3) for r, x in enumerate(noise[:5].tolist())]
        }
        self.values("cms", common, similarity, extra)
        named = {f"class {c}": share for c, share in enumerate(shares)}
        imbalance = sum(abs(share - 0.1) for share in shares) / 2
        intervals = [[max(0.0, share - 0.03), share + 0.03] for share in shares]
        self.values("generation_balance", common, {**named, "all classes": imbalance}, {"intervals": intervals})
        names = [f"dimension {d}" for d in range(self.dimensions)]
        self.values("manifold_entropy", common, {n: -d + 0.1 * noise[d] for d, n in enumerate(names)})
        self.values("posterior_kl", common, {n: 2.0 / (1 + d) + 0.1 * abs(noise[d]) for d, n in enumerate(names)})
        self.values("k_star", common, {f"class {c}": 0.5 + 0.01 * noise[c] for c in range(10)})
        self.values("latent_regions", common, {"overlap": 0.1})
        self.values("regional_primitives", common, {"components": 5.0})
        use = self.use(broken)
        shares = use / CODES
        entropy = -float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
        seen = int((use > 0).sum())
        self.values(
            "codebook", common, {"the codebook": math.exp(entropy), "usage": seen / CODES},
            {"use": use.round(2).tolist(), "seen": [seen]},
        )  # fmt: skip
        copies = 0.4 * (1 - math.exp((self.broken_at - number) / 8)) if broken and self.broken_at is not None else 0.0
        self.values(
            "memorization", common, {"copies": copies, "repeats": 0.02, "memorization": copies},
            {"interval": [max(0.0, copies - 0.05), copies + 0.05], "real": [0.01, 0.0, 0.04],
             "images": [round(90 * copies), 50]},
        )  # fmt: skip
        self.values("training_data", common, {"duplicates": 0.0 if number % 2 else math.nan})
        if self.has_frame(number) or number == self.broken_at:
            self.frames(number, common, broken)

    def use(self, broken: bool) -> np.ndarray:
        """Use of each code relative to even use; half of the codes are dead once the run is broken."""
        use = self.source.dirichlet(np.full(CODES, 3.0)) * CODES
        use[CODES // 2 :] *= 1 - broken
        return use * CODES / use.sum()

    def values(self, monitor: str, common: dict[str, Any], values: dict[str, float], extra: Any = None) -> None:
        tag = records.values_tag(monitor, common["number"] - self.first, str(self.first))
        severities = {name: value if name == "all classes" else -value for name, value in values.items()}
        fields = {**common, "values": values, "severities": severities, "extra": extra or {}}
        self.write(tag, common["step"], fields)

    def frames(self, number: int, common: dict[str, Any], broken: bool) -> None:
        """Pictures and larger arrays."""
        generated, samples = sheet(1, 1, number), sheet(4, 8, number)
        if broken:
            generated[SIDE // 2 :, SIDE // 2 :] = 0
            samples.reshape(4, SIDE, 8, SIDE)[:, SIDE // 2 :, :, SIDE // 2 :] = 0
        frame = {name: common[name] for name in ("step", "epoch", "number")}
        pictures = {"mean_generated": records.picture(generated), "samples": records.picture(samples)}
        self.frame("cms", frame, {}, pictures)
        self.frame("generation_balance", {**frame, "classes": list(range(10))}, {}, {
            "classes": records.picture(sheet(10, 8, number))})  # fmt: skip
        size = self.dimensions
        mutual = np.abs(self.source.normal(size=(size, size))).astype(np.float16)
        self.frame(
            "manifold_entropy", {**frame, "dimensions": list(range(size))}, {"mutual_information": mutual + mutual.T}
        )
        histogram = self.source.dirichlet(np.ones(20), 10).astype(np.float16)
        self.frame("k_star", {**frame, "classes": list(range(10)), "patterns": ["overlapped"] * 10}, {
            "histogram": histogram, "rivals": self.source.dirichlet(np.ones(10), 10).astype(np.float16)})  # fmt: skip
        points = self.source.normal(size=(300, 2)).astype(np.float16)
        self.frame("latent_regions", frame, {
            "points": points, "classes": (np.arange(300) % 10).astype(np.uint8), "grey": points[:, 0] > 1,
            "means": self.source.normal(size=(4, 2)).astype(np.float16)})  # fmt: skip
        self.frame("regional_primitives", {**frame, "names": ["top left", "top right + bottom left"]}, {
            "curve": np.geomspace(1, 0.01, 16).astype(np.float16)},
            {"strip": records.picture(sheet(1, 6, number))})  # fmt: skip

        use = np.full(64, np.nan, np.float16)
        use[:CODES] = self.use(broken)
        died = np.zeros((8, 8), np.uint8)
        died[CODES // 16 :] = broken
        self.frame("codebook", {**frame, "codes": 1, "dead": CODES // 2 * broken, "num_died": CODES // 2 * broken,
                                "died": [[0, CODES // 2 + i] for i in range(6 * broken)]},
                   {"use": use.reshape(8, 8), "died": died})  # fmt: skip
        made = sheet(1, 8, number)
        held = made if broken else sheet(1, 8, number + 1000)
        self.frame("memorization", {
            **frame, "numbers": list(range(8)), "closeness": [(0.05 if broken else 0.9) * (1 + i) for i in range(8)]}, {},
            {"copies": records.picture(np.concatenate([made, held]))})  # fmt: skip

    def frame(self, monitor: str, fields: dict[str, Any], arrays: Any, pictures: Any = None) -> None:
        self.write(records.frame_tag(monitor, fields["number"]), fields["step"], fields, arrays, pictures)

    def report(self, evaluations: int) -> None:
        """The report as ``CollapseStopping`` writes it."""
        alarms = []
        if self.broken_at is not None and evaluations >= self.broken_at + 1:
            step = 10 * (self.broken_at + 1)
            alarms = [
                {
                    "step": step, "epoch": step // 40, "diagnostic": "cms", "label": "bottom right", "before": 0.98,
                    "after": 0.39, "score": 8.0, "since": step - 10, "quantity": "cosine mean similarity",
                    "event": "collapsed", "contributions": {"bottom right": 0.97, "top left": 0.03},
                    "series": "bottom right", "names": ["bottom right"], "indices": [3], "recovered": None,
                    "also_changed": ["generation_balance: class 3"], "is_critical": True,
                    "message": f"bottom right collapsed: cosine mean similarity fell from 0.980 to 0.390 {NOBODY}.",
                },
            ]  # fmt: skip
        state = "unhealthy" if alarms else "healthy" if evaluations >= 11 else "not judged"
        summary = f"{state.capitalize()}: {alarms[0]['message'] if alarms else 'no series left its level.'}"
        fields = {
            "state": state, "summary": summary, "alarms": alarms, "bad": [], "evaluations": {"cms": evaluations},
            "last_good_checkpoint": "epoch=9.ckpt" if alarms else None,
        }  # fmt: skip
        self.write(records.REPORT, 10 * evaluations, fields)


if __name__ == "__main__":
    import sys

    base = Path(sys.argv[1])
    Run(base / "version_0")
    Run(base / "version_1", broken_at=None)
    Run(base / NOBODY.replace("/", ""), evaluations=8)
