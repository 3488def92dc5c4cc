"""What benchmarks measure with: operations that are counted and repeated."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from benchmarks.gpu import Recording, main


def test_products_are_counted_by_their_operands_and_repeated() -> None:
    a, b, kernels = torch.rand(3, 4), torch.rand(5, 4), torch.rand(2, 1, 3, 3)
    with Recording() as recording:
        for _ in range(3):
            torch.addmm(torch.ones(3, 1).expand(3, 5), a, b.T, alpha=-2).exp().sum()
        torch.nn.functional.conv2d(torch.rand(1, 1, 8, 8), kernels)
        torch.func.vmap(lambda x: x @ b.T)(torch.rand(2, 3, 4))
    names = [call[0].overloadpacket.__name__ for call in recording.products.elements()]
    assert Counter(names) == {"addmm": 3, "convolution": 1, "mm": 1}
    assert 0 < recording.seconds() < 1


def test_the_benchmark_of_gpus_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--sizes", "16", "--samples", "16", "--only", "cosine", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["failed"]
    assert [row["part"].split(", ")[1] for row in found["rows"]] == ["real side", "compare"]
    assert all(row["ms"] > row["products_ms"] > 0 for row in found["rows"])
