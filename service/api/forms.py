"""`multipart/form-data` in one pass over a body that is in memory already: nothing is spooled to a file.

Parts that have a file name are files, as browsers and curl send them; the others are text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import MalformedBody, TooLarge

MAX_BLANKS = 256


@dataclass(frozen=True)
class FormPart:
    """One part: its name, its bytes, and whether it was sent as a file."""

    name: str
    data: bytes
    is_file: bool


@dataclass(frozen=True)
class FormLimits:
    """How many parts of each kind a form may have, and how large a text may be."""

    max_files: int
    max_texts: int
    max_text_bytes: int


def parse_form(body: bytes, boundary: bytes, limits: FormLimits) -> list[FormPart]:
    """The parts of a form in their order. Bytes of files are copied once.

    Raises:
        MalformedBody: not such a form.
        TooLarge: more parts than the limits let through, or a text that is longer.
    """
    _refuse_slow(body, b"--" + boundary, limits)
    reader = _Reader(limits)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]  # a TypedDict of the same keys
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _unreadable("Invalid multipart data.") from error
    return reader.parts


def _refuse_slow(body: bytes, delimiter: bytes, limits: FormLimits) -> None:
    """Refuse what the parser would walk through byte by byte: delimiters without end, or blanks behind one."""
    at, left = body.find(delimiter), limits.max_files + limits.max_texts + 1  # one ends the form
    while at >= 0:
        after = at + len(delimiter)
        left -= 1
        if left < 0:
            raise TooLarge(f"more than {limits.max_files + limits.max_texts:,} parts in one form")
        if body[after : after + MAX_BLANKS].isspace() and len(body) - after >= MAX_BLANKS:
            raise _unreadable(f"More than {MAX_BLANKS} blanks behind a boundary.")
        at = body.find(delimiter, after)


def _unreadable(reason: str) -> MalformedBody:
    return MalformedBody(f"the multipart body cannot be read: {reason}")


class _Reader:
    """What the parser calls, with places in the body instead of copies of it."""

    def __init__(self, limits: FormLimits) -> None:
        self.parts: list[FormPart] = []
        self._limits = limits
        self._files = self._texts = 0
        self._start_part()

    def callbacks(self) -> Mapping[str, Callable[..., None]]:
        """What of the form is listened to."""
        return {
            "on_part_begin": self._start_part,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
        }

    def _start_part(self) -> None:
        self._field, self._disposition = b"", b""
        self._name, self._is_file = "", False
        self._pieces: list[bytes] = []
        self._size = 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._field = data[start:end].lower()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        if self._field == b"content-disposition":
            self._disposition = data[start:end]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _unreadable('The Content-Disposition header field "name" must be provided.')
        self._name = _text_of_header(options[b"name"])
        self._is_file = b"filename" in options
        self._count()

    def _count(self) -> None:
        self._files += self._is_file
        self._texts += not self._is_file
        if self._files > self._limits.max_files:
            raise TooLarge(f"more than {self._limits.max_files:,} files in one form")
        if self._texts > self._limits.max_texts:
            raise TooLarge(f"more than {self._limits.max_texts} texts in one form")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if not self._is_file and self._size > self._limits.max_text_bytes:
            raise TooLarge(f"a text of the form exceeds {self._limits.max_text_bytes:,} bytes")
        self._pieces.append(data[start:end])

    def _part_end(self) -> None:
        self.parts.append(FormPart(self._name, b"".join(self._pieces), self._is_file))


def _text_of_header(value: bytes) -> str:
    """Browsers send UTF-8; anything else is read as latin-1, which every byte is."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
