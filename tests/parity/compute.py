"""What our networks give for a parity pack, in this process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from service.backbones.catalogue import backbone_registry
from service.backbones.lazyconfig import from_lazyconfig
from service.backbones.registry import json_type
from service.backbones.translation import load_any
from service.config.spec import WeightsRef
from service.necks.base import LevelFacts, NeckFamily
from service.necks.catalogue import neck_registry
from tests.parity.packs import Pack, relative_error


def error_of(pack: Pack) -> float:
    """The largest relative L2 error over the levels of a pack."""
    found = neck_levels(pack) if pack.is_neck else backbone_levels(pack)
    pairs = zip(found, pack.outputs, strict=True)
    return max(relative_error(level.numpy(), expected) for level, expected in pairs)


@torch.inference_mode()
def backbone_levels(pack: Pack) -> list[Tensor]:
    """The levels of a backbone with the pack's weights, of the pack's image."""
    given = from_lazyconfig(pack.config)
    resolved = backbone_registry().resolve(json_type(given, pointer=""))
    raw = {**given, "type": resolved.type}
    config = resolved.family.config.model_validate(raw, context={"scope": resolved.scope})
    state = {pack.prefix + name: tensor for name, tensor in pack.state().items()}
    network, _ = load_any(resolved.family, config, state, WeightsRef("pack.pth", pack.prefix))
    levels = config.levels(resolved.family.describe(config))
    found = network.eval()(torch.from_numpy(pack.input_arrays()[0]), [level.node for level in levels])
    return [found[level.node] for level in levels]


@torch.inference_mode()
def neck_levels(pack: Pack) -> list[Tensor]:
    """The levels of a neck with the pack's weights, of the pack's levels."""
    family = neck_family(pack)
    config = family.config.model_validate(pack.config)
    neck, _ = family.load(config, neck_inputs(pack), pack.state(), WeightsRef("pack.pth"))
    levels: list[Tensor] = neck.eval()([torch.from_numpy(array) for array in pack.input_arrays()])
    return levels


def neck_family(pack: Pack) -> NeckFamily[Any]:
    """The family of the pack's neck."""
    found: NeckFamily[Any] = neck_registry().resolve(pack.config["type"], pointer="#/neck/type").family
    return found


def neck_inputs(pack: Pack) -> list[LevelFacts]:
    """The levels that go into the pack's neck, the first at stride 4."""
    return [LevelFacts(i, str(i), "NCHW", shape[1], 4 << i) for i, (_, shape) in enumerate(pack.inputs)]
