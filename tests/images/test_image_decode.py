"""Image files of any kind and any brokenness become upright RGB, or a clear refusal."""

from __future__ import annotations

import io
import struct
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from service.errors import ServiceError, TooLarge, UndecodableImage, UnsupportedMedia
from service.images.containers import MAX_JPEG_SCANS, MAX_TIFF_VALUES
from service.images.decode import MAX_SIDE, decode_image

LIMIT = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def picture(width=37, height=23, mode="RGB"):
    """A smooth picture with a mark in the upper left corner."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(
        np.uint8
    )
    rgb[: height // 4, : width // 4] = (255, 0, 0)
    return Image.fromarray(rgb).convert(mode)


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decode(data, max_pixels=LIMIT):
    return decode_image(data, index=3, max_pixels=max_pixels)


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("wrap", [bytes, memoryview])
@pytest.mark.parametrize("format", FORMATS)
def test_each_format_decodes_as_pillow_does(format, wrap):
    data = encoded(picture(), format)
    decoded = decode(wrap(data))
    np.testing.assert_array_equal(decoded.rgb, by_pillow(data))
    assert (decoded.width, decoded.height, decoded.format) == (37, 23, format)
    assert decoded.rgb.dtype == np.uint8
    assert decoded.rgb.flags.c_contiguous


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0, "quality": 100}),
        ("RGB", "JPEG", {"restart_marker_rows": 1}),
        ("1", "PNG", {}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("RGBA", "PNG", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {}),
        ("L", "GIF", {}),
        ("P", "GIF", {"transparency": 3, "interlace": 1}),
        ("1", "BMP", {}),
        ("P", "BMP", {}),
        ("RGBA", "BMP", {}),
        ("1", "TIFF", {"compression": "group4"}),
        ("CMYK", "TIFF", {}),
        ("LA", "TIFF", {}),
        ("PA", "TIFF", {}),
        ("YCbCr", "TIFF", {}),
        ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
        ("RGB", "TIFF", {"compression": "tiff_deflate"}),
        ("RGB", "TIFF", {"big_tiff": True}),
    ],
)
def test_every_pixel_type_becomes_rgb(mode, format, options):
    data = encoded(picture(mode=mode), format, **options)
    np.testing.assert_array_equal(decode(data).rgb, by_pillow(data))


def textured(width, height, mode="RGB"):
    """Something of every frequency, so that a different transform or upsampling of colours would show."""
    rng = np.random.default_rng(width * height)
    smooth = np.asarray(picture(width, height)).astype(int)
    return Image.fromarray(
        np.clip(smooth + rng.integers(-60, 60, smooth.shape), 0, 255).astype(np.uint8)
    ).convert(mode)


JPEGS = {
    "4:4:4": ("RGB", {"subsampling": 0}),
    "4:2:2": ("RGB", {"subsampling": 1}),
    "4:2:0": ("RGB", {"subsampling": 2}),
    "grey": ("L", {}),
    "RGB": ("RGB", {"keep_rgb": True}),
    "CMYK": ("CMYK", {}),
    "progressive": ("RGB", {"progressive": True}),
    "progressive grey": ("L", {"progressive": True}),
    "of the worst quality": ("RGB", {"quality": 1}),
    "of the best": ("RGB", {"quality": 100, "optimize": True}),
    "with restarts": ("RGB", {"restart_marker_blocks": 3}),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (16, 16), (97, 61), (250, 333)])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_is_pillows_bit_for_bit(kind, size):
    mode, options = JPEGS[kind]
    data = encoded(textured(*size, mode), "JPEG", **options)
    np.testing.assert_array_equal(decode(data).rgb, by_pillow(data))


def test_a_jpeg_that_is_only_untidy_decodes_as_pillow_decodes_it():
    data = encoded(textured(64, 48), "JPEG", restart_marker_rows=1)
    at = data.index(b"\xff\xd0")
    untidy = data[:at] + b"\0\0\0" + data[at:]
    np.testing.assert_array_equal(decode(untidy).rgb, by_pillow(untidy))


@pytest.mark.parametrize("sampling", [0x14, 0x41, 0x31, 0x13])
def test_a_jpeg_of_unusual_subsampling_decodes_as_pillow_decodes_it(sampling):
    data = bytearray(encoded(textured(64, 64), "JPEG", subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = sampling
    np.testing.assert_array_equal(decode(bytes(data)).rgb, by_pillow(data))


def test_a_jpeg_cut_anywhere_is_undecodable():
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = encoded(textured(90, 70), "JPEG", **options)
        for kept in range(14, len(data) - 1, 97):
            with pytest.raises(UndecodableImage, match="image 3: the JPEG"):
                decode(data[:kept])


# --- scaled decoding -----------------------------------------------------------------------------


def decode_scaled(data, least):
    return decode_image(data, index=3, max_pixels=LIMIT, enough=lambda _width, _height: least)


@pytest.mark.parametrize(
    ("least", "stored"),
    [((1, 1), (38, 51)), ((38, 51), (38, 51)), ((38, 52), (75, 101)), ((70, 101), (75, 101)), ((76, 1), (150, 202)),
     ((151, 1), (300, 403)), ((1000, 1000), (300, 403))],
)  # fmt: skip
def test_a_scaled_jpeg_is_the_smallest_that_is_enough(least, stored):
    decoded = decode_scaled(encoded(picture(403, 300), "JPEG"), least)
    assert decoded.rgb.shape == (*stored, 3)
    assert (decoded.width, decoded.height) == (403, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_is_turned_and_asked_of_its_upright_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(400, 240), "JPEG", exif=exif)
    asked = []

    def enough(width, height):
        asked.append((width, height))
        return (height // 2, width // 2)

    decoded = decode_image(data, index=3, max_pixels=LIMIT, enough=enough)
    upright = (240, 400) if orientation > 4 else (400, 240)
    assert asked == [upright]
    assert (decoded.width, decoded.height) == upright
    assert decoded.rgb.shape == (upright[1] // 2, upright[0] // 2, 3)
    whole = Image.fromarray(by_pillow(data)).resize((upright[0] // 2, upright[1] // 2), Image.Resampling.BOX)
    assert np.abs(decoded.rgb.astype(int) - np.asarray(whole)).mean() < 1


@pytest.mark.parametrize(
    ("mode", "format"), [("RGB", "PNG"), ("RGB", "WEBP"), ("CMYK", "JPEG"), ("RGB", "TIFF")]
)
def test_what_cannot_be_scaled_is_decoded_whole(mode, format):
    data = encoded(picture(400, 240, mode), format)
    np.testing.assert_array_equal(decode_scaled(data, (10, 10)).rgb, by_pillow(data))


def test_a_scaled_jpeg_that_is_cut_or_too_large_is_refused_as_any():
    data = encoded(textured(400, 240), "JPEG")
    with pytest.raises(UndecodableImage, match="truncated or corrupt"):
        decode_scaled(data[: len(data) // 2], (10, 10))
    with pytest.raises(TooLarge, match="40000x40000 exceeds 40 megapixels"):
        decode_scaled(jpeg_of(40000, 40000), (10, 10))


def test_alpha_is_dropped_not_blended():
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    assert (decode(encoded(image, "PNG")).rgb == (10, 200, 30)).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_eight(format):
    grey = (np.arange(37 * 23, dtype=np.uint16) * 76).reshape(23, 37)
    rgb = decode(encoded(Image.fromarray(grey), format)).rgb
    np.testing.assert_array_equal(rgb, np.repeat((grey >> 8)[..., None], 3, 2))


def test_the_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if name == "WEBP" else {}
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
        assert (decode(data).rgb == (255, 0, 0)).all(), name


def test_a_jpeg_with_a_second_picture_is_a_jpeg():
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(9, 9)])
    assert decode(data).format == "JPEG"
    np.testing.assert_array_equal(decode(data).rgb, by_pillow(data))


def test_a_jpeg_is_decoded_as_with_its_metadata():
    exif = Image.Exif()
    exif[0x010F] = "maker" * 100
    options = {"exif": exif, "icc_profile": b"x" * 100_000, "comment": b"hello", "quality": 90}
    data = encoded(picture(), "JPEG", **options)
    np.testing.assert_array_equal(decode(data).rgb, by_pillow(data))


# --- orientation ---------------------------------------------------------------------------------


def with_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    return encoded(picture(), format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format, orientation):
    data = with_orientation(format, orientation)
    decoded = decode(data)
    np.testing.assert_array_equal(decoded.rgb, by_pillow(data))
    assert (decoded.width, decoded.height) == ((23, 37) if orientation > 4 else (37, 23))


def test_orientation_of_sixteen_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.arange(12, dtype=np.uint16).reshape(3, 4) << 8
    rgb = decode(encoded(Image.fromarray(grey), "PNG", exif=exif)).rgb
    np.testing.assert_array_equal(rgb[..., 0], np.rot90(grey >> 8, -1))


def exif_block(entries, order="<", count=None):
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries)
    return head + struct.pack(order + "IH", 8, len(entries) if count is None else count) + body


BROKEN_EXIF = {
    "empty": b"",
    "no header": b"garbage",
    "short": b"II*\0\x08",
    "far offset": b"II*\0\xff\xff\xff\xff",
    "offset into itself": b"II*\0\0\0\0\0",
    "promises entries": exif_block([], count=65535),
    "orientation 0": exif_block([(0x0112, 3, 1, b"\0\0\0\0")]),
    "orientation 9": exif_block([(0x0112, 3, 1, b"\x09\0\0\0")]),
    "orientation a text": exif_block([(0x0112, 2, 4, b"abc\0")]),
    "orientation a list": exif_block([(0x0112, 3, 2, b"\x06\0\x06\0")]),
    "orientation a ratio": exif_block([(0x0112, 5, 1, b"\xff\xff\xff\xff")]),
    "unknown type": exif_block([(0x0112, 99, 1, b"\x06\0\0\0")]),
    "huge tag": exif_block([(0x010F, 2, 2**32 - 1, b"\x08\0\0\0")] * 100),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
def test_broken_exif_means_upright(format, block):
    exif = block if format == "WEBP" else b"Exif\0\0" + block
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encoded(picture(), format, exif=exif, **options))
    assert (decoded.width, decoded.height) == (37, 23)


def test_both_byte_orders_of_exif_are_read():
    for block in (
        exif_block([(0x0112, 3, 1, b"\x06\0\0\0")]),
        exif_block([(0x0112, 3, 1, b"\0\x06\0\0")], ">"),
        exif_block([(0x0112, 4, 1, b"\0\0\0\x06")], ">"),
    ):
        decoded = decode(encoded(picture(), "JPEG", exif=b"Exif\0\0" + block))
        assert (decoded.width, decoded.height) == (23, 37)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"\0\0\0\x1cftypavif" + b"\0" * 100,
        b"\0\0\x01\0\x01\0" + b"\0" * 100,
        b"RIFF\0\0\0\0WAVE" + b"\0" * 100,
        b"\x93NUMPY\x01\0" + b"\0" * 100,
        b"P6 1 1 255 aaa",
        b"\0" * 100,
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
)
def test_other_formats_are_not_served(data):
    with pytest.raises(UnsupportedMedia, match="image 3: is not one of JPEG, PNG, WEBP, GIF, BMP, TIFF"):
        decode(data)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_pixels_are_not_served(mode):
    with pytest.raises(UnsupportedMedia, match="8 and 16 bits"):
        decode(encoded(picture(mode="L").convert(mode), "TIFF"))


def test_lab_is_not_served():
    with pytest.raises(UnsupportedMedia, match="LAB"):
        decode(encoded(Image.new("LAB", (4, 4)), "TIFF"))


def test_an_empty_body_is_undecodable():
    with pytest.raises(UndecodableImage, match="image 3: is empty"):
        decode(b"")


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_undecodable(format):
    data = encoded(picture(301, 203), format)
    for kept in (10, 14, 20, 30, len(data) // 4, len(data) // 2):
        with pytest.raises((UndecodableImage, UnsupportedMedia), match="image 3: ") as caught:
            decode(data[:kept])
        assert isinstance(caught.value, UndecodableImage) or kept < 14


def test_pillow_is_never_told_to_accept_truncated_images():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def png(width, height, *chunks, bits=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(width, height, compression=0, bits=24):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54 + (1024 if bits == 8 else 0)) + header


def gif(width, height, frame=(1, 1)):
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"!\xf9\x04" + bytes([0b00001000, 0, 0, 0]) + b"\0"
    return screen + control + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\0;"


def webp(kind, payload):
    chunk = kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def tiff(entries, tail=b""):
    return exif_block(entries) + b"\0\0\0\0" + tail


def sized_tiff(width, height, *more):
    number = lambda value: struct.pack("<I", value)  # noqa: E731
    entries = [
        (256, 4, 1, number(width)),
        (257, 4, 1, number(height)),
        (258, 3, 1, number(8)),
        (259, 3, 1, number(1)),
        (262, 3, 1, number(1)),
        (273, 4, 1, number(8)),
        (278, 4, 1, number(height)),
    ]
    return tiff([*entries, *more], b"\0" * 64)


def jpeg_of(width, height):
    data = bytearray(encoded(picture(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


HUGE = {
    "jpeg": jpeg_of(40000, 40000),
    "png": png(20000, 20000, (b"IDAT", b"")),
    "png 2**31": png(2**31 - 1, 2**31 - 1, (b"IDAT", b"")),
    "bmp": bmp(20000, 20000),
    "bmp upside down": bmp(20000, -20000),
    "gif screen": gif(65535, 65535),
    "gif frame": gif(1, 1, (65535, 65535)),
    "gif frame below Pillow's own limit": gif(1, 1, (10000, 10000)),
    "webp VP8": webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + b"\0" * 50),
    "webp VP8L": webp(b"VP8L", b"\x2f" + struct.pack("<I", 16383 | 16383 << 14) + b"\0" * 50),
    "webp VP8X": webp(b"VP8X", b"\0" * 4 + b"\xff" * 6),
    "tiff": sized_tiff(20000, 20000),
    "tiff 2**32": sized_tiff(2**32 - 1, 2**32 - 1),
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE.keys())
def test_huge_headers_are_refused_before_memory_is_taken(data):
    started = time.monotonic()
    with pytest.raises(TooLarge, match=r"image 3: .*exceeds 40 megapixels"):
        decode(data)
    assert time.monotonic() - started < 2


def test_the_refusal_says_what_which_and_the_limit():
    with pytest.raises(TooLarge) as caught:
        decode(png(12000, 9000, (b"IDAT", b"")))
    assert caught.value.detail == "image 3: 12000x9000 exceeds 40 megapixels"


def test_pillows_own_limit_does_not_matter_above_or_below_ours():
    with pytest.raises(TooLarge, match=r"37x23 exceeds 0\.00085 megapixels"):
        decode(encoded(picture(), "PNG"), max_pixels=850)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UndecodableImage):  # not enough data; but not too large
            decode(png(20000, 6000, (b"IDAT", b"")), max_pixels=10**9)


def test_a_side_is_bounded_too():
    with pytest.raises(TooLarge, match="65500 pixels on a side"):
        decode(png(MAX_SIDE + 1, 1, (b"IDAT", b"")))


@pytest.mark.parametrize("data", [png(0, 5, (b"IDAT", b"")), bmp(0, 5), gif(0, 0, (0, 0)), sized_tiff(0, 0)])
def test_images_without_pixels_are_undecodable(data):
    with pytest.raises(UndecodableImage, match="image 3: "):
        decode(data)


# --- traps: small files that cost much -------------------------------------------------------------


def quickly(data, expected=UndecodableImage, limit_s=5.0):
    started = time.monotonic()
    with pytest.raises(expected, match="image 3: ") as caught:
        decode(data)
    assert time.monotonic() - started < limit_s
    return caught.value


def test_png_text_bombs_are_refused():
    bomb = b"key\0\0" + zlib.compress(b"x" * 50_000_000)
    quickly(png(4, 4, (b"zTXt", bomb), (b"IDAT", zlib.compress(b"\0" * 52))))


def test_png_profile_bombs_are_refused():
    bomb = b"name\0\0" + zlib.compress(b"x" * 50_000_000)
    quickly(png(4, 4, (b"iCCP", bomb), (b"IDAT", zlib.compress(b"\0" * 52))))


def test_many_small_text_chunks_are_refused():
    bomb = (b"zTXt", b"key\0\0" + zlib.compress(b"x" * 1_000_000))
    quickly(png(4, 4, *[bomb] * 100, (b"IDAT", zlib.compress(b"\0" * 52))))


def test_a_jpeg_of_many_scans_is_refused():
    data = encoded(picture(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * (MAX_JPEG_SCANS + 1) + b"\xff\xd9"
    assert "more than 100 scans" in quickly(bomb).detail


def test_a_sequential_jpeg_of_many_scans_is_refused():
    """One component a scan, and the last of them a thousand times."""
    data = encoded(picture(64, 64), "JPEG", progressive=True)
    frame = data.index(b"\xff\xc2")
    spread = data[:frame] + b"\xff\xc0" + data[frame + 2 :]
    last = spread.rindex(b"\xff\xda")
    quickly(spread[:last] + spread[last:-2] * 1000 + b"\xff\xd9")


def test_scans_after_one_that_has_everything_are_refused():
    data = encoded(picture(2000, 2000), "JPEG")
    scan = data[data.index(b"\xff\xda") : -2]
    quickly(data[:-2] + scan * 200 + b"\xff\xd9", limit_s=2)


def test_metadata_of_a_jpeg_is_not_collected():
    data = encoded(picture(), "JPEG")
    block = b"\xff\xe1\x00\x0aExif\0\0II"
    started = time.monotonic()
    assert decode(data[:2] + block * 5_000 + data[2:]).width == 37
    assert time.monotonic() - started < 1
    assert "segments" in quickly(data[:2] + block * 500_000 + data[2:]).detail


def test_markers_inside_a_thumbnail_do_not_count():
    thumbnail = encoded(picture(8, 8), "JPEG", progressive=True)
    exif = b"Exif\0\0" + exif_block([(0x0112, 3, 1, b"\x06\0\0\0")]) + thumbnail * 40
    decoded = decode(encoded(picture(), "JPEG", exif=exif))
    assert (decoded.width, decoded.height) == (23, 37)


def test_junk_after_the_end_of_a_jpeg_does_not_count():
    data = encoded(picture(), "JPEG")
    assert decode(data + b"\xff\xda\0\x02" * 100_000).width == 37


def test_a_tiff_with_a_list_of_strips_without_end_is_refused():
    strips = MAX_TIFF_VALUES + 1
    data = tiff([(256, 4, 1, b"\x04\0\0\0"), (273, 4, strips, b"\x08\0\0\0")], b"\0" * (4 * strips))
    assert "values" in quickly(data).detail


def test_a_tiff_of_huge_tiles_is_refused():
    huge = struct.pack("<I", 65536)
    assert "tiles" in quickly(sized_tiff(4, 4, (322, 4, 1, huge), (323, 4, 1, huge))).detail


def test_a_tiff_of_huge_strips_is_refused():
    data = bytearray(encoded(picture(), "TIFF", compression="tiff_lzw"))
    at = data.index(struct.pack("<HHI", 278, 3, 1))  # RowsPerStrip
    data[at : at + 12] = struct.pack("<HHII", 278, 4, 1, 2**32 - 1)
    started = time.monotonic()
    assert decode(bytes(data)).width == 37
    assert time.monotonic() - started < 1


def test_a_tiff_that_points_everywhere_is_quick():
    blob = 1_000_000
    entries = [(300 + step, 7, blob, b"\x08\0\0\0") for step in range(5000)]
    quickly(tiff(entries, b"\0" * blob))


@pytest.mark.parametrize("compression", [1, 2])
def test_run_length_coded_bmp_is_not_served(compression):
    quickly(bmp(6000, 6000, compression, bits={1: 8, 2: 4}[compression]) + b"\0" * 2000, UnsupportedMedia)


# --- fuzz ----------------------------------------------------------------------------------------


def mutations(data, count, seed):
    """Truncations, and flips of one to eight bytes, most of them where the headers are."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        if step % 4 == 0:
            yield data[: rng.integers(1, len(data))]
            continue
        mutated, reach = bytearray(data), len(data) if step % 2 else min(len(data), 200)
        for position in rng.integers(0, reach, rng.integers(1, 9)):
            mutated[position] = rng.integers(0, 256)
        yield bytes(mutated)


def text_png():
    info = PngImagePlugin.PngInfo()
    info.add_text("key", "value" * 10, zip=True)
    info.add_itxt("other", "text", "en", "key")
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(mode="P"), "PNG", pnginfo=info, exif=exif, dpi=(72, 72), icc_profile=b"x" * 50)


def rich_jpeg(**options):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    return encoded(picture(), "JPEG", exif=exif, **options)


SEEDS = {
    "JPEG": encoded(picture(), "JPEG"),
    "JPEG with Exif": rich_jpeg(),
    "progressive JPEG": rich_jpeg(progressive=True),
    "CMYK JPEG": encoded(picture(mode="CMYK"), "JPEG"),
    "PNG": encoded(picture(), "PNG"),
    "PNG with texts": text_png(),
    "animated PNG": encoded(
        picture(), "PNG", save_all=True, append_images=[picture(mode="L").convert("RGB")]
    ),
    "WEBP": encoded(picture(), "WEBP"),
    "lossless WEBP": encoded(picture(mode="RGBA"), "WEBP", lossless=True),
    "animated WEBP": encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(180)]),
    "GIF": encoded(picture(), "GIF"),
    "animated GIF": encoded(
        picture(), "GIF", save_all=True, append_images=[picture().rotate(180)], comment=b"hi"
    ),
    "BMP": encoded(picture(), "BMP"),
    "palette BMP": encoded(picture(mode="P"), "BMP"),
    "TIFF": encoded(picture(), "TIFF"),
    "LZW TIFF": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "JPEG in TIFF": encoded(picture(), "TIFF", compression="jpeg"),
    "fax TIFF": encoded(picture(mode="1"), "TIFF", compression="group4"),
}


def outcome_of(data):
    try:
        return decode(data, max_pixels=1_000_000)
    except ServiceError as error:
        return error


@pytest.mark.parametrize("name", SEEDS)
def test_a_mutated_file_decodes_or_is_refused(name):
    for data in mutations(SEEDS[name], 200, seed=len(name)):
        outcome = outcome_of(data)
        if isinstance(outcome, ServiceError):
            assert outcome.detail.startswith("image 3: ")
            assert isinstance(outcome, (UndecodableImage, UnsupportedMedia, TooLarge))
        else:
            assert outcome.rgb.shape == (outcome.height, outcome.width, 3)


def test_pillows_warnings_are_not_passed_on(recwarn):
    data = encoded(picture(), "TIFF", compression="tiff_lzw")
    for mutated in mutations(data, 60, seed=5):
        outcome_of(mutated)
    assert not [warning for warning in recwarn if "PIL" in str(warning.filename)]


def test_threads_decode_side_by_side():
    files = [encoded(picture(30 + step, 20), name) for step, name in enumerate(FORMATS * 3)]
    sizes = {}

    def work(index):
        sizes[index] = decode_image(files[index], index=index, max_pixels=LIMIT).width

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == {index: 30 + index for index in range(len(files))}
