"""An already normalised tensor as a client sends it: one `.npy`."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import MalformedBody, TooLarge, UnsupportedMedia

MAX_HEADER_BYTES = 4096
MAGIC = b"\x93NUMPY"


def read_npy(data: bytes, *, max_elements: int) -> npt.NDArray[np.float32]:
    """The array of a `.npy` file (NumPy's NEP 1): float32 of either byte order, [n, c, h, w], C-contiguous.

    Nothing is allocated before the shape is known to be that of the bytes that are there; objects are never read.

    Raises:
        MalformedBody: not a `.npy`, or not of this shape, or not finite.
        UnsupportedMedia: numbers of another type.
        TooLarge: more than `max_elements` numbers.
    """
    shape, fortran_order, dtype, start = _header(data)
    if dtype.newbyteorder("=") != np.float32:
        raise UnsupportedMedia(f"the tensor holds {dtype.name[:32]}; send float32")
    _check_shape(shape, len(data) - start, max_elements)
    flat = np.frombuffer(data, dtype, offset=start)
    array = flat.reshape(shape, order="F" if fortran_order else "C")
    tensor = np.array(array, dtype=np.float32, order="C")  # a copy of its own: the body is read-only
    if not np.isfinite(tensor).all():
        raise MalformedBody("the tensor holds NaN or infinity")
    return tensor


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    if not data.startswith(MAGIC):
        raise MalformedBody("the tensor is not a .npy file")
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    except (
        ValueError,
        TypeError,
        SyntaxError,
        KeyError,
        MemoryError,
        RecursionError,
        OverflowError,
    ) as error:
        raise MalformedBody("the header of the .npy cannot be read") from error
    return shape, fortran_order, dtype, stream.tell()


def _check_shape(shape: tuple[int, ...], data_bytes: int, max_elements: int) -> None:
    if len(shape) != 4 or any(side < 1 for side in shape):
        raise MalformedBody(
            f"the tensor must be [n, c, h, w], none of them 0; it has {len(shape)} dimensions"
        )
    elements = math.prod(shape)
    if elements > max_elements:
        raise TooLarge(f"the tensor has {elements:,} numbers; the limit is {max_elements:,}")
    if elements * 4 != data_bytes:
        raise MalformedBody(f"the .npy promises {elements * 4:,} bytes and brings {data_bytes:,}")
