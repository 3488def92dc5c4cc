"""Finds what tells real from generated images in a module, and how it is called with images."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_gendiag.functional.arrays import as_data
from lightning_gendiag.model import compat
from lightning_gendiag.model.adapters.own import (
    AVERAGED,
    DISCRIMINATOR_KINDS,
    DISCRIMINATORS,
    accepts,
    has_forward,
    signature_of,
    takes_classes,
)
from lightning_gendiag.model.batches import Images, one_hot_rows
from lightning_gendiag.model.isolation import normalizing_by_batch
from lightning_gendiag.model.outputs import MAX_DEPTH, fields_of

if TYPE_CHECKING:
    from lightning_gendiag.model.view import ModelView, Source

DEEPEST = 3
"""Number of modules inside each other that are searched, such as ``self.model.loss.discriminator``."""

CHUNK = 64
"""Number of images that a discriminator is given at a time."""

GROUP = 4
"""Layers that compare images of a batch, as in https://arxiv.org/abs/1710.10196, take a multiple of so many."""

ADVICE = "AdversaryMonitor(discriminator=lambda module, images: ...)"

LOGIT_LOSSES = re.compile(
    r"binary_cross_entropy_with_logits|BCEWithLogitsLoss|softplus|logsigmoid|\w*hinge\w*", re.IGNORECASE
)
"""What losses call, or are called, for which scores above 0 mean real."""

Form = Callable[[nn.Module, Tensor, Tensor | None], Any]
"""Calls a discriminator with images (n, ...) and their labels (n,), which raises an error where it takes others."""


def _with_labels(part: nn.Module, images: Tensor, labels: Tensor | None) -> Any:
    return part(images, _known(labels))


def _with_one_hot(part: nn.Module, images: Tensor, labels: Tensor | None) -> Any:
    weight = next(p for p in part.parameters() if p.ndim > 1)
    classes = getattr(part, "c_dim", 0) or getattr(part, "num_classes", 0) or int(weight.shape[1])
    return part(images, _hot(labels, classes, images))


def _with_rows_joined(part: nn.Module, images: Tensor, labels: Tensor | None) -> Any:
    flat = images.flatten(1)
    return part(torch.cat([flat, _hot(labels, _inputs(part) - flat.shape[1], flat)], 1))


def _with_maps_joined(part: nn.Module, images: Tensor, labels: Tensor | None) -> Any:
    hot = _hot(labels, _inputs(part) - images.shape[1], images)
    maps = hot.view(*hot.shape, *[1] * (images.ndim - 2)).expand(-1, -1, *images.shape[2:])
    return part(torch.cat([images, maps], 1))


FORMS: dict[str, Form] = {
    "(images)": lambda part, images, labels: part(images),
    "(images.flatten(1))": lambda part, images, labels: part(images.flatten(1)),
    "(images[:, 0])": lambda part, images, labels: part(images[:, 0]),
    "(images, labels)": _with_labels,
    "(images, one-hot labels)": _with_one_hot,
    "(images and one-hot labels as rows)": _with_rows_joined,
    "(images and one-hot labels as channels)": _with_maps_joined,
    "(images, None)": lambda part, images, labels: part(images, None),
}
"""How discriminators are called, by what a line of the log says."""


@dataclass(frozen=True)
class Discriminator:
    """What scores images, as it stands in a module."""

    paths: tuple[str, ...]
    """Paths of one discriminator, or of several whose scores are averaged."""
    form: str
    """One of ``FORMS``."""

    @property
    def name(self) -> str:
        """What a line of the log calls it."""
        return f"self.{self.paths[0]}{self.form}" + f" and {len(self.paths) - 1} more" * (len(self.paths) > 1)

    @property
    def takes_labels(self) -> bool:
        """Whether it is given the classes of images."""
        return "labels" in self.form

    def parts(self, module: nn.Module) -> list[nn.Module]:
        """Returns the discriminators in a module or in a copy of it."""
        return [part_of(module, path) for path in self.paths]


def part_of(module: nn.Module, path: str) -> nn.Module:
    """Returns a part by its path in a copy, where compiled parts are what they were compiled from."""
    for name in path.split("."):
        module = compat.uncompiled(getattr(module, name))
    return module


def _known(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("there are no labels")
    return labels


def _inputs(part: nn.Module) -> int:
    """Number of features or channels that the first layer takes."""
    layers = (m for m in part.modules() if hasattr(m, "in_features") or hasattr(m, "in_channels"))
    first: Any = next(layers)
    return int(first.in_features if hasattr(first, "in_features") else first.in_channels)


def _hot(labels: Tensor | None, classes: int, like: Tensor) -> Tensor:
    if classes < 2:
        raise ValueError("there is no room for labels")
    return one_hot_rows(_known(labels), classes).to(like)


# ---- scores ----


def scores_in(output: Any, n: int, shape: tuple[int, ...] = (), depth: int = 0) -> Tensor | None:
    """Returns one score for each of n images in what a discriminator returned, or None where there is none.

    A map of scores of patches counts as their mean, and so does a list of scores at several scales. Of a tuple or a
    dictionary, such as scores and classes, the first entry with scores is taken. What is as high or as wide as
    an image is none: a reconstruction (https://arxiv.org/abs/1609.03126), or what a layer for latents makes of each row.

    Args:
        output: (n,), (n, 1) or (n, 1, ...), or a container of these.
        n: Number of images.
        shape: Of one image, (C, H, W), where known.
        depth: Number of containers around it.

    Example:
        >>> scores_in((torch.ones(2, 1), torch.zeros(2, 10)), 2)
        tensor([1., 1.])
        >>> scores_in([torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)], 2)
        tensor([0.5000, 0.5000])
    """
    if isinstance(output, Tensor):
        fits = output.is_floating_point() and output.ndim > 0 and len(output) == n and output.shape[1:2] in ((), (1,))
        # a linear layer of latents may also take the rows of an image
        as_large = any(1 < axis <= own for axis, own in zip(shape[1:], output.shape[2:], strict=False))
        fits = fits and not (output.ndim == len(shape) + 1 and as_large)
        return output.detach().float().reshape(n, -1).mean(1) if fits and output.numel() else None
    if depth >= MAX_DEPTH or output is None:
        return None
    fields = fields_of(output)
    parts = list(fields.values()) if fields else list(output) if isinstance(output, (tuple, list)) else []
    found = [score for part in parts if (score := scores_in(part, n, shape, depth + 1)) is not None]
    if not found:
        return None
    return torch.stack(found).mean(0) if isinstance(output, list) else found[0]


def scores_of(view: ModelView, discriminator: Discriminator, images: Images) -> Tensor:
    """Returns the scores (n,) that the discriminator of the copy gives to images, with the raw weights.

    Args:
        view: The view of the module.
        discriminator: What :func:`find_discriminator` returned.
        images: On any device; labels where the discriminator takes them.
    """
    parts, form = discriminator.parts(view.module), FORMS[discriminator.form]
    raw = [_tensors(part) for part in discriminator.parts(view.subject.trained)] if view.averaged else []

    def scored(some: Tensor, labels: Tensor | None) -> Tensor:
        found = []
        for number, part in enumerate(parts):
            # averaged weights are those of no opponent that the generator has met
            call = _Functional(part, raw[number]) if raw else part
            found.append(scores_in(form(call, some, labels), len(some), some.shape[1:]))
        kept = [score for score in found if score is not None]
        if not kept:
            raise ValueError(
                f"a discriminator must return one score for each image, but {discriminator.name} returns none."
            )
        return torch.stack(kept).mean(0)

    with view.isolated(exact=True), normalizing_by_batch(*parts):
        return in_groups(scored, view, images)


def in_groups(score: Callable[[Tensor, Tensor | None], Tensor], view: ModelView, images: Images) -> Tensor:
    """Returns the scores (n,) of images that are given in chunks, without a few that fill no group; inside ``isolated``."""
    n = len(images.images)
    n -= n % GROUP if n >= GROUP else 0
    view.seed()
    found = [torch.empty(0)]
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        labels = None if images.labels is None else images.labels[rows].to(view.device)
        found.append(score(view.as_input(as_data(images.images[rows])), labels).float().cpu())
    return torch.cat(found)


class _Functional(nn.Module):
    """A part of a copy that is called with other weights; its first layers can be looked at."""

    def __init__(self, part: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.part, self.tensors = part, tensors
        self.c_dim, self.num_classes = (getattr(part, name, 0) for name in ("c_dim", "num_classes"))

    def forward(self, *given: Any) -> Any:
        return torch.func.functional_call(self.part, self.tensors, given)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*part.named_parameters(), *part.named_buffers())}


# ---- finding ----


def find_discriminator(view: ModelView, path: str = "") -> Discriminator | None:
    """Finds the discriminator of a module by trying its parts on two real images; None before the first batch shows it.

    Tried are parts with usual names, and those that an optimizer of their own trains. What scores images is one, or what
    scores each patch of them.

    Args:
        view: The view of the module.
        path: Of the only part that is tried; empty for all of them.

    Raises:
        ValueError: If the module has none.
    """
    own, example = type(view.module).__name__, view.real.example
    tried = [(path,)] if path else _candidates(view)
    if not tried:
        raise ValueError(
            f"discriminator must be known, but {own} has no part with such a name, and none with an optimizer of its own. "
            f"To fix this, pass {ADVICE}."
        )
    if example is None:
        return None
    images = view.as_input(as_data(example))
    labels = _example_labels(view, len(images))
    for paths in tried:
        # classes of a projection discriminator are often optional, and without them it gives other scores
        is_labelled = not view.parts.context.labelled.isdisjoint(paths)
        for form, call in sorted(FORMS.items(), key=lambda named: is_labelled and named[1] is not _with_labels):
            with suppress(Exception), view.isolated(exact=True):
                view.seed()
                parts = [part_of(view.module, path) for path in paths]
                with normalizing_by_batch(*parts):
                    outputs = [call(part, images, labels) for part in parts]
                    fits = all(scores_in(output, len(images), images.shape[1:]) is not None for output in outputs)
                if fits:
                    # of several domains, the first is compared
                    found = Discriminator(paths[:1] if view.parts.context.count > 1 else paths, form)
                    view.say(f"Discriminator: {found.name}. To choose another, pass {ADVICE}.")
                    return found
    raise ValueError(f"discriminator must be known, but {_unsuitable(view, tried[:4])}. To fix this, pass {ADVICE}.")


def _unsuitable(view: ModelView, tried: Sequence[tuple[str, ...]]) -> str:
    """Says why parts are no discriminator of images: those that take something beside them, and those without a score."""
    parts = {f"self.{path}": part_of(view.module, path) for path, *_ in tried}
    # without classes it was not called
    has_classes = _example_labels(view, 1) is not None
    more = [name for name, part in parts.items() if not accepts(part, 1) and not (has_classes and takes_classes(part))]
    rest = [name for name in parts if name not in more]
    reasons = [f"{name} takes {signature_of(parts[name])}" for name in more]
    reasons += [f"{', '.join(rest)} return{'s' * (len(rest) == 1)} no score for each image"] if rest else []
    return "; ".join(reasons)


def _example_labels(view: ModelView, n: int) -> Tensor | None:
    labels = view.real.images.labels if view.real.images is not None else None
    if labels is not None:
        return labels[:n].to(view.device)
    return None if view.real.unlabelled else torch.zeros(n, dtype=torch.long, device=view.device)


def _candidates(view: ModelView) -> list[tuple[str, ...]]:
    """Paths of what may be a discriminator: by name, the outermost first, then by an optimizer of its own."""
    named: list[tuple[str, ...]] = []
    parts = [(path, part) for path, part in view.module.named_modules() if path and path.count(".") < DEEPEST]
    for path, part in sorted(parts, key=lambda one: one[0].count(".")):
        name = path.rpartition(".")[2]
        if AVERAGED.search(name) or not list(part.parameters()) or _is_layer_of(view.module, path, named):
            continue
        if DISCRIMINATORS.fullmatch(name) or DISCRIMINATOR_KINDS.search(type(part).__name__):
            is_list = isinstance(part, nn.ModuleList)
            named.append(tuple(f"{path}.{child}" for child, _ in part.named_children()) if is_list else (path,))
    others = [path for path, _ in parts if (path,) not in named and not _is_layer_of(view.module, path, named)]
    alone = [(path,) for path in others if _has_optimizer(view, path)]
    found = [*named, *alone]
    # what makes the samples does not judge them; a fully convolutional generator takes images as well
    generating = set(_called_paths(view, "samples")) if found and view.parts.has("sample") else set()
    # a training step that makes them calls the discriminator as well
    maker = view.parts.way("sample").path if generating else ""
    generating = {path for path in generating if not maker or f"{path}.".startswith(f"{maker}.")}
    return [paths for paths in found if not generating & set(paths)]


def _is_layer_of(module: nn.Module, path: str, named: list[tuple[str, ...]]) -> bool:
    """Whether a part is in a discriminator, whose other arguments it would be given something else in place of."""
    owners = [owner for owner, *_ in named if path.startswith(f"{owner}.")]
    return any(has_forward(part_of(module, owner)) for owner in owners)


def _has_optimizer(view: ModelView, path: str) -> bool:
    """Whether one of several optimizers trains all weights of a part, and nothing else."""
    if len(view.trainer.optimizers) < 2:
        return False
    with suppress(AttributeError):
        own = {id(p) for p in part_of(view.subject.trained, path).parameters() if p.requires_grad}
        return bool(own) and any(own == {id(p) for p in trained_by(one)} for one in view.trainer.optimizers)
    return False


def takes_logits(module: nn.Module) -> bool:
    """Returns whether the code that a training step reaches names a loss of logits, by methods and parts of the module."""
    visited: set[tuple[int, str]] = set()

    def found(owner: Any, method: str) -> bool:
        if (id(owner), method) in visited:
            return False
        visited.add((id(owner), method))
        code = getattr(getattr(type(owner), method, None), "__code__", None)
        for name in _names_in(code) if isinstance(code, types.CodeType) else ():
            part = vars(owner).get(name, owner.get_submodule(name) if name in dict(owner.named_children()) else None)
            if LOGIT_LOSSES.fullmatch(name) or LOGIT_LOSSES.fullmatch(type(part).__name__):
                return True
            if isinstance(part, nn.Module) and not is_torchs(part):
                if found(part, "forward"):
                    return True
            elif isinstance(getattr(type(owner), name, None), types.FunctionType) and found(owner, name):
                return True
        return False

    return found(module, "training_step")


def is_torchs(part: nn.Module) -> bool:
    """Returns whether a module is of torch itself."""
    return type(part).__module__.partition(".")[0] == "torch"


def _names_in(code: types.CodeType) -> list[str]:
    """Names that a function refers to, also inside of functions that it defines."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names_in(part)]
    return [*code.co_names, *inner]


def trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the tensors that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def weights_of(view: ModelView, discriminator: Discriminator, images: Source = "auto") -> dict[str, list[nn.Parameter]]:
    """Returns the weights of the module that is trained, of the ``"discriminator"`` and of the ``"generator"``.

    Those of the generator are of the parts that are called while it makes images, as far as they are trained; where
    none are, all that are trained beside the discriminator's.

    Args:
        view: The view of the module.
        discriminator: What :func:`find_discriminator` returned.
        images: What is generated.
    """
    of_discriminator = [p for part in discriminator.parts(view.subject.trained) for p in part.parameters()]
    others = {id(p) for p in of_discriminator}
    trained = {id(p) for optimizer in view.trainer.optimizers for p in trained_by(optimizer)}
    rest = [p for p in view.subject.trained.parameters() if id(p) not in others and (id(p) in trained or not trained)]
    called = _called_paths(view, images)
    own: list[nn.Parameter] = []
    for path in called:
        with suppress(AttributeError):
            own += part_of(view.subject.trained, path).parameters(recurse=False) if path else []
    # those that are frozen by mistake are in no optimizer, and averaged copies are not either
    of_generator = {id(p): p for p in own if id(p) not in others and (id(p) in trained or not trained)}
    return {"generator": list(of_generator.values()) or rest, "discriminator": of_discriminator}


def _called_paths(view: ModelView, images: Source) -> list[str]:
    """Paths of the parts of the copy that are called while it makes two images."""
    paths = {id(part): path for path, part in view.module.named_modules()}
    called: dict[str, None] = {}

    def note(part: nn.Module, inputs: Any) -> None:
        if id(part) in paths:
            called[paths[id(part)]] = None

    with suppress(Exception):
        # to look for the ways calls other parts too
        samples = view.source(images) == "samples"
        way = view.parts.way("sample" if samples else "reconstruct")
        with view.isolated():
            view.seed()
            handle = register_module_forward_pre_hook(note)
            try:
                if samples:
                    way.call(2, *((view.parts.sample_labels(2),) if way.takes_labels else ()))
                elif view.real.example is not None:
                    way.call(view.as_input(as_data(view.real.example)))
            finally:
                handle.remove()
    return list(called)
