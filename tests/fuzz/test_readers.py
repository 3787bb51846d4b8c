"""A moment of coverage-guided fuzzing of everything that reads bytes of strangers; `make fuzz` goes on for long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.coverage import PACKAGES
from tests.fuzz.targets import TARGETS
from tests.processes import ROOT

RUNS = 2000


def test_every_target_has_packages_that_guide_it() -> None:
    assert PACKAGES.keys() == TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_what_every_target_starts_from_is_read(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    command = [sys.executable, "-m", "tests.fuzz.coverage", name, str(tmp_path / "corpus")]
    # No limit on memory: a process starts out with the peak of the one that started it.
    limits = ["-max_len=4096", "-rss_limit_mb=0"]
    options = ["-seed=1", f"-runs={RUNS}", *limits, f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert f"Done {RUNS} runs" in run.stderr
