from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping

from benchmarks import planted_faults
from benchmarks.measuring import plateau
from benchmarks.planted_faults import below, judge, recorded, summary
from benchmarks.planting import record
from example_models.data import scenes
from lightning_gendiag import find_regions
from lightning_gendiag.functional.distances import adjusted_rand_index
from tests.helpers.running import batches, trainer
from tests.helpers.versions import needs_weights_only


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_regions_of_scenes_are_known(size: int) -> None:
    images, labels = scenes(800, 4, size, seed=2)
    assert images.shape == (800, 1, size, size)
    assert labels.unique().tolist() == [0, 1, 2, 3]
    assert float(images.abs().max()) <= 1
    found = find_regions(images, 4, progress=False)
    assert adjusted_rand_index(found.labels, labels) == pytest.approx(1)


def test_scenes_vary_each_region_for_itself() -> None:
    images, labels = scenes(2000, 5, 16, seed=3)
    # the energy of a region, which follows the strength of its wave
    energy = torch.stack([images[:, 0, labels == r].square().mean(1) for r in range(5)])
    off = energy.corrcoef()[~torch.eye(5, dtype=torch.bool)]
    assert float(off.abs().max()) < 0.1


class Scripted(LightningModule):
    """Logs the values of a series, one an epoch."""

    def __init__(self, series: list[float]) -> None:
        super().__init__()
        self.series, self.weight = series, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("it", torch.tensor(self.series[self.current_epoch]), on_epoch=True, on_step=False)
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("series", "patience", "expected"),
    [
        ([5.0, 4.0, 3.0, 3.1, 3.2, 2.9, 3.0, 3.0, 3.0, 1.0], 3, 8),
        ([5.0, 4.0, 3.0, 3.1, 3.2, 2.9, 3.0, 3.0, 3.0, 1.0], 4, None),
        ([1.0, math.nan, 1.0], 3, 1),
    ],
)
def test_a_plateau_is_where_lightning_stops(series: list[float], patience: int, expected: int | None) -> None:
    stopping = EarlyStopping("it", patience=patience, check_on_train_epoch_end=True)
    own = trainer(stopping, max_epochs=len(series))
    own.fit(Scripted(series), batches())
    assert plateau(series, patience) == expected
    assert own.current_epoch == (len(series) if expected is None else expected + 1)
    assert EarlyStopping("it").patience == 3


def test_a_threshold_arms_itself() -> None:
    assert below([0.1, 0.3, 0.6, 0.7, 0.4, 0.8], 0.5) == 4
    assert below([0.1, 0.3], 0.5) is None
    assert below([0.6, math.nan], 0.5) == 1


# a flow of a few hundred steps
@pytest.mark.filterwarnings("ignore:generated images span")
@needs_weights_only
def test_a_short_run_is_recorded_and_judged() -> None:
    run = json.loads(json.dumps(record("flow", "scenes", 1, evaluations=16, start=12, after=3)))
    assert len(run["healthy"]["loss"]) == len(run["healthy"]["cms"]) == 16
    assert len(run["faults"]["region frozen"]["cms"]) == 4
    assert len(run["faults"]["weight is nan"]["cms"]) == 3
    # a frozen region is further from real images than the samples without the fault
    frozen, healthy = run["faults"]["region frozen"]["cms"][-1], run["healthy"]["cms"][-1]
    assert min(frozen[name][0] - healthy[name][0] for name in frozen) < -0.1
    # the training does not notice that faults were planted
    without = record("flow", "scenes", 1, evaluations=16, start=12, faults=False)["healthy"]
    assert run["healthy"]["loss"] == without["loss"]
    for row, other in zip(run["healthy"]["cms"], without["cms"], strict=True):
        assert {name: held[:2] for name, held in row.items()} == {name: held[:2] for name, held in other.items()}
    _, faults = judge(run)
    found = {one.fault: one for one in faults}
    assert found["weight is nan"].found
    # after so few evaluations an alarm takes one more, and not all regions show at the same one
    assert found["image frozen"].delay <= 4
    assert found["image frozen"].overlap > 0.5


def test_recorded_runs_are_judged_as_the_readme_says() -> None:
    """One seed of each family and each kind of data; the whole table is a benchmark."""
    figures, wrong, _ = summary(recorded(planted_faults.REPORTING[:1]))
    assert figures["regional_found"] >= 0.9
    assert figures["regional_iou"] >= 0.8
    assert figures["named"] >= 0.9
    assert figures["delay"] <= 3
    assert len(wrong) <= 1
