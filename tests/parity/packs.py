"""Parity packs: outputs of the real libraries for a config, weights and inputs that anybody can make again.

`load_pack` reads either kind of JSON into one neutral `Pack`; `write_checkpoint` makes the file that a client
would have; `relative_error` compares a level with what the library gave.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.parity.recipe import Entry, detectron2_rule, fill, make_input, openmmlab_rule, timm_rule

FOLDER = Path(__file__).parent / "packs"
DEFAULT_TOLERANCE = 1e-5
# Gates near 0 and 1 enlarge float32's rounding: with another number of threads the library itself is this far off.
LOOSER_TOLERANCES = {
    "mmpretrain-SEResNet-50": 1e-3,
    "mmpretrain-SEResNeXt-50": 1e-3,
    "mmpretrain-MobileOne-s4": 5e-5,
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HEAD = {"head.fc.weight": (10, 8), "head.fc.bias": (10,)}


@dataclass(frozen=True)
class Expected:
    """One output of the library.

    `shape` is what the service returns; where `channels_last`, the library gives the same map as NHWC and
    `positions` count in that order. `tolerance` bounds `relative_error`.
    """

    name: str
    shape: tuple[int, ...]
    l2: float
    positions: NDArray[np.int64]
    values: NDArray[np.float64]
    tolerance: float
    channels_last: bool = False


@dataclass(frozen=True)
class Frozen:
    """What the library freezes when `update` is put into the config.

    `of` counts its parameters; None where they are all entries but statistics.
    """

    update: Mapping[str, Any]
    parameters: tuple[str, ...]
    norms: tuple[str, ...]
    of_norms: int
    of: int | None = None


@dataclass(frozen=True)
class Pack:
    """One parity case.

    Attributes:
        config: what a client sends, without weights.
        entries: the state dict, in order, by names without `prefix`.
        aliases: names of entries that repeat another, and that other.
        prefix: what the library's checkpoints put before each name.
        inputs: (name, shape) of each input tensor; a backbone has one.
        outputs: in the order the service returns them, which is the order asked.
        suffix: of the checkpoint file.
        computed: entries that follow from the config, which no checkpoint needs.
        written_as: where the checkpoint is in another code's layout, its names there; entries that are not among
            them are not written.
    """

    name: str
    config: Mapping[str, Any]
    entries: tuple[Entry, ...]
    aliases: Mapping[str, str]
    rule: Callable[[Entry], str | None]
    gain: float
    prefix: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[Expected, ...]
    frozen: tuple[Frozen, ...]
    suffix: str
    computed: frozenset[str] = frozenset()
    written_as: Mapping[str, str] | None = None

    @property
    def is_openmmlab(self) -> bool:
        """Whether the config and the checkpoint are OpenMMLab's."""
        return self.rule is openmmlab_rule

    @property
    def is_neck(self) -> bool:
        """Whether the pack is of a neck."""
        return self.prefix == "neck."

    def checkpoint_name(self) -> str:
        """A file name that packs with the same weights share."""
        digest = hashlib.sha256(
            repr((self.entries, self.gain, self.prefix, self.written_as)).encode()
        ).hexdigest()
        return f"parity-{digest[:16]}{self.suffix}"

    def config_with_weights(self) -> dict[str, Any]:
        """The config as a client sends it once the checkpoint lies in the checkpoint folder."""
        name = self.checkpoint_name()
        if not self.is_openmmlab:
            return {**self.config, "checkpoint": name}
        return {**self.config, "init_cfg": {"type": "Pretrained", "checkpoint": name, "prefix": self.prefix}}

    def state(self) -> dict[str, Tensor]:
        """The weights by names without prefix; what a network computes itself is left out.

        Packs share these tensors: not to be written into.
        """
        found = {}
        for entry in self.entries:
            rule = self.rule(entry)
            if rule is not None and entry.name not in self.aliases and entry.name not in self.computed:
                found[entry.name] = _tensor(entry, rule, self.gain)
        for name, original in self.aliases.items():
            if original in found:  # no table that a network computes
                found[name] = found[original]
        if self.written_as is not None:
            return {theirs: official_swin(name, found[name]) for name, theirs in self.written_as.items()}
        return found

    def input_arrays(self) -> list[NDArray[np.float32]]:
        """The input tensors, NCHW and already normalised."""
        return [make_input(name, shape) for name, shape in self.inputs]


def official_swin(name: str, tensor: Tensor) -> Tensor:
    """A tensor of an OpenMMLab Swin in the official code's order: its merging of patches has neighbours outermost."""
    if not re.search(r"downsample\.(norm|reduction)\.", name):
        return tensor
    quarters = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :]
    return quarters.flatten(-2).contiguous()


@lru_cache(maxsize=1024)  # half of the packs are of a few networks
def _tensor(entry: Entry, rule: str, gain: float) -> Tensor:
    return torch.from_numpy(np.array(fill(entry, rule, gain)))


def pack_names(pattern: str = "*") -> list[str]:
    """Names of the packs, sorted, as `openmmlab/mmpretrain-ResNet-18`."""
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in _files(pattern))


def _files(pattern: str) -> list[Path]:
    return list(FOLDER.glob(f"{pattern}.json" if "/" in pattern else f"*/{pattern}.json"))


def load_pack(name: str) -> Pack:
    """The pack of a name that `pack_names` gives."""
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    return READERS[name.partition("/")[0]](raw)


def _entries(raw: Mapping[str, Any]) -> tuple[Entry, ...]:
    return tuple(Entry(name, tuple(shape), dtype) for name, shape, dtype in raw["checkpoint"]["keys"])


def _expected(
    name: str, raw: Mapping[str, Any], tolerance: float, *, channels_last: bool = False
) -> Expected:
    shape = tuple(raw["shape"])
    if channels_last:
        shape = (shape[0], shape[3], shape[1], shape[2])
    positions, values = zip(*raw["samples"], strict=True)
    return Expected(
        name, shape, raw["l2"], np.array(positions), np.array(values, np.float64), tolerance, channels_last
    )


# --- OpenMMLab ------------------------------------------------------------------------------------


def _openmmlab(raw: Mapping[str, Any]) -> Pack:
    inputs = raw.get("inputs") or [raw["input"]]
    tolerance = LOOSER_TOLERANCES.get(raw["name"], DEFAULT_TOLERANCE)
    entries, computed, written_as = _entries(raw), frozenset(raw["checkpoint"]["computed"]), None
    if raw["recipe"].get("filled_by") == "mm":
        entries = tuple(Entry(key, tuple(shape), dtype) for key, shape, dtype in raw["checkpoint"]["mm_keys"])
        computed = frozenset(entry.name for entry in entries if not entry.is_float)
        absent = computed.union(raw["checkpoint"]["missing_after_convert"])
        written_as = {ours: theirs for ours, theirs in raw["checkpoint"]["key_map"] if ours not in absent}
    of = sum(entry.leaf not in STATISTICS and entry.name not in computed for entry in entries)
    return Pack(
        name=raw["name"],
        config=raw["config"],
        entries=entries,
        aliases={},
        rule=openmmlab_rule,
        gain=raw["recipe"]["gain"],
        prefix=raw["checkpoint"]["prefix"],
        inputs=tuple((one["name"], tuple(one["shape"])) for one in inputs),
        outputs=tuple(_expected(one["path"], one, tolerance) for one in raw["outputs"]),
        frozen=tuple(
            _openmmlab_frozen(key, one, of)
            for key, one in raw.get("frozen", {}).items()
            if "error" not in one
        ),
        suffix=".pth",
        computed=computed,
        written_as=written_as,
    )


def _openmmlab_frozen(key: str, raw: Mapping[str, Any], of: int) -> Frozen:
    """`key` is a value of frozen_stages, a JSON object to update the config with, or `asis`."""
    update = {} if key == "asis" else json.loads(key)
    update = update if isinstance(update, dict) else {"frozen_stages": update}
    return Frozen(update, tuple(raw["requires_grad_false"]), tuple(raw["norm_eval"]), raw["n_norms"], of)


# --- timm and torchvision -------------------------------------------------------------------------


def _timm_or_torchvision(raw: Mapping[str, Any]) -> Pack:
    config = raw["config_flat"]
    tolerances = raw["suggested_rel_l2_tol"]
    outputs = [
        _expected(name, one, tolerances[name], channels_last=_is_channels_last(raw, name, one["shape"]))
        for name, one in raw["outputs"].items()
    ]
    return Pack(
        name=raw["name"],
        config=config,
        entries=_entries(raw),
        aliases=raw["checkpoint"]["aliases"],
        rule=timm_rule,
        gain=1.0,
        prefix="",
        inputs=(("input", tuple(raw["input"]["shape"])),),
        outputs=tuple(_in_asked_order(outputs, config.get("out_indices"))),
        frozen=(),
        suffix=".safetensors" if raw["library"] == "timm" else ".pth",
    )


def _is_channels_last(raw: Mapping[str, Any], name: str, shape: Sequence[int]) -> bool:
    """Both libraries' Swin stages are NHWC; the nodes after torchvision's final permute are not."""
    if len(shape) != 4:
        return False
    if raw["output_shape"] is not None:  # timm says how many channels a feature has
        channels: int = raw["output_shape"][name][0]
        return shape[1] != channels
    return "NHWC" in raw["notes"] and name != "out"


def _in_asked_order(outputs: list[Expected], indices: Sequence[int] | None) -> list[Expected]:
    """The outputs by the order of `out_indices`; the packs list them in the order of the network."""
    if indices is None:
        return outputs
    ranks = [sorted(indices).index(index) for index in indices]
    return [outputs[rank] for rank in ranks]


# --- detectron2 and detrex ------------------------------------------------------------------------


def _detectron2(raw: Mapping[str, Any]) -> Pack:
    tolerances, frozen = raw["suggested_rel_l2_tol"], raw["frozen"]
    entries = _entries(raw)
    norms = tuple(
        dict.fromkeys(entry.name[: -len(".running_var")] for entry in entries if entry.leaf == "running_var")
    )
    return Pack(
        name=raw["name"],
        config=raw["config"],
        entries=entries,
        aliases=raw["checkpoint"]["aliases"],
        rule=detectron2_rule,
        gain=1.0,
        prefix="",
        inputs=(("input", tuple(raw["input"]["shape"])),),
        outputs=tuple(_expected(name, one, tolerances[name]) for name, one in raw["outputs"].items()),
        frozen=(
            Frozen(
                {},
                tuple(frozen["params"]),
                norms if frozen["frozen_bn"] == "ALL" else tuple(frozen["frozen_bn"]),
                frozen["n_norms"],
                frozen["n_params"],
            ),
        ),
        suffix=".pth",
    )


READERS: Mapping[str, Callable[[Mapping[str, Any]], Pack]] = {
    "openmmlab": _openmmlab,
    "timm-torchvision": _timm_or_torchvision,
    "detectron2": _detectron2,
}


# --- files and comparison -------------------------------------------------------------------------


def write_checkpoint(pack: Pack, path: Path) -> None:
    """Write the weights as the pack's library would: bare tensors, OpenMMLab's `meta` and `state_dict`, `model`."""
    state = pack.state()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    elif pack.is_openmmlab:
        torch.save(_openmmlab_file(pack.prefix, state), path)
    elif pack.rule is detectron2_rule:
        torch.save({"model": state, "iteration": 89999}, path)
    else:
        torch.save(state, path)


def _openmmlab_file(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """With a head beside the backbone, and the numpy scalars that real files carry in their `meta`."""
    head = {name: torch.zeros(shape) for name, shape in HEAD.items()}
    meta = {
        "epoch": 100,
        "iter": np.int64(1),
        "seed": np.int32(7),
        "lr": np.float64(0.1),
        "CLASSES": ("cat",),
    }
    return {"meta": meta, "state_dict": {**{prefix + name: tensor for name, tensor in state.items()}, **head}}


def relative_error(level: NDArray[Any], expected: Expected) -> float:
    """The larger of two relative L2 errors: over the 64 samples, and of the norm of the whole level."""
    if tuple(level.shape) != expected.shape:
        raise AssertionError(f"{expected.name}: shape {level.shape}, expected {expected.shape}")
    values = np.asarray(level, np.float64)
    flat = (values.transpose(0, 2, 3, 1) if expected.channels_last else values).reshape(-1)
    samples = float(np.linalg.norm(flat[expected.positions] - expected.values) / _norm(expected.values))
    return max(samples, abs(float(np.linalg.norm(flat)) - expected.l2) / max(expected.l2, 1e-12))


def _norm(values: NDArray[np.float64]) -> float:
    return max(float(np.linalg.norm(values)), 1e-12)
