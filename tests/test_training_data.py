from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from benchmarks.training_data import run
from example_models.data import digits
from lightning_gendiag import CollapseStopping, GenerativeDiagnostics, TrainingData, TrainingDataMonitor
from lightning_gendiag.diagnostics.training_data import monitor as monitors
from lightning_gendiag.diagnostics.training_data import plots
from lightning_gendiag.diagnostics.training_data.functional import (
    Moves,
    cell_statistics,
    distinct_of,
    glance,
    grid_of,
    place_of,
    row_hashes,
)
from lightning_gendiag.model.batch_reader import BatchReader
from lightning_gendiag.model.batches import Images
from lightning_gendiag.plots.canvas import Occasion
from tests.helpers.cases import Case
from tests.helpers.models import TinyGAN
from tests.helpers.running import loading, state_after_training, trainer

IMAGES, LABELS = digits(8)


def updates(count: int = 12, n: int = 20) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "data": torch.randn(n, 2, 8, 8, generator=generator),
            "labels": torch.randint(4, (n,), generator=generator),
            "first": index < count // 2,
        }
        for index in range(count)
    ]


CASE = Case(make=lambda: TrainingData((2, 8, 8), rows=10), updates=updates(), tolerance=1e-10)


def filled(images: Tensor, labels: Tensor | None = None, first: tuple[Tensor, Tensor | None] | None = None) -> Any:
    """The result of data beside the first ones, in batches of 64, all of whose images are measured."""
    metric = TrainingData(images.shape[1:])
    for (some, of_some), is_first in ((first or (IMAGES, LABELS), True), ((images, labels), False)):
        for start in range(0, len(some), 64):
            part = slice(start, start + 64)
            metric.update(some[part], None if of_some is None else of_some[part], first=is_first)
    return metric.compute()


# ---- the numbers ----


def test_cells_have_the_moments_that_a_loop_computes(generator: torch.Generator) -> None:
    rows = torch.randn(5, 3, 8, 12, generator=generator)
    values = cell_statistics(rows, grid_of(rows.shape[1:])).view(5, 3, 3, 4, 4)
    for channel in range(3):
        for i in range(4):
            for j in range(4):
                cell = rows[:, channel, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].flatten(1)
                torch.testing.assert_close(values[:, 0, channel, i, j], cell.mean(1))
                torch.testing.assert_close(values[:, 1, channel, i, j], cell.square().mean(1))
                torch.testing.assert_close(values[:, 2, channel, i, j], cell.mean(1) * rows.flatten(1).mean(1))


@pytest.mark.parametrize("shape", [(2,), (300,), (3, 50), (9, 8, 8), (1, 6, 6, 6), (1, 2, 2), (1, 3, 4, 5, 6)])
def test_data_of_every_shape_have_cells(shape: tuple[int, ...], generator: torch.Generator) -> None:
    data = torch.randn(70, *shape, generator=generator)
    result = filled(data, first=(data + 0.0, None))
    assert result.moves() == {}
    moved = filled(data + 5, first=(data, None))
    assert "range" in moved.moves()
    assert all(value.isfinite() for value in moved.scalars().values())
    panel = plots.panel(moved, Occasion(3))
    assert panel.dtype == torch.uint8


def test_hashes_of_rows_do_not_depend_on_the_batch(generator: torch.Generator) -> None:
    rows = torch.randn(50, 3, 7, 7, generator=generator)
    hashes = row_hashes(rows)
    assert len(hashes.unique()) == 50
    assert torch.equal(torch.cat([row_hashes(rows[:7]), row_hashes(rows[7:])]), hashes)
    changed = rows.clone()
    changed[0, 1, 2, 3] += 1e-6
    assert row_hashes(changed)[0] != hashes[0]


def test_the_expected_number_of_different_images_is_the_mean_over_all_selections() -> None:
    hashes = torch.tensor([1, 1, 1, 2, 2, 3])
    subsets = torch.combinations(torch.arange(6), 3)
    slow = sum(len(hashes[subset].unique()) for subset in subsets) / len(subsets)
    assert distinct_of(hashes, 3) == pytest.approx(slow)
    assert distinct_of(hashes, 6) == pytest.approx(3)


def test_shares_and_moments_are_those_of_all_images() -> None:
    result = filled(IMAGES, LABELS)
    torch.testing.assert_close(result.classes[0], LABELS.bincount().double())
    assert float(result.low[0]) == float(IMAGES.min())
    assert float(result.high[0]) == float(IMAGES.max())
    mean = IMAGES.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1).double().mean(0)
    torch.testing.assert_close(result.cells[0, 0] / result.rows[0], mean, rtol=1e-6, atol=1e-6)
    assert result.variety == pytest.approx(1)
    assert float(result.scalars()["class_distance"]) == 0


def test_the_first_images_have_not_moved() -> None:
    metric = TrainingData((1, 8, 8))
    metric.update(IMAGES[:64], LABELS[:64])
    result = metric.compute()
    assert result.moves() == {}
    assert all(value.isfinite() for value in result.scalars().values())
    assert result.variety == 1


def test_a_glance_takes_other_images_of_each_batch_and_copies_them() -> None:
    data = torch.arange(64.0).view(64, 1, 1, 1)
    seen = [glance(data, most=8, first=number) for number in range(8)]
    assert sorted(torch.cat([part.rows for part in seen]).flatten().tolist()) == list(range(64))
    before = seen[0].rows.clone()
    data.zero_()
    assert torch.equal(seen[0].rows, before)
    assert glance(torch.zeros(2, 3, 512, 512)).rows.shape == (2, 3, 32, 32)


def test_no_value_is_read_before_an_evaluation_so_that_no_device_is_waited_for() -> None:
    """Tensors without values raise an error where a value is read."""
    metric = TrainingData((3, 64, 64)).to("meta")
    seen = [
        glance(
            torch.empty(n, 3, 64, 64, device="meta"), torch.empty(n, dtype=torch.long, device="meta"), 8, first=number
        )
        for number, n in enumerate((64, 64, 37))
    ]
    metric.update(glances=seen)
    assert metric.images.device.type == "meta"


def test_features_of_rows_are_named_by_their_number(generator: torch.Generator) -> None:
    rows = torch.randn(400, 12, generator=generator)
    changed = rows.clone()
    changed[:, 4:6] += 2
    assert (
        filled(changed, first=(rows, None)).moves()["regions"].startswith("features 4 to 5 of 12 of the training rows")
    )


def test_data_that_are_all_nan_are_flagged() -> None:
    result = filled(torch.full((64, 1, 8, 8), math.nan), LABELS[:64])
    assert result.moves() == {"invalid": "64 of the last 64 training images contain nan or inf"}
    assert float(result.within[0]) == 0
    assert plots.panel(result, Occasion(1)).dtype == torch.uint8


def test_places_are_named() -> None:
    assert place_of([0, 1, 4, 5], (4, 4)) == "the top left"
    assert place_of([8, 12], (4, 4)) == "the bottom left"
    assert place_of([5, 6, 9, 10], (4, 4)) == "the middle centre"
    assert place_of([0, 15], (4, 4)) == "2 of 16 cells"
    assert place_of([3], (16,)) == "cell 3 of 16"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TrainingData(()), "shape must be one or more positive sizes"),
        (lambda: TrainingData((1, 8, 8), rows=0), "rows must be at least 1, got 0"),
        (lambda: TrainingData((1, 8, 8), confidence=1.0), r"confidence must be in \(0.5, 1\), got 1.0"),
        (lambda: TrainingData((1, 8, 8)).update(torch.zeros(3, 3, 8, 8)), r"data must be \(N, 1, 8, 8\) real numbers"),
        (
            lambda: TrainingData((2,)).update(torch.zeros(3, 2), torch.zeros(2).long()),
            r"labels must be \(3,\) integers",
        ),
        (lambda: TrainingDataMonitor(rows=0), "rows must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---- what moved, in words ----


def test_a_class_that_is_gone_is_named_with_what_was_expected() -> None:
    keep = LABELS != 3
    moves = filled(IMAGES[keep], LABELS[keep]).moves()
    assert moves == {"classes": "class 3 has not been in the last 1,614 training images, of which 164 were expected"}


def test_labels_that_are_indices_are_no_classes() -> None:
    """Two epochs of a data set whose second entry is the index of the sample, and a third one."""
    once = torch.arange(len(IMAGES))
    first = IMAGES[:900], once[:900]
    result = filled(torch.cat([IMAGES[900:], IMAGES]), torch.cat([once[900:], once]), first)
    assert not result.has_classes
    assert {"moved_classes", "class_distance"}.isdisjoint(result.scalars())
    monitor = TrainingDataMonitor()
    names = [o.series.name for o in monitor.observations(monitor.noted(result))]
    assert names == ["range", "regions", "duplicates", "invalid"]
    assert filled(IMAGES, LABELS).has_classes


def test_labels_that_are_no_classes_do_not_make_the_bounds_of_others_wider() -> None:
    first = IMAGES, torch.arange(len(IMAGES))
    assert Moves(filled(IMAGES, first[1], first)).tail == Moves(filled(IMAGES, None, (IMAGES, None))).tail


def test_too_few_images_are_no_evidence() -> None:
    keep = LABELS != 3
    assert filled(IMAGES[keep][:60], LABELS[keep][:60]).moves() == {}


def test_a_class_that_became_frequent_is_named() -> None:
    images, labels = torch.cat([IMAGES, *[IMAGES[LABELS == 5]] * 4]), torch.cat([LABELS, *[LABELS[LABELS == 5]] * 4])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert filled(images[order], labels[order]).moves()["classes"].startswith("class 5 is 36.")


def test_another_normalisation_is_named_as_the_range_alone() -> None:
    moves = filled((IMAGES + 1) / 2, LABELS).moves()
    assert moves == {"range": "training images are in 0 to 1 now, and were in -1 to 1"}


@pytest.mark.parametrize(
    ("rows", "columns", "place"),
    [
        (slice(0, 4), slice(0, 4), "the top left"),
        (slice(4, 8), slice(0, 8), "the bottom"),
        (slice(0, 8), slice(6, 8), "the right"),
    ],
)
def test_an_inverted_region_is_named(rows: slice, columns: slice, place: str) -> None:
    images = IMAGES.clone()
    images[:, :, rows, columns] *= -1
    (words,) = filled(images, LABELS).moves().values()
    assert words.startswith(f"{place} of the training images moved: mean ")


def test_an_inverted_region_shows_where_its_mean_is_zero(generator: torch.Generator) -> None:
    brightness = torch.randn(600, 1, 1, 1, generator=generator)
    images = brightness + 0.5 * torch.randn(600, 1, 8, 8, generator=generator)
    images -= images.mean(0)
    changed = images.clone()
    changed[:, :, :4, :4] *= -1
    assert "regions" in filled(changed, first=(images, None)).moves()


def test_a_batch_that_repeats_is_named() -> None:
    images = IMAGES[:64].repeat(20, 1, 1, 1)
    moves = filled(images, LABELS[:64].repeat(20)).moves()
    assert moves == {
        "duplicates": "the last 20 batches repeat 64 images: among 1,280 of them 64 differ, and 1,280 did at first"
    }


def test_nan_is_named_and_left_out_of_all_else() -> None:
    images = IMAGES.clone()
    images[5] = math.nan
    result = filled(images, LABELS)
    assert result.moves() == {"invalid": "1 of the last 1,797 training images contain nan or inf"}
    assert all(value.isfinite() for value in result.scalars().values())


def test_classes_that_come_sorted_tell_as_much_as_their_batches() -> None:
    """Ten batches of one class each are no evidence about ten classes, though they hold 640 images."""
    order = LABELS.argsort(stable=True)
    result = filled(IMAGES[order][:640], LABELS[order][:640], first=(IMAGES[order], LABELS[order]))
    assert result.is_ordered
    assert "classes" not in result.moves()
    shuffled = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    assert not filled(IMAGES[shuffled], LABELS[shuffled], first=(IMAGES[shuffled], LABELS[shuffled])).is_ordered


def test_healthy_runs_raise_no_alarm() -> None:
    """``benchmarks/training_data.py`` judges 200 of them."""
    assert [alarm for seed in range(12) for alarm in run(seed, 8)] == []


# ---- the monitor ----


class Loaded(TinyGAN):
    """Trains on one loader up to an epoch, and then on another one."""

    def __init__(self, healthy: Any, broken: Any = None, start: int = 2) -> None:
        super().__init__()
        self.loaders, self.start = [healthy, healthy if broken is None else broken], start

    def train_dataloader(self) -> Any:
        return self.loaders[self.current_epoch >= self.start]


def fit(healthy: Any, broken: Any = None, epochs: int = 4, **options: Any) -> tuple[Any, Any]:
    monitor, stopping = TrainingDataMonitor(on_error="raise"), CollapseStopping("warn")
    own = trainer(monitor, stopping, max_epochs=epochs, reload_dataloaders_every_n_epochs=1, **options)
    own.fit(Loaded(healthy, broken))
    return monitor, stopping


def loader(images: Tensor, labels: Tensor, drop_last: bool = False, **options: Any) -> DataLoader[Any]:
    options = {"shuffle": True} | options
    return DataLoader(TensorDataset(images, labels), batch_size=64, drop_last=drop_last, **options)


class Stream(IterableDataset[Any]):
    """An endless source of shuffled data in batches, cut to some."""

    def __init__(self, images: Tensor, labels: Tensor, count: int = 28) -> None:
        self.images, self.labels, self.count = images, labels, count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            some = torch.randint(len(self.images), (64,))
            yield {"image": self.images[some], "label": self.labels[some]}


def inverted() -> Tensor:
    images = IMAGES.clone()
    images[:, :, :4, :4] *= -1
    return images


def with_nan() -> Tensor:
    images = IMAGES.clone()
    images[11:31, 0, 0, 0] = math.inf
    return images


WITHOUT = LABELS != 3
FAULTS = {
    "class": (lambda: (IMAGES[WITHOUT], LABELS[WITHOUT]), "class 3 has not been in the last"),
    "range": (lambda: ((IMAGES + 1) / 2, LABELS), "training images are in 0 to 1 now, and were in -1 to 1"),
    "region": (lambda: (inverted(), LABELS), "the top left of the training images moved"),
    "batch": (lambda: (IMAGES[:64].repeat(20, 1, 1, 1), LABELS[:64].repeat(20)), "batches repeat 6"),
    "nan": (lambda: (with_nan(), LABELS), "training images contain nan or inf"),
}


@pytest.mark.filterwarnings("ignore::lightning_gendiag.CollapseWarning", "ignore:.*last batch.*")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["shuffled", "drop_last", "stream"])
def test_a_fault_of_the_data_is_named_at_the_first_evaluation_after_it(fault: str, kind: str) -> None:
    make, words = FAULTS[fault]
    if kind == "stream":
        healthy, broken = (DataLoader(Stream(*data), batch_size=None) for data in ((IMAGES, LABELS), make()))
    else:
        healthy, broken = (loader(*data, drop_last=kind == "drop_last") for data in ((IMAGES, LABELS), make()))
    monitor, stopping = fit(healthy, broken)
    assert stopping.alarms[0].epoch == 2
    assert words in stopping.alarms[0].message
    assert words in monitor.moved
    assert stopping.alarms[0].label.startswith("data: ")


@pytest.mark.filterwarnings("ignore:.*does not have a length.*")
def test_weighted_samplers_and_streams_are_no_fault() -> None:
    weights = torch.where(LABELS < 3, 1.0, 0.02)
    weighted = loader(IMAGES, LABELS, shuffle=False, sampler=WeightedRandomSampler(weights, len(weights)))  # type: ignore[arg-type]
    for data in (weighted, DataLoader(Stream(IMAGES, LABELS), batch_size=None), loader(IMAGES[:150], LABELS[:150])):
        monitor, stopping = fit(data, epochs=6)
        assert monitor.evaluations == 6
        assert stopping.alarms == []
        assert monitor.moved == ""


def test_evaluations_by_steps_see_every_batch_between_them() -> None:
    monitor = TrainingDataMonitor(every_n_train_steps=7, on_error="raise")
    seen = []
    monitor.observations = lambda result: seen.append(int(result.images[0])) or []  # type: ignore[method-assign]
    trainer(monitor, max_epochs=3).fit(TinyGAN(), loader(IMAGES[:640], LABELS[:640]))
    # the reference is there after an epoch of 10 batches
    assert seen == [14 * 64, 7 * 64, 7 * 64]


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_of_batches_that_take_too_long_to_look_at_only_some_are(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(monitors, "LOOKING", 0.0)
    monkeypatch.setattr(monitors, "LOOKING_SECONDS", seconds)
    monkeypatch.setattr(monitors, "MORE_ROWS", 12)
    monitor = TrainingDataMonitor(max_overhead=0.9, on_error="raise")
    own = trainer(monitor, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    own.fit(Loaded(loader(IMAGES, LABELS), loader(IMAGES[WITHOUT], LABELS[WITHOUT])))
    looked = " that were looked at" if seconds == 0 else ""
    assert re.match(rf"class 3 has not been in the last [\d,]+ training images{looked}, of which", monitor.moved)
    assert monitor.result is not None
    batches, skipped = int(monitor.result.batches[0]), int(monitor.result.skipped)
    # of 26 batches
    assert (batches, skipped) == ((12, 14) if seconds == 0 else (26, 0))


class Failing(TrainingDataMonitor):
    def see(self, view: Any, data: Images) -> None:
        raise RuntimeError("no")


def test_a_failure_while_batches_pass_is_named_at_the_evaluation_and_training_goes_on() -> None:
    own = trainer(Failing(), max_epochs=2)
    with pytest.warns(UserWarning, match="Failing failed at step .* RuntimeError: no"):
        own.fit(TinyGAN(), loader(IMAGES[:128], LABELS[:128]))
    assert own.current_epoch == 2


def test_training_is_the_same_with_and_without_it() -> None:
    monitor = TrainingDataMonitor(on_error="raise")
    torch.testing.assert_close(state_after_training(monitor), state_after_training(), rtol=0, atol=0)
    assert monitor.evaluations == 3


def test_it_resumes_with_the_first_images_of_the_run(tmp_path: Any) -> None:
    own = trainer(TrainingDataMonitor(), max_epochs=2)
    own.fit(TinyGAN(), loader(IMAGES, LABELS))
    own.save_checkpoint(tmp_path / "last.ckpt")
    monitor = TrainingDataMonitor(on_error="raise")
    trainer(monitor, max_epochs=3).fit(
        TinyGAN(), loader(IMAGES[WITHOUT], LABELS[WITHOUT]), ckpt_path=tmp_path / "last.ckpt", **loading()
    )
    assert "class 3 has not been" in monitor.moved


class Nothing(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_it_is_on_by_default_and_needs_no_model() -> None:
    diagnostics = GenerativeDiagnostics(max_overhead=None)
    with pytest.warns(UserWarning, match="watches the training data only, since no diagnostic of Nothing"):
        trainer(diagnostics, max_epochs=2).fit(Nothing(), loader(IMAGES, LABELS))
    assert diagnostics.attached == ["training_data"]
    assert diagnostics.monitors["training_data"].evaluations == 2


# ---- reading batches ----


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Any) -> Images:
        self.calls += 1
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        return Images(images, labels.long())


@pytest.mark.parametrize("is_dict", [True, False])
def test_batches_of_one_structure_are_searched_once(is_dict: bool) -> None:
    find = Counted()
    reader = BatchReader(find, has_callables=False)
    for number in range(5):
        images, labels = torch.rand(4 + number, 1, 2, 2), torch.arange(4 + number, dtype=torch.int32)
        found = reader({"label": labels, "image": images} if is_dict else [images, labels])
        assert found is not None
        assert found.images is images
        assert found.labels is not None
        assert torch.equal(found.labels, labels.long())
    assert find.calls == 1
    reader({"image": torch.rand(2, 3, 2, 2), "label": torch.zeros(2).long()})
    assert find.calls == 2


def test_slow_callables_of_the_user_are_called_seldom() -> None:
    find = Counted()
    reader = BatchReader(find, has_callables=True)
    for _ in range(50):
        reader([torch.rand(4, 1, 2, 2), torch.zeros(4).long()])
    assert 1 <= find.calls < 50
