"""Checkpoint files become tensors; everything else in them is ignored or refused, and never run."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from service.checkpoints.read import read_checkpoint
from service.errors import CheckpointUnavailable, CheckpointUnreadable

POINTER = "#/backbone/init_cfg/checkpoint"
BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path: Path, value: object, *, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def state() -> dict[str, torch.Tensor]:
    return {"conv1.weight": torch.randn(4, 3, 2, 2), "bn1.num_batches_tracked": torch.tensor(7)}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointUnreadable) as raised:
        read_checkpoint(path, pointer=POINTER)
    assert raised.value.faults[0].pointer == POINTER
    assert str(path.parent) not in raised.value.detail
    return raised.value.faults[0].detail


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach())


# --- layouts and formats ------------------------------------------------------------------------


def test_safetensors_are_read(tmp_path) -> None:
    expected = state()
    save_file(expected, tmp_path / "a.safetensors")
    read = read_checkpoint(tmp_path / "a.safetensors", pointer=POINTER)
    assert_same({name: read[name] for name in expected}, expected)


@BOTH_FORMATS
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state", "model_state_dict"])
def test_every_layout_is_unwrapped(tmp_path, wrapper, zipped) -> None:
    expected = state()
    whole = expected if wrapper is None else {"epoch": 3, "meta": {"x": [1]}, wrapper: expected}
    assert_same(read_checkpoint(saved(tmp_path / "a.pth", whole, zipped=zipped), pointer=POINTER), expected)


@BOTH_FORMATS
def test_a_modules_own_state_dict_is_read(tmp_path, zipped) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = saved(tmp_path / "a.pt", module.state_dict(), zipped=zipped)
    assert_same(read_checkpoint(path, pointer=POINTER), dict(module.state_dict()))


@BOTH_FORMATS
def test_a_training_checkpoint_with_its_optimizer_is_read(tmp_path, zipped) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1, "lr": 0.1}
    path = saved(tmp_path / "a.pyth", whole, zipped=zipped)
    assert_same(read_checkpoint(path, pointer=POINTER), dict(module.state_dict()))


@BOTH_FORMATS
def test_parameters_are_their_tensors(tmp_path, zipped) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    read = read_checkpoint(saved(tmp_path / "a.pth", {"x": parameter}, zipped=zipped), pointer=POINTER)
    assert type(read["x"]) is torch.Tensor
    assert not read["x"].requires_grad
    assert torch.equal(read["x"], parameter.data)


def test_a_prefix_of_data_parallel_training_is_taken_off(tmp_path) -> None:
    path = saved(tmp_path / "a.pth", {"module.a.w": torch.ones(1), "module.module": torch.ones(2)})
    assert sorted(read_checkpoint(path, pointer=POINTER)) == ["a.w", "module"]


def test_a_bare_name_is_not_overwritten_by_the_prefixed_one(tmp_path) -> None:
    path = saved(tmp_path / "a.pth", {"module.a": torch.ones(1), "a": torch.zeros(1)})
    read = read_checkpoint(path, pointer=POINTER)
    assert (read["a"].item(), read["module.a"].item()) == (0, 1)


def test_what_is_no_tensor_in_a_bare_dict_is_left_out(tmp_path) -> None:
    path = saved(
        tmp_path / "a.pth", {"x": torch.ones(2), "epoch": 3, "arch": "r18", 5: torch.ones(1), "y": [1]}
    )
    assert list(read_checkpoint(path, pointer=POINTER)) == ["x"]


@pytest.mark.parametrize(
    "whole",
    [{}, {"epoch": 1}, [torch.ones(1)], torch.ones(2), {"state_dict": {}}, {"state_dict": 3}, None, "x"],
)
def test_a_file_without_named_tensors_says_so(tmp_path, whole) -> None:
    assert "no state_dict found" in refusal(saved(tmp_path / "a.pth", whole))


@BOTH_FORMATS
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.bool,
    ],
)
def test_dtypes_are_kept(tmp_path, dtype, zipped) -> None:
    expected = {"x": torch.tensor([0, 1, 1]).to(dtype), "y": torch.ones(2)}
    assert_same(
        read_checkpoint(saved(tmp_path / "a.pth", expected, zipped=zipped), pointer=POINTER), expected
    )


@BOTH_FORMATS
def test_views_empty_and_shared_tensors_are_right(tmp_path, zipped) -> None:
    base = torch.arange(24.0)
    expected = {
        "transposed": base.reshape(4, 6).t(),
        "slice": base[3:9:2],
        "scalar": base[5],
        "empty": torch.empty(0, 3),
        "expanded": torch.ones(1).expand(5),
        "whole": base,
    }
    assert_same(
        read_checkpoint(saved(tmp_path / "a.pth", expected, zipped=zipped), pointer=POINTER), expected
    )


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path) -> None:
    path = saved(tmp_path / "a.pth", {"x": torch.zeros(3)})
    read_checkpoint(path, pointer=POINTER)["x"].fill_(9)
    assert read_checkpoint(path, pointer=POINTER)["x"].tolist() == [0, 0, 0]


def test_not_a_number_is_a_weight_like_any_other(tmp_path) -> None:
    path = saved(tmp_path / "a.pth", {"x": torch.tensor([float("nan"), float("inf")])})
    assert read_checkpoint(path, pointer=POINTER)["x"].isnan().tolist() == [True, False]


# --- metadata of the frameworks -----------------------------------------------------------------


class HistoryBuffer:
    """Pickles as OpenMMLab's does: by its class, with arrays in its state."""

    def __init__(self) -> None:
        self.__dict__.update({"_log": np.arange(4.0), "_max_length": 1_000_000})


class ConfigDict(dict[str, Any]):
    """Pickles as a dict subclass with items and a state."""


@pytest.fixture
def foreign_module(monkeypatch) -> Callable[..., Any]:
    """Gives one of our classes a foreign library's name while a file is written."""

    def rename(kind: type, name: str) -> Any:
        parents = name.split(".")
        for depth in range(1, len(parents) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parents[:depth]), types.ModuleType(parents[depth - 1]))
        monkeypatch.setattr(kind, "__module__", name)
        setattr(sys.modules[name], kind.__name__, kind)
        return kind

    return rename


@BOTH_FORMATS
def test_the_metadata_of_openmmlab_files_is_no_obstacle(
    tmp_path, foreign_module, monkeypatch, zipped
) -> None:
    history = foreign_module(HistoryBuffer, "mmengine.logging.history_buffer")
    config = foreign_module(ConfigDict, "mmengine.config.config")
    meta = {
        "CLASSES": ("cat", "dog"),
        "cfg": config(a=1, b=config(c=[1])),
        "scalar": np.float64(0.5),
        "array": np.arange(3),
        "dtype": np.dtype("f4"),
        "namespace": argparse.Namespace(depth=50),
        "path": Path("x"),
        "time": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, x=[1]),
        "deque": collections.deque([1]),
        "complex": 1j,
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "float32": torch.float32,
        "slice": slice(1, 2),
        "long": 2**80,
    }
    expected = state()
    whole = {"state_dict": expected, "meta": meta, "message_hub": {"log_scalars": {"loss": history()}}}
    path = saved(tmp_path / "a.pth", whole, zipped=zipped)
    monkeypatch.undo()
    assert_same(read_checkpoint(path, pointer=POINTER), expected)
    assert "mmengine" not in sys.modules


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, protocol) -> None:
    expected = state()
    whole = {
        "state_dict": expected,
        "meta": {"array": np.arange(3), "name": "é", "list": [1, -5, 2**40, 1.5]},
    }
    torch.save(whole, tmp_path / "a.pth", pickle_protocol=protocol)
    assert_same(read_checkpoint(tmp_path / "a.pth", pointer=POINTER), expected)


# --- code that must not run ---------------------------------------------------------------------


def zipped_pickle(path: Path, data: bytes, **records: bytes) -> Path:
    """A file of torch's zip format whose pickle is hand-written."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, body in records.items():
            archive.writestr(f"a/data/{name}", body)
    return path


def legacy_pickle(path: Path, data: bytes) -> Path:
    header = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(header) + data + pickle.dumps([], 2))
    return path


class Runs:
    """Unpickled by `pickle`, calls `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class RunningDict(dict[str, Any]):
    """A state dict that runs something when it is unpickled."""

    def __init__(self, call: Runs, **items: object) -> None:
        super().__init__(**items)
        self.call = call

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call.__reduce__()


def attacks(mark: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that make the file `mark` under `pickle.loads`, and the name that gives each away."""
    touch = f"touch {mark}"
    code = f"open({str(mark)!r}, 'w').close()"
    nested = Runs(getattr, Runs(__import__, "os"), "system")
    quoted = f"S'{touch}'\n".encode()
    return {
        "os.system": (pickle.dumps(Runs(os.system, touch), 2), "posix.system"),
        "os.system, framed": (pickle.dumps(Runs(os.system, touch), 4), "posix.system"),
        "Popen": (pickle.dumps(Runs(subprocess.Popen, ["touch", str(mark)]), 4), "subprocess.Popen"),
        "eval": (pickle.dumps(Runs(builtins.eval, code), 4), "builtins.eval"),
        "eval, old name": (b"c__builtin__\neval\n(S" + repr(code).encode() + b"\ntR.", "builtins.eval"),
        "nested": (pickle.dumps({"state_dict": {"x": nested}}, 2), "getattr"),
        "dict": (pickle.dumps(RunningDict(Runs(os.system, touch), x=1), 2), "posix.system"),
        "INST": (b"(" + quoted + b"ios\nsystem\n.", "INST"),
        "OBJ": (b"(cos\nsystem\n" + quoted + b"o.", "os.system"),
        "numpy": (b"cnumpy.testing._private.utils\nrunstring\n(S'x'\n}tR.", "no state_dict"),
        "torch": (b"ctorch\nload\n(" + quoted + b"tR.", "torch.load"),
        "torch internals": (b"ctorch._utils\n_import_dotted_name\n(S'os.system'\ntR.", "_import_dotted_name"),
        "torch globals": (b"ctorch.serialization\nadd_safe_globals\n(]tR.", "add_safe_globals"),
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x0b_utils.load\x93.", "torch._utils.load"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "numpy by path": (b"\x80\x04\x8c\x08numpyfoo\x8c\x04load\x93.", "numpyfoo.load"),
    }


ATTACKS = sorted(attacks(Path("x")))


@pytest.mark.parametrize("write", [zipped_pickle, legacy_pickle])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_file_names_is_run(tmp_path, attack, write) -> None:
    mark = tmp_path / "mark"
    data, name = attacks(mark)[attack]
    refusal(write(tmp_path / "plain.pth", b"}."))  # what reading itself imports
    modules = set(sys.modules)
    assert name in refusal(write(tmp_path / "a.pth", data))
    assert not mark.exists()
    assert set(sys.modules) <= modules


@pytest.mark.parametrize("attack", ["os.system", "Popen", "eval", "dict"])
def test_the_attacks_are_real(tmp_path, attack) -> None:
    mark = tmp_path / "mark"
    made = pickle.loads(attacks(mark)[attack][0])
    if isinstance(made, subprocess.Popen):
        made.wait(10)
    assert mark.exists()


def test_a_whole_module_is_no_checkpoint(tmp_path) -> None:
    for zipped in (True, False):
        detail = refusal(saved(tmp_path / "a.pth", torch.nn.Linear(1, 1), zipped=zipped))
        assert "holds objects that are not tensors (torch.nn.modules.linear.Linear)" in detail


def test_a_refused_name_is_clipped(tmp_path) -> None:
    data = b"cevil\n" + b"x" * 100_000 + b"\n."
    assert len(refusal(zipped_pickle(tmp_path / "a.pth", data))) < 400


# --- tensors that are not served ----------------------------------------------------------------


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecation
        return torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)


@BOTH_FORMATS
@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.eye(2, dtype=torch.complex64), "complex"),
        (torch.eye(2, device="meta"), "meta"),
        (torch.eye(2).to(torch.float8_e4m3fn), "8-bit"),
        (quantised(), "quantised"),
    ],
    ids=["sparse", "complex", "meta", "float8", "quantised"],
)
def test_tensors_of_another_kind_are_refused(tmp_path, tensor, word, zipped) -> None:
    assert word in refusal(saved(tmp_path / "a.pth", {"x": tensor}, zipped=zipped))


def test_other_numbers_in_safetensors_are_refused(tmp_path) -> None:
    save_file({"x": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "a.safetensors")
    assert "float8_e5m2" in refusal(tmp_path / "a.safetensors")


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".pth", ".pt", ".bin", ".pyth", ".safetensors"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"not a checkpoint, but text\n" * 10,
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        bytes(1000),
        b"\xff" * 1000,
        b"PK\x03\x04" + bytes(100),
        b"PK\x05\x06" + bytes(18),
        b"PK\x03\x04" + bytes(40) + b"PK\x05\x06" + b"\xff" * 18,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        b"\x80\x02.",
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    ],
)
def test_garbage_is_refused(tmp_path, data, extension) -> None:
    path = tmp_path / f"a{extension}"
    path.write_bytes(data)
    assert refusal(path)


@pytest.mark.parametrize("extension", [".pth", ".safetensors", ".legacy.pth"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, extension) -> None:
    path = tmp_path / f"whole{extension}"
    if extension == ".safetensors":
        save_file(state(), path)
    else:
        saved(path, state(), zipped=extension == ".pth")
    whole = path.read_bytes()
    cut = tmp_path / f"cut{extension}"
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        cut.write_bytes(whole[:length])
        refusal(cut)


def test_damaged_bytes_never_raise_anything_else(tmp_path) -> None:
    generator = np.random.default_rng(0)
    for zipped in (True, False):
        whole = np.frombuffer(saved(tmp_path / "w.pth", state(), zipped=zipped).read_bytes(), np.uint8)
        for _ in range(300):
            damaged = whole.copy()
            damaged[generator.integers(0, len(whole), 3)] = generator.integers(0, 256, 3)
            (tmp_path / "d.pth").write_bytes(damaged.tobytes())
            try:
                read = read_checkpoint(tmp_path / "d.pth", pointer=POINTER)
            except CheckpointUnreadable:
                continue
            assert all(tensor.numel() < 100 for tensor in read.values())


def tensor_pickle(size: str, stride: str, *, offset: int = 0, count: int = 4) -> bytes:
    """`{"x": _rebuild_tensor_v2(FloatStorage "0" of count elements, offset, size, stride, False, {})}`."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{count}\ntQ"
    return (
        f"(S'x'\nctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{size}{stride}I00\n(dtRd.".encode()
    )


def numbers(*values: int) -> str:
    return "(" + "".join(f"I{value}\n" for value in values) + "t"


def test_a_hand_written_tensor_is_read(tmp_path) -> None:
    body = struct.pack("<4f", 1, 2, 3, 4)
    path = zipped_pickle(tmp_path / "a.pth", tensor_pickle(numbers(2, 2), numbers(1, 2)), **{"0": body})
    assert read_checkpoint(path, pointer=POINTER)["x"].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    "data",
    [
        tensor_pickle(numbers(5), numbers(1)),
        tensor_pickle(numbers(4), numbers(2)),
        tensor_pickle(numbers(4), numbers(1), offset=1),
        tensor_pickle(numbers(4), numbers(1), offset=-1),
        tensor_pickle(numbers(-4), numbers(1)),
        tensor_pickle(numbers(2), numbers(-1)),
        tensor_pickle(numbers(2**40), numbers(0)),
        tensor_pickle(numbers(2**40, 2**40), numbers(0, 0)),
        tensor_pickle(numbers(*[1] * 70), numbers(*[1] * 70)),
        tensor_pickle(numbers(0, 2**62, 2**62), numbers(1, 1, 1)),
        tensor_pickle(numbers(2**80), numbers(1)),
        tensor_pickle(numbers(4), numbers(1, 1)),
        tensor_pickle(numbers(4), numbers(1), count=2**40),
        tensor_pickle(numbers(4), numbers(1), count=-1),
        tensor_pickle("N", "N"),
        tensor_pickle("S'x'\n", numbers(1)),
        tensor_pickle("(F4.0\nt", numbers(1)),
        tensor_pickle("(I01\nt", "(I01\nt"),
    ],
)
def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path, data) -> None:
    assert refusal(zipped_pickle(tmp_path / "a.pth", data, **{"0": bytes(16)}))


def test_a_tensor_without_a_storage_is_refused(tmp_path) -> None:
    assert refusal(zipped_pickle(tmp_path / "a.pth", tensor_pickle(numbers(4), numbers(1))))


def test_memory_that_the_file_does_not_hold_is_never_shown(tmp_path) -> None:
    # torch.load would hand out uninitialised memory here: the storage is announced and then not stored.
    assert refusal(legacy_pickle(tmp_path / "a.pth", tensor_pickle(numbers(4), numbers(1))))


def big_endian(path: Path) -> Path:
    zipped_pickle(path, tensor_pickle(numbers(4), numbers(1)), **{"0": bytes(16)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/byteorder", "big")
    return path


def test_big_endian_files_are_refused(tmp_path) -> None:
    assert "big-endian" in refusal(big_endian(tmp_path / "a.pth"))


def test_torchscript_is_refused(tmp_path) -> None:
    path = zipped_pickle(tmp_path / "a.pth", b"}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/constants.pkl", b"}.")
    assert "TorchScript" in refusal(path)


# --- bombs --------------------------------------------------------------------------------------


def compressed(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"}." + bytes(50_000_000))
    return path


def billion_laughs() -> bytes:
    """A list of two of the list before, sixty deep; named by what it holds, its text would be 2^60 long."""
    steps = b"".join(b"(h%ch%cl" % (index, index) + b"q%c" % (index + 1) for index in range(60))
    return b"\x80\x02]q\x00" + steps + b"0h\x3ch\x3c\x93."


BOMBS: dict[str, bytes] = {
    "deep": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "deep key": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "laughs": billion_laughs(),
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "call": b"cbuiltins\nbytearray\n(I99999999999\ntR.",
    "opcodes": b"\x80\x02" + b"N" * 3_000_000 + b".",
}


@pytest.mark.parametrize("bomb", sorted(BOMBS))
def test_a_bomb_is_refused_within_seconds(tmp_path, bomb) -> None:
    path = zipped_pickle(tmp_path / "a.pth", BOMBS[bomb])
    started = time.monotonic()
    refusal(path)
    assert time.monotonic() - started < 20  # a shared machine; alone it is under three


def test_compressed_records_are_refused(tmp_path) -> None:
    assert "compressed" in refusal(compressed(tmp_path / "a.pth"))


def test_a_pickle_over_its_limit_is_refused(tmp_path) -> None:
    data = io.BytesIO()
    data.write(b"\x80\x02X" + struct.pack("<I", 65 * 2**20))
    data.write(bytes(65 * 2**20) + b".")
    assert "too long" in refusal(zipped_pickle(tmp_path / "a.pth", data.getvalue()))


def test_a_file_that_went_away_is_unavailable(tmp_path) -> None:
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(CheckpointUnavailable):
            read_checkpoint(tmp_path / name, pointer=POINTER)


@BOTH_FORMATS
def test_a_name_that_is_not_text_is_refused(tmp_path, zipped) -> None:
    path = saved(tmp_path / "x.pth", {**state(), "a\ud800": torch.zeros(1)}, zipped=zipped)
    assert "not text" in refusal(path)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "F6_E2M3"])
def test_types_that_only_the_format_knows_are_refused(tmp_path, kind) -> None:
    header = json.dumps({"a": {"dtype": kind, "shape": [8], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert refusal(path)
