"""Makes the gallery of failures, ``docs/gallery.md``, from runs of the examples: ``python -m benchmarks.gallery``.

Each run trains an example on handwritten digits with a fault that begins at epoch 20 or with the run. The page has the picture
of the first alarm that names the fault, and what the alarm says. ``--only TITLE`` trains those with such words in their titles,
and writes nothing. About 20 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.defaults import EXAMPLES
from benchmarks.pictures import events_of, picture, said
from benchmarks.zoo.faults import FAULTS, FROM_THE_START, Planting
from lightning_gendiag import GenerativeDiagnostics

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
    """What is planted: a fault of that module, or of the zoo."""
    title: str
    """Heading in the page."""
    planted: str
    """What happens in the model, as a sentence."""
    guide: str
    """Name of the guide that explains the picture."""
    words: str = ""
    """What the alarm says that is shown; by default it is the first one."""
    seed: int = 0
    """Of a fault of the zoo, which decides on classes and quadrants."""

    @property
    def name(self) -> str:
        """Name of the picture and of the run."""
        return f"{self.model}_{self.fault.replace(' ', '_')}"

    @property
    def is_of_the_zoo(self) -> bool:
        """Whether the fault is one of the zoo's."""
        return self.fault in FAULTS or self.fault in FROM_THE_START

    @property
    def is_from_the_start(self) -> bool:
        """Whether the fault begins with the run."""
        return self.is_of_the_zoo and self.fault not in FAULTS

    @property
    def command(self) -> str:
        """What trains it."""
        if self.is_of_the_zoo:
            return f"python -m benchmarks.gallery --only '{self.title}'"
        return f"python -m example_models.{self.model} --fault {self.fault}"


CMS, MANIFOLD = "cosine_mean_similarity", "manifold_entropy"
KL, DATA, ALARMS, ADVERSARY = "posterior_kl", "training_data", "alarms", "adversary"
"""Guides that explain the pictures."""

FAILURES = [
    Failure("gan", "frozen", "A region that is frozen", "All images show one patch in the bottom right.", CMS),
    Failure("gan", "noise", "A region of noise", "Uniform noise takes the place of the image in the bottom right.", CMS),
    Failure(
        "diffusion", "dark", "A diffusion model that draws a part too dark",
        "Samples are half as bright in a box of 4 x 6 pixels at the bottom right.", CMS,
    ),
    Failure("gan", "latent ignored", "A generator that ignores its noise", "The generator is given zeros.", CMS, "alike"),
    Failure(
        "gan", "learning rate x30", "A learning rate that is too high", "Both learning rates are 30 times as high.", CMS
    ),
    Failure(
        "gan", "discriminator frozen", "A discriminator that stops learning", "Its learning rate becomes 0.", ADVERSARY,
        "discriminator",
    ),
    Failure(
        "gan", "generator never steps", "A generator that never learns", "Its learning rate is 0 from the start.", ADVERSARY,
        "generator is frozen",
    ),
    Failure("vae", "entangled", "Two dimensions become one", "Dimension 1 has almost the effect of dimension 0.", MANIFOLD),
    Failure("vae", "collapse", "Latents hardly matter", "All dimensions but one have a fiftieth of their effect.", MANIFOLD),
    Failure("vae", "beta x200", "A KL term that is too large", "The weight of the KL term is 200 times as large.", KL, "KL"),
    Failure("vae", "nan weight", "A weight that is nan", "One weight of the decoder is set to nan.", ALARMS, "nan"),
    Failure("flow", "dead", "A dimension of a flow dies", "One dimension of the latent has no effect any more.", MANIFOLD),
    Failure(
        "vae", "class removed", "Training data that lose a class", "The training images hold no 3 any more.", DATA, "class 3",
        seed=3,
    ),
    Failure(
        "vae", "other normalisation", "Training data in another range", "Images are in 0 to 1 in place of -1 to 1.", DATA,
        "training images",
    ),
    Failure(
        "vae", "one batch for ever", "Training data that repeat themselves", "The loader brings one batch for ever.", DATA,
        "repeat",
    ),
    Failure(
        "vae", "data region inverted", "Training data of which a part is inverted",
        "The bottom right of the training images is inverted.", DATA, "training images", seed=3,
    ),
    Failure(
        "gan", "data by mean and std", "Training data that the model cannot reach",
        "The images are standardized, and the generator ends in a tanh.", ALARMS, "outside",
    ),
]  # fmt: skip
"""In the order of the page."""

EPOCHS, BEGIN = 40, 20
"""Epochs of a run with a fault of the zoo, and the one at which the fault begins."""


class Begin(Callback):
    """Plants a fault when its epoch comes.

    Args:
        fault: From ``FAULTS``.
        planting: The run's parts.
    """

    def __init__(self, fault: str, planting: Planting) -> None:
        self.fault, self.planting = fault, planting

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plants it."""
        if trainer.current_epoch == BEGIN:
            self.planting.trainer = trainer
            FAULTS[self.fault].plant(self.planting)


def train_with_fault_of_the_zoo(failure: Failure, folder: Path) -> None:
    """Trains an example with a fault that it cannot plant itself."""
    seed_everything(failure.seed, verbose=False)
    example = EXAMPLES[failure.model]
    module, batches = example.make(), example.batches(failure.seed)
    planting = Planting(module, None, batches, example.kind, failure.seed)
    diagnostics = GenerativeDiagnostics("warn", max_overhead=None, num_samples=256)
    callbacks: list[Callback] = [diagnostics]
    if failure.is_from_the_start:
        FROM_THE_START[failure.fault].plant(planting)
    else:
        callbacks.insert(0, Begin(failure.fault, planting))
    Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, logger=TensorBoardLogger(folder, name=""),
        enable_checkpointing=False, enable_model_summary=False,
    ).fit(module, batches)  # fmt: skip


def train(failure: Failure, folder: Path) -> None:
    """Trains an example into a folder."""
    if failure.is_of_the_zoo:
        train_with_fault_of_the_zoo(failure, folder)
    else:
        importlib.import_module(f"example_models.{failure.model}").main(
            ["--fault", failure.fault, "--runs", str(folder)]
        )


def section(failure: Failure, message: str) -> str:
    """Returns the section of one run."""
    guide = failure.guide.replace("_", " ")
    return (
        f"## {failure.title}\n\n{failure.planted} `{failure.command}`\n\n"
        f"> {message}\n\n![{failure.title}](gallery/{failure.name}.png)\n\n"
        f"How to read the picture: [{guide}]({failure.guide}.md).\n"
    )


def main() -> None:
    """Trains what is not there yet, and writes pictures and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of runs that are used again where they are there")
    parser.add_argument("--only", help="words of titles; trains these, and writes no page")
    parser.add_argument("--json", action="store_true", help="writes what the alarms of the page say")
    options = parser.parse_args()
    folder = options.runs or Path(tempfile.mkdtemp())
    PICTURES.mkdir(exist_ok=True)
    sections, messages = [], {}
    for failure in FAILURES:
        if options.only and options.only not in failure.title:
            continue
        own = folder / failure.name
        if not own.exists():
            train(failure, own)
        events = events_of(own)
        if options.only:
            print(failure.title, *said(events), f"tensorboard --logdir {own}", sep="\n")
            continue
        image, text = picture(events, failure.words)
        # some runs are only watched
        message, _, _ = text.partition(" Training ")
        image.save(PICTURES / f"{failure.name}.png", optimize=True)
        sections.append(section(failure, message))
        messages[failure.name] = message
        print(failure.name, message)
    if not options.only:
        above, _, _ = PAGE.read_text().partition(MARK)
        PAGE.write_text(f"{above}{MARK}\n" + "\n".join(sections))
    if options.json:
        print(json.dumps(messages))


if __name__ == "__main__":
    main()
