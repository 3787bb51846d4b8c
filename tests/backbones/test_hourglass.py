"""HourglassNet: what parity packs do not show of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from service.backbones.hourglass import HOURGLASS, HourglassConfig
from service.errors import InvalidConfig
from service.validation import invalid

SMALL = {"downsample_times": 2, "stage_channels": [8, 8, 12], "stage_blocks": [1, 2, 1], "feat_channel": 6}


def config(**keys: Any) -> HourglassConfig:
    return HourglassConfig.model_validate({"type": "mmdet.HourglassNet", **SMALL, **keys})


def maps_of(chosen: HourglassConfig, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = HOURGLASS.build(chosen).eval()
    levels = chosen.levels(HOURGLASS.describe(chosen))
    with torch.inference_mode():
        found: dict[str, torch.Tensor] = network(torch.ones(1, 3, *size), [level.node for level in levels])
    return found


def test_the_default_has_the_librarys_size() -> None:
    default = HourglassConfig.model_validate({"type": "mmdet.HourglassNet"})
    assert HOURGLASS.describe(default).parameters == 187_700_352


@pytest.mark.parametrize("size", [(64, 32), (37, 51), (1, 1)])
def test_every_hourglass_gives_a_map_of_stride_4_of_any_size(size: tuple[int, int]) -> None:
    found = maps_of(config(num_stacks=3), size)
    expected = (1, 6, -(-size[0] // 4), -(-size[1] // 4))
    assert {node: tuple(maps.shape) for node, maps in found.items()} == dict.fromkeys("012", expected)
    assert not torch.equal(found["0"], found["1"])


def test_hourglasses_can_be_chosen_and_share_the_model() -> None:
    chosen = config(num_stacks=3, out_indices=[-1, 0])
    assert list(maps_of(chosen, (32, 32))) == ["0", "2"]
    assert chosen.key() == config(num_stacks=3).key() != config().key()


def test_norms_without_gradient_are_all_that_is_frozen() -> None:
    chosen = config(norm_cfg={"type": "BN", "requires_grad": False})
    with torch.device("meta"):
        report = HOURGLASS.build(chosen).frozen(chosen.freeze())
    assert report.norms == ()
    assert 0 < len(report.parameters) < report.of
    assert {name.rpartition(".")[2] for name in report.parameters} == {"weight", "bias"}


@pytest.mark.parametrize(
    ("keys", "pointer"),
    [
        ({"downsample_times": 3}, "downsample_times"),
        ({"stage_blocks": [1, 1]}, "stage_blocks"),
        ({"num_stacks": 99}, "num_stacks"),
        ({"out_indices": [2]}, "out_indices/0"),
        ({"frozen_stages": 1}, "frozen_stages"),
        ({"norm_cfg": {"type": "GN", "num_groups": 8}}, "norm_cfg/num_groups"),
    ],
)
def test_a_bad_key_is_refused_by_its_place(keys: dict[str, Any], pointer: str) -> None:
    with pytest.raises((ValidationError, InvalidConfig)) as caught:
        config(**keys).levels(HOURGLASS.describe(config(**keys)))
    error = caught.value
    faults = error.faults if isinstance(error, InvalidConfig) else invalid(error, "#/backbone").faults
    assert faults[0].pointer == f"#/backbone/{pointer}"
