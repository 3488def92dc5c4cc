"""What really happened in a run, decided by a classifier of the benchmark's own, and which alarms are right by that.

The product compares pixels and classifies by nearest neighbours. The referee is a small convolutional network that is
trained on the same real images, and it draws samples of its own, so that both do not err alike.

An alarm on a healthy run is wrong unless what it names really got worse:

- The image, the samples, or what has no rule of its own: the FID rose by ``FID_FACTOR`` over the best evaluations before,
  or samples are much alike. In healthy GANs the FID differs by 10 to 20 % from one evaluation to the next.
- A region: the same, or the mean, the contrast and the edges of its pixels moved away from the real ones. The referee
  computes them from its own samples, pixel by pixel and without kernels.
- A class of samples: its share fell below ``SHARE_FACTOR`` of what it was, or is below ``ABSENT`` of the real one. With
  1,024 samples, half of a share of 0.1 is five standard deviations.
- The balance of classes: the distance of all shares from the real ones rose by ``FID_FACTOR`` and by ``BALANCE``.
- A class of latents: a linear probe on latents of real images recognises ``PROBE`` less of this class than before.
- A dimension: its influence on images fell below ``SHARE_FACTOR`` of what it was. An entropy may change without it.
- The training data: never, since the data of a healthy run do not change.
- nan or inf: the referee's samples have some as well.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.data import Data, load
from lightning_gendiag import Alarm
from lightning_gendiag.functional.arrays import pieces

SAMPLES = 2048
"""Number of samples of the referee at an evaluation; fewer of models that sample in many steps."""

BEST = 10
"""The median of this many best evaluations before a change is what the values after it are compared with."""

FID_FACTOR, SHARE_FACTOR, ABSENT, BALANCE, PROBE, ALIKE = 1.5, 0.5, 0.1, 0.1, 0.1, 0.25
"""See the table above; samples are much alike where their mean distance is below ``ALIKE`` of that of real images."""

LEARNT = 0.75
"""A run without a planted fault is healthy only if its FID ends below this share of the first one."""

PIXELS_FACTOR, PIXELS = 1.5, 0.05
"""A region got worse where its pixels' statistics are this many times farther from the real ones, and by this much."""

FOLDER = Path(tempfile.gettempdir()) / "lightning_gendiag_zoo"
"""Where trained classifiers are kept."""


# ---- the referee ----


class Classifier(nn.Module):
    """A small convolutional network for grey images of 8 to 28 pixels.

    Args:
        finer: Number of its outputs.
    """

    def __init__(self, finer: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, finer)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features (N, 64) and scores of finer classes."""
        features = self.body(F.avg_pool2d(images, 2) if images.shape[2] > 16 else images)
        return features, self.head(features)


def _trained(data: Data, steps: int = 1200) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        network = Classifier(int(data.finer.max()) + 1)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(data.labels), (128,))
            # small shifts and noise, so that it does not learn its images by heart
            images = data.images[rows].roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
            images = images + 0.1 * torch.randn_like(images)
            loss = F.cross_entropy(network(images)[1], data.finer[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


class Referee:
    """Judges samples by the features and the classes of a classifier that is trained for one data set and kept on disk.

    Args:
        name: Name of the data set.
    """

    def __init__(self, name: str) -> None:
        data = load(name)
        self.network = Classifier(int(data.finer.max()) + 1).eval().requires_grad_(False)
        path = FOLDER / f"{name}.pt"
        if path.exists():
            self.network.load_state_dict(torch.load(path, weights_only=True))
        else:
            self.network = _trained(data)
            FOLDER.mkdir(parents=True, exist_ok=True)
            own = path.with_suffix(f".{os.getpid()}")
            torch.save(self.network.state_dict(), own)
            own.replace(path)
        self.num_classes = data.num_classes
        self.class_of = torch.zeros(int(data.finer.max()) + 1, dtype=torch.long)
        self.class_of[data.finer] = data.labels
        features, scores = self._features(data.images)
        self.accuracy = float((self.class_of[scores.argmax(1)] == data.labels).double().mean())
        self.real = _moments(features)
        # data sets are sorted by class
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        self.real_diversity = _diversity(features[order])
        self.real_shares = self._shares(scores)
        self.real_pixels = _pixels(data.images)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.network(piece) for piece in pieces(images, 512)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _shares(self, scores: Tensor) -> Tensor:
        """Share of each class (K,)."""
        return self.class_of[scores.argmax(1)].bincount(minlength=self.num_classes).double() / len(scores)

    def measure(self, images: Tensor, regions: Tensor | None = None) -> dict[str, Any]:
        """Returns what the referee finds in samples.

        Args:
            images: Samples (N, 1, H, W).
            regions: (H, W) labels of regions, once there are any.

        Returns:
            The FID, the share of each class, the diversity relative to real images, the distance of each region's pixels
            from real ones, and the share of samples without nan and inf.
        """
        finite = images[images.flatten(1).isfinite().all(1)]
        share = len(finite) / len(images)
        count = 0 if regions is None else int(regions.max()) + 1
        if len(finite) < 8:
            nan = math.nan
            shares = [nan] * self.num_classes
            return {"fid": nan, "shares": shares, "diversity": nan, "regions": [nan] * count, "finite": share}
        # what is far out of range would count without bound
        finite = finite.clamp(-3, 3)
        features, scores = self._features(finite)
        gaps = (_pixels(finite) - self.real_pixels).square().mean(0)
        return {
            "fid": frechet(_moments(features), self.real),
            "shares": self._shares(scores).tolist(),
            "diversity": _diversity(features) / self.real_diversity,
            "regions": [float(gaps[regions == number].mean().sqrt()) for number in range(count)],
            "finite": share,
        }


@cache
def referee(name: str) -> Referee:
    """Returns the referee of a data set."""
    return Referee(name)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Returns the Fréchet distance of two normal distributions, given by means (D,) and covariances (D, D)."""
    (mean, cov), (other_mean, other_cov) = one, other
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * cross)


def _diversity(features: Tensor) -> float:
    """Mean distance of pairs."""
    return float(F.pdist(features[:256]).mean())


def _pixels(images: Tensor) -> Tensor:
    """Mean, standard deviation and mean steps to two neighbours of each pixel, (4, H, W)."""
    steps = [images.diff(dim=axis, prepend=images.narrow(axis, 0, 1)).abs().mean(0)[0] for axis in (2, 3)]
    return torch.stack([images.mean(0)[0], images.std(0)[0], *steps])


# ---- which alarms are right ----

Truth = dict[str, list[Any]]
"""What the referee measured, one entry an evaluation."""


def before_and_after(values: Sequence[float], since: int, at: int, best: bool = True) -> tuple[float, float]:
    """Returns the level before a change and the median of the newest values since then; nan where there are none.

    Args:
        values: One an evaluation.
        since: Evaluation at which a change began.
        at: Evaluation of the alarm.
        best: Whether the level is of the smallest values before the change, or of the newest.
    """
    earlier = [value for value in values[:since] if math.isfinite(value)]
    level = sorted(earlier)[:BEST] if best else earlier[-BEST:]
    later = [value for value in values[max(since, at - 2) : at + 1] if math.isfinite(value)]
    return median(level or [math.nan]), median(later or [math.nan])


def has_learnt(truth: Truth) -> bool:
    """Returns whether the samples of a run became better; one whose codebook collapsed at once is not healthy."""
    fid: list[float] = truth["fid"]
    return median(fid[-BEST:]) < LEARNT * fid[0]


def quality_fell(truth: Truth, since: int, at: int) -> bool:
    """Returns whether samples as a whole got worse, by the FID, or are much alike and were not before."""
    before, after = before_and_after(truth["fid"], since, at)
    alike = truth["diversity"][at] < ALIKE and not (since and truth["diversity"][since - 1] < ALIKE)
    return after > FID_FACTOR * before or alike or truth["finite"][at] != 1


def region_fell(truth: Truth, number: int, since: int, at: int) -> bool:
    """Returns whether the pixels of one region got worse."""
    rows = [row[number] if number < len(row) else math.nan for row in truth["regions"]]
    before, after = before_and_after(rows, since, at)
    return after > max(PIXELS_FACTOR * before, before + PIXELS)


def share_fell(truth: Truth, real: Sequence[float], number: int, since: int, at: int) -> bool:
    """Returns whether the share of a class fell, or the class is absent."""
    before, after = before_and_after([row[number] for row in truth["shares"]], since, at, best=False)
    return after < max(SHARE_FACTOR * before, ABSENT * real[number])


def balance_fell(truth: Truth, real: Sequence[float], since: int, at: int) -> bool:
    """Returns whether the shares of classes as a whole moved away from the real ones."""
    distances = [sum(abs(a - b) for a, b in zip(row, real, strict=True)) / 2 for row in truth["shares"]]
    before, after = before_and_after(distances, since, at)
    return after > max(FID_FACTOR * before, before + BALANCE)


def influence_fell(truth: Truth, number: int, since: int, at: int) -> bool:
    """Returns whether a latent dimension changes images less than before."""
    before, after = before_and_after([row[number] for row in truth["influence"]], since, at, best=False)
    return after < SHARE_FACTOR * before


def probe_fell(truth: Truth, number: int, since: int, at: int) -> bool:
    """Returns whether a class is recognised less often by its latents."""
    before, after = before_and_after([row[number] for row in truth["probe"]], since, at, best=False)
    return after < before - PROBE


def quadrants_of(regions: dict[str, Any], name: str) -> list[int]:
    """Returns the quadrants that a region overlaps by a quarter of theirs, or by half of its own."""
    if name not in regions.get("names", ()):
        return []
    inside = torch.tensor(regions["labels"]) == regions["names"].index(name)
    half = inside.shape[0] // 2
    parts = [inside[r, c] for r in (slice(half), slice(half, None)) for c in (slice(half), slice(half, None))]
    return [
        number
        for number, part in enumerate(parts)
        if int(part.sum()) >= min(part.numel() / 4, max(1.0, int(inside.sum()) / 2))
    ]


def numbers_in(names: Sequence[str], kind: str) -> list[int]:
    """Returns the numbers in names such as "class 3" or "dimension 1 with dimension 7"."""
    words = [word.strip(",:") for name in names for word in name.split()]
    return [int(b) for a, b in itertools.pairwise(words) if a == kind and b.isdigit()]


def is_about_data(alarm: Alarm) -> bool:
    """Returns whether an alarm is about the training data, and not about the model."""
    return alarm.diagnostic == "training_data"


def is_right(alarm: Alarm, run: dict[str, Any], truth: Truth, since: int, at: int) -> bool:
    """Returns whether what an alarm names really got worse in a run without a planted fault.

    Args:
        alarm: The alarm.
        run: Record of the run.
        truth: What the referee measured.
        since: Evaluation at which the change began by the alarm.
        at: Evaluation of the alarm.
    """
    if is_about_data(alarm):
        return False
    if not math.isfinite(alarm.after):
        return any(share < 1 for share in truth["finite"][since : at + 1])
    real = run["real_shares"]
    classes = [c for c in numbers_in(alarm.names, "class") if c < len(real)]
    if classes and alarm.diagnostic == "k_star":
        return "probe" in truth and any(probe_fell(truth, c, since, at) for c in classes)
    if classes:
        return any(share_fell(truth, real, c, since, at) for c in classes)
    if alarm.names[:1] == ["all classes"]:
        return balance_fell(truth, real, since, at)
    dimensions = numbers_in([*alarm.names, alarm.label], "dimension")
    if dimensions and "influence" in truth:
        length = len(truth["influence"][0])
        return any(influence_fell(truth, d, since, at) for d in dimensions if d < length)
    known = run["regions"].get("names", [])
    regions = [known.index(name) for name in alarm.names if name in known]
    return quality_fell(truth, since, at) or any(region_fell(truth, r, since, at) for r in regions)
