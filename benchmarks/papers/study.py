"""Records of studies: a table and findings for each part of a paper, and their Markdown, of which the pages are made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "papers"
PAGES = ROOT / "docs" / "papers"

NOT_MEASURED = "This part has a script, and was not measured yet."
"""What a page says in place of a table."""

Shown = Literal["yes", "in part", "no", "answered"]
"""Whether a result shows again, or an open question is answered."""

SHOWN: tuple[Shown, ...] = get_args(Shown)


class Finding(NamedTuple):
    """What a paper claims, beside what was measured here."""

    paper: str
    ours: str
    shown: Shown


class Part(NamedTuple):
    """A part of a study."""

    columns: list[str]
    rows: list[list[Any]]
    """Of text and numbers."""
    findings: list[Finding]


def holds(*conditions: bool) -> Shown:
    """Returns ``"yes"`` if all conditions hold, ``"in part"`` if some do, else ``"no"``."""
    return "yes" if all(conditions) else "in part" if any(conditions) else "no"


def record_of(name: str) -> dict[str, Any]:
    """Returns the record of a study: for each part its seconds, columns, rows and findings."""
    path = RECORDS / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def save(name: str, part: str, seconds: float, found: Part) -> None:
    """Writes a part to the record of a study, and keeps the other parts."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    rows = [[_rounded(cell) for cell in row] for row in found.rows]
    findings = [finding._asdict() for finding in found.findings]
    entry = {"seconds": round(seconds), "columns": found.columns, "rows": rows, "findings": findings}
    record = record_of(name) | {part: entry}
    (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _rounded(cell: Any) -> Any:
    return float(f"{cell:.3g}") if isinstance(cell, float) else cell


def text_of(cell: Any) -> str:
    """Returns a cell as a page shows it, numbers with three digits."""
    if not isinstance(cell, float):
        return re.sub(r"(\d)%", r"\1 %", str(cell))
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """Returns a table."""
    first, *others = ["| " + " | ".join(map(text_of, line)) + " |" for line in (columns, *rows)]
    return "\n".join([first, "|" + "---|" * len(columns), *others])


def tables(name: str) -> dict[str, str]:
    """Returns the tables of a page: one for each part that was measured, and ``findings`` of all of them."""
    record = record_of(name)
    found = {part: markdown(entry["columns"], entry["rows"]) for part, entry in record.items()}
    rows = [[f["paper"], f["ours"], f["shown"]] for entry in record.values() for f in entry["findings"]]
    return found | ({"findings": markdown(["the paper", "here", "shown again"], rows)} if rows else {})


def counted(name: str) -> list[int]:
    """Returns how many findings of a study are of each kind of ``SHOWN``."""
    shown = [finding["shown"] for entry in record_of(name).values() for finding in entry["findings"]]
    return [shown.count(kind) for kind in SHOWN]


def overview(names: tuple[str, ...]) -> str:
    """Returns the table of the index: how many findings of each study show again."""
    rows = []
    for name in names:
        seconds = sum(entry["seconds"] for entry in record_of(name).values())
        title = (PAGES / f"{name}.md").read_text().splitlines()[0].removeprefix("# ")
        rows.append([f"[{title}]({name}.md)", *counted(name), seconds, f"`python -m benchmarks.papers {name}`"])
    return markdown(["page", *SHOWN, "seconds of one core", "command"], rows)


def filled(text: str, made: dict[str, str]) -> str:
    """Returns the text of a page whose tables, which follow comments with their names, are those that were made."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{made.get(match[1], NOT_MEASURED)}\n"

    row = rf"(?:\||{re.escape(NOT_MEASURED)}).*\n"
    return re.sub(rf"<!-- (\w+) -->\n(?:\n(?:{row})+)?", table, text)


def write_pages(names: tuple[str, ...]) -> None:
    """Writes the tables of all pages from the records."""
    for name in names:
        path = PAGES / f"{name}.md"
        path.write_text(filled(path.read_text(), tables(name)))
    index = PAGES / "index.md"
    index.write_text(filled(index.read_text(), {"overview": overview(names)}))
