"""`python -m tests.fuzz` (`make fuzz`): everything here for as long as one likes; 1 where something was found.

What the fuzzers learned stays in `.fuzz/` and is gone on with the next time; a finding is a file there, and
`python -m tests.fuzz.coverage TARGET .fuzz/TARGET FILE` runs it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.coverage import PACKAGES
from tests.fuzz.effort import VARIABLE

FOLDER = Path(".fuzz")
MAX_BYTES = 65_536


def main() -> int:
    """Fuzz the readers one after the other, then the routes."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each reader (default: 5)")
    parser.add_argument(
        "--times", type=int, default=20, help="examples of the routes, as often as in make test"
    )
    parser.add_argument(
        "--only", choices=[*PACKAGES, "routes"], action="append", help="one of them; may be repeated"
    )
    options = parser.parse_args()
    wanted = options.only or [*PACKAGES, "routes"]
    failed = [
        name
        for name in wanted
        if (_routes(options.times) if name == "routes" else _reader(name, options.minutes))
    ]
    print(f"findings: {', '.join(failed)}" if failed else "nothing was found")
    return 1 if failed else 0


def _reader(name: str, minutes: float) -> int:
    print(f"{name}: {minutes:g} minutes", flush=True)
    options = [f"-max_total_time={int(minutes * 60)}", f"-max_len={MAX_BYTES}", f"-artifact_prefix={FOLDER}/"]
    FOLDER.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.coverage", name, str(FOLDER / name), *options]
    return subprocess.run([*command, "-timeout=10", "-rss_limit_mb=4096"], check=False).returncode


def _routes(times: int) -> int:
    print(f"routes: {times} times what make test sends", flush=True)
    command = [sys.executable, "-m", "pytest", "tests/fuzz", "--timeout=0", "-k", "not atheris"]
    return subprocess.run(command, env={**os.environ, VARIABLE: str(times)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
