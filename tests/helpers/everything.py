"""Converts everything that a module holds to plain values that can be compared."""

from __future__ import annotations

import random
import types
from collections.abc import Mapping
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
    if depth and hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
        return type(value).__name__, everything(vars(value), depth - 1)
    return type(value).__name__
