"""Darknet-53: what parity packs do not show of its spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from service.backbones.darknet import DARKNET, DarknetConfig
from service.config.spec import WeightsRef
from service.errors import InvalidConfig
from service.validation import invalid


def config(**keys: Any) -> DarknetConfig:
    return DarknetConfig.model_validate({"type": "mmdet.Darknet", **keys})


def test_the_first_convolution_is_level_0_at_full_size() -> None:
    described = DARKNET.describe(config())
    assert [(feature.index, feature.stride) for feature in described.features] == [
        (0, 1),
        (1, 2),
        (2, 4),
        (3, 8),
        (4, 16),
        (5, 32),
    ]
    assert described.parameters == 40_584_928
    assert [level.index for level in config().levels(described)] == [3, 4, 5]


def test_all_six_layers_can_be_frozen_and_norms_stay_in_eval() -> None:
    with torch.device("meta"):
        network = DARKNET.build(config())
    everything = network.frozen(config(frozen_stages=6).freeze())
    assert len(everything.parameters) == everything.of
    nothing = network.frozen(config(frozen_stages=0, norm_eval=False).freeze())
    assert (nothing.parameters, nothing.norms) == ((), ())


def test_the_deprecated_spelling_of_a_checkpoint_is_understood() -> None:
    chosen = config(pretrained="open-mmlab://darknet53")
    assert chosen.weights() == WeightsRef("open-mmlab://darknet53", pointer="#/backbone/pretrained")
    assert chosen.key() == config().key() != config(act_cfg={"type": "LeakyReLU"}).key()


@pytest.mark.parametrize(
    ("keys", "pointer"),
    [
        ({"depth": 19}, "depth"),
        ({"out_indices": [6]}, "out_indices/0"),
        ({"frozen_stages": 7}, "frozen_stages"),
        ({"norm_cfg": {"type": "GN", "num_groups": 48}}, "norm_cfg/num_groups"),
        ({"pretrained": "a.pth", "checkpoint": "b.pth"}, "pretrained"),
    ],
)
def test_a_bad_key_is_refused_by_its_place(keys: dict[str, Any], pointer: str) -> None:
    with pytest.raises((ValidationError, InvalidConfig)) as caught:
        config(**keys).levels(DARKNET.describe(config(**keys)))
    error = caught.value
    faults = error.faults if isinstance(error, InvalidConfig) else invalid(error, "#/backbone").faults
    assert faults[0].pointer == f"#/backbone/{pointer}"
