"""What TensorBoard reads from a log folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2


def events(folder: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0, "histograms": 0}
    )
    accumulator.Reload()
    return accumulator


def written_events(folder: str | Path) -> list[Any]:
    """Returns the records of all event files of a folder."""
    return [
        event for path in sorted(Path(folder).glob("*tfevents*")) for event in LegacyEventFileLoader(str(path)).Load()
    ]


def written_layout(accumulator: EventAccumulator) -> layout_pb2.Layout:
    proto = accumulator.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return layout_pb2.Layout.FromString(proto)
