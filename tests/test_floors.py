"""The house stands: no module imports its own floor or a higher one, and the door costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gendiag

ROOT = Path(lightning_gendiag.__file__).parent
FLOORS = [
    {"functional", "detectors", "panels", "budget"},
    {"regions", "diagnostic", "board", "judges", "verdict"},
    {"probe"},
    {"monitor"},
    {"diagnostics", "stopping"},
    {"automatic"},
]
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imported(path: Path) -> set[str]:
    """First part of the names of this package that a module imports, anywhere in it.

    What outgrew one file is a folder, whose files may import each other.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_gendiag"):
            parts = node.module.split(".")[1:]
            home = list(path.relative_to(ROOT).parts[:-1])
            if home not in ([], ["diagnostics"]) and parts[: len(home)] == home:
                continue
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lightning_gendiag.")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_its_own_floor_or_a_higher_one(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert all(floor(name) < floor(own) for name in imported(path)), imported(path)


@pytest.mark.parametrize("path", [p for p in MODULES if floor(p.relative_to(ROOT).parts[0].removesuffix(".py")) == 0])
def test_the_ground_floor_knows_no_model_and_no_trainer(path: Path) -> None:
    text = path.read_text()
    assert "lightning.pytorch" not in text
    assert "torchmetrics" not in text


def test_the_door_is_lazy_and_complete() -> None:
    code = "import sys, lightning_gendiag as g; print('torch' in sys.modules, 'lightning' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
    assert set(lightning_gendiag._HOME_OF) == set(lightning_gendiag.__all__)
    for name in lightning_gendiag.__all__:
        assert getattr(lightning_gendiag, name).__name__ == name
        assert name in dir(lightning_gendiag)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightning_gendiag.nothing  # noqa: B018
