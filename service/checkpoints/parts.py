"""The beginnings of downloads that broke off: kept beside their target, to be gone on with.

`FILE.part` is locked (flock) by the process that writes it; another process that wants the same file meanwhile takes a
part of its own. `FILE.part.json` says which bytes of which file they are: the validator that the server gave for it
(RFC 9110, section 8.8) goes back to the server with the range that is missing, and another file starts over.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from service.errors import RemoteFailed, RemoteTimeout

SUFFIX: Final = ".part"
MAX_AGE_S: Final = 7 * 24 * 3600.0
MAX_PARTS: Final = 16
MAX_NOTE_BYTES: Final = 4096
MAX_VALIDATOR_LENGTH: Final = 256
OPEN_ATTEMPTS: Final = 8
STRONG_ETAG: Final = re.compile(r'"[^"]*"')


@dataclass(frozen=True)
class Note:
    """What a server said of the file that it sent: where it was asked, a strong validator, bytes or None."""

    url: str
    validator: str
    size: int | None

    @property
    def is_etag(self) -> bool:
        """Whether the validator is an ETag, and not a date."""
        return self.validator.startswith('"')


def note_of(url: str, headers: Mapping[str, str], size: int | None) -> Note | None:
    """The note of an answer, None where it has no strong validator: such a file cannot be gone on with."""
    etag = headers.get("ETag", "")
    validator = etag if STRONG_ETAG.fullmatch(etag) else _strong_date(headers)
    if not validator or len(validator) > MAX_VALIDATOR_LENGTH or not validator.isascii():
        return None
    return Note(url, validator, size)


def _strong_date(headers: Mapping[str, str]) -> str:
    """`Last-Modified`, if the file was left alone for a second before it was sent (RFC 9110, section 8.8.2.2)."""
    modified = headers.get("Last-Modified", "")
    try:
        rested = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError):  # one of them is no date, or only one has a time zone
        return ""
    return modified if rested.total_seconds() >= 1 else ""


class Part:
    """What is there of a file. Only the process that holds its lock has one of these.

    Attributes:
        path: where it is.
        note: whose bytes they are, None where they cannot be gone on with.
    """

    def __init__(self, path: Path, file: BinaryIO, note: Note | None, *, shared: bool) -> None:
        self.path = path
        self.note = note
        self._file = file
        self._shared = shared
        self.size = file.seek(0, os.SEEK_END)
        if note is None:
            self.restart(None)

    def restart(self, note: Note | None) -> None:
        """Throw the bytes away, to write those of the file of this note."""
        self._file.seek(0)
        self._file.truncate()
        self.size, self.note = 0, note
        # Between the two there are no bytes that the old note could be taken for the note of.
        if self._shared:
            _write_note(self.path, note)

    def write(self, data: bytes) -> None:
        """Go on with these bytes."""
        self._file.write(data)
        self.size += len(data)

    def chunks(self, size: int = 2**20) -> Iterator[bytes]:
        """What is there, from the first byte to the last; writing then goes on behind it."""
        self._file.seek(0)
        while chunk := self._file.read(size):
            yield chunk

    def sync(self) -> None:
        """To the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def move_to(self, target: Path) -> None:
        """Become the whole file."""
        os.fchmod(self._file.fileno(), 0o644)
        # While it is locked: behind the renaming there may be another's note.
        _note_path(self.path).unlink(missing_ok=True)
        self.path.replace(target)

    def settle(self) -> None:
        """Stay for another request if that can go on with it, else go."""
        if self._shared and self.note is not None and self.size:
            self._file.flush()
        else:
            self.discard()

    def discard(self) -> None:
        """Go, with the note."""
        _note_path(self.path).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


@contextmanager
def open_part(target: Path) -> Iterator[Part]:
    """What there is of the file at `target`, locked.

    It stays behind a remote failure, if it can be gone on with, and goes with every other.
    """
    shared = target.with_name(target.name + SUFFIX)
    file = _locked(shared)
    if file is not None:
        path, note = shared, _read_note(shared)
    else:  # another process is at it, or the file system has no locks
        path, file, note = *_own(target.parent), None
    with file:
        part = Part(path, file, note, shared=path == shared)
        try:
            yield part
        except (RemoteFailed, RemoteTimeout):
            part.settle()
            raise
        except BaseException:
            part.discard()
            raise


def sweep_parts(directory: Path, max_bytes: int) -> None:
    """Remove parts that nobody writes and that are old, or more than may be kept, the oldest first."""
    now, kept, kept_bytes = time.time(), 0, 0
    for path, status in _by_age(directory):
        kept, kept_bytes = kept + 1, kept_bytes + status.st_size
        if now - status.st_mtime > MAX_AGE_S or kept > MAX_PARTS or kept_bytes > max_bytes:
            _remove_unlocked(path)


def _by_age(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """Every part below a directory, the youngest first."""
    found = []
    for path in directory.rglob(f"*{SUFFIX}"):
        try:
            found.append((path, path.lstat()))
        except OSError:  # it has become a whole file meanwhile
            continue
    return sorted(found, key=lambda each: each[1].st_mtime, reverse=True)


def _remove_unlocked(path: Path) -> None:
    file = _locked(path)
    if file is not None:
        with file:
            _note_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def _own(folder: Path) -> tuple[Path, BinaryIO]:
    handle, name = tempfile.mkstemp(suffix=SUFFIX, dir=folder)
    _lock(handle)
    return Path(name), os.fdopen(handle, "r+b")


def _locked(path: Path) -> BinaryIO | None:
    """The file at a path, made if need be and locked; None where another has it."""
    for _ in range(OPEN_ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not _lock(handle):
            os.close(handle)
            return None
        # Who had the lock before may have moved the file to its place: it is whole now, and not ours to write.
        if _is_at(handle, path):
            return os.fdopen(handle, "r+b")
        os.close(handle)
    return None


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or there are no locks here
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


# --- notes ----------------------------------------------------------------------------------------


def _note_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_note(path: Path, note: Note | None) -> None:
    place = _note_path(path)
    if note is None:
        place.unlink(missing_ok=True)
    else:
        place.write_bytes(orjson.dumps(asdict(note)))


def _read_note(path: Path) -> Note | None:
    """The note of a part; None where there is none, or half of one."""
    try:
        with _note_path(path).open("rb") as file:
            told = orjson.loads(file.read(MAX_NOTE_BYTES))
    except (OSError, orjson.JSONDecodeError):
        return None
    if not isinstance(told, dict):
        return None
    url, validator, size = (told.get(key) for key in ("url", "validator", "size"))
    if not isinstance(url, str) or not isinstance(validator, str) or not isinstance(size, int | None):
        return None
    return Note(url, validator, size)
