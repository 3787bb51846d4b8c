"""What reads bytes of strangers, each as a function of bytes: it refuses them in the service's words, or reads them.

An exception that is no `ServiceError` is a finding, and so is a result that breaks what the function promises.
"""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from service.api.forms import FormLimits, parse_form
from service.checkpoints.read import read_checkpoint
from service.config.preprocess import PreprocessSpec, parse_preprocess, resolve_preprocess
from service.errors import ServiceError
from service.images.decode import decode_image
from service.images.tensors import open_npy
from service.images.transforms import transform_image
from service.protocol.request import parse_json_body
from tests.fuzz.strategies import FILES, THIN

MAX_PIXELS = 1_000_000
MAX_ELEMENTS = 1_000_000
SPEC: PreprocessSpec = resolve_preprocess(parse_preprocess({"mode": "crop", "size": 32}), [])


@dataclass(frozen=True)
class Target:
    """What is fuzzed, and files that it reads."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def decode(data: bytes) -> None:
    """An image file: upright RGB bytes within the limit, and a tensor of the size that was asked for."""
    with suppress(ServiceError):
        image = decode_image(data, index=0, max_pixels=MAX_PIXELS)
        assert image.rgb.dtype == np.uint8
        assert image.rgb.shape == (image.height, image.width, 3)
        assert image.width * image.height <= MAX_PIXELS
        assert transform_image(image, SPEC).array.shape[-2:] == (32, 32)


def array(data: bytes) -> None:
    """A `.npy` of float32."""
    with suppress(ServiceError):
        tensor = open_npy(data, max_elements=MAX_ELEMENTS).read()
        assert tensor.dtype == np.float32
        assert tensor.ndim == 4
        assert np.isfinite(tensor).all()


def form(data: bytes) -> None:
    """A multipart body."""
    with suppress(ServiceError):
        parts = parse_form(data, b"x", FormLimits(max_files=8, max_texts=8, max_text_bytes=4096))
        assert len(parts) <= 16


def body(data: bytes) -> None:
    """A JSON body."""
    with suppress(ServiceError):
        parse_json_body(data)


def checkpoint(suffix: str) -> Callable[[bytes], None]:
    """A checkpoint file of this suffix; nothing that it names is run."""

    def read(data: bytes) -> None:
        path = Path(_folder().name, f"checkpoint{suffix}")
        path.write_bytes(data)
        with suppress(ServiceError):
            state = read_checkpoint(path, pointer="#")
            assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())

    return read


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where files to be read are put; it goes with the process."""
    return tempfile.TemporaryDirectory()


def _arrays() -> list[bytes]:
    sinks = []
    for values in (np.zeros((1, 3, 4, 4), np.float32), np.zeros((2, 3, 2, 2), np.float64)):
        sink = io.BytesIO()
        np.save(sink, values)
        sinks.append(sink.getvalue())
    return sinks


def _forms() -> list[bytes]:
    part = b'--x\r\nContent-Disposition: form-data; name="'
    return [
        part
        + b'backbone"\r\n\r\n{"type": "ResNet"}\r\n'
        + part
        + b'image"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    ]


def _bodies() -> list[bytes]:
    return [
        b'{"backbone": {"type": "ResNet", "depth": 18}, "images": [{"base64": "AAAA"}], "pool": "avg"}',
        str(THIN).encode(),
    ]


def _torch_files() -> list[bytes]:
    state = {"conv.weight": torch.zeros(2, 3), "bn.bias": torch.ones(2, dtype=torch.float16)}
    files = []
    for is_zip in (True, False):
        sink = io.BytesIO()
        torch.save({"state_dict": state, "meta": {"epoch": 3}}, sink, _use_new_zipfile_serialization=is_zip)
        files.append(sink.getvalue())
    return files


def _numpy_pickles() -> list[bytes]:
    blobs = {"conv_w": np.zeros((2, 3), np.float32), "res_b": np.ones(2, np.float64)}
    return [pickle.dumps({"model": blobs, "__author__": "x"}, protocol) for protocol in (2, 4, 5)]


def _safetensors() -> list[bytes]:
    return [safetensors.torch.save({"conv.weight": torch.zeros(2, 3), "bias": torch.ones(2)})]


TARGETS: Mapping[str, Target] = {
    "decode": Target(decode, FILES.values),
    "array": Target(array, _arrays),
    "form": Target(form, _forms),
    "body": Target(body, _bodies),
    "torch": Target(checkpoint(".pth"), _torch_files),
    "pickle": Target(checkpoint(".pkl"), _numpy_pickles),
    "safetensors": Target(checkpoint(".safetensors"), _safetensors),
}
