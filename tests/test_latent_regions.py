from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from example_models.data import digits
from example_models.vae import VAE
from lightning_gendiag import (
    CollapseStopping,
    CollapseWarning,
    LatentRegions,
    LatentRegionsMonitor,
    ModelAdapter,
    latent_regions,
)
from lightning_gendiag.diagnostics.latent_regions.functional import KINDS
from tests.helpers.cases import Case
from tests.helpers.logs import events
from tests.helpers.models import ScriptedGenerator
from tests.helpers.running import batches, state_after_training, trainer

CENTRES = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 7.0]])


def blobs(n: int = 900, seed: int = 0, centres: Tensor = CENTRES, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(centres)
    return centres[labels] + scale * torch.randn(n, centres.shape[1], generator=generator), labels


def updates(count: int = 10) -> list[dict[str, Any]]:
    latents, labels = blobs(600)
    return [{"latents": latents[i::count], "labels": labels[i::count]} for i in range(count)]


CASE = Case(make=lambda: LatentRegions(3), updates=updates())


# ---- the mixture ----


def test_the_density_equals_that_of_scipy() -> None:
    z, labels = blobs()
    regions = latent_regions(z, labels, components=3)
    density = sum(
        float(w) * multivariate_normal(m.numpy(), c.numpy()).pdf(z.numpy())
        for w, m, c in zip(regions.weights, regions.means, regions.covariances, strict=True)
    )
    torch.testing.assert_close(regions.log_density(z).exp(), torch.as_tensor(density))
    torch.testing.assert_close(regions.responsibilities(z).sum(1), torch.ones(len(z)).double())


def test_the_density_far_from_zero_is_as_exact_as_near_it() -> None:
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    regions = latent_regions(z, components=2)
    far = regions._replace(means=regions.means + 1e6)
    # the shift itself rounds to 1e-10
    torch.testing.assert_close(far.log_density(z + 1e6), regions.log_density(z), atol=1e-8, rtol=0)


def test_known_components_and_their_number_are_recovered() -> None:
    z, labels = blobs(1500)
    regions = latent_regions(z, labels)
    assert len(regions.weights) == 3
    order = torch.cdist(CENTRES.double(), regions.means).argmin(1)
    torch.testing.assert_close(regions.means[order], CENTRES.double(), rtol=0, atol=0.15)
    torch.testing.assert_close(regions.covariances, torch.eye(2).double().expand(3, 2, 2), rtol=0, atol=0.2)
    torch.testing.assert_close(regions.class_entropy, torch.zeros(3).double(), rtol=0, atol=0.05)
    assert float(regions.overlap) < 0.01
    assert not regions.collapsed


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_margins_lie_on_the_true_saddle(shift: float) -> None:
    """The saddle of unequal components is found by an independent minimization of the density along the segment."""
    generator = torch.Generator().manual_seed(0)
    z = torch.cat(
        [
            torch.randn(800, 3, generator=generator) * 0.7 - shift / 2,
            torch.randn(300, 3, generator=generator) + shift / 2,
        ]
    )
    regions = latent_regions(z, components=2)
    assert regions.margins.tolist() == [[0, 1]]
    parts = [multivariate_normal(m.numpy(), c.numpy()) for m, c in zip(regions.means, regions.covariances, strict=True)]
    start, stop = regions.means.numpy()

    def density(t: float) -> float:
        point = start + t * (stop - start)
        return math.log(sum(float(w) * part.pdf(point) for w, part in zip(regions.weights, parts, strict=True)))

    saddle = minimize_scalar(density, bounds=(0.1, 0.9), method="bounded", options={"xatol": 1e-9})
    torch.testing.assert_close(
        regions.saddles[0], torch.from_numpy(start + saddle.x * (stop - start)), rtol=0, atol=1e-5
    )
    peaks = [
        minimize_scalar(lambda t: -density(t), bounds=bounds, method="bounded")
        for bounds in ((0, saddle.x), (saddle.x, 1))
    ]
    depth = min(-peak.fun for peak in peaks) - saddle.fun
    assert float(regions.depths[0]) == pytest.approx(depth, abs=0.01)
    # the width ends where the density has risen by half the depth
    place, length = saddle.x, float((regions.means[1] - regions.means[0]).norm())
    half = [t / 1000 for t in range(1001) if density(t / 1000) < saddle.fun + depth / 2 and abs(t / 1000 - place) < 0.4]
    assert float(regions.widths[0]) == pytest.approx((half[-1] - half[0]) * length, abs=0.05 * length)


def test_the_saddle_of_equal_components_is_half_way() -> None:
    z, _ = blobs(4000, centres=torch.tensor([[-3.0, 0.0], [3.0, 0.0]]))
    regions = latent_regions(z, components=2)
    torch.testing.assert_close(regions.saddles[0], torch.zeros(2).double(), rtol=0, atol=0.15)


def test_components_with_a_third_between_them_have_no_margin() -> None:
    z, _ = blobs(900, centres=torch.tensor([[-8.0, 0.0], [0.0, 0.0], [8.0, 0.0]]))
    regions = latent_regions(z, components=3)
    middle = int(regions.means.norm(dim=1).argmin())
    assert len(regions.margins) == 2
    assert (regions.margins == middle).any(1).all()


# ---- the kinds of points ----


def test_each_kind_of_points_has_the_expected_density() -> None:
    # three components are separate, and two overlap
    centres = torch.cat([CENTRES, torch.tensor([[0.0, -6.0], [1.6, -6.0]])])
    z, labels = blobs(2000, centres=centres)
    regions = latent_regions(z, labels, components=5)
    generator = torch.Generator().manual_seed(0)
    points = {kind: regions.sample(kind, 400, generator) for kind in KINDS}
    assert all(p.shape == (400, 2) for p in points.values())
    density = {kind: regions.log_density(p) for kind, p in points.items()}
    assert density["cluster"].median() > density["margin"].median() + 1
    assert (regions.responsibilities(points["cluster"]).amax(1) >= 0.9).all()
    assert (regions.responsibilities(points["grey"]).amax(1) <= 0.6).all()
    assert (density["grey"] >= regions.typical).all()
    assert ((points["grey"] - torch.tensor([0.8, -6.0])).norm(dim=1) < 2.5).all()
    assert density["margin"].median() < regions.typical
    for kind in KINDS:
        assert regions.inside(kind, points[kind]).all()
    assert float(points["prior"].std()) == pytest.approx(1, abs=0.1)
    # the classes in the grey area are the two that overlap
    assert set((regions.grey_classes > 0.05).nonzero()[:, 0].tolist()) == {3, 4}
    own = regions.sample("cluster", 50, generator, component=2)
    assert (regions.responsibilities(own).argmax(1) == 2).all()
    again = regions.sample("margin", 400, torch.Generator().manual_seed(5))
    torch.testing.assert_close(again, regions.sample("margin", 400, torch.Generator().manual_seed(5)), rtol=0, atol=0)


def test_clusters_hold_nine_tenths_of_the_latents() -> None:
    z, _ = blobs(3000)
    regions = latent_regions(z, components=3)
    share = float(regions.inside("cluster", z).double().mean())
    assert share == pytest.approx(0.9, abs=0.03)


def test_an_empty_region_has_no_points() -> None:
    regions = latent_regions(torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), components=1)
    assert len(regions.margins) == 0
    assert regions.sample("margin", 10).shape == (0, 2)
    assert regions.sample("grey", 10).shape == (0, 2)
    assert regions.sample("cluster", 10).shape == (10, 2)


# ---- degenerate latents ----


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(50, 3),
        torch.ones(50, 3) * 1e6,
        torch.full((20, 2), torch.nan),
        torch.randn(3, 2),
        torch.randn(1, 4),
        torch.zeros(0, 2),
        torch.randn(30, 40),
        torch.cat([torch.zeros(50, 2), torch.ones(50, 2)]),
        torch.cat([torch.randn(100, 1), torch.zeros(100, 1)], 1),
        torch.randn(200, 1),
    ],
    ids=["identical", "far", "nan", "three", "one", "none", "wide", "two points", "a dead dimension", "one dimension"],
)
@pytest.mark.parametrize("components", [None, 8])
def test_degenerate_latents_are_finite_or_flagged(latents: Tensor, components: int | None) -> None:
    regions = latent_regions(latents, torch.zeros(len(latents), dtype=torch.long), components=components)
    assert all(value.ndim == 0 for value in regions.scalars().values())
    for kind in KINDS:
        assert regions.sample(kind, 20).isfinite().all()
    if len(regions.weights):
        assert regions.means.isfinite().all()
        assert regions.covariances.isfinite().all()
        assert regions.typical.isfinite()


def test_collapse_and_nan_are_flagged() -> None:
    assert latent_regions(torch.zeros(50, 3)).collapsed
    assert len(latent_regions(torch.zeros(50, 3), components=9).weights) == 1
    z, _ = blobs(100)
    z[:25] = torch.nan
    assert float(latent_regions(z).invalid) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: latent_regions(torch.zeros(3)), r"latents must be \(N, D\) of floats"),
        (lambda: latent_regions(torch.zeros(3, 2), torch.zeros(3)), r"labels must be \(3,\) integers"),
        (lambda: latent_regions(torch.randn(9, 2)).sample("edge", 3), "kind must be one of prior, cluster"),  # type: ignore[arg-type]
        (lambda: LatentRegions(0), "components must be at least 1, got 0"),
        (lambda: LatentRegions(max_rows=1), "max_rows must be at least 2"),
        (lambda: LatentRegionsMonitor(num_points=5), "num_points must be at least 10"),
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_the_rows_are_bounded_and_do_not_depend_on_their_order() -> None:
    z, labels = blobs(3000)
    one, two = LatentRegions(3, max_rows=300), LatentRegions(3, max_rows=300)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    for part in order.split(200):
        one.update(z[part], labels[part])
    two.update(z, labels)
    assert sum(map(len, one.latents)) <= 600
    torch.testing.assert_close(one.compute(), two.compute(), equal_nan=True)


# ---- the monitor ----


class Ring(ScriptedGenerator):
    """Encodes each class of digits to its own place on a ring, and decodes to a digit near a place and to noise elsewhere."""

    latent_dim = 2

    def __init__(self, still: bool = False) -> None:
        super().__init__()
        images, labels = digits(16)
        self.key = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
        angle = torch.arange(10) * 2 * torch.pi / 10
        self.places = 6 * torch.stack([angle.cos(), angle.sin()], 1)
        self.examples = torch.stack([images[labels == c][0] for c in range(10)])
        self.still = still

    def encode(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.current_epoch)
        labels = torch.tensor([self.key[image.numpy().tobytes()] for image in images])
        noise = 0.5 * torch.randn(len(images), 2, generator=generator)
        return (self.places[labels] + noise) * (0 if self.still and self.current_epoch >= 8 else 1)

    def decode(self, z: Tensor) -> Tensor:
        distance, nearest = torch.cdist(z, self.places).min(1)
        bad = (distance > 1.5).float()[:, None, None, None]
        return self.examples[nearest] * (1 - bad) + bad * torch.sin(40 * z[:, :1, None, None] + torch.arange(16.0))


def adapter() -> ModelAdapter:
    return ModelAdapter(reference=digits(16), num_reference=800)


def test_margins_that_decode_badly_have_a_larger_distance() -> None:
    monitor = LatentRegionsMonitor(components=10, adapter=adapter(), num_points=200, on_error="raise")
    trainer(monitor, max_epochs=1).fit(Ring(), batches(16, 32))
    scalars = monitor.result.scalars()
    assert float(scalars["fid_margin"]) > 1.5 * float(scalars["fid_cluster"])
    assert float(scalars["inception_score_cluster"]) > 7
    assert float(monitor.result.decoded_entropy.max()) == 0
    # each component decodes to the class that it holds, except for one example that may be misclassified
    assert (monitor.result.decoded_share.argmax(1) == monitor.result.class_share.argmax(1)).sum() >= 9


def test_latents_that_collapse_stop_the_run() -> None:
    monitor, stopping = LatentRegionsMonitor(adapter=adapter(), num_points=50, on_error="raise"), CollapseStopping()
    with pytest.warns(CollapseWarning, match="all images have the same latents"):
        own = trainer(monitor, stopping, max_epochs=20)
        own.fit(Ring(still=True), batches(16, 32))
    assert own.current_epoch == 9


@pytest.mark.parametrize("classifier", [None, nn.Sequential(nn.Flatten(), nn.Linear(256, 10))])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_monitor_runs_with_and_without_labels_and_classifiers(classifier: Any, labelled: bool) -> None:
    reference = digits(16) if labelled else digits(16)[0]
    monitor = LatentRegionsMonitor(
        classifier=classifier,
        adapter=ModelAdapter(reference=reference, num_reference=400),
        num_points=50,
        on_error="raise",
    )
    trainer(monitor, max_epochs=2).fit(Ring(), batches(16, 32))
    known = labelled or classifier is not None
    assert bool(monitor.result.inception[0].isnan()) is not known
    assert monitor.result.fid[0].isfinite()


def test_labels_that_are_indices_are_no_classes() -> None:
    images = digits(16)[0]
    adapter_of_indices = ModelAdapter(reference=(images, 1000 * torch.arange(len(images))), num_reference=400)
    monitor = LatentRegionsMonitor(adapter=adapter_of_indices, num_points=50, on_error="raise")
    trainer(monitor, max_epochs=1).fit(Ring(), batches(16, 32))
    assert len(monitor.result.classes) == 0
    assert monitor.result.inception[0].isnan()


def test_the_number_of_components_is_restored_from_a_checkpoint() -> None:
    monitor = LatentRegionsMonitor(adapter=adapter(), num_points=50, on_error="raise")
    trainer(monitor, max_epochs=2).fit(Ring(), batches(16, 32))
    again = LatentRegionsMonitor()
    again.set_extra_state(monitor.get_extra_state())
    assert again.get_extra_state()["components"] == len(monitor.result.weights)


def test_scalars_and_panels_are_logged(tmp_path: Any) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    monitor = LatentRegionsMonitor(adapter=adapter(), num_points=100, on_error="raise")
    trainer(monitor, max_epochs=2, logger=logger).fit(Ring(), batches(16, 32))
    seen = events(logger.log_dir)
    wanted = {f"gendiag/latent_regions/{name}" for name in ("fid_margin", "overlap", "gap_margin", "components")}
    assert wanted <= set(seen.Tags()["scalars"])
    assert "gendiag/latent_regions/panel" in seen.Tags()["images"]


def test_training_is_bit_identical_with_and_without_the_monitor() -> None:
    def run(*callbacks: Any) -> Any:
        return state_after_training(*callbacks, module=lambda: VAE(3, width=2), size=32)

    monitor = LatentRegionsMonitor(adapter=ModelAdapter(num_samples=64), num_points=50, on_error="raise")
    torch.testing.assert_close(run(monitor), run(), rtol=0, atol=0)
    assert monitor.result is not None


def test_latents_of_many_dimensions_are_sampled_without_a_matrix_for_each_point() -> None:
    z = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    z[:200] += 3
    regions = latent_regions(z, components=2)
    points = regions.sample("cluster", 100, torch.Generator().manual_seed(0))
    assert points.shape == (100, 256)
    own = regions.responsibilities(points).argmax(1)
    means = regions.latents_of(regions.means)
    for k in range(2):
        torch.testing.assert_close(points[own == k].mean(0), means[k], rtol=0, atol=0.8)


def test_points_of_one_component_belong_to_it_even_inside_a_broad_one() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.cat([4 * torch.randn(800, 2, generator=generator), 0.2 * torch.randn(400, 2, generator=generator) + 1])
    regions = latent_regions(z, components=2)
    for k in range(2):
        points = regions.sample("cluster", 300, generator, component=k)
        assert (regions.responsibilities(points).argmax(1) == k).all()


def test_a_decoder_of_vectors_raises_an_error_before_training() -> None:
    class Vectors(Ring):
        def decode(self, z: Tensor) -> Tensor:
            return z

    with pytest.raises(ValueError, match=r"decode must be known, but self.decode fails .* got \(2, 2\)"):
        trainer(LatentRegionsMonitor(adapter=adapter()), max_epochs=1).fit(Vectors(), batches(16, 32))
