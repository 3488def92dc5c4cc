"""Flows that are written without names of their own: a module whose ``forward`` another method, or a parameter, inverts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_gendiag.model.adapters.base import Context, Way
from lightning_gendiag.model.adapters.own import NOISE, inverse_of, is_discriminator, normal, signature_of


def flows(module: nn.Module, context: Context) -> Iterator[Way]:
    """Yields how a flow maps data to latents and back.

    Which direction is which is told by the names of the parameters: what takes ``z`` makes data of noise, and otherwise
    ``forward`` is given data. Whether it is a flow shows when data are encoded and decoded again.
    """
    parts = {"self": module, **{f"self.{name}": child for name, child in module.named_children()}}
    for path, part in parts.items():
        name = path.rpartition(".")[2]
        inverse = inverse_of(part)
        if inverse is None or is_discriminator(name, part):
            continue
        there: tuple[str, Callable[..., Any]] = (f"{path}.forward", part)
        back: tuple[str, Callable[..., Any]] = (f"{path}.{inverse.name}", inverse.call)
        if _takes_noise(part) or (_takes_data(inverse.call) and not _takes_data(part)):
            there, back = back, there
        yield Way("encode", f"{there[0]}(images)", there[1], is_inverted=True)
        yield Way("encode", f"{there[0]}(images.flatten(1))", partial(_of_rows, there[1]), is_inverted=True)
        if context.latent is None:
            continue
        yield Way("decode", back[0], back[1], latent=context.latent)
        shown = ", ".join(map(str, context.latent))
        draw = partial(_drawn, back[1], module, context.latent)
        yield Way(
            "sample", f"{back[0]} from normal noise (n, {shown})", draw, latent=context.latent, assumes_prior=True
        )


def _first_name(target: Callable[..., Any]) -> str:
    signature = signature_of(target)
    return "" if signature is None else next(iter(signature.parameters), "")


def _takes_noise(target: Callable[..., Any]) -> bool:
    return NOISE.fullmatch(_first_name(target)) is not None


def _takes_data(target: Callable[..., Any]) -> bool:
    return re.fullmatch(r"x|imgs?|images?|data|inputs?", _first_name(target), re.IGNORECASE) is not None


def _of_rows(encode: Callable[..., Any], images: Tensor) -> Any:
    return encode(images.flatten(1))


def _drawn(decode: Callable[..., Any], module: nn.Module, shape: tuple[int, ...], n: int) -> Any:
    return decode(normal(module, n, shape))
