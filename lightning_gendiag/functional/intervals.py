"""Confidence bounds of shares, and the quantile of the normal distribution."""

from __future__ import annotations

import torch
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
    # quantiles of the beta distribution, in a quarter of the time of scipy.stats
    from scipy.special import betainccinv, betaincinv

    k = counts.double().cpu().numpy()
    n = k.sum()
    low = torch.from_numpy(betaincinv(k, n - k + 1, tail)).nan_to_num(0.0)
    high = torch.from_numpy(betainccinv(k + 1, n - k, tail)).nan_to_num(1.0)
    return torch.stack([low, high], 1).to(counts.device)


def normal_quantile(tail: float) -> float:
    """Returns the value that a standard normal variable exceeds with a probability in (0, 1).

    Example:
        >>> round(normal_quantile(0.025), 3)
        1.96
    """
    from scipy.special import ndtri

    return -float(ndtri(tail))
