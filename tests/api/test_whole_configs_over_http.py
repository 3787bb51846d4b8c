"""OpenMMLab's whole configs as a client sees them: dropped into the config directory, they serve."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from service.backbones.catalogue import backbone_registry
from service.necks.base import LevelFacts
from service.necks.catalogue import neck_registry
from tests.conftest import RunningService, multipart, settings_for

WIDTHS = [8, 16, 32, 64]
BACKBONE = {"type": "mmdet.ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 1, 2, 3]}
NECK = {"type": "mmdet.FPN", "in_channels": WIDTHS, "out_channels": 12, "num_outs": 5}
PREPROCESS = {
    "type": "DetDataPreprocessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
}
DETECTOR = """
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, base_channels=8, out_indices=(0, 1, 2, 3)),
    neck=dict(type='FPN', in_channels=[8 * 2**0, 16, 32, 64], out_channels=12, num_outs=5),
    roi_head=dict(type='StandardRoIHead'))
"""
FILES = {
    "_base_/models/detector.py": DETECTOR,
    "_base_/runtime.py": "default_scope = 'mmdet'\nload_from = None\n",
    "detector.py": "_base_ = ['_base_/models/detector.py', '_base_/runtime.py']\nlr = (lambda: 1)()\n",
    "trained.py": "_base_ = 'detector.py'\nload_from = 'whole.pth'\n",
    "narrow.py": "_base_ = 'detector.py'\nmodel = dict(neck=dict(in_channels=[8, 16, 32, 32]))\n",
    "chain.py": "_base_ = 'detector.py'\nmodel = dict(neck=[_base_.model.neck, "
    "dict(type='BFP', in_channels=8, num_levels=5)])\n",
    "unknown.py": "_base_ = 'detector.py'\nmodel = dict(neck=dict(_delete_=True, type='NoFPN'))\n",
    "unread.py": "_base_ = 'detector.py'\nmodel = dict(\n    backbone=dict(depth=int('18')))\n",
    "imports.py": "_base_ = 'detector.py'\nimport os\n",
    "badly_padded.py": "_base_ = 'detector.py'\nmodel = dict(data_preprocessor=dict(pad_value=114))\n",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with a folder of whole configs and a detector's checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    for name, text in FILES.items():
        path = folder / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    _save_detector(folder / "whole.pth")
    with RunningService(settings_for(folder, config_dir=folder / "configs")) as service:
        yield service


def _save_detector(path: Path) -> None:
    torch.manual_seed(5)
    resnet = backbone_registry().resolve("mmdet.ResNet").family
    backbone = resnet.build(resnet.config.model_validate(BACKBONE))
    family = neck_registry().resolve("mmdet.FPN", pointer="#/neck/type").family
    facts = [LevelFacts(i, str(i), "NCHW", width, 4 << i) for i, width in enumerate(WIDTHS)]
    neck = family.build(family.config.model_validate(NECK), facts)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state |= {f"neck.{name}": tensor for name, tensor in neck.state_dict().items()}
    torch.save({"state_dict": {**state, "rpn_head.conv.weight": torch.zeros(3)}}, path)


@pytest.fixture
def http(running: RunningService) -> httpx.Client:
    return running.http


def arrays(http: httpx.Client, config: Any, image: bytes, **parts: Any) -> dict[str, np.ndarray]:
    reply = http.post(
        "/features", headers={"Accept": "application/x-npz"}, **multipart(config, image, **parts)
    )
    assert reply.status_code == 200, reply.text
    with np.load(io.BytesIO(reply.content)) as found:
        return {name: found[name] for name in found.files if name != "meta.json"}


def test_a_whole_config_gives_what_its_parts_give(http: httpx.Client, photo: bytes) -> None:
    named = arrays(http, "detector", photo)
    inline = arrays(http, BACKBONE, photo, neck=NECK, preprocess={"data_preprocessor": PREPROCESS})
    assert [array.shape for array in named.values()] == [
        (1, 12, height, width) for height, width in ((96, 128), (48, 64), (24, 32), (12, 16), (6, 8))
    ]
    for name, array in named.items():
        np.testing.assert_array_equal(array, inline[name])


def test_load_from_fills_backbone_and_neck(http: httpx.Client, photo: bytes) -> None:
    reply = http.post("/features", **multipart("trained", photo)).json()
    assert "model" in reply, reply
    for weights in (reply["model"]["weights"], reply["model"]["neck"]["weights"]):
        assert (weights["source"], weights["checkpoint"], weights["missing"]) == (
            "checkpoint",
            "whole.pth",
            [],
        )
    init = {"type": "Pretrained", "checkpoint": "whole.pth", "prefix": "backbone."}
    preprocess = {"data_preprocessor": PREPROCESS}
    inline = arrays(http, {**BACKBONE, "init_cfg": init}, photo, neck=NECK, preprocess=preprocess)
    random = arrays(http, "detector", photo)
    for name, array in arrays(http, "trained", photo).items():
        np.testing.assert_array_equal(array, inline[name])
        assert not np.array_equal(array, random[name])


def test_what_is_given_beside_a_name_goes_before_its_own(http: httpx.Client, photo: bytes) -> None:
    pooled = arrays(http, "detector", photo, neck={"type": "GlobalAveragePooling"}, preprocess="crop")
    assert [array.shape for array in pooled.values()] == [(1, width) for width in WIDTHS]


def test_whole_configs_are_listed_and_shown(http: httpx.Client) -> None:
    names = [config["name"] for config in http.get("/configs").json()["configs"]]
    assert names == sorted(name.removesuffix(".py") for name in FILES if not name.startswith("_"))
    shown = http.get("/configs/trained").json()
    assert shown["as_written"] == FILES["trained.py"]
    assert shown["resolved"]["backbone"]["init_cfg"]["checkpoint"] == "whole.pth"
    assert shown["resolved"]["preprocess"] == {"data_preprocessor": PREPROCESS}
    assert shown["notes"] == ["load_from gives the weights of the backbone, and of the neck"]
    assert [neck["type"] for neck in http.get("/configs/chain").json()["resolved"]["neck"]] == [
        "mmdet.FPN",
        "mmdet.BFP",
    ]


def asked(http: httpx.Client, route: str, name: str, photo: bytes) -> httpx.Response:
    if route == "/features":
        return http.post(route, **multipart(name, photo))
    return http.post(route, json={"backbone": name})


@pytest.mark.parametrize("route", ["/features", "/backbones/inspect", "/models"])
@pytest.mark.parametrize(
    ("name", "status", "pointer", "said"),
    [
        (
            "narrow",
            422,
            "#/neck/in_channels",
            "the backbone gives [8, 16, 32, 64], the neck takes [8, 16, 32, 32]",
        ),
        (
            "chain",
            422,
            "#/neck/1/in_channels",
            "the backbone gives [12, 12, 12, 12, 12], the neck takes [8, 8,",
        ),
        ("unknown", 404, "#/neck/type", "no neck type named 'mmdet.NoFPN'"),
        ("unread", 422, "#/model/backbone/depth", "unread.py, line 3: a call is not read"),
        ("imports", 422, "#", "imports.py, line 2: an import is not read"),
    ],
)
def test_a_config_that_cannot_be_served_says_which_and_where(
    http: httpx.Client, photo: bytes, route: str, name: str, status: int, pointer: str, said: str
) -> None:
    reply = asked(http, route, name, photo)
    body = reply.json()
    assert (reply.status_code, body["errors"][0]["pointer"]) == (status, pointer)
    assert said in body["errors"][0]["detail"]
    assert f"with the config {name}: " in body["detail"]


def test_preprocessing_that_is_not_served_names_the_config(http: httpx.Client, photo: bytes) -> None:
    body = asked(http, "/features", "badly_padded", photo).json()
    assert body["errors"][0]["pointer"] == "#/preprocess/data_preprocessor/pad_value"
    assert "with the config badly_padded: " in body["detail"]
