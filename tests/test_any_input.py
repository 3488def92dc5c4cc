"""Rows, series and volumes in place of images, spatial latents, and latents without a prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from lightning_gendiag import (
    CosineMeanSimilarityMonitor,
    DiagnosticWarning,
    GenerationBalanceMonitor,
    GenerativeDiagnostics,
    KStarMonitor,
    LatentRegionsMonitor,
    ManifoldEntropyMonitor,
    ModelAdapter,
    Monitor,
    PosteriorKL,
    PosteriorKLMonitor,
    cosine_mean_similarity,
    decoder_gram,
    k_star,
    latent_regions,
)
from lightning_gendiag.functional.arrays import as_data, middle_slices, pooled
from lightning_gendiag.functional.jacobian import active_dims
from lightning_gendiag.plots import pictures
from tests.helpers.running import attached, state_after_training, trainer

# an untrained decoder gives values of another range
pytestmark = pytest.mark.filterwarnings("ignore:generated images span")

SHAPES = {"rows": (6,), "series": (2, 9), "images": (1, 4, 4), "volumes": (1, 5, 4, 4)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())

LOG_VARIANCE = torch.tensor([-1.0, -0.5, -2.0])


def data(shape: tuple[int, ...], n: int = 64) -> tuple[Tensor, Tensor]:
    """Returns rows (n, ...) of four classes around places of their own, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    places = torch.randn(4, *shape, generator=generator)
    return places[labels] + 0.5 * torch.randn(n, *shape, generator=generator), labels


def loader(shape: tuple[int, ...], shift: float = 0.0) -> DataLoader[Any]:
    rows, labels = data(shape)
    return DataLoader(TensorDataset(rows + shift, labels), batch_size=16)


class Still(LightningModule):
    """A module that training does not change, so that what is measured has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class LinearVAE(Still):
    """Encodes and decodes data of any shape by matrices."""

    latent_dim = 3

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, generator = shape, torch.Generator().manual_seed(1)
        self.register_buffer("encoding", torch.randn(math.prod(shape), 3, generator=generator) / 3)
        self.register_buffer("decoding", torch.randn(3, math.prod(shape), generator=generator))

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = rows.flatten(1) @ self.encoding
        return mean, LOG_VARIANCE.expand_as(mean)

    def decode(self, z: Tensor) -> Tensor:
        return (z @ self.decoding).view(-1, *self.shape)


class Spatial(Still):
    """An encoder of images (1, H, W) whose posterior has a mean (C, H, W)."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images * torch.arange(1.0, self.channels + 1).view(-1, 1, 1)
        return mean, torch.full_like(mean, -1.0)


class Squares(Still):
    """An autoencoder of rows without a prior, whose decoder has the Jacobian 2 diag(z)."""

    latent_dim = 4

    def encode(self, rows: Tensor) -> Tensor:
        return rows + 3

    def decode(self, z: Tensor) -> Tensor:
        return z.square()


def run(module: LightningModule, callback: Any, shape: tuple[int, ...], epochs: int = 1, **options: Any) -> Any:
    own = trainer(callback, max_epochs=epochs, **options)
    own.fit(module, loader(shape))
    return {name.removeprefix("gendiag/"): float(value) for name, value in own.callback_metrics.items()}


# ---- what each monitor measures ----


@every_shape
def test_every_kind_of_data_is_measured_by_closed_forms(shape: tuple[int, ...]) -> None:
    module, (rows, labels) = LinearVAE(shape), data(shape)
    diagnostics = GenerativeDiagnostics(max_overhead=None, on_error="raise", reference=data(shape), skip=("cms",))
    scalars = run(module, diagnostics, shape, epochs=5)
    mean, log_variance = module.encode(rows)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean(0)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + module.decoding.norm(dim=1).log()
    for i in range(3):
        assert scalars[f"posterior_kl/dimension_{i}"] == pytest.approx(float(divergence[i]), rel=1e-5)
        assert scalars[f"manifold_entropy/dimension_{i}"] == pytest.approx(float(entropy[i]), rel=1e-5, abs=1e-5)
    assert scalars["k_star/mean"] == pytest.approx(float(k_star(mean, labels).values.mean()))
    spread = mean.var(0, correction=0).sum().sqrt()
    assert scalars["latent_regions/spread"] == pytest.approx(float(spread), rel=1e-4)
    assert ("latent_regions/fid_prior" in scalars) == (len(shape) > 2)


class Tokens(Still):
    """A VAE of tokens, whose encoder embeds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.embedding(tokens).mean(1).chunk(2, 1)
        return mean, log_variance


def test_tokens_that_are_named_as_the_data_have_a_posterior() -> None:
    tokens = torch.randint(8, (64, 5), generator=torch.Generator().manual_seed(0))
    own = DataLoader([{"tokens": row} for row in tokens], 16)  # type: ignore[arg-type]
    diagnostics = GenerativeDiagnostics(max_overhead=None)
    with pytest.warns(DiagnosticWarning, match="no images or other floating-point data; pass ModelAdapter"):
        trainer(diagnostics, max_epochs=1).fit(Tokens(), own)
    diagnostics = GenerativeDiagnostics(
        max_overhead=None,
        images=lambda batch: batch["tokens"],
        encode=lambda module, tokens: module.encode(tokens.long()),
    )
    trainer(diagnostics, max_epochs=1).fit(Tokens(), own)
    assert "posterior_kl" in diagnostics.attached


@every_shape
def test_what_needs_images_is_attached_to_images_and_volumes_alone(shape: tuple[int, ...]) -> None:
    diagnostics = GenerativeDiagnostics(max_overhead=None, num_regions=2)
    run(LinearVAE(shape), diagnostics, shape)
    assert {"k_star", "manifold_entropy", "posterior_kl", "latent_regions"} <= set(diagnostics.attached)
    for name in ("cms", "generation_balance"):
        assert (name in diagnostics.attached) == (len(shape) > 2 or name == "cms")
        reason = f"it needs images (N, C, H, W) or volumes (N, C, D, H, W), and the data are {(16, *shape)}"
        assert diagnostics.left_out.get(name, reason) == reason


@pytest.mark.parametrize(("kind", "shape"), [(GenerationBalanceMonitor, (6,)), (CosineMeanSimilarityMonitor, (1025,))])
def test_a_monitor_of_images_alone_is_switched_off_by_rows(kind: Any, shape: tuple[int, ...]) -> None:
    monitor = kind(adapter=ModelAdapter(sample=lambda module, n: torch.zeros(n, *shape)))
    with pytest.warns(DiagnosticWarning, match=r"the data must be images \(N, C, H, W\) or volumes .* got \(64, \d+\)"):
        run(LinearVAE(shape), monitor, shape, epochs=2)
    assert not monitor.enabled


def test_rows_are_compared_by_groups_of_features_as_images_of_one_row_of_pixels() -> None:
    real, other = data((6,))[0], torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    regions = torch.tensor([[0, 1, 1, 1, 0, 0]])
    adapter = ModelAdapter(sample=lambda module, n: other[:n], num_samples=64, chunk_size=64)
    scalars = run(Still(), CosineMeanSimilarityMonitor(regions, adapter=adapter, on_error="raise"), (6,))
    expected = cosine_mean_similarity(other[:, None, None], real[:, None, None], regions)
    assert scalars["cms/image"] == pytest.approx(float(expected.image), rel=1e-5)
    assert scalars["cms/worst"] == pytest.approx(float(expected.regions.min()), rel=1e-5)


def test_series_are_compared_by_groups_of_positions_as_images_of_one_row_of_pixels() -> None:
    shape = (2, 6)
    real, other = data(shape)[0], torch.randn(64, *shape, generator=torch.Generator().manual_seed(2))
    regions = torch.tensor([[0, 1, 1, 1, 0, 0]])
    adapter = ModelAdapter(sample=lambda module, n: other[:n], num_samples=64, chunk_size=64)
    scalars = run(Still(), CosineMeanSimilarityMonitor(regions, adapter=adapter, on_error="raise"), shape)
    expected = cosine_mean_similarity(other[:, :, None], real[:, :, None], regions)
    assert scalars["cms/image"] == pytest.approx(float(expected.image), rel=1e-5)
    assert scalars["cms/worst"] == pytest.approx(float(expected.regions.min()), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 30), (30, 2), (1, 2000)])
def test_what_samples_series_is_compared_and_checked_for_copies(shape: tuple[int, ...]) -> None:
    real = data(shape)[0]
    diagnostics = GenerativeDiagnostics(
        max_overhead=None, on_error="raise", sample=lambda module, n: real[torch.arange(n) % 8], num_samples=64
    )
    scalars = run(Still(), diagnostics, shape, epochs=5)
    assert {"cms", "memorization"} <= set(diagnostics.attached)
    assert scalars["memorization/copied"] == scalars["memorization/repeated"] == 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_messages_call_rows_and_series_data(shape: tuple[int, ...]) -> None:
    def sample(module: Any, n: int) -> Tensor:
        return 0.1 * data(shape)[0][:n]

    monitor = CosineMeanSimilarityMonitor(adapter=ModelAdapter(sample=sample, num_samples=64), on_error="raise")
    trainer(monitor, max_epochs=1).fit(LinearVAE(shape), loader(shape))
    word, other = ("data", "images") if len(shape) < 3 else ("images", "data")
    observed = monitor.observations(monitor.result)
    said = [text for o in observed for text in (o.message, o.series.event, o.series.quantity)]
    assert sum(f"real {word}" in text for text in said) == 6
    assert not any(f"real {other}" in text for text in said)


def test_positions_of_series_that_break_are_named_beside_the_series() -> None:
    real = data((2, 6))[0]
    stuck = ModelAdapter(sample=lambda module, n: real[:n] * torch.tensor([1.0, 1, 1, 0, 0, 0]), num_samples=64)
    monitor = CosineMeanSimilarityMonitor(num_regions=6, adapter=stuck, on_error="raise")
    run(Still(), monitor, (2, 6))
    series = {o.series.name: o for o in monitor.observations(monitor.metric.compute())}
    for position in (3, 4, 5):
        assert series[f"position {position}"].severity > series["position 0"].severity + 1
    assert series["image"].series.label == "the series"


def test_features_of_rows_that_depend_on_each_other_are_found_and_named() -> None:
    rows = torch.randn(128, 2, generator=torch.Generator().manual_seed(3))[:, [0, 1, 0, 0, 1, 1]]
    monitor = CosineMeanSimilarityMonitor(
        num_regions=2,
        adapter=ModelAdapter(sample=lambda module, n: rows[:n], reference=rows, num_samples=128),
        on_error="raise",
    )
    run(Still(), monitor, (6,))
    assert monitor.region_map is not None
    assert set(monitor.region_map.names) == {"features 0, 2, 3", "features 1, 4, 5"}


def test_a_feature_of_rows_that_does_not_vary_is_named_beside_the_row() -> None:
    rows = torch.randn(128, 2, generator=torch.Generator().manual_seed(3))
    stuck = ModelAdapter(sample=lambda module, n: rows[:n] * torch.tensor([1.0, 0.0]), reference=rows, num_samples=128)
    monitor = CosineMeanSimilarityMonitor(num_regions=2, adapter=stuck, on_error="raise")
    run(Still(), monitor, (2,))
    series = {o.series.name: o for o in monitor.observations(monitor.metric.compute())}
    assert series["feature 1"].severity > series["feature 0"].severity + 1
    assert series["image"].series.label == "the row"


def test_of_volumes_the_middle_slices_are_compared() -> None:
    shape = (1, 5, 4, 4)
    real, other = data(shape)[0], torch.randn(64, *shape, generator=torch.Generator().manual_seed(2))
    regions = torch.arange(4).view(1, 4).expand(4, 4) // 2
    adapter = ModelAdapter(sample=lambda module, n: other[:n], num_samples=64, chunk_size=64)
    scalars = run(Still(), CosineMeanSimilarityMonitor(regions, adapter=adapter, on_error="raise"), shape)
    expected = cosine_mean_similarity(other[:, :, 2], real[:, :, 2], regions)
    assert scalars["cms/image"] == pytest.approx(float(expected.image), rel=1e-5)
    assert scalars["cms/worst"] == pytest.approx(float(expected.regions.min()), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_of_videos_the_middle_frames_are_compared(channels: int, caplog: pytest.LogCaptureFixture) -> None:
    shape = (7, channels, 4, 4)
    real, other = data(shape)[0], torch.randn(64, *shape, generator=torch.Generator().manual_seed(2))
    regions = torch.arange(4).view(1, 4).expand(4, 4) // 2
    adapter = ModelAdapter(sample=lambda module, n: other[:n], num_samples=64, chunk_size=64)
    with caplog.at_level("INFO"):
        scalars = run(Still(), CosineMeanSimilarityMonitor(regions, adapter=adapter, on_error="raise"), shape)
    expected = cosine_mean_similarity(other[:, 3], real[:, 3], regions)
    assert scalars["cms/image"] == pytest.approx(float(expected.image), rel=1e-5)
    assert scalars["cms/worst"] == pytest.approx(float(expected.regions.min()), rel=1e-5)
    assert "Videos: the middle frame is the image of a video" in caplog.text
    assert "Volumes" not in caplog.text


def test_images_of_one_position_are_one_region() -> None:
    diagnostics = GenerativeDiagnostics(
        max_overhead=None, on_error="raise", sample=lambda module, n: torch.randn(n, 5, 1, 1)
    )
    scalars = run(Still(), diagnostics, (5, 1, 1))
    assert "cms" in diagnostics.attached
    assert scalars["cms/region_0"] == scalars["cms/worst"] == scalars["cms/best"]


@pytest.mark.parametrize("shape", [(6,), (1, 5, 4, 4)], ids=["rows", "volumes"])
def test_training_does_not_notice(shape: tuple[int, ...]) -> None:
    class Trained(LinearVAE):
        def __init__(self) -> None:
            super().__init__(shape)
            self.layer = nn.Linear(8, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(torch.randn(8, 8)).square().mean()

    def taken(batch: Any) -> Tensor:
        pixels = batch[0].flatten(1).repeat(1, 2)
        return pixels[:, : math.prod(shape)].view(-1, *shape)

    monitor = GenerativeDiagnostics(images=taken, max_overhead=None, on_error="raise", num_regions=2)
    observed = state_after_training(monitor, module=Trained)
    torch.testing.assert_close(observed, state_after_training(module=Trained), rtol=0, atol=0)
    assert "posterior_kl" in monitor.attached


# ---- the reference ----


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.long, torch.uint8])
def test_numbers_that_are_no_images_keep_their_values(kind: torch.dtype) -> None:
    rows = torch.tensor([[0, 255], [3, 7]]).to(kind)
    expected = torch.float64 if kind is torch.float64 else torch.float32
    torch.testing.assert_close(as_data(rows), torch.tensor([[0, 255], [3, 7]], dtype=expected))


def test_only_images_of_bytes_are_scaled() -> None:
    assert as_data(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).unique().tolist() == [1.0]
    with pytest.raises(
        ValueError, match=r"data must be an \(N, ...\) tensor of real numbers .* got torch.float32 of shape"
    ):
        as_data(torch.zeros(3))


def test_integers_that_the_user_names_are_data() -> None:
    counts = torch.arange(128).view(64, 2)
    module = Still()
    module.encode = lambda rows: (rows, -torch.ones_like(rows))  # type: ignore[assignment]
    monitor = PosteriorKLMonitor(adapter=ModelAdapter(images=lambda batch: batch["counts"]), on_error="raise")
    trainer(monitor, max_epochs=1).fit(module, DataLoader([{"counts": row} for row in counts], batch_size=16))
    assert monitor.result is not None
    expected = 0.5 * (counts.double().square() + math.exp(-1)).mean(0)
    torch.testing.assert_close(monitor.result.per_dimension, expected)


@every_shape
def test_other_data_of_a_second_fit_take_the_place_of_the_first(shape: tuple[int, ...]) -> None:
    own, monitor = trainer(max_epochs=1), PosteriorKLMonitor(on_error="raise")
    own.callbacks.append(monitor)
    module = LinearVAE(shape)
    for shift, epochs in ((0.0, 2), (5.0, 3)):
        own.fit_loop.max_epochs = epochs
        own.fit(module, loader(shape, shift))
        assert monitor.result is not None
        mean = module.encode(data(shape)[0] + shift)[0].double().mean(0)
        torch.testing.assert_close(monitor.result.aggregate_mean, mean, rtol=1e-4, atol=1e-4)
    assert monitor.evaluations == 1


# ---- spatial latents ----


def test_the_divergence_of_long_spatial_latents_is_summed_over_positions() -> None:
    images = data((1, 16, 16))[0]
    monitor = PosteriorKLMonitor(on_error="raise")
    scalars = run(Spatial(), monitor, (1, 16, 16))
    mean, log_variance = Spatial().encode(images)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum((2, 3)).mean(0)
    assert [scalars[f"posterior_kl/channel_{c}"] for c in range(3)] == pytest.approx(expected.tolist(), rel=1e-5)
    assert scalars["posterior_kl/total"] == pytest.approx(float(expected.sum()), rel=1e-5)
    assert monitor.latest is not None
    names = [observation.series.name for observation in monitor.latest.observations]
    assert names[:3] == ["channel 0", "channel 1", "channel 2"]


def test_short_spatial_latents_are_measured_dimension_by_dimension() -> None:
    monitor = PosteriorKLMonitor(on_error="raise")
    scalars = run(Spatial(16), monitor, (1, 4, 4))
    assert monitor.latest is not None
    assert [o.series.name for o in monitor.latest.observations][:256] == [f"dimension {i}" for i in range(256)]
    assert "posterior_kl/channel_0" not in scalars


def test_channels_must_divide_the_latents() -> None:
    with pytest.raises(ValueError, match="channels must divide latent_dim 8, got 3"):
        PosteriorKL(8, channels=3)


@pytest.mark.parametrize(("size", "is_pooled"), [(26, False), (27, True)])
def test_k_star_compares_means_over_the_positions_of_long_latents(size: int, is_pooled: bool) -> None:
    images, labels = data((1, size, size))
    features = Spatial().encode(images)[0]
    rows = features.mean((2, 3)) if is_pooled else features.flatten(1)
    for features_of in ("encode", lambda module, some: module.encode(some)[0]):
        scalars = run(Spatial(), KStarMonitor(features_of, on_error="raise"), (1, size, size))  # type: ignore[arg-type]
        assert scalars["k_star/mean"] == pytest.approx(float(k_star(rows, labels).values.mean()))


def test_pooled_latents_of_any_rank() -> None:
    assert pooled(torch.ones(2, 3, 4, 5), most=59).shape == (2, 3)
    assert pooled(torch.ones(2, 3, 4, 5), most=60).shape == (2, 60)
    assert pooled(torch.ones(2, 100), most=60).shape == (2, 100)


@pytest.mark.parametrize("n", [50, 400])
def test_long_latents_have_the_regions_of_their_principal_components(n: int) -> None:
    """Latents in a plane of 100 dimensions have the mixture of their coordinates in the plane."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(100, 2, generator=generator, dtype=torch.float64))[0]
    places = torch.randn(n, 2, generator=generator, dtype=torch.float64) + 8 * (torch.arange(n) % 3 > 0)[:, None]
    result, expected = (latent_regions(z, components=2) for z in (places @ plane.T + 1, places))
    torch.testing.assert_close(result.weights, expected.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.latents_of(result.means), expected.means @ plane.T + 1, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.spread, expected.spread)
    torch.testing.assert_close(result.axes.T @ result.axes, torch.eye(result.axes.shape[1], dtype=torch.float64))
    points = result.sample("cluster", 20, generator)
    assert result.inside("cluster", points).all()
    # what is added to variances lies outside of the plane
    away = points - 1
    assert float((away - away @ plane @ plane.T).norm() / away.norm()) < 0.05
    assert float(result.sample("prior", 500, generator).std()) == pytest.approx(1, abs=0.02)


def test_latents_of_equal_images_are_one_region_however_long_they_are() -> None:
    result = latent_regions(torch.ones(20, 100))
    assert result.collapsed
    assert len(result.weights) == 1


@every_shape
def test_more_data_than_are_always_encoded_are_timed_first(shape: tuple[int, ...]) -> None:
    rows, labels = data(shape, 192)
    own = trainer(KStarMonitor(), PosteriorKLMonitor(), max_epochs=1)
    own.fit(LinearVAE(shape), DataLoader(TensorDataset(rows, labels), batch_size=64))
    assert float(own.callback_metrics["gendiag/posterior_kl/total"]) > 0
    assert 0 < float(own.callback_metrics["gendiag/k_star/mean"]) <= 1


# ---- latents without a prior ----


def test_latents_without_a_prior_are_those_of_real_images() -> None:
    rows = data((4,))[0]
    view = attached(Squares(), ModelAdapter(reference=rows), ("decode",))
    assert not view.has_prior
    drawn = torch.cat(list(view.prior_latents(64)))
    order = [int((drawn_row - rows - 3).abs().sum(1).argmin()) for drawn_row in drawn]
    assert sorted(order) == list(range(64))
    assert order != list(range(64))
    torch.testing.assert_close(drawn, rows[order] + 3)
    torch.testing.assert_close(torch.cat(list(view.prior_latents(80)))[64:], drawn[:16])


def test_a_vae_has_a_prior() -> None:
    view = attached(LinearVAE((6,)), ModelAdapter(reference=data((6,))), ("decode",))
    assert view.has_prior
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(next(view.prior_latents(2)), expected)


def test_manifold_entropy_is_measured_at_latents_of_real_rows() -> None:
    monitor = ManifoldEntropyMonitor(64, on_error="raise")
    scalars = run(Squares(), monitor, (4,))
    assert monitor.needs_reference
    expected = 0.5 * math.log(2 * math.pi * math.e) + (2 * (data((4,))[0] + 3)).abs().log().mean(0)
    assert [scalars[f"manifold_entropy/dimension_{i}"] for i in range(4)] == pytest.approx(expected.tolist(), rel=1e-5)


def test_points_of_a_prior_are_not_decoded_where_there_is_none() -> None:
    class Images(Squares):
        latent_dim = 16

        def decode(self, z: Tensor) -> Tensor:
            return z.square().view(-1, 1, 4, 4)

        def encode(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    scalars = run(Images(), LatentRegionsMonitor(2, num_points=60, on_error="raise"), (1, 4, 4))
    assert "latent_regions/fid_cluster" in scalars
    assert "latent_regions/fid_prior" not in scalars


# ---- pictures, and derivatives ----


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(28, 28, (224, 224)), (1, 4096, (232, 928)), (1, 100, (232, 928)), (4096, 1, (232, 14)), (300, 600, (232, 464))],
)
def test_pictures_of_any_shape_have_bounded_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    labels = torch.arange(height * width).view(height, width)
    assert pictures.enlarged_labels(labels).shape == expected
    assert pictures.enlarged(torch.zeros(height, width, 3, dtype=torch.uint8)).shape == (*expected, 3)


def test_the_middle_slice_is_one_of_images_and_of_volumes() -> None:
    assert middle_slices(torch.zeros(2, 1, 4, 4)).shape == (2, 1, 4, 4)
    assert middle_slices(torch.arange(4.0).view(1, 1, 4, 1, 1)).item() == 2
    # scans of four channels and few slices are no videos
    assert middle_slices(torch.zeros(2, 4, 3, 8, 8)).shape == (2, 4, 8, 8)


class Cube(torch.autograd.Function):
    """An operation in the old style, which ``torch.func`` does not transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_operations_that_cannot_be_transformed_have_derivatives_too(guard: Callable[[], Any]) -> None:
    with guard():
        z = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.0, 3.0]])
        grams = decoder_gram(Cube.apply, z, data_scale=torch.tensor([1.0, 2.0, 1.0]))
        expected = torch.diag_embed((3 * z.double() ** 2 * torch.tensor([1.0, 2.0, 1.0])) ** 2)
        torch.testing.assert_close(grams, expected)
        assert active_dims(Cube.apply, z, 2).tolist() == [1, 2]


def test_such_operations_may_have_many_outputs() -> None:
    gram = decoder_gram(lambda z: Cube.apply(z).repeat(1, 2049), torch.tensor([[1.0, -2.0]]))
    torch.testing.assert_close(gram, 2049 * torch.diag(torch.tensor([3.0, 12.0]).double() ** 2)[None])


def test_each_monitor_says_what_it_needs() -> None:
    needs = {
        kind.name: kind.needs_images for kind in Monitor.__subclasses__() if kind.__module__.startswith("lightning")
    }
    expected = {"cms", "generation_balance", "memorization", "regional_primitives"}
    assert {name for name, images in needs.items() if images} == expected
