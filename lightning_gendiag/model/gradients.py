"""Reads the norms of gradients just before optimizers use them, at a few steps, so that training does not notice."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

NEWEST = 6
"""Number of norms that are kept."""

SAMPLED = 32
"""Number of weights of each tensor by which it shows whether training changes them."""


class GradientReader:
    """Norms of the gradients of several groups of weights, at the steps 1, 2, 4, 8, ... since the last evaluation.

    Args:
        weights: The weights of each group, by its name.
    """

    def __init__(self, weights: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.weights = {name: list(tensors) for name, tensors in weights.items()}
        self.steps = dict.fromkeys(weights, 0)
        """Number of optimizer steps of each group."""
        self._since = dict.fromkeys(weights, 0)
        self._norms: dict[str, deque[Tensor]] = {name: deque(maxlen=NEWEST) for name in weights}
        self._groups = {id(p): name for name, tensors in weights.items() for p in tensors}
        self._trained: WeakKeyDictionary[torch.optim.Optimizer, dict[str, list[Tensor]]] = WeakKeyDictionary()

    def count(self, optimizer: torch.optim.Optimizer) -> bool:
        """Counts a step that an optimizer is about to take, and returns whether norms are to be read at it."""
        trained = self._trained.get(optimizer)
        if trained is None:
            trained = self._trained[optimizer] = {}
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    if id(tensor) in self._groups:
                        trained.setdefault(self._groups[id(tensor)], []).append(tensor)
        due = False
        for name in trained:
            self.steps[name] += 1
            self._since[name] += 1
            due = due or self._is_due(name)
        return due

    def _is_due(self, name: str) -> bool:
        return self._since[name] & (self._since[name] - 1) == 0

    def read(self, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> None:
        """Reads the norms at a step that was counted.

        Args:
            optimizer: The optimizer.
            scale: The factor by which the gradients are still multiplied.
        """
        for name, tensors in self._trained[optimizer].items():
            norm = norm_of(p.grad for p in tensors) if self._is_due(name) else None
            if norm is not None:
                self._norms[name].append(norm / scale)

    def norms(self, name: str) -> Tensor:
        """Returns the newest norms (n,) of a group in float64, n up to 6; inf and nan where gradients are."""
        held = self._norms[name]
        return torch.stack(list(held)).double().cpu() if held else torch.empty(0, dtype=torch.float64)

    def restart(self) -> None:
        """Begins to count steps anew, after an evaluation."""
        self._since = dict.fromkeys(self._since, 0)


def norm_of(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """Returns the norm () of gradients together, in float32; None where there are none.

    Example:
        >>> norm_of([torch.tensor([3.0]), None, torch.tensor([[4.0]])])
        tensor(5.)
    """
    dense = [g.detach() for g in gradients if g is not None and g.layout is torch.strided]
    if not dense:
        return None
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32 if g.dtype != torch.float64 else None) for g in dense]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))
    return total


def sampled_weights(weights: Sequence[Tensor]) -> Tensor:
    """Returns some numbers (n,) of each of several tensors, evenly spaced, in float64 on the CPU."""
    rows = []
    for tensor in weights:
        flat = tensor.detach().reshape(-1)
        rows.append(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].double())
    return torch.cat(rows).cpu() if rows else torch.empty(0, dtype=torch.float64)
