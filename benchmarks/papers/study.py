"""Records of studies: a table and findings for each part of a paper, and their Markdown, of which the pages are made."""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple, get_args

from benchmarks import pages
from benchmarks.pages import ROOT, filled, markdown

RECORDS = pages.RECORDS / "papers"
PAGES = ROOT / "docs" / "papers"

STUDIES = ("cms", "entropy", "dysfunctions", "k_star", "primitives")
"""Papers, by the names of their modules and pages."""

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


def overview() -> str:
    """Returns the table of the index: how many findings of each study show again."""
    rows = []
    for name in STUDIES:
        seconds = sum(entry["seconds"] for entry in record_of(name).values())
        title = (PAGES / f"{name}.md").read_text().splitlines()[0].removeprefix("# ")
        rows.append([f"[{title}]({name}.md)", *counted(name), seconds, f"`python -m benchmarks.papers {name}`"])
    return markdown(["page", *SHOWN, "seconds of one core", "command"], rows)


def write_pages() -> None:
    """Writes the tables of all pages about papers from the records."""
    for name in STUDIES:
        path = PAGES / f"{name}.md"
        path.write_text(filled(path.read_text(), tables(name)))
    index = PAGES / "index.md"
    index.write_text(filled(index.read_text(), {"overview": overview()}))
