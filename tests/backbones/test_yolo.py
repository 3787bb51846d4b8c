"""The YOLO backbones: what parity packs do not show of their spellings, refusals and variants."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError

from service.backbones.base import Family
from service.backbones.catalogue import backbone_registry
from service.config.spec import FreezeReport
from service.errors import InvalidConfig
from service.validation import invalid

REGISTRY = backbone_registry()
SMALL = {"widen_factor": 0.125, "deepen_factor": 0.2}
STAGED = (
    "mmdet.CSPDarknet",
    "mmdet.CSPNeXt",
    "mmyolo.CSPNeXt",
    "mmyolo.PPYOLOECSPResNet",
    "mmyolo.YOLOXCSPDarknet",
    "mmyolo.YOLOv5CSPDarknet",
    "mmyolo.YOLOv6CSPBep",
    "mmyolo.YOLOv6EfficientRep",
    "mmyolo.YOLOv7Backbone",
    "mmyolo.YOLOv8CSPDarknet",
)
V5, V6, BEP, V7, V8, X, PPYOLOE = (
    "mmyolo.YOLOv5CSPDarknet",
    "mmyolo.YOLOv6EfficientRep",
    "mmyolo.YOLOv6CSPBep",
    "mmyolo.YOLOv7Backbone",
    "mmyolo.YOLOv8CSPDarknet",
    "mmyolo.YOLOXCSPDarknet",
    "mmyolo.PPYOLOECSPResNet",
)
DET_X, DET_NEXT, NEXT = "mmdet.CSPDarknet", "mmdet.CSPNeXt", "mmyolo.CSPNeXt"


def family(type_name: str) -> Family[Any]:
    return REGISTRY.resolve(type_name, pointer="#/backbone/type").family


def config(type_name: str, **keys: Any) -> Any:
    return family(type_name).config.model_validate({"type": type_name, **keys})


def pointer_of(type_name: str, keys: dict[str, Any]) -> str:
    """Where the refusal of these keys points."""
    try:
        chosen = config(type_name, **keys)
        chosen.levels(family(type_name).describe(chosen))
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {keys}")


def built(chosen: Any) -> Any:
    torch.manual_seed(0)
    return family(chosen.type).build(chosen).eval()


def names(chosen: Any) -> set[str]:
    with torch.device("meta"):
        return set(family(chosen.type).build(chosen).state_dict())


def frozen(type_name: str, **keys: Any) -> FreezeReport:
    chosen = config(type_name, **keys)
    with torch.device("meta"):
        report: FreezeReport = family(type_name).build(chosen).frozen(chosen.freeze())
    return report


# --- the libraries' networks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_name", "keys", "parameters"),
    [
        (V8, {}, 37_510_976),
        (BEP, {}, 38_460_949),
        (X, {}, 27_075_968),
        (V6, {}, 128_660_608),
        (NEXT, {}, 26_138_912),
        (PPYOLOE, {}, 21_149_490),
        (V7, {"arch": "L"}, 13_371_808),
    ],
)
def test_a_default_config_is_the_librarys_network(
    type_name: str, keys: dict[str, Any], parameters: int
) -> None:
    assert family(type_name).describe(config(type_name, **keys)).parameters == parameters


@pytest.mark.parametrize("type_name", STAGED)
def test_maps_have_the_described_shapes_whatever_is_asked(type_name: str) -> None:
    chosen = config(type_name, **SMALL, out_indices=[4, 0, -2])
    described = family(type_name).describe(chosen)
    levels = chosen.levels(described)
    assert [level.index for level in levels] == [0, 3, 4]
    with torch.inference_mode():
        found = built(chosen)(torch.randn(1, 3, 64, 96), [level.node for level in levels])
    features = {feature.node: feature for feature in described.features}
    for node, maps in found.items():
        feature = features[node]
        assert feature.stride is not None
        assert maps.shape == (1, feature.channels, 64 // feature.stride, 96 // feature.stride)
        assert maps.isfinite().all()


@pytest.mark.parametrize("arch", ["Tiny", "L", "X", "W", "E", "D", "E2E"])
def test_every_yolov7_gives_what_its_description_says(arch: str) -> None:
    chosen = config(V7, arch=arch)
    features = family(V7).describe(chosen).features
    with torch.device("meta"), torch.inference_mode():
        network = family(V7).build(chosen)
        found = network(torch.empty(1, 3, 128, 64), [feature.node for feature in features])
    expected = {f.node: (1, f.channels, 128 // f.stride, 64 // f.stride) for f in features if f.stride}
    assert {node: tuple(maps.shape) for node, maps in found.items()} == expected


def test_yolov7_tiny_has_two_levels_of_stride_4_and_a_stride_means_the_deeper() -> None:
    chosen = config(V7, arch="Tiny", strides=[4, 32])
    described = family(V7).describe(chosen)
    assert [feature.stride for feature in described.features] == [4, 4, 8, 16, 32]
    assert [level.index for level in chosen.levels(described)] == [1, 4]


@pytest.mark.parametrize(("widen", "widths"), [(0.5, [32, 64, 128, 256, 512]), (0.3, [24, 40, 80, 160, 312])])
def test_yolov5_rounds_widths_up_to_multiples_of_8(widen: float, widths: list[int]) -> None:
    described = family(V5).describe(config(V5, widen_factor=widen))
    assert [feature.channels for feature in described.features] == widths


def test_yolov6_and_mmdet_cut_widths_instead() -> None:
    for type_name in (V6, DET_X):
        described = family(type_name).describe(config(type_name, widen_factor=0.3))
        assert [feature.channels for feature in described.features] == [19, 38, 76, 153, 307]


def test_other_stages_can_be_given() -> None:
    rows = [[16, 24, 1, True, False], [24, 40, 2, True, True]]
    chosen = config(DET_NEXT, arch_ovewrite=rows, out_indices=[0, 1, 2])
    features = family(DET_NEXT).describe(chosen).features
    assert [(feature.channels, feature.stride) for feature in features] == [(16, 2), (24, 4), (40, 8)]
    assert pointer_of(DET_NEXT, {"arch_ovewrite": rows, "out_indices": [3]}) == "#/backbone/out_indices/0"


# --- one model or two -----------------------------------------------------------------------------


def test_mmdet_and_mmyolo_share_the_networks_that_are_the_same() -> None:
    silu = {"type": "SiLU", "inplace": True}  # mmdet's default is Swish, which rounds otherwise
    assert config(DET_X, act_cfg=silu).key() == config(X).key()
    yolo_norm = {"type": "BN", "momentum": 0.03, "eps": 0.001}
    assert config(NEXT, norm_cfg=yolo_norm, out_indices=[1]).key() != config(DET_NEXT).key()


def test_separable_convolutions_are_in_the_blocks_of_mmdet_only() -> None:
    key = "stage1.1.blocks.0.conv2.depthwise_conv.conv.weight"
    assert key in names(config(DET_X, use_depthwise=True, **SMALL))
    assert key not in names(config(X, use_depthwise=True, **SMALL))
    assert "stage1.0.depthwise_conv.conv.weight" in names(config(X, use_depthwise=True, **SMALL))


def test_mmyolos_cspnext_has_torchs_epsilon_by_default() -> None:
    assert config(NEXT).key() == config(NEXT, norm_cfg={"type": "SyncBN", "eps": 1e-5}).key()
    assert config(DET_NEXT).key() == config(DET_NEXT, norm_cfg={"type": "BN", "eps": 1e-3}).key()
    assert config(NEXT).key() != config(NEXT, norm_cfg={"type": "BN", "eps": 1e-3}).key()


@pytest.mark.parametrize("type_name", STAGED)
def test_what_only_training_or_the_reply_reads_makes_no_second_model(type_name: str) -> None:
    view = {"out_indices": [1], "frozen_stages": 2, "norm_eval": True, "init_cfg": {"type": "Kaiming"}}
    assert config(type_name, **view).key() == config(type_name).key()
    assert config(type_name, act_cfg={"type": "GELU"}).key() != config(type_name).key()


# --- frozen ---------------------------------------------------------------------------------------


def test_a_stem_without_norms_freezes_none() -> None:
    report = frozen(BEP, deepen_factor=0.33, frozen_stages=0)
    assert (report.parameters, report.norms) == (("stem.block.conv.weight", "stem.block.conv.bias"), ())
    report = frozen(BEP, deepen_factor=0.33, frozen_stages=1)
    assert (len(report.parameters), len(report.norms)) == (18, 3)


def test_yolov8_freezes_its_stem_and_stages() -> None:
    counts = []
    for stages in (-1, 0, 1):
        report = frozen(V8, deepen_factor=0.33, widen_factor=0.25, frozen_stages=stages)
        counts.append((len(report.parameters), len(report.norms)))
    assert counts == [(0, 0), (3, 1), (18, 6)]


def test_norms_can_be_put_into_eval_mode_and_lose_their_gradient() -> None:
    report = frozen(V5, **SMALL, norm_eval=True)
    assert len(report.norms) == 29
    assert report.parameters == ()
    report = frozen(V5, **SMALL, norm_cfg={"type": "BN", "requires_grad": False})
    assert {name.rpartition(".bn.")[2] for name in report.parameters} == {"weight", "bias"}
    assert len(report.parameters) == 2 * 29


# --- blocks, plugins ------------------------------------------------------------------------------


def test_blocks_have_their_own_norm_and_activation() -> None:
    plain = names(config(BEP, **SMALL))
    normed = names(config(BEP, **SMALL, block_cfg={"type": "ConvWrapper", "norm_cfg": {"type": "BN"}}))
    assert {"stem.block.bn.weight", "stem.block.conv.bias"} <= normed
    assert "stem.block.bn.weight" not in plain
    silu = {"type": "RepVGGBlock", "act_cfg": {"type": "SiLU"}}
    assert config(V6, block_cfg=silu).key() != config(V6).key()


def test_a_fused_block_gives_what_its_branches_give() -> None:
    keys = {**SMALL, "out_indices": [0]}
    branched = built(config(V6, **keys))
    fused = built(config(V6, **keys, block_cfg={"type": "RepVGGBlock", "deploy": True}))
    stem = branched.stem
    for norm in (stem.rbr_dense.bn, stem.rbr_1x1.bn):
        torch.nn.init.uniform_(norm.running_mean, -1, 1)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    kernel, bias = torch.zeros_like(stem.rbr_dense.conv.weight), torch.zeros(stem.rbr_dense.conv.out_channels)
    for branch, pad in ((stem.rbr_dense, 0), (stem.rbr_1x1, 1)):
        scale = branch.bn.weight / torch.sqrt(branch.bn.running_var + branch.bn.eps)
        kernel += torch.nn.functional.pad(branch.conv.weight, [pad] * 4) * scale[:, None, None, None]
        bias += branch.bn.bias - branch.bn.running_mean * scale
    assert {name for name, _ in fused.stem.named_parameters()} == {"rbr_reparam.weight", "rbr_reparam.bias"}
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        fused.stem.rbr_reparam.weight.copy_(kernel)
        fused.stem.rbr_reparam.bias.copy_(bias)
        torch.testing.assert_close(fused(images, ["0"])["0"], branched(images, ["0"])["0"])


def test_training_starts_with_whole_shortcuts() -> None:
    for type_name in (BEP, PPYOLOE):
        alphas = [
            value for name, value in built(config(type_name, **SMALL)).named_parameters() if "alpha" in name
        ]
        assert alphas
        assert all(alpha.item() == 1 for alpha in alphas)


def test_the_parts_of_ppyoloe_can_be_left_out() -> None:
    whole = names(config(PPYOLOE, **SMALL))
    bare = names(config(PPYOLOE, **SMALL, block_cfg={"type": "PPYOLOEBasicBlock"}, attention_cfg=None))
    left_out = {name for name in whole - bare if name.startswith("stage1.")}
    assert left_out == {
        "stage1.0.attn.fc.conv.weight",
        "stage1.0.attn.fc.conv.bias",
        "stage1.0.blocks.0.conv2.alpha",
    }
    assert bare < whole


def test_attention_is_behind_the_stages_that_ask_for_it() -> None:
    plugin = {"cfg": {"type": "CBAM", "reduce_ratio": 4}, "stages": [False, True, False, True]}
    chosen = config(V5, **SMALL, plugins=[plugin], out_indices=[1, 2, 4])
    added = names(chosen) - names(config(V5, **SMALL))
    parts = ("channel_attention.fc.0.conv", "channel_attention.fc.1.conv", "spatial_attention.conv.conv")
    assert added == {
        f"{place}.{part}.{leaf}"
        for place in ("stage2.2", "stage4.3")
        for part in parts
        for leaf in ("weight", "bias")
    }
    with torch.inference_mode():
        network = built(chosen)
        for parameter in network.stage2[2].parameters():
            parameter.zero_()
        found = network(torch.randn(1, 3, 64, 64), ["2"])["2"]
        network.stage2 = network.stage2[:2]
        without = network(torch.randn(1, 3, 64, 64), ["2"])["2"]
    # Gates of 1/2 twice
    assert found.shape == without.shape
    assert found.abs().max() < without.abs().max()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_name", "keys", "pointer"),
    [
        (V5, {"arch": "P7"}, "arch"),
        (V5, {"out_indices": [5]}, "out_indices/0"),
        (V5, {"out_indices": [2, 2]}, "out_indices"),
        (V5, {"frozen_stages": 5}, "frozen_stages"),
        (V5, {"frozen_stages": -2}, "frozen_stages"),
        (V5, {"widen_factor": 0}, "widen_factor"),
        (V5, {"widen_factor": 1000}, "widen_factor"),
        (V5, {"deepen_factor": 1e9}, "deepen_factor"),
        (V5, {"strides": [64]}, "strides/0"),
        (V5, {"depth": 50}, "depth"),
        (V5, {"norm_cfg": {"type": "GN", "num_groups": 48}}, "norm_cfg/num_groups"),
        (V5, {"norm_cfg": {"type": "GN"}}, "norm_cfg/num_groups"),
        (V5, {"act_cfg": {"type": "Sine"}}, "act_cfg/type"),
        (V5, {"plugins": [{"cfg": {"type": "CBAM"}, "stages": [True]}]}, "plugins/0/stages"),
        (V5, {"plugins": [{"cfg": {"type": "CBAM", "reduce_ratio": 999}}]}, "plugins/0/cfg/reduce_ratio"),
        (V5, {"plugins": [{"cfg": {"type": "CBAM", "kernel_size": 4}}]}, "plugins/0/cfg/kernel_size"),
        (V6, {"block_cfg": {"type": "subprocess.Popen"}}, "block_cfg"),
        (V6, {"block_cfg": {"type": "RepVGGBlock", "use_se": True}}, "block_cfg/use_se"),
        (V6, {"norm_cfg": {"type": "BN", "requires_grad": False}}, "block_cfg/norm_cfg/requires_grad"),
        (BEP, {"hidden_ratio": 0.05, "widen_factor": 0.05}, "hidden_ratio"),
        (V7, {"arch": "XL"}, "arch"),
        (V7, {"input_channels": 1}, "input_channels"),
        (V7, {"arch": "E", "widen_factor": 0.27}, "widen_factor"),
        (PPYOLOE, {"widen_factor": 0.3}, "widen_factor"),
        (V8, {"last_stage_out_channels": 10**9}, "last_stage_out_channels"),
        (X, {"spp_kernal_sizes": [4]}, "spp_kernal_sizes/0"),
        (DET_X, {"input_channels": 3}, "input_channels"),
        (DET_X, {"arch_ovewrite": []}, "arch_ovewrite"),
        (DET_X, {"arch_ovewrite": [[64, 128, 3, True]]}, "arch_ovewrite/0/4"),
        (DET_X, {"arch_ovewrite": [[64, 128, 3, True, False], [64, 32, 1, True, True]]}, "arch_ovewrite"),
        (DET_NEXT, {"expand_ratio": 0.05, "widen_factor": 0.05}, "expand_ratio"),
        (PPYOLOE, {"attention_cfg": {"type": "SELayer"}}, "attention_cfg/type"),
    ],
)
def test_a_bad_key_is_refused_by_its_place(type_name: str, keys: dict[str, Any], pointer: str) -> None:
    assert pointer_of(type_name, keys) == f"#/backbone/{pointer}"


def test_the_narrowest_networks_can_be_built() -> None:
    for type_name in STAGED:
        keys = {"hidden_ratio": 0.5} if type_name == BEP else {}
        chosen = config(type_name, widen_factor=0.0625, deepen_factor=0.01, **keys)
        with torch.inference_mode():
            assert built(chosen)(torch.randn(1, 3, 64, 64), ["4"])["4"].isfinite().all()


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", STAGED)
def test_the_page_of_a_type_has_an_example_that_can_be_inspected(type_name: str, http: httpx.Client) -> None:
    page = http.get(f"/backbones/{type_name}").json()
    assert page["indices"] == {"permitted": [0, 1, 2, 3, 4], "default": [2, 3, 4]}
    reply = http.post("/backbones/inspect", json={"backbone": page["example"], "input_size": [64, 64]})
    assert [level["index"] for level in reply.json()["levels"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("type_name", [DET_X, V7])
def test_an_odd_size_is_refused_where_the_library_fails_on_it(type_name: str, http: httpx.Client) -> None:
    body = {"backbone": {"type": type_name}, "input_size": [65, 63]}
    reply = http.post("/backbones/inspect", json=body)
    assert reply.status_code == 422
    assert [error["pointer"] for error in reply.json()["errors"]] == ["#/input_size"]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("mmyolo/yolov5_s", [128, 256, 512]),
        ("mmyolo/yolov5_s_p6", [128, 256, 384, 512]),
        ("mmyolo/yolov6_s", [128, 256, 512]),
        ("mmyolo/yolov6_m", [192, 384, 768]),
        ("mmyolo/yolov7_tiny", [128, 256, 512]),
        ("mmyolo/yolov8_s", [128, 256, 512]),
        ("mmyolo/yolox_s", [128, 256, 512]),
        ("mmyolo/rtmdet_s", [128, 256, 512]),
        ("mmyolo/ppyoloe_plus_s", [128, 256, 512]),
        ("mmdet/yolox_s", [128, 256, 512]),
        ("mmdet/rtmdet_s", [128, 256, 512]),
        ("mmdet/darknet53", [256, 512, 1024]),
        ("mmdet/hourglass52", [256]),
    ],
)
def test_a_shipped_config_has_the_librarys_channels(
    name: str, channels: list[int], http: httpx.Client
) -> None:
    levels = http.post("/backbones/inspect", json={"backbone": name}).json()["levels"]
    assert [level["channels"] for level in levels] == channels


def test_a_network_that_cannot_take_the_usual_size_asks_for_another(http: httpx.Client) -> None:
    config = {"type": "mmyolo.YOLOv7Backbone", "arch": "D", "out_indices": [5]}
    refused = http.post("/backbones/inspect", json={"backbone": config})
    assert refused.status_code == 422
    assert "does not take images of 224x224; give another size" in refused.json()["detail"]
    assert http.post("/backbones/inspect", json={"backbone": config, "input_size": 640}).status_code == 200


def test_a_name_that_two_libraries_have_is_refused_with_both(http: httpx.Client) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": {"type": "CSPNeXt"}})
    assert reply.status_code in (404, 422)
    assert "mmdet.CSPNeXt" in reply.text
    assert "mmyolo.CSPNeXt" in reply.text
