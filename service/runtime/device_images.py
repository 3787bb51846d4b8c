"""From bytes on the host to normalised images on the device."""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from service.runtime.intake import ByteBatch

# Bytes of images that wait on a device for their turn there, or are on their way; others are copied when it comes.
MAX_BYTES_AHEAD = 256 * 2**20


class Upload:
    """The images of one request on their way to a device.

    Args:
        stream: of the copy, beside what the device computes; None to copy when the images are asked for.
    """

    def __init__(self, batch: ByteBatch, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._batch = batch
        self.device = device
        self._pixels: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        if stream is not None:
            with torch.cuda.stream(stream):
                self._pixels = _to_device(batch, device)
                self._copied = stream.record_event()

    def images(self) -> Tensor:
        """[n, 3, h, w], float32, normalised, on the device; for the current stream, which waits for the copy."""
        if self._pixels is None or self._copied is None:
            return normalise_on_device(self._batch, self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._copied)
        self._pixels.record_stream(
            current
        )  # its memory is not given to another copy while this stream reads it
        return _normalised(self._pixels, self._batch)


class Uploads:
    """Copies bytes to a CUDA device while it computes: as soon as they are there, not when their turn comes.

    On another device nothing is gained by that, and nothing is done ahead.
    """

    def __init__(self, device: torch.device, max_bytes: int = MAX_BYTES_AHEAD) -> None:
        self._device = device
        self._left = max_bytes
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's

    def begin(self, batch: ByteBatch) -> Upload:
        """The images of a request; their copy is under way if there is room for it."""
        size = batch.images.nbytes
        if self._stream is None or not self._take(size):
            return Upload(batch, self._device, None)
        upload = Upload(batch, self._device, self._stream)
        weakref.finalize(upload, self._give_back, size)  # used or cancelled
        return upload

    def _take(self, size: int) -> bool:
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


def normalise_on_device(batch: ByteBatch, device: torch.device) -> Tensor:
    """[n, 3, h, w], float32, on `device`: what `Intake.images` makes on the host, to float32 rounding.

    A quarter of the bytes crosses the bus. To a CUDA device they go by pinned memory and without waiting: the copy
    is queued on the current stream, and so is all that is computed with the result.
    """
    return _normalised(_to_device(batch, device), batch)


def _normalised(pixels: Tensor, batch: ByteBatch) -> Tensor:
    scale, shift = (
        torch.from_numpy(values).to(pixels.device)[:, None, None] for values in (batch.scale, batch.shift)
    )
    images = pixels.to(torch.float32).mul_(scale).add_(shift)
    _blank_padding(images, batch)
    return images


def _to_device(batch: ByteBatch, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(batch.images)
    if device.type != "cuda":
        return pixels.to(device)
    return pixels.pin_memory().to(device, non_blocking=True)


def _blank_padding(images: Tensor, batch: ByteBatch) -> None:
    """Padding is zero after normalising, where the network expects nothing; before, zero is black."""
    if batch.valid is None:
        return
    for image, info in zip(images, batch.infos, strict=True):
        height, width = info.valid
        image[:, height:] = 0
        image[:, :, width:] = 0
