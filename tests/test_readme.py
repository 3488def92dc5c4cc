"""What the README says exists: each scalar, each name that it imports, each page that it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lightning_gendiag
from tests.cases import cases
from tests.test_laws import filled

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STEMS = {"cosine_mean_similarity": "cms"}


def documented() -> dict[str, set[str]]:
    """Names in the first column of the table of scalars, by the stem before the slash."""
    table = README.split("## All scalars")[1].split("\n## ")[0]
    found: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`[^|]*) \|", table, re.M):
        first, *others = re.findall(r"`([^`]*)`", row)
        stem, name = first.split("/")
        found.setdefault(stem, set()).update([name, *others])
    return found


@pytest.mark.parametrize("stem", cases())
def test_each_scalar_is_in_the_table_and_the_table_has_no_other(stem: str) -> None:
    known = documented()[STEMS.get(stem, stem)]
    logged = {re.sub(r"\d+$", "0", name) for name in filled(cases()[stem]).compute().scalars()} - {"invalid"}
    assert logged <= known
    # what appears with classes, labels or a classifier only is logged by other tests
    rest = {"class_0", "worst_class", "accuracy", "fid_class_0", "decoded_entropy"}
    assert {name for name in known - logged if not name.startswith(("inception_score", "fid_", "gap_"))} <= rest


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"\b(COST|[A-Z]+_TABLE)\b", README)


def test_each_name_that_is_imported_is_there() -> None:
    for page in PAGES:
        for names in re.findall(r"^from lightning_gendiag import (.*)$", page.read_text(), re.M):
            for name in names.split(","):
                assert hasattr(lightning_gendiag, name.strip()), (page.name, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere_and_each_command_exists(page: Path) -> None:
    words = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", words):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:benchmarks|example_models)\.\w+)", words):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?(?:::(\w+))?", words):
        held = (ROOT / "tests" / test[0]).read_text()
        assert all(re.search(rf"(def|class) {name}\b", held) for name in test[1:] if name), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_of_code_is_code(page: Path) -> None:
    for block in re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.M | re.S):
        indent = len(block[0])
        compile("\n".join(line[indent:] for line in block[1].splitlines()), page.name, "exec")
