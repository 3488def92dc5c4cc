"""Random generators: the global ones, and those that a module, a dataset or a function keeps."""

from __future__ import annotations

import copy
import gc
import inspect
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gendiag.model import compat

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random

DEPTH = 8
"""Number of references that are followed from an attribute to a generator."""

LARGEST_CONTAINER = 256
"""Generators stand in short containers, data in long ones."""


@contextmanager
def random_state_kept(device: torch.device, *owners: object) -> Iterator[None]:
    """Restores the global random generators afterwards, and those that given objects own."""
    saved: list[Callable[[], None]] = [_saved(torch.default_generator), _saved_python(), _saved_numpy()]
    if device.type == "cuda":
        cuda = torch.cuda.get_rng_state(device)
        saved.append(lambda: torch.cuda.set_rng_state(cuda, device))
    if device.type == "mps":
        mps = torch.mps.get_rng_state()
        saved.append(lambda: torch.mps.set_rng_state(mps))
    saved += [_saved(generator) for generator in own_generators(owners)]
    try:
        yield
    finally:
        for restore in saved:
            restore()


def seed_all(seed: int, device: torch.device, *owners: object) -> None:
    """Seeds what :func:`random_state_kept` restores, and no other device's generator as ``torch.manual_seed`` would."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)
    for number, generator in enumerate(own_generators(owners), 1):
        own = (seed + 104729 * number) % 2**32
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        else:
            generator.seed(own)


def own_generators(owners: Iterable[object]) -> list[Generator]:
    """Returns the random generators that modules, datasets, loaders and functions refer to, in a fixed order."""
    found: dict[int, Generator] = {}
    # the largest depth that an object was visited with
    visited: dict[int, int] = {}

    def visit(value: object, depth: int) -> None:
        role = _role(type(value))
        if role == "generator":
            found.setdefault(id(value), cast(Generator, value))
        elif role != "leaf" and visited.get(id(value), 0) < depth:
            visited[id(value)] = depth
            if role == "module":
                parts = list(cast(nn.Module, value).modules())
                visited.update((id(part), DEPTH) for part in parts)
                for part in parts:
                    for attribute in _referents(part):
                        visit(attribute, DEPTH)
            else:
                for child in _referents(value):
                    visit(child, depth - 1)

    for owner in owners:
        visit(owner, DEPTH)
    return list(found.values())


_WITHOUT_GENERATORS: tuple[type, ...] = (
    str, bytes, int, float, type(None), Tensor, np.ndarray, torch.dtype, torch.device, type, types.ModuleType, types.CodeType,
    *weakref.ProxyTypes,
)  # fmt: skip


def _role(kind: type[Any]) -> str:
    """Returns ``"generator"``, ``"leaf"``, ``"module"`` or ``"other"``: what objects of a type are to the search."""
    try:
        return _known_role(cast(Hashable, kind))
    except TypeError:
        # a metaclass without a hash
        return _known_role.__wrapped__(kind)


@lru_cache(maxsize=4096)
def _known_role(kind: type[Any]) -> str:
    if issubclass(kind, Generator):
        return "generator"
    if issubclass(kind, _WITHOUT_GENERATORS) or compat.is_a(kind, "Trainer", "TrainerView", "Fabric"):
        return "leaf"
    return "module" if issubclass(kind, nn.Module) else "other"


def _referents(value: Any) -> Iterable[object]:
    """Returns what an object refers to; of a function what it was made with, and not the globals of its file."""
    if isinstance(value, types.FunctionType):
        return value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)
    if isinstance(value, types.GeneratorType):
        return inspect.getgeneratorlocals(value).values()
    if isinstance(value, (dict, list, tuple, set, deque)) and len(value) > LARGEST_CONTAINER:
        return ()
    return gc.get_referents(value)


def _saved(generator: Generator) -> Callable[[], None]:
    """Returns what puts the state back that a generator has now."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return partial(_set_state, generator, state)
    if isinstance(generator, np.random.Generator):
        bits = copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(generator.bit_generator, "state", bits)
    if isinstance(generator, np.random.RandomState):
        numpy_state = generator.get_state()
        return lambda: generator.set_state(numpy_state)
    python_state = generator.getstate()
    return lambda: generator.setstate(python_state)


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _saved_python() -> Callable[[], None]:
    state = random.getstate()
    return lambda: random.setstate(state)


def _saved_numpy() -> Callable[[], None]:
    state = np.random.get_state()  # noqa: NPY002
    return lambda: np.random.set_state(state)  # noqa: NPY002
