"""How a module is evaluated so that nothing of it changes: a copy in evaluation mode, or the module itself, restored."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_gendiag.functional.arrays import exact_matmul, matmul_precision, set_matmul_precision
from lightning_gendiag.model import compat
from lightning_gendiag.model.generators import PACKAGES, random_state_kept
from lightning_gendiag.model.warning import warn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a copy of a module in evaluation mode, without gradients."""
    module.eval()
    with torch.no_grad(), compat.without_compiling():
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Lets progress bars of tqdm show nothing, such as those of samplers, which would break the line of the training's own."""
    from tqdm import tqdm

    make = tqdm.__init__

    @wraps(make)
    def make_silent(bar: Any, *args: Any, **kwargs: Any) -> None:
        make(bar, *args, **kwargs | {"disable": True})

    tqdm.__init__ = make_silent
    try:
        yield
    finally:
        tqdm.__init__ = make


SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Variables of the environment that Lightning's ``seed_everything`` sets."""


def _set_seeds(values: tuple[str | None, ...]) -> None:
    for name, value in zip(SEEDS, values, strict=True):
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _set_determinism(values: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(values[0], warn_only=values[1])


SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (matmul_precision, set_matmul_precision),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _set_determinism,
    ),
    (lambda: torch.backends.cudnn.benchmark, partial(setattr, torch.backends.cudnn, "benchmark")),
    (lambda: torch.backends.cudnn.deterministic, partial(setattr, torch.backends.cudnn, "deterministic")),
    (lambda: tuple(map(os.environ.get, SEEDS)), _set_seeds),
)
"""What reads and what sets each switch of the process that a user's sampler may change."""


@contextmanager
def switches_kept() -> Iterator[None]:
    """Restores the switches of the process that a user's code changed, such as the default dtype or the number of threads."""
    before = [read() for read, _ in SWITCHES]
    try:
        with np.errstate():
            yield
    finally:
        for (read, write), value in zip(SWITCHES, before, strict=True):
            # some take effect whenever they are set
            if read() != value:
                write(value)


@contextmanager
def exits_as_errors() -> Iterator[None]:
    """Raises an error in place of what a user's code raises beside errors, such as ``SystemExit``, which would end the run.

    Raises:
        RuntimeError: In place of ``SystemExit``, or of an own class that derives from ``BaseException``.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except SystemExit as exit_:
        raise RuntimeError(
            f"the code that was called wanted to end the process by SystemExit({exit_.code!r})"
        ) from exit_
    except BaseException as other:
        raise RuntimeError(f"the code that was called raised {type(other).__name__}: {other}") from other


@contextmanager
def contained(device: torch.device, *owners: object) -> Iterator[None]:
    """Runs a user's code so that it changes nothing of the process: random generators, switches, and that it goes on.

    Args:
        device: Whose generator is restored, beside those of the CPU.
        owners: Objects whose generators are restored.

    Raises:
        RuntimeError: In place of ``SystemExit``, or of an own class that derives from ``BaseException``.
    """
    with exits_as_errors(), switches_kept(), random_state_kept(device, *owners):
        yield


COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
)  # fmt: skip
"""Functions of ``torch.distributed`` for which each process waits for the others."""


@contextmanager
def without_collectives() -> Iterator[None]:
    """Raises an error where a user's code waits for other processes by ``torch.distributed``, inside the context.

    Processes draw their own shares, so they call a sampler at other times and another number of times.

    Raises:
        RuntimeError: In the call.
    """
    own, thread = torch.distributed, threading.get_ident()

    def guarded(collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Lightning and torch call them for us, and other threads belong to the run
            frame = inspect.currentframe()
            caller = str(frame.f_back.f_globals.get("__name__")) if frame and frame.f_back else ""
            if threading.get_ident() == thread and caller.partition(".")[0] not in PACKAGES:
                compat.refuse_collective()
            return collective(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in COLLECTIVES:
            if own.is_available() and hasattr(own, name):
                stack.callback(setattr, own, name, getattr(own, name))
                setattr(own, name, guarded(getattr(own, name)))
        yield


@contextmanager
def not_called(module: nn.Module) -> Iterator[None]:
    """Raises an error where a part of a module is called inside the context: evaluations use the copy and nothing else.

    Raises:
        RuntimeError: In the call.
    """
    parts = {id(part) for part in module.modules()}

    def refuse(part: nn.Module, inputs: Any) -> None:
        if id(part) in parts:
            raise RuntimeError(
                f"an evaluation must use a copy of the module, but called {type(part).__name__} of the module that is "
                "trained. To fix this, use the module that is passed, as in ModelAdapter(sample=lambda module, n: ...)"
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers that can be given the statistics of each batch. SyncBatchNorm would wait for other processes."""


@contextmanager
def normalizing_by_batch(*parts: nn.Module) -> Iterator[None]:
    """Lets layers of BatchNorm take the statistics of each batch, as in training, without changing their running ones.

    The two networks of a GAN meet each other that way: batches are all real or all generated, and running statistics mix
    both, or lag behind.
    """
    with ExitStack() as stack:
        for layer in (layer for part in parts for layer in part.modules() if isinstance(layer, BATCH_NORMS)):
            for name, value in (("training", True), ("track_running_stats", False)):
                stack.callback(setattr, layer, name, getattr(layer, name))
                setattr(layer, name, value)
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
        warn(f"An evaluation could not restore {', '.join(failures)} of the module.", category=UserWarning)


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


@contextmanager
def perturbed(module: nn.Module, seed: int) -> Iterator[None]:
    """Adds noise of the size of its weights to a copy of a module inside the context, to see which outputs can change."""
    weights = [p for p in module.parameters() if p.is_floating_point() and not nn.parameter.is_lazy(p)]
    kept = [p.data.clone() for p in weights]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for p in weights:
                size = p.abs().mean().nan_to_num().clamp(min=0.1)
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p))
        yield
    finally:
        for p, data in zip(weights, kept, strict=True):
            p.data.copy_(data)
