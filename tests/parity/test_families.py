"""The families give what the real libraries give: weights loaded strictly, every output of every pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.backbones.base import Backbone, Family
from service.backbones.building import on_meta
from service.backbones.resnet import RESNET, ResNet, ResNetConfig, ResNetSpec
from service.backbones.vision_transformer import (
    VISION_TRANSFORMER,
    VisionTransformer,
    VisionTransformerConfig,
    VisionTransformerSpec,
)
from service.checkpoints.read import read_checkpoint
from service.config.spec import WeightsRef
from service.necks.base import LevelFacts
from service.necks.global_average_pooling import GLOBAL_AVERAGE_POOLING
from tests.parity.packs import Pack, load_pack, pack_names, relative_error, write_checkpoint

Config = ResNetConfig | VisionTransformerConfig
FAMILIES: dict[str, Family[Any]] = {"ResNet": RESNET, "VisionTransformer": VISION_TRANSFORMER}
NETWORKS: dict[type, type[Backbone]] = {ResNetSpec: ResNet, VisionTransformerSpec: VisionTransformer}
BACKBONES = pack_names("openmmlab/*-ResNet-*") + pack_names("openmmlab/*-VisionTransformer-*")


def family_of(pack: Pack) -> Family[Any]:
    return FAMILIES[pack.config["type"].partition(".")[2]]


def config_of(pack: Pack, **update: Any) -> Config:
    scope = pack.config["type"].partition(".")[0]
    return family_of(pack).config.model_validate({**pack.config, **update}, context={"scope": scope})


def errors_of(pack: Pack, config: Config, network: Backbone) -> list[float]:
    levels = config.levels(family_of(pack).describe(config))
    images = torch.from_numpy(pack.input_arrays()[0])
    with torch.inference_mode():
        found = network.eval()(images, [level.node for level in levels])
    outputs = zip(levels, pack.outputs, strict=True)
    return [
        relative_error(found[level.node].numpy(), expected) / expected.tolerance
        for level, expected in outputs
    ]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_output_is_the_librarys(name: str) -> None:
    pack = load_pack(name)
    config = config_of(pack)
    state = {pack.prefix + key: tensor for key, tensor in pack.state().items()}
    network, keys = family_of(pack).load(config, state, WeightsRef("any", pack.prefix))
    assert list(network.state_dict()) == [entry.name for entry in pack.entries]
    assert (keys.loaded, keys.missing, keys.unexpected) == (len(pack.entries), (), ())
    assert max(errors_of(pack, config, network)) <= 1


@pytest.mark.parametrize("name", [name for name in BACKBONES if load_pack(name).frozen])
def test_what_is_frozen_is_what_the_library_freezes(name: str) -> None:
    pack = load_pack(name)
    spec = config_of(pack).spec()
    network = on_meta(lambda: NETWORKS[type(spec)](spec))
    for frozen in pack.frozen:
        report = network.frozen(config_of(pack, **frozen.update).freeze())
        assert report.parameters == frozen.parameters
        assert report.norms == frozen.norms
        assert report.of == len(list(network.parameters()))


def test_a_checkpoint_file_of_openmmlab_fills_the_network(tmp_path: Path) -> None:
    pack = load_pack("openmmlab/mmpretrain-ResNet-18")
    path = tmp_path / pack.checkpoint_name()
    write_checkpoint(pack, path)
    config = family_of(pack).config.model_validate(pack.config_with_weights())
    ref = config.weights()
    assert ref is not None
    assert (ref.name, ref.prefix) == (path.name, "backbone.")
    network, keys = family_of(pack).load(config, read_checkpoint(path, pointer=ref.pointer), ref)
    assert keys.unexpected == ("head.fc.weight", "head.fc.bias")
    assert max(errors_of(pack, config, network)) <= 1


@pytest.mark.parametrize("name", ["timm_resnet18_in1", "tv_resnet18"])
def test_the_files_of_timm_and_torchvision_hold_the_packs_weights(name: str, tmp_path: Path) -> None:
    pack = load_pack(f"timm-torchvision/{name}")
    path = tmp_path / pack.checkpoint_name()
    write_checkpoint(pack, path)
    state = read_checkpoint(path, pointer="#/backbone/checkpoint")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        entry.name: entry.shape for entry in pack.entries
    }
    assert all(torch.equal(state[key], tensor) for key, tensor in pack.state().items())


@pytest.mark.parametrize("name", pack_names("openmmlab/*GlobalAveragePooling*"))
def test_pooling_gives_the_librarys_means(name: str) -> None:
    pack = load_pack(name)
    features = [torch.from_numpy(array) for array in pack.input_arrays()]
    config = GLOBAL_AVERAGE_POOLING.config.model_validate(pack.config)
    levels = [LevelFacts(i, str(i), "NCHW", map_.shape[1], 4) for i, map_ in enumerate(features)]
    pooled = GLOBAL_AVERAGE_POOLING.build(config, levels)(features)
    for level, expected in zip(pooled, pack.outputs, strict=True):
        assert relative_error(level.numpy(), expected) <= expected.tolerance


def test_another_network_is_not_taken_for_the_librarys() -> None:
    pack = load_pack("openmmlab/mmpretrain-ResNet-50-caffe")
    config = config_of(pack, style="pytorch")
    network, _ = family_of(pack).load(config, pack.state(), WeightsRef("any"))
    assert max(errors_of(pack, config, network)) > 100


def test_outputs_come_in_the_order_asked() -> None:
    asked = load_pack("timm-torchvision/timm_vit_tiny_in1_neg")
    assert [expected.name for expected in asked.outputs] == ["1", "0"]


@pytest.mark.parametrize("name", pack_names())
def test_every_pack_can_be_read(name: str) -> None:
    pack = load_pack(name)
    assert pack.outputs
    assert pack.inputs
    assert pack.is_neck or pack.entries
