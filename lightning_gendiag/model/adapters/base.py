"""What a recogniser of a kind of model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Need = Literal["sample", "encode", "decode", "reconstruct"]
"""An ability of a module that a diagnostic needs."""


@dataclass(frozen=True)
class Way:
    """One way in which a module samples, encodes, decodes or reconstructs."""

    need: Need
    name: str
    """What log lines call it, such as ``"self.model.sample(n)"``."""
    call: Callable[..., Any]
    """Of a sampler ``(n)`` or ``(n, labels)``; of an encoder and of what reconstructs ``(images)``; of a decoder
    ``(latents)``."""
    takes_labels: bool = False
    """Whether a sampler takes labels."""


@dataclass(frozen=True)
class Context:
    """What is known of the data when ways are tried."""

    shape: tuple[int, ...] | None
    """Of one real image, (C, H, W), or of one row; None before the first batch."""
    device: torch.device


Recogniser = Callable[[nn.Module, Context], Iterator[Way]]
"""From an isolated copy of a module to ways in order of preference, which are then tried with two samples."""
