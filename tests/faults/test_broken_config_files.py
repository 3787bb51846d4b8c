"""Named configs that are edited, replaced or no files at all, under a running service."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.api.problems import assert_problem
from tests.checkpoints.test_weights_over_http import IMAGES
from tests.conftest import RunningService, Serve, multipart

TINY = "type: ResNet\ndepth: 18\nbase_channels: 4\nout_indices: [3]\n"


def bomb(path: Path) -> None:
    """Ten lists of ten of the one before: ten thousand million words."""
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 10)]
    path.write_text("\n".join(lines))


def large(path: Path) -> None:
    path.write_text(TINY + "#" * 10_000_000)


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def half(path: Path) -> None:
    path.write_text('type: "ResN')


def itself(path: Path) -> None:
    path.write_text("type: ResNet\narch: &a [*a]\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config folder with one config."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def status_of(service: RunningService) -> int:
    return service.http.post("/features", **multipart("tiny", tensor=IMAGES)).status_code


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, bomb, large, deep, garbage, half, itself, lambda path: path.symlink_to("/dev/zero")],
    ids=["pipe", "bomb", "large", "deep", "garbage", "half", "itself", "endless"],
)
def test_a_config_that_becomes_unreadable_is_refused_until_it_is_mended(
    serve: Serve, folder: Path, make: Callable[[Path], object]
) -> None:
    service, path = serve(config_dir=folder), folder / "tiny.yaml"
    assert status_of(service) == 200
    path.unlink()
    make(path)
    assert_problem(service.http.post("/features", **multipart("tiny", tensor=IMAGES)), 422, "invalid-config")
    assert_problem(service.http.get("/configs/tiny"), 422, "invalid-config")
    path.unlink()
    path.write_text(TINY)
    assert status_of(service) == 200


def test_an_edit_is_seen_by_the_next_request(serve: Serve, folder: Path) -> None:
    service = serve(config_dir=folder)
    models = []
    for depth in (18, 34, 18):
        (folder / "tiny.yaml").write_text(TINY.replace("18", str(depth)))
        reply = service.http.post("/features", **multipart("tiny", tensor=IMAGES))
        models.append(reply.headers["x-model-id"])
    assert models[0] == models[2] != models[1]


def test_a_config_folder_that_goes_away_has_no_configs(serve: Serve, folder: Path) -> None:
    service = serve(config_dir=folder)
    folder.rename(folder.with_name("elsewhere"))
    assert_problem(service.http.get("/configs/tiny"), 404, "unknown-config")
    folder.with_name("elsewhere").rename(folder)
    assert service.http.get("/configs/tiny").status_code == 200
