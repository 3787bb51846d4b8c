"""What a device can compute while somebody waits for it: a request for more is refused and not begun."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from service.config.spec import Precision
from service.errors import TooLarge

# Operations a second, float32, that no network exceeds: a core with two units of 512 bits at 4 GHz (ResNet-50 was seen
# to reach 220 on such a one), and a multiprocessor of CUDA (128 lanes at 2 GHz, a product and a sum each).
CORE_SPEED = 256 * 10**9
MULTIPROCESSOR_SPEED = 512 * 10**9
OTHER_DEVICE_SPEED = 10**13
# CUDA multiplies 16 bits so much faster; CPUs do not, as a rule.
HALF_PRECISION_GAIN = 16


@dataclass(frozen=True)
class Speed:
    """The most that a request may compute: `limit` operations in float32, and `half_limit` in 16 bits.

    A forward pass cannot be stopped. One that takes longer than a request may is for nobody, and would keep everybody
    else from the device until `/healthz` fails.
    """

    limit: int
    half_limit: int

    @classmethod
    def of(cls, device: torch.device, cores: int, request_timeout_s: float) -> Speed:
        """What a device with so many cores does at its fastest in the time that a request has."""
        gain = HALF_PRECISION_GAIN if device.type == "cuda" else 1
        limit = int(_operations_a_second(device, cores) * request_timeout_s)
        return cls(limit, limit * gain)

    def refuse_slow(self, operations: int, precision: Precision) -> None:
        """Refuse what cannot be computed in the time that a request has.

        Raises:
            TooLarge: with the number.
        """
        limit = self.limit if precision == "float32" else self.half_limit
        if operations > limit:
            detail = f"the request would take about {operations / 1e9:,.0f} billion operations"
            raise TooLarge(
                f"{detail}; this device does at most {limit / 1e9:,.0f} billion before the deadline"
            )


def _operations_a_second(device: torch.device, cores: int) -> int:
    if device.type == "cpu":
        return cores * CORE_SPEED
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * MULTIPROCESSOR_SPEED
    return OTHER_DEVICE_SPEED
