"""Flows that are written without names of their own: a module whose ``forward`` another method, or a parameter, inverts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from lightning_gendiag.model.adapters.base import Context, Way
from lightning_gendiag.model.adapters.own import (
    inverse_of,
    is_discriminator,
    noise_of,
    of_rows,
    sampled_by,
    signature_of,
    takes_noise,
    with_children,
)

DATA = re.compile(r"x|imgs?|images?|data|inputs?", re.IGNORECASE)
"""Names of parameters that take data."""


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
        if takes_noise(part) or (_takes_data(inverse.call) and not _takes_data(part)):
            there, back = back, there
        yield Way("encode", f"{there[0]}(images)", there[1], is_inverted=True)
        yield Way("encode", f"{there[0]}(images.flatten(1))", partial(of_rows, there[1]), is_inverted=True)
        if context.latent is None:
            continue
        yield Way("decode", back[0], back[1], latent=context.latent)
        name, draw = f"{back[0]} from {noise_of(context.latent)}", partial(sampled_by, back[1], module, context.latent)
        yield Way("sample", name, draw, latent=context.latent, assumes_prior=True)


def _takes_data(target: Callable[..., Any]) -> bool:
    signature = signature_of(target)
    first = "" if signature is None else next(iter(signature.parameters), "")
    return DATA.fullmatch(first) is not None
