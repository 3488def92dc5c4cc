"""What the site needs beside the pages: guides and reference in the navigation, links of the repository, mathematics.

MkDocs calls the functions that are named ``on_...``. The pages stay plain Markdown, which GitHub shows as it is.
"""

from __future__ import annotations

import ast
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGE = "lightning_gendiag"
REPOSITORY = f"https://github.com/{PACKAGE.replace('_', '-')}/{PACKAGE}"

ROOT_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
"""Pages of the site that are files in the root of the repository."""

PARTS = {
    "callbacks": "Callbacks",
    "detection": "Alarms and series",
    "regions": "Regions",
    "model": "Models",
    "samplers": "Samplers",
    "functional": "Other functions",
    "metric": "Base of the metrics",
    "comparison": "Comparison of runs",
}
"""Titles of the pages of the reference beside those of the diagnostics, by module."""


def guides() -> list[dict[str, str]]:
    """Returns the navigation of the guides: title and page of each row in the table of ``docs/index.md``."""
    table = (ROOT / "docs" / "index.md").read_text().split("## Guides to the diagnostics")[1].split("\n## ")[0]
    links = re.findall(r"\[([^\]]+)\]\((\w+\.md)\)", table)
    # k* is a symbol
    return [{title if "*" in title else title[:1].upper() + title[1:]: page} for title, page in links]


def public_names() -> dict[str, list[str]]:
    """Returns the public names by page of the reference: those in ``PARTS`` first, then the diagnostics."""
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / PACKAGE / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            path = (node.module or node.names[0].name).split(".")
            page = path[1] if path[0] == "diagnostics" else path[0]
            names.setdefault(page, []).extend(str(alias.asname) for alias in node.names)
    return {page: names[page] for page in [*PARTS, *names] if page in names}


def title_of(page: str) -> str:
    """Returns the title of a page of the reference."""
    titles = {path.removesuffix(".md"): title for guide in guides() for title, path in guide.items()}
    if page not in PARTS and page not in titles:
        raise PluginError(
            f"the reference of {page} has no title. To fix this, add a guide {page}.md to the first table of docs/index.md, "
            "or a title to PARTS in docs/site/hooks.py"
        )
    return PARTS.get(page) or titles[page]


def reference(page: str, names: list[str]) -> str:
    """Returns a page of the reference in Markdown."""
    guide = f"Guide: [{title_of(page)}](../{page}.md)\n\n" if page not in PARTS else ""
    entries = (f"::: {PACKAGE}.{name}\n" for name in names)
    return f"# {title_of(page)}\n\n{guide}" + "\n".join(entries)


def overview() -> str:
    """Returns the page that lists all public names."""
    rows = (
        f"| [{title_of(page)}]({page}.md) | {', '.join(f'[`{name}`][{PACKAGE}.{name}]' for name in names)} |"
        for page, names in public_names().items()
    )
    head = f"# API reference\n\nAll names can be imported from `{PACKAGE}`, which loads each when it is first used.\n\n"
    return head + "\n".join(["| page | names |", "|---|---|", *rows]) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the guides and the reference to the navigation."""
    sections: dict[str, list[Any]] = {title: pages for entry in config.nav or [] for title, pages in entry.items()}
    sections["Diagnostics"].extend(guides())
    sections["Reference"].append(
        {"API": ["api/index.md", *({title_of(page): f"api/{page}.md"} for page in public_names())]}
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made from other files of the repository."""
    pages = {page: (ROOT / source).read_text() for page, source in ROOT_PAGES.items()}
    pages["api/index.md"] = overview()
    pages |= {f"api/{page}.md": reference(page, names) for page, names in public_names().items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links to files of the repository links to pages of the site, or to the repository."""
    inside = page.file.src_uri in ROOT_PAGES
    own = {source: target for target, source in ROOT_PAGES.items()}

    def redirected(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if inside:
            path = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        # relative to the folder of the pages
        folder = posixpath.dirname(page.file.src_uri)
        target = posixpath.normpath(posixpath.join(folder, path))
        if not target.startswith("../"):
            return f"]({path}{anchor})"
        target = target.removeprefix("../")
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        if target in own:
            return f"]({posixpath.relpath(own[target], folder or '.')}{anchor})"
        return f"]({REPOSITORY}/blob/main/{target}{anchor})"

    if page.file.src_uri.startswith("api/"):
        return markdown
    return re.sub(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)", redirected, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes formulae as MathML, which browsers draw without a script."""

    def formula(match: re.Match[str]) -> str:
        tag, written = match[1], unescape(match[2]).strip()
        display = tag == "div"
        latex = written.removeprefix(r"\[" if display else r"\(").removesuffix(r"\]" if display else r"\)").strip()
        try:
            mathml = convert(latex, display="block" if display else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: the formula cannot be read: {latex}") from error
        # the difference of sets, for which fonts have a glyph
        mathml = mathml.replace("<mi>&#x029F5;</mi>", "<mo>&#x02216;</mo>")
        # bars around norms, of which else only one grows with what is beside it
        mathml = re.sub(r"<mo>(&#x02016;|&#x0007C;)</mo>", r'<mo stretchy="false">\1</mo>', mathml)
        return f'<{tag} class="formula">{mathml}</{tag}>'

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, html, flags=re.S)
