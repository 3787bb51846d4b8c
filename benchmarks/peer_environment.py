"""The peers' own environment: `.venv-bench`, which sees this one's packages so that torch is not installed twice."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from benchmarks.processes import ROOT

FOLDER = ROOT / ".venv-bench"
PINS = Path(__file__).parent / "requirements.txt"
PYTHON = FOLDER / "bin" / "python"


class NotInstalled(RuntimeError):
    """A peer could not be installed, with the end of what pip said."""


def _own_packages() -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return FOLDER / "lib" / version / "site-packages"


def _make() -> None:
    venv.create(FOLDER, with_pip=True)
    # Read after the environment's own folder: what is installed there comes first.
    shared = sysconfig.get_paths()["purelib"]
    (_own_packages() / "shared-packages.pth").write_text(f"{shared}\n")


def _pinned(package: str) -> str:
    pins = dict(line.strip().split("==") for line in PINS.read_text().splitlines() if "==" in line)
    return pins[package]


def installed_version(package: str) -> str | None:
    """The version of a package in the peers' environment."""
    found: Sequence[Distribution] = list(distributions(name=package, path=[str(_own_packages())]))
    return found[0].version if found else None


def install(package: str) -> str:
    """The version of a peer's package, installed if need be at its pin.

    Raises:
        NotInstalled: pip could not.
    """
    if not PYTHON.exists():
        _make()
    pin = _pinned(package)
    if installed_version(package) != pin:
        pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["-c", str(PINS), "-c", str(ROOT / "constraints.txt")]
        done = subprocess.run([*pip, *constraints, package], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalled(done.stderr.strip()[-500:])
    return pin
