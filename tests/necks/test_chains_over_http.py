"""Necks one behind the other as a client sees them, and necks that are known and not served."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch
from torch import Tensor

from service.backbones.resnet import RESNET
from service.client import BackboneClient
from service.necks.catalogue import UNSUPPORTED
from tests.conftest import RunningService, multipart
from tests.necks.levels import built, facts

BACKBONE = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 1, 2, 3]}
FPN = {"type": "mmdet.FPN", "in_channels": [8, 16, 32, 64], "out_channels": 12, "num_outs": 5}
BFP = {"type": "mmdet.BFP", "in_channels": 12, "num_levels": 5, "refine_type": "conv"}
IMAGES = np.random.default_rng(3).standard_normal((2, 3, 64, 96), np.float32)


def parts() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a backbone and of two necks."""
    torch.manual_seed(0)
    backbone = RESNET.build(RESNET.config.model_validate(BACKBONE)).state_dict()
    return backbone, built(FPN, facts([8, 16, 32, 64])).state_dict(), built(BFP, facts([12] * 5)).state_dict()


@pytest.fixture(scope="module")
def client(service: RunningService, checkpoint_dir: Path) -> Any:
    """The shared service with the file of a detector of two necks, and of the same with one."""
    backbone, fpn, bfp = parts()
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    single = state | {f"neck.{name}": tensor for name, tensor in fpn.items()}
    chain = state | {f"neck.0.{name}": tensor for name, tensor in fpn.items()}
    chain |= {f"neck.1.{name}": tensor for name, tensor in bfp.items()}
    torch.save({"state_dict": single}, checkpoint_dir / "single.pth")
    torch.save({"state_dict": chain}, checkpoint_dir / "chain.pth")
    del chain["neck.1.refine.conv.bias"]
    torch.save({"state_dict": chain}, checkpoint_dir / "chain-not-whole.pth")
    with BackboneClient(service.url, timeout_s=60) as client:
        yield client


def filled(name: str) -> dict[str, Any]:
    return {**BACKBONE, "init_cfg": {"type": "Pretrained", "checkpoint": name, "prefix": "backbone."}}


def asked(http: httpx.Client, neck: Any, backbone: dict[str, Any] = BACKBONE) -> httpx.Response:
    return http.post("/features", **multipart(backbone, tensor=IMAGES, neck=neck))


@torch.inference_mode()
def test_each_neck_of_a_chain_takes_what_the_one_before_gives(
    client: BackboneClient, http: httpx.Client
) -> None:
    before = client.features(backbone=filled("single.pth"), neck=FPN, tensor=IMAGES)
    bfp = built(BFP, facts([12] * 5))
    expected = bfp([torch.tensor(array) for array in before.arrays.values()])
    reply = asked(http, [FPN, BFP], filled("chain.pth"))
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["model"]["neck"]["type"] == "mmdet.FPN, mmdet.BFP"
    weights = body["model"]["neck"]["weights"]
    assert (weights["checkpoint"], weights["prefix"], weights["loaded"]) == ("chain.pth", "neck.", 18)
    assert [level["stride"] for level in body["levels"]] == [4, 8, 16, 32, 64]
    for level, tensor in zip(body["levels"], expected, strict=True):
        assert level["stats"]["mean"] == pytest.approx(float(tensor.mean()), rel=1e-3, abs=1e-5)
        assert level["stats"]["std"] == pytest.approx(float(tensor.std(correction=0)), rel=1e-3)


def test_every_way_in_takes_a_chain(client: BackboneClient, http: httpx.Client) -> None:
    chain = [FPN, "GlobalAveragePooling"]
    body = {"backbone": BACKBONE, "neck": chain, "input_size": [64, 96]}
    inspected = http.post("/backbones/inspect", json=body)
    assert inspected.status_code == 200, inspected.text
    assert [level["shape"] for level in inspected.json()["levels"]] == [[1, 12]] * 5
    loaded = http.post("/models", json={"backbone": BACKBONE, "neck": chain})
    assert loaded.status_code in (200, 201), loaded.text
    types = [model["type"] for model in client.models()["models"]]
    assert "mmdet.FPN, mmpretrain.GlobalAveragePooling" in types
    raw = {"backbone": orjson.dumps(BACKBONE).decode(), "neck": orjson.dumps(chain).decode()}
    buffer = BytesIO()
    np.save(buffer, IMAGES)
    reply = http.post(
        "/features", params=raw, content=buffer.getvalue(), headers={"Content-Type": "application/x-npy"}
    )
    assert reply.status_code == 200, reply.text
    assert [level["shape"] for level in reply.json()["levels"]] == [[2, 12]] * 5


@pytest.mark.parametrize(
    ("neck", "pointer", "detail"),
    [
        ([], "#/neck", "a chain of 0 necks; give 1 to 4"),
        ([FPN] * 5, "#/neck", "a chain of 5 necks; give 1 to 4"),
        (
            [FPN, {**BFP, "num_levels": 4}],
            "#/neck/1/in_channels",
            "the backbone gives [12, 12, 12, 12, 12], ",
        ),
        ([FPN, {**BFP, "levels": 4}], "#/neck/1/levels", "unknown key"),
        ([{**FPN, "num_outs": 2}, BFP], "#/neck/0/num_outs", "2 is less than the 4 levels used"),
        ([FPN, 3], "#/neck/1", "must be an object"),
        ([[FPN]], "#/neck/0", "must be an object"),
        ([{**FPN, "checkpoint": "single.pth"}], "#/neck/0/checkpoint", "in the backbone's checkpoint, under"),
        ([FPN, {"type": "RFP"}], "#/neck/1/type", "mmdet.RFP is not served"),
    ],
)
def test_a_chain_that_does_not_fit_says_which_neck(
    client: BackboneClient, http: httpx.Client, neck: Any, pointer: str, detail: str
) -> None:
    reply = asked(http, neck)
    assert reply.status_code == 422, reply.text
    [fault] = reply.json()["errors"]
    assert fault["pointer"] == pointer
    assert detail in fault["detail"]


def test_a_chains_missing_weight_is_named_with_its_neck(client: BackboneClient, http: httpx.Client) -> None:
    for name, missing in (
        ("chain-not-whole.pth", "1.refine.conv.bias"),
        ("single.pth", "the neck's with '0.', '1.'"),
    ):
        reply = asked(http, [FPN, BFP], filled(name))
        assert reply.status_code == 422, reply.text
        assert missing in reply.json()["errors"][0]["detail"]


def test_a_neck_that_is_not_served_says_why(http: httpx.Client) -> None:
    for type_name, reason in UNSUPPORTED:
        reply = http.post("/backbones/inspect", json={"backbone": BACKBONE, "neck": {"type": type_name}})
        assert reply.status_code == 422, reply.text
        assert reply.json()["errors"] == [
            {"pointer": "#/neck/type", "detail": f"{type_name} is not served: {reason}"}
        ]
