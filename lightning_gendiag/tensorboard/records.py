"""How what the tab shows lies in an event file: compressed records, of which TensorBoard drops none.

A record is a string tensor: a JSON header, then one blob for each array and picture. TensorBoard keeps ten or a hundred
tensors of a tag, and always the newest. So values of evaluations go to a new tag after every ten, pictures have a tag of
their own at each evaluation that has some, and what replaces itself keeps one tag.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLUGIN = "gendiag"
"""Name of the plugin in TensorBoard."""

PREFIX = "gendiag/tab"
"""First part of the tags of all records."""

REPORT = f"{PREFIX}/report"
"""Tag of the report."""

VERSION = 1
"""Of the records; readers leave out what is newer than they know."""

BLOCK = 10
"""Number of records in one tag; TensorBoard keeps as many of each."""

Kind = Literal["PNG", "JPEG"]
"""How pictures are encoded."""

LOSSLESS = 1 << 13
"""Pictures of more pixels are stored as JPEG and not as PNG, which takes ten times as long and twice the bytes."""


class Picture(NamedTuple):
    """An encoded picture."""

    content: bytes
    kind: str
    """Its media type."""
    width: int
    height: int


class Record(NamedTuple):
    """What one record holds."""

    fields: Mapping[str, Any] = {}
    """Plain numbers, strings, lists and dictionaries; numbers that are not finite are None."""
    arrays: Mapping[str, NDArray[Any]] = {}
    pictures: Mapping[str, Picture] = {}


def setup_tag(monitor: str) -> str:
    """Returns the tag of what does not change from one evaluation to the next."""
    return f"{PREFIX}/{monitor}/setup"


def values_tag(monitor: str, place: int, fit: str = "0") -> str:
    """Returns the tag of the values of an evaluation.

    Args:
        monitor: Name of the monitor.
        place: Of the record among those of this fit, counted from 0.
        fit: Letters and digits, other ones in each fit; a resumed run may evaluate again what it had evaluated, and would
            fill tags with more than is kept.

    Example:
        >>> values_tag("cms", 9), values_tag("cms", 10)
        ('gendiag/tab/cms/values_0_0', 'gendiag/tab/cms/values_0_1')
    """
    return f"{PREFIX}/{monitor}/values_{fit}_{place // BLOCK}"


def frame_tag(monitor: str, number: int) -> str:
    """Returns the tag of the pictures and larger arrays of an evaluation, by its number."""
    return f"{PREFIX}/{monitor}/frame_{number}"


def picture(pixels: NDArray[np.uint8]) -> Picture:
    """Encodes pixels (H, W) or (H, W, 3) uint8, without loss unless they are many."""
    height, width = pixels.shape[:2]
    kind: Kind = "PNG" if width * height <= LOSSLESS else "JPEG"
    return Picture(_encoded(pixels, kind), f"image/{kind.lower()}", width, height)


def _encoded(pixels: NDArray[np.uint8], kind: Kind) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=90)
    return buffer.getvalue()


def packed(record: Record) -> list[bytes]:
    """Returns a record as byte strings.

    Example:
        >>> record = Record({"step": 3, "values": {"top": float("nan")}}, {"labels": np.zeros((2, 2), np.uint8)})
        >>> again = unpacked(packed(record))
        >>> again.fields, again.arrays["labels"].shape
        ({'step': 3, 'values': {'top': None}}, (2, 2))
    """
    fields, arrays, pictures = record
    header = {
        "version": VERSION,
        "fields": finite(fields),
        "arrays": [[name, array.dtype.newbyteorder("<").str, list(array.shape)] for name, array in arrays.items()],
        "pictures": [[name, one.kind, one.width, one.height] for name, one in pictures.items()],
    }
    return [
        zlib.compress(json.dumps(header, separators=(",", ":")).encode()),
        *(zlib.compress(np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes()) for a in arrays.values()),
        *(one.content for one in pictures.values()),
    ]


def unpacked(parts: Sequence[bytes]) -> Record:
    """Returns what :func:`packed` made.

    Raises:
        ValueError: If the record is of a newer version, or damaged.
    """
    try:
        header = json.loads(zlib.decompress(parts[0]))
        version = int(header["version"])
        if version <= VERSION:
            blobs = iter(parts[1:])
            arrays = {
                name: np.frombuffer(zlib.decompress(next(blobs)), kind).reshape(shape)
                for name, kind, shape in header["arrays"]
            }
            pictures = {name: Picture(next(blobs), kind, w, h) for name, kind, w, h in header["pictures"]}
            return Record(header["fields"], arrays, pictures)
    except (KeyError, TypeError, IndexError, StopIteration, ValueError, RuntimeError, zlib.error) as error:
        raise ValueError(f"the record is damaged: {type(error).__name__}: {error}") from error
    raise ValueError(f"version must be at most {VERSION}, got {version}. To fix this, update lightning_gendiag.")


def finite(value: Any) -> Any:
    """Returns plain data in which None replaces numbers that are not finite, which JSON has not, and floats are short.

    Example:
        >>> finite({"a": [1.23456789, float("inf")], "b": "text"})
        {'a': [1.23457, None], 'b': 'text'}
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value


def summary(tag: str, parts: Sequence[bytes]) -> Any:
    """Returns a record as TensorBoard's ``Summary``, which a file writer's ``add_summary`` takes."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=json.dumps({"version": VERSION}).encode())
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(parts))])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=parts)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def image_summary(tag: str, pixels: NDArray[np.uint8]) -> Any:
    """Returns pixels (H, W, 3) as TensorBoard's ``Summary`` of an image, in half the time of ``SummaryWriter.add_image``."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width, channels = pixels.shape
    encoded = _encoded(pixels, "PNG")
    image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
