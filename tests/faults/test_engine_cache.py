"""The engine cache: damaged, cut off, without room, or left by a process that was killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from service.errors import Unavailable
from service.runtime.engines.artefacts import ArtefactStore, Facts
from service.runtime.engines.base import FIRST_REQUESTS
from tests.conftest import RunningService, Serve, multipart, settings_for
from tests.engines.test_promotion import SMALL, ask, distance, entry_of, images, maps, promote
from tests.faults.conftest import SmallDisk
from tests.processes import DEADLINE_S, Start, wait_until

pytest.importorskip("openvino", reason="OpenVINO is not installed on this machine")


def weights_in(folder: Path) -> Path:
    """The one file of constants in the cache."""
    [path] = folder.glob("*.bin")
    return path


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one converted network, to be copied."""
    folder = tmp_path_factory.mktemp("cache")
    settings = settings_for(tmp_path_factory.mktemp("empty"), engine="auto", engine_cache=folder)
    with RunningService(settings) as service:
        promote(service)
    return folder


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half])
def test_a_damaged_network_is_not_used_but_removed(
    serve: Serve, tmp_path: Path, cache: Path, damage: Callable
) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    damage(weights_in(folder))
    service = serve(engine="auto", engine_cache=folder)
    reply = ask(service)
    assert reply.json()["model"]["engine"] == "torch"
    promotion = entry_of(service, reply.headers["x-model-id"])["promotion"]
    assert promotion == {"state": "waiting", "reason": "the files of its converted network were damaged"}
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []


def test_a_network_in_memory_outlives_its_files(serve: Serve, tmp_path: Path, cache: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    service, other = serve(engine="auto", engine_cache=folder), {**SMALL, "out_indices": [1, 2]}
    assert ask(service).json()["model"]["engine"] == "openvino"
    weights_in(folder).write_bytes(b"")  # of a mapped file every page would be gone
    reply = ask(service, other)  # compiles once more
    assert reply.json()["model"]["engine"] == "openvino"
    expected = maps(ask(serve(engine="torch"), other))
    assert all(distance(a, b) <= 1e-5 for a, b in zip(maps(reply), expected, strict=True))


def test_a_model_is_converted_once_there_is_room(serve: Serve, small_disk: SmallDisk) -> None:
    service = serve(engine="auto", engine_cache=small_disk.path / "cache")
    reply = promote(service)
    described = entry_of(service, reply.headers["x-model-id"])["promotion"]
    assert described == {"state": "waiting", "reason": "the engine cache has no room on its disk for it"}
    small_disk.grow()
    promote(service)
    assert ask(service).json()["model"]["engine"] == "openvino"


def test_facts_without_room_are_an_error_that_leaves_nothing(small_disk: SmallDisk) -> None:
    store = ArtefactStore(small_disk.path, 10**9)
    facts = Facts("m", "", "refused", reason="r" * 9000)
    small_disk.fill()
    with pytest.raises(Unavailable, match="no room"):
        store.keep(facts, None)
    assert store.known("m") == []
    small_disk.clear()
    store.keep(facts, None)
    assert len(store.known("m")) == 1
    store.close()


def test_a_converter_ends_with_its_service_and_what_it_left_is_removed(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    settings = {"BACKBONE_ENGINE": "auto", "BACKBONE_ENGINE_CACHE": str(folder)}
    service = start(**settings)
    for _ in range(FIRST_REQUESTS):
        service.http.post("/features", **multipart(SMALL, tensor=images())).raise_for_status()
    wait_until(lambda: any(folder.glob(".making-*/*.xml")))
    [converter] = psutil.Process(service.pid).children()
    service.signal(signal.SIGKILL)
    service.wait()
    converter.wait(DEADLINE_S)
    [left] = folder.glob(".making-*")
    start(**settings).http.get("/models").raise_for_status()
    assert not left.exists()
