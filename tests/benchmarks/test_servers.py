"""Servers under measurement: that they come up, stand still and leave nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.failures import ServerFailed
from benchmarks.load import process_tree
from benchmarks.processes import Launch, running

PARENT_OF_ONE = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "http.server", sys.argv[1], "--bind", "127.0.0.1"])
child.wait()
"""


def test_what_a_server_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    with running(
        lambda port: Launch([sys.executable, "-c", PARENT_OF_ONE, str(port)], "/"), tmp_path
    ) as server:
        assert server.wait_until_up() > 0
        family = process_tree(server.pid)
        assert len(family) == 2
        assert server.memory_bytes() > 1_000_000
    assert not any(process.is_running() for process in family)


def test_a_paused_server_is_stopped_with_its_children_and_goes_on(tmp_path: Path) -> None:
    with running(
        lambda port: Launch([sys.executable, "-c", PARENT_OF_ONE, str(port)], "/"), tmp_path
    ) as server:
        server.wait_until_up()
        server.pause()
        assert {process.status() for process in process_tree(server.pid)} == {psutil.STATUS_STOPPED}
        server.resume()
        server.wait_until_up()
        assert psutil.STATUS_STOPPED not in {process.status() for process in process_tree(server.pid)}


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        running(lambda port: Launch(command, "/"), tmp_path) as server,
        pytest.raises(ServerFailed, match="no such model"),
    ):
        server.wait_until_up()
