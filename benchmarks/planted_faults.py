"""Can the alarms be trusted? Planted faults and healthy runs of four families of models, and what people use today.

Each run trains one model and looks a hundred times. At the 40th look faults begin, one at a time: for each the monitors
measure what they would see from there on, which is what they see if the model is broken so when it is looked at. Faults
of training (a learning rate that is too high, a decoder that ignores its latents, a weight that is nan) train on from a
checkpoint of that moment. All series are written to files, and judged from there in seconds::

    python -m benchmarks.planted_faults                 judges the recorded runs (seconds)
    python -m benchmarks.planted_faults --tuning        judges those that detectors were chosen by, with each detector
    python -m benchmarks.planted_faults --small         trains five short runs and judges them (minutes)
    python -m benchmarks.planted_faults --record        trains all again (hours; --share 0/2 and 1/2 side by side)
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from benchmarks.planting import FAMILIES, monitors_for, record
from lightning_gendiag import CollapseStopping, CosineMeanSimilarityMonitor, Probe, RegionMap
from lightning_gendiag.detectors import DETECTORS
from lightning_gendiag.monitor import Evaluation, Reading

RECORDS = Path(__file__).parent / "records"

TUNING, REPORTING, HEALTHY = (*range(100, 102), *range(200, 207)), range(400, 407), range(403, 407)
"""Seeds of each model and each kind of data; faults are planted in all but the last ones."""

SOON = 3
"""A sudden fault must be found within so many looks."""


# ---- judging ----


class Judged(NamedTuple):
    """How a run with one fault ended."""

    run: tuple[str, str, int]
    """Family, data and seed."""
    fault: str
    about: str
    found: bool
    """Whether it was told while it was there, soon if it is sudden, with no alarm before."""
    named: bool
    """Whether what was told is what was planted."""
    overlap: float
    """Intersection over union of the pixels told and planted; nan where none are, or where regions are not known."""
    delay: float
    """Looks from the first with the fault to the one at which it was found, counted from 1; nan where it was not."""
    words: list[str]


def judge(run: dict[str, Any], **options: Any) -> tuple[list[str], list[Judged]]:
    """What all monitors of a recorded run tell: false alarms in the healthy one, and how each fault ended."""
    healthy, start, texts = run["healthy"], run["start"], run["texts"]
    regions = RegionMap(torch.tensor(run["regions"]))
    monitors = monitors_for(run["family"], run["data"], Probe())
    for monitor in monitors:
        if isinstance(monitor, CosineMeanSimilarityMonitor):
            monitor.region_map = regions

    def look(stopping: CollapseStopping, at: int, series: dict[str, Any], row: int) -> None:
        for monitor in monitors:
            # what a fault does not touch goes on
            held = series[monitor.name][row] if monitor.name in series else healthy[monitor.name][at]
            readings = {name: Reading(value, badness, *texts[text]) for name, (value, badness, text) in held.items()}
            stopping.judge(monitor, Evaluation(at + 1, at, at, readings))

    stopping = CollapseStopping(**options)
    for at in range(start):
        look(stopping, at, healthy, at)
    before = copy.deepcopy(stopping.state_dict())
    judged = []
    for fault, series in run["faults"].items():
        stopping = CollapseStopping(**options)
        stopping.load_state_dict(copy.deepcopy(before))
        for row in range(len(series["loss"])):
            look(stopping, start + row, series, row)
        judged.append(_judged(run, fault, series, stopping.findings, regions))
    stopping = CollapseStopping(**options)
    stopping.load_state_dict(before)
    for at in range(start, len(healthy["loss"])):
        look(stopping, at, healthy, at)
    return [f"{f.diagnostic}: {f}" for f in stopping.findings], judged


def _judged(run: dict[str, Any], fault: str, series: dict[str, Any], findings: list[Any], regions: RegionMap) -> Judged:
    start, about, truth = run["start"], series["about"], series["truth"]
    late = [f for f in findings if f.epoch >= start]
    overlap = math.nan
    if about == "region":
        right = [f for f in late if f.diagnostic == "cms"]
        planted = torch.tensor(truth).bool()
        told = torch.zeros_like(planted)
        for finding in right:
            # a second region that is told with the next look belongs to the same alarm
            if finding.epoch <= right[0].epoch + 1:
                for name in finding.names:
                    told |= regions.mask(regions.names.index(name)) if name in regions.names else name == "image"
        best = torch.zeros_like(planted)
        for r in range(regions.num_regions):
            if (regions.mask(r) & planted).sum() > regions.sizes[r] / 2:
                best |= regions.mask(r)
        # the regions that are looked at need not be those that were planted in
        named = bool(right) and _overlap(told, planted) >= 0.9 * _overlap(best, planted)
        if right and run["data"] == "scenes":
            overlap = _overlap(told, planted)
    elif about == "run":
        right = [f for f in late if not truth or any(t in (f.where, *f.names) or t in f.words for t in truth)]
        named = bool(right)
    else:
        right = [f for f in late if _names(f, truth)]
        named = bool(right)
    found = bool(right) and not any(f.epoch < start for f in findings)
    delay = right[0].epoch - start + 1 if found else math.nan
    if about == "region":
        found = found and (delay <= SOON or "decaying" in fault)
    words = [f"{f.diagnostic}: {f}" for f in findings]
    return Judged(name_of(run), fault, about, found, found and named, overlap, delay, words)


def _overlap(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def _names(finding: Any, truth: list[str]) -> bool:
    """Whether a finding is about what was planted."""
    if truth == ["all dimensions"]:
        return finding.where.startswith("all dimensions") or len(finding.names) >= 3
    told = [*finding.names, *finding.where.replace(" with ", ", ").split(", ")]
    return any(name in told for name in truth)


# ---- what people use today ----


def plateau(series: list[float], patience: int) -> int | None:
    """The look at which Lightning's ``EarlyStopping`` stops, or None."""
    stopper = EarlyStopping("it", patience=patience)
    for look, value in enumerate(series):
        if stopper._evaluate_stopping_criteria(torch.tensor(value))[0]:
            return look
    return None


def below(series: list[float], threshold: float) -> int | None:
    """The first look at which a value lies below a threshold that one before had reached, or None."""
    reached = False
    for look, value in enumerate(series):
        if reached and not value >= threshold:
            return look
        reached = reached or value >= threshold
    return None


BASELINES: dict[str, tuple[Callable[[list[float], Any], int | None], tuple[Any, ...]]] = {
    "EarlyStopping on the loss": (plateau, (3, 5, 8, 12, 16, 24, 32, 48)),
    "EarlyStopping on FID": (plateau, (3, 5, 8, 12, 16, 24, 32, 48)),
    "threshold on image-wise CMS": (below, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95)),
}


def watched_by(name: str, series: dict[str, Any]) -> list[float]:
    """The numbers that a baseline looks at."""
    if "CMS" in name:
        return [math.nan if row["image"][0] is None else row["image"][0] for row in series["cms"]]
    return list(series["fid" if "FID" in name else "loss"])


def baseline(run: dict[str, Any], fault: str | None, name: str, setting: Any) -> int | None:
    """The look at which a baseline stops the run, or None."""
    stop = BASELINES[name][0]
    values = watched_by(name, run["healthy"])
    if fault is not None:
        faulty = run["faults"][fault]
        start = run["start"]
        # what the fault does not touch goes on
        values = values[:start] + (
            watched_by(name, faulty)
            if "CMS" not in name or "cms" in faulty
            else values[start : start + len(faulty["loss"])]
        )
    return stop(values, setting)


def tuned(runs: list[dict[str, Any]], name: str) -> Any:
    """The setting of a baseline that finds most regional faults for its false alarms."""

    def worth(setting: Any) -> float:
        found, wrong = rates(runs, name, setting)
        return found - wrong

    return max(BASELINES[name][1], key=worth)


def rates(runs: list[dict[str, Any]], name: str, setting: Any) -> tuple[float, float]:
    """Shares of regional faults that a baseline finds, and of healthy runs that it stops."""
    cases = [(run, fault) for run in runs for fault in run["faults"] if run["faults"][fault]["about"] == "region"]
    found = [in_time(baseline(run, fault, name, setting), run["start"], fault) for run, fault in cases]
    wrong = [baseline(run, None, name, setting) is not None for run in runs]
    return statistics.mean(found), statistics.mean(wrong)


def in_time(look: int | None, start: int, fault: str) -> bool:
    """Whether an alarm came while there was a fault, and soon if it is a sudden one."""
    return look is not None and look >= start and (look - start < SOON or "decaying" in fault)


# ---- the table ----


def mean(values: Iterable[float]) -> float:
    """Of what is a number; nan of nothing."""
    kept = [value for value in values if not math.isnan(value)]
    return statistics.fmean(kept) if kept else math.nan


def middle(values: Iterable[float]) -> float:
    """The median of what is a number."""
    kept = [value for value in values if not math.isnan(value)]
    return statistics.median(kept) if kept else math.nan


def summary(runs: list[dict[str, Any]], **options: Any) -> tuple[dict[str, float], list[str], list[Judged]]:
    """Figures, false alarms in words, and all faults."""
    wrong: list[str] = []
    faults: list[Judged] = []
    stopped = 0
    for run in runs:
        alarms, judged = judge(run, **options)
        stopped += bool(alarms)
        wrong += [f"{run['family']} {run['data']} {run['seed']}: {words}" for words in alarms]
        faults += judged
    regional = [one for one in faults if one.about == "region"]
    sudden = [one for one in regional if "decaying" not in one.fault]
    figures = {
        "regional_found": mean(one.found for one in regional),
        "regional_named": mean(one.named for one in regional),
        "regional_iou": middle(one.overlap for one in regional),
        "named": mean(one.named for one in faults if one.about in ("class", "dimension")),
        "false_alarms": len(wrong) / len(runs),
        "healthy_stopped": stopped / len(runs),
        "delay": middle(one.delay for one in sudden),
    }
    return figures, wrong, faults


def table(runs: list[dict[str, Any]], figures: dict[str, float], wrong: list[str], faults: list[Judged]) -> None:
    """Print what is found, how soon, and how often wrongly."""
    looks = sum(len(run["healthy"]["loss"]) for run in runs)
    print(f"{len(wrong)} false alarms in {len(runs)} healthy runs of {looks} looks in all")
    for words in wrong:
        print(f"  {words}")
    print(f"{'fault':26s} {'runs':>5s} {'found':>6s} {'named':>6s} {'overlap':>8s} {'delay':>6s} {'longest':>8s}")
    for fault in dict.fromkeys(one.fault for one in faults):
        some = [one for one in faults if one.fault == fault]
        delays = [one.delay for one in some]
        longest = max((d for d in delays if not math.isnan(d)), default=math.nan)
        print(
            f"{fault:26s} {len(some):5d} {mean(one.found for one in some):6.0%} {mean(one.named for one in some):6.0%} "
            f"{middle(one.overlap for one in some):8.2f} {middle(delays):6.1f} {longest:8.0f}"
        )
    print("by model:", ", ".join(
        f"{family} on {kind} {mean(one.named for one in faults if one.run[:2] == (family, kind)):.0%} named"
        for family in FAMILIES for kind in ("scenes", "digits")
    ))  # fmt: skip


def against_baselines(runs: list[dict[str, Any]], tuning: list[dict[str, Any]]) -> dict[str, float]:
    """Print what people use today on the same runs, each at the setting that does best on the tuning runs."""
    print(f"{'baseline':30s} {'setting':>8s} {'regional faults found':>22s} {'healthy runs stopped':>21s}")
    best, figures = -math.inf, {}
    for name in BASELINES:
        setting = tuned(tuning, name)
        found, wrong = rates(runs, name, setting)
        print(f"{name:30s} {setting:8g} {found:22.0%} {wrong:21.0%}")
        if found - wrong > best:
            best, figures = found - wrong, {"baseline_found": found, "baseline_false_alarms": wrong}
    return figures


def natural(runs: list[dict[str, Any]], faults: list[Judged], tuning: list[dict[str, Any]]) -> float:
    """Print how often a learning rate that is too high is told before the loss tells; return the share."""
    name, fault = "EarlyStopping on the loss", "learning rate too high"
    ours = {one.run: one.delay for one in faults if one.fault == fault}
    print(f"{fault}: told before {name}", end="")
    shares = []
    # as Lightning has it by default, and as it does best
    for setting in (3, tuned(tuning, name)):
        sooner = []
        for run in runs:
            if fault not in run["faults"]:
                continue
            look = baseline(run, fault, name, setting)
            # a run that is stopped before anything is wrong is stopped for nothing
            theirs = math.inf if look is None or look < run["start"] else look - run["start"] + 1
            sooner.append(ours[name_of(run)] < theirs)
        shares.append(mean(sooner))
        print(f" in {shares[-1]:.0%} of the runs (patience {setting})", end="")
    print()
    return min(shares)


# ---- the command ----


def name_of(run: dict[str, Any]) -> tuple[str, str, int]:
    """Family, data and seed."""
    return run["family"], run["data"], run["seed"]


def path_of(family: str, kind: str, seed: int) -> Path:
    """Where a run is kept."""
    return RECORDS / f"{family}_{kind}_{seed}.json.gz"


def recorded(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """All runs of these seeds that are there."""
    paths = [path_of(family, kind, seed) for seed in seeds for family in FAMILIES for kind in ("scenes", "digits")]
    return [json.loads(gzip.decompress(path.read_bytes())) for path in paths if path.exists()]


def keep(run: dict[str, Any]) -> None:
    """Write a run."""
    RECORDS.mkdir(exist_ok=True)
    packed = gzip.compress(json.dumps(run, separators=(",", ":")).encode(), mtime=0)
    path_of(*name_of(run)).write_bytes(packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="train what is not recorded yet")
    parser.add_argument("--share", default="0/1", help="of the runs to record: 0/2 and 1/2 side by side on two cores")
    parser.add_argument("--tuning", action="store_true", help="the seeds that detectors were chosen by")
    parser.add_argument("--small", action="store_true", help="train some short runs and judge them")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seeds = TUNING if options.tuning else REPORTING
    if options.record:
        part, parts = map(int, options.share.split("/"))
        wanted = [(f, kind, seed) for seed in seeds for f in FAMILIES for kind in ("scenes", "digits")]
        for one in wanted[part::parts]:
            if not path_of(*one).exists():
                keep(record(*one, faults=one[2] not in HEALTHY))
                print("recorded", *one, flush=True)
        return
    tuning = recorded(TUNING)
    if options.small:
        runs = small()
    elif options.tuning:
        runs = tuning
        for detector in DETECTORS:
            for rate in (1e-2, 1e-3, 1e-4):
                figures, _, _ = summary(runs, detector=detector, false_alarm_rate=rate)
                told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
                print(f"{detector:12s} rate {rate:g}: {told}")
    else:
        runs = recorded(REPORTING)
    figures, wrong, faults = summary(runs)
    table(runs, figures, wrong, faults)
    figures |= against_baselines(runs, tuning)
    figures["before_loss"] = natural(runs, faults, tuning)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def small() -> list[dict[str, Any]]:
    """A short run of each family on scenes and one on digits, of a seed that nothing was chosen by."""
    runs = []
    for family, kind in (*((family, "scenes") for family in FAMILIES), ("gan", "digits")):
        runs.append(record(family, kind, 300, looks=44, start=32, after=4))
        print("trained", family, "on", kind, flush=True)
    return runs


if __name__ == "__main__":
    main()
