"""What is uploaded: sdist and wheel, with a description whose links lead somewhere."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import lightning_gendiag

ROOT = Path(__file__).parent.parent
ADDRESS = re.compile(r"https://github\.com/lightning-gendiag/lightning_gendiag/(?:blob|raw)/main/([^)#\s]+)")

sdist_builder = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed")
wheel_builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (built,) = sdist_builder.SdistBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("sdist")))
    return Path(built)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Message:
    folder = str(tmp_path_factory.mktemp("wheel"))
    (built,) = wheel_builder.WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "lightning_gendiag/py.typed" in archive.namelist()
        assert "lightning_gendiag/__init__.pyi" in archive.namelist()
        return message_from_string(archive.read(name).decode())


def test_the_oldest_versions_are_those_that_the_suite_runs_with(metadata: Message) -> None:
    declared = {}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        found = re.match(r"([\w-]+)(?:\[\w+\])?.*?>=([\d.]+)", requirement)
        if found and not re.search("extra == '(field|zoo|docs|release|dev)'", marker):
            declared[found[1].lower()] = found[2]
    pinned = dict(line.split("==") for line in (ROOT / "constraints-minimal.txt").read_text().splitlines())
    assert declared
    # 2.4 and 2.4.0 are one version
    assert {name: version.rstrip(".0") for name, version in pinned.items()} == {
        name: version.rstrip(".0") for name, version in declared.items()
    }


def test_each_link_of_the_description_is_an_address_of_a_file(metadata: Message) -> None:
    description = metadata.get_payload()
    assert isinstance(description, str)
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)
    linked = ADDRESS.findall(description)
    assert {"LICENSE", "docs/any_model.md"} <= set(linked)
    assert re.search(r"!\[[^\]]*\]\(https://\S+/raw/main/docs/", description)
    assert all((ROOT / path).exists() for path in linked)


def test_the_metadata_name_version_and_addresses(metadata: Message) -> None:
    assert metadata["Version"] == lightning_gendiag.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL") or [])
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog", "Security"} <= set(urls)
    assert all((ROOT / path).exists() for url in urls.values() for path in ADDRESS.findall(url))


def test_the_sdist_holds_what_its_tests_and_its_site_need_and_stays_small(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [
        "pyproject.toml",
        "hatch_build.py",
        "mkdocs.yml",
        "docs/index.md",
        "tests/test_distribution.py",
        "CHANGELOG.md",
    ]
    assert set(needed) <= names
    assert sdist.stat().st_size < 8_000_000
    assert not [name for name in names if name.startswith(("build/", "dist/", "runs/", ".venv/"))]
