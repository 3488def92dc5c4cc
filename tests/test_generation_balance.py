from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from example_models.data import digits
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    DiagnosticWarning,
    GenerationBalance,
    GenerationBalanceMonitor,
    ModelAdapter,
)
from lightning_gendiag.diagnostics.generation_balance.functional import binomial_interval
from lightning_gendiag.functional.distances import frechet_distance
from lightning_gendiag.model.features import FeatureExtractor, NeighbourClassifier, space_for, together
from tests.helpers.cases import Case
from tests.helpers.logs import events
from tests.helpers.models import ScriptedGenerator, TinyGAN
from tests.helpers.recorded_runs import RecordedBalance
from tests.helpers.running import batches, state_after_training, trainer


def updates(count: int = 12, n: int = 30, classes: int = 3, features: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        labels = torch.randint(classes, (n,), generator=generator)
        rows = torch.randn(n, features, generator=generator, dtype=torch.float64) * (1 + labels[:, None]) + i % 2
        made.append({"labels": labels, "real": i % 2 == 0, "features": rows})
    return made


CASE = Case(make=lambda: GenerationBalance(3), updates=updates(), tolerance=1e-8)


class Identity(nn.Module):
    num_features = 4

    def forward(self, features: Tensor) -> Tensor:
        return features


# ---- the metric ----


def test_fid_of_each_class_equals_that_of_torchmetrics_on_the_class_alone() -> None:
    metric = GenerationBalance(3)
    for update in CASE.updates:
        metric.update(**update)
    result = metric.compute()
    for c in range(3):
        fid = FrechetInceptionDistance(Identity()).set_dtype(torch.float64)
        for update in CASE.updates:
            fid.update(update["features"][update["labels"] == c], real=update["real"])
        assert float(result.fid[c]) == pytest.approx(float(fid.compute()), abs=1e-6)


def test_the_frechet_distance_has_a_closed_form_for_diagonal_covariances(generator: torch.Generator) -> None:
    a, b = (torch.rand(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    found = frechet_distance(mean, torch.diag_embed(a), 0 * mean, torch.diag_embed(b))
    torch.testing.assert_close(found, mean.square().sum(1) + (a.sqrt() - b.sqrt()).square().sum(1))
    # singular covariances are handled too
    a[:, 0] = 0
    found = frechet_distance(mean, torch.diag_embed(a), mean, torch.diag_embed(a))
    torch.testing.assert_close(found, torch.zeros(5).double(), rtol=0, atol=1e-7)


def test_shares_distance_and_divergence_equal_values_by_hand() -> None:
    metric = GenerationBalance(4)
    metric.update(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), real=True)
    metric.update(torch.tensor([0, 0, 0, 1]), real=False)
    result = metric.compute()
    assert result.real_share.tolist() == [0.25] * 4
    assert result.generated_share.tolist() == [0.75, 0.25, 0.0, 0.0]
    assert float(result.imbalance) == 0.5
    assert float(result.divergence) == pytest.approx(0.75 * np.log(3))
    assert float(result.coverage) == 0.5
    assert result.fid.isnan().all()
    # eight images are too few for a significant difference
    assert not result.dropped.any()
    assert not result.dominating.any()


def test_the_interval_equals_that_of_scipy() -> None:
    counts = torch.tensor([0.0, 3.0, 47.0])
    for (low, high), k in zip(binomial_interval(counts, 0.01).tolist(), counts.tolist(), strict=True):
        expected = binomtest(int(k), 50).proportion_ci(0.98, "exact")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_dropped_class_is_named_among_500_samples_and_balanced_samples_name_none() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(10).repeat(100)
    for _ in range(10):
        metric = GenerationBalance(10)
        metric.update(real, real=True)
        metric.update(torch.randint(10, (500,), generator=generator), real=False)
        result = metric.compute()
        assert not (result.dropped | result.dominating).any()
        dropped = torch.randint(9, (500,), generator=generator)
        metric.update(dropped + (dropped >= 7), real=False)
        for other in (dropped, dropped, dropped):
            metric.update(other + (other >= 7), real=False)
        assert not metric.compute().dominating.any()
    metric = GenerationBalance(10)
    metric.update(real, real=True)
    metric.update(dropped + (dropped >= 7), real=False)
    result = metric.compute()
    assert result.dropped.nonzero()[:, 0].tolist() == [7]
    assert not result.dominating.any()


def test_a_dominating_class_is_named() -> None:
    metric = GenerationBalance(10)
    metric.update(torch.arange(10).repeat(100), real=True)
    metric.update(torch.cat([torch.full((300,), 4), torch.arange(10).repeat(20)]), real=False)
    assert metric.compute().dominating.nonzero()[:, 0].tolist() == [4]


def test_a_rare_class_without_samples_is_not_reported_as_dropped() -> None:
    metric = GenerationBalance(2)
    metric.update(torch.tensor([0] * 990 + [1] * 10), real=True)
    metric.update(torch.zeros(500, dtype=torch.long), real=False)
    result = metric.compute()
    assert not result.dropped.any()
    assert float(result.interval[1, 1]) > 0.01


def test_forward_and_updates_without_features_agree() -> None:
    one, two = GenerationBalance(3), GenerationBalance(3)
    for update in CASE.updates:
        one(**update)
        two.update(**update)
    torch.testing.assert_close(one.compute(), two.compute(), equal_nan=True)
    two.update(torch.tensor([0, 1, 2]), real=True)
    assert float(two.compute().real_count.sum()) == float(one.compute().real_count.sum()) + 3
    torch.testing.assert_close(two.compute().fid, one.compute().fid)


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    metric = GenerationBalance(2)
    metric.update(torch.tensor([0, 1, 1]), real=False, features=torch.tensor([[0.0], [1.0], [torch.nan]]))
    result = metric.compute()
    assert result.generated_count.tolist() == [1, 1]
    assert float(result.invalid) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: GenerationBalance(1), "num_classes must be at least 2, got 1"),
        (lambda: GenerationBalance(2, confidence=1.0), r"confidence must be in \(0.5, 1\), got 1.0"),
        (lambda: GenerationBalance(2).update(torch.tensor([0.0]), real=True), r"labels must be \(N,\) integers"),
        (
            lambda: GenerationBalance(2).update(torch.tensor([2]), real=True),
            "labels must be 0 to 1, got 2 to 2. To fix",
        ),
        (
            lambda: GenerationBalance(2).update(torch.tensor([1]), True, torch.zeros(2, 3)),
            r"features must be \(1, F\), got",
        ),
        (lambda: GenerationBalanceMonitor(neighbours=0), "neighbours must be at least 1"),
        (lambda: GenerationBalanceMonitor(space="latent"), "space must be 'auto', 'pixels' or 'features'"),  # type: ignore[arg-type]
        (lambda: GenerationBalanceMonitor(num_classes=1), "num_classes must be at least 2"),
        (lambda: FeatureExtractor(torch.zeros(2, 1, 8, 8)), "images must be at least 4, got 2"),
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---- feature extractor and classifier ----


def test_the_feature_extractor_detects_degraded_images() -> None:
    images = digits(32)[0][torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    network = FeatureExtractor(images[:900])
    own, held = network(images[:900]), network(images[900:])
    assert own.shape == (900, 64)
    assert own.mean(0).abs().max() < 1e-3
    assert own.var(0).max() < 1.01

    def distance(some: Tensor) -> float:
        moments = [x for f in (own, network(some)) for x in (f.double().mean(0), torch.cov(f.double().T))]
        return float(frechet_distance(*moments))

    normal = distance(images[900:])
    noise = torch.randn(images[900:].shape, generator=torch.Generator().manual_seed(0))
    for broken in (
        torch.nn.functional.avg_pool2d(images[900:], 3, 1, 1),
        images[900:] + 0.2 * noise,
        images[900:].roll(2, 3),
        (images[900:] + 1) * 0.7 - 1,
    ):
        assert distance(broken) > 3 * normal
    assert held.isfinite().all()


def test_constant_images_have_finite_features() -> None:
    assert FeatureExtractor(torch.zeros(8, 3, 16, 16))(torch.ones(2, 3, 16, 16)).isfinite().all()


def test_the_classifier_recognizes_digits_and_measures_its_accuracy() -> None:
    images, labels = digits(16)
    for features in (None, FeatureExtractor(images[:1000])):
        classifier = NeighbourClassifier(images[:1000], labels[:1000], features)
        right = float((classifier(images[1000:]) == labels[1000:]).double().mean())
        assert classifier.accuracy > 0.9
        assert abs(right - classifier.accuracy) < 0.06
        assert classifier.probabilities(images[:5]).sum(1).tolist() == pytest.approx([1.0] * 5)


# ---- the monitor ----


class ClassSampler(ScriptedGenerator):
    """Returns real digits of the classes that ``classes(epoch)`` allows as samples."""

    def __init__(self, classes: Any = lambda epoch: range(10), size: int = 16) -> None:
        super().__init__(size=size)
        self.classes, self.labels = classes, digits(size)[1]

    def sample(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + self.current_epoch)
        allowed = torch.isin(self.labels, torch.tensor(list(self.classes(self.current_epoch)))).nonzero()[:, 0]
        return self.pool[allowed[torch.randint(len(allowed), (n,), generator=generator)]]


def adapter(**options: Any) -> ModelAdapter:
    return ModelAdapter(reference=digits(16), **({"num_samples": 500, "num_reference": 800} | options))


def test_a_dropped_class_stops_the_run_and_is_named() -> None:
    monitor, stopping = GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), CollapseStopping()
    with pytest.warns(
        CollapseWarning, match="class 7 was dropped: .* Training stops if it lasts for 8 more evaluations"
    ):
        own = trainer(monitor, stopping, max_epochs=30)
        own.fit(ClassSampler(lambda epoch: set(range(10)) - ({7} if epoch >= 12 else set())), batches(16, 32))
    assert stopping.alarms[0].epoch < 17
    # the run continues for eight epochs after the alarm, since a class may return
    assert own.current_epoch == stopping.alarms[0].epoch + 9
    assert "class 7 was dropped" in stopping.stopping_reason_message
    assert stopping.alarms[0].names == ["class 7"]
    assert float(monitor.result.generated_share[7]) < 0.02
    assert 0.9 < float(monitor.result.accuracy) < 1


def test_a_class_that_gets_all_samples_is_reported_as_the_balance_of_classes() -> None:
    monitor, stopping = GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), CollapseStopping()
    with pytest.warns(
        CollapseWarning, match=r"the balance of classes, with class 4 at \d+%, collapsed: distance of their shares"
    ):
        own = trainer(monitor, stopping, max_epochs=30)
        own.fit(ClassSampler(lambda epoch: [4] if epoch >= 12 else range(10)), batches(16, 32))
    # this stops the run at once
    assert own.current_epoch == stopping.alarms[0].epoch + 1


def test_a_class_that_returns_is_reported_and_does_not_stop_the_run() -> None:
    monitor, stopping = GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="class 7 was dropped"):
        own = trainer(monitor, stopping, max_epochs=30)
        own.fit(ClassSampler(lambda epoch: set(range(10)) - ({7} if 12 <= epoch < 17 else set())), batches(16, 32))
    assert own.current_epoch == 30
    assert stopping.alarms[0].recovered is not None
    assert stopping.report()["state"] == "healthy"


def test_a_healthy_run_raises_no_alarm() -> None:
    monitor, stopping = GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), CollapseStopping()
    trainer(monitor, stopping, max_epochs=25).fit(ClassSampler(), batches(16, 32))
    assert stopping.alarms == []


class Classified(ClassSampler):
    def __init__(self) -> None:
        super().__init__()
        self.classifier_net = nn.Linear(256, 10)

    def classify(self, images: Tensor) -> Tensor:
        return self.classifier_net(images.flatten(1))


@pytest.mark.parametrize(
    "classifier",
    [
        "classify",
        lambda module, images: module.classify(images).argmax(1),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 10)),
    ],
)
def test_the_users_classifier_is_used(classifier: Any) -> None:
    monitor = GenerationBalanceMonitor(classifier, adapter=adapter(), on_error="raise")
    trainer(monitor, max_epochs=1).fit(Classified(), batches(16, 32))
    # the classifier was never trained
    assert float(monitor.result.accuracy) < 0.5
    assert float(monitor.result.generated_count.sum()) == 500


def test_the_users_features_are_used_for_distances_and_for_neighbours() -> None:
    own = GenerationBalanceMonitor(
        space="features",
        features=lambda module, images: images[:, 0, ::4, ::4].flatten(1),
        adapter=adapter(),
        on_error="raise",
    )
    trainer(own, max_epochs=1).fit(ClassSampler(), batches(16, 32))
    assert own.result.fid.isfinite().all()


def test_images_with_nan_are_counted_as_invalid() -> None:
    def script(images: Tensor, epoch: int) -> Tensor:
        images[:100] = torch.nan
        return images

    monitor = GenerationBalanceMonitor(adapter=adapter(chunk_size=500), on_error="raise")
    trainer(monitor, max_epochs=1).fit(ScriptedGenerator(script), batches(16, 32))
    assert float(monitor.result.generated_count.sum()) == 400
    assert float(monitor.result.invalid) == pytest.approx(100 / 500)


def test_missing_labels_and_an_unknown_classifier_are_reported() -> None:
    monitor = GenerationBalanceMonitor(adapter=ModelAdapter(reference=digits(16)[0]))
    with pytest.warns(DiagnosticWarning, match="labels must be known, but the batches hold no labels; pass labels="):
        trainer(monitor, max_epochs=1).fit(ClassSampler(), batches(16, 32))
    with pytest.raises(ValueError, match="classifier must be a callable or name a submodule or method of ClassSampler"):
        trainer(GenerationBalanceMonitor("classifier_net"), max_epochs=1).fit(ClassSampler(), batches(16, 32))


def test_scalars_and_panels_are_logged(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), max_epochs=2, logger=logger).fit(
        ClassSampler(), batches(16, 32)
    )
    seen = events(logger.log_dir)
    classes = {
        f"gendiag/generation_balance/{name}" for name in ("imbalance", "class_3", "fid_class_9", "accuracy", "seconds")
    }
    assert classes <= set(seen.Tags()["scalars"])
    assert "gendiag/generation_balance/panel" in seen.Tags()["images"]


def test_training_is_bit_identical_with_and_without_the_monitor() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: VAE(3, width=2), size=32)

    monitor = GenerationBalanceMonitor(adapter=ModelAdapter(num_samples=64), on_error="raise")
    torch.testing.assert_close(run(monitor), run(), rtol=0, atol=0)
    assert monitor.result is not None


# ---- recorded runs ----

RUNS = RecordedBalance.read()


@pytest.mark.parametrize("model", ["gan", "vae"])
def test_recorded_healthy_runs_raise_no_alarm_and_a_dropped_class_is_named(model: str) -> None:
    runs = [run for run in RUNS if run.model == model]
    assert len(runs) == 10
    for run in runs:
        assert [str(alarm) for alarm in run.alarms()] == []
        first = run.alarms("dropped")[0]
        assert first.names == [f"class {run.victim}"]
        assert first.epoch < run.start + 4


def test_large_images_are_compared_by_features_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = set()
    fit = KNeighborsClassifier.fit
    monkeypatch.setattr(KNeighborsClassifier, "fit", lambda self, x, y: lengths.add(x.shape[1]) or fit(self, x, y))
    large, small = torch.rand(40, 3, 96, 96), torch.rand(40, 1, 32, 32)
    assert together(large) == 256
    assert together(torch.empty(1, 3, 1024, 1024)) == 4
    assert space_for(small, torch.nn.Identity()) is None
    monitor = GenerationBalanceMonitor(
        adapter=ModelAdapter(reference=(large, torch.arange(40) % 2), num_samples=8), on_error="raise"
    )
    network = nn.Sequential(nn.Linear(4, 3 * 96 * 96), nn.Unflatten(1, (3, 96, 96)), nn.Sigmoid())
    model = Classified()
    model.sample = lambda n: network(torch.randn(n, 4))  # type: ignore[method-assign]
    trainer(monitor, max_epochs=1).fit(model, batches(16, 32))
    (compared,) = lengths
    assert compared == 39


class WithClassifier(TinyGAN):
    """A GAN with a classifier that has BatchNorm, dropout, and more classes than the reference."""

    def __init__(self, favourite: int = 3) -> None:
        super().__init__()
        self.classifier_net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 12))
        nn.init.zeros_(self.classifier_net[3].weight)
        with torch.no_grad():
            self.classifier_net[3].bias.copy_(torch.nn.functional.one_hot(torch.tensor(favourite), 12))


@pytest.mark.parametrize(
    "options",
    [
        {"classifier": "classifier_net"},
        {"features": lambda module, images: module.classifier_net(images)},
        {"features": lambda module, images: module.classifier_net(images), "space": "features"},
        {"classifier": "the module"},
    ],
)
def test_a_classifier_inside_the_module_leaves_training_unchanged(options: dict[str, Any]) -> None:
    class Attached(GenerationBalanceMonitor):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if self.classifier == "the module":
                self.classifier = pl_module.classifier_net
            super().setup(trainer, pl_module, stage)

    monitor = Attached(adapter=ModelAdapter(num_samples=32, num_reference=32), on_error="raise", **options)
    found = state_after_training(monitor, module=WithClassifier)
    torch.testing.assert_close(found, state_after_training(module=WithClassifier), rtol=0, atol=0, equal_nan=True)
    assert monitor.result is not None


def test_a_classifier_with_more_classes_than_the_reference_sets_their_number() -> None:
    monitor = GenerationBalanceMonitor(
        "classifier_net", adapter=ModelAdapter(num_samples=32, num_reference=32), on_error="raise"
    )
    trainer(monitor, max_epochs=1).fit(WithClassifier(11), batches())
    assert monitor.result.generated_count.tolist() == [0.0] * 11 + [32.0]


def test_each_model_is_evaluated_with_its_own_classifier() -> None:
    monitor = GenerationBalanceMonitor(
        "classifier_net", adapter=ModelAdapter(num_samples=32, num_reference=32), on_error="raise"
    )
    for favourite in (3, 5):
        trainer(monitor, max_epochs=1).fit(WithClassifier(favourite), batches())
        assert int(monitor.result.generated_count.argmax()) == favourite


def test_samples_that_are_all_nan_are_counted_as_invalid() -> None:
    monitor = GenerationBalanceMonitor("classify", adapter=adapter(), on_error="raise")
    model = Classified()
    model.sample = lambda n: torch.full((n, 1, 16, 16), torch.nan)  # type: ignore[method-assign]
    trainer(monitor, max_epochs=1).fit(model, batches(16, 32))
    assert float(monitor.result.invalid) == 1
    assert not monitor.result.dropped.any()


def test_features_of_the_model_itself_are_computed_at_each_evaluation() -> None:
    class Growing(ScriptedGenerator):
        def features(self, images: Tensor) -> Tensor:
            return 1.5**self.current_epoch * images.flatten(2).mean(2).expand(-1, 2).clone()

    seen = []

    class Recording(GenerationBalanceMonitor):
        def observations(self, result: Any) -> Any:
            seen.append(float(result.fid.nan_to_num(0).max()) / 1.5 ** (2 * self.session.trainer.current_epoch))
            return super().observations(result)

    monitor = Recording(features=lambda module, images: module.features(images), adapter=ModelAdapter(num_samples=400))
    trainer(monitor, max_epochs=4).fit(Growing(size=8), batches(8, 800))
    # samples are real images, so that the distance grows only in proportion to the features
    assert max(seen) < 0.02
