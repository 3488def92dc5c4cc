"""Tells by a training step whether what returns data of the shape of images is trained to return them, or their logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gendiag.model.denoising import Call, TrainingStep, tensor_like

SHIFT = 0.05
"""Distance from the images, in their standard deviations, at which the gradient of the loss is looked at."""

LEAST_SHARE = 0.8
"""Share of the numbers at which the loss must rise with the distance from the images."""

LEAST_NUMBERS = 16
"""Number of these below which nothing is known."""

Activation = Literal["sigmoid", "softmax"]
"""What a training step applies to logits before it compares them with images; names of functions of torch."""

MOST_PARTS = 4
"""Number of parts that are looked at, the outermost first."""

BLACK = 0.01
"""Distance from 0 and 1 within which values have no logit that is reached: the loss falls beyond that of this value."""

LOGITS_SHIFT = 0.1
"""Distance from logits at which the gradient of the loss is looked at."""


def reconstructs(step: TrainingStep, images: Tensor, seed: int) -> bool | None:
    """Returns whether the loss of a training step is least where a part of the module returns its input, or the images.

    What is trained to return latents, scores, noise or logits has its least loss elsewhere. Any loss will do that rises on
    both sides of its target, such as squared, absolute and binary cross entropies, or a likelihood.

    Args:
        step: Of the copy; inside ``isolated``.
        images: (N, ...) of its batch.
        seed: Of the step.

    Returns:
        None where no part returns data of that shape, or the step cannot be run.
    """
    answers: list[bool] = []
    for call, wanted in _returning(step, images, seed):
        given = [part.detach() for part in (*call.args, *call.kwargs.values()) if _is_like(part, wanted)]
        for target in (*given[:1], wanted):
            answer = _aims_at(step, call.path, call.output, target, seed)
            answers += [] if answer is None else [answer]
            if answer:
                return True
    return False if answers else None


def activation_of_logits(step: TrainingStep, images: Tensor, seed: int) -> Activation | None:
    """Returns what makes images of what a part returns, where the loss of a training step is least at their logits.

    The loss may be any, such as a binary cross entropy with logits, or a squared error of the sigmoid. A step that makes its
    images black and white before it compares them has its least loss beyond all logits.

    Args:
        step: Of the copy; inside ``isolated``.
        images: (N, ...) of its batch.
        seed: Of the step.

    Returns:
        None as well where images leave 0 to 1, no part returns data of that shape, or the step cannot be run. A softmax is one
        of channels, or of the columns of rows.
    """
    if float(images.amin()) < 0 or float(images.amax()) > 1:
        return None
    for call, wanted in _returning(step, images, seed):
        if any(_aims_at_logits(step, call, wanted, seed, binary) for binary in (False, True)):
            if not _is_normalized(step, call, wanted, seed):
                return "sigmoid"
            sums = wanted.sum(1)
            return "softmax" if torch.allclose(sums, torch.ones_like(sums)) else None
    return None


def _returning(step: TrainingStep, images: Tensor, seed: int) -> Iterator[tuple[Call, Tensor]]:
    """Yields calls of the outermost parts that return data of the shape of images, and the images in that shape."""
    try:
        calls, _ = step.calls(seed)
    except Exception:
        return
    shapes = [images] if images.ndim < 3 else [images, images.flatten(1)]
    # gray images may lack the axis of their channel
    shapes += [images[:, 0]] if images.ndim == 4 and images.shape[1] == 1 else []
    seen: set[str] = set()
    for call in sorted(calls, key=lambda call: len(call.path.split(".")) if call.path else 0):
        for wanted in shapes:
            output = tensor_like(call.output, wanted, len(wanted))
            if output is None or output.shape != wanted.shape or call.path in seen or len(seen) == MOST_PARTS:
                continue
            seen.add(call.path)
            yield call, wanted


def _is_like(value: Any, wanted: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == wanted.shape


def _aims_at(step: TrainingStep, path: str, template: Any, target: Tensor, seed: int) -> bool | None:
    """Whether the loss rises on both sides of a target, number by number.

    Zeros tell nothing, since other losses have their minimum there as well.
    """
    shift = SHIFT * float(target.std(correction=0))
    middle = (target.amax() + target.amin()) / 2
    inwards = shift * torch.where(target < middle, 1.0, -1.0).to(target)
    answer: bool | None = None
    # beyond the range of the images, some losses are not defined
    for offset in (inwards, -inwards):
        try:
            _, gradient = step.gradient(path, seed, template, target + offset)
        except Exception:
            return answer
        known = (target.abs() > 2 * shift) & (gradient != 0)
        if int(known.sum()) < LEAST_NUMBERS:
            return None
        answer = float((gradient * offset > 0)[known].double().mean()) >= LEAST_SHARE
        if not answer:
            return False
    return answer


def _aims_at_logits(step: TrainingStep, call: Call, images: Tensor, seed: int, binary: bool) -> bool:
    """Whether the loss falls towards the logits of most bright and of most dark numbers, and rises beyond those of grey ones.

    Args:
        step: The step.
        call: Of the part that may return logits.
        images: (N, ...) in the shape that it returns.
        seed: Of the step.
        binary: Whether grey numbers are taken for black or white.
    """
    outwards = torch.where(images < 0.5, -1.0, 1.0).to(images)
    nearest = (outwards > 0).to(images) if binary else images
    logits = nearest.clamp(BLACK, 1 - BLACK).logit()
    beyond = torch.where((nearest - 0.5).abs() < 0.5 - BLACK, -outwards, outwards)
    # on the near side of the logits, and on the far side
    for side, falls in ((-1, outwards), (1, beyond)):
        try:
            shifted = logits + side * LOGITS_SHIFT * outwards
            _, gradient = step.gradient(call.path, seed, call.output, shifted)
        except Exception:
            return False
        for numbers in (outwards < 0, outwards > 0):
            known = numbers & (gradient != 0)
            if int(known.sum()) < LEAST_NUMBERS:
                return False
            if float((gradient * falls < 0)[known].double().mean()) < LEAST_SHARE:
                return False
    return True


def _is_normalized(step: TrainingStep, call: Call, images: Tensor, seed: int) -> bool:
    """Whether equal logits and logits that are all larger by 1 have the same loss, as those of a softmax have."""
    zeros = torch.zeros_like(images)
    (low, _), (high, _) = (step.gradient(call.path, seed, call.output, zeros + value) for value in (0, 1))
    return torch.allclose(low, high, rtol=1e-5)
