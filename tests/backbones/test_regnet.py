"""RegNet: the widths that its parameters make, and the parameters that make none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backbones.residual import (
    assert_maps_are_as_described,
    built,
    config_of,
    family_of,
    indices,
    pointer_of,
)

ARCH = {"w0": 8, "wa": 8.0, "wm": 2.0, "group_w": 4, "depth": 8, "bot_mul": 1.0}


@pytest.mark.parametrize(
    ("arch", "blocks", "widths"),
    [
        ("regnetx_400mf", (1, 2, 7, 12), (32, 64, 160, 384)),
        ("regnetx_4.0gf", (2, 5, 14, 2), (80, 240, 560, 1360)),
        ("regnetx_12gf", (2, 5, 11, 1), (224, 448, 896, 2240)),
    ],
)
def test_named_architectures_have_the_papers_blocks_and_widths(
    arch: str, blocks: tuple[int, ...], widths: tuple[int, ...]
) -> None:
    for scope in ("mmpretrain", "mmdet"):
        spec = config_of(f"{scope}.RegNet", arch=arch).spec()
        assert (spec.blocks, spec.widths) == (blocks, widths)


@pytest.mark.parametrize("scope", ["mmpretrain", "mmdet"])
@pytest.mark.parametrize("more", [{}, {"bot_mul": 0.5}, {"bot_mul": 2.0}, {"group_w": 512}])
def test_parameters_are_as_good_as_a_name(scope: str, more: dict[str, Any]) -> None:
    chosen = config_of(f"{scope}.RegNet", arch={**ARCH, **more}, out_indices=[0, 1, 2, 3])
    assert len(chosen.spec().widths) == 4
    assert_maps_are_as_described(chosen)


def test_a_name_and_its_parameters_are_one_model() -> None:
    parameters = {"w0": 24, "wa": 24.48, "wm": 2.54, "group_w": 16, "depth": 22, "bot_mul": 1.0}
    named, spelt = (config_of("mmcls.RegNet", arch=arch) for arch in ("regnetx_400mf", parameters))
    assert named.key() == spelt.key() != config_of("mmdet.RegNet", arch="regnetx_400mf").key()


def test_the_stem_and_every_stage_halve() -> None:
    chosen = config_of("mmpretrain.RegNet", arch=ARCH)
    described = family_of(chosen.type).describe(chosen)
    assert [feature.stride for feature in described.features] == [4, 8, 16, 32]
    assert indices(config_of("mmpretrain.RegNet", arch=ARCH, strides=[8, 32])) == [1, 3]
    assert built(chosen).conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("keys", "pointer"),
    [
        ({"arch": "regnetx_5gf"}, "arch/name"),
        ({"arch": {**ARCH, "w0": 20}}, "arch/parameters/w0"),
        ({"arch": {**ARCH, "wm": 1.0}}, "arch/parameters/wm"),
        ({"arch": {**ARCH, "depth": 10**6}}, "arch/parameters/depth"),
        ({"arch": {**ARCH, "depth": 64}}, "arch"),
        ({"arch": {**ARCH, "bot_mul": 0.01}}, "arch"),
        ({"arch": {"w0": 8}}, "arch/parameters/wa"),
        ({"arch": ARCH, "deep_stem": True}, "deep_stem"),
        ({"arch": ARCH, "depth": 50}, "depth"),
        ({"arch": {**ARCH, "depth": 3}, "frozen_stages": 4, "out_indices": [0]}, "frozen_stages"),
    ],
)
def test_widths_that_make_no_network_are_refused(keys: dict[str, Any], pointer: str) -> None:
    assert pointer_of("mmpretrain.RegNet", **keys) == f"#/backbone/{pointer}"
