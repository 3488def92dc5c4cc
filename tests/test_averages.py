"""Averaged weights inside a module: what is recognised, what is not, and what evaluations use."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_gendiag import CosineMeanSimilarityMonitor, GenerativeDiagnostics, ModelAdapter
from lightning_gendiag.model.averages import has_own_average, load_own_average
from lightning_gendiag.model.copying import copy_module
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.view import ModelView
from tests.helpers.everything import everything
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, state_after_training, trainer
from tests.helpers.versions import EMAWeightAveraging

AVERAGE, RAW = 0.5, 0.25
"""Values of all averaged and of all raw weights."""


def network(value: float = RAW, width: int = 3) -> nn.Module:
    layers = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
    for parameter in layers.parameters():
        nn.init.constant_(parameter, value)
    return layers


class Holder(LightningModule):
    """A wrapper with its network in ``self.model`` and a discriminator."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.model, self.discriminator = network(), nn.Linear(2, 1)
        for name, part in parts.items():
            setattr(self, name, part)


class EMA(nn.Module):
    """As ema-pytorch's: the online model beside the averaged one, and a flag."""

    def __init__(self, online: nn.Module, initted: bool = True, inside: bool = True) -> None:
        super().__init__()
        self.online_model: Any = online if inside else [online]
        self.ema_model = network(AVERAGE)
        self.register_buffer("initted", torch.tensor(initted))


class LitEma(nn.Module):
    """As CompVis': buffers with the names of parameters without dots, and a number of updates."""

    def __init__(self, model: nn.Module, updates: int = 1) -> None:
        super().__init__()
        self.m_name2s_name = {}
        self.register_buffer("num_updates", torch.tensor(updates))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.m_name2s_name[name] = name.replace(".", "")
                self.register_buffer(name.replace(".", ""), torch.full_like(parameter, AVERAGE).detach())

    def copy_to(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(getattr(self, self.m_name2s_name[name]))


class Shadow:
    """As torch_ema's and diffusers': a list of tensors in the order of the parameters."""

    def __init__(self, model: nn.Module, **counts: int | None) -> None:
        self.shadow_params = [torch.full_like(parameter, AVERAGE).detach() for parameter in model.parameters()]
        self.collected_params = [parameter.clone() for parameter in model.parameters()]
        self.refs = [weakref.ref(parameter) for parameter in model.parameters()]
        vars(self).update(counts)


class ModelEmaV2(nn.Module):
    """As timm's: the averaged module as ``module``."""

    def __init__(self, averaged: nn.Module) -> None:
        super().__init__()
        self.module = averaged


class NamedShadow:
    """The class of many tutorials: the model, and its averages by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.backup = model, {}
        self.shadow = {name: torch.full_like(p, AVERAGE).detach() for name, p in model.named_parameters()}


def averaged_model(updates: int = 1) -> AveragedModel:
    average = AveragedModel(network(AVERAGE))
    average.n_averaged.fill_(updates)
    return average


def of_model(make: Callable[[nn.Module], Any], name: str = "ema") -> Holder:
    module = Holder()
    setattr(module, name, make(module.model))
    return module


def values(part: nn.Module) -> set[float]:
    return {value for parameter in part.parameters() for value in parameter.detach().flatten().tolist()}


KINDS: dict[str, tuple[Callable[[], LightningModule], str]] = {
    "child": (lambda: Holder(ema=network(AVERAGE)), "self.ema"),
    "child by its part's name": (lambda: Holder(model_ema=network(AVERAGE)), "self.model_ema"),
    "in a list": (lambda: Holder(ema_model=[network(AVERAGE)]), "self.ema_model"),
    "in a dictionary": (lambda: Holder(emas={"model": network(AVERAGE)}), "self.emas.model"),
    "AveragedModel": (lambda: Holder(ema=averaged_model()), "self.ema"),
    "AveragedModel by its type": (lambda: Holder(smooth=averaged_model()), "self.smooth"),
    "ema-pytorch": (lambda: of_model(EMA), "self.ema"),
    "ema-pytorch without the model": (lambda: of_model(lambda model: EMA(model, inside=False)), "self.ema"),
    "timm": (lambda: Holder(ema=ModelEmaV2(network(AVERAGE))), "self.ema"),
    "timm, an object": (lambda: Holder(smoother=SimpleNamespace(ema=1), ema=SimpleNamespace(ema=network(AVERAGE))), "self.ema"),
    "LitEma": (lambda: of_model(LitEma, "model_ema"), "self.model_ema"),
    "torch_ema": (lambda: of_model(lambda model: Shadow(model, num_updates=1)), "self.ema"),
    "torch_ema that does not count": (lambda: of_model(lambda model: Shadow(model, num_updates=None)), "self.ema"),
    "diffusers": (lambda: of_model(lambda model: Shadow(model, optimization_step=1)), "self.ema"),
    "tutorials": (lambda: of_model(NamedShadow), "self.ema"),
    "list of tensors": (lambda: of_model(lambda model: Shadow(model).shadow_params, "ema_params"), "self.ema_params"),
    "dictionary of tensors": (lambda: of_model(lambda model: NamedShadow(model).shadow, "shadow"), "self.shadow"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_each_kind_are_written_into_the_part_that_they_average(kind: str) -> None:
    make, name = KINDS[kind]
    module = make()
    discriminator = copy.deepcopy(module.discriminator)
    copied = copy_module(module).module
    before, state = everything(module), torch.get_rng_state()
    assert has_own_average(module)
    assert load_own_average(copied) == name
    assert values(copied.model) == {AVERAGE}
    assert values(copied.discriminator) == values(discriminator)
    assert everything(module) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Holder(ema=averaged_model(updates=0)),
        lambda: of_model(lambda model: EMA(model, initted=False)),
        lambda: of_model(lambda model: LitEma(model, updates=0)),
        lambda: of_model(lambda model: Shadow(model, num_updates=0)),
        lambda: of_model(lambda model: Shadow(model, optimization_step=0)),
    ],
    ids=["AveragedModel", "ema-pytorch", "LitEma", "torch_ema", "diffusers"],
)
def test_an_average_that_was_never_updated_is_not_used(make: Callable[[], LightningModule]) -> None:
    module = make()
    assert has_own_average(module)
    assert load_own_average(module) is None
    assert values(module.model) == {RAW}


class Codebook(nn.Module):
    """A codebook whose type says EMA, since it averages its vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)


class VectorQuantizerEMA(Codebook):
    pass


@pytest.mark.parametrize(
    ("parts", "has"),
    [
        ({}, False),
        ({"top": VectorQuantizerEMA(), "bottom": VectorQuantizerEMA(), "classes": nn.Embedding(4, 2)}, False),
        ({"avg_proj": nn.Linear(2, 2), "max_proj": nn.Linear(2, 2)}, False),
        ({"shadow_net": network(AVERAGE)}, False),
        ({"schema": network(AVERAGE), "ema_decay": 0.999, "use_ema": True, "semantic": nn.Linear(2, 2)}, False),
        ({"average_meter": SimpleNamespace(values=[torch.ones(3)])}, False),
        ({"ema": network(AVERAGE, width=5)}, True),
        ({"ema": network(AVERAGE), "second": network()}, True),
        ({"ema": [torch.tensor(0.5)], "temperature": nn.ParameterList([torch.tensor(1.0)])}, False),
    ],
    ids=["none", "codebooks", "layers", "shadows", "names", "meter", "other shapes", "ambiguous", "numbers"],
)  # fmt: skip
def test_what_only_looks_like_an_average_is_left_alone(parts: dict[str, Any], has: bool) -> None:
    module = Holder(**copy.deepcopy(parts))
    before = everything(module)
    assert load_own_average(module) is None
    assert has_own_average(module) is has
    assert everything(module) == before


@pytest.mark.parametrize(
    ("parts", "averages"),
    [
        (("generator", "discriminator"), ("ema_generator",)),
        (("generator", "discriminator"), ("generator_ema", "discriminator_ema")),
        (("generator", "discriminator"), ("g_ema",)),
        (("generator", "generator2"), ("generator_ema",)),
        (("netG", "netD"), ("netG_ema", "netD_ema")),
        (("G_AB", "G_BA"), ("G_AB_ema", "G_BA_ema")),
        (("model", "generator"), ("model_ema",)),
    ],
)
def test_of_several_parts_with_the_same_shapes_the_name_decides(
    parts: tuple[str, ...], averages: tuple[str, ...]
) -> None:
    module = LightningModule()
    for index, part in enumerate(parts):
        setattr(module, part, network(index / 8))
    for index, average in enumerate(averages):
        setattr(module, average, network(AVERAGE + index / 8))
    assert load_own_average(module) == " and ".join(f"self.{average}" for average in averages)
    expected = [AVERAGE + i / 8 if i < len(averages) else i / 8 for i in range(len(parts))]
    assert [values(getattr(module, part)) for part in parts] == [{value} for value in expected]
    assert [values(getattr(module, average)) for average in averages] == [
        {AVERAGE + i / 8} for i in range(len(averages))
    ]


def test_the_part_whose_parameters_are_exactly_those_of_the_average_comes_first() -> None:
    module = LightningModule()
    module.first, module.second, module.ema = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    module.first.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    assert load_own_average(module) == "self.ema"
    assert torch.equal(module.second.weight, module.ema.weight)
    assert not torch.equal(module.first.weight, module.ema.weight)


def test_wrappers_of_one_network_are_one_part_and_of_two_averages_of_it_the_first_is_used() -> None:
    module = LightningModule()
    module.model = network()
    module.slow_ema, module.fast_ema = Shadow(module.model), Shadow(network(AVERAGE))
    for tensor in module.fast_ema.shadow_params:
        tensor.fill_(1.0)
    assert load_own_average(module) == "self.slow_ema"
    assert values(module) == {AVERAGE}


def test_the_model_that_an_average_refers_to_is_no_average() -> None:
    module = of_model(lambda model: SimpleNamespace(model=model, shadow={}))
    module.second = network(0.125)
    assert load_own_average(module) is None
    assert (values(module.model), values(module.second)) == ({RAW}, {0.125})


def test_an_average_beside_its_part_is_of_this_part() -> None:
    module = LightningModule()
    module.first, module.second = nn.Module(), nn.Module()
    for part in (module.first, module.second):
        part.net = network()
    module.second.ema = network(AVERAGE)
    assert load_own_average(module) == "self.second.ema"
    assert (values(module.first), values(module.second.net)) == ({RAW}, {AVERAGE})


def test_an_average_may_be_of_the_whole_module_and_inside_a_model_with_a_telling_type() -> None:
    class EMADiffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet, self.ema_unet = network(), network(AVERAGE)

    module = Holder(model=EMADiffusion())
    assert load_own_average(module) == "self.model.ema_unet"
    assert values(module.model.unet) == {AVERAGE}
    module = Holder()
    average = copy.deepcopy(module)
    for parameter in average.parameters():
        nn.init.constant_(parameter, AVERAGE)
    module.ema = average
    assert load_own_average(module) == "self.ema"
    assert values(module.model) == values(module.discriminator) == values(module.ema) == {AVERAGE}


def test_parameters_that_are_shared_with_the_average_and_frozen_ones_without_an_average_are_kept() -> None:
    module = Holder(ema=network(AVERAGE))
    module.ema[2] = module.model[2]
    assert load_own_average(module) == "self.ema"
    assert (values(module.model[0]), values(module.model[2])) == ({AVERAGE}, {RAW})
    module = Holder()
    module.model[2].requires_grad_(False)
    module.model_ema = LitEma(module.model)
    assert load_own_average(module) == "self.model_ema"
    assert (values(module.model[0]), values(module.model[2])) == ({AVERAGE}, {RAW})


@pytest.mark.parametrize(("mean", "expected"), [(0.0, 3.0), (2.0, 2.0)])
def test_statistics_of_normalization_layers_are_taken_over_where_the_average_has_any(
    mean: float, expected: float
) -> None:
    module = LightningModule()
    module.net, module.net_ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    module.net.running_mean.fill_(3.0)
    module.net_ema.running_mean.fill_(mean)
    assert load_own_average(module) == "self.net_ema"
    assert module.net.running_mean.tolist() == [expected] * 2


# ---- context managers ----


class Scoped(Holder):
    """As latent diffusion models: a context manager in which the module has its averaged weights."""

    left = 0

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        stored = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.enter()
        try:
            yield
        finally:
            self.left += 1
            for parameter, value in zip(self.model.parameters(), stored, strict=True):
                parameter.data.copy_(value)

    def enter(self) -> None:
        for parameter in self.model.parameters():
            parameter.data.fill_(AVERAGE)


class WithSparseBuffer(Scoped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("operator", torch.eye(2).to_sparse())


class Failing(Scoped):
    def enter(self) -> None:
        self.model[0].weight.data.fill_(AVERAGE)
        raise RuntimeError("no average")


class Switched(Scoped):
    """Its averaged weights are switched off."""

    def enter(self) -> None:
        pass


class OfObject(Holder):
    """A context manager that is a class."""

    def ema_scope(self) -> Any:
        class Scope:
            def __enter__(scope) -> None:  # noqa: N805
                self.model, self.ema_net = self.ema_net, self.model

            def __exit__(scope, *error: object) -> None:  # noqa: N805
                self.model, self.ema_net = self.ema_net, self.model

        return Scope()


class Unsuitable(Holder):
    """Methods with the names of context managers."""

    called = 0

    def ema(self) -> None:
        self.called += 1

    def swap_ema(self) -> Iterator[None]:
        self.called += 1
        yield

    @contextmanager
    def ema_scope(self, model: nn.Module) -> Iterator[None]:
        self.called += 1
        yield


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (Scoped, "ema_scope()", AVERAGE),
        (lambda: Holder(model=Scoped()), "self.model.ema_scope()", AVERAGE),
        (lambda: OfObject(ema_net=network(AVERAGE)), "ema_scope()", AVERAGE),
        (WithSparseBuffer, "ema_scope()", AVERAGE),
        (Failing, None, RAW),
        (Switched, None, RAW),
        (lambda: Switched(ema=network(AVERAGE)), "self.ema", AVERAGE),
        (lambda: Scoped(ema=averaged_model(updates=0)), None, RAW),
        (Unsuitable, None, RAW),
    ],
)
def test_weights_are_taken_from_a_context_manager_that_changes_them(
    make: Callable[[], Any], name: str | None, value: float
) -> None:
    module = make()
    assert load_own_average(module) == name
    # an abandoned context manager would restore the weights now
    gc.collect()
    inner = module.model.model if isinstance(module.model, Holder) else module.model
    assert values(inner) == {value}
    assert getattr(module, "called", 0) == 0
    if isinstance(module, OfObject):
        assert values(module.ema_net) == {AVERAGE}


# ---- in evaluations ----


class WithAverage(TinyGAN):
    """A GAN that averages its generator, in an attribute that is made as late as possible."""

    def on_train_start(self) -> None:
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for average, current in zip(self.generator_ema.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(current, 0.25)


class Compare(CosineMeanSimilarityMonitor):
    """Records whether the evaluated generator has the averaged and the raw weights."""

    def update(self, view: Any) -> None:
        super().update(view)
        trained = view.subject.trained
        now = list(view.module.generator.parameters())
        self.seen = [
            all(map(torch.equal, now, part.parameters()))
            for part in (getattr(trained, "generator_ema", nn.Module()), trained.generator)
        ]
        assert self.seen == [view.averaged, not view.averaged]


@pytest.mark.filterwarnings("ignore:generated images span")
@pytest.mark.parametrize(("weights", "seen"), [("auto", [True, False]), ("ema", [True, False]), ("raw", [False, True])])
def test_a_late_average_is_evaluated_and_the_log_says_so_once(
    weights: Any, seen: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    adapter = ModelAdapter(weights=weights, num_samples=16, num_reference=16)
    monitor = Compare(num_regions=2, adapter=adapter, on_error="raise")
    trainer(monitor).fit(WithAverage(), batches())
    assert monitor.seen == seen
    assert monitor.latest is not None
    assert monitor.latest.averaged is seen[0]
    line = "Evaluations use the EMA weights of self.generator_ema. To use the raw weights, pass weights='raw'."
    assert caplog.text.count(line) == seen[0]


@pytest.mark.filterwarnings("ignore:generated images span", "ignore:.*lr_scheduler.step.*")
def test_the_weights_of_lightnings_callback_come_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=ModelAdapter(num_samples=16), on_error="raise")
    module = TinyGAN()
    module.generator_ema = copy.deepcopy(module.generator).requires_grad_(False)
    trainer(EMAWeightAveraging(decay=0.5), monitor).fit(module, batches())
    assert caplog.text.count("Evaluations use the EMA weights of the EMAWeightAveraging callback.") == 1
    assert "self.generator_ema" not in caplog.text


@pytest.mark.filterwarnings("ignore:generated images span")
def test_asking_for_averaged_weights_where_there_are_none_is_an_error_of_the_first_evaluation() -> None:
    monitor = Compare(num_regions=2, adapter=ModelAdapter(weights="ema"), on_error="raise")
    with pytest.raises(ValueError, match="weights must be 'raw' or 'auto' where neither a callback nor the module"):
        trainer(monitor).fit(TinyGAN(), batches())


def test_a_warning_says_once_that_averaged_weights_cannot_be_used() -> None:
    module, own = TinyGAN(), trainer()
    module.ema = averaged_model()
    view = ModelView(ModelAdapter(weights="ema"), Subject(module, own), own)
    with pytest.warns(UserWarning, match="so the raw weights are evaluated") as caught:
        for _ in range(2):
            view.expire()
            view.refresh()
    assert len(caught) == 1
    assert not view.averaged


def test_views_of_raw_and_averaged_weights_share_one_subject() -> None:
    module, own = TinyGAN(), trainer()
    module.generator_ema = copy.deepcopy(module.generator)
    with torch.no_grad():
        module.generator_ema[0].weight.fill_(AVERAGE)
    subject = Subject(module, own)
    raw, auto = (ModelView(ModelAdapter(weights=weights), subject, own) for weights in ("raw", "auto"))
    for view, expected in ((raw, False), (auto, True), (raw, False)):
        view.refresh()
        assert view.averaged is expected
        assert torch.equal(view.module.generator[0].weight, module.generator_ema[0].weight) is expected


def test_a_module_that_is_evaluated_in_place_keeps_its_raw_weights_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_gendiag.model.subject.fits_in_memory", lambda module: False)
    module, own = TinyGAN(), trainer()
    module.generator_ema = copy.deepcopy(module.generator)
    with torch.no_grad():
        module.generator_ema[0].weight.fill_(AVERAGE)
    with pytest.warns(UserWarning, match="Averaged weights that it keeps inside itself are not used"):
        view = ModelView(ModelAdapter(), Subject(module, own), own)
    before = everything(module)
    view.refresh()
    with view.isolated():
        assert not view.module.generator[0].weight.eq(AVERAGE).any()
    assert not view.averaged
    assert everything(module) == before


class WithScope(WithAverage):
    """Its context manager draws random numbers, and keeps what it stored."""

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        self.stored = copy.deepcopy(self.generator.state_dict())
        self.generator.load_state_dict(self.generator_ema.state_dict())
        self.noise = torch.rand(2)
        yield
        self.generator.load_state_dict(self.stored)


@pytest.mark.filterwarnings("ignore:generated images span")
@pytest.mark.parametrize("make", [WithAverage, WithScope])
def test_training_with_averages_inside_the_module_is_bit_identical(make: type[TinyGAN]) -> None:
    def trained(*callbacks: Any) -> Any:
        seed_everything(3, verbose=False)
        module = make()
        trainer(*callbacks).fit(module, batches())
        return everything(module)

    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=ModelAdapter(num_samples=16), on_error="raise")
    assert trained(monitor) == trained()
    assert monitor.latest is not None
    assert monitor.latest.averaged
    diagnostics = GenerativeDiagnostics("warn", num_samples=16, max_overhead=None)
    assert everything(state_after_training(diagnostics, module=make)) == everything(state_after_training(module=make))
