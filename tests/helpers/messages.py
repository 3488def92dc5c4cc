"""Finds every message of the package in its source, for ``docs/troubleshooting.md``.

``python -m tests.helpers.messages`` prints those that the page does not have yet, as rows to complete. With ``--write``, those
about arguments of functions and metrics, which show their fix, are appended to the page.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning_gendiag

PACKAGE = Path(lightning_gendiag.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"

PLACE = "…"
"""Stands for what a message fills in."""

SAYS = {"rank_zero_warn", "rank_zero_info", "warn", "warning", "say", "_say", "_warn", "_contained", "_no_labels"}
"""Functions whose arguments people read."""

REASONS = {
    "_explained",
    "in_words",
    "_message",
    "_failure",
    "settle",
    "_unsuitable",
    "_fix",
    "report",
    "_left_out",
    "_effect",
}
"""Functions that return a message or a part of one."""

ADVICE = re.compile(r"To fix this|\bmust (be|have|hold|go|name|make|return|take)\b|pip install")
"""What only messages contain, wherever they are written."""

FIX = " To fix this, "


@dataclass(frozen=True)
class Message:
    """A message with the place in the source where it is written."""

    text: str
    """What it says, with ``PLACE`` for what is filled in."""
    place: str
    """File and line."""

    @property
    def parts(self) -> list[str]:
        """The fixed parts of the text, in order, without spaces and full stops at their ends."""
        parts = (part.strip(" .\n") for part in re.split(rf"{PLACE}|(?<=\.){FIX}|{FIX.strip()}", self.text))
        return [part for part in parts if re.search(r"\w{2}", part)]

    @property
    def row(self) -> str:
        """A row of the page, of which the cause is to be written."""
        text, _, fix = self.text.partition(FIX)
        fix = fix if fix.endswith("..") else fix.removesuffix(".")
        return f"| {as_code(text)} | ? | {fix or '?'} |"


def as_code(text: str) -> str:
    """Returns text as code in a cell of a table."""
    return f"`{text.strip()}`".replace("|", "\\|")


def template(node: ast.expr) -> str | None:
    """Returns the text of a string with ``PLACE`` for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sd]|\{\w+\}", PLACE, node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or PLACE if isinstance(part, ast.Constant) else PLACE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None or right is None else left + right
    return None


def strings(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields the strings in a node that are not part of a longer one, and their lines."""
    for child in ast.iter_child_nodes(node):
        text = template(child) if isinstance(child, ast.expr) else None
        if text is None:
            yield from strings(child)
        else:
            yield text, child.lineno


def documented(tree: ast.Module) -> set[int]:
    """Returns the lines on which docstrings begin."""
    return {
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def name_of(function: ast.expr) -> str:
    """Returns the last name of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_said(node: ast.AST) -> bool:
    """Returns whether a node raises an error or calls a function whose arguments people read."""
    if isinstance(node, ast.Raise):
        return node.exc is not None
    return isinstance(node, ast.Call) and name_of(node.func) in SAYS


def said(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields all strings of a module that are in a message."""
    docstrings = documented(tree)
    for text, line in strings(tree):
        if ADVICE.search(text) and line not in docstrings:
            yield text, line
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        assigned: dict[str, list[ast.expr]] = {}
        shown: list[ast.AST] = [function] if function.name in REASONS else []
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        assigned.setdefault(target.id, []).append(node.value)
                    if isinstance(target, ast.Subscript) and name_of(target.value) == "left_out":
                        shown.append(node)
            elif is_said(node):
                shown.append(node)
        for node in shown:
            yield from ((text, line) for text, line in strings(node) if line not in docstrings)
            for part in ast.walk(node):
                for value in assigned.get(part.id, []) if isinstance(part, ast.Name) else []:
                    yield from strings(ast.Expr(value))


def messages() -> list[Message]:
    """Returns all messages of the package, each once, without those that are hardly more than what is filled in."""
    found: dict[str, Message] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for text, line in said(tree):
            message = Message(" ".join(text.split()), f"{path.relative_to(PACKAGE)}:{line}")
            if sum(len(part.split()) for part in message.parts) >= 3:
                found.setdefault(message.text, message)
    return list(found.values())


def all_strings() -> set[str]:
    """Returns all strings of the package as templates, with and without what fixes them."""
    found = {
        " ".join(text.split()) for path in PACKAGE.rglob("*.py") for text, _ in strings(ast.parse(path.read_text()))
    }
    return found | {text.partition(FIX)[0] for text in found}


def cells() -> list[str]:
    """Returns the first cell of each row of the page: the messages themselves."""
    found = re.findall(r"^\| `((?:[^`])*)` \|", PAGE.read_text(), re.M)
    return [cell.replace("\\|", "|") for cell in found]


def explaining(actual: str) -> list[str]:
    """Returns the cells of the page that fit a message as people see it."""
    fits = {cell: ".*".join(re.escape(part.rstrip(".")) for part in cell.split(PLACE)) for cell in cells()}
    return [cell for cell, pattern in fits.items() if re.search(pattern, " ".join(actual.split()))]


def rows() -> list[str]:
    """Returns the rows of the page's tables, without the marks of code."""
    lines = (line for line in PAGE.read_text().splitlines() if line.startswith("| "))
    return [line.replace("\\|", "|").replace("`", "") for line in lines]


def is_in(message: Message, row: str) -> bool:
    """Returns whether a row has all fixed parts of a message, in order."""
    return re.search(".*?".join(re.escape(part.replace("`", "")) for part in message.parts), row) is not None


def missing() -> list[Message]:
    """Returns the messages that no row of the page has."""
    known = rows()
    return [message for message in messages() if not any(is_in(message, row) for row in known)]


def is_of_a_function(message: Message) -> bool:
    """Returns whether a message is about an argument of a function or a metric, and shows its fix."""
    where = message.place.partition(":")[0]
    return FIX in message.text and where.endswith(("functional.py", "/metric.py"))


def main() -> None:
    """Prints the rows that are missing, or writes those that need no cause."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="append the rows about functions and metrics to the last table"
    )
    lacking = missing()
    if parser.parse_args().write:
        plain = [message.row.replace(" | ? |", " |") for message in lacking if is_of_a_function(message)]
        PAGE.write_text(PAGE.read_text() + "".join(f"{row}\n" for row in plain))
        lacking = [message for message in lacking if not is_of_a_function(message)]
    for message in lacking:
        print(message.place, message.row, sep="\n")


if __name__ == "__main__":
    main()
