"""What happens to a level between the backbone and the reply: pooling and normalising."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from service.config.spec import Layout
from service.errors import InvalidConfig
from service.necks.base import LevelFacts

Pool = Literal["none", "avg", "max", "gem", "cls"]
GEM_POWER = 3.0
GEM_FLOOR = 1e-6


def _gem(positions: Tensor) -> Tensor:
    """Generalised mean with p=3 (Radenović et al., "Fine-tuning CNN image retrieval", equation 3)."""
    return positions.clamp(min=GEM_FLOOR).pow(GEM_POWER).mean(dim=-1).pow(1 / GEM_POWER)


# over the last dimension of [n, c, positions]
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda positions: positions.mean(dim=-1),
    "max": lambda positions: positions.amax(dim=-1),
    "gem": _gem,
}


def refuse_pool(pool: Pool, facts: Sequence[LevelFacts], prefix_tokens: int) -> None:
    """Refuse a pool that a level cannot give, before anything is computed.

    Raises:
        InvalidConfig: `cls` of a map, or of tokens without a class token.
    """
    if pool != "cls":
        return
    for level in facts:
        if level.layout in ("NCHW", "NCL") or (level.layout == "NLC" and not prefix_tokens):
            raise InvalidConfig("#/pool", f"level {level.name} has no class token")


def pool_level(
    feature: Tensor,
    layout: Layout,
    pool: Pool,
    prefix_tokens: int,
    valid: Sequence[tuple[float, float]] | None,
) -> Tensor:
    """One level pooled to [n, c]; vectors stay as they are.

    Args:
        feature: [n, c, h, w], [n, l, c] (its first `prefix_tokens` tokens are not patches), [n, c, l] or [n, c].
        valid: for each image the fraction of height and of width that is not padding; None if nothing is.
    """
    if pool == "none" or layout == "NC":
        return feature
    if layout == "NCL":
        return POOLS[pool](feature)
    if layout == "NLC":
        return feature[:, 0] if pool == "cls" else POOLS[pool](feature[:, prefix_tokens:].transpose(1, 2))
    if valid is None:
        return POOLS[pool](feature.flatten(2))
    height, width = feature.shape[2:]
    images = [
        POOLS[pool](image[:, : math.ceil(part_h * height), : math.ceil(part_w * width)].flatten(1))
        for image, (part_h, part_w) in zip(feature, valid, strict=True)
    ]
    return torch.stack(images)


def normalize_level(feature: Tensor, layout: Layout) -> Tensor:
    """L2 over channels; pooled features are [n, c], whatever their layout was."""
    return F.normalize(feature, dim=-1 if layout == "NLC" else 1)
