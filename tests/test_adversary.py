"""The adversary: numbers by independent twins, discriminators of other people's shapes, and failures in real training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from example_models.data import digits
from lightning_gendiag import (
    Adversary,
    AdversaryMonitor,
    CollapseStopping,
    Evaluation,
    GenerativeDiagnostics,
    ModelAdapter,
    adversary,
    stable_rank,
)
from lightning_gendiag.detection.history import History
from lightning_gendiag.diagnostics.adversary import monitor as adversary_monitor
from lightning_gendiag.diagnostics.adversary.functional import auc_error, best_threshold, greater_share
from lightning_gendiag.model import compat
from lightning_gendiag.model.batches import Images
from lightning_gendiag.model.discriminators import (
    FORMS,
    Discriminator,
    find_discriminator,
    scores_in,
    scores_of,
    takes_logits,
    weights_of,
)
from lightning_gendiag.model.gradients import GradientReader, norm_of
from tests.helpers.cases import Case
from tests.helpers.logs import events
from tests.helpers.models import SmallVAE, TinyGAN
from tests.helpers.running import attached, batches, loading, state_after_training, trainer
from tests.helpers.versions import WeightAveraging


def _update(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def scores(shift: float, n: int = 6) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64) + shift

    return {
        "real": scores(1.0),
        "generated": scores(-1.0),
        "held_out": scores(0.5),
        "generator_gradients": scores(3.0, 1).exp(),
        "discriminator_gradients": scores(2.0, 1).exp(),
    }


CASE = Case(lambda: Adversary(threshold=0.0), [_update(seed) for seed in range(8)])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- numbers ----


@pytest.mark.parametrize("levels", [4, 1000])
def test_the_auc_equals_that_of_scikit_learn_with_ties(levels: int, generator: torch.Generator) -> None:
    real = torch.randint(1, levels, (40,), generator=generator).double()
    made = torch.randint(0, levels, (30,), generator=generator).double()
    expected = roc_auc_score(np.repeat([1, 0], [40, 30]), torch.cat([real, made]).numpy())
    assert float(greater_share(real, made)) == pytest.approx(expected, abs=1e-12)
    assert float(adversary(real, made).auc) == pytest.approx(expected, abs=1e-12)


def test_no_other_threshold_is_more_accurate(generator: torch.Generator) -> None:
    for _ in range(20):
        real = torch.randint(1, 9, (15,), generator=generator).double()
        made = torch.randint(0, 8, (11,), generator=generator).double()
        accuracy = {t: float((real > t).double().mean() + (made <= t).double().mean()) for t in np.arange(-1, 10, 0.5)}
        result = adversary(real, made)
        assert float(result.accuracies[:2].sum()) == pytest.approx(max(accuracy.values()))
        best = float(best_threshold(real, made))
        assert accuracy[min(accuracy, key=lambda t: abs(t - best))] == pytest.approx(max(accuracy.values()))


def test_heuristics_of_overfitting_are_those_of_stylegan2_ada() -> None:
    real, made, held_out = torch.tensor([3.0, 1.0]), torch.tensor([-2.0, -4.0]), torch.tensor([1.0, 0.0, -1.0])
    result = adversary(real, made, held_out, threshold=1.5)
    assert float(result.overfitting) == pytest.approx((2 - 0) / (2 + 3))
    assert float(result.sign) == 0
    assert float(adversary(real, made, held_out, threshold=0.0).sign) == 1
    assert "sign" not in adversary(real, made, held_out).scalars()
    same = adversary(real, made, real)
    assert float(same.overfitting) == 0
    assert float(same.train_auc) == 0.5


def test_ranks_do_not_depend_on_the_scale_of_scores_nor_on_their_sign(generator: torch.Generator) -> None:
    real, made, held_out = (torch.randn(50, generator=generator).double() + shift for shift in (1, -1, 0.5))
    expected = adversary(real, made, held_out)
    maps: list[tuple[Callable[[Tensor], Tensor], bool]] = [
        (torch.sigmoid, False),
        (lambda x: 1000 * x - 7, False),
        (lambda x: -x, True),
    ]
    for change, lower in maps:
        other = adversary(change(real), change(made), change(held_out), lower_is_real=lower)
        for name in ("auc", "held_out_auc", "train_auc", "accuracies"):
            torch.testing.assert_close(getattr(other, name), getattr(expected, name), rtol=0, atol=1e-12)


def test_the_standard_error_is_that_of_exponential_scores(generator: torch.Generator) -> None:
    """Hanley and McNeil's formula is exact for these."""
    n, m, rate = 30, 20, 3.0
    x, y = (torch.rand(4000, size, generator=generator).double().log().neg() for size in (n, m))
    found = torch.stack([greater_share(rate * a, b) for a, b in zip(x, y, strict=True)])
    auc = torch.tensor(rate / (1 + rate), dtype=torch.float64)
    assert float(found.mean()) == pytest.approx(float(auc), abs=0.005)
    assert float(auc_error(auc, n, m)) == pytest.approx(float(found.std()), rel=0.05)


@pytest.mark.parametrize("shape", [(40, 30), (16, 8, 3, 3), (5, 500)])
def test_the_stable_rank_equals_that_of_all_singular_values(shape: tuple[int, ...], generator: torch.Generator) -> None:
    weight = torch.randn(*shape, generator=generator)
    values = torch.linalg.svdvals(weight.flatten(1).double())
    assert float(stable_rank(weight)) == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
    one = torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, 12, generator=generator)
    assert float(stable_rank(one)) == pytest.approx(1)
    assert stable_rank(torch.zeros(6, 6)).isnan()


def test_numbers_are_nan_or_flagged_where_scores_show_nothing() -> None:
    constant = adversary(torch.ones(4), torch.ones(5), torch.ones(6), threshold=0.0)
    assert float(constant.auc) == float(constant.train_auc) == 0.5
    assert constant.overfitting.isnan()
    broken = adversary(torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, math.nan]))
    assert float(broken.invalid) == 0.75
    assert broken.auc.isnan()
    assert adversary(torch.empty(0), torch.empty(0)).invalid.isnan()
    observed = AdversaryMonitor().observations(broken)
    assert [o.severity for o in observed if o.series.role == "rule"] == [0, 0, 0]
    none = adversary(torch.tensor([math.nan]), torch.tensor([math.inf]))
    rule = next(o for o in AdversaryMonitor().observations(none) if o.severity == math.inf)
    assert rule.message.startswith("all scores of the discriminator are nan or inf")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: adversary(torch.zeros(2, 1), torch.zeros(2)), r"real must be \(N,\), one score for each image"),
        (lambda: Adversary().update(real=torch.zeros(2, 3)), r"real must be floats \(n,\) or \(n, 1, ...\)"),
        (lambda: Adversary().update(real=torch.zeros(2).long()), "real must be floats"),
        (
            lambda: Adversary().update(generator_gradients=torch.zeros(2, 1)),
            r"generator_gradients must be floats \(n,\)",
        ),
        (lambda: AdversaryMonitor(threshold="logits"), "threshold must be a number, 'auto' or None, got 'logits'"),  # type: ignore[arg-type]
        (lambda: AdversaryMonitor(images="fakes"), "images must be 'auto'"),  # type: ignore[arg-type]
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_maps_of_scores_count_by_their_means() -> None:
    metric = Adversary()
    metric.update(real=torch.arange(8.0).view(2, 1, 2, 2), generated=torch.zeros(3))
    assert metric.compute().real.tolist() == [1.5, 5.5]


# ---- other people's discriminators ----


def layers(*inside: nn.Module, inputs: int = 64) -> nn.Sequential:
    return nn.Sequential(*inside, nn.Linear(inputs, 8), nn.LeakyReLU(), nn.Linear(8, 1))


class WithClasses(nn.Module):
    """Returns whether an image is real, and its class, as the discriminator of an ACGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.real, self.classes = layers(nn.Flatten()), nn.Linear(1, 1), nn.Linear(1, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.real(features), self.classes(features)


class OfClass(nn.Module):
    """Takes an image and its class, as that of a conditional GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(10, 10), layers(inputs=74)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.body(torch.cat([images.flatten(1), self.embedding(labels)], 1))


class MultiScale(nn.Module):
    """Returns maps of scores at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv2d(1, 1, 3, 2, 1) for _ in range(2))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.scales[0](images), self.scales[1](F.avg_pool2d(images, 2))]


class Loss(nn.Module):
    """A loss that holds a discriminator, as that of latent diffusion's first stage, and cannot be called with images."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(), nn.Conv2d(4, 1, 3, 1, 1))

    def forward(self, images: Tensor, reconstructions: Tensor, optimizer_idx: int) -> Tensor:
        return F.relu(1 - self.discriminator(images)).mean()


class Generating(LightningModule):
    """A generator beside something under a name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim = 4
        self.generator = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters()) for part in self.children()]


class Wrapper(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.latent_dim = model, 4

    def forward(self, z: Tensor) -> Tensor:
        return self.model.generator(z)


def view_of(module: LightningModule, labelled: bool = True) -> Any:
    """A view of a module that has seen real images, whose trainer has its optimizers."""
    images, labels = digits(8)
    given = (images[:40], labels[:40]) if labelled else images[:40]
    view = attached(module, ModelAdapter(reference=given, num_samples=16), needs=())
    optimizers = module.configure_optimizers()
    view.trainer.strategy.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    return view


FOUND: dict[str, tuple[Callable[[], LightningModule], str]] = {
    "named": (lambda: Generating(discriminator=layers(nn.Flatten())), "self.discriminator(images)"),
    "rows": (lambda: Generating(critic=layers()), "self.critic(images.flatten(1))"),
    "short name": (lambda: Generating(netD=layers(nn.Flatten(), nn.Sigmoid())), "self.netD(images)"),
    "no name": (lambda: Generating(judge=layers(nn.Flatten())), "self.judge(images)"),
    "patches": (lambda: Generating(D=nn.Conv2d(1, 1, 3, 2)), "self.D(images)"),
    "one of a batch": (
        lambda: Generating(disc=nn.Sequential(layers(nn.Flatten()), nn.Flatten(0))),
        "self.disc(images)",
    ),
    "classes": (lambda: Generating(discriminator=WithClasses()), "self.discriminator(images)"),
    "of a class": (lambda: Generating(discriminator=OfClass()), "self.discriminator(images, labels)"),
    "one-hot rows": (
        lambda: Generating(discriminator=layers(inputs=74)),
        "self.discriminator(images and one-hot labels as rows)",
    ),
    "one-hot maps": (
        lambda: Generating(discriminator=nn.Conv2d(11, 1, 3, 2)),
        "self.discriminator(images and one-hot labels as channels)",
    ),
    "several scales": (lambda: Generating(discriminator=MultiScale()), "self.discriminator(images)"),
    "a list": (
        lambda: Generating(discriminators=nn.ModuleList(layers(nn.Flatten()) for _ in range(3))),
        "self.discriminators.0(images) and 2 more",
    ),
    "in a loss": (lambda: Generating(loss=Loss()), "self.loss.discriminator(images)"),
    "in a model": (lambda: _wrapped(), "self.model.discriminator(images)"),
}


def _wrapped() -> LightningModule:
    module = Wrapper(Generating(discriminator=layers(nn.Flatten())))
    module.configure_optimizers = module.model.configure_optimizers  # type: ignore[method-assign, operator, assignment]
    return module


@pytest.mark.parametrize("name", FOUND)
def test_discriminators_are_found_by_what_they_do_and_score_as_the_users_code_does(name: str) -> None:
    make, expected = FOUND[name]
    seed_everything(0, verbose=False)
    module = make()
    view = view_of(module)
    found = find_discriminator(view)
    assert found is not None
    assert found.name == expected
    scores = scores_of(view, found, view.reference)
    images, labels = view.reference.images, view.reference.labels
    hot = F.one_hot(labels, 10).float()
    given: dict[str, tuple[Tensor, ...]] = {
        "rows": (images.flatten(1),),
        "of a class": (images, labels),
        "one-hot rows": (torch.cat([images.flatten(1), hot], 1),),
        "one-hot maps": (torch.cat([images, hot[:, :, None, None].expand(-1, -1, 8, 8)], 1),),
    }
    with torch.no_grad():
        outputs = [part(*given.get(name, (images,))) for part in found.parts(module)]
    own = torch.stack([scores_in(output, len(images)) for output in outputs]).mean(0)
    torch.testing.assert_close(scores, own)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SmallVAE(),
        # of latents, as in adversarial autoencoders
        lambda: Generating(discriminator=layers(inputs=4)),
        lambda: Generating(classifier=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
        lambda: Generating(discriminator=nn.Conv2d(1, 1, 3, 1, 1)),
    ],
)
def test_what_scores_no_images_is_no_discriminator(make: Callable[[], LightningModule]) -> None:
    with pytest.raises(ValueError, match=r"discriminator must be known, but .* pass AdversaryMonitor\(discriminator="):
        find_discriminator(view_of(make()))


def test_the_generator_is_what_is_called_while_samples_are_made() -> None:
    module = Generating(discriminator=layers(nn.Flatten()), encoder=nn.Linear(64, 4))
    view = view_of(module)
    found = find_discriminator(view)
    assert found is not None
    weights = weights_of(view, found)
    assert {id(p) for p in weights["generator"]} == {id(p) for p in module.generator.parameters()}
    assert {id(p) for p in weights["discriminator"]} == {id(p) for p in module.discriminator.parameters()}


class Penalized(TinyGAN):
    """Its own training step reaches no loss of logits, though a method that it inherits would."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return self.steps(batch)

    def steps(self, batch: Any) -> None: ...

    def loss(self, scores: Tensor) -> Tensor:
        return F.softplus(scores)


def test_a_loss_of_logits_is_seen_in_the_code_that_training_reaches() -> None:
    class ByCriterion(Penalized):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.BCEWithLogitsLoss()

        def steps(self, batch: Any) -> None:
            self.criterion(batch, batch)

    assert takes_logits(TinyGAN())
    assert takes_logits(ByCriterion())
    assert not takes_logits(Penalized())


def test_layers_of_batch_norm_take_the_statistics_of_each_chunk_and_keep_their_own() -> None:
    seed_everything(0, verbose=False)
    module = Generating(discriminator=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    view = view_of(module)
    found = find_discriminator(view)
    assert found is not None
    before = {name: buffer.clone() for name, buffer in view.module.named_buffers()}
    scores = scores_of(view, found, view.reference)
    assert all(torch.equal(buffer, before[name]) for name, buffer in view.module.named_buffers())
    # the copy goes on in evaluation mode
    assert not any(part.training for part in view.module.modules())
    module.discriminator.train()
    torch.testing.assert_close(scores, module.discriminator(view.reference.images)[:, 0].detach())


# ---- gradients ----


class Norms(Callback):
    """Notes the norm of each optimizer's gradient by torch's own function."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        # with no limit it changes nothing
        norm = torch.nn.utils.clip_grad_norm_(weights, math.inf)
        self.seen.setdefault(trainer.optimizers.index(optimizer), []).append(float(norm))


def test_norms_are_those_that_optimizers_use_at_the_steps_1_2_4_and_8() -> None:
    norms, monitor = Norms(), AdversaryMonitor(on_error="raise", every_n_train_steps=12)
    trainer(norms, monitor, max_epochs=3).fit(TinyGAN(), batches())
    assert monitor.result is not None
    for number, found in enumerate((monitor.result.discriminator_gradients, monitor.result.generator_gradients)):
        expected = sorted(norms.seen[number][step - 1] for step in (1, 2, 4, 8))
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_scaled_gradients_are_read_as_optimizers_use_them() -> None:
    """Lightning divides by the scale before the hook, except for fused optimizers."""
    norms, monitor = Norms(), AdversaryMonitor(on_error="raise", every_n_train_steps=4)
    # by its name, the accelerator would choose another precision
    own = trainer(norms, monitor, max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu")])
    own.fit(TinyGAN(), batches())
    assert monitor.result is not None
    expected = sorted(norms.seen[1][step - 1] for step in (1, 2, 4))
    assert monitor.result.generator_gradients.tolist() == pytest.approx(expected, rel=1e-5)
    optimizer = own.optimizers[0]
    assert compat.gradient_scale(own, optimizer) == 1
    optimizer._step_supports_amp_scaling = True
    assert compat.gradient_scale(own, optimizer) == own.precision_plugin.scaler.get_scale() > 1000
    reader = GradientReader({"generator": [weight := nn.Parameter(torch.zeros(2))]})
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], 0.1)
    assert reader.count(optimizer)
    reader.read(optimizer, 10.0)
    assert reader.norms("generator").tolist() == [0.5]


def test_norms_are_read_at_powers_of_two_and_of_what_has_a_gradient() -> None:
    weight, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    reader = GradientReader({"generator": [weight], "discriminator": [other]})
    optimizer = torch.optim.SGD([weight, other], 0.1)
    for step in range(1, 20):
        weight.grad = torch.full((3,), float(step))
        if reader.count(optimizer):
            reader.read(optimizer)
    assert reader.norms("generator").tolist() == pytest.approx([s * math.sqrt(3) for s in (1, 2, 4, 8, 16)])
    assert len(reader.norms("discriminator")) == 0
    assert reader.steps == {"generator": 19, "discriminator": 19}
    reader.restart()
    assert reader.count(optimizer)
    reader.read(optimizer)
    assert len(reader.norms("generator")) == 6
    assert norm_of([None]) is None


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_scores_are_finite_in_every_precision(precision: str) -> None:
    monitor = AdversaryMonitor(on_error="raise")
    trainer(monitor, max_epochs=1, precision=precision).fit(TinyGAN(), batches())
    assert monitor.result is not None
    assert float(monitor.result.invalid) == 0


def test_training_is_bit_identical_with_and_without_the_monitor() -> None:
    with_monitor = state_after_training(AdversaryMonitor(on_error="raise", every_n_train_steps=2))
    torch.testing.assert_close(with_monitor, state_after_training(), rtol=0, atol=0)


# ---- the monitor ----


class OfTwo(TinyGAN):
    """A GAN whose networks learn at rates of their own, with other losses, and validation batches."""

    def __init__(self, rates: tuple[float, float] = (1e-3, 1e-3), saturating: bool = False) -> None:
        super().__init__()
        self.rates, self.saturating = rates, saturating

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0]
        d, g = self.optimizers()
        fake = self(torch.randn(len(real), self.latent_dim))
        d.zero_grad()
        self.manual_backward(self.loss_d(real, fake.detach()))
        d.step()
        g.zero_grad()
        self.manual_backward(self.loss_g(real, fake))
        g.step()

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake)).mean()

    def loss_g(self, real: Tensor, fake: Tensor) -> Tensor:
        scores = self.discriminator(fake)
        return -F.softplus(scores).mean() if self.saturating else F.softplus(-scores).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        parts = (self.discriminator, self.generator)
        return [torch.optim.Adam(p.parameters(), rate, (0.5, 0.999)) for p, rate in zip(parts, self.rates, strict=True)]


def fitted(
    module: LightningModule, *callbacks: Any, epochs: int = 20, images: int = 512, every: int = 8, seed: int = 0
) -> tuple[AdversaryMonitor, CollapseStopping]:
    monitor = AdversaryMonitor(on_error="raise", every_n_train_steps=every, adapter=ModelAdapter(num_samples=256))
    stopping = CollapseStopping("warn")
    pool, labels = digits(8)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    pool, labels = pool[order], labels[order]
    train = DataLoader(TensorDataset(pool[:images], labels[:images]), min(32, images), shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(pool[-256:], labels[-256:]), 64)
    # of the check before training, two validation batches are enough
    options: dict[str, Any] = {"max_epochs": epochs, "check_val_every_n_epoch": 1000}
    trainer(*callbacks, monitor, stopping, **options).fit(module, train, held_out)
    return monitor, stopping


class ByClass(OfTwo):
    """Draws classes in its training step, of which its discriminator gets those of the images; its sampler takes none."""

    def __init__(self, kind: Callable[[], nn.Module] = OfClass) -> None:
        super().__init__()
        self.discriminator = kind()  # type: ignore[assignment]

    def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
        labels = torch.randint(10, (len(real),))
        return (
            F.softplus(-self.discriminator(real, labels)).mean() + F.softplus(self.discriminator(fake, labels)).mean()
        )

    def loss_g(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(fake, torch.randint(10, (len(real),)))).mean()


class OfNoClass(OfClass):
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return super().forward(images, torch.zeros_like(labels))


def test_samples_of_unknown_classes_are_not_scored_where_classes_matter(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        monitor, stopping = fitted(ByClass(), epochs=2)
    assert caplog.text.count("generated images are not scored, since its scores depend on classes") == 1
    result = monitor.result
    assert (len(result.real), len(result.generated), len(result.held_out)) == (256, 0, 128)
    assert {"auc", "accuracy_real", "held_out_auc", "overfitting"}.isdisjoint(result.scalars())
    assert {"train_auc", "invalid", "generator_gradient"} <= result.scalars().keys()
    assert stopping.alarms == []
    with caplog.at_level("INFO"):
        caplog.clear()
        monitor, _ = fitted(ByClass(OfNoClass), epochs=2)
    assert len(monitor.result.generated) == 256
    assert "not scored" not in caplog.text


def test_a_discriminator_that_is_given_no_classes_scores_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    def counted(view: Any, found: Discriminator, images: Images) -> Tensor:
        scored.append(len(images.images))
        return scores_of(view, found, images)

    monkeypatch.setattr(adversary_monitor, "scores_of", counted)
    monitor, _ = fitted(OfTwo(), epochs=1)
    result = monitor.result
    assert result is not None
    # of the two evaluations
    assert scored == 2 * [len(result.real), len(result.held_out), len(result.generated)]


def test_samples_are_scored_with_the_classes_that_their_sampler_was_given() -> None:
    def sample(module: Any, n: int, labels: Tensor) -> Tensor:
        return module(torch.randn(n, module.latent_dim))

    adapter = ModelAdapter(sample=sample, num_samples=64, conditional=True)
    monitor = AdversaryMonitor(on_error="raise", adapter=adapter)
    trainer(monitor, max_epochs=1).fit(ByClass(), batches(8))
    assert len(monitor.result.generated) == 64


def test_training_is_bit_identical_where_classes_of_samples_are_not_known() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=ByClass)

    torch.testing.assert_close(run(AdversaryMonitor(on_error="raise")), run(), rtol=0, atol=0)


class Rate(Callback):
    """Sets the learning rate of one network at an epoch."""

    def __init__(self, network: int, rate: float, epoch: int) -> None:
        self.network, self.rate, self.epoch = network, rate, epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch >= self.epoch:
            trainer.optimizers[self.network].param_groups[0]["lr"] = self.rate


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("network", "name"), [(0, "discriminator"), (1, "generator")])
def test_a_network_that_stops_to_change_is_named_at_the_third_evaluation(network: int, name: str, seed: int) -> None:
    seed_everything(seed, verbose=False)
    monitor, stopping = fitted(OfTwo(), Rate(network, 0.0, 10), epochs=18, every=16, seed=seed)
    alarm = stopping.alarms[0]
    assert alarm.message.startswith(f"the {name} is frozen: none of its weights changed in ")
    assert alarm.epoch in (12, 13, 14)
    assert alarm.stop == "never"
    assert monitor.result is not None
    assert float(monitor.result.changes[1 - network]) == 0
    assert float(monitor.result.changes[network]) > 0


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_a_discriminator_that_was_never_trained_is_named_later() -> None:
    seed_everything(0, verbose=False)
    _, stopping = fitted(OfTwo((0.0, 1e-3)), epochs=12, every=8)
    assert "the discriminator is frozen: none of its weights has ever changed in " in stopping.alarms[0].message
    # at 8 evaluations in a row with at least 30 steps
    assert (stopping.alarms[0].since, stopping.alarms[0].step) == (31, 31 + 7 * 8)


def test_a_discriminator_that_starts_late_by_a_loss_times_zero_is_not_frozen() -> None:
    class Late(OfTwo):
        def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
            return 0 * F.softplus(-self.discriminator(real)).mean()

        def loss_g(self, real: Tensor, fake: Tensor) -> Tensor:
            return (fake - real).square().mean()

    seed_everything(0, verbose=False)
    monitor, stopping = fitted(Late(), epochs=12)
    assert stopping.alarms == []
    assert monitor.result is not None
    assert float(monitor.result.changes[1]) == 0


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
@pytest.mark.parametrize("seed", range(2))
def test_a_discriminator_that_is_too_strong_is_named(seed: int) -> None:
    seed_everything(seed, verbose=False)
    monitor, stopping = fitted(OfTwo((2e-2, 2e-4), saturating=True), epochs=20, seed=seed)
    assert (
        "the discriminator is too strong: it ranks real images above generated ones in " in stopping.alarms[0].message
    )
    assert "the norm of the generator's gradient fell from" in stopping.alarms[0].message
    assert monitor.result is not None
    assert float(monitor.result.auc) > 0.99


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_a_discriminator_that_knows_its_few_images_by_heart_is_named() -> None:
    module = OfTwo((1e-3, 3e-3))
    module.discriminator = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
    )
    module.generator = nn.Sequential(
        nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64), nn.Tanh(),
    )  # fmt: skip
    seed_everything(0, verbose=False)
    monitor, stopping = fitted(module, epochs=400, images=32, every=25)
    alarm = stopping.alarms[0]
    assert alarm.message.startswith(
        "the discriminator overfits: a training image looks more real to it than a held-out"
    )
    assert monitor.result is not None
    assert float(monitor.result.train_auc) > 0.9
    # held-out images look generated
    assert float(monitor.result.overfitting) > 0.5
    assert float(monitor.result.accuracies[2]) < float(monitor.result.accuracies[0]) - 0.3


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_gradients_that_explode_are_named() -> None:
    class Exploding(OfTwo):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch == 10 and batch_idx == 0:
                with torch.no_grad():
                    self.discriminator[1].weight.mul_(3e3)
            super().training_step(batch, batch_idx)

    seed_everything(0, verbose=False)
    _, stopping = fitted(Exploding(), epochs=14)
    assert stopping.alarms[0].message.startswith("gradients of the discriminator exploded: their norm rose from ")
    assert stopping.alarms[0].epoch in (10, 11)


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning")
def test_a_discriminator_whose_scores_become_nan_is_named() -> None:
    class Broken(OfTwo):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch == 8 and batch_idx == 0:
                with torch.no_grad():
                    self.discriminator[1].weight[0, 0] = math.nan
            super().training_step(batch, batch_idx)

    seed_everything(0, verbose=False)
    _, stopping = fitted(Broken(), epochs=12)
    assert "are nan or inf, for 2 evaluations" in stopping.alarms[0].message


def test_a_spectrum_that_collapses_is_named() -> None:
    monitor, stopping = AdversaryMonitor(), CollapseStopping("warn")
    result = adversary(torch.randn(9), torch.randn(9))
    observed = [
        monitor.observations(result._replace(stable_ranks=torch.tensor([rank, rank])))[-1] for rank in (40.0, 3.0, 1.2)
    ]
    assert [o.value for o in observed] == pytest.approx([40, 3, 1.2])
    # a healthy one falls as well, but not so far
    assert observed[1].severity == observed[0].severity
    assert observed[2].severity - observed[1].severity == pytest.approx(math.log(2 / 1.2))
    assert observed[0].series.role == "standalone"
    assert stopping.alarms == []
    history = History()
    for number in range(1, 21):
        rows = [observed[0] if number < 10 else observed[1] if number < 18 else observed[2]]
        evaluation = Evaluation(number, number, number, rows)
        history.append(monitor.name, evaluation)
        stopping.judge.update(monitor.name, evaluation, history)
    (alarm,) = stopping.judge.alarms
    assert alarm.step == 19
    assert str(alarm).startswith("the spectrum of the discriminator collapsed: stable rank fell from")


@pytest.mark.parametrize("make", [OfTwo, lambda: OfTwo((5e-4, 1e-3))])
def test_a_healthy_run_raises_no_alarm(make: Callable[[], LightningModule]) -> None:
    seed_everything(1, verbose=False)
    monitor, stopping = fitted(make(), epochs=30)
    assert stopping.alarms == []
    assert monitor.result is not None
    assert abs(float(monitor.result.train_auc) - 0.5) < 0.15
    assert len(monitor.result.held_out) == 128
    # its loss takes logits
    assert -1 <= float(monitor.result.sign) <= 1


def test_validation_images_are_held_once_and_a_given_reference_stands_for_them() -> None:
    monitor, _ = fitted(OfTwo(), epochs=3)
    images, _ = digits(8)
    given = AdversaryMonitor(on_error="raise", adapter=ModelAdapter(reference=images[500:600], num_samples=64))
    own = trainer(given, max_epochs=1)
    own.fit(OfTwo(), batches())
    for found, count in ((monitor, 128), (given, 100)):
        assert found.result is not None
        assert len(found.result.held_out) == count
    # training images are those of the first batch
    assert given.result is not None
    assert len(given.result.real) == 16
    plain = AdversaryMonitor(on_error="raise")
    trainer(plain, max_epochs=1).fit(TinyGAN(), batches())
    assert plain.result is not None
    assert "train_auc" not in plain.result.scalars()


def test_averaged_weights_generate_and_the_raw_discriminator_scores() -> None:
    seed_everything(0, verbose=False)
    module, monitor = OfTwo((1e-2, 1e-2)), AdversaryMonitor(on_error="raise")
    average = WeightAveraging(avg_fn=lambda averaged, current, number: averaged)
    own = trainer(average, monitor, max_epochs=1)
    own.fit(module, batches())
    assert monitor.latest is not None
    assert monitor.latest.averaged
    assert monitor.result is not None
    # Lightning puts the averaged weights into the module when training ends, so the raw ones are other ones
    first = module.discriminator(digits(8)[0][:64])[:, 0].double().sort().values
    assert not torch.allclose(monitor.result.real.sort().values, first, atol=1e-3)


def test_a_callable_of_the_users_and_a_path_give_the_same_scores() -> None:
    def run(discriminator: Any) -> Any:
        seed_everything(0, verbose=False)
        monitor = AdversaryMonitor(discriminator, on_error="raise")
        trainer(monitor, max_epochs=2).fit(TinyGAN(), batches())
        return monitor.result

    found, named = run(None), run("discriminator")
    given = run(lambda module, images: module.discriminator(images))
    with_labels = run(lambda module, images, labels: module.discriminator(images) + 0 * labels[:, None])
    for other in (named, given, with_labels):
        torch.testing.assert_close(other.real, found.real)
        torch.testing.assert_close(other.generated, found.generated)
    with pytest.raises(ValueError, match=r"discriminator must return floats \(64,\)"):
        run(lambda module, images: images.repeat(1, 3, 1, 1))


def test_smaller_scores_mean_real_where_most_evaluations_show_it() -> None:
    class Reversed(OfTwo):
        def loss_d(self, real: Tensor, fake: Tensor) -> Tensor:
            return F.softplus(self.discriminator(real)).mean() + F.softplus(-self.discriminator(fake)).mean()

        def loss_g(self, real: Tensor, fake: Tensor) -> Tensor:
            return F.softplus(self.discriminator(fake)).mean()

    seed_everything(0, verbose=False)
    monitor, _ = fitted(Reversed((5e-3, 1e-4)), epochs=8)
    assert monitor.result is not None
    assert float(monitor.result.direction) == -1
    assert float(monitor.result.auc) > 0.8


def test_it_is_attached_to_gans_and_left_out_elsewhere() -> None:
    small = ModelAdapter(num_samples=32, num_reference=64)
    diagnostics = GenerativeDiagnostics(adapter=small, max_overhead=None, on_error="raise")
    trainer(diagnostics, max_epochs=8).fit(TinyGAN(), batches())
    assert "adversary" in diagnostics.attached
    result = diagnostics.monitors["adversary"].result
    assert len(result.generator_gradients) > 0
    assert float(result.changes[0]) > 0
    other = GenerativeDiagnostics(adapter=small, max_overhead=None)
    trainer(other, max_epochs=1).fit(SmallVAE(), batches())
    assert "discriminator must be known, but SmallVAE has no part with such a name" in other.left_out["adversary"]


def test_scalars_and_panels_are_logged(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    monitor = AdversaryMonitor(on_error="raise")
    own = trainer(monitor, max_epochs=2, logger=logger)
    own.fit(OfTwo(), batches(), batches(n=128, shuffle=False))
    seen = events(logger.log_dir)
    assert {"auc", "train_auc", "overfitting", "sign", "generator_gradient", "discriminator_change", "stable_rank"} <= {
        tag.removeprefix("gendiag/adversary/") for tag in seen.Tags()["scalars"]
    }
    assert "gendiag/adversary/panel" in seen.Tags()["images"]


def test_a_resumed_run_knows_the_usual_gradients(tmp_path: Any) -> None:
    own = trainer(AdversaryMonitor(on_error="raise"), max_epochs=2)
    own.fit(TinyGAN(), batches())
    own.save_checkpoint(tmp_path / "run.ckpt")
    monitor = AdversaryMonitor(on_error="raise")
    trainer(monitor, max_epochs=3).fit(TinyGAN(), batches(), ckpt_path=tmp_path / "run.ckpt", **loading())
    assert monitor.evaluations == 3
    assert monitor.result is not None
    assert monitor.result.levels.isfinite().all()
    assert monitor.result.changes.isnan().all()
    assert monitor.result.has_changed.all()


@pytest.mark.parametrize(
    "form",
    ["(images, one-hot labels)", "(images and one-hot labels as rows)", "(images and one-hot labels as channels)"],
)
def test_a_label_beyond_the_classes_that_a_discriminator_takes_is_refused_before_a_gpu_is_asked(form: str) -> None:
    part = nn.Conv2d(11, 1, 1) if "channels" in form else nn.Linear(10 if "images," in form else 74, 1)
    with pytest.raises(ValueError, match="it takes 10 classes, got a label 3000"):
        FORMS[form](part, torch.rand(2, 1, 8, 8), torch.tensor([3, 3000]))
