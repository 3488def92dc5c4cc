"""Metrics give the recorded results on inputs in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import Case, cases

RECORDED = json.loads((Path(__file__).parent / "recorded" / "metrics.json").read_text())


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case in cases().items() if name in RECORDED])
def test_each_field_and_scalar_is_as_recorded(name: str, case: Case) -> None:
    metric = case.make()
    for update in case.updates:
        metric.update(**{key: in_float64(value) for key, value in update.items()})
    result = metric.compute()
    # fields that were added since are tested elsewhere
    recorded = {field: values for field, values in RECORDED[name].items() if field != "scalars"}
    expected = {field: torch.tensor(values, dtype=torch.float64).flatten() for field, values in recorded.items()}
    for field in expected:
        value = getattr(result, field).flatten()[:600]
        torch.testing.assert_close(value, expected[field].to(value), rtol=1e-12, atol=1e-12, equal_nan=True, msg=field)
    scalars = {key: float(value) for key, value in result.scalars().items() if key in RECORDED[name]["scalars"]}
    assert scalars == pytest.approx(RECORDED[name]["scalars"], rel=1e-12, abs=1e-12, nan_ok=True)
