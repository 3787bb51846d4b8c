"""A stored zip archive in pieces: headers are computed, and the members' own bytes are views that nobody copies.

The records are those of PKWARE's APPNOTE 6.3.10: local headers (4.3.7), central headers (4.3.12), the end of the
central directory (4.3.14 to 4.3.16), and zip64 fields (4.5.3) where a size or an offset does not fit 32 bits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isal import isal_zlib  # the CRC32 of zlib at eight times its speed

Chunk = bytes | memoryview

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")

MAX_32_BITS = 0xFFFFFFFF
_VERSION, _VERSION_64 = 20, 45
_MADE_ON_UNIX = 3 << 8
_MODE = 0o600 << 16
_TIME, _DATE = 0, (1 << 5) | 1  # midnight of 1 January 1980: the same members are the same bytes
_STORED = 0
_ZIP64_FIELD = 1


@dataclass(frozen=True)
class _Member:
    """One stored file: `size` in bytes, `offset` of its local header from the start of the archive."""

    name: bytes
    chunks: tuple[Chunk, ...]
    size: int
    crc: int
    offset: int

    @property
    def sizes(self) -> list[int]:
        """Its uncompressed and its compressed size."""
        return [self.size, self.size]

    def local_header(self) -> bytes:
        """What stands before its bytes."""
        extra = _zip64_field(self.sizes if self.size >= MAX_32_BITS else [])
        common = (_version(extra), 0, _STORED, _TIME, _DATE, self.crc, *map(_fitting, self.sizes))
        return _LOCAL.pack(b"PK\3\4", *common, len(self.name), len(extra)) + self.name + extra

    def central_header(self) -> bytes:
        """Its entry in the directory at the end."""
        # 4.5.3: only those fields are there that do not fit their own place, in this order
        extra = _zip64_field([value for value in (*self.sizes, self.offset) if value >= MAX_32_BITS])
        made = _version(extra) | _MADE_ON_UNIX
        common = (made, _version(extra), 0, _STORED, _TIME, _DATE, self.crc, *map(_fitting, self.sizes))
        rest = (len(self.name), len(extra), 0, 0, 0, _MODE, _fitting(self.offset))
        return _CENTRAL.pack(b"PK\1\2", *common, *rest) + self.name + extra


def stored_archive(files: Iterable[tuple[str, Sequence[Chunk]]]) -> tuple[Chunk, ...]:
    """The archive of files that are given in pieces, in their order; the same files make the same bytes.

    Args:
        files: names in ASCII, each with its bytes.
    """
    members = _placed(files)
    body: list[Chunk] = []
    for member in members:
        body += (member.local_header(), *member.chunks)
    return *body, _directory(members, sum(map(len, body)))


def _placed(files: Iterable[tuple[str, Sequence[Chunk]]]) -> list[_Member]:
    members: list[_Member] = []
    offset = 0
    for name, chunks in files:
        size = sum(map(len, chunks))
        member = _Member(name.encode("ascii"), tuple(chunks), size, _crc32(chunks), offset)
        members.append(member)
        offset += len(member.local_header()) + size
    return members


def _crc32(chunks: Sequence[Chunk]) -> int:
    crc = 0
    for chunk in chunks:
        crc = isal_zlib.crc32(chunk, crc)
    return crc


def _directory(members: Sequence[_Member], start: int) -> bytes:
    """The central directory, which begins at `start`, and its end."""
    entries = b"".join(member.central_header() for member in members)
    count, end_64 = len(members), b""
    if start >= MAX_32_BITS:
        end = start + len(entries)
        made = _VERSION_64 | _MADE_ON_UNIX
        end_64 = _END_64.pack(
            b"PK\6\6", _END_64.size - 12, made, _VERSION_64, 0, 0, count, count, len(entries), start
        ) + _LOCATOR_64.pack(b"PK\6\7", 0, end, 1)
    return entries + end_64 + _END.pack(b"PK\5\6", 0, 0, count, count, len(entries), _fitting(start), 0)


def _zip64_field(values: Sequence[int]) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", _ZIP64_FIELD, 8 * len(values), *values) if values else b""


def _version(extra: bytes) -> int:
    """The version of zip that a reader needs."""
    return _VERSION_64 if extra else _VERSION


def _fitting(value: int) -> int:
    """The value, or the mark that it is in the zip64 field."""
    return min(value, MAX_32_BITS)
