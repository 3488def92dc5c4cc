"""Distances between rows, between Gaussians and between partitions."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Computes squared Euclidean distances between rows by one matrix product.

    Rows should be centred first, since the rounding error is that of ``|x|^2 + |y|^2`` and not that of the distance.

    Args:
        x: (M, D) rows.
        y: (N, D) rows.

    Returns:
        (M, N) squared distances, at least 0.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """
    own = x.square().sum(1)
    squares = own[:, None] + (own if y is x else y.square().sum(1))
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)  # (M, D) @ (D, N) -> (M, N)


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """Computes the agreement of two partitions of the same items.

    Source: Hubert and Arabie, *Comparing partitions*, 1985.

    Args:
        a: (...) integer labels.
        b: (...) integer labels of the same shape.

    Returns:
        1 where the partitions are equal, about 0 by chance, and at least -0.5.

    Example:
        >>> adjusted_rand_index(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
        1.0
    """

    def pairs(labels: Tensor) -> float:
        sizes = torch.unique(labels, dim=-1, return_counts=True)[1].double()
        return float((sizes * (sizes - 1) / 2).sum())

    a, b = a.flatten(), b.flatten()
    in_a, in_b, together = pairs(a), pairs(b), pairs(torch.stack([a, b]))
    every = len(a) * (len(a) - 1) / 2
    chance = in_a * in_b / every if every else 0.0
    most = (in_a + in_b) / 2
    # two partitions into one set, or into single items, agree
    return 1.0 if most == chance else (together - chance) / (most - chance)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Computes the squared Fréchet distance of Gaussians, ``|m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2)``.

    It solves symmetric eigenvalue problems only, so covariances may be singular.

    Source: Dowson and Landau, 1982.

    Args:
        mean_a: (..., F) means.
        covariance_a: (..., F, F) covariances.
        mean_b: (..., F) means.
        covariance_b: (..., F, F) covariances.

    Returns:
        (...) squared distances, 0 or more up to rounding.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)
        >>> frechet_distance(torch.zeros(2), one, torch.ones(2), 4 * one)
        tensor(4., dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    inner = root @ covariance_b @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    traces = (covariance_a + covariance_b).diagonal(dim1=-2, dim2=-1).sum(-1)
    distance: Tensor = (mean_a - mean_b).square().sum(-1) + traces - 2 * cross
    return distance
