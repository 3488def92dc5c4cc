"""The page of all messages: it has each message of the source, and no message that the source does not have."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gendiag import (
    CollapseStopping,
    CosineMeanSimilarity,
    GenerativeDiagnostics,
    KStarMonitor,
    ModelAdapter,
    decoder_gram,
    find_regions,
    k_star,
    pixel_cka,
    samplers,
)
from tests.helpers import messages
from tests.helpers.models import TinyGAN
from tests.helpers.running import batches, trainer


def test_the_page_has_each_message_of_the_source() -> None:
    lacking = "\n".join(f"{message.place}\n{message.row}" for message in messages.missing())
    assert not lacking, f"complete these rows, and add them to docs/troubleshooting.md:\n{lacking}"


def test_each_message_of_the_page_is_in_the_source() -> None:
    known = messages.all_strings()
    known |= {text.strip() for text in known}
    unknown = [cell for cell in messages.cells() if cell not in known and not any(cell in text for text in known)]
    assert unknown == []


def test_each_row_says_what_to_write() -> None:
    rows = [re.split(r"(?<!\\)\|", row) for row in messages.PAGE.read_text().splitlines() if row.startswith("| `")]
    assert len(rows) > 200
    for row in rows:
        assert all(re.search(r"\w", cell.replace("…", "")) for cell in row[2:-1]), row


def test_messages_are_found_however_they_are_written() -> None:
    source = '''
"""A docstring must be left out, got none."""
NEEDED = "{who} needs a package: pip install this"

def f(x):
    """It must be left out as well. To fix this, ..."""
    if x:
        raise ValueError(f"x must be small, got {x!r}. " "To fix this, pass less.")
    text = f"{x} could not be written"
    rank_zero_warn(text + "!", category=UserWarning)
    self.left_out[x] = "it was not wanted here"
    view.say("Samples: all of them" if x else f"none of {x} at all")
    other = "a string that nobody reads"

def settle(x):
    return {x: f"{x} is not found anywhere"}
'''
    found = {text for text, _ in messages.said(ast.parse(source))}
    assert found == {
        "… needs a package: pip install this",
        "x must be small, got …. To fix this, pass less.",
        "… could not be written",
        "!",
        "it was not wanted here",
        "Samples: all of them",
        "none of … at all",
        "… is not found anywhere",
    }


def test_a_row_must_have_all_parts_of_a_message_in_order() -> None:
    message = messages.Message("x must be in …, got …. To fix this, pass 1.", "")
    assert messages.is_in(message, "| x must be in (0, 1), got …. | too large | pass 1 |")
    assert not messages.is_in(message, "| x must be in (0, 1), got …. | too large | pass 2 |")
    assert not messages.is_in(message, "| got 3, x must be in | pass 1 |")
    assert message.row == "| `x must be in …, got ….` | ? | pass 1 |"


def left_out(name: str, **options: Any) -> str:
    diagnostics = GenerativeDiagnostics("warn", **options)
    trainer(diagnostics, max_epochs=1).fit(TinyGAN(), batches())
    return diagnostics.left_out[name]


def raised(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    "message",
    [
        lambda: raised(lambda: CollapseStopping("halt")),
        lambda: raised(lambda: GenerativeDiagnostics(max_overhead=2)),
        lambda: raised(lambda: ModelAdapter(num_samples=1)),
        lambda: raised(lambda: k_star(torch.zeros(4), torch.zeros(4).long())),
        lambda: raised(lambda: CosineMeanSimilarity()),
        lambda: raised(lambda: pixel_cka(torch.full((4, 1, 2, 2), torch.nan))),
        lambda: raised(lambda: find_regions(torch.rand(8, 1, 2, 2), 5)),
        lambda: raised(lambda: decoder_gram(nn.Identity(), torch.zeros(2, 3).long())),
        lambda: raised(lambda: samplers.ddim(nn.Identity(), torch.full((2,), 2.0), (1, 1, 2, 2))),
        lambda: raised(lambda: trainer(KStarMonitor("nowhere"), max_epochs=1).fit(TinyGAN(), batches())),
        lambda: left_out("codebook"),
        lambda: left_out("posterior_kl"),
        lambda: left_out("cms", skip=("cms",)),
        lambda: left_out("k_star", encode=lambda module, images: images.mean()),
    ],
)
def test_a_message_is_found_on_the_page_as_people_see_it(message: Callable[[], str]) -> None:
    seen = message()
    assert messages.explaining(seen), seen
    assert not messages.explaining("the weather is fine")
