"""A network traced at one size gives what it gives untraced at others, and for other numbers of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.backbones.catalogue import backbone_registry

TINY_SWIN: Mapping[str, Any] = {
    "arch": {"embed_dims": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]},
    "out_indices": [0, 1, 2, 3],
}
SMALL_VIT: Mapping[str, Any] = {"out_indices": [0, 1], "out_type": "featmap"}
# Whose graphs follow the size by what `service.backbones.tracing` has, by type, with what makes them small.
TRACED: Mapping[str, Mapping[str, Any]] = {
    "mmpretrain.SwinTransformer": TINY_SWIN,
    "mmpretrain.DistilledVisionTransformer": SMALL_VIT,
    "mmpretrain.ViTEVA02": SMALL_VIT,
    "mmpretrain.T2T_ViT": SMALL_VIT,
    "mmpretrain.EfficientNet": {"arch": "b0", "out_indices": [2, 4]},
    "mmpretrain.EdgeNeXt": {"arch": "xxsmall"},
    "mmpretrain.MobileViT": {"arch": "xx_small"},
    "mmpretrain.ResNeSt": {"depth": 50, "out_indices": [1]},
    "mmpretrain.SVT": {},
    "detectron2.SwinTransformer": {"depths": [2, 2, 2, 2], "embed_dim": 24},
    "detectron2.ViT": {
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 4,
        "window_block_indexes": [0],
        "img_size": 256,
    },
    "timm.xception41": {"out_indices": [0, 2]},
}
TRACED_SIZE, OTHER_SIZES = (2, 224, 224), ((1, 256, 288), (3, 224, 224))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small take several times as long with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Levels(nn.Module):
    """The levels of a backbone as a tuple, which is what a trace can give."""

    def __init__(self, backbone: nn.Module, nodes: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.nodes = backbone, nodes

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One tensor a level."""
        found: dict[str, Tensor] = self.backbone(images, self.nodes)
        return tuple(found[node] for node in self.nodes)


def levels_of(type_name: str) -> Levels:
    """The levels of a type's example, made small."""
    family = backbone_registry().resolve(type_name).family
    raw = {**family.example(type_name), **TRACED[type_name], "type": type_name}
    config = family.config.model_validate(raw, context={"scope": type_name.partition(".")[0]})
    torch.manual_seed(1)
    network = family.build(config).eval().requires_grad_(False)
    return Levels(network, [level.node for level in config.levels(family.describe(config))]).eval()


def images(shape: Sequence[int]) -> Tensor:
    count, height, width = shape
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("type_name", TRACED)
def test_a_trace_is_for_images_of_any_size_and_number(type_name: str) -> None:
    network = levels_of(type_name)
    with torch.no_grad():
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]  # torch's
            network, images(TRACED_SIZE), check_trace=False, strict=False
        )
        for shape in OTHER_SIZES:
            pairs = zip(traced(images(shape)), network(images(shape)), strict=True)
            for found, expected in pairs:
                assert found.shape == expected.shape
                assert (found - expected).norm() <= 1e-5 * expected.norm()
