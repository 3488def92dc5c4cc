"""Measures how many planted faults the alarms find and name in four families of models, and how many alarms are false.

Each run trains one model with a hundred evaluations. At the 40th, faults begin, one at a time: the monitors measure what
they would observe from there on with each fault. Faults of training (a learning rate that is too high, a decoder that
ignores its latents, a weight that is nan) train on from a checkpoint of that moment. All series are written to files, and
judged from there in seconds, beside ``EarlyStopping`` and a threshold::

    python -m benchmarks.planted_faults                 judges the recorded runs (seconds)
    python -m benchmarks.planted_faults --tuning        judges those that the detector was tuned on, at several rates
    python -m benchmarks.planted_faults --small         trains five short runs and judges them (minutes)
    python -m benchmarks.planted_faults --record        trains all again (hours; --share 0/2 and 1/2 side by side)
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import operator
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measuring import plateau, rounded
from benchmarks.planting import FAMILIES, monitors_for, record
from benchmarks.today import as_today
from lightning_gendiag import Alarm, Evaluation, ModelAdapter, Monitor, Observation, RegionMap, Series
from lightning_gendiag.detection.history import Role
from tests.helpers.recorded_runs import Replay

RECORDS = Path(__file__).parent / "records"

TUNING, REPORTING, HEALTHY = (*range(100, 102), *range(200, 207)), range(400, 407), range(403, 407)
"""Seeds of each model and each kind of data; faults are planted in all but the last ones."""

SOON = 3
"""A sudden fault must be found within this many evaluations."""

ROLES: dict[str, Role] = {"part": "component", "whole": "aggregate", "other": "standalone"}
"""Names of roles in older recordings."""

Run = dict[str, Any]


# ---- judging ----


class Judged(NamedTuple):
    """How a run with one fault ended."""

    run: tuple[str, str, int]
    """Family, data and seed."""
    fault: str
    about: str
    found: bool
    """Whether an alarm was raised while the fault was there, soon if it is sudden, and none before."""
    named: bool
    """Whether the alarm also names what was planted."""
    overlap: float
    """Intersection over union of the pixels named and planted; nan where none are, or where regions are not known."""
    delay: float
    """Evaluations from the first with the fault to the alarm, counted from 1; nan where it was not found."""
    messages: list[str]


def observations_of(monitor: Monitor[Any, Any], row: dict[str, Any], texts: list[list[Any]]) -> list[Observation]:
    """Returns the observations of a recorded row, with the thresholds of today."""
    module = sys.modules[type(monitor).__module__]
    observations = []
    for name, (value, severity, place) in row.items():
        role, label, quantity, event, message, *thresholds = texts[place]
        role = ROLES.get(role, role)
        # older recordings have none
        min_std, min_delta, confirm = thresholds or [module.MIN_STD, 0.0, 1]
        series = Series(
            name, role, quantity or "its value", event=event, min_std=min_std, min_delta=min_delta, confirm=confirm
        )
        observations.append(as_today(monitor.name, Observation(series, value, severity, label or "", message)))
    return observations


def judge(run: Run, **options: Any) -> tuple[list[Alarm], list[Judged]]:
    """Returns the alarms of a recorded run without faults, which are false, and how each fault ended."""
    healthy, start, texts = run["healthy"], run["start"], run["texts"]
    regions = RegionMap(torch.tensor(run["regions"]))
    monitors = monitors_for(run["family"], run["data"], ModelAdapter())

    def add(replay: Replay, at: int, series: dict[str, Any], row: int) -> None:
        for monitor in monitors:
            # what a fault does not touch goes on
            held = series[monitor.name][row] if monitor.name in series else healthy[monitor.name][at]
            replay.add(monitor, Evaluation(at + 1, at, at, observations_of(monitor, held, texts)))

    before = Replay(**options)
    for at in range(start):
        add(before, at, healthy, at)
    judged = []
    for fault, series in run["faults"].items():
        replay = copy.deepcopy(before)
        for row in range(len(series["loss"])):
            add(replay, start + row, series, row)
        judged.append(_judged(run, fault, series, replay.judge.alarms, regions))
    for at in range(start, len(healthy["loss"])):
        add(before, at, healthy, at)
    return before.judge.alarms, judged


def _judged(run: Run, fault: str, series: dict[str, Any], alarms: list[Alarm], regions: RegionMap) -> Judged:
    start, about, truth = run["start"], series["about"], series["truth"]
    late = [alarm for alarm in alarms if alarm.epoch >= start]
    overlap = math.nan
    if about == "region":
        right = [alarm for alarm in late if alarm.diagnostic == "cms"]
        planted = torch.tensor(truth).bool()
        # a second region that is found at the next evaluation belongs to the same alarm
        names = [name for alarm in right if alarm.epoch <= right[0].epoch + 1 for name in alarm.names]
        reported = torch.zeros_like(planted)
        for name in names:
            reported |= regions.mask(regions.names.index(name)) if name in regions.names else name == "image"
        best = torch.zeros_like(planted)
        for r in range(regions.num_regions):
            if (regions.mask(r) & planted).sum() > regions.sizes[r] / 2:
                best |= regions.mask(r)
        # the regions that are monitored need not be those in which faults were planted
        named = bool(right) and _overlap(reported, planted) >= 0.9 * _overlap(best, planted)
        if right and run["data"] == "scenes":
            overlap = _overlap(reported, planted)
    else:
        right = [alarm for alarm in late if not truth or _names(alarm, truth)]
        named = bool(right)
    found = bool(right) and len(late) == len(alarms)
    delay = right[0].epoch - start + 1 if found else math.nan
    if about == "region":
        found = found and (delay <= SOON or "decaying" in fault)
    messages = [f"{alarm.diagnostic}: {alarm}" for alarm in alarms]
    return Judged(name_of(run), fault, about, found, found and named, overlap, delay, messages)


def _overlap(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def _names(alarm: Alarm, truth: list[str]) -> bool:
    """Whether an alarm is about what was planted."""
    if truth == ["all dimensions"]:
        return alarm.label.startswith("all dimensions") or len(alarm.names) >= 3
    reported = [*alarm.names, *alarm.label.replace(" with ", ", ").split(", ")]
    return any(name in reported or name in alarm.rule for name in truth)


# ---- what people use today ----


def below(series: Iterable[float], threshold: float) -> int | None:
    """Returns the first evaluation with a value below a threshold that one before had reached, or None."""
    reached = False
    for number, value in enumerate(series):
        if reached and not value >= threshold:
            return number
        reached = reached or value >= threshold
    return None


BASELINES: dict[str, tuple[Callable[[Iterable[float], Any], int | None], tuple[Any, ...]]] = {
    "EarlyStopping on the loss": (plateau, (3, 5, 8, 12, 16, 24, 32, 48)),
    "EarlyStopping on FID": (plateau, (3, 5, 8, 12, 16, 24, 32, 48)),
    "threshold on image-wise CMS": (below, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95)),
}


def watched_by(name: str, series: dict[str, Any]) -> list[float]:
    """Returns the numbers that a baseline watches; empty where a fault does not touch them."""
    if "CMS" in name:
        values = [row["image"][0] for row in series.get("cms", ())]
        return [math.nan if value is None else value for value in values]
    return list(series["fid" if "FID" in name else "loss"])


def baseline(run: Run, fault: str | None, name: str, setting: Any) -> int | None:
    """Returns the evaluation at which a baseline stops the run, or None."""
    values = watched_by(name, run["healthy"])
    if fault is not None:
        start, faulty = run["start"], run["faults"][fault]
        # what the fault does not touch goes on
        values = values[:start] + (watched_by(name, faulty) or values[start : start + len(faulty["loss"])])
    return BASELINES[name][0](values, setting)


def rates(runs: Sequence[Run], name: str, setting: Any) -> tuple[float, float]:
    """Returns the fractions of regional faults that a baseline finds, and of healthy runs that it stops."""
    cases = [(run, fault) for run in runs for fault in run["faults"] if run["faults"][fault]["about"] == "region"]
    found = [in_time(baseline(run, fault, name, setting), run["start"], fault) for run, fault in cases]
    stopped = [baseline(run, None, name, setting) is not None for run in runs]
    return statistics.mean(found), statistics.mean(stopped)


def tuned(runs: Sequence[Run], name: str) -> Any:
    """Returns the setting of a baseline with the largest difference of regional faults found and healthy runs stopped."""
    worth = {setting: operator.sub(*rates(runs, name, setting)) for setting in BASELINES[name][1]}
    return max(worth, key=worth.__getitem__)


def in_time(number: int | None, start: int, fault: str) -> bool:
    """Returns whether an alarm came while there was a fault, and soon if it is a sudden one."""
    return number is not None and number >= start and (number - start < SOON or "decaying" in fault)


# ---- the table ----


def mean(values: Iterable[float]) -> float:
    """Returns the mean of the values that are numbers; nan where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def middle(values: Iterable[float]) -> float:
    """Returns the median of the values that are numbers; nan where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def summary(runs: Sequence[Run], **options: Any) -> tuple[dict[str, float], list[str], list[Judged]]:
    """Returns figures, the messages of false alarms, and all faults."""
    wrong: list[str] = []
    faults: list[Judged] = []
    stopped = 0
    for run in runs:
        alarms, judged = judge(run, **options)
        stopped += bool(alarms)
        wrong += [f"{run['family']} {run['data']} {run['seed']}: {alarm.diagnostic}: {alarm}" for alarm in alarms]
        faults += judged
    regional = [one for one in faults if one.about == "region"]
    parts = [one for one in faults if one.about in ("class", "dimension")]
    others = [one for one in faults if one.about not in ("region", "class", "dimension")]
    figures = {
        "runs": len(runs),
        "runs_with_faults": len({one.run for one in faults}),
        "evaluations": sum(len(run["healthy"]["loss"]) for run in runs),
        "wrong_alarms": len(wrong),
        "runs_with_wrong_alarms": stopped,
        "regional_found": mean(one.found for one in regional),
        "regional_named": mean(one.named for one in regional),
        "regional_iou": middle(one.overlap for one in regional),
        "parts_found": mean(one.found for one in parts),
        "named": mean(one.named for one in parts),
        "others_found": mean(one.found for one in others),
        "false_alarms": len(wrong) / len(runs),
        "healthy_stopped": stopped / len(runs),
        "delay": middle(one.delay for one in regional if "decaying" not in one.fault),
    }
    return figures, wrong, faults


def by_fault(faults: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Returns for each fault the number of runs, the shares found and named, and the median and longest delay."""
    kinds: dict[str, list[Judged]] = {}
    for one in faults:
        kinds.setdefault(one.fault, []).append(one)
    return {
        fault: {
            "runs": len(some),
            "found": mean(one.found for one in some),
            "named": mean(one.named for one in some),
            "overlap": middle(one.overlap for one in some),
            "delay": middle(one.delay for one in some),
            "longest": max((one.delay for one in some if not math.isnan(one.delay)), default=math.nan),
        }
        for fault, some in kinds.items()
    }


def without_nan(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what was found without the numbers that JSON cannot hold."""
    return {
        name: without_nan(own) if isinstance(own, dict) else own
        for name, own in found.items()
        if not (isinstance(own, float) and math.isnan(own))
    }


def table(runs: Sequence[Run], wrong: list[str], faults: list[Judged]) -> None:
    """Prints what is found, how soon, and how many alarms are false."""
    evaluations = sum(len(run["healthy"]["loss"]) for run in runs)
    print(f"{len(wrong)} false alarms in {len(runs)} healthy runs with {evaluations} evaluations in total")
    for message in wrong:
        print(f"  {message}")
    print(f"{'fault':26s} {'runs':>5s} {'found':>6s} {'named':>6s} {'overlap':>8s} {'delay':>6s} {'longest':>8s}")
    for fault, own in by_fault(faults).items():
        print(
            f"{fault:26s} {own['runs']:5d} {own['found']:6.0%} {own['named']:6.0%} {own['overlap']:8.2f} {own['delay']:6.1f} "
            f"{own['longest']:8.0f}"
        )
    kinds = [(family, kind) for family in FAMILIES for kind in ("scenes", "digits")]
    shares = {kind: mean(one.named for one in faults if one.run[:2] == kind) for kind in kinds}
    print("named, by model:", ", ".join(f"{family} on {kind} {share:.0%}" for (family, kind), share in shares.items()))


def against_baselines(runs: Sequence[Run], tuning: Sequence[Run]) -> dict[str, Any]:
    """Prints what people use today on the same runs, each at the setting that does best on the tuning runs."""
    print(f"{'baseline':30s} {'setting':>8s} {'regional faults found':>22s} {'healthy runs stopped':>21s}")
    results = {}
    for name in BASELINES:
        setting = tuned(tuning, name)
        found, wrong = rates(runs, name, setting)
        print(f"{name:30s} {setting:8g} {found:22.0%} {wrong:21.0%}")
        results[name] = {"setting": setting, "found": found, "stopped": wrong}
    best = max(results.values(), key=lambda own: own["found"] - own["stopped"])
    return {"baseline_found": best["found"], "baseline_false_alarms": best["stopped"], "baselines": results}


def before_loss(runs: Sequence[Run], faults: list[Judged], tuning: Sequence[Run]) -> dict[int, float]:
    """Prints and returns how often the alarm on a learning rate that is too high comes before the loss stops the run.

    Returns:
        The share by the patience of ``EarlyStopping``: Lightning's default, and the one that does best.
    """
    name, fault = "EarlyStopping on the loss", "learning rate too high"
    ours = {one.run: one.delay for one in faults if one.fault == fault}
    shares = {}
    for setting in (3, tuned(tuning, name)):
        sooner = []
        for run in (run for run in runs if fault in run["faults"]):
            number = baseline(run, fault, name, setting)
            # a run that is stopped before anything is wrong is stopped for nothing
            theirs = math.inf if number is None or number < run["start"] else number - run["start"] + 1
            sooner.append(ours[name_of(run)] < theirs)
        shares[setting] = mean(sooner)
    print(f"{fault}: the alarm comes before {name}", end=" ")
    print(", ".join(f"in {share:.0%} of the runs with patience {setting}" for setting, share in shares.items()))
    return shares


# ---- the command ----


def name_of(run: Run) -> tuple[str, str, int]:
    """Returns family, data and seed."""
    return run["family"], run["data"], run["seed"]


def path_of(family: str, kind: str, seed: int) -> Path:
    """Returns the path of a recorded run."""
    return RECORDS / f"{family}_{kind}_{seed}.json.gz"


def run_names(seeds: Iterable[int]) -> list[tuple[str, str, int]]:
    """Returns the names of all runs with these seeds."""
    return [(family, kind, seed) for seed in seeds for family in FAMILIES for kind in ("scenes", "digits")]


def recorded(seeds: Iterable[int]) -> list[Run]:
    """Returns all recorded runs with these seeds."""
    paths = [path_of(*name) for name in run_names(seeds)]
    return [json.loads(gzip.decompress(path.read_bytes())) for path in paths if path.exists()]


def small() -> list[Run]:
    """Trains a short run of each family on scenes and one on digits, with a seed that was used for nothing else."""
    runs = []
    for family, kind in (*((family, "scenes") for family in FAMILIES), ("gan", "digits")):
        runs.append(record(family, kind, 300, evaluations=44, start=32, after=4))
        print("trained", family, "on", kind, flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="train what is not recorded yet")
    parser.add_argument("--share", default="0/1", help="part of the runs to record: 0/2 and 1/2 on two cores")
    parser.add_argument("--tuning", action="store_true", help="take the seeds that the detector was tuned on")
    parser.add_argument("--small", action="store_true", help="train some short runs and judge them")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if options.record:
        part, parts = map(int, options.share.split("/"))
        for name in run_names(TUNING if options.tuning else REPORTING)[part::parts]:
            path = path_of(*name)
            if not path.exists():
                run = json.dumps(record(*name, faults=name[2] not in HEALTHY), separators=(",", ":"))
                path.write_bytes(gzip.compress(run.encode(), mtime=0))
                print("recorded", *name, flush=True)
        return
    tuning = recorded(TUNING)
    runs = small() if options.small else tuning if options.tuning else recorded(REPORTING)
    for rate in (1e-2, 1e-3, 1e-4) if options.tuning else ():
        figures, _, _ = summary(runs, false_alarm_rate=rate)
        print(f"false_alarm_rate {rate:g}: {', '.join(f'{name} {value:.2f}' for name, value in figures.items())}")
    figures, wrong, faults = summary(runs)
    table(runs, wrong, faults)
    sooner = before_loss(runs, faults, tuning)
    found = {
        **figures,
        **against_baselines(runs, tuning),
        "before_loss": min(sooner.values()),
        "before_loss_by_patience": sooner,
        "faults": by_fault(faults),
    }
    if options.json:
        print(json.dumps(rounded(without_nan(found))))


if __name__ == "__main__":
    main()
