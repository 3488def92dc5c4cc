"""The pages about papers show what the records hold, and the parts of the studies do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.pages import NOT_MEASURED, filled, markdown
from benchmarks.papers.entropy import GIN, DetailStep, Preserving, WaveletFlow
from benchmarks.papers.study import (
    PAGES,
    SHOWN,
    STUDIES,
    Part,
    holds,
    overview,
    record_of,
    save,
    tables,
)

every_study = pytest.mark.parametrize("name", STUDIES)


def markers(name: str) -> list[str]:
    """Returns the names of the tables of a page."""
    return re.findall(r"^<!-- (\w+) -->$", (PAGES / f"{name}.md").read_text(), re.M)


@every_study
def test_the_tables_of_a_page_are_those_of_the_record(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    assert filled(text, tables(name)) == text, "run python -m benchmarks.pages"


def test_the_overview_counts_the_findings_of_the_records() -> None:
    text = (PAGES / "index.md").read_text()
    assert filled(text, {"overview": overview()}) == text, "run python -m benchmarks.pages"


@every_study
def test_a_page_has_a_table_for_each_part_of_its_record(name: str) -> None:
    assert len(markers(name)) == len(set(markers(name)))
    assert {"findings", *record_of(name)} <= set(markers(name))


@every_study
def test_measured_numbers_of_a_page_stand_in_its_tables_only(name: str) -> None:
    prose = re.sub(r"^\|.*$", "", (PAGES / f"{name}.md").read_text(), flags=re.M)
    prose = re.sub(r"arXiv\s\d+\.\d+|arxiv\.org/abs/\d+\.\d+", "", prose)
    assert not re.findall(r"\d+\.\d+|\d %", prose)


@every_study
def test_each_finding_of_a_record_says_whether_it_shows_again(name: str) -> None:
    for entry in record_of(name).values():
        assert entry["findings"]
        assert {finding["shown"] for finding in entry["findings"]} <= set(SHOWN)
        assert all(len(row) == len(entry["columns"]) for row in entry["rows"])


def test_a_finding_holds_in_part_where_some_conditions_do() -> None:
    assert [holds(True, True), holds(True, False), holds(False, False)] == ["yes", "in part", "no"]


def test_a_table_replaces_the_one_before_and_a_missing_one_is_named() -> None:
    table = markdown(["a", "b"], [["x", 1.23456], ["y", 123.4]])
    assert table == "| a | b |\n|---|---|\n| x | 1.23 |\n| y | 123 |"
    page = "# Title\n\n<!-- one -->\n\n| old |\n|---|\n\nText.\n\n<!-- two -->\n"
    once = filled(page, {"one": table})
    assert once == f"# Title\n\n<!-- one -->\n\n{table}\n\nText.\n\n<!-- two -->\n\n{NOT_MEASURED}\n"
    assert filled(once, {"one": table}) == once
    assert filled(once, {"one": table, "two": table}) == once.replace(NOT_MEASURED, table)
    assert filled(once, {}) == once.replace(table, NOT_MEASURED)


def test_a_part_is_saved_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.papers.study.RECORDS", tmp_path)
    for part in ("one", "two"):
        save("study", part, 1.6, Part(["a"], [[1 / 3]], []))
    assert record_of("study") == {
        part: {"seconds": 2, "columns": ["a"], "rows": [[0.333]], "findings": []} for part in ("one", "two")
    }


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_wavelet_flow_inverts_itself_and_knows_its_determinant(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    flow = WaveletFlow(4, 3)
    for step in flow.modules():
        if isinstance(step, DetailStep):
            torch.nn.init.normal_(step.net[-1].weight, 0, 0.1)  # type: ignore[arg-type]
    flow.double()
    z, determinant = flow.transform(images.double())
    torch.testing.assert_close(flow.decode(z), images.double())
    jacobian = torch.func.jacfwd(lambda x: flow.transform(x.view(1, 1, 16, 16))[0][0])(images[0].double().flatten())
    torch.testing.assert_close(determinant[0], torch.linalg.slogdet(jacobian).logabsdet)


def test_gin_preserves_volume_and_inverts_itself(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    flow = GIN(8, 2, 10)
    for layer in flow.layers:
        assert isinstance(layer, Preserving)
        torch.nn.init.normal_(layer.net[-1].weight, 0, 0.1)  # type: ignore[arg-type]
    flow.double()
    z, determinant = flow.transform(images.double())
    torch.testing.assert_close(determinant, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(flow.decode(z), images.double())
