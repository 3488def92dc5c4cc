from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gendiag.model.warning import LOG

# tiny networks run faster on one thread, and reproducibly bit for bit
torch.set_num_threads(1)


class Refused(logging.Handler):
    """Collects the warnings that were logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(autouse=True)
def restored_globals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs each test in its own folder and from one seed; fails if it changes the gradient mode, the dtype or the precision."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    yield
    assert torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == precision
    assert torch.get_default_dtype() == dtype


@pytest.fixture(autouse=True)
def refused_warnings() -> Any:
    """Fails if our code warned of anything that a test does not expect, which is logged since warnings are errors here."""
    handler = Refused()
    LOG.addHandler(handler)
    yield handler.texts
    LOG.removeHandler(handler)
    assert handler.texts == []


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
