"""Shows by a training step what noise a generator is given, and lets training steps make samples where nothing else does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_gendiag.model.adapters.own import is_discriminator, signature_of
from lightning_gendiag.model.batches import one_hot_rows
from lightning_gendiag.model.denoising import Call, TrainingStep
from lightning_gendiag.model.outputs import data_in, tensors_in

LEAST_NUMBERS = 32
"""Number of values of noise below which its distribution is not judged."""

MOST_EQUAL = 0.02
"""Largest share of zeros and ones in normal noise; more are one-hot rows beside it, or binary codes."""

SAME = 1e-5
"""Largest difference that another batch may make, relative to that of other draws, where only rounding is left."""


class Fake(NamedTuple):
    """What a part returned in a training step, as far as it is data."""

    path: str
    number: int
    """Of the call, among those of the part in that step."""
    data: Tensor
    """(rows, *shape)."""
    given: tuple[Any, ...]
    """Its arguments; empty where the first one was made by another part, and so is no noise."""


class Joined(NamedTuple):
    """A part that is given noise and the one-hot rows of classes, as one tensor or beside each other."""

    path: str
    length: int
    """Of the noise."""
    classes: int
    classes_first: bool
    is_map: bool
    """Whether it is given maps of one pixel."""
    is_beside: bool = False
    """Whether the rows are a second argument, of any name, and rows."""

    @property
    def described(self) -> str:
        """Says what samples are made of."""
        rows = "and one-hot labels" if self.is_beside else "joined with one-hot labels"
        return f"self.{self.path or 'forward'} from normal noise (n, {self.length}) {rows}"

    def __call__(self, module: nn.Module, noise: Tensor, labels: Tensor) -> Any:
        """Returns what the part makes of noise (n, L) and labels (n,)."""
        rows = [noise, one_hot_rows(labels, self.classes).to(noise)]
        beside = rows[1:] if self.is_beside else []
        given = noise if self.is_beside else torch.cat(rows[::-1] if self.classes_first else rows, 1)
        return module.get_submodule(self.path)(given[..., None, None] if self.is_map else given, *beside)


class Fakes(NamedTuple):
    """What a training step of a module with a discriminator shows of its generator."""

    maker: tuple[str, int] | None
    """Path of the part that makes data of the draws of a step, and the number of its call; None where there is none."""
    noise: Tensor | None
    """(rows, L) noise that a generator is given; None where it is not known."""
    classes: int = 0
    """Number of classes of the one-hot rows that it is given beside its noise; 0 where there are none."""
    joined: Joined | None = None
    """Where it is given normal noise and one-hot rows."""
    is_of_batch: bool = False
    """Whether what stands for noise are rows of the batch, such as an embedding of a text."""
    labelled: frozenset[str] = frozenset()
    """Paths of the parts, discriminators among them, that are given classes (rows,) as a second argument."""
    listed: frozenset[str] = frozenset()
    """Paths of the parts that are given noise in a list, as generators that mix styles are."""
    of_batch: frozenset[str] = frozenset()
    """Paths of the parts that are always given rows of the batch, alone or joined with noise, such as layers of a generator."""


def find_fakes(step: TrainingStep, shape: tuple[int, ...], seed: int) -> Fakes:
    """Finds what makes data in a training step, whatever it is given; inside ``isolated``.

    It is the first part, the outermost first, whose output depends on the draws of the step and not on its batch: what
    translates, reconstructs or augments real images depends on the batch, and so does what takes labels of the batch.

    Args:
        step: Of the copy.
        shape: Of one image or row.
        seed: Of the step.
    """
    turned = TrainingStep(step.module, apply_to_collection(step.batch, Tensor, _turned), step.rows, step.seed)
    calls, _ = step.calls(seed, may_fail=True)
    fakes = list(_fakes_in(step, shape, calls))
    again = {fake[:2]: fake for fake in _fakes_in(turned, shape, turned.calls(seed, may_fail=True)[0])}
    other = {fake[:2]: fake for fake in _fakes_in(step, shape, step.calls(seed + 1, may_fail=True)[0])}
    makers = (fake[:2] for fake in fakes if _is_drawn(fake, again.get(fake[:2]), other.get(fake[:2])))
    noises = [fake for fake in fakes if _noise_in(fake) is not None]
    free = [fake for fake in noises if not _is_of_batch(fake, again.get(fake[:2]))]
    drawn = free[0] if free else None
    seen = Fakes(
        next(makers, None),
        _noise_in(noises[0]) if noises else None,
        is_of_batch=bool(noises),
        labelled=frozenset(call.path for call in calls if _is_given_classes(step.module, call)),
        listed=frozenset(fake.path for fake in noises if not isinstance(fake.given[0], Tensor)),
        of_batch=frozenset(fake.path for fake in noises) - {fake.path for fake in free},
    )
    if drawn is None:
        return seen
    classes = max(map(_classes_in, drawn.given[1:]), default=0)
    return seen._replace(noise=_noise_in(drawn), classes=classes, joined=_joined_in(drawn), is_of_batch=False)


def fakes_of(step: TrainingStep, maker: tuple[str, int], shape: tuple[int, ...], n: int) -> Tensor:
    """Returns data (n, *shape) that training steps make, with seeds that the global generator draws; inside ``isolated``."""
    rows: list[Tensor] = []
    while sum(map(len, rows)) < n:
        output = step.output(*maker, int(torch.randint(2**31 - 1, ())))
        rows.append(data_in(output, step.rows, shape))
    return torch.cat(rows)[:n]


def is_normal(noise: Tensor) -> bool | None:
    """Returns whether noise may be of N(0, 1): not where all of it is in -1 to 1, or a part of it is zeros and ones.

    Example:
        >>> is_normal(torch.linspace(-1, 1, 64))
        False
    """
    if noise.numel() < LEAST_NUMBERS:
        return None
    return bool((noise.abs() > 1).any()) and float(((noise == 0) | (noise == 1)).double().mean()) <= MOST_EQUAL


def is_of_discriminator(module: nn.Module, path: str) -> bool:
    """Returns whether a part is a discriminator, or belongs to one."""
    name, parent = path.rpartition(".")[2], path.rpartition(".")[0]
    return bool(path) and (is_discriminator(name, module.get_submodule(path)) or is_of_discriminator(module, parent))


def _turned(rows: Tensor) -> Tensor:
    return rows.flip(0) if rows.ndim else rows


def _is_drawn(fake: Fake, again: Fake | None, other: Fake | None) -> bool:
    """Whether data are the same with the same draws and another batch, and differ with other draws."""
    if again is None or other is None:
        return False
    # what encodes images decodes nearly the same for all of them before it is trained
    by_batch, by_draws = (float((fake.data - one.data).detach().abs().max()) for one in (again, other))
    return by_batch <= SAME * by_draws and by_draws > 0


def _is_of_batch(fake: Fake, again: Fake | None) -> bool:
    """Whether numbers that a part is given as noise are others with the same draws and another batch.

    Zeros and ones are not meant, which are one-hot rows beside noise.
    """
    z, turned = _noise_in(fake), None if again is None else _noise_in(again)
    if z is None or turned is None or z.shape != turned.shape:
        return False
    differ = ~torch.isclose(z, turned, atol=1e-5).all(0)
    return bool(((z != 0) & (z != 1))[:, differ].any())


def _is_given_classes(module: nn.Module, call: Call) -> bool:
    """Whether a part is given one integer for each of its rows, as its second argument or under the name of that."""
    signature = signature_of(module.get_submodule(call.path))
    second = list(signature.parameters)[1:2] if signature is not None else []
    given = call.args[1] if len(call.args) > 1 else next((call.kwargs.get(name) for name in second), None)
    rows = call.args[0] if call.args else None
    if not isinstance(given, Tensor) or not isinstance(rows, Tensor) or given.ndim != 1 or given.dtype == torch.bool:
        return False
    return not given.is_floating_point() and len(given) == len(rows)


def _fakes_in(step: TrainingStep, shape: tuple[int, ...], calls: Sequence[Call]) -> Iterator[Fake]:
    """Yields the calls of a training step that return data, without those of discriminators, the outermost first."""
    # all of them are held, so that no two share an address
    made = [(call.path, tensor.data_ptr()) for call in calls for tensor in tensors_in(call.output)]
    counts: Counter[str] = Counter()
    for call in sorted(calls, key=lambda call: len(call.path.split(".")) if call.path else 0):
        number = counts[call.path]
        counts[call.path] += 1
        if not is_of_discriminator(step.module, call.path):
            with suppress(ValueError):
                data = data_in(call.output, step.rows, shape)
                given = (*call.args, *call.kwargs.values())
                # a part inside may return a view of what the whole is given
                others = {address for path, address in made if not f"{path}.".startswith(f"{call.path}.")}
                is_made = call.path and any(tensor.data_ptr() in others for tensor in tensors_in(given[:1]))
                yield Fake(call.path, number, data, () if is_made else given)


def _noise_in(fake: Fake) -> Tensor | None:
    """The noise (rows, L) that a part is given first, also as maps of one pixel, or the first in a list."""
    z = fake.given[0] if fake.given else None
    z = z[0] if isinstance(z, (list, tuple)) and z else z
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim < 2 or len(z) != len(fake.data):
        return None
    return z.detach().flatten(1) if z.shape[1:].numel() == z.shape[1] else None


def _classes_in(given: Any) -> int:
    """The number of columns of one-hot rows (rows, K) of at least two classes; 0 for anything else."""
    is_rows = isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] > 1
    return given.shape[1] if is_rows and bool(((given == 0) | (given == 1)).all() and (given.sum(1) == 1).all()) else 0


def _joined_in(fake: Fake) -> Joined | None:
    """What a part is given, where it is normal noise and one-hot rows."""
    z = _noise_in(fake)
    if z is None or not isinstance(fake.given[0], Tensor):
        return None
    if len(fake.given) == 2 and (classes := _classes_in(fake.given[1])) and is_normal(z) is not False:
        return Joined(fake.path, z.shape[1], classes, False, fake.given[0].ndim > 2, is_beside=True)
    is_noise = ~((z == 0) | (z == 1)).all(0)
    places = is_noise.nonzero().flatten().tolist()
    if not places:
        return None
    for classes_first, columns in ((False, slice(places[-1] + 1, None)), (True, slice(0, places[0]))):
        classes = _classes_in(z[:, columns])
        noise = z[:, classes:] if classes_first else z[:, : z.shape[1] - classes]
        if classes and is_normal(noise) is not False:
            return Joined(fake.path, noise.shape[1], classes, classes_first, fake.given[0].ndim > 2)
    return None
