"""Makes the pictures of the guides from runs of the examples: ``python -m benchmarks.pictures``.

Each picture is what TensorBoard shows: the newest panel of a monitor, or the picture of the first alarm with some words. About
eight minutes on two cores. ``--json`` writes what the alarms of all runs say, which the guides quote. ``--tab RUNS`` takes
screenshots and an animation of the tab, and ``--power FILE`` draws ``docs/power.png`` from the last line of
``python -m benchmarks.defaults --json --samples ...``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.codebook_usage import few_batches
from benchmarks.timestep_loss import Denoising
from benchmarks.zoo.autoencoders import VQVAE
from benchmarks.zoo.flows import Glow
from benchmarks.zoo.gans import GAN, mlp
from benchmarks.zoo.judging import bounds
from example_models import flow, gan, vae
from example_models.data import digit_batches, digits
from lightning_gendiag import (
    AdversaryMonitor,
    CodebookUsageMonitor,
    CollapseStopping,
    GenerationBalanceMonitor,
    KStarMonitor,
    LatentRegionsMonitor,
    MemorizationMonitor,
    Monitor,
    PosteriorKLMonitor,
    RegionalPrimitivesMonitor,
    RegionMap,
    RoundTripMonitor,
    TimestepLossMonitor,
    TrainingDataMonitor,
)
from lightning_gendiag.plots import canvas, charts
from tests.helpers.codebooks import Planted

DOCS = Path(__file__).parent.parent / "docs"

GIF_WIDTH = 980
"""Pixels."""


def fit(make: Callable[[], LightningModule], monitor: Monitor[Any, Any], folder: Path) -> None:
    """Trains a model of digits with a single monitor, as the guides do."""
    seed_everything(0, verbose=False)
    logger = TensorBoardLogger(folder, name="")
    callbacks = [monitor, CollapseStopping()]
    Trainer(max_epochs=40, accelerator="cpu", callbacks=callbacks, logger=logger).fit(make(), digit_batches())


class OtherData(vae.VAE):
    """A VAE whose training data change at epoch 4: class 3 is removed, or one image is nan.

    Args:
        change: ``removed`` or ``nan``.
    """

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns other data from epoch 4 on."""
        images, labels = digits(32)
        if self.current_epoch >= 4 and self.change == "removed":
            images, labels = images[labels != 3], labels[labels != 3]
        elif self.current_epoch >= 4:
            images[0] = math.nan
        return DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)


def fit_with_other_data(change: str, folder: Path) -> None:
    """Trains on the digits, which change."""
    seed_everything(0, verbose=False)
    Trainer(
        max_epochs=6, accelerator="cpu", callbacks=[TrainingDataMonitor(), CollapseStopping("warn")],
        logger=TensorBoardLogger(folder, name=""), reload_dataloaders_every_n_epochs=1,
    ).fit(OtherData(change))  # fmt: skip


class EmptyImages(vae.VAE):
    """A VAE whose encoder receives empty images from epoch 10 on."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the log variance (N, L) of the posterior."""
        return super().encode(images * 0 if self.current_epoch >= 10 else images)


def fit_with_a_corner(folder: Path) -> None:
    """Trains the example GAN, of which the corner that will be frozen is a region of its own."""
    labels = torch.zeros(32, 32, dtype=torch.long)
    top, left, bottom, right = gan.BOX
    labels[top:bottom, left:right] = 1
    labels[:16, :16] = 2
    labels[:16, 16:] = 3
    regions = RegionMap(labels, names=("rest", "corner", "top left", "top right"))
    monitor = RegionalPrimitivesMonitor(regions=regions, every_n_epochs=1)
    fit(partial(gan.FaultyGAN, "frozen", start=20), monitor, folder)


class AtOnePoint(VQVAE):
    """A VQ-VAE whose latents are all at one point from epoch 12 on."""

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the nearest vectors of these latents, and the loss of the codebook."""
        return super().quantize(z * 1e-3 if self.current_epoch >= 12 else z)


def fit_with_codes_far_away(folder: Path) -> None:
    """Trains a tokenizer of the digits whose codes lie far from its latents."""
    seed_everything(0, verbose=False)
    batches = few_batches()
    Trainer(
        max_epochs=12, accelerator="cpu", logger=TensorBoardLogger(folder, name=""),
        callbacks=[CodebookUsageMonitor(), CollapseStopping("warn")],
    ).fit(Planted("far", 0), batches)  # fmt: skip


class Transport(LightningModule):
    """A generator that is drawn to the images that optimal transport assigns to its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.Tanh()
        )

    def sample(self, n: int) -> Tensor:
        """Returns images (n, 1, 8, 8)."""
        images: Tensor = self.net(torch.randn(n, 4)).view(n, 1, 8, 8)
        return images

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the mean squared distance of samples from the images that are assigned to them."""
        real, made = batch[0].repeat(4, 1, 1, 1), self.sample(4 * len(batch[0]))
        costs = torch.cdist(made.flatten(1), real.flatten(1)).square()
        assigned = linear_sum_assignment(costs.detach().numpy())[1]
        return (made - real[assigned]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing; validation batches are the real images that samples are compared with."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


def fit_on_few_images(folder: Path) -> None:
    """Trains on 50 digits, which the generator memorises."""
    seed_everything(0, verbose=False)
    images = digits(8)[0][torch.randperm(1797)]
    train, held_out = TensorDataset(images[:50]), TensorDataset(images[1400:])
    Trainer(
        max_epochs=-1, max_steps=1500, accelerator="cpu", logger=TensorBoardLogger(folder, name=""),
        callbacks=[MemorizationMonitor(every_n_train_steps=100), CollapseStopping()], check_val_every_n_epoch=1500,
    ).fit(Transport(), DataLoader(train, 50, shuffle=True), DataLoader(held_out, 200))  # fmt: skip


class Held(GAN):
    """A GAN with validation batches, which are the real images that its discriminator never sees."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing."""


def fit_discriminator_of_few_images(folder: Path) -> None:
    """Trains a GAN on 50 digits, which its discriminator learns by heart."""
    seed_everything(0, verbose=False)
    images = digits(8)[0][torch.randperm(1797)]
    train, held_out = TensorDataset(images[:50], torch.zeros(50)), TensorDataset(images[1400:])
    generator = nn.Sequential(mlp(32, 64, 128, 64, norm=True), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
    discriminator = nn.Sequential(nn.Flatten(), mlp(64, 128, 64, 1))
    Trainer(
        max_epochs=900, accelerator="cpu", logger=TensorBoardLogger(folder, name=""), check_val_every_n_epoch=900,
        callbacks=[AdversaryMonitor(every_n_train_steps=25), CollapseStopping()],
    ).fit(Held(generator, discriminator, 32, 5e-4), DataLoader(train, 50, shuffle=True), DataLoader(held_out, 200))  # fmt: skip


class NearZero(Glow):
    """A flow in which a learnt scale of the third step is almost zero from epoch 12 on."""

    def on_train_epoch_start(self) -> None:
        """Sets the scale of one channel of four."""
        if self.current_epoch == 12:
            self.layers[2].log_scale.data[:, 1] = -25.0
            self.layers[2].shift.data[:, 1] = 1.0


def fit_with_scale_near_zero(folder: Path) -> None:
    """Trains a flow on small digits."""
    seed_everything(0, verbose=False)
    callbacks = [RoundTripMonitor(), CollapseStopping()]
    logger = TensorBoardLogger(folder, name="")
    Trainer(max_epochs=24, accelerator="cpu", callbacks=callbacks, logger=logger).fit(
        NearZero((1, 8, 8), 16, 1e-3), flow.digit_batches()
    )


def fit_denoiser_on_few_images(folder: Path) -> None:
    """Trains a flow matching model on 24 digits, with others held out."""
    seed_everything(0, verbose=False)
    images = digits(8)[0][torch.randperm(1797)]
    train, held_out = TensorDataset(images[:24].repeat(20, 1, 1, 1)), TensorDataset(images[1400:])
    Trainer(
        max_epochs=40, accelerator="cpu", logger=TensorBoardLogger(folder, name=""),
        callbacks=[TimestepLossMonitor(), CollapseStopping("warn")],
    ).fit(Denoising("flow", width=32, lr=4e-3), DataLoader(train, 48, shuffle=True), DataLoader(held_out, 64))  # fmt: skip


RUNS: dict[str, Callable[[Path], Any]] = {
    "gan frozen": lambda folder: gan.main(["--fault", "frozen", "--runs", str(folder)]),
    "gan": lambda folder: gan.main(["--runs", str(folder)]),
    "vae two": lambda folder: vae.main(["--latent-dim", "2", "--runs", str(folder)]),
    "vae dead": lambda folder: vae.main(["--fault", "dead", "--runs", str(folder)]),
    "vae ignored": lambda folder: vae.main(["--fault", "ignored", "--runs", str(folder)]),
    "balance": lambda folder: fit(partial(vae.FaultyVAE, "ignored"), GenerationBalanceMonitor(), folder),
    "k_star": lambda folder: fit(partial(vae.FaultyVAE, "ignored"), KStarMonitor(), folder),
    "primitives": lambda folder: fit(vae.VAE, RegionalPrimitivesMonitor(), folder),
    "primitives corner": fit_with_a_corner,
    "never used": lambda folder: fit(partial(vae.VAE, beta=10_000), PosteriorKLMonitor(), folder),
    "empty": lambda folder: fit(EmptyImages, LatentRegionsMonitor(every_n_epochs=1), folder),
    "data": lambda folder: fit_with_other_data("removed", folder),
    "data nan": lambda folder: fit_with_other_data("nan", folder),
    "codebook": lambda folder: fit(partial(AtOnePoint, 12, 1e-3, codes=64), CodebookUsageMonitor(), folder),
    "codebook far": fit_with_codes_far_away,
    "memorizing": fit_on_few_images,
    "overfitted": fit_discriminator_of_few_images,
    "inverse": fit_with_scale_near_zero,
    "noise levels": fit_denoiser_on_few_images,
}
"""What is trained into a folder."""

PICTURES: dict[str, list[tuple[str, str]]] = {
    "adversary": [("overfitted", "the discriminator overfits")],
    "codebook_usage": [("codebook", "perplexity")],
    "cosine_mean_similarity": [("gan frozen", "cms/panel")],
    "generation_balance": [("vae two", "share of generated images")],
    "k_star": [("k_star", "mean k*")],
    "latent_regions": [("vae two", "latent_regions/panel"), ("vae two", "generation_balance/panel")],
    "manifold_entropy": [("vae dead", "entropy in nats")],
    "memorization": [("memorizing", "copies")],
    "posterior_kl": [("vae ignored", "KL in nats")],
    "regional_primitives": [("primitives", "regional_primitives/panel"), ("gan", "regional_primitives/panel")],
    "round_trip": [("inverse", "inverse of the flow")],
    "timestep_loss": [("noise levels", "noise levels")],
    "training_data": [("data", "training images")],
}
"""For each page its pictures, side by side: the runs, and the tag of a panel or words of an alarm."""


def events_of(folder: Path) -> EventAccumulator:
    """Returns what a run has logged."""
    events = EventAccumulator(str(next(folder.rglob("events*")).parent), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


def said(events: EventAccumulator) -> list[str]:
    """Returns what the alarms of a run say, in their order."""
    tags = (f"gendiag/alarm_{number}/message/text_summary" for number in itertools.count(1))
    known = itertools.takewhile(set(events.Tags()["tensors"]).__contains__, tags)
    texts = (events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in known)
    # below it is a table
    return [text.partition("\n")[0].replace("**", "") for text in texts]


def picture(events: EventAccumulator, shown: str) -> tuple[Image.Image, str]:
    """Returns the newest panel of a tag, or the picture of the first alarm with some words and what it says."""
    tag, text = f"gendiag/{shown}", ""
    if not shown.endswith("/panel"):
        number, text = next((number, text) for number, text in enumerate(said(events), 1) if shown in text)
        tag = f"gendiag/alarm_{number}/picture"
    return Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)).convert("RGB"), text


def beside(pictures: list[Image.Image]) -> Image.Image:
    """Returns pictures side by side on white."""
    width, height = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    sheet = Image.fromarray(np.full((height, width, 3), 255, dtype=np.uint8))
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def power(found: dict[str, dict[str, Any]]) -> Tensor:
    """Returns curves of the share of faults that are found, and of how long that takes, over the number of samples.

    Args:
        found: Figures by number of samples, as ``benchmarks.defaults`` gives them.
    """
    cells = [cell for name, cell in found.items() if name != "planned"]
    ranges = [bounds(round(cell["found"] * cell["faults"]), cell["faults"]) for cell in cells]
    shares = [(100 * cell["found"], 100 * low, 100 * high) for cell, (low, high) in zip(cells, ranges, strict=True)]
    # where fewer than half, or nine tenths, are found, that takes longer than was measured
    delays = [tuple(cell[name] or math.inf for name in ("seconds", "seconds", "seconds_90")) for cell in cells]
    longest = max((value for delay in delays for value in delay if math.isfinite(value)), default=1.0)
    samples = [cell["samples"] for cell in cells]
    tiles = [
        canvas.Tile("% of the faults found", _over_samples(samples, shares, 100.0)),
        canvas.Tile("delay in s of training", _over_samples(samples, delays, 2.0 * math.ceil(0.55 * longest))),
    ]
    faults = sorted({cell["faults"] for cell in cells})
    note = (
        f"{' or '.join(map(str, faults))} faults for each number of samples. Left: within six evaluations, with 95 % "
        "intervals. Right: the median, and a line up to the delay within which nine tenths are found, which ends at the top "
        "where fewer are found."
    )
    return canvas.panel("Power by the number of samples", tiles, (), note)


def _over_samples(samples: Sequence[float], values: Sequence[Sequence[float]], high: float) -> Tensor:
    """Draws values with their ranges over numbers of samples on a logarithmic axis."""
    image, draw = canvas.blank_tile()
    left, right, top, base = 34, canvas.TILE - 16, 8, canvas.TILE - 20
    low, span = math.log(min(samples)), math.log(max(samples) / min(samples))

    def at(number: float, value: float) -> tuple[float, float]:
        return left + 8 + (right - left - 8) * (math.log(number) - low) / span, base - (base - top) * min(
            value / high, 1
        )

    for share in (0.0, 0.5, 1.0):
        y = base - (base - top) * share
        draw.line((left, y, canvas.TILE, y), fill=charts.GRID)
        draw.text((left - 4, y), f"{share * high:.3g}", fill=canvas.FAINT, font=canvas.font(12), anchor="rm")
    for number in samples:
        draw.text((at(number, 0)[0], base + 4), f"{number:.0f}", fill=canvas.FAINT, font=canvas.font(12), anchor="mt")
    points = [at(number, value[0]) for number, value in zip(samples, values, strict=True)]
    draw.line(points, fill=canvas.region_colour(0), width=2)
    for number, (x, y), (value, least, most) in zip(samples, points, values, strict=True):
        draw.line((at(number, least), at(number, most)), fill=canvas.region_colour(0), width=1)
        if math.isfinite(value):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=canvas.region_colour(0))
    return canvas.picture_of(image)


def screenshots(logdir: Path) -> None:
    """Takes pictures of the tab in headless Chromium: the first screen, and what lies below it."""
    from tests.helpers.tab_browser import Board, start_browser

    browser = start_browser(1400, 900)
    board = Board(browser, logdir)
    try:
        board.open()
        for name, panel in (("tab", None), ("tab_below", "panel-GenerationBalance")):
            if panel is not None:
                browser.execute_script("arguments[0].scrollIntoView()", board.one(panel))
            # panels are drawn when they come into view
            time.sleep(4)
            browser.switch_to.default_content()
            browser.save_screenshot(str(DOCS / f"{name}.png"))
            browser.switch_to.frame(browser.find_element("css selector", "iframe[src*='name=gendiag']"))
            print(f"docs/{name}.png")
        browser.execute_script("window.scrollTo(0, 0)")
        animate(board, DOCS / "tab.gif")
        print("docs/tab.gif")
    finally:
        board.close()
        browser.quit()


def animate(board: Any, path: Path) -> None:
    """Writes a GIF of the tab's first screen while the slider moves from the first step to the last."""
    frames = []
    for _ in board.slide():
        time.sleep(0.5)
        page = Image.open(io.BytesIO(board.browser.get_screenshot_as_png())).convert("RGB")
        width, height = page.size
        # without the bar of TensorBoard, and as wide as a README
        page = page.crop((0, 64, width, height - 64))
        frames.append(page.resize((GIF_WIDTH, page.height * GIF_WIDTH // width), Image.Resampling.LANCZOS))
    # the last one has the colours of all, of which few are large areas
    last = frames[-1].quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    first, *others = [frame.quantize(palette=last, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = [*[350] * len(others), 6000]
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)


def main() -> None:
    """Trains the examples and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of runs that are used again where they are there")
    parser.add_argument("--page", choices=sorted(PICTURES), help="the page whose picture is made; by default all")
    parser.add_argument("--power", type=Path, help="what benchmarks.defaults --json wrote; draws docs/power.png alone")
    parser.add_argument("--json", action="store_true", help="writes what the alarms of all runs say")
    parser.add_argument(
        "--tab",
        type=Path,
        help="log directory of the demo; takes docs/tab.png, docs/tab_below.png and docs/tab.gif alone",
    )
    options = parser.parse_args()
    if options.tab:
        screenshots(options.tab)
        return
    if options.power:
        figures = json.loads(options.power.read_text().splitlines()[-1])
        Image.fromarray(power(figures["power"]).numpy()).save(DOCS / "power.png")
        print("docs/power.png")
        return
    folder = options.runs or Path(tempfile.mkdtemp())
    pages = {page: parts for page, parts in PICTURES.items() if options.page in (None, page)}
    for name, train in RUNS.items():
        shown = any(run == name for parts in pages.values() for run, *_ in parts)
        if not (folder / name).exists() and (shown or options.page is None):
            train(folder / name)
    for page, parts in pages.items():
        beside([picture(events_of(folder / run), what)[0] for run, what in parts]).save(DOCS / f"{page}.png")
        print(f"docs/{page}.png")
    if options.json:
        print(json.dumps({name: said(events_of(folder / name)) for name in RUNS}))


if __name__ == "__main__":
    main()
