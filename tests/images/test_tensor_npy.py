"""A `.npy` body is read by its header, which is never believed."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from service.errors import MalformedBody, ServiceError, TooLarge, UnsupportedMedia
from service.images.tensors import open_npy

LIMIT = 1_000_000


def npy(array, version=(1, 0), allow_pickle=False):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=allow_pickle)
    return stream.getvalue()


def with_header(header, payload=b"", version=1):
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + payload


def header_of(shape, descr="'<f4'", fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}"


@pytest.fixture
def tensor():
    return np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_float32_of_any_order_is_read(tensor, version, order, dtype):
    read = open_npy(npy(np.asarray(tensor, dtype, order=order), version), max_elements=LIMIT).read()
    np.testing.assert_array_equal(read, tensor)
    assert read.dtype == np.dtype(np.float32)
    assert read.dtype.isnative
    assert read.flags.c_contiguous
    assert read.flags.writeable


@pytest.mark.parametrize("dtype", ["f2", "f8", "i4", "u1", "c8", "?"])
def test_other_numbers_are_not_served(tensor, dtype):
    with pytest.raises(UnsupportedMedia, match="float32"):
        open_npy(npy(tensor.astype(dtype)), max_elements=LIMIT).read()


def test_objects_are_never_unpickled():
    array = np.empty((1, 1, 1, 1), object)
    with pytest.raises(MalformedBody, match="not an array of numbers"):
        open_npy(npy(array, allow_pickle=True), max_elements=LIMIT).read()


@pytest.mark.parametrize("descr", ["[('a', '<f4')]", "'S4'", "'U1'", "'M8[s]'", "'V4'", "('<f4', (2,))"])
def test_what_is_not_a_number_is_malformed(descr):
    with pytest.raises(MalformedBody):
        open_npy(with_header(header_of("(1, 1, 1, 1)", descr), b"\0" * 8), max_elements=LIMIT).read()


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:-40], lambda data: data + b"\0"]
)
def test_missing_and_trailing_bytes_are_malformed(tensor, change):
    with pytest.raises(MalformedBody):
        open_npy(change(npy(tensor)), max_elements=LIMIT).read()


@pytest.mark.parametrize(
    "shape",
    [
        "(1000000000000, 1, 1, 1)",
        "(1099511627776, 1099511627776, 1099511627776, 4)",
        "(-1, 1, 1, 1)",
        "(-1, -1, 1, 1)",
        "(0, 3, 4, 4)",
        "(True, 1, 1, 1)",
        "(1.0, 1, 1, 1)",
        "(1, 1, 1)",
        "()",
        "(1, 1, 1, 1, 1)",
        "[1, 1, 1, 1]",
        "'1'",
        "(9" + "9" * 5000 + ", 1, 1, 1)",
    ],
)
def test_impossible_shapes_are_malformed(shape):
    with pytest.raises(MalformedBody):
        open_npy(with_header(header_of(shape), b"\0" * 4), max_elements=LIMIT).read()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\xff\xff{}",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}",
        b"PK\x03\x04" + b"\0" * 100,
        with_header(""),
        with_header("1"),
        with_header("{"),
        with_header("(" * 9000),
        with_header("-" * 9000 + "1"),
        with_header("[" * 150 + "]" * 150),
        with_header("'''"),
        with_header("{'descr': '<f4'}"),
        with_header(header_of("(1, 1, 1, 1)") + " " * 20_000, b"\0" * 4),
        with_header(header_of("(1, 1, 1, 1)", fortran="2"), b"\0" * 4),
        with_header(header_of("(1, 1, 1, 1)", "'nonsense'"), b"\0" * 4),
        with_header(header_of("(1, 1, 1, 1)", "None"), b"\0" * 8),
        with_header("__import__('os').system('false')"),
        with_header("\0\xff"),
    ],
)
def test_a_broken_header_is_malformed(data):
    with pytest.raises(MalformedBody):
        open_npy(data, max_elements=LIMIT).read()


def test_unknown_versions_are_not_served(tensor):
    with pytest.raises(UnsupportedMedia, match="version"):
        open_npy(npy(tensor, (3, 0)), max_elements=LIMIT).read()


def test_more_numbers_than_allowed_are_too_large(tensor):
    with pytest.raises(TooLarge, match="120 numbers; the limit is 119"):
        open_npy(npy(tensor), max_elements=119).read()
    assert open_npy(npy(tensor), max_elements=120).shape == tensor.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(tensor, value):
    tensor[1, 2, 3, 4] = value
    with pytest.raises(MalformedBody, match="NaN or infinity"):
        open_npy(npy(tensor), max_elements=LIMIT).read()


def outcome_of(data):
    try:
        return open_npy(data, max_elements=LIMIT).read()
    except ServiceError as error:
        return error


def test_a_mutated_file_is_read_or_refused(tensor):
    original, rng = npy(tensor), np.random.default_rng(1)
    for _ in range(500):
        data = bytearray(original)
        for position in rng.integers(0, 140, rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        outcome = outcome_of(bytes(data))
        assert isinstance(outcome, (np.ndarray, MalformedBody, UnsupportedMedia, TooLarge))
