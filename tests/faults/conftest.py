"""What the tests of faults share: a disk that is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints.conftest import remote  # noqa: F401 - a fixture of theirs


class SmallDisk:
    """A file system of its own that holds a megabyte."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave no room."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def clear(self) -> None:
        """Give the room back."""
        (self.path / "filler").unlink()

    def grow(self) -> None:
        """Hold fifty megabytes."""
        self._mount("remount,size=50m")

    def mount(self) -> bool:
        """Whether it is there; only root may do that, and not everywhere."""
        return self._mount("size=1m") == 0

    def _mount(self, options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path]
        return subprocess.run(command, capture_output=True).returncode


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    disk = SmallDisk(folder)
    try:
        is_there = disk.mount()
    except FileNotFoundError:
        is_there = False
    if not is_there:
        pytest.skip("a file system can be mounted by root only, where mounting is allowed")
    yield disk
    subprocess.run(["umount", "-l", folder], check=True)
