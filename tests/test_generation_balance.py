from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.stats import binomtest
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.balance_alarms import KINDS, RECORDS, START, replay
from example_models.data import digits
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    DiagnosticWarning,
    GenerationBalance,
    GenerationBalanceMonitor,
    Probe,
)
from lightning_gendiag.diagnostics.generation_balance.metric import binomial_interval
from lightning_gendiag.functional import frechet_distance
from lightning_gendiag.judges import FeatureNetwork, NeighbourClassifier, space_for, together
from tests.cases import Case
from tests.conftest import ScriptedGenerator, TinyGAN, batches, trainer
from tests.test_board_and_panels import events
from tests.test_monitor import state_after_training


def updates(count: int = 12, n: int = 30, classes: int = 3, features: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        labels = torch.randint(classes, (n,), generator=generator)
        rows = torch.randn(n, features, generator=generator, dtype=torch.float64) * (1 + labels[:, None]) + i % 2
        made.append({"labels": labels, "real": i % 2 == 0, "features": rows})
    return made


CASE = Case(make=lambda: GenerationBalance(3), updates=updates(), tolerance=1e-8)


class Given(nn.Module):
    num_features = 4

    def forward(self, features: Tensor) -> Tensor:
        return features


# ---- the metric ----


def test_fid_of_each_class_is_that_of_torchmetrics_on_the_class_alone() -> None:
    metric = GenerationBalance(3)
    for update in CASE.updates:
        metric.update(**update)
    result = metric.compute()
    for c in range(3):
        fid = FrechetInceptionDistance(Given()).set_dtype(torch.float64)
        for update in CASE.updates:
            fid.update(update["features"][update["labels"] == c], real=update["real"])
        assert float(result.fid[c]) == pytest.approx(float(fid.compute()), abs=1e-6)


def test_the_frechet_distance_has_a_closed_form_for_diagonal_covariances(generator: torch.Generator) -> None:
    a, b = (torch.rand(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    found = frechet_distance(mean, torch.diag_embed(a), 0 * mean, torch.diag_embed(b))
    torch.testing.assert_close(found, mean.square().sum(1) + (a.sqrt() - b.sqrt()).square().sum(1))
    # a singular covariance does no harm
    a[:, 0] = 0
    found = frechet_distance(mean, torch.diag_embed(a), mean, torch.diag_embed(a))
    torch.testing.assert_close(found, torch.zeros(5).double(), rtol=0, atol=1e-7)


def test_shares_distances_and_divergence_by_hand() -> None:
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
    # so few images prove nothing
    assert not result.dropped.any()
    assert not result.dominating.any()


def test_the_interval_is_that_of_scipy() -> None:
    counts = torch.tensor([0.0, 3.0, 47.0])
    for (low, high), k in zip(binomial_interval(counts, 0.01).tolist(), counts.tolist(), strict=True):
        expected = binomtest(int(k), 50).proportion_ci(0.98, "exact")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_dropped_class_is_named_with_500_samples_and_none_is_on_balanced_draws() -> None:
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


def test_a_rare_class_of_500_is_no_news() -> None:
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


def test_rows_that_are_not_finite_are_left_out_and_told() -> None:
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
        (lambda: FeatureNetwork(torch.zeros(2, 1, 8, 8)), "images must be at least 4, got 2"),
    ],
)
def test_bad_input_is_refused_in_words(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---- the judges ----


def test_the_feature_network_sees_what_goes_wrong_with_images() -> None:
    images = digits(32)[0][torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    network = FeatureNetwork(images[:900])
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


def test_constant_images_have_features_that_are_finite() -> None:
    assert FeatureNetwork(torch.zeros(8, 3, 16, 16))(torch.ones(2, 3, 16, 16)).isfinite().all()


def test_neighbours_tell_digits_apart_and_know_how_well() -> None:
    images, labels = digits(16)
    for features in (None, FeatureNetwork(images[:1000])):
        judge = NeighbourClassifier(images[:1000], labels[:1000], features)
        right = float((judge(images[1000:]) == labels[1000:]).double().mean())
        assert judge.accuracy > 0.9
        assert abs(right - judge.accuracy) < 0.06
        assert judge.probabilities(images[:5]).sum(1).tolist() == pytest.approx([1.0] * 5)


# ---- the monitor ----


class Drawing(ScriptedGenerator):
    """Draws real digits, of some classes only from some epoch on."""

    def __init__(self, wanted: Any = lambda epoch: range(10), size: int = 16) -> None:
        super().__init__(size=size)
        self.wanted, self.labels = wanted, digits(size)[1]

    def sample(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) + self.current_epoch)
        allowed = torch.isin(self.labels, torch.tensor(list(self.wanted(self.current_epoch)))).nonzero()[:, 0]
        return self.pool[allowed[torch.randint(len(allowed), (n,), generator=generator)]]


def probe(**options: Any) -> Probe:
    return Probe(reference=digits(16), **({"num_samples": 500, "num_reference": 800} | options))


def test_a_dropped_class_stops_the_run_and_is_named() -> None:
    watched, stopping = GenerationBalanceMonitor(probe=probe(), on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="class 7 was dropped: .* Training stops if it lasts for 8 more looks"):
        own = trainer(watched, stopping, max_epochs=30)
        own.fit(Drawing(lambda epoch: set(range(10)) - ({7} if epoch >= 12 else set())), batches(16, 32))
    assert stopping.findings[0].epoch < 17
    # the epoch that it is found in, and eight more
    assert own.current_epoch == stopping.findings[0].epoch + 9
    assert "class 7 was dropped" in stopping.stopping_reason_message
    assert stopping.findings[0].names == ["class 7"]
    assert float(watched.result.generated_share[7]) < 0.02
    assert 0.9 < float(watched.result.accuracy) < 1


def test_a_class_that_takes_all_is_told_as_the_whole() -> None:
    watched, stopping = GenerationBalanceMonitor(probe=probe(), on_error="raise"), CollapseStopping()
    with pytest.warns(
        CollapseWarning, match=r"the balance of classes, with class 4 at \d+%, collapsed: distance of their shares"
    ):
        own = trainer(watched, stopping, max_epochs=30)
        own.fit(Drawing(lambda epoch: [4] if epoch >= 12 else range(10)), batches(16, 32))
    # at once
    assert own.current_epoch == stopping.findings[0].epoch + 1


def test_a_class_that_comes_back_is_told_and_does_not_stop_the_run() -> None:
    watched, stopping = GenerationBalanceMonitor(probe=probe(), on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="class 7 was dropped"):
        own = trainer(watched, stopping, max_epochs=30)
        own.fit(Drawing(lambda epoch: set(range(10)) - ({7} if 12 <= epoch < 17 else set())), batches(16, 32))
    assert own.current_epoch == 30
    assert stopping.findings[0].recovered is not None
    assert stopping.verdict()["healthy"] is True


def test_a_healthy_run_goes_to_its_end() -> None:
    watched, stopping = GenerationBalanceMonitor(probe=probe(), on_error="raise"), CollapseStopping()
    trainer(watched, stopping, max_epochs=25).fit(Drawing(), batches(16, 32))
    assert stopping.findings == []


class Classified(Drawing):
    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(256, 10)

    def classify(self, images: Tensor) -> Tensor:
        return self.judge(images.flatten(1))


@pytest.mark.parametrize(
    "classifier",
    [
        "classify",
        lambda module, images: module.classify(images).argmax(1),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 10)),
    ],
)
def test_the_users_classifier_is_asked(classifier: Any) -> None:
    watched = GenerationBalanceMonitor(classifier, probe=probe(), on_error="raise")
    trainer(watched, max_epochs=1).fit(Classified(), batches(16, 32))
    # it was never trained
    assert float(watched.result.accuracy) < 0.5
    assert float(watched.result.generated_count.sum()) == 500


def test_features_may_be_the_users_and_the_space_too() -> None:
    own = GenerationBalanceMonitor(
        space="features",
        features=lambda module, images: images[:, 0, ::4, ::4].flatten(1),
        probe=probe(),
        on_error="raise",
    )
    trainer(own, max_epochs=1).fit(Drawing(), batches(16, 32))
    assert own.result.fid.isfinite().all()


def test_images_with_nan_are_counted_and_no_crash() -> None:
    def script(images: Tensor, epoch: int) -> Tensor:
        images[:100] = torch.nan
        return images

    watched = GenerationBalanceMonitor(probe=probe(chunk_size=500), on_error="raise")
    trainer(watched, max_epochs=1).fit(ScriptedGenerator(script), batches(16, 32))
    assert float(watched.result.generated_count.sum()) == 400
    assert float(watched.result.invalid) == pytest.approx(100 / 500)


def test_without_labels_it_says_so() -> None:
    watched = GenerationBalanceMonitor(probe=Probe(reference=digits(16)[0]))
    with pytest.warns(DiagnosticWarning, match="labels must be known, but the batches have none"):
        trainer(watched, max_epochs=1).fit(Drawing(), batches(16, 32))
    with pytest.raises(ValueError, match="classifier must be a callable or name a submodule or method of Drawing"):
        trainer(GenerationBalanceMonitor("judge"), max_epochs=1).fit(Drawing(), batches(16, 32))


def test_pictures_scalars_and_charts_are_on_the_board(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(GenerationBalanceMonitor(probe=probe(), on_error="raise"), max_epochs=2, logger=logger).fit(
        Drawing(), batches(16, 32)
    )
    seen = events(logger.log_dir)
    wanted = {
        f"gendiag/generation_balance/{name}" for name in ("imbalance", "class_3", "fid_class_9", "accuracy", "seconds")
    }
    assert wanted <= set(seen.Tags()["scalars"])
    assert "gendiag/generation_balance/panel" in seen.Tags()["images"]


def test_training_is_bit_identical_with_and_without() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: VAE(3, width=2), size=32)

    watched = GenerationBalanceMonitor(probe=Probe(num_samples=64), on_error="raise")
    torch.testing.assert_close(run(watched), run(), rtol=0, atol=0)
    assert watched.result is not None


# ---- recorded runs ----

RUNS = json.loads(RECORDS.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_healthy_runs_raise_no_alarm_and_a_dropped_class_is_named(kind: str) -> None:
    runs = [run for run in RUNS if run["kind"] == kind]
    assert len(runs) == 10
    for run in runs:
        assert [str(finding) for finding in replay(run, "healthy")[0].findings] == []
        stopping, victim = replay(run, "dropped")
        assert stopping.findings[0].names == [victim]
        assert stopping.findings[0].epoch < START + 4


def test_large_images_are_looked_at_in_small_pieces_and_compared_by_features() -> None:
    large, small = torch.rand(40, 3, 96, 96), torch.rand(40, 1, 32, 32)
    assert together(large) == 256
    assert together(torch.empty(1, 3, 1024, 1024)) == 4
    assert space_for(small, torch.nn.Identity()) is None
    watched = GenerationBalanceMonitor(
        probe=Probe(reference=(large, torch.arange(40) % 2), num_samples=8), on_error="raise"
    )
    network = nn.Sequential(nn.Linear(4, 3 * 96 * 96), nn.Unflatten(1, (3, 96, 96)), nn.Sigmoid())
    model = Classified()
    model.sample = lambda n: network(torch.randn(n, 4))  # type: ignore[method-assign]
    trainer(watched, max_epochs=1).fit(model, batches(16, 32))
    assert isinstance(watched._classify, NeighbourClassifier)
    assert watched._classify.model.n_features_in_ == 39


class Judged(TinyGAN):
    """A GAN with a classifier of its own that has BatchNorm and dropout, wider than the reference's labels."""

    def __init__(self, favourite: int = 3) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 12))
        nn.init.zeros_(self.judge[3].weight)
        with torch.no_grad():
            self.judge[3].bias.copy_(torch.nn.functional.one_hot(torch.tensor(favourite), 12))


@pytest.mark.parametrize(
    "options",
    [
        {"classifier": "judge"},
        {"features": lambda module, images: module.judge(images)},
        {"features": lambda module, images: module.judge(images), "space": "features"},
        {"classifier": "the module"},
    ],
)
def test_judges_that_are_part_of_the_module_leave_no_trace(options: dict[str, Any]) -> None:
    class Attached(GenerationBalanceMonitor):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if self.classifier == "the module":
                self.classifier = pl_module.judge
            super().setup(trainer, pl_module, stage)

    watched = Attached(probe=Probe(num_samples=32, num_reference=32), on_error="raise", **options)
    found = state_after_training(watched, module=Judged)
    torch.testing.assert_close(found, state_after_training(module=Judged), rtol=0, atol=0, equal_nan=True)
    assert watched.result is not None


def test_a_classifier_of_more_classes_than_the_reference_shows_sets_their_number() -> None:
    watched = GenerationBalanceMonitor("judge", probe=Probe(num_samples=32, num_reference=32), on_error="raise")
    trainer(watched, max_epochs=1).fit(Judged(11), batches())
    assert watched.result.generated_count.tolist() == [0.0] * 11 + [32.0]


def test_another_model_on_another_trainer_is_judged_by_its_own_classifier() -> None:
    watched = GenerationBalanceMonitor("judge", probe=Probe(num_samples=32, num_reference=32), on_error="raise")
    for favourite in (3, 5):
        trainer(watched, max_epochs=1).fit(Judged(favourite), batches())
        assert int(watched.result.generated_count.argmax()) == favourite


def test_images_that_are_all_nan_are_told() -> None:
    watched = GenerationBalanceMonitor("classify", probe=probe(), on_error="raise")
    model = Classified()
    model.sample = lambda n: torch.full((n, 1, 16, 16), torch.nan)  # type: ignore[method-assign]
    trainer(watched, max_epochs=1).fit(model, batches(16, 32))
    assert float(watched.result.invalid) == 1
    assert not watched.result.dropped.any()


def test_features_of_the_model_itself_are_asked_anew() -> None:
    class Growing(ScriptedGenerator):
        def features(self, images: Tensor) -> Tensor:
            return 1.5**self.current_epoch * images.flatten(2).mean(2).expand(-1, 2).clone()

    seen = []

    class Noting(GenerationBalanceMonitor):
        def readings(self, result: Any) -> Any:
            seen.append(float(result.fid.nan_to_num(0).max()) / 1.5 ** (2 * self.probe.module.current_epoch))
            return super().readings(result)

    watched = Noting(features=lambda module, images: module.features(images), probe=Probe(num_samples=400))
    trainer(watched, max_epochs=4).fit(Growing(size=8), batches(8, 800))
    # samples are real images: the distance grows as the features do, and no faster
    assert max(seen) < 0.02
