"""Filled metrics, and the comparison of their results."""

from __future__ import annotations

from typing import Any

import torch

from lightning_gendiag import Diagnostic
from tests.helpers.cases import Case


def filled(case: Case, updates: list[dict[str, Any]] | None = None) -> Diagnostic:
    metric = case.make()
    for update in case.updates if updates is None else updates:
        metric.update(**update)
    return metric


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
