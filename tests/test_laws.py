"""Laws of every diagnostic's metric."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch

from lightning_gendiag import Diagnostic
from tests.cases import Case, cases

CASES = cases()
over_all = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def filled(case: Case, updates: list[dict[str, Any]] | None = None) -> Diagnostic:
    metric = case.make()
    for update in case.updates if updates is None else updates:
        metric.update(**update)
    return metric


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@over_all
def test_clones_and_pickles_are_the_same(case: Case) -> None:
    metric = filled(case)
    expected = metric.compute()
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        close(other.compute(), expected)
        other._computed = None
        close(other.compute(), expected)


@over_all
def test_the_order_of_updates_does_not_matter(case: Case) -> None:
    updates = list(case.updates)
    random.Random(0).shuffle(updates)
    close(filled(case, updates).compute(), filled(case).compute(), 1e-5)


@over_all
def test_reset_forgets(case: Case) -> None:
    metric = filled(case)
    expected = metric.compute()
    metric.reset()
    for update in case.updates:
        metric.update(**update)
    close(metric.compute(), expected)


@over_all
def test_compute_draws_nothing_and_changes_nothing(case: Case) -> None:
    metric = filled(case)
    state = torch.get_rng_state()
    first = metric.compute()
    metric._computed = None
    close(metric.compute(), first, 0)
    assert torch.equal(torch.get_rng_state(), state)


@over_all
def test_compute_without_a_sample_is_flagged_and_no_crash(case: Case) -> None:
    result = case.make().compute()
    assert all(value.ndim == 0 for value in result.scalars().values())


@over_all
def test_scalars_are_scalars(case: Case) -> None:
    scalars = filled(case).compute().scalars()
    assert scalars
    for value in scalars.values():
        assert value.shape == ()
        assert value.isfinite()


@over_all
def test_plot_draws_one_result_and_several(case: Case) -> None:
    metric = filled(case)
    figure, axes = metric.plot()
    assert axes.figure is figure
    assert len(axes.patches) > 1
    figure, axes = metric.plot([metric.compute()] * 3)
    assert len(axes.lines) > 1
    assert len(axes.lines[0].get_xdata()) == 3
    _, again = metric.plot(ax=axes)
    assert again is axes
