"""Packs through the door of a service that answers with OpenVINO alone, from the first request on.

`make test` takes the lightest pack of each room of `service/backbones/`, and of these the lightest. All packs, about
half an hour on two cores: `BACKBONE_TEST_ALL_PACKS=1 make test ARGS=tests/parity/test_engines.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from service.backbones.catalogue import backbone_registry
from service.backbones.lazyconfig import from_lazyconfig
from service.backbones.registry import json_type
from service.client import BackboneClient, BackboneServiceError
from tests.conftest import RunningService, settings_for
from tests.parity.packs import load_pack, pack_names, relative_error, write_checkpoint
from tests.parity.test_http import features_of

pytest.importorskip("openvino", reason="OpenVINO is not installed on this machine")

TOLERANCE = 1e-4
SAMPLED = 24
# Asked at once, so that one converter serves them: it ends when it has nothing to do.
AT_ONCE = 6
CACHE_BYTES = 3 * 2**30
CONVERSION_TIMEOUT_S = 600.0
# Packs of networks that stay on torch, and what of the refusal says why. The packs' weights make these enlarge every
# rounding: torch's own float32 is up to 0.6 away from its float64 (RegNetY's 4e-5, and OpenVINO's 1.2e-4).
REFUSED: Mapping[str, str] = {
    "detectron2/d2_regnety_4gf": "it differs from torch",
    "detectron2/detrex_tvresnet50_dc5_notrain": "OpenVINO has no operator",
    "detectron2/detrex_tvresnet50_train": "OpenVINO has no operator",
    "openmmlab/mmdet-ResNet-50-dcn-fallback": "it differs from torch",
    "openmmlab/mmdet-ResNeXt-50-dcnv2": "it differs from torch",
    "openmmlab/mmpretrain-SEResNeXt-50": "it differs from torch",
    "openmmlab/mmpretrain-T2T_ViT-14": "it differs from torch",
    "timm-torchvision/timm_levit_128": "it differs from torch",
}
PACKS = {name: pack for name in pack_names() if not (pack := load_pack(name)).is_neck}


def numbers(name: str) -> int:
    """How many numbers the checkpoint of a pack holds."""
    return sum(math.prod(entry.shape) for entry in PACKS[name].entries)


def lightest_of_each_room() -> list[str]:
    """One pack for each module of families, from light to heavy."""
    registry, found = backbone_registry(), dict[str, str]()
    for name in sorted(PACKS, key=lambda name: (numbers(name), name)):
        type_name = json_type(from_lazyconfig(PACKS[name].config), pointer="")
        room, _, _ = registry.resolve(type_name).entry.family.partition(":")
        found.setdefault(room, name)
    return list(found.values())


def tried() -> list[tuple[str, ...]]:
    """The packs to try, in groups."""
    everything = os.environ.get("BACKBONE_TEST_ALL_PACKS") == "1"
    names = sorted(PACKS, key=numbers) if everything else lightest_of_each_room()[:SAMPLED]
    return [tuple(names[start : start + AT_ONCE]) for start in range(0, len(names), AT_ONCE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[BackboneClient]:
    settings = settings_for(
        folder,
        engine="openvino",
        engine_cache_bytes=CACHE_BYTES,
        min_residency=0,
        request_timeout=CONVERSION_TIMEOUT_S,
    )
    with (
        RunningService(settings) as running,
        BackboneClient(running.url, timeout_s=CONVERSION_TIMEOUT_S) as client,
    ):
        yield client


@pytest.fixture
def checkpoints(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """The checkpoints of the packs of one test."""
    paths = {folder / PACKS[name].checkpoint_name(): PACKS[name] for name in names}
    for path, pack in paths.items():
        write_checkpoint(pack, path)
    yield
    for path in paths:
        path.unlink()


def finding(client: BackboneClient, name: str) -> str:
    """What is wrong with the features of a pack; empty if nothing is."""
    pack = PACKS[name]
    try:
        features = features_of(client, pack)
    except BackboneServiceError as error:
        return str(error)
    errors = [
        relative_error(level.array, expected) / max(TOLERANCE, expected.tolerance)
        for level, expected in zip(features.levels.values(), pack.outputs, strict=True)
        if level.array is not None
    ]
    assert len(errors) == len(pack.outputs)
    assert features.model["engine"] == "openvino"
    return "" if max(errors) <= 1 else f"differs by {max(errors):.1f} times what is tolerated"


@pytest.mark.timeout(3 * CONVERSION_TIMEOUT_S)
@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("names", tried(), ids=lambda names: f"{names[0]}-and-{len(names) - 1}-more")
def test_the_promoted_engine_gives_the_librarys_levels(names: Sequence[str], client: BackboneClient) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        findings = dict(zip(names, threads.map(partial(finding, client), names), strict=True))
    wrong = {name: found for name, found in findings.items() if found and name not in REFUSED}
    assert not wrong
    # Those that are refused are so for the reason that the table says: it must stay true.
    for name in REFUSED.keys() & findings.keys():
        assert REFUSED[name] in findings[name]
