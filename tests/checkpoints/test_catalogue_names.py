"""Names that libraries give to their published checkpoints, from the config to the weights that a reply has."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch
from torch import Tensor, nn

from service.backbones.resnet import RESNET
from service.checkpoints.make_catalogues import FILE, torchvision_urls
from service.checkpoints.names import UrlName, parse_name
from service.client import BackboneClient
from service.config.spec import WeightsRef
from service.errors import CheckpointUnavailable, RemoteFailed
from service.settings import LIBRARY_HOSTS
from tests.api.problems import assert_problem, pointers
from tests.checkpoints.conftest import MakeStore, Remote
from tests.conftest import Serve, multipart

State = dict[str, Tensor]
OPENMMLAB = "https://download.openmmlab.com"
THIRD_PARTY = f"{OPENMMLAB}/pretrain/third_party"
PYTORCH = "https://download.pytorch.org/models"
UNSIGNED = ("open-mmlab://mmedit/mobilenet_v2", "/mmediting/third_party/mobilenet_v2.pth")
TINY = {"type": "ResNet", "depth": 18, "base_channels": 4, "out_indices": [1, 3]}
IMAGES = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
CATALOGUES = FILE.parent


def weights_of(seed: int, config: dict[str, Any] = TINY) -> State:
    """Weights of a ResNet; no two seeds give the same features."""
    torch.manual_seed(seed)
    return dict(RESNET.build(RESNET.config.model_validate(config)).state_dict())


def deepest_of(state: State) -> np.ndarray:
    """The last map of the tiny ResNet with these weights."""
    network = RESNET.build(RESNET.config.model_validate(TINY)).eval()
    network.load_state_dict(state)
    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(IMAGES), ["3"])["3"])


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected))


def keep(folder: Path, name: str, data: bytes) -> None:
    """Put a file where the download of this name leaves it, with its receipt: published digests cannot be forged."""
    parsed = parse_name(name)
    assert isinstance(parsed, UrlName)
    path = folder / "url" / parsed.key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    Path(f"{path}.json").write_text(json.dumps({"sha256": hashlib.sha256(data).hexdigest()}))


def pickled(state: State, path: Path) -> bytes:
    torch.save({"state_dict": state}, path)
    data = path.read_bytes()
    path.unlink()
    return data


# --- names to URLs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("open-mmlab://detectron2/resnet50_caffe", f"{THIRD_PARTY}/resnet50_msra-5891d200.pth"),
        ("openmmlab://regnetx_1.6gf", f"{THIRD_PARTY}/regnetx_1.6gf-5791c176.pth"),
        ("open-mmlab://resnet50_caffe", f"{THIRD_PARTY}/resnet50_caffe-788b5fa3.pth"),
        ("open-mmlab://resnet101_caffe", f"{THIRD_PARTY}/resnet101_caffe-3ad79236.pth"),
        ("openmmlab://resnet50_caffe_bgr", f"{THIRD_PARTY}/resnet50_msra-5891d200.pth"),
        ("open-mmlab://resnet101_caffe_bgr", f"{THIRD_PARTY}/resnet101_msra-6cc46731.pth"),
        (
            "mmcls://resnet50",
            f"{OPENMMLAB}/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth",
        ),
        ("torchvision://resnet50", f"{PYTORCH}/resnet50-0676ba61.pth"),
        ("modelzoo://resnet50", f"{PYTORCH}/resnet50-0676ba61.pth"),
        ("torchvision://resnet50.default", f"{PYTORCH}/resnet50-11ad3fa6.pth"),
        ("torchvision://resnet50.imagenet1k_v2", f"{PYTORCH}/resnet50-11ad3fa6.pth"),
        ("torchvision://resnet50/IMAGENET1K_V2", f"{PYTORCH}/resnet50-11ad3fa6.pth"),
        ("torchvision://vit_b_16.imagenet1k_swag_e2e_v1", f"{PYTORCH}/vit_b_16_swag-9ac1b537.pth"),
        ("torchvision://shufflenetv2_x1.0", f"{PYTORCH}/shufflenetv2_x1-5666bf0f80.pth"),
    ],
)
def test_a_librarys_name_is_the_url_that_the_library_fetches(name: str, url: str) -> None:
    assert parse_name(name) == parse_name(url)


@pytest.mark.parametrize("catalogue", ["open-mmlab", "mmcls", "torchvision"])
def test_every_name_of_a_table_leads_to_a_file_of_an_allowed_host(catalogue: str) -> None:
    table = orjson.loads((CATALOGUES / f"{catalogue}.json").read_bytes())
    parsed = [parse_name(f"{catalogue}://{name}") for name in table]
    assert {name.host for name in parsed if isinstance(name, UrlName)} <= set(LIBRARY_HOSTS)
    assert [name.name for name in parsed] == list(table.values())


@pytest.mark.parametrize("catalogue", ["open-mmlab", "torchvision"])
def test_every_deprecated_name_leads_to_one_that_is_there(catalogue: str) -> None:
    aliases = orjson.loads((CATALOGUES / "aliases.json").read_bytes())[catalogue]
    for old, new in aliases.items():
        assert parse_name(f"{catalogue}://{old}") == parse_name(f"{catalogue}://{new}")


def test_the_shipped_table_is_that_of_the_installed_torchvision() -> None:
    assert orjson.loads(FILE.read_bytes()) == torchvision_urls()


def test_a_name_of_torchvision_is_found_without_torchvision() -> None:
    program = (
        "import sys; from service.checkpoints.names import parse_name; "
        "parse_name('torchvision://resnet50'); "
        "sys.exit('torchvision' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("mmcls://resnet5", r"no checkpoint named 'mmcls://resnet5'; nearest: .*mmcls://resnet50"),
        ("open-mmlab://detectron2/resnet5_caffe", r"nearest: .*open-mmlab://detectron2/resnet50_caffe"),
        ("torchvision://resnet50.imagenet1k_v3", r"nearest: .*torchvision://resnet50\.imagenet1k_v"),
        ("openmmlab://qqq@@", r"no checkpoint named 'openmmlab://qqq@@'$"),
        ("mmcls://", r"is not of the form mmcls://NAME"),
        ("torchvision:resnet50", r"is not of the form torchvision://NAME"),
        ("open-mmlab://../../etc/passwd", r"no checkpoint named"),
    ],
)
def test_a_name_that_no_table_has_is_refused_with_the_nearest(
    name: str, detail: str, make_store: MakeStore
) -> None:
    with pytest.raises(CheckpointUnavailable, match=detail) as raised:
        make_store().resolve(WeightsRef(name, pointer="#/backbone/checkpoint"))
    assert [fault.pointer for fault in raised.value.faults] == ["#/backbone/checkpoint"]


# --- the download path ----------------------------------------------------------------------------


def openmmlab_store(make_store: MakeStore, remote: Remote, **more: object) -> Any:
    options = {
        "hosts": frozenset({"download.openmmlab.com"}),
        "mirrors": {"download.openmmlab.com": remote.url},
    }
    return make_store(remote.url, **{**options, **more})


def test_a_name_is_fetched_once_from_the_mirror_of_its_host(
    remote: Remote, make_store: MakeStore, weights: bytes
) -> None:
    name, path = UNSIGNED
    remote.has(path, weights)
    store = openmmlab_store(make_store, remote)
    found = store.resolve(WeightsRef(name))
    assert (found.source, found.name, found.path.read_bytes()) == ("url", name, weights)
    remote.stop()
    by_url = openmmlab_store(make_store, remote).resolve(WeightsRef(OPENMMLAB + path))
    assert (by_url.path, by_url.name) == (found.path, OPENMMLAB + path)


def test_a_name_whose_host_is_not_allowed_is_refused_unasked(remote: Remote, make_store: MakeStore) -> None:
    store = openmmlab_store(make_store, remote, hosts=frozenset({"download.pytorch.org"}))
    with pytest.raises(CheckpointUnavailable, match=r"download\.openmmlab\.com is not a host"):
        store.resolve(WeightsRef("mmcls://resnet50"))
    assert remote.requests == []


def test_the_digest_in_a_published_file_is_held_against_what_comes(
    remote: Remote, make_store: MakeStore, weights: bytes
) -> None:
    remote.has("/pretrain/third_party/resnet50_msra-5891d200.pth", weights)
    with pytest.raises(RemoteFailed, match="damaged"):
        openmmlab_store(make_store, remote).resolve(WeightsRef("open-mmlab://detectron2/resnet50_caffe"))


def test_a_name_has_the_limits_of_every_download(
    remote: Remote, make_store: MakeStore, weights: bytes
) -> None:
    name, path = UNSIGNED
    remote.has(path, weights)
    with pytest.raises(CheckpointUnavailable, match="over the limit of 10 bytes"):
        openmmlab_store(make_store, remote, max_bytes=10).resolve(WeightsRef(name))


# --- over HTTP ------------------------------------------------------------------------------------


def test_a_reply_names_the_checkpoint_as_it_was_asked_for(
    remote: Remote, serve: Serve, tmp_path: Path
) -> None:
    state = weights_of(1)
    name, path = UNSIGNED
    remote.has(path, pickled(state, tmp_path / "made"))
    config = {**TINY, "init_cfg": {"type": "Pretrained", "checkpoint": name}}
    with BackboneClient(serve(checkpoint_mirrors=f"download.openmmlab.com={remote.url}").url) as client:
        features = client.features(backbone=config, tensor=IMAGES)
    assert features.model["weights"]["source"] == "url"
    assert features.model["weights"]["checkpoint"] == name
    assert close(features.arrays["3"], deepest_of(state))
    assert remote.asked_for("GET", path) == 1


def test_mmcls_takes_the_backbone_out_of_its_classifier(serve: Serve, tmp_path: Path) -> None:
    state = weights_of(2)
    file = {f"backbone.{key}": tensor for key, tensor in state.items()} | {"head.fc.bias": torch.zeros(10)}
    keep(tmp_path, "mmcls://resnet18", pickled(file, tmp_path / "made"))
    keep(tmp_path, "mmcls://resnet34", pickled(state, tmp_path / "made"))
    running = serve()
    with BackboneClient(running.url) as client:
        for prefix in ({}, {"prefix": "backbone"}):
            init = {"type": "Pretrained", "checkpoint": "mmcls://resnet18", **prefix}
            features = client.features(backbone={**TINY, "init_cfg": init}, tensor=IMAGES)
            assert close(features.arrays["3"], deepest_of(state))
            weights = features.model["weights"]
            assert (weights["prefix"], weights["missing"]) == ("backbone.", [])
            assert weights["unexpected"] == ["head.fc.bias"]
        told = client.inspect({**TINY, "checkpoint": "mmcls://resnet18"})["weights"]
    assert told == {"checkpoint": "mmcls://resnet18", "prefix": "backbone."}
    bare = {**TINY, "checkpoint": "mmcls://resnet34"}
    refused = running.http.post("/features", **multipart(bare, tensor=IMAGES))
    assert "'backbone.'" in assert_problem(refused, 422, "checkpoint-mismatch")["detail"]


def test_torchvisions_weights_fit_openmmlabs_resnet_and_mean_the_same(serve: Serve, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(3)
    theirs = resnet18().eval()
    theirs.fc = nn.Linear(512, 2)
    keep(tmp_path, "torchvision://resnet18", pickled(dict(theirs.state_dict()), tmp_path / "made"))
    trunk = nn.Sequential(*list(theirs.children())[:-2])
    with torch.inference_mode():
        expected = np.asarray(trunk(torch.from_numpy(IMAGES)))
    with BackboneClient(serve().url) as client:
        for kind in ("mmpretrain.ResNet", "mmdet.ResNet"):
            config = {"type": kind, "depth": 18, "out_indices": [3], "checkpoint": "torchvision://resnet18"}
            features = client.features(backbone=config, tensor=IMAGES)
            assert close(features.arrays["3"], expected)
            assert sorted(features.model["weights"]["unexpected"]) == ["fc.bias", "fc.weight"]


SCOPES = ("mmpretrain", "mmdet", "mmyolo", "mmselfsup", "detectron2", "detrex", "timm", "torchvision")


@pytest.mark.parametrize("scope", SCOPES)
def test_types_of_every_library_take_these_names_in_init_cfg(http: httpx.Client, scope: str) -> None:
    name = "torchvision://vgg16"
    types = http.get("/backbones", params={"scope": scope, "limit": 50}).raise_for_status().json()["types"]
    served = [listed for listed in types if "unsupported" not in listed][:5]
    assert served
    for listed in served:
        example = http.get(listed["href"]).raise_for_status().json()["example"]
        config = {**example, "init_cfg": {"type": "Pretrained", "checkpoint": name}}
        reply = http.post("/backbones/inspect", json={"backbone": config})
        assert reply.status_code == 200, f"{listed['type']}: {reply.text}"
        assert reply.json()["weights"] == {"checkpoint": name, "prefix": None}


def test_an_unknown_name_is_refused_with_its_nearest(serve: Serve) -> None:
    config = {**TINY, "init_cfg": {"type": "Pretrained", "checkpoint": "torchvision://resnet5"}}
    body = assert_problem(
        serve().http.post("/features", **multipart(config, tensor=IMAGES)), 422, "checkpoint-unavailable"
    )
    assert pointers(body) == ["#/backbone/init_cfg/checkpoint"]
    assert "torchvision://resnet50" in body["detail"]


# --- weights that would fit and mean another network ----------------------------------------------

CAFFE = "open-mmlab://detectron2/resnet50_caffe"


@pytest.mark.parametrize(
    ("style", "checkpoint", "theirs"),
    [
        ("caffe", "torchvision://resnet50", "pytorch"),
        ("caffe", f"{PYTORCH}/resnet50-0676ba61.pth", "pytorch"),
        ("caffe", "mmcls://resnet50", "pytorch"),
        ("pytorch", CAFFE, "caffe"),
        ("pytorch", "open-mmlab://resnet50_caffe", "caffe"),
    ],
)
@pytest.mark.parametrize("kind", ["mmpretrain.ResNet", "mmdet.ResNet"])
def test_weights_of_the_other_style_are_refused_with_the_reason(
    http: httpx.Client, kind: str, style: str, checkpoint: str, theirs: str
) -> None:
    init = {"type": "Pretrained", "checkpoint": checkpoint}
    config = {"type": kind, "depth": 50, "style": style, "init_cfg": init}
    reply = http.post("/backbones/inspect", json={"backbone": config})
    body = assert_problem(reply, 422, "checkpoint-mismatch")
    assert pointers(body) == ["#/backbone/init_cfg/checkpoint"]
    assert f"of style {theirs}, not {style}" in body["detail"]


@pytest.mark.parametrize(
    ("depth", "style", "checkpoint"),
    [
        (50, "caffe", CAFFE),
        (50, "pytorch", "torchvision://resnet50"),
        (18, "caffe", "torchvision://resnet18"),  # blocks without a 1x1 have one style
        (50, "caffe", "resnet50.pth"),
    ],
)
def test_weights_of_the_same_style_or_an_unknown_one_are_not_refused(
    http: httpx.Client, depth: int, style: str, checkpoint: str
) -> None:
    config = {"type": "mmdet.ResNet", "depth": depth, "style": style, "checkpoint": checkpoint}
    reply = http.post("/backbones/inspect", json={"backbone": config})
    assert reply.status_code == 200, reply.text
    assert reply.json()["weights"]["checkpoint"] == checkpoint
