"""Generates the table of all scalars in ``docs/scalars.md`` from the declarations of the metrics.

``python -m tests.helpers.scalar_table`` prints it, and ``--write`` writes it into the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_gendiag import Monitor
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS
from lightning_gendiag.callbacks.logging import PREFIX
from lightning_gendiag.metric import ScalarInfo

PAGE = Path(__file__).parents[2] / "docs" / "scalars.md"

MARK = "<!-- Below this line: python -m tests.helpers.scalar_table --write -->\n"
"""Separates the text of the page from the generated tables."""

BETTER = {True: "higher", False: "lower", None: ""}


def guide_of(monitor: type[Monitor[Any, Any]]) -> str:
    """Returns the name of a diagnostic's folder, test file and guide."""
    return monitor.__module__.split(".")[-2]


def row(tag: str, info: ScalarInfo) -> str:
    """Returns the row of one scalar: tag, meaning, unit, better direction."""
    meaning = info.description.replace("|", "\\|")
    return f"| `{tag}`{' †' if info.optional else ''} | {meaning} | {info.unit} | {BETTER[info.higher_is_better]} |"


def table(monitor: type[Monitor[Any, Any]]) -> str:
    """Returns the section of one diagnostic."""
    rows = [row(f"{PREFIX}/{monitor.name}/{name}", info) for name, info in monitor.metric_class.scalar_info.items()]
    heading = f"## {monitor.metric_class.__name__}\n\nGuide: [{guide_of(monitor)}.md]({guide_of(monitor)}.md)"
    return "\n".join([heading, "", "| scalar | meaning | unit | better |", "|---|---|---|---|", *rows])


def tables() -> str:
    """Returns the sections of all diagnostics."""
    return "\n\n".join(table(monitor) for monitor in MONITORS) + "\n"


def main() -> None:
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write them into {PAGE.name}")
    if parser.parse_args().write:
        page, _, _ = PAGE.read_text().partition(MARK)
        PAGE.write_text(f"{page}{MARK}\n{tables()}")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
