"""What `test_http.py` cannot show of the packs: that they tell networks apart, and the neck by itself."""

from __future__ import annotations

import pytest
import torch

from service.backbones.resnet import RESNET
from service.config.spec import WeightsRef
from service.necks.base import LevelFacts
from service.necks.global_average_pooling import GLOBAL_AVERAGE_POOLING
from tests.parity.packs import load_pack, pack_names, relative_error


def test_another_network_is_not_taken_for_the_librarys() -> None:
    pack = load_pack("openmmlab/mmpretrain-ResNet-50-caffe")
    config = RESNET.config.model_validate({**pack.config, "style": "pytorch"})
    network, _ = RESNET.load(config, pack.state(), WeightsRef("any"))
    levels = config.levels(RESNET.describe(config))
    with torch.inference_mode():
        images = torch.from_numpy(pack.input_arrays()[0])
        found = network.eval()(images, [level.node for level in levels])
    # The first stage does not stride: it is the same in either style.
    for level, expected in list(zip(levels, pack.outputs, strict=True))[1:]:
        assert relative_error(found[level.node].numpy(), expected) > 100 * expected.tolerance


@pytest.mark.parametrize("name", pack_names("openmmlab/*GlobalAveragePooling*"))
def test_pooling_gives_the_librarys_means(name: str) -> None:
    pack = load_pack(name)
    features = [torch.from_numpy(array) for array in pack.input_arrays()]
    config = GLOBAL_AVERAGE_POOLING.config.model_validate(pack.config)
    levels = [LevelFacts(i, str(i), "NCHW", map_.shape[1], 4) for i, map_ in enumerate(features)]
    pooled = GLOBAL_AVERAGE_POOLING.build(config, levels)(features)
    for level, expected in zip(pooled, pack.outputs, strict=True):
        assert relative_error(level.numpy(), expected) <= expected.tolerance


def test_a_state_dict_has_the_librarys_names_in_the_librarys_order() -> None:
    for name in pack_names("openmmlab/mmpretrain-ResNet-*"):
        pack = load_pack(name)
        with torch.device("meta"):
            network = RESNET.build(RESNET.config.model_validate(pack.config))
        assert list(network.state_dict()) == [entry.name for entry in pack.entries]
