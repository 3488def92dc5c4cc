"""Confidence bounds of shares, and the quantile of the normal distribution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def binomial_interval(counts: Tensor, tail: float) -> Tensor:
    """Computes exact binomial confidence bounds of shares.

    Source: Clopper and Pearson, 1934.

    Args:
        counts: (K,) number of items of each class.
        tail: probability with which each bound is wrong, at most.

    Returns:
        (K, 2) lower and upper bounds in float64.

    Example:
        >>> binomial_interval(torch.tensor([0.0, 100.0]), 0.025)[0]
        tensor([0.0000, 0.0362], dtype=torch.float64)
    """
    return torch.from_numpy(binomial_bounds(counts.double().cpu().numpy(), tail)).to(counts.device)


def binomial_bounds(counts: NDArray[np.float64], tail: float) -> NDArray[np.float64]:
    """Returns what :func:`binomial_interval` does, of and as NumPy's arrays."""
    # quantiles of the beta distribution, in a quarter of the time of scipy.stats
    from scipy.special import betainccinv, betaincinv

    n = counts.sum()
    low = np.nan_to_num(betaincinv(counts, n - counts + 1, tail))
    high = np.nan_to_num(betainccinv(counts + 1, n - counts, tail), nan=1.0)
    return np.stack([low, high], 1)


def normal_quantile(tail: float) -> float:
    """Returns the value that a standard normal variable exceeds with a probability in (0, 1).

    Example:
        >>> round(normal_quantile(0.025), 3)
        1.96
    """
    from scipy.special import ndtri

    return -float(ndtri(tail))
