"""The engine that every model starts on: the torch module itself, on any device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from service.backbones.base import Backbone
from service.config.spec import Precision
from service.protocol.reply import FloatArray
from service.runtime.engines.base import BackboneEngine, on_device

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# A forward pass that took no longer is as fast on one thread, and does not spin on a core that others need:
# mobilenetv3_small takes 5 ms alone on either, and 12 to 44 ms on two threads of two busy cores.
SMALL_NETWORK_S = 0.008


class TorchEngine(BackboneEngine):
    """A backbone as it is. Only one thread may run it: OpenMP's workers belong to the thread that started them."""

    name = "torch"

    def __init__(self, backbone: Backbone, device: torch.device, missing: Iterable[str] = ()) -> None:
        self.backbone = backbone
        self.device = device
        self._missing = frozenset(missing)
        self._bytes = module_bytes(backbone)

    @property
    def bytes(self) -> int:
        """Parameters and buffers."""
        return self._bytes

    @torch.inference_mode()
    def run(
        self,
        images: FloatArray | Tensor,
        nodes: Sequence[str],
        precision: Precision,
        *,
        crowded: bool,  # noqa: ARG002 - one batch at a time has the device to itself
    ) -> dict[str, Tensor]:
        """As `BackboneEngine.run`; reduced precision is torch's autocast."""
        started = time.perf_counter()
        tensor = on_device(images, self.device)
        dtype = AUTOCAST.get(precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            found = self.backbone(tensor, nodes)
        self.gains_by_threads &= time.perf_counter() - started > SMALL_NETWORK_S
        return {node: feature.float() for node, feature in found.items()}

    def close(self) -> None:
        """As `BackboneEngine.close`."""
        drop_weights(self.backbone)

    def needs_missing(self, node: str) -> Sequence[str]:
        """As `BackboneEngine.needs_missing`, in alphabetical order."""
        return sorted(self._missing & self.backbone.needs(node)) if self._missing else ()


def drop_weights(module: nn.Module) -> None:
    """Free the weights of a module at once, whoever still has it.

    Some modules are part of a cycle (all of torchvision's, which are graphs; some of timm's keep methods of their own),
    and would stay until Python looks for cycles, which stops every thread for a fifth of a second.
    """
    for part in module.modules():
        part._parameters.clear()  # noqa: SLF001 - there is no public way to take a parameter out without its name
        part._buffers.clear()  # noqa: SLF001


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
