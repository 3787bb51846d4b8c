"""Encoders of masked pretraining: what packs do not show."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from service.backbones.catalogue import backbone_registry
from service.errors import InvalidConfig
from service.validation import invalid

REGISTRY = backbone_registry()
TINY = {"embed_dims": 24, "num_layers": 2, "num_heads": 2, "feedforward_channels": 48}


def config_of(raw: dict[str, Any]) -> Any:
    resolved = REGISTRY.resolve(raw["type"])
    return resolved.family.config.model_validate(raw, context={"scope": resolved.scope})


def pointer_of(raw: dict[str, Any]) -> str:
    try:
        config_of(raw)
    except InvalidConfig as error:
        return error.faults[0].pointer
    except ValueError as error:
        return invalid(error, "#/backbone").faults[0].pointer  # type: ignore[arg-type] # pydantic's is one
    raise AssertionError(f"accepted: {raw}")


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"type": "mmpretrain.MAEViT", "with_cls_token": False}, "with_cls_token"),
        ({"type": "mmpretrain.MAEViT", "output_cls_token": True}, "output_cls_token"),
        ({"type": "mmpretrain.MAEViT", "mask_ratio": 1}, "mask_ratio"),
        ({"type": "mmpretrain.MoCoV3ViT", "arch": "mocov3-small"}, "patch_size"),
        ({"type": "mmpretrain.VisionTransformer", "arch": "mocov3-small"}, "arch"),
        ({"type": "mmselfsup.MoCoV3ViT", "patch_size": 16, "out_type": "raw"}, "out_type"),
        ({"type": "mmpretrain.CAEPretrainViT"}, "layer_scale_init_value"),
        ({"type": "mmpretrain.CAEPretrainViT", "use_abs_pos_emb": False}, "use_abs_pos_emb"),
        ({"type": "mmpretrain.BEiTPretrainViT", "img_size": 230}, "img_size"),
        ({"type": "mmpretrain.SimMIMSwinTransformer", "window_size": 6}, "window_size"),
        ({"type": "mmpretrain.MAEHiViT", "ape": False}, "ape"),
        ({"type": "mmpretrain.iTPNHiViT", "reconstruction_type": "dino"}, "reconstruction_type"),
    ],
)
def test_what_the_library_does_not_take_is_refused(raw: dict[str, Any], key: str) -> None:
    assert pointer_of(raw) == f"#/backbone/{key}"


def test_what_only_masking_reads_makes_no_second_model() -> None:
    plain = {"type": "mmpretrain.MAEViT", "arch": TINY, "img_size": 32}
    assert config_of({**plain, "mask_ratio": 0.5, "out_type": "featmap"}).key() == config_of(plain).key()
    moco = {"type": "mmpretrain.MoCoV3ViT", "arch": TINY, "img_size": 32, "patch_size": 16}
    assert config_of({**moco, "stop_grad_conv1": True}).key() == config_of(moco).key()


@pytest.mark.parametrize(
    ("raw", "constant"),
    [
        ({"type": "mmpretrain.MixMIMTransformer", "arch": "base"}, {"absolute_pos_embed"}),
        (
            {"type": "mmselfsup.ResNetSobel", "depth": 18},
            {f"sobel_layer.sobel.{place}.{leaf}" for place in "01" for leaf in ("weight", "bias")},
        ),
        (
            {"type": "mmpretrain.MoCoV3ViT", "arch": TINY, "patch_size": 16, "stop_grad_conv1": True},
            {"patch_embed.projection.weight", "patch_embed.projection.bias"},
        ),
    ],
)
def test_what_never_learns_is_listed_though_nothing_is_frozen(
    raw: dict[str, Any], constant: set[str], http: httpx.Client
) -> None:
    told = http.post("/backbones/inspect", json={"backbone": raw}).json()
    assert set(told["frozen"]["parameters"]) == constant


def test_a_former_name_has_the_defaults_of_its_library(http: httpx.Client) -> None:
    former = {"type": "BEiT", "arch": TINY, "img_size": 32, "output_cls_token": True}
    names = [
        level["name"] for level in http.post("/backbones/inspect", json={"backbone": former}).json()["levels"]
    ]
    assert names == ["1", "1.cls"]
    page = http.get("/backbones/mmcls.BEiT").json()
    assert page["type"] == "mmpretrain.BEiTViT"
    assert {"mmcls.BEiT", "mmcls.BEiTViT"} <= set(page["aliases"])


@pytest.mark.parametrize(
    ("type_name", "key", "entry"),
    [
        ("mmpretrain.VisionTransformer", "layer_cfgs", {"act_cfg": {"type": "QuickGELU"}}),
        ("mmpretrain.BEiTViT", "layer_cfgs", {"bias": True}),
        ("mmpretrain.SwinTransformer", "stage_cfgs", {"block_cfgs": {"window_size": 6}}),
    ],
)
def test_a_list_with_the_same_for_each_layer_is_that_for_all(type_name: str, key: str, entry: Any) -> None:
    once, often = {"type": type_name, key: entry}, {"type": type_name, key: [entry] * 12}
    assert config_of(often).key() == config_of(once).key() != config_of({"type": type_name}).key()
    assert pointer_of({"type": type_name, key: [entry, {}]}) == f"#/backbone/{key}"
    assert pointer_of({"type": type_name, key: []}) == f"#/backbone/{key}"
