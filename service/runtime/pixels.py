"""How much a query is, in pixels, before anything of it is decoded."""

from __future__ import annotations

from service.config.preprocess import PreprocessSpec
from service.images.decode import image_size
from service.images.tensors import open_npy
from service.images.transforms import planned_size
from service.runtime.query import FeatureQuery


def count_pixels(query: FeatureQuery, spec: PreprocessSpec, max_pixels: int) -> int:
    """Pixels to be decoded or to go through the network, whichever are more: an image may be enlarged.

    A tensor is n x h x w of them, whatever its channels.

    Raises:
        UndecodableImage, UnsupportedMedia, TooLarge, MalformedBody: as when it is decoded.
    """
    if query.tensor is not None:
        count, _, height, width = open_npy(query.tensor, max_elements=len(query.tensor)).shape
        return count * height * width
    sizes = [image_size(data, index=index, max_pixels=max_pixels) for index, data in enumerate(query.images)]
    return sum(max(width * height, _area(planned_size(width, height, spec))) for width, height in sizes)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
