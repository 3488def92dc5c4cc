"""Measures what each part of an evaluation costs, by monitor: the first one, and the median of the later ones.

Example models train with TensorBoard and all diagnostics that apply, each at every epoch, as in a run of hours: not the
amounts of short runs, and nothing is left out for want of time. Milliseconds of the process's CPU time in one thread within
the parts are counted, each without the parts inside it. "copy" is the isolated copy of the module, "samples" what the model
makes and encodes, which diagnostics share, "set up" what is done once (regions, real side, classifier), "update" and
"compute" the metric, "panels" the pictures, "rest" the scalars, the tab's records and their logging::

    python -m benchmarks.evaluation --json                             all models, 64 and 1,024 samples
    python -m benchmarks.evaluation --models gan --num-samples 128     one model with another number of samples
    python -m benchmarks.evaluation --no-panels                        without pictures
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks import overhead
from benchmarks.measuring import be_silent, in_own_process, rounded
from benchmarks.zoo.autoencoders import VQVAE
from example_models.data import digit_batches
from lightning_gendiag import GenerativeDiagnostics
from lightning_gendiag.callbacks.schedule import Schedule
from lightning_gendiag.callbacks.session import Session
from lightning_gendiag.detection.rules import Judge
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.view import ModelView

MODELS: dict[str, Callable[[], tuple[LightningModule, Any]]] = {
    **overhead.MODELS,
    "vq": lambda: (VQVAE(12, 1e-3, codes=64), digit_batches()),
}

ORDER = ("copy", "samples", "set up", "update", "compute", "panels", "rest")
SHARED = ("copy", "samples")
"""Parts that diagnostics share."""

DRAWN = 1e-3
"""Seconds that drawing takes, at least."""

ALL = "all"
"""Who owns what belongs to no diagnostic."""

Parts = dict[tuple[str, str], float]
"""Seconds by owner and part."""


class Clock:
    """Counts the seconds within named parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.rounds: list[Parts] = []
        self._open: list[float] = []
        self.owner = ""

    def counted(self, holder: Any, name: str, part: str) -> None:
        """Counts a method of a class or an object."""
        method = getattr(holder, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            self._open.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                whole = time.process_time() - started
                inside = self._open.pop()
                if self._open:
                    self._open[-1] += whole
                if self.rounds:
                    self.rounds[-1][self.owner, part] += whole - inside

        setattr(holder, name, wrapped)

    def attach(self, diagnostics: GenerativeDiagnostics) -> None:
        """Counts all parts of all monitors, and lets each evaluate at every epoch."""
        self.counted(Subject, "refresh", "copy")
        for name in ("samples", "reconstructions", "encoded"):
            self.counted(ModelView, name, "samples")
        self.counted(Judge, "update", "rest")
        for name, monitor in diagnostics.monitors.items():
            self._counted_monitor(name, monitor)
        evaluate = Session._evaluate

        def evaluated(session: Session, *args: Any, **kwargs: Any) -> None:
            self.rounds.append(defaultdict(float))
            self.owner = ALL
            # no rehearsal, by which a short run would choose smaller amounts
            session._planned = True
            evaluate(session, *args, **kwargs)

        def all_of_them(_: Schedule, monitors: Any, step: int, epoch_over: bool) -> list[Any]:
            return list(monitors) if epoch_over else []

        Session._evaluate = evaluated  # type: ignore[method-assign]
        Schedule.choose = all_of_them  # type: ignore[method-assign]

    def _counted_monitor(self, name: str, monitor: Any) -> None:
        build = monitor.build_metric

        def built(view: ModelView) -> Any:
            metric = build(view)
            self.counted(metric, "compute", "compute")
            return metric

        monitor.build_metric = built
        self.counted(monitor, "build_metric", "set up")
        self.counted(monitor, "update", "update")
        self.counted(monitor, "_log_panels", "panels")
        self.counted(monitor, "evaluate", "rest")
        evaluate: Callable[..., Any] = monitor.evaluate

        def owned(*args: Any, **kwargs: Any) -> Any:
            self.owner = name
            try:
                return evaluate(*args, **kwargs)
            finally:
                self.owner = ALL

        monitor.evaluate = owned


def milliseconds(rounds: list[Parts], name: str, part: str) -> float:
    """Returns the median over the rounds in which an owner took part; of panels, over those in which they were drawn."""
    found = [own[name, part] for own in rounds if any(owner == name for owner, _ in own)]
    found = [value for value in found if value > DRAWN or part != "panels"]
    return 1000 * statistics.median(found) if found else 0.0


def table(title: str, rounds: list[Parts], names: list[str]) -> None:
    """Prints milliseconds by monitor and part, medians over rounds."""
    print(f"\n{title:24s}" + "".join(f"{part:>10s}" for part in ORDER) + f"{'sum':>10s}")
    totals = dict.fromkeys(ORDER, 0.0)
    for name in names:
        cells = {part: milliseconds(rounds, name, part) for part in ORDER}
        for part in ORDER:
            totals[part] += cells[part]
        print(f"  {name:22s}" + "".join(f"{cells[part]:10.1f}" for part in ORDER) + f"{sum(cells.values()):10.1f}")
    print(f"  {'together':22s}" + "".join(f"{totals[part]:10.1f}" for part in ORDER) + f"{sum(totals.values()):10.1f}")


def measured(model: str, num_samples: int, epochs: int, panels: bool) -> tuple[list[str], list[Parts]]:
    """Trains a model, and returns the names of the diagnostics that evaluate it, and the parts of each evaluation."""
    torch.set_num_threads(1)
    be_silent()
    seed_everything(0, verbose=False)
    module, batches = MODELS[model]()
    # a limit that is never reached, under which evaluations are as by default
    diagnostics = GenerativeDiagnostics(
        "warn", num_samples=num_samples, every_n_epochs=1, max_overhead=1.0, log_images=panels
    )
    clock = Clock()
    clock.attach(diagnostics)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[diagnostics], logger=TensorBoardLogger(folder),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ).fit(module, batches)  # fmt: skip
    return diagnostics.attached, [own for own in clock.rounds if own]


def summary(names: list[str], rounds: list[Parts]) -> dict[str, dict[str, float]]:
    """Returns milliseconds of a later evaluation by diagnostic, what the first one takes beyond, and a panel."""
    figures = {}
    for name in names:
        own = [part for part in ORDER if part not in (*SHARED, "panels")]
        first, later = (sum(milliseconds(some, name, part) for part in own) for some in (rounds[:1], rounds[1:]))
        # a panel is not drawn where nothing has changed since the first
        panel = milliseconds(rounds[1:], name, "panels") or milliseconds(rounds[:1], name, "panels")
        figures[name] = {"later": later, "setup": max(first - later, 0.0), "panel": panel}
    # whoever asks first pays for all
    taken = [1000 * sum(own[key] for key in own if key[1] in SHARED) for own in rounds]
    figures["shared"] = {
        "later": statistics.median(taken[1:]),
        "setup": max(taken[0] - statistics.median(taken[1:]), 0.0),
    }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--num-samples", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--no-panels", action="store_true")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {model: {} for model in options.models}
    for model in options.models:
        for num_samples in options.num_samples:
            names, rounds = in_own_process(measured, model, num_samples, options.epochs, not options.no_panels)
            print(f"\n{model}, {num_samples:,} samples: milliseconds of an evaluation")
            table("first evaluation", rounds[:1], [*names, ALL])
            table("later evaluations", rounds[1:], [*names, ALL])
            figures[model][str(num_samples)] = summary(names, rounds)
            sys.stdout.flush()
    if options.json:
        print(json.dumps(rounded(figures)))


if __name__ == "__main__":
    main()
