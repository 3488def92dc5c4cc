"""Makes the gallery of failures, ``docs/gallery.md``, from runs of the examples: ``python -m benchmarks.gallery``.

Each run trains an example on handwritten digits with a fault that begins at epoch 20, until it is stopped. The page has the
picture of its first alarm and what the alarm says. About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "gallery.md"
PICTURES = DOCS / "gallery"

MARK = "<!-- Below this line: python -m benchmarks.gallery -->\n"
"""Separates the text of the page from what is generated."""


class Failure(NamedTuple):
    """A run of an example with a fault."""

    model: str
    """Module in ``example_models``."""
    fault: str
    """What is planted."""
    title: str
    """Heading in the page."""
    planted: str
    """What happens in the model, as a sentence."""
    guide: str
    """Name of the guide that explains the picture."""

    @property
    def name(self) -> str:
        """Name of the picture and of the run."""
        return f"{self.model}_{self.fault}"


CMS, BALANCE, MANIFOLD = "cosine_mean_similarity", "generation_balance", "manifold_entropy"
"""Guides that explain the pictures."""

FAILURES = [
    Failure("gan", "frozen", "A region that is frozen", "All images show one patch in the bottom right.", CMS),
    Failure(
        "gan", "noise", "A region of noise", "Uniform noise takes the place of the image in the bottom right.", CMS
    ),
    Failure(
        "diffusion",
        "still",
        "A diffusion model that repeats a part",
        "All samples show the first one in a box.",
        BALANCE,
    ),
    Failure(
        "vae", "entangled", "Two dimensions become one", "Dimension 1 has almost the effect of dimension 0.", MANIFOLD
    ),
    Failure(
        "vae", "collapse", "Latents hardly matter", "All dimensions but one have a fiftieth of their effect.", MANIFOLD
    ),
    Failure(
        "flow", "dead", "A dimension of a flow dies", "One dimension of the latent has no effect any more.", MANIFOLD
    ),
]
"""In the order of the page."""


def train(failure: Failure, folder: Path) -> None:
    """Trains an example, and notes what its alarms say beside the run."""
    main = importlib.import_module(f"example_models.{failure.model}").main
    stopping = main(["--fault", failure.fault, "--runs", str(folder)])
    (folder / "alarms.json").write_text(json.dumps([alarm.message for alarm in stopping.alarms]))


def picture(folder: Path) -> Image.Image:
    """Returns the picture of the first alarm."""
    events = EventAccumulator(str(next(folder.rglob("events*")).parent), size_guidance={"images": 0})
    events.Reload()
    encoded = events.Images("gendiag/alarm_1/picture")[-1].encoded_image_string
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def section(failure: Failure, message: str) -> str:
    """Returns the section of one run."""
    guide = failure.guide.replace("_", " ")
    return (
        f"## {failure.title}\n\n{failure.planted} `python -m example_models.{failure.model} --fault {failure.fault}`\n\n"
        f"> {message}\n\n![{failure.title}](gallery/{failure.name}.png)\n\n"
        f"How to read the picture: [{guide}]({failure.guide}.md).\n"
    )


def main() -> None:
    """Trains what is not there yet, and writes pictures and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of runs that are used again where they are there")
    folder = parser.parse_args().runs or Path(tempfile.mkdtemp())
    PICTURES.mkdir(exist_ok=True)
    sections = []
    for failure in FAILURES:
        own = folder / failure.name
        if not (own / "alarms.json").exists():
            train(failure, own)
        first, *_ = json.loads((own / "alarms.json").read_text())
        picture(own).save(PICTURES / f"{failure.name}.png", optimize=True)
        sections.append(section(failure, first))
        print(failure.name, first)
    text, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{text}{MARK}\n" + "\n".join(sections))


if __name__ == "__main__":
    main()
