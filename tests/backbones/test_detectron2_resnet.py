"""detectron2's and detrex's ResNet: one network behind all spellings, and what is refused where."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from service.backbones.base import BackboneConfig
from service.backbones.catalogue import backbone_registry
from service.backbones.detectron2_configs import RESNET
from service.backbones.detectron2_resnet import ResNet
from service.config.files import ConfigCatalogue
from service.config.spec import WeightsRef
from service.errors import InvalidConfig
from service.necks.catalogue import neck_registry
from service.runtime.plan import Plan, Planner
from tests.conftest import ROOT
from tests.parity.packs import FOLDER, pack_names

PACKS = pack_names("detectron2/*")
SPELLINGS = ("config", "config_flat", "config_import_path")
STEM = {"type": "BasicStem", "norm": "BN"}
FLAT = {"type": "detectron2.ResNet", "depth": 18}
NESTED = {"type": "detectron2.ResNet", "stem": STEM, "stages": {"type": "make_default_stages", "depth": 50}}
YACS = "detectron2.build_resnet_backbone"
STAGE = {
    "type": "make_stage",
    "block_class": "BottleneckBlock",
    "num_blocks": 1,
    "in_channels": 64,
    "out_channels": 128,
    "bottleneck_channels": 32,
}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(backbone_registry(), neck_registry(), ConfigCatalogue(ROOT / "model_configs"))


def config(**keys: Any) -> BackboneConfig:
    return RESNET.config.model_validate({"type": "detectron2.ResNet", **keys})


def built(**keys: Any) -> ResNet:
    torch.manual_seed(0)
    network = RESNET.build(config(**keys)).eval()
    assert isinstance(network, ResNet)
    return network


def run(network: ResNet, node: str = "res2") -> Tensor:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return network(images, [node])[node]


def network_of(plan: Plan) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return plan.config.key(), tuple(level.name for level in plan.levels), plan.frozen.parameters


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKS)
def test_every_spelling_of_a_config_is_the_same_network(name: str, planner: Planner) -> None:
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    found = {network_of(planner.plan(raw[spelling])) for spelling in SPELLINGS if raw.get(spelling)}
    assert len(found) == 1


def test_a_list_of_stages_is_what_the_default_stages_are(planner: Planner) -> None:
    blocks, channels = (3, 4, 6, 3), (64, 256, 512, 1024, 2048)
    stages = [
        {
            **STAGE,
            "_target_": "detectron2.modeling.backbone.resnet.ResNet.make_stage",
            "block_class": "detectron2.modeling.backbone.resnet.BottleneckBlock",
            "num_blocks": blocks[stage],
            "stride_per_block": [1 if stage == 0 else 2] + [1] * (blocks[stage] - 1),
            "in_channels": channels[stage],
            "out_channels": channels[stage + 1],
            "bottleneck_channels": channels[stage + 1] // 4,
        }
        for stage in range(4)
    ]
    for stage in stages:
        del stage["type"]
    listed = planner.plan({**NESTED, "stages": stages})
    assert listed.config.key() == planner.plan(NESTED).config.key()


@pytest.mark.parametrize(
    "spelled",
    [
        {"type": YACS, "MODEL": {"RESNETS": {"DEPTH": 101}, "BACKBONE": {"FREEZE_AT": 3}}},
        {"MODEL": {"RESNETS": {"DEPTH": 101}, "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 3}}},
        {"type": "build_resnet_backbone", "MODEL.RESNETS.DEPTH": 101, "MODEL.BACKBONE.FREEZE_AT": 3},
        {"type": "detectron2.ResNet", "MODEL.RESNETS.DEPTH": 101, "MODEL.BACKBONE.FREEZE_AT": 3},
        {
            "builder": "build_resnet_backbone",
            "opts": ["MODEL.RESNETS.DEPTH", 101, "MODEL.BACKBONE.FREEZE_AT", 3],
        },
        {
            "type": YACS,
            "MODEL": {"RESNETS": {"DEPTH": 50}},
            "opts": {"MODEL.RESNETS.DEPTH": 101, "MODEL.BACKBONE.FREEZE_AT": 3},
        },
    ],
)
def test_yacs_keys_nested_or_dotted_are_a_resnet_with_detectron2s_defaults(
    spelled: dict[str, Any], planner: Planner
) -> None:
    own = {
        "type": "detectron2.ResNet",
        "depth": 101,
        "norm": "FrozenBN",
        "stride_in_1x1": True,
        "out_features": ["res4"],
        "freeze_at": 3,
    }
    assert network_of(planner.plan(spelled)) == network_of(planner.plan(own))


def test_weights_of_yacs_are_a_checkpoint(planner: Planner) -> None:
    plan = planner.plan({"type": YACS, "MODEL.WEIGHTS": "R-50.pth"})
    assert plan.weights == WeightsRef("R-50.pth", pointer="#/backbone/MODEL/WEIGHTS")
    with pytest.raises(InvalidConfig, match="give WEIGHTS or checkpoint"):
        planner.plan({"type": YACS, "MODEL.WEIGHTS": "R-50.pth", "checkpoint": "other.pth"})


def test_every_named_config_of_the_libraries_can_be_planned(planner: Planner) -> None:
    names = [name for name in planner.catalogue.names() if name.startswith(("detectron2/", "detrex/"))]
    assert {"detectron2/resnet50", "detectron2/vitdet_base", "detrex/resnet50_dc5"} <= set(names)
    levels = {
        name: [level.name for level in planner.plan(*planner.named(name, None, None)).levels]
        for name in names
    }
    assert levels["detectron2/resnet50_c4"] == ["res4"]
    assert levels["detrex/timm_resnet152d"] == ["p1", "p2", "p3"]


# --- what is one model ----------------------------------------------------------------------------


def test_what_is_frozen_and_the_order_asked_make_no_second_model() -> None:
    first = config(depth=50, norm="BN", freeze_at=0, out_features=["res3", "res5"])
    second = config(depth=50, norm="SyncBN", freeze_at=4, out_features=["res5", "stem"])
    assert first.key() == second.key()
    assert first.key() != config(depth=50, norm="FrozenBN", out_features=["res5"]).key()
    assert first.key() != config(depth=50, norm="BN", out_features=["res4"]).key()


def test_detrex_shares_the_network_of_detectron2(planner: Planner) -> None:
    theirs = planner.plan({**NESTED, "type": "detrex.ResNet"})
    assert theirs.config.key() == planner.plan(NESTED).config.key()


# --- what comes out -------------------------------------------------------------------------------


def test_maps_by_stride_are_named_as_the_features() -> None:
    chosen = config(depth=18, strides=[32, 4, 8])
    assert [level.name for level in chosen.levels(RESNET.describe(chosen))] == ["res5", "res2", "res3"]


def test_without_out_features_the_last_output_comes() -> None:
    plain, classified = config(depth=18), config(depth=18, num_classes=7)
    assert [level.name for level in plain.levels(RESNET.describe(plain))] == ["res5"]
    level, feature = (
        classified.levels(RESNET.describe(classified))[0],
        RESNET.describe(classified).features[-1],
    )
    assert (level.name, feature.layout, feature.channels) == ("linear", "NC", 7)


def test_frozen_norms_give_what_batch_norms_give() -> None:
    plain = built(depth=18, norm="BN", out_features=["res2"])
    for name, tensor in plain.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    frozen, keys = RESNET.load(
        config(depth=18, norm="FrozenBN", out_features=["res2"]), plain.state_dict(), WeightsRef("any")
    )
    torch.testing.assert_close(run(frozen.eval()), run(plain))
    assert {name.rpartition(".")[2] for name in keys.unexpected} == {"num_batches_tracked"}


@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 0.5)])
def test_deformable_blocks_without_offsets_are_plain_ones(modulated: bool, factor: float) -> None:
    """A fresh modulation is half of everything, which the norm's own scale can take back."""
    keys: dict[str, Any] = {"depth": 50, "norm": "", "out_features": ["res2"]}
    deformed = built(**keys, deform_on_per_stage=[True, False, False, False], deform_modulated=modulated)
    plain = {name: value.clone() for name, value in deformed.state_dict().items() if "offset" not in name}
    for name, value in plain.items():
        if name.startswith("res2") and name.endswith("conv2.weight"):
            value.mul_(factor)
    expected, _ = RESNET.load(config(**keys), plain, WeightsRef("any"))
    torch.testing.assert_close(run(deformed), run(expected.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "entries"),
    [
        ("FrozenBN", {"weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}),
        ("GN", {"weight", "norm.weight", "norm.bias"}),
        ("LN", {"weight", "norm.weight", "norm.bias"}),
        ("", {"weight"}),
        (None, {"weight"}),
        ("detectron2.layers.batch_norm.FrozenBatchNorm2d", None),
    ],
)
def test_a_norm_has_the_librarys_keys_and_finite_maps(norm: str | None, entries: set[str] | None) -> None:
    stage = {"type": "make_default_stages", "depth": 18, "norm": norm}
    network = built(stem={"norm": norm}, stages=stage, out_features=["res2"])
    found = {name.removeprefix("stem.conv1.") for name in network.state_dict() if name.startswith("stem")}
    if entries is not None:
        assert found == entries
    assert bool(run(network).isfinite().all())


def test_freezing_a_group_norm_takes_its_gradient_and_leaves_it_a_norm() -> None:
    network = built(depth=18, norm="GN", freeze_at=1)
    report = network.frozen(config(depth=18, norm="GN", freeze_at=1).freeze())
    assert report.parameters == ("stem.conv1.weight", "stem.conv1.norm.weight", "stem.conv1.norm.bias")
    assert (report.norms, report.of) == ((), 60)


# --- what is refused ------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("depth", {"type": "detectron2.ResNet"}),
    ("depth", {**FLAT, "depth": 20}),
    ("norm", {**FLAT, "norm": "IN"}),
    ("depth", {**NESTED, "depth": 50}),
    ("stem", {"type": "detectron2.ResNet", "stages": {"type": "make_stage"}}),
    ("stem/type", {**NESTED, "stem": {"type": "DeepStem"}}),
    ("stem/in_channels", {**NESTED, "stem": {"in_channels": 0}}),
    ("stem_out_channels", {**FLAT, "stem": STEM, "stem_out_channels": 64}),
    ("stem/out_channels", {**NESTED, "stem": {"out_channels": 32}}),
    ("stages", {**NESTED, "stages": "make_stages"}),
    ("stages/type", {**NESTED, "stages": {"type": "os.system", "depth": 50}}),
    ("stages/depth", {**NESTED, "stages": {"type": "make_stage", "depth": "50"}}),
    ("stages/width", {**NESTED, "stages": {"type": "make_default_stages", "depth": 50, "width": 1}}),
    ("stages/stride_in_1x1", {**NESTED, "stages": {**NESTED["stages"], "depth": 18, "stride_in_1x1": True}}),  # type: ignore[dict-item]
    ("stages/block_class", {**NESTED, "stages": {**NESTED["stages"], "block_class": "BasicBlock"}}),  # type: ignore[dict-item]
    ("stages/out_channels", {**NESTED, "stages": {"type": "make_stage", "depth": 18}}),
    ("stages/num_groups", {**NESTED, "stages": {**NESTED["stages"], "num_groups": 3}}),  # type: ignore[dict-item]
    ("stages/0/bottleneck_channels", {**NESTED, "stages": [{**STAGE, "bottleneck_channels": None}]}),
    ("stages/0/stride_per_block", {**NESTED, "stages": [{**STAGE, "stride_per_block": [1, 1]}]}),
    ("stages/1/in_channels", {**NESTED, "stages": [STAGE, STAGE]}),
    ("stages/0/out_channels", {**NESTED, "stages": [{**STAGE, "out_channels": 64, "stride": 2}]}),
    ("out_features/0", {**NESTED, "stages": [STAGE], "out_features": ["res5"]}),
    ("out_channels", {**FLAT, "depth": 50, "out_channels": 3}),
    ("width_per_group", {**FLAT, "depth": 50, "num_groups": 1024, "width_per_group": 4096}),
    ("res5_dilation", {**FLAT, "res5_dilation": 2}),
    ("deform_on_per_stage", {**FLAT, "deform_on_per_stage": [False, False, False, True]}),
    ("out_features/0", {**FLAT, "out_features": ["layer4"]}),
    ("out_features", {**FLAT, "out_features": []}),
    ("out_features", {**FLAT, "out_features": ["res4", "res4"]}),
    ("out_features", {**FLAT, "out_features": ["res4", "linear"]}),
    ("out_features", {**FLAT, "out_features": ["linear"], "num_classes": 10}),
    ("freeze_at", {**FLAT, "freeze_at": 6}),
    ("norm", {**FLAT, "stem_out_channels": 48, "norm": "GN"}),
    ("strides/0", {**FLAT, "strides": [64]}),
    ("MODEL/RESNETS/DEPTH", {"type": YACS, "MODEL": {"RESNETS": {"DEPTH": 51}}}),
    ("MODEL/RESNETS/RES2_OUT_CHANNELS", {"type": YACS, "MODEL.RESNETS.DEPTH": 18}),
    ("MODEL/RESNETS/DEEP", {"type": YACS, "opts": ["MODEL.RESNETS.DEEP", 1]}),
    ("MODEL/RESNETS/OUT_FEATURES", {"type": YACS, "MODEL.RESNETS.OUT_FEATURES": ["linear"]}),
    ("MODEL.RESNETS.A.B", {"type": YACS, "MODEL.RESNETS.A.B": 1}),
    ("MODEL", {"type": YACS, "MODEL": 1}),
    ("opts", {"type": YACS, "opts": ["MODEL.RESNETS.DEPTH"]}),
    ("opts/0", {"type": YACS, "opts": ["SOLVER.BASE_LR", 1]}),
    ("stages/_target_", {**NESTED, "stages": {"_target_": "os.system"}}),
    ("stem/_target_", {**NESTED, "stem": {"_target_": 5}}),
    ("_target_", {**NESTED, "_target_": "detectron2.modeling.ResNet"}),
    ("_target_", {"_target_": ["detectron2.modeling.ResNet"]}),
]


@pytest.mark.parametrize(("key", "backbone"), REFUSED)
def test_a_config_that_cannot_be_built_is_refused_at_its_key(
    key: str, backbone: dict[str, Any], http: httpx.Client
) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": backbone})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["pointer"] == f"#/backbone/{key}"


@pytest.mark.parametrize(
    "target",
    ["os.system", "detectron2.modeling.backbone.ResNets", "service.backbones.resnet:RESNET", "x" * 128],
)
def test_a_target_that_is_in_no_table_is_not_found(target: str, http: httpx.Client) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": {"_target_": target}})
    assert reply.status_code == 404
    assert reply.json()["errors"][0]["pointer"] == "#/backbone/_target_"
    if "ResNets" in target:
        assert "detectron2.modeling.backbone.ResNet" in reply.json()["detail"]


def test_a_builder_that_is_not_served_is_not_found(http: httpx.Client) -> None:
    backbone = {"builder": "build_mnv2_backbone", "MODEL": {}}
    reply = http.post("/backbones/inspect", json={"backbone": backbone})
    assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (404, "#/backbone/builder")


@pytest.mark.parametrize(
    ("type_name", "permitted", "default"),
    [
        ("detectron2.ResNet", [0, 1, 2, 3, 4], [4]),
        (YACS, [0, 1, 2, 3, 4], [3]),
        ("detrex.TimmBackbone", [0, 1, 2, 3, 4], [0, 1, 2, 3]),
        ("detrex.TorchvisionResNet", [0, 1, 2, 3, 4, 5, 6, 7], [7]),
    ],
)
def test_a_type_is_documented_with_all_of_its_indices(
    type_name: str, permitted: list[int], default: list[int], http: httpx.Client
) -> None:
    page = http.get(f"/backbones/{type_name}").json()
    assert page["indices"] == {"permitted": permitted, "default": default}
    assert http.post("/backbones/inspect", json={"backbone": page["example"]}).status_code == 200
