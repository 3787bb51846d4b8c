"""Which versions of what run where."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

LIBRARIES = ("torch", "timm", "torchvision")


def service_version() -> str:
    """The version of the installed distribution; `0+source` when run from a tree that is not installed."""
    try:
        return version("backbone-service")
    except PackageNotFoundError:
        return "0+source"


def versions(device: torch.device) -> dict[str, str]:
    """The service, its libraries, the device, and the build that the image was labelled with."""
    found = {library: version(library) for library in LIBRARIES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "service": service_version(),
        **found,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": name,
        "build": os.environ.get("BACKBONE_BUILD", "source"),
    }
