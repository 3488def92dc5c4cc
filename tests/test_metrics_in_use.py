"""Metrics as users of Lightning and torchmetrics use them: in ``log_dict``, called like functions, and in collections."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from lightning_gendiag import CosineMeanSimilarity, Diagnostic, KStar, LatentRegions, RegionMap, find_regions
from tests.helpers.cases import ARGUMENTS, Case, all_cases
from tests.helpers.metrics import close, filled
from tests.helpers.running import trainer

CASES = all_cases()
QUARTERS = (torch.arange(8)[:, None] // 4) * 2 + torch.arange(8)[None] // 4
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

SHAPES = {
    ("manifold_entropy", "latent_dim"), ("posterior_kl", "latent_dim"), ("regional_primitives", "num_regions"),
    ("training_data", "shape"), ("generation_balance", "classes"),
}  # fmt: skip
"""Arguments that change the shape or the labels of the updates, so that no collection holds two metrics that differ in them."""
CHANGED = sorted({(name, argument) for name, given in ARGUMENTS.items() for argument in given.changes} - SHAPES)


class UsesMetric(LightningModule):
    """Updates a metric and logs its results, which is all that a user of a metric writes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.updates, self.weight = case.updates, torch.nn.Parameter(torch.zeros(1))
        self.batch_metric, self.epoch_metric = case.make(), case.make()
        self.results: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log_dict(self.batch_metric(**self.updates[int(batch)]), prog_bar=False)
        self.log_dict(self.batch_metric.compute(), prog_bar=False)
        return (self.weight * 0).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.epoch_metric.update(**self.updates[int(batch)])

    def on_validation_epoch_end(self) -> None:
        result = self.epoch_metric.compute()
        self.log_dict(result, prog_bar=False)
        self.results.append(result.scalars())
        self.epoch_metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@every_case
def test_results_can_be_logged_as_they_are(case: Case) -> None:
    loader: DataLoader[int] = DataLoader(range(len(case.updates)), batch_size=1)  # type: ignore[arg-type]
    module = UsesMetric(case)
    own = trainer(max_epochs=1, num_sanity_val_steps=0, log_every_n_steps=1)
    own.fit(module, loader, loader)
    assert len(module.results) == 1
    logged = {name: float(value) for name, value in own.callback_metrics.items()}
    expected = filled(case).compute().scalars()
    assert {name: logged[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5, abs=1e-5
    )


@every_case
def test_a_result_is_a_tuple_and_reads_like_a_dictionary_of_its_scalars(case: Case) -> None:
    result = filled(case).compute()
    scalars = result.scalars()
    assert isinstance(result, tuple)
    assert list(result.keys()) == list(scalars)
    close(dict(result.items()), scalars, 0)
    close(dict(result), scalars, 0)
    close({**result}, scalars, 0)
    if "values" not in result._fields:
        close(list(result.values()), list(scalars.values()), 0)
    name = next(iter(scalars))
    assert torch.equal(result[name], scalars[name])
    assert result[0] is getattr(result, result._fields[0])
    assert len(result[1:]) == len(result) - 1
    with pytest.raises(KeyError, match="no such scalar"):
        result["no such scalar"]
    close(pickle.loads(pickle.dumps(result)), result, 0)


@every_case
def test_results_and_states_share_no_memory(case: Case) -> None:
    metric = filled(case, case.updates[:4])
    metric.compute_with_cache = False
    result = metric.compute()
    before = [part.clone() for part in result]
    for update in case.updates[4:]:
        metric.update(**update)
    expected = metric.compute()
    close(list(result), before, 0)
    for part in metric.compute():
        part.zero_()
    close(metric.compute(), expected, 0)


# ---- forward ----


@every_case
def test_forward_returns_the_result_of_the_batch_and_accumulates(case: Case) -> None:
    metric = case.make()
    for update in case.updates:
        close(metric(**update), filled(case, [update]).compute())
    assert metric.update_count == len(case.updates)
    close(metric.compute(), filled(case).compute())


@every_case
def test_an_invalid_batch_leaves_the_metric_as_it_was(case: Case) -> None:
    metric = filled(case)
    invalid = {name: torch.zeros(2, 2, 2, 2, 2) if isinstance(v, Tensor) else v for name, v in case.updates[0].items()}
    with pytest.raises(ValueError, match="must be"):
        metric(**invalid)
    close(metric.compute(), filled(case).compute())


def test_forward_stores_no_more_rows_than_update() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = KStar(max_rows=20)
    for _ in range(30):
        metric(torch.randn(10, 2, generator=generator), torch.randint(0, 2, (10,), generator=generator))
    assert len(metric.rows("latents")) <= 40
    assert len(metric.selected()[1]) == 20


def test_forward_counts_stored_real_images_once() -> None:
    case = CASES["cosine_mean_similarity"]
    arguments: dict[str, Any] = {"regions": torch.arange(8).repeat(8, 1) // 4, "reset_real_features": False}
    called, updated = CosineMeanSimilarity(**arguments), CosineMeanSimilarity(**arguments)
    for update in case.updates:
        called(**update)
        updated.update(**update)
    assert len(called.rows("real")) == len(updated.rows("real"))
    close(called.compute(), updated.compute())


@every_case
def test_a_metric_may_be_updated_after_inference_mode(case: Case) -> None:
    metric = case.make()
    half = len(case.updates) // 2
    with torch.inference_mode():
        metric.reset()
        for update in case.updates[:half]:
            metric.update(**update)
    for update in case.updates[half:]:
        metric.update(**update)
    close(metric.compute(), filled(case).compute())


@every_case
@pytest.mark.parametrize("half_way", [False, True])
def test_sums_and_integers_keep_their_types_when_a_module_is_cast(case: Case, half_way: bool) -> None:
    class Holder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metric = case.make()

    holder = Holder()
    start = len(case.updates) // 2 if half_way else 0
    for update in case.updates[:start]:
        holder.metric.update(**update)
    # Lightning casts for precision="64-true"; a cast to fewer digits would round the rows that are stored already
    holder.to(torch.float64 if half_way else torch.bfloat16)
    holder.metric.set_dtype(torch.float64 if half_way else torch.float16)
    for update in case.updates[start:]:
        holder.metric.update(**update)
    result, expected = holder.metric.compute(), filled(case).compute()
    close(result.scalars(), {name: v.to(result[name].dtype) for name, v in expected.scalars().items()}, 1e-5)
    assert torch.equal(holder.metric.configuration, case.make().configuration)


def test_uint8_images_stay_uint8_when_a_metric_is_cast() -> None:
    metric = CosineMeanSimilarity(QUARTERS)
    bright = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metric.update(bright, real=True)
    metric.update(bright // 2, real=False)
    expected = metric.compute()
    metric.set_dtype(torch.float64)
    metric.compute_with_cache = False
    metric.update(bright[:0], real=False)
    close(metric.compute(), expected, 0)


# ---- collections ----


def make(name: str, **changes: Any) -> Diagnostic:
    metric_class = type(CASES[name].make())
    return metric_class(**{**ARGUMENTS[name].valid, **changes})


def filled_by_name(metric: Any, name: str, call: bool = False) -> Any:
    for update in CASES[name].updates:
        if call:
            metric(**update)
        else:
            metric.update(**update)
    return metric


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_is_declared(name: str) -> None:
    metric_class = type(CASES[name].make())
    parameters = inspect.signature(metric_class).parameters.values()
    assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} == set(ARGUMENTS[name].changes)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_configurations_are_equal_only_for_equal_arguments(name: str) -> None:
    changed = [make(name, **change) for change in ARGUMENTS[name].changes.values()]
    metrics = [make(name), *changed, make(name, compute_on_cpu=True)]
    numbers = torch.stack([metric.configuration for metric in metrics])
    assert numbers.dtype == torch.float64
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    apart = (numbers[:, None] - numbers[None]).abs().amax(-1)
    assert bool((apart + torch.eye(len(numbers)) > 0.01).all())
    assert torch.equal(make(name).configuration, numbers[0])


def test_metrics_of_different_classes_share_no_rows() -> None:
    collection = filled_by_name(
        MetricCollection({"a": KStar(max_rows=50), "b": LatentRegions(2, max_rows=50)}), "k_star"
    )
    assert len(collection.compute_groups) == 2


@pytest.mark.parametrize("call", [False, True], ids=["update", "forward"])
@pytest.mark.parametrize(("name", "argument"), CHANGED)
def test_each_metric_of_a_collection_gives_the_result_that_it_gives_alone(name: str, argument: str, call: bool) -> None:
    change = ARGUMENTS[name].changes[argument]
    one, two = filled_by_name(make(name), name).compute(), filled_by_name(make(name, **change), name).compute()
    for first, second, expected in (({}, change, (one, two)), (change, {}, (two, one))):
        collection = MetricCollection({"a": make(name, **first), "b": make(name, **second)})
        filled_by_name(collection, name, call)
        if not call:
            assert len(collection.compute_groups) == 2
        result = collection.compute()
        close((result["a"], result["b"]), expected)


@pytest.mark.parametrize("call", [False, True], ids=["update", "forward"])
@every_case
def test_metrics_with_the_same_arguments_may_share_their_states(case: Case, call: bool) -> None:
    collection = MetricCollection({"a": case.make(), "b": case.make()})
    for step, update in enumerate(case.updates):
        if call and step:
            collection(**update)
        else:
            collection.update(**update)
    assert len(collection.compute_groups) == 1
    result = collection.compute()
    close((result["a"], result["b"]), (filled(case).compute(),) * 2)


@every_case
def test_the_configuration_survives_copies_casts_resets_and_loading(case: Case) -> None:
    expected = case.make().configuration
    metric = filled(case)
    metric(**case.updates[0])
    metric.persistent(True)
    other = case.make()
    other.load_state_dict(metric.state_dict())
    for held in (metric, metric.clone(), pickle.loads(pickle.dumps(metric)), other):
        assert torch.equal(held.configuration, expected)
        held.reset()
        assert torch.equal(held.configuration, expected)
        held.set_dtype(torch.float16).half().to(torch.bfloat16)
        assert torch.equal(held.configuration, expected)
    assert "configuration" not in metric.compute().scalars()


def test_a_metric_keeps_its_configuration_when_it_loads_the_state_of_another() -> None:
    saved, metric = KStar(seed=1), KStar(seed=0)
    saved.persistent(True)
    metric.load_state_dict(saved.state_dict())
    assert torch.equal(metric.configuration, KStar(seed=0).configuration)


# ---- regions that the cosine mean similarity finds itself ----


def quartered(n: int, seed: int = 0) -> Tensor:
    """Returns images whose pixels share one random number in each quarter, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 1, 4, generator=generator)[:, :, QUARTERS]
    return common + 0.3 * torch.randn(n, 1, 8, 8, generator=generator)


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = torch.unique(torch.stack([a.flatten(), b.flatten()]), dim=1)
    return pairs.shape[1] == len(torch.unique(a)) == len(torch.unique(b))


def test_regions_are_found_at_the_first_result_and_stay_until_the_reset() -> None:
    metric = CosineMeanSimilarity(num_regions=4)
    metric.update(quartered(300), real=True)
    assert metric.region_map is None
    assert metric.compute().regions.isnan().all()
    metric.update(quartered(300, seed=1), real=False)
    result = metric.compute()
    found = metric.region_map
    assert found is not None
    assert same_partition(found.labels, QUARTERS)
    given = CosineMeanSimilarity(found)
    given.update(quartered(300), real=True)
    given.update(quartered(300, seed=1), real=False)
    close(result, given.compute())
    # more real images change the result, but not the regions
    metric.update(quartered(50, seed=2), real=True)
    metric.compute()
    assert metric.region_map is found
    metric.reset()
    assert metric.region_map is None


def test_regions_do_not_depend_on_the_order_of_images_and_use_at_most_a_thousand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def recorded(images: Tensor, *args: Any, **options: Any) -> RegionMap:
        sizes.append(len(images))
        return find_regions(images, *args, **options)

    monkeypatch.setattr("lightning_gendiag.diagnostics.cosine_mean_similarity.metric.find_regions", recorded)
    images, generated = quartered(1500), quartered(100, seed=1)
    maps = []
    for order in (torch.arange(1500), torch.randperm(1500, generator=torch.Generator().manual_seed(0))):
        metric = CosineMeanSimilarity(num_regions=6, null_splits=0)
        for batch in images[order].split(400):
            metric.update(batch, real=True)
        metric.update(generated, real=False)
        metric.compute()
        maps.append(metric.region_map)
    # with six regions in four quarters, the map depends on the chosen images
    assert maps[0] is not None
    assert maps[0] == maps[1]
    assert sizes == [1000, 1000]


def test_regions_stay_where_real_images_stay() -> None:
    metric = CosineMeanSimilarity(num_regions=4, reset_real_features=False)
    metric.update(quartered(300), real=True)
    metric.update(quartered(300, seed=1), real=False)
    metric.compute()
    found = metric.region_map
    metric.reset()
    assert metric.region_map is found
    metric.update(quartered(300, seed=1), real=False)
    assert metric.compute().regions.isfinite().all()


def test_forward_neither_finds_nor_clears_regions() -> None:
    metric = CosineMeanSimilarity(num_regions=4)
    assert metric(quartered(300), real=True).regions.shape == (4,)
    assert metric(quartered(300, seed=1), real=False).image.isnan()
    assert metric.region_map is None
    metric.compute()
    found = metric.region_map
    metric(quartered(300, seed=2), real=False)
    assert metric.region_map is found
    assert found is not None


def test_too_few_real_images_for_regions_are_flagged() -> None:
    metric = CosineMeanSimilarity(num_regions=4)
    metric.update(quartered(1), real=True)
    metric.update(quartered(20, seed=1), real=False)
    result = metric.compute()
    assert result.regions.shape == (4,)
    assert all(value.isnan() for name, value in result.scalars().items() if name != "invalid")
    assert metric.region_map is None


def test_images_are_checked_before_and_after_regions_are_found() -> None:
    metric = CosineMeanSimilarity(num_regions=4)
    with pytest.raises(ValueError, match="num_regions must be between 1 and the number of positions, got 4 for 1x3"):
        metric.update(torch.rand(5, 1, 1, 3), real=True)
    metric.update(quartered(50), real=True)
    for _ in range(2):
        for images in (torch.rand(5, 1, 4, 4), torch.rand(5, 3, 8, 8)):
            with pytest.raises(ValueError, match=r"generated must be \(N, 1, 8, 8\)"):
                metric.update(images, real=False)
        metric.update(quartered(50, seed=1), real=False)
        metric.compute()
    with pytest.raises(ValueError, match=r"real must be floating-point as before, got torch\.uint8"):
        metric.update(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), real=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "regions must be a map where num_regions is not given, got None"),
        ({"regions": QUARTERS, "num_regions": 4}, "num_regions must be None where regions are given, got 4"),
        ({"num_regions": 0}, "num_regions must be at least 1, got 0"),
    ],
)
def test_regions_or_their_number_must_be_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CosineMeanSimilarity(**arguments)
    assert "To fix this" in str(error.value)
