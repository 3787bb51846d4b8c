"""RIFormer (Wang et al., arXiv:2304.05659) with mmpretrain's key names: PoolFormer without any mixing of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import InputChannels
from service.backbones.norms import make_norm
from service.backbones.openmmlab import Scale, frozen_by_stage, make_family
from service.backbones.poolformer import (
    ARCHS,
    FeedForward,
    FormerConfig,
    PoolFormer,
    PoolFormerSpec,
    may_lack_norms,
)
from service.config.spec import Freeze, FreezeReport


@dataclass(frozen=True)
class RIFormerSpec(PoolFormerSpec):
    """What decides the numbers and the names of the weights; `deploy` is the factors merged into the norms."""

    deploy: bool = False


class Affine(nn.Module):
    """What a factor and an offset a channel add to a map; key `affine`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.affine = nn.Conv2d(width, width, 1, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        scaled: Tensor = self.affine(maps)
        return scaled - maps


class Block(Scale):
    """An affine layer and a feed-forward network, each with a scaled residual.

    Keys `layer_scale_1`, `norm1` and `token_mixer` (in deployed networks `norm_reparam` for both), `norm2`, `mlp`.
    """

    def __init__(self, spec: RIFormerSpec, stage: int) -> None:
        super().__init__()
        width, self.initial, self.deploy = spec.widths[stage], spec.layer_scale, spec.deploy
        self.layer_scale_1 = nn.Parameter(torch.empty(width))
        self.layer_scale_2 = nn.Parameter(torch.empty(width))
        if spec.deploy:
            self.norm_reparam = make_norm(spec.norm, width)
        else:
            self.norm1 = make_norm(spec.norm, width)
            self.token_mixer = Affine(width)
        self.norm2 = make_norm(spec.norm, width)
        self.mlp = FeedForward(width, int(width * spec.ratios[stage]), spec.activation)

    def start(self) -> None:
        """The residual branches begin at the architecture's scale."""
        nn.init.constant_(self.layer_scale_1, self.initial)
        nn.init.constant_(self.layer_scale_2, self.initial)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        affine = self.norm_reparam(maps) if self.deploy else self.token_mixer(self.norm1(maps))
        maps = maps + self.layer_scale_1[:, None, None] * affine
        mixed: Tensor = maps + self.layer_scale_2[:, None, None] * self.mlp(self.norm2(maps))
        return mixed


class RIFormer(PoolFormer):
    """Stages and strided convolutions in one list, `network`; layers that are asked for have a norm."""

    def make_block(self, spec: PoolFormerSpec, stage: int) -> nn.Module:
        """One block of a stage."""
        assert isinstance(spec, RIFormerSpec)
        return Block(spec, stage)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is `patch_embed` and `network.0` to `network.k` with their output norms."""

        def names(stages: int) -> Sequence[str]:
            layers = range(stages + 1)
            return ["patch_embed", *(name for i in layers for name in (f"network.{i}", f"norm{i}"))]

        return frozen_by_stage(self, freeze, names)


# --- mmpretrain.RIFormer --------------------------------------------------------------------------


class RIFormerConfig(FormerConfig):
    """`mmpretrain.RIFormer`."""

    NETWORK: ClassVar[str] = "RIFormer"

    in_channels: InputChannels = 3
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=14)] = Field(
        -1, description="-1 nothing, k the patch embedding and layers 0 to k with their output norms."
    )
    deploy: bool = Field(False, description="Weights whose affine layers are merged into the norms.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        last = 2 * len(self.plan()[1]) - 2
        if self.frozen_stages > last:
            yield "frozen_stages", f"{self.frozen_stages} is not a layer of 0 to {last}"

    def spec(self) -> RIFormerSpec:
        """The neutral spelling."""
        own = {"in_channels": self.in_channels, "deploy": self.deploy}
        return RIFormerSpec(**{**vars(super().spec()), **own})


RIFORMER = make_family(
    RIFormerConfig,
    RIFormer,
    example={"arch": "s12", "out_indices": [0, 2, 4, 6]},
    architectures=tuple(ARCHS),
    optional=may_lack_norms,
)
