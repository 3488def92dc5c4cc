"""The scripts of the quick start run as they are written, and enable what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lightning_gendiag import GenerativeDiagnostics
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS

PAGE = Path(__file__).parent.parent / "docs" / "quick_start.md"
INTRODUCTION, *SECTIONS = PAGE.read_text().split("\n## ")
NAMES = {monitor.name for monitor in MONITORS}


def blocks(section: str) -> list[str]:
    """Returns the blocks of Python of a section."""
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


MODELS = [section for section in SECTIONS if blocks(section)]


def test_the_page_has_each_kind_of_model() -> None:
    titles = [section.splitlines()[0] for section in MODELS]
    assert titles == ["GAN", "VAE", "Normalizing flow", "Diffusion model", "Latent diffusion", "VQ-VAE"]


@pytest.mark.parametrize("section", MODELS, ids=lambda section: section.splitlines()[0])
def test_the_script_runs_and_enables_what_the_page_says(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (data,), (script,) = blocks(INTRODUCTION), blocks(section)
    names: dict[str, Any] = {}
    exec(compile(data + script, str(PAGE), "exec"), names)

    found = [value for value in names.values() if isinstance(value, GenerativeDiagnostics)]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section, re.M)[1:]
    assert len(rows) == len(found) > 0
    for diagnostics, (enabled, left_out) in zip(found, rows, strict=True):
        assert re.findall(r"`(\w+)`", enabled) == diagnostics.attached
        assert NAMES & set(re.findall(r"`(\w+)`", left_out)) == set(diagnostics.left_out)
        assert (tmp_path / "lightning_logs").exists()
    watched = re.findall(r"`(gendiag/\w+/\w+)`", section.split("Watch ")[1])
    assert watched
    for tag in watched:
        assert bool(names["trainer"].callback_metrics[tag].isfinite()), tag
