"""The architecture: floors of imports, one registry, private names of others in one file, and a lazy package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_gendiag

ROOT = Path(lightning_gendiag.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

FLOORS = [
    {"functional", "detection", "plots", "tensorboard"},
    {"regions", "metric", "samplers", "comparison"},
    {"model"},
    {
        "callbacks/logging",
        "callbacks/schedule",
        "callbacks/planning",
        "callbacks/session",
        "callbacks/monitor",
        "callbacks/page",
    },
    {"diagnostics"},
    {"callbacks/alerts", "callbacks/checkpoints", "callbacks/collapse_stopping", "callbacks/generative_diagnostics"},
    {"__main__"},
]
"""Lowest first. A module imports from its own folder and from lower floors; the base of callbacks counts as a folder."""

NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
"""Names of named tuples that are public despite their underscore."""


def folder_of(module: str) -> str:
    """Returns the folder of a module, such as ``"detection"``, or its file in ``"callbacks/session"``."""
    parts = module.split(".")
    return "/".join(parts[:2]) if parts[0] == "callbacks" and len(parts) > 1 else parts[0]


def floor(name: str) -> int:
    return next(number for number, folders in enumerate(FLOORS) if name in folders)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Yields the modules of this package that a module imports at run time; imports for types alone are ignored."""
    tree = parsed(path)
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and node.module:
            package, _, module = node.module.partition(".")
            if package == "lightning_gendiag":
                yield from [module] if module else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_each_module_imports_from_its_own_folder_or_a_lower_floor(path: Path) -> None:
    own = folder_of(module_of(path))
    if own == "callbacks":
        # the package itself imports nothing
        assert not list(imports(path))
        return
    for module in imports(path):
        other = folder_of(module)
        beside = own == other or {own, other} <= FLOORS[3] or {own, other} <= FLOORS[5]
        assert beside or floor(other) < floor(own), module


@pytest.mark.parametrize("path", [p for p in MODULES if module_of(p).startswith("detection")], ids=module_of)
def test_detection_imports_neither_torch_nor_lightning(path: Path) -> None:
    assert not re.search(r"^\s*(from|import) (torch|lightning|torchmetrics)\b", path.read_text(), re.M)


@pytest.mark.parametrize("folder", sorted((ROOT / "diagnostics").glob("*/")), ids=lambda path: path.name)
def test_every_diagnostic_has_the_same_shape(folder: Path) -> None:
    if folder.name != "__pycache__":
        assert {path.name for path in folder.glob("*.py")} == {
            "__init__.py", "functional.py", "metric.py", "monitor.py", "plots.py",
        }  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_private_names_of_other_packages_are_in_compat_alone(path: Path) -> None:
    text = path.read_text()
    if module_of(path) == "model.compat":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            own |= isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            own |= f"def {node.attr}(" in text or f"self.{node.attr}:" in text
            assert own or node.attr in NAMED_TUPLES, ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = ast.unparse(node.args[1]).strip("'")
            assert not re.match("_[a-z]", name) or name in NAMED_TUPLES, ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_the_sessions_registry_is_the_only_mutable_state_of_a_module(path: Path) -> None:
    makers = {"dict", "list", "set", "defaultdict", "deque", "WeakKeyDictionary", "WeakValueDictionary", "count"}
    for node in parsed(path).body:
        value = getattr(node, "value", None)
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or value is None:
            continue
        names = [ast.unparse(target) for target in getattr(node, "targets", [getattr(node, "target", None)])]
        mutable = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1].split("[")[0] in makers
        # tables of constants have names in capitals and are never written to
        constant = isinstance(value, (ast.Dict, ast.List, ast.Set)) and all(name.isupper() for name in names)
        if constant:
            written = re.compile(
                rf"\b({'|'.join(names)})(\[[^\]]*\]\s*=[^=]|\.(append|update|pop|add|setdefault|clear)\()"
            )
            assert not written.search(path.read_text()), names
        elif mutable or isinstance(value, (ast.Dict, ast.List, ast.Set)):
            assert names in (["_SESSIONS"], ["__all__"]), names
    assert "global " not in re.sub(r'"""[\s\S]*?"""', "", path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_no_callback_is_inserted_or_removed(path: Path) -> None:
    text = path.read_text()
    assert not re.search(
        r"callbacks\.(insert|remove|append|extend|pop|clear)\(|callbacks\s*(\+=|\[[^\]]*\]\s*=[^=])", text
    )
    if module_of(path) != "model.compat":
        assert "trainer.callbacks" not in re.sub(r'"""[\s\S]*?"""', "", text)


def test_the_package_imports_lazily_and_completely() -> None:
    code = "import sys, lightning_gendiag as g; print('torch' in sys.modules, 'lightning' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
    for name in lightning_gendiag.__all__:
        assert getattr(lightning_gendiag, name).__name__.removeprefix("lightning_gendiag.") == name
        assert name in dir(lightning_gendiag)
    with pytest.raises(AttributeError, match="nothing"):
        lightning_gendiag.nothing  # noqa: B018
