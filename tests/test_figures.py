"""The figures of the pages are those that scripts have measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.pages import TABLES, page
from benchmarks.pictures import PICTURES
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS
from tests.helpers.figures import OUTPUTS, ROOT, SAID, SENTENCES, alarms, quotes, sentence, sources_of, text_of

MEASURED = re.compile(r"\d[\d.,]* (?:m?s|seconds|[KMG]i?B)\b|\b[\d,]+ of [\d,]+ (?:runs|trainings)|found in [\d,]+ of")
"""Times, memory and counts of runs, which are measured where they are no limits."""

GUIDES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "site" not in path.parts)

DECLARED = ("95 % bounds",)
"""What README says of how it was measured."""


@pytest.mark.parametrize(("page", "template"), [(page, one) for page, some in SENTENCES.items() for one in some])
def test_a_page_shows_what_was_measured(page: str, template: str) -> None:
    assert sentence(template) in text_of(page)


def test_each_number_about_alarms_in_the_readme_was_measured() -> None:
    text = text_of("README.md").partition(" ## Alarms ")[2].partition(" ## ")[0]
    for known in (*map(sentence, SENTENCES["README.md"]), *DECLARED):
        text = text.replace(known, "")
    # code and links hold none
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    assert not re.findall(r".{30}\d.{30}", text)


@pytest.mark.parametrize("path", TABLES)
def test_the_tables_of_a_page_are_those_of_the_records(path: str) -> None:
    text = (ROOT / path).read_text()
    assert page(path) == text, "run python -m benchmarks.pages"
    assert all(f"<!-- {name} -->" in text for name in TABLES[path])


@pytest.mark.parametrize("path", GUIDES)
def test_times_memory_and_counts_in_a_guide_were_measured(path: str) -> None:
    text = (ROOT / path).read_text()
    # code, formulae, what alarms say, and tables that are made
    text = re.sub(r"^```[\s\S]*?^```|^>.*$|<!-- \w+ -->\n\n(?:\|.*\n)+", "", text, flags=re.M)
    text = " ".join(text.split())
    for known in SENTENCES.get(path, ()):
        text = text.replace(sentence(known), "")
    limits = r"at most [\d.,]+ \w+|fit [\d.,]+ s\b"
    assert not re.findall(rf".{{0,40}}(?:{MEASURED.pattern})", re.sub(limits, "", text))


@pytest.mark.parametrize("path", ["README.md", *GUIDES])
def test_what_alarms_say_in_a_page_was_said(path: str) -> None:
    said = alarms()
    for quote in quotes((ROOT / path).read_text()):
        for part in quote.split("..."):
            assert any(part.strip() in text for text in said), quote


def test_a_page_quotes_an_alarm_of_each_diagnostic_that_has_a_picture() -> None:
    quoting = {path for path in GUIDES if quotes((ROOT / path).read_text())}
    assert {f"docs/{page}.md" for page in PICTURES} <= quoting
    assert len(quotes((ROOT / "README.md").read_text())) == len(MONITORS) + 1


def test_each_output_is_shown_somewhere() -> None:
    shown = {name for some in SENTENCES.values() for one in some for name in sources_of(one)}
    sources = {source for tables in TABLES.values() for table in tables.values() for source in table.sources}
    shown |= {Path(source).stem for source in sources if source.startswith("outputs/")} | set(SAID)
    assert {path.stem for path in OUTPUTS.glob("*.json")} == shown
    assert all((ROOT / page).exists() for page in SENTENCES)
