"""`.pkl` files of arrays become tensors; numpy is not asked, and nothing that they name is run."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.checkpoints.read import read_checkpoint
from service.errors import CheckpointUnreadable
from tests.checkpoints.test_checkpoint_reading import ATTACKS, BOMBS, Runs, attacks

POINTER = "#/backbone/checkpoint"
Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    """Long and short ones, with and without dimensions, of both orders, aligned and not."""
    random = np.random.default_rng(0)
    return {
        "conv1_w": random.standard_normal((8, 3, 3, 3), np.float32),
        "fortran": np.asfortranarray(random.standard_normal((5, 70), np.float32)),
        "conv1_b": np.arange(3, dtype=np.float32),
        "counter": np.array(7),
        "empty": np.empty((0, 3), np.float32),
        "half": random.standard_normal(300).astype(np.float16),
        "wide": random.standard_normal((40, 2)),
        "flags": np.array([True, False]),
        "strided": random.standard_normal((6, 4), np.float32)[::2],
    }


def written(folder: Path, data: bytes) -> Path:
    path = folder / "a.pkl"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> dict[str, torch.Tensor]:
    return read_checkpoint(written(folder, data), pointer=POINTER)


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(CheckpointUnreadable) as raised:
        read(folder, data)
    assert raised.value.faults[0].pointer == POINTER
    assert str(folder) not in raised.value.detail
    return raised.value.faults[0].detail


def assert_same(found: dict[str, torch.Tensor], expected: Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == torch.from_numpy(array.copy()).dtype
        assert list(found[name].shape) == list(array.shape)
        assert np.array_equal(found[name].numpy(), array), name


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path, protocol) -> None:
    assert_same(read(tmp_path, pickle.dumps(arrays(), protocol)), arrays())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda found: {"model": found, "__author__": "torchvision", "matching_heuristics": True},
        lambda found: {"blobs": found, "cfg": "MODEL:\n  TYPE: generalized_rcnn\n"},
        lambda found: {"model": collections.OrderedDict(found), "iteration": 89_999},
        lambda found: {"scalar": np.float64(0.1), "model": found, "list": [1, None, (2.5, "é")]},
    ],
    ids=["detectron2", "detectron", "ordered", "metadata"],
)
def test_every_layout_is_unwrapped(tmp_path, wrap) -> None:
    assert_same(read(tmp_path, pickle.dumps(wrap(arrays()))), arrays())


def test_the_optimisers_momenta_are_left_out(tmp_path) -> None:
    blobs = {"a_w": np.ones(2), "a_w_momentum": np.ones(2)}
    assert list(read(tmp_path, pickle.dumps({"blobs": blobs}))) == ["a_w"]


def python2_pickle(found: Arrays) -> bytes:
    """What Python 2's cPickle wrote, in protocol 2: names and bytes are the same kind of string."""

    def string(data: bytes) -> bytes:
        return (
            b"U" + bytes([len(data)]) + data
            if len(data) < 256
            else b"T" + struct.pack("<i", len(data)) + data
        )

    def one(name: str, array: np.ndarray) -> bytes:
        shape = b"".join(b"M" + struct.pack("<H", length) for length in array.shape)
        dtype = b"cnumpy\ndtype\n(" + string(array.dtype.str[1:].encode()) + b"I0\nI1\ntR(I3\n" + string(b"<")
        return (
            string(name.encode())
            + (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR")
            + (b"(I1\n(" + shape + b"t" + dtype + b"NNNI-1\nI-1\nI0\ntbI00\n")
            + (string(array.tobytes()) + b"tb")
        )

    return b"\x80\x02}(" + b"".join(one(name, array) for name, array in found.items()) + b"u."


def test_files_of_python_2_are_read(tmp_path) -> None:
    whole = {name: np.ascontiguousarray(array) for name, array in arrays().items()}
    data = python2_pickle(whole)
    theirs = pickle.loads(data, encoding="latin1")
    assert all(np.array_equal(theirs[name], array) for name, array in whole.items())
    assert_same(read(tmp_path, data), whole)


def test_an_array_under_two_names_is_read_twice(tmp_path) -> None:
    shared = np.arange(300.0)
    found = read(tmp_path, pickle.dumps({"a": shared, "b": shared}))
    assert found["a"].tolist() == found["b"].tolist() == shared.tolist()


def test_a_file_of_torch_is_one_whatever_it_is_called(tmp_path) -> None:
    for zipped in (True, False):
        torch.save({"model": {"x": torch.ones(2)}}, tmp_path / "a.pkl", _use_new_zipfile_serialization=zipped)
        assert read_checkpoint(tmp_path / "a.pkl", pointer=POINTER)["x"].tolist() == [1, 1]


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path) -> None:
    data = pickle.dumps({"x": np.zeros(1000, np.uint8)})
    read(tmp_path, data)["x"].fill_(9)
    assert (tmp_path / "a.pkl").read_bytes() == data


# --- numbers that are not served ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.array([{"a": 1}, None], object), "objects"),
        (np.zeros(2, [("a", "f4"), ("b", "i4")]), "records"),
        (np.ones(2, ">f4"), "big-endian"),
        (np.ones(2, np.complex64), "c8 arrays"),
        (np.ones(2, np.uint16), "u2 arrays"),
        (np.array(["a"]), "U1 arrays"),
        (np.array(["2020-01-01"], "M8[D]"), "M8 arrays"),
        (np.rec.array([1.0]), "numpy.rec.recarray"),
    ],
)
def test_arrays_of_other_things_are_refused(tmp_path, array, word) -> None:
    for protocol in (2, 5):
        assert word in refusal(tmp_path, pickle.dumps({"x": array}, protocol))


@pytest.mark.parametrize("root", [{}, {"lr": 0.1}, [np.ones(2)], np.ones(2), {"model": {"a": 1}}, None])
def test_a_file_without_named_arrays_says_so(tmp_path, root) -> None:
    assert "no state_dict found" in refusal(tmp_path, pickle.dumps(root))


# --- code that must not run -----------------------------------------------------------------------


class Holds(np.ndarray):
    """An array of a class of one's own, which pickles by its name."""


def array_pickle(
    *,
    call: str = "numpy._core.multiarray _reconstruct",
    kind: str = "numpy ndarray",
    dtype: str = "cnumpy\ndtype\n(S'f4'\nI00\nI01\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb",
    shape: str = "(I2\nt",
    data: str = "S'aaaabbbb'\n",
    state: str | None = None,
) -> bytes:
    """`{"x": array}`, written by hand; the defaults make a whole one."""

    def named(path: str) -> str:
        return "c" + path.replace(" ", "\n") + "\n"

    given = f"(I1\n{shape}{dtype}I00\n{data}t" if state is None else state
    return f"(S'x'\n{named(call)}({named(kind)}(I0\ntS'b'\ntR{given}bd.".encode("latin-1")


def test_an_array_written_by_hand_is_read(tmp_path) -> None:
    expected = np.frombuffer(b"aaaabbbb", "f4").tolist()
    assert read(tmp_path, array_pickle())["x"].tolist() == expected
    assert pickle.loads(array_pickle())["x"].tolist() == expected


NUMPY_ATTACKS: dict[str, tuple[bytes, str]] = {
    "runstring": (
        b"cnumpy.testing._private.utils\nrunstring\n(S'x'\n}tR.",
        "numpy.testing._private.utils.runstring",
    ),
    "load": (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
    "fromfile": (b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.", "numpy.fromfile"),
    "memmap": (array_pickle(kind="numpy memmap"), "numpy.memmap"),
    "subclass": (array_pickle(kind="numpy dtype"), "foreign class"),
    "subclass by a name": (pickle.dumps({"x": np.ones(2).view(Holds)}, 2), "Holds"),
    "f2py": (b"cnumpy.f2py\ncompile\n(S'x'\ntR.", "numpy.f2py.compile"),
    "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.load\x93.", "numpy.ndarray.load"),
    "ufunc": (b"cnumpy._core\n_ufunc_reconstruct\n(S'os'\nS'system'\ntR.", "_ufunc_reconstruct"),
    "dtype of a class": (
        array_pickle(dtype="cnumpy\ndtype\n(cnumpy\nndarray\nI00\nI01\ntR"),
        "foreign dtype",
    ),
    "persistent": (b"Pwhatever\n.", "PERSID"),
    "persistent, binary": (b"\x80\x02U\x01aQ.", "outside"),
    "out of band": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "torch": (b"ctorch._utils\n_rebuild_tensor_v2\n(tR.", "torch._utils._rebuild_tensor_v2"),
    "torch storage": (b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.", "torch.storage._load_from_bytes"),
    "metadata of a framework": (b"cyacs.config\nCfgNode\n)\x81.", "yacs.config.CfgNode"),
}


@pytest.mark.parametrize("attack", sorted(NUMPY_ATTACKS))
def test_names_that_are_no_arrays_are_refused(tmp_path, attack) -> None:
    data, name = NUMPY_ATTACKS[attack]
    modules = set(sys.modules)
    assert name in refusal(tmp_path, data)
    assert set(sys.modules) <= modules


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_file_names_is_run(tmp_path, attack) -> None:
    mark = tmp_path / "mark"
    refusal(tmp_path, pickle.dumps({}))  # what reading itself imports
    modules = set(sys.modules)
    assert refusal(tmp_path, attacks(mark)[attack][0])
    assert not mark.exists()
    assert set(sys.modules) <= modules


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["value", "key", "state", "beside", "object array"])
def test_code_beside_arrays_is_not_run_either(tmp_path, place, protocol) -> None:
    mark = tmp_path / "mark"
    runs = Runs(os.system, f"touch {mark}")
    held = np.empty(1, object)
    held[0] = runs
    roots: dict[str, Any] = {
        "value": {"model": {**arrays(), "x": runs}},
        "key": {"model": {("x", runs): 1, **arrays()}},
        "state": {"blobs": arrays(), "cfg": Runs(setattr, runs, "x", 1)},
        "beside": [arrays(), runs],
        "object array": {"model": {"x": held}},
    }
    data = pickle.dumps(roots[place], protocol)
    assert refusal(tmp_path, data)
    assert not mark.exists()
    if place == "value":  # and it would have been
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, pickle; pickle.load(open(sys.argv[1], 'rb'))",
                tmp_path / "a.pkl",
            ],
            check=False,
            capture_output=True,
        )
        assert mark.exists()


# --- arrays that are none -------------------------------------------------------------------------

F4 = "cnumpy\ndtype\n(S'f4'\nI00\nI01\ntR"
BROKEN: dict[str, bytes] = {
    "too few bytes": array_pickle(shape="(I3\nt"),
    "too many bytes": array_pickle(shape="(I1\nt"),
    "no shape": array_pickle(shape="N"),
    "a negative length": array_pickle(shape="(I-2\nt"),
    "two negative lengths": array_pickle(shape="(I-1\nI-2\nt"),
    "a huge shape": array_pickle(shape="(I4611686018427387904\nI4\nt"),
    "a huge shape of nothing": array_pickle(
        shape="(I0\nI4611686018427387904\nI4611686018427387904\nt", data="S''\n"
    ),
    "a length beyond words": array_pickle(shape="(L" + "9" * 80 + "L\nt"),
    "many dimensions": array_pickle(shape="(" + "I1\n" * 70 + "I2\nt"),
    "a length that is no number": array_pickle(shape="(F2.0\nt"),
    "a length that is a truth": array_pickle(shape="(I01\nI2\nt"),
    "a dict for a state": array_pickle(state="(S'__class__'\nS'os'\nd"),
    "a pair of states": array_pickle(state="(N(dt"),
    "no state": array_pickle(state="N"),
    "a list of objects": array_pickle(data="(lI1\na"),
    "no dtype": array_pickle(dtype="N"),
    "a name for a dtype": array_pickle(dtype="cnumpy\nndarray\n"),
    "an array for a dtype": array_pickle(dtype="cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\ntR"),
    "text that is no bytes": array_pickle(data="V\\u20ac\\u20ac\\u20ac\\u20ac1234\n"),
    "a dict for a dtype's state": array_pickle(dtype=F4 + "(db"),
    "a short state of a dtype": array_pickle(dtype=F4 + "(I3\nS'<'\ntb"),
    "fields": array_pickle(dtype=F4 + "(I3\nS'<'\nN(S'a'\nt(dI-1\nI-1\nI0\ntb"),
    "a subarray": array_pickle(dtype=F4 + "(I3\nS'<'\n(N(I2\nttNNI-1\nI-1\nI0\ntb"),
    "an order of bytes that is none": array_pickle(dtype=F4 + "(I3\nS'?'\nNNNI-1\nI-1\nI0\ntb"),
    "another encoding": array_pickle(data="c_codecs\nencode\n(S'aaaabbbb'\nS'rot13'\ntR"),
    "bytes of a number": array_pickle(data="c__builtin__\nbytes\n(I99999999\ntR"),
    "a scalar without bytes": b"(S'x'\ncnumpy.core.multiarray\nscalar\n(" + F4.encode() + b"tRd.",
    "a buffer of no order": b"(S'x'\ncnumpy._core.numeric\n_frombuffer\n(S'aaaa'\n"
    + F4.encode()
    + b"(I1\ntS'K'\ntRd.",
    "a buffer of too few arguments": b"(S'x'\ncnumpy._core.numeric\n_frombuffer\n(S'aaaa'\ntRd.",
    "a call without arguments": b"(S'x'\ncnumpy.core.multiarray\n_reconstruct\n)Rd.",
    "an array never filled": b"(S'x'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntRd.",
    "an array filled twice": array_pickle()[:-2] + b"(I1\n(I2\nt" + F4.encode() + b"I00\nS'aaaabbbb'\ntbd.",
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_an_array_that_is_none_is_refused(tmp_path, name) -> None:
    assert refusal(tmp_path, BROKEN[name])


def shared_bytes(count: int, size: int) -> bytes:
    """So many arrays of the same bytes, which are in the file once."""
    array = F4.encode() + b"(K" + bytes([size // 4]) + b"tS'C'\ntR"
    calls = b"".join(
        b"U\x04"
        + struct.pack(">I", 0x61616161 + index)
        + b"cnumpy._core.numeric\n_frombuffer\n(h\x00"
        + array
        for index in range(count)
    )
    return b"\x80\x02C" + bytes([size]) + bytes(size) + b"q\x000}(" + calls + b"u."


def test_arrays_that_share_their_bytes_are_no_larger_than_the_file(tmp_path) -> None:
    assert len(read(tmp_path, shared_bytes(1, 200))) == 1
    assert "other bytes" in refusal(tmp_path, shared_bytes(1000, 200))


def laughing_arrays() -> bytes:
    """A million arrays of one text of a megabyte: a terabyte, were each of them made."""
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x000"
    encoded = b"c_codecs\nencode\nq\x01(h\x00X\x06\x00\x00\x00latin1tRq\x020"
    dtype = F4.encode() + b"q\x030cnumpy._core.numeric\n_frombuffer\nq\x040"
    one = b"h\x04(h\x02h\x03(J\x00\x00\x04\x00tX\x01\x00\x00\x00CtR"
    named = b"".join(b"J" + struct.pack("<i", index) + one for index in range(50_000))
    return (
        b"\x80\x02"
        + text
        + encoded
        + dtype
        + b"}(U\x01x"
        + one
        + b"U\x01y"
        + one
        + b"U\x01z"
        + one
        + named
        + b"u."
    )


LARGE_BOMBS = {
    **BOMBS,
    "laughing arrays": laughing_arrays(),
    "array of a huge buffer": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
    "negative string": b"\x80\x02T\xff\xff\xff\xff.",
    "endless line": b"c" + b"x" * 1_000_000,
    "nested arrays": b"(S'x'\n" + b"cnumpy.core.multiarray\n_reconstruct\n(" * 100_000,
}


@pytest.mark.parametrize("bomb", sorted(LARGE_BOMBS))
def test_a_bomb_is_refused_within_seconds(tmp_path, bomb) -> None:
    started = time.monotonic()
    refusal(tmp_path, LARGE_BOMBS[bomb])
    assert time.monotonic() - started < 20  # a shared machine; alone it is under three


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"}",
        b"text that is long enough to be none\n" * 9,
        b"<html>",
        bytes(99),
        b"\xff" * 99,
        b"PK\x03\x04x",
    ],
)
def test_garbage_is_refused(tmp_path, data) -> None:
    assert refusal(tmp_path, data)


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, protocol) -> None:
    whole = pickle.dumps({"model": arrays(), "__author__": "x"}, protocol)
    for length in range(0, len(whole) - 1, max(1, len(whole) // 80)):
        refusal(tmp_path, whole[:length])


@pytest.mark.parametrize("protocol", [2, 5])
def test_damaged_bytes_never_raise_anything_else(tmp_path, protocol) -> None:
    random = np.random.default_rng(protocol)
    whole = np.frombuffer(pickle.dumps({"a": np.arange(3.0), "b": np.ones((2, 2), "f4")}, protocol), np.uint8)
    for _ in range(600):
        damaged = whole.copy()
        damaged[random.integers(0, len(whole), 2)] = random.integers(0, 256, 2)
        try:
            found = read(tmp_path, damaged.tobytes())
        except CheckpointUnreadable:
            continue
        assert all(tensor.numel() < 200 for tensor in found.values())
