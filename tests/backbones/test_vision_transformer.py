"""VisionTransformer through its family: what a config means, what it refuses, and what the network gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from timm.layers import SwiGLUPacked

from service.backbones.vision_transformer import (
    SIZES,
    VISION_TRANSFORMER,
    SwiGLU,
    VisionTransformer,
    VisionTransformerConfig,
)
from service.config.spec import Level, WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig, TooLarge
from service.validation import invalid

TINY = {"embed_dims": 24, "num_layers": 3, "num_heads": 2, "feedforward_channels": 48}
SMALL = {"type": "mmpretrain.VisionTransformer", "arch": TINY, "img_size": 32, "patch_size": 8}
ANY = WeightsRef("any")


def config(scope: str = "mmpretrain", **keys: Any) -> VisionTransformerConfig:
    return VisionTransformerConfig.model_validate({**SMALL, **keys}, context={"scope": scope})


def built(chosen: VisionTransformerConfig) -> VisionTransformer:
    torch.manual_seed(0)
    network = VISION_TRANSFORMER.build(chosen).eval()
    assert isinstance(network, VisionTransformer)
    return network


def levels(chosen: VisionTransformerConfig) -> list[Level]:
    return list(chosen.levels(VISION_TRANSFORMER.describe(chosen)))


def run(chosen: VisionTransformerConfig, height: int = 32, width: int = 32) -> dict[str, torch.Tensor]:
    images = torch.randn(2, chosen.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return built(chosen)(images, [level.node for level in levels(chosen)])


def pointer_of(scope: str, keys: dict[str, Any]) -> str:
    """Where the refusal of these keys points."""
    try:
        levels(config(scope, **keys))
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {keys}")


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({}, (2, 24)),
        ({"out_type": "raw"}, (2, 17, 24)),
        ({"out_type": "featmap"}, (2, 24, 4, 4)),
        ({"out_type": "avg_featmap"}, (2, 24)),
        ({"out_type": "raw", "with_cls_token": False}, (2, 16, 24)),
        ({"out_type": "featmap", "with_cls_token": False, "in_channels": 1}, (2, 24, 4, 4)),
        ({"out_type": "featmap", "img_size": [64, 16]}, (2, 24, 4, 4)),
        ({"layer_cfgs": {"ffn_type": "swiglu_fused"}, "layer_scale_init_value": 1e-5}, (2, 24)),
        ({"layer_cfgs": {"act_cfg": {"type": "mmpretrain.QuickGELU"}}, "pre_norm": True}, (2, 24)),
        ({"qkv_bias": False, "final_norm": False, "patch_cfg": {"bias": False}}, (2, 24)),
    ],
)
def test_the_last_layer_is_given_in_the_form_asked_for(keys: dict[str, Any], shape: tuple[int, ...]) -> None:
    (found,) = run(config(**keys)).values()
    assert found.shape == shape
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("size", [(32, 32), (33, 40), (8, 120), (1, 1)])
def test_images_of_any_size_are_padded_to_whole_patches(size: tuple[int, int]) -> None:
    (found,) = run(config(out_type="featmap"), *size).values()
    assert found.shape == (2, 24, -(-size[0] // 8), -(-size[1] // 8))


def test_an_image_of_too_many_patches_is_refused_before_it_is_computed() -> None:
    with pytest.raises(TooLarge, match="16512 patches of 8 px; the limit is 16384"):
        run(config(), 8 * 128, 8 * 129)


def test_only_the_last_layer_has_the_final_norm() -> None:
    early, late = run(config(out_type="raw", out_indices=[1, 2])).values()
    assert not torch.allclose(early.mean(-1), torch.zeros(2, 17), atol=1e-5)
    assert torch.allclose(late.mean(-1), torch.zeros(2, 17), atol=1e-5)


def test_the_description_counts_the_network() -> None:
    chosen = VisionTransformerConfig(type="mmpretrain.VisionTransformer")
    described = VISION_TRANSFORMER.describe(chosen)
    assert described.parameters == 85_798_656
    assert described.bytes == 4 * described.parameters
    assert described.input.size == (224, 224)
    assert {feature.index for feature in described.features} == set(range(12))


def test_every_named_arch_is_described() -> None:
    for name in SIZES:
        described = VISION_TRANSFORMER.describe(config(arch=name.upper()))
        assert described.features[-1].channels == SIZES[name].width


# --- which levels ---------------------------------------------------------------------------------


def test_the_default_is_the_class_token_in_mmpretrain_and_a_map_with_it_in_mmcls() -> None:
    assert levels(config()) == [Level(2, "2", "2.cls_token")]
    assert levels(config("mmcls")) == [Level(2, "2", "2.featmap"), Level(2, "2.cls", "2.cls_token")]


def test_either_spelling_is_taken_in_either_scope() -> None:
    assert levels(config("mmcls", out_type="raw")) == [Level(2, "2", "2.raw")]
    assert levels(config("mmcls", output_cls_token=False)) == [Level(2, "2", "2.featmap")]
    assert len(levels(config("mmpretrain", output_cls_token=True, out_indices=[0, 2]))) == 4


def test_indices_count_from_either_end_and_come_shallow_to_deep() -> None:
    assert [level.name for level in levels(config(out_indices=[-1, 0]))] == ["0", "2"]
    assert [level.name for level in levels(config(out_indices=1))] == ["1"]


def test_the_stride_of_the_patches_is_the_last_map() -> None:
    assert levels(config(strides=[8])) == [Level(2, "2", "2.featmap")]


def test_every_output_but_the_averaged_one_shares_a_model() -> None:
    key = config().key()
    for same in ({"out_type": "raw"}, {"out_type": "featmap"}, {"frozen_stages": 1}, {"drop_path_rate": 0.1}):
        assert config(**same).key() == key
    assert config("mmcls", type="mmcls.VisionTransformer").key() == key
    assert config(norm_cfg={"type": "LN", "eps": 1e-6, "requires_grad": False}).key() == key
    assert config(out_type="avg_featmap").key() != key
    assert config(norm_cfg={"type": "LN"}).key() != key


# --- weights --------------------------------------------------------------------------------------


def test_the_same_seed_builds_the_same_weights() -> None:
    first, second = built(config()).state_dict(), built(config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())


def test_positions_of_another_grid_are_resized_at_load_as_in_forward() -> None:
    source = built(config())
    larger, keys = VISION_TRANSFORMER.load(config(img_size=48), source.state_dict(), ANY)
    assert keys.missing == ()
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        resized, original = larger.eval()(images, ["2.raw"]), source(images, ["2.raw"])
    assert torch.allclose(resized["2.raw"], original["2.raw"], atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("img_size", [32, 48])
def test_without_a_class_token_its_position_is_cut(prefix: str, img_size: int) -> None:
    source = built(config())
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    chosen = config(with_cls_token=False, out_type="raw", img_size=img_size)
    network, keys = VISION_TRANSFORMER.load(chosen, state, WeightsRef("any", prefix or None))
    assert keys.unexpected == (f"{prefix}cls_token",)
    if img_size == 32:
        assert torch.equal(network.state_dict()["pos_embed"], source.pos_embed[:, 1:])


@pytest.mark.parametrize("shape", [(1, 12, 24), (1, 17, 25), (17, 24), (2, 17, 24), (1, 1, 24)])
def test_positions_of_no_grid_are_refused(shape: tuple[int, ...]) -> None:
    state = {**built(config()).state_dict(), "pos_embed": torch.zeros(shape)}
    with pytest.raises(CheckpointMismatch) as refused:
        VISION_TRANSFORMER.load(config(), state, ANY)
    assert refused.value.wrong_shape[0].startswith("pos_embed")


def test_key_names_are_mmpretrains() -> None:
    names = set(built(config(layer_scale_init_value=0.1, pre_norm=True, out_type="avg_featmap")).state_dict())
    assert {
        "layers.0.attn.gamma1.weight",
        "layers.2.ffn.gamma2.weight",
        "pre_norm.bias",
        "ln2.weight",
    } <= names
    assert "patch_embed.projection.bias" not in names
    fused = set(built(config(layer_cfgs={"ffn_type": "swiglu_fused"})).state_dict())
    assert {"layers.0.ffn.w12.weight", "layers.0.ffn.w3.bias"} <= fused


def test_layer_scale_starts_at_its_initial_value() -> None:
    network = built(config(layer_scale_init_value=0.25))
    assert torch.equal(network.state_dict()["layers.0.attn.gamma1.weight"], torch.full((24,), 0.25))


def test_the_gated_feed_forward_is_the_one_of_dinov2() -> None:
    """timm's packed SwiGLU with its gate first is what the DINOv2 giant weights are for."""
    ours = SwiGLU(config(layer_cfgs={"ffn_type": "swiglu_fused"}).spec())
    theirs = SwiGLUPacked(24, 2 * 32, gate_last=False)
    theirs.load_state_dict(
        {
            name.replace("w12", "fc1").replace("w3", "fc2"): tensor
            for name, tensor in ours.state_dict().items()
        }
    )
    tokens = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-6)


# --- freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "out_type", "roots"),
    [
        (0, "raw", set()),
        (1, "raw", {"cls_token", "pos_embed", "patch_embed", "pre_norm", "layers"}),
        (3, "raw", {"cls_token", "pos_embed", "patch_embed", "pre_norm", "layers", "ln1"}),
        (3, "avg_featmap", {"cls_token", "pos_embed", "patch_embed", "pre_norm", "layers", "ln1", "ln2"}),
    ],
)
def test_freezing_takes_the_embeddings_then_layers_then_norms(
    stages: int, out_type: str, roots: set[str]
) -> None:
    chosen = config(frozen_stages=stages, out_type=out_type, pre_norm=True)
    report = built(chosen).frozen(chosen.freeze())
    assert {name.partition(".")[0] for name in report.parameters} == roots
    assert report.norms == ()


def test_norms_without_gradient_are_all_frozen() -> None:
    chosen = config(norm_cfg={"type": "LN", "eps": 1e-6, "requires_grad": False})
    report = built(chosen).frozen(chosen.freeze())
    assert len(report.parameters) == 2 * (2 * 3 + 1)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "keys", "pointer"),
    [
        ("mmpretrain", {"arch": "tiny"}, "#/backbone/arch"),
        ("mmpretrain", {"arch": {**TINY, "num_heads": 5}}, "#/backbone/arch/num_heads"),
        ("mmpretrain", {"arch": {**TINY, "num_layers": 10**6}}, "#/backbone/arch/num_layers"),
        ("mmpretrain", {"arch": {"embed_dims": 24}}, "#/backbone/arch/num_layers"),
        ("mmpretrain", {"arch": {**TINY, "depth": 3}}, "#/backbone/arch/depth"),
        ("mmpretrain", {"arch": 3}, "#/backbone/arch"),
        ("mmpretrain", {"img_size": 4096, "patch_size": 1}, "#/backbone/img_size"),
        ("mmpretrain", {"img_size": 0}, "#/backbone/img_size"),
        ("mmpretrain", {"img_size": [32]}, "#/backbone/img_size/1"),
        ("mmpretrain", {"patch_size": 0}, "#/backbone/patch_size"),
        ("mmpretrain", {"out_indices": [3]}, "#/backbone/out_indices/0"),
        ("mmpretrain", {"out_indices": [0, -4]}, "#/backbone/out_indices/1"),
        ("mmpretrain", {"out_indices": [2, -1]}, "#/backbone/out_indices"),
        ("mmpretrain", {"strides": [16]}, "#/backbone/strides/0"),
        ("mmpretrain", {"out_type": "patch"}, "#/backbone/out_type"),
        ("mmpretrain", {"with_cls_token": False}, "#/backbone/out_type"),
        ("mmpretrain", {"with_cls_token": False, "out_type": "cls_token"}, "#/backbone/out_type"),
        ("mmcls", {"with_cls_token": False}, "#/backbone/output_cls_token"),
        ("mmcls", {"out_type": "raw", "output_cls_token": True}, "#/backbone/output_cls_token"),
        ("mmpretrain", {"out_type": "raw", "output_cls_token": False}, "#/backbone/output_cls_token"),
        ("mmpretrain", {"frozen_stages": 4}, "#/backbone/frozen_stages"),
        ("mmpretrain", {"interpolate_mode": "nearest"}, "#/backbone/interpolate_mode"),
        ("mmpretrain", {"layer_scale_init_value": -1}, "#/backbone/layer_scale_init_value"),
        ("mmpretrain", {"layer_scale_init_value": float("inf")}, "#/backbone/layer_scale_init_value"),
        ("mmpretrain", {"patch_cfg": {"stride": 4}}, "#/backbone/patch_cfg/stride"),
        ("mmpretrain", {"layer_cfgs": {"ffn_type": "moe"}}, "#/backbone/layer_cfgs/ffn_type"),
        ("mmpretrain", {"layer_cfgs": {"act_cfg": {"type": "Tanh"}}}, "#/backbone/layer_cfgs/act_cfg/type"),
        ("mmpretrain", {"norm_cfg": {"type": "BN"}}, "#/backbone/norm_cfg/type"),
        ("mmpretrain", {"drop_rate": 1}, "#/backbone/drop_rate"),
        ("mmpretrain", {"pretrained": True}, "#/backbone/pretrained"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_at_its_key(
    scope: str, keys: dict[str, Any], pointer: str
) -> None:
    assert pointer_of(scope, keys) == pointer


def test_an_unknown_arch_lists_those_known() -> None:
    with pytest.raises(ValidationError, match="deit-tiny"):
        config(arch="vit_base_patch16_224")
