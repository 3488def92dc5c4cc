from __future__ import annotations

import itertools
import math
import random

import pytest

from lightning_gendiag.detection.contributions import explaining


@pytest.mark.parametrize(
    ("contributions", "expected"),
    [
        ({}, []),
        ({"left": 1.0}, ["left"]),
        ({"left": 0.1, "right": 0.9}, ["right"]),
        ({"left": 0.7, "right": 0.1, "top": 0.2}, ["left", "top"]),
        ({"left": 0.7, "right": 0.1, "top": 0.1, "bottom": 0.1}, ["left", "right"]),
        ({"left": 1.5, "right": -0.5}, ["left"]),
        ({"left": -0.5, "right": 0.0}, []),
        ({"left": 0.4, "right": 0.3, "top": math.nan}, ["left", "right"]),
        ({"left": math.inf, "right": 0.3}, ["left"]),
    ],
)
def test_the_fewest_components_that_reach_the_share(contributions: dict[str, float], expected: list[str]) -> None:
    assert explaining(contributions) == expected


def test_equal_contributions_keep_their_order() -> None:
    assert explaining(dict.fromkeys("dbca", 0.25), 0.5) == ["d", "b"]
    assert explaining(dict.fromkeys("dbca", 0.25), 1.0) == ["d", "b", "c", "a"]


def test_no_smaller_set_reaches_the_share() -> None:
    source = random.Random(0)
    for _ in range(50):
        parts = [source.uniform(-0.2, 1) for _ in range(6)]
        contributions = {str(i): part / math.fsum(parts) for i, part in enumerate(parts)}
        names = explaining(contributions)
        assert sum(contributions[name] for name in names) >= 0.8 - 1e-9
        smaller = itertools.combinations(contributions.values(), len(names) - 1)
        assert max(map(math.fsum, smaller)) < 0.8


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_wrong_shares_raise_errors(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        explaining({"left": 1.0}, share)
