"""Res2Net: where the two libraries differ, and what does not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backbones.residual import assert_maps_are_as_described, built, maps, pointer_of, small


@pytest.mark.parametrize(
    "keys", [{}, {"deep_stem": False}, {"avg_down": False}, {"scales": 2}, {"scales": 6}]
)
def test_mmpretrains_stem_shortcut_and_slices_can_be_chosen(keys: dict[str, Any]) -> None:
    assert_maps_are_as_described(small("mmpretrain.Res2Net", out_indices=[0, 3], **keys))


def test_only_mmpretrain_pools_the_last_slice_of_a_block_that_does_not_stride() -> None:
    ours, theirs = (
        small(f"{scope}.Res2Net", out_indices=[0], num_stages=1) for scope in ("mmpretrain", "mmdet")
    )
    network, other = built(ours), built(theirs)
    other.layer1.load_state_dict(network.layer1.state_dict())
    maps_in = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert not torch.allclose(network.layer1[0](maps_in), other.layer1[0](maps_in))
        torch.testing.assert_close(
            network.layer1[1:](maps(ours, network)["0"]), other.layer1[1:](maps(ours, network)["0"])
        )


@pytest.mark.parametrize(
    ("name", "keys", "key"),
    [
        ("mmpretrain.Res2Net", {"scales": 1}, "scales"),
        ("mmpretrain.Res2Net", {"depth": 18}, "depth"),
        ("mmpretrain.Res2Net", {"norm_cfg": {"type": "GN", "num_groups": 32}}, "norm_cfg/num_groups"),
        ("mmdet.Res2Net", {"style": "caffe"}, "style"),
        ("mmdet.Res2Net", {"deep_stem": False}, "deep_stem"),
    ],
)
def test_what_makes_no_res2net_is_refused(name: str, keys: dict[str, Any], key: str) -> None:
    assert pointer_of(name, **{"depth": 50, **keys}) == f"#/backbone/{key}"
