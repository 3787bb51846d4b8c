"""detectron2's published files: their names, Caffe2's names in them, and the features that come of it."""

from __future__ import annotations

import pickle
import re
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch
from torch import Tensor

from service.backbones.caffe2_names import detectron2_name
from service.backbones.detectron2_configs import RESNET
from service.checkpoints.make_catalogues import FILE
from service.checkpoints.names import UrlName, parse_name
from service.client import BackboneClient
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch
from service.settings import LIBRARY_HOSTS
from tests.api.problems import assert_problem, pointers
from tests.checkpoints.conftest import Remote
from tests.conftest import Serve, multipart

State = dict[str, Tensor]
HOST = "https://dl.fbaipublicfiles.com"
REF = WeightsRef("R-50.pkl", pointer="#/backbone/checkpoint")
IMAGES = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
BRANCHES = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
LEAVES = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}


def config(norm: str = "FrozenBN", **more: Any) -> dict[str, Any]:
    """A narrow ResNet of one bottleneck a stage."""
    width, stages = 32, []
    for stage in range(2):
        stages.append(
            {
                "type": "make_stage",
                "block_class": "BottleneckBlock",
                "num_blocks": 1,
                "in_channels": width,
                "out_channels": 2 * width,
                "bottleneck_channels": 32,
                "stride": stage + 1,
                "norm": norm,
            }
        )
        width *= 2
    stem = {"type": "BasicStem", "out_channels": 32, "norm": norm}
    return {
        "type": "detectron2.ResNet",
        "stem": stem,
        "stages": stages,
        "out_features": ["res2", "res3"],
        **more,
    }


def loaded(state: State, norm: str = "FrozenBN") -> tuple[State, LoadedKeys]:
    """What the network then holds."""
    network, keys = RESNET.load(RESNET.config.model_validate(config(norm)), state, REF)
    return network.state_dict(), keys


def weights(norm: str = "FrozenBN") -> State:
    """detectron2's names, no two numbers alike; variances are positive."""
    torch.manual_seed(0)
    state = RESNET.build(RESNET.config.model_validate(config(norm))).state_dict()
    return {
        name: torch.rand_like(tensor) + 0.5
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


def caffe2_name(name: str, *, norm: str = "bn") -> str:
    """Caffe2's name of one of detectron2's."""
    parts = name.split(".")
    leaf = f"{norm}_{LEAVES[parts[-1]]}" if "norm" in parts else "w"
    if parts[0] == "stem":
        return f"{'res_' if leaf.startswith('bn') else ''}conv1_{leaf}"
    return f"{parts[0]}_{parts[1]}_{BRANCHES[parts[2]]}_{leaf}"


def caffe2(state: State, *, norm: str = "bn", statistics: bool = True) -> State:
    """The same under Caffe2's names; most files have no statistics."""
    return {
        caffe2_name(name, norm=norm): tensor
        for name, tensor in state.items()
        if statistics or "running" not in name
    }


# --- names of weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("conv1_w", "stem.conv1.weight"),
        ("conv1_b", "stem.conv1.bias"),
        ("res_conv1_bn_s", "stem.conv1.norm.weight"),
        ("res_conv1_bn_beta", "stem.conv1.norm.bias"),
        ("conv1_gn_b", "stem.conv1.norm.bias"),
        ("res2_0_branch1_w", "res2.0.shortcut.weight"),
        ("res2_0_branch1_bn_b", "res2.0.shortcut.norm.bias"),
        ("res4_22_branch2c_bn_rm", "res4.22.conv3.norm.running_mean"),
        ("res5_2_branch2b_bn_riv", "res5.2.conv2.norm.running_var"),
        ("res5_2_branch2b_bn_running_mean", "res5.2.conv2.norm.running_mean"),
        ("res5_2_branch2b_bn_running_var", "res5.2.conv2.norm.running_var"),
        ("res3_1_branch2a_bn_gamma", "res3.1.conv1.norm.weight"),
        ("res3_1_branch2a_gn_s", "res3.1.conv1.norm.weight"),
        ("pred_w", "linear.weight"),
        ("pred_b", "linear.bias"),
        ("fc1000_w", "fc1000_w"),
        ("conv_rpn_fpn2_w", "conv_rpn_fpn2_w"),
        ("fpn_inner_res5_2_sum_w", "fpn_inner_res5_2_sum_w"),
        ("res6_0_branch2a_w", "res6_0_branch2a_w"),
        ("res2_0_branch2d_w", "res2_0_branch2d_w"),
        ("xconv1_w", "xconv1_w"),
    ],
)
def test_caffe2_names_are_detectron2s(theirs: str, ours: str) -> None:
    assert detectron2_name(theirs) == ours


def test_a_caffe2_file_with_statistics_is_loaded_whole() -> None:
    state = weights()
    held, keys = loaded(caffe2(state))
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items())
    assert (keys.missing, keys.unexpected) == ((), ())


def test_a_frozen_norm_without_statistics_is_a_scale_and_a_bias() -> None:
    state = weights()
    held, keys = loaded(caffe2(state, statistics=False))
    for name, tensor in state.items():
        constant = {"running_mean": 0.0, "running_var": 1.0}.get(name.rpartition(".")[2])
        assert torch.equal(held[name], tensor if constant is None else torch.full_like(tensor, constant))
    assert keys.missing == ()


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_a_norm_that_is_not_frozen_needs_its_statistics(norm: str) -> None:
    with pytest.raises(CheckpointMismatch) as raised:
        loaded(caffe2(weights(), statistics=False), norm)
    assert "stem.conv1.norm.running_mean" in raised.value.missing


def test_half_of_the_statistics_is_a_mismatch() -> None:
    state = caffe2(weights())
    del state["res2_0_branch2a_bn_rm"]
    with pytest.raises(CheckpointMismatch) as raised:
        loaded(state)
    assert raised.value.missing == ("res2.0.conv1.norm.running_mean",)


def test_statistics_are_made_up_for_caffe2s_names_only() -> None:
    state = {name: tensor for name, tensor in weights().items() if "running" not in name}
    with pytest.raises(CheckpointMismatch) as raised:
        loaded(state)
    assert "stem.conv1.norm.running_var" in raised.value.missing


def test_group_norms_are_loaded() -> None:
    state = weights("GN")
    held, keys = loaded(caffe2(state, norm="gn"), "GN")
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items())
    assert keys.missing == ()


def test_what_is_of_no_use_is_reported_under_the_files_own_names() -> None:
    more = {"conv1_b": torch.ones(32), "fc1000_w": torch.ones(2, 3), "res4_0_branch2a_w": torch.ones(1)}
    _, keys = loaded({**caffe2(weights()), **more})
    assert keys.unexpected == tuple(more)


def test_two_names_of_one_weight_are_refused() -> None:
    state = caffe2(weights())
    with pytest.raises(CheckpointMismatch, match=r"two keys of the file are stem\.conv1\.norm\.weight"):
        loaded({**state, "res_conv1_bn_gamma": state["res_conv1_bn_s"]})


def test_a_wrong_shape_is_named_as_the_network_has_it() -> None:
    state = {**caffe2(weights()), "res3_0_branch1_w": torch.ones(1)}
    with pytest.raises(CheckpointMismatch, match=r"res3\.0\.shortcut\.weight: file \[1\], backbone"):
        loaded(state)


# --- names of files -------------------------------------------------------------------------------

DETECTRON = f"{HOST}/detectron/ImageNetPretrained"
MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"


@pytest.mark.parametrize(
    ("name", "url"),
    [
        (MSRA, f"{HOST}/detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
        (
            "detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
            f"{HOST}/detectron2/COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
        ),
        (
            "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True",
            f"{HOST}/detectron2/ImageNetPretrained/MAE/mae_pretrain_vit_base.pth",
        ),
        ("catalog://ImageNetPretrained/MSRA/R-50", f"{DETECTRON}/MSRA/R-50.pkl"),
        ("catalog://ImageNetPretrained/FAIR/R-50-GN", f"{DETECTRON}/47261647/R-50-GN.pkl"),
        ("catalog://ImageNetPretrained/FAIR/X-101-64x4d", f"{DETECTRON}/FBResNeXt/X-101-64x4d.pkl"),
    ],
)
def test_detectron2s_names_are_the_urls_that_it_fetches(name: str, url: str) -> None:
    assert parse_name(name) == parse_name(url)


def test_every_name_of_the_catalogue_leads_to_a_file_of_an_allowed_host() -> None:
    table = orjson.loads((FILE.parent / "detectron2.json").read_bytes())
    parsed = [parse_name(f"catalog://{name}") for name in table]
    assert len(parsed) == 20
    assert {name.host for name in parsed if isinstance(name, UrlName)} <= set(LIBRARY_HOSTS)
    assert [name.name for name in parsed] == list(table.values())


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("catalog://ImageNetPretrained/MSRA/R-5", r"nearest: .*catalog://ImageNetPretrained/MSRA/R-50"),
        ("detectron2:R-50.pkl", r"is not of the form detectron2://PATH"),
        ("detectron2://R-50", r"'' files are not served"),
        ("detectron2://../../x.pkl", r"of plain names"),
    ],
)
def test_other_names_are_refused_with_the_reason(http: httpx.Client, name: str, detail: str) -> None:
    body = {"backbone": {**config(), "checkpoint": name}}
    problem = assert_problem(http.post("/models", json=body), 422, "checkpoint-unavailable")
    assert pointers(problem) == ["#/backbone/checkpoint"]
    assert re.search(detail, problem["detail"])


# --- weights that would fit and mean another network ----------------------------------------------


def yacs(name: str, *, in_1x1: bool) -> dict[str, Any]:
    resnets = {"DEPTH": 50, "STRIDE_IN_1X1": in_1x1, "OUT_FEATURES": ["res5"]}
    return {"type": "detectron2.build_resnet_backbone", "MODEL": {"WEIGHTS": name, "RESNETS": resnets}}


@pytest.mark.parametrize(
    ("name", "in_1x1"),
    [
        (MSRA, True),
        ("catalog://ImageNetPretrained/MSRA/R-101", True),
        (TORCHVISION, False),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", False),
        ("catalog://ImageNetPretrained/FAIR/X-152-32x8d-IN5k", False),
    ],
)
def test_a_config_that_strides_elsewhere_than_its_weights_is_refused(
    http: httpx.Client, name: str, in_1x1: bool
) -> None:
    fits = http.post("/backbones/inspect", json={"backbone": yacs(name, in_1x1=in_1x1)})
    assert fits.status_code == 200, fits.text
    other = http.post("/backbones/inspect", json={"backbone": yacs(name, in_1x1=not in_1x1)})
    body = assert_problem(other, 422, "checkpoint-mismatch")
    assert pointers(body) == ["#/backbone/MODEL/WEIGHTS"]
    assert f"stride_in_1x1 {str(in_1x1).lower()}" in body["detail"]


# --- over HTTP ------------------------------------------------------------------------------------


def pickled(state: State, *, protocol: int = 2) -> bytes:
    """As Detectron's tools wrote it: arrays in `blobs`, with their momenta."""
    blobs = {name: tensor.numpy() for name, tensor in state.items()}
    momenta = {f"{name}_momentum": array * 0 for name, array in blobs.items()}
    return pickle.dumps({"blobs": {**blobs, **momenta, "lr": np.ones(1, "f4")}, "cfg": "x: 1\n"}, protocol)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_file_of_detectron2s_host_gives_the_features_of_its_weights(
    remote: Remote, serve: Serve, protocol: int
) -> None:
    state = weights()
    for name in state:
        if "running" in name:
            state[name].fill_(float(name.endswith("var")))
    path = "/detectron2/ImageNetPretrained/MSRA/tiny.pkl"
    remote.has(path, pickled(caffe2(state, statistics=False), protocol=protocol))
    network, _ = RESNET.load(RESNET.config.model_validate(config()), state, REF)
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(IMAGES), ["res3"])["res3"].numpy()
    name = "detectron2://ImageNetPretrained/MSRA/tiny.pkl"
    with BackboneClient(serve(checkpoint_mirrors=f"dl.fbaipublicfiles.com={remote.url}").url) as client:
        features = client.features(backbone=config(checkpoint=name), tensor=IMAGES)
    found = features.arrays["res3"]
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    told = features.model["weights"]
    assert (told["source"], told["checkpoint"], told["missing"]) == ("url", name, [])
    assert told["unexpected"] == ["lr"]


def test_a_malicious_file_is_refused_and_not_run(remote: Remote, serve: Serve, tmp_path: Any) -> None:
    mark = tmp_path / "mark"
    path = "/detectron2/evil.pkl"
    remote.has(path, f"(S'model'\ncposix\nsystem\n(S'touch {mark}'\ntRd.".encode())
    http = serve(checkpoint_mirrors=f"dl.fbaipublicfiles.com={remote.url}").http
    evil = config(checkpoint="detectron2://evil.pkl")
    body = assert_problem(
        http.post("/features", **multipart(evil, tensor=IMAGES)), 422, "checkpoint-unreadable"
    )
    assert "posix.system" in body["detail"]
    assert not mark.exists()
