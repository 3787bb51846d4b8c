"""Checkpoints that are replaced, cut off, overwritten, removed or no files at all, under a running service."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from service.checkpoints.read import read_checkpoint
from service.errors import Unavailable
from tests.api.problems import assert_problem
from tests.checkpoints.test_weights_over_http import IMAGES, TINY, weights_of
from tests.conftest import RunningService, Serve, multipart

State = dict[str, torch.Tensor]
LARGER_THAN_A_PAGE = 1_000_000


def ask(service: RunningService, name: str = "a.pth") -> httpx.Response:
    parts = multipart({**TINY, "checkpoint": name}, tensor=IMAGES, **{"return": "tensors"})
    return service.http.post("/features", **parts)


def maps(reply: httpx.Response) -> list[np.ndarray]:
    return [np.asarray(level["data"], np.float32) for level in reply.json()["levels"]]


def sha256(reply: httpx.Response) -> str:
    return str(reply.json()["model"]["weights"]["sha256"])


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


def written(folder: Path, seed: int, name: str = "a.pth") -> Path:
    data = io.BytesIO()  # torch.save writes the name of a file into it
    torch.save(weights_of(seed), data)
    (folder / name).write_bytes(data.getvalue())
    return folder / name


@contextmanager
def again_and_again(work: Callable[[int], object]) -> Iterator[None]:
    """Do something on another thread until the end."""
    ended = threading.Event()

    def run() -> None:
        turn = 0
        while not ended.is_set():
            work(turn)
            turn += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# A process of its own: what this test is about would end the tests.
TRUNCATED = """
import os, sys
from pathlib import Path
from service.checkpoints.read import read_checkpoint
state = read_checkpoint(Path(sys.argv[1]), pointer="#")
os.truncate(sys.argv[1], 0)
print(float(state["w"].sum()))
"""


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pkl", "-old.pth"])
def test_tensors_survive_that_their_file_is_cut_off(tmp_path: Path, ending: str) -> None:
    path, state = tmp_path / f"w{ending}", {"w": torch.ones(LARGER_THAN_A_PAGE)}
    if ending == ".safetensors":
        save_file(state, path)
    elif ending == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"w": state["w"].numpy()}}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=ending == ".pth")
    done = subprocess.run([sys.executable, "-c", TRUNCATED, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1000000.0"), done.stderr


def test_other_bytes_than_those_that_were_hashed_are_not_loaded(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    with pytest.raises(Unavailable, match="replaced while it was being loaded"):
        read_checkpoint(path, pointer="#", sha256="0" * 64)


def replaced(folder: Path) -> Callable[[int], object]:
    """One of two files renamed into the place, by turns."""
    files = [(folder / name).read_bytes() for name in ("one.pth", "two.pth")]

    def work(turn: int) -> None:
        (folder / "next.tmp").write_bytes(files[turn % 2])
        (folder / "next.tmp").rename(folder / "a.pth")

    return work


def overwritten(folder: Path) -> Callable[[int], object]:
    """One of two files, and nothing, written into the place, by turns."""
    files = [(folder / name).read_bytes() for name in ("one.pth", "two.pth")]
    return lambda turn: (folder / "a.pth").write_bytes(files[turn % 2])


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_the_digest_of_a_reply_is_that_of_the_weights_that_computed_it(
    serve: Serve, tmp_path: Path, change: Any
) -> None:
    service = serve()
    for seed, name in enumerate(("one.pth", "two.pth", "a.pth")):
        written(tmp_path, seed % 2, name)
    replies = [ask(service, name) for name in ("one.pth", "two.pth")]
    expected = {sha256(reply): maps(reply) for reply in replies}

    def is_right(reply: httpx.Response) -> bool:
        return same(maps(reply), expected[sha256(reply)])

    with again_and_again(change(tmp_path)):
        for reply in (ask(service) for _ in range(30)):
            assert reply.status_code in (200, 422, 503), reply.text
            if reply.status_code == 200:
                assert is_right(reply)
                service.http.delete(f"/models/{reply.headers['x-model-id']}")
    assert is_right(ask(service))


def test_a_file_of_the_same_size_and_time_is_another_model(serve: Serve, tmp_path: Path) -> None:
    service = serve()
    path = written(tmp_path, 1)
    before, first = path.stat(), ask(service)
    path.write_bytes(written(tmp_path, 2, "other.pth").read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    second = ask(service)
    assert sha256(second) == sha256(ask(service, "other.pth")) != sha256(first)
    assert not same(maps(first), maps(second))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def vast(path: Path) -> None:
    """A terabyte of nothing, which takes no room."""
    path.touch()
    os.truncate(path, 2**40)


WORDS = {
    "pipe": (pipe, "no checkpoint named"),
    "folder": (Path.mkdir, "no checkpoint named"),
    "empty": (Path.touch, "empty"),
    "vast": (vast, "over the limit of 8589934592 bytes"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no checkpoint named"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "no checkpoint named"),
}


@pytest.mark.parametrize("what", WORDS)
def test_what_takes_the_place_of_a_loaded_checkpoint_is_refused(
    serve: Serve, tmp_path: Path, what: str
) -> None:
    service, path = serve(), written(tmp_path, 3)
    first = ask(service)
    path.unlink()
    make, words = WORDS[what]
    make(path)
    problem = assert_problem(ask(service), 422)
    assert words in problem["detail"], problem
    assert "nearest" not in problem["detail"]
    path.rmdir() if path.is_dir() else path.unlink()
    written(tmp_path, 3)
    assert sha256(ask(service)) == sha256(first)


def test_the_folder_may_go_away_and_come_back(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    service = serve(checkpoint_dir=folder)
    written(folder, 4)
    first = ask(service)
    folder.rename(tmp_path / "elsewhere")
    assert_problem(ask(service), 422, "checkpoint-unavailable")
    assert service.http.post("/features", **multipart(TINY, tensor=IMAGES)).status_code == 200
    (tmp_path / "elsewhere").rename(folder)
    assert sha256(ask(service)) == sha256(first)
