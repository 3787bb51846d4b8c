"""The device that models run on, and how much of its memory they may take."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from pathlib import Path

import psutil
import torch

from service.errors import CannotStart

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
CGROUP_DETAILS = Path("/sys/fs/cgroup/memory.stat")


def pick_device(name: str) -> torch.device:
    """The device that `name` means; `auto` is CUDA if there is one, then MPS, then the CPU.

    Raises:
        CannotStart: a device that this machine has not. There is no fallback.
    """
    if name == "auto":
        return torch.device(_best())
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices found"
        raise CannotStart(f"BACKBONE_DEVICE: device {name} is not there: {found}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CannotStart("BACKBONE_DEVICE: device mps is not there")
    return device


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_in_float32() -> None:
    """Have CUDA multiply and convolve in float32 where float32 is asked for, and not in TF32 as cuDNN would.

    TF32 keeps 10 bits of the mantissa: numbers that depend on the batch by 1e-3.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now; on a CPU within the container's own limit.

    On CUDA what torch keeps for its next tensors is free, and in a container so are files that are only cached.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    available = int(psutil.virtual_memory().available)
    limit = _read_bytes(CGROUP_LIMIT)
    if limit is None:
        return available
    return min(available, limit - (_read_bytes(CGROUP_USED) or 0) + _cached_file_bytes())


def total_bytes(device: torch.device) -> int:
    """Bytes that the device has in all; on a CPU within the container's own limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    limit = _read_bytes(CGROUP_LIMIT)
    return total if limit is None else min(total, limit)


def _cached_file_bytes() -> int:
    """Bytes of files that the container's own count has, and that the system drops first where it needs room."""
    try:
        lines = CGROUP_DETAILS.read_text().splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines if line.startswith("inactive_file "))
    return next((int(words[1]) for words in found), 0)


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes by kind: `free` anywhere; on CUDA also `total`, and `allocated` and `reserved` by this process.

    What a process holds on a CPU is its resident memory, which the process' own numbers have.
    """
    if device.type != "cuda":
        return {"free": free_bytes(device)}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "free": free,
        "total": total,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }


def _read_bytes(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def available_cores() -> int:
    """Cores that this process may use: its affinity, within the container's own quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cpu_quota() -> float | None:
    """Cores that the container's quota comes to (cgroup v2's `cpu.max`: microseconds of each period)."""
    try:
        allowed, period = CGROUP_CPU.read_text().split()
    except (OSError, ValueError):
        return None
    return int(allowed) / int(period) if allowed.isdigit() else None  # "max" is no limit


def budget_bytes(setting: str, device: torch.device) -> int:
    """What `BACKBONE_MODEL_BUDGET` means on this device: plain bytes, or percent of what is free now."""
    if setting.endswith("%"):
        return int(free_bytes(device) * float(setting[:-1]) / 100)
    return int(setting)


def return_freed_memory(device: torch.device) -> None:
    """Give the memory of dropped models back to the system: from the C library's arenas and the device's cache.

    glibc keeps what is freed, and `malloc_trim` hands whole free pages back, wherever in the heap they are. (Having it
    map every large block instead would return them by itself, and make each forward pass 2.5 times slower.)
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class MemoryReturner:
    """Does `return_freed_memory` on a thread of its own: it takes some 20 ms, and is done once for many models."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = threading.Event()
        self._ends = False
        threading.Thread(target=self._work, name="memory", daemon=True).start()

    def ask(self) -> None:
        """Have it done soon."""
        self._asked.set()

    def stop(self) -> None:
        """End the thread."""
        self._ends = True
        self._asked.set()

    def _work(self) -> None:
        while self._asked.wait() and not self._ends:
            self._asked.clear()
            return_freed_memory(self._device)
