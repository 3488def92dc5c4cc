from __future__ import annotations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from lightning_gendiag.functional.arrays import as_images, exact_matmul, kth_smallest, median
from lightning_gendiag.functional.distances import adjusted_rand_index, squared_distances


def test_squared_distances_equal_those_of_cdist(generator: torch.Generator) -> None:
    x = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(squared_distances(x, y), torch.cdist(x, y) ** 2)


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_median_equals_the_quantile_of_torch(n: int, generator: torch.Generator) -> None:
    values = torch.randint(0, 4, (n,), generator=generator).double()
    assert float(median(values)) == pytest.approx(float(torch.quantile(values, 0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_smallest_entry_is_that_of_sorted_entries(dtype: torch.dtype, generator: torch.Generator) -> None:
    values = torch.randint(5, (6, 7), generator=generator).to(dtype).T
    ordered = values.flatten().sort().values
    for k in range(42):
        found = kth_smallest(values, k)
        assert (found.shape, found.dtype) == ((), dtype)
        assert found == ordered[k]


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_adjusted_rand_index_equals_that_of_scikit_learn(classes: int, generator: torch.Generator) -> None:
    a = torch.randint(0, classes, (50,), generator=generator)
    b = torch.where(torch.rand(50, generator=generator) < 0.6, a, torch.randint(0, 3, (50,), generator=generator))
    assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b))
    assert adjusted_rand_index(a, a + 3) == 1.0


def test_exact_matmul_restores_the_precision_after_an_error() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ZeroDivisionError), exact_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
            _ = 1 / 0
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_exact_matmul_ignores_autocast() -> None:
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with exact_matmul():
            assert (x @ x).dtype == torch.float32


def test_invalid_images_raise_errors() -> None:
    assert torch.equal(as_images(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)), torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"images must be an \(N, C, H, W\) tensor, got shape \(3, 4, 4\)"):
        as_images(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="floating-point or uint8"):
        as_images(torch.zeros(1, 1, 4, 4, dtype=torch.long))


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older torch has one setting only"
)
def test_exact_matmul_restores_the_newer_setting_of_precision() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with exact_matmul():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
