from __future__ import annotations

import gc
import math
import random
import sys
import weakref
from contextlib import nullcontext
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from example_models.data import digits
from lightning_gendiag import ModelAdapter
from lightning_gendiag.model import compat
from lightning_gendiag.model.batches import Images, images_of, read_labels
from lightning_gendiag.model.copying import copy_module
from lightning_gendiag.model.isolation import isolated_in_place
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.view import ModelView
from tests.helpers.models import SmallVAE, TinyGAN
from tests.helpers.running import attached, batches, trainer
from tests.helpers.versions import WeightAveraging


class Disturbed(TinyGAN):
    """A GAN whose sampler changes modes, weights, buffers and the state of random number generators."""

    def sample(self, n: int) -> Tensor:
        self.generator.train()
        self.still.weight.data.add_(0)
        self.still.running_mean += 1
        self.still.num_batches_tracked = torch.tensor(99)
        random.random()
        np.random.rand()
        return self(torch.randn(n, self.latent_dim))


def test_sampling_leaves_no_trace() -> None:
    module = Disturbed()
    module.generator[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    view = attached(module, ModelAdapter(num_samples=300))
    images = view.samples().images
    assert images.shape == (300, 1, 8, 8)
    assert not images.requires_grad
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


def test_a_failing_sampler_leaves_no_trace_either() -> None:
    class Failing(TinyGAN):
        def sample(self, n: int) -> Tensor:
            self.still.running_mean += 1
            torch.randn(3)
            raise RuntimeError("no luck")

    module = Failing()
    view = attached(module, ModelAdapter("sample"), ())
    state, modes = torch.get_rng_state(), [part.training for part in module.modules()]
    with pytest.raises(ValueError, match=r"sample must .* but self.sample\(n\) fails \(RuntimeError: no luck\)"):
        view.samples()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(module.still.running_mean, torch.zeros(3))
    assert [part.training for part in module.modules()] == modes


class Acting(nn.Linear):
    """A layer that acts when its mode changes, as LoRA layers do, with a flag and with buffers that are hard to compare."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.calls, self.ready = 0, False
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("operator", torch.eye(2).to_sparse())
        self.register_buffer("expanded", torch.tensor([math.nan]).expand(3))

    def train(self, mode: bool = True) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().train(mode)


def test_a_module_that_cannot_be_copied_is_restored_in_place() -> None:
    module = nn.Sequential(Acting(), nn.Dropout(), nn.BatchNorm1d(2).eval())
    calls, modes, state = module[0].calls, [part.training for part in module.modules()], torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no luck"), isolated_in_place(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        module[0].running += 1
        module[0].running = torch.ones(2)
        module[0].ready = True
        torch.rand(1)
        raise RuntimeError("no luck")
    assert module[0].calls == calls
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(module[0].running, torch.zeros(2))
    assert module[0].ready is False
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("place", ["torch.distributed.tensor", "torch.distributed._tensor"])
def test_sharded_parameters_are_known_where_old_and_new_versions_of_torch_define_them(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DTensor(nn.Parameter):
        pass

    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    module, run = nn.Linear(2, 2), trainer()
    assert compat.sharded_by(run, module) is None
    monkeypatch.setitem(sys.modules, place, SimpleNamespace(DTensor=DTensor))
    assert compat.sharded_by(run, module) is None
    module.weight = DTensor(torch.zeros(2, 2))
    assert compat.sharded_by(run, module) == "FSDP2 or tensor parallelism"


class DeepSpeedStrategy(SimpleNamespace):
    """Named as Lightning's, which cannot be made without the package."""


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (FSDPStrategy(), "FSDPStrategy"),
        (ModelParallelStrategy(), "ModelParallelStrategy"),
        (DeepSpeedStrategy(zero_stage_3=True), "DeepSpeedStrategy"),
        (DeepSpeedStrategy(zero_stage_3=False), None),
        (DDPStrategy(), None),
    ],
)
def test_a_sharded_module_is_refused_with_the_name_of_what_shards_it(strategy: Any, expected: str | None) -> None:
    module, run = TinyGAN(), SimpleNamespace(strategy=strategy, world_size=1, global_rank=0)
    assert compat.sharded_by(run, module) == expected
    view = ModelView(ModelAdapter(), Subject(module, run), run)
    with pytest.raises(ValueError, match=f"sharded by {expected}. To fix") if expected else nullcontext():
        view.attach()


def test_a_module_that_is_too_large_to_copy_is_evaluated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gendiag.model.subject.fits_in_memory", lambda module: False)
    module = TinyGAN()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.warns(UserWarning, match="TinyGAN cannot be copied .it is larger"):
        view = attached(module, ModelAdapter(num_samples=20))
    assert view.module is module
    assert view.samples().images.shape == (20, 1, 8, 8)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module.generator.training


class TestCopies:
    def test_a_copy_shares_no_tensor_and_no_part_with_the_module(self) -> None:
        module = TinyGAN()
        copied = copy_module(module)
        mine = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
        assert not mine & {t.data_ptr() for t in (*copied.module.parameters(), *copied.module.buffers())}
        assert not {id(part) for part in module.modules()} & {id(part) for part in copied.module.modules()}
        assert [name for name, _ in copied.module.named_modules()] == [name for name, _ in module.named_modules()]
        assert all(map(torch.equal, module.state_dict().values(), copied.module.state_dict().values()))

    def test_the_next_copy_reuses_the_memory(self) -> None:
        module = TinyGAN()
        first = copy_module(module)
        places = {t.data_ptr() for t in first.module.parameters()}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        second = copy_module(module, first)
        assert {t.data_ptr() for t in second.module.parameters()} == places
        assert all(map(torch.equal, module.parameters(), second.module.parameters()))

    def test_references_to_a_part_become_references_to_its_copy(self) -> None:
        module = TinyGAN()
        module.tied = nn.Linear(4, 16)
        module.tied.weight = module.generator[0].weight
        module.sampler, module.bound = lambda n: module.generator(torch.randn(n, 4)), module.forward
        module.parts = {"first": module.generator[0]}
        copied = copy_module(module)
        twin: Any = copied.module
        assert twin.tied.weight is twin.generator[0].weight
        assert twin.bound.__self__ is twin
        assert twin.parts["first"] is twin.generator[0]
        with torch.no_grad():
            twin.generator[4].weight.zero_()
            twin.generator[4].bias.zero_()
        assert not twin.sampler(3).any()
        assert module.sampler(3).any()
        assert copied.counterpart(module.generator) is twin.generator
        assert copied.counterpart(module.generator.forward).__self__ is twin.generator
        assert not copied.counterpart(lambda: module.generator(torch.randn(2, 4)))().any()

    def test_only_attributes_that_cannot_be_copied_are_shared(self) -> None:
        module = TinyGAN()
        module.kept = module(torch.randn(2, 4))
        module.things = [torch.zeros(2), Lock(), {"x": torch.ones(1)}]
        twin: Any = copy_module(module).module
        assert torch.equal(twin.kept, module.kept)
        assert not twin.kept.requires_grad
        assert twin.things[1] is module.things[1]
        assert twin.things[0] is not module.things[0]
        assert twin.things[2]["x"] is not module.things[2]["x"]

    def test_a_module_with_a_part_that_cannot_be_copied_is_evaluated_in_place(self) -> None:
        class Handle(nn.Linear):
            def __reduce_ex__(self, protocol: Any) -> Any:
                raise TypeError("a handle cannot be copied")

        module = TinyGAN()
        module.handle = Handle(4, 4)
        with pytest.raises(TypeError, match="handle cannot be copied"):
            copy_module(module)
        with pytest.warns(UserWarning, match=r"TinyGAN cannot be copied .TypeError: handle cannot be copied"):
            view = attached(module, ModelAdapter(num_samples=4))
        assert view.module is module
        assert view.samples().images.shape == (4, 1, 8, 8)
        assert module.handle.training
        # the module's own log method is not replaced
        assert "log" not in vars(module)

    def test_a_callback_or_a_trainer_in_an_attribute_is_shared(self) -> None:
        module = TinyGAN()
        own = trainer()
        module.things = {"trainer": own, "callback": own.callbacks[0] if own.callbacks else own}
        twin: Any = copy_module(module).module
        assert twin.things["trainer"] is own

    def test_metrics_of_a_copy_are_independent_of_the_modules(self) -> None:
        module = TinyGAN()
        module.average = MeanMetric()
        module.average.update(3.0)
        twin: Any = copy_module(module).module
        twin.average.update(9.0)
        assert float(twin.average.compute()) == 6
        assert float(module.average.compute()) == 3

    def test_a_copy_that_refers_to_itself_is_freed_before_the_next_is_made(self) -> None:
        module = TinyGAN()
        module.again, module.data = module.forward, [np.zeros(4)]
        copied = copy_module(module)
        old = weakref.ref(copied.module.data[0])
        gc.disable()
        try:
            copied = copy_module(module, copied)
            assert old() is None
            assert copied.module.data[0] is not module.data[0]
        finally:
            gc.enable()

    def test_a_graph_is_copied_with_its_parts(self) -> None:
        module = TinyGAN()
        module.graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)))
        twin: Any = copy_module(module).module
        assert not {id(part) for part in module.modules()} & {id(part) for part in twin.modules()}
        z = torch.randn(3, 4)
        assert torch.equal(twin.graph.eval()(z), module.graph.eval()(z))

    def test_a_wrapper_that_passes_attributes_on_is_not_taken_for_a_compiled_part(self) -> None:
        class Scaled(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def __getattr__(self, name: str) -> Any:
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(super().__getattr__("net"), name)

            def forward(self, z: Tensor) -> Tensor:
                return 5 * self.net(z)

        module = TinyGAN()
        module.scaled = Scaled(torch.compile(nn.Linear(4, 4), backend="eager"))
        twin: Any = copy_module(module).module
        assert type(twin.scaled) is Scaled
        assert type(twin.scaled.net) is nn.Linear

    def test_a_module_inside_sees_the_trainer_too(self) -> None:
        class Inner(LightningModule):
            def forward(self, z: Tensor) -> Tensor:
                self.log("inner", 1.0)
                assert self.trainer.lightning_module is not outer
                return torch.full((len(z), 1, 8, 8), float(self.current_epoch))

        class Outer(TinyGAN):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def sample(self, n: int) -> Tensor:
                return self.inner(torch.zeros(n, 1))

        outer = Outer()
        view = attached(outer, ModelAdapter(num_samples=4))
        view.trainer.fit_loop.epoch_progress.current.completed = 3
        view.expire()
        assert view.samples().images.unique().tolist() == [3.0]

    def test_calling_the_module_that_is_trained_raises_an_error(self) -> None:
        module = TinyGAN()
        globals()["MODULE"] = module
        view = attached(module, ModelAdapter(lambda given, n: MODULE(torch.zeros(n, 4)), num_samples=4), ())  # noqa: F821
        with pytest.raises(ValueError, match=r"an evaluation must use a copy of the module, but called TinyGAN"):
            view.samples()
        assert module(torch.zeros(2, 4)).shape == (2, 1, 8, 8)

    def test_a_copy_can_read_its_trainer_and_neither_log_nor_stop(self) -> None:
        class Chatty(TinyGAN):
            def log(self, name: str, value: Any) -> None:  # type: ignore[override]
                raise RuntimeError("log is not for copies")

            def sample(self, n: int) -> Tensor:
                self.log("samples", n)
                self.log_dict({"samples": n})
                self.trainer.should_stop = True
                assert self.trainer.world_size == 1
                assert self.current_epoch == 0
                assert self.logger is None
                return self(torch.randn(n, 4))

        view = attached(Chatty(), ModelAdapter(num_samples=4))
        assert view.samples().images.shape == (4, 1, 8, 8)
        assert not view.trainer.should_stop


def test_samples_are_the_same_at_each_evaluation_and_computed_once() -> None:
    calls = []

    class Counting(TinyGAN):
        def sample(self, n: int) -> Tensor:
            calls.append(n)
            return self(torch.randn(n, self.latent_dim))

    view = attached(Counting(), ModelAdapter(num_samples=200))
    first = view.samples()
    assert view.samples() is first
    # the first two samples are those by which the sampler was chosen
    assert calls == [2, 128, 72]
    view.expire()
    assert torch.equal(view.samples().images, first.images)
    assert not torch.equal(first.images[:72], first.images[128:])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_all_ranks_together_have_the_samples_of_one_process(world: int) -> None:
    module = TinyGAN()
    whole = attached(module, ModelAdapter(num_samples=300)).samples().images
    parts = []
    for rank in range(world):
        view = attached(module, ModelAdapter(num_samples=300))
        view.trainer = SimpleNamespace(
            global_step=0,
            global_rank=rank,
            world_size=world,
            callbacks=[],
            precision_plugin=view.trainer.precision_plugin,
        )
        parts += list(view.samples().images)
    assert len(parts) == 300
    known = {tuple(image.flatten().tolist()) for image in whole}
    assert {tuple(image.flatten().tolist()) for image in parts} == known


def conditional(module: Any, n: int, labels: Tensor) -> Tensor:
    return labels.float().view(n, 1, 1, 1).expand(n, 1, 8, 8)


@pytest.mark.parametrize(
    "sample",
    [None, "forward", "generator_image", "generate", lambda module, n: module.generate(n)],
)
def test_a_sampler_may_be_a_method_a_submodule_or_a_callable(sample: Any) -> None:
    class Many(TinyGAN):
        def __init__(self) -> None:
            super().__init__()
            self.generator_image = nn.Sequential(self.generator, nn.Unflatten(1, (1, 8, 8)))

        def generate(self, n: int) -> Tensor:
            return self(torch.randn(n, self.latent_dim))

    assert attached(Many(), ModelAdapter(sample, num_samples=10)).samples().images.shape == (10, 1, 8, 8)


def test_a_conditional_sampler_gets_the_labels_of_the_reference() -> None:
    reference = 3 + 3 * torch.rand(40, 1, 8, 8), torch.arange(40) % 4 + 3
    view = attached(TinyGAN(), ModelAdapter(conditional, conditional=True, reference=reference, num_samples=60))
    sampled = view.samples()
    assert sampled.labels is not None
    assert torch.equal(sampled.images[:, 0, 0, 0].long(), sampled.labels)
    assert set(sampled.labels.tolist()) == {3, 4, 5, 6}


def test_encode_and_decode_are_found_or_raise_an_error() -> None:
    module = TinyGAN()
    with pytest.raises(
        ValueError, match=r"encode must be known, but TinyGAN has none of encode, encoder, .*. To fix this, define"
    ):
        attached(module, ModelAdapter(), ("encode",))
    view = attached(module, ModelAdapter(encode="discriminator", decode=lambda m, z: m(z)), ("encode", "decode"))
    with view.isolated():
        assert view.latents_of(torch.zeros(2, 1, 8, 8)).shape == (2, 1)
        assert view.decode(torch.zeros(2, 4)).shape == (2, 1, 8, 8)


def test_errors_about_sampling_show_the_fix() -> None:
    class Mute(LightningModule):
        pass

    class Pair(LightningModule):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    class Other(TinyGAN):
        def sample(self, z: Tensor) -> Tensor:
            return self(z)

    with pytest.raises(ValueError, match=r"Mute has none of sample, .*decode, .* To fix this, define Mute.sample\(n\)"):
        attached(Mute(), ModelAdapter())
    with pytest.raises(ValueError, match=r"sample must be known, but self.forward takes \(x: 'Tensor', t: 'Tensor'\)"):
        attached(Pair(), ModelAdapter())
    with pytest.raises(ValueError, match=r"sample must name a method or submodule of TinyGAN, got 'nowhere.at_all'"):
        attached(TinyGAN(), ModelAdapter("nowhere.at_all"))
    assert attached(Other(), ModelAdapter()).parts.way("sample").name == "self.sample(noise)"
    reference = torch.rand(4, 1, 9, 9)
    with pytest.raises(ValueError, match=r"self.generator .* must return \(2, 1, 9, 9\) data .*, got \(2, 64\)"):
        attached(TinyGAN(), ModelAdapter("generator", reference=reference))
    without_average = attached(TinyGAN(), ModelAdapter(weights="ema"), ())
    without_average.refresh()
    with pytest.raises(
        ValueError, match="weights must be 'raw' or 'auto' where neither a callback nor the module averages"
    ):
        without_average.samples()
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 2"):
        ModelAdapter(num_samples=1)
    with pytest.raises(ValueError, match="weights must be 'auto'"):
        ModelAdapter(weights="best")  # type: ignore[arg-type]


class WithEncoder(LightningModule):
    """Latents of length 4, and an encoder whose output may be something else."""

    def __init__(self, length: int, **layers: nn.Module) -> None:
        super().__init__()
        self.latent_dim, self.encoder = 4, nn.Sequential(nn.Flatten(), nn.Linear(64, length))
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_an_encoder_is_used_only_where_it_returns_latents() -> None:
    def latents_of_zeros(module: LightningModule, **options: Any) -> Tensor:
        view = attached(module, ModelAdapter(reference=torch.rand(4, 1, 8, 8), **options), ("encode",))
        with view.isolated():
            return view.latents_of(torch.zeros(2, 1, 8, 8))

    assert latents_of_zeros(WithEncoder(4)).shape == (2, 4)
    with pytest.raises(
        ValueError, match=r"self.encoder\(images\) fails \(it must return \(2, 4\) latents, got \(2, 7\)"
    ):
        latents_of_zeros(WithEncoder(7))
    # a name that the user gives is trusted
    assert latents_of_zeros(WithEncoder(7), encode="encoder").shape == (2, 7)
    # mean and variance in one tensor
    module = WithEncoder(8)
    assert torch.equal(latents_of_zeros(module), module.encoder(torch.zeros(2, 1, 8, 8))[:, :4].detach())
    module = WithEncoder(4, to_mu=nn.Linear(4, 4))
    assert torch.equal(latents_of_zeros(module), module.to_mu(module.encoder(torch.zeros(2, 1, 8, 8))).detach())
    # names that merely resemble those of a posterior's layers
    assert latents_of_zeros(WithEncoder(4, num=nn.Linear(4, 4), museum=nn.Linear(4, 4))).shape == (2, 4)


def test_a_submodule_named_for_samples_gives_the_latent_length_and_decodes() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z_dim, self.layer = 3, nn.Linear(3, 64)

        def paint(self, n: int) -> Tensor:
            return self(torch.randn(n, 3))

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(z).view(-1, 1, 8, 8)

    class Outer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    view = attached(Outer(), ModelAdapter("model", num_samples=4), ("sample", "decode"))
    assert view.latent_dim == 3
    assert view.samples().images.shape == (4, 1, 8, 8)
    with view.isolated():
        assert view.decode(torch.zeros(2, 3)).shape == (2, 1, 8, 8)
    # a method that takes the number of images cannot decode
    with pytest.raises(ValueError, match="decode must be known"):
        attached(Outer(), ModelAdapter("model.paint"), ("sample", "decode"))


class TestReference:
    images, labels = digits(8)

    @pytest.mark.parametrize("kind", ["tensor", "pair", "dataset", "loader"])
    def test_may_be_given_in_any_form(self, kind: str) -> None:
        given = {
            "tensor": self.images,
            "pair": (self.images, self.labels),
            "dataset": TensorDataset(self.images, self.labels),
            "loader": DataLoader(TensorDataset(self.images, self.labels), batch_size=30, shuffle=True),
        }[kind]
        module = TinyGAN()
        state = torch.get_rng_state()
        view = attached(module, ModelAdapter(reference=given, num_reference=100))
        assert torch.equal(state, torch.get_rng_state())
        assert view.has_reference
        assert view.reference.images.shape == (100, 1, 8, 8)
        assert (view.reference.labels is None) == (kind == "tensor")
        again = attached(TinyGAN(), ModelAdapter(reference=given, num_reference=100))
        assert again.has_reference
        assert torch.equal(view.reference.images, again.reference.images)

    def test_is_collected_from_training_batches(self) -> None:
        view = attached(TinyGAN(), ModelAdapter(num_reference=50))
        for index, batch in enumerate(batches(n=100)):
            view.real.collect(batch)
            assert view.real.ready(epoch_over=False) == (index >= 3)
        assert view.has_reference
        assert len(view.reference.images) == 50
        assert len(view.reference.images.flatten(1).unique(dim=0)) == 50

    def test_is_complete_when_an_epoch_is_over(self) -> None:
        view = attached(TinyGAN(), ModelAdapter(num_reference=500))
        for batch in batches(n=64):
            view.real.collect(batch)
        assert not view.real.ready(epoch_over=False)
        assert view.real.ready(epoch_over=True)
        assert view.has_reference
        assert len(view.reference.images) == 64

    def test_leaves_out_images_that_are_not_finite(self) -> None:
        images = self.images[:20].clone()
        images[3] = math.nan
        view = attached(TinyGAN(), ModelAdapter(reference=images))
        assert view.has_reference
        assert len(view.reference.images) == 19

    def test_says_what_a_batch_must_hold(self) -> None:
        view = attached(TinyGAN(), ModelAdapter())
        with pytest.raises(
            ValueError,
            match=r"a batch must hold \(N, C, H, W\) images or other data \(N, ...\), got \{text: \(str\)\}. To fix this",
        ):
            view.real.collect({"text": ["a"]})
        with pytest.raises(ValueError, match="reference must hold at least 4 finite images, got 3"):
            attached(TinyGAN(), ModelAdapter(reference=self.images[:3]))
        with pytest.raises(ValueError, match="reference must be a tensor, a pair"):
            attached(TinyGAN(), ModelAdapter(reference=7))

    def test_images_of_several_shapes_are_refused_with_the_shapes(self) -> None:
        view = attached(TinyGAN(), ModelAdapter(num_reference=50))
        for size in (8, 12):
            view.real.collect((torch.rand(8, 1, size, 8), torch.zeros(8)))
        message = r"real images must have one shape, got \(1, 8, 8\) and \(1, 12, 8\). To fix this, resize them"
        with pytest.raises(ValueError, match=message):
            view.real.ready(epoch_over=True)

    def test_few_images_of_an_epoch_are_kept_for_the_next(self) -> None:
        view = attached(TinyGAN(), ModelAdapter(num_reference=50))
        view.real.collect((self.images[:3], torch.arange(3)))
        # each monitor asks, and is told the same
        for _ in range(2):
            with pytest.raises(ValueError, match="at least 4 finite images, got 3"):
                view.real.ready(epoch_over=True)
        view.real.collect((self.images[3:6], torch.arange(3)))
        assert view.real.ready(epoch_over=True)
        assert torch.equal(view.reference.images, self.images[:6])
        assert view.reference.labels is not None
        assert view.reference.labels.tolist() == [0, 1, 2, 0, 1, 2]

    def test_round_trips(self) -> None:
        view = attached(TinyGAN(), ModelAdapter(num_reference=50))
        loader = list(batches(n=100))
        for batch in loader[:2]:
            view.real.collect(batch)
        other = attached(TinyGAN(), ModelAdapter(num_reference=50))
        other.real.load_state_dict(view.real.state_dict())
        for batch in loader[2:]:
            view.real.collect(batch)
            other.real.collect(batch)
        assert view.real.ready(epoch_over=False)
        assert other.real.ready(epoch_over=False)
        assert view.has_reference
        assert other.has_reference
        assert torch.equal(view.reference.images, other.reference.images)
        third = attached(TinyGAN(), ModelAdapter())
        third.real.load_state_dict(view.real.state_dict())
        assert third.real.ready(epoch_over=False)


def test_batches_of_every_form_are_read() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    for batch in (x, (x, y), [x, y], {"image": x, "label": y}, {"pixel_values": x, "labels": y}, ((x, y), y)):
        assert images_of(batch) is x
    assert read_labels((x, y)).labels is y
    assert read_labels({"x": x, "y": y}).labels is y
    assert read_labels((x, x)).labels is None
    assert read_labels(x).labels is None
    assert images_of("nothing") is None


@pytest.mark.parametrize(
    ("real", "generated", "warns"),
    [((-1, 1), (-1, 1), False), ((0, 1), (-1, 1), True), ((-1, 1), (0, 1), True), ((0, 1), (0, 255), True),
     ((-1, 1), (-0.1, 0.1), False)],
)  # fmt: skip
def test_a_warning_about_different_ranges_of_values_is_given_once(
    real: tuple[float, float], generated: tuple[float, float], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    def spread(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, 64 * 10).view(10, 1, 8, 8)

    view = attached(TinyGAN(), ModelAdapter(reference=spread(*real)))
    for step in (1, 1, 1, 2):
        view._check_range(spread(*generated), step)
    # of three evaluations, and not of three looks at one
    assert not recwarn.list
    for step in (3, 4):
        view._check_range(spread(*generated), step)
    assert [str(w.message).startswith("generated images span") for w in recwarn] == [True] * warns


@pytest.mark.parametrize(
    ("scales", "warns"), [((3.0, 3.0, 3.0), True), ((9.0, 5.0, 3.0), False), ((9.0, 3.0, 1.0), False)]
)
def test_what_a_model_has_not_learned_yet_is_no_other_range(
    scales: tuple[float, ...], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    view = attached(TinyGAN(), ModelAdapter(reference=torch.linspace(-1, 1, 640).view(10, 1, 8, 8)))
    for step, scale in enumerate(scales):
        view._check_range(torch.linspace(-scale, scale, 640).view(10, 1, 8, 8), step)
    assert bool(recwarn.list) is warns


def test_outliers_are_no_other_range(recwarn: pytest.WarningsRecorder) -> None:
    view = attached(TinyGAN(), ModelAdapter(reference=torch.linspace(-1, 1, 640).view(10, 1, 8, 8)))
    generated = torch.linspace(-1, 1, 640)
    generated[::200] = 8.0
    for step in range(5):
        view._check_range(generated.view(10, 1, 8, 8), step)
    assert not recwarn.list


def test_warnings_about_ranges_say_what_may_be_wrong(recwarn: pytest.WarningsRecorder) -> None:
    generated = torch.linspace(-0.9, 0.9, 640).view(10, 1, 8, 8)
    view = attached(TinyGAN(), ModelAdapter(reference=3.2 * torch.rand(20, 1, 8, 8) - 0.4))
    for step in range(2):
        view._check_range(generated, step)
    assert not recwarn.list
    view._check_range(generated, 2)
    assert "ends in tanh or sigmoid" in str(recwarn.pop(UserWarning).message)
    view = attached(TinyGAN(), ModelAdapter(reference=255 * torch.rand(20, 1, 8, 8)))
    view._check_range(generated.abs(), 1)
    assert "divide the real images by 255" in str(recwarn.pop(UserWarning).message)
    # of 16 bits
    view = attached(TinyGAN(), ModelAdapter(reference=65535 * torch.rand(20, 1, 8, 8)))
    view._check_range(generated.abs(), 1)
    assert "scale the real images as the training step does" in str(recwarn.pop(UserWarning).message)


class Averaging(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("weights", ["raw", "ema", "auto"])
def test_averaged_weights_are_evaluated_on_request_and_both_sets_of_weights_stay_the_same(weights: Any) -> None:
    from lightning.pytorch.callbacks import Callback

    seen = {}

    class Peek(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            view = ModelView(ModelAdapter(weights=weights), Subject(pl_module, trainer), trainer)
            view.attach()
            average = averaging._average_model.module
            before = [p.clone() for p in pl_module.parameters()], [p.clone() for p in average.parameters()]
            view.refresh()
            with view.isolated():
                now = [p.clone() for p in view.module.parameters()]
            seen["raw"] = all(map(torch.equal, now, before[0]))
            seen["ema"] = all(map(torch.equal, now, before[1]))
            assert view.averaged == seen["ema"]
            assert all(map(torch.equal, pl_module.parameters(), before[0]))
            assert all(map(torch.equal, average.parameters(), before[1]))

    averaging = Averaging()
    trainer(averaging, Peek(), max_epochs=1).fit(TinyGAN(), batches())
    assert seen == {"raw": weights == "raw", "ema": weights != "raw"}


# not an attribute of the module, which would be copied with it
CALLS: list[int] = []


class Squeezing(SmallVAE):
    """A VAE that notes how many images it gets, and fails with a single one, as models that squeeze do."""

    def encode(self, images: Tensor) -> Any:
        CALLS.append(len(images))
        if len(images) == 1:
            raise RuntimeError("the batch axis is gone")
        return super().encode(images)


@pytest.mark.parametrize(
    ("n", "encoded", "reconstructed"), [(129, [43, 43, 43], [64]), (130, [44, 44, 42], [33, 32]), (128, [64, 64], [64])]
)
def test_no_piece_of_real_images_is_a_single_one(n: int, encoded: list[int], reconstructed: list[int]) -> None:
    images, labels = (part[:n] for part in digits(8))
    adapter = ModelAdapter(reference=(images, labels), num_reference=n, chunk_size=64)
    view = attached(Squeezing(), adapter, ("encode", "reconstruct"))
    CALLS.clear()
    pieces = view.encoded()
    assert encoded == CALLS
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), labels)
    CALLS.clear()
    made = view.reconstructions()
    assert reconstructed == CALLS
    assert torch.equal(made.labels, labels[1::2])  # type: ignore[arg-type]
    with view.isolated(exact=True):
        torch.testing.assert_close(made.images, view.decode(view.latents_of(images[1::2])))


class RowAutoencoder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def test_more_rows_than_are_encoded_in_any_case_need_not_be_images() -> None:
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    view = attached(RowAutoencoder(), ModelAdapter(reference=rows), ("encode",))
    assert sum(piece.size for piece in view.encoded()) == 300
    assert len(view.reconstructions().images) == 150


def test_the_range_is_that_of_the_images_that_are_held_now() -> None:
    view = attached(TinyGAN(), ModelAdapter(reference=torch.linspace(-1, 3, 640).view(10, 1, 8, 8)))
    assert view.real.range == (-1, 3)
    view.real.images = Images((255 * torch.ones(4, 1, 8, 8)).byte(), None)
    assert view.real.range == (1, 1)
