"""Resizing as Pillow does it; bilinear and bicubic by torch's kernel for bytes, a quarter of Pillow's time.

The kernel is Pillow's algorithm (antialiased, two passes, fixed-point weights) with weights of 16 bits instead of 32,
and differs from it by one grey level, in a few pixels of a thousand. Here alone torch is used between the bytes of an
image and the array for the network; it is imported on use.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

ByteImage = npt.NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[float, float, float, float]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# How large a side may become by torch's kernel, against what it was. Bicubic, over it, is two grey levels off in one
# pixel of a million; nearest takes the other pixel where two are as near; the other filters torch has not.
_LARGEST_RATIO = {"bilinear": math.inf, "bicubic": 0.7}
# The builds of torch that have the kernel. Without it torch would compute in floats, on threads of OpenMP.
_WITH_KERNEL = frozenset(("AVX2", "AVX512"))


def resize(rgb: ByteImage, size: Size, interpolation: str) -> ByteImage:
    """[h, w, 3] resized to `size`, [height, width]; not always C-contiguous.

    Args:
        interpolation: a key of `FILTERS`.
    """
    if rgb.shape[:2] == size:
        return rgb
    if _suits_torch(rgb.shape, size, interpolation):
        if _columns_first(rgb.shape, size):
            rgb = np.ascontiguousarray(_resize_by_torch(rgb, (size[0], rgb.shape[1]), interpolation))
        return _resize_by_torch(rgb, size, interpolation)
    return np.asarray(Image.fromarray(rgb).resize((size[1], size[0]), FILTERS[interpolation]))


def resize_window(rgb: ByteImage, size: Size, box: Box, interpolation: str) -> ByteImage:
    """What `box` (left, top, right, bottom; in pixels of `rgb`, fractions too) shows, resized to [height, width]."""
    return np.asarray(Image.fromarray(rgb).resize((size[1], size[0]), FILTERS[interpolation], box=box))


def _suits_torch(shape: tuple[int, ...], size: Size, interpolation: str) -> bool:
    ratio = max(size[0] / shape[0], size[1] / shape[1])
    return ratio <= _LARGEST_RATIO.get(interpolation, 0.0) and _torch_has_kernel()


def _columns_first(shape: tuple[int, ...], size: Size) -> bool:
    """Whether Pillow, from version 13, resizes the columns of an image before its rows; torch never does by itself.

    It is no matter of rounding: what overshoots white or black at an edge is clipped between the passes.
    """
    lost_rows, lost_columns = shape[0] - size[0], shape[1] - size[1]
    return lost_columns != 0 and lost_rows > max(0, 2 * lost_columns)


@cache
def _torch_has_kernel() -> bool:
    import torch

    return torch.backends.cpu.get_cpu_capability() in _WITH_KERNEL


def _resize_by_torch(rgb: ByteImage, size: Size, mode: str) -> ByteImage:
    """By the kernel for bytes whose channels come last, which runs on the calling thread alone.

    One image is not divided among threads, whatever `torch.set_num_threads` says, and OpenMP is never
    entered: that would start a second team of threads, which slows the device's own. (Planar bytes are packed
    by a parallel copy first: so the channels must be last.) The interpreter's lock is released meanwhile.
    """
    import torch

    # torch warns of arrays that it could write into against their will.
    pixels = torch.from_numpy(rgb if rgb.flags.writeable else rgb.copy())
    resized = torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None], size, mode=mode, antialias=True)
    array: ByteImage = resized[0].permute(1, 2, 0).numpy()
    return array
