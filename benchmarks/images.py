"""Images that the command makes: nothing is downloaded."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

PHOTO_SIZE = (500, 375)


def photo(size: tuple[int, int] = PHOTO_SIZE, seed: int = 0) -> bytes:
    """A JPEG of (width, height) with broad shapes, edges and grain: about as many bytes as a camera's photo.

    A flat or a noisy picture would be cheaper, or dearer, to decode than what people send.
    """
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    edges = Image.fromarray(rng.integers(0, 60, (48, 64, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)
    grain = rng.normal(0, 4, (size[1], size[0], 1))
    pixels = np.asarray(shapes, np.float32) * 0.75 + np.asarray(edges, np.float32) + grain
    sink = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=85)
    return sink.getvalue()


def photos(count: int, size: tuple[int, int] = PHOTO_SIZE) -> tuple[bytes, ...]:
    """Different photos of one size, so that nothing can be remembered from one request to the next."""
    return tuple(photo(size, seed) for seed in range(count))


def normalised_batch(count: int, side: int = 224, seed: int = 0) -> bytes:
    """A `.npy` of float32 [count, 3, side, side]: images that arrive decoded."""
    sink = io.BytesIO()
    np.save(sink, np.random.default_rng(seed).standard_normal((count, 3, side, side), np.float32))
    return sink.getvalue()
