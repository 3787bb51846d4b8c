"""The installed command as a process of its own, for what only another process can show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sys.executable).parent / "backbone-service")
DEADLINE_S = 60.0


def environment(**given: str) -> dict[str, str]:
    """The environment without the settings of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("BACKBONE_", "HF_"))}
    return {
        **clean,
        "BACKBONE_CONFIG_DIR": str(ROOT / "model_configs"),
        "BACKBONE_DEVICE": "cpu",
        "BACKBONE_ENGINE": "torch",
        **given,
    }


def wait_until(holds: Callable[[], bool]) -> None:
    """For what another process does and does not say."""
    ends = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < ends
        os.sched_yield()


class Process:
    """`backbone-service serve --port 0`, up and listening; its log is read all the time.

    Args:
        program: Python to run instead, which must say in the same words where it listens.
        under: a command that runs it, as `nice` would.
    """

    def __init__(
        self, folder: Path, *arguments: str, program: str = "", under: Sequence[str] = (), **settings: str
    ) -> None:
        command = [sys.executable, "-c", program] if program else [COMMAND, "serve", "--port", "0"]
        self._process = subprocess.Popen(
            [*under, *command, *arguments],
            cwd=folder,
            env=environment(**settings),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.port = self._find_port()
        except BaseException:
            self._end()
            raise
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def _find_port(self) -> int:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.wait_for_line("running on"))
        assert found
        return int(found[1])

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()
        with self._more:
            self.lines.append("(end of the log)")
            self._more.notify_all()

    def wait_for_line(self, words: str) -> str:
        """The first line with these words."""

        def found() -> str | None:
            return next((line for line in self.lines if words in line or line == "(end of the log)"), None)

        with self._more:
            line = self._more.wait_for(found, timeout=60)
        assert line is not None
        assert words in line, "".join(self.lines)
        return line

    @property
    def pid(self) -> int:
        """Its number among the processes."""
        return self._process.pid

    def resident_bytes(self) -> int:
        """What the process has in memory now."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def allow_more_memory(self, more_bytes: int) -> None:
        """Let the process map so many bytes more than it has now; what asks for more finds none. Linux only."""
        process = psutil.Process(self._process.pid)
        limit = process.memory_info().vms + more_bytes
        process.rlimit(psutil.RLIMIT_AS, (limit, limit))

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        status = self._process.wait(60)
        self._reader.join(60)
        return status

    def close(self) -> None:
        self.http.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait(60)
        self._reader.join(60)
        assert self._process.stderr is not None
        self._process.stderr.close()


Start = Callable[..., Process]
