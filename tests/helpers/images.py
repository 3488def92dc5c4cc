"""Images whose regions are known."""

from __future__ import annotations

import torch
from torch import Tensor


def blocks(height: int = 12, width: int = 12) -> Tensor:
    """Returns a map of four regions of different sizes."""
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[: height // 2, width // 2 :] = 1
    labels[height // 2 :, : width // 3] = 2
    labels[-height // 4 :, -width // 4 :] = 3
    return labels


def regional_images(labels: Tensor, n: int, seed: int = 0, channels: int = 1) -> Tensor:
    """Returns images whose pixels share a random number within each region, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    regions = int(labels.max()) + 1
    common = torch.randn(n, channels, regions, generator=generator)
    noise = torch.randn(n, channels, *labels.shape, generator=generator)
    return common[:, :, labels] + 0.3 * noise
