"""A module that is looked at stays as it was: its modes, buffers, precision, and every random generator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_gendiag.functional import exact_matmul


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put every random generator that the training loop may use back as it was."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def seed_all(seed: int, device: torch.device) -> None:
    """Seed what :func:`random_state_kept` puts back, and no other device's generator, as ``torch.manual_seed`` would."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def untouched(module: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Show a module in evaluation mode, without gradients; put back its modes, buffers and, if asked, parameters.

    Modes are kept for each submodule, since a user may have frozen one.
    """
    modes = [(part, part.training) for part in module.modules()]
    held: list[dict[str, Any]] = [part._buffers for part in module.modules()]
    if parameters:
        held += [part._parameters for part in module.modules()]
    kept = [
        (own, name, tensor, None if tensor is None or nn.parameter.is_lazy(tensor) else tensor.detach().clone())
        for own in held
        for name, tensor in own.items()
    ]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for own, name, tensor, value in kept:
                own[name] = tensor
                if tensor is not None and value is not None and not torch.equal(tensor, value):
                    tensor.copy_(value)
        for part, mode in modes:
            part.training = mode


@contextmanager
def in_full_precision(module: nn.Module) -> Iterator[None]:
    """A module of half precision in float32, without autocast; then its very tensors again."""
    low = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [tensor.data for tensor in low]
    try:
        for tensor in low:
            tensor.data = tensor.data.float()
        with exact_matmul():
            yield
    finally:
        for tensor, data in zip(low, kept, strict=True):
            tensor.data = data


def uncompiled() -> Any:
    """Without ``torch.compile``: a look at other sizes would make it compile the training anew, for other numbers."""
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
