"""The other spellings of ResNet: what differs between libraries, and what they do not take."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch

from service.backbones.resnet_variants import Sobel
from service.config.spec import WeightsRef
from tests.backbones.residual import (
    assert_maps_are_as_described,
    built,
    config_of,
    family_of,
    indices,
    maps,
    pointer_of,
    small,
)
from tests.parity.packs import load_pack, pack_names

TYPES = {
    "mmdet": ("ResNet", "ResNetV1d", "ResNeXt", "RegNet", "Res2Net", "ResNeSt"),
    "mmpretrain": (
        "ResNetV1c",
        "ResNetV1d",
        "ResNet_CIFAR",
        "ResNeXt",
        "SEResNet",
        "SEResNeXt",
        "RegNet",
        "Res2Net",
        "ResNeSt",
    ),
    "mmselfsup": ("ResNet", "ResNetV1d", "ResNeXt", "ResNetSobel"),
}
NAMES = [f"{scope}.{name}" for scope, names in TYPES.items() for name in names]
OF_DEPTH = [name for name in NAMES if not name.endswith("RegNet")]


# --- through the door -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_type_says_what_it_takes_and_its_example_works(name: str, http: httpx.Client) -> None:
    told = http.get(f"/backbones/{name}").json()
    assert "frozen_stages" in told["schema"]["properties"]
    reply = http.post("/backbones/inspect", json={"backbone": told["example"]})
    assert reply.status_code == 200, reply.text
    assert [level["index"] for level in reply.json()["levels"]] == told["example"]["out_indices"]
    key = "arch" if "arch" in told["example"] else "depth"
    assert str(told["example"][key]) in told["architectures"]


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("mmdet/resnet50", [8, 16, 32]),
        ("mmdet/resnet50_caffe", [8, 16, 32]),
        ("mmselfsup/resnet50", [8, 16, 32]),
        ("mmpretrain/regnetx_4.0gf", [4, 8, 16, 32]),
        ("mmpretrain/resnet18_cifar", [8]),
    ],
)
def test_a_shipped_config_gives_the_tutorials_levels(
    name: str, strides: list[int], http: httpx.Client
) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": name})
    assert reply.status_code == 200, reply.text
    assert [level["stride"] for level in reply.json()["levels"]] == strides


@pytest.mark.parametrize("name", OF_DEPTH)
def test_a_small_one_gives_what_it_describes(name: str) -> None:
    style = "pytorch" if name == "mmdet.Res2Net" else "caffe"
    chosen = small(name, style=style, norm_cfg={"type": "GN", "num_groups": 2})
    every = [feature.index for feature in family_of(name).describe(chosen).features]
    assert_maps_are_as_described(chosen.model_copy(update={"out_indices": every}))


@pytest.mark.parametrize("name", OF_DEPTH)
def test_what_only_training_reads_makes_no_second_model(name: str) -> None:
    training = {"with_cp": True, "frozen_stages": 2, "norm_eval": True, "zero_init_residual": True}
    assert small(name, **training, norm_cfg={"type": "SyncBN"}).key() == small(name).key()


def test_every_type_is_a_model_of_its_own() -> None:
    assert len({small(name).key() for name in OF_DEPTH}) == len(OF_DEPTH)


# --- indices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["mmdet", "mmpretrain", "mmselfsup"])
def test_default_indices_are_the_librarys(scope: str) -> None:
    expected = {"mmdet": [0, 1, 2, 3], "mmpretrain": [3], "mmselfsup": [4]}[scope]
    for name in TYPES[scope]:
        arch = {"arch": "regnetx_400mf"} if name == "RegNet" else {"depth": 50}
        assert indices(config_of(f"{scope}.{name}", **arch)) == expected


def test_mmselfsup_counts_the_stem_before_its_max_pool_as_0() -> None:
    chosen = small("mmselfsup.ResNet", out_indices=[0, 1, -1])
    described = family_of(chosen.type).describe(chosen)
    assert [(f.index, f.channels, f.stride) for f in described.features[:2]] == [(0, 8, 2), (1, 32, 4)]
    assert indices(chosen) == [0, 1, 4]
    found = maps(chosen, built(chosen))
    assert found["0"].shape == (1, 8, 32, 48)
    assert found["0"].min() == 0
    pooled = torch.nn.functional.max_pool2d(found["0"], 3, 2, 1)
    torch.testing.assert_close(built(chosen).layer1(pooled), found["1"])
    assert indices(small("mmselfsup.ResNet", strides=[32, 2])) == [4, 0]
    assert pointer_of("mmselfsup.ResNet", depth=18, out_indices=[5]) == "#/backbone/out_indices/0"


def test_stages_are_the_same_maps_under_every_librarys_index() -> None:
    ours, theirs = small("mmselfsup.ResNet", out_indices=[2]), small("mmdet.ResNet", out_indices=[1])
    network, other = built(ours), built(theirs)
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(maps(ours, network)["2"], maps(theirs, other)["1"], rtol=0, atol=0)


def test_cifar_has_levels_from_stride_1() -> None:
    chosen = small("mmpretrain.ResNet_CIFAR", out_indices=[0, 3])
    assert [feature.stride for feature in family_of(chosen.type).describe(chosen).features] == [1, 2, 4, 8]
    assert_maps_are_as_described(chosen, (32, 32))
    assert indices(small("mmpretrain.ResNet_CIFAR", strides=[4, 8])) == [2, 3]


# --- names of weights -----------------------------------------------------------------------------


def test_each_library_names_a_deep_stem_and_a_pooling_shortcut_its_own_way() -> None:
    ours, theirs = (set(built(small(f"{scope}.ResNetV1d")).state_dict()) for scope in ("mmpretrain", "mmdet"))
    assert {"stem.2.conv.weight", "layer1.0.downsample.0.weight", "layer2.0.downsample.1.weight"} <= ours
    assert {"stem.6.weight", "layer1.0.downsample.1.weight", "layer2.0.downsample.1.weight"} <= theirs
    assert len(ours) == len(theirs)


def test_a_checkpoint_of_the_other_library_does_not_load_by_chance() -> None:
    state = built(small("mmpretrain.ResNetV1d")).state_dict()
    theirs = small("mmdet.ResNetV1d")
    with pytest.raises(Exception, match=r"weights are missing: stem\.0\.weight"):
        family_of(theirs.type).load(theirs, state, WeightsRef("a.pth"))


def test_mmdet_takes_the_stems_channels_from_the_first_stage() -> None:
    assert built(config_of("mmdet.ResNet", depth=18, base_channels=16)).conv1.out_channels == 16


@pytest.mark.parametrize(
    ("name", "keys", "inner"),
    [
        ("mmpretrain.ResNeXt", {}, 128),
        ("mmpretrain.ResNeXt", {"groups": 64, "width_per_group": 4}, 256),
        ("mmpretrain.ResNeXt", {"groups": 1}, 64),
        ("mmdet.ResNeXt", {}, 64),
        ("mmdet.ResNeXt", {"groups": 32, "base_width": 8}, 256),
        ("mmselfsup.ResNeXt", {}, 128),
        ("mmpretrain.SEResNeXt", {"width_per_group": 8}, 256),
    ],
)
def test_groups_make_the_inner_width(name: str, keys: dict[str, Any], inner: int) -> None:
    assert config_of(name, depth=50, **keys).spec().inner[0] == inner


@pytest.mark.parametrize(("ratio", "hidden"), [(16, 128), (1024, 8), (100, 24)])
def test_squeezed_channels_are_a_multiple_of_8(ratio: int, hidden: int) -> None:
    with torch.device("meta"):
        chosen = config_of("mmpretrain.SEResNet", depth=50, se_ratio=ratio)
        state = family_of(chosen.type).build(chosen).state_dict()
    assert state["layer4.2.se_layer.conv1.conv.bias"].shape == (hidden,)


PACKS = [
    name
    for kind in (
        "RegNet",
        "Res2Net",
        "ResNeSt",
        "ResNetV1",
        "ResNet_CIFAR",
        "SERes",
        "mmdet-ResNet",
        "mmselfsup-ResNet",
    )
    for name in pack_names(f"openmmlab/*{kind}*")
]


@pytest.mark.parametrize("name", sorted(set(PACKS)))
def test_a_state_dict_has_the_librarys_names_in_the_librarys_order(name: str) -> None:
    pack = load_pack(name)
    with torch.device("meta"):
        network = family_of(pack.config["type"]).build(
            config_of(
                pack.config["type"], **{key: value for key, value in pack.config.items() if key != "type"}
            )
        )
    assert list(network.state_dict()) == [entry.name for entry in pack.entries]


# --- freezing -------------------------------------------------------------------------------------


def test_mmdet_keeps_norms_in_eval_mode_unless_told_not_to() -> None:
    chosen, told = small("mmdet.ResNet"), small("mmdet.ResNet", norm_eval=False)
    network = built(chosen)
    assert len(network.frozen(chosen.freeze()).norms) == 53
    assert network.frozen(chosen.freeze()).parameters == ()
    assert network.frozen(told.freeze()).norms == ()


def test_sobel_filters_are_frozen_whatever_else_is() -> None:
    chosen = small("mmselfsup.ResNetSobel")
    report = built(chosen).frozen(chosen.freeze())
    assert report.parameters == tuple(
        f"sobel_layer.sobel.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")
    )


def test_sobel_filters_see_slopes() -> None:
    sobel = Sobel()
    sobel.initialise()
    ramp = torch.arange(6.0).expand(1, 3, 5, 6)
    with torch.inference_mode():
        horizontal, vertical = sobel(ramp)[0, :, 1:-1, 1:-1]
    torch.testing.assert_close(horizontal, torch.full((3, 4), -8.0))
    torch.testing.assert_close(vertical, torch.zeros(3, 4))


# --- what is refused ------------------------------------------------------------------------------

DCN = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": False}
PLUGIN = {"cfg": {"type": "ContextBlock", "ratio": 0.0625}, "position": "after_conv3"}
PRETRAINED = {"type": "Pretrained", "checkpoint": "b.pth"}


def test_pretrained_is_mmdets_old_spelling_of_a_checkpoint() -> None:
    chosen = small("mmdet.ResNet", pretrained="torchvision://resnet50")
    assert chosen.weights() == WeightsRef("torchvision://resnet50", None, "#/backbone/pretrained")
    assert chosen.key() == small("mmdet.ResNet").key()


def test_deformable_convolutions_of_no_stage_change_nothing() -> None:
    assert small("mmdet.ResNet", dcn=DCN).key() == small("mmdet.ResNet", plugins=[]).key()


@pytest.mark.parametrize(
    ("name", "keys", "key"),
    [
        ("mmdet.ResNeSt", {"dcn": DCN, "stage_with_dcn": [False, True, True, True]}, "dcn"),
        ("mmdet.Res2Net", {"plugins": [PLUGIN]}, "plugins"),
        ("mmdet.ResNet", {"pretrained": "a.pth", "init_cfg": PRETRAINED}, "pretrained"),
        ("mmdet.ResNet", {"pretrained": "a.pth", "checkpoint": "b.pth"}, "pretrained"),
        ("mmdet.ResNet", {"expansion": 4}, "expansion"),
        ("mmdet.ResNet", {"drop_path_rate": 0.1}, "drop_path_rate"),
        ("mmdet.ResNeXt", {"width_per_group": 4}, "width_per_group"),
        ("mmdet.ResNeXt", {"depth": 18}, "depth"),
        ("mmpretrain.ResNeXt", {"base_width": 4}, "base_width"),
        ("mmpretrain.ResNeXt", {"groups": 0}, "groups"),
        ("mmpretrain.ResNetV1c", {"deep_stem": False}, "deep_stem"),
        ("mmpretrain.ResNetV1d", {"avg_down": False}, "avg_down"),
        ("mmpretrain.ResNet_CIFAR", {"deep_stem": True}, "deep_stem"),
        ("mmpretrain.ResNet", {"depth": 18, "expansion": 4}, "expansion"),
        ("mmpretrain.ResNet", {"dcn": DCN}, "dcn"),
        ("mmpretrain.SEResNet", {"depth": 34}, "depth"),
        ("mmpretrain.SEResNet", {"se_ratio": 0}, "se_ratio"),
        ("mmselfsup.ResNetSobel", {"in_channels": 2}, "in_channels"),
        ("mmselfsup.ResNet", {"frozen_stages": 5}, "frozen_stages"),
        ("mmselfsup.ResNet", {"strides": [1, 4]}, "strides"),
    ],
)
def test_what_a_library_does_not_take_is_refused(name: str, keys: dict[str, Any], key: str) -> None:
    assert pointer_of(name, **{"depth": 50, **keys}) == f"#/backbone/{key}"
