"""GlobalAveragePooling through its family: what comes out, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from service.config.spec import Layout, WeightsRef
from service.errors import InvalidConfig
from service.necks.base import LevelFacts
from service.necks.global_average_pooling import GLOBAL_AVERAGE_POOLING, GlobalAveragePoolingConfig

MAP = LevelFacts(3, "3", "NCHW", 8, 32)


def config(**keys: object) -> GlobalAveragePoolingConfig:
    return GlobalAveragePoolingConfig.model_validate({"type": "mmpretrain.GlobalAveragePooling", **keys})


def test_a_map_becomes_a_vector_under_its_own_name() -> None:
    described = GLOBAL_AVERAGE_POOLING.describe(config(), [MAP, LevelFacts(1, "1", "NCHW", 4, 8)])
    assert described.levels == (LevelFacts(3, "3", "NC", 8, None), LevelFacts(1, "1", "NC", 4, None))
    assert (described.parameters, described.bytes) == (0, 0)


def test_each_map_is_averaged_over_its_pixels() -> None:
    neck = GLOBAL_AVERAGE_POOLING.build(config(), [MAP])
    maps = torch.arange(2 * 8 * 3 * 5, dtype=torch.float32).reshape(2, 8, 3, 5)
    (pooled,) = neck([maps])
    assert pooled.shape == (2, 8)
    assert torch.allclose(pooled, maps.flatten(2).mean(2))


def test_tokens_with_their_channels_first_are_averaged_at_dimension_1() -> None:
    level = LevelFacts(11, "11", "NCL", 8, None)
    described = GLOBAL_AVERAGE_POOLING.describe(config(dim=1), [level])
    assert described.levels == (LevelFacts(11, "11", "NC", 8, None),)
    tokens = torch.arange(2 * 8 * 5, dtype=torch.float32).reshape(2, 8, 5)
    (pooled,) = GLOBAL_AVERAGE_POOLING.build(config(dim=1), [level])([tokens])
    assert torch.equal(pooled, tokens.mean(2))
    with pytest.raises(InvalidConfig) as refused:
        GLOBAL_AVERAGE_POOLING.describe(config(), [level])
    assert refused.value.faults[0].pointer == "#/neck/dim"


@pytest.mark.parametrize("layout", ["NLC", "NC"])
def test_levels_that_are_not_maps_are_refused(layout: Layout) -> None:
    level = LevelFacts(11, "11.cls", layout, 8, None)
    with pytest.raises(InvalidConfig, match=r"takes maps; level 11\.cls is .*") as refused:
        GLOBAL_AVERAGE_POOLING.describe(config(), [MAP, level])
    assert refused.value.faults[0].pointer == "#/neck"


@pytest.mark.parametrize("dim", [1, 3])
def test_a_dim_that_is_not_that_of_maps_is_refused(dim: int) -> None:
    with pytest.raises(InvalidConfig) as refused:
        GLOBAL_AVERAGE_POOLING.build(config(dim=dim), [MAP])
    assert refused.value.faults[0].pointer == "#/neck/dim"


@pytest.mark.parametrize("keys", [{"dim": 4}, {"dim": "2"}, {"in_channels": 8}, {"init_cfg": None}])
def test_unknown_keys_and_values_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(**keys)


def test_it_has_no_weights_under_either_name_of_its_type() -> None:
    assert config().weights() is None
    assert config().key() == config(type="mmcls.GlobalAveragePooling").key()
    neck, keys = GLOBAL_AVERAGE_POOLING.load(config(), [MAP], {}, WeightsRef("any"))
    assert not list(neck.parameters())
    assert keys.loaded == 0
