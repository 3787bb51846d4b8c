"""From an RGB array to the tensor that a network takes, as torchvision and timm do it with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.config.preprocess import PreprocessSpec
from service.images.decode import DecodedImage
from service.images.resize import ByteImage, Size, resize, resize_window

FloatImage = npt.NDArray[np.float32]
Window = tuple[int, int, int, int]
# A thin image is not resized as a whole before it is cropped: at 224 pixels 1x30000 would become 256x7680000.
MAX_RESIZED_PIXELS = 50_000_000

# A scaled JPEG keeps twice as many pixels a side as are left of it: what it loses is finer than what resizing leaves.
OVERSAMPLING = 2


@dataclass(frozen=True)
class TransformedImage:
    """One image for a network: `array` is [3, height, width]; all of it is image, nothing padding.

    It is float32 and normalised, or uint8 and still to be: in the network's order of channels either way.
    """

    array: FloatImage | ByteImage

    @property
    def valid(self) -> Size:
        """[height, width] of what is not padding once the image is stacked with others."""
        return self.array.shape[1], self.array.shape[2]


def planned_size(width: int, height: int, spec: PreprocessSpec) -> Size:
    """[height, width] that an image of this size will have, before padding; costs nothing."""
    return (height, width) if spec.size is None else spec.size


def resized_pixels(width: int, height: int, spec: PreprocessSpec) -> int:
    """Pixels that an image of this size has at most while it is fitted; 0 where it stays as it is."""
    if spec.size is None:
        return 0
    resized = RESIZED_SIZES[spec.mode]((height, width), spec)
    return min(resized[0] * resized[1], MAX_RESIZED_PIXELS)


def enough_pixels(width: int, height: int, spec: PreprocessSpec) -> Size:
    """[height, width] that a scaled decoding of an image of this size has at least, for `fast_decode`."""
    target = RESIZED_SIZES[spec.mode]((height, width), spec)
    return target[0] * OVERSAMPLING, target[1] * OVERSAMPLING


def transform_image(image: DecodedImage, spec: PreprocessSpec) -> TransformedImage:
    """Resize, crop and normalise one image: float32."""
    return TransformedImage(_normalised(_fitted(image, spec), spec))


def fit_image(image: DecodedImage, spec: PreprocessSpec) -> TransformedImage:
    """Resize and crop one image: uint8, to be normalised on the device."""
    return TransformedImage(_fitted(image, spec))


def scale_and_shift(spec: PreprocessSpec) -> tuple[FloatImage, FloatImage]:
    """Of each channel, [3]: a byte times the one plus the other is (byte / 255 - mean) / std."""
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _fitted(image: DecodedImage, spec: PreprocessSpec) -> ByteImage:
    """[3, h, w] in the order of the network's channels."""
    rgb = FITS[spec.mode](image, spec)
    pixels = rgb[:, :, ::-1] if spec.channel_order == "bgr" else rgb
    return pixels.transpose(2, 0, 1)


def _native(image: DecodedImage, _spec: PreprocessSpec) -> ByteImage:
    return image.rgb


def _resized(image: DecodedImage, spec: PreprocessSpec) -> ByteImage:
    """Exactly `spec.size`; the aspect is not kept."""
    assert spec.size is not None
    return resize(image.rgb, spec.size, spec.interpolation)


def _cropped(image: DecodedImage, spec: PreprocessSpec) -> ByteImage:
    """Resize so that `size / crop_pct` is just covered, then cut `size` from the middle.

    The offsets round as torchvision's CenterCrop does. Where the whole resized image would be too large, only
    the window is computed: the same filter over the same pixels, equal but for what Pillow rounds between passes.
    """
    assert spec.size is not None
    target = _crop_target((image.height, image.width), spec)
    top, left = (round((full - kept) / 2.0) for full, kept in zip(target, spec.size, strict=True))
    window = (top, left, top + spec.size[0], left + spec.size[1])
    if target[0] * target[1] > MAX_RESIZED_PIXELS:
        return _resized_window(image, target, window, spec)
    resized = resize(image.rgb, target, spec.interpolation)
    return resized[window[0] : window[2], window[1] : window[3]]


def _crop_target(size: Size, spec: PreprocessSpec) -> Size:
    """[height, width] that an image of this size is resized to before it is cropped."""
    assert spec.size is not None
    return _covering(size, (int(spec.size[0] / spec.crop_pct), int(spec.size[1] / spec.crop_pct)))


def _whole_target(size: Size, spec: PreprocessSpec) -> Size:
    """[height, width] that an image of this size is resized to if it is not cropped."""
    return size if spec.size is None else spec.size


def _covering(size: Size, edges: Size) -> Size:
    """[height, width] of an image that is scaled until it covers `edges`, its aspect kept.

    Square edges round as torchvision's `Resize(int)` does, others as timm's `ResizeKeepRatio`.
    """
    height, width = size
    if edges[0] == edges[1]:
        edge = edges[0]
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
    ratio = min(height / edges[0], width / edges[1])
    return round(height / ratio), round(width / ratio)


def _resized_window(image: DecodedImage, target: Size, window: Window, spec: PreprocessSpec) -> ByteImage:
    """What `window` (top, left, bottom, right) shows of the image resized to `target`, without the rest of it."""
    assert spec.size is not None
    stored = image.rgb.shape
    y_scale, x_scale = stored[0] / target[0], stored[1] / target[1]
    top, left, bottom, right = window
    box = (left * x_scale, top * y_scale, min(right * x_scale, stored[1]), min(bottom * y_scale, stored[0]))
    return resize_window(image.rgb, spec.size, box, spec.interpolation)


FITS = {"crop": _cropped, "resize": _resized, "native": _native}
RESIZED_SIZES = {"crop": _crop_target, "resize": _whole_target, "native": _whole_target}


def _normalised(pixels: ByteImage, spec: PreprocessSpec) -> FloatImage:
    """(x / 255 - mean) / std, [3, h, w], as one multiplication and one addition.

    By NumPy: torch would share so little work among threads of OpenMP.
    """
    scale, shift = scale_and_shift(spec)
    array: FloatImage = pixels.astype(np.float32, order="C")
    array *= scale[:, None, None]
    array += shift[:, None, None]
    return array


def stack_images(images: Sequence[TransformedImage], spec: PreprocessSpec) -> FloatImage | ByteImage:
    """[n, 3, h, w]: zeros to the right and below where an image is smaller than the largest or than the divisor."""
    height, width = (_up(max(image.valid[axis] for image in images), spec.size_divisor) for axis in (0, 1))
    if len(images) == 1 and images[0].valid == (height, width):
        return images[0].array[None]
    stacked = np.zeros((len(images), 3, height, width), images[0].array.dtype)
    for slot, image in zip(stacked, images, strict=True):
        slot[:, : image.valid[0], : image.valid[1]] = image.array
    return stacked


def _up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor
