"""Images over HTTP: every format that is served, every way a file can be broken, and whose fault it is."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from PIL import Image

from tests.api.problems import assert_problem
from tests.conftest import multipart

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "out_indices": [3]}
WIDTH, HEIGHT = 96, 64


def picture(mode: str = "RGB") -> Image.Image:
    """A picture of WIDTH x HEIGHT that is no flat colour."""
    small = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)


def file_of(image: Image.Image, form: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, of what Pillow does not write and of what nobody should."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def png_rgb16() -> bytes:
    wide = (np.asarray(picture()).astype(np.uint16) << 8).astype(">u2")
    return png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in wide))


def grey16() -> Image.Image:
    return Image.fromarray(np.asarray(picture("L")).astype(np.uint16) << 8)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return file_of(picture(), "JPEG", exif=exif, quality=95)


def post(http: httpx.Client, *images: bytes, content_type: str = "image/jpeg") -> httpx.Response:
    request = multipart(THIN)
    request["files"] = [("image", ("file", data, content_type)) for data in images]
    return http.post("/features", **request)


def post_raw(http: httpx.Client, data: bytes, content_type: str) -> httpx.Response:
    query = {"backbone": orjson.dumps(THIN).decode()}
    return http.post("/features", content=data, params=query, headers={"Content-Type": content_type})


SERVED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a JPEG": ("JPEG", lambda: file_of(picture(), "JPEG")),
    "a progressive JPEG": ("JPEG", lambda: file_of(picture(), "JPEG", progressive=True)),
    "a grey JPEG": ("JPEG", lambda: file_of(picture("L"), "JPEG")),
    "a CMYK JPEG": ("JPEG", lambda: file_of(picture("CMYK"), "JPEG")),
    "a PNG of 1 bit": ("PNG", lambda: file_of(picture("1"), "PNG")),
    "a PNG of 8 bits": ("PNG", lambda: file_of(picture(), "PNG")),
    "a grey PNG": ("PNG", lambda: file_of(picture("L"), "PNG")),
    "a grey PNG of 16 bits": ("PNG", lambda: file_of(grey16(), "PNG")),
    "a PNG of 16 bits": ("PNG", png_rgb16),
    "a PNG with a palette": ("PNG", lambda: file_of(picture("P"), "PNG")),
    "a PNG with a palette of 4 colours": ("PNG", lambda: file_of(picture().quantize(4), "PNG", bits=2)),
    "a PNG with alpha": ("PNG", lambda: file_of(picture("RGBA"), "PNG")),
    "a grey PNG with alpha": ("PNG", lambda: file_of(picture("LA"), "PNG")),
    "a PNG with a transparent colour": ("PNG", lambda: file_of(picture("P"), "PNG", transparency=0)),
    "a WebP": ("WEBP", lambda: file_of(picture(), "WEBP")),
    "a lossless WebP with alpha": ("WEBP", lambda: file_of(picture("RGBA"), "WEBP", lossless=True)),
    "a GIF": ("GIF", lambda: file_of(picture("P"), "GIF")),
    "an animated GIF": (
        "GIF",
        lambda: file_of(picture("P"), "GIF", save_all=True, append_images=[picture("L").rotate(180)]),
    ),
    "a BMP": ("BMP", lambda: file_of(picture(), "BMP")),
    "a BMP with a palette": ("BMP", lambda: file_of(picture("P"), "BMP")),
    "a TIFF": ("TIFF", lambda: file_of(picture(), "TIFF")),
    "a compressed TIFF": ("TIFF", lambda: file_of(picture(), "TIFF", compression="tiff_lzw")),
    "a CMYK TIFF": ("TIFF", lambda: file_of(picture("CMYK"), "TIFF")),
    "a grey TIFF of 16 bits": ("TIFF", lambda: file_of(grey16(), "TIFF")),
}


@pytest.mark.parametrize("name", SERVED)
def test_every_kind_of_file_is_served(http: httpx.Client, name: str) -> None:
    form, make = SERVED[name]
    reply = post(http, make())
    assert reply.status_code == 200, reply.text
    [image] = reply.json()["images"]
    assert (image["format"], image["width"], image["height"]) == (form, WIDTH, HEIGHT)
    assert reply.json()["levels"][0]["stats"]["std"] > 0


def test_lossless_files_of_one_picture_give_one_answer(http: httpx.Client) -> None:
    lossless = (
        "a PNG of 8 bits",
        "a PNG of 16 bits",
        "a lossless WebP with alpha",
        "a BMP",
        "a TIFF",
        "a compressed TIFF",
    )
    levels = [post(http, SERVED[name][1]()).json()["levels"] for name in lossless]
    assert all(level == levels[0] for level in levels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image(http: httpx.Client, orientation: int) -> None:
    [image] = post(http, turned(orientation)).json()["images"]
    upright = (WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH)
    assert (image["width"], image["height"]) == upright


def test_an_image_turned_by_exif_is_the_image_turned_by_hand(http: httpx.Client) -> None:
    exif = Image.Exif()
    exif[274] = 6
    by_exif = post(http, file_of(picture(), "PNG", exif=exif)).json()["levels"]
    by_hand = post(http, file_of(picture().transpose(Image.Transpose.ROTATE_270), "PNG")).json()["levels"]
    assert by_exif == by_hand
    assert by_exif != post(http, file_of(picture(), "PNG")).json()["levels"]


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "image/webp", "image/x-unheard-of", "application/octet-stream"]
)
def test_the_bytes_say_the_format_whatever_the_content_type(http: httpx.Client, content_type: str) -> None:
    data = file_of(picture(), "PNG")
    for reply in (post(http, data, content_type=content_type), post_raw(http, data, content_type)):
        assert reply.status_code == 200, reply.text
        assert reply.json()["images"][0]["format"] == "PNG"


# --- files that are refused ---------------------------------------------------------------------

PDF = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
BOMB = png(20_000, 20_000, 8, 2, b"\0" * 100_000)
REFUSED = {
    "nothing": (b"", 400, "undecodable-image", "image 0: is empty"),
    "text": (b"hello, this is no image at all", 415, "unsupported-media", "image 0: is not one of JPEG"),
    "an SVG": (SVG, 415, "unsupported-media", "image 0: is not one of JPEG"),
    "a PDF": (PDF, 415, "unsupported-media", "image 0: is not one of JPEG"),
    "HTML": (b"<!doctype html><script>alert(1)</script>", 415, "unsupported-media", "image 0: is not one of"),
    "an ICO": (file_of(picture(), "ICO"), 415, "unsupported-media", "image 0: is not one of"),
    "a PPM": (file_of(picture(), "PPM"), 415, "unsupported-media", "image 0: is not one of"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "unsupported-media", "image 0"),
    "floats": (file_of(picture("F"), "TIFF"), 415, "unsupported-media", "image 0: floating-point pixels"),
    "a PNG of no width": (png(0, 9, 8, 2, b""), 400, "undecodable-image", "image 0"),
    "a PNG of no height": (png(9, 0, 8, 2, b""), 400, "undecodable-image", "image 0"),
    "a bomb": (BOMB, 413, "too-large", "image 0: 20000x20000 exceeds 40 megapixels"),
    "a long thin one": (
        png(70_000, 1, 8, 0, b""),
        413,
        "too-large",
        "image 0: 70000x1 exceeds 65500 pixels on a side",
    ),
    "the largest PNG": (png(2**31 - 1, 2**31 - 1, 1, 0, b""), 413, "too-large", "image 0"),
    "a magic and nothing else": (
        b"\x89PNG\r\n\x1a\n",
        400,
        "undecodable-image",
        "image 0: the PNG is truncated",
    ),
    "a JPEG without a scan": (b"\xff\xd8\xff\xe0" + bytes(60), 400, "undecodable-image", "image 0: the JPEG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused_with_its_index(http: httpx.Client, name: str) -> None:
    data, status, kind, text = REFUSED[name]
    for reply in (post(http, data), post_raw(http, data, "image/png")):
        assert assert_problem(reply, status, kind)["detail"].startswith(text)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_400_whatever_the_format(http: httpx.Client, form: str, part: float) -> None:
    data = file_of(picture(), form)
    body = assert_problem(post(http, data[: int(len(data) * part)]), 400, "undecodable-image")
    assert body["detail"].startswith(f"image 0: the {form} ")


def test_an_image_of_one_pixel_is_an_image(http: httpx.Client) -> None:
    reply = post(http, png(1, 1, 8, 2, b"\0\x10\x20\x30"))
    assert reply.status_code == 200
    assert reply.json()["levels"][0]["shape"] == [1, 64, 7, 7]


def test_images_that_together_are_too_large_are_413(http: httpx.Client) -> None:
    wide, high = png(30_000, 1, 8, 0, b"\0" + bytes(30_000)), png(1, 30_000, 8, 0, bytes(60_000))
    request = multipart(THIN, preprocess="native")
    request["files"] = [("image", ("a", wide)), ("image", ("b", high))]
    body = assert_problem(http.post("/features", **request), 413, "too-large")
    assert "30000x30000" in body["detail"]
    assert "40 megapixels" in body["detail"]


def test_the_first_bad_image_is_named_by_its_place(http: httpx.Client) -> None:
    good = file_of(picture(), "PNG")
    body = assert_problem(post(http, good, good, good[:-40], good), 400, "undecodable-image")
    assert body["detail"].startswith("image 2: ")


def test_a_bad_image_fails_its_own_request_and_no_neighbour(http: httpx.Client, service: Any) -> None:
    good = file_of(picture(), "PNG")
    alone = np.asarray(list(post(http, good).json()["levels"][0]["stats"].values()))
    together = Barrier(8)

    def ask(position: int) -> httpx.Response:
        with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
            together.wait(30)
            images = (good, good[: len(good) // 2], good) if position % 2 else (good,)
            return post(client, *images)

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(ask, range(8)))
    for bad in replies[1::2]:
        assert assert_problem(bad, 400, "undecodable-image")["detail"].startswith("image 1: ")
    for reply in replies[::2]:
        assert reply.status_code == 200, reply.text
        found = np.asarray(list(reply.json()["levels"][0]["stats"].values()))
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-6)


# --- scaled decoding -----------------------------------------------------------------------------


def large_photo() -> bytes:
    return file_of(picture().resize((960, 640), Image.Resampling.BICUBIC), "JPEG")


def ask_fast(http: httpx.Client, **preprocess: Any) -> httpx.Response:
    return http.post("/features", **multipart(THIN, image=large_photo(), preprocess=preprocess))


def test_fast_decoding_is_asked_for_reported_and_another_answer(http: httpx.Client) -> None:
    plain, fast = ask_fast(http, size=64), ask_fast(http, size=64, fast_decode=True)
    assert plain.json()["preprocess"]["fast_decode"] is False
    assert fast.json()["preprocess"]["fast_decode"] is True
    assert fast.json()["images"] == plain.json()["images"]
    assert fast.headers["etag"] != plain.headers["etag"]
    assert fast.json()["levels"] != plain.json()["levels"]


def test_fast_decoding_of_images_that_keep_their_size_is_refused(http: httpx.Client) -> None:
    reply = ask_fast(http, mode="native", fast_decode=True)
    problem = assert_problem(reply, 422)
    assert [fault["pointer"] for fault in problem["errors"]] == ["#/preprocess/fast_decode"]
    assert "fast_decode" not in ask_fast(http, mode="native", fast_decode=False).json()["preprocess"]
