"""Tables of pages, made from what scripts have recorded.

``python -m benchmarks.pages`` writes those of ``docs/costs.md`` and computes nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
COSTS = ROOT / "docs" / "costs.md"

NOT_MEASURED = "This part has a script, and was not measured yet."
"""What a page says in place of a table."""

LABELS = {
    "sampling": "samples of a DCGAN",
    "cosine mean similarity, real side": "`CosineMeanSimilarity`, real side and null, once",
    "cosine mean similarity, compare": "`CosineMeanSimilarity`, later",
    "class features": "class features",
    "classification": "classes by real images, on the CPU",
    "Jacobian Gram matrices": "Jacobian Gram matrices",
    "find_regions": "`find_regions`",
    "shares, Fréchet distance by class": "shares and Fréchet distances of the classes",
    "k*": "`KStar`",
    "manifold entropy of these": "manifold entropy of these",
}
"""What the pages call each part."""

AXES = {
    "resolution": "side of the image",
    "samples": "images",
    "latent dimensions": "latent dimensions",
    "latents": "latents",
    "classes": "classes",
    "regions": "regions",
}
"""What the pages call the amounts by which the cost of a part grows."""

BASE = {"samples": 512, "latents": 16}
"""The amounts of a base case."""

SETTINGS = ((64, 1024), (64, 8192), (256, 1024), (256, 4096))
"""Side of the images and number of samples in the columns of the table of GPUs."""


def text_of(cell: Any) -> str:
    """Returns a cell as a page shows it, numbers with three digits."""
    if not isinstance(cell, float):
        return re.sub(r"(\d)%", r"\1 %", str(cell))
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """Returns a table."""
    first, *others = ["| " + " | ".join(map(text_of, line)) + " |" for line in (columns, *rows)]
    return "\n".join([first, "|" + "---|" * len(columns), *others])


def filled(text: str, made: dict[str, str]) -> str:
    """Returns the text of a page whose tables, which follow comments with their names, are those that were made."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{made.get(match[1], NOT_MEASURED)}\n"

    row = rf"(?:\||{re.escape(NOT_MEASURED)}).*\n"
    return re.sub(rf"<!-- (\w+) -->\n(?:\n(?:{row})+)?", table, text)


def scaling_table() -> str:
    """Returns how the time of each part grows, from ``benchmarks/records/scaling.json``."""
    found = json.loads((RECORDS / "scaling.json").read_text())
    amounts = {entry["axis"]: entry["amounts"] for entry in found}
    rows = []
    for part, label in LABELS.items():
        own = {entry["axis"]: entry for entry in found if entry["part"] == part}
        axis = next(axis for axis in BASE if axis in own)
        base = own[axis]["seconds"][own[axis]["amounts"].index(BASE[axis])]
        rows.append([label, 1e3 * base, *(f"{own[a]['exponent']:.1f}" if a in own else "" for a in AXES)])
    ranges = [f"{name}, {amounts[axis][0]:,} to {amounts[axis][-1]:,}" for axis, name in AXES.items()]
    return markdown(["", "milliseconds of a base case", *ranges], rows)


def gpu_table() -> str:
    """Returns milliseconds on a GPU, and those of the products alone, from ``benchmarks/records/gpu.json``."""
    found = json.loads((RECORDS / "gpu.json").read_text())["rows"]
    by_setting = {(row["part"], row["size"], row["samples"]): row for row in found}
    rows = [
        [label, *(f"{row['ms']:.0f} ({row['products_ms']:.0f})" for row in own)]
        for part, label in LABELS.items()
        if all(own := [by_setting.get((part, *setting), {}) for setting in SETTINGS])
    ]
    return markdown(["", *(f"{count:,} of 3x{size}x{size}" for size, count in SETTINGS)], rows)


def costs(text: str) -> str:
    """Returns the text of the page about costs with the tables that were recorded."""
    return filled(text, {"scaling": scaling_table(), "gpu": gpu_table()})


if __name__ == "__main__":
    COSTS.write_text(costs(COSTS.read_text()))
