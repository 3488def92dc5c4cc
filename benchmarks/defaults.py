"""Measures what ``GenerativeDiagnostics`` finds at default settings in runs of a few minutes, and what samples cost in power.

Each run trains an example model for so many minutes, with one thread and TensorBoard. At half of it the process forks for
each of some faults, one after the other. A fork trains on until its alarms name the fault, or until all monitors that can
raise an alarm have evaluated it ``AFTER`` times. The healthy run goes on to its end. Seconds of training are steps times the
seconds of a step without callbacks.

``--samples 64 256`` repeats the runs with so many samples at an evaluation in place of what the plan chooses, at the same
limit of the training's time: few samples allow many evaluations, and many samples show smaller changes.

``--out FOLDER`` keeps each run as JSON, written after each fork, so that runs of several machines can be judged together by
``--read FOLDER``.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import logging
import math
import multiprocessing as mp
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from benchmarks.zoo.data import Batches, Data
from benchmarks.zoo.faults import FAULTS, Planting
from benchmarks.zoo.judging import mean, names
from benchmarks.zoo.models import Kind
from benchmarks.zoo.recording import regions_of, truth_of
from example_models.data import digits
from example_models.diffusion import Diffusion
from example_models.flow import Flow
from example_models.gan import GAN
from example_models.vae import VAE
from lightning_gendiag import Alarm, GenerativeDiagnostics, Monitor
from lightning_gendiag.callbacks import planning
from lightning_gendiag.callbacks.session import Session

AFTER, AFTER_OF_CLASSES = 6, 12
"""Evaluations with a fault; alarms of classes must last."""

SOON = 3
"""Evaluations within which a fault is found soon."""

TIMED = 3.0
"""Seconds of training in which a step is timed."""

LIMIT = 140
"""Seconds that a run and its forks may take, for each minute of training."""

GRACE = 10.0
"""Seconds after its limit after which a process is ended."""

Record = dict[str, Any]


# ---- models ----


class PicturedGAN(GAN):
    """The example, with a module through which its images pass, for faults of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.latent_dim = nn.Identity(), int(self.hparams["latent_dim"])

    def forward(self, z: Tensor) -> Tensor:
        """Returns images (N, 1, 32, 32) from noise (N, L)."""
        images: Tensor = self.picture(super().forward(z))
        return images


class PicturedVAE(VAE):
    """The example, with a module through which its images pass, and a weight that a fault can change."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.latent_dim = nn.Identity(), int(self.hparams["latent_dim"])

    @property
    def beta(self) -> float:
        """Weight of the KL term."""
        return float(self.hparams["beta"])

    @beta.setter
    def beta(self, value: float) -> None:
        self.hparams["beta"] = value

    def decode(self, z: Tensor) -> Tensor:
        """Returns images (N, 1, 32, 32) from latents (N, L)."""
        images: Tensor = self.picture(super().decode(z))
        return images


class PicturedFlow(Flow):
    """The example, with a module through which its images pass."""

    def __init__(self) -> None:
        super().__init__(64, (1, 8, 8), hidden=128)
        self.picture = nn.Identity()

    def decode(self, z: Tensor) -> Tensor:
        """Returns images (N, 1, 8, 8) from latents (N, L)."""
        images: Tensor = self.picture(super().decode(z))
        return images


class PicturedDiffusion(Diffusion):
    """The example, with a module through which its images pass."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Identity()

    def sample(self, n: int) -> Tensor:
        """Returns images (n, 1, 16, 16)."""
        images: Tensor = self.picture(super().sample(n))
        return images


class Example(NamedTuple):
    """An example model and its data."""

    make: Callable[[], LightningModule]
    family: str
    size: int = 32
    """Height and width of its images."""
    batch_size: int = 64
    noise: float = 0.0
    """Standard deviation of noise on the data."""

    @property
    def kind(self) -> Kind:
        """What faults must know of it."""
        return Kind(lambda *_: self.make(), ("digits",), (), (), self.family, held_out=True)

    def batches(self, seed: int) -> Batches:
        """Returns its batches, which faults can change."""
        images, labels = digits(self.size)
        images = images + self.noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return Batches(Data(images, labels, labels), self.batch_size, seed)

    def faults(self) -> list[str]:
        """Returns the names of the faults that apply."""
        return [name for name, fault in FAULTS.items() if fault.applies(self.kind, self.make())]


EXAMPLES = {
    "gan": Example(PicturedGAN, "gan"),
    "vae": Example(PicturedVAE, "vae"),
    "flow": Example(PicturedFlow, "flow", 8, 128, 1 / 16),
    "diffusion": Example(PicturedDiffusion, "diffusion", 16),
}


# ---- a run ----


class Unit(NamedTuple):
    """A run and the faults that fork from it."""

    model: str
    seed: int
    samples: int | None
    """At an evaluation; None for what the plan chooses."""
    minutes: float
    faults: int
    """Largest number of faults."""
    limit: float
    """Seconds that the run and its forks may take."""

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.model}_{self.seed}_{self.samples or 'planned'}.json"

    def chosen(self) -> list[str]:
        """Returns the faults of this run; consecutive seeds have others, so that all have their turn."""
        fitting = EXAMPLES[self.model].faults()
        first = self.seed * self.faults
        return [fitting[(first + place) % len(fitting)] for place in range(min(self.faults, len(fitting)))]


class Clock(Callback):
    """Times epochs, and ends the run when that has taken long enough."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the time."""
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the seconds."""
        self.epochs.append(time.monotonic() - self.started)
        trainer.should_stop = sum(self.epochs) > TIMED


class PlanLine(logging.Handler):
    """Keeps the line in which the plan is said."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the line."""
        text = record.getMessage()
        self.text = text if text.startswith("Plan: ") else self.text


class Forks(Callback):
    """Forks the process at half of the run for each fault; a fork has the whole state of the run.

    Args:
        unit: What is trained.
        planting: The run's parts.
        diagnostics: What finds faults.
        folder: Of what forks write.
        started: When the run began, on the monotonic clock.
        step_seconds: Seconds of a step without callbacks.
        keep: Is given the faults so far after each fork.
    """

    def __init__(
        self,
        unit: Unit,
        planting: Planting,
        diagnostics: GenerativeDiagnostics,
        folder: Path,
        started: float,
        step_seconds: float,
        keep: Callable[[list[Record]], None],
    ) -> None:
        self.unit, self.planting, self.diagnostics, self.folder = unit, planting, diagnostics, folder
        self.started, self.step_seconds, self.keep = started, step_seconds, keep
        self.faults: list[Record] = []
        self.fault: Record | None = None
        """What a fork found."""
        self._began = 0.0
        self._deadline = math.inf
        self._steps = 0
        self._before: dict[str, int] = {}
        self._seen = 0
        self._held: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the time."""
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forks at half of the run."""
        if self.fault is not None or trainer.current_epoch != (trainer.max_epochs or 0) // 2:
            return
        chosen = self.unit.chosen()
        # the other half of the run comes after the forks
        rest = 1.1 * (time.monotonic() - self._began) + GRACE
        for number, name in enumerate(chosen):
            paused = time.monotonic()
            left = self.unit.limit - (paused - self.started) - rest
            if self._fork(trainer, name, max(left, 0.0) / (len(chosen) - number)):
                return
            # no training takes place while a fork trains
            Session.of(trainer).schedule.budget.started += time.monotonic() - paused
            self.keep(self.faults)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts steps, and ends a fork that has found enough or has no more time."""
        self._steps += 1
        self._end_where_done(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a fork that has found enough."""
        self._end_where_done(trainer)

    # ---- in the process that forks ----

    def _fork(self, trainer: Trainer, name: str, seconds: float) -> bool:
        """Goes on with a fault in a process of its own; returns whether this is it."""
        child = os.fork()
        if child == 0:
            end_with_parent()
            self._deadline = time.monotonic() + seconds
            try:
                self._begin(trainer, name)
            except BaseException:
                self.end_fork(traceback.format_exc())
            return True
        ended = wait_for(child, seconds + GRACE)
        path = self.folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {"name": name, "error": f"no result, {ended}"}
        self.faults.append(found)
        return False

    # ---- in a fork ----

    def _begin(self, trainer: Trainer, name: str) -> None:
        """Plants a fault."""
        # the thread that writes for the loggers so far is in the other process; they must not be flushed here
        self._held += trainer.loggers
        trainer.loggers = [TensorBoardLogger(self.folder / name)]
        fault, session = FAULTS[name], Session.of(trainer)
        self.planting.trainer = trainer
        self.fault = {
            "name": name, "counts": not fault.if_changed, **truth_of(self.planting, name, fault), "found": False,
            "named": False, "cut": True, "alarms": [],
        }  # fmt: skip
        self._steps, self._seen = 0, len(self._alarms())
        self._before = {monitor.name: monitor.evaluations for monitor in session.monitors}
        torch.manual_seed(self.unit.seed + 1)
        fault.plant(self.planting)

    def _alarms(self) -> list[Alarm]:
        return [] if self.diagnostics.stopping is None else self.diagnostics.stopping.alarms

    def _end_where_done(self, trainer: Trainer) -> None:
        if self.fault is None:
            return
        regions, alarms = {"regions": regions_of(self.diagnostics)}, self._alarms()
        for alarm in alarms[self._seen :]:
            number = alarm.number - self._before[alarm.diagnostic]
            seconds = self._steps * self.step_seconds
            self.fault["named"] |= names(alarm, regions, self.fault)
            self.fault["alarms"].append(
                {"monitor": alarm.diagnostic, "evaluation": number, "seconds": seconds, "message": alarm.message}
            )
        self._seen = len(alarms)
        self.fault["found"] = bool(self.fault["alarms"])
        needed = AFTER_OF_CLASSES if FAULTS[self.fault["name"]].place == "class" else AFTER
        after = {m.name: m.evaluations - self._before[m.name] for m in self._able(trainer)}
        self.fault |= {"evaluations": after, "seconds": self._steps * self.step_seconds}
        done = self.fault["named"] or min(after.values(), default=0) >= needed
        self.fault["cut"] = not done
        if done or time.monotonic() > self._deadline:
            self.end_fork()

    def _able(self, trainer: Trainer) -> list[Monitor[Any, Any]]:
        """The monitors that can raise an alarm, and those that compare samples, some of whose alarms need no level."""
        monitors, stopping = [m for m in Session.of(trainer).monitors if m.enabled], self.diagnostics.stopping
        assert stopping is not None
        return [m for m in monitors if m.shares() == "samples" or m.evaluations >= stopping.needed(m.name)]

    def end_fork(self, error: str = "") -> None:
        """Writes what a fork found, and ends it without any cleaning up, which is for the process that forked."""
        assert self.fault is not None
        path = self.folder / f"{self.fault['name']}.json"
        write(self.fault | ({"error": error} if error else {}), path)
        os._exit(0)


def end_with_parent() -> None:
    """Lets this process be killed when the one that started it ends."""
    # where the system cannot, the limits of time end it
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))


def wait_for(child: int, seconds: float) -> str:
    """Waits for a process, kills it after some seconds, and returns how it ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return f"exit status {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"killed after {seconds:.0f} s"


def train(unit: Unit, folder: Path, started: float) -> None:
    """Trains one model and the faults that fork from it, and writes what was found into a folder."""
    end_with_parent()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plan, said = PlanLine(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    said.handlers, said.propagate = [plan], False
    said.setLevel(logging.INFO)
    torch.set_num_threads(1)
    if unit.samples is not None:
        planning.SIZES = (unit.samples,)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as runs:
        epoch_seconds = timed_epoch(unit, Path(runs))
        epochs = max(2, round(60 * unit.minutes / epoch_seconds))
        module, batches = made(unit)
        planting = Planting(module, None, batches, EXAMPLES[unit.model].kind, unit.seed)
        diagnostics = GenerativeDiagnostics("warn")
        record: Record = {**unit._asdict(), "epoch_seconds": epoch_seconds, "epochs": epochs, "healthy": None}

        def keep(faults: list[Record]) -> None:
            record.update(faults=faults, plan=plan.text, attached=diagnostics.attached)
            write(record, folder / unit.file)

        forks = Forks(unit, planting, diagnostics, Path(runs), started, epoch_seconds / len(batches), keep)
        trainer = quiet_trainer(epochs, [diagnostics, forks], Path(runs) / "healthy")
        try:
            trainer.fit(module, batches)
        except BaseException:
            if forks.fault is None:
                raise
            forks.end_fork(traceback.format_exc())
        if forks.fault is not None:
            # the run is over before there were enough evaluations
            forks.end_fork()
        record |= {"healthy": healthy(trainer, diagnostics), "seconds": time.monotonic() - started}
        keep(forks.faults)


def made(unit: Unit) -> tuple[LightningModule, Batches]:
    """Returns the model and its batches, the same for each number of samples."""
    seed_everything(unit.seed, verbose=False)
    return EXAMPLES[unit.model].make(), EXAMPLES[unit.model].batches(unit.seed)


def timed_epoch(unit: Unit, folder: Path) -> float:
    """Returns the seconds of an epoch of training without diagnostics."""
    clock, (module, batches) = Clock(), made(unit)
    quiet_trainer(10_000, [clock], folder / "timed").fit(module, batches)
    return statistics.median(clock.epochs)


def quiet_trainer(epochs: int, callbacks: list[Callback], folder: Path) -> Trainer:
    """Returns a trainer that writes TensorBoard files and nothing else."""
    return Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=TensorBoardLogger(folder),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def healthy(trainer: Trainer, diagnostics: GenerativeDiagnostics) -> Record:
    """Returns how a healthy run ended."""
    session = Session.of(trainer)
    alarms = [] if diagnostics.stopping is None else diagnostics.stopping.alarms
    evaluations = {monitor.name: monitor.evaluations for monitor in session.monitors}
    budget = session.schedule.budget
    return {
        "alarms": [f"{alarm.diagnostic}: {alarm.message}" for alarm in alarms],
        "stopped": any(alarm.is_critical for alarm in alarms),
        "evaluations": max((evaluations[m.name] for m in session.monitors if m.shares() == "samples"), default=0),
        "by_monitor": evaluations,
        "samples": next((session.view_of(m).num_samples for m in session.monitors if m.shares() == "samples"), None),
        "overhead": budget.spent / budget.training,
        "setup": budget.first,
    }


def write(record: Record, path: Path) -> None:
    """Writes JSON, at once or not at all."""
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(record))
    own.replace(path)


# ---- many runs ----


def train_all(units: Sequence[Unit], folder: Path, jobs: int) -> None:
    """Trains in parallel processes, each of which has a limit of time; those that fail are reported."""
    context, waiting = mp.get_context("spawn"), iter(units)
    began = time.monotonic()
    running: list[tuple[Unit, Any, float]] = []
    while True:
        for unit in itertools.islice(waiting, jobs - len(running)):
            started = time.monotonic()
            process = context.Process(target=train, args=(unit, folder, started), daemon=True)
            process.start()
            running.append((unit, process, started))
        if not running:
            return
        time.sleep(0.2)
        for unit, process, started in list(running):
            late = time.monotonic() - started > unit.limit + 2 * GRACE
            if process.is_alive() and not late:
                continue
            process.kill()
            process.join()
            running.remove((unit, process, started))
            how = "killed at its limit" if late else "done" if process.exitcode == 0 else "failed"
            print(f"{time.monotonic() - began:5.0f} s: {unit.file} {how}", file=sys.stderr, flush=True)


# ---- judging ----


class Summary(NamedTuple):
    """What was found in some runs."""

    faults: int
    found: float
    within_3: float
    named: float
    delay: float
    """Median over all faults in evaluations of the monitor that raised the alarm; nan where it is beyond those made."""
    seconds: float
    """Median in seconds of training."""
    cut: float
    """Share that ended, by the limit of time or with the run, before there were enough evaluations."""
    runs: int
    """That are healthy and came to their end."""
    alarms: float
    """Share of healthy runs with an alarm."""
    stopped: float
    evaluations: float
    samples: float
    overhead: float


def first_alarm(fault: Record) -> Record:
    """Returns the first alarm of a fault; one after infinite time where there is none."""
    alarms: list[Record] = fault["alarms"]
    return alarms[0] if alarms else {"evaluation": math.inf, "seconds": math.inf}


def quantile(values: Iterable[float], q: float = 0.5) -> float:
    """Returns a quantile, the larger of two values; nan where it is not finite.

    Example:
        >>> quantile([1, 2, math.inf]), quantile([1, math.inf], 0.9)
        (2, nan)
    """
    held = sorted(values)
    value = held[min(len(held) - 1, int(q * len(held)))] if held else math.nan
    return value if math.isfinite(value) else math.nan


def counted(runs: Iterable[Record], name: str | None = None) -> list[Record]:
    """Returns the faults of runs, by default those that count wherever they were planted."""
    return [
        fault
        for run in runs
        for fault in run["faults"]
        if "error" not in fault and (fault["counts"] if name is None else fault["name"] == name)
    ]


def summary(runs: Sequence[Record], name: str | None = None) -> Summary:
    """Returns what was found of one fault, or of all that count."""
    faults, ended = counted(runs, name), [run["healthy"] for run in runs if run["healthy"]]
    first = [first_alarm(fault) for fault in faults]

    def average(what: str) -> float:
        return statistics.fmean(one[what] or math.nan for one in ended) if ended else math.nan

    return Summary(
        len(faults),
        mean(fault["found"] for fault in faults),
        mean(alarm["evaluation"] <= SOON for alarm in first),
        mean(fault["named"] for fault in faults),
        quantile(alarm["evaluation"] for alarm in first),
        quantile(alarm["seconds"] for alarm in first),
        mean(fault["cut"] for fault in faults),
        len(ended),
        mean(one["alarms"] for one in ended),
        mean(one["stopped"] for one in ended),
        average("evaluations"),
        average("samples"),
        average("overhead"),
    )


class Power(NamedTuple):
    """What a number of samples finds."""

    faults: int
    found: float
    """Share of faults that are found within ``AFTER`` evaluations."""
    seconds: float
    """Median of the delay in seconds of training, over all faults; nan where most are not found."""
    seconds_90: float
    """The same for nine tenths of them."""
    cut: float
    """Share that ended before there were enough evaluations, and may have been found by more."""
    evaluations: float
    """In the run."""
    samples: float


def power(runs: Sequence[Record]) -> Power:
    """Returns what runs with one number of samples find."""
    first, whole = [first_alarm(fault) for fault in counted(runs)], summary(runs)
    seconds = [alarm["seconds"] if alarm["evaluation"] <= AFTER else math.inf for alarm in first]
    return Power(
        len(first),
        mean(math.isfinite(value) for value in seconds),
        quantile(seconds),
        quantile(seconds, 0.9),
        whole.cut,
        whole.evaluations,
        whole.samples,
    )


SHARES = ("found", "within_3", "named", "cut", "alarms", "stopped", "overhead")


def row(title: str, cells: NamedTuple, only: Sequence[str] = ()) -> str:
    """Returns a line of a table."""
    texts = [
        f"{value:.0%}" if name in SHARES else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        for name, value in cells._asdict().items()
        if not only or name in only
    ]
    return f"{title:26s}" + "".join(f"{'-' if text.startswith('nan') else text:>12s}" for text in texts)


def head(title: str, of: Any, only: Sequence[str] = ()) -> str:
    """Returns the titles of a table."""
    return f"{title:26s}" + "".join(f"{name:>12s}" for name in of._fields if not only or name in only)


def lines(runs: Sequence[Record], verbose: bool) -> Iterator[str]:
    """Yields the tables."""
    default = [run for run in runs if run["samples"] is None]
    yield head("", Summary)
    for model, own in by_model(default).items():
        yield row(model, summary(own))
    of_faults = Summary._fields[:7]
    yield ""
    yield head("", Summary, of_faults)
    for name, fault in FAULTS.items():
        if counted(default, name):
            yield row(name + " (not counted)" * fault.if_changed, summary(default, name), of_faults)
    sizes = sorted({run["samples"] for run in runs if run["samples"] is not None})
    if sizes:
        yield ""
        yield head("samples", Power)
        for title, own in by_samples(runs).items():
            yield row(title, power(own))
    yield ""
    forks, ends = [fault for run in runs for fault in run["faults"]], sum(run["healthy"] is None for run in runs)
    yield f"{sum('error' in fork for fork in forks)} of {len(forks)} forks failed, {ends} of {len(runs)} runs did not end"
    for run in runs if verbose else ():
        yield f"\n{run['model']} {run['seed']} {run['samples'] or 'planned'}: {run['plan']}"
        for fault in run["faults"]:
            yield f"  {fault['name']}: {fault.get('error') or told(fault)}"
        if run["healthy"]:
            yield f"  healthy: {run['healthy']}"


def told(fault: Record) -> str:
    """Returns what happened to a fault, for people."""
    alarms = [f"{a['evaluation']} of {a['monitor']}, {a['seconds']:.1f} s: {a['message']}" for a in fault["alarms"]]
    ended = f"{fault['evaluations']} in {fault['seconds']:.1f} s{', cut' if fault['cut'] else ''}"
    return f"{' | '.join(alarms) or 'not found'} {'(named)' if fault['named'] else ''} [{ended}]"


def by_model(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns runs by model, and all of them."""
    groups = {model: [run for run in runs if run["model"] == model] for model in EXAMPLES}
    return {model: own for model, own in groups.items() if own} | {"all": list(runs)}


def by_samples(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns runs by their number of samples, those of the plan first."""
    groups: dict[str, list[Record]] = {"planned": []}
    for run in sorted(runs, key=lambda run: run["samples"] or 0):
        groups.setdefault(str(run["samples"] or "planned"), []).append(run)
    return {title: own for title, own in groups.items() if own}


def figures(runs: Sequence[Record]) -> dict[str, Any]:
    """Returns the figures of the last line."""
    default = [run for run in runs if run["samples"] is None]
    by_fault = {name: summary(default, name) for name in FAULTS if counted(default, name)}
    return {
        "models": {model: rounded(summary(own)) for model, own in by_model(default).items()},
        "faults": {name: rounded(found, Summary._fields[:7]) for name, found in by_fault.items()},
        "power": {title: rounded(power(own)) for title, own in by_samples(runs).items()},
    }


def rounded(cells: NamedTuple, only: Sequence[str] = ()) -> dict[str, float | None]:
    """Returns numbers for JSON, which has no nan."""
    held = {name: value for name, value in cells._asdict().items() if not only or name in only}
    return {name: None if math.isnan(value) else round(value, 4) for name, value in held.items()}


def read(folders: Iterable[Path]) -> list[Record]:
    """Returns the runs of folders."""
    return [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.5, help="of training, 2 to 5")
    parser.add_argument("--models", nargs="+", default=list(EXAMPLES), choices=EXAMPLES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[5000, 5001])
    parser.add_argument(
        "--samples", nargs="+", type=int, default=[], help="numbers at an evaluation, beside the plan's"
    )
    parser.add_argument("--faults", type=int, default=6, help="largest number of faults of a run")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--limit", type=float, help=f"seconds of a run with its forks; by default {LIMIT} a minute")
    parser.add_argument("--out", type=Path, help="folder of what is written")
    parser.add_argument("--read", nargs="+", type=Path, help="folders that are judged, without training")
    parser.add_argument("--verbose", action="store_true", help="list all alarms")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    folders = options.read
    if folders is None:
        folders = [options.out or Path(tempfile.mkdtemp())]
        folders[0].mkdir(parents=True, exist_ok=True)
        limit = options.limit or LIMIT * options.minutes
        units = [
            Unit(model, seed, samples, options.minutes, options.faults, limit)
            for seed in options.seeds
            for samples in (None, *options.samples)
            for model in options.models
        ]
        train_all(units, folders[0], options.jobs)
    runs = [run for run in read(folders) if run["model"] in options.models]
    for line in lines(runs, options.verbose):
        print(line)
    if options.json:
        print(json.dumps(figures(runs)))


if __name__ == "__main__":
    main()
