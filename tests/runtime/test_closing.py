"""A network that is closed gives its weights back at once, although some are part of a cycle."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from service.backbones.catalogue import backbone_registry
from service.config.files import ConfigCatalogue
from service.necks.catalogue import neck_registry
from service.runtime.model import build_model
from service.runtime.plan import Planner


@pytest.fixture
def no_cycles_are_looked_for() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "type_name",
    [
        "timm.resnet18",
        "timm.fasternet_t0",
        "torchvision.resnet18",
        "torchvision.shufflenet_v2_x0_5",
        "mmdet.ResNet",
    ],
)
def test_weights_go_when_a_model_is_closed(type_name: str, no_cycles_are_looked_for: None) -> None:
    config = {"type": type_name, "depth": 18} if type_name == "mmdet.ResNet" else {"type": type_name}
    plan = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(Path())).plan(config)
    model = build_model(plan, None, torch.device("cpu"))
    nodes = tuple(level.node for level in plan.levels)
    model.engine.run(np.zeros((1, 3, 64, 64), np.float32), nodes, "float32", crowded=False)
    weights = [weakref.ref(weight) for weight in model.engine.backbone.parameters()]  # type: ignore[attr-defined]
    assert weights
    model.close()
    assert all(weight() is None for weight in weights)
