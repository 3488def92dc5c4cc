"""The gallery of failures: each fault that the examples can plant, with its alarm and its picture."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from benchmarks.defaults import EXAMPLES
from benchmarks.gallery import BEGIN, DOCS, FAILURES, MARK, PAGE, PICTURES, Failure, section
from example_models import diffusion, flow, gan, vae
from tests.helpers.figures import output

SECTIONS = PAGE.read_text().split(MARK)[1].split("\n## ")
every_failure = pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)


def test_the_page_shows_faults_that_the_examples_can_plant() -> None:
    planted = {
        (module.__name__.split(".")[-1], fault) for module in (gan, vae, flow, diffusion) for fault in module.FAULTS
    }
    own = {(failure.model, failure.fault) for failure in FAILURES if not failure.is_of_the_zoo}
    assert own <= planted
    for failure in FAILURES:
        assert not failure.is_of_the_zoo or failure.model in EXAMPLES
    assert [part.splitlines()[0].lstrip("# ") for part in SECTIONS if part.strip()] == [f.title for f in FAILURES]
    assert {path.stem for path in PICTURES.glob("*")} == {failure.name for failure in FAILURES}


@every_failure
def test_the_page_has_an_alarm_and_its_picture(failure: Failure) -> None:
    (written,) = (part for part in SECTIONS if part.lstrip("\n# ").startswith(f"{failure.title}\n"))
    message = output("gallery")[failure.name]
    assert re.search(r"detected at epoch \d+, step \d+", message)
    assert section(failure, message).strip() == f"## {written.strip().removeprefix('## ')}"
    with Image.open(PICTURES / f"{failure.name}.png") as picture:
        assert min(picture.size) > 300
    assert (DOCS / f"{failure.guide}.md").exists()


@every_failure
def test_the_alarm_is_raised_after_the_fault_begins(failure: Failure) -> None:
    (written,) = (part for part in SECTIONS if part.lstrip("\n# ").startswith(f"{failure.title}\n"))
    epoch = int(re.findall(r"detected at epoch (\d+)", written)[0])
    assert epoch >= (0 if failure.is_from_the_start else BEGIN)
