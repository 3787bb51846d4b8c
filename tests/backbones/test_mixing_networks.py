"""ShuffleNets, MobileOne, MLP-Mixer, RepLKNet, RepMLPNet, Twins, MixMIM, TinyViT: what packs do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from service.backbones.base import Backbone
from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig, TooLarge
from tests.backbones.test_openmmlab_networks import built, key, parsed, pointer_of

TINY_ONE = {
    "type": "MobileOne",
    "arch": {
        "num_blocks": [1, 1, 1, 1],
        "width_factor": [0.125, 0.125, 0.125, 0.125],
        "num_conv_branches": [2, 1, 1, 1],
        "num_se_blocks": [0, 0, 0, 1],
    },
}
TINY_MIXER = {
    "type": "MlpMixer",
    "arch": {"embed_dims": 8, "num_layers": 2, "tokens_mlp_dims": 4, "channels_mlp_dims": 16},
    "img_size": 32,
}
TINY_KERNELS = {
    "type": "RepLKNet",
    "arch": {
        "large_kernel_sizes": [7, 5],
        "layers": [1, 1],
        "channels": [8, 16],
        "small_kernel": 3,
        "dw_ratio": 1,
    },
    "strides": [2, 2],
    "dilations": [1, 1],
    "out_indices": [0, 1],
}
TINY_MLP = {
    "type": "RepMLPNet",
    "arch": {"channels": [8, 16], "depths": [1, 1], "sharesets_nums": [1, 2]},
    "img_size": 32,
    "out_indices": [0, 1],
}
TINY_TWINS = {
    "embed_dims": [8, 16],
    "depths": [2, 1],
    "num_heads": [1, 2],
    "patch_sizes": [4, 2],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "sr_ratios": [2, 1],
}
TINY_MIM = {
    "type": "MixMIMTransformer",
    "arch": {"embed_dims": 8, "depths": [1, 1], "num_heads": [1, 2]},
    "img_size": 32,
    "window_size": [4, 4],
}
TINY_VIT = {
    "type": "TinyViT",
    "arch": {"channels": [8, 16, 24], "num_heads": [1, 2, 3], "depths": [1, 1, 1]},
    "img_size": [32, 64],
    "out_indices": [0, 1, 2],
}


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ({"type": "ShuffleNetV1", "groups": 5}, "#/backbone/groups"),
        ({"type": "ShuffleNetV1", "groups": 4, "widen_factor": 1.5}, "#/backbone/widen_factor"),
        ({"type": "ShuffleNetV1", "out_indices": [2, -1]}, "#/backbone/out_indices/1"),
        ({"type": "ShuffleNetV1", "frozen_stages": 3}, "#/backbone/frozen_stages"),
        ({"type": "ShuffleNetV2", "widen_factor": 0.75}, "#/backbone/widen_factor"),
        ({"type": "ShuffleNetV2", "out_indices": [4]}, "#/backbone/out_indices/0"),
        ({"type": "MobileOne", "arch": "S0"}, "#/backbone/arch"),
        ({"type": "MobileOne", "arch": "s0", "out_indices": [4]}, "#/backbone/out_indices/0"),
        (
            {**TINY_ONE, "arch": {**TINY_ONE["arch"], "num_se_blocks": [0, 2, 0, 0]}},  # type: ignore[dict-item]  # an object of JSON
            "#/backbone/arch/num_se_blocks/1",
        ),
        ({**TINY_MIXER, "out_indices": [2]}, "#/backbone/out_indices/0"),
        ({**TINY_MIXER, "img_size": 4096, "patch_size": 1}, "#/backbone/img_size"),
        ({**TINY_MIXER, "strides": [16]}, "#/backbone/strides/0"),
        ({**TINY_KERNELS, "strides": [2, 2, 2]}, "#/backbone/strides"),
        ({**TINY_KERNELS, "dilations": [1]}, "#/backbone/dilations"),
        ({**TINY_KERNELS, "frozen_stages": 3}, "#/backbone/frozen_stages"),
        ({**TINY_MLP, "reparam_conv_kernels": [3, 3]}, "#/backbone/reparam_conv_kernels"),
        ({**TINY_MLP, "img_size": 4}, "#/backbone/img_size"),
        ({**TINY_MLP, "img_size": 4096}, "#/backbone/img_size"),
        (
            {**TINY_MLP, "img_size": 36, "conv_cfg": {"type": "Conv2dAdaptivePadding"}},
            "#/backbone/conv_cfg/type",
        ),
        ({"type": "SVT", "arch": "small", "norm_after_stage": [True]}, "#/backbone/norm_after_stage"),
        ({"type": "PCPVT", "arch": {**TINY_TWINS, "depths": [1]}}, "#/backbone/arch/embed_dims"),
        ({"type": "PCPVT", "arch": "small", "frozen_stages": 1}, "#/backbone/frozen_stages"),
        ({**TINY_MIM, "window_size": [4]}, "#/backbone/window_size"),
        ({**TINY_MIM, "img_size": 36}, "#/backbone/img_size"),
        ({**TINY_VIT, "img_size": 224}, "#/backbone/img_size"),
        ({**TINY_VIT, "local_conv_size": 4}, "#/backbone/local_conv_size"),
        ({**TINY_VIT, "frozen_stages": 4}, "#/backbone/frozen_stages"),
        ({**TINY_VIT, "window_size": [7]}, "#/backbone/window_size"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_key(raw: dict[str, Any], pointer: str) -> None:
    assert pointer_of(raw) == pointer


@pytest.mark.parametrize(
    ("raw", "same"),
    [
        (
            {"type": "ShuffleNetV2"},
            {"frozen_stages": 2, "norm_eval": True, "out_indices": [0], "with_cp": True},
        ),
        (TINY_MIXER, {"drop_path_rate": 0.1, "out_indices": [0], "layer_cfgs": {"drop_rate": 0.1}}),
        (TINY_KERNELS, {"norm_cfg": {"type": "BN", "eps": 0.1}, "strides": [1, 2], "drop_path_rate": 0.1}),
        (TINY_MLP, {"out_indices": [-1], "norm_cfg": {"type": "BN", "requires_grad": False}}),
        (TINY_MIM, {"use_checkpoint": True, "attn_drop_rate": 0.1}),
        (TINY_VIT, {"layer_lr_decay": 0.9, "frozen_stages": 1, "out_indices": [2, 1, 0]}),
    ],
)
def test_keys_of_training_and_of_the_reply_share_a_model(raw: dict[str, Any], same: dict[str, Any]) -> None:
    assert key({**raw, **same}) == key(raw)


def features(raw: dict[str, Any], size: tuple[int, int]) -> list[Tensor]:
    family, config = parsed(raw)
    network = built(raw)
    with torch.inference_mode():
        nodes = [level.node for level in config.levels(family.describe(config))]
        found: dict[str, Tensor] = network(torch.ones(1, 3, *size), nodes)
    return [found[node] for node in nodes]


@pytest.mark.parametrize(
    ("raw", "shapes"),
    [
        ({**TINY_MIXER, "out_indices": [0, -1]}, [(1, 8, 4), (1, 8, 4)]),
        (TINY_MLP, [(1, 16, 4, 4), (1, 16, 4, 4)]),
        (TINY_MIM, [(1, 16)]),
    ],
)
def test_a_network_of_one_size_says_what_it_is_made_for(
    raw: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    family, config = parsed(raw)
    assert [tuple(one.shape) for one in features(raw, (32, 32))] == shapes
    assert family.describe(config).input.size == (32, 32)
    with pytest.raises(ValueError, match=r"images must"):
        features(raw, (64, 32))


def test_a_mixers_tokens_have_their_channels_first() -> None:
    family, config = parsed(TINY_MIXER)
    first, *_ = family.describe(config).features
    assert (first.layout, first.channels, first.stride) == ("NCL", 8, None)


def test_tinyvit_gives_means_by_index_and_maps_by_stride() -> None:
    assert [tuple(one.shape) for one in features(TINY_VIT, (32, 64))] == [(1, 16), (1, 24), (1, 24)]
    by_stride = {name: value for name, value in TINY_VIT.items() if name != "out_indices"} | {
        "strides": [8, 16]
    }
    assert [tuple(one.shape) for one in features(by_stride, (32, 64))] == [(1, 16, 4, 8), (1, 24, 2, 4)]
    with pytest.raises(ValueError, match="the map after stage 0 must be 4x8"):
        features(TINY_VIT, (64, 64))


def test_replknets_strides_are_those_of_stages_or_of_levels() -> None:
    def names(strides: list[int]) -> list[str]:
        family, config = parsed({**TINY_KERNELS, "strides": strides})
        return [level.name for level in config.levels(family.describe(config))]

    assert (names([1, 2]), names([8])) == (["0", "1"], ["1"])


@pytest.mark.parametrize(
    ("raw", "early", "last"),
    [(TINY_KERNELS, "stages.0.norm.bias", "stages.1.norm.bias"), (TINY_VIT, "norm0.bias", "norm2.bias")],
)
def test_a_classifiers_file_may_lack_the_norms_of_earlier_outputs(
    raw: dict[str, Any], early: str, last: str
) -> None:
    family, config = parsed(raw)
    state = built(raw).state_dict()
    prefixes = [early.rpartition(".")[0], *(["norm1"] if "norm1.bias" in state else [])]
    kept = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in prefixes}
    network, keys = family.load(config, kept, WeightsRef("any"))
    assert early in keys.missing
    assert not network.state_dict()[early].any()
    del kept[last]
    with pytest.raises(CheckpointMismatch) as refused:
        family.load(config, kept, WeightsRef("any"))
    assert refused.value.missing == (last,)


def test_mobileone_without_se_cfg_has_no_gates() -> None:
    with_gates, without = built(TINY_ONE), built({**TINY_ONE, "se_cfg": None})
    gates = {name for name in with_gates.state_dict() if ".se." in name}
    assert len(gates) == 8
    assert set(without.state_dict()) == set(with_gates.state_dict()) - gates


def test_the_positions_of_mixmim_never_learn() -> None:
    family, config = parsed(TINY_MIM)
    network = family.build(config)
    assert isinstance(network, Backbone)
    assert network.frozen(config.freeze()).parameters == ("absolute_pos_embed",)


def test_an_image_with_too_many_pairs_of_positions_is_refused_in_words() -> None:
    raw = {"type": "PCPVT", "arch": {**TINY_TWINS, "sr_ratios": [1, 1]}, "out_indices": [1]}
    family, config = parsed(raw)
    with torch.device("meta"), pytest.raises(TooLarge, match="pairs of positions"):
        family.build(config)(torch.empty(1, 3, 1024, 1024), ["1"])


def test_a_map_smaller_than_its_reduction_is_an_error_of_size() -> None:
    with pytest.raises((RuntimeError, InvalidConfig), match=r"[Kk]ernel size"):
        features({"type": "PCPVT", "arch": {**TINY_TWINS, "sr_ratios": [8, 1]}, "out_indices": [1]}, (16, 16))
