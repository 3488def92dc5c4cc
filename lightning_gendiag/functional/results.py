"""Results that can be logged as they are: named tuples that can also be read like dictionaries of their scalars."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, KeysView, ValuesView
from typing import Any, Protocol, TypeVar

from torch import Tensor

MAX_CLASS_TAGS = 20
"""Largest number of classes for which each class has scalars; more would flood the loggers with tags."""


class Result(Protocol):
    """The result of a metric: a named tuple of tensors that also gives the scalars to log."""

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars by name, without prefix, each of shape ()."""
        ...


ResultT = TypeVar("ResultT", bound=Result)


def _keys(result: Result) -> KeysView[str]:
    """Returns the names of the scalars."""
    return result.scalars().keys()


def _items(result: Result) -> ItemsView[str, Tensor]:
    """Returns pairs of a name and a tensor of shape ()."""
    return result.scalars().items()


def _values(result: Result) -> ValuesView[Tensor]:
    """Returns the scalars, each of shape ()."""
    return result.scalars().values()


def _getitem(result: Any, key: Any) -> Any:
    """Returns a scalar by its name, or a field by its position."""
    return result.scalars()[key] if isinstance(key, str) else tuple.__getitem__(result, key)


_METHODS: dict[str, Callable[..., Any]] = {"keys": _keys, "items": _items, "values": _values, "__getitem__": _getitem}


def loggable(result_class: type[ResultT]) -> type[ResultT]:
    """Adds the methods of a dictionary of scalars to a named tuple, so that ``self.log_dict(metric.compute())`` works.

    The methods are ``keys()``, ``items()`` and ``values()``, and indexing by the name of a scalar; iteration, length and
    integer indices stay those of the tuple. A field of the same name as a method is kept, such as ``KStarResult.values``.

    Args:
        result_class: a named tuple with a method ``scalars()`` that returns names and tensors of shape ().

    Returns:
        The same class.

    Example:
        >>> import torch
        >>> from typing import NamedTuple
        >>> @loggable
        ... class Mean(NamedTuple):
        ...     per_class: Tensor
        ...
        ...     def scalars(self) -> dict[str, Tensor]:
        ...         return {"mean": self.per_class.mean()}
        >>> result = Mean(torch.tensor([1.0, 3.0]))
        >>> dict(result), result["mean"], result[0]
        ({'mean': tensor(2.)}, tensor(2.), tensor([1., 3.]))
    """
    fields: tuple[str, ...] = getattr(result_class, "_fields", ())
    for name, method in _METHODS.items():
        if name not in fields:
            setattr(result_class, name, method)
    return result_class
