"""Measures what each part of an evaluation costs, by monitor: the first one, and the median of the later ones.

An example trains by default settings, and the seconds within the parts are counted, each without the parts inside it. "copy"
is the isolated copy of the module, "samples" what the model makes and encodes, "set up" what is done once (regions, real side,
classifier), "update" and "compute" the metric, "panels" the pictures, "rest" the scalars and their logging::

    python -m benchmarks.evaluation                       the example GAN, evaluated at each epoch
    python -m benchmarks.evaluation --num-samples 128     with another number of samples
    python -m benchmarks.evaluation --no-panels           without pictures
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import seed_everything

from benchmarks.measuring import trained
from benchmarks.overhead import MODELS
from lightning_gendiag import GenerativeDiagnostics
from lightning_gendiag.callbacks.session import Session
from lightning_gendiag.detection.rules import Judge
from lightning_gendiag.model.subject import Subject
from lightning_gendiag.model.view import ModelView

ORDER = ("copy", "samples", "set up", "update", "compute", "panels", "rest")


class Clock:
    """Counts the seconds within named parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.rounds: list[dict[tuple[str, str], float]] = []
        self._open: list[float] = []
        self.owner = ""

    def counted(self, holder: Any, name: str, part: str) -> None:
        """Counts a method of a class or an object."""
        method = getattr(holder, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._open.append(0.0)
            try:
                return method(*args, **kwargs)
            finally:
                whole = time.perf_counter() - started
                inside = self._open.pop()
                if self._open:
                    self._open[-1] += whole
                if self.rounds:
                    self.rounds[-1][self.owner, part] += whole - inside

        setattr(holder, name, wrapped)

    def attach(self, diagnostics: GenerativeDiagnostics) -> None:
        """Counts all parts of all monitors."""
        self.counted(Subject, "refresh", "copy")
        for name in ("samples", "reconstructions", "encoded"):
            self.counted(ModelView, name, "samples")
        self.counted(Judge, "update", "rest")
        for name, monitor in diagnostics.monitors.items():
            self._counted_monitor(name, monitor)
        evaluate = Session._evaluate

        def evaluated(session: Session, *args: Any, **kwargs: Any) -> None:
            self.rounds.append(defaultdict(float))
            self.owner = "all"
            evaluate(session, *args, **kwargs)

        Session._evaluate = evaluated  # type: ignore[method-assign]

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
                self.owner = "all"

        monitor.evaluate = owned


def table(title: str, rounds: list[dict[tuple[str, str], float]], names: list[str]) -> None:
    """Prints milliseconds by monitor and part, medians over rounds."""
    print(f"\n{title:24s}" + "".join(f"{part:>10s}" for part in ORDER) + f"{'sum':>10s}")
    totals = dict.fromkeys(ORDER, 0.0)
    for name in names:
        cells = {}
        for part in ORDER:
            found = [own[name, part] for own in rounds if any(owner == name for owner, _ in own)]
            cells[part] = 1000 * statistics.median(found) if found else 0.0
            totals[part] += cells[part]
        print(f"  {name:22s}" + "".join(f"{cells[part]:10.1f}" for part in ORDER) + f"{sum(cells.values()):10.1f}")
    print(f"  {'together':22s}" + "".join(f"{totals[part]:10.1f}" for part in ORDER) + f"{sum(totals.values()):10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gan", choices=MODELS)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--num-samples", type=int)
    parser.add_argument("--no-panels", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed_everything(0, verbose=False)
    module, batches = MODELS[options.model]()
    # a limit that is never reached, under which evaluations are as by default
    diagnostics = GenerativeDiagnostics(
        "warn", num_samples=options.num_samples, every_n_epochs=1, max_overhead=1.0, log_images=not options.no_panels
    )
    clock = Clock()
    clock.attach(diagnostics)
    started = time.monotonic()
    trained(module, batches, options.epochs, diagnostics)
    seconds = time.monotonic() - started
    rounds = [own for own in clock.rounds if own]
    evaluating = sum(sum(own.values()) for own in rounds)
    print(f"{options.model}: {(seconds - evaluating) / options.epochs:.2f} s an epoch, milliseconds of an evaluation")
    names = [*diagnostics.attached, "all"]
    table("first evaluation", rounds[:1], names)
    table("later evaluations", rounds[1:], names)


if __name__ == "__main__":
    main()
