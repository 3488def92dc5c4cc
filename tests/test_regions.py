from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.cluster import hierarchy
from torch import Tensor

from example_models.data import digits, scenes
from lightning_gendiag import RegionMap, find_regions, pixel_cka
from lightning_gendiag.functional.distances import adjusted_rand_index
from lightning_gendiag.regions.balanced import _edges, _tree
from lightning_gendiag.regions.pixel_cka import (
    SERIES,
    _alignments_with,
    _differ_little,
    _kernel_rows,
    _mirror,
    _series_cka,
)
from tests.helpers.images import blocks, regional_images


def slow_cka(images: Tensor, i: int, j: int, gamma: float, batch_size: int) -> float:
    """Computes the formula literally for one pair of pixels."""
    n, c, _, _ = images.shape
    flat = images.view(n, c, -1)
    values = []
    for start in range(0, n - batch_size + 1, batch_size):
        kernels = []
        for pixel in (i, j):
            x = flat[start : start + batch_size, :, pixel]
            kernel = torch.empty(batch_size, batch_size, dtype=x.dtype)
            for a in range(batch_size):
                for b in range(batch_size):
                    kernel[a, b] = math.exp(-gamma * float((x[a] - x[b]).square().sum()))
            centring = torch.eye(batch_size, dtype=x.dtype) - 1 / batch_size
            kernels.append(centring @ kernel @ centring)
        k, m = kernels
        values.append(float((k * m).sum() / (k.norm() * m.norm())))
    return sum(values) / len(values)


def paper_gamma(images: Tensor) -> float:
    flat = images.flatten(1)
    return 1 / float((flat[:, None] - flat[None]).square().sum(-1).quantile(0.5))


@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_cka_equals_the_formula(channels: int, generator: torch.Generator) -> None:
    images = torch.randn(25, channels, 3, 4, generator=generator, dtype=torch.float64).cumsum(-1)
    cka = pixel_cka(images, batch_size=10)
    gamma = paper_gamma(images)
    for i, j in [(0, 0), (0, 1), (3, 11), (7, 2), (5, 5)]:
        assert float(cka[i, j]) == pytest.approx(slow_cka(images[:20], i, j, gamma, 10), abs=1e-10)


def test_pixel_cka_in_float32_agrees_on_faint_kernels() -> None:
    # with the paper's bandwidth, a pixel's kernel is almost constant, which is the worst case for float32
    images = digits(32)[0][:100]
    cka = pixel_cka(images)
    gamma = paper_gamma(images.double())
    for i, j in [(16 * 32 + 16, 17 * 32 + 15), (10 * 32 + 9, 20 * 32 + 22)]:
        assert float(cka[i, j]) == pytest.approx(slow_cka(images.double(), i, j, gamma, 100), abs=1e-4)


def test_pixel_cka_does_not_depend_on_the_memory_limit(generator: torch.Generator) -> None:
    images = torch.randn(20, 1, 6, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pixel_cka(images, max_bytes=20_000), pixel_cka(images))


def test_pixel_cka_is_symmetric_bounded_and_independent_of_order(generator: torch.Generator) -> None:
    images = torch.randn(30, 2, 4, 4, generator=generator, dtype=torch.float64)
    cka = pixel_cka(images, batch_size=30)
    assert torch.equal(cka, cka.T)
    assert float(cka.min()) >= 0
    assert float(cka.max()) <= 1 + 1e-12
    torch.testing.assert_close(cka.diagonal(), torch.ones(16, dtype=torch.float64))
    order = torch.randperm(30, generator=generator)
    torch.testing.assert_close(pixel_cka(images[order], batch_size=30), cka)


def test_pixel_cka_of_a_constant_pixel_is_zero(generator: torch.Generator) -> None:
    images = torch.randn(20, 1, 2, 2, generator=generator)
    images[:, :, 0, 0] = 5
    cka = pixel_cka(images)
    assert (cka[0] == 0).all()
    assert cka.isfinite().all()


def test_constant_images_are_flagged() -> None:
    with pytest.warns(UserWarning, match="all images are equal"):
        regions = find_regions(torch.ones(20, 1, 4, 4), 2)
    assert regions.num_regions == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_independent_regions_are_recovered_exactly(channels: int) -> None:
    truth = blocks()
    found = find_regions(regional_images(truth, 1000, channels=channels), num_regions=4)
    assert adjusted_rand_index(found.labels, truth) == 1.0
    assert found.stability == 1.0
    assert found.dependence < 0.05
    assert float(found.alignment.diagonal().min()) > 0.5
    # the largest region is the first
    assert found.sizes.tolist() == sorted(found.sizes.tolist(), reverse=True)


def test_the_series_for_grey_pixels_approximates_the_kernel(generator: torch.Generator) -> None:
    images = digits(16)[0][:50].double() + 0.1 * torch.randn(50, 1, 16, 16, generator=generator)
    images[:, :, 0, :2] = 0.3
    pixels = images.flatten(2)
    # the pixels are as far from their means as the series permits
    gamma = 0.99 * SERIES / (2 * float((pixels - pixels.mean(0)).square().max()))
    assert _differ_little([pixels], gamma)
    assert not _differ_little([pixels], 1.02 * gamma)
    assert not _differ_little([pixels.expand(-1, 3, -1)], gamma)
    # the smaller the exponents, the more products of features are left out
    for smaller in (1, 10, 100, 1000):
        expected = pixel_cka(images, gamma / smaller, batch_size=50)
        found = _mirror(_series_cka(pixels, gamma / smaller, 1 << 30, torch.zeros_like(expected)))
        assert float((found - expected).abs().max()) < 1e-4
        assert found[0].count_nonzero() == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_series_gives_the_products_with_mean_kernels(channels: int, generator: torch.Generator) -> None:
    pixels = torch.randn(20, channels, 30, generator=generator, dtype=torch.float64)
    pixels[..., 0] = 0.3
    gamma = 0.99 * SERIES / (2 * float((pixels - pixels.mean(0)).square().max()))
    rows = _kernel_rows(pixels, gamma)
    means = rows.view(3, 10, -1).mean(1)
    found = _alignments_with(pixels, gamma, means)
    assert float((found - rows @ means.T).abs().max()) < 1e-4
    assert found[0].count_nonzero() == 0


def test_neighbours_are_merged_by_what_the_sum_of_squares_within_clusters_grows(generator: torch.Generator) -> None:
    height, width = 4, 5
    vectors = torch.randn(height * width, 6, generator=generator, dtype=torch.float64)
    edges = _edges(torch.ones(height, width, dtype=torch.bool).numpy())

    def within(some: list[int]) -> float:
        return float((vectors[some] - vectors[some].mean(0)).square().sum())

    # the definition: all pairs of neighbouring clusters are compared anew before each merge
    clusters = {i: [i] for i in range(height * width)}
    expected = []
    while len(clusters) > 1:
        where = {position: node for node, some in clusters.items() for position in some}
        pairs = {tuple(sorted((where[a], where[b]))) for a, b in edges.tolist() if where[a] != where[b]}
        costs = {
            (a, b): within(clusters[a] + clusters[b]) - within(clusters[a]) - within(clusters[b]) for a, b in pairs
        }
        a, b = min(costs, key=lambda pair: costs[pair])
        clusters[height * width + len(expected)] = clusters.pop(a) + clusters.pop(b)
        expected.append((a, b, costs[a, b]))
    found = _tree((vectors @ vectors.T).numpy(), edges)
    assert [sorted(merge[:2]) for merge in found] == [list(merge[:2]) for merge in expected]
    assert [merge[2] for merge in found] == pytest.approx([merge[2] for merge in expected])


def test_a_matrix_of_many_rows_is_mirrored(generator: torch.Generator) -> None:
    upper = torch.randn(1100, 1100, generator=generator)
    assert torch.equal(_mirror(upper.clone()), upper.triu() + upper.triu(1).T)


def test_the_data_choose_the_number_of_regions() -> None:
    truth = blocks()
    assert adjusted_rand_index(find_regions(regional_images(truth, 400), num_regions=None).labels, truth) == 1.0


def test_large_images_are_clustered_in_cells() -> None:
    truth = blocks(24, 24)
    found = find_regions(regional_images(truth, 400), num_regions=4, max_pixels=200)
    assert found.labels.shape == (24, 24)
    assert adjusted_rand_index(found.labels, truth) > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_cells_at_borders_join_the_right_region(channels: int) -> None:
    # borders at 11, 13 and 17 cut through cells of 4 pixels
    truth = torch.zeros(32, 32, dtype=torch.long)
    truth[:13, 11:], truth[13:, :17], truth[13:, 17:] = 1, 2, 3
    images = regional_images(truth, 400, channels=channels)
    found = find_regions(images, num_regions=4, max_pixels=64)
    in_cells = truth[2::4, 2::4].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert adjusted_rand_index(in_cells, truth) < 0.9
    assert adjusted_rand_index(found.labels, truth) > 0.99


def test_a_map_is_the_same_for_the_same_images() -> None:
    images = digits(16)[0][:300]
    assert find_regions(images, 5) == find_regions(images.clone(), 5)


def test_a_single_small_batch_has_a_stability() -> None:
    found = find_regions(regional_images(blocks(), 40), num_regions=4)
    assert not math.isnan(found.stability)


def test_tied_distances_give_the_requested_number_of_regions() -> None:
    images = torch.randn(50, 1, 1, 1).expand(-1, 1, 4, 4)
    assert find_regions(images.contiguous(), num_regions=3).num_regions == 3


def test_a_map_round_trips(tmp_path: Path) -> None:
    found = find_regions(regional_images(blocks(), 100), 4)
    found.save(tmp_path / "map.pt")
    loaded = RegionMap.of(str(tmp_path / "map.pt"))
    assert loaded == found
    assert hash(loaded) == hash(found)
    assert loaded.stability == found.stability
    assert torch.equal(loaded.alignment, found.alignment)
    assert loaded != RegionMap(found.labels, names=tuple("abcd"))


def test_regions_are_named_by_their_position() -> None:
    labels = torch.zeros(12, 12, dtype=torch.long)
    labels[2:10, 2:10] = 1
    labels[3:5, 3:5] = 2
    labels[8:10, 8:10] = 3
    regions = RegionMap(labels)
    assert regions.names == ("border", "centre", "top left", "bottom right")
    assert regions.sizes.tolist() == [80, 56, 4, 4]
    assert regions.boxes.tolist()[2] == [3, 3, 5, 5]
    assert regions.overlap(2, regions.mask(2)) == 1.0
    half = regions.mask(2).clone()
    half[3, 3:5] = False
    assert regions.overlap(2, half) == 0.5
    assert "top left" in str(regions)


def test_equal_names_are_numbered() -> None:
    labels = torch.tensor([[0, 1, 2, 2, 2, 2, 2, 3, 3, 3]])
    assert RegionMap(labels).names == ("left", "left (2)", "centre", "right")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4), "labels must be an"),
        (torch.zeros(4, 4), "labels must be an"),
        (torch.tensor([[0, 2]]), "every number 0..R-1"),
    ],
)
def test_invalid_labels_raise_errors(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionMap(labels)


def test_invalid_arguments_raise_errors() -> None:
    images = torch.rand(10, 1, 4, 4)
    with pytest.raises(ValueError, match="at least 2"):
        find_regions(images[:1])
    with pytest.raises(ValueError, match="finite"):
        find_regions(images / 0)
    with pytest.raises(ValueError, match="num_regions must be between 1 and"):
        find_regions(images, 17)
    with pytest.raises(ValueError, match="names must hold one name for each"):
        RegionMap(torch.zeros(2, 2, dtype=torch.long), names=("a", "b"))


@pytest.mark.parametrize("names", [("face", "face"), ("image", "border"), ("face", "samples")])
def test_names_that_two_series_would_share_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="names must be unique and none of 'image' and 'samples'"):
        RegionMap(torch.tensor([[0, 1]]), names=names)


def has_one_part(mask: Tensor) -> bool:
    return int(ndimage.label(mask.numpy())[1]) == 1


def in_a_margin(images: Tensor, margin: int) -> Tensor:
    return F.pad(images, (margin,) * 4, value=-1.0)


@pytest.mark.parametrize("num_regions", [2, 5, 9])
@pytest.mark.parametrize("kind", ["digits", "scenes", "noise", "constant"])
@pytest.mark.filterwarnings("ignore:all images are equal")
def test_regions_are_connected_and_none_is_a_speck(kind: str, num_regions: int) -> None:
    images = {
        "digits": lambda: digits(16)[0][:200],
        "scenes": lambda: scenes(200, 4, 16)[0],
        "noise": lambda: torch.randn(40, 3, 16, 12, generator=torch.Generator().manual_seed(0)),
        "constant": lambda: torch.zeros(10, 1, 16, 16),
    }[kind]()
    found = find_regions(images, num_regions)
    assert found.num_regions == num_regions
    judged = [r for r in range(num_regions) if r != found.background]
    assert all(has_one_part(found.mask(r)) for r in judged)
    varying = sum(int(found.sizes[r]) for r in judged)
    assert min(int(found.sizes[r]) for r in judged) >= varying / (4 * len(judged)) - 1
    assert len(set(found.names)) == num_regions


@pytest.mark.parametrize("margin", [1, 4])
def test_a_constant_border_is_the_background(margin: int) -> None:
    truth = blocks()
    found = find_regions(in_a_margin(regional_images(truth, 400), margin), num_regions=5)
    assert found.background == 4
    assert found.names[4] == "background"
    assert torch.equal(found.mask(4), in_a_margin(torch.ones(12, 12), margin) < 0)
    inside = found.labels[margin:-margin, margin:-margin]
    assert adjusted_rand_index(inside, truth) == 1.0
    assert RegionMap.from_state_dict(found.state_dict()).background == 4


def test_single_pixels_that_never_vary_are_no_background() -> None:
    images = regional_images(blocks(), 400)
    images[:, :, 0, 0] = images[:, :, 5, 5] = 0
    found = find_regions(images, num_regions=4)
    assert found.background is None
    assert adjusted_rand_index(found.labels, blocks()) == 1.0


def test_parts_that_the_background_separates_are_regions() -> None:
    truth = torch.zeros(12, 12, dtype=torch.long)
    truth[5:7], truth[7:] = 2, 1
    images = regional_images(truth, 400)
    images[:, :, truth == 2] = 0
    found = find_regions(images, num_regions=3)
    assert found.background == 2
    assert torch.equal(found.labels, truth)


def test_fewer_varying_pixels_than_regions_leave_no_background() -> None:
    images = torch.zeros(40, 1, 6, 6)
    images[:, :, 2, 2:4] = torch.randn(40, 1, 2, generator=torch.Generator().manual_seed(0))
    assert find_regions(images, 4).background is None
    assert find_regions(images, 4).num_regions == 4
    few = find_regions(images, 3)
    assert few.sizes.tolist() == [1, 1, 34]
    assert find_regions(images, 1).names == ("centre",)
    assert find_regions(torch.randn(40, 1, 1, 1), 1).labels.tolist() == [[0]]
    assert find_regions(torch.randn(40, 1, 1, 9), 9).num_regions == 9


def test_a_map_of_transposed_images_is_transposed() -> None:
    images = digits(16)[0][:300, :, 1:]
    found, other = find_regions(images, 5), find_regions(images.mT.contiguous(), 5)
    assert adjusted_rand_index(found.labels, other.labels.T) == 1.0


def test_a_block_that_depends_on_nothing_else_is_a_region_of_its_own() -> None:
    images = digits(16)[0][:400].clone()
    truth = torch.zeros(16, 16, dtype=torch.bool)
    truth[3:9, 9:15] = True
    shared = torch.randn(400, 1, 1, generator=torch.Generator().manual_seed(0))
    images[:, 0] = torch.where(truth, shared, images[:, 0])
    found = find_regions(images, 5)
    assert max(found.overlap(r, truth) for r in range(5)) > 0.95


def scattered(count: int = 24, groups: int = 3) -> tuple[Tensor, Tensor]:
    """Returns rows (N, 1, 1, count) whose features depend on each other in groups of equal size, and the groups (count,)."""
    group = torch.arange(count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))] % groups
    common = torch.randn(400, groups, generator=torch.Generator().manual_seed(1))[:, group]
    noise = torch.randn(400, count, generator=torch.Generator().manual_seed(2))
    return (common + 0.3 * noise)[:, None, None], group


@pytest.mark.parametrize("num_regions", [3, None])
def test_features_in_any_order_are_grouped_by_what_they_depend_on(num_regions: int | None) -> None:
    rows, group = scattered()
    found = find_regions(rows, num_regions, connected=False).labels.flatten()
    assert adjusted_rand_index(found, group) == 1


def test_features_that_never_vary_are_the_background_wherever_they_are() -> None:
    rows, group = scattered()
    rows[..., 1::4] = 2
    region_map = find_regions(rows, 4, connected=False)
    assert region_map.background == 3
    assert torch.equal(region_map.labels.flatten() == 3, torch.arange(24) % 4 == 1)
    varies = region_map.labels.flatten() != 3
    assert adjusted_rand_index(region_map.labels.flatten()[varies], group[varies]) == 1


def test_groups_are_the_same_in_another_order() -> None:
    rows, _ = scattered()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    one, other = (find_regions(x, 5, connected=False).labels.flatten() for x in (rows, rows[..., order]))
    assert adjusted_rand_index(one[order], other) == 1


def test_the_clustering_of_the_paper_has_a_name() -> None:
    images = digits(16)[0][:300]
    # the authors' steps: Euclidean distances of rows, average linkage, maxclust
    tree = hierarchy.linkage(pixel_cka(images).double().numpy(), "average")
    expected = torch.from_numpy(hierarchy.fcluster(tree, 5, "maxclust")).long()
    found = find_regions(images, 5, method="paper")
    assert adjusted_rand_index(found.labels.flatten(), expected) == 1.0
    assert found.background is None
    assert find_regions(images, 5, method="paper", linkage="ward") != found
    with pytest.raises(ValueError, match="method must be 'balanced' or 'paper', got 'other'"):
        find_regions(images, 5, method="other")


def test_a_background_must_be_a_region() -> None:
    with pytest.raises(ValueError, match="background must be the number of a region, 0 to 1, or None, got 2"):
        RegionMap(torch.tensor([[0, 1]]), background=2)
