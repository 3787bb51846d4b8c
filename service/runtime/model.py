"""A loaded model: a backbone with its weights on the device, and how it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from service.backbones.base import Backbone, BackboneConfig, Family
from service.checkpoints.read import read_checkpoint
from service.checkpoints.resolve import CheckpointFile
from service.config.spec import Freeze, FreezeReport, Level, LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch

Precision = Literal["float32", "bfloat16", "float16"]
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ID_LENGTH = 20


@dataclass
class LoadedModel:
    """A backbone in memory. `id` is a digest of its architecture and its weights."""

    id: str
    type: str
    backbone: Backbone
    bytes: int
    device: torch.device
    checkpoint: CheckpointFile | None
    keys: LoadedKeys
    reports: dict[Freeze, FreezeReport] = field(default_factory=dict)

    def freeze_report(self, freeze: Freeze) -> FreezeReport:
        """What `freeze` freezes of this model."""
        if freeze not in self.reports:
            self.reports[freeze] = self.backbone.frozen(freeze)
        return self.reports[freeze]

    def refuse_unfilled(self, levels: Sequence[Level], pointer: str) -> None:
        """Refuse levels that depend on weights which the checkpoint has not.

        Raises:
            CheckpointMismatch: names those weights.
        """
        missing = set(self.keys.missing)
        for level in levels if missing else ():
            needed = sorted(missing & self.backbone.needs(level.node))
            if needed:
                detail = (
                    f"level {level.name} needs weights that the checkpoint has not: {', '.join(needed[:8])}"
                )
                raise CheckpointMismatch(pointer, detail, missing=needed)

    @torch.inference_mode()
    def run(self, images: Tensor, nodes: Sequence[str], precision: Precision) -> dict[str, Tensor]:
        """Features of [n, c, h, w] images on this model's device, as float32."""
        dtype = AUTOCAST.get(precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            found = self.backbone(images, nodes)
        return {node: feature.float() for node, feature in found.items()}


def model_id(config: BackboneConfig, ref: WeightsRef | None, file: CheckpointFile | None) -> str:
    """The id of what `config` builds with these weights; equal on every replica."""
    weights = f"{file.sha256}:{ref.prefix or ''}" if file is not None and ref is not None else "random"
    return hashlib.sha256(f"{config.key()}:{weights}".encode()).hexdigest()[:ID_LENGTH]


def build_model(
    type_name: str,
    family: Family[Any],
    config: BackboneConfig,
    ref: WeightsRef | None,
    file: CheckpointFile | None,
    device: torch.device,
) -> LoadedModel:
    """Build a backbone, fill it from its checkpoint or from a seed of its architecture, and place it.

    Building is always done on the CPU, so that random weights are the same whatever the device.
    """
    backbone, keys = _filled(family, config, ref, file)
    backbone = backbone.eval().requires_grad_(requires_grad=False).to(device)
    size = module_bytes(backbone)
    return LoadedModel(model_id(config, ref, file), type_name, backbone, size, device, file, keys)


def _filled(
    family: Family[Any], config: BackboneConfig, ref: WeightsRef | None, file: CheckpointFile | None
) -> tuple[Backbone, LoadedKeys]:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(int(config.key()[:15], 16))
        if ref is not None and file is not None:
            state = read_checkpoint(file.path, pointer=ref.pointer)
            return family.load(config, state, ref)
        return family.build(config), LoadedKeys(0)


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
