"""Trains one model of the zoo, with faults that fork from it, and records what monitors and the referee observe."""

from __future__ import annotations

import json
import lzma
import math
import os
import random
import traceback
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.measuring import be_silent
from benchmarks.zoo.data import Batches, load
from benchmarks.zoo.faults import FAULTS, FROM_THE_START, Fault, Planting, harmed_dimensions
from benchmarks.zoo.models import KINDS, at_rest, drawn, influences, probe
from benchmarks.zoo.truth import referee
from lightning_gendiag import Evaluation, GenerativeDiagnostics, Series
from lightning_gendiag.callbacks.session import Session

EVALUATIONS, EARLY, LATE, AFTER, FROM_START = 60, 15, 40, 10, 25
"""Evaluations of a healthy run, those before an early and a late fault, those with a fault, and of a run with a fault from
the start."""

SKIPPED = ("regional_primitives",)
"""At every tenth evaluation, a run of 60 gives them too few for any alarm, and they take half of the time."""

DIGITS, ROUGH = 4, 3
"""Significant digits of what monitors observe, and of what the referee measures."""

Record = dict[str, Any]


class Unit(NamedTuple):
    """A training: a healthy one with the faults that fork from it, or one with a fault from the start."""

    kind: str
    seed: int
    fault: str = ""
    """From the start; empty for a healthy run."""

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.kind}_{self.seed}{'_' + self.fault.replace(' ', '_') if self.fault else ''}.json.xz"


class Setting(NamedTuple):
    """What the seed draws for a run."""

    data: str
    width: int
    lr: float
    batch_size: int
    spacing: int
    num_samples: int


def setting_of(unit: Unit) -> Setting:
    """Returns what the seed of a run draws; the same with and without a fault."""
    kind, draw = KINDS[unit.kind], random.Random(f"{unit.kind} {unit.seed}")
    low, high = kind.spacing
    return Setting(
        data=draw.choice(kind.data),
        width=draw.choice(kind.widths),
        lr=draw.choice(kind.lrs),
        batch_size=draw.choice((32, 64)),
        # as often as not below the geometric mean
        spacing=round(math.exp(draw.uniform(math.log(low), math.log(high)))),
        num_samples=draw.choice([n for n in (128, 256, 512, 1024) if n <= kind.most_samples]),
    )


def forks_of(unit: Unit, module: LightningModule) -> dict[int, list[str]]:
    """Returns the faults that fork from a healthy run, by the number of evaluations before them: one early, one late."""
    fitting = [name for name, fault in FAULTS.items() if fault.applies(KINDS[unit.kind], module)]
    first = 2 * unit.seed + sum(map(ord, unit.kind))
    early, late = (fitting[place % len(fitting)] for place in (first, first + 1))
    # so that each comes early in some runs and late in others
    return {EARLY: [late], LATE: [early]} if unit.seed % 3 == 0 else {EARLY: [early], LATE: [late]}


# ---- what is written ----


class Track:
    """The series of one stretch of training, as columns."""

    def __init__(self, declared: dict[str, int], first: int) -> None:
        self.declared, self.first = declared, first
        self.steps: list[int] = []
        self.epochs: list[int] = []
        self.loss: list[float] = []
        self.truth: dict[str, list[Any]] = defaultdict(list)
        self.monitors: dict[str, dict[str, Any]] = {}

    def add(self, monitor: str, latest: Evaluation) -> None:
        """Adds what a monitor observed at the evaluation that takes place now."""
        held = self.monitors.setdefault(monitor, {"at": [], "number": [], "columns": {}})
        position = len(held["at"])
        held["at"].append(len(self.steps))
        held["number"].append(latest.number)
        for observation in latest.observations:
            text = json.dumps(declaration(observation.series))
            number = self.declared.setdefault(text, len(self.declared))
            column = held["columns"].setdefault(str(number), {"value": [], "severity": [], "more": {}})
            for name in ("value", "severity"):
                column[name] += [None] * (position - len(column[name]))
                column[name].append(short(getattr(observation, name)))
            more = {name: value for name, value in zip(observation._fields[3:], observation[3:], strict=True) if value}
            if more:
                column["more"][str(position)] = more

    def packed(self) -> Record:
        """Returns all of it as plain Python."""
        monitors = {}
        for name, held in self.monitors.items():
            columns = {number: self._column(column) for number, column in held["columns"].items()}
            monitors[name] = {**held, "columns": columns}
        names = ("first", "steps", "epochs", "loss")
        return {n: getattr(self, n) for n in names} | {"monitors": monitors, "truth": dict(self.truth)}

    @staticmethod
    def _column(column: dict[str, Any]) -> dict[str, Any]:
        """A column without what is empty, and without severities that are the values."""
        column = {name: part for name, part in column.items() if part}
        for sign, name in ((1, "+"), (-1, "-")):
            if column["severity"] == [None if value is None else sign * value for value in column["value"]]:
                column["severity"] = name
        return column


def declaration(series: Series) -> dict[str, Any]:
    """Returns the fields of a series that differ from the defaults."""
    return {field.name: value for field in fields(series) if (value := getattr(series, field.name)) != field.default}


def short(value: Any, digits: int = DIGITS) -> Any:
    """Returns a number, or numbers in lists, with few significant digits."""
    if isinstance(value, list):
        return [short(part, digits) for part in value]
    if not math.isfinite(value):
        return float(value)
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


# ---- the run ----


class Recorder(Callback):
    """Records after each evaluation, and forks the process where a fault begins.

    A fork has the whole state of the run: weights, optimizers, random numbers, monitors and their history.

    Args:
        unit: What is trained.
        planting: The run's parts.
        diagnostics: What is recorded.
        evaluations: After which the run ends.
        forks: Names of faults by the number of evaluations before them.
    """

    def __init__(
        self,
        unit: Unit,
        planting: Planting,
        diagnostics: GenerativeDiagnostics,
        evaluations: int,
        forks: dict[int, list[str]],
    ) -> None:
        self.unit, self.planting, self.diagnostics = unit, planting, diagnostics
        setting = setting_of(unit)
        self.referee, self.spacing = referee(setting.data), setting.spacing
        self.evaluations, self.forks = evaluations, forks
        self.declared: dict[str, int] = {}
        self.track = Track(self.declared, 0)
        self.faults: list[Record] = []
        self.pipe: int | None = None
        """Of a fork, to the process that it came from."""
        self._losses: list[float] = []
        self._seen: dict[str, int] = {}
        self._batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss, and records when it is time."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._losses.append(float(loss))
        self._batches += 1
        if self._batches % self.spacing:
            return
        self._record(trainer, pl_module)
        done = self.track.first + len(self.track.steps)
        if done >= self.evaluations:
            trainer.should_stop = True
        elif self.pipe is None:
            for name in self.forks.get(done, ()):
                if self._fork(trainer, name, done):
                    return

    def _record(self, trainer: Trainer, module: LightningModule) -> None:
        track, kind, data = self.track, KINDS[self.unit.kind], self.planting.batches.data
        for monitor in Session.of(trainer).monitors:
            latest = monitor.latest
            if latest is not None and latest.number > self._seen.get(monitor.name, 0):
                self._seen[monitor.name] = latest.number
                track.add(monitor.name, latest)
        found = regions_of(self.diagnostics)
        labels = torch.tensor(found["labels"]) if found else None
        with at_rest(module, self._batches):
            measured = self.referee.measure(drawn(module, data, 2 * kind.most_samples), labels)
            latent = {"influence": influences(module), "probe": probe(module, data)}
        measured |= {name: values for name, values in latent.items() if values is not None}
        for name, value in measured.items():
            track.truth[name].append(short(value, ROUGH))
        track.steps.append(self._batches)
        track.epochs.append(trainer.current_epoch)
        track.loss.append(short(sum(self._losses) / len(self._losses)))
        self._losses.clear()

    def _fork(self, trainer: Trainer, name: str, done: int) -> bool:
        """Goes on with a fault in a process of its own; returns whether this is it."""
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            self.pipe = sender
            self.evaluations = done + AFTER
            expected = truth_of(self.planting, name, FAULTS[name])
            self.planting.trainer = trainer
            torch.manual_seed(self.unit.seed + 1)
            FAULTS[name].plant(self.planting)
            self.track = Track(self.declared, done)
            self.faults = [{"name": name, **expected}]
            return True
        os.close(sender)
        with os.fdopen(receiver, "rb") as file:
            content = file.read()
        os.waitpid(child, 0)
        if content:
            found = json.loads(content)
            # the fork may have declared more series
            for text in found.pop("declared"):
                self.declared.setdefault(text, len(self.declared))
            self.faults.append(found)
        return False

    def send(self) -> None:
        """Ends a fork: writes what it recorded to the process that it came from."""
        assert self.pipe is not None
        content = self.faults[0] | self.track.packed() | {"declared": list(self.declared)}
        with os.fdopen(self.pipe, "wb") as file:
            file.write(json.dumps(content).encode())


def truth_of(planting: Planting, name: str, fault: Fault) -> dict[str, Any]:
    """Returns what an alarm about a fault must name, as plain Python."""
    if fault.place == "quadrant":
        return {"quadrant": planting.quadrant}
    if fault.place == "class":
        return {"class": planting.number}
    return {"dimensions": harmed_dimensions(planting)} if fault.place == "dimensions" else {}


def record(unit: Unit) -> Record:
    """Trains one model and the faults that fork from it, and returns all series."""
    be_silent()
    torch.set_num_threads(1)
    before = cpu_seconds()
    kind, setting = KINDS[unit.kind], setting_of(unit)
    data, judge = load(setting.data), referee(setting.data)
    seed_everything(unit.seed, verbose=False)
    shape: Any = tuple(data.images.shape[1:])
    module = kind.make(shape, data.num_classes, setting.width, setting.lr)
    batches = Batches(data, setting.batch_size, unit.seed, kind.noise)
    planting = Planting(module, None, batches, kind, unit.seed)
    if unit.fault:
        FROM_THE_START[unit.fault].plant(planting)
        evaluations, forks = FROM_START, {}
    else:
        evaluations, forks = EVALUATIONS, forks_of(unit, module)
    diagnostics = GenerativeDiagnostics(
        None, every_n_train_steps=setting.spacing, num_samples=setting.num_samples, max_overhead=None,
        log_images=False, skip=SKIPPED, conditional=kind.conditional,
    )  # fmt: skip
    recorder = Recorder(unit, planting, diagnostics, evaluations, forks)
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", callbacks=[diagnostics, recorder], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module, batches)
        if recorder.pipe is not None:
            recorder.send()
    except BaseException:
        if recorder.pipe is None:
            raise
        traceback.print_exc()
    finally:
        if recorder.pipe is not None:
            os._exit(0)
    return {
        **unit._asdict(),
        **setting._asdict(),
        "attached": diagnostics.attached,
        "left_out": diagnostics.left_out,
        "regions": regions_of(diagnostics),
        "real_shares": short(judge.real_shares.tolist()),
        "declared": [json.loads(text) for text in recorder.declared],
        **recorder.track.packed(),
        "faults": recorder.faults,
        "seconds": round(cpu_seconds() - before, 1),
    }


def cpu_seconds() -> float:
    """Returns the time of this process and of its forks, which other processes do not lengthen."""
    return sum(os.times()[:4])


def regions_of(diagnostics: GenerativeDiagnostics) -> dict[str, Any]:
    """Returns labels and names of the regions of images, if there are any."""
    found = getattr(diagnostics.monitors.get("cms"), "region_map", None)
    return {} if found is None else {"labels": found.labels.tolist(), "names": list(found.names)}


def write(run: Record, path: Path) -> None:
    """Writes a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")
    own.write_bytes(lzma.compress(json.dumps(run, separators=(",", ":")).encode(), preset=9))
    own.replace(path)


def read(path: Path) -> Record:
    """Returns a record."""
    run: Record = json.loads(lzma.decompress(path.read_bytes()))
    return run
