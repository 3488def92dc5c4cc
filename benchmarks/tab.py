"""Measures the tab of TensorBoard: what writing costs, how large files are, and how fast the page is.

A run of 2,000 evaluations of five regions, ten classes, 64 dimensions and 60 codes is written without training, with
pictures at the evaluations that a training would write them at. The page is opened in headless Chromium, in a new browser,
and the slider is moved from evaluation to evaluation; a move is measured up to the next picture of the screen. The share of
writing is that of a training of the example GAN with ``GenerativeDiagnostics()``. Needs Chromium and its driver.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.overhead import MODELS
from lightning_gendiag import CollapseStopping, Evaluation, GenerativeDiagnostics, Monitor
from lightning_gendiag.callbacks.page import Page
from lightning_gendiag.tensorboard.records import Record
from tests.helpers.tab_browser import Board, start_browser
from tests.tab_runs import Run

MOVE = """
const [slider, position, done] = [arguments[0], arguments[1], arguments[arguments.length - 1]];
const start = performance.now();
slider.value = position;
slider.dispatchEvent(new Event("input", {bubbles: true}));
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
"""


class Schedule:
    """At which evaluations a training writes pictures."""

    def __init__(self) -> None:
        self.page = Page("x", "X")

    def __call__(self, number: int) -> bool:
        """Returns whether an evaluation has pictures; to be asked for each in turn."""
        due = self.page.is_due(number)
        if due:
            nothing: Any = type("Nothing", (), {"log_record": lambda *_: None})()
            self.page.write_frame(Evaluation(number, number, 0, []), Record(), nothing)
        return due


def page(evaluations: int, moves: int) -> dict[str, float]:
    """Returns the size of the files in MB, the seconds to the page, and the milliseconds of a move of the slider."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", evaluations, evaluations * 3 // 4, dimensions=64, has_frame=Schedule())
        run.writer.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*tfevents*"))
        browser = start_browser()
        board = Board(browser, Path(folder))
        try:
            board.wait_for_server()
            started = time.monotonic()
            board.enter()
            ready = time.monotonic() - started
            slider = board.one("step-slider")
            positions = int(slider.get_attribute("max"))
            times = [browser.execute_async_script(MOVE, slider, number * positions // moves) for number in range(moves)]
        finally:
            board.close()
            browser.quit()
    return {
        "evaluations": evaluations, "event_files_mb": size / 1e6, "page_ready_s": ready,
        "slider_move_ms": statistics.median(times), "slider_move_p95_ms": statistics.quantiles(times, n=20)[-1],
    }  # fmt: skip


def writing_share(epochs: int) -> float:
    """Returns the share of a training's time that is spent on what only the tab shows."""
    spent: Counter[str] = Counter()

    def measure(owner: type, name: str) -> None:
        own = getattr(owner, name)

        def measured(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return own(*args, **options)
            finally:
                spent[name] += time.perf_counter() - started

        setattr(owner, name, measured)

    # frames are written within these, or after the training
    measure(Monitor, "_write_page")
    measure(CollapseStopping, "_show_report")
    seed_everything(0, verbose=False)
    module, data = MODELS["gan"]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=TensorBoardLogger(folder), callbacks=[GenerativeDiagnostics("warn")],
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.fit(module, data)
        total = time.perf_counter() - started
    return sum(spent.values()) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=2000)
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=80, help="of the training")
    parser.add_argument("--json", action="store_true", help="print one line of JSON only")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = page(options.evaluations, options.moves) | {"writing_share": writing_share(options.epochs)}
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        return
    for name, value in found.items():
        print(f"{name:20s} {value:10.4g}")


if __name__ == "__main__":
    main()
