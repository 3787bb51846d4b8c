"""ResNeSt: splits and groups that the packs do not have, and those that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from service.backbones.norms import BATCH_NORM
from service.backbones.resnest import SplitAttention, SplitSpec
from tests.backbones.residual import assert_maps_are_as_described, config_of, pointer_of, small


@pytest.mark.parametrize(
    "keys",
    [
        {"radix": 1},
        {"radix": 4},
        {"radix": 1, "groups": 2, "width_per_group": 8},
        {"groups": 2, "width_per_group": 4},
        {"avg_down_stride": False},
        {"reduction_factor": 1, "strides": [1, 2, 1, 1], "dilations": [1, 1, 2, 4]},
    ],
)
def test_every_variant_gives_what_it_describes(keys: dict[str, Any]) -> None:
    assert_maps_are_as_described(small("mmpretrain.ResNeSt", out_indices=[0, 1, 2, 3], **keys))


@pytest.mark.parametrize(("radix", "groups"), [(2, 1), (2, 2), (3, 2), (1, 2)])
def test_attention_weighs_the_splits_of_each_channel(radix: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = SplitAttention(
        SplitSpec(radix, 1, True), 12, BATCH_NORM, stride=1, dilation=1, groups=groups
    ).eval()
    images = torch.randn(2, 12, 5, 7)
    with torch.inference_mode():
        torch.testing.assert_close(layer(images), plain_attention(layer, images, radix, groups))


def plain_attention(layer: SplitAttention, images: Tensor, radix: int, groups: int) -> Tensor:
    """The paper's equations, channel by channel."""
    splits = torch.relu(layer.bn0(layer.conv(images)))
    means = sum(splits[:, 12 * split : 12 * (split + 1)] for split in range(radix)).mean((2, 3), keepdim=True)
    scores = layer.fc2(torch.relu(layer.bn1(layer.fc1(means))))[:, :, 0, 0]
    weighed = torch.zeros_like(images)
    per_group = 12 // groups
    for channel in range(12):
        group, within = divmod(channel, per_group)
        of_splits = [scores[:, (group * radix + split) * per_group + within] for split in range(radix)]
        weights = torch.stack(of_splits).softmax(0) if radix > 1 else torch.stack(of_splits).sigmoid()
        for split in range(radix):
            weighed[:, channel] += weights[split, :, None, None] * splits[:, 12 * split + channel]
    return weighed


def test_both_libraries_have_their_own_depths() -> None:
    assert config_of("mmpretrain.ResNeSt", depth=269).spec().blocks == (3, 30, 48, 8)
    assert config_of("mmdet.ResNeSt", depth=200).spec().blocks == (3, 24, 36, 3)
    assert pointer_of("mmdet.ResNeSt", depth=269) == "#/backbone/depth"


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"groups": 3, "width_per_group": 21, "radix": 1}, "groups"),
        ({"radix": 5}, "groups"),
        ({"radix": 0}, "radix"),
        ({"reduction_factor": 10**6}, "reduction_factor"),
        ({"deep_stem": False}, "deep_stem"),
        ({"norm_cfg": {"type": "GN", "num_groups": 64}}, "norm_cfg/num_groups"),
    ],
)
def test_what_does_not_divide_is_refused(keys: dict[str, Any], key: str) -> None:
    assert pointer_of("mmpretrain.ResNeSt", depth=50, **keys) == f"#/backbone/{key}"
