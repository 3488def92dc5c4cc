"""Recorded runs of training, and the alarms that are raised in them, judged as in training but without a trainer."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_gendiag import (
    Alarm,
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    CosineMeanSimilarityResult,
    Evaluation,
    GenerationBalance,
    GenerationBalanceMonitor,
    KStarMonitor,
    KStarResult,
    ManifoldEntropyMonitor,
    ManifoldEntropyResult,
    Monitor,
    PosteriorKLMonitor,
    PosteriorKLResult,
    RegionMap,
)
from lightning_gendiag.detection.history import History
from lightning_gendiag.functional.results import Result

DATA = Path(__file__).parent.parent / "data"

RunT = TypeVar("RunT", bound="RecordedRun")


class Replay:
    """Judges evaluations as ``CollapseStopping`` does; ``options`` are those of ``CollapseStopping``."""

    def __init__(self, **options: Any) -> None:
        self.judge, self.history = CollapseStopping("warn", **options).judge, History()

    def add(self, monitor: Monitor[Any, Any], evaluation: Evaluation) -> None:
        """Adds one evaluation of a monitor."""
        self.history.append(monitor.name, evaluation)
        self.judge.update(monitor.name, evaluation, self.history, monitor.contributions)


class RecordedRun(ABC):
    """One training of a model, healthy, and what its monitor observes with faults from the evaluation ``start`` on.

    Args:
        data: As it is in the file.

    Attributes:
        model: Which model was trained.
        seed: Its seed.
        series: Recorded rows by fault; those of a fault follow the first ``start`` ones of ``"healthy"``.
    """

    file: ClassVar[str]
    start: ClassVar[int] = 20

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.model: str = data.get("kind", "gan")
        self.seed: int = data["seed"]
        self.series: dict[str, list[Any]] = dict(data.get("series", {}))

    @classmethod
    def read(cls: type[RunT], folder: Path = DATA) -> list[RunT]:
        """Returns all recorded runs."""
        return [cls(data) for data in json.loads((folder / cls.file).read_text())]

    @abstractmethod
    def monitor(self) -> Monitor[Any, Any]:
        """Returns the monitor as it was when the run was recorded."""

    @abstractmethod
    def result(self, row: Any) -> Result:
        """Returns the metric's result, as far as it was recorded."""

    @abstractmethod
    def is_right(self, fault: str, alarm: Alarm) -> bool:
        """Returns whether an alarm names what was planted."""

    def rows(self, fault: str) -> list[Any]:
        """Returns the rows of all evaluations of a run with a fault, or of the ``"healthy"`` one."""
        healthy = self.series["healthy"]
        return healthy if fault == "healthy" else healthy[: self.start] + self.series[fault]

    def begin(self, fault: str) -> int:
        """Returns the evaluation at which a fault begins, counted from 0."""
        return self.start

    def title(self, fault: str) -> str:
        """Returns the fault without the place where it was planted."""
        return fault

    def alarms(self, fault: str = "healthy", **options: Any) -> list[Alarm]:
        """Returns the alarms of a run with a fault, or of the healthy one; evaluations take place once an epoch."""
        monitor, replay = self.monitor(), Replay(**options)
        for epoch, row in enumerate(self.rows(fault)):
            observations = monitor.observations(self.result(row))
            replay.add(monitor, Evaluation(epoch + 1, epoch, epoch, observations))
        return replay.judge.alarms


class RecordedCosines(RecordedRun):
    """Cosine mean similarity; faults are planted in regions of the samples, as in ``"frozen 3"``, or in the image.

    A row has the regions' cosines and the image's.
    """

    file, start = "recorded_gans.json", 24

    @property
    def regions(self) -> RegionMap:
        """The regions that were found."""
        return RegionMap(torch.tensor(self.data["labels"]))

    def monitor(self) -> CosineMeanSimilarityMonitor:
        """Returns a monitor of the regions."""
        return CosineMeanSimilarityMonitor(self.regions)

    def result(self, row: list[float]) -> CosineMeanSimilarityResult:
        """Returns the cosines, and the comparison of real with real images that was recorded once."""
        values, mean, std = (torch.tensor(part) for part in (row, self.data["null_mean"], self.data["null_std"]))
        classes = torch.empty(0, len(row))
        none, as_real = torch.tensor(0.0), torch.tensor(1.0)
        return CosineMeanSimilarityResult(values[-1], values[:-1], mean, std, classes, none, as_real, none, none, none)

    def is_right(self, fault: str, alarm: Alarm) -> bool:
        """Returns whether an alarm names the region, or the image."""
        place = fault.split()[1]
        return alarm.label == ("image" if place == "image" else self.regions.names[int(place)])

    def title(self, fault: str) -> str:
        """Returns the fault without its region."""
        return fault.rstrip(" 0123456789")


class RecordedDimensions(RecordedRun):
    """Manifold entropy of a decoder that misuses its latents; see ``benchmarks.alarms.mixing`` for the faults.

    A row has the dimensions' entropies, the largest mutual information of a pair, and the pair.
    """

    file = "recorded_dimensions.json"

    def monitor(self) -> ManifoldEntropyMonitor:
        """Returns a monitor of all dimensions."""
        monitor = ManifoldEntropyMonitor()
        monitor.dims = torch.arange(len(self.series["healthy"][0]) - 3)
        return monitor

    def result(self, row: list[float]) -> ManifoldEntropyResult:
        """Returns the entropies, and the mutual information of the strongest pair."""
        entropy = torch.tensor(row[:-3], dtype=torch.float64)
        length, i, j = len(entropy), int(row[-2]), int(row[-1])
        shared = torch.zeros(length, length, dtype=torch.float64)
        shared[i, j] = shared[j, i] = row[-3]
        nan = torch.full((length,), math.nan)
        return ManifoldEntropyResult(
            entropy, nan[0], nan[0], shared, nan, nan, entropy.argsort(descending=True), nan[:0], nan[0], nan[0]
        )

    def is_right(self, fault: str, alarm: Alarm) -> bool:
        """Returns whether an alarm names the dimensions."""
        if fault == "collapse":
            return alarm.label.startswith(("all dimensions", "dimension"))
        return alarm.label == {"dead": "dimension 3", "entangled": "dimension 3 with dimension 7"}[fault]


class RecordedClasses(RecordedRun):
    """k* of an encoder's or a discriminator's features; the fault is that class 7 fractures.

    A row has the mean k* and the nearest rival of each of ten classes, and the mean of all.
    """

    file = "recorded_classes.json"

    def monitor(self) -> KStarMonitor:
        """Returns a monitor."""
        return KStarMonitor()

    def result(self, row: list[float]) -> KStarResult:
        """Returns the classes' means and nearest rivals."""
        mean = torch.tensor(row[:10], dtype=torch.float64)
        rivals = torch.nn.functional.one_hot(torch.tensor(row[10:20]).long(), 10).double()
        values = torch.full((1,), row[20], dtype=torch.float64)
        return KStarResult(values, torch.zeros(1), torch.arange(10), mean, mean, mean, rivals, mean.new_zeros(()))

    def is_right(self, fault: str, alarm: Alarm) -> bool:
        """Returns whether an alarm names class 7."""
        return "class 7" in alarm.names


class RecordedPosteriors(RecordedRun):
    """Posterior KL of VAEs that are healthy, or come to harm in training itself, each recorded as a run of its own.

    A row has the KL of each dimension, and the variances of the posterior's mean.
    """

    file = "recorded_posteriors.json"

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        kind, healthy = data["kind"], data["kind"].startswith("healthy")
        self.model = f"vae{kind.removeprefix('healthy')}" if healthy else "vae"
        self.series = {"healthy" if healthy else kind: data["rows"] if "rows" in data else data["series"]["healthy"]}

    def rows(self, fault: str) -> list[Any]:
        """Returns the rows of all evaluations."""
        return self.series[fault]

    def begin(self, fault: str) -> int:
        """Returns the evaluation at which the harm begins."""
        return 0 if fault.endswith("from the start") else self.start

    def monitor(self) -> PosteriorKLMonitor:
        """Returns a monitor."""
        return PosteriorKLMonitor()

    def result(self, row: list[list[float]]) -> PosteriorKLResult:
        """Returns the KL of each dimension and the variance of its mean."""
        kl, variance = torch.tensor(row, dtype=torch.float64)
        zero = kl.new_zeros(())
        return PosteriorKLResult(kl, variance, kl * 0, kl * 0 + 1, zero, zero, zero + self.monitor().threshold)

    def is_right(self, fault: str, alarm: Alarm) -> bool:
        """Returns whether an alarm names the dimension, or the latent as a whole."""
        return alarm.label == ("dimension 3" if fault.startswith("dimension 3") else "the latent")


class RecordedBalance(RecordedRun):
    """Balance of generated classes; the fault is that nine tenths of the most frequent class become others.

    A row has the number of generated images of each class.
    """

    file = "recorded_balance.json"

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.real = torch.tensor(data["real"] if "real" in data else self.series.pop("real")[0])
        healthy = torch.tensor(self.series["healthy"], dtype=torch.float64)
        self.victim = int(healthy[self.start - 8 : self.start].sum(0).argmax())
        self.series["dropped"] = [self._dropped(counts).tolist() for counts in healthy[self.start :]]

    def _dropped(self, counts: Tensor) -> Tensor:
        gone = (counts[self.victim] * 0.9).floor()
        others = torch.arange(len(counts)) != self.victim
        counts = counts + others * (gone * counts / counts[others].sum()).round()
        counts[self.victim] -= gone
        return counts

    def monitor(self) -> GenerationBalanceMonitor:
        """Returns a monitor."""
        return GenerationBalanceMonitor()

    def result(self, row: list[float]) -> Result:
        """Returns the result of images of these classes."""
        metric = GenerationBalance(len(row))
        for counts, real in ((self.real, True), (torch.tensor(row).long(), False)):
            metric.update(torch.repeat_interleave(torch.arange(len(row)), counts), real=real)
        return metric.compute()

    def is_right(self, fault: str, alarm: Alarm) -> bool:
        """Returns whether an alarm names the class."""
        return f"class {self.victim}" in alarm.names
