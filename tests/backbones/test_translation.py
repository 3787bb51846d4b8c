"""Checkpoints in another library's names, between networks that both libraries have, both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor

from service.backbones.base import BackboneConfig, Family
from service.backbones.catalogue import backbone_registry
from service.backbones.conversion import convert
from service.backbones.translation import all_namings, load_any
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, Regrouping, rules
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch

REF = WeightsRef("weights.pth")
Config = dict[str, Any]

MVIT_TINY: Config = {"embed_dim": 96, "depth": 10, "num_heads": 1, "last_block_indexes": [0, 2, 7, 9]}
REGNETY_200MF: Config = {
    "stem_class": "SimpleStem",
    "stem_width": 32,
    "block_class": "ResBottleneckBlock",
    "depth": 13,
    "w_a": 36.44,
    "w_0": 24,
    "w_m": 2.49,
    "group_width": 8,
    "se_ratio": 0.25,
    "norm": "BN",
    "out_features": ["s4"],
}
# A model of timm or torchvision with a level of it, OpenMMLab's type with the same level, and the image's side.
SAME_MAPS: tuple[tuple[str, Config, Config, int], ...] = (
    (
        "timm.resnet26d",
        {"out_indices": [4]},
        {"type": "mmpretrain.ResNetV1d", "depth": 50, "out_indices": [3]},
        0,
    ),
    (
        "timm.resnet50d",
        {"out_indices": [4]},
        {"type": "mmpretrain.ResNetV1d", "depth": 50, "out_indices": [3]},
        64,
    ),
    (
        "timm.resnet50d",
        {"out_indices": [4]},
        {"type": "mmdet.ResNetV1d", "depth": 50, "out_indices": [3]},
        64,
    ),
    (
        "timm.resnet50c",
        {"out_indices": [4]},
        {"type": "mmpretrain.ResNetV1c", "depth": 50, "out_indices": [3]},
        64,
    ),
    (
        "timm.resnest50d",
        {"out_indices": [4]},
        {"type": "mmpretrain.ResNeSt", "depth": 50, "out_indices": [3]},
        64,
    ),
    ("timm.resnest50d", {"out_indices": [4]}, {"type": "mmdet.ResNeSt", "depth": 50, "out_indices": [3]}, 64),
    (
        "timm.seresnet50",
        {"out_indices": [4]},
        {"type": "mmpretrain.SEResNet", "depth": 50, "out_indices": [3]},
        64,
    ),
    (
        "timm.regnetx_004",
        {"out_indices": [4]},
        {"type": "RegNet", "arch": "regnetx_400mf", "out_indices": [3]},
        64,
    ),
    (
        "torchvision.regnet_x_800mf",
        {"return_nodes": {"trunk_output.block4": "c5"}},
        {"type": "mmdet.RegNet", "arch": "regnetx_800mf", "out_indices": [3]},
        64,
    ),
    ("timm.cspresnext50", {"out_indices": [-1]}, {"type": "CSPResNeXt", "depth": 50, "out_indices": [3]}, 64),
    ("timm.cspdarknet53", {"out_indices": [-1]}, {"type": "CSPDarkNet", "depth": 53, "out_indices": [4]}, 64),
    ("timm.repvgg_a0", {"out_indices": [-1]}, {"type": "RepVGG", "arch": "A0", "out_indices": [3]}, 64),
    ("timm.densenet121", {"out_indices": [-1]}, {"type": "DenseNet", "arch": "121", "out_indices": [3]}, 64),
    (
        "timm.convmixer_768_32",
        {"features_only": False},
        {"type": "ConvMixer", "act_cfg": {"type": "ReLU"}},
        56,
    ),
    (
        "torchvision.swin_t",
        {"return_nodes": {"norm": "c5"}},
        {"type": "mmpretrain.SwinTransformer", "arch": "tiny", "out_indices": [3]},
        224,
    ),
    (
        "timm.vit_tiny_patch16_224",
        {"features_only": False},
        {"type": "VisionTransformer", "arch": "deit-tiny", "out_type": "raw"},
        224,
    ),
    (
        "torchvision.vit_b_32",
        {"return_nodes": {"encoder.ln": "tokens"}},
        {"type": "VisionTransformer", "arch": "base", "patch_size": 32, "img_size": 224, "out_type": "raw"},
        224,
    ),
    (
        "timm.beit_base_patch16_224",
        {"out_indices": [11]},
        {"type": "BEiTViT", "arch": "base", "img_size": 224, "out_type": "featmap", "final_norm": False},
        224,
    ),
    (
        "timm.tf_efficientnet_b1",
        {"out_indices": [3]},
        {"type": "EfficientNet", "arch": "b1", "out_indices": [4]},
        64,
    ),
    (
        "timm.tf_efficientnetv2_b0",
        {"out_indices": [2]},
        {"type": "EfficientNetV2", "arch": "b0", "out_indices": [3]},
        64,
    ),
    ("timm.mobilenetv2_100", {"out_indices": [2]}, {"type": "MobileNetV2", "out_indices": [2]}, 64),
    (
        "torchvision.mobilenet_v2",
        {"return_nodes": {"features.18": "last"}},
        {"type": "mmdet.MobileNetV2", "out_indices": [7]},
        64,
    ),
    (
        "torchvision.mobilenet_v3_small",
        {"return_nodes": {"features.12": "last"}},
        {"type": "MobileNetV3", "arch": "small", "out_indices": [12]},
        64,
    ),
    (
        "torchvision.mobilenet_v3_large",
        {"return_nodes": {"features.16": "last"}},
        {"type": "MobileNetV3", "arch": "large", "out_indices": [16]},
        64,
    ),
    (
        "torchvision.vgg11_bn",
        {"return_nodes": {"features.28": "last"}},
        {"type": "VGG", "depth": 11, "norm_cfg": {"type": "BN"}, "out_indices": [4]},
        64,
    ),
    ("timm.vgg13", {"out_indices": [-1]}, {"type": "VGG", "depth": 13, "out_indices": [4]}, 64),
    (
        "timm.mixer_s32_224",
        {"features_only": False},
        {"type": "MlpMixer", "arch": "s", "patch_size": 32},
        224,
    ),
    (
        "timm.xcit_nano_12_p16_224",
        {"out_indices": [11]},
        {
            "type": "XCiT",
            "embed_dims": 128,
            "num_heads": 4,
            "depth": 12,
            "layer_scale_init_value": 1.0,
            "tokens_norm": False,
            "out_type": "featmap",
            "out_indices": [11],
        },
        64,
    ),
    (
        "torchvision.shufflenet_v2_x0_5",
        {"return_nodes": {"conv5": "c5"}},
        {"type": "ShuffleNetV2", "widen_factor": 0.5, "out_indices": [3]},
        64,
    ),
    (
        "timm.mobilevit_xxs",
        {"out_indices": [4]},
        {"type": "MobileViT", "arch": "xx_small", "out_indices": [4]},
        64,
    ),
    ("timm.mobileone_s4", {"out_indices": [4]}, {"type": "MobileOne", "arch": "s4", "out_indices": [3]}, 64),
    ("timm.levit_128s", {"out_indices": [2]}, {"type": "LeViT", "arch": "128s", "out_indices": [2]}, 224),
    (
        "timm.levit_conv_128s",
        {"out_indices": [2]},
        {"type": "LeViT", "arch": "128s", "out_indices": [2]},
        224,
    ),
    (
        "timm.twins_pcpvt_small",
        {"out_indices": [3]},
        {"type": "PCPVT", "arch": "small", "out_indices": [3], "qkv_bias": True},
        64,
    ),
    (
        "timm.twins_svt_small",
        {"out_indices": [3]},
        {"type": "SVT", "arch": "small", "out_indices": [3], "qkv_bias": True},
        224,
    ),
    ("timm.regnety_002", {"out_indices": [4]}, {"type": "detectron2.RegNet", **REGNETY_200MF}, 64),
    (
        "torchvision.regnet_y_400mf",
        {"return_nodes": {"trunk_output.block4": "c5"}},
        {"type": "detectron2.RegNet", **REGNETY_200MF, "depth": 16, "w_0": 48, "w_a": 27.89, "w_m": 2.09},
        64,
    ),
    (
        "torchvision.resnet50",
        {"return_nodes": {"layer4": "c5"}},
        {"type": "detectron2.ResNet", "depth": 50, "norm": "FrozenBN", "out_features": ["res5"]},
        64,
    ),
)[1:]
# OpenMMLab norms the levels that it returns, the others do not: compared on the way back alone.
NORMED: tuple[tuple[str, Config, Config], ...] = (
    ("timm.convnext_atto", {"out_indices": [3]}, {"type": "ConvNeXt", "arch": "atto"}),
    (
        "timm.convnextv2_atto",
        {"out_indices": [3]},
        {"type": "ConvNeXt", "arch": "atto", "use_grn": True, "layer_scale_init_value": 0.0},
    ),
    (
        "torchvision.convnext_tiny",
        {"return_nodes": {"features.7": "c5"}},
        {"type": "ConvNeXt", "arch": "tiny"},
    ),
    (
        "timm.swin_tiny_patch4_window7_224",
        {"out_indices": [3]},
        {"type": "SwinTransformer", "arch": "tiny", "img_size": 224},
    ),
    ("timm.poolformer_s12", {"out_indices": [3]}, {"type": "PoolFormer", "arch": "s12"}),
    (
        "timm.deit_tiny_distilled_patch16_224",
        {"out_indices": [11]},
        {"type": "DistilledVisionTransformer", "arch": "deit-tiny", "out_type": "featmap"},
    ),
)

# The same with the norm that the other library has behind its last level, the way there included.
LAST_NORMED: tuple[tuple[str, Config, Config, int, str], ...] = (
    (
        "timm.swinv2_tiny_window8_256",
        {"out_indices": [3]},
        {"type": "SwinTransformerV2", "arch": "tiny", "img_size": 256, "window_size": 8},
        256,
        "norm",
    ),
    (
        "torchvision.swin_v2_t",
        {"return_nodes": {"features.7": "c5"}},
        {"type": "SwinTransformerV2", "arch": "tiny", "img_size": 256, "window_size": 8},
        256,
        "norm",
    ),
    ("timm.efficientformer_l1", {"out_indices": [3]}, {"type": "EfficientFormer", "arch": "l1"}, 224, "norm"),
    ("timm.mvitv2_tiny", {"out_indices": [3]}, {"type": "MViT", "arch": "tiny"}, 224, "norm"),
)
# Networks of other libraries than OpenMMLab, whose norms behind each level no other has: those of a level are new.
NEWLY_NORMED: tuple[tuple[str, Config, Config], ...] = (
    (
        "torchvision.convnext_tiny",
        {"return_nodes": {"features.5": "c4"}},
        {"type": "detrex.ConvNeXt", "out_indices": [2]},
    ),
    (
        "torchvision.swin_t",
        {"return_nodes": {"features.5": "c4"}},
        {"type": "detectron2.SwinTransformer", "out_indices": [2]},
    ),
    (
        "timm.focalnet_tiny_srf",
        {"out_indices": [2]},
        {
            "type": "detrex.FocalNet",
            "focal_levels": [2, 2, 2, 2],
            "focal_windows": [3, 3, 3, 3],
            "out_indices": [2],
        },
    ),
)


REGISTRY = backbone_registry()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Images are so small that threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts(given: Config) -> tuple[Family[Any], BackboneConfig]:
    resolved = REGISTRY.resolve(given["type"])
    config = resolved.family.config.model_validate(
        {**given, "type": resolved.type}, context={"scope": resolved.scope}
    )
    return resolved.family, config


def made(model: str, device: str) -> dict[str, Tensor]:
    library, _, name = model.partition(".")
    with torch.device(device):
        network = timm.create_model(name) if library == "timm" else getattr(torchvision.models, name)()
    return dict(network.state_dict())


def weights_of(model: str) -> dict[str, Tensor]:
    """A whole model's state dict with random numbers everywhere, statistics included."""
    generator = torch.Generator().manual_seed(0)
    # Building one for its names alone takes no time; torchvision's need numbers to be built.
    state = made(model, "meta" if model.startswith("timm.") else "cpu")
    if any(tensor.is_meta and key.endswith("idxs") for key, tensor in state.items()):
        state = made(model, "cpu")
    return {key: _random(key, tensor, generator) for key, tensor in state.items()}


def _random(key: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or key.endswith("relative_coords_table"):
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor
    if tensor.dim() < 2:
        return torch.rand(tensor.shape, generator=generator) + 0.5
    return torch.randn(tensor.shape, generator=generator) / math.sqrt(max(1, tensor[0].numel()))


def load(given: Config, state: Mapping[str, Tensor]) -> tuple[Any, LoadedKeys]:
    family, config = parts(given)
    network, keys = load_any(family, config, dict(state), REF)
    return network.eval(), keys


def level(given: Config, network: Any, side: int) -> Tensor:
    """The one level that a config asks for, of one image."""
    family, config = parts(given)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    (asked,) = config.levels(family.describe(config))
    with torch.inference_mode():
        found: Tensor = network(images, [asked.node])[asked.node]
    return found


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def shaped(expected: Tensor, found: Tensor) -> Tensor:
    """The same features in another's shape: tokens as a map, or with the channels first."""
    if expected.ndim == 3 and found.shape[1] == expected.shape[2] != expected.shape[1]:
        expected = expected.transpose(1, 2)
    return expected.reshape(found.shape)


def names_of(given: Config) -> str:
    family, _ = parts(given)
    assert family.naming is not None
    return family.key_library or family.naming.own[0]


@pytest.mark.parametrize(("model", "keys", "openmmlab", "side"), SAME_MAPS, ids=lambda value: str(value)[:40])
def test_weights_of_another_library_give_the_same_features(
    model: str, keys: Config, openmmlab: Config, side: int
) -> None:
    state = weights_of(model)
    theirs, _ = load({"type": model, **keys}, state)
    ours, report = load(openmmlab, state)
    expected = level({"type": model, **keys}, theirs, side)
    found = level(openmmlab, ours, side)
    assert error(found, shaped(expected, found)) < 1e-5
    # Where several libraries have the same names, the file may be any one's.
    assert report.layout in (model.partition(".")[0], "torchvision", "mmpretrain")
    assert report.loaded + len(report.unexpected) == len(state)
    # And back, from a file of a detector.
    returned, report = load(
        {"type": model, **keys}, {f"backbone.{k}": v for k, v in ours.state_dict().items()}
    )
    assert (report.layout, report.prefix) == (names_of(openmmlab), "backbone.")
    assert error(level({"type": model, **keys}, returned, side), expected) == 0


@pytest.mark.parametrize(("model", "keys", "openmmlab"), NORMED, ids=lambda value: str(value)[:40])
def test_weights_come_back_as_they_went(model: str, keys: Config, openmmlab: Config) -> None:
    state = weights_of(model)
    theirs, _ = load({"type": model, **keys}, state)
    ours, report = load(openmmlab, state)
    assert report.layout == model.partition(".")[0]
    assert not [name for name in report.missing if "norm" not in name]
    returned, _ = load({"type": model, **keys}, ours.state_dict())
    expected = level({"type": model, **keys}, theirs, 224)
    assert error(level({"type": model, **keys}, returned, 224), expected) == 0


@pytest.mark.parametrize(
    ("model", "keys", "openmmlab", "side", "norm"), LAST_NORMED, ids=lambda value: str(value)[:40]
)
def test_the_norm_behind_the_last_level_is_that_of_the_level(
    model: str, keys: Config, openmmlab: Config, side: int, norm: str
) -> None:
    state = weights_of(model)
    theirs, _ = load({"type": model, **keys}, state)
    ours, report = load(openmmlab, state)
    expected = level({"type": model, **keys}, theirs, side)
    expected = channels_first(expected, state[f"{norm}.weight"])
    normed = layer_norm(expected, state[f"{norm}.weight"], state[f"{norm}.bias"])
    found = level(openmmlab, ours, side)
    assert error(found, shaped(normed.flatten(2), found) if found.ndim == 3 else normed) < 1e-5
    assert (report.layout, report.missing) == (model.partition(".")[0], ())
    returned, _ = load({"type": model, **keys}, ours.state_dict())
    again = level({"type": model, **keys}, returned, side)
    assert error(channels_first(again, state[f"{norm}.weight"]), expected) == 0


@pytest.mark.parametrize(("model", "keys", "other"), NEWLY_NORMED, ids=lambda value: str(value)[:40])
def test_norms_that_no_other_library_has_start_at_1_and_0(model: str, keys: Config, other: Config) -> None:
    state = weights_of(model)
    theirs, _ = load({"type": model, **keys}, state)
    ours, report = load(other, state)
    assert (report.layout, report.missing) == (model.partition(".")[0], ("norm2.weight", "norm2.bias"))
    expected = level({"type": model, **keys}, theirs, 224)
    found = level(other, ours, 224)
    expected = expected if expected.shape == found.shape else expected.permute(0, 3, 1, 2)
    assert error(found, layer_norm(expected)) < 1e-5
    returned, _ = load({"type": model, **keys}, ours.state_dict())
    assert (
        error(level({"type": model, **keys}, returned, 224), level({"type": model, **keys}, theirs, 224)) == 0
    )


def channels_first(maps: Tensor, weight: Tensor) -> Tensor:
    """[n, h, w, c] or [n, c, h, w] to [n, c, h, w]; `weight` has one number a channel."""
    return maps if maps.shape[1] == len(weight) else maps.movedim(-1, 1)


def layer_norm(maps: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Over the channels of [n, c, h, w]."""
    last = maps.movedim(1, -1)
    return torch.nn.functional.layer_norm(last, last.shape[-1:], weight, bias, 1e-5).movedim(-1, 1)


@pytest.mark.parametrize("official", [False, True])
def test_the_query_of_pvt_v2_goes_with_its_keys_and_values(official: bool) -> None:
    state = weights_of("timm.pvt_v2_b0")
    theirs, _ = load({"type": "timm.pvt_v2_b0", "out_indices": [3]}, state)
    file = convert(state, "official").renamed.state if official else state
    assert ("block1.0.attn.q.weight" in file) == official
    widths = {"embed_dims": 32, "num_layers": [2, 2, 2, 2]}
    given = {
        "type": "mmdet.PyramidVisionTransformerV2",
        **widths,
        "out_indices": [3],
        "convert_weights": False,
    }
    ours, report = load(given, file)
    assert (report.layout, report.missing) == ("official" if official else "timm", ())
    assert report.unexpected == (() if official else ("head.weight", "head.bias"))
    expected = level({"type": "timm.pvt_v2_b0", "out_indices": [3]}, theirs, 64)
    assert error(level(given, ours, 64), expected) < 1e-5
    returned, _ = load({"type": "timm.pvt_v2_b0", "out_indices": [3]}, ours.state_dict())
    assert error(level({"type": "timm.pvt_v2_b0", "out_indices": [3]}, returned, 64), expected) == 0


def filled(network: torch.nn.Module) -> dict[str, Tensor]:
    """The same random numbers as `weights_of`, in a network of another library too."""
    generator = torch.Generator().manual_seed(0)
    state = {key: _random(key, tensor, generator) for key, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    return state


def test_a_small_segment_anything_encoder_comes_from_timm_and_from_its_own_code() -> None:
    theirs: Any = VisionTransformerSAM(
        img_size=64,
        embed_dim=32,
        depth=2,
        num_heads=2,
        use_abs_pos=True,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
        num_classes=0,
    ).eval()
    state = filled(theirs)
    arch = {
        "embed_dims": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feedforward_channels": 128,
        "global_attn_indexes": [1],
    }
    given = {"type": "ViTSAM", "arch": arch, "img_size": 64, "window_size": 3}
    with torch.inference_mode():
        expected = theirs.forward_features(
            torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        )
    official = {f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}": tensor for key, tensor in state.items()}
    for file, library in ((state, "timm"), (official, "official")):
        ours, report = load(given, file)
        assert (report.layout, report.missing, report.unexpected) == (library, (), ())
        assert error(level(given, ours, 64), expected) < 1e-5


def test_a_gated_feed_forward_is_told_by_its_shapes() -> None:
    make: Any = timm.models.vision_transformer.VisionTransformer
    theirs = make(
        img_size=56,
        patch_size=14,
        embed_dim=48,
        depth=2,
        num_heads=2,
        init_values=1.0,
        mlp_ratio=16 / 3,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        num_classes=0,
    ).eval()
    state = filled(theirs)
    arch = {"embed_dims": 48, "num_layers": 2, "num_heads": 2, "feedforward_channels": 192}
    given = {
        "type": "VisionTransformer",
        "arch": arch,
        "img_size": 56,
        "patch_size": 14,
        "layer_scale_init_value": 1.0,
        "layer_cfgs": {"ffn_type": "swiglu_fused"},
        "out_type": "raw",
    }
    with torch.inference_mode():
        expected = theirs.forward_features(
            torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
        )
    official = {key.replace("fc1", "w12").replace("fc2", "w3"): tensor for key, tensor in state.items()}
    for file in (state, official):
        ours, report = load(given, file)
        assert (report.layout, report.missing, report.unexpected) == ("timm", (), ())
        assert error(level(given, ours, 56), expected) < 1e-5


# --- what only looks alike ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("openmmlab", "model", "name", "reason"),
    [
        ({"type": "ResNet", "depth": 50, "style": "caffe"}, "timm.resnet50", "r50.pth", "style='pytorch'"),
        ({"type": "mmdet.ResNet", "depth": 50, "style": "caffe"}, "torchvision.resnet50", "r50.pth", "3x3"),
        ({"type": "MobileNetV3", "arch": "large"}, "timm.mobilenetv3_large_100", "m.pth", "epsilon 1e-5"),
        ({"type": "timm.mobilenetv3_large_100"}, "torchvision.mobilenet_v3_large", "m.pth", "epsilon 1e-5"),
        (
            {"type": "EfficientNet", "arch": "b0"},
            "timm.efficientnet_b0",
            "efficientnet_b0.ra.pth",
            "tf_efficientnet_",
        ),
        ({"type": "ConvMixer"}, "timm.convmixer_768_32", "c.pth", "ReLU"),
        ({"type": "DaViT", "arch": "tiny"}, "timm.davit_tiny", "d.pth", "stem"),
        (
            {"type": "detectron2.ResNet", "depth": 50, "norm": "FrozenBN", "stride_in_1x1": True},
            "torchvision.resnet50",
            "r.pth",
            "stride_in_1x1",
        ),
        ({"type": "detectron2.MViT", **MVIT_TINY}, "timm.mvitv2_tiny", "m.pth", "fewer keys"),
    ],
)
def test_weights_that_fit_and_mean_another_network_are_refused(
    openmmlab: Config, model: str, name: str, reason: str
) -> None:
    family, config = parts(openmmlab)
    with pytest.raises(CheckpointMismatch, match=reason):
        load_any(family, config, weights_of(model), WeightsRef(name))


def test_what_a_translated_file_lacks_is_named() -> None:
    state = weights_of("timm.seresnet50")
    del state["layer1.0.se.fc1.weight"]
    with pytest.raises(CheckpointMismatch, match="read by timm's names") as refused:
        load({"type": "SEResNet", "depth": 50}, state)
    assert list(refused.value.missing) == ["layer1.0.se_layer.conv1.conv.weight"]


def test_a_file_of_no_known_network_keeps_its_own_error() -> None:
    with pytest.raises(CheckpointMismatch, match="none of the file's 2 keys fit"):
        load({"type": "SEResNet", "depth": 50}, {"a.weight": torch.zeros(1), "b.weight": torch.zeros(1)})


# --- rules --------------------------------------------------------------------------------------


def test_a_rule_reads_both_ways_and_counts_from_another_number() -> None:
    layout = KeyLayout("theirs", rules({"layer{s}.{b}.{leaf}": "s{s}.b{b+1}.{leaf}"}))
    state = {"s2.b1.weight": torch.ones(1), "s2.b0.weight": torch.ones(1), "head.weight": torch.ones(1)}
    ours = layout.to_ours(state)
    assert list(ours.state) == ["layer2.0.weight"]
    # There is no block before the first.
    assert ours.left == ("s2.b0.weight", "head.weight")
    assert dict(layout.to_theirs(ours.state).origins) == {"s2.b1.weight": ("layer2.0.weight",)}


def test_parts_that_one_library_keeps_in_one_tensor_are_joined_and_split() -> None:
    group = Regrouping(("b{i}.qkv.{leaf}",), ("{i}.q.{leaf}", None, "{i}.v.{leaf}"), (1, 1, 1))
    layout = KeyLayout("theirs", rules({"b{i}.proj.{leaf}": "{i}.proj.{leaf}"}), regroupings=(group,))
    state = {"0.q.bias": torch.ones(2), "0.v.bias": torch.full((2,), 3.0), "0.proj.bias": torch.ones(2)}
    ours = layout.to_ours(state)
    assert ours.state["b0.qkv.bias"].tolist() == [1, 1, 0, 0, 3, 3]
    assert ours.origins["b0.qkv.bias"] == ("0.q.bias", "0.v.bias")
    assert ours.left == ()
    theirs = layout.to_theirs(ours.state)
    assert {name: tensor.tolist() for name, tensor in theirs.state.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    "parts",
    [
        {"0.q.bias": torch.ones(2)},
        {"0.q.bias": torch.ones(2), "0.v.bias": torch.ones(2, 2)},
        {"0.q.bias": torch.ones(()), "0.v.bias": torch.ones(())},
    ],
)
def test_parts_that_do_not_belong_together_stay_as_they_are(parts: dict[str, Tensor]) -> None:
    group = Regrouping(("b{i}.qkv.{leaf}",), ("{i}.q.{leaf}", None, "{i}.v.{leaf}"), (1, 1, 1))
    layout = KeyLayout("theirs", (), regroupings=(group,))
    assert layout.to_ours(parts).left == tuple(parts)
    assert layout.to_theirs({"b0.qkv.bias": torch.ones(4)}).left == ("b0.qkv.bias",)


def test_the_first_rule_that_fits_wins() -> None:
    layout = KeyLayout("theirs", (KeyRule("stem.{rest}", "conv1.{rest}"), KeyRule("{rest}", "{rest}")))
    assert list(layout.to_ours({"conv1.0.weight": torch.ones(1), "fc.weight": torch.ones(1)}).state) == [
        "stem.0.weight",
        "fc.weight",
    ]


@pytest.mark.parametrize("naming", all_namings(), ids=lambda naming: naming.kind)
def test_no_two_names_of_a_network_become_one(naming: Naming) -> None:
    examples = [entry for entry, family in FAMILIES.items() if family.naming is naming]
    assert examples
    for entry in examples:
        family, config = parts(dict(FAMILIES[entry].example(entry)))
        with torch.device("meta"):
            names = dict(family.build(config).state_dict())
        own = naming.layout(family.key_library or naming.own[0])
        assert own is not None
        ours = own.to_ours(names)
        assert not lost(own, names, ours.left, ours=False), entry
        for layout in naming.layouts:
            assert not lost(layout, ours.state, layout.to_theirs(ours.state).left, ours=True), entry


def lost(layout: KeyLayout, state: dict[str, Tensor], left: tuple[str, ...], *, ours: bool) -> list[str]:
    """Names that have a counterpart, which another name had taken."""
    fixed = layout.rules(state, ours) if callable(layout.rules) else layout.rules
    alone = KeyLayout(layout.name, fixed)
    rename = alone.to_theirs if ours else alone.to_ours
    return [name for name in left if rename({name: state[name]}).state]


def _families() -> dict[str, Family[Any]]:
    served = [entry.type for entry in REGISTRY.entries() if entry.unsupported is None]
    others = [name for name in served if name.partition(".")[0] not in ("timm", "torchvision")]
    return {name: REGISTRY.resolve(name).family for name in others}


FAMILIES = _families()


@pytest.mark.parametrize("naming", all_namings(), ids=lambda naming: naming.kind)
def test_tensors_of_any_shape_are_translated_or_left(naming: Naming) -> None:
    shapes = ((), (0,), (3,), (5, 7), (1, 1, 1, 1), (2, 0), (3, 5, 1, 1))
    entry, family = next((entry, family) for entry, family in FAMILIES.items() if family.naming is naming)
    _, config = parts(dict(family.example(entry)))
    with torch.device("meta"):
        names = dict(family.build(config).state_dict())
    for library in naming.libraries():
        there = naming.translate(names, family.key_library or naming.own[0], library)
        assert there is not None
        for first in range(len(shapes)):
            places = enumerate(there.state, first)
            hostile = {name: torch.zeros(shapes[place % len(shapes)]) for place, name in places}
            for target in naming.libraries():
                assert naming.translate(hostile, library, target) is not None
            assert naming.recognises(hostile, library) in (True, False)
