"""Counts the operations for which the host would wait for a GPU, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READ = {
    "_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "equal", "masked_select", "bincount",
}  # fmt: skip
"""Operations that read a value, or whose result has a size that depends on values."""


class _Waits(TorchDispatchMode):
    """Counts operations that read values inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Counts the operation if it reads values, also as an index of booleans."""
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        self.count += name in READ or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        return func(*args, **(kwargs or {}))


def waits(call: Callable[[], object]) -> int:
    """Returns the number of operations of a call for which the host would wait."""
    with _Waits() as counted:
        call()
    return counted.count
