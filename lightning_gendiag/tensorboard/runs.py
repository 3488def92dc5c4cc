"""Reads the records of runs from TensorBoard's data provider and turns them into the replies that the page expects.

Records are kept after they are read, and decoded when they are first used. So a new request reads only tags that changed,
and decodes only the evaluations that its reply has.
"""

from __future__ import annotations

import json
import math
import re
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
from tensorboard import errors
from tensorboard.data.provider import RunTagFilter

from lightning_gendiag.tensorboard.records import PLUGIN, PREFIX, REPORT, Picture, Record, finite, unpacked

TAG = re.compile(rf"{PREFIX}/(?P<monitor>.+)/(?P<kind>setup|values|frame)(_\w+)?", re.S)
"""Tags of a monitor's records."""

TAGS_AT_ONCE = 200
"""Number of tags in one query, since a reply of TensorBoard's data server has at most 256 MB."""

OPEN_RUNS = 8
"""Number of runs whose values are kept in memory, the ones that were used last."""

NEIGHBOURS = 3
"""Number of frames before and after a frame that are read with it, those of the other monitors too: the page asks for them
next, and one query for many frames takes as long as one for a single frame."""

FRAMES_KEPT = 256
"""Number of frames of a run that are kept in memory, the ones that were used last."""

UNKNOWN_SERIES = {"role": "record", "quantity": "", "unit": "", "label": "", "index": None}
"""What a series is where no setup says it."""

NO_RUNS = (
    "No run in this log directory has records for this tab. "
    "A run has some as soon as a diagnostic of lightning_gendiag has logged its first evaluation to TensorBoard."
)


class Stamp(NamedTuple):
    """Changes whenever a tag has a new record."""

    wall: float
    """When the newest record of the tag was written; unix seconds."""
    step: int
    """Largest step of its records."""


class Source(NamedTuple):
    """TensorBoard's data as one request sees it."""

    provider: Any
    context: Any
    experiment: str

    def stamps(self, run: str | None = None) -> dict[str, dict[str, Stamp]]:
        """Returns the stamps of our tags, by run, of all runs or of one."""
        listing = self.provider.list_tensors(
            self.context,
            experiment_id=self.experiment,
            plugin_name=PLUGIN,
            run_tag_filter=None if run is None else RunTagFilter(runs=[run]),
        )
        ours = {
            name: {
                tag: Stamp(one.max_wall_time, one.max_step) for tag, one in tags.items() if tag.startswith(f"{PREFIX}/")
            }
            for name, tags in listing.items()
        }
        return {name: tags for name, tags in ours.items() if tags}

    def read(self, run: str, tags: Sequence[str]) -> Iterator[tuple[str, list[Entry]]]:
        """Yields each tag with its records."""
        for first in range(0, len(tags), TAGS_AT_ONCE):
            found = self.provider.read_tensors(
                self.context,
                experiment_id=self.experiment,
                plugin_name=PLUGIN,
                downsample=1000,
                run_tag_filter=RunTagFilter(runs=[run], tags=tags[first : first + TAGS_AT_ONCE]),
            )
            for tag, data in found.get(run, {}).items():
                yield tag, [Entry(one.wall_time, one.step, one.numpy) for one in data]


class Entry:
    """A record with its time and step, which is decoded when it is first used."""

    __slots__ = ("_parts", "_record", "fault", "step", "wall")

    def __init__(self, wall: float, step: int, parts: Any) -> None:
        self.wall, self.step = wall, step
        self.fault = ""
        """Why the record cannot be read."""
        self._parts: Any = parts
        self._record: Record | None = None

    @property
    def record(self) -> Record | None:
        """The decoded record, or None if it cannot be read."""
        if self._parts is not None:
            try:
                record = unpacked(self._parts)
                if not isinstance(record.fields, dict):
                    raise ValueError("the record is damaged: it has no fields")
                self._record = record
            except Exception as error:
                # whatever lies in a file, the other records must still be shown
                self.fault = str(error) or type(error).__name__
            self._parts = None
        return self._record

    @property
    def fields(self) -> Mapping[str, Any]:
        """The plain fields of the record; none if it cannot be read."""
        return {} if self.record is None else self.record.fields


class Restarts:
    """Says which records a resumed run has replaced, from the time and step of each record.

    Where values, in the order in which they were written, go back to a step, all that was written before with this step
    or a later one is of a branch that was given up.

    Example:
        >>> restarts = Restarts([(0.0, 10), (1.0, 20), (2.0, 30), (3.0, 20)])
        >>> [restarts.replaced(0.0, 10), restarts.replaced(1.0, 20), restarts.replaced(3.0, 20)]
        [False, True, False]
    """

    def __init__(self, values: Iterable[tuple[float, int]], frames: Iterable[tuple[float, int]] = ()) -> None:
        self._walls: list[float] = []
        self._steps: list[int] = []
        newest: int | None = None
        for wall, step, is_value in sorted([*((*one, True) for one in values), *((*one, False) for one in frames)]):
            if newest is None or step >= newest:
                newest = step
            elif is_value:
                self._walls.append(wall)
                self._steps.append(step)
                newest = step
        # the smallest step to which this restart or a later one goes back
        for position in range(len(self._steps) - 2, -1, -1):
            self._steps[position] = min(self._steps[position], self._steps[position + 1])

    def after(self, wall: float) -> bool:
        """Returns whether what was written at a time may be of the branch after a restart."""
        return bool(self._walls) and wall >= self._walls[0]

    def replaced(self, wall: float, step: int) -> bool:
        """Returns whether a record was replaced, by the time at which it was written and its step."""
        later = bisect_right(self._walls, wall)
        return later < len(self._walls) and step >= self._steps[later]


class FrameKey(NamedTuple):
    """Where a frame is."""

    step: int
    wall: float
    tag: str


class Run:
    """What is known of a run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = ""
        self.timelines: dict[str, list[Entry]] = {}
        """Evaluations of each monitor by step, without those that were replaced."""
        self.frames: dict[str, list[FrameKey]] = {}
        """Frames of each monitor by step, without those that were replaced."""
        self._stamps: dict[str, Stamp] = {}
        self._kinds: dict[str, list[str]] = {}
        self._monitors: dict[str, str] = {}
        self._read: dict[str, Stamp] = {}
        self._entries: dict[str, list[Entry]] = {}
        self._decoded: OrderedDict[FrameKey, Entry] = OrderedDict()
        self._indexed = ""

    def refresh(self, stamps: dict[str, Stamp]) -> None:
        """Takes the newest listing of the run's tags."""
        if stamps == self._stamps:
            return
        self._stamps = stamps
        self._kinds, self._monitors = {}, {}
        for match in map(TAG.fullmatch, stamps):
            if match:
                self._kinds.setdefault(match["kind"], []).append(match[0])
                self._monitors[match[0]] = match["monitor"]
        self._entries = {tag: entries for tag, entries in self._entries.items() if tag in stamps}
        self._read = {tag: stamp for tag, stamp in self._read.items() if tag in stamps}
        self.version = f"{zlib.crc32(repr(sorted(stamps.items())).encode()):08x}"

    @property
    def monitors(self) -> list[str]:
        """Names of the monitors."""
        return sorted(set(self._monitors.values()))

    def tags(self, kind: str) -> list[str]:
        """Returns the tags of one kind: setup, values or frame."""
        return self._kinds.get(kind, [])

    def load(self, source: Source, tags: Iterable[str]) -> None:
        """Reads those of some tags that changed since they were read."""
        changed = [tag for tag in tags if tag in self._stamps and self._read.get(tag) != self._stamps[tag]]
        stamps = {tag: self._stamps[tag] for tag in changed}
        for tag, entries in source.read(self.name, changed):
            self._entries[tag] = sorted(entries, key=lambda entry: entry.wall)
            self._read[tag] = stamps[tag]

    def load_all(self, source: Source) -> None:
        """Reads all records but frames, of which it finds out the steps."""
        if self._indexed == self.version:
            return
        values = self.tags("values")
        self.load(source, [REPORT, *self.tags("setup"), *values])
        frames = self.tags("frame")
        entries = [(tag, entry) for tag in values for entry in self._entries.get(tag, [])]
        written = [(entry.wall, entry.step) for _, entry in entries]
        # the data server drops replaced records of the tags that were written again; those of other tags tell of a restart
        restarts = Restarts(written, (self._stamps[tag] for tag in frames))
        keys = self._frame_keys(source, restarts)
        restarts = Restarts(written, ((key.wall, key.step) for key in keys))

        timelines: dict[str, dict[int, Entry]] = {}
        for tag, entry in sorted(entries, key=lambda pair: pair[1].wall):
            if not restarts.replaced(entry.wall, entry.step):
                timelines.setdefault(self._monitors[tag], {})[entry.step] = entry
        self.timelines = {name: [entry for _, entry in sorted(line.items())] for name, line in timelines.items()}

        found: dict[str, dict[int, FrameKey]] = {}
        for key in sorted(keys, key=lambda key: key.wall):
            if not restarts.replaced(key.wall, key.step):
                found.setdefault(self._monitors[key.tag], {})[key.step] = key
        self.frames = {name: [key for _, key in sorted(line.items())] for name, line in found.items()}
        self._indexed = self.version

    def _frame_keys(self, source: Source, restarts: Restarts) -> list[FrameKey]:
        """Returns the keys of all frames, those that were replaced too; reads the frames of tags that may have both."""
        tags = self.tags("frame")
        # the listing of a tag has its largest step, which after a restart may be that of a replaced frame
        unsure = [tag for tag in tags if restarts.after(self._stamps[tag].wall)]
        changed = [tag for tag in unsure if self._read.get(tag) != self._stamps[tag]]
        for tag, entries in source.read(self.name, changed):
            # without their content, which is large
            self._entries[tag] = [Entry(entry.wall, entry.step, None) for entry in entries]
            self._read[tag] = self._stamps[tag]
        exact = [FrameKey(one.step, one.wall, tag) for tag in unsure for one in self._entries.get(tag, [])]
        sure = set(tags) - set(unsure)
        return [*exact, *(FrameKey(self._stamps[tag].step, self._stamps[tag].wall, tag) for tag in tags if tag in sure)]

    def newest(self, tag: str) -> Entry | None:
        """Returns the newest record of a tag that can be read."""
        return next((entry for entry in reversed(self._entries.get(tag, [])) if entry.record is not None), None)

    def setup(self, monitor: str) -> Entry | None:
        """Returns what does not change from one evaluation of a monitor to the next."""
        return self.newest(f"{PREFIX}/{monitor}/setup")

    def report(self) -> dict[str, Any] | None:
        """Returns the newest report."""
        newest = self.newest(REPORT)
        if newest is None:
            return None
        state, alarms = newest.fields.get("state"), newest.fields.get("alarms")
        return {
            **newest.fields,
            "state": state if isinstance(state, str) else "not judged",
            "alarms": [alarm for alarm in alarms if isinstance(alarm, dict)] if isinstance(alarms, list) else [],
            # a record has six digits of a number, which is too few for a time
            "time": newest.wall,
        }

    def newest_step(self, source: Source) -> int | None:
        """Returns the step of the newest evaluation, for which it reads one tag at most."""
        for kind in ("values", "frame"):
            tags = self.tags(kind)
            if tags:
                tag = max(tags, key=lambda tag: self._stamps[tag])
                if kind == "values":
                    self.load(source, [tag])
                    if self._entries.get(tag):
                        return self._entries[tag][-1].step
                return self._stamps[tag].step
        return None

    def frame(self, source: Source, key: FrameKey) -> Entry | None:
        """Returns a frame, or None if it is gone."""
        if key not in self._decoded:
            wanted = [key]
            for keys in self.frames.values():
                position = bisect_right([one.step for one in keys], key.step)
                wanted += keys[max(position - 1 - NEIGHBOURS, 0) : position + NEIGHBOURS]
            self._read_frames(source, [one for one in wanted if one not in self._decoded])
        if key not in self._decoded:
            return None
        self._decoded.move_to_end(key)
        while len(self._decoded) > FRAMES_KEPT:
            self._decoded.popitem(last=False)
        return self._decoded[key]

    def _read_frames(self, source: Source, keys: Sequence[FrameKey]) -> None:
        wanted = set(keys)
        for tag, entries in source.read(self.name, sorted({key.tag for key in wanted})):
            for entry in entries:
                key = FrameKey(entry.step, entry.wall, tag)
                if key in wanted:
                    self._decoded[key] = entry

    def faults(self) -> list[str]:
        """Returns why records that were used could not be read."""
        entries = [entry for tag in self._entries.values() for entry in tag]
        return [entry.fault for entry in (*entries, *self._decoded.values()) if entry.fault]


class Reader:
    """Answers the requests of the page; keeps what it has read.

    Replies are JSON without NaN.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], Run] = {}
        self._open: OrderedDict[tuple[str, str], Run] = OrderedDict()
        self._lock = threading.Lock()

    def runs(self, source: Source) -> str:
        """Returns all runs that have records of ours, in natural order, and a note on what could not be read."""
        with self._lock:
            listing = source.stamps()
            for key in [key for key in self._runs if key[0] == source.experiment and key[1] not in listing]:
                self._open.pop(key, None)
                del self._runs[key]
            entries, faults = [], []
            for name in sorted(listing, key=natural):
                run = self._runs.setdefault((source.experiment, name), Run(name))
                run.refresh(listing[name])
                entries.append(self._summary(source, run))
                faults += run.faults()
            note = _note(faults) if listing else NO_RUNS
            return plain({"runs": entries, "note": note})

    @staticmethod
    def _summary(source: Source, run: Run) -> dict[str, Any]:
        run.load(source, [REPORT])
        report = run.report() or {"state": "not judged", "summary": "", "alarms": []}
        return {
            "run": run.name,
            "state": report["state"],
            "summary": report.get("summary", ""),
            "step": run.newest_step(source),
            "alarms": sum(alarm.get("recovered") is None for alarm in report["alarms"]),
            "monitors": run.monitors,
            "version": run.version,
        }

    def run(self, source: Source, name: str, points: int) -> str:
        """Returns the report of a run and all its series, at some of its evaluations if it has more than ``points``.

        Raises:
            tensorboard.errors.NotFoundError: If there is no such run.
        """
        with self._lock:
            run = self._loaded(source, name, fresh=True)
            report = run.report()
            kept = alarm_steps(report)
            monitors = {monitor: _monitor_reply(run, monitor, points, kept) for monitor in run.monitors}
            reply = {"run": name, "version": run.version, "report": report, "monitors": monitors}
            return plain({**reply, "note": _note(run.faults())})

    def frame(self, source: Source, name: str, monitor: str, step: int) -> str:
        """Returns the newest frame of a monitor at or before a step, or its first one.

        Raises:
            tensorboard.errors.NotFoundError: If there is none.
        """
        with self._lock:
            for fresh in (False, True):
                run = self._loaded(source, name, fresh)
                keys = run.frames.get(monitor, [])
                timeline = run.timelines.get(monitor, [])
                if not fresh and not (timeline and step <= timeline[-1].step):
                    # the run may have gone on since it was read
                    continue
                position = max(bisect_right([key.step for key in keys], step), 1)
                for key in [*reversed(keys[:position]), *keys[position:]]:
                    entry = run.frame(source, key)
                    if entry is not None and entry.record is not None:
                        return plain(_frame_reply(name, monitor, entry, entry.record))
            raise errors.NotFoundError(f"the monitor {monitor!r} of the run {name!r} has no frame")

    def picture(self, source: Source, name: str, monitor: str, picture: str, step: int | None) -> Picture:
        """Returns a picture of the frame of a step, or of the setup without a step.

        Raises:
            tensorboard.errors.NotFoundError: If there is none.
        """
        with self._lock:
            for fresh in (False, True):
                run = self._loaded(source, name, fresh)
                if step is None:
                    entry = run.setup(monitor)
                else:
                    key = next((key for key in run.frames.get(monitor, []) if key.step == step), None)
                    entry = None if key is None else run.frame(source, key)
                record = None if entry is None else entry.record
                if record is not None and picture in record.pictures:
                    return record.pictures[picture]
            raise errors.NotFoundError(f"the monitor {monitor!r} of the run {name!r} has no picture {picture!r} there")

    def _loaded(self, source: Source, name: str, fresh: bool) -> Run:
        """Returns a run with all its values, as it is now or as it was when it was last read."""
        key = (source.experiment, name)
        if fresh or key not in self._open:
            stamps = source.stamps(name).get(name)
            if stamps is None:
                raise errors.NotFoundError(f"no run {name!r} has records of lightning_gendiag")
            run = self._runs.setdefault(key, Run(name))
            run.refresh(stamps)
            run.load_all(source)
            self._open[key] = run
        self._open.move_to_end(key)
        while len(self._open) > OPEN_RUNS:
            del self._runs[self._open.popitem(last=False)[0]]
        return self._open[key]


def natural(name: str) -> tuple[list[int | str], str]:
    """Returns the key that sorts numbers in names by their value.

    Example:
        >>> sorted(["version_10", "version_2", "b/1"], key=natural)
        ['b/1', 'version_2', 'version_10']
    """
    # parts of text and numbers take turns, so that only like is compared with like
    parts: list[int | str] = [
        int(part) if part.isdecimal() else part.casefold() for part in re.split(r"([0-9]{1,18})", name)
    ]
    return parts, name


def alarm_steps(report: dict[str, Any] | None) -> set[int]:
    """Returns the steps at which alarms were raised and at which they began."""
    found = [alarm.get(name) for alarm in (report or {"alarms": []})["alarms"] for name in ("step", "since")]
    return {step for step in found if isinstance(step, int)}


def downsampled(entries: Sequence[Entry], points: int, kept: Collection[int]) -> list[Entry]:
    """Returns at most ``points`` evenly spaced entries, the last one among them, and those at the steps that must be kept.

    Example:
        >>> [entry.step for entry in downsampled([Entry(0.0, step, None) for step in range(10)], 3, {5})]
        [0, 4, 5, 9]
    """
    if len(entries) <= points:
        return list(entries)
    even = set(np.linspace(len(entries) - 1, 0, points).round().astype(int).tolist())
    return [entry for position, entry in enumerate(entries) if position in even or entry.step in kept]


def plain(reply: Any) -> str:
    """Returns JSON; null replaces numbers that are not finite, which JSON does not have."""
    try:
        return json.dumps(reply, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(finite(reply), allow_nan=False, separators=(",", ":"))


def _note(faults: Sequence[str]) -> str:
    if not faults:
        return ""
    were = "1 record was" if len(faults) == 1 else f"{len(faults)} records were"
    return f"{were} left out. The reason for the first: {faults[0]}"


def _monitor_reply(run: Run, monitor: str, points: int, kept: Collection[int]) -> dict[str, Any]:
    timeline = run.timelines.get(monitor, [])
    chosen = downsampled(timeline, points, kept)
    while any(entry.record is None for entry in chosen):
        timeline = [entry for entry in timeline if not entry.fault]
        chosen = downsampled(timeline, points, kept)
    setup = run.setup(monitor)
    declared = {} if setup is None else setup.fields
    series = _series(declared.get("series"))
    parts = ("values", "severities", "extra")
    rows = {name: [_dictionary(entry.fields.get(name)) for entry in chosen] for name in parts}
    names = dict.fromkeys(one["name"] for one in series)
    undeclared = [name for name in dict.fromkeys(name for row in rows["values"] for name in row) if name not in names]
    series += [{"name": name, **UNKNOWN_SERIES} for name in undeclared]
    described: dict[str, Any] = {}
    if setup is not None and setup.record is not None:
        pictures = _pictures(run.name, monitor, setup, setup.record, "setup")
        described = {**declared, **_lists(setup.record), "pictures": pictures}
    values = {one["name"]: [_value(row.get(one["name"])) for row in rows["values"]] for one in series}
    severities: dict[str, list[Any]] = {}
    for one in series:
        judged = [_value(row.get(one["name"])) for row in rows["severities"]]
        one["worse"] = _worse(values[one["name"]], judged)
        if one["worse"] == "severe":
            severities[one["name"]] = judged
    return {
        "diagnostic": declared.get("diagnostic"),
        "setup": described,
        "series": series,
        "evaluations": len(timeline),
        "steps": [entry.step for entry in chosen],
        "epochs": [entry.fields.get("epoch") for entry in chosen],
        "values": values,
        "severities": severities,
        "extra": {
            name: [row.get(name) for row in rows["extra"]]
            for name in dict.fromkeys(n for row in rows["extra"] for n in row)
        },
        "frames": [key.step for key in run.frames.get(monitor, [])],
    }


def _frame_reply(run: str, monitor: str, entry: Entry, record: Record) -> dict[str, Any]:
    pictures = _pictures(run, monitor, entry, record, entry.step)
    return {**record.fields, "step": entry.step, "arrays": _lists(record), "pictures": pictures}


def _pictures(run: str, monitor: str, entry: Entry, record: Record, step: int | str) -> dict[str, Any]:
    """Returns the address and size of each picture; the time in the address changes when the picture is replaced."""
    where = {"run": run, "monitor": monitor, "step": step, "time": f"{entry.wall:.6f}"}
    return {
        name: {"url": f"picture?{urlencode({**where, 'name': name})}", "width": one.width, "height": one.height}
        for name, one in record.pictures.items()
    }


def _lists(record: Record) -> dict[str, Any]:
    return {name: finite(array.tolist()) for name, array in record.arrays.items() if array.dtype.kind in "biuf"}


def _series(declared: Any) -> list[dict[str, Any]]:
    found = declared if isinstance(declared, list) else []
    return [{**UNKNOWN_SERIES, **one} for one in found if isinstance(one, dict) and isinstance(one.get("name"), str)]


def _worse(values: Sequence[Any], severities: Sequence[Any]) -> str:
    """Returns which way a series is worse: up, down, by its severity, which is sent then, or unknown."""
    pairs = [(v, s) for v, s in zip(values, severities, strict=True) if v is not None and s is not None]
    if not pairs:
        return ""
    for name, sign in (("up", 1), ("down", -1)):
        if all(math.isclose(sign * v, s, rel_tol=1e-4, abs_tol=1e-9) for v, s in pairs):
            return name
    return "severe"


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None
