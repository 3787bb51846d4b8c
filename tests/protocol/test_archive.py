"""The zip that an npz is: read by Python's own reader, and by numpy."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from datetime import datetime

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.protocol.archive import Chunk, stored_archive

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.-", min_size=1, max_size=20)


class Pieces(io.RawIOBase):
    """A file of pieces that are not put together, as 4 GB are better not."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = [memoryview(chunk) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, self._chunks)]).tolist()
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._starts[-1])[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what io hands over
        index = int(np.searchsorted(self._starts, self._at, side="right")) - 1
        if index >= len(self._chunks):
            return 0
        start = self._at - self._starts[index]
        piece = self._chunks[index][start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def read(chunks: Sequence[Chunk]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(b"".join(chunks))) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


@given(files=st.dictionaries(NAMES, st.lists(st.binary(max_size=50), max_size=3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_is_put_in_is_read_back_and_its_checksums_hold(files: dict[str, list[bytes]]) -> None:
    assert read(stored_archive(files.items())) == {name: b"".join(chunks) for name, chunks in files.items()}


def test_a_member_is_the_view_that_was_given() -> None:
    view = memoryview(bytes(range(256)))
    assert any(chunk is view for chunk in stored_archive([("a", (b"head", view))]))


def test_an_archive_is_one_of_unix_of_1980_and_stored() -> None:
    with zipfile.ZipFile(io.BytesIO(b"".join(stored_archive([("a.npy", (b"abc",))])))) as archive:
        [info] = archive.infolist()
    assert datetime(*info.date_time) == datetime(1980, 1, 1)  # noqa: DTZ001 - zip knows no zones
    assert (info.compress_type, info.create_system, info.external_attr) == (
        zipfile.ZIP_STORED,
        3,
        0o600 << 16,
    )
    assert (info.extract_version, info.extra, info.flag_bits) == (20, b"", 0)


def test_a_member_and_an_offset_beyond_4_gigabytes_are_written_as_zip64() -> None:
    zeros = np.zeros(2**32 + 5, np.uint8)  # never touched: the kernel gives one page for all
    chunks = stored_archive([("small", (b"before",)), ("large", (zeros.data,)), ("late", (b"after",))])
    with zipfile.ZipFile(Pieces(chunks)) as archive:  # type: ignore[type-var]  # a file
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes == {"small": 6, "large": 2**32 + 5, "late": 5}
        assert (archive.read("small"), archive.read("late")) == (b"before", b"after")
        assert archive.getinfo("late").header_offset > 2**32
        assert [info.extract_version for info in archive.infolist()] == [20, 45, 45]
        with archive.open("large") as member:
            assert member.read(1 << 16) == bytes(1 << 16)
        checksum = archive.getinfo("large").CRC
    expected = 0
    for start in range(0, len(zeros), 2**26):
        expected = zlib.crc32(zeros[start : start + 2**26], expected)
    assert checksum == expected
