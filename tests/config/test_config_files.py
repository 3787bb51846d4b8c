"""Named configs: what `_base_` and `_delete_` mean, and what a file cannot do."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from service.config.files import ConfigCatalogue, merge
from service.errors import InvalidConfig, UnknownConfig


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    return folder


def write(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


def resolved(directory: Path, name: str) -> dict[str, object]:
    return ConfigCatalogue(directory).load(name).resolved()


def test_a_file_is_named_by_its_path_without_the_suffix(directory: Path) -> None:
    write(directory, "mmdet/resnet50.yaml", "type: ResNet\ndepth: 50\n")
    write(directory, "b.json", '{"type": "ResNet", "depth": 18}')
    write(directory, "_base.yaml", "type: ResNet\n")
    write(directory, "notes.txt", "type: ResNet\n")
    assert ConfigCatalogue(directory).names() == ["b", "mmdet/resnet50"]
    assert resolved(directory, "mmdet/resnet50") == {"backbone": {"type": "ResNet", "depth": 50}}


def test_a_base_is_merged_key_by_key_and_lists_are_replaced(directory: Path) -> None:
    write(
        directory,
        "_base.yaml",
        "type: ResNet\ndepth: 50\nout_indices: [0, 1]\nnorm_cfg: {type: BN, eps: 1.0e-3}\n",
    )
    write(directory, "own.yaml", "_base_: _base.yaml\ndepth: 18\nout_indices: [3]\nnorm_cfg: {eps: 1.0e-5}\n")
    assert resolved(directory, "own")["backbone"] == {
        "type": "ResNet",
        "depth": 18,
        "out_indices": [3],
        "norm_cfg": {"type": "BN", "eps": 1e-5},
    }


def test_delete_drops_what_the_base_said(directory: Path) -> None:
    write(directory, "_base.yaml", "type: ResNet\nnorm_cfg: {type: BN, eps: 1.0e-3}\n")
    write(
        directory, "own.yaml", "_base_: [_base.yaml]\nnorm_cfg: {_delete_: true, type: GN, num_groups: 32}\n"
    )
    assert resolved(directory, "own")["backbone"]["norm_cfg"] == {"type": "GN", "num_groups": 32}  # type: ignore[index]


def test_the_merge_leaves_its_arguments_alone() -> None:
    base, own = {"a": {"b": 1}}, {"a": {"c": {"_delete_": True, "d": 2}}}
    assert merge(base, own) == {"a": {"b": 1, "c": {"d": 2}}}
    assert base == {"a": {"b": 1}}
    assert own == {"a": {"c": {"_delete_": True, "d": 2}}}


def test_a_config_may_bring_its_neck_and_preprocess(directory: Path) -> None:
    write(
        directory,
        "a.yaml",
        "backbone: {type: ResNet}\nneck: {type: GlobalAveragePooling}\npreprocess: native\n",
    )
    config = ConfigCatalogue(directory).load("a")
    assert config.neck == {"type": "GlobalAveragePooling"}
    assert config.preprocess == "native"
    assert config.as_written["preprocess"] == "native"


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        ("- a\n- b\n", "#"),
        ("depth: 50\n", "#"),
        ("backbone: {type: ResNet}\nhead: {type: X}\n", "#/head"),
        ("type: [unclosed\n", "#"),
        ("!!python/object/apply:os.system [echo]\n", "#"),
        ("_base_: 3\ntype: ResNet\n", "#/_base_"),
        ("_base_: missing.yaml\n", "#/_base_"),
        ("_base_: ../../outside.yaml\n", "#/_base_"),
        ("_base_: /etc/passwd\n", "#/_base_"),
        ("_base_: own.yaml\n", "#/_base_"),
    ],
)
def test_a_file_that_is_no_config_says_where(directory: Path, text: str, pointer: str) -> None:
    write(directory, "own.yaml", text)
    write(directory.parent, "outside.yaml", "type: ResNet\n")
    with pytest.raises(InvalidConfig) as refused:
        ConfigCatalogue(directory).load("own")
    assert refused.value.faults[0].pointer == pointer
    assert str(directory) not in refused.value.detail


def test_two_bases_may_not_say_the_same(directory: Path) -> None:
    for name in ("_a.yaml", "_b.yaml"):
        write(directory, name, "type: ResNet\n")
    write(directory, "own.yaml", "_base_: [_a.yaml, _b.yaml]\n")
    with pytest.raises(InvalidConfig, match="type"):
        ConfigCatalogue(directory).load("own")


def test_anchors_that_unfold_without_end_are_refused(directory: Path) -> None:
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9)]
    write(directory, "bomb.yaml", "\n".join(["type: ResNet", *rows]))
    with pytest.raises(InvalidConfig, match="unfolds"):
        ConfigCatalogue(directory).load("bomb")


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        ("type: ResNet\n1: 2\n", "#/backbone"),
        ("type: ResNet\ndepth: 2020-01-01\n", "#/backbone/depth"),
        ("backbone: {type: ResNet, depth: .inf}\n", "#/backbone/depth"),
        ("backbone: {type: ResNet, data: !!binary aGVsbG8=}\n", "#/backbone/data"),
        ("backbone: {type: ResNet}\nneck: !!set {a, b}\n", "#/neck"),
    ],
)
def test_yaml_that_json_cannot_carry_is_refused(directory: Path, text: str, pointer: str) -> None:
    write(directory, "own.yaml", text)
    with pytest.raises(InvalidConfig) as refused:
        ConfigCatalogue(directory).load("own")
    assert refused.value.faults[0].pointer == pointer


def test_a_dead_link_is_no_file(directory: Path) -> None:
    (directory / "own.yaml").symlink_to(directory / "gone.yaml")
    (directory / "loop.yaml").symlink_to(directory / "loop.yaml")
    with pytest.raises(InvalidConfig, match="not a file"):
        ConfigCatalogue(directory).load("own")
    write(directory, "above.yaml", "_base_: loop.yaml\n")
    with pytest.raises(InvalidConfig, match="no base"):
        ConfigCatalogue(directory).load("above")


@pytest.mark.parametrize(
    "name", ["../own", "/etc/passwd", "own.yaml", "", "own\0", "a" * 10_000, "./own", "_base"]
)
def test_only_listed_names_are_looked_up(directory: Path, name: str) -> None:
    write(directory, "own.yaml", "type: ResNet\n")
    write(directory, "_base.yaml", "type: ResNet\n")
    with pytest.raises(UnknownConfig):
        ConfigCatalogue(directory).load(name)


def test_an_unknown_name_comes_with_the_nearest(directory: Path) -> None:
    write(directory, "resnet50.yaml", "type: ResNet\n")
    with pytest.raises(UnknownConfig) as unknown:
        ConfigCatalogue(directory).load("resnet5O")
    assert unknown.value.nearest == ("resnet50",)


def test_an_edit_needs_no_restart(directory: Path) -> None:
    catalogue = ConfigCatalogue(directory)
    write(directory, "own.yaml", "type: ResNet\ndepth: 18\n")
    assert catalogue.load("own").backbone["depth"] == 18
    write(directory, "own.yaml", "type: ResNet\ndepth: 34\n")
    assert catalogue.load("own").backbone["depth"] == 34
