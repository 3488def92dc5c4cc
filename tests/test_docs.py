"""What the documentation says exists: links, commands, names, tests, scalars and the functions of the newcomer's walk."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_gendiag
from lightning_gendiag import CollapseStopping, Monitor
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS
from lightning_gendiag.detection import alarm_positions
from tests.helpers import scalar_table

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lightning_gendiag.__file__).parent
NAMES = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")
PAGES = [ROOT / f"{name}.md" for name in NAMES] + sorted((ROOT / "docs").rglob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
every_monitor = pytest.mark.parametrize("monitor", MONITORS, ids=lambda monitor: monitor.name)


def blocks(page: Path, language: str) -> list[str]:
    """Returns the blocks of code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(path: Path) -> set[str]:
    """Returns the functions, classes and methods of a module, methods as ``Class.method``."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@every_page
def test_each_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if not target.startswith("https://"):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), anchor


@every_page
def test_each_command_and_its_options_exist(page: Path) -> None:
    for module, options in re.findall(
        r"python -m ((?:benchmarks|example_models|tests)[.\w]+)([^`\n]*)", page.read_text()
    ):
        folder = ROOT / module.replace(".", "/")
        path = folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert path.exists(), module
        sources = path.read_text() + (ROOT / "example_models" / "running.py").read_text()
        for option in re.findall(r"--[a-z-]+", options):
            assert f'"{option}"' in sources, f"{module} {option}"
    for target in re.findall(r"`make (\w+)`", page.read_text()):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


@every_page
def test_each_test_that_is_named_exists(page: Path) -> None:
    for name, *parts in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?(?:::(\w+))?", page.read_text()):
        source = (ROOT / "tests" / name).read_text()
        assert all(re.search(rf"(def|class) {part}\b", source) for part in parts if part), (name, parts)


@every_page
def test_each_path_of_the_repository_exists(page: Path) -> None:
    for path in re.findall(r"`((?:docs|tests|benchmarks|example_models|lightning_gendiag)/[\w./]*)", page.read_text()):
        assert (ROOT / path).exists(), path


@every_page
def test_each_name_that_is_imported_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
                "lightning_gendiag",
                "example_models",
            ):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def arguments(name: str) -> set[str]:
    """Returns the arguments of a class of ours, with those that it passes on to its base classes."""
    bases = getattr(lightning_gendiag, name).__mro__
    own = [base for base in bases if base.__module__.startswith("lightning_gendiag")]
    return {argument for base in own for argument in inspect.signature(base).parameters}


@every_page
def test_each_argument_of_our_classes_exists(page: Path) -> None:
    for code in [*blocks(page, "python"), *re.findall(r"`([A-Z]\w+\([^`]*\))`", page.read_text())]:
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func)
            if name in lightning_gendiag.__all__ and name[0].isupper():
                assert {keyword.arg for keyword in call.keywords} <= arguments(name), ast.unparse(call)


def test_each_callback_in_a_block_of_settings_exists() -> None:
    for page in PAGES:
        for block in blocks(page, "yaml"):
            for entry in yaml.safe_load(block)["trainer"]["callbacks"]:
                package, _, name = entry["class_path"].rpartition(".")
                assert package == "lightning_gendiag"
                assert set(entry["init_args"]) <= arguments(name), name


def test_the_table_of_scalars_is_what_the_metrics_declare() -> None:
    _, mark, written = scalar_table.PAGE.read_text().partition(scalar_table.MARK)
    assert mark
    assert written.strip() == scalar_table.tables().strip(), "run python -m tests.helpers.scalar_table --write"


@every_monitor
def test_each_scalar_is_in_the_guide_and_the_guide_has_no_other(monitor: type[Monitor[Any, Any]]) -> None:
    page = (ROOT / "docs" / f"{scalar_table.guide_of(monitor)}.md").read_text()
    section = page.split("\n## Scalars\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.M)
    assert {name for row in rows for name in re.findall(r"`([^`]*)`", row)} == set(monitor.metric_class.scalar_info)


@every_page
def test_each_tag_is_logged(page: Path) -> None:
    metrics = {monitor.name: monitor.metric_class.scalar_info for monitor in MONITORS}
    others = {"panel", "regions", "classes", "components"}
    for name, scalar in re.findall(r"`(?:gendiag/)?(\w+)/(\w+)`", page.read_text()):
        if name in metrics:
            general = re.sub(r"_\d+$", "_{}", scalar)
            known = {re.sub(r"\{\w\}", "{}", declared) for declared in metrics[name]}
            assert scalar in others or general in known or scalar in known, f"{name}/{scalar}"


def test_the_time_that_a_large_drop_takes_is_as_the_table_says() -> None:
    page = (ROOT / "docs" / "alarms.md").read_text()
    healthy, taken = (
        [int(number) for number in re.findall(r"\d+", next(re.finditer(rf"^\| {head} \|(.*)$", page, re.M))[1])]
        for head in ("healthy evaluations before the drop", "evaluations until the alarm")
    )
    series, monitors_rate = 6, inspect.signature(CollapseStopping).parameters["false_alarm_rate"].default
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0)).tolist()
    assert len(healthy) == len(taken) > 3
    for before, delay in zip(healthy, taken, strict=True):
        values = [value + 1e6 * (position >= before) for position, value in enumerate(noise)]
        assert alarm_positions(values, monitors_rate / series) == [before + delay - 1]


def test_the_newcomers_walk_names_functions_in_at_most_six_files() -> None:
    walk = (ROOT / "CONTRIBUTING.md").read_text().split("## A newcomer's walk")[1].split("\n## ")[0]
    paths = walk.split("**From a training batch to an alarm.**")
    assert len(paths) == 2
    for path in paths:
        steps = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", path, re.M)
        assert 3 <= len({file for file, _ in steps}) <= 6
        for file, function in steps:
            assert function in defined(PACKAGE / file), (file, function)


def test_the_table_of_floors_has_each_folder() -> None:
    house = (ROOT / "CONTRIBUTING.md").read_text().split("## The house")[1].split("\n## ")[0]
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name in folders if f"`{name}/" not in house} == set()


def test_the_version_stands_in_one_place() -> None:
    assert re.search(r'^dynamic = \["version"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"version: {lightning_gendiag.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.name
)
def test_each_form_for_issues_can_be_read_and_links_to_files(form: Path) -> None:
    text = form.read_text()
    content = yaml.safe_load(text)
    if form.name != "config.yml":
        assert {"name", "description", "body"} <= set(content)
        kinds = {"markdown", "textarea", "dropdown", "input", "checkboxes"}
        named = [part["id"] for part in content["body"] if part["type"] != "markdown"]
        assert {part["type"] for part in content["body"]} <= kinds
        assert len(named) == len(set(named)) > 0
        assert all(part["attributes"]["label"] for part in content["body"] if part["type"] != "markdown")
    for path in re.findall(r"lightning_gendiag/blob/main/([^)#\s]+)", text):
        assert (ROOT / path).exists(), path


def test_the_changelog_has_the_version_that_is_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.M)
    assert versions[0] == ("Unreleased", "")
    assert [name for name, _ in versions[1:]][:1] in ([], [lightning_gendiag.__version__])
    assert all(date for _, date in versions[1:])
    linked = re.findall(r"^\[(.+?)\]: https://", text, re.M)
    assert {name for name, _ in versions} == set(linked)
    for section in re.findall(r"^### (.+)$", text, re.M):
        assert section in {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def described(name: str) -> set[str]:
    """Returns the arguments that the docstring of a public name describes, and the fields that have one of their own."""
    thing = getattr(lightning_gendiag, name)
    found = set(re.findall(r"^ *\*{0,2}(\w+): \S", inspect.getdoc(thing) or "", re.M))
    if inspect.isclass(thing):
        (node,) = ast.parse(inspect.getsource(thing)).body
        assert isinstance(node, ast.ClassDef)
        for field, text in itertools.pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found.add(ast.unparse(field.target))
    return found


OF_PYTHON = ("samplers", "CollapseWarning", "DiagnosticWarning")
"""A module, and warnings, which take what those of Python take."""


@pytest.mark.parametrize("name", [name for name in lightning_gendiag.__all__ if name not in OF_PYTHON])
def test_each_argument_of_a_public_name_is_described(name: str) -> None:
    assert set(inspect.signature(getattr(lightning_gendiag, name)).parameters) <= described(name)
