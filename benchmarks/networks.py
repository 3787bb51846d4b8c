"""timm networks on torch and on OpenVINO: what the raw loops run and what the peers serve."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import psutil
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from benchmarks.jobs import Job

SIDE = 224
Levels = Callable[[torch.Tensor], list[torch.Tensor]]


def physical_cores() -> int:
    """Cores, not hyperthreads."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def make_transform(job: Job) -> Callable[[Image.Image], torch.Tensor]:
    """timm's own preprocessing of the job's network: an RGB image to float32 [3, 224, 224]."""
    resolve: Any = resolve_data_config
    published: Any = timm.get_pretrained_cfg(job.model)
    config = resolve(pretrained_cfg=published.to_dict())
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(**config)
    return transform


def decode(transform: Callable[[Image.Image], torch.Tensor], data: bytes) -> torch.Tensor:
    """A JPEG, preprocessed."""
    return transform(Image.open(io.BytesIO(data)).convert("RGB"))


def make_model(job: Job) -> torch.nn.Module:
    """The job's network, as timm documents it for features; weights are random."""
    model: torch.nn.Module = timm.create_model(job.model, features_only=True, out_indices=job.nodes)
    return model.eval()


def compile_openvino(job: Job, batch: int, options: dict[str, Any]) -> Any:
    """The job's network for OpenVINO, in float32; a batch of -1 takes any."""
    import openvino as ov

    example = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        network = ov.convert_model(make_model(job), example_input=example, input=[batch, 3, SIDE, SIDE])
    # Without the hint it computes in bfloat16 where the processor has that.
    return ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **options})


class OpenVinoLevels:
    """OpenVINO put in by hand: images [n, 3, 224, 224] to levels, from any thread."""

    def __init__(self, job: Job, hint: str) -> None:
        self._network = compile_openvino(job, -1, {"PERFORMANCE_HINT": hint})
        self._local = threading.local()  # an infer request is for one thread at a time

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        if not hasattr(self._local, "request"):
            self._local.request = self._network.create_infer_request()
        found = self._local.request.infer([images.numpy()], share_inputs=True)
        return [torch.from_numpy(level) for level in found.to_tuple()]


class TorchLevels:
    """torch as it comes: images [n, 3, 224, 224] to levels."""

    def __init__(self, job: Job) -> None:
        self._model = make_model(job)

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        with torch.inference_mode():
            found: list[torch.Tensor] = self._model(images)
        return found


def load_levels(job: Job, engine: str, hint: str = "LATENCY") -> Levels:
    """The network on `torch` or `openvino`; the hint is OpenVINO's, for how it shares the cores."""
    return OpenVinoLevels(job, hint) if engine == "openvino" else TorchLevels(job)
