"""Checkpoint files copied into memory, for what is read from a mapped file may change, or end the process.

Reading a page of a mapped file that has been truncated meanwhile is a SIGBUS, and one that has been written to has
other bytes than those that were hashed. A copy is what it is, and its digest says of which file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from io import BufferedReader
from pathlib import Path
from typing import Final

from service.checkpoints.pickles import DamagedPickleError
from service.files import open_regular

CHUNK_BYTES: Final = 2**20


class OtherBytesError(Exception):
    """The file has other bytes than it had when it was looked at."""


def copied(path: Path, sha256: str) -> mmap.mmap:
    """The bytes of a file in anonymous memory, which goes with the last tensor that is a view of it.

    Args:
        path: of a regular file.
        sha256: what its bytes must have; empty if any will do.

    Raises:
        OtherBytesError: they have another.
        DamagedPickleError: the file is empty, or was cut off while it was read.
        OSError: it cannot be read, or there is no memory for it.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        memory = mmap.mmap(-1, max(size, 1))
        read, digest = _fill(memory, size, file)
    if sha256 not in ("", digest):
        raise OtherBytesError
    if not read or read < size:
        raise DamagedPickleError("cut off" if size else "empty")
    return memory


def _fill(memory: mmap.mmap, size: int, file: BufferedReader) -> tuple[int, str]:
    """Read `size` bytes, or as many as there are; gives how many came, and their sha256."""
    digest, at = hashlib.sha256(), 0
    with memoryview(memory) as whole:
        while at < size and (count := file.readinto(whole[at : min(at + CHUNK_BYTES, size)])):
            digest.update(whole[at : at + count])
            at += count
    return at, digest.hexdigest()
