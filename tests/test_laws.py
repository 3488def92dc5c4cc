"""Laws of every diagnostic's metric."""

from __future__ import annotations

import copy
import pickle
import random
import re
from typing import Any

import pytest
import torch

from lightning_gendiag import Diagnostic
from tests.helpers.cases import Case, all_cases
from tests.helpers.metrics import close, filled

CASES = all_cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_clones_and_pickles_give_the_same_result(case: Case) -> None:
    metric = filled(case)
    expected = metric.compute()
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        close(other.compute(), expected)
        # the states alone give the same result, without the cached one
        computed_again = filled(case, [])
        computed_again.merge_state(other)
        close(computed_again.compute(), expected)


@every_case
def test_merged_states_count_as_an_update_and_replace_the_result_from_before(case: Case) -> None:
    metric = case.make()
    metric.compute()
    metric.merge_state(filled(case))
    assert metric.update_called
    close(metric.compute(), filled(case).compute())


@every_case
def test_the_order_of_updates_does_not_matter(case: Case) -> None:
    updates = list(case.updates)
    random.Random(0).shuffle(updates)
    close(filled(case, updates).compute(), filled(case).compute(), 1e-5)


@every_case
def test_reset_clears_the_state(case: Case) -> None:
    metric = filled(case)
    expected = metric.compute()
    metric.reset()
    for update in case.updates:
        metric.update(**update)
    close(metric.compute(), expected)


@every_case
def test_compute_uses_no_random_numbers_and_changes_no_state(case: Case) -> None:
    metric = filled(case)
    metric.compute_with_cache = False
    state = torch.get_rng_state()
    close(metric.compute(), metric.compute(), 0)
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_compute_without_samples_gives_scalars_and_no_error(case: Case) -> None:
    result = case.make().compute()
    assert all(value.ndim == 0 for value in result.scalars().values())


@every_case
def test_scalars_are_finite_floats_without_axes(case: Case) -> None:
    scalars = filled(case).compute().scalars()
    assert scalars
    for value in scalars.values():
        assert value.shape == ()
        assert value.is_floating_point()
        assert value.isfinite()


def declared(metric: Diagnostic, scalar: str) -> list[str]:
    """Returns the names in ``scalar_info`` that match a scalar; a placeholder matches a number."""
    patterns = {name: r"-?\d+".join(map(re.escape, re.split(r"\{\w+\}", name))) for name in metric.scalar_info}
    return [name for name, pattern in patterns.items() if re.fullmatch(pattern, scalar)]


def measured(result: Any) -> Any:
    """Returns a result with the fields that only a monitor can measure, so that all scalars occur."""
    if hasattr(result, "inception"):
        ones = torch.ones(4, dtype=torch.float64)
        decoded = torch.full_like(result.class_share, 1 / result.class_share.shape[1])
        return result._replace(fid=ones, inception=ones, decoded_share=decoded)
    if hasattr(result, "stable_ranks"):
        ones = torch.ones(2, dtype=torch.float64)
        return result._replace(changes=ones, stable_ranks=ones)
    return result._replace(accuracy=torch.ones(()).double()) if hasattr(result, "accuracy") else result


@every_case
def test_every_scalar_is_declared_exactly_once(case: Case) -> None:
    metric = filled(case)
    for result in (case.make().compute(), metric.compute(), measured(metric.compute())):
        for scalar in result.scalars():
            assert len(declared(metric, scalar)) == 1, scalar


@every_case
def test_every_declared_scalar_occurs(case: Case) -> None:
    metric = filled(case)
    occurring = {name for scalar in metric.compute().scalars() for name in declared(metric, scalar)}
    assert {name for name, info in metric.scalar_info.items() if not info.optional} <= occurring


def test_optional_scalars_occur_where_everything_is_measured() -> None:
    for name, case in CASES.items():
        if "," in name:
            continue
        metric = filled(case)
        occurring = {d for scalar in measured(metric.compute()).scalars() for d in declared(metric, scalar)}
        assert occurring == set(metric.scalar_info), name


@every_case
def test_each_description_is_one_short_sentence(case: Case) -> None:
    for name, info in case.make().scalar_info.items():
        assert re.fullmatch(r"[A-Z][^.]*([.]\d[^.]*)*\.", info.description), name
        assert len(info.description) <= 120, name
        assert info.unit in ("", "nats", "standard deviations"), name


@every_case
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
