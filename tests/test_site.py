"""The documentation site: every page has its place, the strict build passes, and what it must refuse is refused."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_gendiag
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS
from tests.helpers import scalar_table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")


class Loader(yaml.SafeLoader):
    """Reads the settings of MkDocs, without the functions that they name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def navigation(entries: list[Any]) -> list[str]:
    """Returns the pages of a navigation, in order."""
    pages: list[str] = []
    for entry in entries:
        for part in entry.values() if isinstance(entry, dict) else [entry]:
            pages += [part] if isinstance(part, str) else navigation(part)
    return pages


def rows_of_guides() -> list[str]:
    """Returns the pages in the first table of the overview, which are added to the navigation."""
    section = (DOCS / "index.md").read_text().split("\n## Guides to the diagnostics\n")[1].split("\n## ")[0]
    return re.findall(r"\]\((\w+\.md)\)", section)


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Builds the site of a folder that has ``mkdocs.yml``."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {
        "PATH": str(Path(sys.executable).parent),
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the site whose pages have headings only, of a package with one public name, which builds fast."""
    folder = tmp_path_factory.mktemp("miniature")
    package, docs = folder / "lightning_gendiag", folder / "docs"
    (package / "callbacks").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "__init__.pyi").write_text("from .callbacks import thing as thing\n")
    (package / "callbacks" / "__init__.py").write_text('def thing() -> None:\n    """Does nothing."""\n')
    (package / "callbacks" / "monitor.py").write_text("class Monitor:\n    pass\n")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    shutil.copytree(DOCS / "site", docs / "site")
    for page in DOCS.rglob("*.md"):
        copied = docs / page.relative_to(DOCS)
        copied.parent.mkdir(exist_ok=True)
        copied.write_text("\n\n".join(re.findall(r"^#+ .*$", page.read_text(), re.M)))
    section = (DOCS / "index.md").read_text().split("\n## Guides to the diagnostics\n")[1].split("\n## ")[0]
    (docs / "index.md").write_text(f"# Overview\n\n## Guides to the diagnostics\n{section}")
    for name in GENERATED.values():
        (folder / name).write_text(f"# {name}\n")
    assert build(folder, folder / "site").returncode == 0
    return folder


def test_each_page_has_one_place_in_the_navigation() -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    pages = [page for page in navigation(settings["nav"]) if not page.startswith("https://")] + rows_of_guides()
    assert len(pages) == len(set(pages))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(GENERATED) == set(pages)
    assert all((ROOT / source).exists() for source in GENERATED.values())


def test_each_diagnostic_has_a_row_in_the_overview() -> None:
    assert {f"{scalar_table.guide_of(monitor)}.md" for monitor in MONITORS} <= set(rows_of_guides())


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_formulae_of_a_page_are_closed(page: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"^```math\n(.*?)^```$", text, re.M | re.S)
    assert text.count("```math") == len(blocks)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    inline = re.findall(r"\$(.+?)\$", re.sub(r"`[^`]*`", "", prose), re.S)
    for formula in [*blocks, *inline]:
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula


@needs_mkdocs
def test_the_strict_build_passes_with_every_public_name_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.html")}
    reference = "".join(text for path, text in pages.items() if path.startswith("api/"))
    for name in lightning_gendiag.__all__:
        assert f'id="lightning_gendiag.{name}"' in reference, name
    for path, text in pages.items():
        loaded = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="(https?://[^"]*)"', text)
        assert not loaded, (path, loaded)
        # with it, a script asks GitHub for numbers
        assert 'data-md-component="source"' not in text, path
        assert "arithmatex" not in text, path
        source = DOCS / path.replace(".html", ".md")
        if source.exists():
            assert text.count('<div class="formula">') == source.read_text().count("```math"), path
    # an argument of a public class with its default
    assert "false_alarm_rate" in pages["api/callbacks.html"]
    assert "0.0003" in pages["api/callbacks.html"]


@needs_mkdocs
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# Lost\n", "lost.md"),
        ("# Lost\n\n[nowhere](alarms.md#no-such-heading)\n", "no-such-heading"),
        ("# Lost\n\n[nowhere](no_such_page.md)\n", "no_such_page.md"),
        ("# Lost\n\n[nowhere](../NO_SUCH_FILE.md)\n", "NO_SUCH_FILE.md"),
        ("# Lost\n\n```math\n\\frac{1}{\n```\n", "the formula cannot be read"),
    ],
    ids=["no place", "anchor", "page", "file", "formula"],
)
def test_the_strict_build_refuses(text: str, complaint: str, miniature: Path) -> None:
    (miniature / "docs" / "lost.md").write_text(text)
    refused = build(miniature, miniature / "site")
    assert refused.returncode != 0
    assert complaint in refused.stdout + refused.stderr
