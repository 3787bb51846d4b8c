"""XCiT, TNT, T2T-ViT, EVA-02, SAM, RevViT, PVT, and mmdet's SSDVGG, DetectoRS, TridentNet: what packs do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from service.backbones.base import BackboneConfig, Family
from service.backbones.catalogue import backbone_registry
from service.backbones.pvt import from_official
from service.config.spec import WeightsRef
from service.errors import InvalidConfig, TooLarge
from service.validation import invalid

ARCH = {"embed_dims": 24, "num_layers": 3, "num_heads": 2, "feedforward_channels": 48}
SAM_ARCH = {**ARCH, "global_attn_indexes": [1]}
SMALL = {"embed_dims": 24, "num_heads": 2}
XCIT = {"type": "mmpretrain.XCiT", **SMALL, "depth": 2}
T2T = {"type": "mmpretrain.T2T_ViT", "embed_dims": 24, "num_layers": 2, "img_size": 32}
SAM = {"type": "mmpretrain.ViTSAM", "arch": SAM_ARCH, "img_size": 32, "patch_size": 8, "window_size": 3}
EVA = {"type": "mmpretrain.ViTEVA02", "arch": ARCH, "img_size": 32, "patch_size": 8}
REV = {"type": "mmpretrain.RevVisionTransformer", "arch": ARCH, "img_size": 32, "patch_size": 8}
PVT = {"type": "mmdet.PyramidVisionTransformer", "embed_dims": 8, "num_layers": [1, 1, 1, 1]}
TINY = {"depth": 50, "base_channels": 4, "stem_channels": 4}
DETECTORS = {"type": "mmdet.DetectoRS_ResNet", **TINY}
BRANCHES = {"num_branch": 3, "test_branch_idx": 1, "trident_dilations": [1, 2, 3]}
TRIDENT = {
    "type": "mmdet.TridentResNet",
    **TINY,
    **BRANCHES,
    "num_stages": 3,
    "strides": [1, 2, 2],
    "dilations": [1, 1, 1],
    "out_indices": [2],
}
TNT_ARCH = {"embed_dims_outer": 24, "embed_dims_inner": 8, "num_layers": 1}
TNT = {
    "type": "mmpretrain.TNT",
    "arch": {**TNT_ARCH, "num_heads_outer": 2, "num_heads_inner": 2},
    "img_size": 32,
}


def parts(given: dict[str, Any]) -> tuple[Family[Any], BackboneConfig]:
    resolved = backbone_registry().resolve(given["type"], pointer="#/backbone/type")
    scope = str(given["type"]).partition(".")[0]
    return resolved.family, resolved.family.config.model_validate(given, context={"scope": scope})


def built(given: dict[str, Any]) -> Any:
    family, config = parts(given)
    torch.manual_seed(0)
    return family.build(config).eval()


def run(given: dict[str, Any], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The levels by name, from weights of a seed."""
    family, config = parts(given)
    levels = config.levels(family.describe(config))
    with torch.inference_mode():
        found = built(given)(images, [level.node for level in levels])
    return {level.name: found[level.node] for level in levels}


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def pointer_of(given: dict[str, Any]) -> str:
    """Where the refusal of a config points, by its levels too."""
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
        ({**XCIT, "out_indices": [1]}, "out_indices"),
        ({**XCIT, "out_type": "raw", "out_indices": [4]}, "out_indices/0"),
        ({**XCIT, "patch_size": 4}, "patch_size"),
        ({**XCIT, "img_size": 100}, "img_size"),
        ({**XCIT, "final_norm": False}, "final_norm"),
        ({**XCIT, "frozen_stages": 6}, "frozen_stages"),
        ({**XCIT, "bn_norm_cfg": {"type": "BN", "requires_grad": False}}, "bn_norm_cfg"),
        ({**TNT, "patch_size": 10}, "img_size"),
        ({**TNT, "out_indices": [0]}, "out_indices"),
        ({**T2T, "t2t_cfg": {"use_performer": True}}, "t2t_cfg/use_performer"),
        ({**T2T, "img_size": [32, 32]}, "img_size"),
        ({**T2T, "layer_cfgs": [{}]}, "layer_cfgs"),
        ({**T2T, "layer_cfgs": {"num_heads": 5}}, "layer_cfgs"),
        ({**T2T, "with_cls_token": False}, "with_cls_token"),
        ({**EVA, "arch": {**ARCH, "embed_dims": 20}}, "arch/num_heads"),
        ({**EVA, "layer_cfgs": {"act_cfg": {"type": "GELU"}}}, "layer_cfgs/act_cfg"),
        ({**SAM, "arch": ARCH}, "arch"),
        ({**SAM, "use_abs_pos": False, "frozen_stages": 1}, "frozen_stages"),
        ({**SAM, "out_type": "cls_token"}, "out_type"),
        ({**REV, "out_type": "cls_token"}, "with_cls_token"),
        ({**REV, "fusion_mode": "sum"}, "fusion_mode"),
        ({**PVT, "num_stages": 3}, "num_layers"),
        ({**PVT, "strides": [4, 2]}, "strides"),
        ({**PVT, "pretrain_img_size": 16}, "pretrain_img_size"),
        ({**PVT, "pretrained": "a.pth", "checkpoint": "b.pth"}, "pretrained"),
        ({**PVT, "type": "mmdet.PyramidVisionTransformerV2", "paddings": [3, 1, 1, 1]}, "paddings"),
        ({"type": "mmdet.SSDVGG", "depth": 16, "out_feature_indices": [35]}, "out_feature_indices/0"),
        ({**DETECTORS, "sac": {"type": "SAC"}, "stage_with_sac": [False, True, True, True]}, "sac"),
        ({**DETECTORS, "depth": 18}, "depth"),
        ({**TRIDENT, "test_branch_idx": -1}, "test_branch_idx"),
        ({**TRIDENT, "test_branch_idx": 3}, "test_branch_idx"),
        ({**TRIDENT, "num_branch": 2}, "trident_dilations"),
        ({**TRIDENT, "num_stages": 4}, "num_stages"),
    ],
)
def test_what_the_library_does_not_build_is_refused(given: dict[str, Any], pointer: str) -> None:
    assert pointer_of(given).startswith(f"#/backbone/{pointer}")


@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        ({**XCIT, "out_type": "raw", "out_indices": [-1, 0]}, {"3": (2, 5, 24), "0": (2, 4, 24)}),
        ({**XCIT, "strides": [16]}, {"3": (2, 24, 2, 2)}),
        (TNT, {"0": (2, 24)}),
        ({**T2T, "out_type": "featmap", "out_indices": [0, -1]}, {"0": (2, 24, 2, 2), "1": (2, 24, 2, 2)}),
        ({**SAM, "out_channels": 0}, {"2": (2, 24, 4, 4)}),
        ({**SAM, "out_channels": 8, "out_type": "avg_featmap"}, {"2": (2, 8)}),
        ({**REV, "out_type": "featmap"}, {"0": (2, 48, 4, 4)}),
        ({**REV, "out_type": "raw", "fusion_mode": "add", "with_cls_token": True}, {"0": (2, 17, 24)}),
        ({**DETECTORS, "output_img": True, "out_indices": [1]}, {"img": (2, 3, 32, 32), "1": (2, 32, 4, 4)}),
    ],
)
def test_levels_are_those_of_the_library(given: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    assert {name: tuple(level.shape) for name, level in run(given, images()).items()} == shapes


def test_strides_of_a_pyramid_are_of_stages_or_of_levels() -> None:
    small = {**PVT, "pretrain_img_size": 64, "sr_ratios": [2, 2, 1, 1]}
    assert list(run({**small, "strides": [16, 4]}, images(64, 64))) == ["2", "0"]
    coarse = run({**small, "strides": [4, 2, 1, 1], "patch_sizes": [4, 2, 1, 1]}, images(64, 64))
    assert [level.shape[2] for level in coarse.values()] == [16, 8, 8, 8]


def test_a_pyramid_takes_the_names_of_the_official_code() -> None:
    given = {**PVT, "num_stages": 1, "out_indices": [0], "pretrain_img_size": 28, "strides": [4]}
    given |= {"num_layers": [1], "num_heads": [2], "patch_sizes": [4], "sr_ratios": [2]}
    family, config = parts(given)
    ours = {name: torch.randn_like(entry) for name, entry in built(given).state_dict().items()}
    layer = {name.removeprefix("layers.0.1.1."): entry for name, entry in ours.items()}
    width = 16
    theirs = {
        "pos_embed1": ours["layers.0.1.0.pos_embed"],
        **{f"patch_embed1.proj.{leaf}": ours[f"layers.0.0.projection.{leaf}"] for leaf in ("weight", "bias")},
        **{f"patch_embed1.norm.{leaf}": ours[f"layers.0.0.norm.{leaf}"] for leaf in ("weight", "bias")},
        "head.weight": torch.zeros(2, width),
    }
    for leaf in ("weight", "bias"):
        packed = layer[f"attn.attn.in_proj_{leaf}"]
        theirs |= {f"block1.0.attn.q.{leaf}": packed[:width], f"block1.0.attn.kv.{leaf}": packed[width:]}
        theirs[f"block1.0.attn.proj.{leaf}"] = layer[f"attn.attn.out_proj.{leaf}"]
        theirs |= {f"block1.0.{name}.{leaf}": layer[f"{name}.{leaf}"] for name in ("norm1", "norm2")}
        theirs |= {f"block1.0.attn.{name}.{leaf}": layer[f"attn.{name}.{leaf}"] for name in ("sr", "norm")}
        for name, number in (("fc1", 0), ("fc2", 3)):
            entry = layer[f"ffn.layers.{number}.{leaf}"]
            theirs[f"block1.0.mlp.{name}.{leaf}"] = entry.flatten(1) if leaf == "weight" else entry
    assert from_official(ours, has_positions=True, last=3) == ours
    loaded, keys = family.load(config, theirs, WeightsRef("any"))
    assert (keys.missing, keys.unexpected) == ((), ("head.weight",))
    for name, entry in loaded.state_dict().items():
        torch.testing.assert_close(entry, ours[name])


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (T2T, {**T2T, "img_size": 64}),
        (EVA, {**EVA, "img_size": 64}),
        (SAM, {**SAM, "img_size": 64, "window_size": 5}),
        (REV, {**REV, "img_size": 64}),
    ],
)
def test_positions_of_another_size_are_resized_at_load(small: dict[str, Any], large: dict[str, Any]) -> None:
    state = {f"backbone.{name}": entry for name, entry in built(small).state_dict().items()}
    family, config = parts(large)
    network, keys = family.load(config, state, WeightsRef("any", "backbone."))
    assert (keys.missing, keys.unexpected) == ((), ())
    assert network.pos_embed.shape == built(large).pos_embed.shape


def test_computed_positions_may_be_missing_from_a_file() -> None:
    family, config = parts(T2T)
    source = built(T2T)
    state = {name: entry for name, entry in source.state_dict().items() if name != "pos_embed"}
    loaded, keys = family.load(config, state, WeightsRef("any"))
    assert keys.missing == ("pos_embed",)
    torch.testing.assert_close(loaded.pos_embed, source.pos_embed)
    assert "pos_embed" not in loaded.needs("1.raw")


def test_rotations_that_a_file_has_are_known_in_every_layer() -> None:
    family, config = parts(EVA)
    source = built(EVA)
    rotations = dict(source.rope.named_buffers())
    places = ["rope", *(f"layers.{layer}.attn.rope" for layer in range(3))]
    extra = {f"{place}.{name}": entry for place in places for name, entry in rotations.items()}
    state = {**source.state_dict(), **extra}
    _, keys = family.load(config, state, WeightsRef("any"))
    assert (keys.loaded, keys.unexpected) == (len(state), ())


def test_positions_of_a_tnt_are_made_for_images_of_one_size() -> None:
    with pytest.raises(InvalidConfig, match="32x32 px, not 48x32"):
        run(TNT, images(32, 48))


def test_attention_among_too_many_patches_is_refused() -> None:
    wide = torch.empty(1, 3, 1024, 1024, device="meta")
    family, config = parts(T2T)
    with torch.device("meta"), pytest.raises(TooLarge, match="65536 tokens"):
        family.build(config)(wide, ["0.raw"])


def test_a_branch_of_a_trident_dilates_its_last_stage_only() -> None:
    first = run({**TRIDENT, "test_branch_idx": 0, "out_indices": [1, 2]}, images())
    last = run({**TRIDENT, "test_branch_idx": 2, "out_indices": [1, 2]}, images())
    torch.testing.assert_close(first["1"], last["1"])
    assert not torch.allclose(first["2"], last["2"])


def test_a_plain_checkpoint_becomes_standardised_weights_that_give_the_same() -> None:
    plain, standardised = DETECTORS, {**DETECTORS, "conv_cfg": {"type": "ConvAWS"}}
    source = built(plain)
    family, config = parts(standardised)
    loaded, keys = family.load(config, dict(source.state_dict()), WeightsRef("any"))
    assert (keys.missing, keys.unexpected) == ((), ())
    with torch.inference_mode():
        expected, found = source(images(), ["0", "3"]), loaded.eval()(images(), ["0", "3"])
    for node, level in expected.items():
        torch.testing.assert_close(found[node], level, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [XCIT, TNT, T2T, EVA, SAM, REV, PVT], ids=lambda given: str(given["type"]))
def test_what_only_training_reads_makes_no_second_model(given: dict[str, Any]) -> None:
    _, one = parts(given)
    _, other = parts({**given, "drop_path_rate": 0.3})
    assert one.key() == other.key()
