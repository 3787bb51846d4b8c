"""OpenMMLab's Python configs: what is read of them as data, and what they cannot make the service do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from service.config.files import ConfigCatalogue, NamedConfig
from service.config.python_files import PythonFile, Refused
from service.errors import InvalidConfig

WHOLE_SECOND = 1.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    return folder


def write(directory: Path, name: str, text: str | bytes) -> None:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())


def load(directory: Path, name: str = "own") -> NamedConfig:
    return ConfigCatalogue(directory).load(name)


def values(text: str, **base: Any) -> dict[str, Any]:
    return PythonFile(dedent(text).encode(), "own.py").values(base)


@pytest.fixture
def quickly() -> Iterator[None]:
    start = time.thread_time()
    yield
    assert time.thread_time() - start < WHOLE_SECOND


# --- what is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("dict(a=1, b=[2, (3, 4)], c={'d': None})", {"a": 1, "b": [2, (3, 4)], "c": {"d": None}}),
        ("dict(known, depth=101)", {"depth": 101, "style": "pytorch"}),
        ("dict(**known, extra=True)", {"depth": 50, "style": "pytorch", "extra": True}),
        ("{**known, 'depth': 18}", {"depth": 18, "style": "pytorch"}),
        ("known.depth + known['depth']", 100),
        ("known.copy()", {"depth": 50, "style": "pytorch"}),
        ("widths[-1]", 1024),
        ("widths[1:]", [512, 1024]),
        ("[*widths, 2048]", [256, 512, 1024, 2048]),
        ("[256] * 4", [256, 256, 256, 256]),
        ("2 * (1, 2)", (1, 2, 1, 2)),
        ("widths + [1]", [256, 512, 1024, 1]),
        ("-2 ** 3 + 7 // 2 - 7 % 4 + 1 / 4", -7.75),
        ("2 ** -1", 0.5),
        ("'mmdet.' + 'ResNet'", "mmdet.ResNet"),
        ("'ResNet-%d' % known.depth", "ResNet-50"),
        ("'%s-%.2f' % ('a', 0.5)", "a-0.50"),
        ("f'resnet{known.depth}-{0.25:.1f}-{7:03d}'", "resnet50-0.2-007"),
        ("{3, 1, 3}", [3, 1]),
        ("+1.5e-3", 0.0015),
    ],
)
def test_an_expression_of_data_has_pythons_value(expression: str, value: object) -> None:
    before = "known = dict(depth=50, style='pytorch')\nwidths = [256, 512, 1024]\n"
    assert values(f"{before}x = {expression}")["x"] == value


def test_statements_do_what_they_do_in_python() -> None:
    read = values(
        """
        '''A comment in quotes.'''
        first, (second, third) = 1, [2, 3]
        a = b = dict(depth=50, gone=1, dropped=2, inner=dict(list=[1, 2]))
        a.depth = 101
        a['inner']['list'][0] = dict(x=1)
        b.inner.list[0]['x'] += 4
        a.update(dict(new=1), newer=2)
        a.pop('gone')
        a.pop('never', None)
        del a['dropped'], first
        total: int = second * third
        pipeline = [1]
        same = pipeline
        pipeline += (2, 3)
        __hidden = 1
        """
    )
    changed = {"depth": 101, "inner": {"list": [{"x": 5}, 2]}, "new": 1, "newer": 2}
    assert read == {
        "second": 2,
        "third": 3,
        "a": changed,
        "b": changed,
        "total": 6,
        "pipeline": [1, 2, 3],
        "same": [1, 2, 3],
    }


def test_values_of_bases_are_read_as_names_and_as_templates() -> None:
    read = values(
        """
        a = _base_.model.depth
        b = [{{_base_.model}}, {{ _base_.model.depth }}]
        _base_.model.depth = 18
        """,
        model={"depth": 50},
    )
    assert read == {"a": 50, "b": [{"depth": 50}, 50]}


def test_what_is_no_data_matters_only_where_it_is_needed(directory: Path) -> None:
    write(
        directory,
        "own.py",
        """
        custom_imports = dict(imports=['nothing.there'], allow_failed_imports=False)
        schedule = dict(by=lambda epoch: epoch, steps=[i * 2 for i in range(3)])
        schedule.update({str(i): i for i in range(3)})
        schedule.by.deeper = 3
        model = dict(
            type='FasterRCNN',
            backbone=dict(type='ResNet', depth=18),
            train_cfg=dict(factor=open('nothing').read(), twice=schedule['by']))
        """,
    )
    assert load(directory).backbone == {"type": "ResNet", "depth": 18}


@pytest.mark.parametrize(
    ("text", "pointer", "line"),
    [
        ("x = 1\nmodel = dict(backbone=dict(type='ResNet', depth=int('50')))", "#/model/backbone/depth", 2),
        (
            "depth = len([1])\nmodel = dict(backbone=dict(\n type='ResNet', depth=depth))",
            "#/model/backbone/depth",
            1,
        ),
        ("model = build(\n 1)", "#/model", 1),
        ("model = dict(backbone=dict(type='ResNet'), neck=[f() for f in []])", "#/model/neck", 1),
        ("model = dict(backbone=dict(type='ResNet'), data_preprocessor=f())", "#/model/data_preprocessor", 1),
        (
            "a = [1]\nb = a\nb += f()\nbackbone = dict(type='ResNet', out_indices=a)",
            "#/backbone/out_indices/1",
            3,
        ),
        ("a = [1]\na += 'x'\nbackbone = dict(type='ResNet', out_indices=a)", "#/backbone/out_indices/1", 2),
        ("a = 1\na += f()\nbackbone = dict(type='ResNet', depth=a)", "#/backbone/depth", 2),
        ("a = {1: 2}\na.update(f())\nmodel = dict(backbone=a)", "#/model/backbone", 2),
        ("load_from = f'{name}.pth'\nmodel = dict(backbone=dict(type='ResNet'))", "#/load_from", 1),
        ("backbone = dict(type='ResNet', depth=float('inf'))", "#/backbone/depth", 1),
        ("backbone = dict(type='ResNet', depth=1e999)", "#/backbone/depth", 1),
        ("backbone = dict(type='ResNet', depth=b'50')", "#/backbone/depth", 1),
        ("backbone = dict(type='ResNet', depth={{ fileBasename }})", "#/backbone/depth", 1),
        ("\nbackbone = dict(type='ResNet', depth=unknown)", "#/backbone/depth", 2),
        ("backbone = dict(type='ResNet', depth=1 if True else 2)", "#/backbone/depth", 1),
        ("backbone = dict(type='ResNet', depth=50, **dict(depth=18))", "#/backbone", 1),
    ],
)
def test_what_is_needed_and_is_no_data_is_refused_with_its_line(
    directory: Path, text: str, pointer: str, line: int
) -> None:
    write(directory, "own.py", text)
    with pytest.raises(InvalidConfig, match=rf"own\.py, line {line}: ") as refused:
        load(directory)
    assert refused.value.faults[0].pointer in (pointer, "#")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("import os", "an import"),
        ("from os import path", "an import"),
        ("if True:\n    x = 1", "an if"),
        ("for i in [1]:\n    x = i", "a for loop"),
        ("while True:\n    x = 1", "a while loop"),
        ("def f():\n    return 1", "a function"),
        ("class A:\n    pass", "a class"),
        ("with open('x') as f:\n    x = 1", "a with block"),
        ("with read_base():\n    from .a import *", "read_base"),
        ("try:\n    x = 1\nfinally:\n    x = 2", "a try block"),
        ("assert True", "a statement"),
        ("print('x')", "not an assignment"),
        ("a.append(1)", "a call"),
        ("missing.depth = 1", "no 'missing'"),
        ("a.b.c = 1", "no 'b'"),
        ("l[7] = 1", "nothing can be assigned"),
        ("del a['x']", "nothing here to delete"),
        ("a.pop('x')", "nothing here to pop"),
        ("x, y = [1]", "2 values"),
        ("f().x = 1", "a call"),
        ("x, *y = [1, 2]", "cannot be assigned"),
        ("x = y = 1; import os", "an import"),
    ],
)
def test_a_statement_that_is_not_data_is_refused_with_its_line(
    directory: Path, statement: str, said: str
) -> None:
    write(directory, "own.py", f"a = dict()\nl = [1]\n{statement}\nbackbone = dict(type='ResNet')\n")
    with pytest.raises(InvalidConfig, match=r"own\.py, line 3: ") as refused:
        load(directory)
    assert said in refused.value.detail


def test_no_code_is_run(directory: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write(
        directory,
        "own.py",
        f"""
        a = open({str(trace)!r}, 'w').close()
        b = f"{{open({str(trace)!r}, 'w')}}"
        c = [x for x in [__import__('os').mkdir({str(trace)!r})]]
        d = ().__class__.__base__.__subclasses__()
        e = dict.fromkeys([1])
        f = '{{0.__class__}}'.format(1)
        dict = open
        g = dict({str(trace)!r}, 'w')
        backbone = {{'type': 'ResNet'}}
        """,
    )
    assert load(directory).backbone == {"type": "ResNet"}
    assert not trace.exists()
    assert isinstance(values("d = ().__class__")["d"], Refused)


# --- bounds -----------------------------------------------------------------------------------------

DOUBLED = "\n".join(["a = [1]", *["a = a + a"] * 60])
GROWN = "\n".join(["a = [1]", *["a += a"] * 60])
NESTED = "\n".join(["a = [1]", *[f"a = {'[' + 'a, ' * 9 + 'a]'}"] * 12])
CYCLE = "a = dict()\na.a = a"
HOSTILE = {
    "a long list": "a = [1] * 10**9",
    "a long string": "a = 'x' * 10**9",
    "a long tuple": "a = 10**9 * (1, 2)",
    "a tower": "a = 9**9**9**9",
    "a power": "a = 10**10**7",
    "powers of powers": "a = 2**62\na = a**62\na = a * a",
    "a float power": "a = 9.0**9.0**9.0**9.0",
    "a shift": "a = 1 << 10**10",
    "doubling": DOUBLED,
    "growing": GROWN,
    "shared lists": NESTED,
    "a cycle": CYCLE,
    "parentheses": "a = " + "(" * 10_000 + "1" + ")" * 10_000,
    "brackets": "a = " + "[" * 190 + "]" * 190,
    "braces": "a = " + "{1: " * 90 + "1" + "}" * 90,
    "signs": "a = " + "-" * 200_000 + "1",
    "additions": "a = 0\nb = " + "1+" * 100_000 + "1",
    "attributes": "a = 0\nb = a" + ".b" * 100_000,
    "lambdas": "a = " + "lambda: " * 30_000 + "1",
    "many values": "a = [" + "1," * 120_000 + "]",
    "many statements": "a = 1;" * 40_000,
    "an integer": "a = " + "9" * 200_000,
    "a hexadecimal": "a = 0x" + "f" * 200_000,
    "a width": "a = '%1000000000d' % 1",
    "a width of a string": "a = f'{1:1000000000}'",
    "a precision": "a = f'{1.5:.1000000000f}'",
    "a nested width": "w = 10**9\na = f'{1:{w}}'",
    "a null byte": "a = 1\0",
    "a bad string": "a = 'unterminated",
    "no encoding": b"a = 1\nb = '\xff\xfe'",
    "another encoding": b"# -*- coding: utf-7 -*-\na = '\xe9'",
    "sixteen bits": "a = 1".encode("utf-16"),
    "a large file": "# " + "x" * 300_000,
    "a large YAML": "a = 1\n" + "#" * 1_000_001,
    "repeated templates": "a = [" + "{{_base_.x}}," * 1000 + "]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.usefixtures("quickly")
def test_a_bomb_is_refused_quickly(directory: Path, text: str | bytes) -> None:
    source = text.encode() if isinstance(text, str) else text
    write(directory, "own.py", source + b"\nbackbone = dict(type='ResNet', depth=a)\n")
    with pytest.raises(InvalidConfig, match=r"own\.py") as refused:
        load(directory)
    assert len(refused.value.detail) < 300


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\nb = 2\nc = (", 3),
        ("a = 1\n\0", 2),
        (b"a = 1\nb = '\xff'", 2),
        ("a = 1\nb = [\n" + "1+" * 50_000 + "1]", 2),
        ("a = 1\n\n\nb = " + "-" * 50_000 + "1", 4),
        ("a = 1\nb = " + "[" * 70 + "]" * 70, 2),
        ("a = 'x'\nb = 3\nc = a * 3_000_000", 3),
        ("a = 1\nb = " + "9" * 5000, 2),
    ],
)
def test_a_bound_says_its_line(directory: Path, text: str | bytes, line: int) -> None:
    write(directory, "own.py", text)
    with pytest.raises(InvalidConfig, match=rf"own\.py, line {line}: "):
        load(directory)


# --- bases ------------------------------------------------------------------------------------------


def test_bases_of_all_three_formats_merge_as_in_mmengine(directory: Path) -> None:
    write(
        directory,
        "_base_/model.py",
        "model = dict(backbone=dict(type='ResNet', depth=50, out_indices=(0, 1)))",
    )
    write(directory, "_base_/neck.yaml", "model_neck: {type: FPN, in_channels: [1, 2]}")
    write(directory, "_base_/scope.json", '{"default_scope": "mmdet"}')
    write(
        directory,
        "a/own.py",
        """
        _base_ = ['../_base_/model.py', '../_base_/neck.yaml', '../_base_/scope.json']
        model = dict(
            backbone=dict(depth=101, out_indices=(3,), norm_cfg=dict(_delete_=True, type='BN')),
            neck=_base_.model_neck)
        """,
    )
    config = load(directory, "a/own")
    assert config.backbone == {
        "type": "mmdet.ResNet",
        "depth": 101,
        "out_indices": [3],
        "norm_cfg": {"type": "BN"},
    }
    assert config.neck == {"type": "mmdet.FPN", "in_channels": [1, 2]}
    assert ConfigCatalogue(directory).names() == ["a/own"]


def test_a_yaml_file_has_a_python_base(directory: Path) -> None:
    write(directory, "_base.py", "backbone = dict(type='ResNet', depth=50)\nhelper = 3")
    write(directory, "own.yaml", "_base_: _base.py\nbackbone: {depth: 18}\nhelper: null\n")
    with pytest.raises(InvalidConfig, match="helper"):
        load(directory)
    write(directory, "_base.py", "backbone = dict(type='ResNet', depth=50)")
    write(directory, "own.yaml", "_base_: _base.py\nbackbone: {depth: 18}\n")
    assert load(directory).backbone == {"type": "ResNet", "depth": 18}


def test_changes_to_a_base_go_before_the_merge(directory: Path) -> None:
    write(
        directory, "_base.py", "model = dict(backbone=dict(type='ResNet', depth=50), neck=dict(type='FPN'))"
    )
    write(
        directory,
        "own.py",
        """
        _base_ = '_base.py'
        detector = _base_.model
        detector.backbone.depth = 34
        del _base_.model.neck
        model = dict(backbone=dict(style='caffe'))
        """,
    )
    config = load(directory)
    assert config.backbone == {"type": "ResNet", "depth": 34, "style": "caffe"}
    assert config.neck is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_base_ = 'mmdet::_base_/models/x.py'", "another library"),
        ("_base_ = '../../outside.py'", "no base"),
        ("_base_ = 'missing.py'", "no base"),
        ("_base_ = 'a\\0b.py'", "no base"),
        ("_base_ = 'a' * 9000", "no base"),
        ("_base_ = 'own.py'", "its own base"),
        ("_base_ = ['_a.py', '_b.py']", "define x"),
        ("_base_ = ['_a.py', 3]", "file name"),
        ("_base_ = names()", "file name"),
        ("name = '_a.py'\n_base_ = [name]", "file name"),
        ("_base_ = '_a.py'\n_base_ = '_b.py'", "twice"),
        ("_base_ = '_a.py'\nx = dict(a=1)", "#/x: an object over the base's int"),
        ("_base_ = '_a.py'\ny = {'0': dict(a=1)}", "#/y: an object over the base's list"),
    ],
)
def test_a_base_that_is_none_is_refused(directory: Path, text: str, said: str) -> None:
    write(directory, "_a.py", "x = 1\ny = [dict(a=2)]")
    write(directory, "_b.py", "x = 2")
    write(directory.parent, "outside.py", "x = 1")
    write(directory, "own.py", text + "\nbackbone = dict(type='ResNet')\n")
    with pytest.raises(InvalidConfig) as refused:
        load(directory)
    assert said in refused.value.detail
    assert str(directory) not in refused.value.detail


def test_two_files_of_one_name_are_refused(directory: Path) -> None:
    write(directory, "own.py", "type = 'ResNet'\ndepth = 18")
    write(directory, "own.yaml", "type: ResNet\n")
    assert ConfigCatalogue(directory).names() == ["own"]
    with pytest.raises(InvalidConfig, match=r"own\.py and own\.yaml"):
        load(directory)
    (directory / "own.yaml").unlink()
    assert load(directory).backbone == {"type": "ResNet", "depth": 18}
    assert load(directory).as_written == "type = 'ResNet'\ndepth = 18"
