"""Tells by a training step whether what returns data of the shape of images is trained to return the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gendiag.model.denoising import TrainingStep, tensor_like

SHIFT = 0.05
"""Distance from the images, in their standard deviations, at which the gradient of the loss is looked at."""

LEAST_SHARE = 0.8
"""Share of the numbers at which the loss must rise with the distance from the images."""

LEAST_NUMBERS = 16
"""Number of these below which nothing is known."""

MOST_PARTS = 4
"""Number of parts that are looked at, the outermost first."""


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
    try:
        calls, _ = step.calls(seed)
    except Exception:
        return None
    shapes = [images] if images.ndim < 3 else [images, images.flatten(1)]
    answers: list[bool] = []
    seen: set[str] = set()
    for call in sorted(calls, key=lambda call: len(call.path.split(".")) if call.path else 0):
        for wanted in shapes:
            output = tensor_like(call.output, wanted, len(wanted))
            if output is None or output.shape != wanted.shape or call.path in seen or len(seen) == MOST_PARTS:
                continue
            seen.add(call.path)
            given = [part.detach() for part in (*call.args, *call.kwargs.values()) if _is_like(part, wanted)]
            for target in (*given[:1], wanted):
                answer = _aims_at(step, call.path, call.output, target, seed)
                answers += [] if answer is None else [answer]
                if answer:
                    return True
    return False if answers else None


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
