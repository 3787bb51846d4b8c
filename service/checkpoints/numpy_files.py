"""Pickles of numpy arrays: the `.pkl` files of detectron2, and of Caffe2 before it.

Read as the pickles of torch's files are, by `service.checkpoints.pickles`: numpy's functions are neither imported nor
called, an array is a record of what its pickle says, and becomes a tensor when its bytes have been counted. Long
strings of bytes stay where the file is in memory. Protocols 1 to 5 of either Python; Python 2's strings are bytes here.

Layouts: an array is `_reconstruct(ndarray, (0,), b"b")` with the state `(version, shape, dtype, is_fortran, bytes)`,
or in protocol 5 `_frombuffer(bytes, dtype, shape, order)`; a dtype is `dtype("f4", False, True)` with the state
`(3, byteorder, subdtype, names, fields, size, alignment, flags)`. Python 3 writes bytes in protocol 2 as
`_codecs.encode(text, "latin1")`.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from service.checkpoints.pickles import (
    Builder,
    DamagedPickleError,
    ForeignObjectError,
    Named,
    Operation,
    Stateful,
    Vocabulary,
    load_operations,
)
from service.checkpoints.torch_files import MAX_ELEMENTS, lengths_of

MAX_FILE_BYTES: Final = 4 * 2**30
MAX_TEXT_BYTES: Final = 512 * 2**20
MAX_LINE_BYTES: Final = 4096
SHORT_BYTES: Final = 256
LITTLE: Final = ("<", "=", "|")

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "b1": torch.bool,
}


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of the file that are not copied once more."""

    first: int
    length: int


# Text is Latin-1: the bytes of Python 2, or those of Python 3 in protocol 2.
Bytes = Span | bytes | str


class DtypeRecord(Stateful):
    """A dtype as its pickle describes it: `f4`, and the order of its bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="

    def set_state(self, state: object) -> None:
        """Take `(version, byteorder, subdtype, names, fields, …)`."""
        if not isinstance(state, tuple) or len(state) < 5 or not isinstance(state[1], str):
            raise DamagedPickleError("a dtype without a byte order")
        if any(part is not None for part in state[2:5]):
            raise ForeignObjectError("holds arrays of records, not of numbers")
        self.order = state[1]

    def torch_dtype(self) -> torch.dtype:
        """The same in torch.

        Raises:
            ForeignObjectError: torch has none, or no backbone has.
        """
        if self.order not in LITTLE:
            raise ForeignObjectError("holds big-endian arrays")
        if self.code not in DTYPES:
            raise ForeignObjectError(f"holds {self.code[:16]} arrays, which no backbone here has")
        return DTYPES[self.code]


class ArrayRecord(Stateful):
    """An array as its pickle describes it; nothing is checked before `NumpyFile.tensor`."""

    __slots__ = ("data", "dtype", "is_fortran", "shape")

    def __init__(self) -> None:
        self.dtype: DtypeRecord | None = None
        self.shape: object = ()
        self.is_fortran = False
        self.data: Bytes = b""

    def set_state(self, state: object) -> None:
        """Take `(version, shape, dtype, is_fortran, bytes)`, once; the oldest have no version."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise DamagedPickleError("an array without a state")
        shape, dtype, is_fortran, data = state[-4:]
        self.take(data, dtype, shape, is_fortran=bool(is_fortran))

    def take(self, data: object, dtype: object, shape: object, *, is_fortran: bool) -> None:
        """Take what an array is made of.

        Raises:
            DamagedPickleError: it was given some already, or this is none.
        """
        if self.dtype is not None or not isinstance(dtype, DtypeRecord):
            raise DamagedPickleError("an array without a dtype, or with two")
        if not isinstance(data, (Span, bytes, str)):
            raise DamagedPickleError("an array without its bytes")
        self.data, self.dtype, self.shape, self.is_fortran = data, dtype, shape, is_fortran


class NumpyFile:
    """What a file holds: `root` has an `ArrayRecord` for every array, whose bytes lie in `mapped`."""

    def __init__(self, root: object, mapped: mmap.mmap) -> None:
        self.root = root
        self._mapped = mapped
        self._left = len(mapped)
        self._made: dict[int, Tensor] = {}

    def tensor(self, record: ArrayRecord) -> Tensor:
        """The array as a tensor on the CPU: a view of the file's copy where its bytes are aligned there.

        Raises:
            DamagedPickleError: its bytes are not those of its shape, or all arrays together have more than the file.
            ForeignObjectError: numbers that are not served.
        """
        made = self._made.get(id(record))
        if made is None:
            made = self._made[id(record)] = self._tensor(record)
        return made

    def _tensor(self, record: ArrayRecord) -> Tensor:
        if record.dtype is None:
            raise DamagedPickleError("an array that is never filled")
        dtype, shape = record.dtype.torch_dtype(), lengths_of(record.shape)
        if math.prod(length for length in shape if length) > MAX_ELEMENTS:
            raise DamagedPickleError("an array of an impossible shape")
        count = math.prod(shape)
        self._pay(record.data, count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = self._flat(record.data, dtype, count)
        return (
            flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1])
            if record.is_fortran
            else flat.reshape(shape)
        )

    def _pay(self, data: Bytes, size: int) -> None:
        """Arrays may share bytes in a pickle; what they take together must still be in the file."""
        length = data.length if isinstance(data, Span) else len(data)
        self._left -= size
        if length != size or self._left < 0:
            raise DamagedPickleError("an array of other bytes than its shape has")

    def _flat(self, data: Bytes, dtype: torch.dtype, count: int) -> Tensor:
        if isinstance(data, Span):
            if data.first % dtype.itemsize == 0:
                return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=data.first)
            data = self._mapped[data.first : data.first + data.length]
        plain = data.encode("latin-1") if isinstance(data, str) else data
        return torch.frombuffer(bytearray(plain), dtype=dtype)


# --- what the pickles may say ---------------------------------------------------------------------


def _reconstruct(arguments: tuple[object, ...]) -> ArrayRecord:
    """`_reconstruct(ndarray, (0,), b"b")`: an array whose state follows."""
    if not isinstance(arguments[0], Named) or arguments[0].path != "numpy.ndarray":
        raise ForeignObjectError("holds arrays of a foreign class")
    return ArrayRecord()


def _from_buffer(arguments: tuple[object, ...]) -> ArrayRecord:
    data, dtype, shape, order = arguments
    if order not in ("C", "F"):
        raise DamagedPickleError("an array of no known order")
    record = ArrayRecord()
    record.take(data, dtype, shape, is_fortran=order == "F")
    return record


def _scalar(arguments: tuple[object, ...]) -> ArrayRecord:
    """`scalar(dtype, bytes)`: an array without dimensions."""
    dtype, data = arguments
    record = ArrayRecord()
    record.take(data, dtype, (), is_fortran=False)
    return record


def _dtype(arguments: tuple[object, ...]) -> DtypeRecord:
    code = arguments[0]
    if not isinstance(code, str):
        raise ForeignObjectError("holds arrays of a foreign dtype")
    if code.startswith(("O", "V")):
        raise ForeignObjectError("holds arrays of objects or records, not of numbers")
    return DtypeRecord(code)


def _encoded(arguments: tuple[object, ...]) -> str:
    """`_codecs.encode(text, "latin1")`, not done before it is known how many bytes it should give."""
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DamagedPickleError("bytes in no known encoding")
    return text


def _no_bytes(arguments: tuple[object, ...]) -> bytes:
    if arguments:
        raise DamagedPickleError("bytes of an unknown source")
    return b""


def _pairs(arguments: tuple[object, ...]) -> dict[object, object]:
    """An OrderedDict: empty (its entries follow), or of pairs as Python 2 wrote it."""
    pairs = arguments[0] if arguments else ()
    whole = (
        [pair for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]
        if isinstance(pairs, list)
        else []
    )
    return {pair[0]: pair[1] for pair in whole if isinstance(pair[0], str)}


# numpy 2 moved its core; Python 2's files have the old name.
_CORES: Final = ("numpy.core", "numpy._core")
_BUILDERS: Final[Mapping[str, Builder]] = {
    "numpy.dtype": _dtype,
    "collections.OrderedDict": _pairs,
    "_codecs.encode": _encoded,
    "builtins.bytes": _no_bytes,
    **{f"{core}.multiarray._reconstruct": _reconstruct for core in _CORES},
    **{f"{core}.multiarray.scalar": _scalar for core in _CORES},
    **{f"{core}.numeric._frombuffer": _from_buffer for core in _CORES},
}
VOCABULARY: Final = Vocabulary(
    builders=_BUILDERS,
    values=frozenset({"numpy.ndarray"}),
    inert=frozenset(),
    inert_packages=frozenset(),
    refused={},
)


def _nothing_outside(_identifier: object) -> object:
    raise ForeignObjectError("refers to objects outside of the file")


# --- reading --------------------------------------------------------------------------------------


def read_numpy_file(mapped: mmap.mmap) -> NumpyFile:
    """The one object of a pickle file that is in memory, with a record for every array.

    Raises:
        DamagedPickleError: truncated, garbage or over the bounds.
        ForeignObjectError: it names anything but numpy's arrays.
    """
    if len(mapped) > MAX_FILE_BYTES:
        raise ForeignObjectError(f"is a .pkl file of more than {MAX_FILE_BYTES} bytes")
    return NumpyFile(load_operations(_operations(_Source(mapped)), VOCABULARY, _nothing_outside), mapped)


class _Source:
    """A file in memory, read from front to back, as `pickletools` reads one; long strings are only passed over."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._at = 0
        self._text_left = MAX_TEXT_BYTES

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        self._text_left -= min(count, len(self._mapped) - self._at)
        if self._text_left < 0:
            raise DamagedPickleError("too much text")
        data = self._mapped[self._at : self._at + count]
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        """To the end of the line."""
        end = self._mapped.find(b"\n", self._at, self._at + MAX_LINE_BYTES)
        if end < 0:
            raise DamagedPickleError("a line without an end")
        return self.read(end + 1 - self._at)

    def span(self, length: int) -> Span:
        """The next bytes, not copied."""
        first = self._at
        if not 0 <= length <= len(self._mapped) - first:
            raise DamagedPickleError("cut off")
        self._at += length
        return Span(first, length)


_OPCODES: Final = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
# How the length of a string is written before it.
_LENGTHS: Final = {
    name: struct.Struct(form)
    for name, form in (("BINSTRING", "<i"), ("BINBYTES", "<I"), ("BINBYTES8", "<Q"), ("BYTEARRAY8", "<Q"))
}


def _operations(source: _Source) -> Iterator[Operation]:
    """As `pickletools.genops`, save that long strings are spans."""
    name = ""
    while name != "STOP":
        opcode = _OPCODES.get(source.read(1))
        if opcode is None:
            raise DamagedPickleError("not a whole pickle")
        name = opcode.name
        if name in _LENGTHS:
            yield name, _string(source, name)
        else:
            # typeshed asks for a whole IO; the readers use read and readline.
            yield name, None if opcode.arg is None else opcode.arg.reader(source)  # type: ignore[arg-type]


def _string(source: _Source, name: str) -> Bytes:
    form = _LENGTHS[name]
    header = source.read(form.size)
    if len(header) < form.size:
        raise DamagedPickleError("cut off")
    (length,) = form.unpack(header)
    if name == "BINSTRING" and 0 <= length < SHORT_BYTES:  # Python 2's text, which may be a name
        return source.read(length).decode("latin-1")
    return source.span(length)
