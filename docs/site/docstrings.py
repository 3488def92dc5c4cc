"""Reads the docstrings as the reference needs them.

References of Sphinx become links, fields and properties become one table of their class, and what a class only takes over
from Lightning or from :class:`Monitor` is left out.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

PACKAGE = "lightning_gendiag"
SOURCES = Path(__file__).parents[2] / PACKAGE
HOOK = re.compile(
    r"on_|setup$|teardown$|join$|state_dict$|load_state_dict$|state_key$|get_extra_state$|set_extra_state$"
)
"""Methods that Lightning, torchmetrics or the session calls."""


def public_names() -> set[str]:
    """Returns the names that can be imported from the package."""
    stub = ast.parse((SOURCES / "__init__.pyi").read_text())
    return {str(alias.asname) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def parts_of_a_monitor() -> set[str]:
    """Returns the names that the base class of the monitors documents."""
    module = ast.parse((SOURCES / "callbacks" / "monitor.py").read_text())
    base = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Monitor")
    return {node.name for node in base.body if isinstance(node, ast.FunctionDef)}


PUBLIC, OF_MONITORS = public_names(), parts_of_a_monitor()


def link(match: re.Match[str]) -> str:
    """Returns a link to a public name, else the name as code."""
    name = match[1].lstrip("~").removeprefix(f"{PACKAGE}.")
    return f"[`{name}`][{PACKAGE}.{name.split('.')[0]}]" if name.split(".")[0] in PUBLIC else f"`{name}`"


def is_taken_over(name: str, owner: str) -> bool:
    """Returns whether a method of a class is documented elsewhere."""
    return bool(HOOK.match(name)) or (owner.endswith("Monitor") and owner != "Monitor" and name in OF_MONITORS)


class References(griffe.Extension):
    """Changes docstrings and members as they are read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Writes ``:class:`Name``` and its like as links of Markdown."""
        if obj.docstring:
            text = re.sub(r":(?:class|func|meth|mod|attr|data):`([^`]+)`", link, obj.docstring.value)
            # the section whose lines are shown as code
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Makes one table of the fields and properties of a public class."""
        if cls.name not in PUBLIC or not cls.docstring:
            return
        rows = []
        for name, member in list(cls.members.items()):
            if name.startswith("_") or member.is_alias:
                continue
            if member.is_attribute:
                if member.docstring and not HOOK.match(name):
                    kind = f" ({member.annotation})" if member.annotation else ""
                    rows.append(f"{name}{kind}: {' '.join(member.docstring.value.split())}")
                # a dataclass takes its parameters from its fields, so they stay, and only their own entries go
                member.docstring = None
            elif is_taken_over(name, cls.name):
                cls.del_member(name)
        if rows and "\nAttributes:\n" not in cls.docstring.value:
            table = textwrap.indent("\n".join(rows), "    ")
            cls.docstring.value = f"{cls.docstring.value.rstrip()}\n\nAttributes:\n{table}\n"
