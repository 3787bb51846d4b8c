"""What a forward pass holds, counted without memory, beside what it really holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.backbones.catalogue import backbone_registry
from service.config.files import ConfigCatalogue
from service.necks.catalogue import neck_registry
from service.runtime.live_bytes import LiveBytes, coarse
from service.runtime.model import build_model
from service.runtime.plan import Planner
from tests.conftest import ROOT

CONFIGS: list[tuple[dict[str, Any], int]] = [
    ({"type": "ResNet", "depth": 18, "out_indices": [0, 1, 2, 3]}, 256),
    ({"type": "VisionTransformer", "arch": "deit-tiny", "img_size": 224}, 224),
    ({"type": "mmpretrain.SwinTransformer", "arch": "tiny", "img_size": 224}, 224),
    ({"type": "timm.mobilenetv3_small_100", "features_only": True}, 256),
    ({"type": "mmpretrain.ConvNeXt", "arch": "atto"}, 224),
    ({"type": "torchvision.densenet121"}, 224),
]


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(backbone_registry(), neck_registry(), ConfigCatalogue(ROOT / "model_configs"))


@pytest.mark.parametrize(("config", "side"), CONFIGS, ids=lambda value: str(value)[:40])
def test_the_count_is_no_less_than_what_tensors_really_hold(planner, config, side) -> None:
    plan = planner.plan(config)
    counted = planner.cost(plan, (side, side)).bytes
    backbone = build_model(plan, None, torch.device("cpu")).engine.backbone  # type: ignore[attr-defined]
    live = LiveBytes()
    with torch.inference_mode(), live:
        backbone(torch.zeros((1, 3, side, side)), plan.nodes)
    assert live.peak <= counted <= 1.6 * live.peak


def test_the_count_has_what_a_neck_makes(planner) -> None:
    backbone = {"type": "mmdet.ResNet", "depth": 18, "out_indices": [0, 1, 2, 3]}
    neck = {"type": "mmdet.FPN", "in_channels": [64, 128, 256, 512], "out_channels": 256, "num_outs": 5}
    bare = planner.cost(planner.plan(backbone), (256, 256)).bytes
    assert planner.cost(planner.plan(backbone, neck), (256, 256)).bytes > bare + 4 * 256 * 64 * 64


def test_images_of_any_size_need_few_counts(planner) -> None:
    plan = planner.plan({"type": "ResNet", "depth": 18})
    assert planner.known_cost(plan, (1001, 1001)) is None
    counted = planner.cost(plan, (1001, 1001))
    assert planner.known_cost(plan, (1010, 1024)) == counted
    assert planner.known_cost(plan, (1001, 1025)) is None


def test_a_size_is_rounded_up_by_an_eighth_at_most() -> None:
    for side in range(1, 5000):
        assert side <= coarse((side, 1))[0] <= side * 1.125 + 1
