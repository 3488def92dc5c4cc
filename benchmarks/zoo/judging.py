"""Judges recorded runs as ``CollapseStopping`` does, and as people stop runs today."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from benchmarks.measuring import plateau
from benchmarks.today import as_today
from benchmarks.zoo.faults import FAULTS, FROM_THE_START
from benchmarks.zoo.models import KINDS
from benchmarks.zoo.recording import AFTER, EARLY, LATE, Record
from benchmarks.zoo.running import HELD_OUT_SEED
from benchmarks.zoo.truth import (
    has_learnt,
    is_about_data,
    is_right,
    numbers_in,
    quadrants_of,
    quality_fell,
    region_fell,
)
from lightning_gendiag import Alarm, CollapseStopping, Evaluation, Observation, Series
from lightning_gendiag.callbacks.generative_diagnostics import MONITORS
from lightning_gendiag.detection.history import History
from lightning_gendiag.functional.intervals import binomial_interval

CONTRIBUTIONS = {kind.name: kind().contributions for kind in MONITORS}
"""Pure functions of values, so that they need not be recorded."""

PATIENCE, WINDOW, THRESHOLD = 10, 30, 3.0
"""Of ``EarlyStopping``, and of the z-score rule."""


# ---- replay ----


class Raised(NamedTuple):
    """An alarm of a replayed run."""

    alarm: Alarm
    at: int
    """Evaluation of the run, counted from 0."""
    since: int
    """Evaluation at which the change began by the alarm."""


class Replayed(NamedTuple):
    """What happened to a run."""

    raised: list[Raised]
    stopped: int | None
    """The evaluation that would have stopped it; None if none would."""
    by: list[Alarm]
    """Alarms that would have stopped it."""
    state: str = ""
    """Of the report at its end."""


def evaluations_of(run: Record, track: Record) -> list[dict[str, Evaluation]]:
    """Returns what each monitor observed at each evaluation of a track, in the order of the monitors."""
    known = {field.name for field in fields(Series)}
    declared = [Series(**{name: x for name, x in one.items() if name in known}) for one in run["declared"]]
    rows: list[dict[str, Evaluation]] = [{} for _ in track["steps"]]
    for monitor, held in track["monitors"].items():
        columns = [(declared[int(number)], column) for number, column in held["columns"].items()]
        for position, (at, number) in enumerate(zip(held["at"], held["number"], strict=True)):
            observations = [
                as_today(monitor, o, run["real_shares"])
                for series, c in columns
                if (o := _observation(series, c, position)) is not None
            ]
            rows[at][monitor] = Evaluation(number, track["steps"][at], track["epochs"][at], observations)
    return rows


def _observation(series: Series, column: dict[str, Any], position: int) -> Observation | None:
    if position >= len(column["value"]) or column["value"][position] is None:
        return None
    value = column["value"][position]
    severity = {"+": value, "-": -value}[s] if isinstance(s := column["severity"], str) else s[position]
    more = column.get("more", {}).get(str(position), {})
    return Observation(series, value, severity, **{k: v for k, v in more.items() if k in Observation._fields})


def replay(run: Record, fault: Record | None = None) -> Replayed:
    """Judges a recorded run, or what led to a fault and followed it, with the rules of today."""
    rows, steps = evaluations_of(run, run), list(run["steps"])
    if fault is not None:
        first = fault["first"]
        rows, steps = rows[:first] + evaluations_of(run, fault), steps[:first] + fault["steps"]
    return judged(rows, steps)


def judged(rows: Sequence[dict[str, Evaluation]], steps: Sequence[int]) -> Replayed:
    """Judges evaluations of all monitors, at increasing steps, with the rules of today."""
    stopper, history = CollapseStopping("warn"), History()
    raised: list[Raised] = []
    stopped: int | None = None
    by: list[Alarm] = []
    for at, observed in enumerate(rows):
        for monitor, evaluation in observed.items():
            history.append(monitor, evaluation)
        for monitor, evaluation in observed.items():
            contributions = CONTRIBUTIONS.get(monitor, lambda before, after: {})
            for alarm in stopper.judge.update(monitor, evaluation, history, contributions):
                since = next((number for number, step in enumerate(steps) if step >= alarm.since), at)
                raised.append(Raised(alarm, at, since))
        lasting = stopper.judge.stopping(history)
        if lasting and stopped is None:
            stopped, by = at, lasting
    return Replayed(raised, stopped, by, stopper.report()["state"])


# ---- what people use today ----


def z_scores(rows: Sequence[dict[str, Evaluation]]) -> int | None:
    """Returns the first evaluation at which any severity is far above the mean of its window, or None."""
    seen: dict[tuple[str, str], list[float]] = {}
    for at, observed in enumerate(rows):
        far = False
        for monitor, evaluation in observed.items():
            for observation in evaluation.observations:
                if observation.series.role == "record":
                    continue
                window = seen.setdefault((monitor, observation.series.name), [])
                recent = [value for value in window[-WINDOW:] if math.isfinite(value)]
                if len(recent) >= WINDOW // 3:
                    limit = statistics.fmean(recent) + THRESHOLD * max(statistics.stdev(recent), 1e-6)
                    far |= not observation.severity <= limit
                window.append(observation.severity)
        if far:
            return at
    return None


def baselines(run: Record, fault: Record | None = None) -> dict[str, int | None]:
    """Returns the evaluation at which each baseline stops a run."""
    rows, loss, fid = evaluations_of(run, run), run["loss"], run["truth"]["fid"]
    if fault is not None:
        first = fault["first"]
        rows = rows[:first] + evaluations_of(run, fault)
        loss, fid = loss[:first] + fault["loss"], fid[:first] + fault["truth"]["fid"]
    return {
        "EarlyStopping on the loss": plateau(loss, PATIENCE),
        "EarlyStopping on the referee's FID": plateau(fid, PATIENCE),
        "z-score above 3": z_scores(rows),
    }


# ---- verdicts ----


class Healthy(NamedTuple):
    """How a healthy run ended."""

    run: Record
    stopped: int | None
    alarms: list[str]
    wrong: list[str]
    """Messages of alarms that name nothing that got worse."""
    state: str
    """Of the report at its end."""
    wrongly_stopped: bool
    """Whether it was stopped although nothing that stopped it was right and the FID was no worse."""
    late: dict[int, bool]
    """Whether an alarm came by chance in the evaluations in which faults are looked for."""
    baselines: dict[str, int | None]


class Faulty(NamedTuple):
    """How a run with a fault ended."""

    run: Record
    fault: str
    from_start: bool
    found: bool
    """Whether an alarm was raised while there was a fault; with a fault from the start also if the report ends unhealthy."""
    named: bool
    as_data: bool
    stopped: bool
    visible: bool
    """Whether the referee sees that samples got worse."""
    delay: float
    messages: list[str]
    baselines: dict[str, bool]


def judged_healthy(run: Record) -> Healthy:
    """Judges a run without faults."""
    played = replay(run)
    truth = run["truth"]
    right = {id(r.alarm): is_right(r.alarm, run, truth, r.since, r.at) for r in played.raised}
    since = min((r.since for r in played.raised if any(r.alarm is a for a in played.by)), default=0)
    worse = played.stopped is not None and quality_fell(truth, since, played.stopped)
    wrong = [r for r in played.raised if not right[id(r.alarm)]]
    return Healthy(
        run,
        played.stopped,
        [f"{r.alarm.diagnostic}: {r.alarm}" for r in played.raised],
        [f"{r.at}: {r.alarm.diagnostic}: {r.alarm.message}" for r in wrong],
        played.state,
        played.stopped is not None and not worse and not any(right.get(id(a), False) for a in played.by),
        {start: any(start <= r.at < start + AFTER for r in played.raised) for start in (EARLY, LATE)},
        baselines(run),
    )


def judged_faulty(run: Record, fault: Record | None) -> Faulty:
    """Judges a fault that forked from a run, or a run with a fault from the start."""
    played, stops = replay(run, fault), baselines(run, fault)
    first = 0 if fault is None else fault["first"]
    name = run["fault"] if fault is None else fault["name"]
    late = [r for r in played.raised if r.at >= first]
    return Faulty(
        run,
        name,
        fault is None,
        bool(late) or (fault is None and played.state == "unhealthy"),
        bool(late) if fault is None else any(names(r.alarm, run, fault) for r in late),
        any(is_about_data(r.alarm) for r in late),
        played.stopped is not None and played.stopped >= first,
        fault is None or visible(run, fault),
        min((r.at - first + 1 for r in late), default=math.nan),
        [f"{r.at}: {r.alarm.diagnostic}: {r.alarm.message}" for r in late],
        {name: at is not None and at >= first for name, at in stops.items()},
    )


def visible(run: Record, fault: Record) -> bool:
    """Returns whether the referee sees in half of the evaluations with a fault that samples got worse, or a region did."""
    first, truth = fault["first"], fault["truth"]
    joined = {name: [*run["truth"][name][:first], *values] for name, values in truth.items()}
    affected = [
        number
        for number, name in enumerate(run["regions"].get("names", ()))
        if fault.get("quadrant") in quadrants_of(run["regions"], name)
    ]
    worse = [
        quality_fell(joined, first, at) or any(region_fell(joined, number, first, at) for number in affected)
        for at in range(first, first + len(truth["fid"]))
    ]
    return sum(worse) >= len(worse) / 2


def names(alarm: Alarm, run: Record, fault: Record) -> bool:
    """Returns whether an alarm names what is at fault."""
    planted = FAULTS[fault["name"]]
    if planted.of_data and planted.place != "class" and is_about_data(alarm):
        return True
    if planted.place == "class":
        return fault["class"] in numbers_in([*alarm.names, alarm.label], "class") and alarm.diagnostic != "k_star"
    if planted.place == "dimensions":
        return bool({*fault["dimensions"]} & {*numbers_in([*alarm.names, alarm.label], "dimension")})
    if planted.place == "quadrant":
        words = [*alarm.names, *alarm.label.split(", ")]
        return fault["quadrant"] in [q for name in words for q in quadrants_of(run["regions"], name)]
    return planted.place == "any"


# ---- the table ----


def bounds(count: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share by Clopper and Pearson.

    Example:
        >>> [round(bound, 3) for bound in bounds(0, 100)]
        [0.0, 0.036]
    """
    low, high = binomial_interval(torch.tensor([count, n - count]), 0.025)[0].tolist()
    return low, high


def share(flags: Iterable[Any]) -> str:
    """Returns "3 of 10 (7 to 65 %)"."""
    held = [bool(flag) for flag in flags]
    low, high = bounds(sum(held), len(held)) if held else (0.0, 1.0)
    return f"{sum(held):3d} of {len(held):3d} ({100 * low:2.0f} to {100 * high:3.0f} %)"


def is_held_out(run: Record) -> bool:
    """Returns whether rules were never chosen on a run."""
    return int(run["seed"]) >= HELD_OUT_SEED


def lines(healthy: Sequence[Healthy], faulty: Sequence[Faulty], verbose: bool) -> Iterator[str]:
    """Yields the lines of the table."""
    yield f"{'healthy runs':28s} {'stopped':26s} {'wrongly stopped':26s} {'with a wrong alarm':26s}"
    groups: dict[str, list[Healthy]] = {"all": list(healthy)}
    for one in healthy:
        kind = one.run["kind"]
        groups.setdefault(kind + (" (new kind)" if KINDS[kind].held_out else ""), []).append(one)
        groups.setdefault(f"spacing of {spacing_of(one)} or more steps", []).append(one)
    for name in sorted(groups, key=lambda name: (name != "all", name)):
        some = groups[name]
        stops, wrong = share(one.stopped is not None for one in some), share(one.wrongly_stopped for one in some)
        yield f"{name:28s} {stops:26s} {wrong:26s} {share(bool(one.wrong) for one in some):26s}"
    for start in (EARLY, LATE) if healthy else ():
        chance = share(one.late[start] for one in healthy)
        yield f"an alarm by chance in the {AFTER} evaluations from {start}: {chance}"
    if healthy:
        yield f"reported as unhealthy at the end: {share(one.state == 'unhealthy' for one in healthy)}"
    for one in healthy if verbose else ():
        for message in one.wrong:
            yield f"  {one.run['kind']} {one.run['seed']}{' (stopped)' if one.stopped is not None else ''} {message}"
    yield ""
    yield f"{'fault':28s} {'found':26s} {'stopped':26s} {'named':26s} {'delay':>6s} {'as data':>8s} {'visible':>8s}"
    for from_start, listed in ((False, FAULTS), (True, FROM_THE_START)):
        for name in listed:
            some_faults = [one for one in faulty if one.fault == name and one.from_start is from_start]
            if some_faults:
                delays = [one.delay for one in some_faults if one.found]
                yield (
                    f"{name + (' (from the start)' if from_start else ''):28s} {share(o.found for o in some_faults):26s} "
                    f"{share(o.stopped for o in some_faults):26s} {share(o.named for o in some_faults):26s} "
                    f"{statistics.median(delays) if delays else math.nan:6.1f} "
                    f"{sum(o.as_data for o in some_faults):8d} {sum(o.visible for o in some_faults):8d}"
                )
            for fault in some_faults if verbose else ():
                yield f"  {fault.run['kind']} {fault.run['seed']}: {' | '.join(fault.messages) or '-'}"
    counted = [one for one in faulty if counts(one)]
    yield ""
    yield f"{'baseline':36s} {'healthy runs stopped':28s} {'faults found':28s}"
    for name in baselines_of(healthy, counted):
        stopped = share(one.baselines[name] is not None for one in healthy)
        yield f"{name:36s} {stopped:28s} {share(fault.baselines[name] for fault in counted):28s}"


def spacing_of(one: Healthy) -> int:
    """Returns the least number of steps between evaluations in the group of a run."""
    return next(low for low in (50, 25, 12, 0) if one.run["spacing"] >= low)


def tally(healthy: Sequence[Healthy], group: Callable[[Healthy], str]) -> dict[str, tuple[int, int]]:
    """Returns for each group the number of runs with a wrong alarm, and of all runs."""
    groups: dict[str, list[bool]] = {}
    for one in healthy:
        groups.setdefault(group(one), []).append(bool(one.wrong))
    return {name: (sum(flags), len(flags)) for name, flags in sorted(groups.items())}


def counts(one: Faulty) -> bool:
    """Returns whether a fault counts: some do only where what is generated got worse."""
    return one.visible or one.from_start or not FAULTS[one.fault].if_changed


def baselines_of(healthy: Sequence[Healthy], faulty: Sequence[Faulty]) -> list[str]:
    """Returns the names of the baselines."""
    return list(healthy[0].baselines if healthy else faulty[0].baselines if faulty else ())


def figures(healthy: Sequence[Healthy], faulty: Sequence[Faulty]) -> dict[str, Any]:
    """Returns the figures of the last line; those of baselines are of the one with the largest difference."""
    later = [one for one in faulty if not one.from_start and counts(one)]
    start = [one for one in faulty if one.from_start]
    data = [one for one in later if FAULTS[one.fault].of_data]
    shares = {
        name: (
            mean(one.baselines[name] is not None for one in healthy),
            mean(one.baselines[name] for one in later),
        )
        for name in baselines_of(healthy, later)
    }
    best = max(shares.values(), key=lambda pair: pair[1] - pair[0], default=(math.nan, math.nan))
    delays = [one.delay for one in later if one.found]
    stopped = [one.stopped is not None for one in healthy]
    wrong = [bool(one.wrong) for one in healthy]
    return {
        "healthy_runs": len(healthy),
        "kinds": len({one.run["kind"] for one in healthy}),
        "stopped_runs": sum(stopped),
        "stopped": mean(stopped),
        "stopped_bounds": bounds(sum(stopped), len(healthy)),
        "wrongly_stopped": mean(one.wrongly_stopped for one in healthy),
        "wrong_alarms": sum(len(one.wrong) for one in healthy),
        "runs_with_wrong_alarms": mean(wrong),
        "wrong_bounds": bounds(sum(wrong), len(healthy)),
        "wrong_by_spacing": tally(healthy, lambda one: str(spacing_of(one))),
        "wrong_by_kind": tally(healthy, lambda one: one.run["kind"]),
        "called_unhealthy": mean(one.state == "unhealthy" for one in healthy),
        "by_chance": mean(one.late[start] for one in healthy for start in (EARLY, LATE)),
        "faults": len(later),
        "found": mean(one.found for one in later),
        "stopped_by_faults": mean(one.stopped for one in later),
        "named": mean(one.named for one in later),
        "data_faults": len(data),
        "data_found": mean(one.as_data for one in data),
        "start_faults": len(start),
        "start_faults_found": sum(one.found for one in start),
        "start_kind_least": min(
            (mean(kind) for name in FROM_THE_START if (kind := [one.found for one in start if one.fault == name])),
            default=math.nan,
        ),
        "start_found": mean(one.found for one in start),
        "delay": statistics.median(delays) if delays else math.nan,
        "baselines": list(shares.values()),
        "baseline_stopped": best[0],
        "baseline_found": best[1],
    }


def mean(flags: Iterable[Any]) -> float:
    """Returns the share of what is true; nan where there is nothing."""
    held = [bool(flag) for flag in flags]
    return sum(held) / len(held) if held else math.nan


def judge(runs: Iterable[Record], verbose: bool = False) -> dict[str, Any]:
    """Judges runs, prints the table and returns the figures; runs that did not learn, and their faults, are left out."""
    healthy: list[Healthy] = []
    faulty: list[Faulty] = []
    unlearnt: list[str] = []
    for run in runs:
        if run["fault"]:
            faulty.append(judged_faulty(run, None))
            continue
        if not has_learnt(run["truth"]):
            unlearnt.append(f"{run['kind']} {run['seed']}")
            continue
        healthy.append(judged_healthy(run))
        faulty += [judged_faulty(run, fault) for fault in run["faults"]]
    if unlearnt:
        print(f"left out, since they did not learn without a fault either: {', '.join(unlearnt)}")
    for line in lines(healthy, faulty, verbose):
        print(line)
    return figures(healthy, faulty)


def as_line(found: dict[str, Any]) -> str:
    """Returns figures as one line of JSON."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(part) for part in value]
        return None if value != value else round(value, 4)

    return json.dumps(rounded(found))
