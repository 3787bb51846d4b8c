"""What the tests of the residual families share: small networks of any type, their maps, their refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from service.backbones.base import Family
from service.backbones.catalogue import backbone_registry
from service.backbones.resnet import ResidualConfig, ResNet
from service.errors import InvalidConfig
from service.validation import invalid

REGISTRY = backbone_registry()
SMALL = {"depth": 50, "base_channels": 8, "stem_channels": 8}


def family_of(type_name: str) -> Family[Any]:
    return REGISTRY.resolve(type_name).family


def config_of(type_name: str, **keys: Any) -> ResidualConfig:
    chosen: ResidualConfig = family_of(type_name).config.model_validate({"type": type_name, **keys})
    return chosen


def small(type_name: str, **keys: Any) -> ResidualConfig:
    """A config of depth 50 with few channels."""
    slices = {"base_width": 4} if type_name.endswith("Res2Net") else {}
    return config_of(type_name, **{**SMALL, **slices, **keys})


def built(chosen: ResidualConfig) -> ResNet:
    torch.manual_seed(0)
    network = family_of(chosen.type).build(chosen).eval()
    assert isinstance(network, ResNet)
    return network


def indices(chosen: ResidualConfig) -> list[int]:
    return [level.index for level in chosen.levels(family_of(chosen.type).describe(chosen))]


def maps(chosen: ResidualConfig, network: ResNet, size: tuple[int, int] = (64, 96)) -> Mapping[str, Tensor]:
    """What the levels of a config are for one image."""
    images = torch.randn(1, chosen.in_channels, *size, generator=torch.Generator().manual_seed(1))
    nodes = [level.node for level in chosen.levels(family_of(chosen.type).describe(chosen))]
    with torch.inference_mode():
        return network(images, nodes)


def assert_maps_are_as_described(chosen: ResidualConfig, size: tuple[int, int] = (64, 96)) -> None:
    found = maps(chosen, built(chosen), size)
    for feature in family_of(chosen.type).describe(chosen).features:
        if feature.node in found:
            assert feature.stride is not None
            height, width = (-(-side // feature.stride) for side in size)
            assert found[feature.node].shape == (1, feature.channels, height, width)
            assert torch.isfinite(found[feature.node]).all()


def pointer_of(type_name: str, **keys: Any) -> str:
    """Where the refusal of these keys points."""
    try:
        chosen = config_of(type_name, **keys)
        chosen.weights()
        indices(chosen)
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {keys}")
