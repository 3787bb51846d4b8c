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
# A very long image is cut to what the crop shows before it is resized; below this nothing is cut.
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

    For a square size this is torchvision's Resize of the short side and CenterCrop, and timm's evaluation
    transform: the short side becomes floor(size / crop_pct), the long side is truncated, the offsets rounded.
    """
    assert spec.size is not None
    height, width = image.rgb.shape[:2]
    covered = [int(side / spec.crop_pct) for side in spec.size]
    if covered[0] / height >= covered[1] / width:
        target = (covered[0], max(int(width * covered[0] / height), spec.size[1]))
    else:
        target = (max(int(height * covered[1] / width), spec.size[0]), covered[1])
    if target[0] * target[1] > MAX_RESIZED_PIXELS:
        return _cropped(_middle(image, target, spec.size), spec)
    resized = _resize(image.rgb, target, spec.interpolation)
    top, left = (round((full - kept) / 2.0) for full, kept in zip(target, spec.size, strict=True))
    return resized[top : top + spec.size[0], left : left + spec.size[1]]


def _middle(image: DecodedImage, target: Size, size: Size) -> DecodedImage:
    """The part of an extremely long image that its centre crop can see, with as much again on either side."""
    height, width = image.rgb.shape[:2]
    kept_h = min(height, -(-height * size[0] * 3 // target[0]))
    kept_w = min(width, -(-width * size[1] * 3 // target[1]))
    top, left = (height - kept_h) // 2, (width - kept_w) // 2
    rgb = np.ascontiguousarray(image.rgb[top : top + kept_h, left : left + kept_w])
    return DecodedImage(rgb, kept_w, kept_h, image.format)


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
