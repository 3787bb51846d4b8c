"""What a run was made on, for the head of its tables."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

LIBRARIES = ("torch", "timm", "torchvision", "openvino", "fastapi", "uvicorn")
CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd")


def _cpu_facts() -> dict[str, str]:
    """The first processor's lines of the kernel's list; nothing elsewhere than on Linux."""
    if not CPU_INFO.exists():
        return {}
    lines = CPU_INFO.read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def processor() -> str:
    """The processor's name and the vector instructions that matter here."""
    facts = _cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    known = [flag for flag in CPU_FLAGS if flag in flags]
    family = f", family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return f"{name}{family} ({', '.join(known)})" if known else name


def cores() -> str:
    """How many there are."""
    physical = psutil.cpu_count(logical=False) or 0
    return f"{physical} cores, {psutil.cpu_count()} threads"


def library_versions(extra: Sequence[str] = ()) -> str:
    """Names and versions of the libraries that decide the numbers, and more that the caller knows."""
    found = [f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join([*found, *extra])


def describe(extra: Sequence[str] = ()) -> str:
    """A paragraph: date, machine, load before the run, versions."""
    memory_gb = psutil.virtual_memory().total / 1e9
    busy = os.getloadavg()[0]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"{today}. {processor()}, {cores()}, {memory_gb:.0f} GB, {platform.system()} {platform.release()}; "
        f"load average {busy:.1f} when it ended. {library_versions(extra)}."
    )
