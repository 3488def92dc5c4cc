"""Converts everything that a module holds to plain values that can be compared."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Mapping
from inspect import getgeneratorlocals
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LIGHTNINGS_OWN = {"_trainer", "_fabric", "_fabric_optimizers", "_metric_attributes", "_current_fx_name"}
"""Attributes that belong to the run and not to the model."""


def everything(value: Any, depth: int = 6) -> Any:
    """Returns modules, containers, tensors, generators and attributes as nested plain values."""
    if isinstance(value, nn.Module) and depth > 0:
        own = {
            # the keys of hooks come from a counter that all modules share
            name: everything(list(held.values()) if name.endswith("_hooks") else held, depth - 1)
            for name, held in vars(value).items()
            if name not in LIGHTNINGS_OWN | {"_parameters", "_buffers", "_modules"}
        }
        tensors = {**value._parameters, **value._buffers}
        grads = {name: everything(p.grad) for name, p in value._parameters.items() if p is not None}
        slots = {name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())}
        own |= {name: everything(getattr(value, name, None), depth - 1) for name in sorted(slots)}
        children = {name: everything(child, depth) for name, child in value._modules.items()}
        return {"attributes": own, "tensors": everything(tensors), "grads": grads, "children": children}
    if isinstance(value, Tensor):
        if nn.parameter.is_lazy(value):
            return "lazy"
        plain = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        # as text, since nan is not equal to itself
        return str(value.dtype), str(value.layout), value.requires_grad, str(plain.tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return everything(value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Mapping):
        return {str(key): everything(held, depth - 1) for key, held in value.items()} if depth else len(value)
    if isinstance(value, (list, tuple, set)) or type(value).__name__ == "deque":
        return [everything(held, depth - 1) for held in value] if depth else len(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, RemovableHandle):
        # it holds a number of the same counter
        return "RemovableHandle"
    if not depth or isinstance(value, (type, types.ModuleType)):
        return type(value).__name__
    if isinstance(value, types.FunctionType):
        made_with = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__name__, everything([made_with, value.__defaults__, value.__kwdefaults__], depth - 1)
    if isinstance(value, functools.partial):
        return everything([value.func, value.args, value.keywords], depth - 1)
    if isinstance(value, types.MethodType):
        return everything([value.__func__, value.__self__], depth - 1)
    if isinstance(value, types.BuiltinFunctionType):
        return everything(value.__self__, depth - 1)
    if isinstance(value, (count, types.GeneratorType)):
        return repr(value) if isinstance(value, count) else everything(getgeneratorlocals(value), depth - 1)
    if hasattr(value, "cache_info"):
        return str(value.cache_info()), everything(value.__wrapped__, depth - 1)
    slots = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return type(value).__name__, everything({**getattr(value, "__dict__", {}), **held}, depth - 1)
