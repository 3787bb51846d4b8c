"""Memory of the work in flight: what a request needs is known before it takes any, and nothing is begun without it.

Decoded pixels, tensors, activations and the reply of a request count together, from the sizes in its images' headers
and a forward pass on the meta device. Small activations run in a part of the memory that is set aside for each lane of
the device worker, in batches that fit there; large ones are the request's own, one image at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from service.errors import OutOfMemory, ServiceError, TooLarge
from service.runtime.device import budget_bytes, free_bytes, total_bytes
from service.runtime.intake import Heads
from service.runtime.plan import LevelShape
from service.runtime.shares import Share, Shares

CPU = torch.device("cpu")
FLOAT32_BYTES = 4
# Of the budget, what the lanes have for small activations; requests share the rest.
LANES_PART = 8
# Kernels lay tensors out anew beside the old ones, and the C library keeps gaps between small blocks. In the first pass
# on a CPU of one image each, resident memory grew by 1.0 to 2.0 times the live tensors in eleven of twelve families
# (1.07 for 742 MB of a ResNet-50), which this covers; DenseNet-121's 41 MB took 280 MB, which it does not.
SCRATCH_SHARE, MAX_GAPS = 0.1, 256 * 2**20
# A request for less than this is not worth asking the system for.
WORTH_ASKING = 64 * 2**20


@dataclass(frozen=True)
class Need:
    """What a request takes: bytes of the host before and with its reply, and images in a forward pass at most."""

    bytes: int
    reply_bytes: int
    at_once: int


class WorkMemory:
    """The memory that requests may take beside the models.

    Args:
        setting: bytes, or percent of what is free now.
        device: where activations are; those of the CPU are of the same memory.
        lanes: forward passes that may run side by side.
        evict_idle: gives back the memory of models that nobody uses.
    """

    def __init__(
        self, setting: str, device: torch.device, lanes: int, evict_idle: Callable[[], None]
    ) -> None:
        budget = budget_bytes(setting, CPU)
        lane_bytes = budget // LANES_PART if device.type == "cpu" else 0
        self.lane_bytes = lane_bytes // lanes if device.type == "cpu" else total_bytes(device) // LANES_PART
        self._device = device
        self._evict_idle = evict_idle
        self.shares = Shares(
            budget - lane_bytes, max_burden=(budget - lane_bytes) // 4, full=_no_place, aside=True
        )

    def need(
        self, heads: Heads, levels: Sequence[LevelShape], activation_bytes: int, reply_bytes: int
    ) -> Need:
        """What a request takes at most.

        Args:
            activation_bytes: of tensors in a forward pass of one image (`Planner.activation_bytes`).
            reply_bytes: of its body, encoded.
        """
        activations = resident_bytes(activation_bytes)
        at_once = min(heads.images, max(1, self.lane_bytes // activations))
        numbers = heads.images * sum(math.prod(level.shape[1:]) for level in levels)
        reply = numbers * FLOAT32_BYTES + reply_bytes
        forward = reply if at_once == heads.images else reply + numbers * FLOAT32_BYTES
        if self._device.type == "cpu" and activations > self.lane_bytes:
            forward += activations
        return Need(heads.batch_bytes + max(heads.decoding_bytes, forward), reply, at_once)

    def refuse_oversized(self, need: Need, activation_bytes: int) -> None:
        """Refuse what would not even fit alone.

        Raises:
            TooLarge: it needs more than there is for all requests, or than the device has.
        """
        if need.bytes > self.shares.largest:
            detail = f"the request would take about {need.bytes:,} bytes of memory"
            raise TooLarge(f"{detail}; the limit is {self.shares.largest:,}")
        if self._device.type == "cpu":
            return
        device_bytes = resident_bytes(activation_bytes)
        if device_bytes > total_bytes(self._device):
            detail = f"one image would take about {device_bytes:,} bytes of the device"
            raise TooLarge(f"{detail}; it has {total_bytes(self._device):,}")

    def is_large(self, need: Need, activation_bytes: int) -> bool:
        """Whether the system should be asked if it really has what a request needs."""
        on_device = 0 if self._device.type == "cpu" else activation_bytes
        return max(need.bytes, on_device) > WORTH_ASKING

    def refuse_what_is_not_there(self, need: Need, activation_bytes: int) -> None:
        """Evict idle models for what the machine has no room for now, and refuse what it still has none for.

        Raises:
            OutOfMemory: something else takes the memory.
        """
        wanted = {CPU: need.bytes}
        if self._device.type != "cpu":
            wanted[self._device] = resident_bytes(activation_bytes)
        if any(free_bytes(device) < amount for device, amount in wanted.items()):
            self._evict_idle()
        for device, amount in wanted.items():
            free = free_bytes(device)
            if free < amount:
                detail = f"the request would take about {amount:,} bytes of memory; {free:,} are free"
                raise OutOfMemory(detail, retry_after_s=max(5.0, self.shares.retry_after_s()))

    def late(self) -> ServiceError:
        """What a request is told whose deadline passed while it waited for memory."""
        detail = "the deadline passed while the request waited for memory that others use"
        return OutOfMemory(detail, retry_after_s=self.shares.retry_after_s())

    def share(self, client: str) -> Share:
        """A share of nothing yet."""
        return self.shares.share(client)


def resident_bytes(activation_bytes: int) -> int:
    """What a forward pass adds to resident memory, about, of which so many bytes are tensors."""
    return activation_bytes + int(activation_bytes * SCRATCH_SHARE) + min(activation_bytes, MAX_GAPS)


def _no_place(retry_after_s: float) -> ServiceError:
    return OutOfMemory("too many requests wait for memory", retry_after_s=retry_after_s)
