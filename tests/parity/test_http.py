"""Every pack through the door: a checkpoint file and a tensor go in, what the real library gives comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.client import BackboneClient
from service.protocol.decode import Features
from tests.conftest import RunningService, Serve, settings_for
from tests.parity.packs import HEAD, Pack, load_pack, pack_names, relative_error, write_checkpoint
from tests.parity.recipe import make_input

PACKS = {name: load_pack(name) for name in pack_names()}
NECKS = [name for name, pack in PACKS.items() if pack.is_neck]
POOLINGS = [name for name in NECKS if "GlobalAveragePooling" in name]
# Those of one checkpoint follow each other, so that its file is written once.
BACKBONES = sorted(PACKS.keys() - set(NECKS), key=lambda name: (PACKS[name].checkpoint_name(), name))
FORMATS = ("application/vnd.safetensors", "application/x-npz", "application/vnd.apache.arrow.stream")
FORMAT_OF = {name: FORMATS[position % len(FORMATS)] for position, name in enumerate(BACKBONES)}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# The largest pack fits, and not many beside it: most of them come to a memory that must be cleared for them.
BUDGET = 700_000_000


class CheckpointFolder:
    """Holds the checkpoint of one pack at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: Path | None = None
        self._sha256 = ""

    def put(self, pack: Pack) -> str:
        """Write the pack's checkpoint unless it is there; returns its sha256."""
        path = self.folder / pack.checkpoint_name()
        if path != self._path:
            self.clear()
            write_checkpoint(pack, path)
            with path.open("rb") as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self._path = path
        return self._sha256

    def clear(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink()
        self._path = None


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointFolder]:
    folder = CheckpointFolder(tmp_path_factory.mktemp("parity"))
    yield folder
    folder.clear()


@pytest.fixture(scope="module")
def small_service(checkpoints: CheckpointFolder) -> Iterator[RunningService]:
    """A service with memory for few models."""
    settings = settings_for(
        checkpoints.folder, model_budget=str(BUDGET), min_residency=0, request_timeout=120
    )
    with RunningService(settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(small_service: RunningService) -> Iterator[BackboneClient]:
    with BackboneClient(small_service.url, timeout_s=120) as client:
        yield client


def features_of(client: BackboneClient, pack: Pack, accept: str = FORMATS[0]) -> Features:
    return client.features(backbone=pack.config_with_weights(), tensor=pack.input_arrays()[0], accept=accept)


def errors_of(pack: Pack, features: Features) -> list[float]:
    """The relative error of each output, in units of what is tolerated."""
    found = []
    for level, expected in zip(features.levels.values(), pack.outputs, strict=True):
        assert level.array is not None
        assert level.shape == level.array.shape == expected.shape
        found.append(relative_error(level.array, expected) / expected.tolerance)
    return found


@pytest.mark.parametrize("name", BACKBONES)
def test_every_level_is_the_librarys(
    name: str, client: BackboneClient, checkpoints: CheckpointFolder
) -> None:
    pack = PACKS[name]
    sha256 = checkpoints.put(pack)
    features = features_of(client, pack, FORMAT_OF[name])
    assert max(errors_of(pack, features)) <= 1
    weights = features.model["weights"]
    assert (weights["source"], weights["checkpoint"]) == ("checkpoint", pack.checkpoint_name())
    assert weights["sha256"] == sha256
    assert_every_key_is_accounted_for(pack, weights)
    budget = client.models()["budget"]
    assert 0 < budget["used"] <= budget["bytes"] == BUDGET


def assert_every_key_is_accounted_for(pack: Pack, weights: Mapping[str, Any]) -> None:
    written = pack.state().keys()
    # Packs leave out what a network computes itself, which torchvision's own files have.
    assert set(weights["missing"]) <= {entry.name for entry in pack.entries} - written
    if pack.is_openmmlab:
        assert (weights["loaded"], weights["unexpected"]) == (len(written), list(HEAD))
    else:
        assert set(weights["unexpected"]) < written
        assert weights["loaded"] + len(weights["unexpected"]) == len(written)


@pytest.mark.parametrize("name", [name for name in BACKBONES if PACKS[name].frozen])
def test_inspect_lists_what_the_library_freezes(name: str, client: BackboneClient) -> None:
    pack = PACKS[name]
    parameters = [entry.name for entry in pack.entries if entry.leaf not in STATISTICS]
    for frozen in pack.frozen:
        report = client.inspect({**pack.config, **frozen.update})["frozen"]
        assert report["parameters"] == list(frozen.parameters)
        assert report["norms"] == list(frozen.norms)
        assert report["of"] == (len(parameters) if frozen.of is None else frozen.of)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_behind_a_backbone_gives_the_means_of_its_maps(name: str, client: BackboneClient) -> None:
    config = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [1, 3]}
    images = make_input("images", (2, 3, 64, 96))
    maps = client.features(backbone=config, tensor=images).arrays
    pooled = client.features(backbone=config, tensor=images, neck=PACKS[name].config)
    assert list(pooled.levels) == ["1", "3"]
    for level, found in pooled.arrays.items():
        np.testing.assert_allclose(found, maps[level].mean((2, 3)), rtol=1e-5, atol=1e-7)


def test_a_model_that_made_room_comes_back_the_same(serve: Serve, tmp_path: Path) -> None:
    first, second = PACKS["openmmlab/mmpretrain-ResNet-18"], PACKS["openmmlab/mmpretrain-ResNet-34"]
    service = serve(model_budget="100000000", min_residency=0)
    for pack in (first, second):
        write_checkpoint(pack, tmp_path / pack.checkpoint_name())
    with BackboneClient(service.url) as client:
        before = features_of(client, first)
        other = features_of(client, second)
        assert [model["id"] for model in client.models()["models"]] == [other.model["id"]]
        after = features_of(client, first)
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(after.arrays[name], array)
    assert max(errors_of(second, other)) <= 1
    assert evictions(service.http) == 2


def evictions(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("backbone_model_evictions_total "))
