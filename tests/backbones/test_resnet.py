"""ResNet through its family: what a config means, what it refuses, and what the network gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from service.backbones.resnet import RESNET, ResNetConfig
from service.config.spec import Level, WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig
from service.validation import invalid

SMALL = {"type": "mmpretrain.ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8}


def config(**keys: Any) -> ResNetConfig:
    return ResNetConfig.model_validate({**SMALL, **keys})


def pointer_of(keys: dict[str, Any]) -> str:
    """Where the refusal of these keys points."""
    try:
        chosen = config(**keys)
        chosen.weights()
        chosen.levels(RESNET.describe(chosen))
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {keys}")


def seeded(chosen: ResNetConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return RESNET.build(chosen).eval()


def run(chosen: ResNetConfig, size: tuple[int, int] = (64, 64), **asked: Any) -> dict[str, torch.Tensor]:
    images = torch.randn(1, chosen.in_channels, *size, generator=torch.Generator().manual_seed(1))
    nodes = [level.node for level in chosen.levels(RESNET.describe(chosen))]
    with torch.inference_mode():
        return seeded(chosen)(images, nodes)


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_176_512), (50, 23_508_032), (152, 58_143_808)])
def test_an_architecture_is_described_without_weights(depth: int, parameters: int) -> None:
    described = RESNET.describe(ResNetConfig(type="mmpretrain.ResNet", depth=depth))
    assert described.parameters == parameters
    assert [feature.stride for feature in described.features] == [4, 8, 16, 32]
    assert described.in_channels == 3


def test_levels_come_shallow_to_deep_in_whatever_order_they_are_asked_for() -> None:
    described = RESNET.describe(config())
    assert config().levels(described) == (Level(3, "3", "3"),)
    assert config(out_indices=[2, -4]).levels(described) == (Level(0, "0", "0"), Level(2, "2", "2"))


def test_strides_of_levels_and_strides_of_stages_are_told_apart() -> None:
    described = RESNET.describe(config())
    assert [level.index for level in config(strides=[32, 8]).levels(described)] == [3, 1]
    stages = config(strides=[1, 2, 1, 1], dilations=[1, 1, 2, 4])
    assert [feature.stride for feature in RESNET.describe(stages).features] == [4, 8, 8, 8]
    assert stages.levels(RESNET.describe(stages)) == (Level(3, "3", "3"),)
    assert config(strides=[32, 8]).key() == config().key() != stages.key()


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (7, 5), (1, 1)])
@pytest.mark.parametrize("norm_cfg", [{"type": "BN"}, {"type": "GN", "num_groups": 8}])
def test_maps_of_any_image_have_the_described_channels(
    size: tuple[int, int], norm_cfg: dict[str, Any]
) -> None:
    chosen = config(out_indices=[0, 1, 2, 3], norm_cfg=norm_cfg)
    found = run(chosen, size)
    described = RESNET.describe(chosen)
    assert [found[feature.node].shape[1] for feature in described.features] == [8, 16, 32, 64]
    assert all(torch.isfinite(feature).all() for feature in found.values())


@pytest.mark.parametrize(
    "keys",
    [
        {"depth": 50, "deep_stem": True, "avg_down": True},
        {"depth": 50, "style": "caffe", "expansion": 2},
        {"num_stages": 2, "out_indices": [1]},
        {"num_stages": 3, "strides": [1, 2, 1], "dilations": [1, 1, 2], "out_indices": [2]},
        {"norm_cfg": {"type": "GN", "num_groups": 4}},
        {"in_channels": 1, "conv_cfg": {"type": "Conv2d"}},
    ],
)
def test_every_variant_gives_what_it_describes(keys: dict[str, Any]) -> None:
    chosen = config(**keys)
    described = RESNET.describe(chosen)
    for node, found in run(chosen).items():
        feature = described.features[int(node)]
        assert feature.stride is not None
        assert found.shape == (1, feature.channels, 64 // feature.stride, 64 // feature.stride)


def test_only_the_stages_asked_for_are_computed() -> None:
    network = seeded(config())
    ran: list[int] = []
    for stage in (1, 2, 3, 4):
        getattr(network, f"layer{stage}").register_forward_hook(lambda *_, stage=stage: ran.append(stage))
    network(torch.zeros(1, 3, 32, 32), ["1", "0"])
    assert ran == [1, 2]


def test_the_same_seed_builds_the_same_weights() -> None:
    first, second = seeded(config()).state_dict(), seeded(config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())


def test_deep_stem_and_group_norm_name_their_keys_as_openmmlab_does() -> None:
    names = set(seeded(config(deep_stem=True, norm_cfg={"type": "GN", "num_groups": 2})).state_dict())
    assert {"stem.0.conv.weight", "stem.2.gn.bias", "layer1.0.gn2.weight"} <= names
    pooled = set(seeded(config(avg_down=True)).state_dict())
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.2.running_mean"} <= pooled


# --- one model for what differs in nothing but training or the reply -------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"type": "mmcls.ResNet"},
        {"with_cp": True, "zero_init_residual": False, "drop_path_rate": 0.1},
        {"norm_cfg": {"type": "SyncBN", "momentum": 0.01, "requires_grad": False}},
        {"frozen_stages": 2, "norm_eval": True, "out_indices": [0, 1]},
        {"init_cfg": [{"type": "Kaiming", "layer": ["Conv2d"]}]},
        {"style": "caffe"},
    ],
)
def test_what_changes_no_number_makes_no_second_model(keys: dict[str, Any]) -> None:
    assert config(**keys).key() == config().key()


@pytest.mark.parametrize(
    "keys", [{"norm_cfg": {"type": "BN", "eps": 1e-3}}, {"depth": 50}, {"avg_down": True}]
)
def test_what_changes_numbers_makes_another_model(keys: dict[str, Any]) -> None:
    assert config(**keys).key() != config().key()


# --- init_cfg -------------------------------------------------------------------------------------

INITIALISERS = [
    {"type": "Kaiming", "layer": ["Conv2d"]},
    {
        "type": "Constant",
        "val": 1,
        "layer": ["_BatchNorm", "GroupNorm"],
        "override": {"type": "Constant", "val": 0, "name": "norm2"},
    },
]


@pytest.mark.parametrize("init_cfg", [None, [], INITIALISERS, INITIALISERS[0]])
def test_initialisers_mean_no_checkpoint(init_cfg: Any) -> None:
    assert config(init_cfg=init_cfg).weights() is None


@pytest.mark.parametrize("nonlinearity", ["linear", "sigmoid", "tanh", "selu", "conv2d", "leaky_relu"])
def test_an_initialiser_may_be_for_any_nonlinearity_that_has_a_gain(nonlinearity: str) -> None:
    init_cfg = {"type": "Kaiming", "layer": "Conv2d", "nonlinearity": nonlinearity}
    assert config(init_cfg=init_cfg).weights() is None


def test_a_checkpoint_without_a_type_is_a_checkpoint() -> None:
    assert config(init_cfg={"checkpoint": "a.pth"}).weights() == WeightsRef(
        "a.pth", None, "#/backbone/init_cfg/checkpoint"
    )


def test_the_one_checkpoint_of_a_list_is_used() -> None:
    pretrained = {"type": "Pretrained", "checkpoint": "a.pth", "prefix": "backbone."}
    ref = config(init_cfg=[*INITIALISERS, pretrained]).weights()
    assert ref == WeightsRef("a.pth", "backbone.", "#/backbone/init_cfg/2/checkpoint")


# --- freezing -------------------------------------------------------------------------------------


def test_nothing_is_frozen_by_default() -> None:
    report = seeded(config()).frozen(config().freeze())
    assert (report.stages, report.parameters, report.norms, report.of) == (None, (), (), 60)


def test_norms_without_gradient_are_all_frozen_but_stay_in_train_mode() -> None:
    chosen = config(norm_cfg={"type": "BN", "requires_grad": False})
    report = seeded(chosen).frozen(chosen.freeze())
    assert len(report.parameters) == 40
    assert {name.rpartition(".")[2] for name in report.parameters} == {"weight", "bias"}
    assert report.norms == ()


def test_norm_eval_is_of_batch_norms_only() -> None:
    groups = config(norm_eval=True, norm_cfg={"type": "GN", "num_groups": 2})
    assert seeded(groups).frozen(groups.freeze()).norms == ()
    assert len(seeded(config()).frozen(config(norm_eval=True).freeze()).norms) == 20


def test_a_frozen_deep_stem_is_one_module() -> None:
    chosen = config(deep_stem=True, frozen_stages=0)
    report = seeded(chosen).frozen(chosen.freeze())
    assert report.norms == ("stem.0.bn", "stem.1.bn", "stem.2.bn")
    assert all(name.startswith("stem.") for name in report.parameters)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "pointer"),
    [
        ({"depth": 17}, "#/backbone/depth"),
        ({"depth": "50"}, "#/backbone/depth"),
        ({"depth": True}, "#/backbone/depth"),
        ({"base_channels": 10**9}, "#/backbone/base_channels"),
        ({"base_channels": 0}, "#/backbone/base_channels"),
        ({"stem_channels": 64.0}, "#/backbone/stem_channels"),
        ({"in_channels": -3}, "#/backbone/in_channels"),
        ({"expansion": 0}, "#/backbone/expansion"),
        ({"num_stages": 5}, "#/backbone/num_stages"),
        ({"num_stages": 3, "out_indices": [3]}, "#/backbone/out_indices/0"),
        ({"num_stages": 3, "strides": [1, 2, 2, 2], "out_indices": [0]}, "#/backbone/strides"),
        ({"strides": [1, 2]}, "#/backbone/strides"),
        ({"strides": [1, 2, 4, 8]}, "#/backbone/strides"),
        ({"strides": [64]}, "#/backbone/strides/0"),
        ({"strides": []}, "#/backbone/strides"),
        ({"dilations": [1, 1, 1]}, "#/backbone/dilations"),
        ({"dilations": [1, 1, 1, 10**6]}, "#/backbone/dilations/3"),
        ({"out_indices": [4]}, "#/backbone/out_indices/0"),
        ({"out_indices": [0, -5]}, "#/backbone/out_indices/1"),
        ({"out_indices": []}, "#/backbone/out_indices"),
        ({"out_indices": [1, 1]}, "#/backbone/out_indices"),
        ({"style": "tensorflow"}, "#/backbone/style"),
        ({"frozen_stages": 5}, "#/backbone/frozen_stages"),
        ({"frozen_stages": 4, "num_stages": 2}, "#/backbone/frozen_stages"),
        ({"deep_stem": True, "stem_channels": 1}, "#/backbone/stem_channels"),
        ({"conv_cfg": {"type": "DCNv2"}}, "#/backbone/conv_cfg/type"),
        ({"norm_cfg": {"type": "GN"}}, "#/backbone/norm_cfg/num_groups"),
        ({"norm_cfg": {"type": "GN", "num_groups": 3}}, "#/backbone/norm_cfg/num_groups"),
        ({"norm_cfg": {"type": "BN", "num_groups": 2}}, "#/backbone/norm_cfg/num_groups"),
        ({"norm_cfg": {"type": "IN"}}, "#/backbone/norm_cfg/type"),
        ({"norm_cfg": {"type": "BN", "eps": -1e-9}}, "#/backbone/norm_cfg/eps"),
        ({"norm_cfg": {"type": "BN", "eps": float("nan")}}, "#/backbone/norm_cfg/eps"),
        ({"norm_cfg": {"type": "os.system"}}, "#/backbone/norm_cfg/type"),
        ({"drop_path_rate": 1.5}, "#/backbone/drop_path_rate"),
        ({"dcn": {"type": "DCN"}}, "#/backbone/dcn"),
        ({"init_cfg": {"type": "Pretrained"}}, "#/backbone/init_cfg/checkpoint"),
        ({"init_cfg": {"type": "subprocess.Popen"}}, "#/backbone/init_cfg"),
        ({"init_cfg": [INITIALISERS[0]] * 17}, "#/backbone/init_cfg"),
        ({"init_cfg": [{"type": "Pretrained", "checkpoint": "a"}] * 2}, "#/backbone/init_cfg/1/checkpoint"),
        ({"init_cfg": {"type": "Pretrained", "checkpoint": "a"}, "checkpoint": "b"}, "#/backbone/checkpoint"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_at_its_key(keys: dict[str, Any], pointer: str) -> None:
    assert pointer_of(keys) == pointer


def test_a_checkpoint_of_another_depth_is_refused_by_name() -> None:
    state = seeded(config()).state_dict()
    with pytest.raises(CheckpointMismatch) as refused:
        RESNET.load(config(depth=34), state, WeightsRef("any"))
    assert "layer1.2.conv1.weight" in refused.value.missing


def test_counters_that_a_checkpoint_leaves_out_are_zero() -> None:
    state = {
        name: tensor for name, tensor in seeded(config()).state_dict().items() if "num_batches" not in name
    }
    network, keys = RESNET.load(config(), state, WeightsRef("any"))
    assert keys.missing == ()
    assert all(int(buffer) == 0 for name, buffer in network.named_buffers() if "num_batches" in name)
