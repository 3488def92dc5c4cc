"""Training is the same with and without diagnostics: everything that a module holds stays equal."""

from __future__ import annotations

import io
import os
import queue
import random
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerativeDiagnostics,
    KStarMonitor,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    ModelAdapter,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
)
from lightning_gendiag.model.generators import own_generators
from tests.helpers.denoisers import DDPM
from tests.helpers.everything import everything
from tests.helpers.models import SmallVAE
from tests.helpers.running import batches, trainer

# untrained models generate images in another range of values
pytestmark = pytest.mark.filterwarnings("ignore:generated images span", "ignore:Lazy modules are a new feature")


class LowRankLinear(nn.Linear):
    """A layer that adds its update to the weight in ``eval()`` and subtracts it in ``train()``, as LoRA layers do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs) / 10), nn.Parameter(torch.zeros(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class WithLowRank(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0] = LowRankLinear(3, 32)


class ActNorm(nn.Module):
    """A layer that sets its scale from the first batch, and records this in a plain attribute."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.ones(size))
        self.initialised, self.first = False, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            with torch.no_grad():
                self.shift.copy_(x.mean(0))
                self.scale.copy_(1 / (x.std(0) + 1e-2))
            self.initialised, self.first = True, tuple(x.shape)
        return (x - self.shift) * self.scale


class WithActNorm(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[1] = ActNorm(32)


class WithLazy(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0] = nn.LazyLinear(32)


class WithSpectralNorms(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0] = nn.utils.spectral_norm(nn.Linear(3, 32))
        self.encoder_net[1] = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 16))
        self.encoder_net[3] = nn.utils.parametrizations.weight_norm(nn.Linear(16, 6))


class WithSparseBuffer(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("operator", torch.eye(64).to_sparse(), persistent=False)
        self.register_buffer("unknown", torch.tensor([float("nan")]).expand(4), persistent=False)

    def decode(self, z: Tensor) -> Tensor:
        return (self.operator @ super().decode(z).flatten(1).T).T.view(-1, 1, 8, 8)


class WithTorchGenerator(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


class WithNumpyGenerator(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.helpers = {"generator": np.random.default_rng(0)}

    def noise(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.helpers["generator"].standard_normal(shape)).float()


NUMPY, TORCH, PYTHON = np.random.default_rng(0), torch.Generator(), {"generator": [random.Random(0)]}
"""Generators of this file, as users keep them at the top of theirs."""


def drawn(*shape: int) -> Tensor:
    def scale() -> float:
        return PYTHON["generator"][0].uniform(0.9, 1.1)

    return torch.from_numpy(NUMPY.standard_normal(shape)).float() * scale()


class WithGeneratorsOfItsFile(SmallVAE):
    """Draws with generators of its file, by a function that draws with others."""

    def __init__(self) -> None:
        super().__init__()
        NUMPY.bit_generator.state = np.random.default_rng(1).bit_generator.state
        TORCH.manual_seed(2)
        PYTHON["generator"][0].seed(3)

    @torch.no_grad()
    def noise(self, *shape: int) -> Tensor:
        return drawn(*shape) + torch.randn(*shape, generator=TORCH) / 10


class Noise:
    legacy = np.random.RandomState(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.legacy.standard_normal(shape)).float()


class WithGeneratorsOfItsClass(SmallVAE):
    own = torch.Generator()

    def __init__(self) -> None:
        super().__init__()
        self.draw = Noise()
        Noise.legacy.seed(1)
        self.own.manual_seed(2)

    def noise(self, *shape: int) -> Tensor:
        return self.draw(*shape) + torch.randn(*shape, generator=self.own) / 10


class Compared(type):
    """A metaclass whose classes compare by name, and therefore have no hash."""

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and cls.__name__ == other.__name__


class Source(metaclass=Compared):
    def __init__(self) -> None:
        self.generator = random.Random(0)


class Buffer:
    """A replay buffer of images with a lock, which cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.images, self.count = threading.Lock(), deque(maxlen=64), 0

    def push(self, images: Tensor) -> Tensor:
        with self.lock:
            self.count += len(images)
            self.images.extend(images.detach())
            return torch.stack(list(self.images)[-len(images) :])


class VectorQuantizer(nn.Module):
    """Moves its codes to the vectors that are nearest to each, and counts these, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(8, 3) / 8)
        self.register_buffer("counts", torch.zeros(8))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        indices = torch.cdist(z, self.embed).argmin(1)
        if self.training:
            self.counts += indices.bincount(minlength=8)
            self.embed[indices] += 0.1 * (z.detach() - self.embed[indices])
        return z + (self.embed[indices] - z).detach(), indices


class WithQuantizer(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.quantizer = VectorQuantizer()

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder_net(self.quantizer(z)[0])


class WithReplayBuffer(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.replay, self.calls = Buffer(), 0
        self.generated = self.decode(torch.randn(4, 3))
        self.paint = lambda z: self.count(self.decode(z))

    def count(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.replay.push(images)

    def sample(self, n: int) -> Tensor:
        return self.paint(self.noise(n, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count(batch[0])
        self.generated = self.decode(self.noise(4, 3))
        return super().training_step(batch, batch_idx) + 0.1 * self.replay.images[0].mean() * self.generated.mean()


class WithHooks(SmallVAE):
    """Remembers what passed through its parts, by functions that refer to the module, and by references to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Any] = []
        self.itself, self.again = {"me": self}, self.decoder_net
        self.register_parameter("nothing", None)
        self.handle = self.decoder_net.register_forward_hook(
            lambda module, inputs, output: self.shapes.append(output.shape)
        )
        self.encoder_net[1].register_forward_pre_hook(partial(self.note, "encoder"))
        remember = self.note
        self.decoder_net[0].register_forward_hook(lambda *arguments: remember("decoder", *arguments))

    def note(self, name: str, *arguments: Any) -> None:
        self.shapes.append(name)


class WithFunctions(SmallVAE):
    """Keeps its state in functions: generators, lists and counters that nothing else refers to."""

    def __init__(self) -> None:
        super().__init__()
        generator, calls, count = torch.Generator().manual_seed(2), [], 0

        def noise(*shape: int) -> Tensor:
            nonlocal count
            count += 1
            calls.append(count)
            return torch.randn(*shape, generator=generator)

        self.draw, self.counted = noise, lambda: count
        self.shift = partial(torch.rand, 3, generator=torch.Generator().manual_seed(4))
        self.remember = calls.append
        self.scale = lru_cache(maxsize=None)(self.uncached_scale)
        self.decoder_net[0].register_forward_hook(lambda *arguments: calls.append(len(calls)))

    def uncached_scale(self, n: int) -> int:
        self.remember(n)
        return 1

    def noise(self, *shape: int) -> Tensor:
        return self.draw(*shape) * self.scale(shape[0]) + self.shift() / 100


class Counters:
    """Counts without a ``__dict__``."""

    __slots__ = ("_calls", "seen")

    def __init__(self) -> None:
        self._calls, self.seen = 0, [threading.Lock()]

    def count(self) -> None:
        self._calls += 1
        self.seen.append(self._calls)


class Slotted(nn.Linear):
    """A layer with a slot of its own."""

    __slots__ = ("calls",)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class WithSlots(SmallVAE):
    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0], self.counters = Slotted(3, 32), Counters()

    def decode(self, z: Tensor) -> Tensor:
        self.counters.count()
        return super().decode(z)


class WithWeakReferences(SmallVAE):
    """Reaches its decoder, which counts its calls, by weak references only."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0] = Slotted(3, 32)
        self.hidden, self.proxies = weakref.ref(self.decoder_net), [weakref.proxy(self.decoder_net)]
        self.method, self.calls = weakref.WeakMethod(self.count), 0
        self.scales = weakref.WeakKeyDictionary({self.decoder_net: [1.0]})
        self.parts = weakref.WeakSet([self.decoder_net])

    def count(self) -> None:
        self.calls += 1

    def decode(self, z: Tensor) -> Tensor:
        self.method()()
        (part,) = self.parts
        self.scales[part].append(1.0)
        return (self.hidden()(z) + 0 * self.proxies[0](z)).view(-1, 1, 8, 8)


class WithIterators(SmallVAE):
    """Advances iterators when it is trained, and one also when it is sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.stream, self.numbers = (0.1 / n for n in count(1)), count()
        self.rows = iter(DataLoader(TensorDataset(torch.arange(1000.0)), shuffle=True))

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape) + 0.001 * (next(self.numbers) % 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (row,) = next(self.rows)
        return super().training_step(batch, batch_idx) * (1 + next(self.stream) + row.item() / 1000)


class Proxy:
    """Passes everything on to what it wraps."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __call__(self, x: Tensor) -> Tensor:
        return self.part(x)


class Registry:
    """There is one object of this class."""

    only: ClassVar[Any] = None

    def __new__(cls) -> Any:
        if cls.only is None:
            cls.only = super().__new__(cls)
            cls.only.parts = []
        return cls.only


class Session:
    """A class of the user's own with a name of Lightning's kind, which counts."""

    def __init__(self, part: nn.Module) -> None:
        self.part, self.mean = part, torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        y = self.part(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
        return y


class Redrawn(nn.Linear):
    """A layer whose copies draw weights, and take over others."""

    def __deepcopy__(self, memo: Any) -> Any:
        new = Redrawn(self.in_features, self.out_features)
        new.load_state_dict(self.state_dict())
        return new


class WithWrappedParts(SmallVAE):
    """Reaches its decoder through objects of many kinds, in a module that refers to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0] = Redrawn(3, 32)
        self.wrapped, self.counted, Registry.only = Proxy(self.decoder_net), Session(self.decoder_net), None
        self.registry = Registry()
        self.registry.parts.append(self.decoder_net)
        self.missing, self.again = MISSING, self.sample

    def decode(self, z: Tensor) -> Tensor:
        assert self.missing is MISSING
        return (self.wrapped(z) + self.counted(z) + self.registry.parts[0](z)) / 3


MISSING = object()


class Closing(nn.Linear):
    """A layer that closes a file when it is deleted."""

    def __init__(self, file: Any) -> None:
        super().__init__(3, 32)
        self.file = file

    def forward(self, x: Tensor) -> Tensor:
        self.file.write("x")
        return super().forward(x)

    def __del__(self) -> None:
        self.file.close()


def consume(items: queue.Queue[int]) -> None:
    while items.get() >= 0:
        items.task_done()


class WithThreads(SmallVAE):
    """Passes what it decodes to a thread through a queue, and closes a file at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder_net[0] = Closing(io.StringIO())
        self.queue: Any = queue.Queue(2)
        threading.Thread(target=consume, args=(self.queue,), daemon=True).start()

    def decode(self, z: Tensor) -> Tensor:
        for _ in range(3):
            self.queue.put(len(z))
        self.queue.join()
        return super().decode(z)

    def on_fit_end(self) -> None:
        self.queue.put(-1)
        # what was written by evaluations is not of interest
        self.queue, self.decoder_net[0].file = None, io.StringIO()


class WithLoader(SmallVAE):
    """Keeps the loader that it is trained with, which has a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        images, labels = (rows[:64] for rows in digits(8))
        generator = torch.Generator().manual_seed(3)
        self.loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True, generator=generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader


def test_a_loader_that_a_module_keeps_brings_the_same_batches() -> None:
    def weights(*callbacks: Any) -> list[Tensor]:
        seed_everything(0, verbose=False)
        module = WithLoader()
        trainer(*callbacks, max_epochs=3).fit(module)
        return [parameter.detach().clone() for parameter in module.parameters()]

    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=small())
    assert all(map(torch.equal, weights(monitor), weights()))
    assert monitor.evaluations == 3


MODELS = [
    SmallVAE,
    WithLowRank,
    WithActNorm,
    WithLazy,
    WithSpectralNorms,
    WithSparseBuffer,
    WithTorchGenerator,
    WithNumpyGenerator,
    WithGeneratorsOfItsFile,
    WithGeneratorsOfItsClass,
    WithQuantizer,
    WithReplayBuffer,
    WithHooks,
    WithFunctions,
    WithSlots,
    WithWeakReferences,
    WithIterators,
    WithWrappedParts,
    WithThreads,
]


def small() -> ModelAdapter:
    return ModelAdapter(num_samples=32, num_reference=64)


def single_monitors() -> list[Any]:
    options: dict[str, Any] = {"adapter": small(), "every_n_train_steps": 2, "on_error": "raise"}
    return [
        CosineMeanSimilarityMonitor(num_regions=2, **options),
        ManifoldEntropyMonitor(num_latents=4, **options),
        PosteriorKLMonitor(**options),
        KStarMonitor("encoder_net.1", **options),
        LatentRegionsMonitor(2, num_points=20, **options),
        RegionalPrimitivesMonitor(num_regions=2, num_images=1, max_steps=2, **options),
    ]


def trained(make: Callable[[], LightningModule], callbacks: list[Any], data: DataLoader[Any] | None = None) -> Any:
    seed_everything(0, verbose=False)
    module = make()
    seed_everything(1, verbose=False)
    own = trainer(*callbacks, max_epochs=2)
    own.fit(module, batches() if data is None else data)
    optimizers = [optimizer.state_dict()["state"] for optimizer in own.optimizers]
    return everything(module), everything(optimizers), torch.get_rng_state().tolist()


@pytest.mark.parametrize("make", MODELS)
def test_all_diagnostics_leave_everything_in_a_module_unchanged(make: type[LightningModule]) -> None:
    everything_applicable = GenerativeDiagnostics(adapter=small(), max_overhead=None, on_error="raise")
    assert trained(make, [everything_applicable]) == trained(make, [])
    # torch has no vectorized derivative of sparse products
    needs_derivatives = {"manifold_entropy", "regional_primitives"} if make is WithSparseBuffer else set()
    needs_codes = set() if make is WithQuantizer else {"codebook"}
    # none of them predicts from several levels of noise
    assert set(everything_applicable.left_out) <= needs_derivatives | needs_codes | {"adversary", "timestep_loss"}
    evaluated = {name for name, monitor in everything_applicable.monitors.items() if monitor.evaluations > 0}
    assert evaluated >= {"cms", "k_star", "posterior_kl"}


@pytest.mark.parametrize("make", [make for make in MODELS if make is not WithSparseBuffer])
def test_single_monitors_leave_everything_in_a_module_unchanged(make: type[LightningModule]) -> None:
    monitors = single_monitors()
    assert trained(make, [CollapseStopping(), *monitors]) == trained(make, [])
    assert all(monitor.evaluations > 1 for monitor in monitors)


def test_an_iterator_that_a_sampler_would_advance_is_left_to_training() -> None:
    class Streaming(SmallVAE):
        def __init__(self) -> None:
            super().__init__()
            self.stream = (torch.randn(3, generator=torch.Generator().manual_seed(n)) for n in count())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1 + next(self.stream).mean().abs())

        def sample(self, n: int) -> Tensor:
            return self.decode(torch.stack([next(self.stream) for _ in range(n)]))

    adapter = ModelAdapter(sample="sample", num_samples=32, num_reference=64)
    diagnostics, free = (GenerativeDiagnostics(adapter=given, max_overhead=None) for given in (adapter, small()))
    alone = trained(Streaming, [])
    assert trained(Streaming, [diagnostics]) == alone
    assert "an evaluation cannot advance a generator of the module" in diagnostics.left_out["cms"]
    assert trained(Streaming, [free]) == alone
    assert free.monitors["cms"].view.source() == "reconstructions"


class Watch(Callback):
    """A user's callback that counts what passes through the module, and what its own hook is given."""

    def __init__(self) -> None:
        self.shapes: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.decoder_net.register_forward_hook(self.note)

    def note(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.shapes.append(tuple(output.shape))


def test_hooks_of_a_users_callback_see_training_only() -> None:
    alone, together = Watch(), Watch()
    assert trained(SmallVAE, [together, *single_monitors()]) == trained(SmallVAE, [alone])
    assert together.shapes == alone.shapes


class Sampler:
    """A user's sampler that refers to a part of the module, has a generator that training uses too, and counts."""

    def __init__(self) -> None:
        self.generator, self.decoder, self.calls = torch.Generator().manual_seed(9), nn.Identity(), []

    def __call__(self, module: Any, n: int) -> Tensor:
        self.calls.append(n)
        return self.decoder(torch.randn(n, 3, generator=self.generator))


def test_a_users_sampler_uses_the_copy_and_leaves_its_generator_to_training() -> None:
    sampler = Sampler()

    class Sampled(SmallVAE):
        def __init__(self) -> None:
            super().__init__()
            self.decoder_net.insert(1, nn.BatchNorm1d(32))
            sampler.decoder = self.decoder_net
            sampler.generator.manual_seed(9)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.1 * sampler(self, 4).mean()

    for given in (sampler, partial(sampler), lambda module, n: sampler(module, n)):
        adapter = ModelAdapter(sample=given, num_samples=32, num_reference=64)
        monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=adapter, on_error="raise")
        sampler.calls.clear()
        noticed = trained(Sampled, [monitor])
        assert 32 in sampler.calls
        assert noticed == trained(Sampled, [])


@pytest.mark.parametrize("make", [WithTorchGenerator, WithNumpyGenerator, WithFunctions, WithGeneratorsOfItsFile])
def test_the_same_weights_give_the_same_samples_even_with_a_modules_own_generator(make: type[SmallVAE]) -> None:
    samples = []

    class Still(make):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

        def __init__(self) -> None:
            super().__init__()
            self.decoder_net[3] = nn.Identity()

    class Peek(CosineMeanSimilarityMonitor):
        def update(self, view: Any) -> None:
            super().update(view)
            samples.append(view.samples().images)

    trainer(Peek(num_regions=2, adapter=small(), on_error="raise"), max_epochs=2).fit(Still(), batches())
    assert len(samples) == 2
    assert torch.equal(*samples)


def test_generators_are_found_in_objects_whose_class_has_no_hash() -> None:
    source = Source()
    assert own_generators([{"sources": [source, Source]}]) == [source.generator]


UNSET: Any = None


def test_generators_of_a_file_are_those_that_its_functions_name_now() -> None:
    class Drawing:
        draw = staticmethod(lambda: UNSET.random() if UNSET else torch.rand(1))

        @property
        def legacy(self) -> float:
            return Noise.legacy.normal()

    assert own_generators([Drawing()]) == [Noise.legacy]
    globals()["UNSET"] = own = random.Random(0)
    assert own_generators([Drawing]) == [own, Noise.legacy]
    globals()["UNSET"] = random.SystemRandom()
    assert own_generators([Drawing(), SmallVAE()]) == [Noise.legacy]
    globals()["UNSET"] = None
    assert own_generators([drawn]) == [NUMPY, PYTHON["generator"][0]]
    # the global generators are restored in any case
    assert own_generators([random.uniform, np.random.normal, torch.default_generator]) == []


def switches() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "numpy": np.geterr(),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "workers": os.environ.get("PL_SEED_WORKERS"),
    }


class Switching(SmallVAE):
    """Changes what belongs to the process when it is sampled."""

    def sample(self, n: int) -> Tensor:
        images = super().sample(n)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
        np.seterr(all="raise")
        seed_everything(8, workers=True, verbose=False)
        return images


def test_switches_of_the_process_that_a_sampler_changes_are_restored() -> None:
    alone = trained(Switching, [])
    before = switches()
    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None, on_error="raise")
    assert trained(Switching, [diagnostics]) == alone
    assert switches() == before
    assert diagnostics.monitors["cms"].evaluations == 2


class Leaving(SmallVAE):
    """Ends the process when it is sampled, after as many times as are given."""

    left: ClassVar[int] = 0

    def sample(self, n: int) -> Tensor:
        type(self).left -= 1
        if type(self).left < 0:
            sys.exit("no images today")
        return super().sample(n)


@pytest.mark.parametrize("times", [0, 1])
def test_a_sampler_that_ends_the_process_is_left_out(times: int) -> None:
    alone = trained(Leaving, [])
    diagnostics = GenerativeDiagnostics(
        adapter=ModelAdapter(sample="sample", num_samples=32, num_reference=64), max_overhead=None
    )
    Leaving.left = times
    with pytest.warns(DiagnosticWarning, match="SystemExit: no images today") if times else nullcontext():
        assert trained(Leaving, [diagnostics]) == alone
    assert times or "no images today" in diagnostics.left_out["cms"]


class FoundNoNumbers(BaseException):
    """What some samplers raise where they find nan, which is no ``Exception``."""


class Raising(Leaving):
    """Raises what is no error when it is sampled, after as many times as are given."""

    def sample(self, n: int) -> Tensor:
        try:
            return super().sample(n)
        except SystemExit as exit_:
            raise FoundNoNumbers(exit_.code) from exit_


@pytest.mark.parametrize("times", [0, 1])
def test_a_sampler_that_raises_what_is_no_error_is_left_out(times: int) -> None:
    alone = trained(Raising, [])
    diagnostics = GenerativeDiagnostics(
        adapter=ModelAdapter(sample="sample", num_samples=32, num_reference=64), max_overhead=None
    )
    Raising.left = times
    with pytest.warns(DiagnosticWarning, match="raised FoundNoNumbers: no images today") if times else nullcontext():
        assert trained(Raising, [diagnostics]) == alone
    assert times or "no images today" in diagnostics.left_out["cms"]


@pytest.mark.parametrize("images", [lambda batch: sys.exit(3), lambda batch: batch[0] * NUMPY.uniform(1, 1)])
def test_a_callable_for_batches_neither_ends_the_process_nor_moves_generators(images: Any) -> None:
    alone = trained(WithGeneratorsOfItsFile, [])
    diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(images=images, num_samples=32), max_overhead=None)
    assert trained(WithGeneratorsOfItsFile, [diagnostics]) == alone


def test_an_interrupt_ends_the_run() -> None:
    def interrupt(module: Any, n: int) -> Tensor:
        raise KeyboardInterrupt

    diagnostics = GenerativeDiagnostics(adapter=ModelAdapter(sample=interrupt))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trained(SmallVAE, [diagnostics])


class Surroundings(LightningDataModule):
    """Data with a generator, a count and a list, and as many images as the batches of other tests."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.calls, self.sizes = np.random.default_rng(0), 0, []

    def train_dataloader(self) -> DataLoader[Any]:
        return batches()

    def shift(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(images))
        return images + torch.from_numpy(self.generator.standard_normal(images.shape)).float() / 100


class Shifting(Callback, Surroundings):
    """A callback with the same."""


class Reaching(DDPM):
    """Acts in its training step on all that it reaches through its trainer, as people do with automatic optimization."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        scheduler.step()
        optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0] * (1 + self.trainer.global_step / 100)
        first = optimizer.param_groups[0]["params"][0]
        assert first is next(self.parameters())
        if self.trainer.global_step > 0:
            optimizer.state[first]["seen"] = optimizer.state[first].get("seen", 0) + 1
        self.trainer.strategy.optimizers[0].param_groups[0]["eps"] /= 1.01
        self.toggle_optimizer(optimizer)
        self.untoggle_optimizer(optimizer)
        self.trainer.seen = getattr(self.trainer, "seen", 0) + 1
        shifted = self.trainer.callbacks[0].shift(self.trainer.datamodule.shift(batch[0]))
        return super().training_step([shifted], batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]


def test_a_training_step_that_is_watched_acts_on_nothing_of_the_run() -> None:
    def run(*callbacks: Any) -> Any:
        seed_everything(0, verbose=False)
        module, data, own = Reaching(), Surroundings(), trainer(Shifting(), *callbacks, max_epochs=2)
        own.fit(module, datamodule=data)
        optimizer, scheduler = own.optimizers[0].state_dict(), own.lr_scheduler_configs[0].scheduler.state_dict()
        held = [[one.calls, one.sizes, one.generator] for one in (data, own.callbacks[0])]
        return everything(module), everything([optimizer, scheduler, held]), own.seen

    diagnostics = GenerativeDiagnostics(adapter=small(), max_overhead=None, on_error="raise")
    assert run(diagnostics) == run()
    assert "timestep_loss" not in diagnostics.left_out


def test_a_sampler_that_reads_the_run_sees_it_as_it_is() -> None:
    read: list[Any] = []

    class Reading(SmallVAE):
        def sample(self, n: int) -> Tensor:
            own, optimizer = self.trainer, self.optimizers()
            read.append((own.global_step, own.max_epochs, own.datamodule, len(own.callbacks), type(optimizer)))
            assert self.lr_schedulers() is None
            assert own.strategy.root_device == self.device
            assert optimizer.state[next(self.parameters())]["step"] == own.global_step
            # which advances the generator of the loader
            next(iter(own.train_dataloader))
            own.save_checkpoint("nowhere.ckpt")
            return super().sample(n)

    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=small(), on_error="raise", every_n_train_steps=4)

    def weights(*callbacks: Any) -> list[Tensor]:
        seed_everything(0, verbose=False)
        module = Reading()
        trainer(*callbacks, max_epochs=3).fit(module, WithLoader().loader)
        return [parameter.detach().clone() for parameter in module.parameters()]

    assert all(map(torch.equal, weights(monitor), weights()))
    assert monitor.evaluations == 3
    assert read[-1] == (12, 3, None, 1, torch.optim.Adam)
    assert not Path("nowhere.ckpt").exists()


class OutOfRange(SmallVAE):
    """Its samples are in another range of values, and fail from the second evaluation on."""

    def sample(self, n: int) -> Tensor:
        if self.current_epoch > 0:
            raise ArithmeticError("no images today")
        return 100 + super().sample(n)


def test_warnings_that_are_errors_are_logged_and_training_goes_on(
    refused_warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # of two evaluations, one fails
    monkeypatch.setattr("lightning_gendiag.model.view.WITHIN", 1)
    alone = trained(OutOfRange, [])
    diagnostics = GenerativeDiagnostics(
        adapter=ModelAdapter(sample="sample", num_samples=32, num_reference=64), max_overhead=None
    )
    with warnings.catch_warnings():
        # also where the suite runs with warnings ignored
        for text in ("generated images span", ".*no images today"):
            warnings.filterwarnings("error", text)
        assert trained(OutOfRange, [diagnostics]) == alone
    assert diagnostics.monitors["cms"].evaluations == 1
    assert sum("generated images span" in text for text in refused_warnings) == 1
    assert any(text.startswith("DiagnosticWarning: Cos") and "no images today" in text for text in refused_warnings)
    refused_warnings.clear()


def test_a_lazy_layer_that_is_never_called_fails_no_evaluation() -> None:
    class Unused(SmallVAE):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LazyLinear(3)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.decoder_net.parameters(), 1e-3)

    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=small(), on_error="raise")
    trained(Unused, [monitor])
    assert monitor.evaluations == 2


def test_a_loader_that_is_the_reference_gives_training_the_same_batches() -> None:
    class Noisy(TensorDataset):
        """A dataset that adds noise from its own generator."""

        def __init__(self, *tensors: Tensor) -> None:
            super().__init__(*tensors)
            self.rng = np.random.default_rng(0)

        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return image + float(self.rng.normal()) / 100, label

    def loader() -> DataLoader[Any]:
        images, labels = (rows[:64] for rows in digits(8))
        generator = torch.Generator().manual_seed(5)
        return DataLoader(Noisy(images, labels), batch_size=16, shuffle=True, generator=generator)

    data = loader()
    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=ModelAdapter(reference=data, num_samples=32))
    assert trained(SmallVAE, [monitor], data) == trained(SmallVAE, [], loader())
    assert monitor.evaluations == 2


def test_the_reference_is_collected_before_a_step_can_change_its_batch() -> None:
    class InPlace(SmallVAE):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images = batch[0].clone()
            batch[0].zero_()
            return super().training_step([images], batch_idx)

    class Copying(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return tuple(tensor[index].clone() for tensor in self.tensors)

    images, labels = (rows[:64] for rows in digits(8))
    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=small())
    trainer(monitor, max_epochs=1).fit(InPlace(), DataLoader(Copying(images, labels), batch_size=16))
    assert torch.equal(monitor.view.reference.images, images)
