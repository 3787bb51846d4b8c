"""From encoded images, or one `.npy`, to the array that the device worker takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Generic, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from service.config.preprocess import PreprocessSpec
from service.errors import InvalidConfig, TooLarge
from service.images.decode import DecodedImage, OpenedImage, open_image
from service.images.tensors import OpenedTensor, open_npy
from service.images.transforms import (
    TransformedImage,
    enough_pixels,
    fit_image,
    planned_size,
    resized_pixels,
    scale_and_shift,
    stack_images,
    transform_image,
)
from service.protocol.reply import FloatArray, ImageInfo
from service.runtime.shares import Share
from service.runtime.threads import all_of, on_thread, on_thread_holding

T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", OpenedImage, OpenedTensor)
P = ParamSpec("P")

TENSOR = "tensor"  # the format of what was sent as an array


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
        info = ImageInfo(size[1], size[0], TENSOR, size, size)
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
class Heads:
    """What is known of a request's images before any is decoded.

    Attributes:
        size: [height, width] of what the network will see; of `native` images that hide how they are turned it may be
            the other way round.
        decoding_bytes: what decoding them side by side holds at a time beside the batch.
        batch_bytes: what the batch holds.
    """

    images: int
    size: tuple[int, int]
    decoding_bytes: int
    batch_bytes: int


class Admission(Protocol):
    """Who says when a request may take memory. `share` is what it has of it."""

    share: Share

    def now(self, heads: Heads) -> bool:
        """Take what it needs at once, if that is there; asked on a thread."""

    async def in_turn(self, heads: Heads) -> None:
        """Take what it needs when its turn comes."""


@dataclass(frozen=True)
class _Image:
    transformed: TransformedImage
    width: int
    height: int
    format: str


@dataclass(frozen=True)
class _Opened(Generic[F]):
    """What is opened, and whether it may be decoded."""

    files: Sequence[F]
    heads: Heads
    is_admitted: bool


Transform = Callable[[DecodedImage, PreprocessSpec], TransformedImage]


class Intake:
    """Decodes and transforms on threads; whatever is wrong with an image fails its own request only.

    Whoever gives an `admission` is asked once the headers are read and before anything is decoded.
    """

    def __init__(self, executor: Executor, limits: Limits) -> None:
        self._executor = executor
        self._limits = limits

    async def tensor(self, data: bytes, channels: int, admission: Admission | None = None) -> Batch:
        """The batch of an already normalised `.npy`.

        Raises:
            MalformedBody, UnsupportedMedia, TooLarge, InvalidConfig: what is wrong with it.
        """
        begun = await self._run(admission, self._begin_tensor, data, channels, admission)
        if isinstance(begun, Batch):
            return begun
        if admission is not None:
            await admission.in_turn(begun.heads)
        return await self._run(admission, _tensor_batch, begun.files[0])

    async def images(
        self,
        encoded: Sequence[bytes],
        spec: PreprocessSpec,
        channels: int,
        admission: Admission | None = None,
    ) -> Batch:
        """The batch of encoded images, decoded side by side.

        Raises:
            UndecodableImage, UnsupportedMedia, TooLarge, InvalidConfig: what is wrong with one of them.
        """
        _refuse_channels(channels)
        form = _Form(spec, transform_image, partial(_batch, spec=spec), np.dtype(np.float32).itemsize)
        return await self._stacked(encoded, form, admission)

    async def byte_images(
        self,
        encoded: Sequence[bytes],
        spec: PreprocessSpec,
        channels: int,
        admission: Admission | None = None,
    ) -> ByteBatch:
        """As `images`, but not yet normalised.

        Raises:
            UndecodableImage, UnsupportedMedia, TooLarge, InvalidConfig: what is wrong with one of them.
        """
        _refuse_channels(channels)
        form = _Form(spec, fit_image, partial(_byte_batch, spec=spec), np.dtype(np.uint8).itemsize)
        return await self._stacked(encoded, form, admission)

    async def _stacked(self, encoded: Sequence[bytes], form: _Form[T], admission: Admission | None) -> T:
        """Decoded side by side, then stacked; one image that may be decoded at once is done in one go."""
        begun = await self._run(admission, self._begin, encoded, form, admission)
        if not isinstance(begun, _Opened):
            return begun
        if admission is not None and not begun.is_admitted:
            await admission.in_turn(begun.heads)
        decoded = await all_of(self._run(admission, self._decode, opened, form) for opened in begun.files)
        self._refuse_pixels([image.transformed.valid for image in decoded], form.spec.size_divisor)
        return await self._run(admission, form.stack, decoded)

    async def _run(
        self, admission: Admission | None, function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs
    ) -> R:
        """Run on a thread; what the request has of the memory stays its own until that is done."""
        if admission is None:
            return await on_thread(self._executor, function, *arguments, **keywords)
        return await on_thread_holding(admission.share, self._executor, function, *arguments, **keywords)

    def _begin(
        self, encoded: Sequence[bytes], form: _Form[T], admission: Admission | None
    ) -> _Opened[OpenedImage] | T:
        opened = [
            open_image(data, index=index, max_pixels=self._limits.max_pixels)
            for index, data in enumerate(encoded)
        ]
        sizes = [planned_size(image.width, image.height, form.spec) for image in opened]
        heads = _heads(opened, self._refuse_pixels(sizes, form.spec.size_divisor), form)
        is_admitted = admission is None or admission.now(heads)
        if is_admitted and len(opened) == 1:
            return form.stack([self._decode(opened[0], form)])
        return _Opened(opened, heads, is_admitted)

    def _begin_tensor(
        self, data: bytes, channels: int, admission: Admission | None
    ) -> _Opened[OpenedTensor] | Batch:
        tensor = open_npy(data, max_elements=self._limits.max_elements)
        count, found, height, width = tensor.shape
        if count > self._limits.max_images:
            raise TooLarge(f"{count} images exceed {self._limits.max_images} in one request")
        if found != channels:
            raise InvalidConfig(
                "#/tensor", f"the tensor has {found} channels, this backbone takes {channels}"
            )
        heads = Heads(count, (height, width), 0, tensor.bytes)
        if admission is None or admission.now(heads):
            return _tensor_batch(tensor)
        return _Opened([tensor], heads, is_admitted=False)

    def _decode(self, opened: OpenedImage, form: _Form[T]) -> _Image:
        spec = form.spec
        image = opened.decode(partial(enough_pixels, spec=spec) if spec.fast_decode else None)
        self._refuse_pixels([planned_size(image.width, image.height, spec)], spec.size_divisor)
        return _Image(form.transform(image, spec), image.width, image.height, image.format)

    def _refuse_pixels(self, sizes: Sequence[Sequence[int]], divisor: int) -> tuple[int, int]:
        """Refuse images that together, padded to the largest, have more pixels than one request may.

        Returns:
            [height, width] of each, padded.
        """
        height, width = (-(-max(size[axis] for size in sizes) // divisor) * divisor for axis in (0, 1))
        pixels = len(sizes) * height * width
        if pixels > self._limits.max_pixels:
            count = f"{len(sizes)} images of " if len(sizes) > 1 else ""
            limit = f"{self._limits.max_pixels / 1e6:g} megapixels"
            raise TooLarge(f"{count}{width}x{height} after preprocessing exceed {limit}")
        return height, width


@dataclass(frozen=True)
class _Form(Generic[T]):
    """What a request's images become: how each is transformed and all are stacked, of numbers of so many bytes."""

    spec: PreprocessSpec
    transform: Transform
    stack: Callable[[Sequence[_Image]], T]
    number_bytes: int


def _heads(opened: Sequence[OpenedImage], size: tuple[int, int], form: _Form[T]) -> Heads:
    stacked = len(opened) * 3 * size[0] * size[1] * form.number_bytes
    decoding = sum(
        image.decoded_bytes + 3 * resized_pixels(image.width, image.height, form.spec) for image in opened
    )
    # several are all there beside the array that they are put into
    return Heads(len(opened), size, decoding + (stacked if len(opened) > 1 else 0), stacked)


def _refuse_channels(channels: int) -> None:
    if channels != 3:
        detail = f"images have 3 channels, this backbone takes {channels}: send a tensor"
        raise InvalidConfig("#/backbone", detail)


def _tensor_batch(tensor: OpenedTensor) -> Batch:
    count, _, height, width = tensor.shape
    info = ImageInfo(width, height, TENSOR, (height, width), (height, width))
    return Batch(tensor.read(), (info,) * count, None)


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
