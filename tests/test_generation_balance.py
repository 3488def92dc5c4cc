from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.optimize import minimize
from scipy.stats import binomtest
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
    LatentRegionsMonitor,
    ModelAdapter,
)
from lightning_gendiag.diagnostics.generation_balance import plots
from lightning_gendiag.diagnostics.generation_balance.functional import (
    LEAST_SINGULAR,
    corrected_interval,
    corrected_shares,
    error_rates,
    share_error,
    share_variance,
)
from lightning_gendiag.diagnostics.generation_balance.monitor import severity
from lightning_gendiag.functional.distances import frechet_distance
from lightning_gendiag.functional.intervals import binomial_interval
from lightning_gendiag.model.features import (
    FeatureExtractor,
    KernelClassifier,
    NeighbourClassifier,
    averaged_pixels,
    principal_components,
    space_for,
    together,
)
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


def test_images_that_are_said_to_be_finite_count_whatever_their_features_are() -> None:
    features = torch.tensor([[0.0], [2.0], [torch.nan], [1.0]])
    metric = GenerationBalance(2)
    metric.update(torch.tensor([0, 0, 1, 1]), real=True, features=features.nan_to_num())
    metric.update(
        torch.tensor([0, 0, 0, 1]), real=False, features=features, finite=torch.tensor([True, True, True, False])
    )
    result = metric.compute()
    assert result.generated_count.tolist() == [3, 0]
    assert float(result.invalid) == 1 / 4
    assert float(result.fid[0]) == pytest.approx(0, abs=1e-12)


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
        (
            lambda: GenerationBalance(2, confusion=torch.ones(2, 3)),
            r"confusion must be \(2, 2\) counts of at least 0, got \(2, 3\). To fix",
        ),
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


def test_the_neighbours_recognize_digits() -> None:
    images, labels = digits(16)
    for features in (None, FeatureExtractor(images[:1000])):
        classifier = NeighbourClassifier(images[:1000], labels[:1000], features)
        assert float((classifier(images[1000:]) == labels[1000:]).double().mean()) > 0.9
        assert classifier.probabilities(images[:5]).sum(1).tolist() == pytest.approx([1.0] * 5)


class Counting(nn.Module):
    """Features of a user's own network, and how many images went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return averaged_pixels(images)


@pytest.mark.parametrize("given", [True, False])
def test_features_of_the_reference_are_computed_once_for_all_monitors(
    given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Counting()
    responses = FeatureExtractor.responses
    if not given:
        monkeypatch.setattr(
            FeatureExtractor, "responses", lambda own, images: (network(images), responses(own, images))[1]
        )
    # so that the neighbours compare features too
    monkeypatch.setattr("lightning_gendiag.model.features.PIXELS", 0)
    options: Any = {"features": network if given else None, "on_error": "raise", "log_images": False}
    options["adapter"] = ModelAdapter(reference=digits(32), num_reference=400, num_samples=20)
    monitors = [
        GenerationBalanceMonitor(**options),
        LatentRegionsMonitor(components=1, num_points=10, **options),
    ]
    trainer(monitors[0], max_epochs=1).fit(VAE(3, width=2), batches(32))
    # samples go through the filters once, for the classes and for the distances
    assert network.images == 400 + 20
    network.images = 0
    trainer(*monitors, max_epochs=1).fit(VAE(3, width=2), batches(32))
    without_points = network.images
    # ten points of each of four kinds, which two networks compare, and those of the only component, which one compares
    assert without_points <= 400 + 20 + 4 * 10 * 2 + 32


def test_features_of_some_rows_of_the_reference_are_those_of_its_images() -> None:
    images = digits(16)[0][:300]
    network = FeatureExtractor(images)
    torch.testing.assert_close(network.of_reference(slice(1, None, 2)), network(images[1::2]), rtol=1e-4, atol=1e-4)


def test_principal_components_are_those_of_an_eigendecomposition(generator: torch.Generator) -> None:
    scale = 0.9 ** torch.arange(300)
    rows = torch.randn(400, 300, generator=generator) * scale
    rows -= rows.mean(0)
    exact = torch.linalg.eigvalsh(rows.double().T.cov()).flip(0)[:20]
    variance, directions = principal_components(rows, 20)
    torch.testing.assert_close(variance, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(directions.T @ directions, torch.eye(20).double(), rtol=0, atol=1e-5)
    covariance = (rows.double() @ directions).T.cov()
    torch.testing.assert_close(covariance, variance.diag(), rtol=1e-3, atol=1e-6)
    # fewer rows than twice the components leave nothing out
    few = rows[:15] - rows[:15].mean(0)
    torch.testing.assert_close(
        principal_components(few, 10)[0], torch.linalg.svdvals(few.double())[:10].square() / 14, rtol=1e-4, atol=0
    )


SPACES = [(averaged_pixels, 0.3)]


def labels_by_eigenvalues(images: Tensor, labels: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the classifier assigns to its own images in each ridge's regression without their fold, and to others.

    It is a slow twin: in float64, from differences of rows and an eigendecomposition.
    """
    x, y = (averaged_pixels(some).double() for some in (images, other))
    squares = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    variance = 0.3 * squares[~torch.eye(len(x), dtype=torch.bool)].median()
    values, vectors = torch.linalg.eigh((-squares / (2 * variance)).exp())
    targets = nn.functional.one_hot(labels).double()
    fits = []
    for ridge in (1e-3, 1e-2, 1e-1):
        inverse = (vectors / (values + ridge)) @ vectors.T
        weights = inverse @ targets
        fits.append((float((weights / inverse.diag()[:, None]).square().sum()), weights, inverse))
    _, weights, inverse = min(fits, key=lambda fit: fit[0])
    held_out = torch.empty_like(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    for fold in (order[first::10] for first in range(10)):
        errors = torch.linalg.solve(inverse[fold[:, None], fold], weights[fold])
        held_out[fold] = (targets[fold] - errors).argmax(1)
    kernel = (-torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * variance)).exp()
    return held_out, (kernel @ weights).argmax(1)


def test_the_classifier_assigns_the_labels_of_one_in_float64(generator: torch.Generator) -> None:
    images, labels = digits(32)
    noisy = images[1000:1700] + 0.5 * torch.randn(700, 1, 32, 32, generator=generator)
    classifier = KernelClassifier(images[:600], labels[:600], SPACES)
    held_out, others = labels_by_eigenvalues(images[:600], labels[:600], noisy)
    assert torch.equal(classifier.held_out, held_out)
    assert torch.equal(classifier(noisy), others)


def test_the_classifier_recognizes_digits_and_knows_its_errors() -> None:
    images, labels = digits(32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    filters = FeatureExtractor(images[:1000]).responses
    classifier = KernelClassifier(images[:1000], labels[:1000], [*SPACES, (lambda some: filters(some).sqrt(), 0.1)])
    right = float((classifier(images[1000:]) == labels[1000:]).double().mean())
    assert right > 0.98
    known = [None, filters(images[:1000]).sqrt()]
    again = KernelClassifier(images[:1000], labels[:1000], [*SPACES, (lambda some: some, 0.1)], known)
    assert torch.equal(again.held_out, classifier.held_out)
    assert float((classifier.held_out == labels[:1000]).double().mean()) == pytest.approx(right, abs=0.01)


def test_held_out_labels_equal_those_of_a_classifier_without_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gendiag.model.features.RIDGES", (1e-2,))
    monkeypatch.setattr("lightning_gendiag.model.features.FOLDS", 2)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    images = torch.randn(400, 1, 4, 4, generator=generator) + 0.5 * labels[:, None, None, None]
    whole = KernelClassifier(images, labels, SPACES)
    # the same order, in which every second image of a class is of the other fold
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    fold = torch.empty(400, dtype=torch.long)
    fold[order[labels[order].argsort(stable=True)]] = torch.arange(400) % 2
    equal = []
    for side in (0, 1):
        half = KernelClassifier(images[fold == side], labels[fold == side], SPACES)
        equal.append(half(images[fold != side]) == whole.held_out[fold != side])
    # but for the width of the kernel, which is taken from all images
    assert float(torch.cat(equal).double().mean()) > 0.97


def test_a_classifier_that_cannot_learn_is_right_by_chance_on_held_out_images() -> None:
    images, labels = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    right = float((KernelClassifier(images, labels, SPACES).held_out == labels).double().mean())
    assert right == pytest.approx(0.5, abs=0.11)


def test_images_beyond_those_it_learns_from_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gendiag.model.features.LEARNED", 500)
    images, labels = digits(16)
    classifier = KernelClassifier(images, labels, SPACES)
    assert float((classifier.held_out == labels).double().mean()) > 0.96


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(8, 1, 4, 4), torch.arange(8) % 2),
        (torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.long)),
        (torch.rand(8, 1, 2, 2), torch.tensor([0, 0, 0, 0, 0, 0, 0, 5])),
        (torch.rand(8, 1, 2, 2), torch.tensor([0, 0, 0, 3, 3, 3, 3, 10**9])),
    ],
)
def test_degenerate_images_and_labels_are_classified(images: Tensor, labels: Tensor) -> None:
    classifier = KernelClassifier(images, labels, SPACES)
    for found in (classifier.held_out, classifier(images[:0]), classifier(100 * images)):
        assert ((found >= 0) & (found <= labels.max())).all()


# ---- correction for the classifier's errors ----


def variance_by_loops(p: Tensor, c: Tensor, number: Tensor, samples: float) -> Tensor:
    """The delta method, term by term, with an inverse from the singular values."""
    u, s, vh = torch.linalg.svd(c.T)
    inverse = sum(torch.outer(vh[i], u[:, i]) / max(float(s[i]), LEAST_SINGULAR) for i in range(len(p)))
    q = c.T @ p
    middle = (q.diag() - torch.outer(q, q)) / samples
    for i in range(len(p)):
        middle += p[i] ** 2 / number[i] * (c[i].diag() - torch.outer(c[i], c[i]))
    return torch.stack([row @ middle @ row for row in inverse]).clamp(min=0)


@pytest.mark.parametrize("kind", ["good", "poor", "singular"])
@pytest.mark.parametrize("k", [2, 7, 60])
def test_the_variance_of_shares_equals_the_formula_term_by_term(kind: str, k: int, generator: torch.Generator) -> None:
    c = torch.rand(k, k, generator=generator, dtype=torch.float64) + {"good": 3 * k, "poor": 0.5, "singular": 0}[
        kind
    ] * torch.eye(k, dtype=torch.float64)
    c[0] = c[1] if kind == "singular" else c[0]
    c /= c.sum(1, keepdim=True)
    p = torch.rand(k, generator=generator, dtype=torch.float64)
    number = torch.randint(2, 50, (k,), generator=generator).double()
    found, expected = share_variance(p / p.sum(), c, number, 300), variance_by_loops(p / p.sum(), c, number, 300)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12 * float(expected.max()))


def test_the_bounds_of_many_classes_need_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    k = 300
    confusion = 5 * torch.eye(k, dtype=torch.float64) + torch.eye(k, dtype=torch.float64).roll(1, 0)
    share = torch.full((k,), 1 / k, dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "svd", None)
    bounds = corrected_interval(3 * torch.ones(k, dtype=torch.float64), share, confusion, 1e-4)
    assert (bounds[:, 0] <= share).all()
    assert (share <= bounds[:, 1]).all()
    assert share_error(share, confusion).isfinite().all()


def errors(accuracy: float, k: int, seed: int = 0) -> Tensor:
    """Returns (K, K) error rates of a classifier that is right for a fraction of each class and wrong unevenly."""
    others = torch.rand(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    others.fill_diagonal_(0)
    return (1 - accuracy) * others / others.sum(1, keepdim=True) + accuracy * torch.eye(k)


def assigned(shares: Tensor, rates: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Returns (K,) counts of the classes to which a classifier assigns n images."""
    true = torch.multinomial(shares, n, replacement=True, generator=generator)
    return torch.bincount(torch.multinomial(rates[true], 1, generator=generator)[:, 0], minlength=len(shares)).double()


def test_two_classes_have_a_closed_form() -> None:
    rates = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    for q in (0.3, 0.5, 0.85):
        expected = (q - 0.2) / (0.9 - 0.2)
        assert float(corrected_shares(torch.tensor([q, 1 - q]), rates)[0]) == pytest.approx(expected, abs=1e-6)
    # fewer than the classifier's errors alone would give
    assert float(corrected_shares(torch.tensor([0.1, 0.9]), rates)[0]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("accuracy", [0.95, 0.6])
def test_corrected_shares_have_the_largest_likelihood(accuracy: float) -> None:
    generator = torch.Generator().manual_seed(1)
    rates, true = errors(accuracy, 6), torch.tensor([0.0, 0.3, 0.3, 0.2, 0.15, 0.05], dtype=torch.float64)
    q = (assigned(true, rates, 400, generator) / 400).numpy()
    found = minimize(
        lambda p: -float(q @ np.log(np.maximum(rates.numpy().T @ p, 1e-12))), np.full(6, 1 / 6), method="SLSQP",
        bounds=[(0, 1)] * 6, constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, options={"ftol": 1e-14},
    )  # fmt: skip
    torch.testing.assert_close(corrected_shares(torch.tensor(q), rates), torch.tensor(found.x), rtol=0, atol=2e-3)


def test_the_variance_equals_that_of_a_simulation() -> None:
    generator = torch.Generator().manual_seed(2)
    rates, p, n, real = errors(0.8, 3), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 500, 200
    shares = []
    for _ in range(2000):
        drawn = [torch.multinomial(row, real, replacement=True, generator=generator) for row in rates]
        measured = torch.stack([torch.bincount(row, minlength=3) / real for row in drawn]).double()
        shares.append(torch.linalg.solve(measured.T, assigned(p, rates, n, generator) / n))
    expected = torch.stack(shares).var(0)
    torch.testing.assert_close(share_variance(p, rates, torch.full((3,), real), n), expected, rtol=0.1, atol=0)
    # without errors it is the binomial one
    perfect = share_variance(p, torch.eye(3), torch.full((3,), real), n)
    torch.testing.assert_close(perfect, p * (1 - p) / n)


@pytest.mark.parametrize(("accuracy", "k"), [(0.99, 2), (0.94, 10), (0.7, 10)])
@pytest.mark.parametrize("dropped", [False, True])
def test_intervals_cover_the_true_shares_at_least_as_often_as_stated(accuracy: float, k: int, dropped: bool) -> None:
    generator, confidence, runs, real = torch.Generator().manual_seed(3), 0.9, 200, 1000 // k
    rates, p = errors(accuracy, k), torch.full((k,), 1 / k, dtype=torch.float64)
    if dropped:
        p[0] = 0
        p /= p.sum()
    held = 0
    for _ in range(runs):
        drawn = [torch.multinomial(row, real, replacement=True, generator=generator) for row in rates]
        confusion = torch.stack([torch.bincount(row, minlength=k) for row in drawn]).double()
        counts = assigned(p, rates, 500, generator)
        shares = corrected_shares(counts, error_rates(confusion)[0])
        low, high = corrected_interval(counts, shares, confusion, (1 - confidence) / (4 * k)).unbind(1)
        held += bool(((low <= p) & (p <= high)).all())
    # the nominal 90 %, less three standard errors of this simulation
    assert held / runs >= confidence - 3 * (confidence * (1 - confidence) / runs) ** 0.5


def balance(confusion: Tensor, counts: Tensor) -> Any:
    """Returns the result of generated images that a classifier with these errors assigned."""
    k = len(confusion)
    metric = GenerationBalance(k, confusion=confusion)
    metric.update(torch.repeat_interleave(torch.arange(k), confusion.sum(1).long()), real=True)
    metric.update(torch.repeat_interleave(torch.arange(k), counts.long()), real=False)
    return metric.compute()


def test_what_is_kept_of_the_real_images_is_that_of_all_of_them() -> None:
    confusion = torch.tensor([[90.0, 10.0], [30.0, 70.0]])
    metric, again = GenerationBalance(2, confusion=confusion), GenerationBalance(2, confusion=confusion)
    real, more, made = (torch.tensor([0, 1]).repeat_interleave(torch.tensor(n)) for n in ([50, 50], [5, 95], [30, 70]))
    metric.update(real, real=True)
    metric.update(made, real=False)
    metric.compute()
    metric.update(more, real=True)
    again.update(torch.cat([real, more]), real=True)
    again.update(made, real=False)
    for value, expected in zip(metric.compute(), again.compute(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def test_an_unbalanced_classifier_on_balanced_images_gives_balanced_shares() -> None:
    # doubtful images of all classes are assigned to class 1
    rates = 0.85 * torch.eye(10, dtype=torch.float64)
    rates[:, 1] += 0.15
    result = balance((rates * 100).round(), (rates.mean(0) * 1000).round())
    assert float(result.assigned_share[1]) > 0.23
    torch.testing.assert_close(result.generated_share, torch.full((10,), 0.1).double(), rtol=0, atol=5e-3)
    assert float(result.imbalance) < 0.01
    assert not (result.dropped | result.dominating | result.undetermined).any()
    assert float(result.accuracy) == pytest.approx(0.865)
    assert ((result.interval[:, 0] < 0.1) & (result.interval[:, 1] > 0.1)).all()


def test_a_class_that_the_others_are_mistaken_for_is_seen_to_be_dropped() -> None:
    rates = 0.9 * torch.eye(10, dtype=torch.float64)
    rates[:, 1] += 0.1
    p = (torch.arange(10) != 1).double() / 9
    result = balance((rates * 1000).round(), (rates.T @ p * 4000).round())
    # as many images are assigned to it as are real
    assert float(result.assigned_share[1]) == pytest.approx(0.1, abs=2e-3)
    assert result.dropped.nonzero()[:, 0].tolist() == [1]


def test_classes_that_the_classifier_confuses_cannot_be_told_and_count_together() -> None:
    rates = torch.eye(4, dtype=torch.float64)
    rates[2:, 2:] = 0.5
    result = balance(rates * 100, torch.tensor([300.0, 300.0, 400.0, 0.0]))
    assert result.undetermined.tolist() == [False, False, True, True]
    assert not (result.dropped | result.dominating).any()
    assert (result.interval[2:, 1] - result.interval[2:, 0] > 0.4).all()
    assert float(result.imbalance) == pytest.approx(0.1, abs=0.01)
    assert float(result["undetermined"]) == 2
    # their sum is as certain as other shares
    alone = balance(rates * 100, torch.tensor([500.0, 500.0, 0.0, 0.0]))
    assert float(alone.imbalance) == pytest.approx(0.5, abs=0.02)


def test_a_classifier_that_guesses_tells_nothing() -> None:
    counts = torch.tensor([400.0, 0.0, 0.0])
    result = balance(torch.full((3, 3), 30.0), counts)
    assert result.undetermined.all()
    assert result.imbalance.isnan()
    assert result.divergence.isnan()
    monitor = GenerationBalanceMonitor()
    observations = monitor.observations(result)
    assert len(observations) == 4
    assert {observation.series.role for observation in observations} == {"record"}


def test_a_classifier_with_other_numbers_of_the_classes_tells_nothing() -> None:
    result = balance(torch.eye(3).roll(1, 1) * 100, torch.tensor([300.0, 0.0, 0.0]))
    assert result.undetermined.all()
    assert result.interval.tolist() == [[0.0, 1.0]] * 3


@pytest.mark.parametrize("few", [0, 1])
def test_a_class_with_one_real_image_or_none_is_not_told(few: int) -> None:
    confusion = torch.tensor([[100.0, 0, 0], [0, 100, 0], [few, 0, 0]])
    for counts in ([500.0, 500, 0], [0.0, 0, 1000], [0.0, 0, 0]):
        result = balance(confusion, torch.tensor(counts))
        assert not result.dropped[2]
        assert result.undetermined.tolist() == [False, False, few > 0]
        assert result.interval.isfinite().all()
        assert result.generated_share.isnan().all() == (sum(counts) == 0)


# ---- the severity ----


def test_a_share_that_halves_is_worse_by_one_octave_anywhere() -> None:
    for share in (0.5, 0.2, 0.05):
        assert severity(share / 2, 10000, 0.5) - severity(share, 10000, 0.5) == pytest.approx(1, abs=0.02)
    assert np.isnan(severity(float("nan"), 0, 0.1))


def test_a_fall_to_the_real_share_is_an_improvement() -> None:
    assert severity(0.9, 1000, 0.1) == severity(0.2, 1000, 0.1)
    assert severity(0.05, 1000, 0.1) > severity(0.1, 1000, 0.1) + 0.9


def test_sampling_makes_frequent_and_rare_classes_fluctuate_about_equally() -> None:
    generator = np.random.default_rng(0)
    for share in (0.004, 0.01, 0.02, 0.05, 0.1):
        counts = generator.binomial(512, share, 4000)
        assert 0.15 < np.std([severity(count / 512, 512, 1.0) for count in counts]) < 0.4


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


@pytest.mark.filterwarnings("ignore:class 7 was dropped")
def test_a_dropped_class_stops_the_run_and_is_named() -> None:
    monitor, stopping = GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), CollapseStopping()
    with pytest.warns(
        CollapseWarning,
        match="class 7 was dropped: .* Training continues, and stops if the change lasts for 4 more evaluations and",
    ):
        own = trainer(monitor, stopping, max_epochs=30)
        own.fit(ClassSampler(lambda epoch: set(range(10)) - ({7} if epoch >= 12 else set())), batches(16, 32))
    assert stopping.alarms[0].epoch < 23
    # the run continues for four epochs after the alarm, since a class may return
    assert own.current_epoch == stopping.alarms[0].epoch + 5
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
        own.fit(ClassSampler(lambda epoch: set(range(10)) - ({7} if 12 <= epoch < 22 else set())), batches(16, 32))
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
    assert monitor.result.undetermined.any()
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


class Quick(GenerationBalanceMonitor):
    """Evaluates what is judged alone."""

    def update(self, view: Any) -> None:
        view.thorough = False
        super().update(view)


@pytest.mark.parametrize("options", [{}, {"space": "features"}, {"space": "pixels"}, {"classifier": "classify"}])
def test_evaluations_that_are_not_full_lack_distances_within_classes_alone(options: dict[str, Any]) -> None:
    class Broken(Classified):
        def sample(self, n: int) -> Tensor:
            images = super().sample(n)
            images[: n // 5] = torch.nan
            return images

    results = []
    for kind in (GenerationBalanceMonitor, Quick):
        seed_everything(0, verbose=False)
        monitor = kind(adapter=adapter(chunk_size=500), on_error="raise", **options)
        trainer(monitor, max_epochs=1).fit(Broken(), batches(16, 32))
        results.append(monitor.result)
    full, quick = results
    assert full.fid.isfinite().any()
    assert {"fid_mean", "fid_worst"} <= set(full.scalars())
    assert not any(name.startswith("fid") for name in quick.scalars())
    assert float(quick.invalid) == pytest.approx(1 / 5)
    torch.testing.assert_close(full._replace(fid=quick.fid), quick, rtol=0, atol=0, equal_nan=True)


def test_images_with_nan_are_counted_as_invalid() -> None:
    def script(images: Tensor, epoch: int) -> Tensor:
        images[:100] = torch.nan
        return images

    monitor = GenerationBalanceMonitor(adapter=adapter(chunk_size=500), on_error="raise")
    trainer(monitor, max_epochs=1).fit(ScriptedGenerator(script), batches(16, 32))
    assert float(monitor.result.generated_count.sum()) == 400
    assert float(monitor.result.invalid) == pytest.approx(100 / 500)


@pytest.mark.parametrize("dropped", [True, False])
def test_a_class_that_is_generated_too_often_is_seen_to_be_dropped_but_may_become_as_frequent_as_it_is(
    dropped: bool,
) -> None:
    class Favourite(ClassSampler):
        """Generates class 3 four times as often as real; from epoch 15 on never, or as often."""

        def sample(self, n: int) -> Tensor:
            images = super().sample(n)
            pool = self.pool[self.labels == 3]
            if self.current_epoch < 15:
                images[: n // 3] = pool[torch.randint(len(pool), (n // 3,))]
            return images

    monitor, stopping = GenerationBalanceMonitor(adapter=adapter(), on_error="raise"), CollapseStopping("warn")
    model = Favourite(lambda epoch: set(range(10)) - ({3} if dropped and epoch >= 15 else set()))
    with pytest.warns(CollapseWarning, match="class 3 was dropped") if dropped else nullcontext():
        trainer(monitor, stopping, max_epochs=26).fit(model, batches(16, 32))
    assert bool(stopping.alarms) is dropped


def test_shares_of_an_unbalanced_classifier_are_corrected() -> None:
    images, labels = digits(16)
    means = torch.stack([images[labels == c].flatten(1).mean(0) for c in range(10)])

    def doubtful_are_ones(module: Any, images: Tensor) -> Tensor:
        first, second = torch.cdist(images.flatten(1), means).topk(2, largest=False).values.unbind(1)
        return torch.where(second / first < 1.15, 1, torch.cdist(images.flatten(1), means).argmin(1))

    monitor = GenerationBalanceMonitor(doubtful_are_ones, adapter=adapter(), on_error="raise")
    trainer(monitor, max_epochs=1).fit(ClassSampler(), batches(16, 32))
    result = monitor.result
    assert float(result.assigned_share[1]) > 0.2
    assert float(result.generated_share[1]) < 0.16
    assert float(result.imbalance) < float((result.assigned_share - result.real_share).abs().sum() / 2)
    assert not result.dominating.any()


def test_a_class_that_no_image_is_assigned_to_has_no_share() -> None:
    """A share that is nearly 0 would be generated without any real image, and has no binomial bounds."""
    confusion = torch.tensor([[40.0, 4, 0], [5, 45, 0], [0, 0, 0]])
    metric = GenerationBalance(3, confusion=confusion)
    for real, classes in ((True, [0] * 45 + [1] * 50), (False, [1] * 100)):
        metric.update(torch.tensor(classes), real=real, features=torch.randn(len(classes), 2))
    result = metric.compute()
    assert float(result.generated_share[2]) == 0
    assert float(result.generated_share[0]) == 0
    assert result.interval.isfinite().all()
    assert result.divergence.isfinite()


def test_a_classifier_that_guesses_is_reported_once_and_nothing_is_judged(caplog: pytest.LogCaptureFixture) -> None:
    guess = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    nn.init.zeros_(guess[1].weight)
    monitor = GenerationBalanceMonitor(guess, adapter=adapter(), on_error="raise")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(monitor, max_epochs=3).fit(ClassSampler(), batches(16, 32))
    assert caplog.text.count("cannot tell the share of any class: the classifier is right for") == 1
    assert {o.series.role for o in monitor.observations(monitor.result)} == {"record"}


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
    found = []
    for run in runs:
        assert [str(alarm) for alarm in run.alarms()] == []
        alarms = run.alarms("dropped")
        found += alarms[:1]
        assert [alarm.names for alarm in alarms[:1]] in ([], [[f"class {run.victim}"]])
    assert len(found) == 10
    assert all(alarm.after < 0.5 * alarm.before and alarm.epoch <= run.start + 10 for alarm in found)


def test_large_images_are_classified_in_small_chunks() -> None:
    large = torch.rand(40, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert together(large) == 128
    assert together(torch.empty(1, 3, 1024, 1024)) == 4
    assert averaged_pixels(large).shape == (40, 3 * 16 * 16)
    assert averaged_pixels(large[:, :, :8]).shape == (40, 3 * 8 * 16)
    assert space_for(torch.rand(40, 1, 32, 32), torch.nn.Identity()) is None
    monitor = GenerationBalanceMonitor(
        adapter=ModelAdapter(reference=(large, torch.arange(40) % 2), num_samples=8), on_error="raise"
    )
    network = nn.Sequential(nn.Linear(4, 3 * 96 * 96), nn.Unflatten(1, (3, 96, 96)), nn.Sigmoid())
    model = Classified()
    model.sample = lambda n: network(torch.randn(n, 4))  # type: ignore[method-assign]
    trainer(monitor, max_epochs=1).fit(model, batches(16, 32))
    # labels are random
    assert monitor.result.undetermined.all()


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
    assert monitor.result.classes.tolist() == list(range(12))


NUMBERS = torch.tensor([0, 500, 9000, 1_000_000])


def test_classes_with_gaps_have_the_result_of_classes_without(generator: torch.Generator) -> None:
    some = {True: torch.randint(4, (200,), generator=generator), False: torch.randint(3, (150,), generator=generator)}
    confusion = 40 * torch.eye(4) + 2
    dense = GenerationBalance(4, confusion=confusion)
    gaps = GenerationBalance(4, classes=NUMBERS, confusion=confusion)
    for real, labels in some.items():
        features = torch.rand(len(labels), 2, generator=generator)
        dense.update(labels, real=real, features=features)
        gaps.update(NUMBERS[labels], real=real, features=features)
    found, expected = gaps.compute(), dense.compute()
    assert found.classes.tolist() == NUMBERS.tolist()
    torch.testing.assert_close(tuple(found)[:-1], tuple(expected)[:-1], rtol=0, atol=0, equal_nan=True)
    for c, number in enumerate(NUMBERS.tolist()):
        for name in ("class", "fid_class"):
            torch.testing.assert_close(
                found[f"{name}_{number}"], expected[f"{name}_{c}"], rtol=0, atol=0, equal_nan=True
            )
    assert [line.split(" | ")[0] for line in plots.table(found).splitlines()[2:]] == [
        f"| {c}" for c in NUMBERS.tolist()
    ]


@pytest.mark.parametrize(
    "classes", [torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 1, 3]), torch.arange(3), torch.arange(4.0)]
)
def test_classes_that_are_no_ascending_integers_are_refused(classes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"classes must be \(4,\) ascending integers, got .* To fix this, pass"):
        GenerationBalance(4, classes=classes)


def test_a_label_that_is_none_of_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be of 4 given classes, got 3 to 500\. To fix this, pass"):
        GenerationBalance(4, classes=NUMBERS).update(torch.tensor([500, 3]), real=True)


@pytest.mark.parametrize("largest", [9000, 1_000_000])
def test_classes_with_gaps_are_monitored_by_their_own_numbers(largest: int, tmp_path: Any) -> None:
    images, labels = digits(8)
    numbers, kept = torch.tensor([0, 500, largest]), labels < 3
    reference = images[kept], numbers[labels[kept]]
    monitor = GenerationBalanceMonitor(
        adapter=ModelAdapter(reference=reference, num_samples=32, num_reference=200), on_error="raise"
    )
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(monitor, max_epochs=1, logger=logger).fit(TinyGAN(), batches())
    assert monitor.result.classes.tolist() == numbers.tolist()
    assert float(monitor.result.accuracy) > 0.9
    names = [f"class {c}" for c in numbers.tolist()]
    assert [o.series.name for o in monitor.latest.observations] == [*names, "all classes"]
    assert {f"gendiag/generation_balance/class_{c}" for c in numbers.tolist()} <= set(
        events(logger.log_dir).Tags()["scalars"]
    )
    assert (
        monitor.page_setup().fields["classes"]
        == monitor.page_frame(monitor.result).fields["classes"]
        == numbers.tolist()
    )


def test_the_users_classifier_may_return_labels_with_gaps() -> None:
    images, labels = digits(8)
    monitor = GenerationBalanceMonitor(
        lambda module, some: NUMBERS[(some.mean((1, 2, 3)) > 0).long()],
        adapter=ModelAdapter(reference=(images[:90], NUMBERS[labels[:90] % 3]), num_samples=32), on_error="raise",
    )  # fmt: skip
    trainer(monitor, max_epochs=1).fit(TinyGAN(), batches())
    assert monitor.result.classes.tolist() == NUMBERS[:3].tolist()
    assert float(monitor.result.generated_count[:2].sum()) == 32


def test_a_hundred_classes_are_monitored() -> None:
    reference = digits(8)[0][:1000], torch.arange(1000) % 100
    monitor = GenerationBalanceMonitor(adapter=ModelAdapter(reference=reference, num_samples=32), on_error="raise")
    trainer(monitor, max_epochs=1).fit(TinyGAN(), batches())
    assert len(monitor.result.classes) == 100


def test_more_classes_than_can_be_monitored_are_refused_before_a_classifier_is_fitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_gendiag.diagnostics.generation_balance.monitor.KernelClassifier", None)
    reference = torch.rand(3003, 1, 8, 8), torch.arange(3003) % 1001
    monitor = GenerationBalanceMonitor(adapter=ModelAdapter(reference=reference, num_reference=3003, num_samples=16))
    with pytest.warns(
        DiagnosticWarning, match=r"labels must be of at most 1,000 classes, got 1,001\. To fix this, pass"
    ):
        trainer(monitor, max_epochs=1).fit(TinyGAN(), batches())
    assert not monitor.enabled
    with pytest.raises(ValueError, match=r"num_classes must be at most 1,000, got 1,001\. To fix this, pass"):
        GenerationBalanceMonitor(num_classes=1001)


def test_a_number_of_classes_that_leaves_labels_out_is_refused() -> None:
    monitor = GenerationBalanceMonitor(
        num_classes=9, adapter=ModelAdapter(reference=digits(8), num_samples=16), on_error="raise"
    )
    with pytest.raises(
        ValueError, match=r"num_classes must be more than the largest label, 9, got 9\. To fix this, pass"
    ):
        trainer(monitor, max_epochs=1).fit(TinyGAN(), batches())


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
