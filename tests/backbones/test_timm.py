"""timm's models and OpenMMLab's wrapper: the numbers are timm's own, for one set of names and any order."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from service.backbones import tables
from service.backbones.timm import TIMM, TIMM_BACKBONE, TimmBackbone, TimmConfig, hub_architecture
from service.config.spec import Freeze, LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig, UnknownBackbone

REF = WeightsRef("weights.safetensors", pointer="#/backbone/checkpoint")
State = dict[str, Tensor]


def config(model: str, **keys: Any) -> TimmConfig:
    return TIMM.config.model_validate({"type": f"timm.{model}", **keys})


def whole_state(model: str, **keys: Any) -> State:
    """The state of a whole timm model with numbers that no constructor gives."""
    torch.manual_seed(1)
    state = timm.create_model(model, **keys).state_dict()
    return {
        n: torch.rand_like(t) + 0.5 if t.is_floating_point() and t.ndim < 2 else t for n, t in state.items()
    }


def loaded(cfg: Any, state: State, ref: WeightsRef = REF) -> tuple[TimmBackbone, LoadedKeys]:
    family = TIMM_BACKBONE if cfg.type.endswith("TIMMBackbone") else TIMM
    backbone, keys = family.load(cfg, state, ref)
    assert isinstance(backbone, TimmBackbone)
    return backbone.eval(), keys


def levels_of(cfg: Any, backbone: nn.Module, images: Tensor) -> list[Tensor]:
    levels = cfg.levels(TIMM.describe(cfg))
    with torch.inference_mode():
        features = backbone(images, [level.node for level in levels])
    return [features[level.node] for level in levels]


def timms_own(model: str, state: State, images: Tensor, **keys: Any) -> list[Tensor]:
    """What timm's own loading and `features_only` give."""
    overlay = {"state_dict": dict(state), "hf_hub_id": None, "url": None, "custom_load": False}
    net = timm.create_model(
        model, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **keys
    )
    with torch.inference_mode():
        features = net.eval()(images)
    last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    return [feature.permute(0, 3, 1, 2) if last else feature for feature in features]


def images(cfg: TimmConfig, size: int | None = None) -> Tensor:
    torch.manual_seed(2)
    height, width = cfg.built().size if size is None else (size, size)
    return torch.randn(2, cfg.in_chans, height, width)


@pytest.mark.parametrize(
    ("model", "keys", "size"),
    [
        ("resnet18", {}, 64),
        ("resnet18", {"out_indices": [1, 3]}, 64),
        ("resnet18", {"in_chans": 4}, 64),
        ("convnext_atto", {"in_chans": 1}, 64),
        ("mobilenetv3_small_050", {"out_indices": [0, 2]}, 64),
        ("regnety_002", {"output_stride": 16}, 64),
        ("hrnet_w18_small", {"out_indices": [1, 3]}, 64),
        ("xception41", {"out_indices": [0, 2]}, 64),
        ("vit_tiny_patch16_224", {"img_size": 64, "out_indices": [2, 7]}, None),
        ("swin_tiny_patch4_window7_224", {"img_size": 112}, None),
    ],
)
def test_features_are_those_of_features_only(model: str, keys: dict[str, Any], size: int | None) -> None:
    cfg, state = config(model, **keys), whole_state(model)
    backbone, report = loaded(cfg, state)
    ours = levels_of(cfg, backbone, images(cfg, size))
    theirs = timms_own(model, state, images(cfg, size), **keys)
    assert report.missing == ()
    for mine, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, want)


def test_swin_maps_have_their_channels_second() -> None:
    cfg = config("swin_tiny_patch4_window7_224", img_size=56)
    shapes = [tuple(f.shape[1:]) for f in levels_of(cfg, TIMM.build(cfg).eval(), images(cfg))]
    assert shapes == [(96, 14, 14), (192, 7, 7), (384, 4, 4), (768, 2, 2)]
    assert shapes == [feature.shape for feature in TIMM.describe(cfg).features]


@pytest.mark.parametrize(
    ("model", "keys", "names"),
    [
        ("resnet18", {"out_indices": [-1, 1]}, ["4", "1"]),
        ("resnet18", {"out_indices": 2}, ["3", "4"]),
        ("resnet18", {"strides": [32, 8]}, ["4", "2"]),
        ("vit_tiny_patch16_224", {}, ["9", "10", "11"]),
        ("tresnet_m", {}, ["1", "2", "3", "4"]),
    ],
)
def test_levels_come_in_the_order_asked(model: str, keys: dict[str, Any], names: list[str]) -> None:
    cfg = config(model, **keys)
    assert [level.name for level in cfg.levels(TIMM.describe(cfg))] == names


def test_a_feature_is_the_same_alone_and_among_others() -> None:
    cfg = config("resnet18")
    backbone = TIMM.build(cfg).eval()
    with torch.inference_mode():
        backwards = backbone(images(cfg, 64), ["4", "0", "2"])
        alone = backbone(images(cfg, 64), ["2"])
    assert list(backwards) == ["4", "0", "2"]
    torch.testing.assert_close(alone["2"], backwards["2"], rtol=0, atol=0)


def test_configs_that_differ_in_what_they_return_share_a_model() -> None:
    views: list[dict[str, Any]] = [
        {},
        {"out_indices": [1]},
        {"pretrained": True},
        {"drop_path_rate": 0.5, "num_classes": 10, "global_pool": "avg"},
        {"frozen_stages": 1},
        {"norm_layer": "FrozenBatchNorm2d"},
    ]
    assert len({config("resnet18", **view).key() for view in views}) == 1
    assert config("resnet18.tv_in1k").key() == config("resnet18").key()
    assert config("resnet18", output_stride=16).key() != config("resnet18").key()


def test_former_names_mean_what_timm_makes_of_them() -> None:
    assert config("tf_efficientnetv2_s_in21k").name() == "tf_efficientnetv2_s.in21k"


@pytest.mark.parametrize(
    ("model", "keys", "pointer"),
    [
        ("resnet18", {"img_size": 96}, "#/backbone/img_size"),
        ("vit_tiny_patch16_224", {"output_stride": 16}, "#/backbone/output_stride"),
        ("vit_tiny_patch16_224", {"norm_layer": "BN"}, "#/backbone/norm_layer"),
        ("swin_tiny_patch4_window7_224", {"img_size": 1}, "#/backbone/img_size"),
        ("tiny_vit_5m_224", {"img_size": 2048}, "#/backbone/img_size"),
        ("resnet18", {"out_indices": [5]}, "#/backbone/out_indices/0"),
        ("resnet18", {"out_indices": [1, 1]}, "#/backbone/out_indices"),
        ("resnet18", {"out_indices": 6}, "#/backbone/out_indices"),
        ("tresnet_m", {"out_indices": [0]}, "#/backbone/out_indices/0"),
    ],
)
def test_what_a_model_does_not_take_is_refused_by_its_key(
    model: str, keys: dict[str, Any], pointer: str
) -> None:
    cfg = config(model, **keys)
    with pytest.raises(InvalidConfig) as refused:
        cfg.levels(TIMM.describe(cfg))
    assert refused.value.faults[0].pointer == pointer


@pytest.mark.parametrize(
    "keys",
    [
        {"pretrained": "weights.pth"},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"pretrained_cfg_overlay": {"url": "https://example.com"}},
        {"cache_dir": "/tmp"},
        {"feature_cls": "fx"},
        {"scriptable": True},
        {"in_chans": 65},
        {"in_chans": True},
        {"img_size": [224, 224, 224]},
        {"img_size": 100_000},
        {"out_indices": []},
        {"out_indices": list(range(65))},
        {"act_layer": "os.system"},
        {"norm_layer": "torch.nn.BatchNorm2d"},
        {"drop_rate": 2},
        {"drop_rate": float("nan")},
        {"global_pool": "../../x"},
        {"num_classes": 10**9},
    ],
)
def test_unknown_and_unbounded_keys_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config("resnet18", **keys)


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "local-dir:/tmp/model", "resnet18.no_such_tag", "resnet", "", "a" * 5000]
)
def test_only_names_of_the_table_reach_timm(name: str) -> None:
    with pytest.raises(UnknownBackbone) as refused:
        config(name)
    assert len(refused.value.detail) < 600


def test_a_model_that_cannot_be_served_says_why() -> None:
    with pytest.raises(InvalidConfig, match="gemma4_vit_167m is not served: its shapes"):
        config("gemma4_vit_167m")


# --- loading ----------------------------------------------------------------------------------------------


def test_what_only_the_head_uses_is_unexpected() -> None:
    _, report = loaded(config("resnet18"), whole_state("resnet18") | {"optimizer.lr": torch.zeros(1)})
    assert sorted(report.unexpected) == ["fc.bias", "fc.weight", "optimizer.lr"]
    assert (report.loaded, report.missing, report.prefix) == (120, (), "")


def test_a_missing_weight_is_an_error_that_names_it() -> None:
    state = whole_state("resnet18")
    del state["layer3.0.conv1.weight"]
    with pytest.raises(CheckpointMismatch, match=r"layer3\.0\.conv1\.weight") as refused:
        loaded(config("resnet18"), state)
    assert refused.value.missing == ("layer3.0.conv1.weight",)
    assert refused.value.faults[0].pointer == REF.pointer


def test_a_weight_that_only_deeper_levels_need_may_be_missing() -> None:
    state = whole_state("resnet18")
    del state["layer3.0.bn1.running_var"], state["layer1.0.bn1.num_batches_tracked"]
    backbone, report = loaded(config("resnet18", out_indices=[1, 2]), state)
    assert report.missing == ("layer3.0.bn1.running_var",)
    assert "layer3.0.bn1.running_var" not in backbone.needs("2")
    assert "layer3.0.bn1.running_var" in backbone.needs("3") & backbone.needs("4")


def test_a_wrong_shape_is_an_error_that_names_it() -> None:
    state = whole_state("resnet18") | {"layer1.0.conv1.weight": torch.zeros(64, 64, 5, 5)}
    with pytest.raises(CheckpointMismatch) as refused:
        loaded(config("resnet18"), state)
    assert refused.value.wrong_shape == ("layer1.0.conv1.weight",)


@pytest.mark.parametrize("state", [{}, {"a.b": torch.zeros(3)}, {"": torch.zeros(())}])
@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_a_file_of_something_else_is_a_mismatch(model: str, state: State) -> None:
    with pytest.raises(CheckpointMismatch):
        loaded(config(model), state)


def test_another_number_of_classes_does_not_matter() -> None:
    _, report = loaded(config("resnet18"), whole_state("resnet18", num_classes=7))
    assert sorted(report.unexpected) == ["fc.bias", "fc.weight"]


@pytest.mark.parametrize("prefix", ["", "model.", "backbone.timm_model."])
@pytest.mark.parametrize("model", ["convnext_atto", "vit_tiny_patch16_224"])
def test_names_of_the_features_only_form_fit_too(model: str, prefix: str) -> None:
    cfg = config(model)
    wrapped = timm.create_model(model, features_only=True).state_dict()
    named = {prefix + name: tensor for name, tensor in wrapped.items()}
    backbone, report = loaded(config(model, out_indices=[-1]), named)
    size = cfg.built().size[0]
    again, _ = loaded(cfg, {backbone.names[n]: t for n, t in backbone.net.state_dict().items()})
    want, got = (b(images(cfg, size), ["2"])["2"] for b in (backbone, again))
    assert report.missing == ()
    torch.testing.assert_close(got, want)


def test_openmmlabs_wrapper_takes_its_own_names_and_gives_one_unpooled_map() -> None:
    cfg = TIMM_BACKBONE.config.model_validate({"type": "mmpretrain.TIMMBackbone", "model_name": "resnet18"})
    state = {f"backbone.timm_model.{name}": tensor for name, tensor in whole_state("resnet18").items()}
    state["head.fc.weight"] = torch.zeros(2, 2)
    backbone, report = loaded(cfg, state, WeightsRef("x.pth", prefix="backbone."))
    want = timm.create_model("resnet18").eval()
    want.load_state_dict(whole_state("resnet18"))
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images, ["0"])["0"], want.forward_features(images))
    assert report.prefix == "backbone.timm_model."
    assert "head.fc.weight" in report.unexpected
    assert [(level.index, level.name) for level in cfg.levels(TIMM_BACKBONE.describe(cfg))] == [(0, "0")]


def test_a_whole_vision_transformer_gives_tokens() -> None:
    raw = {"type": "mmpretrain.TIMMBackbone", "model_name": "vit_tiny_patch16_224", "in_channels": 1}
    cfg = TIMM_BACKBONE.config.model_validate(raw)
    described = TIMM_BACKBONE.describe(cfg)
    (feature,) = described.features
    assert (feature.layout, feature.channels, feature.stride, feature.shape) == ("NLC", 192, None, (197, 192))
    assert described.prefix_tokens == 1


@pytest.mark.parametrize("key", ["out_indices", "frozen_stages"])
def test_a_whole_model_has_no_indices(key: str) -> None:
    raw = {"type": "mmpretrain.TIMMBackbone", "model_name": "resnet18", key: 1}
    cfg = TIMM_BACKBONE.config.model_validate(raw)
    with pytest.raises(InvalidConfig, match="features_only"):
        (cfg.levels(TIMM_BACKBONE.describe(cfg)), cfg.freeze())


# --- weights, freezing, description -----------------------------------------------------------------------


def test_pretrained_means_the_hub_file_of_the_tag_and_its_preprocessing() -> None:
    cfg = config("vit_base_patch16_clip_224.openai", pretrained=True)
    ref = cfg.weights()
    assert ref is not None
    assert (ref.name, ref.pointer) == (
        "hf-hub:timm/vit_base_patch16_clip_224.openai",
        "#/backbone/pretrained",
    )
    assert cfg.input_defaults().mean == timm.get_pretrained_cfg(cfg.name()).mean
    assert config("resnet18").weights() is None


@pytest.mark.parametrize("other", [{"checkpoint": "a.pth"}, {"checkpoint_path": "a.pth"}])
def test_two_sources_of_weights_are_refused(other: dict[str, str]) -> None:
    with pytest.raises(InvalidConfig, match="not both"):
        config("resnet18", pretrained=True, **other).weights()


def test_a_model_without_weights_on_the_hub_is_refused() -> None:
    with pytest.raises(InvalidConfig) as refused:
        config("coatnet_0_224", pretrained=True).weights()
    assert refused.value.faults[0].pointer == "#/backbone/pretrained"


@pytest.mark.parametrize(
    ("model", "index", "parameters", "norms", "of"),
    [
        ("resnet18", 1, 15, 5, 60),
        ("resnet18", 4, 60, 20, 60),
        ("convnext_atto", 1, 44, 0, 124),
        ("hrnet_w18_small", 3, 231, 77, 261),
        ("dla34", 3, 60, 20, 111),
        ("levit_128s", 0, 38, 12, 161),
    ],
)
def test_freezing_to_a_feature_freezes_what_it_depends_on(
    model: str, index: int, parameters: int, norms: int, of: int
) -> None:
    cfg = config(model, freeze_to_index=index)
    with torch.device("meta"):
        report = TIMM.build(cfg).frozen(cfg.freeze())
    assert (len(report.parameters), len(report.norms), report.of) == (parameters, norms, of)


@pytest.mark.parametrize(
    ("model", "stages", "some"),
    [
        ("resnet18", 0, {"conv1.weight", "bn1.weight", "bn1.bias"}),
        ("convnext_atto", 0, {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}),
        (
            "twins_pcpvt_small",
            0,
            {f"patch_embeds.0.{n}.{w}" for n in ("proj", "norm") for w in ("weight", "bias")},
        ),
        ("resnet18", -1, set()),
    ],
)
def test_stage_zero_is_the_stem(model: str, stages: int, some: set[str]) -> None:
    cfg = config(model, frozen_stages=stages)
    with torch.device("meta"):
        assert set(TIMM.build(cfg).frozen(cfg.freeze()).parameters) == some


def test_names_of_frozen_parameters_are_those_of_checkpoints() -> None:
    cfg = config("convnext_atto", frozen_stages=1)
    with torch.device("meta"):
        report = TIMM.build(cfg).frozen(cfg.freeze())
    assert set(report.parameters) <= set(whole_state("convnext_atto"))
    assert "stages.0.blocks.0.gamma" in report.parameters
    assert not any(name.startswith("stages.1") for name in report.parameters)


def test_frozen_batch_norms_are_all_frozen_and_give_the_same_numbers() -> None:
    cfg = config("resnet18", norm_layer="FrozenBatchNorm2d")
    backbone, _ = loaded(cfg, whole_state("resnet18"))
    report = backbone.frozen(cfg.freeze())
    assert (len(report.norms), len(report.parameters)) == (20, 40)


@pytest.mark.parametrize("keys", [{"frozen_stages": 5}, {"freeze_to_index": 5}])
def test_a_stage_that_is_not_there_is_refused(keys: dict[str, int]) -> None:
    cfg = config("resnet18", **keys)
    with torch.device("meta"), pytest.raises(InvalidConfig, match="5 is not"):
        TIMM.build(cfg).frozen(cfg.freeze())


@pytest.mark.parametrize("model", ["resnet18", "swin_tiny_patch4_window7_224", "xception41", "tresnet_m"])
def test_the_table_says_what_building_says(model: str) -> None:
    described = TIMM.describe(config(model))
    with torch.device("meta"):
        backbone = TIMM.build(config(model))
        images = torch.empty(1, 3, *(described.input.size or (0, 0)))
        with torch.inference_mode():
            outputs = backbone(images, [feature.node for feature in described.features])
    assert [tuple(outputs[f.node].shape[1:]) for f in described.features] == [
        f.shape for f in described.features
    ]
    assert described.parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert described.tensors == backbone.frozen(Freeze()).of


def test_a_network_that_the_table_has_not_is_counted_too() -> None:
    cfg = config("resnet18", output_stride=16, in_chans=4)
    with torch.device("meta"):
        backbone = TIMM.build(cfg)
    assert TIMM.describe(cfg).tensors == backbone.frozen(Freeze()).of == 60


def test_the_table_has_every_model_of_the_installed_timm() -> None:
    assert set(tables.timm_models()) == set(timm.list_models())


def test_building_leaves_the_librarys_own_loading_alone() -> None:
    TIMM.build(config("resnet18"))
    state = whole_state("resnet18")
    theirs = timms_own("resnet18", state, torch.zeros(1, 3, 32, 32))
    assert len(theirs) == 5


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(TIMM.build(config("resnet18", out_indices=[1])).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_examples_work_as_they_stand() -> None:
    for family, type_name in ((TIMM, "timm.resnet18"), (TIMM_BACKBONE, "mmpretrain.TIMMBackbone")):
        cfg = family.config.model_validate(orjson.loads(orjson.dumps(family.example(type_name))))
        assert cfg.levels(family.describe(cfg))


def test_a_hub_repositorys_config_names_a_model_of_the_table() -> None:
    arguments = {"in_chans": 1}
    assert hub_architecture({"architecture": "resnet18", "model_args": arguments}) == ("resnet18", arguments)
    with pytest.raises(InvalidConfig):
        hub_architecture({"architecture": "resnet18", "model_args": {"pretrained_cfg": {}}})
    with pytest.raises(UnknownBackbone):
        hub_architecture({"architecture": "evil"})
