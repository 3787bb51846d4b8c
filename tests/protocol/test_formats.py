"""Every format round trip, and read by the library that the format belongs to."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidConfig, MalformedBody, NotAcceptable, UnsupportedMedia
from service.protocol.decode import decode
from service.protocol.encode import (
    ENCODERS,
    EncodedReply,
    ReplyOptions,
    check_levels,
    encode,
    reply_bytes,
)
from service.protocol.negotiate import ARROW, JSON, MEDIA_TYPES, NPY, NPZ, SAFETENSORS
from service.protocol.reply import (
    FeatureReply,
    FrozenInfo,
    ImageInfo,
    LevelArray,
    ModelInfo,
    Timings,
    WeightsInfo,
    level_stats,
)

TENSORS = ReplyOptions(returns="tensors")
BASE64 = ReplyOptions(returns="tensors", encoding="base64")
BINARY = [NPZ, SAFETENSORS, ARROW]
MODEL = ModelInfo(
    id="0f3a",
    type="ResNet",
    device="cpu",
    engine="torch",
    precision="float32",
    weights=WeightsInfo(
        "torchvision", "torchvision://resnet50", "ab" * 32, 318, (), ("fc.weight", "fc.bias")
    ),
    frozen=FrozenInfo(stages=1, parameters=33, of=161),
)


def numbers(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Any:
    """Normally distributed numbers of float32 or float16."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def a_reply(dtype: str = "float32", images: int = 2) -> FeatureReply:
    """A map, tokens and a vector; the map's count of elements is odd for one image."""
    return FeatureReply(
        model=MODEL,
        images=tuple(ImageInfo(640, 480, "JPEG", (224, 224), (224, 168)) for _ in range(images)),
        levels=(
            LevelArray(3, "3", "NCHW", 16, 5, numbers((images, 5, 3, 7), dtype, seed=3)),
            LevelArray(4, "4", "NLC", None, 9, numbers((images, 11, 9), dtype, seed=4)),
            LevelArray(4, "4.cls", "NC", None, 9, numbers((images, 9), dtype, seed=5)),
        ),
        timings=Timings(load=0.0, decode=1.25, queue=0.5, forward=12.3456789),
        preprocess={"mode": "crop", "size": [224, 224]},
    )


def one_level(dtype: str = "float32") -> FeatureReply:
    """A reply of one map."""
    return FeatureReply(MODEL, (), (LevelArray(3, "3", "NCHW", 16, 5, numbers((1, 5, 3, 3), dtype)),))


def written(media_type: str, reply: FeatureReply, options: ReplyOptions = TENSORS) -> EncodedReply:
    encoded = encode(media_type, reply, options)
    assert encoded.size == len(encoded.body)
    return encoded


def assert_same_levels(body: bytes, media_type: str, reply: FeatureReply) -> None:
    features = decode(media_type, body)
    assert list(features.levels) == [level.name for level in reply.levels]
    for level in reply.levels:
        got = features.levels[level.name]
        assert (got.index, got.layout, got.stride, got.channels, got.shape, got.dtype) == (
            level.index,
            level.layout,
            level.stride,
            level.channels,
            level.array.shape,
            level.array.dtype.name,
        )
        assert got.array is not None
        assert got.array.dtype == level.array.dtype
        np.testing.assert_array_equal(got.array, level.array)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    ("media_type", "options"), [(JSON, TENSORS), (JSON, BASE64), *((name, TENSORS) for name in BINARY)]
)
def test_a_reply_survives_the_wire(media_type: str, options: ReplyOptions, dtype: str, images: int) -> None:
    reply = a_reply(dtype, images)
    body = written(media_type, reply, options).body
    assert_same_levels(body, media_type, reply)
    features = decode(media_type, body)
    assert features.model == json.loads(json.dumps(reply.model.describe()))
    assert len(features.images) == images
    assert features.preprocess == {"mode": "crop", "size": [224, 224]}


def test_json_has_the_keys_of_the_contract_and_no_others() -> None:
    body = orjson.loads(written(JSON, replace(a_reply(), preprocess=None), ReplyOptions()).body)
    assert list(body) == ["model", "images", "levels", "timings_ms"]
    assert set(body["model"]) == {"id", "type", "device", "engine", "precision", "weights", "frozen"}
    assert set(body["model"]["weights"]) == {
        "source",
        "checkpoint",
        "sha256",
        "loaded",
        "missing",
        "unexpected",
    }
    assert body["model"]["frozen"] == {"stages": 1, "parameters": 33, "of": 161}
    assert set(body["images"][0]) == {"width", "height", "format", "input", "valid"}
    assert body["images"][0]["valid"] == [224, 168]
    keys = {"index", "name", "layout", "stride", "channels", "shape", "dtype"}
    assert set(body["levels"][0]) == keys | {"stats"}
    assert set(body["levels"][0]["stats"]) == {"min", "max", "mean", "std"}
    assert set(body["timings_ms"]) == {"load", "decode", "queue", "forward", "encode"}
    assert body["timings_ms"]["forward"] == 12.346
    assert body["timings_ms"]["encode"] > 0.0
    with_data = orjson.loads(written(JSON, a_reply(), TENSORS).body)
    assert set(with_data["levels"][0]) == keys | {"data"}


def test_json_lists_read_back_as_the_very_same_floats() -> None:
    extremes = np.array([[1e-45, 3.4028235e38, -0.0, 1 / 3]], dtype=np.float32)
    reply = FeatureReply(MODEL, (), (LevelArray(0, "0", "NC", None, 4, extremes),))
    body = json.loads(written(JSON, reply).body)
    assert np.array(body["levels"][0]["data"], np.float32).tobytes() == extremes.tobytes()


def test_base64_is_the_raw_little_endian_array() -> None:
    reply = one_level("float16")
    data = json.loads(written(JSON, reply, BASE64).body)["levels"][0]["data"]
    assert base64.b64decode(data) == reply.levels[0].array.astype("<f2").tobytes()


def test_safetensors_is_read_by_its_library() -> None:
    reply = a_reply("float16", images=1)
    encoded = written(SAFETENSORS, reply)
    tensors = safetensors.numpy.load(encoded.body)
    for level in reply.levels:
        np.testing.assert_array_equal(tensors[level.name], level.array)
    length = int.from_bytes(encoded.body[:8], "little")
    assert length % 8 == 0
    metadata = json.loads(encoded.body[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["reply"])["levels"][0]["stride"] == 16


def test_safetensors_does_not_copy_the_arrays() -> None:
    reply = one_level()
    [_, chunk] = written(SAFETENSORS, reply).chunks
    assert np.shares_memory(np.frombuffer(chunk, np.uint8), reply.levels[0].array)


def test_npz_is_read_by_numpy_and_unzip() -> None:
    reply = a_reply("float16")
    body = written(NPZ, reply).body
    with np.load(io.BytesIO(body), allow_pickle=False) as archive:
        for level in reply.levels:
            np.testing.assert_array_equal(archive[level.name], level.array)
        assert json.loads(archive["meta.json"])["model"]["id"] == "0f3a"
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.namelist() == ["meta.json", "3.npy", "4.npy", "4.cls.npy"]
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_arrow_is_one_batch_of_tensor_columns() -> None:
    reply = a_reply("float16")
    with pa.ipc.open_stream(written(ARROW, reply).body) as reader:
        batches = list(reader)
    [batch] = batches
    assert batch.num_rows == 2
    assert isinstance(batch.schema.field("3").type, pa.FixedShapeTensorType)
    assert list(batch.schema.field("3").type.dim_names) == ["channel", "height", "width"]
    assert json.loads(batch.schema.metadata[b"backbone_service"])["levels"][2]["name"] == "4.cls"
    array = batch.column("3").to_numpy_ndarray()
    assert not array.flags.owndata
    np.testing.assert_array_equal(array, reply.levels[0].array)


def test_npy_is_the_array_alone() -> None:
    reply = one_level("float16")
    body = written(NPY, reply).body
    np.testing.assert_array_equal(np.load(io.BytesIO(body), allow_pickle=False), reply.levels[0].array)
    [level] = decode(NPY, body).levels.values()
    assert (level.layout, level.channels, level.shape) == ("NCHW", 5, (1, 5, 3, 3))


def test_npy_refuses_more_levels_than_one() -> None:
    with pytest.raises(NotAcceptable, match="one level and the request asks for 3"):
        encode(NPY, a_reply(), TENSORS)


@pytest.mark.parametrize("media_type", BINARY)
def test_the_same_reply_is_the_same_bytes(media_type: str) -> None:
    slower = replace(a_reply(), timings=replace(a_reply().timings, forward=99.0))
    assert written(media_type, a_reply()).body == written(media_type, slower).body


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_an_array_in_any_memory_order_is_written_as_it_reads(media_type: str) -> None:
    base = numbers((1, 4, 6, 5)).astype(">f4")
    array = base.transpose(0, 3, 1, 2)[:, :, ::2]
    reply = FeatureReply(MODEL, (), (LevelArray(0, "0", "NCHW", 4, 5, array),))
    [got] = decode(media_type, written(media_type, reply).body).arrays.values()
    np.testing.assert_array_equal(got, array.astype("<f4"))


@pytest.mark.parametrize("media_type", BINARY)
@pytest.mark.parametrize("name", ["../etc/x", "a/b", "", "a\x00", "__metadata__", ".hidden", "ä", "x" * 129])
def test_a_name_that_is_no_plain_word_is_refused(media_type: str, name: str) -> None:
    with pytest.raises(InvalidConfig, match="name"):
        check_levels([name], media_type)


@pytest.mark.parametrize("media_type", BINARY)
def test_two_levels_of_one_name_are_refused(media_type: str) -> None:
    with pytest.raises(InvalidConfig, match="same name"):
        check_levels(["p2", "p2"], media_type)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("media_type", MEDIA_TYPES)
@pytest.mark.parametrize("options", [ReplyOptions(), TENSORS, BASE64])
def test_the_size_is_known_before_the_forward_pass(
    media_type: str, options: ReplyOptions, dtype: str
) -> None:
    array = numbers((2, 64, 14, 14), dtype)
    reply = FeatureReply(MODEL, a_reply().images, (LevelArray(0, "0", "NCHW", 16, 64, array),))
    expected = reply_bytes([array.shape], dtype, media_type, options.returns, options.encoding)
    size = encode(media_type, reply, options).size
    assert size <= expected <= size * 1.5 + 4096


def test_every_served_type_has_an_encoder() -> None:
    assert set(ENCODERS) == set(MEDIA_TYPES)


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_a_truncated_reply_is_a_clear_error(media_type: str) -> None:
    body = written(media_type, one_level()).body
    for length in (0, 1, 7, 9, len(body) // 4, len(body) // 2, len(body) - 9):
        with pytest.raises(MalformedBody):
            decode(media_type, body[:length])


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
@given(body=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_noise_is_a_clear_error(media_type: str, body: bytes) -> None:
    with pytest.raises(MalformedBody):
        decode(media_type, body)


def test_a_pickle_in_an_npz_is_not_run() -> None:
    sink = io.BytesIO()
    meta = np.frombuffer(b"{}", np.uint8)
    np.savez(sink, **{"3": np.array([{"a": 1}], dtype=object), "meta": meta})
    with zipfile.ZipFile(sink, "a") as archive:
        archive.writestr("meta.json", json.dumps(a_reply().describe()))
    with pytest.raises(MalformedBody):
        decode(NPZ, sink.getvalue())


def test_a_reply_of_another_type_is_refused() -> None:
    with pytest.raises(UnsupportedMedia):
        decode("text/html; charset=utf-8", b"<html>")


def test_the_content_type_may_have_parameters_or_be_an_alias() -> None:
    body = written(JSON, a_reply()).body
    assert decode("application/json; charset=utf-8", body).timings_ms["decode"] == 1.25
    assert decode("application/x-safetensors", written(SAFETENSORS, a_reply()).body).arrays


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2048, 7, 7), (3, 257, 33, 29)])
def test_stats_are_those_of_numpy_in_float64(shape: tuple[int, ...], dtype: str) -> None:
    array = numbers(shape, dtype) * np.dtype(dtype).type(0.01) + np.dtype(dtype).type(100)
    wide = array.astype(np.float64)
    stats = level_stats(array)
    assert stats["min"] == wide.min()
    assert stats["max"] == wide.max()
    assert stats["mean"] == pytest.approx(wide.mean(), rel=1e-13)
    assert stats["std"] == pytest.approx(wide.std(), rel=1e-9, abs=1e-13)


def test_an_empty_array_has_no_stats() -> None:
    with pytest.raises(ValueError, match="empty"):
        level_stats(np.zeros((0, 3), np.float32))
