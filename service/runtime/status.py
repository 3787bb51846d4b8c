"""Which versions of what run where."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

from service.version import service_version

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "timm", "torchvision")


def versions(device: torch.device) -> dict[str, str]:
    """The service, its libraries, the device, and the build that the image was labelled with."""
    found = {library: version(library) for library in LIBRARIES}
    return {
        "service": service_version(),
        **found,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": _name(device),
        "build": os.environ.get("BACKBONE_BUILD", "source"),
    }


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.machine()
    import torch

    return torch.cuda.get_device_name(device)
