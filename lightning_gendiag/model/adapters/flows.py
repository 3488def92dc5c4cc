"""Flows that are written without names of their own: a module whose ``forward`` another method, or a parameter, inverts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gendiag.model.adapters.base import Context, Way
from lightning_gendiag.model.adapters.libraries import divided
from lightning_gendiag.model.adapters.own import (
    inverse_of,
    is_discriminator,
    noise_of,
    normal,
    of_rows,
    sampled_by,
    signature_of,
    takes_noise,
    with_children,
)

DATA = re.compile(r"x|imgs?|images?|data|inputs?", re.IGNORECASE)
"""Names of parameters that take data."""

EXACT = "reconstruct"
"""Parameter of an inverse that takes latents as they are, where it otherwise takes the noise of a learned prior."""


def flows(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields how a flow maps data to latents and back.

    Which direction is which is told by the names of the parameters: what takes ``z`` makes data of noise, and otherwise
    ``forward`` is given data. Whether it is a flow shows when data are encoded and decoded again.
    """
    for path, part in with_children(module).items():
        inverse = inverse_of(part)
        if inverse is None or is_discriminator(path.rpartition(".")[2], part):
            continue
        there: tuple[str, Callable[..., Any]] = (f"{path}.forward", part)
        back: tuple[str, Callable[..., Any]] = (f"{path}.{inverse.name}", inverse.call)
        from_noise = takes_noise(part) and not takes_noise(inverse.call)
        if from_noise or (_takes_data(inverse.call) and not _takes_data(part)):
            there, back = back, there
        yield Way("encode", f"{there[0]}(images)", partial(_encoded, there[1]), is_inverted=True)
        yield Way(
            "encode", f"{there[0]}(images.flatten(1))", partial(_encoded, partial(of_rows, there[1])), is_inverted=True
        )
        if context.latent is None:
            continue
        name, decode, scales = back[0], back[1], _Scales(module, there[1], context)
        learns_prior = _may_be_exact(decode)
        if learns_prior:
            name, decode = f"{name}({EXACT}=True)", partial(decode, **{EXACT: True})
        yield Way("decode", name, partial(scales.given_to, decode), latent=context.latent, has_other_prior=learns_prior)
        name, draw = f"{back[0]} from {noise_of(context.latent)}", partial(scales.given_to, back[1])
        sample = partial(sampled_by, draw, module, context.latent)
        yield Way("sample", name, sample, latent=context.latent, assumes_prior=True)


class _Scales:
    """The latents of a multiscale flow, which are a list of one tensor for each scale (https://arxiv.org/abs/1605.08803).

    Args:
        module: The copy of the module.
        encode: From data to latents.
        context: What is known of the data.
    """

    def __init__(self, module: nn.Module, encode: Callable[..., Any], context: Context) -> None:
        self.module, self.encode, self.shape, self.latent = module, encode, context.shape, context.latent

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the latents of each scale; empty where they are a single tensor."""
        if self.shape is None or self.latent != (math.prod(self.shape),):
            return []
        # any data do, without a step of the generators that samples are drawn from
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(2, *self.shape, generator=generator, dtype=torch.float32).to(normal(self.module, 0, ()))
        # a flow of rows, which have one scale, takes no images
        with suppress(Exception):
            return [tuple(scale.shape[1:]) for scale in scales_in(self.encode(data), 2, math.prod(self.shape))]
        return []

    def given_to(self, decode: Callable[..., Any], z: Tensor) -> Any:
        """Decodes latents (n, ...), given as one tensor for each scale where there are several."""
        return _summed(decode(divided(z.flatten(1), self.shapes) if self.shapes else z))


def scales_in(output: Any, n: int, size: int) -> list[Tensor]:
    """Returns the latents of each scale in what a flow returned for n rows of data; empty where there are not several.

    Args:
        output: What was returned.
        n: Number of rows.
        size: Number of values of a row, which all scales have together.
    """
    if not isinstance(output, (tuple, list)):
        return []
    tensors = [part for part in output if isinstance(part, Tensor) and part.ndim > 1 and len(part) == n]
    if len(tensors) == len(output) > 1 and sum(part[0].numel() for part in tensors) == size:
        return tensors
    return next((found for part in output if (found := scales_in(part, n, size))), [])


def _summed(output: Any) -> Any:
    """Returns the output of a flow, with a log-determinant that it has for each dimension summed (n,)."""
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        return output
    values, volume = output
    if not all(isinstance(part, Tensor) and part.ndim > 1 for part in output) or values.shape != volume.shape:
        return output
    return values, volume.flatten(1).sum(1)


def _encoded(encode: Callable[..., Any], images: Tensor) -> Any:
    """Encodes images; the latents of several scales become rows (n, L), with the log-determinant if it is the only sum."""
    output = _summed(encode(images))
    scales = scales_in(output, len(images), images[0].numel())
    if not scales:
        return output
    # log-likelihoods have the same shape, and nothing tells them from log-determinants
    sums = [part for part in output if isinstance(part, Tensor) and part.shape == (len(images),)]
    latents = torch.cat([scale.flatten(1) for scale in scales], 1)
    return (latents, *sums) if len(sums) == 1 else latents


def _may_be_exact(inverse: Callable[..., Any]) -> bool:
    signature = signature_of(inverse)
    parameter = None if signature is None else signature.parameters.get(EXACT)
    return parameter is not None and parameter.default is False


def _takes_data(target: Callable[..., Any]) -> bool:
    signature = signature_of(target)
    first = "" if signature is None else next(iter(signature.parameters), "")
    return DATA.fullmatch(first) is not None
