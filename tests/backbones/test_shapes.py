"""The rules for shapes say what torch's own meta kernels say, and keep its compiler out of the process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.backbones.catalogue import backbone_registry
from service.backbones.shapes import RULES, ShapeRules, shapes_only
from service.config.files import ConfigCatalogue
from service.necks.catalogue import neck_registry
from service.runtime.plan import Planner
from tests.processes import ROOT

TYPES = (
    "mmpretrain.ResNet",
    "mmpretrain.VisionTransformer",
    "mmpretrain.SwinTransformer",
    "mmpretrain.MobileNetV3",
    "mmpretrain.ConvNeXt",
    "mmpretrain.EdgeNeXt",
    "mmdet.HRNet",
    "mmyolo.YOLOv5CSPDarknet",
    "detectron2.MViT",
    "detectron2.SwinTransformer",
    "detrex.InternImage",
    "timm.efficientnet_b0",
)


def look(tensor: Tensor) -> tuple[Any, ...]:
    """What a rule has to get right; the stride of a side of 1 says nothing."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.dtype, tuple((side, stride if side > 1 else None) for side, stride in sides)


class Compared(ShapeRules):
    """Asks torch too, whatever the rules say."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = 0
        self.wrong: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        tensors = rule is not None and bool(args) and isinstance(args[0], Tensor | list | tuple)
        made = rule(*args, **(kwargs or {})) if rule is not None and tensors else None
        real = func(*args, **(kwargs or {}))
        if made is not None:
            self.checked += 1
            if look(made) != look(real):
                self.wrong.append((func, look(made), look(real)))
        return real


@pytest.mark.parametrize("type_name", TYPES)
def test_every_operator_gives_what_torch_gives(type_name: str) -> None:
    planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(ROOT / "model_configs"))
    resolved = planner.backbones.resolve(type_name)
    plan = planner.plan({**resolved.family.example(resolved.type), "type": resolved.type})
    with torch.device("meta"), torch.inference_mode():
        backbone = plan.family.build(plan.config).eval()
        with Compared() as compared:
            backbone(torch.empty((1, 3, *plan.input_size)), plan.nodes)
    assert compared.checked > 10
    assert compared.wrong == []


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nn.Conv2d(4, 8, 3)(x),
        lambda x: nn.Conv2d(3, 8, 9)(x),
        lambda x: nn.Linear(5, 2)(x),
        lambda x: x + torch.empty(1, 3, 8, 7),
        lambda x: torch.cat([x, torch.empty(1, 4, 7, 8)], dim=1),
        lambda x: x @ torch.empty(1, 3, 7, 8),
        lambda x: nn.MaxPool2d(2, padding=2)(x),
        lambda x: nn.functional.layer_norm(x, (7,)),
    ],
)
def test_what_does_not_fit_is_refused_as_torch_refuses_it(call: Any) -> None:
    with torch.device("meta"), pytest.raises(RuntimeError):
        call(torch.empty(1, 3, 8, 8))
    with shapes_only(), pytest.raises(RuntimeError):
        call(torch.empty(1, 3, 8, 8))


def test_describing_common_networks_imports_no_compiler() -> None:
    code = """
import sys, torch
from pathlib import Path
from service.backbones.catalogue import backbone_registry
from service.config.files import ConfigCatalogue
from service.necks.catalogue import neck_registry
from service.runtime.plan import Planner
planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(Path("model_configs")))
for config in ({"type": "ResNet", "depth": 50}, {"type": "VisionTransformer", "arch": "base"},
               {"type": "mmpretrain.ConvNeXt", "arch": "tiny"}, {"type": "mmpretrain.SwinTransformer", "arch": "tiny"}):
    planner.levels_at(planner.plan(config), (224, 224))
    planner.cost(planner.plan(config), (224, 224), "#")
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
