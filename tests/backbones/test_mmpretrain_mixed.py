"""mmpretrain's mixtures of convolutions and attention, and Inception v3: what their parity packs do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from service.backbones.base import BackboneConfig, Family
from service.backbones.catalogue import backbone_registry
from service.config.spec import WeightsRef
from service.errors import InvalidConfig
from service.validation import invalid

CONFORMER = {"arch": {"embed_dims": 16, "channel_ratio": 0.5, "num_heads": 2, "depths": 6}}
DAVIT = {"arch": {"embed_dims": 8, "depths": [1, 1], "num_heads": [1, 2]}, "pad_small_map": True}
EDGENEXT = {"arch": {"channels": [8, 8, 12, 16], "depths": [1, 1, 2, 1], "num_heads": [2, 2, 2, 2]}}
EFFICIENT_ARCH = {
    "layers": [1, 1, 1, 2],
    "embed_dims": [8, 8, 12, 16],
    "downsamples": [False, True, True, True],
    "vit_num": 1,
}
EFFICIENTFORMER = {"arch": EFFICIENT_ARCH}
HIVIT = {"arch": {"embed_dims": 16, "depths": [1, 4], "num_heads": 2}, "img_size": 32}
LOCAL, GLOBAL = {"type": "DW", "kernel_size": 3}, {"type": "GF", "h": 4, "w": 3}
HORNET_ARCH = {
    "base_dim": 8,
    "depths": [1, 1, 1, 1],
    "orders": [1, 2, 2, 3],
    "dw_cfg": [LOCAL, LOCAL, GLOBAL, GLOBAL],
}
HORNET = {"arch": HORNET_ARCH, "gap_before_final_norm": False}
MVIT = {
    "arch": {"embed_dims": 8, "num_layers": 3, "num_heads": 1, "downscale_indices": [1]},
    "img_size": 32,
}


def parts(given: dict[str, Any]) -> tuple[Family[Any], BackboneConfig]:
    resolved = backbone_registry().resolve(given["type"], pointer="#/backbone/type")
    scope = str(given["type"]).partition(".")[0]
    return resolved.family, resolved.family.config.model_validate(given, context={"scope": scope})


def mmpretrain(name: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": f"mmpretrain.{name}", **given, **more}


def run(given: dict[str, Any], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The levels by name, from weights of a seed."""
    family, config = parts(given)
    torch.manual_seed(0)
    network = family.build(config).eval()
    levels = config.levels(family.describe(config))
    with torch.inference_mode():
        found = network(images, [level.node for level in levels])
    return {level.name: found[level.node] for level in levels}


def frozen(given: dict[str, Any]) -> set[str]:
    """First two parts of the names of what is frozen."""
    family, config = parts(given)
    with torch.device("meta"):
        network = family.build(config)
    report = network.frozen(config.freeze())
    return {".".join(name.split(".")[:2]) for name in report.parameters}


def images(height: int = 32, width: int | None = None) -> torch.Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def pointer_of(given: dict[str, Any]) -> str:
    """Where the refusal of a config points."""
    try:
        family, config = parts(given)
        config.levels(family.describe(config))
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {given}")


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        (mmpretrain("Conformer", CONFORMER, patch_size=24), "patch_size"),
        (mmpretrain("Conformer", CONFORMER, out_indices=[7]), "out_indices/0"),
        (mmpretrain("Conformer", CONFORMER, out_indices=[-7]), "out_indices"),
        (mmpretrain("Conformer", CONFORMER, out_indices=[6, -1]), "out_indices"),
        (mmpretrain("Conformer", CONFORMER, base_channels=6), "arch/channel_ratio"),
        (mmpretrain("Conformer", CONFORMER, strides=[16]), "strides/0"),
        (mmpretrain("DaViT", DAVIT, out_indices=[0], out_after_downsample=True), "out_after_downsample"),
        (mmpretrain("DaViT", DAVIT, out_indices=[1], frozen_stages=2), "frozen_stages"),
        (mmpretrain("EdgeNeXt", EDGENEXT, d2_scales=[2, 2, 1, 2]), "d2_scales/2"),
        (mmpretrain("EdgeNeXt", EDGENEXT, conv_kernel_sizes=[4, 3, 3, 3]), "conv_kernel_sizes/0"),
        (mmpretrain("EdgeNeXt", EDGENEXT, norm_cfg={"type": "BN"}), "norm_cfg/type"),
        (mmpretrain("EfficientFormer", {"arch": {**EFFICIENT_ARCH, "vit_num": 3}}), "arch/vit_num"),
        (mmpretrain("EfficientFormer", {"arch": {**EFFICIENT_ARCH, "vit_num": 0}}), "reshape_last_feat"),
        (
            mmpretrain("EfficientFormer", {"arch": {**EFFICIENT_ARCH, "downsamples": [False] * 4}}),
            "arch/downsamples/2",
        ),
        (mmpretrain("HiViT", HIVIT, out_indices=[2, 3]), "out_indices/0"),
        (mmpretrain("HiViT", HIVIT, frozen_stages=1), "frozen_stages"),
        (mmpretrain("HiViT", HIVIT, rpe=True, img_size=[32, 64]), "img_size"),
        (mmpretrain("HiViT", HIVIT, rpe=True, img_size=1024), "img_size"),
        (mmpretrain("HiViT", HIVIT, inner_patches=1), "inner_patches"),
        (mmpretrain("HorNet", HORNET, frozen_stages=3), "frozen_stages"),
        (mmpretrain("HorNet", {"arch": {**HORNET_ARCH, "orders": [5, 1, 1, 1]}}), "arch/orders/0"),
        (mmpretrain("HorNet", {"arch": {**HORNET_ARCH, "orders": [1, 1, 6, 1]}}), "arch/dw_cfg/2"),
        (mmpretrain("InceptionV3", {}, num_classes=0), "num_classes"),
        (mmpretrain("LeViT", {}), "arch"),
        (mmpretrain("LeViT", {}, arch="128s", img_size=1024), "img_size"),
        (mmpretrain("MViT", MVIT, out_scales=[2]), "out_scales/0"),
        (mmpretrain("MViT", MVIT, head_mul=3), "head_mul"),
        (mmpretrain("MViT", MVIT, pool_kernel=[2, 2]), "pool_kernel"),
        (mmpretrain("MViT", MVIT, img_size=[32, 64]), "img_size"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is(given: dict[str, Any], pointer: str) -> None:
    assert pointer_of(given).startswith(f"#/backbone/{pointer}")


@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        (
            mmpretrain("Conformer", CONFORMER, out_indices=[-1, 1, 2]),
            {"6": 128, "6.cls": 16, "2": 32, "2.cls": 16},
        ),
        (mmpretrain("Conformer", CONFORMER, with_cls_token=False), {"6": 128, "6.avg": 16}),
        (mmpretrain("DaViT", DAVIT, out_indices=[-1, 0], norm_cfg=None), {"1": 16, "0": 8}),
        (mmpretrain("EdgeNeXt", EDGENEXT, strides=[8, 32]), {"1": 8, "3": 16}),
        (mmpretrain("EdgeNeXt", EDGENEXT, use_pos_embd_global=True, linear_pw_conv=False), {"3": 16}),
        (mmpretrain("HiViT", HIVIT, out_indices=[0], rpe=True), {"3": 16}),
        (mmpretrain("HorNet", HORNET, out_indices=[2, 1]), {"2": 32, "1": 16}),
        (mmpretrain("MViT", MVIT, out_scales=[-1, 0], use_abs_pos_embed=True), {"1": 16, "0": 8}),
        (mmpretrain("LeViT", {}, arch="128s", img_size=32, out_indices=[2, 0]), {"2": 384, "0": 128}),
    ],
)
def test_levels_are_those_of_the_library(given: dict[str, Any], shapes: dict[str, int]) -> None:
    assert {name: level.shape[1] for name, level in run(given, images()).items()} == shapes


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (mmpretrain("Conformer", CONFORMER, frozen_stages=3), set()),
        (
            mmpretrain("DaViT", DAVIT, out_indices=[0, 1], frozen_stages=0),
            {"patch_embed.projection", "patch_embed.norm", "stages.0", "norm0.weight", "norm0.bias"},
        ),
        (
            mmpretrain("DaViT", DAVIT, out_indices=[1], norm_cfg={"type": "LN", "requires_grad": False}),
            {"norm1.weight", "norm1.bias"},
        ),
        (
            mmpretrain(
                "EdgeNeXt", EDGENEXT, norm_cfg={"type": "LN2d", "requires_grad": False}, frozen_stages=0
            ),
            {"downsample_layers.0", "downsample_layers.1", "downsample_layers.2", "downsample_layers.3"}
            | {"stages.0", "stages.2"},
        ),
        (mmpretrain("EfficientFormer", EFFICIENTFORMER, frozen_stages=0), {"patch_embed.0", "patch_embed.1"}),
        (
            mmpretrain("HorNet", HORNET, out_indices=[1, 2], frozen_stages=1),
            {
                "downsample_layers.0",
                "downsample_layers.1",
                "stages.0",
                "stages.1",
                "norm2.weight",
                "norm2.bias",
            },
        ),
    ],
)
def test_frozen_stages_count_as_in_the_library(given: dict[str, Any], names: set[str]) -> None:
    assert frozen(given) == names


@pytest.mark.parametrize(
    ("given", "size", "words"),
    [
        (mmpretrain("DaViT", DAVIT, out_indices=[1]), (36, 36), "9x9"),
        (mmpretrain("EfficientFormer", EFFICIENTFORMER), (64, 64), "7x7"),
        (mmpretrain("HiViT", HIVIT), (40, 32), "whole patches"),
        (mmpretrain("HiViT", HIVIT, rpe=True), (64, 64), "32x32 px"),
        (mmpretrain("LeViT", {}, arch="128s", img_size=32), (64, 64), "32x32 px"),
    ],
)
def test_images_of_a_size_that_the_library_fails_at_are_refused(
    given: dict[str, Any], size: tuple[int, int], words: str
) -> None:
    with pytest.raises(InvalidConfig, match=words):
        run(given, images(*size))


def test_tokens_of_efficientformer_have_their_channels_first() -> None:
    family, config = parts(mmpretrain("EfficientFormer", EFFICIENTFORMER))
    (level,) = config.levels(family.describe(config))
    layouts = {feature.node: feature.layout for feature in family.describe(config).features}
    assert layouts[level.node] == "NCL"
    assert run(mmpretrain("EfficientFormer", EFFICIENTFORMER), images(224))["3"].shape == (2, 16, 49)


def test_the_norm_of_a_shallow_scale_takes_part_in_the_deeper_ones() -> None:
    _, alone = parts(mmpretrain("MViT", MVIT))
    family, both = parts(mmpretrain("MViT", MVIT, out_scales=[0, 1]))
    assert alone.key() != both.key()
    torch.manual_seed(0)
    state = {name: torch.rand_like(tensor) for name, tensor in family.build(both).state_dict().items()}
    with torch.inference_mode():
        deep = [
            family.load(config, state, WeightsRef("any"))[0].eval()(images(), ["1"])
            for config in (alone, both)
        ]
    assert not torch.allclose(deep[0]["1"], deep[1]["1"])


def test_a_classifiers_file_may_lack_the_norms_of_earlier_outputs() -> None:
    family, config = parts(mmpretrain("HorNet", HORNET, out_indices=[0, 3]))
    torch.manual_seed(0)
    state = {
        name: tensor for name, tensor in family.build(config).state_dict().items() if "norm0" not in name
    }
    network, keys = family.load(config, state, WeightsRef("any"))
    assert keys.missing == ("norm0.weight", "norm0.bias")
    assert network.state_dict()["norm0.weight"].eq(1).all()
    assert network.state_dict()["norm0.bias"].eq(0).all()


def test_a_deployed_levit_gives_what_its_folded_norms_gave() -> None:
    given = mmpretrain("LeViT", {}, arch="128s", img_size=32)
    family, config = parts(given)
    torch.manual_seed(0)
    source = family.build(config).eval()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in source.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        owner, _, part = layer.rpartition(".")
        if part in ("linear", "conv"):
            norm = source.get_submodule(f"{owner}.bn")
            assert isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            state[f"{owner}.weight"] = tensor * factor.reshape(-1, *[1] * (tensor.ndim - 1))
            state[f"{owner}.bias"] = norm.bias - norm.running_mean * factor
        elif leaf == "attention_biases":
            state[name] = tensor
    _, deployed = parts({**given, "deploy": True})
    folded, _ = family.load(deployed, state, WeightsRef("any"))
    with torch.inference_mode():
        expected, found = source(images(), ["2"]), folded.eval()(images(), ["2"])
    torch.testing.assert_close(found["2"], expected["2"], rtol=1e-4, atol=1e-5)


def test_what_only_training_reads_makes_no_second_model() -> None:
    for name, given in (
        ("Conformer", CONFORMER),
        ("EdgeNeXt", EDGENEXT),
        ("HiViT", HIVIT),
        ("HorNet", HORNET),
    ):
        _, one = parts(mmpretrain(name, given))
        _, other = parts(mmpretrain(name, given, drop_path_rate=0.3))
        assert one.key() == other.key()
