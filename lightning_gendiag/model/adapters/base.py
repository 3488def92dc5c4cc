"""What a recogniser of a kind of model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Need = Literal["sample", "encode", "decode", "reconstruct"]
"""An ability of a module that a diagnostic needs."""


@dataclass(frozen=True)
class Way:
    """One way in which a module samples, encodes, decodes or reconstructs."""

    need: Need
    name: str
    """What log lines call it, such as ``"self.model.sample(n)"``."""
    call: Callable[..., Any]
    """Of a sampler ``(n)`` or ``(n, labels)``; of an encoder ``(images)`` or ``(images, labels)``; of what reconstructs
    ``(images)``; of a decoder ``(latents)``."""
    takes_labels: bool = False
    """Whether a sampler or an encoder takes labels."""
    latent: tuple[int, ...] | None = None
    """Shape of one latent that a decoder takes; None where it is that of the encoder's latents."""
    frozen: bool = False
    """Whether it is of a part that is not trained, though the module is."""
    owner: str = ""
    """Name of the class that encodes."""
    assumes_prior: bool = False
    """Whether a sampler decodes normal noise, which makes sense only where that is the prior of the latents."""
    is_generator: bool = False
    """Whether the name of a decoder, or of what a sampler decodes with, says that it takes noise, as a GAN's generator."""
    is_sampler: bool = False
    """Whether its parameters show that it samples. Where it fails, it is not known which prior it draws from."""
    is_inverted: bool = False
    """Whether what decodes inverts this encoder, so that latents may have the shape of images."""
    has_other_prior: bool = False
    """Whether the latents that a decoder takes have another prior than N(0, 1), also where it inverts the encoder."""
    is_of_batch: bool = False
    """Whether a training step gives what decodes rows of its batch, alone or joined with noise."""
    is_guess: bool = False
    """Whether only the shape of what it returns says that it reconstructs."""
    path: str = ""
    """Of the part that makes the samples, where a sampler calls others for other ends."""
    is_reading: bool = False
    """Whether it only reads the output of the way before it differently, so that its failure says nothing more."""
    activation: str = ""
    """What makes data of the logits that its call would return otherwise; empty where it returns data."""


@dataclass(frozen=True)
class Context:
    """What is known of the data when ways are tried."""

    device: torch.device
    shape: tuple[int, ...] | None = None
    """Of one real image, (C, H, W); None before the first batch."""
    latent: tuple[int, ...] | None = None
    """Of one latent that the module's encoder returns; None where it is not known."""
    latent_dim: int | None = None
    """Length of the latents that the user stated."""
    conditional: bool = False
    """Whether the user says that the sampler takes labels."""
    one_hot: int = 0
    """Number of columns of the batches' one-hot labels; 0 where labels are given otherwise, or there are none."""
    classes: int = 0
    """Number of classes that the batches are known to have; 0 where they have no labels."""
    condition: Tensor | None = None
    """(K,) row or number that stands for the label of a real image and is no class, such as its attributes or an angle; None
    for classes."""
    count: int = 0
    """Number of batches of images in a training batch, of which the first is taken; 0 where it is not known."""
    is_paired: bool = False
    """Whether a training batch holds other images of the same shape, such as those of another domain."""
    is_gray: bool = False
    """Whether the images of a training batch are (N, H, H), without an axis for their channel."""
    noise: int | None = None
    """Length of the noise that a training step gives its generator; None where it is not known."""
    is_conditioned: bool = False
    """Whether training steps show that the model is always given the classes of its batch."""
    labelled: frozenset[str] = frozenset()
    """Paths of the parts that a training step gives classes as a second argument."""
    listed: frozenset[str] = frozenset()
    """Paths of the parts that a training step gives noise in a list."""
    of_batch: frozenset[str] = frozenset()
    """Paths of the parts that a training step always gives rows of its batch, alone or joined with noise."""

    @property
    def is_converted(self) -> bool:
        """Whether a training step may convert the labels to float32, since they are no classes and of another type."""
        return self.condition is not None and self.condition.dtype != torch.float32


Recogniser = Callable[[nn.Module, Context], Iterator[Way]]
"""From an isolated copy of a module to ways in order of preference, which are then tried with two samples."""
