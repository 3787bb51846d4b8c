"""`POST /features` as a client sees it: three ways in, five formats out, one meaning."""

from __future__ import annotations

import base64
import io
import re
import urllib.parse
from typing import Any

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pytest
import safetensors.numpy

from tests.conftest import Serve, encoded, multipart, npy

RESNET18 = {"type": "ResNet", "depth": 18, "out_indices": [0, 1, 2, 3], "frozen_stages": 1}
TINY_VIT = {
    "type": "mmpretrain.VisionTransformer",
    "arch": "deit-tiny",
    "out_type": "raw",
    "out_indices": [11],
}
BINARY = ("application/x-npz", "application/vnd.safetensors", "application/vnd.apache.arrow.stream")


def post(http: httpx.Client, config: Any, accept: str = "application/json", **given: Any) -> httpx.Response:
    headers = httpx.Headers([("Accept", accept), *httpx.Headers(given.pop("headers", {})).multi_items()])
    return http.post("/features", headers=headers, **multipart(config, **given))


def arrays_of(reply: httpx.Response) -> dict[str, np.ndarray]:
    media_type = reply.headers["content-type"]
    if media_type == "application/json":
        return {level["name"]: np.asarray(level["data"], level["dtype"]) for level in reply.json()["levels"]}
    if media_type == "application/x-npz":
        with np.load(io.BytesIO(reply.content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name != "meta.json"}
    if media_type == "application/vnd.safetensors":
        return safetensors.numpy.load(reply.content)
    table = pa.ipc.open_stream(reply.content).read_all()
    return {name: table[name].combine_chunks().to_numpy_ndarray() for name in table.column_names}


def test_the_first_curl_of_the_readme(http: httpx.Client, photo: bytes) -> None:
    config = {"type": "ResNet", "depth": 50, "out_indices": [0, 1, 2, 3], "frozen_stages": 1}
    reply = post(http, config, image=photo)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    shapes = [level["shape"] for level in body["levels"]]
    assert shapes == [[1, 256, 56, 56], [1, 512, 28, 28], [1, 1024, 14, 14], [1, 2048, 7, 7]]
    assert [level["stride"] for level in body["levels"]] == [4, 8, 16, 32]
    assert [level["name"] for level in body["levels"]] == ["0", "1", "2", "3"]
    assert {level["layout"] for level in body["levels"]} == {"NCHW"}
    assert set(body["levels"][0]["stats"]) == {"min", "max", "mean", "std"}
    assert body["images"] == [
        {"width": 500, "height": 375, "format": "JPEG", "input": [224, 224], "valid": [224, 224]}
    ]
    assert body["model"]["weights"]["source"] == "random"
    assert body["model"]["frozen"] == {"stages": 1, "parameters": 33, "of": 159}
    assert set(body["timings_ms"]) == {"load", "decode", "queue", "forward", "encode"}
    assert reply.headers["x-model-id"] == body["model"]["id"]


def test_three_ways_in_give_the_same_levels(http: httpx.Client, photo: bytes) -> None:
    as_parts = post(http, RESNET18, image=photo).json()["levels"]
    body = {"backbone": RESNET18, "images": [{"base64": base64.b64encode(photo).decode()}]}
    as_json = http.post("/features", json=body).json()["levels"]
    query = urllib.parse.urlencode({"backbone": orjson.dumps(RESNET18).decode()})
    as_raw = http.post(f"/features?{query}", content=photo, headers={"Content-Type": "image/jpeg"}).json()[
        "levels"
    ]
    assert as_parts == as_json == as_raw


def test_a_tensor_comes_in_by_part_and_as_raw_body(http: httpx.Client) -> None:
    tensor = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    as_part = post(http, RESNET18, tensor=tensor)
    query = urllib.parse.urlencode({"backbone": orjson.dumps(RESNET18).decode()})
    raw = http.post(f"/features?{query}", content=npy(tensor), headers={"Content-Type": "application/x-npy"})
    assert as_part.json()["levels"] == raw.json()["levels"]
    assert as_part.json()["levels"][3]["shape"] == [2, 512, 2, 2]
    assert as_part.json()["images"][1] == {
        "width": 64,
        "height": 64,
        "format": "tensor",
        "input": [64, 64],
        "valid": [64, 64],
    }


@pytest.mark.parametrize("accept", BINARY)
def test_every_format_carries_the_same_arrays_and_description(
    http: httpx.Client, photo: bytes, accept: str
) -> None:
    expected = arrays_of(post(http, RESNET18, image=photo, **{"return": "tensors"}))
    found = arrays_of(post(http, RESNET18, accept, image=photo))
    assert sorted(found) == ["0", "1", "2", "3"]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_npy_carries_one_level(http: httpx.Client, photo: bytes) -> None:
    config = {**RESNET18, "out_indices": [3]}
    reply = post(http, config, "application/x-npy", image=photo, pool="avg")
    assert np.load(io.BytesIO(reply.content), allow_pickle=False).shape == (1, 512)
    assert post(http, RESNET18, "application/x-npy", image=photo).status_code == 406


def test_base64_tensors_in_json_are_the_same_numbers(http: httpx.Client, photo: bytes) -> None:
    config = {**RESNET18, "out_indices": [3]}
    as_list = post(http, config, image=photo, **{"return": "tensors"}).json()["levels"][0]
    as_text = post(http, config, image=photo, encoding="base64", **{"return": "tensors"}).json()["levels"][0]
    raw = np.frombuffer(base64.b64decode(as_text["data"]), "<f4").reshape(as_text["shape"])
    np.testing.assert_array_equal(raw, np.asarray(as_list["data"], np.float32))


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
def test_pooling_is_over_the_map(http: httpx.Client, photo: bytes, pool: str) -> None:
    full = arrays_of(post(http, RESNET18, BINARY[1], image=photo))["3"].astype(np.float64)
    level = post(
        http, {**RESNET18, "out_indices": [3]}, image=photo, pool=pool, **{"return": "tensors"}
    ).json()
    expected = {
        "avg": full.mean((2, 3)),
        "max": full.max((2, 3)),
        "gem": (np.maximum(full, 1e-6) ** 3).mean((2, 3)) ** (1 / 3),
    }[pool]
    assert level["levels"][0]["layout"] == "NC"
    assert level["levels"][0]["stride"] is None
    np.testing.assert_allclose(level["levels"][0]["data"], expected, rtol=1e-5, atol=1e-6)


def test_normalize_is_l2_over_channels_after_pooling(http: httpx.Client, photo: bytes) -> None:
    vector = arrays_of(post(http, RESNET18, BINARY[0], image=photo, pool="avg", normalize=True))["3"]
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, rtol=1e-5)
    maps = arrays_of(post(http, RESNET18, BINARY[0], image=photo, normalize=True))["3"]
    np.testing.assert_allclose(np.linalg.norm(maps, axis=1), 1, rtol=1e-5)


def test_the_class_token_is_a_pool_of_tokens_only(http: httpx.Client, photo: bytes) -> None:
    tokens = arrays_of(post(http, TINY_VIT, BINARY[0], image=photo))["11"]
    cls = arrays_of(post(http, TINY_VIT, BINARY[0], image=photo, pool="cls"))["11"]
    mean = arrays_of(post(http, TINY_VIT, BINARY[0], image=photo, pool="avg"))["11"]
    assert tokens.shape == (1, 197, 192)
    np.testing.assert_array_equal(cls, tokens[:, 0])
    np.testing.assert_allclose(mean, tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-6)
    refused = post(http, RESNET18, image=photo, pool="cls")
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "#/pool"


def test_float16_is_the_rounded_float32(http: httpx.Client, photo: bytes) -> None:
    single = arrays_of(post(http, RESNET18, BINARY[1], image=photo))
    half = arrays_of(post(http, RESNET18, BINARY[1], image=photo, dtype="float16"))
    for name, array in single.items():
        assert half[name].dtype == np.float16
        np.testing.assert_array_equal(half[name], array.astype(np.float16))


def test_bfloat16_computes_about_the_same(http: httpx.Client, photo: bytes) -> None:
    single = arrays_of(post(http, RESNET18, BINARY[1], image=photo))["3"]
    reply = post(http, RESNET18, BINARY[1], image=photo, precision="bfloat16")
    coarse = arrays_of(reply)["3"]
    error = np.linalg.norm(coarse - single) / np.linalg.norm(single)
    assert 1e-5 < error < 5e-2
    with safetensors.safe_open(_file(reply.content), "np") as opened:
        assert orjson.loads(opened.metadata()["reply"])["model"]["precision"] == "bfloat16"


def _file(content: bytes) -> str:
    import tempfile

    file = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115 - safe_open wants a name
    file.write(content)
    file.close()
    return file.name


def test_levels_come_in_the_order_asked(http: httpx.Client, photo: bytes) -> None:
    config = {"type": "timm.resnet18", "out_indices": [4, -4]}
    levels = post(http, config, image=photo).json()["levels"]
    assert [(level["index"], level["channels"]) for level in levels] == [(4, 512), (1, 64)]


def test_strides_ask_for_maps(http: httpx.Client, photo: bytes) -> None:
    for config in ({"type": "ResNet", "depth": 18}, {"type": "timm.resnet18"}):
        levels = post(http, {**config, "strides": [32, 8]}, image=photo).json()["levels"]
        assert [level["shape"] for level in levels] == [[1, 512, 7, 7], [1, 128, 28, 28]]


def test_a_map_with_its_class_token_is_two_levels(http: httpx.Client, photo: bytes) -> None:
    config = {"type": "mmcls.VisionTransformer", "arch": "deit-tiny", "out_indices": [5, 11]}
    levels = post(http, config, image=photo).json()["levels"]
    assert [(level["name"], level["layout"]) for level in levels] == [
        ("5", "NCHW"),
        ("5.cls", "NC"),
        ("11", "NCHW"),
        ("11.cls", "NC"),
    ]


def test_a_neck_follows_the_backbone(http: httpx.Client, photo: bytes) -> None:
    maps = arrays_of(post(http, RESNET18, BINARY[1], image=photo))
    pooled = arrays_of(post(http, RESNET18, BINARY[1], image=photo, neck={"type": "GlobalAveragePooling"}))
    for name, array in maps.items():
        np.testing.assert_allclose(pooled[name], array.mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_images_of_one_request_are_stacked(http: httpx.Client, photo: bytes) -> None:
    other = encoded(np.full((300, 200, 3), 77, np.uint8))
    request = multipart(RESNET18, image=photo)
    request["files"].append(("image", ("b.png", other, "image/png")))
    body = http.post("/features", **request).json()
    assert [level["shape"][0] for level in body["levels"]] == [2, 2, 2, 2]
    assert [image["format"] for image in body["images"]] == ["JPEG", "PNG"]


def test_an_image_gives_the_same_alone_and_among_others(http: httpx.Client, photo: bytes) -> None:
    other = encoded(np.full((300, 200, 3), 77, np.uint8))
    alone = arrays_of(post(http, RESNET18, BINARY[1], image=photo))
    request = multipart(RESNET18, image=other)
    request["files"].append(("image", ("b.jpg", photo, "image/jpeg")))
    among = arrays_of(http.post("/features", headers={"Accept": BINARY[1]}, **request))
    for name, array in alone.items():
        error = np.linalg.norm(among[name][1] - array[0]) / np.linalg.norm(array)
        assert error < 1e-5


def test_native_pads_right_and_bottom_and_pools_only_what_is_image(http: httpx.Client, photo: bytes) -> None:
    preprocess = {"mode": "native", "size_divisor": 32}
    body = post(http, RESNET18, image=photo, preprocess=preprocess).json()
    assert body["images"][0]["input"] == [384, 512]
    assert body["images"][0]["valid"] == [375, 500]
    assert body["levels"][3]["shape"] == [1, 512, 12, 16]
    small = encoded(np.full((96, 64, 3), 77, np.uint8))
    request = multipart({**RESNET18, "out_indices": [0]}, image=small, preprocess=preprocess, pool="max")
    alone = arrays_of(http.post("/features", headers={"Accept": BINARY[1]}, **request))["0"]
    assert alone.shape == (1, 64)


def test_an_etag_changes_with_what_changes_the_answer(http: httpx.Client, photo: bytes) -> None:
    first = post(http, RESNET18, image=photo)
    etag = first.headers["etag"]
    assert post(http, RESNET18, image=photo).headers["etag"] == etag
    again = post(http, RESNET18, image=photo, headers={"If-None-Match": etag})
    assert again.status_code == 304
    assert again.content == b""
    assert again.headers["etag"] == etag
    for matching in ('"x", ' + etag, '"x"\t,' + etag.removeprefix("W/"), "*"):
        twice = [("If-None-Match", '"y"'), ("If-None-Match", matching)]
        assert post(http, RESNET18, image=photo, headers=twice).status_code == 304
    for other_tag in ('"*"', 'W/"*"', '""', etag[:-2] + '"'):
        assert post(http, RESNET18, image=photo, headers={"If-None-Match": other_tag}).status_code == 200
    others = [
        post(http, {**RESNET18, "depth": 34}, image=photo),
        post(http, RESNET18, image=photo + b"\0"),
        post(http, RESNET18, image=photo, preprocess="resize"),
        post(http, RESNET18, image=photo, pool="avg"),
        post(http, RESNET18, BINARY[0], image=photo),
    ]
    assert len({etag, *(other.headers["etag"] for other in others)}) == 6


def test_every_reply_says_who_answered_and_how_long_it_took(http: httpx.Client, photo: bytes) -> None:
    reply = post(http, RESNET18, image=photo, headers={"X-Request-ID": "my-id.1"})
    assert reply.headers["x-request-id"] == "my-id.1"
    assert {part.split(";")[0] for part in reply.headers["server-timing"].split(", ")} == {
        "load",
        "decode",
        "queue",
        "forward",
        "encode",
    }
    forged = http.get("/version", headers={"X-Request-ID": "no spaces here"})
    assert forged.headers["x-request-id"] != "no spaces here"


def test_variants_share_one_model(http: httpx.Client, photo: bytes) -> None:
    ids = {
        post(http, {"type": scope, "depth": 18, **view}, image=photo).headers["x-model-id"]
        for scope in ("ResNet", "mmpretrain.ResNet", "mmcls.ResNet")
        for view in ({}, {"out_indices": [0]}, {"frozen_stages": 2}, {"norm_eval": True}, {"strides": [8]})
    }
    assert len(ids) == 1


def test_bgr_and_scaled_means_are_the_same_tensor(http: httpx.Client, photo: bytes) -> None:
    ours = {
        "mode": "native",
        "mean": [0.406, 0.456, 0.485],
        "std": [0.225, 0.224, 0.229],
        "channel_order": "bgr",
    }
    scaled = {**ours, "mean": [103.53, 116.28, 123.675], "std": [57.375, 57.12, 58.395]}
    theirs = {
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [57.375, 57.12, 58.395],
        "input_format": "BGR",
    }
    config = {**RESNET18, "out_indices": [0]}
    found = [
        arrays_of(post(http, config, BINARY[1], image=photo, preprocess=spec))["0"]
        for spec in (ours, scaled, theirs)
    ]
    for other in found[1:]:
        assert np.linalg.norm(other - found[0]) / np.linalg.norm(found[0]) < 1e-5


def test_every_stage_of_a_request_is_in_the_metrics(serve: Serve, photo: bytes) -> None:
    service = serve()
    assert post(service.http, RESNET18, image=photo).status_code == 200
    counted = re.findall(
        r'backbone_stage_seconds_count\{stage="(\w+)"\} 1\.0', service.http.get("/metrics").text
    )
    assert sorted(counted) == ["decode", "encode", "forward", "load", "queue"]
