"""Real images that need no download: scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def digits(size: int = 32) -> tuple[Tensor, Tensor]:
    """Images (1797, 1, size, size) in -1..1, enlarged from 8x8, and their labels (1797,)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(data.target).long()


def digit_batches(batch_size: int = 64, size: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches of (images, labels)."""
    return DataLoader(TensorDataset(*digits(size)), batch_size=batch_size, shuffle=True, drop_last=True)
