"""From encoded images, or one `.npy`, to the array that the device worker takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from service.config.preprocess import PreprocessSpec
from service.errors import InvalidConfig, TooLarge
from service.images.decode import decode_image
from service.images.tensors import read_npy
from service.images.transforms import TransformedImage, planned_size, stack_images, transform_image
from service.protocol.reply import FloatArray, ImageInfo
from service.runtime.threads import on_thread


@dataclass(frozen=True)
class Batch:
    """The images of one request, ready for the device.

    `images` is [n, c, h, w], float32; `valid` is each image's fraction of height and width that is not
    padding, None where nothing is.
    """

    images: FloatArray
    infos: tuple[ImageInfo, ...]
    valid: tuple[tuple[float, float], ...] | None

    @classmethod
    def blank(cls, channels: int, size: tuple[int, int]) -> Batch:
        """One image of zeros, [height, width]."""
        info = ImageInfo(size[1], size[0], "tensor", size, size)
        return cls(np.zeros((1, channels, *size), np.float32), (info,), None)


@dataclass(frozen=True)
class Limits:
    """What one request may bring."""

    max_pixels: int
    max_images: int
    max_elements: int


@dataclass(frozen=True)
class _Image:
    transformed: TransformedImage
    width: int
    height: int
    format: str


class Intake:
    """Decodes and transforms on threads; whatever is wrong with an image fails its own request only."""

    def __init__(self, executor: Executor, limits: Limits) -> None:
        self._executor = executor
        self._limits = limits

    async def tensor(self, data: bytes, channels: int) -> Batch:
        """The batch of an already normalised `.npy`.

        Raises:
            MalformedBody, UnsupportedMedia, TooLarge, InvalidConfig: what is wrong with it.
        """
        return await on_thread(self._executor, self._read_tensor, data, channels)

    async def images(self, encoded: Sequence[bytes], spec: PreprocessSpec, channels: int) -> Batch:
        """The batch of encoded images, decoded side by side.

        Raises:
            UndecodableImage, UnsupportedMedia, TooLarge, InvalidConfig: what is wrong with one of them.
        """
        if channels != 3:
            detail = f"images have 3 channels, this backbone takes {channels}: send a tensor"
            raise InvalidConfig("#/backbone", detail)
        jobs = [
            on_thread(self._executor, self._decode, data, index, spec) for index, data in enumerate(encoded)
        ]
        decoded = await asyncio.gather(*jobs)
        sizes = [image.transformed.array.shape[1:] for image in decoded]
        self._refuse_pixels(sizes, spec.size_divisor)
        return await on_thread(self._executor, _stack, decoded, spec)

    def _read_tensor(self, data: bytes, channels: int) -> Batch:
        tensor = read_npy(data, max_elements=self._limits.max_elements)
        count, found, height, width = tensor.shape
        if count > self._limits.max_images:
            raise TooLarge(f"{count} images exceed {self._limits.max_images} in one request")
        if found != channels:
            raise InvalidConfig(
                "#/tensor", f"the tensor has {found} channels, this backbone takes {channels}"
            )
        info = ImageInfo(width, height, "tensor", (height, width), (height, width))
        return Batch(tensor, (info,) * count, None)

    def _decode(self, data: bytes, index: int, spec: PreprocessSpec) -> _Image:
        image = decode_image(data, index=index, max_pixels=self._limits.max_pixels)
        self._refuse_pixels([planned_size(image.width, image.height, spec)], spec.size_divisor)
        return _Image(transform_image(image, spec), image.width, image.height, image.format)

    def _refuse_pixels(self, sizes: Sequence[Sequence[int]], divisor: int) -> None:
        """Refuse images that together, padded to the largest, have more pixels than one request may."""
        height, width = (-(-max(size[axis] for size in sizes) // divisor) * divisor for axis in (0, 1))
        pixels = len(sizes) * height * width
        if pixels > self._limits.max_pixels:
            count = f"{len(sizes)} images of " if len(sizes) > 1 else ""
            limit = f"{self._limits.max_pixels / 1e6:g} megapixels"
            raise TooLarge(f"{count}{width}x{height} after preprocessing exceed {limit}")


def _stack(images: Sequence[_Image], spec: PreprocessSpec) -> Batch:
    stacked = stack_images([image.transformed for image in images], spec)
    height, width = stacked.shape[2:]
    infos = tuple(
        ImageInfo(image.width, image.height, image.format, (height, width), image.transformed.valid)
        for image in images
    )
    padded = any(info.valid != (height, width) for info in infos)
    valid = tuple((info.valid[0] / height, info.valid[1] / width) for info in infos) if padded else None
    return Batch(stacked, infos, valid)
