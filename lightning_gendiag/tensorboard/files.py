"""Reads the records of one run from its event files, without TensorBoard's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning_gendiag.tensorboard.records import PREFIX, REPORT, Record, setup_tag, unpacked
from lightning_gendiag.tensorboard.runs import TAG, Restarts


class Monitored(NamedTuple):
    """What one monitor wrote."""

    series: dict[str, dict[str, Any]]
    """Each series by name, as the setup describes it."""
    evaluations: list[dict[str, Any]]
    """Fields of each evaluation, by step."""
    regions: bytes = b""
    """The map of its regions; empty where it has none."""


class RunFiles(NamedTuple):
    """What a run wrote for the tab."""

    monitors: dict[str, Monitored]
    report: dict[str, Any] | None
    """The newest one."""


def read_run(folder: str | Path) -> RunFiles:
    """Reads what a run wrote for the tab.

    Args:
        folder: With the event files of one run, such as ``lightning_logs/version_3``.

    Raises:
        FileNotFoundError: If the folder has no event files, or none with evaluations.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    folder = Path(folder)
    paths = sorted(folder.glob("*tfevents*"))
    if not paths:
        inside = sorted({str(path.parent) for path in folder.rglob("*tfevents*")}) if folder.is_dir() else []
        choice = f"one of {', '.join(inside[:6])}" if inside else "the folder that TensorBoard's logger writes to"
        raise FileNotFoundError(f"run must be a folder with event files, got {folder}. To fix this, pass {choice}.")
    written: dict[str, list[tuple[float, int, Record]]] = {}
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith(f"{PREFIX}/") and "/frame_" not in value.tag:
                    try:
                        record = unpacked(list(value.tensor.string_val))
                    except ValueError:
                        # one that is damaged leaves the others readable
                        continue
                    written.setdefault(value.tag, []).append((event.wall_time, event.step, record))
    reports = written.pop(REPORT, [])
    monitors = _monitors(written)
    if not monitors:
        raise FileNotFoundError(
            f"run must have evaluations, got none in {folder}. To fix this, train with a TensorBoardLogger and a monitor."
        )
    return RunFiles(monitors, dict(reports[-1][2].fields) if reports else None)


def _monitors(written: dict[str, list[tuple[float, int, Record]]]) -> dict[str, Monitored]:
    values = [
        (match["monitor"], wall, step, record)
        for tag, rows in written.items()
        if (match := TAG.fullmatch(tag)) and match["kind"] == "values"
        for wall, step, record in rows
    ]
    restarts = Restarts((wall, step) for _, wall, step, _ in values)
    kept: dict[str, dict[int, dict[str, Any]]] = {}
    for monitor, wall, step, record in sorted(values, key=lambda row: row[1]):
        if not restarts.replaced(wall, step):
            kept.setdefault(monitor, {})[step] = dict(record.fields)
    found = {}
    for monitor, evaluations in kept.items():
        setups = written.get(setup_tag(monitor), [])
        described = setups[-1][2].fields.get("series", []) if setups else []
        series = {one["name"]: one for one in described}
        labels = setups[-1][2].arrays.get("labels") if setups else None
        regions = b"" if labels is None else labels.tobytes()
        found[monitor] = Monitored(series, [fields for _, fields in sorted(evaluations.items())], regions)
    return found
