"""Random generators: the global ones, and those that a module, a dataset or a function keeps."""

from __future__ import annotations

import copy
import gc
import inspect
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
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

CONTAINERS = (dict, OrderedDict, list, tuple, set)
"""Kinds of containers that hold nothing beside their items."""

METHOD_DEPTH, GLOBAL_DEPTH = 6, 3
"""Numbers of references that are followed from what a class holds, and from what its functions name in their files."""

PACKAGES = {
    *sys.stdlib_module_names, "builtins", "lightning", "lightning_fabric", "lightning_gendiag", "lightning_utilities", "numpy",
    "pytorch_lightning", "tensorboard", "torch", "torchmetrics", "torchvision", "tqdm",
}  # fmt: skip
"""Packages that hold none of a user's code, and keep no generators beside the global ones."""

GLOBAL_ONES = {id(torch.default_generator), id(random.random.__self__), id(np.random.rand.__self__)}  # type: ignore[attr-defined]
"""The global generators, which are restored and seeded in any case."""


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

    def visit(values: Iterable[object], depth: int) -> None:
        for value in values:
            role = _role(type(value))
            if role == "leaf" or (type(value) in CONTAINERS and not value):
                # each part of a module has ten empty ones
                continue
            if role == "generator":
                if id(value) not in GLOBAL_ONES:
                    found.setdefault(id(value), cast(Generator, value))
            elif visited.get(id(value), 0) < depth:
                visited[id(value)] = depth
                if role == "module":
                    parts = list(cast(nn.Module, value).modules())
                    visited.update((id(part), DEPTH) for part in parts)
                    for part in parts:
                        visit(_referents(part), DEPTH)
                elif role == "class":
                    visit(_class_attributes(cast(type, value)), min(depth - 1, METHOD_DEPTH))
                elif role == "function":
                    visit(_referents(value), depth - 1)
                    visit(_globals(cast(types.FunctionType, value)), min(depth - 1, GLOBAL_DEPTH))
                else:
                    visit(_referents(value), depth - 1)

    visit(owners, DEPTH)
    return list(found.values())


_WITHOUT_GENERATORS: tuple[type, ...] = (
    str, bytes, int, float, type(None), Tensor, np.ndarray, torch.dtype, torch.device, types.ModuleType, types.CodeType,
    random.SystemRandom, *weakref.ProxyTypes,
)  # fmt: skip


def _role(kind: type[Any]) -> str:
    """Returns how to search objects of a type: as "generator", "leaf", "module", "class", "function" or "other"."""
    try:
        return _known_role(cast(Hashable, kind))
    except TypeError:
        # a metaclass without a hash
        return _known_role.__wrapped__(kind)


@lru_cache(maxsize=4096)
def _known_role(kind: type[Any]) -> str:
    if issubclass(kind, _WITHOUT_GENERATORS) or compat.is_a(kind, "Trainer", "TrainerView", "Fabric", "Member"):
        return "leaf"
    if issubclass(kind, Generator):
        return "generator"
    if issubclass(kind, (type, types.FunctionType)):
        return "class" if issubclass(kind, type) else "function"
    return "module" if issubclass(kind, nn.Module) else "other"


def _referents(value: Any) -> Iterable[object]:
    """Returns what an object refers to; of a function what it was made with."""
    if isinstance(value, types.FunctionType):
        return value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)
    if isinstance(value, types.GeneratorType):
        return inspect.getgeneratorlocals(value).values()
    if isinstance(value, (dict, list, tuple, set, deque)) and len(value) > LARGEST_CONTAINER:
        return ()
    return gc.get_referents(value)


def _class_attributes(kind: type) -> Iterator[object]:
    """Yields what the user's classes among a class and its bases hold: methods, properties and class attributes."""
    for base in kind.__mro__:
        if _package(base) not in PACKAGES:
            yield from tuple(vars(base).values())


def _globals(function: types.FunctionType) -> Iterator[object]:
    """Yields what a user's function names in its file, and in other files that it names, where a generator may be.

    These are generators, containers, and the user's own objects, classes and functions.
    """
    names, namespace = _names(function.__code__), function.__globals__
    own = str(namespace.get("__name__")).partition(".")[0]
    if own in PACKAGES:
        return
    for name in names:
        value = namespace.get(name)
        if type(value) is not types.ModuleType:
            values = [value]
        elif _is_near(value.__name__, own):
            values = [vars(value).get(other) for other in names]
        else:
            continue
        yield from (value for value in values if _is_searched(value, own))


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Returns the names of globals and attributes in a function and in the functions that it contains."""
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def _is_searched(value: object, own: str) -> bool:
    role = _role(type(value))
    if role in ("class", "function"):
        return _is_near(str(getattr(value, "__module__", "")), own)
    held = (dict, list, tuple, set, deque, partial, types.MethodType, types.BuiltinMethodType)
    return role in ("generator", "module") or (
        role == "other" and (isinstance(value, held) or _is_near(str(type(value).__module__), own))
    )


@lru_cache(maxsize=4096)
def _is_near(module: str, own: str) -> bool:
    """Whether a file is of the user's project and not of another installed package."""
    package = module.partition(".")[0]
    if package == own or package in PACKAGES:
        return package == own
    path = str(getattr(sys.modules.get(package), "__file__", None) or "")
    return not any(folder in path for folder in ("site-packages", "dist-packages"))


def _package(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


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
