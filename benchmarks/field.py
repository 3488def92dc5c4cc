"""Measures ``GenerativeDiagnostics()`` without arguments on other people's models: ``pip install 'lightning_gendiag[field]'``.

Each model of ``benchmarks.field_models`` is trained for a few epochs of eight batches, with and without diagnostics. A row
says what is attached, which must be what the model needs by what ``field_models`` says that it has, what samples or
reconstructs by the log, and whether that is right: for the same seed it must give the
same images as the package's own sampler with all its steps, or images of the same distribution where a sampler with fewer
steps is used. "found" and "true" are those of samples, then of reconstructions. Where the package's users evaluate averaged
weights, the weights that the diagnostics evaluate must be those bit for bit.

Two distributions count as the same if their energy distance, as a fraction of 0 to 1, exceeds chance (99 % of 200
permutations) by at most ``TOLERANCE``. It is the distance of 256 samples of each after whitening, by which fine details count
as much as coarse ones, with the principal components of other samples. ``--calibrate`` compares samplers with mistakes. The
package's own sampler with another seed is at most -0.0007 above chance for the 13 models, the diagnostics' sampler 0.0017, and
37 of 45 samplers with mistakes are told apart.

==========================================  ================  ==================================================
mistake                                     above chance      not told apart
==========================================  ================  ==================================================
a tenth of the noise                        0.070 to 0.33
noise taken for velocity, or the reverse    0.0023 to 0.51    ``guided_by_classes``
first stage without its scale               0.025, 0.12
class 0 only                                0.018 to 0.050
normal noise for a VampPrior                0.0047
raw instead of averaged weights             0.0030, 0.0052
steps without DDPM's noise, or the reverse  0.0007 to 0.13    ``gaussian`` and the other model of velocity
5 steps                                     -0.0083 to 0.22   ``guided_by_classes``, two vector fields
a vector field backwards in time            -0.0077 to 0.020  the same two vector fields
==========================================  ================  ==================================================
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from benchmarks.field_models import MODELS, NEEDS, Case, Entry, version_of
from benchmarks.measuring import trained
from lightning_gendiag import GenerativeDiagnostics
from lightning_gendiag.functional.arrays import as_data, as_images
from lightning_gendiag.model.outputs import data_in
from lightning_gendiag.model.view import ModelView

TOLERANCE = 0.0025
SAME, MANY = 16, 256
COMPONENTS = 64


@dataclass
class Row:
    """What happened to a model."""

    attached: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    """Diagnostics that belong to the model and are not attached."""
    extra: list[str] = field(default_factory=list)
    """Those that are attached and do not belong to it."""
    source: str = "nothing"
    names: dict[str, str] = field(default_factory=dict)
    """Of the ways that were found, by need."""
    agrees: dict[str, bool] = field(default_factory=dict)
    distance: float | None = None
    """Energy distance above chance of what was found."""
    wrong: dict[str, float] = field(default_factory=dict)
    """Energy distances above chance of samplers with a mistake, and of the right one with another seed."""
    numbers: dict[str, bool] = field(default_factory=dict)
    useful: bool = False
    right: bool = False
    identical: bool = False
    first: float = 0.0
    later: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of a later evaluation, by monitor."""
    alarms: list[str] = field(default_factory=list)
    error: str = ""


# ---- comparing ----


def equal(a: Any, b: Any) -> bool:
    """Returns whether nested values are equal bit for bit, where nan equals nan."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


def state_of(case: Case, trainer: Trainer) -> Any:
    """Returns weights, buffers, modes, the state of optimizers and that of all global generators."""
    modes = [part.training for part in case.module.modules()]
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    random_states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    return [case.module.state_dict(), modes, optimizers, *random_states]


def whitening(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a projection on the first principal components of samples (n, D), scaled so that fine details count too.

    The samples must be others than those that are compared, so that chance is the same for both.
    """
    x = x.double()
    _, sizes, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    variances = sizes[:COMPONENTS].square() / len(x)
    scales = (variances + 0.01 * variances.mean() + 1e-12).sqrt()
    return lambda y: (y - x.mean(0)) @ directions[:COMPONENTS].T / scales


def above_chance(a: Tensor, b: Tensor, whiten: Callable[[Tensor], Tensor]) -> float:
    """Returns the energy distance of samples as a fraction of the mean distance, less its 99 % quantile by chance."""
    if not bool(a.isfinite().all()):
        return 1.0
    joint = whiten(torch.cat([a, b]).flatten(1).double())
    distances, generator = torch.cdist(joint, joint), torch.Generator().manual_seed(0)

    def between(order: Tensor) -> float:
        one, other = order[: len(a)], order[len(a) :]
        cross = distances[one][:, other].mean()
        own = sum(distances[part][:, part].sum() / (len(part) * (len(part) - 1)) for part in (one, other))
        return float(1 - own / (2 * cross))

    orders = [torch.randperm(len(joint), generator=generator) for _ in range(200)]
    return between(torch.arange(len(joint))) - float(np.quantile([between(order) for order in orders], 0.99))


# ---- running ----


class Clock(Callback):
    """Measures the seconds that another callback takes in hooks; ``before`` and ``after`` stand around it."""

    def __init__(self, diagnostics: GenerativeDiagnostics) -> None:
        self.diagnostics = diagnostics
        self.started = self.setup = self.first = 0.0

    @property
    def before(self) -> Callback:
        """The callback that starts the measurement."""
        clock = self

        class Before(Callback):
            def start(self, *args: Any) -> None:
                clock.started = time.monotonic()

            on_fit_start = on_train_batch_start = on_train_epoch_end = start

        return Before()

    def on_fit_start(self, *args: Any) -> None:
        """Notes the seconds of choosing monitors."""
        self.setup += time.monotonic() - self.started

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes the seconds of trying them with the first batch."""
        if trainer.global_step == 0 and batch_idx == 0:
            self.setup += time.monotonic() - self.started

    def on_train_epoch_end(self, *args: Any) -> None:
        """Notes the seconds of the first evaluation."""
        if not self.first and any(monitor.evaluations for monitor in self.diagnostics.monitors.values()):
            self.first = self.setup + time.monotonic() - self.started


class Probe(Callback):
    """Evaluates once more at the end, and asks for the samples and reconstructions that the diagnostics see."""

    def __init__(
        self, diagnostics: GenerativeDiagnostics, case: Case, row: Row, expected: list[str], evaluates: bool = True
    ) -> None:
        self.diagnostics, self.case, self.row, self.expected = diagnostics, case, row, expected
        self.evaluates = evaluates
        self.images: dict[str, Tensor] = {}
        self.given = torch.zeros(0)
        self.has_average = True
        self.num_samples = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Fills the row at the end of the last epoch."""
        if trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            return
        row, monitors = self.row, self.diagnostics.monitors
        row.attached, row.left_out = self.diagnostics.attached, dict(self.diagnostics.left_out)
        row.misses = [name for name in self.expected if name not in row.attached]
        row.extra = [name for name in row.attached if name not in self.expected]
        view = self.diagnostics.session.view_of(monitors["cms"])
        started = time.monotonic()
        # with no monitor attached, nothing else has noted that the module changed
        view.subject.expire()
        view.expire()
        view.refresh()
        for name in row.attached if self.evaluates else ():
            began = time.monotonic()
            if monitors[name].period_multiplier == 1:
                monitors[name].evaluate(view, trainer.global_step, True)
                row.seconds[name] = time.monotonic() - began
        row.later = time.monotonic() - started
        self.num_samples = view.num_samples or 0
        with contextlib.suppress(ValueError):
            row.source = view.source()
        for need, get in {"sample": self.samples, "reconstruct": self.reconstructions}.items():
            if view.parts.has(need):
                row.names[need] = view.parts.way(need).name
                self.images[need] = get(view)
        if self.case.averaged is not None:
            network, average = self.case.averaged
            copied = view.module.get_submodule(network).parameters()
            self.has_average = all(map(torch.equal, copied, average()))
        for name in self.case.numbers:
            value = trainer.callback_metrics.get(f"gendiag/{name}")
            if name.partition("/")[0] in row.attached and value is not None:
                row.numbers[name] = float(value)

    def samples(self, view: ModelView) -> Tensor:
        """Returns samples of the diagnostics' sampler, for the seed 0."""
        n, way = count(self.case), view.parts.way("sample")
        with view.isolated():
            torch.manual_seed(0)
            output = way.call(n, *([labels_of(n)] if way.takes_labels else []))
            return view.parts.images_in(output, n) if self.case.has_images else data_in(output, n, None)

    def reconstructions(self, view: ModelView) -> Tensor:
        """Returns reconstructions of the first images of the reference."""
        if not view.has_reference:
            return torch.zeros(0)
        self.given = view.as_input(as_data(view.reference.images[:SAME]))
        with view.isolated(exact=True):
            torch.manual_seed(0)
            return view.parts.reconstructed(view.parts.way("reconstruct").call(self.given), self.given)


def count(case: Case) -> int:
    """Returns the number of samples to compare."""
    return SAME if case.same else MANY


def labels_of(n: int) -> Tensor:
    """Returns n labels of ten classes."""
    return torch.arange(n) % 10


def run(entry: Entry, epochs: int, calibrate: bool = False) -> Row:
    """Trains a model twice, or once to calibrate, and compares what the diagnostics use with what is true."""
    row = Row()
    plain = None if calibrate else fitted(entry, epochs, lambda case: [])
    probes: list[Probe] = []
    clocks: list[Clock] = []

    def callbacks(case: Case) -> list[Callback]:
        diagnostics = GenerativeDiagnostics()
        probes.append(Probe(diagnostics, case, row, entry.expected, evaluates=not calibrate))
        clocks.append(Clock(diagnostics))
        return [clocks[0].before, diagnostics, clocks[0], probes[0]]

    try:
        with_them = fitted(entry, epochs, callbacks)
    except Exception:
        row.error = traceback.format_exc()
        return row
    row.identical, row.first = plain is not None and equal(plain[1], with_them[1]), clocks[0].first
    stopping = probes[0].diagnostics.stopping
    row.alarms = [str(alarm) for alarm in stopping.alarms] if stopping is not None else []
    judge(row, probes[0], with_them[0])
    if calibrate:
        compare_wrong(row, with_them[0])
    return row


def fitted(entry: Entry, epochs: int, callbacks: Callable[[Case], list[Callback]]) -> tuple[Case, Any]:
    """Trains a model, and returns it and everything that training leaves behind."""
    seed_everything(0, verbose=False)
    case = entry.make()
    seed_everything(1, verbose=False)
    trainer = trained(case.module, case.loader, epochs * case.longer, *callbacks(case))
    # the same Python objects would be equal to themselves
    return case, state_of(case, trainer)


def judge(row: Row, probe: Probe, case: Case) -> None:
    """Says what is right, by the functions that are written by hand for each model."""
    case.module.eval()
    with torch.no_grad(), quiet():
        if case.sample is not None and "sample" in probe.images:
            # samples of one seed would be alike by their noise
            found, true = probe.images["sample"].flatten(1), sampled(case, case.sample, 0 if case.same else 3)
            if case.same:
                row.agrees["sample"] = alike(found, true)
            else:
                whiten = whitening(sampled(case, case.sample, 2))
                row.distance = above_chance(found, true, whiten)
                row.agrees["sample"] = row.distance < TOLERANCE and probe.has_average
        elif "sample" in probe.images:
            row.agrees["sample"] = False
        if case.reconstruct is not None and len(probe.given):
            torch.manual_seed(0)
            found, true = probe.images["reconstruct"], case.reconstruct(probe.given)
            row.agrees["reconstruct"] = alike(found.flatten(1), true.float().flatten(1))
        for name, value in row.numbers.items():
            true, error = case.numbers[name](probe.num_samples)
            row.numbers[name] = abs(value - true) <= error
    need = "sample" if case.sample is not None else "reconstruct"
    row.right = bool(row.agrees.get(need)) and (not case.has_images or row.source.startswith(need))
    cms = probe.diagnostics.monitors["cms"]
    row.useful = cms.enabled and cms.evaluations > 0 if case.has_images else any(row.numbers.values())


def sampled(case: Case, sample: Callable[..., Any], seed: int) -> Tensor:
    """Returns samples (n, D) for a seed."""
    n = count(case)
    torch.manual_seed(seed)
    samples = sample(n, *([labels_of(n)] if takes_labels(case) else []))
    return (as_images(samples) if case.has_images else samples).float().flatten(1)


def takes_labels(case: Case) -> bool:
    """Returns whether the sampler of a case takes labels."""
    return case.sample is not None and len(signature(case.sample).parameters) == 2


def compare_wrong(row: Row, case: Case) -> None:
    """Compares samplers with a mistake, and the right one with another seed, with the right one."""
    if case.sample is None or not case.wrong:
        return
    with torch.no_grad(), quiet():
        true, whiten = sampled(case, case.sample, 3), whitening(sampled(case, case.sample, 2))
        for name, sample in {"right, another seed": case.sample, **case.wrong}.items():
            row.wrong[name] = above_chance(sampled(case, sample, 1), true, whiten)


def alike(a: Tensor, b: Tensor) -> bool:
    """Returns whether images are the same up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the progress bars of libraries."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- printing ----

MARKS = {True: "yes", False: "NO", None: "-"}


def shown(entry: Entry, row: Row) -> str:
    """Returns the row of a model, and indented lines that explain it."""
    found = " ".join(MARKS[row.agrees.get(need)] for need in ("sample", "reconstruct"))
    cells = (
        f"{entry.name:28s}", f"{'YES' if row.error else 'no':>5s}", f"{MARKS[row.useful]:>6s}", f"{MARKS[row.right]:>5s}",
        f"{found:>8s}", f"{MARKS[row.identical]:>9s}", f"{row.first:6.1f}", f"{row.later:6.1f}", f"{len(row.alarms):6d}",
        f"  {', '.join(row.attached) or 'none'}",
    )  # fmt: skip
    lines = [f"{row.source}: " + "; ".join(f"{need}: {name}" for need, name in row.names.items())]
    if row.distance is not None:
        lines[0] += f" (energy distance above chance {row.distance:.4f})"
    lines.append("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.seconds.items()))
    lines += [f"{name} {'is right' if value else 'is WRONG'}" for name, value in row.numbers.items()]
    lines += [f"{name} belongs to the model and is LEFT OUT" for name in row.misses]
    lines += [f"{name} does NOT belong to the model" for name in row.extra]
    lines += [f"left out {name}: {reason}" for name, reason in row.left_out.items()]
    lines += [f"alarm: {alarm}" for alarm in row.alarms] + [row.error] * bool(row.error)
    return "".join(cells) + "\n" + "\n".join(textwrap.indent(line, "      ") for line in lines)


def calibrated(entry: Entry, row: Row) -> str:
    """Returns the distances above chance of a model's samplers."""
    distances = {"found": row.distance, **row.wrong}
    cells = [f"{name} {value:.4f}{'*' * (value > TOLERANCE)}" for name, value in distances.items() if value is not None]
    return f"{entry.name:30s}" + "; ".join(cells) + row.error


def of_diagnostic(name: str, rows: dict[str, Row]) -> dict[str, Any]:
    """Returns to how many models a diagnostic belongs, to how many of them it is attached, and the others."""
    missed = [model for model, row in rows.items() if name in row.misses]
    extra = [model for model, row in rows.items() if name in row.extra]
    attached = sum(name in row.attached for row in rows.values()) - len(extra)
    return {"models": attached + len(missed), "attached": attached, "missed": missed, "extra": extra}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[entry.name for entry in MODELS], help="names of models")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--calibrate", action="store_true", help="compare samplers with mistakes; * are told apart")
    options = parser.parse_args()
    if options.calibrate:
        for entry in (entry for entry in MODELS if entry.name in options.only and not entry.missing):
            with quiet():
                row = run(entry, options.epochs, calibrate=True) if entry.make().wrong else None
            if row is not None:
                print(calibrated(entry, row), flush=True)
        return
    print(f"{'model':28s} ended useful right  samples recons identical first later alarms")
    rows: dict[str, Row] = {}
    for entry in (entry for entry in MODELS if entry.name in options.only):
        if entry.missing:
            print(f"{entry.name:28s} skipped: pip install {' '.join(entry.missing)}")
            continue
        with quiet():
            rows[entry.name] = run(entry, options.epochs)
        print(shown(entry, rows[entry.name]), flush=True)
    packages = {package: version_of(package) for entry in MODELS for package in entry.packages}
    figures = {
        "models": len(rows),
        "useful": sum(row.useful for row in rows.values()),
        "ended": sum(bool(row.error) for row in rows.values()),
        "right_sampler": sum(row.right for row in rows.values()),
        "identical": sum(row.identical for row in rows.values()),
        "alarms": sum(len(row.alarms) for row in rows.values()),
        "rightly_attached": sum(not row.misses and not row.extra for row in rows.values()),
        "diagnostics": {name: of_diagnostic(name, rows) for name in NEEDS},
        "packages": packages,
    }
    print(json.dumps(figures) if options.json else figures)


if __name__ == "__main__":
    main()
