"""Writes the links of the README for PyPI, where a path of the repository leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "https://github.com/lightning-gendiag/lightning_gendiag"


def absolute(text: str) -> str:
    """Returns Markdown whose links and pictures are addresses."""
    text = re.sub(r"!\[([^\]]*)\]\((?!https?://)([^)\s]+)\)", rf"![\1]({REPOSITORY}/raw/main/\2)", text)
    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", rf"]({REPOSITORY}/blob/main/\1)", text)


class ReadmeHook(MetadataHookInterface):
    """Gives the distribution its description."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the README to the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text)}
