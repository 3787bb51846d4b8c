"""Every pack of a neck: a state dict and levels go in, what the real library gives comes out."""

from __future__ import annotations

import pytest
import torch

from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch
from service.necks.base import Neck
from tests.parity.compute import neck_family, neck_inputs
from tests.parity.packs import Pack, load_pack, pack_names, relative_error

NECKS = [name for name in pack_names("openmmlab/*") if load_pack(name).is_neck]


def loaded(pack: Pack) -> Neck:
    family, levels = neck_family(pack), neck_inputs(pack)
    config = family.config.model_validate(pack.config)
    neck: Neck
    neck, keys = family.load(config, levels, pack.state(), WeightsRef("any"))
    assert (keys.loaded, keys.missing, keys.unexpected) == (len(pack.state()), (), ())
    return neck.eval()


@pytest.mark.parametrize("name", NECKS)
def test_every_level_of_a_neck_is_the_librarys(name: str) -> None:
    pack = load_pack(name)
    with torch.inference_mode():
        levels = loaded(pack)([torch.from_numpy(array) for array in pack.input_arrays()])
    for level, expected in zip(levels, pack.outputs, strict=True):
        assert relative_error(level.numpy(), expected) <= expected.tolerance


@pytest.mark.parametrize("name", NECKS)
def test_a_neck_is_described_as_it_is(name: str) -> None:
    pack = load_pack(name)
    family, levels = neck_family(pack), neck_inputs(pack)
    config = family.config.model_validate(pack.config)
    described = family.describe(config, levels)
    assert [level.channels for level in described.levels] == [one.shape[1] for one in pack.outputs]
    sizes = [shape[2] * 4 for _, shape in pack.inputs]  # the first level is at stride 4
    for level, expected in zip(described.levels, pack.outputs, strict=True):
        if level.layout == "NCHW":
            assert level.stride is not None
            assert -(-sizes[0] // level.stride) == expected.shape[2]
    with torch.device("meta"):
        built = family.build(config, levels)
    assert list(built.state_dict()) == [entry.name for entry in pack.entries]
    held = [*built.parameters(), *built.buffers()]
    assert described.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert described.bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize("name", [name for name in NECKS if load_pack(name).entries])
def test_a_neck_without_one_of_its_weights_is_refused(name: str) -> None:
    pack = load_pack(name)
    family, levels = neck_family(pack), neck_inputs(pack)
    config = family.config.model_validate(pack.config)
    state = pack.state()
    gone = next(iter(state))
    others = {key: tensor for key, tensor in state.items() if key != gone} | {"other.weight": torch.zeros(1)}
    with pytest.raises(CheckpointMismatch) as refused:
        family.load(config, levels, others, WeightsRef("any"))
    assert refused.value.missing == (gone,)
