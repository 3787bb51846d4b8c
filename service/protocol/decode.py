"""The client's side: a reply's bytes back into arrays with their description."""

from __future__ import annotations

import base64
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import orjson

from service.errors import MalformedBody, UnsupportedMedia
from service.protocol.encode import ARROW_META_KEY, META_KEY, META_MEMBER
from service.protocol.negotiate import ALIASES, ARROW, JSON, NPY, NPZ, SAFETENSORS
from service.protocol.reply import FloatArray

_DTYPES = {"F32": "<f4", "F16": "<f2", "float32": "<f4", "float16": "<f2"}
_LAYOUTS = {4: "NCHW", 3: "NLC", 2: "NC"}


@dataclass(frozen=True)
class FeatureLevel:
    """One level of a reply.

    `array` is [n, c, h, w], [n, l, c] or [n, c] and may be read-only; it is None where the reply has only
    `stats`. `index` is None in an npy reply, which says nothing but the array.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    dtype: str
    channels: int
    index: int | None = None
    stride: int | None = None
    array: FloatArray | None = None
    stats: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Features:
    """A reply to `POST /features`. `timings_ms` is empty in a binary reply, all but `levels` in an npy one.

    `request_id`, `model_id` and `etag` are from the headers, where the client has filled them in.
    """

    levels: Mapping[str, FeatureLevel]
    model: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Mapping[str, Any], ...] = ()
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    preprocess: Mapping[str, Any] | None = None
    request_id: str | None = None
    model_id: str | None = None
    etag: str | None = None

    @property
    def arrays(self) -> dict[str, FloatArray]:
        """The arrays by level name, of those levels that have one."""
        return {name: level.array for name, level in self.levels.items() if level.array is not None}


def decode(media_type: str, body: bytes) -> Features:
    """The reply in `body`.

    Args:
        media_type: its `Content-Type`; parameters are ignored.

    Raises:
        UnsupportedMedia: not a format of `DECODERS`.
        MalformedBody: the body is not what the media type says.
    """
    name = media_type.partition(";")[0].strip().lower()
    decoder = DECODERS.get(ALIASES.get(name, name))
    if decoder is None:
        raise UnsupportedMedia(f"a reply of type {name[:100]!r} cannot be read")
    try:
        return decoder(body)
    except _NOT_THE_FORMAT as error:
        raise MalformedBody(f"the reply is not valid {name}") from error


def _features(described: Mapping[str, Any], arrays: Mapping[str, FloatArray]) -> Features:
    """A description (of JSON or of a binary format's metadata) with its arrays."""
    levels = [_level(entry, arrays.get(entry["name"])) for entry in described["levels"]]
    return Features(
        levels={level.name: level for level in levels},
        model=described["model"],
        images=tuple(described["images"]),
        timings_ms=described.get("timings_ms", {}),
        preprocess=described.get("preprocess"),
    )


def _level(entry: Mapping[str, Any], array: FloatArray | None) -> FeatureLevel:
    shape = tuple(entry["shape"])
    if array is not None and (array.shape != shape or array.dtype.name != entry["dtype"]):
        raise MalformedBody(f"level {entry['name']}: the array is not of the shape and dtype described")
    return FeatureLevel(
        name=entry["name"],
        layout=entry["layout"],
        shape=shape,
        dtype=entry["dtype"],
        channels=entry["channels"],
        index=entry["index"],
        stride=entry["stride"],
        array=array,
        stats=entry.get("stats"),
    )


# --- one reader a format ------------------------------------------------------------------------


def _json(body: bytes) -> Features:
    described = orjson.loads(body)
    arrays = {entry["name"]: _json_array(entry) for entry in described["levels"] if "data" in entry}
    return _features(described, arrays)


def _json_array(entry: Mapping[str, Any]) -> FloatArray:
    data, dtype = entry["data"], _DTYPES[entry["dtype"]]
    if isinstance(data, str):
        return np.frombuffer(base64.b64decode(data, validate=True), dtype).reshape(entry["shape"])
    return np.array(data, dtype).reshape(entry["shape"])


def _npz(body: bytes) -> Features:
    with np.load(BytesIO(body), allow_pickle=False) as archive:
        described = orjson.loads(archive[META_MEMBER])
        arrays = {entry["name"]: archive[entry["name"]] for entry in described["levels"]}
    return _features(described, arrays)


def _npy(body: bytes) -> Features:
    array = np.load(BytesIO(body), allow_pickle=False)
    layout = _LAYOUTS[array.ndim]
    channels = array.shape[1] if layout == "NCHW" else array.shape[-1]
    level = FeatureLevel("0", layout, array.shape, array.dtype.name, channels, array=array)
    return Features({level.name: level})


def _safetensors(body: bytes) -> Features:
    """Arrays are read-only views of the body."""
    size = int.from_bytes(body[:8], "little")
    header = orjson.loads(body[8 : 8 + size])
    described = orjson.loads(header["__metadata__"][META_KEY])
    arrays = {
        entry["name"]: _safetensors_array(body, 8 + size, header[entry["name"]])
        for entry in described["levels"]
    }
    return _features(described, arrays)


def _safetensors_array(body: bytes, data_start: int, entry: Mapping[str, Any]) -> FloatArray:
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], np.dtype(_DTYPES[entry["dtype"]])
    count = math.prod(shape)
    if not 0 <= begin <= end <= len(body) - data_start or end - begin != count * dtype.itemsize:
        raise MalformedBody("a tensor of the reply does not lie inside it")
    return np.frombuffer(body, dtype, count, data_start + begin).reshape(shape)


def _arrow(body: bytes) -> Features:
    """Arrays are read-only views of the body."""
    import pyarrow as pa  # half a second that clients of other formats need not wait

    try:
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            described = orjson.loads((reader.schema.metadata or {})[ARROW_META_KEY])
            batch = reader.read_next_batch()
    except (pa.ArrowInvalid, OSError, StopIteration) as error:
        raise MalformedBody("the reply is not a valid Arrow stream") from error
    arrays = {entry["name"]: batch.column(entry["name"]).to_numpy_ndarray() for entry in described["levels"]}
    return _features(described, arrays)


Decoder = Callable[[bytes], Features]

DECODERS: dict[str, Decoder] = {
    JSON: _json,
    NPZ: _npz,
    NPY: _npy,
    SAFETENSORS: _safetensors,
    ARROW: _arrow,
}

# What the readers raise on bytes of another kind; the errors of JSON, base64 and Arrow are ValueErrors.
_NOT_THE_FORMAT = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    EOFError,
    OverflowError,
    RuntimeError,  # an encrypted member, a compression that is not known
    struct.error,
    zipfile.BadZipFile,
)
