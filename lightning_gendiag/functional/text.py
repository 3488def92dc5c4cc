"""Objects as text for people."""

from __future__ import annotations

import inspect
from typing import Any


def representation(value: Any, **instead: Any) -> str:
    """Returns an object as the call that makes it, with the arguments that differ from their defaults.

    The arguments are read from attributes of the same name, those of base classes too.

    Args:
        value: Any object.
        instead: Values of arguments that are not kept under their own name.

    Example:
        >>> class Point:
        ...     def __init__(self, x, y=0):
        ...         self.x, self.y = x, y
        >>> representation(Point(1))
        'Point(x=1)'
    """
    parameters: dict[str, inspect.Parameter] = {}
    for base in type(value).__mro__:
        if "__init__" in vars(base) and base is not object:
            own = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in own:
                if parameter.name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    parameters.setdefault(parameter.name, parameter)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
                break
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    held = {name: getattr(value, name, default) for name, default in defaults.items()} | instead
    given = [f"{name}={_short(held[name])}" for name in defaults if not _same(held[name], defaults[name])]
    return f"{type(value).__name__}({', '.join(given)})"


def without_full_stop(text: str) -> str:
    """Returns a sentence without the full stop at its end; an ellipsis stays.

    Example:
        >>> without_full_stop("It failed."), without_full_stop("pass labels=lambda batch: ...")
        ('It failed', 'pass labels=lambda batch: ...')
    """
    return text if text.endswith("..") else text.removesuffix(".")


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except Exception:
        return False


def _short(value: Any) -> str:
    """Large values, such as tensors and data sets, by their class and size."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"<{type(value).__name__} {tuple(shape)}>"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"
