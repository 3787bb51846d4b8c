"""A reply as bytes, in the five formats. Arrays never become Python lists; binary formats do not copy them."""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby
from typing import Any, Literal

import numpy as np
import orjson

from service.errors import InvalidConfig, NotAcceptable
from service.protocol.archive import Chunk, stored_archive
from service.protocol.coding import AS_IT_IS, IDENTITY, AcceptedCoding, compress
from service.protocol.negotiate import ARROW, JSON, NPY, NPZ, SAFETENSORS
from service.protocol.reply import FeatureReply, FloatArray, LevelArray, level_stats

Returns = Literal["shapes", "tensors"]
ListOrBase64 = Literal["list", "base64"]

META_MEMBER = "meta.json"
META_KEY = "reply"
ARROW_META_KEY = b"backbone_service"
DIM_NAMES = {
    "NCHW": ("channel", "height", "width"),
    "NLC": ("token", "channel"),
    "NCL": ("channel", "token"),
    "NC": ("channel",),
}

# Shortest round-trip text with its comma, measured: activations near 1 take 10.5, near 1e-3 14.
JSON_BYTES_PER_NUMBER = 14
# orjson writes a number in 15 ns, and a level's statistics take no longer.
QUICK_NUMBERS = 4096
# A description of the model without its key lists, of one level with its stats, and of zip or Arrow framing.
HEAD_BYTES = 2048
LEVEL_BYTES = 512
IMAGE_BYTES = 128

_LEVEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")
_RESERVED_NAMES = frozenset({"__metadata__"})  # safetensors


@dataclass(frozen=True)
class ReplyOptions:
    """What of a reply is sent and how JSON spells arrays; a binary reply always has the tensors."""

    returns: Returns = "shapes"
    encoding: ListOrBase64 = "list"


@dataclass(frozen=True)
class EncodedReply:
    """A body in order of its chunks; some are views of the reply's arrays, which must outlive it unchanged.

    `encode_ms` is how long encoding took, compressing in `coding` included.
    """

    chunks: tuple[Chunk, ...]
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
    encode_ms: float = 0.0
    coding: str = IDENTITY

    @property
    def size(self) -> int:
        """Bytes of the body: its Content-Length."""
        return sum(len(chunk) for chunk in self.chunks)

    @property
    def body(self) -> bytes:
        """The body in one piece; copies unless it is one chunk already."""
        return b"".join(self.chunks)


def encode(
    media_type: str, reply: FeatureReply, options: ReplyOptions, accepted: AcceptedCoding = AS_IT_IS
) -> EncodedReply:
    """The reply in the format of `ENCODERS`, compressed where that is accepted and pays.

    Raises:
        InvalidConfig: a binary format and level names that it cannot carry.
        NotAcceptable: npy and more levels than one.
    """
    if media_type != JSON:
        check_levels([level.name for level in reply.levels], media_type)
    started = time.perf_counter()
    chunks = ENCODERS[media_type](reply, options)
    coding = accepted.name if accepted.pays(sum(map(len, chunks))) else IDENTITY
    if coding != IDENTITY:
        chunks = compress(coding, chunks)
    return EncodedReply(chunks, media_type, HEADERS.get(media_type, {}), _ms_since(started), coding)


def is_quick(media_type: str, reply: FeatureReply, options: ReplyOptions) -> bool:
    """Whether encoding takes less than the tenth of a millisecond that handing it to another thread costs."""
    if media_type in (NPY, SAFETENSORS):
        return all(level.array.flags.c_contiguous for level in reply.levels)  # views and a header
    numbers = sum(level.array.size for level in reply.levels)
    return media_type == JSON and options.encoding == "list" and numbers <= QUICK_NUMBERS


def check_levels(names: Sequence[str], media_type: str) -> None:
    """Nothing, where the format can carry levels of these names; worth asking before the forward pass.

    Raises:
        InvalidConfig: a name twice, or one that is not a plain word and so no safe member of an archive.
        NotAcceptable: npy and more levels than one.
    """
    if media_type == JSON:
        return
    if media_type == NPY and len(names) != 1:
        others = ", ".join((NPZ, SAFETENSORS, ARROW))
        raise NotAcceptable(f"{NPY} holds one level and the request asks for {len(names)}; use {others}")
    if len(set(names)) != len(names):
        raise InvalidConfig("#/backbone", "two levels have the same name")
    for name in names:
        if not _LEVEL_NAME.fullmatch(name) or name in _RESERVED_NAMES:
            detail = "a level's name must be 1 to 128 letters, digits, '_', '.', ':' or '-' in a binary reply"
            raise InvalidConfig("#/backbone", detail)


# --- JSON ---------------------------------------------------------------------------------------


def _json(reply: FeatureReply, options: ReplyOptions) -> tuple[Chunk, ...]:
    """`levels` is written first, so that `timings_ms.encode` can be in the same body."""
    started = time.perf_counter()
    written = [_json_level(level, options) for level in reply.levels]
    levels = orjson.dumps(written, option=orjson.OPT_SERIALIZE_NUMPY)
    timings = reply.timings.describe()
    timings["encode"] = timings["encode"] or round(_ms_since(started), 3)
    described = reply.describe()
    del described["levels"]
    preprocess = {"preprocess": described.pop("preprocess")} if "preprocess" in described else {}
    head = orjson.dumps(described)
    tail = orjson.dumps({"timings_ms": timings, **preprocess})
    return (head[:-1] + b',"levels":', levels, b"," + tail[1:])


def _json_level(level: LevelArray, options: ReplyOptions) -> dict[str, Any]:
    if options.returns == "shapes":
        return level.describe() | {"stats": level_stats(level.array)}
    return level.describe() | {"data": _SPELLINGS[options.encoding](wire_array(level.array))}


def _as_base64(array: FloatArray) -> orjson.Fragment:
    # base64 needs no escaping: a fragment spares a decode and a scan of the whole text
    return orjson.Fragment(b'"' + base64.b64encode(raw_bytes(array)) + b'"')


def _as_list(array: FloatArray) -> FloatArray:
    return array  # orjson writes C-contiguous arrays as nested lists


_SPELLINGS: dict[str, Callable[[FloatArray], Any]] = {"list": _as_list, "base64": _as_base64}


# --- arrays as they lie in memory ---------------------------------------------------------------


def wire_array(array: FloatArray) -> FloatArray:
    """The array, C-contiguous and little-endian; itself where it already is."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def raw_bytes(array: FloatArray) -> memoryview:
    """The bytes of a C-contiguous array, not copied. `memoryview.cast` would refuse empty shapes."""
    return array.reshape(-1).view(np.uint8).data


def _npy_chunks(array: FloatArray) -> tuple[Chunk, Chunk]:
    """Header and data of a `.npy`, format version 1.0."""
    wire = wire_array(array)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(wire))
    return header.getvalue(), raw_bytes(wire)


def _npy(reply: FeatureReply, _options: ReplyOptions) -> tuple[Chunk, ...]:
    [level] = reply.levels
    return _npy_chunks(level.array)


def _npz(reply: FeatureReply, _options: ReplyOptions) -> tuple[Chunk, ...]:
    """A stored zip with `meta.json` first; fixed dates, so the same reply is the same bytes."""
    meta = (META_MEMBER, (orjson.dumps(reply.describe()),))
    arrays = [(f"{level.name}.npy", _npy_chunks(level.array)) for level in reply.levels]
    return stored_archive([meta, *arrays])


# --- safetensors --------------------------------------------------------------------------------

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16"}


def _safetensors(reply: FeatureReply, _options: ReplyOptions) -> tuple[Chunk, ...]:
    """Header length (u64), JSON header padded with spaces to 8 bytes, then the arrays end to end.

    The layout is that of the safetensors format description; the arrays are views, not copies.
    """
    arrays = [wire_array(level.array) for level in reply.levels]
    # the format allows strings only as metadata
    header: dict[str, Any] = {"__metadata__": {META_KEY: orjson.dumps(reply.describe()).decode()}}
    offset = 0
    for level, array in zip(reply.levels, arrays, strict=True):
        header[level.name] = {
            "dtype": _SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return (len(text).to_bytes(8, "little") + text, *(raw_bytes(array) for array in arrays))


# --- Arrow --------------------------------------------------------------------------------------


def _arrow(reply: FeatureReply, _options: ReplyOptions) -> tuple[Chunk, ...]:
    """An IPC stream of one record batch: a row an image, a fixed-shape tensor column a level."""
    import pyarrow as pa  # half a second and 60 MB that a service of JSON never needs

    columns = [
        pa.FixedShapeTensorArray.from_numpy_ndarray(wire_array(level.array), DIM_NAMES[level.layout])
        for level in reply.levels
    ]
    fields = [
        pa.field(level.name, column.type, nullable=False)
        for level, column in zip(reply.levels, columns, strict=True)
    ]
    schema = pa.schema(fields, metadata={ARROW_META_KEY: orjson.dumps(reply.describe())})
    sink = _ChunkSink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.chunks()


class _ChunkSink:
    """A file for Arrow that keeps what is written: text as bytes, and arrays as the buffers they already are."""

    closed = False

    def __init__(self) -> None:
        self._written: list[Any] = []

    def write(self, data: Any) -> int:
        """Keep `bytes` or a `pyarrow.Buffer`."""
        self._written.append(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def chunks(self) -> tuple[Chunk, ...]:
        """What was written, pieces of framing put together."""
        chunks: list[Chunk] = []
        for is_framing, run in groupby(self._written, lambda piece: isinstance(piece, bytes)):
            pieces = list(run)
            chunks += [b"".join(pieces)] if is_framing else [memoryview(piece) for piece in pieces]
        return tuple(chunks)


Encoder = Callable[[FeatureReply, ReplyOptions], tuple[Chunk, ...]]

ENCODERS: dict[str, Encoder] = {
    JSON: _json,
    NPZ: _npz,
    NPY: _npy,
    SAFETENSORS: _safetensors,
    ARROW: _arrow,
}

HEADERS: dict[str, Mapping[str, str]] = {
    NPZ: {"Content-Disposition": 'attachment; filename="features.npz"'},
    NPY: {"Content-Disposition": 'attachment; filename="features.npy"'},
    SAFETENSORS: {"Content-Disposition": 'attachment; filename="features.safetensors"'},
    ARROW: {"Content-Disposition": 'attachment; filename="features.arrows"'},
}


# --- how large it will be -----------------------------------------------------------------------


def reply_bytes(
    shapes: Sequence[Sequence[int]],
    dtype: str,
    media_type: str,
    returns: Returns = "shapes",
    encoding: ListOrBase64 = "list",
) -> int:
    """About how many bytes a reply will have, known from the shapes of its levels before any forward pass.

    Rather too many than too few: a JSON number counts 14 bytes with its comma.

    Args:
        shapes: the whole shape of each level, the count of images first.
        dtype: `float32` or `float16`, as returned.
        media_type: one of `ENCODERS`.
    """
    images = max((shape[0] for shape in shapes), default=0)
    frame = HEAD_BYTES + LEVEL_BYTES * len(shapes) + IMAGE_BYTES * images
    if media_type == JSON and returns == "shapes":
        return frame
    numbers = sum(math.prod(shape) for shape in shapes)
    raw = numbers * np.dtype(dtype).itemsize
    if media_type != JSON:
        return frame + raw
    return frame + (numbers * JSON_BYTES_PER_NUMBER if encoding == "list" else -(-raw * 4 // 3))


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
