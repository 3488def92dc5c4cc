"""Trains models, plants faults in what their monitors see, and records what they observe; see ``planted_faults``."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.measuring import trained
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
    ModelAdapter,
    Monitor,
    Observation,
    PosteriorKLMonitor,
)
from lightning_gendiag.functional.distances import frechet_distance
from lightning_gendiag.model.batches import Images
from lightning_gendiag.model.features import FeatureExtractor, NeighbourClassifier
from lightning_gendiag.model.view import ModelView

EVALUATIONS, START, AFTER, OF_CLASS, SLOW = 100, 40, 8, 12, 20
"""Evaluations of a run, the one at which faults begin, and for how many a sudden and a slow fault is followed."""

STEPS, BATCH = 12, 64
"""Steps between evaluations, and images in each step."""

Data = tuple[Tensor, Tensor | None, Tensor | None]
"""Images, labels, and known regions (H, W), where there are some."""


# ---- models ----


class ProvokedVAE(VAE):
    """A VAE that may come to harm in training itself.

    Args:
        harm: ``"beta"``: the KL term has a weight of 10,000; ``"ignored"``: the decoder gets zeros for its latents;
            ``"dimension"``: it gets zeros for dimension 3; empty: no harm.
        start: The first epoch with the harm.
        kwargs: Arguments of :class:`VAE`.
    """

    def __init__(self, harm: str = "", start: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.harm, self.start = harm, start

    def decode(self, z: Tensor) -> Tensor:
        """Returns images, of latents that are lost once the harm has begun."""
        if self.harm in ("ignored", "dimension") and self.current_epoch >= self.start:
            used = torch.ones(z.shape[1], device=z.device)
            used[slice(None) if self.harm == "ignored" else 3] = 0
            z = z * used
        return super().decode(z)

    def on_train_epoch_start(self) -> None:
        """Sets the weight of the KL term."""
        if self.harm == "beta" and self.current_epoch >= self.start:
            self.hparams["beta"] = 1e4


def _vae(kind: str) -> ProvokedVAE:
    # with fewer latents than the scenes have degrees of freedom, no dimension dies in a healthy run
    own: dict[str, Any] = {"latent_dim": 8, "noise": 0.5} if kind == "scenes" else {"noise": 0.8}
    return ProvokedVAE(width=10, lr=5e-3, **own)


class Family(NamedTuple):
    """A model and how it is trained."""

    make: Callable[[str], LightningModule]
    """From the kind of data to a model."""
    size: int
    loss: str
    high: float
    """A learning rate that is too high."""


FAMILIES = {
    "gan": Family(lambda kind: GAN(16, width=10, lr=4e-4), 32, "loss_g", 2e-2),
    "vae": Family(_vae, 32, "loss", 1e-1),
    "flow": Family(lambda kind: Flow(64, (1, 8, 8), hidden=96, transforms=4), 8, "nll", 5e-2),
    "diffusion": Family(lambda kind: Diffusion(width=8, steps=6), 16, "loss", 3e-1),
}


def data_of(kind: str, size: int, seed: int) -> Data:
    """Returns images, labels and known regions, where there are some."""
    labels = regions = None
    if kind == "digits":
        images, labels = digits(size)
    else:
        images, regions = scenes(1800, 4 + seed % 3, size, seed)
    if size == 8:
        # densities need noise of the size of a grey level
        images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) / 16
    return images, labels, regions


def monitors_for(family: str, kind: str, adapter: ModelAdapter) -> list[Monitor[Any, Any]]:
    """Returns the monitors that GenerativeDiagnostics attaches, except for the two expensive ones."""
    options: dict[str, Any] = {"adapter": adapter, "log_images": False, "on_error": "raise"}
    monitors: list[Monitor[Any, Any]] = [CosineMeanSimilarityMonitor(**options)]
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


class Harm(NamedTuple):
    """How a fault changes what is seen of a model."""

    latents: Callable[[Tensor], Tensor] = lambda z: z
    """Applied to latents before they are decoded."""
    images: Callable[[Tensor], Tensor] = lambda x: x
    """Applied to samples."""
    encoded: Callable[[Tensor, Any], Any] = lambda images, output: output
    """From images, and what the encoder returns for them, to what it returns with the fault."""


class HarmedView(ModelView):
    """What monitors see of the same module with a fault; the module and its copy are not changed.

    Args:
        view: What they see without it.
        harm: The fault.
    """

    def __init__(self, view: ModelView, harm: Harm) -> None:
        super().__init__(view.adapter, view.subject, view.trainer)
        self.healthy, self.harm = view, harm
        self.real, self.parts = view.real, view.parts

    @property
    def feature_extractor(self) -> FeatureExtractor:
        """The one that was fitted on the same reference."""
        return self.healthy.feature_extractor

    def samples(self) -> Images:
        """Returns the samples with the fault."""
        images, labels = self.healthy.samples()
        return Images(self.harm.images(images), labels)

    def encode(self, images: Tensor) -> Any:
        """Returns what the encoder returns with the fault."""
        return self.harm.encoded(images, self.healthy.encode(images))

    def decode(self, z: Tensor) -> Any:
        """Returns what the decoder returns with the fault."""
        return self.healthy.decode(self.harm.latents(z))


class Fault(NamedTuple):
    """What is planted, and what an alarm must name."""

    name: str
    about: str
    """``"region"``, ``"class"``, ``"dimension"`` or ``"run"``."""
    harm: Callable[[int], Harm]
    """From the number of evaluations since the fault began to how it acts."""
    truth: list[Any]
    """Pixels of the region, or names."""
    watched: tuple[str, ...] = ("cms", "generation_balance")
    """Monitors that evaluate the fault; the others go on without it."""
    evaluations: int = AFTER


def regional_faults(known: Tensor, still: Tensor, seed: int) -> Iterator[Fault]:
    """Yields faults of one region (H, W) of the known ones, of two, and of the whole image."""
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

    def planted(name: str, way: str, where: Tensor) -> Fault:
        harm = lambda age: Harm(images=lambda x: torch.where(where, ways[way](x, age), x))  # noqa: E731
        return Fault(name, "region", harm, where.int().tolist(), evaluations=SLOW if way == "decaying" else AFTER)

    yield from (planted(f"region {way}", way, first) for way in ways)
    yield planted("two regions frozen", "frozen", first | second)
    yield from (planted(f"image {way}", way, everywhere) for way in ("frozen", "blurred", "darkened"))


def class_faults(view: ModelView, shares: Tensor, images: Tensor, labels: Tensor, seed: int) -> Iterator[Fault]:
    """Yields faults of classes, of which ``shares`` (K,) are generated."""
    classifier = NeighbourClassifier(images, labels)
    # a class that is hardly generated cannot be lost
    common = (shares >= 0.05).nonzero()[:, 0].tolist()
    a, b = common[seed % len(common)], common[(seed + 1 + seed // 10) % len(common)]

    def replaced(x: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
        classes = classifier(x)
        gone, others = classes == a, x[by(classes)]
        x = x.clone()
        if gone.any() and len(others):
            x[gone] = others[torch.arange(int(gone.sum())) % len(others)]
        return x

    dropped = Harm(images=lambda x: replaced(x, lambda classes: classes != a))
    merged = Harm(images=lambda x: replaced(x, lambda classes: classes == b))
    yield Fault("class dropped", "class", lambda age: dropped, [f"class {a}"], evaluations=OF_CLASS)
    truth = [f"class {a}", f"class {b}"]
    yield Fault("classes drawn as one", "class", lambda age: merged, truth, evaluations=OF_CLASS)
    if not isinstance(view.module, VAE):
        # the latents of the other models do not separate classes
        return
    held = torch.cat([images[labels == c][:100] for c in range(10)])
    classes = classifier(held)
    with view.isolated(exact=True):
        latents = view.latents_of(view.as_input(held))
    shift = latents[classes == b].mean(0) - latents[classes == a].mean(0)

    def confused(x: Tensor, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mean, log_variance = output
        return torch.where((classifier(x) == a)[:, None], mean + shift, mean), log_variance

    yield Fault("classes encoded as one", "class", lambda age: Harm(encoded=confused), truth, ("k_star",))


def dimension_faults(entropy: Tensor, seed: int) -> Iterator[Fault]:
    """Yields faults of latent dimensions with these entropies (L,)."""
    order = entropy.argsort(descending=True)
    length = len(order)
    # a dimension that does nothing has nothing to lose
    upper = order[: max(2, length // 2)].tolist()
    i, j = upper[seed % len(upper)], upper[(seed + 1 + seed // len(upper) % (len(upper) - 1)) % len(upper)]
    dead, entangled, silent = (torch.eye(length) for _ in range(3))
    dead[i, i] = 0
    entangled[j, j], entangled[j, i] = 0.2, 1
    weak = order[max(1, length // 10) :]
    silent[weak, weak] = 0.02

    def planted(name: str, mixing: Tensor, truth: list[str]) -> Fault:
        harm = Harm(latents=lambda z: z @ mixing.to(z))
        return Fault(name, "dimension", lambda age: harm, truth, ("manifold_entropy",))

    yield planted("dimension dead", dead, [f"dimension {i}"])
    yield planted("dimensions entangled", entangled, [f"dimension {i}", f"dimension {j}"])
    yield planted("dimensions silent", silent, ["all dimensions"])


def training_faults(family: str) -> dict[str, Callable[[Any, Trainer], None]]:
    """Returns what goes wrong in training itself, by name."""

    def fast(module: Any, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = FAMILIES[family].high

    def poisoned(module: Any, trainer: Trainer) -> None:
        with torch.no_grad():
            next(p for p in module.parameters() if p.ndim > 1).view(-1)[0] = math.nan

    def provoked(harm: str) -> Callable[[Any, Trainer], None]:
        return lambda module, trainer: setattr(module, "harm", harm)

    ways: dict[str, Callable[[Any, Trainer], None]] = {"learning rate too high": fast, "weight is nan": poisoned}
    if family == "vae":
        ways |= {"latents ignored": provoked("ignored"), "KL term too heavy": provoked("beta")}
    return ways


TRUTHS = {"latents ignored": ["the latent"], "KL term too heavy": ["the latent"]}


# ---- recording ----


class Recorder(Callback):
    """Records after each evaluation what the monitors observed, what they would with each fault, the loss, and FID.

    Args:
        monitors: All monitors of the trainer, which share one adapter.
        loss: Key of the loss.
        texts: Descriptions of series, to which those of this run are added.
        plant: Returns the faults; called once, before the evaluation ``start``.
        start: The evaluation at which faults begin; None for a run without.
        checkpoint: Where the state before that evaluation is saved.
    """

    def __init__(
        self,
        monitors: list[Monitor[Any, Any]],
        loss: str,
        texts: list[list[Any]],
        plant: Callable[[dict[str, Any]], Iterator[Fault]],
        start: int | None,
        checkpoint: Path,
    ) -> None:
        self.monitors: dict[str, Any] = {monitor.name: monitor for monitor in monitors}
        self.loss, self.texts, self.plant, self.start, self.checkpoint = loss, texts, plant, start, checkpoint
        self.healthy: dict[str, Any] = defaultdict(list)
        self.faulty: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.losses: list[float] = []
        self.real: tuple[Tensor, Tensor] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Collects the loss."""
        self.losses.append(float(trainer.callback_metrics.get(self.loss, outputs.get("loss", math.nan))))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records one evaluation."""
        loss = statistics.mean(self.losses)
        self.losses.clear()
        view: ModelView = self.monitors["cms"].view
        observed = {name: monitor.latest.observations for name, monitor in self.monitors.items()}
        self._record(self.healthy, loss, view, observed)
        if self.start is None:
            return
        age = trainer.current_epoch - self.start
        if age == -1:
            self.faults = list(self.plant(self.monitors))
            trainer.save_checkpoint(self.checkpoint)
        for fault in self.faults if age >= 0 else ():
            if age < fault.evaluations:
                harmed = HarmedView(view, fault.harm(age))
                watched = [self.monitors[name] for name in fault.watched if name in self.monitors]
                observed = {monitor.name: _observed(monitor, harmed) for monitor in watched}
                series = self.faulty.setdefault(fault.name, defaultdict(list, about=fault.about, truth=fault.truth))
                self._record(series, loss, harmed, observed)

    def _record(
        self, series: dict[str, Any], loss: float, view: ModelView, observed: dict[str, list[Observation]]
    ) -> None:
        images = view.samples().images
        finite = images[images.flatten(1).isfinite().all(1)]
        self.real = self.real or _moments(view, view.reference.images)
        fid = float(frechet_distance(*self.real, *_moments(view, finite))) if len(finite) > 2 else math.nan
        series["loss"].append(_short(loss))
        series["fid"].append(_short(fid))
        for name, observations in observed.items():
            series[name].append({observation.series.name: self._packed(observation) for observation in observations})

    def _packed(self, observation: Observation) -> list[float]:
        """Value, severity, and the place of the description among ``texts``."""
        s = observation.series
        text: list[Any] = [s.role, observation.label or s.label, s.quantity, s.event, observation.message]
        text += [s.min_std, s.min_delta, s.confirm]
        if text not in self.texts:
            self.texts.append(text)
        return [_short(observation.value), _short(observation.severity), self.texts.index(text)]


def _observed(monitor: Any, view: ModelView) -> list[Observation]:
    """What a monitor observes of a view, as in its own evaluations."""
    monitor.metric.reset()
    monitor.update(view)
    observations: list[Observation] = monitor.observations(monitor.postprocess(view, monitor.metric.compute()))
    return observations


def _moments(view: ModelView, images: Tensor) -> tuple[Tensor, Tensor]:
    features = view.feature_extractor(images).double()
    return features.mean(0), features.T.cov()


def _short(value: float) -> float:
    return float(f"{value:.5g}")


class Breaker(Callback):
    """Does harm to training at its start, once the checkpoint is loaded."""

    def __init__(self, harm: Callable[[Any, Trainer], None]) -> None:
        self.harm = harm

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does it."""
        self.harm(pl_module, trainer)


def record(
    family: str,
    kind: str,
    seed: int,
    evaluations: int = EVALUATIONS,
    start: int = START,
    after: int = AFTER,
    faults: bool = True,
) -> dict[str, Any]:
    """Trains one model, and on from a checkpoint with each fault of training; returns all series."""
    chosen = FAMILIES[family]
    images, labels, known = data_of(kind, chosen.size, seed)
    dataset = TensorDataset(images, torch.arange(len(images)) if labels is None else labels)
    texts: list[list[Any]] = []

    def plant(monitors: dict[str, Any]) -> Iterator[Fault]:
        cms = monitors["cms"]
        regions = cms.region_map.labels if known is None else known
        yield from regional_faults(regions, cms.view.samples().images[0].clone(), seed)
        if labels is not None:
            shares = monitors["generation_balance"].result.generated_share
            yield from class_faults(cms.view, shares, images, labels, seed)
        if "manifold_entropy" in monitors:
            yield from dimension_faults(monitors["manifold_entropy"].result.entropy, seed)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "before.ckpt"

        def fit(epochs: int, begin: int | None, *more: Callback, **options: Any) -> Recorder:
            monitors = monitors_for(family, kind, ModelAdapter(num_samples=512, num_reference=1024))
            recorder = Recorder(monitors, chosen.loss, texts, plant, begin, checkpoint)
            sampler = RandomSampler(dataset, num_samples=STEPS * BATCH)
            batches = DataLoader(dataset, BATCH, sampler=sampler, drop_last=True)
            trained(chosen.make(kind), batches, epochs, *monitors, recorder, *more, **options)
            return recorder

        seed_everything(seed, verbose=False)
        recorder = fit(evaluations, start if faults else None)
        for name, harm in training_faults(family).items() if faults else ():
            seed_everything(seed + 1, verbose=False)
            fork = fit(start + after, None, Breaker(harm), ckpt_path=str(checkpoint), weights_only=True)
            recorder.faulty[name] = {**fork.healthy, "about": "run", "truth": TRUTHS.get(name, [])}
    return {
        "family": family,
        "data": kind,
        "seed": seed,
        "start": start,
        "regions": recorder.monitors["cms"].region_map.labels.tolist(),
        "texts": texts,
        "healthy": dict(recorder.healthy),
        "faults": {name: dict(series) for name, series in recorder.faulty.items()},
    }
