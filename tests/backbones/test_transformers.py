"""Relatives of VisionTransformer, Swin, PoolFormer and classics: what their parity packs do not show."""

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

TINY = {"embed_dims": 24, "num_layers": 3, "num_heads": 2, "feedforward_channels": 48}
VIT = {"arch": TINY, "img_size": 32, "patch_size": 8}
SWIN = {"embed_dims": 8, "depths": [1, 2], "num_heads": [1, 2], "extra_norm_every_n_blocks": 2}
SWIN_V2 = {"type": "mmpretrain.SwinTransformerV2", "arch": SWIN, "window_size": 4}
LAYERS = [["mobilenetv2", 8, 1, 1, 2], ["mobilevit", 8, 2, 16, 16, 1, 2]]


def parts(given: dict[str, Any]) -> tuple[Family[Any], BackboneConfig]:
    resolved = backbone_registry().resolve(given["type"], pointer="#/backbone/type")
    scope = str(given["type"]).partition(".")[0]
    return resolved.family, resolved.family.config.model_validate(given, context={"scope": scope})


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
    """First parts of the names of what is frozen."""
    family, config = parts(given)
    with torch.device("meta"):
        network = family.build(config)
    report = network.frozen(config.freeze())
    return {".".join(name.split(".")[:2]) for name in report.parameters}


def images(side: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def pointer_of(given: dict[str, Any]) -> str:
    """Where the refusal of a config points."""
    try:
        parts(given)
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {given}")


@pytest.mark.parametrize(
    ("given", "pointer"),
    [
        ({"type": "DistilledVisionTransformer", **VIT, "with_cls_token": False}, "with_cls_token"),
        ({"type": "DistilledVisionTransformer", **VIT, "frozen_stages": 4}, "frozen_stages"),
        ({"type": "DeiT3", **VIT, "out_type": "avg_featmap"}, "out_type"),
        ({"type": "DeiT3", **VIT, "frozen_stages": 1}, "frozen_stages"),
        ({"type": "DeiT3", "arch": "deit-small"}, "arch"),
        ({"type": "BEiTViT", "arch": "huge"}, "arch"),
        ({"type": "BEiTViT", **VIT, "with_cls_token": False}, "with_cls_token"),
        ({"type": "BEiTViT", **VIT, "img_size": 512}, "img_size"),
        ({"type": "BEiTViT", **VIT, "use_shared_rel_pos_bias": True}, "use_shared_rel_pos_bias"),
        ({"type": "SwinTransformerV2", "window_size": [8, 8]}, "window_size"),
        ({"type": "SwinTransformerV2", "pretrained_window_sizes": [8]}, "pretrained_window_sizes"),
        ({"type": "SwinTransformerV2", "arch": SWIN, "frozen_stages": 2}, "frozen_stages"),
        ({"type": "RIFormer", "pool_size": 3}, "pool_size"),
        ({"type": "RIFormer", "frozen_stages": 7}, "frozen_stages"),
        ({"type": "ConvMixer", "arch": "768/20"}, "arch"),
        ({"type": "ConvMixer", "frozen_stages": 33}, "frozen_stages"),
        ({"type": "MobileViT", "arch": [["mobilevit", 8, 2, 18, 16, 1, 2]]}, "arch/0/3"),
        ({"type": "MobileViT", "frozen_stages": 5}, "frozen_stages"),
        ({"type": "AlexNet", "num_classes": 1_000_000}, "num_classes"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is(given: dict[str, Any], pointer: str) -> None:
    assert pointer_of({**given, "type": f"mmpretrain.{given['type']}"}).startswith(f"#/backbone/{pointer}")


@pytest.mark.parametrize(
    ("given", "channels"),
    [
        ({"type": "mmpretrain.DistilledVisionTransformer", **VIT}, {"2": 24, "2.dist": 24}),
        ({"type": "mmcls.DistilledVisionTransformer", **VIT}, {"2": 24, "2.cls": 24, "2.dist": 24}),
        ({"type": "mmpretrain.DeiT3", **VIT, "out_indices": [-1, 0]}, {"2": 24, "0": 24}),
        ({"type": "mmcls.BEiTViT", **VIT}, {"2": 24}),
        ({"type": "mmpretrain.BEiTViT", **VIT, "bias": True, "layer_scale_init_value": 0}, {"2": 24}),
        ({**SWIN_V2, "out_indices": [1, 0]}, {"1": 16, "0": 8}),
        ({"type": "mmpretrain.MobileViT", "arch": LAYERS, "out_indices": [0, 1, 2]}, {"0": 8, "1": 32}),
        ({"type": "mmpretrain.RIFormer", "deploy": True, "out_indices": [1, 6]}, {"1": 128, "6": 512}),
    ],
)
def test_levels_are_those_of_the_library(given: dict[str, Any], channels: dict[str, int]) -> None:
    assert {name: level.shape[1] for name, level in run(given, images()).items()} == channels


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {"type": "mmpretrain.DistilledVisionTransformer", **VIT, "frozen_stages": 1},
            {"cls_token", "pos_embed", "patch_embed.projection", "layers.0"},
        ),
        (
            {"type": "mmpretrain.BEiTViT", **VIT, "frozen_stages": 3},
            {"cls_token", "patch_embed.projection", "layers.0", "layers.1", "layers.2"}
            | {"ln2.weight", "ln2.bias"},
        ),
        ({"type": "mmpretrain.ConvMixer", "frozen_stages": 1}, {"stages.0"}),
        (
            {"type": "mmpretrain.RIFormer", "frozen_stages": 0, "out_indices": [0, 6]},
            {"patch_embed.proj", "network.0", "norm0.weight", "norm0.bias"},
        ),
        (
            {**SWIN_V2, "frozen_stages": 0, "out_indices": [0, 1]},
            {"patch_embed.projection", "patch_embed.norm", "stages.0", "norm0.weight", "norm0.bias"},
        ),
    ],
)
def test_frozen_stages_count_as_in_the_library(given: dict[str, Any], names: set[str]) -> None:
    assert frozen(given) == names


def test_relative_positions_refuse_images_of_another_size() -> None:
    with pytest.raises(InvalidConfig, match="32x32 px"):
        run({"type": "mmpretrain.BEiTViT", **VIT}, images(40))


def test_positions_without_relative_ones_take_any_size() -> None:
    given = {**VIT, "use_rel_pos_bias": False, "use_abs_pos_emb": True, "out_type": "featmap"}
    assert run({"type": "mmpretrain.BEiTViT", **given}, images(40))["2"].shape == (2, 24, 5, 5)


def test_shared_relative_positions_of_a_file_go_to_every_layer() -> None:
    shared = {**VIT, "type": "mmpretrain.BEiTViT", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    family, config = parts(shared)
    torch.manual_seed(0)
    source = family.build(config).eval()
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    _, apart = parts({**VIT, "type": "mmpretrain.BEiTViT"})
    loaded, keys = family.load(apart, state, WeightsRef("any", "backbone."))
    assert (keys.missing, keys.unexpected) == ((), ())
    nodes = ["0.raw", "2.raw"]
    with torch.inference_mode():
        expected, found = source(images(), nodes), loaded.eval()(images(), nodes)
    for node in nodes:
        torch.testing.assert_close(found[node], expected[node])


def test_a_deployed_riformer_gives_what_its_merged_layers_gave() -> None:
    arch = {"layers": [1, 1], "embed_dims": [8, 16], "mlp_ratios": [2, 2]}
    trained = {"type": "mmpretrain.RIFormer", "arch": arch, "out_indices": [0, 2]}
    family, config = parts(trained)
    torch.manual_seed(0)
    source = family.build(config).eval()
    for parameter in source.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    state = dict(source.state_dict())
    for block in ("network.0.0", "network.2.0"):
        factor = state.pop(f"{block}.token_mixer.affine.weight").flatten() - 1
        offset = state.pop(f"{block}.token_mixer.affine.bias")
        weight, bias = state.pop(f"{block}.norm1.weight"), state.pop(f"{block}.norm1.bias")
        state[f"{block}.norm_reparam.weight"] = weight * factor
        state[f"{block}.norm_reparam.bias"] = bias * factor + offset
    _, merged = parts({**trained, "deploy": True})
    deployed, _ = family.load(merged, state, WeightsRef("any"))
    with torch.inference_mode():
        expected, found = source(images(), ["0", "2"]), deployed.eval()(images(), ["0", "2"])
    for node in expected:
        torch.testing.assert_close(found[node], expected[node], rtol=1e-4, atol=1e-5)


def test_classes_are_asked_of_images_of_the_size_made_for() -> None:
    lenet = {"type": "mmpretrain.LeNet5", "num_classes": 10}
    assert run(lenet, images(32, 1))["0"].shape == (2, 10)
    with pytest.raises(InvalidConfig, match="1x1"):
        run(lenet, images(64, 1))


def test_what_only_training_reads_makes_no_second_model() -> None:
    for name in ("DistilledVisionTransformer", "DeiT3", "BEiTViT"):
        plain = {"type": f"mmpretrain.{name}", **VIT}
        _, one = parts(plain)
        _, other = parts({**plain, "drop_path_rate": 0.3, "out_indices": [0]})
        assert one.key() == other.key()
