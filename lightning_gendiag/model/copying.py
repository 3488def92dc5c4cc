"""An isolated copy of a module, so that evaluating it cannot change the module that is trained.

A plain ``copy.deepcopy`` fails as a whole where one object cannot be copied: a generated batch that is kept with its
graph, as in Lightning's own GAN example, a lock or an open file. It also shares functions and weak references, which lead
back to the module. So a module is copied part by part, and all that it refers to object by object, by the rules of
``copy``; what has no copy is shared.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import operator
import re
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gendiag.model import compat

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

SHARED_KINDS = (
    "Trainer", "Fabric", "Strategy", "Accelerator", "LightningDataModule", "Dataset", "DataLoader", "Optimizer",
    "LightningOptimizer", "LRScheduler", "Logger", "SummaryWriter", "memmap", "Session", "Member",
)  # fmt: skip
"""Classes whose objects a copy shares with the module, since they are large or belong to the run."""

OWNERS = ("lightning", "pytorch_lightning", "torch", "numpy", "logging", "lightning_gendiag")
"""Packages of these classes; classes of the user's own with such a name are copied."""

SHARED_PACKAGES = (
    "threading", "queue", "concurrent", "multiprocessing", "asyncio", "tensorboard", "matplotlib", "torch._dynamo",
)  # fmt: skip
"""Packages whose objects belong to threads, to windows or to the compiler: half of a copy would be of the original."""

ATOMIC = {type(None), bool, int, float, complex, str, bytes, range, types.ModuleType, types.CodeType}
"""What cannot change is not copied."""

RUNNING = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)

ITERATORS = ("builtins", "itertools")
"""Packages of iterators that have no copy where what they iterate over has none."""

WEAK = (weakref.ReferenceType, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)

DEPTH = 8
"""Number of references that are followed from a user's callable to a part of the module."""

LARGEST_CONTAINER = 256
"""Parts of a module stand in short containers, data in long ones."""


class ModuleCopy(NamedTuple):
    """A copy of a module."""

    module: LightningModule
    tensors: dict[tuple[str, str], Tensor]
    """The storage of its tensors, which the next copy takes over."""
    parts: dict[int, Any]
    """The copy of each part, by the part's id."""
    alive: list[Any]
    """What the copy refers to by weak references."""

    def release(self) -> dict[tuple[str, str], Tensor]:
        """Empties the parts, which may refer to each other, and returns the storage of their tensors."""
        for part in self.parts.values():
            vars(part).clear()
            if hasattr(type(part), "__del__"):
                # what a user's class does then is for the module that is trained
                part.__class__ = nn.Module
        self.alive.clear()
        return self.tensors

    def counterpart(self, value: Any) -> Any:
        """Returns a user's callable as it is on the copy: a part, a method of a part, or a function that refers to one."""
        return _Rebinder(self.parts).rebind(value)


def copy_module(module: LightningModule, previous: ModuleCopy | None = None) -> ModuleCopy:
    """Copies a module with all that it refers to, so that evaluating the copy does not change the module.

    Functions, bound methods and weak references refer to the copy afterwards. Compiled parts are copied as what they were
    compiled from, and tensors without their graph. The trainer is left out. Shared are objects of the run
    (:data:`SHARED_KINDS`), what cannot be copied, such as locks, and what releases something when it is deleted, such as
    files. Running generators and iterators of loaders would be advanced, so on the copy they raise an error instead.

    Args:
        module: The module that is trained.
        previous: An earlier copy, given up for this one: its memory is used again.

    Raises:
        TypeError: If a part of the module cannot be copied.
    """
    copier = _Copier({} if previous is None else previous.release())
    copied: Any = copier.copy_module(module)
    parts = {id(part): copier.memo[id(part)] for part in module.modules()}
    shared = [name or "it" for name, part in module.named_modules() if parts[id(part)] is part]
    if shared:
        raise TypeError(f"{', '.join(shared)} cannot be copied")
    return ModuleCopy(copied, copier.tensors, parts, copier.alive)


class _Copier:
    """Copies objects; the memo, as that of ``copy.deepcopy``, holds the copy of each object that was copied already."""

    def __init__(self, pool: dict[tuple[str, str], Tensor]) -> None:
        self.pool, self.tensors = pool, {}  # type: tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor]]
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []
        self._originals: list[Any] = []

    def _remember(self, original: object, copied: Any) -> Any:
        self.memo[id(original)] = copied
        # while they live, no other object gets their id
        self._originals.append(original)
        return copied

    # ---- modules ----

    def copy_module(self, module: nn.Module) -> nn.Module:
        parts = {name: part for name, part in module.named_modules() if part is compat.uncompiled(part)}
        # all parts get their copies first, so that a reference to a part finds its copy
        plain = {name: part for name, part in parts.items() if not _copies_itself(part)}
        for part in plain.values():
            shell = _blank(type(part))
            vars(shell).update(compat.unset_attributes(part))
            self._remember(part, shell)
        for name, part in plain.items():
            self._copy_tensors(name, part)
        # what copies itself needs its children first
        for part in reversed(list(module.modules())):
            if id(part) in self.memo:
                self._fill(part, self.memo[id(part)])
            else:
                self.copy(part)
        copied: nn.Module = self.memo[id(module)]
        return copied

    def _fill(self, part: nn.Module, twin: nn.Module) -> None:
        skipped = compat.skipped_attributes(part)
        vars(twin).update({name: self._own(name, value) for name, value in vars(part).items() if name not in skipped})
        for name in _slots(part):
            object.__setattr__(twin, name, self.copy(getattr(part, name)))

    def _own(self, name: str, value: Any) -> Any:
        """Returns the copy of an attribute; each part has ten empty dictionaries, to which nothing else refers."""
        is_empty = name in compat.PLAIN_ATTRIBUTES and type(value) in (dict, OrderedDict, set) and not value
        return type(value)() if is_empty else self.copy(value)

    def _copy_tensors(self, name: str, part: nn.Module) -> None:
        parameters, buffers, _ = compat.own_tensors(part)
        plain = {key: value for key, value in vars(part).items() if type(value) is Tensor and value.is_leaf}
        for key, tensor in (*parameters.items(), *buffers.items(), *plain.items()):
            if tensor is not None and id(tensor) not in self.memo:
                twin = self._remember(tensor, self._pooled_tensor((name, key), tensor))
                if vars(tensor):
                    vars(twin).update({attribute: self.copy(value) for attribute, value in vars(tensor).items()})

    def _pooled_tensor(self, place: tuple[str, str], tensor: Tensor) -> Tensor:
        if nn.parameter.is_lazy(tensor):
            return copy.deepcopy(tensor)
        old = self.pool.get(place)
        plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        with torch.no_grad():
            reused = old if plain and old is not None and _alike(old, tensor) else None
            data = tensor.detach().clone() if reused is None else reused.copy_(tensor.detach())
        if plain:
            self.tensors[place] = data
        if type(tensor) is nn.Parameter:
            return nn.Parameter(data, requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            # a parameter of the user's own class
            return copy.deepcopy(tensor)
        return data.requires_grad_(tensor.requires_grad and tensor.is_leaf)

    # ---- any object ----

    def copy(self, value: Any) -> Any:
        """Returns a copy of an object, or the object itself where it cannot change or has no copy."""
        if type(value) in ATOMIC:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        try:
            return self._copy(value)
        except Exception:
            runs = type(value).__module__ in ITERATORS and hasattr(type(value), "__next__")
            return self._remember(value, Unadvanced(value) if runs else value)

    def _copy(self, value: Any) -> Any:
        """Returns a copy of an object, with copies of what it refers to; raises whatever an object raises that has none."""
        kind = type(value)
        if kind in (dict, OrderedDict):
            mapping = self._remember(value, kind())
            mapping.update([(self.copy(key), self.copy(item)) for key, item in value.items()])
            return mapping
        if kind is list:
            items = self._remember(value, [])
            items += map(self.copy, value)
            return items
        if kind is tuple:
            fixed = tuple(map(self.copy, value))
            return value if all(map(operator.is_, fixed, value)) else self._remember(value, fixed)
        if kind is types.FunctionType:
            return self._copy_function(value)
        if kind is types.CellType:
            return self._copy_cell(value)
        if kind is types.MethodType:
            return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))
        if issubclass(kind, functools.partial):
            named = {name: self.copy(argument) for name, argument in value.keywords.items()}
            return self._remember(value, kind(self.copy(value.func), *map(self.copy, value.args), **named))
        if compat.is_kind(value, "_lru_cache_wrapper"):
            cached = functools.lru_cache(**value.cache_parameters())
            return self._remember(value, cached(self.copy(value.__wrapped__)))
        if issubclass(kind, WEAK) or kind in weakref.ProxyTypes:
            return self._remember(value, self._copy_weak(value))
        if issubclass(kind, RUNNING) or compat.is_kind(value, "_BaseDataLoaderIter"):
            return self._remember(value, Unadvanced(value))
        if isinstance(value, nn.Module) and value is not compat.uncompiled(value):
            return self._remember(value, self.copy(compat.uncompiled(value)))
        if _is_shared(kind):
            return value
        if kind is torch.Generator:
            return self._remember(value, torch.Generator(value.device).set_state(value.get_state()))
        if kind is Tensor and value.layout is torch.strided:
            leaf = value.is_leaf and value.requires_grad
            return self._remember(value, value.detach().clone().requires_grad_(leaf))
        if isinstance(value, Tensor) and not value.is_leaf:
            return self._remember(value, value.detach().clone())
        return self._deep_copy(value) if hasattr(kind, "__deepcopy__") else self._rebuild(value)

    def _copy_function(self, function: types.FunctionType) -> types.FunctionType:
        closure, defaults = self.copy(function.__closure__), self.copy(function.__defaults__)
        named, attributes = self.copy(function.__kwdefaults__), self.copy(vars(function))
        if id(function) in self.memo:
            # it refers to itself
            known: types.FunctionType = self.memo[id(function)]
            return known
        if closure is function.__closure__ and defaults is function.__defaults__ and not (named or attributes):
            return function
        twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
        twin.__kwdefaults__, twin.__qualname__ = named, function.__qualname__
        vars(twin).update(attributes)
        self._remember(function, twin)
        return twin

    def _copy_cell(self, cell: types.CellType) -> types.CellType:
        twin: types.CellType = self._remember(cell, types.CellType())
        with suppress(ValueError):
            # an empty cell is of a variable that was not assigned yet
            twin.cell_contents = self.copy(cell.cell_contents)
        return twin

    def _copy_weak(self, value: Any) -> Any:
        """A weak reference to the copy of what another one refers to, or a collection of such references."""
        kind = type(value)
        if kind in weakref.ProxyTypes:
            # a method that is bound to what the proxy stands for
            self.alive.append(target := self.copy(value.__repr__.__self__))
            return weakref.proxy(target)
        if issubclass(kind, weakref.ReferenceType):
            self.alive.append(target := self.copy(value()))
            if isinstance(target, types.MethodType):
                self.alive.append(target.__func__)
            return value if target is None else kind(target)
        pairs = (
            [(self.copy(key), self.copy(item)) for key, item in value.items()] if kind is not weakref.WeakSet else []
        )
        members = pairs or list(map(self.copy, value))
        self.alive += members
        return kind(members)

    def _deep_copy(self, value: Any) -> Any:
        """A copy of an object whose class says how."""
        known = len(self.memo)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            # what was copied on the way is half done
            while len(self.memo) > known:
                self.memo.popitem()
            raise

    def _rebuild(self, value: Any) -> Any:
        """A copy by the protocol of ``copy`` and ``pickle``."""
        kind = type(value)
        # itertools' iterators can be copied up to Python 3.13, with a warning
        with warnings.catch_warnings() if kind.__module__ == "itertools" else nullcontext():
            if kind.__module__ == "itertools":
                warnings.simplefilter("ignore", DeprecationWarning)
            reduce = copyreg.dispatch_table.get(kind)
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduced, str):
            return value
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        is_plain = getattr(make, "__name__", "") == "__newobj__" and tuple(arguments) == (kind,)
        if is_plain and state is None and items is None and pairs is None:
            # such as object(), which is known by its identity
            return value
        twin = self._remember(value, _blank(kind) if is_plain else make(*map(self.copy, arguments)))
        if twin is value:
            return value
        # proxies answer for other objects, so the class is asked
        if state is not None and hasattr(type(twin), "__setstate__"):
            twin.__setstate__(self.copy(state))
        elif state is not None:
            attributes, slots = self.copy(state) if isinstance(state, tuple) else (self.copy(state), None)
            if attributes:
                vars(twin).update(attributes)
            for name, held in (slots or {}).items():
                object.__setattr__(twin, name, held)
        for item in items or ():
            twin.append(self.copy(item))
        for key, item in pairs or ():
            twin[self.copy(key)] = self.copy(item)
        return twin


class _Rebinder:
    """Replaces references to parts of a module by references to their copies.

    What refers to no part stays the object that it is, so that a user's sampler may count its calls.

    Args:
        parts: The copy of each part, by the part's id.
    """

    def __init__(self, parts: dict[int, Any]) -> None:
        self.memo = dict(parts)

    def rebind(self, value: Any, depth: int = DEPTH) -> Any:
        if id(value) in self.memo or depth == 0 or type(value) in ATOMIC or isinstance(value, (Tensor, type)):
            return self.memo.get(id(value), value)
        # meanwhile, for what refers to itself
        self.memo[id(value)] = value
        with suppress(Exception):
            self.memo[id(value)] = self._rebound(value, depth - 1)
        return self.memo[id(value)]

    def _rebound(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is types.FunctionType:
            held = value.__closure__, value.__defaults__, value.__kwdefaults__
            closure, defaults, named = (self.rebind(part, depth) for part in held)
            if all(map(operator.is_, (closure, defaults, named), held)):
                return value
            twin = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
            twin.__kwdefaults__ = named
            return twin
        if kind is types.CellType:
            content = self.rebind(value.cell_contents, depth)
            return value if content is value.cell_contents else types.CellType(content)
        if kind is types.MethodType:
            return types.MethodType(self.rebind(value.__func__, depth), self.rebind(value.__self__, depth))
        if kind is functools.partial:
            arguments, named = self.rebind(value.args, depth), self.rebind(value.keywords, depth)
            return functools.partial(self.rebind(value.func, depth), *arguments, **named)
        if issubclass(kind, weakref.ReferenceType):
            return value if (target := value()) is None else kind(self.rebind(target, depth))
        if issubclass(kind, (list, tuple)) and len(value) <= LARGEST_CONTAINER:
            items = [self.rebind(item, depth) for item in value]
            changed = not all(map(operator.is_, items, value))
            return getattr(kind, "_make", kind)(items) if changed else value
        if issubclass(kind, dict) and len(value) <= LARGEST_CONTAINER:
            mapping = {key: self.rebind(item, depth) for key, item in value.items()}
            return self._changed(value, mapping, value, dict.__setitem__)
        if _is_shared(kind):
            return value
        attributes = {name: getattr(value, name) for name in _slots(value)} | getattr(value, "__dict__", {})
        rebound = {name: self.rebind(item, depth) for name, item in attributes.items()}
        return self._changed(value, rebound, attributes, _set)

    @staticmethod
    def _changed(value: Any, new: dict[Any, Any], old: dict[Any, Any], put: Callable[[Any, Any, Any], None]) -> Any:
        """The object itself, or a shallow copy of it with those entries replaced that have changed."""
        changed = {key: item for key, item in new.items() if item is not old[key]}
        rebound = copy.copy(value) if changed else value
        for key, item in changed.items():
            put(rebound, key, item)
        return rebound


class Unadvanced:
    """Stands on a copy for an iterator of the module that cannot be copied, and which an evaluation must not advance.

    Args:
        iterator: The iterator of the module.
    """

    def __init__(self, iterator: object) -> None:
        self._kind = type(iterator).__name__

    def __iter__(self) -> Unadvanced:
        return self

    def __next__(self) -> Any:
        raise TypeError(f"an evaluation cannot advance a {self._kind} of the module, since training goes on with it")


def _set(value: Any, name: str, item: Any) -> None:
    object.__setattr__(value, name, item)


def _is_shared(kind: type) -> bool:
    """Whether objects of a class are shared: those of the run, of threads, and what releases something when deleted."""
    bases = [(str(base.__module__), base.__name__) for base in kind.__mro__]
    return (
        hasattr(kind, "__del__")
        or any(module.startswith(SHARED_PACKAGES) for module, _ in bases)
        or any(name in SHARED_KINDS and module.startswith(OWNERS) for module, name in bases)
    )


def _blank(kind: type) -> Any:
    """Returns an object of a class without calling what the class does when one is made."""
    make = next(new for base in kind.__mro__ if isinstance(new := vars(base).get("__new__"), types.BuiltinFunctionType))
    return make(kind)


def _copies_itself(part: nn.Module) -> bool:
    """Whether a class says how its objects are copied, as torchmetrics' metrics and scripted modules do."""
    for base in type(part).__mro__:
        if base in (nn.Module, object) or base.__name__ in ("LightningModule", "_DeviceDtypeModuleMixin"):
            continue
        if base.__module__.startswith("torch.nn.utils.parametri"):
            continue
        own = vars(base)
        if "__getstate__" in own or "__reduce__" in own or "__reduce_ex__" in own:
            return True
        # torch gives parametrized classes a __deepcopy__ that copies attributes and nothing else
        if "__deepcopy__" in own and not base.__name__.startswith("Parametrized"):
            return True
    return False


def _slots(value: object) -> list[str]:
    """Returns the names of the attributes that an object keeps in slots of its classes."""
    slotted = [vars(base) for base in type(value).__mro__ if "__slots__" in vars(base)]
    names = [name for own in slotted for name, held in own.items() if isinstance(held, types.MemberDescriptorType)]
    return [name for name in names if hasattr(value, name)]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def fits_in_memory(module: nn.Module) -> bool:
    """Returns whether a copy of a module takes less than half of the memory that is free; True where that is not known."""
    held = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    tensors = [t for t in (*module.parameters(), *module.buffers(), *held) if not nn.parameter.is_lazy(t)]
    needed = sum(t.numel() * t.element_size() for t in tensors if t.layout is torch.strided)
    device = next((t.device for t in tensors), torch.device("cpu"))
    try:
        if device.type == "cuda":
            free = (
                torch.cuda.mem_get_info(device)[0]
                + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device)
            )
        else:
            available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
            free = int(available[1]) * 1024 if available else 2 * needed + 1
    except (AttributeError, OSError, ValueError, RuntimeError):
        return True
    return needed < free / 2
