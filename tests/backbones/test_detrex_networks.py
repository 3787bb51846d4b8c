"""detrex's own backbones: how they are spelled, what is refused where, and the formulas inside them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
import torch.nn.functional as F

from service.backbones.catalogue import backbone_registry
from service.backbones.detrex_convnext import DETREX_CONVNEXT
from service.backbones.eva import EVA_FAMILY, resampling, spline_weights, table_places
from service.backbones.eva02 import EVA02_FAMILY
from service.backbones.focalnet import FOCALNET
from service.backbones.internimage import POINTS, sample_and_sum
from service.backbones.lazyconfig import from_lazyconfig
from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig, TooLarge

REF = WeightsRef("any")
SMALL: dict[str, dict[str, Any]] = {
    "detrex.ConvNeXt": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "detrex.FocalNet": {"embed_dim": 8, "depths": [1, 1, 1, 1]},
    "detrex.InternImage": {"channels": 8, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]},
    "detrex.EVAViT": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "detrex.EVA02_ViT": {
        "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "window_size": 2,
    },
}  # fmt: skip
OF_STAGES = ("detrex.ConvNeXt", "detrex.FocalNet", "detrex.InternImage")


def small(type_name: str, **keys: Any) -> dict[str, Any]:
    return {"type": type_name, **SMALL[type_name], **keys}


def eva02(**keys: Any) -> Any:
    return EVA02_FAMILY.config.model_validate(small("detrex.EVA02_ViT", **keys))


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("convnext", "ConvNeXt"),
        ("focalnet", "FocalNet"),
        ("internimage", "InternImage"),
        ("eva", "EVAViT"),
        ("eva_02", "EVA02_ViT"),
    ],
)
def test_each_path_that_a_class_is_imported_from_names_its_type(file: str, name: str) -> None:
    for module in ("modeling", "modeling.backbone", f"modeling.backbone.{file}"):
        raw = from_lazyconfig({"_target_": f"detrex.{module}.{name}"})
        assert backbone_registry().resolve(raw["type"]).type == f"detrex.{name}"


@pytest.mark.parametrize("type_name", OF_STAGES)
def test_levels_are_named_by_their_stage_and_come_in_the_order_of_strides(type_name: str) -> None:
    family = backbone_registry().resolve(type_name).family
    config = family.config.model_validate(small(type_name, out_indices=[3, 1]))
    by_stride = family.config.model_validate(small(type_name, strides=[32, 8]))
    for asked, names in ((config, ["p1", "p3"]), (by_stride, ["p3", "p1"])):
        levels = asked.levels(family.describe(asked))
        assert [level.name for level in levels] == names
        with torch.inference_mode():
            found = family.build(asked).eval()(torch.zeros(1, 3, 64, 96), [level.node for level in levels])
        sizes = [tuple(found[level.node].shape[2:]) for level in levels]
        assert sorted(sizes) == [(2, 3), (8, 12)]


@pytest.mark.parametrize("type_name", ["detrex.EVAViT", "detrex.EVA02_ViT"])
def test_the_one_map_is_called_as_the_config_says(type_name: str, http: httpx.Client) -> None:
    for keys in ({"out_feature": "map"}, {"out_feature": "map", "strides": [8]}):
        reply = http.post("/backbones/inspect", json={"backbone": small(type_name, **keys)}).json()
        assert [(level["name"], level["stride"]) for level in reply["levels"]] == [("map", 8)]


def test_a_norm_is_the_same_by_each_of_its_paths() -> None:
    keys = {
        EVA_FAMILY.config.model_validate(small("detrex.EVAViT", norm_layer=norm)).key()
        for norm in (
            "torch.nn.LayerNorm",
            "torch.nn.modules.normalization.LayerNorm",
            "detrex.modeling.backbone.eva.LayerNormWithForceFP32",
            {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-5},
        )
    }
    assert len(keys) == 1


@pytest.mark.parametrize("name", ["dino_eva01_base", "dino_eva02_base"])
def test_the_pyramid_around_an_eva_has_the_levels_of_dino(name: str, http: httpx.Client) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": f"detrex/{name}"})
    levels = [(level["name"], level["stride"], level["channels"]) for level in reply.json()["levels"]]
    assert levels == [("p3", 8, 256), ("p4", 16, 256), ("p5", 32, 256), ("p6", 64, 256)]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_name", "pointer", "keys"),
    [
        ("detrex.ConvNeXt", "out_indices/0", {"out_indices": [-1]}),
        ("detrex.ConvNeXt", "out_indices/0", {"out_indices": [4]}),
        ("detrex.ConvNeXt", "out_indices", {"out_indices": [1, 1]}),
        ("detrex.ConvNeXt", "depths/3", {"depths": [1, 1, 1]}),
        ("detrex.ConvNeXt", "frozen_stages", {"frozen_stages": 5}),
        ("detrex.FocalNet", "frozen_stages", {"frozen_stages": 6}),
        ("detrex.FocalNet", "focal_levels", {"focal_levels": [3]}),
        ("detrex.FocalNet", "focal_windows/1", {"focal_windows": [3, 4, 3, 3]}),
        ("detrex.FocalNet", "out_indices/0", {"out_indices": [4]}),
        ("detrex.InternImage", "groups/0", {"groups": [3, 2, 4, 8]}),
        ("detrex.InternImage", "groups", {"groups": [1, 2]}),
        ("detrex.InternImage", "dw_kernel_size", {"dw_kernel_size": 4}),
        ("detrex.InternImage", "norm_layer", {"norm_layer": "GN"}),
        ("detrex.EVAViT", "num_heads", {"num_heads": 3}),
        ("detrex.EVAViT", "img_size", {"img_size": 4, "use_rel_pos": True}),
        ("detrex.EVAViT", "interp_type", {"interp_type": "nearest"}),
        ("detrex.EVAViT", "interp_type", {"interp_type": "beit", "use_rel_pos": True, "img_size": 4096}),
        ("detrex.EVA02_ViT", "num_heads", {"num_heads": 8}),
        ("detrex.EVA02_ViT", "window_size", {"window_size": 0}),
        ("detrex.EVA02_ViT", "window_size", {"intp_freq": False, "window_block_indexes": [0]}),
        ("detrex.EVA02_ViT", "img_size", {"img_size": 4096, "patch_size": 1}),
        ("detrex.EVA02_ViT", "rel_pos_zero_init", {"rel_pos_zero_init": False}),
    ],
)
def test_what_the_library_cannot_run_is_refused_at_its_key(
    type_name: str, pointer: str, keys: dict[str, Any], http: httpx.Client
) -> None:
    reply = http.post("/backbones/inspect", json={"backbone": small(type_name, **keys)})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["pointer"] == f"#/backbone/{pointer}"


def test_windows_do_not_make_a_long_thin_image_enormous() -> None:
    keys = {"window_size": 100, "window_block_indexes": [0], "patch_size": 1, "img_size": 32}
    config = EVA_FAMILY.config.model_validate(small("detrex.EVAViT", **keys))
    with torch.device("meta"), pytest.raises(TooLarge, match="the limit is 65536"):
        EVA_FAMILY.build(config)(torch.empty(1, 3, 2, 8000), ["map"])


def test_positions_among_the_places_of_a_long_thin_image_are_not_all_written_down() -> None:
    config = EVA_FAMILY.config.model_validate(small("detrex.EVAViT", use_rel_pos=True))
    with torch.device("meta"), pytest.raises(TooLarge, match="among 8192 and 8192 patches a side"):
        EVA_FAMILY.build(config)(torch.empty(1, 3, 8, 65_536), ["map"])


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [DETREX_CONVNEXT, FOCALNET])
def test_a_classifiers_file_has_no_output_norms(family: Any) -> None:
    type_name = "detrex.ConvNeXt" if family is DETREX_CONVNEXT else "detrex.FocalNet"
    config = family.config.model_validate(small(type_name))
    state = family.build(config).state_dict()
    norms = {f"norm{stage}.{name}" for stage in range(4) for name in ("weight", "bias")}
    classifier = {name: tensor for name, tensor in state.items() if name not in norms}
    network, keys = family.load(config, {**classifier, "norm.weight": torch.zeros(16)}, REF)
    assert (set(keys.missing), keys.unexpected) == (norms, ("norm.weight",))
    assert network.norm3.weight.tolist() == [1.0] * len(network.norm3.weight)
    with pytest.raises(CheckpointMismatch):
        family.load(config, {name: state[name] for name in state if not name.startswith("norm3")}, REF)


def test_a_file_may_have_the_tables_of_positions_below_every_block() -> None:
    config = eva02(window_block_indexes=[0])
    network = EVA02_FAMILY.build(config)
    tables = {
        f"{module}.{name}": getattr(network.get_submodule(module), name)
        for module in ("rope_win", "rope_glb", "blocks.0.attn.rope", "blocks.1.attn.rope")
        for name in ("freqs_cos", "freqs_sin")
    }
    state = network.state_dict()
    _, keys = EVA02_FAMILY.load(config, {**state, **tables}, REF)
    assert (keys.loaded, keys.unexpected) == (len(state) + len(tables), ())
    # Those of another size are of no use: they follow from this config's.
    _, keys = EVA02_FAMILY.load(eva02(window_block_indexes=[0], img_size=64), {**state, **tables}, REF)
    assert set(keys.unexpected) == {name for name in tables if "glb" in name or "blocks.1" in name}


# --- formulas -------------------------------------------------------------------------------------


def test_samples_without_offsets_are_the_window_around_each_position() -> None:
    maps = torch.randn(2, 5, 7, 4, generator=torch.Generator().manual_seed(0))
    offsets, weights = torch.zeros(2, 5, 7, 2, POINTS, 2), torch.full((2, 5, 7, 2, POINTS), 1 / POINTS)
    found = sample_and_sum(maps, offsets, weights, 1.0)
    means = F.avg_pool2d(maps.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, means, rtol=1e-5, atol=1e-6)


def test_an_offset_moves_its_point_right_and_down() -> None:
    maps = torch.randn(1, 6, 8, 2, generator=torch.Generator().manual_seed(0))
    offsets, weights = torch.zeros(1, 6, 8, 1, POINTS, 2), torch.zeros(1, 6, 8, 1, POINTS)
    # Points go down each column: the second is left of the position.
    weights[..., 1] = 1
    offsets[..., 1, :] = torch.tensor([3.0, 1.0])
    found = sample_and_sum(maps, offsets, weights, 1.0)
    torch.testing.assert_close(found[:, :5, :6], maps[:, 1:, 2:], rtol=1e-5, atol=1e-5)
    assert not found[:, 5:].any()
    assert not found[:, :, 6:].any()


def test_a_spline_goes_through_its_points_and_along_any_cubic_even_beyond_them() -> None:
    places = table_places(13)
    torch.testing.assert_close(spline_weights(places, places), torch.eye(13, dtype=torch.float64))
    targets = torch.linspace(-14, 14, 29, dtype=torch.float64)
    cubic = 0.01 * places**3 - 0.2 * places**2 + places - 3
    found = spline_weights(places, targets) @ cubic
    torch.testing.assert_close(found, 0.01 * targets**3 - 0.2 * targets**2 + targets - 3)


def test_a_table_too_short_for_a_spline_is_an_error_of_the_config() -> None:
    with pytest.raises(InvalidConfig) as refused:
        resampling(3, 9)
    assert refused.value.faults[0].pointer == "#/backbone/interp_type"


def test_rotated_positions_fit_one_number_of_patches() -> None:
    network = EVA02_FAMILY.build(eva02()).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 32, 32), ["map"])["map"].shape == (1, 16, 4, 4)
        with pytest.raises(InvalidConfig) as refused:
            network(torch.zeros(1, 3, 32, 40), ["map"])
        assert refused.value.faults[0].pointer == "#/backbone/img_size"
        windowed = EVA02_FAMILY.build(eva02(window_block_indexes=[0, 1])).eval()
        assert windowed(torch.zeros(1, 3, 40, 24), ["map"])["map"].shape == (1, 16, 5, 3)
