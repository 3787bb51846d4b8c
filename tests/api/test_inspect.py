"""What the service says of backbones without building them is what it then builds."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from service.client import BackboneClient
from tests.api.problems import assert_problem, pointers
from tests.conftest import RunningService

SQUARE, TALL, WIDE = (224, 224), (160, 96), (97, 130)
RESNET = {"type": "ResNet", "depth": 18, "out_indices": [0, 1, 2, 3]}
VIT = {"type": "mmpretrain.VisionTransformer", "arch": "deit-tiny", "out_indices": [3, -1]}
SERVED: tuple[tuple[dict[str, Any], tuple[tuple[int, int], ...]], ...] = (
    (RESNET, (SQUARE, TALL, WIDE)),
    ({**RESNET, "strides": [32, 8], "deep_stem": True, "style": "caffe"}, (WIDE,)),
    ({**VIT, "out_type": "featmap"}, (SQUARE, TALL)),
    ({**VIT, "out_type": "raw"}, (SQUARE, TALL)),
    ({**VIT, "out_type": "cls_token"}, (SQUARE,)),
    ({"type": "mmcls.VisionTransformer", "arch": "deit-tiny", "out_indices": [5, 11]}, (SQUARE,)),
    ({"type": "TIMMBackbone", "model_name": "resnet10t"}, (SQUARE, WIDE)),
    ({"type": "TIMMBackbone", "model_name": "vit_tiny_patch16_224"}, (SQUARE,)),
    ({"type": "timm.resnet10t", "out_indices": [4, 0]}, (SQUARE, TALL, WIDE)),
    ({"type": "timm.convnext_atto", "output_stride": 16}, (TALL, WIDE)),
    ({"type": "timm.mobilenetv3_small_050"}, (SQUARE, WIDE)),
    ({"type": "timm.swin_tiny_patch4_window7_224", "out_indices": [0, 3]}, (SQUARE,)),
    ({"type": "timm.vit_tiny_patch16_224", "img_size": [96, 160]}, ((96, 160),)),
    ({"type": "timm.vit_tiny_patch16_224", "dynamic_img_size": True}, (TALL,)),
    ({"type": "torchvision.resnet18"}, (SQUARE, TALL, WIDE)),
    ({"type": "torchvision.mobilenet_v3_small"}, (WIDE,)),
    ({"type": "torchvision.convnext_tiny"}, (WIDE,)),
    ({"type": "torchvision.maxvit_t"}, (SQUARE,)),
    ({"type": "torchvision.swin_t", "return_nodes": ["features.1", "features.7", "avgpool"]}, (SQUARE, TALL)),
    ({"type": "torchvision.vit_b_16", "return_nodes": {"encoder.layers.encoder_layer_0": "a"}}, (SQUARE,)),
)
CASES = [(config, size) for config, sizes in SERVED for size in sizes]
FACTS = ("index", "name", "layout", "stride", "channels", "shape")


def case_name(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value.get("model_name") or value["type"])


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[BackboneClient]:
    with BackboneClient(service.url) as client:
        yield client


def inspect(http: httpx.Client, config: Any, **more: Any) -> httpx.Response:
    return http.post("/backbones/inspect", json={"backbone": config, **more})


def facts_of(levels: Any) -> list[dict[str, Any]]:
    return [{fact: level[fact] for fact in FACTS} for level in levels]


def returned_facts(client: BackboneClient, config: Any, size: tuple[int, int], **more: Any) -> list[Any]:
    images = np.zeros((1, 3, *size), np.float32)
    levels = client.features(backbone=config, tensor=images, **more).levels.values()
    described = [{**vars(level), "shape": list(level.shape)} for level in levels]
    assert [tuple(level["array"].shape) for level in described] == [tuple(lev["shape"]) for lev in described]
    return facts_of(described)


@pytest.mark.parametrize(("config", "size"), CASES, ids=case_name)
def test_features_are_what_inspect_said(
    client: BackboneClient, config: dict[str, Any], size: tuple[int, int]
) -> None:
    said = client.inspect(config, input_size=size)
    assert said["input_size"] == list(size)
    assert facts_of(said["levels"]) == returned_facts(client, config, size)


@pytest.mark.parametrize("neck", ["GlobalAveragePooling", {"type": "mmcls.GlobalAveragePooling"}])
def test_a_neck_is_inspected_behind_its_backbone(client: BackboneClient, neck: Any) -> None:
    said = client.inspect(RESNET, neck=neck, input_size=WIDE)
    assert [level["shape"] for level in said["levels"]] == [[1, 64], [1, 128], [1, 256], [1, 512]]
    assert facts_of(said["levels"]) == returned_facts(client, RESNET, WIDE, neck=neck)


def test_a_neck_that_does_not_fit_is_refused_by_its_key(http: httpx.Client) -> None:
    for neck, pointer in (
        ({"type": "GlobalAveragePooling", "dims": 2}, "#/neck/dims"),
        ({"type": "NoNeck"}, "#/neck/type"),
    ):
        refused = inspect(http, RESNET, neck=neck)
        assert refused.status_code in (404, 422)
        assert pointers(assert_problem(refused, refused.status_code)) == [pointer]
    tokens = inspect(http, {**VIT, "out_type": "raw"}, neck="GlobalAveragePooling")
    assert pointers(assert_problem(tokens, 422))[0].startswith("#/neck")


def test_the_size_is_the_architectures_own_where_none_is_given(client: BackboneClient) -> None:
    for config, size in (
        (RESNET, [224, 224]),
        ({**VIT, "arch": "deit-tiny", "img_size": 384, "out_type": "featmap"}, [384, 384]),
        ({"type": "timm.inception_v3"}, [299, 299]),
        ({"type": "timm.vit_tiny_patch16_384"}, [384, 384]),
        ({"type": "torchvision.inception_v3"}, [299, 299]),
    ):
        assert client.inspect(config)["input_size"] == size
    assert client.inspect(RESNET, input_size=None)["levels"] == client.inspect(RESNET)["levels"]


def test_numbers_and_bytes_are_those_of_the_model(client: BackboneClient) -> None:
    said = client.inspect({"type": "ResNet", "depth": 50, "frozen_stages": 1, "norm_eval": True})
    assert said["parameters"] == 23_508_032  # torchvision's resnet50 without its classifier
    loaded = client.load({"type": "ResNet", "depth": 50})
    assert said["bytes"] == loaded["bytes"]
    client.unload(loaded["id"])
    assert (said["frozen"]["stages"], len(said["frozen"]["parameters"]), said["frozen"]["of"]) == (1, 33, 159)
    assert len(said["frozen"]["norms"]) == 53
    assert said["weights"] is None


def test_named_weights_are_not_fetched(client: BackboneClient) -> None:
    config = {"type": "timm.resnet10t.c3_in1k", "pretrained": True}
    assert client.inspect(config)["weights"] == {
        "checkpoint": "hf-hub:timm/resnet10t.c3_in1k",
        "prefix": None,
    }
    config = {
        "type": "ResNet",
        "depth": 18,
        "init_cfg": {"type": "Pretrained", "checkpoint": "no.pth", "prefix": "a."},
    }
    assert client.inspect(config)["weights"] == {"checkpoint": "no.pth", "prefix": "a."}


@pytest.mark.parametrize(
    ("config", "parameters", "norms"),
    [
        ({"type": "timm.resnet18", "frozen_stages": 0}, ["conv1.weight", "bn1.weight", "bn1.bias"], ["bn1"]),
        ({"type": "timm.resnet18", "frozen_stages": -1}, [], []),
        ({"type": "torchvision.resnet18"}, [], []),
        (
            {"type": "ResNet", "depth": 18, "frozen_stages": 0},
            ["conv1.weight", "bn1.weight", "bn1.bias"],
            ["bn1"],
        ),
    ],
)
def test_what_is_frozen_is_listed(
    client: BackboneClient, config: dict[str, Any], parameters: list[str], norms: list[str]
) -> None:
    frozen = client.inspect(config)["frozen"]
    assert (frozen["parameters"], frozen["norms"]) == (parameters, norms)


def test_what_nothing_is_frozen_of_has_as_many_parameters(client: BackboneClient) -> None:
    for name in ("timm.resnet18", "timm.hrnet_w18_small", "timm.vit_tiny_patch16_224", "timm.levit_128s"):
        frozen = client.inspect({"type": name, "freeze_to_index": 0})["frozen"]
        assert client.inspect({"type": name})["frozen"] == {
            "stages": None, "parameters": [], "norms": [], "of": frozen["of"]
        }  # fmt: skip


@pytest.mark.parametrize(
    "size", [[0, 10], [10], [1, 2, 3], "224", [224.0, 224], [True, True], True, [9000, 10], -1, {}, [None, 1]]
)
def test_a_size_that_is_none_is_refused(http: httpx.Client, size: Any) -> None:
    body = assert_problem(inspect(http, RESNET, input_size=size), 422, "invalid-config")
    assert pointers(body) == ["#/input_size"]


def test_one_number_is_the_size_of_a_square(client: BackboneClient, http: httpx.Client) -> None:
    assert inspect(http, RESNET, input_size=96).json() == client.inspect(RESNET, input_size=(96, 96))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"type": "timm.swin_tiny_patch4_window7_224"}, (200, 224)),
        ({"type": "timm.vit_tiny_patch16_224"}, (256, 256)),
        ({"type": "torchvision.vit_b_16"}, (256, 256)),
        ({"type": "torchvision.vgg11"}, (1, 1)),
    ],
)
def test_a_size_that_the_network_does_not_take_is_refused(
    http: httpx.Client, config: dict[str, Any], size: tuple[int, int]
) -> None:
    body = assert_problem(inspect(http, config, input_size=size), 422, "invalid-config")
    assert pointers(body) == ["#/input_size"]
    assert f"{size[0]}x{size[1]}" in body["detail"]


def test_a_giant_is_inspected_in_no_time_and_no_memory(http: httpx.Client) -> None:
    process = psutil.Process()
    inspect(http, {"type": "mmpretrain.VisionTransformer", "arch": "deit-tiny"})
    before = process.memory_info().rss
    started = time.process_time()
    said = inspect(http, {"type": "mmpretrain.VisionTransformer", "arch": "eva-g"}).json()
    seconds = time.process_time() - started
    assert said["bytes"] > 4_000_000_000
    assert seconds < 2
    assert process.memory_info().rss - before < 100_000_000
    assert not any(model["bytes"] == said["bytes"] for model in http.get("/models").json()["models"])


# --- lists of types -------------------------------------------------------------------------------


def pages(http: httpx.Client, **params: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = http.get("/backbones", params={**params, "cursor": cursor}).json()
        assert len(page["types"]) <= params.get("limit", 100)
        rows += page["types"]
        cursor = page["next"]
    assert len(rows) == page["total"]
    return rows


@pytest.mark.parametrize("limit", [1, 100, 333])
def test_the_pages_have_every_type_once(http: httpx.Client, limit: int) -> None:
    scope = {"scope": "mmpretrain"} if limit == 1 else {}
    whole = http.get("/backbones", params={"limit": 2000, **scope}).json()
    assert whole["next"] is None
    assert pages(http, limit=limit, **scope) == whole["types"]
    names = [row["type"] for row in whole["types"]]
    assert names == sorted(set(names))
    assert len(names) == whole["total"]


def test_a_scope_has_its_own_types_under_either_name(http: httpx.Client) -> None:
    everything = pages(http, limit=2000)
    scopes = {row["scope"] for row in everything}
    assert {"mmpretrain", "timm", "torchvision"} <= scopes
    for scope in scopes:
        named = [row for row in everything if f"{scope}." in " ".join((row["type"], *row["aliases"]))]
        assert pages(http, scope=scope, limit=1000) == named
    assert pages(http, scope="mmcls") == pages(http, scope="mmpretrain")
    assert pages(http, scope="nobody") == []


def test_a_search_is_for_all_words_in_any_case(http: httpx.Client) -> None:
    rows = pages(http, search="RESNET torchvision", limit=1000)
    names = [row["type"] for row in rows]
    assert "torchvision.resnet50" in names
    assert "timm.resnet50" not in names
    for row in rows:
        text = " ".join((row["type"], row["summary"])).lower()
        assert "resnet" in text
        assert "torchvision" in text
    found = [row["type"] for row in pages(http, search="VisionTransformer", scope="mmcls")]
    assert found == [
        "mmpretrain.DistilledVisionTransformer",
        "mmpretrain.RevVisionTransformer",
        "mmpretrain.VisionTransformer",
    ]
    assert pages(http, search="no such words") == []


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 2001}, {"limit": "many"}, {"search": "x" * 129}])
def test_a_query_outside_its_bounds_is_refused(http: httpx.Client, params: dict[str, Any]) -> None:
    body = assert_problem(http.get("/backbones", params=params), 422)
    assert pointers(body) == [f"#/query/{next(iter(params))}"]


# --- pages of types -------------------------------------------------------------------------------

JSON_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}
CHOOSING = ("out_indices", "return_nodes", "return_layers", "strides", "out_features", "MODEL")


SAMPLES = {"timm": 25, "torchvision": 10}


def served_types(http: httpx.Client) -> dict[str, list[str]]:
    """All types that are served, by scope; a sample of each of the two libraries that have many."""
    found: dict[str, list[str]] = {}
    for row in pages(http, limit=2000):
        if "unsupported" not in row:
            found.setdefault(row["scope"], []).append(row["type"])
    chosen = {scope: random.Random(scope).sample(found[scope], count) for scope, count in SAMPLES.items()}
    return {**found, **chosen}


def test_the_page_of_a_type_is_right(http: httpx.Client) -> None:
    for names in served_types(http).values():
        for name in names:
            page = http.get(f"/backbones/{name}").json()
            assert page["type"] == name
            assert_schema(page["schema"])
            assert_described_by(page["example"], page["schema"])
            assert_indices(http, page)


def assert_schema(schema: Mapping[str, Any]) -> None:
    """A JSON Schema of an object that takes no other keys, whose references and patterns lead somewhere."""
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert {"type", "checkpoint", "init_cfg", "strides"} <= schema["properties"].keys()
    for part in _objects(schema):
        if isinstance(part.get("type"), str) and not {"properties", "anyOf", "oneOf"} & part.keys():
            assert part["type"] in JSON_TYPES
        if "$ref" in part:
            assert part["$ref"].removeprefix("#/$defs/") in schema["$defs"]
        if isinstance(part.get("pattern"), str):
            re.compile(part["pattern"])


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    children: Any = ()
    if isinstance(value, dict):
        yield value
        # The keys of `properties` are names of parameters, not words of the schema.
        children = [v for key, v in value.items() if key not in ("properties", "default", "const", "enum")]
        children += value.get("properties", {}).values()
    elif isinstance(value, list):
        children = value
    for child in children:
        yield from _objects(child)


def assert_described_by(example: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    assert set(schema.get("required", ())) <= example.keys() <= schema["properties"].keys()


def assert_indices(http: httpx.Client, page: Mapping[str, Any]) -> None:
    """The example is accepted; its levels by default, and every one that is permitted, are there."""
    assert inspect(http, page["example"]).status_code == 200
    plain = {key: value for key, value in page["example"].items() if key not in CHOOSING}
    if inspect(http, plain).status_code != 200:  # it has no levels unless they are chosen
        plain = page["example"]
    permitted, default = page["indices"]["permitted"], page["indices"]["default"]
    assert indices_of(inspect(http, plain)) == default
    assert permitted == sorted(set(permitted))
    assert set(default) <= set(permitted)
    if page["schema"]["properties"].get("out_indices", {"type": "null"}).get("type") == "null":
        return
    if "out_feature_indices" in page["schema"]["properties"]:
        return  # these choose the levels of SSDVGG, whose out_indices choose nothing
    assert indices_of(inspect(http, {**plain, "out_indices": permitted})) == permitted
    if page["type"] == "detrex.TimmBackbone":
        return  # has only the features asked for: its page lists those of its example and by default
    if "HiViT" in page["type"]:
        return  # gives its last block whatever the index, as in the library
    beyond = inspect(http, {**plain, "out_indices": [permitted[-1] + 1]})
    assert pointers(assert_problem(beyond, 422)) == ["#/backbone/out_indices/0"]


def indices_of(reply: httpx.Response) -> list[int]:
    assert reply.status_code == 200, reply.text
    return list(dict.fromkeys(level["index"] for level in reply.json()["levels"]))


def test_a_former_scope_and_no_scope_lead_to_the_same_page(http: httpx.Client) -> None:
    page = http.get("/backbones/mmpretrain.ResNet").json()
    assert page["aliases"] == ["mmcls.ResNet"]
    for name in ("mmcls.ResNet", "ResNet"):
        assert http.get(f"/backbones/{name}").json() == page
    assert set(page["architectures"]) == {"18", "34", "50", "101", "152"}


def test_a_tag_of_timm_has_the_page_of_its_model(http: httpx.Client) -> None:
    page = http.get("/backbones/timm.resnet50.a1_in1k").json()
    assert page["type"] == "timm.resnet50"
    assert page["example"]["type"] == "timm.resnet50.a1_in1k"
    assert "resnet50.a1_in1k" in page["architectures"]
    assert_problem(http.get("/backbones/timm.resnet50.no_such_tag"), 404, "unknown-backbone")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ResNett", "ResNet"),
        ("mmpretrain.ViisionTransformer", "mmpretrain.VisionTransformer"),
        ("timm.resnet5o", "timm.resnet50"),
        ("torchvision.mobilenetv3small", "torchvision.mobilenet_v3_small"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(http: httpx.Client, name: str, nearest: str) -> None:
    by_path = assert_problem(http.get(f"/backbones/{name}"), 404, "unknown-backbone")
    assert nearest in by_path["nearest"]
    by_config = assert_problem(inspect(http, {"type": name}), 404, "unknown-backbone")
    assert nearest in by_config["nearest"]
    assert pointers(by_config) == ["#/backbone/type"]


def test_a_type_that_is_known_but_not_served_says_why(http: httpx.Client) -> None:
    refused = [row for row in pages(http, limit=2000) if "unsupported" in row]
    of_timm = [row for row in refused if row["scope"] == "timm"]
    others = [row for row in refused if row["scope"] != "timm"]
    assert {row["type"] for row in others} >= {"mmpretrain.Vig", "mmselfsup.MAEViT", "mmyolo.BaseBackbone"}
    for row in (*others, *of_timm[:3]):
        for name in (row["type"], *row["aliases"]):
            by_path = assert_problem(http.get(f"/backbones/{name}"), 422, "invalid-config")
            by_config = assert_problem(inspect(http, {"type": name}), 422, "invalid-config")
            assert row["unsupported"] in by_path["detail"]
            assert row["unsupported"] in by_config["detail"]
            assert pointers(by_config) == ["#/backbone/type"]


def test_what_replaces_a_type_that_is_not_served_is_served(http: httpx.Client) -> None:
    types = {row["type"]: row for row in pages(http, limit=2000)}
    named = {
        name
        for row in types.values()
        if row["scope"] != "timm"
        for name in re.findall(r"\bmmpretrain\.\w+", row.get("unsupported", ""))
    }
    assert "mmpretrain.MAEViT" in named
    assert all("unsupported" not in types[name] for name in named)
