"""Models that can be harmed, the harm that is done to them, and a recorder of what their monitors see; see planted_faults."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from example_models.data import digits, scenes
from example_models.diffusion import Diffusion
from example_models.flow import Flow
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import (
    CosineMeanSimilarityMonitor,
    GenerationBalanceMonitor,
    KStarMonitor,
    ManifoldEntropyMonitor,
    Monitor,
    PosteriorKLMonitor,
    Probe,
)
from lightning_gendiag.functional import frechet_distance
from lightning_gendiag.judges import FeatureNetwork, NeighbourClassifier
from lightning_gendiag.monitor import Reading

LOOKS, START, AFTER, SLOW = 100, 40, 8, 20
"""Looks of a run, the look at which faults begin, and for how many a sudden and a slow one is followed."""

STEPS, BATCH = 12, 64
"""Steps between looks, and images in each."""


# ---- models that can be harmed ----


class Harm(NamedTuple):
    """What is done to a model while it is looked at."""

    latents: Callable[[Tensor], Tensor] = lambda z: z
    images: Callable[[Tensor], Tensor] = lambda x: x
    codes: Callable[[Tensor, Tensor], Tensor] = lambda images, codes: codes


def _drawn(module: Any, draw: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    if module.harm is None or module.training:
        return draw(z)
    return module.harm.images(draw(module.harm.latents(z)))


class HarmedGAN(GAN):
    """A GAN that can be harmed."""

    harm: Harm | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Images, harmed."""
        return _drawn(self, super().forward, z)


class HarmedVAE(VAE):
    """A VAE that can be harmed, in training too."""

    harm: Harm | None = None
    ignored = False

    def decode(self, z: Tensor) -> Tensor:
        """Data, harmed."""
        return _drawn(self, super().decode, z * 0 if self.ignored else z)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, harmed, and log variance."""
        mean, log_variance = super().encode(images)
        return (mean if self.harm is None or self.training else self.harm.codes(images, mean)), log_variance


class HarmedFlow(Flow):
    """A flow that can be harmed."""

    harm: Harm | None = None

    def decode(self, z: Tensor) -> Tensor:
        """Data, harmed."""
        return _drawn(self, super().decode, z)

    def encode(self, x: Tensor) -> Tensor:
        """Latents, harmed."""
        z = super().encode(x)
        return z if self.harm is None or self.training else self.harm.codes(x, z)


class HarmedDiffusion(Diffusion):
    """A diffusion model that can be harmed."""

    harm: Harm | None = None

    def sample(self, n: int) -> Tensor:
        """Images, harmed."""
        images = super().sample(n)
        return images if self.harm is None else self.harm.images(images)


class Family(NamedTuple):
    """A model and how it is looked at."""

    make: Callable[[str], LightningModule]
    size: int
    loss: str
    high: float
    """A learning rate that is too high."""


FAMILIES = {
    "gan": Family(lambda kind: HarmedGAN(16, width=10, lr=4e-4), 32, "loss_g", 2e-2),
    # with fewer latents than the scenes have freedoms, none dies of itself
    "vae": Family(
        lambda kind: (
            HarmedVAE(8, width=10, noise=0.5, lr=5e-3) if kind == "scenes" else HarmedVAE(width=10, noise=0.8, lr=5e-3)
        ),
        32,
        "loss",
        1e-1,
    ),
    "flow": Family(lambda kind: HarmedFlow(64, (1, 8, 8), hidden=96, transforms=4), 8, "nll", 5e-2),
    "diffusion": Family(lambda kind: HarmedDiffusion(width=8, steps=6), 16, "loss", 3e-1),
}


def data_of(kind: str, size: int, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images, labels and known regions, where there are some."""
    if kind == "digits":
        images, labels = digits(size)
        regions = None
    else:
        images, regions = scenes(1800, 4 + seed % 3, size, seed)
        labels = None
    if size == 8:
        # densities need noise of the size of a grey level
        images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) / 16
    return images, labels, regions


def monitors_for(family: str, kind: str, probe: Probe) -> list[Monitor]:
    """The diagnostics that GenerativeDiagnostics attaches, but for the two that look every fifth and tenth time."""
    options: dict[str, Any] = {"probe": probe, "draw_pictures": False, "on_error": "raise"}
    monitors: list[Monitor] = [CosineMeanSimilarityMonitor(**options)]
    if kind == "digits":
        monitors.append(GenerationBalanceMonitor(**options))
        if family != "diffusion":
            monitors.append(KStarMonitor("discriminator.7" if family == "gan" else "encode", **options))
    if family != "diffusion":
        monitors.append(ManifoldEntropyMonitor(**options))
    if family == "vae":
        monitors.append(PosteriorKLMonitor(**options))
    return monitors


# ---- faults ----


class Fault(NamedTuple):
    """What is planted, and what a finding must name."""

    name: str
    about: str
    """``region``, ``class``, ``dimension`` or ``run``."""
    harm: Callable[[int], Harm] | None
    """By the number of looks since it began; None for faults of training."""
    truth: list[Any]
    """Pixels of the region, or names."""
    watched: tuple[str, ...] = ("cms", "generation_balance")
    """Diagnostics that are asked; the others go on as if nothing were."""
    looks: int = AFTER


def regional_faults(module: Any, known: Tensor, still: Tensor, seed: int) -> Iterable[Fault]:
    """Faults of one region (H, W) of known ones, of two, and of the whole image."""
    count = int(known.max()) + 1
    first, second = known == seed % count, known == (seed + 1 + seed // count % (count - 1)) % count
    everywhere = torch.ones_like(first)
    noise = torch.rand(256, *still.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    far = max(1, known.shape[0] // 8)
    ways: dict[str, Callable[[Tensor, int], Tensor]] = {
        "frozen": lambda x, age: still.expand_as(x),
        "blurred": lambda x, age: x.mean(0, keepdim=True).expand_as(x),
        "darkened": lambda x, age: (x - 1) / 2,
        "noisy": lambda x, age: noise.repeat(-(-len(x) // 256), 1, 1, 1)[: len(x)],
        "shifted": lambda x, age: x.roll((far, far), (2, 3)),
        "decaying": lambda x, age: x.lerp(x.mean(0, keepdim=True).expand_as(x), min(1.0, 0.08 * (age + 1))),
    }

    def planted(way: str, where: Tensor) -> Callable[[int], Harm]:
        return lambda age: Harm(images=lambda x: torch.where(where, ways[way](x, age), x))

    for way in ways:
        yield Fault(
            f"region {way}",
            "region",
            planted(way, first),
            first.int().tolist(),
            looks=SLOW if way == "decaying" else AFTER,
        )
    yield Fault("two regions frozen", "region", planted("frozen", first | second), (first | second).int().tolist())
    for way in ("frozen", "blurred", "darkened"):
        yield Fault(f"image {way}", "region", planted(way, everywhere), everywhere.int().tolist())


def class_faults(
    module: Any, monitors: dict[str, Monitor], images: Tensor, labels: Tensor, seed: int
) -> Iterable[Fault]:
    """Faults of classes."""
    judge = NeighbourClassifier(images, labels, accuracy=False)
    # what is hardly drawn at all cannot be lost
    drawn = monitors["generation_balance"].result.generated_share
    common = (drawn >= 0.05).nonzero()[:, 0].tolist()
    a, b = common[seed % len(common)], common[(seed + 1 + seed // 10) % len(common)]

    def dropped(x: Tensor) -> Tensor:
        gone = judge(x) == a
        others = x[~gone]
        if not gone.any() or not len(others):
            return x
        x = x.clone()
        x[gone] = others[torch.arange(int(gone.sum())) % len(others)]
        return x

    def merged(x: Tensor) -> Tensor:
        told = judge(x)
        mine, theirs = (told == a).nonzero()[:, 0], (told == b).nonzero()[:, 0]
        if not len(mine) or not len(theirs):
            return x
        x = x.clone()
        x[mine] = x[theirs[torch.arange(len(mine)) % len(theirs)]]
        return x

    yield Fault("class dropped", "class", lambda age: Harm(images=dropped), [f"class {a}"])
    yield Fault("classes drawn as one", "class", lambda age: Harm(images=merged), [f"class {a}", f"class {b}"])
    if not isinstance(module, VAE):
        # the latents of the others keep no classes apart
        return
    held = torch.cat([images[labels == c][:100] for c in range(10)])
    told = judge(held)
    module.harm = None
    with torch.no_grad():
        codes = module.encode(held)
    codes = codes[0] if isinstance(codes, tuple) else codes
    ca, cb = codes[told == a].mean(0), codes[told == b].mean(0)

    def confused(x: Tensor, z: Tensor) -> Tensor:
        return torch.where((judge(x) == a)[:, None], z + cb - ca, z)

    yield Fault(
        "classes encoded as one", "class", lambda age: Harm(codes=confused), [f"class {a}", f"class {b}"], ("k_star",)
    )


def dimension_faults(monitor: Monitor, seed: int) -> Iterable[Fault]:
    """Faults of latent dimensions."""
    order = monitor.result.entropy.argsort(descending=True)
    length = len(order)
    # a dimension that does nothing has nothing to lose
    upper = order[: max(2, length // 2)].tolist()
    i, j = upper[seed % len(upper)], upper[(seed + 1 + seed // len(upper) % (len(upper) - 1)) % len(upper)]

    def mixed(change: Callable[[Tensor], None]) -> Callable[[int], Harm]:
        matrix = torch.eye(length)
        change(matrix)
        return lambda age: Harm(latents=lambda z: z @ matrix.to(z))

    def dead(matrix: Tensor) -> None:
        matrix[i, i] = 0

    def entangled(matrix: Tensor) -> None:
        matrix[j, j], matrix[j, i] = 0.2, 1

    def silent(matrix: Tensor) -> None:
        weak = order[max(1, length // 10) :]
        matrix[weak, weak] = 0.02

    about = ("dimension", ("manifold_entropy",))
    yield Fault("dimension dead", about[0], mixed(dead), [f"dimension {i}"], about[1])
    yield Fault("dimensions entangled", about[0], mixed(entangled), [f"dimension {i}", f"dimension {j}"], about[1])
    yield Fault("dimensions silent", about[0], mixed(silent), ["all dimensions"], about[1])


def training_faults(family: str) -> dict[str, Callable[[Any, Trainer], None]]:
    """What goes wrong in training itself."""

    def fast(module: Any, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = FAMILIES[family].high

    def poisoned(module: Any, trainer: Trainer) -> None:
        with torch.no_grad():
            next(p for p in module.parameters() if p.ndim > 1).view(-1)[0] = math.nan

    def ignored(module: Any, trainer: Trainer) -> None:
        module.ignored = True

    def heavy(module: Any, trainer: Trainer) -> None:
        module.hparams["beta"] = 1e4

    ways = {"learning rate too high": fast, "weight is nan": poisoned}
    return ways | ({"latents ignored": ignored, "KL term too heavy": heavy} if family == "vae" else {})


TRUTHS = {"latents ignored": ["the latent"], "KL term too heavy": ["the latent"]}


# ---- recording ----


class Recorder(Callback):
    """After each look: what the monitors found, what they would have found with each fault, the loss, and FID."""

    def __init__(
        self, monitors: list[Monitor], probe: Probe, loss: str, data: tuple[Tensor, Tensor | None, Tensor | None],
        seed: int, start: int | None, checkpoint: Path | None = None,
    ) -> None:  # fmt: skip
        self.monitors = {monitor.name: monitor for monitor in monitors}
        self.probe, self.loss, self.data, self.seed, self.start = probe, loss, data, seed, start
        self.checkpoint = checkpoint
        self.texts: list[list[str | None]] = []
        self.healthy: dict[str, Any] = defaultdict(list)
        self.faulty: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.losses: list[float] = []
        self.judge: FeatureNetwork | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Collect the loss."""
        value = trainer.callback_metrics.get(self.loss, outputs.get("loss", math.nan))
        self.losses.append(float(value))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was found."""
        loss = statistics.mean(self.losses)
        self.losses.clear()
        self._keep(self.healthy, loss, {name: m.latest.readings for name, m in self.monitors.items()})
        if self.start is None:
            return
        age = trainer.current_epoch - self.start
        if age == -1:
            self.faults = list(self._plant(pl_module))
            if self.checkpoint is not None:
                trainer.save_checkpoint(self.checkpoint)
        step = self.monitors["cms"].latest.step
        clean = self.probe.samples(step)
        for fault in self.faults if age >= 0 else []:
            if age >= fault.looks or fault.harm is None:
                continue
            pl_module.harm = harm = fault.harm(age)
            # what was drawn is not drawn again
            self.probe._drawn = step, clean._replace(images=harm.images(clean.images))
            found = {}
            for name in fault.watched:
                if name in self.monitors:
                    found[name] = self._looked(self.monitors[name], step)
            series = self.faulty.setdefault(fault.name, defaultdict(list, about=fault.about, truth=fault.truth))
            self._keep(series, loss, found)
            pl_module.harm = None
            self.probe._drawn = step, clean

    def _plant(self, module: Any) -> Iterable[Fault]:
        images, labels, known = self.data
        regions = self.monitors["cms"].region_map.labels if known is None else known
        still = self.probe.samples(self.monitors["cms"].latest.step).images[0].clone()
        yield from regional_faults(module, regions, still, self.seed)
        if labels is not None:
            yield from class_faults(module, self.monitors, images, labels, self.seed)
        if "manifold_entropy" in self.monitors:
            yield from dimension_faults(self.monitors["manifold_entropy"], self.seed)

    def _looked(self, monitor: Monitor, step: int) -> dict[str, Reading]:
        """As the monitor does it."""
        metric = monitor.metric
        metric.reset()
        monitor.feed(self.probe, step)
        return monitor.readings(monitor.follow(self.probe, metric.compute()))

    def _keep(self, series: dict[str, Any], loss: float, found: dict[str, dict[str, Reading]]) -> None:
        if self.judge is None:
            self.judge = FeatureNetwork(self.probe.reference.images)
            self.real = _moments(self.judge(self.probe.reference.images))
        images = self.probe.samples(self.monitors["cms"].latest.step).images
        finite = images[images.flatten(1).isfinite().all(1)]
        fid = float(frechet_distance(*self.real, *_moments(self.judge(finite)))) if len(finite) > 2 else math.nan
        series["loss"].append(_short(loss))
        series["fid"].append(_short(fid))
        for name, readings in found.items():
            series[name].append({where: self._packed(reading) for where, reading in readings.items()})

    def _packed(self, reading: Reading) -> list[float]:
        text = [reading.kind, reading.where, reading.question, reading.fault, reading.words]
        if text not in self.texts:
            self.texts.append(text)
        return [_short(reading.value), _short(reading.badness), self.texts.index(text)]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.double().mean(0), features.double().T.cov()


def _short(value: float) -> float:
    return float(f"{value:.5g}")


class Breaker(Callback):
    """Does harm to training at its start."""

    def __init__(self, harm: Callable[[Any, Trainer], None]) -> None:
        self.harm = harm

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once the checkpoint is taken up."""
        self.harm(pl_module, trainer)


def record(
    family: str, kind: str, seed: int, looks: int = LOOKS, start: int = START, after: int = AFTER, faults: bool = True
) -> dict[str, Any]:
    """Train one model, and on from a checkpoint with each fault of training; return all series."""
    chosen = FAMILIES[family]
    data = data_of(kind, chosen.size, seed)
    images, labels, _ = data

    def fit(
        model: LightningModule, epochs: int, *, harm: Any = None, checkpoint: Path | None = None, resume: bool = False
    ) -> Recorder:
        probe = Probe(num_samples=512, num_reference=1024)
        monitors = monitors_for(family, kind, probe)
        recorder = Recorder(
            monitors, probe, chosen.loss, data, seed, start if faults and not resume else None, checkpoint
        )
        dataset = TensorDataset(images, torch.arange(len(images)) if labels is None else labels)
        batches = DataLoader(dataset, BATCH, sampler=RandomSampler(dataset, num_samples=STEPS * BATCH), drop_last=True)
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[*monitors, recorder, *([Breaker(harm)] if harm else [])],
            logger=False, enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(model, batches, ckpt_path=str(checkpoint) if resume else None, weights_only=True)
        return recorder

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "before.ckpt"
        seed_everything(seed, verbose=False)
        recorder = fit(chosen.make(kind), looks, checkpoint=checkpoint)
        for name, harm in training_faults(family).items() if faults else ():
            seed_everything(seed + 1, verbose=False)
            fork = fit(chosen.make(kind), start + after, harm=harm, checkpoint=checkpoint, resume=True)
            texts = fork.texts
            series = copy.deepcopy(dict(fork.healthy))
            for rows in (series[key] for key in series if key not in ("loss", "fid")):
                for row in rows:
                    for entry in row.values():
                        if texts[entry[2]] not in recorder.texts:
                            recorder.texts.append(texts[entry[2]])
                        entry[2] = recorder.texts.index(texts[entry[2]])
            recorder.faulty[name] = series | {"about": "run", "truth": TRUTHS.get(name, [])}
    regions = recorder.monitors["cms"].region_map
    return {
        "family": family,
        "data": kind,
        "seed": seed,
        "start": start,
        "regions": regions.labels.tolist(),
        "texts": recorder.texts,
        "healthy": dict(recorder.healthy),
        "faults": {name: dict(series) for name, series in recorder.faulty.items()},
    }
