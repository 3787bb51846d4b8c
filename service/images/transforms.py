"""From an RGB array to the tensor that a network takes, as torchvision and timm do it with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.config.preprocess import PreprocessSpec
from service.images.decode import DecodedImage

ByteImage = npt.NDArray[np.uint8]
FloatImage = npt.NDArray[np.float32]
Size = tuple[int, int]
Window = tuple[int, int, int, int]
# A thin image is not resized as a whole before it is cropped: at 224 pixels 1x30000 would become 256x7680000.
MAX_RESIZED_PIXELS = 50_000_000

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True)
class TransformedImage:
    """One image for a network: `array` is [3, height, width], normalised; all of it is image, nothing padding."""

    array: FloatImage

    @property
    def valid(self) -> Size:
        """[height, width] of what is not padding once the image is stacked with others."""
        return self.array.shape[1], self.array.shape[2]


def planned_size(width: int, height: int, spec: PreprocessSpec) -> Size:
    """[height, width] that an image of this size will have, before padding; costs nothing."""
    return (height, width) if spec.size is None else spec.size


def transform_image(image: DecodedImage, spec: PreprocessSpec) -> TransformedImage:
    """Resize, crop and normalise one image."""
    fitted = FITS[spec.mode](image, spec)
    return TransformedImage(_normalised(fitted, spec))


def _native(image: DecodedImage, _spec: PreprocessSpec) -> ByteImage:
    return image.rgb


def _resized(image: DecodedImage, spec: PreprocessSpec) -> ByteImage:
    """Exactly `spec.size`; the aspect is not kept."""
    assert spec.size is not None
    return _resize(image.rgb, spec.size, spec.interpolation)


def _cropped(image: DecodedImage, spec: PreprocessSpec) -> ByteImage:
    """Resize so that `size / crop_pct` is just covered, then cut `size` from the middle.

    The offsets round as torchvision's CenterCrop does. Where the whole resized image would be too large, only
    the window is computed: the same filter over the same pixels, equal but for what Pillow rounds between passes.
    """
    assert spec.size is not None
    edges = int(spec.size[0] / spec.crop_pct), int(spec.size[1] / spec.crop_pct)
    target = _covering((image.height, image.width), edges)
    top, left = (round((full - kept) / 2.0) for full, kept in zip(target, spec.size, strict=True))
    window = (top, left, top + spec.size[0], left + spec.size[1])
    if target[0] * target[1] > MAX_RESIZED_PIXELS:
        return _resized_window(image, target, window, spec)
    resized = _resize(image.rgb, target, spec.interpolation)
    return resized[window[0] : window[2], window[1] : window[3]]


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
    y_scale, x_scale = image.height / target[0], image.width / target[1]
    top, left, bottom, right = window
    box = (
        left * x_scale,
        top * y_scale,
        min(right * x_scale, image.width),
        min(bottom * y_scale, image.height),
    )
    size = (spec.size[1], spec.size[0])
    return np.asarray(Image.fromarray(image.rgb).resize(size, FILTERS[spec.interpolation], box=box))


def _resize(rgb: ByteImage, size: Size, interpolation: str) -> ByteImage:
    if rgb.shape[:2] == size:
        return rgb
    resized = Image.fromarray(rgb).resize((size[1], size[0]), FILTERS[interpolation])
    return np.asarray(resized)


FITS = {"crop": _cropped, "resize": _resized, "native": _native}


def _normalised(rgb: ByteImage, spec: PreprocessSpec) -> FloatImage:
    """(x / 255 - mean) / std in the channel order of the network, as one multiplication and one addition."""
    pixels = rgb[:, :, ::-1] if spec.channel_order == "bgr" else rgb
    mean, std = np.asarray(spec.mean), np.asarray(spec.std)
    scale = (1.0 / (255.0 * std)).astype(np.float32)[:, None, None]
    shift = (-mean / std).astype(np.float32)[:, None, None]
    array: FloatImage = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
    array *= scale
    array += shift
    return array


def stack_images(images: Sequence[TransformedImage], spec: PreprocessSpec) -> FloatImage:
    """[n, 3, h, w]: zeros to the right and below where an image is smaller than the largest or than the divisor."""
    height, width = (_up(max(image.valid[axis] for image in images), spec.size_divisor) for axis in (0, 1))
    if len(images) == 1 and images[0].valid == (height, width):
        return images[0].array[None]
    stacked = np.zeros((len(images), 3, height, width), np.float32)
    for slot, image in zip(stacked, images, strict=True):
        slot[:, : image.valid[0], : image.valid[1]] = image.array
    return stacked


def _up(side: int, divisor: int) -> int:
    return -(-side // divisor) * divisor
