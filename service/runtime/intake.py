"""From encoded images, or one `.npy`, to the array that the device worker takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from service.config.preprocess import PreprocessSpec
from service.errors import InvalidConfig, TooLarge
from service.images.decode import DecodedImage, decode_image
from service.images.tensors import read_npy
from service.images.transforms import (
    TransformedImage,
    enough_pixels,
    fit_image,
    planned_size,
    scale_and_shift,
    stack_images,
    transform_image,
)
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
class ByteBatch:
    """The images of one request before they are normalised: a quarter of the bytes on their way to a device.

    `images` is [n, 3, h, w], uint8; `scale` and `shift` are [3], float32: a byte times the one plus the other is
    what the network takes, but for padding, which is zero. `infos` and `valid` as in `Batch`.
    """

    images: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    infos: tuple[ImageInfo, ...]
    valid: tuple[tuple[float, float], ...] | None


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


T = TypeVar("T")
Transform = Callable[[DecodedImage, PreprocessSpec], TransformedImage]


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
        return await self._stacked(encoded, spec, channels, transform_image, partial(_batch, spec=spec))

    async def byte_images(self, encoded: Sequence[bytes], spec: PreprocessSpec, channels: int) -> ByteBatch:
        """As `images`, but not yet normalised.

        Raises:
            UndecodableImage, UnsupportedMedia, TooLarge, InvalidConfig: what is wrong with one of them.
        """
        return await self._stacked(encoded, spec, channels, fit_image, partial(_byte_batch, spec=spec))

    async def _stacked(
        self,
        encoded: Sequence[bytes],
        spec: PreprocessSpec,
        channels: int,
        transform: Transform,
        stack: Callable[[Sequence[_Image]], T],
    ) -> T:
        """Decoded side by side, then stacked; one image is decoded and stacked in one go."""
        if channels != 3:
            detail = f"images have 3 channels, this backbone takes {channels}: send a tensor"
            raise InvalidConfig("#/backbone", detail)
        decode = partial(self._decode, spec=spec, transform=transform)
        if len(encoded) == 1:
            return await on_thread(self._executor, lambda: stack([decode(encoded[0], 0)]))
        jobs = [on_thread(self._executor, decode, data, index) for index, data in enumerate(encoded)]
        decoded = await asyncio.gather(*jobs)
        self._refuse_pixels([image.transformed.valid for image in decoded], spec.size_divisor)
        return await on_thread(self._executor, stack, decoded)

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

    def _decode(self, data: bytes, index: int, spec: PreprocessSpec, transform: Transform) -> _Image:
        enough = partial(enough_pixels, spec=spec) if spec.fast_decode else None
        image = decode_image(data, index=index, max_pixels=self._limits.max_pixels, enough=enough)
        self._refuse_pixels([planned_size(image.width, image.height, spec)], spec.size_divisor)
        return _Image(transform(image, spec), image.width, image.height, image.format)

    def _refuse_pixels(self, sizes: Sequence[Sequence[int]], divisor: int) -> None:
        """Refuse images that together, padded to the largest, have more pixels than one request may."""
        height, width = (-(-max(size[axis] for size in sizes) // divisor) * divisor for axis in (0, 1))
        pixels = len(sizes) * height * width
        if pixels > self._limits.max_pixels:
            count = f"{len(sizes)} images of " if len(sizes) > 1 else ""
            limit = f"{self._limits.max_pixels / 1e6:g} megapixels"
            raise TooLarge(f"{count}{width}x{height} after preprocessing exceed {limit}")


def _batch(images: Sequence[_Image], spec: PreprocessSpec) -> Batch:
    stacked = stack_images([image.transformed for image in images], spec)
    return Batch(stacked.astype(np.float32, copy=False), *_described(images, stacked.shape[2:]))


def _byte_batch(images: Sequence[_Image], spec: PreprocessSpec) -> ByteBatch:
    stacked = stack_images([image.transformed for image in images], spec)
    pixels = np.require(
        stacked, np.uint8, ("C", "W")
    )  # one image is a view, and may be of what the decoder keeps
    return ByteBatch(pixels, *scale_and_shift(spec), *_described(images, stacked.shape[2:]))


def _described(
    images: Sequence[_Image], size: Sequence[int]
) -> tuple[tuple[ImageInfo, ...], tuple[tuple[float, float], ...] | None]:
    """`infos` and `valid` of a batch of images stacked to [height, width]."""
    height, width = size
    infos = tuple(
        ImageInfo(image.width, image.height, image.format, (height, width), image.transformed.valid)
        for image in images
    )
    padded = any(info.valid != (height, width) for info in infos)
    valid = tuple((info.valid[0] / height, info.valid[1] / width) for info in infos) if padded else None
    return infos, valid
