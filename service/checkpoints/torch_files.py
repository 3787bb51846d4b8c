"""The two formats of `torch.save`: a zip of records, and before torch 1.6 pickles followed by raw storages.

Both are read without `torch.load`: the pickle by `service.checkpoints.pickles`, the tensors as views of a
copy of the file in memory. Nothing of the process is changed (torch's list of safe globals is one for all threads), no
memory is taken that the file does not hold, and a tensor that reaches past its storage is refused instead
of resized.

Layouts: zip `NAME/data.pkl`, `NAME/data/KEY`, `NAME/byteorder`, all stored; legacy magic number, protocol
1001, system info, object, storage keys, then for each key an int64 count and the elements (little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import BinaryIO, Final, cast

import torch
from torch import Tensor

from service.checkpoints.pickles import (
    MAX_PICKLE_BYTES,
    BoundedStream,
    DamagedPickleError,
    ForeignObjectError,
    Named,
    Vocabulary,
    load_pickle,
)

MAGIC_NUMBER: Final = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION: Final = 1001
ZIP_START: Final = b"PK\x03\x04"
LEGACY_START: Final = b"\x80\x02\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little") + b"."
MAX_DIRECTORY_BYTES: Final = 32 * 2**20
MAX_ELEMENTS: Final = 2**48
MAX_DIMENSIONS: Final = 16

DTYPES: Final[Mapping[str, torch.dtype]] = {
    str(dtype): dtype
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}
STORAGES: Final[Mapping[str, torch.dtype]] = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.BoolStorage": torch.bool,
    "torch.UntypedStorage": torch.uint8,
    "torch.storage.UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """`count` elements from element `start` of the storage called `key`."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as its pickle describes it; nothing is checked before `Storages.tensor`."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: object
    size: object
    stride: object


@dataclass(frozen=True)
class Storages:
    """The file in memory and where in it each storage lies: key → (first byte, bytes)."""

    mapped: mmap.mmap
    places: Mapping[str, tuple[int, int]]

    def tensor(self, record: TensorRecord) -> Tensor:
        """The tensor on the CPU, a view of the file's copy in memory.

        Raises:
            DamagedPickleError: it reaches outside its storage, or its storage outside the file.
        """
        size, stride, offset = _extent(record)
        if math.prod(size) == 0:
            return torch.empty(size, dtype=record.dtype)
        first, elements = self._elements(record)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= elements or math.prod(size) * record.dtype.itemsize > len(self.mapped):
            raise DamagedPickleError("a tensor reaches past its storage")
        flat = self._flat(record.dtype, first, last + 1)
        return flat.as_strided(size, stride, offset)

    def _elements(self, record: TensorRecord) -> tuple[int, int]:
        """First byte and number of elements of the tensor's storage."""
        storage = record.storage
        place = self.places.get(storage.key)
        if place is None:
            raise DamagedPickleError("a tensor has no storage")
        first, length = place
        begin, end = storage.start * storage.dtype.itemsize, storage.count * storage.dtype.itemsize
        if begin < 0 or end < 0 or begin + end > length or first + length > len(self.mapped):
            raise DamagedPickleError("a storage is cut off")
        return first + begin, end // record.dtype.itemsize

    def _flat(self, dtype: torch.dtype, first: int, count: int) -> Tensor:
        if first % dtype.itemsize == 0:
            return torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=first)
        # Legacy files put storages behind pickles of any length; unaligned elements are copied.
        return torch.frombuffer(bytearray(self.mapped[first : first + count * dtype.itemsize]), dtype=dtype)


def _extent(record: TensorRecord) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    size, stride, offset = lengths_of(record.size), lengths_of(record.stride), lengths_of((record.offset,))[0]
    if len(size) != len(stride) or math.prod(length for length in size if length) > MAX_ELEMENTS:
        raise DamagedPickleError("a tensor of an impossible shape")
    return size, stride, offset


def lengths_of(values: object) -> tuple[int, ...]:
    """A shape, a stride or a count as a pickle has it: at most `MAX_DIMENSIONS` numbers of at most `MAX_ELEMENTS`.

    Raises:
        DamagedPickleError: it is none.
    """
    if not isinstance(values, tuple) or len(values) > MAX_DIMENSIONS:
        raise DamagedPickleError("a tensor of an impossible shape")
    lengths = tuple(value for value in values if type(value) is int and 0 <= value <= MAX_ELEMENTS)
    if len(lengths) != len(values):
        raise DamagedPickleError("a tensor of an impossible shape")
    return lengths


# --- what the pickles may say -------------------------------------------------------------------


def _rebuild_tensor(arguments: tuple[object, ...]) -> TensorRecord:
    """`_rebuild_tensor(storage, offset, size, stride)`; `_v2` adds requires_grad, hooks and metadata."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, StorageRecord):
        raise DamagedPickleError("a tensor without a storage")
    _refuse_metadata(arguments[6:7])
    return TensorRecord(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> TensorRecord:
    """`_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)`."""
    storage, offset, size, stride, _, _, dtype = arguments[:7]
    if not isinstance(storage, StorageRecord) or not isinstance(dtype, Named):
        raise DamagedPickleError("a tensor without a storage")
    _refuse_metadata(arguments[7:8])
    return TensorRecord(storage, DTYPES[dtype.path], offset, size, stride)


def _refuse_metadata(metadata: tuple[object, ...]) -> None:
    if metadata and metadata[0]:
        raise ForeignObjectError("holds tensors with a conjugate or negative bit")


def _first(arguments: tuple[object, ...]) -> object:
    """A parameter is its tensor; a size its numbers."""
    return arguments[0]


def _rebuild_subclass(arguments: tuple[object, ...]) -> object:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: a tensor with attributes is its tensor."""
    function, _, inner = arguments[:3]
    builder = _REBUILT.get(function.path) if isinstance(function, Named) else None
    if builder is None or not isinstance(inner, tuple):
        raise ForeignObjectError("holds tensors of a foreign class")
    return builder(inner)


def _dict(arguments: tuple[object, ...]) -> dict[object, object]:
    """An OrderedDict: empty (its entries follow), or of pairs as Python 2 wrote it."""
    made: dict[object, object] = {}
    pairs = arguments[0] if arguments else ()
    for pair in pairs if isinstance(pairs, list) else ():
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str):
            made[pair[0]] = pair[1]
    return made


def _default_dict(_arguments: tuple[object, ...]) -> dict[object, object]:
    return {}


_REBUILT: Final = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}

_REFUSED: Final = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors without data (meta)",
    "torch._utils._rebuild_wrapper_subclass": "tensors of a foreign class",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensors of a foreign device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensors of a foreign device",
    "torch.ComplexFloatStorage": "complex tensors",
    "torch.ComplexDoubleStorage": "complex tensors",
    "torch.complex32": "complex tensors",
    "torch.complex64": "complex tensors",
    "torch.complex128": "complex tensors",
    "torch.QInt8Storage": "quantised tensors",
    "torch.QInt32Storage": "quantised tensors",
    "torch.QUInt8Storage": "quantised tensors",
    "torch.QUInt4x2Storage": "quantised tensors",
    "torch.QUInt2x4Storage": "quantised tensors",
    **{f"torch.{name}": "8-bit floating point tensors" for name in dir(torch) if name.startswith("float8_")},
}

_INERT: Final = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.bytes",
        "builtins.complex",
        "builtins.dict",
        "builtins.float",
        "builtins.frozenset",
        "builtins.int",
        "builtins.list",
        "builtins.object",
        "builtins.range",
        "builtins.set",
        "builtins.slice",
        "builtins.str",
        "builtins.tuple",
        "builtins.xrange",
        "collections.deque",
        "copyreg._reconstructor",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "easydict.EasyDict",
        "enum.Enum",
        "functools.partial",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.torch_version.TorchVersion",
        "types.SimpleNamespace",
        "typing.Any",
        "uuid.UUID",
    }
)

# Nothing of these is imported or called: their objects are metadata of real checkpoints.
_INERT_PACKAGES: Final = frozenset(
    (
        "addict",
        "detectron2",
        "detrex",
        "fvcore",
        "iopath",
        "lightning",
        "lightning_fabric",
        "mmcls",
        "mmcv",
        "mmdet",
        "mmengine",
        "mmpretrain",
        "mmseg",
        "mmselfsup",
        "mmyolo",
        "numpy",
        "omegaconf",
        "pycls",
        "pytorch_lightning",
        "yacs",
    )
)

VOCABULARY: Final = Vocabulary(
    builders={
        **_REBUILT,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch.nn.parameter.Parameter": _first,
        "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
        "collections.OrderedDict": _dict,
        "collections.defaultdict": _default_dict,
        "collections.Counter": _default_dict,
    },
    values=frozenset({*STORAGES, *DTYPES}),
    inert=_INERT,
    inert_packages=_INERT_PACKAGES,
    refused=_REFUSED,
)


# --- the two formats ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchFile:
    """What a file holds: its object with `TensorRecord` for every tensor, and where their bytes lie."""

    root: object
    storages: Storages


def read_torch_file(mapped: mmap.mmap) -> TorchFile:
    """A file of `torch.save`, of either format, that is in memory.

    Raises:
        DamagedPickleError: truncated, garbage, compressed or over the bounds.
        ForeignObjectError: it holds more than tensors and known metadata.
    """
    if len(mapped) < len(ZIP_START):
        raise DamagedPickleError("empty")
    return _read_zip(mapped) if mapped[: len(ZIP_START)] == ZIP_START else _read_legacy(mapped)


def is_torch_file(mapped: mmap.mmap) -> bool:
    """Whether a file begins as those of `torch.save` do, whatever it is called."""
    return mapped[: len(LEGACY_START)].startswith((ZIP_START, LEGACY_START))


def _read_zip(mapped: mmap.mmap) -> TorchFile:
    records = _zip_records(mapped)
    if "constants.pkl" in records:
        raise ForeignObjectError("is a TorchScript program, not a file of tensors")
    first, length = records.get("byteorder", (0, 0))
    if mapped[first : first + min(length, 16)] not in (b"", b"little"):
        raise ForeignObjectError("holds big-endian tensors")
    if "data.pkl" not in records:
        raise DamagedPickleError("a zip file that torch has not written")
    stream = BoundedStream(BytesIO(_pickle_bytes(mapped, *records["data.pkl"])))
    root = load_pickle(stream, VOCABULARY, partial(_storage, legacy=False))
    places = {name.removeprefix("data/"): at for name, at in records.items() if name.startswith("data/")}
    return TorchFile(root, Storages(mapped, places))


def _pickle_bytes(mapped: mmap.mmap, first: int, length: int) -> bytes:
    if length > MAX_PICKLE_BYTES:
        raise DamagedPickleError("too long")
    return mapped[first : first + length]


def _zip_records(mapped: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Records by their name below the archive's one folder: (first byte, bytes)."""
    if _directory_bytes(mapped) > MAX_DIRECTORY_BYTES:
        raise DamagedPickleError("a zip file of too many records")
    try:
        with zipfile.ZipFile(cast("BinaryIO", mapped)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise DamagedPickleError("a damaged zip file") from error
    return {entry.filename.partition("/")[2]: _place(entry, mapped) for entry in entries}


def _directory_bytes(mapped: mmap.mmap) -> int:
    """Bytes of the zip's central directory, by its end record (APPNOTE 4.3.16, zip64 4.3.14)."""
    end = mapped.rfind(b"PK\x05\x06", max(0, len(mapped) - 65_557))
    if end < 0 or end + 22 > len(mapped):
        raise DamagedPickleError("a zip file without an end")
    size: int = struct.unpack_from("<I", mapped, end + 12)[0]
    if size < 0xFFFFFFFF:
        return size
    at: int = struct.unpack_from("<Q", mapped, end - 12)[0] if end >= 20 else len(mapped)
    if at + 56 > len(mapped):
        raise DamagedPickleError("a zip file without an end")
    size64: int = struct.unpack_from("<Q", mapped, at + 40)[0]
    return size64


def _place(entry: zipfile.ZipInfo, mapped: mmap.mmap) -> tuple[int, int]:
    """Where a record's bytes begin (behind its local header, APPNOTE 4.3.7) and how many they are."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise DamagedPickleError("a compressed or encrypted zip file")
    at = entry.header_offset
    if at < 0 or at + 30 > len(mapped) or mapped[at : at + 4] != b"PK\x03\x04":
        raise DamagedPickleError("a damaged zip file")
    name_length, extra_length = struct.unpack_from("<HH", mapped, at + 26)
    first = at + 30 + name_length + extra_length
    if first + entry.file_size > len(mapped):
        raise DamagedPickleError("cut off")
    return first, entry.file_size


class _Lines:
    """A file in memory as a stream: what mmap lacks is a line of at most so many bytes."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.read = mapped.read
        self._mapped = mapped

    def readline(self, limit: int) -> bytes:
        """To the end of the line, or `limit` bytes."""
        at = self._mapped.tell()
        end = self._mapped.find(b"\n", at, at + limit)
        return self._mapped.read(limit if end < 0 else end + 1 - at)


def _read_legacy(mapped: mmap.mmap) -> TorchFile:
    stream = BoundedStream(_Lines(mapped))
    header = [load_pickle(stream, VOCABULARY, _no_storage) for _ in range(2)]
    if header != [MAGIC_NUMBER, PROTOCOL_VERSION]:
        raise DamagedPickleError("neither of torch's formats")
    load_pickle(stream, VOCABULARY, _no_storage)
    counts: dict[str, StorageRecord] = {}
    root = load_pickle(stream, VOCABULARY, partial(_storage, legacy=True, seen=counts))
    keys = load_pickle(stream, VOCABULARY, _no_storage)
    if not isinstance(keys, list):
        raise DamagedPickleError("no list of storages")
    return TorchFile(root, Storages(mapped, _legacy_places(mapped, mapped.tell(), keys, counts)))


def _legacy_places(
    mapped: mmap.mmap, at: int, keys: list[object], storages: Mapping[str, StorageRecord]
) -> dict[str, tuple[int, int]]:
    places = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or at + 8 > len(mapped):
            raise DamagedPickleError("cut off")
        count = struct.unpack_from("<q", mapped, at)[0]
        length = storage.count * storage.dtype.itemsize
        if count != storage.count or at + 8 + length > len(mapped):
            raise DamagedPickleError("cut off")
        places[storage.key] = (at + 8, length)
        at += 8 + length
    return places


def _no_storage(_identifier: object) -> object:
    raise DamagedPickleError("a storage where none belongs")


def _storage(
    identifier: object, *, legacy: bool, seen: dict[str, StorageRecord] | None = None
) -> StorageRecord:
    """`("storage", type, key, location, count)`; legacy adds a view `(key, start, count)` or None."""
    if not isinstance(identifier, tuple) or len(identifier) != 5 + legacy or identifier[0] != "storage":
        raise ForeignObjectError("holds a whole module, not only its tensors")
    named, key, count = identifier[1], identifier[2], identifier[4]
    if not isinstance(named, Named) or named.path not in STORAGES or not isinstance(key, str):
        raise DamagedPickleError("a storage of no known type")
    record = StorageRecord(key, STORAGES[named.path], *lengths_of((count,)))
    if seen is not None:
        seen.setdefault(key, record)
    view = identifier[5] if legacy else None
    if isinstance(view, tuple) and len(view) == 3:
        start, length = lengths_of(view[1:])
        return StorageRecord(key, record.dtype, length, start)
    return record
