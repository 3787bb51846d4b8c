"""A loaded model: a backbone with its weights on the device, and how it runs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from service.backbones.translation import load_any
from service.checkpoints.read import StateDict, read_checkpoint
from service.checkpoints.resolve import CheckpointFile
from service.config.spec import Level, LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch
from service.necks.base import Neck
from service.runtime.engines.base import BackboneEngine
from service.runtime.engines.inductor import InductorEngine
from service.runtime.engines.samples import Samples
from service.runtime.engines.torch_engine import TorchEngine, drop_weights, module_bytes
from service.runtime.plan import NeckPlan, Plan

ID_LENGTH = 20
NECK_PREFIX = "neck."
N = TypeVar("N", bound=nn.Module)


@dataclass
class LoadedNetwork(ABC):
    """A network in memory. `id` is a digest of its architecture and its weights; `bytes` counts both."""

    id: str
    type: str
    bytes: int
    device: torch.device
    checkpoint: CheckpointFile | None
    keys: LoadedKeys

    @abstractmethod
    def close(self) -> None:
        """Let go of its memory. It must not be run any more."""


@dataclass
class LoadedNeck(LoadedNetwork):
    """A neck in memory; it may stand behind any backbone that gives the same levels."""

    neck: Neck

    def close(self) -> None:
        """As `LoadedNetwork.close`."""
        drop_weights(self.neck)


@dataclass
class LoadedModel(LoadedNetwork):
    """A backbone in memory, and what runs it.

    Attributes:
        samples: keeps some of its answers while another engine is tried.
        compiled: what was compiled of it for single shapes, beside `engine`.
    """

    engine: BackboneEngine
    samples: Samples | None = None
    compiled: InductorEngine | None = None

    def close(self) -> None:
        """As `LoadedNetwork.close`."""
        (self.compiled or self.engine).close()  # what is compiled has the engine's weights

    @property
    def held_bytes(self) -> int:
        """What it takes of the device's memory now."""
        return self.engine.bytes if self.compiled is None else self.compiled.bytes

    def refuse_unfilled(self, levels: Sequence[Level], pointer: str) -> None:
        """Refuse levels that depend on weights which the checkpoint has not.

        Raises:
            CheckpointMismatch: names those weights.
        """
        for level in levels if self.keys.missing else ():
            needed = self.engine.needs_missing(level.node)
            if needed:
                detail = (
                    f"level {level.name} needs weights that the checkpoint has not: {', '.join(needed[:8])}"
                )
                raise CheckpointMismatch(pointer, detail, missing=needed)


@dataclass(frozen=True)
class Weights:
    """A checkpoint that was asked for and found: `ref` says which of its keys, `file` where they are."""

    ref: WeightsRef
    file: CheckpointFile

    @property
    def identity(self) -> str:
        """What a network's id says of its weights."""
        return f"{self.file.sha256}:{self.ref.prefix or ''}"

    def read(self) -> StateDict:
        """The tensors of the very bytes that the digest is of.

        Raises:
            CheckpointUnreadable, CheckpointUnavailable, Unavailable: as `read_checkpoint`.
        """
        return read_checkpoint(self.file.path, pointer=self.ref.pointer, sha256=self.file.sha256)


def network_id(key: str, weights: Weights | None) -> str:
    """The id of what the architecture of this key is with these weights; equal on every replica."""
    identity = weights.identity if weights is not None else "random"
    return hashlib.sha256(f"{key}:{identity}".encode()).hexdigest()[:ID_LENGTH]


@contextmanager
def seeded(key: str) -> Iterator[None]:
    """Random weights from a seed of an architecture's key, made on the CPU: the same whatever the device."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(int(key[:15], 16))
        yield


def build_model(plan: Plan, weights: Weights | None, device: torch.device) -> LoadedModel:
    """Build a backbone, fill it from its checkpoint or at random, and place it."""
    key = plan.key
    with seeded(key):
        if weights is None:
            backbone, keys = plan.family.build(plan.config), LoadedKeys(0)
        else:
            state = weights.read()
            backbone, keys = load_any(plan.family, plan.config, state, weights.ref)
    engine = TorchEngine(_placed(backbone, device), device, keys.missing)
    file = weights.file if weights is not None else None
    return LoadedModel(network_id(key, weights), plan.type, engine.bytes, device, file, keys, engine)


def build_neck(plan: NeckPlan, weights: Weights | None, device: torch.device) -> LoadedNeck:
    """Build a neck, fill it from its checkpoint or at random, and place it.

    Weights that are the backbone's checkpoint, and not the neck's own, fill it only if the file has a neck.
    """
    state = None if weights is None else weights.read()
    if state is not None and plan.config.weights() is None and not has_neck(state):
        state = None
    with seeded(plan.key):
        if state is None or weights is None:
            neck, keys = plan.family.build(plan.config, plan.inputs), LoadedKeys(0)
        else:
            neck, keys = plan.family.load(plan.config, plan.inputs, state, weights.ref)
    placed = _placed(neck, device)
    size = module_bytes(placed)
    file = weights.file if weights is not None and state is not None else None
    return LoadedNeck(network_id(plan.key, weights), plan.type, size, device, file, keys, placed)


def build_plain_neck(plan: NeckPlan, device: torch.device) -> LoadedNeck:
    """Build a neck that has no weights. It draws no random numbers and must not seed any.

    The generator is the process's own: a load that is filling a network on another thread would get other numbers.
    """
    neck = _placed(plan.family.build(plan.config, plan.inputs), device)
    return LoadedNeck(network_id(plan.key, None), plan.type, 0, device, None, LoadedKeys(0), neck)


def has_neck(state: StateDict) -> bool:
    """Whether a checkpoint holds a neck where OpenMMLab's detectors and classifiers have it."""
    return any(name.startswith(NECK_PREFIX) for name in state)


def _placed(network: N, device: torch.device) -> N:
    return network.eval().requires_grad_(requires_grad=False).to(device)
