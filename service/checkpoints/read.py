"""Read a checkpoint file into tensors, never running code from it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from service.checkpoints.copies import OtherBytesError, copied
from service.checkpoints.numpy_files import ArrayRecord, read_numpy_file
from service.checkpoints.pickles import DamagedPickleError, ForeignObjectError
from service.checkpoints.torch_files import DTYPES, TensorRecord, is_torch_file, read_torch_file
from service.errors import CheckpointUnavailable, CheckpointUnreadable, Unavailable

StateDict = dict[str, Tensor]

# Where the libraries put the state dict: OpenMMLab and Lightning, detectron2 and timm's papers, pycls,
# others.
WRAPPERS: Final = ("state_dict", "model", "model_state", "model_state_dict")
# Caffe2 put its networks into `blobs`, beside what the optimiser had for each of them.
ARRAY_WRAPPERS: Final = (*WRAPPERS, "blobs")
MOMENTUM: Final = "_momentum"
DATA_PARALLEL: Final = "module."
MAX_WRAPPERS: Final = 2
R = TypeVar("R")


def read_checkpoint(path: Path, *, pointer: str, sha256: str = "") -> StateDict:
    """The tensors of a file, on the CPU and of the dtype they have in it, by their names.

    They are views of a copy of the file in memory, which nobody can change. A state
    dict is taken out of `state_dict`, `model`, `model_state` or `model_state_dict`, or is the file itself;
    what is not a tensor is left out, and a leading `module.` (data parallel training) is taken off. Of a `.pkl` the
    arrays are read, also out of Caffe2's `blobs`, without its momenta.

    Args:
        path: of the file; its ending says how it is read.
        pointer: the key of the request to blame.
        sha256: of the bytes that it had when it was looked at; empty if any will do.

    Raises:
        CheckpointUnreadable: not a file of dense real tensors; nothing that it names has been run.
        CheckpointUnavailable: the file went away.
        Unavailable: it has other bytes by now.
    """
    reader = _READERS.get(path.suffix.lower(), _read_torch)
    try:
        state = reader(copied(path, sha256))
    except OtherBytesError as error:
        detail = f"{pointer}: the checkpoint file was replaced while it was being loaded; ask again"
        raise Unavailable(detail) from error
    except DamagedPickleError as error:
        detail = f"is not a whole checkpoint file: {error}"
        raise CheckpointUnreadable(pointer, detail) from error
    except ForeignObjectError as error:
        raise CheckpointUnreadable(pointer, error.what) from error
    except OSError as error:
        raise CheckpointUnavailable(pointer, "the checkpoint file can no longer be read") from error
    if not state:
        raise CheckpointUnreadable(pointer, "no state_dict found: the file holds no named tensors")
    if not all(_is_text(name) for name in state):
        raise CheckpointUnreadable(pointer, "a tensor's name is not text: it has half of a character")
    return _without_data_parallel(state)


def _read_safetensors(mapped: mmap.mmap) -> StateDict:
    with (
        mapped
    ):  # the library takes bytes, and copies the tensors out of them: no more than two of the three at a time
        data = mapped[:]
    try:
        state: StateDict = load(data)
    except SafetensorError as error:  # its text is of offsets in the header
        raise DamagedPickleError("its safetensors header and its data do not agree") from error
    except KeyError as error:  # of the library's own table of types, which lags behind its format
        raise ForeignObjectError("holds numbers of a type that no backbone here has") from error
    for tensor in state.values():
        if str(tensor.dtype) not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ForeignObjectError(f"holds {kind} tensors, which no backbone here has")
    return state


def _read_torch(mapped: mmap.mmap) -> StateDict:
    file = read_torch_file(mapped)
    named = _state_dict(file.root, TensorRecord, WRAPPERS)
    try:
        return {name: file.storages.tensor(record) for name, record in named.items()}
    except RuntimeError as error:  # torch's own bounds, should ours have let something through
        raise DamagedPickleError("a tensor that torch refuses") from error


def _read_pickle(mapped: mmap.mmap) -> StateDict:
    """A pickle of arrays; what `torch.save` has written is that, whatever it is called."""
    if is_torch_file(mapped):
        return _read_torch(mapped)
    file = read_numpy_file(mapped)
    named = _state_dict(file.root, ArrayRecord, ARRAY_WRAPPERS)
    try:
        return {name: file.tensor(record) for name, record in named.items() if not name.endswith(MOMENTUM)}
    except (RuntimeError, UnicodeEncodeError) as error:  # torch's own bounds, or text that is no bytes
        raise DamagedPickleError("an array that is none") from error


_READERS: Final[Mapping[str, Callable[[mmap.mmap], StateDict]]] = {
    ".safetensors": _read_safetensors,
    ".pkl": _read_pickle,
}


def _state_dict(root: object, kind: type[R], wrappers: Sequence[str]) -> dict[str, R]:
    for _ in range(MAX_WRAPPERS):
        if not isinstance(root, dict):
            return {}
        inner = next((root[key] for key in wrappers if isinstance(root.get(key), dict)), None)
        if inner is None:
            break
        root = inner
    return _records(root, kind)


def _records(mapping: object, kind: type[R]) -> dict[str, R]:
    if not isinstance(mapping, dict):
        return {}
    return {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, kind)}


def _is_text(name: str) -> bool:
    """Whether UTF-8 can write it: pickles may name tensors with lone surrogates, and replies could not."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _without_data_parallel(state: StateDict) -> StateDict:
    """Names without a leading `module.`, save where the bare name is there besides."""
    named: StateDict = {}
    for name, tensor in state.items():
        bare = name.removeprefix(DATA_PARALLEL)
        named[name if bare in state else bare] = tensor
    return named
