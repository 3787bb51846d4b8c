"""What a forward pass computes, counted by shapes, beside what torch's own counter says; and what is refused for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from service.backbones.catalogue import backbone_registry
from service.config.files import ConfigCatalogue
from service.errors import TooLarge
from service.necks.catalogue import neck_registry
from service.runtime.live_bytes import OPERATIONS_OF_A_BYTE, LiveBytes
from service.runtime.model import build_model
from service.runtime.plan import Planner
from service.runtime.speed import Speed
from tests.api.problems import assert_problem
from tests.conftest import ROOT, Serve, encoded, multipart

CONFIGS: list[dict[str, Any]] = [
    {"type": "ResNet", "depth": 18},
    {"type": "VisionTransformer", "arch": "deit-tiny"},
    {"type": "mmpretrain.SwinTransformer", "arch": "tiny"},
    {"type": "timm.convnext_atto"},
]
TOKENS = {"type": "timm.vit_tiny_patch16_224", "dynamic_img_size": True}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(backbone_registry(), neck_registry(), ConfigCatalogue(ROOT / "model_configs"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["type"])
def test_products_are_counted_as_torch_does(planner: Planner, config: dict[str, Any]) -> None:
    plan = planner.plan(config)
    counted = planner.cost(plan, (224, 224))
    backbone = build_model(plan, None, torch.device("cpu")).engine.backbone  # type: ignore[attr-defined]
    live, torchs = LiveBytes(), FlopCounterMode(display=False)
    with torch.no_grad(), torchs:
        backbone(torch.zeros((1, 3, 224, 224)), plan.nodes)
    with torch.inference_mode(), live:
        backbone(torch.zeros((1, 3, 224, 224)), plan.nodes)
    assert 2 * live.products == pytest.approx(torchs.get_total_flops(), rel=0.02)
    assert counted.operations - OPERATIONS_OF_A_BYTE * live.made == pytest.approx(2 * live.products, rel=0.2)


def test_attention_grows_with_the_square_of_the_image(planner: Planner) -> None:
    plan = planner.plan(TOKENS)
    small, large = (planner.cost(plan, (side, side)).operations for side in (2048, 4096))
    assert large > 10 * small


def test_more_than_the_device_does_before_the_deadline_is_refused_with_the_numbers() -> None:
    speed = Speed.of(torch.device("cpu"), cores=2, request_timeout_s=30)
    speed.refuse_slow(speed.limit, "float32")
    with pytest.raises(TooLarge, match=r"16,000 billion operations; .* at most 15,360 billion"):
        speed.refuse_slow(16 * 10**12, "bfloat16")


def test_a_small_file_of_hours_of_attention_is_refused_and_never_begun(serve: Serve) -> None:
    service = serve()
    image = encoded(np.zeros((4992, 4992, 3), np.uint8))
    reply = service.http.post("/features", **multipart(TOKENS, image, preprocess="native"))
    assert_problem(reply, 413)
    assert "billion operations" in reply.json()["detail"]
    assert service.http.get("/models").json()["models"] == []
