"""Digits of MNIST as several studies use them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.zoo.data import load

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images and labels of training, and those that are held out."""


def split_digits(held_out: int, seed: int) -> Split:
    """Returns the digits of MNIST at 16x16 with their labels, in an order by the seed: those to train on, and some others."""
    data = load("mnist")
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    images, labels = data.images[order], data.labels[order]
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


def padded_digits() -> tuple[Tensor, Tensor]:
    """Returns 5,000 digits of MNIST with a black margin, at 32x32, and their labels."""
    data = load("mnist28")
    return F.pad(data.images, (2, 2, 2, 2), value=-1.0), data.labels
