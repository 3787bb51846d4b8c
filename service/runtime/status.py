"""Which versions of what run where."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

from service.version import service_version

LIBRARIES = ("torch", "timm", "torchvision")


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
