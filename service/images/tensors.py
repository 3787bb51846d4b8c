"""An already normalised tensor as a client sends it: one `.npy`."""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import MalformedBody, TooLarge, UnsupportedMedia

MAX_HEADER_BYTES = 4096
MAGIC = b"\x93NUMPY"
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]

READERS: dict[tuple[int, int], Callable[..., Header]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What numpy, and the literal parser and the tokenizer below it, raise for a header that is none.
HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)


@dataclass(frozen=True)
class OpenedTensor:
    """One `.npy` whose header is read and agrees with its length: [n, c, h, w]. No number of it is read."""

    shape: tuple[int, int, int, int]
    _data: bytes
    _start: int
    _dtype: np.dtype[Any]
    _fortran_order: bool

    @property
    def bytes(self) -> int:
        """Of the array that `read` makes."""
        return math.prod(self.shape) * 4

    def read(self) -> npt.NDArray[np.float32]:
        """The array, C-contiguous, in memory of its own.

        Raises:
            MalformedBody: not all of it is finite.
        """
        flat = np.frombuffer(self._data, self._dtype, offset=self._start)
        array = flat.reshape(self.shape, order="F" if self._fortran_order else "C")
        tensor = np.array(array, dtype=np.float32, order="C")  # a copy of its own: the body is read-only
        if not np.isfinite(tensor).all():
            raise MalformedBody("the tensor holds NaN or infinity")
        return tensor


def open_npy(data: bytes, *, max_elements: int) -> OpenedTensor:
    """The header of a `.npy` file (NumPy's NEP 1): float32 of either byte order, [n, c, h, w].

    The shape is known to be that of the bytes that are there before anything is allocated; objects are never read.

    Raises:
        MalformedBody: not a `.npy` of numbers, or not of this shape, or cut short, or longer.
        UnsupportedMedia: numbers of another type, or a format version other than 1.0 and 2.0.
        TooLarge: more than `max_elements` numbers.
    """
    shape, fortran_order, dtype, start = _header(data)
    _check_dtype(dtype)
    _check_shape(shape, len(data) - start, max_elements)
    count, channels, height, width = shape
    return OpenedTensor((count, channels, height, width), data, start, dtype, fortran_order)


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biufc" or dtype.shape:
        raise MalformedBody("the tensor is not an array of numbers")
    if dtype.newbyteorder("=") != np.float32:
        raise UnsupportedMedia(f"the tensor holds {dtype.name}; send float32")


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    if not data.startswith(MAGIC):
        raise MalformedBody("the tensor is not a .npy file")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError as error:
        raise MalformedBody("the tensor is not a .npy file") from error
    if version not in READERS:
        raise UnsupportedMedia("the tensor's .npy version is not 1.0 or 2.0")
    try:
        shape, fortran_order, dtype = READERS[version](stream, max_header_size=MAX_HEADER_BYTES)
    except HEADER_ERRORS as error:
        raise MalformedBody("the header of the .npy cannot be read") from error
    return shape, fortran_order, dtype, stream.tell()


def _check_shape(shape: tuple[int, ...], data_bytes: int, max_elements: int) -> None:
    if len(shape) != 4:
        raise MalformedBody(f"the tensor must be [n, c, h, w]; it has {len(shape)} dimensions")
    if any(type(side) is not int or side < 1 for side in shape):
        raise MalformedBody("the tensor must be [n, c, h, w], each of them at least 1")
    elements = math.prod(shape)
    # A shape that promises more than there is may be any number of digits long: it is not repeated.
    if elements * 4 > data_bytes:
        raise MalformedBody(f"the .npy is truncated: it brings {data_bytes:,} bytes and promises more")
    if elements * 4 < data_bytes:
        raise MalformedBody(f"the .npy promises {elements * 4:,} bytes and brings {data_bytes:,}")
    if elements > max_elements:
        raise TooLarge(f"the tensor has {elements:,} numbers; the limit is {max_elements:,}")
