"""Finds out by a training step what the spread beside the mean of an encoder is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_gendiag.model.denoising import TrainingStep
from lightning_gendiag.model.posterior import SPREAD_NAMES, std_of

DRAWS = ("randn", "randn_like", "normal", "normal_")
"""Functions that draw normal noise."""

PRODUCTS = ("mul", "rmul", "imul", "multiply", "addcmul")
"""Names of products without the underscores of operators."""

MOVES = ("to", "type_as", "view", "reshape", "detach", "cpu", "cuda", "float", "double")
"""Functions after which noise is still that noise."""

RELATIVE = 1e-3
"""Relative error of a standard deviation up to which it is the same."""

OFFSETS = (1e-6, 2e-3)
"""Absolute errors up to which it is: that of rounding, and then a constant that keeps it from being 0."""


class _Scales(TorchFunctionMode):
    """Records what normal noise is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        # they are held, so that no two share an id
        self._draws: dict[int, Tensor] = {}
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        name = getattr(func, "__name__", "")
        is_of_noise = any(id(value) in self._draws for value in given)
        if name == "normal" and len(given) == 2:
            self.found.append(given[1].detach().clone())
        elif is_of_noise and name.strip("_") in PRODUCTS:
            self.found += [value.detach().clone() for value in given if id(value) not in self._draws]
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and (name in DRAWS or (is_of_noise and name in MOVES)):
            self._draws[id(output)] = output
        return output


def scales_in(step: TrainingStep, seed: int, shape: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a training step as far as it goes; inside ``isolated``.

    Args:
        step: Of the copy.
        seed: Of the step.
        shape: Of the data of the batch.

    Returns:
        What normal noise was multiplied by, and what parts of the module were given of the shape of the data.
    """
    with _Scales() as scales:
        calls, _ = step.calls(seed, may_fail=True)
    firsts = [call.args[0] for call in calls if call.args and isinstance(call.args[0], Tensor)]
    given = {id(first): first for first in firsts if first.shape == tuple(shape) and first.is_floating_point()}
    return scales.found, list(given.values())


def spread_shown(values: Tensor, scales: Sequence[Tensor]) -> str | None:
    """Returns which spread makes the values of an encoder (n, ...) one of some scales, or None where not exactly one does.

    Example:
        >>> spread_shown(torch.tensor([[-1.0, 2.0]]), [torch.tensor([[0.3133, 2.1269]]) + 1e-4])
        'softplus_std'
    """
    scales = [scale.double() for scale in _alike(scales, values)]
    for offset in OFFSETS:
        kinds = [kind for kind in SPREAD_NAMES if any(_fits(values, kind, scale, offset) for scale in scales)]
        if kinds:
            return kinds[0] if len(kinds) == 1 else None
    return None


def _alike(scales: Sequence[Tensor], values: Tensor) -> Iterator[Tensor]:
    """Yields scales of the shape of values, of several draws for each row the first."""
    for scale in scales:
        if scale.numel() and scale.shape[max(0, scale.ndim - values.ndim) :] == values.shape:
            yield scale.reshape(-1, *values.shape)[0]


def _fits(values: Tensor, kind: str, scale: Tensor, offset: float) -> bool:
    try:
        return torch.allclose(std_of(values, kind), scale, rtol=RELATIVE, atol=offset)
    except ValueError:
        return False
