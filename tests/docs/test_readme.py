"""The README's examples, run as a user would paste them."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import ROOT, RunningService

README = (ROOT / "README.md").read_text()
URL = "http://127.0.0.1:8000"
SECTIONS = ("Two commands", "Examples", "Drop in a config")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every block to run, in order."""
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", README, flags=re.MULTILINE)}
    text = "".join(sections[name] for name in SECTIONS)
    return re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


EXAMPLES = [block for block in blocks() if "make " not in block[1]]


@pytest.fixture
def folder(tmp_path: Path, photo: bytes) -> Path:
    (tmp_path / "photo.jpg").write_bytes(photo)
    return tmp_path


def run(language: str, text: str, folder: Path, url: str) -> str:
    """What a block prints, run in `folder` against the service at `url`."""
    script = text.replace(URL, url).replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BACKBONE_CONFIG_DIR": str(ROOT / "model_configs")}
    done = subprocess.run(
        [*command, script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of whatever file an example saved."""
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load(path.read_bytes())
    for path in folder.glob("*.npz"):
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            found |= {name: archive[name] for name in archive.files if name != "meta.json"}
    return found


def test_there_are_enough_examples_and_one_in_python() -> None:
    assert len(EXAMPLES) >= 6
    assert "python" in {language for language, _ in EXAMPLES}


def test_the_first_command_is_a_target_of_the_makefile() -> None:
    commands = [line for _, text in blocks() for line in text.splitlines() if line.startswith("make ")]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert commands
    assert {command.split()[1] for command in commands} <= targets


@pytest.mark.parametrize(("language", "text"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_an_example_works_as_pasted(language: str, text: str, folder: Path, service: RunningService) -> None:
    printed = run(language, text, folder, service.url)
    if language == "python":
        shapes = re.findall(r"^\S+ \((\d+(?:, \d+)+)\) \d+$", printed, re.MULTILINE)
        assert len(shapes) == len(printed.splitlines()) == 3
    elif printed:
        levels = json.loads(printed)["levels"]
        assert levels
        assert all(level["shape"] for level in levels)
    else:
        arrays = saved_arrays(folder)
        assert arrays
        assert all(np.isfinite(array).all() for array in arrays.values())


def test_the_first_curl_gives_the_shapes_that_the_readme_promises(
    folder: Path, service: RunningService
) -> None:
    promised = re.search(r"answers with four levels, ([^.]*)\.", README)
    assert promised
    shapes = [[int(side) for side in shape.split("×")] for shape in re.findall(r"\d+×\d+×\d+", promised[1])]
    levels = json.loads(run(*EXAMPLES[0], folder, service.url))["levels"]
    assert [level["shape"][1:] for level in levels] == shapes
    assert len(shapes) == 4
