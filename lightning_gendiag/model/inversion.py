"""Finds the invertible layers of a flow, and the log-determinant that it reports, on the isolated copy."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributions import Transform

from lightning_gendiag.model.adapters.own import accepts, has_forward, inverting_method
from lightning_gendiag.model.outputs import tensors_in

Through = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From data (n, ...) to latents (n, ...) and the log-determinant (n,), or None where none is reported."""

DIRECTIONS = re.compile(r"rev|reverse|inverse|invert|inv|backward|sample|sampling|direction|mode")
"""Parameters of ``forward`` that choose its direction."""

LOG_DET_NAMES = (
    "encode", "forward", "transform", "inverse", "flow", "encode_with_log_det", "inverse_and_log_det",
    "forward_and_log_det", "forward_with_log_det", "_transform", "f", "to_latent",
)  # fmt: skip
"""Methods that may return latents and their log-determinants, which is then seen from their output."""

MAX_DEPTH = 2
"""Levels below the module on which these methods are looked for."""

MOST_LAYERS = 64
"""Largest number of layers that are looked at alone."""

SAME = 1e-4
"""Largest relative difference of latents that are the same but for rounding."""


class Layer(NamedTuple):
    """An invertible layer of a flow, with what passes it from the data to the latents."""

    name: str
    """Such as ``"self.layers.3 (Coupling)"``."""
    before: Tensor
    """(n, ...) what passes in."""
    forward: Callable[[Tensor, int | None], tuple[Tensor, Tensor | None]]
    """From ``before``, or from the row of it that is numbered alone, (1, ...), to the output and the log-determinant."""
    inverse: Callable[[Tensor], Tensor]
    """From the output of all rows to what passed in."""


class _Call(NamedTuple):
    """One recorded call of a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Transforms(NamedTuple):
    """A transform of ``torch.distributions``, or one of zuko, that a module returned."""

    name: str
    """Of the module."""
    whole: Any
    parts: list[Any]
    """From the data to the latents."""

    def rows(self, images: Tensor) -> Tensor:
        """Returns data as the transform takes them: flattened where it is one of rows."""
        return images.flatten(1) if self.whole.domain.event_dim <= 1 else images


def layers_of(
    module: nn.Module, encode: Callable[[Tensor], Any], decode: Callable[[Tensor], Any], images: Tensor
) -> list[Layer]:
    """Finds the invertible layers that data pass while a flow encodes and decodes them.

    A layer is a module with a method such as ``inverse``, one whose ``forward`` has a parameter such as ``reverse``, or a
    transform of ``torch.distributions`` or zuko. Of layers inside each other the innermost are taken. Layers that change the
    number of values, or cannot be called alone, are left out.

    Args:
        module: The copy of the flow; inside ``isolated``.
        encode: From data to what the encoder returns.
        decode: From the flattened latents to data.
        images: (n, ...) data.
    """
    n = len(images)
    candidates = {name: part for name, part in module.named_modules() if name and _may_invert(part)}
    encoded, transforms = _recorded(module, candidates, partial(encode, images), n)
    if transforms is not None:
        return list(_of_transforms(transforms, images))
    latents = latents_in(encode(images), n)
    decoded, _ = _recorded(module, candidates, partial(decode, latents.flatten(1)), n)
    called = [name for name in (encoded or decoded) if name in candidates]
    # what decodes calls its layers from the last to the first
    called = called if encoded else called[::-1]
    innermost = [name for name in called if not any(other.startswith(f"{name}.") for other in called)]
    layers = []
    for name in innermost[:MOST_LAYERS]:
        with suppress(Exception):
            layer = _layer(f"self.{name} ({type(candidates[name]).__name__})", candidates[name], encoded.get(name),
                           decoded.get(name), n)  # fmt: skip
            if layer is not None and _works(layer):
                layers.append(layer)
    return layers


def _may_invert(part: nn.Module) -> bool:
    """Whether a module has a method that inverts its forward, or a forward with a parameter for its direction."""
    if not has_forward(part):
        return False
    if _inverse_of(part) is not None:
        return True
    with suppress(TypeError, ValueError):
        return any(DIRECTIONS.fullmatch(name.lower()) for name in inspect.signature(part.forward).parameters)
    return False


def _inverse_of(part: nn.Module) -> Callable[..., Any] | None:
    name = inverting_method(part)
    return None if name is None else getattr(part, name)


def _recorded(
    module: nn.Module, candidates: Mapping[str, nn.Module], call: Callable[[], Any], n: int
) -> tuple[dict[str, _Call], _Transforms | None]:
    """Returns the first call of each candidate in the order of the calls, and the transform of most parts of any module."""
    calls: dict[str, _Call] = {}
    found: list[_Transforms] = []

    def see(name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name in candidates and name not in calls and _first(args or tuple(kwargs.values()), n) is not None:
            calls[name] = _Call(args, kwargs, output)
        transform = getattr(output, "transform", output)
        if isinstance(transform, Transform):
            parts = getattr(transform, "transforms", getattr(transform, "parts", None))
            found.append(
                _Transforms(f"self.{name}" if name else "self", transform, list(parts) if parts else [transform])
            )

    with ExitStack() as stack:
        for name, part in module.named_modules():
            hook = part.register_forward_hook(partial(see, name), with_kwargs=True)
            stack.callback(hook.remove)
        call()
    # of a whole flow
    return calls, max(found, key=lambda one: len(one.parts), default=None)


def _of_transforms(transforms: _Transforms, images: Tensor) -> Iterator[Layer]:
    """Yields the layers of a chain of transforms."""
    h = transforms.rows(images)
    for number, transform in enumerate(transforms.parts[:MOST_LAYERS]):
        forward = partial(_through_transform, transform)
        layer = Layer(f"{transforms.name}, transform {number} ({type(transform).__name__})", h, forward, transform.inv)
        h = forward(h)[0]
        if h.flatten(1).shape[1] == layer.before.flatten(1).shape[1]:
            yield layer


def _through_transform(transform: Any, h: Tensor, row: int | None = None) -> tuple[Tensor, Tensor]:
    y = transform(h)
    volume: Tensor = transform.log_abs_det_jacobian(h, y)
    # of transforms of single numbers, one for each
    return y, volume.flatten(1).sum(1) if volume.ndim > 1 else volume


def _layer(name: str, part: nn.Module, encoded: _Call | None, decoded: _Call | None, n: int) -> Layer | None:
    """Returns a layer from how it was called in each direction; None where no call is known for one of them."""
    inverse = _inverse_of(part)
    if any(call is not None and _takes_two(call, n) for call in (encoded, decoded)):
        return None
    if encoded is not None and decoded is not None:
        before = _first((encoded.args, encoded.kwargs), n)
        there, back = partial(_again, part, encoded, n), partial(_again, part, decoded, n)
    elif encoded is not None and inverse is not None:
        before = _first((encoded.args, encoded.kwargs), n)
        there, back = partial(_again, part, encoded, n), partial(_with_rest, inverse, encoded, n)
    elif decoded is not None and inverse is not None:
        # what encodes calls the method, which hooks do not see
        before = _first(decoded.output, n)
        there, back = partial(_with_rest, inverse, decoded, n), partial(_again, part, decoded, n)
    else:
        return None
    if before is None:
        return None
    return Layer(name, before.detach(), there, lambda y: back(y)[0])


def _takes_two(call: _Call, n: int) -> bool:
    """Whether two of the values that a layer was given are alike, so that nothing tells which of them it transforms."""
    shapes = [t.shape for t in tensors_in((call.args, call.kwargs)) if _are_values(t, n)]
    return bool(shapes) and shapes.count(shapes[0]) > 1


def _works(layer: Layer) -> bool:
    """Whether a layer can be called alone in both directions and keeps the number of values."""
    y, _ = layer.forward(layer.before, None)
    size = layer.before.numel()
    return y.numel() == size and layer.inverse(y).numel() == size


def _again(
    part: Callable[..., Any], call: _Call, n: int, x: Tensor, row: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Calls a layer as before, with another input, for all rows or for one."""
    args, kwargs = _replaced((call.args, call.kwargs), x, n, row, [])
    start = _start_in((args, kwargs), len(x))
    return _read(part(*args, **kwargs), start, len(x))


def _with_rest(
    inverse: Callable[..., Any], call: _Call, n: int, x: Tensor, row: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Calls the method that inverts a layer, with what else its forward was given where the method takes as much."""
    given = _replaced((call.args, call.kwargs), x, n, row, [])
    args, kwargs = given if accepts(inverse, len(call.args)) else (given[0][:1], {})
    start = _start_in((args, kwargs), len(x))
    return _read(inverse(*args, **kwargs), start, len(x))


def _start_in(given: Any, n: int) -> Tensor | None:
    """Returns a copy of the log-determinants (n,) that a layer is given to add to, which it may do in place."""
    start = next((t for t in tensors_in(given) if t.is_floating_point() and t.shape == (n,)), None)
    return None if start is None else start.clone()


def _read(output: Any, start: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """Returns the values and the log-determinant in what a layer returned, less the one that it was given to add to."""
    values = _first(output, n)
    if values is None:
        raise ValueError("it must return values of the rows that it is given")
    volume = _volume(output, n)
    return values, volume if volume is None or start is None else volume - start


def _first(value: Any, n: int) -> Tensor | None:
    """The first tensor (n, ...) of two axes or more in a container."""
    return next((t for t in tensors_in(value) if _are_values(t, n)), None)


def _are_values(tensor: Tensor, n: int) -> bool:
    return tensor.ndim > 1 and len(tensor) == n and tensor.is_floating_point()


def _volume(value: Any, n: int) -> Tensor | None:
    """The first tensor (n,) or () of floats behind the values in a container, as (n,)."""
    for tensor in tensors_in(value):
        if tensor.is_floating_point() and tensor.shape in ((n,), ()):
            return tensor.expand(n)
        if tensor.is_floating_point() and tensor.shape == (n, 1) and tensor is not _first(value, n):
            return tensor[:, 0]
    return None


def _replaced(value: Any, x: Tensor, n: int, row: int | None, done: list[bool]) -> Any:
    """The same container with x in place of its first tensor (n, ...), and of other tensors of n rows one row."""
    if isinstance(value, Tensor):
        if not done and _are_values(value, n):
            done.append(True)
            return x
        # a layer may write into what it is given
        return (value[row : row + 1] if row is not None and value.ndim and len(value) == n else value).clone()
    if isinstance(value, Mapping):
        return {name: _replaced(part, x, n, row, done) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_replaced(part, x, n, row, done) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def latents_in(output: Any, n: int) -> Tensor:
    """Returns the latents (n, ...) in what an encoder returned, with their derivatives.

    Raises:
        ValueError: If there are none.
    """
    found = _first(output, n)
    if found is None:
        raise ValueError(f"encode must return ({n}, ...) latents. To fix this, pass ModelAdapter(encode=...).")
    return found


# ---- the log-determinant of the whole ----


def log_det_ways(
    module: nn.Module, encode: Callable[[Tensor], Any], images: Tensor, prepare: Callable[[], None]
) -> Iterator[tuple[str, Through]]:
    """Yields what returns the latents that the encoder returns together with log-determinants.

    Args:
        module: The copy of the flow; inside ``isolated``.
        encode: From data to what the encoder returns.
        images: (n, ...) data, at least two of them.
        prepare: Called before each call, to seed what is random.
    """
    n = len(images)
    prepare()
    own = encode(images)
    latents = latents_in(own, n).flatten(1)
    volume = _volume(own, n)
    # of zeros, the method below tells whether they were asked for
    if volume is not None and bool(volume.any()):
        yield "what encodes", lambda x: _read(encode(x), None, len(x))
    _, transforms = _recorded(module, {}, partial(encode, images), n)
    if transforms is not None:
        yield f"the transform of {transforms.name}", partial(_through_all, module, encode)
    for path, part in module.named_modules():
        if path.count(".") >= MAX_DEPTH:
            continue
        owner = f"self.{path}" if path else "self"
        for name in LOG_DET_NAMES:
            method = getattr(type(part), name, None)
            if not callable(method) or (name == "forward" and not has_forward(part)):
                continue
            bound = part if name == "forward" else getattr(part, name)
            if not accepts(bound, 1):
                continue
            for flat in (False, True):
                through = partial(_called, bound, flat)
                # what is not meant to be called like this may fail in any way
                with suppress(Exception):
                    prepare()
                    found, volume = through(images)
                    if volume is not None and _agrees(found.flatten(1), latents) and _is_asked_for(bound, volume):
                        yield f"{owner}.{name}".removesuffix(".forward") or owner, through
                        break


def _is_asked_for(method: Callable[..., Any], volume: Tensor) -> bool:
    """Whether zeros are the log-determinants, and not what a method returns where an option does not ask for them."""
    parameters = inspect.signature(method).parameters.values()
    options = (p for p in parameters if p.default in (None, False) and not DIRECTIONS.fullmatch(p.name.lower()))
    return bool(volume.any()) or next(options, None) is None


def _called(method: Callable[..., Any], flat: bool, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return _read(method(x.flatten(1) if flat else x), None, len(x))


def _through_all(module: nn.Module, encode: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sends data through the transform of a flow, which the flow may make anew at each call."""
    _, transforms = _recorded(module, {}, partial(encode, x), len(x))
    assert transforms is not None
    return _through_transform(transforms.whole, transforms.rows(x))


def _agrees(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= SAME * float(b.norm()) and math.isfinite(float(b.norm()))
