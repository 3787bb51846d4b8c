"""Which content coding an `Accept-Encoding` header asks for, and what comes out."""

from __future__ import annotations

import gzip
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import NotAcceptable
from service.protocol.coding import CODINGS, MIN_COMPRESSED_BYTES, AcceptedCoding, accepted_coding, compress

READERS = {"gzip": gzip.decompress, "zstd": lambda data: zstandard.ZstdDecompressor().decompress(data)}


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        (None, "identity"),
        ("", "identity"),
        ("identity", "identity"),
        ("br", "identity"),
        ("deflate, br", "identity"),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("x-gzip", "gzip"),
        ("zstd", "zstd"),
        ("gzip, zstd", "zstd"),
        ("zstd, gzip", "zstd"),
        ("zstd;q=0.5, gzip;q=0.6", "gzip"),
        ("zstd;q=0, gzip", "gzip"),
        ("gzip;q=0, zstd;q=0", "identity"),
        ("gzip;q=0.5", "gzip"),
        ("gzip;q=0.5, identity", "identity"),
        ("gzip;q=0.5, identity;q=0.5", "gzip"),
        ("gzip, identity;q=0.5", "gzip"),
        ("*", "gzip"),
        ("zstd, *", "zstd"),
        ("*, gzip;q=0", "zstd"),
        ("*;q=0, gzip", "gzip; required"),
        ("br, *;q=0.1", "gzip"),
        ("identity;q=0", "identity; refused"),
        ("*;q=0", "identity; refused"),
        ("identity;q=0, br", "identity; refused"),
        ("identity;q=0, *", "gzip; required"),
        ("identity;q=0, zstd;q=0.1", "zstd; required"),
        ("*;q=0, identity, gzip;q=0.5", "identity"),
        ("gzip;q=2", "identity"),
        ("gzip;q=nan", "identity"),
        ("gzip;q=-1", "identity"),
        ("gzip;q=", "identity"),
        (" ,, gzip ;  q=1.000 ,", "gzip"),
        ("gzip;q=0, gzip;q=1", "identity"),
        ('"gzip, zstd"', "identity"),
        ("gzip/x", "identity"),
        ("g zip", "identity"),
        ("gzip" * 100, "identity"),
    ],
)
def test_what_an_accept_encoding_header_gets(header: str | None, coding: str) -> None:
    if coding.endswith("refused"):
        with pytest.raises(NotAcceptable, match="zstd, gzip and identity"):
            accepted_coding(header)
        return
    found = accepted_coding(header)
    assert found.name + ("; required" if found.required else "") == coding


@pytest.mark.parametrize(
    ("header", "is_habit"),
    [
        ("gzip, deflate", True),  # requests, urllib3, aiohttp
        ("gzip, deflate, br, zstd", True),  # browsers, HTTPX with everything installed
        ("gzip, compress, deflate, br", True),  # axios
        ("br, gzip, deflate", True),  # fetch of node
        ("gzip", False),
        ("zstd, gzip", False),
        ("deflate, gzip, br, zstd", False),  # curl --compressed, which somebody typed
        ("gzip, deflate;q=0.5", False),
        ("gzip, deflate, identity;q=0", False),
    ],
)
def test_the_list_that_libraries_send_unasked_is_known(header: str, is_habit: bool) -> None:
    assert accepted_coding(header).is_habit == is_habit


@pytest.mark.parametrize("unit", ["gzip,", "*;q=0,", ",", '"', "identity;q=0;"])
def test_a_huge_header_asks_for_nothing(unit: str) -> None:
    assert accepted_coding(unit * (2**20 // len(unit))) == AcceptedCoding()


@given(header=st.text(st.characters(max_codepoint=255), max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_header_is_answered_or_refused(header: str) -> None:
    try:
        assert accepted_coding(header).name in (*CODINGS, "identity")
    except NotAcceptable:
        assert "0" in header


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("sizes", [(), (0,), (1,), (0, 70_000, 0, 5), (3_000_000, 7)])
def test_what_is_compressed_reads_back_and_is_the_same_every_time(
    coding: str, sizes: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    chunks = [memoryview(rng.integers(0, 4, size, np.uint8).data) for size in sizes]
    packed = b"".join(compress(coding, chunks))
    assert READERS[coding](packed) == b"".join(chunks)
    assert b"".join(compress(coding, chunks)) == packed


def test_a_zstd_reply_says_how_large_it_is_so_that_a_client_can_refuse_it() -> None:
    packed = b"".join(compress("zstd", [bytes(5000), bytes(5000)]))
    assert zstandard.frame_content_size(packed) == 10_000


def test_gzip_is_what_zlib_reads() -> None:
    packed = b"".join(compress("gzip", [b"abc" * 1000]))
    assert zlib.decompress(packed, 31) == b"abc" * 1000
    assert packed[4:8] == bytes(4)  # no time


def test_a_small_body_is_compressed_only_for_who_does_not_take_it_as_it_is() -> None:
    assert accepted_coding("gzip").pays(MIN_COMPRESSED_BYTES)
    assert not accepted_coding("gzip").pays(MIN_COMPRESSED_BYTES - 1)
    assert accepted_coding("gzip, identity;q=0").pays(0)
    assert not accepted_coding("br").pays(10**9)
