from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_gendiag import KStar, k_star
from lightning_gendiag.diagnostics.k_star import functional as functional
from tests.helpers.cases import Case


def by_sorting(latents: Tensor, labels: Tensor, cosine: bool = False) -> list[float]:
    """Follows the definition: sorts each sample's neighbours, other classes first among ties, and finds the first other.

    The only sample of a class has none.
    """
    values = []
    for p in range(len(latents)):
        a, b = latents[p].double(), latents.double()
        if cosine:
            a, b = (torch.nn.functional.normalize(v, dim=-1) for v in (a, b))
        distances = (a - b).square().sum(1).tolist()
        own = labels == labels[p]
        order = sorted(range(len(latents)), key=lambda q: (q != p, distances[q], bool(own[q])))
        place = next((i for i, q in enumerate(order) if not own[q]), math.nan)
        values.append(place / int(own.sum()) if own.sum() > 1 else math.nan)
    return values


def data(n: int, d: int, classes: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator, dtype=dtype) * 2
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=dtype), labels


def same(latents: Tensor, labels: Tensor, **options: object) -> None:
    result = k_star(latents, labels, **options)  # type: ignore[arg-type]
    expected = by_sorting(latents, labels, options.get("distance") == "cosine")
    assert result.values.tolist() == pytest.approx(expected, abs=0, rel=0, nan_ok=True)
    for k, label in enumerate(result.classes.tolist()):
        own = [value for value, other in zip(expected, labels.tolist(), strict=True) if other == label]
        assert float(result.mean[k]) == pytest.approx(sum(own) / len(own), abs=1e-12, nan_ok=True)
        if len(set(own)) > 1:
            assert float(result.skewness[k]) == pytest.approx(float(stats.skew(own)), abs=1e-12)
            expected_std = float(torch.tensor(own, dtype=torch.float64).std(correction=0))
            assert float(result.std[k]) == pytest.approx(expected_std, abs=1e-12)
    expected = [value for value in expected if not math.isnan(value)]
    if len(set(expected)) > 1:
        assert float(result.true_skewness) == pytest.approx(float(stats.skew(expected)), abs=1e-12)


class TestAgainstSorting:
    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("seed", range(4))
    def test_random_data(self, seed: int, dtype: torch.dtype, distance: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # there are several blocks, of which the last is smaller
        monkeypatch.setattr(functional, "CELLS", 120 * 7)
        latents, labels = data(120, 5, 4, seed, dtype)
        if distance == "cosine" and dtype == torch.float32:
            # normalization rounds the latents, so the rounded ones are compared
            latents = torch.nn.functional.normalize(latents.double(), dim=1).float()
            result = k_star(latents, labels)
            assert result.values.tolist() == by_sorting(latents, labels)
            return
        same(latents, labels, distance=distance)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_ties_on_a_lattice(self, dtype: torch.dtype) -> None:
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            latents = torch.randint(0, 4, (90, 3), generator=generator).to(dtype)
            same(latents, torch.randint(0, 3, (90,), generator=generator))

    def test_ties_far_from_the_origin_where_products_lose_their_digits(self) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randint(0, 4, (80, 2), generator=generator).float() + 20000
        latents[:3] -= 40000
        same(latents, torch.randint(0, 3, (80,), generator=generator))

    def test_duplicates_within_and_between_classes(self) -> None:
        latents, labels = data(40, 3, 3, 0)
        same(latents.repeat(2, 1), labels.repeat(2))
        same(latents.repeat(2, 1), torch.cat([labels, (labels + 1) % 3]))
        same(torch.zeros(20, 3, dtype=torch.float64), torch.arange(20) % 3)

    def test_two_points(self) -> None:
        same(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))

    def test_classes_of_one_sample_and_labels_with_gaps(self) -> None:
        latents, _ = data(12, 2, 2, 0)
        labels = torch.tensor([7, 7, 7, 7, 7, -3, 40, 40, 40, 40, 40, 40])
        same(latents, labels)
        assert k_star(latents, labels).classes.tolist() == [-3, 7, 40]


class TestClosedForms:
    def test_distant_clusters_have_only_ones(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 3
        result = k_star(torch.randn(60, 4, generator=generator) + 1000 * labels[:, None], labels)
        assert (result.values == 1).all()
        assert result.skewness.tolist() == [-math.inf] * 3
        assert result.pattern == ["clustered"] * 3
        assert result.approximate_skewness.isnan()
        assert result.true_skewness == -math.inf
        assert result.nearest_rival.tolist() == [1, 0, 1] or result.nearest_rival.tolist() == [1, 2, 1]

    def test_two_classes_that_alternate_on_a_line(self) -> None:
        # each point has a neighbour of the other class at distance one and none of its own nearer
        result = k_star(torch.arange(20.0)[:, None], torch.arange(20) % 2)
        assert torch.equal(result.values, torch.full((20,), 0.1, dtype=torch.float64))
        assert result.pattern == ["undefined", "undefined"]

    def test_a_line_of_pairs(self) -> None:
        # the labels are 0 0 1 1 0 0 ...: each point has its twin at distance one, and the other class at one or two
        labels = torch.arange(24) // 2 % 2
        values = k_star(torch.arange(24.0)[:, None], labels).values * 12
        assert values[0] == 2
        assert (values[1:-1] == 1).all()
        assert values[-1] == 2


class TestPatterns:
    def test_a_class_in_pieces_is_fractured(self) -> None:
        generator = torch.Generator().manual_seed(0)
        spots = torch.randn(40, 2, generator=generator) * 10
        labels = torch.cat([torch.zeros(300), torch.arange(300) % 6 + 1]).long()
        place = torch.randint(0, 40, (600,), generator=generator)
        latents = spots[place] + 0.5 * torch.randn(600, 2, generator=generator)
        # one large piece of class 0 lies apart from all others
        latents[:60] += 100
        result = k_star(latents, labels)
        assert result.pattern[0] == "fractured"

    def test_two_classes_that_mix_overlap(self) -> None:
        # one half of each class lies in a common place, and the other half in a separate place
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(800) % 2
        place = torch.where(torch.arange(800)[:, None] < 400, 0.0, torch.where(labels[:, None] == 0, -50.0, 50.0))
        latents = torch.randn(800, 2, generator=generator) + place
        far = torch.randn(400, 2, generator=generator) + 1000
        result = k_star(torch.cat([latents, far]), torch.cat([labels, torch.full((400,), 2)]))
        assert result.pattern[:2] == ["overlapped", "overlapped"]
        assert result.nearest_rival[:2].tolist() == [1, 0]

    def test_a_tight_class_is_clustered(self) -> None:
        generator = torch.Generator().manual_seed(0)
        tight = 0.01 * torch.randn(200, 2, generator=generator)
        others = torch.randn(400, 2, generator=generator) * 3
        labels = torch.cat([torch.zeros(200), torch.arange(400) % 2 + 1]).long()
        result = k_star(torch.cat([tight, others[others.norm(dim=1).argsort()]]), labels)
        assert result.pattern[0] == "clustered"


class TestDegenerate:
    def test_one_class_only_is_flagged(self) -> None:
        result = k_star(torch.randn(10, 2), torch.zeros(10, dtype=torch.long))
        assert result.values.isnan().all()
        assert result.pattern == ["undefined"]
        assert result.nearest_rival.tolist() == [-1]
        assert result.scalars()["true_skewness"].isnan()

    def test_a_class_of_one_sample_has_no_value(self) -> None:
        latents, labels = data(41, 3, 3, 0)
        labels[-1] = 9
        result, others = k_star(latents, labels), k_star(latents[:-1], labels[:-1])
        assert result.values[-1].isnan()
        assert result.mean[-1].isnan()
        assert result.pattern[-1] == "undefined"
        assert result.single.tolist() == [False, False, False, True]
        assert "class_9" not in result.scalars()
        # it is a rival of the others all the same
        assert result.rivals[:3, 3].sum() > 0
        assert result.nearest_rival[-1] >= 0
        assert {name for name in result.scalars() if name.startswith("class_")} == {"class_0", "class_1", "class_2"}
        assert float(result.scalars()["mean"]) <= float(others.scalars()["mean"])
        assert result.worst in (0, 1, 2)
        alone = k_star(latents[:3], torch.arange(3))
        assert alone.worst == -1
        assert alone.scalars()["worst_class_mean"].isnan()

    def test_latents_with_nan_are_left_out_and_flagged(self) -> None:
        latents, labels = data(40, 3, 3, 0)
        broken = latents.clone()
        broken[[4, 20]] = math.nan
        keep = torch.tensor([i for i in range(40) if i not in (4, 20)])
        result = k_star(broken, labels)
        assert torch.equal(result.values[keep], k_star(latents[keep], labels[keep]).values)
        assert result.values[[4, 20]].isnan().all()
        assert float(result.invalid) == pytest.approx(0.05)
        everything = k_star(latents * math.nan, labels)
        assert float(everything.invalid) == 1
        assert everything.scalars()["mean"].isnan()

    def test_an_empty_input_gives_an_empty_result(self) -> None:
        assert k_star(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).values.shape == (0,)

    def test_invalid_arguments_raise_errors(self) -> None:
        with pytest.raises(ValueError, match=r"latents must be \(N, D\) of floats, got .* To fix this, flatten"):
            k_star(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"labels must be \(2,\) integers"):
            k_star(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match="distance must be"):
            KStar("taxi")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_rows must be at least 2"):
            KStar(max_rows=1)
        metric = KStar()
        metric.update(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"latents must be \(N, 3\) as before"):
            metric.update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))


class TestMetric:
    def test_the_metric_equals_the_function(self) -> None:
        latents, labels = data(200, 4, 5, 0)
        metric = KStar()
        for part in torch.arange(200).split(33):
            metric.update(latents[part], labels[part])
        expected, found = k_star(latents, labels), metric.compute()
        assert sorted(found.values.tolist()) == sorted(expected.values.tolist())
        torch.testing.assert_close(found.skewness, expected.skewness)
        assert torch.equal(found.rivals, expected.rivals)

    @pytest.mark.parametrize("split", [1, 7, 50, 300])
    def test_the_selected_rows_do_not_depend_on_the_batches(self, split: int) -> None:
        latents, labels = data(300, 4, 5, 0, torch.float32)
        whole = KStar(max_rows=60)
        whole.update(latents, labels)
        metric = KStar(max_rows=60)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(split))
        for part in order.split(split):
            metric.update(latents[part], labels[part])
        assert sum(len(rows) for rows in metric.latents) <= 120 + split
        torch.testing.assert_close(metric.compute(), whole.compute(), rtol=0, atol=0)
        assert len(metric.compute().values) == 60

    def test_the_selected_rows_are_a_fair_sample(self) -> None:
        labels = torch.arange(4000) % 4
        latents = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) + labels[:, None] * 3
        selected = KStar(max_rows=800, seed=3)
        selected.update(latents, labels)
        counts = selected.compute().labels.bincount()
        # 200 of each expected; four standard deviations
        assert (counts - 200).abs().max() < 4 * math.sqrt(200 * 0.75)
        other = KStar(max_rows=800, seed=4)
        other.update(latents, labels)
        assert not torch.equal(other.compute().values, selected.compute().values)


def _updates() -> list[dict[str, Tensor]]:
    latents, labels = data(160, 4, 3, 0, torch.float32)
    return [{"latents": latents[p], "labels": labels[p]} for p in torch.arange(160).split(17)]


CASE = Case(lambda: KStar(max_rows=100), _updates())
