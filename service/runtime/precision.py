"""Which precisions a device computes by itself; the others it only emulates, slower than float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from service.config.spec import Precision
from service.errors import InvalidConfig

# Any of these instruction sets will do, by the names of `torch.cpu.get_capabilities`.
CPU_SUPPORT: Mapping[Precision, frozenset[str]] = {
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"}),
    "float16": frozenset({"avx512_fp16", "amx_fp16", "avx10_1", "fp16_arith"}),
}
ALL: frozenset[Precision] = frozenset({"float32", "bfloat16", "float16"})


def native_precisions(device: torch.device) -> frozenset[Precision]:
    """The precisions that the device has instructions for."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ALL if has_bfloat16 else ALL - {"bfloat16"}
    if device.type == "cpu":
        found: set[Precision] = {name for name, any_of in CPU_SUPPORT.items() if any_of & _cpu_features()}
        return frozenset({"float32", *found})
    return ALL


def _cpu_features() -> frozenset[str]:
    ask = getattr(torch.cpu, "get_capabilities", dict)  # older releases of torch do not say
    return frozenset(name for name, present in ask().items() if present)


def refuse_emulated(precision: Precision, native: frozenset[Precision], device: torch.device) -> None:
    """Refuse a precision that the device would only emulate.

    Raises:
        InvalidConfig: says which it computes.
    """
    if precision not in native:
        served = ", ".join(sorted(native))
        detail = (
            f"{precision} would be emulated on this {device.type}, slower than float32; it computes {served}"
        )
        raise InvalidConfig("#/precision", detail)
