"""From the bytes of an image file to an upright RGB array."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import TooLarge, UndecodableImage, UnsupportedMedia
from service.images.containers import (
    BrokenContainer,
    Container,
    orientation_of,
    read_gif,
    read_jpeg,
    read_plain,
    read_tiff,
    read_webp,
)
from service.images.jpegs import decode_jpeg, jpeg_size

MAX_SIDE = 65_500  # libjpeg's own limit

# What Pillow's plugins raise on corrupt files; a fuzzed file of each format is in the tests.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
Enough = Callable[[int, int], tuple[int, int]]
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class DecodedImage:
    """One image, upright: `rgb` is uint8, [h, w, 3], C-contiguous; `format` as in `JPEG`.

    `width` and `height` are those of the file, and of `rgb` unless it was decoded scaled.
    """

    rgb: np.ndarray
    width: int
    height: int
    format: str


@dataclass(frozen=True)
class _Format:
    """A format that is served: how a file of it begins, what is read of it first, and who decodes it.

    The plugins are called by name: `Image.open` would try one after the other, turn a JPEG with a second
    picture into another format, and warn of large images in a process-wide way.
    """

    name: str
    magic: re.Pattern[bytes]
    read: Callable[[bytes], Container]
    plugin: type[ImageFile]


_FORMATS = (
    _Format("JPEG", re.compile(rb"\xff\xd8\xff"), read_jpeg, JpegImageFile),
    _Format("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), read_plain, PngImageFile),
    _Format("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL), read_webp, WebPImageFile),
    _Format("GIF", re.compile(rb"GIF8[79]a"), read_gif, GifImageFile),
    _Format("BMP", re.compile(rb"BM"), read_plain, BmpImageFile),
    _Format("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), read_tiff, TiffImageFile),
)
_NAMES = ", ".join(known.name for known in _FORMATS)
_SHORTEST_HEADER = 14

_CONVERTED_BY_WAY_OF = {"La": "LA", "RGBa": "RGBA"}
_EIGHT_BIT = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"))
_SIXTEEN_BIT = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))

# Exif 2.32, section 4.6.4, tag 274: the turn that makes an image upright, of [h, w] pixels.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.T,
    6: lambda pixels: pixels[::-1].T,
    7: lambda pixels: pixels[::-1, ::-1].T,
    8: lambda pixels: pixels[:, ::-1].T,
}
_ON_ITS_SIDE = frozenset((5, 6, 7, 8))


# What decoding holds for each pixel, at most: RGB, and a turned copy of it; Pillow keeps four bytes a pixel in up to
# two modes, and hands over copies.
_JPEG_BYTES, _PILLOW_BYTES = 6, 14


@dataclass(frozen=True)
class OpenedImage:
    """One image file whose header is read and within its limits; no pixel of it is.

    Attributes:
        height: of the image upright, and so is `width`; where the file hides how it is turned until it is decoded, the
            two may be the other way round.
        decoded_bytes: what decoding holds at a time, at most.
    """

    width: int
    height: int
    decoded_bytes: int
    _container: Container
    _kind: _Format
    _image: ImageFile | None
    _index: int
    _max_pixels: int

    def decode(self, enough: Enough | None = None) -> DecodedImage:
        """The pixels; as `decode_image`. To be called once."""
        decoded = self._decode_jpeg(enough) if self._image is None else None
        if decoded is not None:
            return decoded
        image = self._image or _opened_by_pillow(self._container, self._kind, self._index, self._max_pixels)
        rgb = _upright_rgb(image, self._container.exif, self._kind, self._index, self._max_pixels)
        return DecodedImage(rgb, rgb.shape[1], rgb.shape[0], self._kind.name)

    def _decode_jpeg(self, enough: Enough | None) -> DecodedImage | None:
        """None where Pillow should see the file."""
        orientation = orientation_of(self._container.exif)
        least = None if enough is None else enough(self.width, self.height)
        stored = least[::-1] if least is not None and orientation in _ON_ITS_SIDE else least
        pixels = decode_jpeg(self._container.data, stored)
        if pixels is None:
            return None
        return DecodedImage(_upright(pixels, orientation), self.width, self.height, "JPEG")


def decode_image(
    data: bytes | memoryview, *, index: int, max_pixels: int, enough: Enough | None = None
) -> DecodedImage:
    """Decode a JPEG, PNG, WebP, GIF (its first frame), BMP or TIFF into upright RGB.

    Alpha is dropped, not blended, and palettes are looked up, as Pillow's `convert("RGB")` does and torchvision and
    timm with it; 16-bit grey keeps its upper 8 bits; colour profiles are not applied. The Exif orientation
    is; a broken Exif block means upright.

    Args:
        data: the file.
        index: which image of the request it is, for the errors.
        max_pixels: the most pixels it may have; checked before they are allocated.
        enough: for scaled decoding of JPEGs: from [width, height] to the [height, width] that will do. None for
            every pixel.

    Raises:
        UndecodableImage: empty, truncated or corrupt.
        UnsupportedMedia: another format, or pixels of 32 bits or floats.
        TooLarge: more than `max_pixels`, or more than 65500 on a side.
    """
    return open_image(data, index=index, max_pixels=max_pixels).decode(enough)


def open_image(data: bytes | memoryview, *, index: int, max_pixels: int) -> OpenedImage:
    """Read the header of an image file: all that `decode_image` refuses without decoding is refused here."""
    _quiet_pillow()
    encoded = bytes(data)
    kind = _format_of(encoded, index)
    container = _read_container(encoded, kind, index)
    size = jpeg_size(container.data) if kind.name == "JPEG" else None
    if size is not None:
        image, (height, width), bytes_a_pixel = None, size, _JPEG_BYTES
        _refuse_large((width, height), index, max_pixels)
    else:
        image = _opened_by_pillow(container, kind, index, max_pixels)
        (width, height), bytes_a_pixel = image.size, _PILLOW_BYTES
    decoded_bytes = width * height * bytes_a_pixel
    if orientation_of(container.exif) in _ON_ITS_SIDE:
        width, height = height, width
    return OpenedImage(width, height, decoded_bytes, container, kind, image, index, max_pixels)


def image_size(data: bytes | memoryview, *, index: int, max_pixels: int) -> tuple[int, int]:
    """[width, height] of an upright image as its header says; no pixel is decoded.

    Raises:
        UndecodableImage, UnsupportedMedia, TooLarge: as `decode_image` does for a header.
    """
    opened = open_image(data, index=index, max_pixels=max_pixels)
    return opened.width, opened.height


def _opened_by_pillow(container: Container, kind: _Format, index: int, max_pixels: int) -> ImageFile:
    if container.size is not None:
        _refuse_large(container.size, index, max_pixels)
    image = _opened(container.data, kind, index, max_pixels)
    _refuse_large(image.size, index, max_pixels)
    _refuse_pixel_type(image, index)
    return image


def _format_of(data: bytes, index: int) -> _Format:
    if not data:
        raise UndecodableImage(f"image {index}: is empty")
    for known in _FORMATS:
        if known.magic.match(data):
            if len(data) < _SHORTEST_HEADER:
                raise _corrupt(known, index)
            return known
    raise UnsupportedMedia(f"image {index}: is not one of {_NAMES}")


def _read_container(data: bytes, kind: _Format, index: int) -> Container:
    try:
        return kind.read(data)
    except BrokenContainer as error:
        raise UndecodableImage(f"image {index}: the {kind.name} {error}") from error


def _opened(data: bytes, kind: _Format, index: int, max_pixels: int) -> ImageFile:
    """The image with its header read and no pixels yet."""
    try:
        return kind.plugin(io.BytesIO(data))
    except _BOMBS as error:
        raise _too_many_pixels(index, max_pixels) from error
    except _DECODER_ERRORS as error:
        raise _corrupt(kind, index) from error


def _upright_rgb(image: ImageFile, exif: bytes, kind: _Format, index: int, max_pixels: int) -> np.ndarray:
    try:
        image.load()
        # TIFF's own orientation is no Exif block: its plugin has turned the image already.
        orientation = orientation_of(exif or _exif_of(image))
        return _upright(np.asarray(_to_rgb(image)), orientation)
    except _BOMBS as error:
        raise _too_many_pixels(index, max_pixels) from error
    except MemoryError:
        raise  # sizes are checked before: it is the machine that has none left, and the file may be in order
    except _DECODER_ERRORS as error:
        raise _corrupt(kind, index) from error


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    turn = _TURNS.get(orientation)
    if turn is None:
        return np.ascontiguousarray(rgb)
    # Whole pixels are moved: three bytes at once take half as long as one after the other.
    turned = np.ascontiguousarray(turn(rgb.view("V3")[:, :, 0]))
    return turned.view(np.uint8).reshape(*turned.shape, 3)


def _exif_of(image: ImageFile) -> bytes:
    exif = image.info.get("exif")
    return exif if isinstance(exif, bytes) and not isinstance(image, TiffImageFile) else b""


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _SIXTEEN_BIT:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in _CONVERTED_BY_WAY_OF:
        image = image.convert(_CONVERTED_BY_WAY_OF[image.mode])
    return image.convert("RGB")


def _refuse_large(size: tuple[int, int], index: int, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise UndecodableImage(f"image {index}: {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise TooLarge(f"image {index}: {width}x{height} exceeds {max_pixels / 1e6:g} megapixels")
    if max(width, height) > MAX_SIDE:
        raise TooLarge(f"image {index}: {width}x{height} exceeds {MAX_SIDE} pixels on a side")


def _refuse_pixel_type(image: ImageFile, index: int) -> None:
    if image.mode not in _EIGHT_BIT | _SIXTEEN_BIT:
        pixels = {"I": "32-bit", "F": "floating-point"}.get(image.mode, image.mode)
        raise UnsupportedMedia(f"image {index}: {pixels} pixels are not served; 8 and 16 bits a channel are")
    # Pillow unpacks run-length coded BMP in Python, a byte at a time: minutes for a file of a few kB.
    if isinstance(image, BmpImageFile) and image.info.get("compression") in (1, 2):
        raise UnsupportedMedia(f"image {index}: run-length coded BMP is not served")


def _corrupt(kind: _Format, index: int) -> UndecodableImage:
    return UndecodableImage(f"image {index}: the {kind.name} is truncated or corrupt")


def _too_many_pixels(index: int, max_pixels: int) -> TooLarge:
    return TooLarge(f"image {index}: exceeds {max_pixels / 1e6:g} megapixels")


_PILLOW = re.compile(r"PIL\.")


def _quiet_pillow() -> None:
    """Ignore what Pillow warns of in clients' metadata; what matters of it is an error here.

    `warnings.catch_warnings` swaps the process's filters back and forth, which threads would tear. One filter
    is added and stays.
    """
    if not any(entry[0] == "ignore" and entry[3] == _PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
