"""Small necks and levels for the tests of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from service.config.spec import Layout
from service.errors import InvalidConfig
from service.necks.base import LevelFacts, Neck, NeckConfig, NeckDescription, NeckFamily
from service.necks.catalogue import neck_registry

SIZES: Mapping[Layout, tuple[int, ...]] = {"NC": (), "NCL": (5,), "NCHW": (16, 24)}


def family(type_name: str) -> NeckFamily[Any]:
    found: NeckFamily[Any] = neck_registry().resolve(type_name, pointer="#/neck/type").family
    return found


def facts(widths: Sequence[int], layout: Layout = "NCHW", *, one_index: bool = False) -> list[LevelFacts]:
    """Levels of these widths from stride 4 on, as a backbone gives them."""
    return [
        LevelFacts(0 if one_index else i, str(i), layout, width, 4 << i if layout == "NCHW" else None)
        for i, width in enumerate(widths)
    ]


def config(raw: Mapping[str, Any]) -> NeckConfig:
    found: NeckConfig = family(raw["type"]).config.model_validate(raw)
    return found


def built(raw: Mapping[str, Any], levels: Sequence[LevelFacts]) -> Neck:
    torch.manual_seed(0)
    neck: Neck = family(raw["type"]).build(config(raw), levels)
    for name, buffer in neck.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return neck.eval()


def described(raw: Mapping[str, Any], levels: Sequence[LevelFacts]) -> NeckDescription:
    found: NeckDescription = family(raw["type"]).describe(config(raw), levels)
    return found


def tensors(levels: Sequence[LevelFacts]) -> list[Tensor]:
    """Two images' levels, maps of 16 by 24 pixels and halves of it."""
    torch.manual_seed(1)
    return [
        torch.randn(2, level.channels, *(side >> i for side in SIZES[level.layout]))
        for i, level in enumerate(levels)
    ]


@torch.inference_mode()
def run(neck: Neck, features: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = neck(features)
    return found


def refused(raw: Mapping[str, Any], levels: Sequence[LevelFacts]) -> tuple[str, str]:
    """The pointer and the detail of the error that a config and these levels are refused with."""
    with pytest.raises(InvalidConfig) as error:
        described(raw, levels)
    fault = error.value.faults[0]
    return fault.pointer, fault.detail
