"""The figures of the pages are those that scripts have measured."""

from __future__ import annotations

import re

import pytest

from benchmarks.pages import COSTS, costs
from tests.helpers.figures import OUTPUTS, ROOT, SENTENCES, sentence, text_of

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


def test_the_tables_of_costs_are_those_of_the_records() -> None:
    text = COSTS.read_text()
    assert costs(text) == text, "run python -m benchmarks.pages"


def test_each_output_is_shown_somewhere() -> None:
    shown = {name for some in SENTENCES.values() for one in some for name in re.findall(r"\{(\w+)\.", one)}
    assert {path.stem for path in OUTPUTS.glob("*.json")} == shown
    assert all((ROOT / page).exists() for page in SENTENCES)
