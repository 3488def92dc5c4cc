"""Finds the quantizers of a module, and reads which codes they choose while images pass through it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gendiag.functional.arrays import pieces
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapters.base import Need
from lightning_gendiag.model.adapters.own import stated_size
from lightning_gendiag.model.outputs import MAX_DEPTH, fields_of

KINDS = re.compile(r"quanti[sz]|vq|code_?book|lfq|fsq|nearest_?embed", re.IGNORECASE)
"""Names of classes that quantize, or hold what does."""

PARTS = re.compile(r"(vq|lfq|fsq|quanti[sz]e|.*quanti[sz]ers?|code_?books?)(_\w{1,8})?", re.IGNORECASE)
"""Names under which modules hold them."""

CODES = re.compile(r"_?(code_?books?|dictionary)(_\w{1,8})?|(vq|quanti[sz]e\w*)_embed\w*", re.IGNORECASE)
"""Names of vectors of codes wherever they are."""

VECTORS = re.compile(r"_?(embed(ding)?s?|emb|codes|vectors)", re.IGNORECASE)
"""Names of vectors of codes within what quantizes; elsewhere they are of classes, times or words."""

SIZES = (
    "codebook_size", "num_embeddings", "n_embeddings", "num_codes", "n_codes", "n_e", "n_embed", "num_embedding",
    "num_vectors", "num_tokens", "K",
)  # fmt: skip
"""Attributes that hold the number of codes."""

FEWEST = 2
"""Number of positions of an image from which on integers that are looked up in a plain embedding are codes, and no class."""

ON_CODES = 1e-3
"""Largest distance of a quantized vector from its code, relative to its length."""

PAIRS = 1 << 22
"""Largest number of distances that are computed at a time."""

INDEX_NAMES = re.compile(r"ind(ex|ices)|codes?|tokens?|ids", re.IGNORECASE)

MOST_BITS = 24
"""Largest number of bits of a code that is looked up nowhere."""

Read = Literal["output", "input", "vectors", "nearest", "residual"]
"""Where codes are read: integers of an output, integers of an input, the codes whose vectors an output has, the codes
nearest to an input, or those of several levels, each of which is nearest to what the levels before it leave."""


@dataclass(frozen=True)
class Codebook:
    """One codebook, and how it is read which codes are chosen."""

    path: str
    """Of the part that is observed; empty for what is called with the images."""
    size: int
    """Number of codes; 0 where nothing states it."""
    read: Read = "output"
    number: int = 1
    """Number of codebooks that the last axis of the integers is of."""
    holder: str = ""
    """Path of the part that holds the vectors, where integers are not there."""
    tensor: str = ""
    """Name of the vectors there."""
    axis: int = 1
    """Of the latents along which their vectors are."""
    is_normalized: bool = False
    """Whether quantized vectors have length 1."""


class Chain(NamedTuple):
    """Parts around one codebook, the outermost first, any of which may show the codes."""

    parts: tuple[str, ...]
    codebook: Codebook
    is_plain: bool
    """Whether it is an embedding with a usual name whose holder is not called a quantizer."""


class Call(NamedTuple):
    """What a part was given, and what it returned."""

    inputs: list[Any]
    output: Any


# ---- which parts may be quantizers ----


def quantizers_in(module: nn.Module, path: str = "", size: int | None = None, unsized: bool = False) -> list[Chain]:
    """Returns what by its name and its parts may quantize, without calling anything.

    Args:
        module: A module.
        path: Of the only part that is looked at; empty for all of them.
        size: Number of codes, where it is stated; by default the parts say it.
        unsized: Whether parts are returned as well of which nothing says how many codes they have.

    Example:
        >>> found = quantizers_in(nn.ModuleDict({"codebook": nn.Embedding(8, 2), "classes": nn.Embedding(10, 2)}))
        >>> [(chain.parts, chain.codebook.size) for chain in found]
        [(('codebook',), 8)]
    """
    # a codebook that is shared has a path in each of its quantizers
    parts = dict(module.named_modules(remove_duplicate=False))
    found = [
        name
        for name, part in parts.items()
        if (path and name == path) or ((not path or _is_inside(name, path)) and _may_quantize(name, part, parts))
    ]
    chains = []
    for name in found:
        if any(_is_inside(other, name) for other in found):
            continue
        around = [other for other in found if _is_inside(name, other)]
        alone = [a for a in around if all(o in (name, a) or _is_inside(name, o) for o in found if _is_inside(o, a))]
        chain = _chain((*alone, name), parts, size, unsized)
        chains += [chain] if chain is not None else []
    return chains


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _may_quantize(path: str, part: nn.Module, parts: dict[str, nn.Module]) -> bool:
    outer, _, name = path.rpartition(".")
    if _is_torchs(part):
        if not isinstance(part, nn.Embedding):
            return False
        if CODES.fullmatch(name):
            return True
        beside = [n for n, child in parts[outer].named_children() if child is not part and _is_called_so(n, child)]
        return VECTORS.fullmatch(name) is not None and not beside and _is_in_quantizer(path, parts)
    if path and _is_called_so(name, part):
        return True
    inside = bool(path) and _is_in_quantizer(path, parts)
    names = (*_own_vectors(part), *_own_levels(part))
    return any(CODES.fullmatch(key) or (inside and VECTORS.fullmatch(key)) for key in names)


def _is_torchs(part: nn.Module) -> bool:
    return type(part).__module__.partition(".")[0] == "torch"


def _is_called_so(name: str, part: nn.Module) -> bool:
    """Whether the name of a part, or of its class, says that it quantizes."""
    if _is_torchs(part):
        return isinstance(part, nn.Embedding) and CODES.fullmatch(name) is not None
    return KINDS.search(type(part).__name__) is not None or PARTS.fullmatch(name) is not None


def _is_in_quantizer(path: str, parts: dict[str, nn.Module]) -> bool:
    """Whether a part is inside of something that quantizes by its name, or of a whole model that does."""
    while path:
        path = path.rpartition(".")[0]
        if _is_called_so(path.rpartition(".")[2], parts[path]):
            return True
    return False


def _own_vectors(part: nn.Module) -> list[str]:
    """Names of the tensors of a part that may be the vectors of codes."""
    parameters, buffers, _ = compat.own_tensors(part)
    return [
        name
        for name, tensor in {**parameters, **buffers}.items()
        if isinstance(tensor, Tensor)
        and not nn.parameter.is_lazy(tensor)
        and tensor.is_floating_point()
        and (tensor.ndim == 2 or (tensor.ndim == 3 and len(tensor) == 1))
        and (isinstance(part, nn.Embedding) or CODES.fullmatch(name) or VECTORS.fullmatch(name))
    ]


def _own_levels(part: nn.Module) -> list[str]:
    """Names under which a part holds the vectors of several levels, each of as many codes."""
    held = {**vars(part), **{name: value for tensors in compat.own_tensors(part) for name, value in tensors.items()}}
    names = [name for name in held if CODES.fullmatch(name) or VECTORS.fullmatch(name)]
    return [name for name in names if len({level.shape for level in _levels_in(held[name])}) == 1]


def _levels_in(held: Any) -> list[Tensor]:
    """The vectors (K, D) of each of several levels; nothing where these are none."""
    levels = list(held) if isinstance(held, (nn.ParameterList, nn.ModuleList, list, tuple)) else []
    if isinstance(held, Tensor) and not nn.parameter.is_lazy(held) and held.ndim == 3:
        levels = list(held)
    levels = [level.weight if isinstance(level, nn.Embedding) else level for level in levels]
    fit = [isinstance(level, Tensor) and level.ndim == 2 and level.is_floating_point() for level in levels]
    return [level.detach() for level in levels] if len(fit) > 1 and all(fit) else []


def _chain(paths: tuple[str, ...], parts: dict[str, nn.Module], size: int | None, unsized: bool) -> Chain | None:
    number, holder, tensor = 1, "", ""
    read: Read = "output"
    for path in reversed(paths):
        part = parts[path]
        names = sorted(_own_vectors(part), key=lambda name: CODES.fullmatch(name) is None)
        if names and not tensor:
            holder, tensor = path, names[0]
        levels = _own_levels(part)
        if levels and not tensor:
            vectors = _levels_in(getattr(part, levels[0]))
            holder, tensor, read, number, size = path, levels[0], "residual", len(vectors), len(vectors[0])
        size = size or stated_size(part, None, SIZES)
        separate = getattr(part, "heads", 1) if getattr(part, "separate_codebook_per_head", False) else 1
        number = max(number, separate, stated_size(part, None, ("num_codebooks",)) or 1)
    if size is None and tensor:
        size = getattr(parts[holder], tensor).shape[-2]
    if size is None and not unsized:
        return None
    outer, _, name = paths[-1].rpartition(".")
    owned = bool(outer) and _is_called_so(outer.rpartition(".")[2], parts[outer])
    is_plain = isinstance(parts[paths[-1]], nn.Embedding) and CODES.fullmatch(name) is None and not owned
    codebook = Codebook(paths[-1], size or 0, read, number, holder, tensor)
    return Chain(tuple(path for path in paths if path), codebook, is_plain)


def is_of_frozen(module: nn.Module, chain: Chain) -> bool:
    """Returns whether codes are chosen by a part that is not trained though the module is, such as a pretrained first stage.

    It is the smallest one around the codebook that has other weights as well, since moving averages train a codebook without
    gradients.
    """
    if not any(weight.requires_grad for weight in module.parameters()):
        return False
    path = chain.codebook.path
    own = set(module.get_submodule(path).parameters())
    while path := path.rpartition(".")[0]:
        weights = set(module.get_submodule(path).parameters())
        if weights - own:
            return not any(weight.requires_grad for weight in weights)
    return False


# ---- how their codes are read ----


@contextmanager
def _observed(module: nn.Module, paths: Sequence[str], take: Callable[[str, Call], None]) -> Iterator[None]:
    """Passes on what the parts of a copy are given and return inside the context."""

    def hook(path: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take(path, Call([*args, *kwargs.values()], output))

    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            handle = module.get_submodule(path).register_forward_hook(partial(hook, path), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def settled(
    chains: Sequence[Chain],
    module: nn.Module,
    run: Callable[[], Any],
    n: int,
    called: set[str],
    of_output: bool = False,
) -> list[Codebook]:
    """Returns the codebooks whose codes can be read while something runs on n images.

    Args:
        chains: What may be a quantizer.
        module: The copy that they are parts of.
        run: Runs the copy.
        n: Number of images.
        called: Paths of the parts that were called in any run, to which those of this one are added.
        of_output: Whether vectors that it returns may stand for quantized ones.
    """
    calls: dict[str, list[Call]] = {}
    paths = [path for chain in chains for path in chain.parts]
    with _observed(module, paths, lambda path, call: calls.setdefault(path, []).append(call)):
        output = run()
    called.update(calls)
    found = []
    for chain in chains:
        chain = _sized(chain, calls, n)
        ways = list(_ways(chain, module))
        if of_output:
            integers = [replace(chain.codebook, path="")] if len(chains) == 1 else []
            ways = [*integers, replace(chain.codebook, path="", read="vectors")]
        if chain.is_plain:
            # what is called with integers that are no codes holds no codes either
            ways = [way for way in ways if way.read in ("output", "input") or not called & set(chain.parts)]
        known = {"": [Call([], output)]} if of_output else calls
        readable = (
            one for way in ways if known.get(way.path) for one in [_readable(way, module, known[way.path], n, chain)]
        )
        found += [one for one in readable if one is not None][:1]
    return found


def _sized(chain: Chain, calls: dict[str, list[Call]], n: int) -> Chain:
    """Returns a chain with the number of codes that calls of its parts show, where nothing states it."""
    shown = [_lookup_free_size(call, n) for path in chain.parts for call in calls.get(path, [])]
    if chain.codebook.size or not shown or not max(shown):
        return chain
    return chain._replace(codebook=replace(chain.codebook, size=max(shown)))


def _lookup_free_size(call: Call, n: int) -> int:
    """Number of codes where integers of an output have the signs of its vectors as their bits, else 0."""
    codes, vectors = (
        next(integers_in(call.output, n), None),
        next((t for t in _floats(call.output) if t.ndim > 1), None),
    )
    if codes is None or vectors is None or not bool(torch.isclose(vectors.abs(), vectors.abs().max(), rtol=1e-3).all()):
        return 0
    for axis in {1, vectors.ndim - 1}:
        signs = (vectors.movedim(axis, -1) > 0).long()
        powers = 2 ** torch.arange(signs.shape[-1], device=signs.device) if signs.shape[-1] <= MOST_BITS else ()
        for weights in (powers, powers.flip(0)) if isinstance(powers, Tensor) else ():
            if torch.equal((signs * weights).sum(-1).flatten(), codes.long().flatten()):
                return int(2 ** signs.shape[-1])
    return 0


def _ways(chain: Chain, module: nn.Module) -> Iterator[Codebook]:
    codebook, parts = chain.codebook, chain.parts
    if codebook.read == "residual":
        yield from (replace(codebook, path=path) for path in reversed(parts))
        yield from (replace(codebook, path=path, read="output") for path in parts)
        # integers of all levels together, of as many codes as a part states
        stated = [path for path in parts if stated_size(module.get_submodule(path), None, SIZES) == codebook.size]
        yield from (replace(codebook, path=path, read="output", number=1) for path in stated)
        return
    yield from (replace(codebook, path=path) for path in parts)
    if parts and isinstance(module.get_submodule(parts[-1]), nn.Embedding):
        yield replace(codebook, path=parts[-1], read="input")
    if codebook.tensor:
        yield from (replace(codebook, path=path, read="vectors") for path in reversed(parts))
        yield from (replace(codebook, path=path, read="nearest") for path in reversed(parts))


def _readable(codebook: Codebook, module: nn.Module, calls: list[Call], n: int, chain: Chain) -> Codebook | None:
    """Returns a codebook as it can be read from calls, or None where it cannot be."""
    try:
        if codebook.read in ("output", "input"):
            codes = [_integers(codebook, call, n) for call in calls]
            inside = all(bool(((c >= -1) & (c < codebook.size)).all()) for c in codes)
            enough = not chain.is_plain or sum(c[0].numel() for c in codes) >= FEWEST
            if chain.codebook.read == "residual" and codebook.number > 1:
                # each level has integers of its own
                enough = enough and all(c.ndim == 3 for c in codes)
            return codebook if codes and inside and enough else None
        if codebook.read == "residual":
            return next((one for one in _along_axes(codebook) if _is_residual(one, module, calls, n)), None)
        vectors = _vectors_of(codebook, module)
        latents = _latents(codebook, calls[0])
    except (ValueError, AttributeError):
        return None
    axes = [
        axis for axis in (1, latents.ndim - 1) if 0 < axis < latents.ndim and latents.shape[axis] == vectors.shape[1]
    ]
    tried = [replace(codebook, axis=axis, is_normalized=unit) for axis in dict.fromkeys(axes) for unit in (False, True)]
    if codebook.read == "nearest" or not codebook.path:
        # of rows, vectors are along the last axis
        return (tried[-2] if latents.ndim == 3 else tried[0]) if tried and len(latents) == n else None
    best = min(tried, key=lambda one: _distance(one, latents, vectors), default=None)
    return best if best is not None and len(latents) == n and _distance(best, latents, vectors) < ON_CODES else None


def _along_axes(codebook: Codebook) -> list[Codebook]:
    return [replace(codebook, axis=axis) for axis in (1, -1)]


def _is_residual(codebook: Codebook, module: nn.Module, calls: list[Call], n: int) -> bool:
    """Whether the vectors of all levels add up to what each call returns."""
    levels = _levels_of(codebook, module)
    for call in calls:
        latents = _latents(codebook, call)
        output = next((t for t in _floats(call.output) if t.shape == latents.shape), None)
        if output is None or len(latents) != n or latents.shape[codebook.axis] != levels[0].shape[1]:
            return False
        _, total = _residual(codebook, latents, levels)
        length = float(total.norm(dim=-1).max())
        distance = float((total - output.detach().movedim(codebook.axis, -1)).norm(dim=-1).max())
        if not distance < ON_CODES * max(length, 1e-12):
            return False
    return bool(calls)


def _levels_of(codebook: Codebook, module: nn.Module) -> list[Tensor]:
    return _levels_in(getattr(module.get_submodule(codebook.holder), codebook.tensor))


def _residual(codebook: Codebook, latents: Tensor, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The numbers (n, P, levels) of the vectors that are nearest to what is left, and their sum (n, ..., D)."""
    rest = latents.movedim(codebook.axis, -1)
    found = []
    for level in levels:
        codes, _ = _nearest(replace(codebook, axis=-1), rest, level)
        found.append(codes)
        rest = rest - level[codes].view(rest.shape)
    return torch.stack(found, -1), latents.movedim(codebook.axis, -1) - rest


def _integers(codebook: Codebook, call: Call, n: int) -> Tensor:
    """The integers (n, P) or (n, P, number) of a call.

    Raises:
        ValueError: If it has none.
    """
    given = next(integers_in(call.inputs if codebook.read == "input" else call.output, n), None)
    if given is None:
        raise ValueError("there are no integers")
    if codebook.number > 1 and given.ndim > 1 and given.shape[-1] == codebook.number:
        return given.reshape(n, -1, codebook.number)
    return given.reshape(n, -1)


def integers_in(output: Any, n: int, depth: int = 0) -> Iterator[Tensor]:
    """Yields the tensors of integers in an output, as many for each of n images, those with names of indices first.

    Example:
        >>> quantized, codes, loss = torch.zeros(2, 4, 3, 3), torch.ones(2, 3, 3, dtype=torch.long), torch.zeros(())
        >>> [tuple(found.shape) for found in integers_in((quantized, codes, loss), 2)]
        [(2, 3, 3)]
    """
    if isinstance(output, Tensor):
        if output.dtype in (torch.int64, torch.int32, torch.int16) and output.numel() and output.numel() % n == 0:
            yield output.detach()
    elif depth < MAX_DEPTH and output is not None:
        fields = fields_of(output)
        parts = [fields[name] for name in sorted(fields, key=lambda name: INDEX_NAMES.search(name) is None)]
        if not fields and isinstance(output, (tuple, list)):
            parts = list(output)
        for part in parts:
            yield from integers_in(part, n, depth + 1)


def _latents(codebook: Codebook, call: Call) -> Tensor:
    """The first latents in the output or in the input of a call.

    Raises:
        ValueError: If it has none.
    """
    source = call.inputs if codebook.read in ("nearest", "residual") else call.output
    found = next((t for t in _floats(source) if t.ndim > 1), None)
    if found is None:
        raise ValueError("there are no latents")
    return found.detach()


def _floats(output: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif depth < MAX_DEPTH and output is not None:
        parts = list(fields_of(output).values())
        if not parts and isinstance(output, (tuple, list)):
            parts = list(output)
        for part in parts:
            yield from _floats(part, depth + 1)


def _vectors_of(codebook: Codebook, module: nn.Module) -> Tensor:
    """The vectors (K, D) of a codebook.

    Raises:
        AttributeError: If the module has none.
    """
    vectors: Tensor = getattr(module.get_submodule(codebook.holder), codebook.tensor).detach()
    vectors = vectors[0] if vectors.ndim == 3 else vectors
    return vectors.T if len(vectors) != codebook.size == vectors.shape[1] else vectors


def _nearest(codebook: Codebook, latents: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (n, P) of the nearest vectors, and the distances."""
    rows = latents.movedim(codebook.axis, -1).flatten(0, -2).to(vectors.dtype)
    if codebook.is_normalized:
        rows, vectors = F.normalize(rows, dim=1), F.normalize(vectors, dim=1)
    nearest = [torch.cdist(some, vectors).min(1) for some in pieces(rows, max(1, PAIRS // len(vectors)))]
    distances, codes = (torch.cat([one[part] for one in nearest]).view(len(latents), -1) for part in (0, 1))
    return codes, distances


def _distance(codebook: Codebook, latents: Tensor, vectors: Tensor) -> float:
    """The largest distance of a vector from a code, relative to the length of the vectors."""
    _, distances = _nearest(codebook, latents, vectors)
    length = 1.0 if codebook.is_normalized else float(latents.movedim(codebook.axis, -1).norm(dim=-1).max())
    return float(distances.max()) / max(length, 1e-12)


@dataclass(frozen=True)
class CodebookReader:
    """Reads the codes of codebooks while the copy of a module encodes or reconstructs images."""

    codebooks: tuple[Codebook, ...]
    need: Need
    """What the copy does."""
    way: str
    """Name of the way in which it does."""

    @property
    def sizes(self) -> list[int]:
        """Number of codes of each codebook."""
        return [one.size for one in self.codebooks for _ in range(one.number)]

    @property
    def name(self) -> str:
        """What log lines call the codebooks."""
        names = [f"self.{one.path or one.holder}".rstrip(".") for one in self.codebooks]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    @contextmanager
    def reading(self, module: nn.Module, n: int) -> Iterator[Callable[[Any], list[Tensor]]]:
        """Reads the codes that are chosen for n images inside the context.

        Yields:
            A callable from what the copy returned to the codes (n, P) of each codebook, which raises ValueError where these
            could not be read. Calls of the copy never fail by it.
        """
        seen: dict[Codebook, list[Tensor]] = {one: [] for one in self.codebooks}
        failures: list[Exception] = []

        def take(path: str, call: Call) -> None:
            try:
                for one in self.codebooks:
                    if one.path == path:
                        seen[one].append(_codes(one, module, call, n))
            except Exception as error:
                failures.append(error)

        def finished(output: Any) -> list[Tensor]:
            take("", Call([], output))
            if failures:
                raise ValueError(f"the codes of {self.name} could not be read: {failures[0]}") from failures[0]
            missing = [one.path for one in self.codebooks if not seen[one]]
            if missing:
                raise ValueError(f"self.{missing[0]} was not called for real images, though it was before.")
            codes = []
            for one in self.codebooks:
                joined = torch.cat(seen[one], 1)
                codes += list(joined.unbind(-1)) if joined.ndim == 3 else [joined]
            return [one.int() for one in codes]

        with _observed(module, [one.path for one in self.codebooks if one.path], take):
            yield finished


def _codes(codebook: Codebook, module: nn.Module, call: Call, n: int) -> Tensor:
    if codebook.read in ("output", "input"):
        return _integers(codebook, call, n)
    if codebook.read == "residual":
        return _residual(codebook, _latents(codebook, call), _levels_of(codebook, module))[0]
    return _nearest(codebook, _latents(codebook, call), _vectors_of(codebook, module))[0]
