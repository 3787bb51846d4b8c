"""What mmpretrain's `out_type` makes of the tokens of a layer, for transformers that are not VisionTransformers.

Nodes are `11.raw`, `11.cls_token`, `11.featmap`, `11.avg_featmap`, as in `vision_transformer`; the mean has no norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from service.backbones.base import Indices, levels_by_index
from service.backbones.openmmlab import SpecConfig
from service.backbones.vision_transformer import LAYOUTS, OutType
from service.config.spec import Description, FeatureInfo, Level
from service.errors import InvalidConfig


def token_features(width: int, stride: int, has_cls_token: Sequence[bool]) -> tuple[FeatureInfo, ...]:
    """Every output of every layer, of which some have a class token; only the maps have a stride."""
    kinds: tuple[OutType, ...] = ("raw", "cls_token", "featmap", "avg_featmap")
    return tuple(
        FeatureInfo(layer, f"{layer}.{kind}", width, stride if kind == "featmap" else None, LAYOUTS[kind])
        for layer, has_token in enumerate(has_cls_token)
        for kind in kinds
        if has_token or kind != "cls_token"
    )


def parse_node(node: str) -> tuple[int, str]:
    """The layer and the kind of output of a node."""
    index, _, kind = node.partition(".")
    return int(index), kind


def token_output(tokens: Tensor, grid: tuple[int, int], kind: str, *, has_cls_token: bool) -> Tensor:
    """[n, l, c] as a kind of output: [n, l, c], [n, c] or [n, c, rows, columns] of `grid`."""
    if kind == "raw":
        return tokens
    if kind == "cls_token":
        return tokens[:, 0]
    patches = tokens[:, int(has_cls_token) :]
    if kind == "featmap":
        return patches.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
    return patches.mean(dim=1)


class TokenConfig(SpecConfig):
    """The keys of a transformer whose layers are returned by `out_indices` as `out_type` says."""

    out_indices: Indices = Field((-1,), description="Layers from 0; negative ones count from the end.")
    out_type: OutType = Field("cls_token", description="What of a layer is returned.")

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`.

        Raises:
            InvalidConfig: no such layer, or one without a class token where that is asked for.
        """
        nodes = {feature.node for feature in description.features}
        levels = []
        for level in levels_by_index(self.out_indices, description.features):
            node = f"{level.index}.{self.out_type}"
            if node not in nodes:
                detail = f"layer {level.index} has no {self.out_type}"
                raise InvalidConfig("#/backbone/out_indices", detail)
            levels.append(Level(level.index, str(level.index), node))
        return tuple(levels)
