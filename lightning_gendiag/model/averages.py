"""Averaged (EMA) weights that a module keeps inside itself, recognised by names and shapes."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gendiag.model import compat

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

EMA_WORDS = {"ema", "emas", "swa"}
"""Words in names and types that say that something averages weights."""

AVERAGE_WORDS = {"average", "averaged", "avg", "shadow"}
"""Words that may also name a layer, such as ``avg_proj``, so what they name must be frozen or count its updates."""

FILLERS = {"net", "network", "model"}
"""Words that say little about which part is averaged."""

COUNTERS = ("n_averaged", "num_updates", "optimization_step", "updates", "initted")
"""Attributes that are 0 or False until the first update."""

SCOPES = ("ema_scope", "average_parameters", "ema_context", "ema_weights", "swap_ema", "use_ema", "with_ema", "ema")
"""Methods of a module that may be context managers in which it has its averaged weights."""

SURE_SCOPES = SCOPES[:2]
"""Those that are called even where it does not show beforehand that they are context managers."""

DEPTH = 2
"""Number of levels below the module at which averages are looked for; further below, names are those of layers."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class _Weights(NamedTuple):
    """Averaged weights: by their names in the part that they average, or in its order."""

    parameters: dict[str, Tensor] | list[Tensor]
    buffers: dict[str, Tensor]
    module: nn.Module | None = None
    """The module that they are the parameters of."""


class _Average(NamedTuple):
    """An object that keeps averaged weights; where several are given, one of them is the average."""

    path: str
    updated: bool
    weights: list[_Weights]


class _Match(NamedTuple):
    """A part of the module that averaged weights fit."""

    path: str
    is_exact: bool
    pairs: list[tuple[Tensor, Tensor]]
    """Averaged tensors and those of the part."""


def load_own_average(module: LightningModule) -> str | None:
    """Writes averaged weights that are found inside a copy of a module into the parts of the copy that they average.

    A context manager of the module, such as ``ema_scope()``, says best what its averaged weights are. Otherwise averages
    are children and attributes with a telling name or type, and the part that one of them averages is the one with the same
    names and shapes of parameters. Averages that were never updated are left out.

    Args:
        module: A copy of the module that is trained.

    Returns:
        What holds the averaged weights, such as ``"self.ema"`` or ``"ema_scope()"``; None where none were loaded.
    """
    with suppress(Exception), torch.no_grad():
        averages = _averages(module)
        if all(average.updated for average in averages) and (scope := _load_from_scope(module)):
            return scope
        return " and ".join(_load_matching(module, averages)) or None
    return None


def has_own_average(module: nn.Module) -> bool:
    """Returns whether a module has something that is named like an average of weights, whether or not it can be used."""
    with suppress(Exception):
        return bool(_averages(module)) or next(_scopes(module), None) is not None
    return False


# ---- context managers of the module ----


def _scopes(module: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    for path, part in (("", module), *((f"self.{name}.", child) for name, child in module.named_children())):
        for name in SCOPES:
            method = getattr(part, name, None)
            if isinstance(method, types.MethodType) and _is_scope(name, method):
                yield f"{path}{name}()", method


def _is_scope(name: str, method: types.MethodType) -> bool:
    """Whether a method can be called without arguments, and is known to be a context manager before it is called."""
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return False
    function = method.__func__
    decorated = inspect.isgeneratorfunction(inspect.unwrap(function)) and not inspect.isgeneratorfunction(function)
    return decorated or name in SURE_SCOPES


def _load_from_scope(module: nn.Module) -> str | None:
    """Returns the name of the first context manager that changes the module's parameters, and keeps what it changes.

    It is left again, since an abandoned generator restores the weights when it is collected, at a time of its own.
    """
    for name, scope in _scopes(module):
        raw = {key: tensor.clone() for key, tensor in _state(module)}
        averaged: dict[str, Tensor] = {}
        with suppress(Exception), scope():
            averaged = {key: t.clone() for key, t in _state(module) if key in raw and not torch.equal(t, raw[key])}
        is_average = not averaged.keys().isdisjoint(key for key, _ in module.named_parameters())
        # a scope that fails may have written a part of the weights
        for key, tensor in _state(module):
            if key in raw:
                tensor.copy_(averaged.get(key, raw[key]) if is_average else raw[key])
        if is_average:
            return name
    return None


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a module that can be compared, without those of averages."""
    named = (*module.named_parameters(), *module.named_buffers())
    dense = [(key, tensor.detach()) for key, tensor in named if tensor.layout is torch.strided]
    return [(key, tensor) for key, tensor in dense if not any(map(_says, key.split(".")))]


# ---- what keeps averaged weights ----


def _averages(module: nn.Module) -> list[_Average]:
    """What is named like an average and holds weights, in a module and in its parts."""
    found: list[_Average] = []
    inside: set[int] = set()
    for path, part in module.named_modules():
        if path.count(".") >= DEPTH or id(part) in inside:
            continue
        for name, value in _held(part):
            kind = type(value).__name__
            if not (_says(name) or _says(kind)) or id(value) in inside:
                continue
            is_counted = any(hasattr(value, counter) for counter in COUNTERS)
            weights = _weights_in(value, module, _says(name), is_counted)
            if not _words(f"{name}_{kind}") & EMA_WORDS and not is_counted:
                weights = [each for each in weights if _is_frozen(each)]
            if weights:
                inside.update(map(id, value.modules() if isinstance(value, nn.Module) else (value,)))
                found.append(_Average(f"{path}.{name}".lstrip("."), _is_updated(value), weights))
    return found


def _held(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes and children of a part, and the modules in dictionaries among them."""
    own = (pair for pair in vars(part).items() if pair[0] not in compat.PLAIN_ATTRIBUTES)
    for name, value in (*own, *part.named_children()):
        inner = dict(value.items()) if isinstance(value, (dict, nn.ModuleDict)) and not name.startswith("_") else {}
        if inner and _says(name) and all(isinstance(each, nn.Module) for each in inner.values()):
            yield from ((f"{name}.{key}", each) for key, each in inner.items())
        else:
            yield name, value


def _weights_in(holder: Any, module: nn.Module, is_named: bool, is_counted: bool) -> list[_Weights]:
    """The weights that an object keeps, the likeliest average first."""
    keys = getattr(holder, "m_name2s_name", None)
    if isinstance(keys, dict):
        return [_Weights({key: getattr(holder, kept) for key, kept in keys.items()}, {})] if keys else []
    held = {**getattr(holder, "__dict__", {}), **_children(holder)}
    kept = [weights for key, value in held.items() if _says(key) and (weights := _weights_of(value))]
    if kept and (is_named or is_counted or not isinstance(holder, nn.Module)):
        return kept
    inner = {key: value for key, value in held.items() if isinstance(value, nn.Module)}
    if not is_named:
        # a type says less than a name: that of a codebook may say that it averages vectors
        likely = [inner["module"]] if "module" in inner else []
    elif len(inner) == 1:
        likely = [holder, *inner.values()]
    else:
        likely = [holder, *(inner[key] for key in ("module", "model", "net") if key in inner)]
    online = _reachable(module, {id(holder)})
    return [weights for value in likely if id(value) not in online and (weights := _weights_of(value))]


def _children(holder: Any) -> dict[str, nn.Module]:
    return dict(holder.named_children()) if isinstance(holder, nn.Module) else {}


def _weights_of(value: Any) -> _Weights | None:
    """The weights in a module, in tensors by name, or in a list of tensors; None where there are none."""
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], nn.Module):
        # a list hides a module from the state that is saved
        value = value[0]
    if isinstance(value, nn.Module):
        parameters: dict[str, Tensor] = dict(value.named_parameters())
        return _Weights(parameters, dict(value.named_buffers()), value) if parameters else None
    tensors = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    if not any(tensor.ndim for tensor in tensors):
        return None
    return _Weights(dict(value), dict(value)) if isinstance(value, Mapping) else _Weights(list(tensors), {})


def _reachable(part: nn.Module, without: set[int]) -> dict[int, nn.Module]:
    """A module and the parts of it that are not held by certain parts alone, by their ids."""
    found: dict[int, nn.Module] = {}
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if id(part) not in without and id(part) not in found:
            found[id(part)] = part
            waiting += part.children()
    return found


def _is_updated(holder: Any) -> bool:
    """Whether an average was updated, as far as it counts its updates."""
    counts = [getattr(holder, name, None) for name in COUNTERS]
    return all(
        bool(count) for count in counts if isinstance(count, int) or (isinstance(count, Tensor) and count.numel() == 1)
    )


def _is_frozen(weights: _Weights) -> bool:
    parameters = weights.parameters
    return not any(t.requires_grad for t in (parameters.values() if isinstance(parameters, dict) else parameters))


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)}


@lru_cache(maxsize=4096)
def _says(name: str) -> bool:
    return not _words(name).isdisjoint(EMA_WORDS | AVERAGE_WORDS)


# ---- what is averaged ----


def _load_matching(module: nn.Module, averages: list[_Average]) -> list[str]:
    """Writes the averages into the parts that they average, and returns their names."""
    sources = [each.module for average in averages for each in average.weights if each.module is not None]
    outside = _reachable(module, set(map(id, sources)))
    shared = {id(tensor) for part in outside.values() for tensor in part.parameters(recurse=False)}
    averaged = {id(tensor) for source in sources for tensor in source.parameters()} - shared
    loaded: list[str] = []
    written: set[int] = set()
    for average in averages:
        matches = (_match(module, average.path, weights, averaged) for weights in average.weights)
        match = next((match for match in matches if match is not None), None)
        if match is None or not average.updated or not written.isdisjoint(id(tensor) for _, tensor in match.pairs):
            continue
        for source, target in match.pairs:
            target.detach().copy_(source)
        written.update(id(tensor) for _, tensor in match.pairs)
        loaded.append(f"self.{average.path}")
    return loaded


def _match(module: nn.Module, path: str, weights: _Weights, averaged: set[int]) -> _Match | None:
    """Returns the one part that weights average; None where none fits, or where several do and no name decides."""
    fitting: dict[tuple[int, ...], _Match] = {}
    for name, part in module.named_modules():
        match = _fit(name, part, weights, averaged)
        if match is not None:
            # a part and what it wraps may have the same parameters
            fitting.setdefault(tuple(id(tensor) for _, tensor in match.pairs), match)
    parent, _, name = path.rpartition(".")
    key = _key(name)
    matches = list(fitting.values())
    for is_better in (
        lambda match: match.is_exact,
        lambda match: _key(match.path.rpartition(".")[2]) == key,
        lambda match: _is_short_for(key, _key(match.path.rpartition(".")[2])),
        lambda match: match.path.rpartition(".")[0] == parent,
    ):
        matches = [match for match in matches if is_better(match)] or matches
    return matches[0] if len(matches) == 1 else None


def _key(name: str) -> str:
    """What a name says about which part is meant: ``"generator"`` for ``ema_generator``, ``"g"`` for ``netG_ema``."""
    words = [word.lower() for word in _WORD.findall(name) if not _says(word)]
    return "".join(word for word in words if word not in FILLERS) or "".join(words)


def _is_short_for(a: str, b: str) -> bool:
    return bool(a and b) and (a.startswith(b) or b.startswith(a))


def _fit(name: str, part: nn.Module, weights: _Weights, averaged: set[int]) -> _Match | None:
    """Returns how weights fit a part: all of its parameters have an average, apart from frozen ones."""
    own: dict[str, Tensor] = {key: t for key, t in part.named_parameters() if id(t) not in averaged}
    trained = {key: tensor for key, tensor in own.items() if tensor.requires_grad}
    if isinstance(weights.parameters, list):
        shapes = [tensor.shape for tensor in weights.parameters]
        for targets in (own, trained):
            if shapes == [tensor.shape for tensor in targets.values()]:
                return _Match(name, targets is own, _pairs(weights.parameters, targets.values()))
        return None
    buffers = dict(part.named_buffers())
    given = {key: tensor for key, tensor in weights.parameters.items() if key not in buffers}
    if not given or not trained.keys() <= given.keys() <= own.keys():
        return None
    if any(tensor.shape != own[key].shape for key, tensor in given.items()):
        return None
    kept = {key: t for key, t in weights.buffers.items() if key in buffers and _is_written(key, weights.buffers)}
    same = {key: tensor for key, tensor in kept.items() if tensor.shape == buffers[key].shape}
    pairs = _pairs(given.values(), (own[key] for key in given)) + _pairs(same.values(), (buffers[key] for key in same))
    return _Match(name, given.keys() == own.keys(), pairs)


def _pairs(sources: Any, targets: Any) -> list[tuple[Tensor, Tensor]]:
    return [(source, target) for source, target in zip(sources, targets, strict=True) if source is not target]


def _is_written(name: str, buffers: dict[str, Tensor]) -> bool:
    """Whether a buffer is none of a normalization layer whose statistics only the trained part collects."""
    mean = buffers.get(f"{name.rpartition('.')[0]}.running_mean".lstrip("."))
    return mean is None or bool(mean.any())
