"""What is read of an image file before the decoder sees it: its size, its orientation, and traps it may set.

All of it is bounded by the length of the file, allocates nothing for what a header promises, and raises
`BrokenContainer` alone.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAX_JPEG_SCANS = 100
MAX_JPEG_SEGMENTS = 10_000
MAX_TIFF_VALUES = 100_000
MAX_TILE_PIXELS = 2**24


class BrokenContainer(ValueError):
    """A file that is not worth a decoder; the text says why, for the client."""


@dataclass(frozen=True)
class Container:
    """What a file says of itself.

    `data` goes to the decoder. `size` is [width, height] where it must be known before a decoder is made;
    `exif` is the Exif block where the decoder is not to see it.
    """

    data: bytes
    size: tuple[int, int] | None = None
    exif: bytes = b""


def read_plain(data: bytes) -> Container:
    """A format whose decoder reads the header without allocating for it."""
    return Container(data)


# --- JPEG (ITU-T T.81, annex B) -----------------------------------------------------------------

_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_SEQUENTIAL = frozenset((b"\xc0", b"\xc1"))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))
# Frames, tables, and the two application segments that say how colours are coded (JFIF's, Adobe's).
_KEPT = frozenset((*range(0xC0, 0xD0), 0xDB, 0xDD, 0xE0, 0xEE))
_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_MARKER_IN_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")


def read_jpeg(data: bytes) -> Container:
    """A JPEG without its metadata.

    Exif, ICC, XMP and comments may be of any number and size, and Pillow collects them; none of them changes
    a pixel but Exif's orientation, which is handed over.

    Raises:
        BrokenContainer: more scans or segments than a photo has. Each scan of a progressive JPEG is a few bytes
            in the file and a pass over the whole image in the decoder.
    """
    kept, exif, frame = [data[:2]], b"", b""
    for marker, segment in _segments(data, _MARKER, 2):
        if marker == _SOS:
            start = segment.start
            if not _has_one_scan(frame, data[start : segment.stop]):
                _refuse_scans(data, start)
            return Container(b"".join((*kept, data[start:])), exif=exif)
        payload = data[segment.start : segment.stop]
        if marker in _FRAMES:
            frame = payload
        if marker in _KEPT:
            kept.append(payload)
        elif marker == _APP1 and not exif and payload[4:10] == b"Exif\0\0":
            exif = payload[4:]
    raise BrokenContainer("has no image data")


def _segments(data: bytes, pattern: re.Pattern[bytes], position: int) -> Iterator[tuple[int, slice]]:
    """Markers with the place of their segment, up to the end of the image."""
    for _ in range(MAX_JPEG_SEGMENTS):
        found = pattern.search(data, position)
        if found is None:
            return
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI:
            return
        if marker in _STANDALONE:
            continue
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
        yield marker, slice(found.end() - 2, position)
    raise BrokenContainer(f"has more than {MAX_JPEG_SEGMENTS} segments")


def _has_one_scan(frame: bytes, scan: bytes) -> bool:
    """Whether the first scan has all there is: a sequential JPEG's whose components are all in it.

    A decoder refuses a second one then, and the rest of the file need not be searched for it.
    """
    return frame[1:2] in _SEQUENTIAL and frame[9:10] == scan[4:5] != b""


def _refuse_scans(data: bytes, position: int) -> None:
    if data.count(bytes((0xFF, _SOS)), position) <= MAX_JPEG_SCANS:
        return  # wherever they stand: ten times as fast as looking where
    scans = 0
    for marker, _ in _segments(data, _MARKER_IN_SCAN, position):
        scans += marker == _SOS
        if scans > MAX_JPEG_SCANS:
            raise BrokenContainer(f"has more than {MAX_JPEG_SCANS} scans")


# --- GIF and WebP: their decoders allocate the canvas at once -------------------------------------


def read_gif(data: bytes) -> Container:
    """A GIF with the size of its screen."""
    width, height = struct.unpack_from("<HH", data, 6)
    return Container(data, (width, height))


def read_webp(data: bytes) -> Container:
    """A WebP with the size of its canvas (RFC 9649, sections 2.5 to 2.7).

    Raises:
        BrokenContainer: no header of an image.
    """
    kind, head = data[12:16], data[20:30]
    if len(head) == 10 and kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (4, 7))
        return Container(data, (width, height))
    if len(head) == 10 and kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 6))
        return Container(data, (width, height))
    if len(head) == 10 and kind == b"VP8L" and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return Container(data, ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1))
    raise BrokenContainer("has no image header")


# --- TIFF directories (TIFF 6.0, section 2), which Exif is made of too ----------------------------

_ORIENTATION, _TILE_WIDTH, _TILE_LENGTH = 0x0112, 322, 323
_SHORT, _LONG = 3, 4
_BYTE_TYPES = frozenset((1, 2, 6, 7))  # kept as bytes by the decoder; the others become a Python number each


@dataclass(frozen=True)
class _Layout:
    """How a directory is written: `struct` formats of the offset, the number of entries, and one entry."""

    offset: str
    offset_at: int
    count: str
    entry: str


_LAYOUTS = {
    b"II*\0": _Layout("<I", 4, "<H", "<HHI4s"),
    b"MM\0*": _Layout(">I", 4, ">H", ">HHI4s"),
    b"II+\0": _Layout("<Q", 8, "<Q", "<HHQ8s"),
    b"MM\0+": _Layout(">Q", 8, ">Q", ">HHQ8s"),
}


@dataclass(frozen=True)
class _Tag:
    """One entry of a directory; `number` is its value where that is one SHORT or LONG."""

    id: int
    type: int
    count: int
    number: int | None


def read_tiff(data: bytes) -> Container:
    """A TIFF whose first directory is of a sane size.

    Raises:
        BrokenContainer: a list of millions of strips, or tiles far larger than an image.
    """
    tile = {_TILE_WIDTH: 1, _TILE_LENGTH: 1}
    for tag in _first_directory(data):
        if tag.type not in _BYTE_TYPES and tag.count > MAX_TIFF_VALUES:
            raise BrokenContainer(f"has a tag of more than {MAX_TIFF_VALUES} values")
        if tag.id in tile:
            tile[tag.id] = max(tile[tag.id], tag.number or 0)
    if tile[_TILE_WIDTH] * tile[_TILE_LENGTH] > MAX_TILE_PIXELS:
        raise BrokenContainer(f"has tiles of more than {MAX_TILE_PIXELS} pixels")
    return Container(data)


def orientation_of(exif: bytes) -> int:
    """The orientation, 1 to 8, of an Exif block; 1 (upright) where it is broken or does not say."""
    for tag in _first_directory(exif.removeprefix(b"Exif\0\0")):
        if tag.id == _ORIENTATION:
            return tag.number if tag.number is not None and 1 <= tag.number <= 8 else 1
    return 1


def _first_directory(data: bytes) -> Iterator[_Tag]:
    """The entries of the first directory as far as they are there."""
    layout = _LAYOUTS.get(data[:4])
    if layout is None:
        return
    offset = _number_at(data, layout.offset, layout.offset_at)
    count = _number_at(data, layout.count, offset)
    first, width = offset + struct.calcsize(layout.count), struct.calcsize(layout.entry)
    present = min(count, max(0, len(data) - first) // width)
    for entry in struct.iter_unpack(layout.entry, data[first : first + present * width]):
        yield _tag(layout.entry[0], *entry)


def _number_at(data: bytes, format: str, position: int) -> int:
    """A number, 0 where the data end before it."""
    raw = data[position : position + struct.calcsize(format)]
    return int(struct.unpack(format, raw)[0]) if len(raw) == struct.calcsize(format) else 0


def _tag(order: str, id: int, type: int, count: int, value: bytes) -> _Tag:
    code = {_SHORT: "H", _LONG: "I"}.get(type)
    number = struct.unpack_from(order + code, value)[0] if code is not None and count == 1 else None
    return _Tag(id, type, count, number)
