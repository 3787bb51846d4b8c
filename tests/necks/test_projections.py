"""The projections of self-supervised learning: what their layers are, and which levels they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from service.necks.base import LevelFacts
from tests.necks.levels import built, config, described, facts, refused, run, tensors

MAP = facts([24])
PAIR = {"in_channels": 24, "hid_channels": 16, "out_channels": 8}
NON_LINEAR = {"type": "mmpretrain.NonLinearNeck", **PAIR}


def names(raw: dict[str, Any], levels: list[LevelFacts] = MAP) -> list[str]:
    return [name for name in built(raw, levels).state_dict() if not name.endswith("num_batches_tracked")]


def test_a_non_linear_neck_is_linear_layers_with_norms_and_relus_between_them() -> None:
    neck = built({**NON_LINEAR, "num_layers": 3, "with_last_bn_affine": False}, MAP)
    state, (maps,) = neck.state_dict(), tensors(MAP)
    vectors = maps.mean((2, 3))
    for place in range(3):
        vectors = F.relu(vectors) if place else vectors
        statistics = (state[f"bn{place}.running_mean"], state[f"bn{place}.running_var"])
        affine = (state.get(f"bn{place}.weight"), state.get(f"bn{place}.bias"))
        vectors = F.batch_norm(vectors @ state[f"fc{place}.weight"].T, *statistics, *affine)
    (found,) = run(neck, [maps])
    assert torch.allclose(found, vectors, rtol=1e-5, atol=1e-6)
    assert "bn1.weight" in state
    assert "bn2.weight" not in state
    assert "fc0.bias" not in state


@pytest.mark.parametrize(
    ("changed", "last", "channels"),
    [
        ({"with_last_bn": False}, "fc1.weight", 8),
        ({"with_last_bn": False, "with_last_bias": True}, "fc1.bias", 8),
        ({"num_layers": 1}, "bn0.running_var", 16),
        ({"with_last_bn": False, "norm_cfg": {"type": "LN"}}, "fc1.weight", 8),
    ],
)
def test_the_last_layer_of_a_non_linear_neck_may_differ(
    changed: dict[str, Any], last: str, channels: int
) -> None:
    raw = {**NON_LINEAR, **changed}
    assert names(raw)[-1] == last
    assert described(raw, MAP).levels == (LevelFacts(0, "0", "NC", channels, None),)
    assert run(built(raw, MAP), tensors(MAP))[0].shape == (2, channels)


def test_a_map_that_is_not_pooled_is_flattened() -> None:
    levels = facts([2])
    raw = {**NON_LINEAR, "in_channels": 2 * 16 * 24, "with_avg_pool": False}
    neck = built(raw, levels)
    maps = tensors(levels)
    assert torch.equal(run(neck, maps)[0], run(neck, [maps[0].flatten(1)])[0])
    assert refused({**raw, "in_channels": 7}, levels)[0] == "#/neck/in_channels"


def test_mmselfsups_neck_takes_the_class_token_beside_a_map() -> None:
    raw = {**NON_LINEAR, "type": "mmselfsup.NonLinearNeck", "with_avg_pool": False, "vit_backbone": True}
    levels = [LevelFacts(11, "11", "NCHW", 24, 16), LevelFacts(11, "11.cls", "NC", 24, None)]
    features = [torch.randn(2, 24, 4, 4), torch.randn(2, 24)]
    assert described(raw, levels).levels[0].name == "11.cls"
    assert torch.equal(*(run(built(raw, levels), [other, features[1]])[0] for other in features))
    assert refused(raw, MAP) == (
        "#/neck/vit_backbone",
        "takes one level and its class token; the backbone gives 1",
    )


@pytest.mark.parametrize(
    ("raw", "first"),
    [
        ({"type": "mmpretrain.MoCoV2Neck", **PAIR}, "mlp.0.weight"),
        ({"type": "mmselfsup.MoCoV2Neck", **PAIR}, "mlp.0.weight"),
        ({"type": "mmselfsup.LinearNeck", "in_channels": 24, "out_channels": 8}, "fc.weight"),
        ({"type": "mmselfsup.ODCNeck", **PAIR}, "fc0.weight"),
        ({"type": "mmselfsup.RelativeLocNeck", "in_channels": 12, "out_channels": 8}, "fc.weight"),
    ],
)
def test_projections_make_a_vector_of_one_level(raw: dict[str, Any], first: str) -> None:
    assert names(raw)[0] == first
    (maps,) = tensors(MAP)
    (pooled,) = run(built(raw, MAP), [maps])
    vectors = facts([24], "NC")
    (same,) = run(built({**raw, "with_avg_pool": False}, vectors), [maps.mean((2, 3))])
    assert pooled.shape == (2, 8)
    assert torch.allclose(pooled, same, rtol=1e-5, atol=1e-6)
    assert refused(raw, facts([24, 24])) == (
        "#/neck",
        f"{raw['type']} takes one level; the backbone gives 2",
    )
    assert refused(raw, vectors)[0] == "#/neck/with_avg_pool"


def test_what_odc_and_relative_location_end_with_is_not_negative() -> None:
    for raw in (
        {"type": "mmselfsup.ODCNeck", **PAIR},
        {"type": "mmselfsup.RelativeLocNeck", "in_channels": 12, "out_channels": 8},
    ):
        (found,) = run(built(raw, MAP), tensors(MAP))
        assert found.min() == 0 < found.max()


def test_relative_location_takes_two_crops_beside_each_other() -> None:
    raw = {"type": "mmselfsup.RelativeLocNeck", "in_channels": 24, "out_channels": 8}
    assert refused(raw, MAP)[1] == "the backbone gives [24], the neck takes [48]"


@pytest.mark.parametrize("library", ["mmpretrain", "mmselfsup"])
def test_swav_projects_to_vectors_of_length_1(library: str) -> None:
    raw = {"type": f"{library}.SwAVNeck", **PAIR}
    (found,) = run(built(raw, MAP), tensors(MAP))
    assert torch.allclose(found.norm(dim=1), torch.ones(2))
    norm = {"mmpretrain": "norm", "mmselfsup": "bn"}[library]
    keys = built(raw, MAP).state_dict()
    assert keys[f"{norm}.weight"].data_ptr() == keys["projection_neck.1.weight"].data_ptr()
    assert not torch.allclose(run(built({**raw, "with_l2norm": False}, MAP), tensors(MAP))[0].norm(), found)
    assert names({**raw, "hid_channels": 0}) == ["projection_neck.weight", "projection_neck.bias"]
    none = {**raw, "out_channels": 0}
    assert (names(none), described(none, MAP).levels[0].channels) == ([], 24)


def test_densecl_gives_the_map_its_pixels_and_their_mean() -> None:
    raw = {"type": "mmpretrain.DenseCLNeck", **PAIR}
    whole, pixels, mean = run(built(raw, MAP), tensors(MAP))
    assert (whole.shape, pixels.shape) == ((2, 8), (2, 8, 16 * 24))
    assert torch.allclose(pixels.mean(2), mean, atol=1e-6)
    assert [level.layout for level in described(raw, MAP).levels] == ["NC", "NCL", "NC"]
    _, coarse, _ = run(built({**raw, "num_grid": 3}, MAP), tensors(MAP))
    assert coarse.shape == (2, 8, 9)


def test_a_map_averaged_to_a_size_has_no_stride() -> None:
    raw = {"type": "mmselfsup.AvgPool2dNeck", "output_size": [2, 3]}
    (maps,) = tensors(MAP)
    (found,) = run(built(raw, MAP), [maps])
    assert torch.allclose(found, maps.reshape(2, 24, 2, 8, 3, 8).mean((3, 5)), atol=1e-6)
    assert described(raw, MAP).levels == (LevelFacts(0, "0", "NCHW", 24, None),)


def test_a_batch_norm_of_vectors_is_for_vectors() -> None:
    raw = {"type": "mmpretrain.ClsBatchNormNeck", "input_features": 24}
    levels = facts([24, 24], "NC")
    neck, vectors = built(raw, levels), tensors(levels)
    statistics = (neck.state_dict()["bn.running_mean"], neck.state_dict()["bn.running_var"])
    for found, vector in zip(run(neck, vectors), vectors, strict=True):
        assert torch.allclose(found, F.batch_norm(vector, *statistics, eps=1e-6), atol=1e-6)
    assert refused(raw, MAP)[1].endswith("takes vectors; level 0 is a map (NCHW)")
    assert refused(raw, facts([16], "NC"))[0] == "#/neck/input_features"


def test_mmselfsups_batch_norm_is_for_class_tokens_beside_maps() -> None:
    raw = {"type": "mmselfsup.ClsBatchNormNeck", "input_features": 24}
    levels = [LevelFacts(11, "11", "NCHW", 24, 16), LevelFacts(11, "11.cls", "NC", 24, None)]
    features = [torch.randn(2, 24, 4, 4), torch.randn(2, 24)]
    maps, token = run(built(raw, levels), features)
    assert torch.equal(maps, features[0])
    assert not torch.allclose(token, features[1])
    assert "level 0 has none" in refused(raw, facts([24, 24], "NC"))[1]
    assert "level 0 has none" in refused(raw, MAP)[1]


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ({**NON_LINEAR, "norm_cfg": {"type": "LN"}}, "#/neck/norm_cfg/type"),
        (
            {"type": "mmselfsup.ODCNeck", **PAIR, "norm_cfg": {"type": "BN1d", "momentum": 0.1}},
            "#/neck/norm_cfg/momentum",
        ),
        ({"type": "mmselfsup.ODCNeck", **PAIR, "norm_cfg": {"type": "LN"}}, "#/neck/norm_cfg/type"),
        ({**NON_LINEAR, "in_channels": 25}, "#/neck/in_channels"),
    ],
)
def test_what_a_projection_cannot_be_is_refused(raw: dict[str, Any], pointer: str) -> None:
    assert refused(raw, MAP)[0] == pointer


def test_equal_projections_of_two_libraries_are_one() -> None:
    for name in ("NonLinearNeck", "MoCoV2Neck", "DenseCLNeck"):
        keys = {
            config({"type": f"{library}.{name}", **PAIR}).key() for library in ("mmpretrain", "mmselfsup")
        }
        assert len(keys) == 1
    named = {config({"type": f"{library}.SwAVNeck", **PAIR}).key() for library in ("mmpretrain", "mmselfsup")}
    assert len(named) == 2
