"""The three jobs that everything is measured at."""

from __future__ import annotations

import json
from dataclasses import dataclass

from benchmarks.wire import multipart_message, raw_message

JSON = "application/json"
SAFETENSORS = "application/vnd.safetensors"
JPEG = "image/jpeg"


@dataclass(frozen=True)
class Job:
    """What is asked for, of the service and of its peers alike.

    `nodes` are timm's feature indices, in which 0 is the stem.
    """

    name: str
    title: str
    model: str
    nodes: tuple[int, ...]
    is_pooled: bool
    clients: int

    @property
    def accept(self) -> str:
        """The media type of the reply: a vector as JSON, maps as safetensors."""
        return JSON if self.is_pooled else SAFETENSORS

    def service_query(self) -> dict[str, str]:
        """The parameters of `POST /features`."""
        config = {"type": f"timm.{self.model}", "out_indices": list(self.nodes)}
        pooled = {"pool": "avg"} if self.is_pooled else {}
        return {"backbone": json.dumps(config), "return": "tensors", **pooled}

    def service_message(self, image: bytes) -> bytes:
        """One request to the service."""
        return raw_message("/features", self.service_query(), image, JPEG, self.accept)


JOBS = {
    job.name: job
    for job in (
        Job("J1", "ResNet-50, one pooled vector as JSON", "resnet50", (4,), True, 8),
        Job("J2", "ResNet-50, four maps as safetensors", "resnet50", (1, 2, 3, 4), False, 8),
        Job("J3", "MobileNetV3-Small, one pooled vector as JSON", "mobilenetv3_small_100", (4,), True, 32),
    )
}


def peer_form_message(path: str, image: bytes) -> bytes:
    """One request to a peer that takes uploads as a form."""
    return multipart_message(path, {}, [image], "*/*")


def peer_raw_message(path: str, image: bytes) -> bytes:
    """One request to a peer that takes the body as it is."""
    return raw_message(path, {}, image, JPEG, "*/*")
