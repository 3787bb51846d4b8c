"""Norm layers as OpenMMLab configs name them, and which modules count as norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

NormKind = Literal["bn", "gn", "ln"]
BATCH_NORMS = (_BatchNorm,)
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)

# mmcv names a norm after its class: `bn1`, `gn1`. Synchronised statistics change nothing in a forward
# pass in eval mode, so every batch norm is one kind.
KINDS: dict[str, NormKind] = {
    "BN": "bn",
    "BN2d": "bn",
    "SyncBN": "bn",
    "MMSyncBN": "bn",
    "GN": "gn",
    "LN": "ln",
}
Eps = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class NormSpec:
    """What decides a norm layer's numbers and the name of its weights: `kind` is how their key starts."""

    kind: NormKind = "bn"
    eps: float = 1e-5
    groups: int | None = None


BATCH_NORM = NormSpec()


class NormConfig(BaseModel):
    """OpenMMLab's `norm_cfg` for maps: `{"type": "BN", "requires_grad": true}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["BN", "BN2d", "SyncBN", "MMSyncBN", "GN"]
    requires_grad: bool = Field(True, description="False freezes weight and bias of every norm layer.")
    eps: Eps = 1e-5
    momentum: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Matters in training only."
    )
    num_groups: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = Field(None, description="GN only.")

    def spec(self) -> NormSpec:
        """The neutral spelling."""
        return NormSpec(KINDS[self.type], self.eps, self.num_groups)

    def fault(self) -> str | None:
        """What is wrong with `num_groups`, if anything: GN needs it and nothing else takes it."""
        if self.type == "GN" and self.num_groups is None:
            return "GN needs num_groups"
        if self.type != "GN" and self.num_groups is not None:
            return f"num_groups is for GN, not for {self.type}"
        return None


class LayerNormConfig(BaseModel):
    """OpenMMLab's `norm_cfg` for tokens: `{"type": "LN", "eps": 1e-6}`; without `eps` mmcv takes 1e-5."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["LN"]
    requires_grad: bool = Field(True, description="False freezes weight and bias of every norm layer.")
    eps: Eps = 1e-5


class GroupNorm(nn.GroupNorm):
    """Group norm of maps down to a single value a group, which `nn.GroupNorm` refuses as useless in training."""

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return torch.group_norm(maps, self.num_groups, self.weight, self.bias, self.eps)


def _group_norm(spec: NormSpec, channels: int) -> nn.Module:
    if spec.groups is None:
        raise ValueError("a group norm needs its number of groups")
    return GroupNorm(spec.groups, channels, eps=spec.eps)


MAKERS: dict[NormKind, Callable[[NormSpec, int], nn.Module]] = {
    "bn": lambda spec, channels: nn.BatchNorm2d(channels, eps=spec.eps),
    "gn": _group_norm,
    "ln": lambda spec, channels: nn.LayerNorm(channels, eps=spec.eps),
}


def make_norm(spec: NormSpec, channels: int) -> nn.Module:
    """A norm layer over `channels`."""
    return MAKERS[spec.kind](spec, channels)
