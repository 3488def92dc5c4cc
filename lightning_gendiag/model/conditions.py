"""Shows by training steps whether a model is always trained with the classes of its data."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lightning_gendiag.model.denoising import Call, TrainingStep
from lightning_gendiag.model.fakes import is_of_discriminator
from lightning_gendiag.model.isolation import isolated_in_place

STEPS = 32
"""Number of training steps without a null class after which there is none: one that takes the place of a tenth of the batches
is missed in 3 % of the runs, and one that takes that of single rows practically never."""


def classes_always_given(step: TrainingStep, labels: Tensor, seed: int) -> int | None:
    """Returns whether training gives the classes of its batch in each call of the parts that are given them.

    Classifier-free guidance drops some of them (https://arxiv.org/abs/2207.12598), often only in training mode.

    Args:
        step: Of the copy; inside ``isolated``.
        labels: (rows,) the classes of its batch.
        seed: Of the first step.

    Returns:
        The number of columns where they are given as one-hot rows, 0 where they are integers; None where some are dropped, or
        nothing is given them.
    """
    if bool((labels == labels[0]).all()):
        return None
    first: list[tuple[str, int]] = []
    with isolated_in_place(step.module):
        for part in step.module.modules():
            # layers of torch would draw and count, and classes are dropped elsewhere
            part.training = type(part).__module__.partition(".")[0] != "torch"
        for number in range(STEPS):
            given: list[tuple[str, int]] = []
            # of all but the first step, what follows would show nothing new
            ends = partial(_is_last, step.module, labels, first, given)
            paths = [call.path for call in step.entries(seed + number, ends)]
            first = first or given
            # parts may be called more often in one step than in another, as for self-conditioning
            if not given or set(given) != set(first) or sum(map(paths.count, {path for path, _ in given})) > len(given):
                return None
    return max(columns for _, columns in first)


def _is_last(
    module: nn.Module, labels: Tensor, first: list[tuple[str, int]], given: list[tuple[str, int]], call: Call
) -> bool:
    """Notes a call that is given classes; returns whether as many as in the first step have come, and the last one is over."""
    # what it calls may be given others
    is_over = 0 < len(first) <= len(given) and not call.path.startswith(f"{given[-1][0]}.".lstrip("."))
    columns = _given_in(call, labels)
    if columns is not None and _may_take_classes(module, call.path):
        given.append((call.path, columns))
    return is_over


def _may_take_classes(module: nn.Module, path: str) -> bool:
    """Whether a part is no loss, which has no weights, and belongs to no discriminator."""
    return next(module.get_submodule(path).parameters(), None) is not None and not is_of_discriminator(module, path)


def _given_in(call: Call, labels: Tensor) -> int | None:
    """The number of one-hot columns of an argument that holds the classes, 0 for integers; None where there is none."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.ndim and len(value) == len(labels):
            if value.numel() == len(labels) and torch.equal(value.flatten().double(), labels.double()):
                return 0
            if value.ndim == 2 and (columns := _columns(value.detach(), labels)):
                return columns
    return None


def _columns(rows: Tensor, labels: Tensor) -> int:
    """The number of one-hot columns of the classes (N,) at the end of rows (N, F), behind which nothing stands; else 0."""
    width, label = rows.shape[1], int(labels[0])
    places: list[int] = (rows[0] == 1).nonzero().flatten().tolist()
    for columns in (width - place + label for place in places):
        if int(labels.max()) < columns <= width:
            wanted = nn.functional.one_hot(labels, columns)
            if torch.equal(rows[:, width - columns :].double(), wanted.double()):
                return columns
    return 0
