from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from example_models.data import digits
from lightning_gendiag import CosineMeanSimilarity, RegionMap, cosine_mean_similarity, find_regions
from lightning_gendiag.diagnostics.cosine_mean_similarity import functional as functional
from tests.helpers.cases import Case
from tests.helpers.images import blocks, regional_images


def gamma_of(x: Tensor) -> float:
    return 1 / float((torch.cdist(x, x) ** 2).quantile(0.5))


def definition(generated: Tensor, real: Tensor, inside: Tensor, gamma: float, unbiased: bool) -> float:
    """Returns the cosine from means of the kernel over all pairs, as in the paper."""
    x, y = generated[:, :, inside].flatten(1), real[:, :, inside].flatten(1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-gamma * (a[:, None] - b[None]).square().sum(-1))

    def norm(a: Tensor) -> Tensor:
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.trace()) / (n * (n - 1)) if unbiased else k.mean()

    return float(kernel(x, y).mean() / (norm(x) * norm(y)).sqrt())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidth", ["region", "image", 0.02])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_result_equals_the_definition(
    channels: int, bandwidth: str | float, unbiased: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # there are several blocks, of which the last is smaller
    monkeypatch.setattr(functional, "BLOCK", 7)
    labels = torch.randint(0, 3, (5, 6), generator=generator)
    real = torch.rand(23, channels, 5, 6, generator=generator, dtype=torch.float64)
    generated = torch.rand(17, channels, 5, 6, generator=generator, dtype=torch.float64) ** 1.3
    result = cosine_mean_similarity(generated, real, labels, bandwidth, unbiased)
    whole = gamma_of(real.flatten(1)) if isinstance(bandwidth, str) else bandwidth
    gammas = [gamma_of(real[:, :, labels == r].flatten(1)) if bandwidth == "region" else whole for r in range(3)]
    for r in range(3):
        expected = definition(generated, real, labels == r, gammas[r], unbiased)
        assert float(result.regions[r]) == pytest.approx(expected, abs=1e-12)
    # the kernel of the image is the product of the kernels of its regions
    scale = torch.tensor(gammas, dtype=torch.float64).sqrt()[labels]
    expected = definition(generated * scale, real * scale, torch.ones(5, 6, dtype=torch.bool), 1.0, unbiased)
    assert float(result.image) == pytest.approx(expected, abs=1e-12)
    assert float(result.product) == pytest.approx(float(result.regions.prod()))
    assert float(result.residual) == pytest.approx(math.log(result.image) - float(result.regions.log().sum()))


def test_float32_is_close_to_float64() -> None:
    images = digits(16)[0]
    one = cosine_mean_similarity(images[:300] * 0.9, images[300:700], blocks(16, 16))
    two = cosine_mean_similarity(images[:300].double() * 0.9, images[300:700].double(), blocks(16, 16))
    torch.testing.assert_close(one.regions.double(), two.regions, atol=1e-5, rtol=0)


def test_the_biased_cosine_of_a_set_with_itself_is_one() -> None:
    images = digits(8)[0][:50].double()
    result = cosine_mean_similarity(images, images, blocks(8, 8), unbiased=False)
    torch.testing.assert_close(result.regions, torch.ones(4, dtype=torch.float64))
    assert float(result.image) == pytest.approx(1)


def test_theorem_1_on_independent_regions_and_not_on_dependent_ones(generator: torch.Generator) -> None:
    labels = blocks(8, 8)
    independent = regional_images(labels, 4000)
    shifted = regional_images(labels, 4000, seed=1) + 0.7
    result = cosine_mean_similarity(shifted, independent, labels)
    # the sampling error of the logarithm is estimated from disjoint tenths
    parts = [
        cosine_mean_similarity(a, b, labels).residual
        for a, b in zip(shifted.chunk(10), independent.chunk(10), strict=True)
    ]
    error = float(torch.stack(parts).std()) / math.sqrt(10)
    assert abs(float(result.residual)) < 4 * error
    assert abs(float(result.residual)) < 0.05

    # one number shifts all regions together, so that they are fully dependent
    common = torch.randn(4000, 1, 1, 1, generator=generator)
    dependent = common + 0.3 * torch.randn(4000, 1, 8, 8, generator=generator)
    moved = (
        torch.randn(4000, 1, 1, 1, generator=generator) + 0.7 + 0.3 * torch.randn(4000, 1, 8, 8, generator=generator)
    )
    assert abs(float(cosine_mean_similarity(moved, dependent, labels).residual)) > 0.3


@pytest.mark.parametrize("sizes", [(400, 400), (200, 600)])
def test_z_scores_of_real_images_against_real_images_are_standard(sizes: tuple[int, int]) -> None:
    labels = torch.arange(4).view(2, 2)
    z = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        generated = torch.randn(sizes[0], 1, 2, 2, generator=generator).exp()
        real = torch.randn(sizes[1], 1, 2, 2, generator=generator).exp()
        z.append(cosine_mean_similarity(generated, real, labels, null_splits=64, seed=seed).z)
    z = torch.stack(z)
    assert abs(float(z.mean())) < 0.35
    assert 0.7 < float(z.std()) < 1.4


@pytest.mark.parametrize("fault", ["frozen", "blurred", "dark", "noise"])
@pytest.mark.parametrize("region", [0, 2])
def test_only_the_broken_region_has_a_low_z_score(fault: str, region: int, generator: torch.Generator) -> None:
    images = regional_images(blocks(), 1000)
    real, generated = images[:500], images[500:].clone()
    inside = blocks() == region
    broken = {
        "frozen": generated[:1].expand_as(generated),
        "blurred": generated.mean(0, keepdim=True).expand_as(generated),
        "dark": generated * 0.5,
        "noise": torch.randn(generated.shape, generator=generator),
    }[fault]
    generated = torch.where(inside, broken, generated)
    z = cosine_mean_similarity(generated, real, blocks(), null_splits=64).z
    assert float(z[region]) < -8
    others = torch.cat([z[:region], z[region + 1 :]])
    assert float(others.min()) > -4


class TestMetric:
    def filled(self, **options: object) -> tuple[CosineMeanSimilarity, Tensor, Tensor]:
        images = digits(8)[0]
        metric = CosineMeanSimilarity(blocks(8, 8), **options)
        real, generated = images[:100], images[100:180] * 0.8
        for batch in real.split(33):
            metric.update(batch, real=True)
        for batch in generated.split(7):
            metric.update(batch, real=False)
        return metric, generated, real

    @pytest.mark.parametrize("unbiased", [True, False])
    def test_batches_give_the_result_of_the_function(self, unbiased: bool) -> None:
        metric, generated, real = self.filled(unbiased=unbiased)
        expected = cosine_mean_similarity(generated, real, blocks(8, 8), unbiased=unbiased)
        torch.testing.assert_close(metric.compute().regions, expected.regions)
        torch.testing.assert_close(metric.compute().image, expected.image)

    def test_reset_keeps_the_real_images_only_on_request(self) -> None:
        metric, generated, _ = self.filled(reset_real_features=False)
        first = metric.compute()
        metric.reset()
        assert metric.compute().image.isnan()
        metric.update(generated, real=False)
        torch.testing.assert_close(metric.compute().regions, first.regions)
        metric, generated, _ = self.filled()
        metric.reset()
        metric.update(generated, real=False)
        assert metric.compute().image.isnan()

    def test_new_real_images_replace_the_prepared_ones(self) -> None:
        metric, generated, real = self.filled()
        metric.compute()
        metric.reset()
        metric.update(real.flip(-1), real=True)
        metric.update(generated, real=False)
        expected = cosine_mean_similarity(generated, real.flip(-1), blocks(8, 8))
        torch.testing.assert_close(metric.compute().regions, expected.regions)

    def test_each_class_is_compared_with_the_same_class(self) -> None:
        images, labels = digits(8)
        metric = CosineMeanSimilarity(blocks(8, 8), num_classes=12)
        metric.update(images[:900], real=True, labels=labels[:900])
        metric.update(images[900:] * 0.9, real=False, labels=labels[900:])
        result = metric.compute()
        assert result.classes.shape == (12, 5)
        # classes without images are nan
        assert result.classes[10:].isnan().all()
        # the bandwidth is that of the whole reference
        for label in (0, 7):
            gamma = [gamma_of(images[:900, :, blocks(8, 8) == r].flatten(1).double()) for r in range(4)]
            generated, real = images[900:][labels[900:] == label] * 0.9, images[:900][labels[:900] == label]
            expected = definition(generated.double(), real.double(), blocks(8, 8) == 1, gamma[1], True)
            assert float(result.classes[label, 1]) == pytest.approx(expected, abs=1e-5)

    def test_uint8_images_are_scaled_to_zero_to_one(self) -> None:
        images = ((digits(8)[0] + 1) * 127).byte()
        metric = CosineMeanSimilarity(blocks(8, 8))
        metric.update(images[:100], real=True)
        metric.update(images[100:200], real=False)
        expected = cosine_mean_similarity(images[100:200].float() / 255, images[:100].float() / 255, blocks(8, 8))
        torch.testing.assert_close(metric.compute().regions, expected.regions)

    def test_the_null_does_not_depend_on_the_order_of_the_images(self) -> None:
        images = digits(8)[0]
        results = []
        for order in (torch.arange(200), torch.arange(200).flip(0)):
            metric = CosineMeanSimilarity(blocks(8, 8))
            metric.update(images[:200][order], real=True)
            metric.update(images[200:300], real=False)
            results.append(metric.compute())
        torch.testing.assert_close(results[0].null_std, results[1].null_std, rtol=1e-5, atol=0)

    def test_degenerate_images_are_finite_or_flagged(self) -> None:
        regions = blocks(8, 8)
        constant = CosineMeanSimilarity(regions)
        constant.update(torch.ones(10, 1, 8, 8), real=True)
        constant.update(torch.ones(10, 1, 8, 8), real=False)
        assert float(constant.compute().image) == pytest.approx(1)
        single = CosineMeanSimilarity(regions)
        single.update(torch.rand(10, 1, 8, 8), real=True)
        single.update(torch.rand(1, 1, 8, 8), real=False)
        assert single.compute().image.isnan()
        # no two of these images are similar, so that an unbiased norm is zero up to rounding
        noise = CosineMeanSimilarity(regions)
        noise.update(torch.rand(50, 1, 8, 8), real=True)
        noise.update(100 * torch.randn(50, 1, 8, 8), real=False)
        assert float(noise.compute().regions.max()) < 1e-6
        assert not noise.compute().image.isnan()
        broken = CosineMeanSimilarity(regions)
        broken.update(torch.rand(10, 1, 8, 8), real=True)
        images = torch.rand(8, 1, 8, 8)
        images[:2] = math.nan
        broken.update(images, real=False)
        assert float(broken.compute().invalid) == 0.25
        assert broken.compute().image.isfinite()
        broken.reset()
        broken.update(torch.rand(10, 1, 8, 8), real=True)
        broken.update(images[:2], real=False)
        assert broken.compute().image.isnan()
        assert float(broken.compute().invalid) == 1.0

    def test_invalid_arguments_raise_errors_and_leave_the_state_unchanged(self) -> None:
        metric, _, real = self.filled()
        before = metric.compute()
        for bad, message in (
            (torch.zeros(2, 1, 9, 8), r"generated must be \(N, 1, 8, 8\)"),
            (torch.zeros(2, 3, 8, 8), r"generated must be \(N, 1, 8, 8\)"),
            (torch.zeros(2, 8, 8), "tensor, got shape"),
        ):
            with pytest.raises(ValueError, match=message):
                metric.update(bad, real=False)
        with pytest.raises(ValueError, match="real must be finite"):
            metric.update(real / 0, real=True)
        metric._computed = None
        torch.testing.assert_close(metric.compute(), before, equal_nan=True)
        with pytest.raises(ValueError, match="bandwidth must be"):
            CosineMeanSimilarity(blocks(), bandwidth="pixel")
        with pytest.raises(ValueError, match="labels must be"):
            CosineMeanSimilarity(blocks(8, 8), num_classes=3).update(real, real=True)
        with pytest.raises(ValueError, match="between 0 and 2"):
            CosineMeanSimilarity(blocks(8, 8), num_classes=3).update(real, True, torch.full((100,), 3))
        with pytest.raises(ValueError, match="generated must be finite"):
            cosine_mean_similarity(real / 0, real, blocks(8, 8))

    def test_one_region_keeps_its_shape(self) -> None:
        metric = CosineMeanSimilarity(RegionMap(torch.zeros(8, 8, dtype=torch.long)))
        metric.update(digits(8)[0][:50], real=True)
        metric.update(digits(8)[0][50:90], real=False)
        assert metric.compute().regions.shape == (1,)
        assert float(metric.compute().regions[0]) == pytest.approx(float(metric.compute().image))


def _updates() -> list[dict[str, object]]:
    images, labels = digits(8)
    real = [{"images": images[i : i + 20], "real": True, "labels": labels[i : i + 20]} for i in range(0, 120, 20)]
    generated = [
        {"images": images[i : i + 11] * 0.9, "real": False, "labels": labels[i : i + 11]} for i in range(200, 288, 11)
    ]
    return [update for pair in zip(real, generated, strict=False) for update in pair] + generated[6:]


CASE = Case(lambda: CosineMeanSimilarity(blocks(8, 8), num_classes=10), _updates())


def test_the_background_is_measured_on_the_scale_of_the_image(generator: torch.Generator) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2]).expand(6, 6)
    real, generated = torch.randn(2, 400, 1, 6, 6, generator=generator)
    # the background differs in one real image, and by a trace in all generated ones
    real[:, :, labels == 2] = 0
    real[0, :, labels == 2] = 0.1
    generated[:, :, labels == 2] = 0.01 * torch.randn(400, 1, 12, generator=generator)
    plain, known = (
        cosine_mean_similarity(generated, real, RegionMap(labels, background=background), null_splits=32)
        for background in (None, 2)
    )
    assert float(plain.regions[2]) < 0.9
    assert float(known.regions[2]) > 0.999
    assert float(known.z[2]) > -3
    torch.testing.assert_close(plain.regions[:2], known.regions[:2])
    torch.testing.assert_close(plain.z[:2], known.z[:2])
    generated[:, :, labels == 2] = 1.0
    changed = cosine_mean_similarity(generated, real, RegionMap(labels, background=2), null_splits=32)
    assert float(changed.regions[2]) < 0.9
    assert float(changed.z[2]) < -10


@pytest.mark.parametrize("corner", [(0, 0), (0, 16), (16, 0), (16, 16)])
def test_a_blurred_quarter_lowers_the_region_that_overlaps_it_most(corner: tuple[int, int]) -> None:
    images = digits(32)[0]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    real, generated = images[:800], images[800:1600]
    regions = find_regions(real, 5, progress=False)
    quarter = torch.zeros(32, 32, dtype=torch.bool)
    quarter[corner[0] : corner[0] + 16, corner[1] : corner[1] + 16] = True
    blurred = torch.where(quarter, F.avg_pool2d(generated, 9, 1, 4, count_include_pad=False), generated)
    before, after = (cosine_mean_similarity(x, real, regions).regions.log() for x in (generated, blurred))
    worst = int((before - after).argmax())
    assert float((before - after)[worst]) > 0.01
    assert regions.overlap(worst, quarter) == max(regions.overlap(r, quarter) for r in range(5))
