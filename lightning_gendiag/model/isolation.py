"""An isolated copy of a module, so that evaluating it cannot change the module that is trained.

A plain ``copy.deepcopy`` fails as a whole where one attribute cannot be copied: a generated batch that is kept with its
graph, as in Lightning's own GAN example, a lock or an open file. So a module is copied part by part: parameters and
buffers always, every other attribute where it can be copied, and shared where it cannot. Where no copy can be made, since
a module is sharded or too large, :func:`isolated_in_place` guards the module itself.
"""

from __future__ import annotations

import copy
import random
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gendiag.functional.arrays import exact_matmul
from lightning_gendiag.model import compat

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

SHARED_KINDS = (
    "Trainer", "Fabric", "Strategy", "Accelerator", "Callback", "LightningDataModule", "Dataset", "DataLoader", "Optimizer",
    "LightningOptimizer", "LRScheduler", "Logger",
)  # fmt: skip
"""Classes whose objects a copy shares with the module, since they are large or belong to the run."""

DEPTH = 4
"""Generators are found in attributes, and in lists and dictionaries nested this deep."""


# ---- random generators ----


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


Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def own_generators(owners: Iterable[object]) -> list[Generator]:
    """Returns the random generators that modules, datasets and loaders keep in their attributes, in a fixed order."""
    found: dict[int, Generator] = {}
    seen: set[int] = set()

    def visit(value: object, depth: int) -> None:
        if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.setdefault(id(value), value)
        elif depth > 0 and id(value) not in seen and not isinstance(value, (str, bytes, Tensor, np.ndarray, type)):
            seen.add(id(value))
            if isinstance(value, dict):
                children: Iterable[object] = value.values()
            elif isinstance(value, (list, tuple, set)):
                # generators stand in short containers, data in long ones
                children = value if len(value) <= 64 else ()
            elif isinstance(value, nn.Module):
                for part in value.modules():
                    seen.add(id(part))
                    for attribute in vars(part).values():
                        visit(attribute, DEPTH)
                return
            elif isinstance(value, compat.TrainerView) or compat.is_kind(value, "Trainer", "Fabric"):
                return
            else:
                children = getattr(value, "__dict__", {}).values()
            for child in list(children):
                visit(child, depth - 1)

    for owner in owners:
        visit(owner, DEPTH)
    return list(found.values())


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


# ---- the copy ----


class ModuleCopy(NamedTuple):
    """A copy of a module, the storage of its tensors, which the next copy takes over, and which part became which."""

    module: LightningModule
    tensors: dict[tuple[str, str], Tensor]
    parts: dict[int, Any]

    def counterpart(self, value: Any) -> Any:
        """Returns a user's callable as it is on the copy: a part, a method of a part, or a function that refers to one."""
        return _counterpart(value, self.parts)


def copy_module(module: LightningModule, previous: ModuleCopy | None = None) -> ModuleCopy:
    """Copies a module part by part, so that evaluating the copy does not change the module.

    State that is held only by a closure, a weak reference, a Python generator or an object with ``__slots__`` is shared.
    Compiled parts are copied as what they were compiled from. A tensor with a graph is copied without it. The trainer is
    left out.

    Args:
        module: The module that is trained.
        previous: An earlier copy, given up for this one: its memory is used again.

    Raises:
        TypeError: If a part of the module cannot be copied.
    """
    copier = _Copier({} if previous is None else previous.tensors)
    copied: Any = copier.copy(module)
    parts = {id(part): copier.memo[id(part)] for part in module.modules()}
    shared = [name or "it" for name, part in module.named_modules() if parts[id(part)] is part]
    if shared:
        raise TypeError(f"{', '.join(shared)} cannot be copied")
    return ModuleCopy(copied, copier.tensors, parts)


class _Copier:
    """Copies one module; the memo of ``copy.deepcopy`` holds what was copied already."""

    def __init__(self, pool: dict[tuple[str, str], Tensor]) -> None:
        self.pool, self.tensors = pool, {}  # type: tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Tensor]]
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []

    def copy(self, module: nn.Module) -> nn.Module:
        parts = {name: part for name, part in module.named_modules() if part is compat.uncompiled(part)}
        # all parts get their copies first, so that a reference to a part finds its copy
        plain = {name: part for name, part in parts.items() if not self._copies_itself(part)}
        for part in plain.values():
            shell = type(part).__new__(type(part))
            vars(shell).update(compat.unset_attributes(part))
            self._remember(part, shell)
        for part in module.modules():
            if part is not compat.uncompiled(part):
                self._remember(part, self.memo.get(id(compat.uncompiled(part)), part))
        for name, part in plain.items():
            self._copy_tensors(name, part)
        for part in parts.values():
            if id(part) not in self.memo:
                self._remember(part, self._attempt(part))
        for hooks in (True, False):
            # hooks first, since what refers to them, such as a handle, must find their copies
            for part in plain.values():
                self._copy_attributes(part, hooks)
        copied: nn.Module = self.memo[id(module)]
        return copied

    @staticmethod
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

    def _remember(self, original: object, copied: object) -> None:
        self.memo[id(original)] = copied
        self.alive.append(original)

    def _copy_tensors(self, name: str, part: nn.Module) -> None:
        parameters, buffers, _ = compat.own_tensors(part)
        for key, tensor in (*parameters.items(), *buffers.items()):
            if tensor is None or id(tensor) in self.memo:
                continue
            self._remember(tensor, self._copied_tensor((name, key), tensor))

    def _copied_tensor(self, place: tuple[str, str], tensor: Tensor) -> Tensor:
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

    def _copy_attributes(self, part: nn.Module, hooks: bool) -> None:
        target = vars(self.memo[id(part)])
        skipped = compat.skipped_attributes(part)
        for name, value in vars(part).items():
            if name not in skipped and name.endswith("_hooks") == hooks:
                target[name] = self._attempt(value)
                if hooks:
                    self._remember(value, target[name])

    def _attempt(self, value: Any) -> Any:
        """A copy of a value, or the value itself where it cannot be copied."""
        if value is None or isinstance(value, (bool, int, float, str, bytes, type)):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, (types.FunctionType, partial)):
            return _counterpart(value, self.memo)
        if isinstance(value, dict) and not value:
            return type(value)() if type(value) is dict else copy.copy(value)
        if compat.is_kind(value, *SHARED_KINDS):
            return value
        if isinstance(value, (dict, list, tuple)) and any(
            isinstance(item, (types.FunctionType, partial))
            for item in (value.values() if isinstance(value, dict) else value)
        ):
            # deepcopy shares functions, such as hooks that refer to the module
            return self._attempt_items(value)
        self._detach_tensors(value, DEPTH)
        known = len(self.memo)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            # what was copied on the way is of no use
            while len(self.memo) > known:
                self.memo.popitem()
        return self._attempt_items(value)

    def _attempt_items(self, value: Any) -> Any:
        """A container whose items are copied one by one, so that one that cannot be copied does not share the others."""
        if type(value) is dict or compat.is_kind(value, "OrderedDict"):
            return type(value)((key, self._attempt(item)) for key, item in value.items())
        if type(value) in (list, tuple, set):
            return type(value)(self._attempt(item) for item in value)
        if type(value).__module__ != "builtins" and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            # an object of the user's own, such as a replay buffer with a lock
            with suppress(Exception):
                twin = object.__new__(type(value))
                self._remember(value, twin)
                vars(twin).update({key: self._attempt(item) for key, item in vars(value).items()})
                return twin
        return value

    def _detach_tensors(self, value: Any, depth: int) -> None:
        """Prepares copies of tensors with a graph and of shared objects, where deepcopy would fail or take too much."""
        if isinstance(value, Tensor):
            if not value.is_leaf and id(value) not in self.memo:
                self._remember(value, value.detach().clone())
        elif compat.is_kind(value, *SHARED_KINDS):
            self._remember(value, value)
        elif isinstance(value, torch.Generator):
            if id(value) not in self.memo:
                twin = torch.Generator(device=value.device)
                twin.set_state(value.get_state())
                self._remember(value, twin)
        elif depth > 0 and id(value) not in self.memo:
            items: Iterable[Any] = ()
            if isinstance(value, dict):
                items = value.values()
            elif isinstance(value, (list, tuple, set)) or compat.is_kind(value, "deque"):
                items = value
            elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, types.ModuleType)):
                items = vars(value).values()
            for item in list(items):
                if not isinstance(item, (bool, int, float, str, bytes)):
                    self._detach_tensors(item, depth - 1)


def _rebound(function: types.FunctionType, parts: dict[int, Any], depth: int = DEPTH) -> types.FunctionType:
    """A function that was made in a method and refers to a part of the module, such as ``lambda: self.decode(z)``."""
    cells = function.__closure__ or ()
    contents = [_counterpart(_content(cell), parts, depth) for cell in cells]
    if all(new is _content(cell) for new, cell in zip(contents, cells, strict=True)):
        return function
    closure = tuple(types.CellType(new) for new in contents)
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _counterpart(value: Any, parts: dict[int, Any], depth: int = DEPTH) -> Any:
    """A part of the module, a method of a part, or a function that refers to one, as it is on the copy."""
    if depth == 0 or id(value) in parts:
        return parts.get(id(value), value)
    if isinstance(value, types.FunctionType):
        return _rebound(value, parts, depth - 1)
    if isinstance(value, types.MethodType) and id(value.__self__) in parts:
        return types.MethodType(value.__func__, parts[id(value.__self__)])
    if isinstance(value, partial):
        given = {name: _counterpart(argument, parts, depth - 1) for name, argument in value.keywords.items()}
        arguments = [_counterpart(argument, parts, depth - 1) for argument in value.args]
        return partial(_counterpart(value.func, parts, depth - 1), *arguments, **given)
    return value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()


def fits_in_memory(module: nn.Module) -> bool:
    """Returns whether a copy of a module takes less than half of the memory that is free; True where that is not known."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not nn.parameter.is_lazy(t)]
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


# ---- evaluating ----


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a copy of a module in evaluation mode, without gradients."""
    module.eval()
    with torch.no_grad(), compat.without_compiling():
        yield


@contextmanager
def isolated_in_place(module: nn.Module) -> Iterator[None]:
    """Shows a module itself in evaluation mode and restores it, where no copy can be made.

    Modes are set by assignment, since layers may act when ``eval()`` is called. Each step that restores something is
    guarded by itself, so that one failure never skips the next.
    """
    modes = [(part, part.training) for part in module.modules()]
    flags = [(part, {k: v for k, v in vars(part).items() if _is_plain(v)}) for part in module.modules()]
    tensors = [_kept_tensors(part) for part in module.modules()]
    failures: list[str] = []

    def guarded(restore: Callable[[], None], what: str) -> None:
        try:
            restore()
        except Exception as error:
            failures.append(f"{what} ({type(error).__name__}: {error})")

    with random_state_kept(torch.device("cpu"), module):
        try:
            for part, _ in modes:
                part.training = False
            with torch.no_grad(), compat.without_compiling():
                yield
        finally:
            for restore_tensors in tensors:
                guarded(restore_tensors, "a buffer")
            for part, attributes in flags:
                guarded(partial(part.__dict__.update, attributes), "an attribute")
            for part, mode in modes:
                part.training = mode
    if failures:
        rank_zero_warn(f"An evaluation could not restore {', '.join(failures)} of the module.", category=UserWarning)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _kept_tensors(part: nn.Module) -> Callable[[], None]:
    """Returns what restores a module's buffers, and the place of its parameters."""
    parameters, buffers, _ = compat.own_tensors(part)
    kept_parameters = dict(parameters)
    kept_buffers = {
        name: (tensor, None if tensor is None or nn.parameter.is_lazy(tensor) else tensor.detach().clone())
        for name, tensor in buffers.items()
    }

    def restore() -> None:
        parameters.update(kept_parameters)
        with torch.no_grad():
            for name, (tensor, value) in kept_buffers.items():
                buffers[name] = tensor
                # a buffer that cannot be written to cannot have changed either
                if tensor is not None and value is not None:
                    with suppress(RuntimeError, NotImplementedError):
                        tensor.copy_(value)

    return restore


@contextmanager
def in_full_precision(module: nn.Module) -> Iterator[None]:
    """Shows a module of half precision in float32, without autocast, and gives it the same tensors back."""
    low = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [tensor.data for tensor in low]
    with ExitStack() as stack:
        for tensor, data in zip(low, kept, strict=True):
            stack.callback(setattr, tensor, "data", data)
            tensor.data = data.float()
        with exact_matmul():
            yield
