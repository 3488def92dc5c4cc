"""Shows by a training step what noise a generator is given, and lets training steps make samples where nothing else does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_gendiag.model.adapters.own import is_discriminator
from lightning_gendiag.model.denoising import TrainingStep
from lightning_gendiag.model.outputs import data_in

LEAST_NUMBERS = 32
"""Number of values of noise below which its distribution is not judged."""

MOST_EQUAL = 0.02
"""Largest share of zeros and ones in normal noise; more are one-hot rows beside it, or binary codes."""


class Fake(NamedTuple):
    """What a part returned in a training step, as far as it is data."""

    path: str
    number: int
    """Of the call, among those of the part in that step."""
    data: Tensor
    """(rows, *shape)."""
    given: tuple[Any, ...]


class Fakes(NamedTuple):
    """What a training step of a module with a discriminator shows of its generator."""

    maker: tuple[str, int] | None
    """Path of the part that makes data of the draws of a step, and the number of its call; None where there is none."""
    noise: Tensor | None
    """(rows, L) noise that a generator is given; None where it is not known."""


def find_fakes(step: TrainingStep, shape: tuple[int, ...], seed: int) -> Fakes:
    """Finds what makes data in a training step, whatever it is given; inside ``isolated``.

    It is the first part, the outermost first, whose output depends on the draws of the step and not on its batch: what
    translates, reconstructs or augments real images depends on the batch, and so does what takes labels of the batch.

    Args:
        step: Of the copy.
        shape: Of one image or row.
        seed: Of the step.
    """
    turned = TrainingStep(step.module, apply_to_collection(step.batch, Tensor, _turned), step.rows, step.seed)
    fakes = list(_fakes_in(step, shape, seed))
    again = {fake[:2]: fake.data for fake in _fakes_in(turned, shape, seed)}
    other = {fake[:2]: fake.data for fake in _fakes_in(step, shape, seed + 1)}
    makers = (fake[:2] for fake in fakes if _is_drawn(fake.data, again.get(fake[:2]), other.get(fake[:2])))
    return Fakes(next(makers, None), next((z for fake in fakes if (z := _noise_in(fake)) is not None), None))


def fakes_of(step: TrainingStep, maker: tuple[str, int], shape: tuple[int, ...], n: int) -> Tensor:
    """Returns data (n, *shape) that training steps make, with seeds that the global generator draws; inside ``isolated``."""
    rows: list[Tensor] = []
    while sum(map(len, rows)) < n:
        output = step.output(*maker, int(torch.randint(2**31 - 1, ())))
        rows.append(data_in(output, step.rows, shape))
    return torch.cat(rows)[:n]


def is_normal(noise: Tensor) -> bool | None:
    """Returns whether noise may be of N(0, 1): not where all of it is in -1 to 1, or a part of it is zeros and ones.

    Example:
        >>> is_normal(torch.linspace(-1, 1, 64))
        False
    """
    if noise.numel() < LEAST_NUMBERS:
        return None
    return bool((noise.abs() > 1).any()) and float(((noise == 0) | (noise == 1)).double().mean()) <= MOST_EQUAL


def _turned(rows: Tensor) -> Tensor:
    return rows.flip(0) if rows.ndim else rows


def _is_drawn(data: Tensor, again: Tensor | None, other: Tensor | None) -> bool:
    """Whether data are the same with the same draws and another batch, and differ with other draws."""
    if again is None or other is None:
        return False
    return torch.allclose(data, again, atol=1e-5) and not torch.allclose(data, other, atol=1e-5)


def _fakes_in(step: TrainingStep, shape: tuple[int, ...], seed: int) -> Iterator[Fake]:
    """Yields the calls of a training step that return data, without those of discriminators, the outermost first."""
    calls, _ = step.calls(seed, may_fail=True)
    counts: Counter[str] = Counter()
    for call in sorted(calls, key=lambda call: len(call.path.split(".")) if call.path else 0):
        number = counts[call.path]
        counts[call.path] += 1
        if not _judges(step.module, call.path):
            with suppress(ValueError):
                yield Fake(call.path, number, data_in(call.output, step.rows, shape), call.args)


def _judges(module: nn.Module, path: str) -> bool:
    """Whether a part is a discriminator, or belongs to one."""
    name, parent = path.rpartition(".")[2], path.rpartition(".")[0]
    return bool(path) and (is_discriminator(name, module.get_submodule(path)) or _judges(module, parent))


def _noise_in(fake: Fake) -> Tensor | None:
    """The noise (rows, L) that a part is given first, also as maps of one pixel."""
    z = fake.given[0] if fake.given else None
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim < 2 or len(z) != len(fake.data):
        return None
    return z.detach().flatten(1) if z.shape[1:].numel() == z.shape[1] else None
