"""Compares two runs by what they wrote for TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_gendiag.detection.comparison import CONFIDENCE, Change, Track, compared, in_words
from lightning_gendiag.plots import canvas, charts
from lightning_gendiag.tensorboard.files import Monitored, RunFiles, read_run

SHOWN, CAPTION, ROW = 12, 32, 62
"""Largest numbers of differences in words below the figure, and of characters of a caption and of such a line."""


class Comparison(NamedTuple):
    """How a second run differs from a first one."""

    first: str
    """Folder of the first run."""
    second: str
    """Folder of the second run."""
    changes: dict[str, list[Change]]
    """Of each series that both have, by the name of the monitor."""
    states: tuple[str, str]
    """Of the runs' reports; empty where there is none."""
    missing: list[str]
    """Monitors that one run lacks, and those whose regions are others."""

    @property
    def summary(self) -> str:
        """What is worse and what is better in the second run, in sentences."""
        states = [f"{run} is {state}." for run, state in zip(self[:2], self.states, strict=True) if state]
        left_out = [f"Not in both: {', '.join(self.missing)}."] if self.missing else []
        return " ".join([f"{self.second} against {self.first}:", in_words(self.changes), *states, *left_out])

    @property
    def table(self) -> str:
        """All series as markdown, with the difference of their severities and its interval."""
        lines = [
            "| diagnostic | series | quantity | first | second | worse by | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for monitor, changes in self.changes.items():
            for one in changes:
                by = "" if math.isnan(one.difference) else f"{one.difference:+.2f} ± {one.margin:.2f}"
                lines.append(
                    f"| {monitor} | {one.name} | {one.quantity} | {one.first:.3f} | {one.second:.3f} | {by} | {one.verdict} |"
                )
        return "\n".join(lines)

    def figure(self) -> Tensor:
        """Draws the second run as bars and the first one as lines across them, (H, W, 3) uint8; worse series in red."""
        tiles, rows = [], []
        for monitor, changes in self.changes.items():
            # bars of one axis have one unit
            group = [one for one in changes if one.quantity == changes[0].quantity]
            known = [one for one in group if math.isfinite(one.first) and math.isfinite(one.second)]
            if len(known) > 1:
                tiles.append(canvas.Tile(f"{monitor}: {known[0].quantity}"[:CAPTION], _bars(known)))
            for one in changes:
                if one.verdict in ("worse", "better"):
                    text = f"{monitor}: {one.name} {one.verdict}, {one.second:.3g} against {one.first:.3g}"
                    rows.append(canvas.Row(canvas.ALARM if one.verdict == "worse" else canvas.INK, text[:ROW]))
        empty = canvas.Tile("no series in common", canvas.picture_of(canvas.blank_tile()[0]))
        note = f"{len(rows) - SHOWN} more differ." if len(rows) > SHOWN else ""
        title = f"{_last(self.second)} (bars) against {_last(self.first)} (lines)"
        # red ones first
        rows.sort(key=lambda row: row.colour != canvas.ALARM)
        return canvas.panel(title, tiles or [empty], rows[:SHOWN], note)


def compare_runs(first: str | Path, second: str | Path, confidence: float = CONFIDENCE) -> Comparison:
    """Compares the newest evaluations of two runs, series by series.

    Args:
        first: Folder with the event files of a run, such as ``lightning_logs/version_0``.
        second: The same of the run that is compared with it.
        confidence: Confidence of all statements about one diagnostic together, in (0, 1).

    Returns:
        The changes; ``summary``, ``table`` and ``figure()`` show them.

    Raises:
        FileNotFoundError: If a folder has no event files with evaluations.
        ValueError: If ``confidence`` is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}. To fix this, pass a number such as 0.95.")
    runs = read_run(first), read_run(second)
    common = [name for name in runs[0].monitors if name in runs[1].monitors]
    changes = {
        name: compared(_tracks(runs[0].monitors[name]), _tracks(runs[1].monitors[name]), confidence) for name in common
    }
    others = [name for name in common if runs[0].monitors[name].regions != runs[1].monitors[name].regions]
    for name in others:
        # one name, and other pixels
        changes[name] = [one for one in changes.get(name, []) if _role(runs[0].monitors[name], one.name) != "component"]
    missing = sorted(runs[0].monitors.keys() ^ runs[1].monitors.keys()) + [
        f"the same regions in {name}" for name in others
    ]
    changes = {name: some for name, some in changes.items() if some}
    return Comparison(str(first), str(second), changes, (_state(runs[0]), _state(runs[1])), missing)


def _role(monitored: Monitored, series: str) -> str:
    return str(monitored.series.get(series, {}).get("role", ""))


def _state(run: RunFiles) -> str:
    return str((run.report or {}).get("state", ""))


def _tracks(monitored: Monitored) -> dict[str, Track]:
    """The series that have a severity, by which better and worse are told apart."""
    names = dict.fromkeys(name for fields in monitored.evaluations for name in fields.get("severities", {}))
    tracks = {}
    for name in names:
        rows = [fields for fields in monitored.evaluations if name in fields.get("severities", {})]
        described = monitored.series.get(name, {})
        tracks[name] = Track(
            [_number(fields["values"].get(name)) for fields in rows],
            [_number(fields["severities"][name]) for fields in rows],
            str(described.get("quantity", "")),
            float(described.get("min_std", 0.0)),
            float(described.get("min_delta", 0.0)),
        )
    return tracks


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _bars(known: list[Change]) -> Tensor:
    names = [one.name.split()[-1] if one.name.split()[-1].isdigit() else str(n) for n, one in enumerate(known)]
    return charts.bars(
        [one.second for one in known],
        names,
        [one.verdict == "worse" for one in known],
        floor=0.0 if all(min(one.first, one.second) >= 0 for one in known) else None,
        targets=[one.first for one in known],
    )


def _last(run: str) -> str:
    """The end of a path, which tells two runs apart and fits in a title."""
    return "/".join(Path(run).parts[-2:])
