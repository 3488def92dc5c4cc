"""What the laws and the two-process test need of each diagnostic; its own test file says it as ``CASE``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import lightning_gendiag
from lightning_gendiag import Diagnostic


class Case(NamedTuple):
    make: Callable[[], Diagnostic]
    updates: list[dict[str, Any]]
    """Keyword arguments of ``update``, eight or more."""
    tolerance: float = 1e-6
    """Of two processes against one."""


def cases() -> dict[str, Case]:
    """One for each file under ``lightning_gendiag/diagnostics``."""
    folder = Path(lightning_gendiag.__file__).parent / "diagnostics"
    stems = sorted(path.stem for path in folder.iterdir() if path.stem != "__init__" and path.stem != "__pycache__")
    return {stem: import_module(f"tests.test_{stem}").CASE for stem in stems}
