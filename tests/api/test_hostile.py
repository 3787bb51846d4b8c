"""What a hostile client may send: nothing is imported, fetched, opened or allocated for it, and nothing crashes."""

from __future__ import annotations

import base64
import io
import json
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
import pytest
import torch

from service.settings import LIBRARY_HOSTS
from tests.api.problems import assert_any_problem, assert_problem, pointers
from tests.checkpoints.conftest import Remote
from tests.conftest import RunningService, encoded, multipart, npy, settings_for

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8}
TIMM = {"type": "timm.resnet18"}
WRAPPED = {"type": "TIMMBackbone", "model_name": "resnet18"}
VISION = {"type": "torchvision.resnet18"}
VIT = {"type": "mmpretrain.VisionTransformer", "arch": "deit-tiny"}
SMALL = encoded(np.full((48, 64, 3), 77, np.uint8))
JSON = {"Content-Type": "application/json"}
MEGABYTE = 2**20


class Besieged:
    """A service that may fetch from nowhere, a hub that must not be asked, and files that must not be read."""

    def __init__(self, service: RunningService, hub: Remote, outside: Path) -> None:
        self.service, self.hub, self.outside = service, hub, outside
        self.http = service.http

    def features(self, config: Any, **given: Any) -> httpx.Response:
        return self.http.post("/features", **multipart(json.dumps(config), **{"image": SMALL, **given}))

    def inspect(self, config: Any, **given: Any) -> httpx.Response:
        body = json.dumps({"backbone": config, **given})
        return self.http.post("/backbones/inspect", content=body, headers=JSON)

    def both(self, config: Any, **given: Any) -> list[httpx.Response]:
        return [self.features(config, **given), self.inspect(config, **given)]


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    """A service that has answered one request of each kind, so that whatever is imported on use is there."""
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "checkpoints"
    folder.mkdir()
    torch.save({"weight": torch.zeros(1)}, outside / "secret.pth")
    (folder / "link.pth").symlink_to(outside / "secret.pth")
    (folder / "folder.pth").mkdir()
    (folder / "sub").symlink_to(outside)
    hub = Remote()
    mirrors = ",".join(f"{host}={hub.url}" for host in LIBRARY_HOSTS)  # where a fetch would be seen
    settings = settings_for(folder, checkpoint_mirrors=mirrors, checkpoint_hosts="", max_images=8)
    try:
        with RunningService(settings) as service:
            yield warmed(Besieged(service, hub, outside))
    finally:
        hub.stop()


def warmed(besieged: Besieged) -> Besieged:
    """The service after one request of each kind."""
    for config in (THIN, TIMM, WRAPPED, VISION, VIT, {**VISION, "return_nodes": ["layer1"]}):
        assert [reply.status_code for reply in besieged.both(config)] == [200, 200]
        assert besieged.http.get(f"/backbones/{config['type']}").status_code == 200
        assert [reply.status_code for reply in besieged.both({"type": "no such"})] == [404, 404]
    assert_problem(besieged.features({**THIN, "checkpoint": "nothing.pth"}), 422)
    return besieged


@pytest.fixture
def unmoved(besieged: Besieged) -> Iterator[None]:
    """What is asked in a test imports nothing, fetches nothing, takes no memory, and is answered in seconds."""
    modules = set(sys.modules)
    process = psutil.Process()
    resident, started = process.memory_info().rss, time.monotonic()
    yield
    assert time.monotonic() - started < 30
    assert sorted(set(sys.modules) - modules) == []
    assert besieged.hub.requests == []
    assert process.memory_info().rss - resident < 50 * MEGABYTE
    assert besieged.features(THIN).status_code == 200


def assert_refused(replies: list[httpx.Response], *statuses: int) -> None:
    for reply in replies:
        assert reply.status_code in statuses, f"{reply.status_code} {reply.text[:300]}"
        assert_any_problem(reply)


# --- names that would run something elsewhere ---------------------------------------------------

TYPES = [
    "subprocess.Popen", "subprocess:Popen", "os.system", "posix.system", "builtins.eval", "builtins.exec", "eval",
    "__import__", "__builtins__", "__class__", "object.__subclasses__", "importlib.import_module", "pickle.loads",
    "torch.hub.load", "torch.load", "torch.nn.Sequential", "torch.jit.load", "service.cli:main", "service.cli.main",
    "service.api.app:create_app", "service.backbones.resnet:RESNET", "resnet:RESNET", "tests.conftest", "antigravity",
    "this", "timm.create_model", "timm.models.resnet", "timm.models.resnet.resnet18", "timm.", "timm", "timm..resnet18",
    "timm.resnet18:evil", "timm.__init__", "timm.local-dir:/etc", "timm.hf-hub:../../x", "timm.hf_hub:evil/x",
    "timm.https://evil.example/x", "torchvision.models.resnet50", "torchvision.io.read_file",
    "torchvision.datasets.ImageFolder", "torchvision.resnet18\n", "torchvision.", "mmpretrain.ResNet\0",
    "mmpretrain.ResNet ", " ResNet", "mmpretrain.mmpretrain.ResNet", "mmpretrain.resnet", "mmdet.ResNet()",
    "mmengine.registry.DefaultScope", "numpy.load", "ctypes.CDLL", "../x", "..", ".", "/", "/etc/passwd",
    "C:\\Windows\\x", "file:///etc/passwd", "${jndi:ldap://x}", "{{7*7}}", "%s%s%n", "'; DROP TABLE models;--",
    "<script>alert(1)</script>", "ResNet\r\nX-Evil: 1", "\u202eteNseR", "ＲｅｓＮｅｔ", "Re\u0301sNet", "😀", "\ud7ff",
    "a" * 128, "timm." + "." * 100, "a" * 129, "a" * 10**5, "timm." + "resnet18." * 1000,
]  # fmt: skip


def test_a_type_is_a_row_of_the_table_and_nothing_else(besieged: Besieged, unmoved: None) -> None:
    started = time.monotonic()
    for name in TYPES:
        assert_refused(besieged.both({"type": name}), 404, 422)
        assert_refused(besieged.both({**THIN, "type": name}), 404, 422)
    assert time.monotonic() - started < 20


def test_a_type_in_a_path_is_a_row_of_the_table_and_nothing_else(besieged: Besieged, unmoved: None) -> None:
    for name in TYPES:
        quoted = urllib.parse.quote(name, safe="")[:60_000]
        for route in ("backbones", "configs"):
            assert_refused([besieged.http.get(f"/{route}/x{quoted}")], 404, 422)
    assert_refused(
        [besieged.http.get("/backbones/subprocess.Popen"), besieged.http.get("/configs/..%2f..%2fx")], 404
    )


def test_the_type_of_a_neck_is_a_row_of_the_table_and_nothing_else(besieged: Besieged, unmoved: None) -> None:
    for name in TYPES:
        assert_refused(besieged.both(THIN, neck={"type": name}), 404, 422)
    assert_refused(besieged.both(THIN, neck="subprocess.Popen"), 404)


def test_a_name_of_a_config_is_a_row_of_the_listing_and_nothing_else(
    besieged: Besieged, unmoved: None
) -> None:
    names = [*TYPES, "../pyproject", "resnet50.yaml", "./resnet50", "timm/../resnet50", "/resnet50", "timm"]
    for name in names:
        assert_refused([besieged.inspect(name)], 404, 422)


@pytest.mark.parametrize(
    "named",
    [
        lambda name: {**WRAPPED, "model_name": name},
        lambda name: {**VISION, "weights": name},
        lambda name: {**VISION, "norm_layer": name},
        lambda name: {**TIMM, "norm_layer": name},
        lambda name: {**TIMM, "act_layer": name},
        lambda name: {**THIN, "norm_cfg": {"type": name}},
        lambda name: {**THIN, "conv_cfg": {"type": name}},
        lambda name: {**THIN, "style": name},
        lambda name: {**VIT, "arch": name},
        lambda name: {**VIT, "norm_cfg": {"type": name}},
        lambda name: {**THIN, "init_cfg": {"type": name}},
        lambda name: {**VISION, "return_nodes": [name]},
        lambda name: {**THIN, "_base_": name},
        lambda name: {**THIN, "_scope_": name},
    ],
)
def test_a_name_inside_a_config_is_one_of_a_list(besieged: Besieged, unmoved: None, named: Any) -> None:
    for name in TYPES:
        assert_refused([besieged.inspect(named(name))], 404, 422)


# --- numbers and shapes beyond all bounds -------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


WILD = [
    {**THIN, "depth": 10**9},
    {**THIN, "depth": 18.5},
    {**THIN, "depth": True},
    {**THIN, "depth": "18; import os"},
    {**THIN, "depth": [18]},
    {**THIN, "in_channels": 10**9},
    {**THIN, "in_channels": True},
    {**THIN, "base_channels": 10**9},
    {**THIN, "base_channels": -1},
    {**THIN, "base_channels": 0},
    {**THIN, "expansion": 10**6},
    {**THIN, "num_stages": 10**9},
    {**THIN, "num_stages": 0},
    {**THIN, "dilations": [10**9] * 4},
    {**THIN, "strides": [-8]},
    {**THIN, "strides": [0]},
    {**THIN, "strides": []},
    {**THIN, "strides": [1] * 1000},
    {**THIN, "strides": [10**30]},
    {**THIN, "out_indices": list(range(1000))},
    {**THIN, "out_indices": list(range(10**5))},
    {**THIN, "out_indices": []},
    {**THIN, "out_indices": [0, 0]},
    {**THIN, "out_indices": [0, -4]},
    {**THIN, "out_indices": [True]},
    {**THIN, "out_indices": [1.5]},
    {**THIN, "out_indices": ["0"]},
    {**THIN, "out_indices": [None]},
    {**THIN, "out_indices": [2**63]},
    {**THIN, "out_indices": [-(2**63)]},
    {**THIN, "out_indices": {"0": 0}},
    {**THIN, "frozen_stages": 10**9},
    {**THIN, "frozen_stages": -10},
    {**THIN, "drop_path_rate": 1e308},
    {**THIN, "init_cfg": [{"type": "Kaiming"}] * 1000},
    {**THIN, "init_cfg": {"type": "Pretrained", "checkpoint": "x" * 10**5}},
    {**THIN, "init_cfg": {"type": "Pretrained", "checkpoint": ["a"]}},
    {**THIN, "junk": deep(20)},
    {**THIN, "junk": deep(100)},
    {**THIN, "x" * 10**5: 1},
    {**THIN, **{f"key{number}": number for number in range(2000)}},
    {**THIN, "a/b~c": 1},
    {**THIN, "": 1},
    {"type": ["ResNet"], "depth": 18},
    {"type": {"type": "ResNet"}, "depth": 18},
    {"type": None},
    {"type": ""},
    {"type": True},
    {**TIMM, "in_chans": 10**9},
    {**TIMM, "img_size": 10**9},
    {**TIMM, "img_size": [1, 2, 3]},
    {**TIMM, "out_indices": 10**9},
    {**TIMM, "out_indices": True},
    {**TIMM, "output_stride": 1},
    {**TIMM, "num_classes": 10**9},
    {**TIMM, "drop_rate": -1},
    {**TIMM, "freeze_to_index": 10**9},
    {**TIMM, "pretrained": "yes; rm"},
    {**TIMM, "features_only": 2},
    {**TIMM, "kwargs": {"block": "x"}},
    {**TIMM, "block_args": [[1]]},
    {"type": "timm.vit_tiny_patch16_224", "img_size": 2048, "depth": 10**6},
    {**VIT, "img_size": 10**9},
    {**VIT, "img_size": [10**9, 1]},
    {**VIT, "img_size": 0},
    {**VIT, "patch_size": 0},
    {**VIT, "patch_size": 10**9},
    {**VIT, "patch_size": 16.0001},
    {**VIT, "in_channels": 10**9},
    {
        **VIT,
        "arch": {"embed_dims": 10**9, "num_layers": 10**9, "num_heads": 1, "feedforward_channels": 10**9},
    },
    {**VIT, "arch": {"embed_dims": 7, "num_layers": 1, "num_heads": 2, "feedforward_channels": 1}},
    {**VIT, "arch": {"embed_dims": 192, "num_layers": 0, "num_heads": 0, "feedforward_channels": 0}},
    {**VIT, "arch": {}},
    {**VIT, "layer_scale_init_value": 1e308},
    {**VIT, "layer_cfgs": [{}] * 1000},
    {**VIT, "patch_cfg": {"stride": 0}},
    {**VISION, "return_nodes": [f"layer{number}" for number in range(1000)]},
    {**VISION, "return_nodes": {f"layer{number}": str(number) for number in range(10**4)}},
    {**VISION, "return_nodes": {"layer1": "../../x"}},
    {**VISION, "return_nodes": {"layer1": "a\nb"}},
    {**VISION, "return_nodes": {"layer1": ""}},
    {**VISION, "return_nodes": {"layer1": "meta.json", "layer2": "meta.json"}},
    {**VISION, "return_nodes": {"layer1": "x" * 10**4}},
    {**VISION, "return_nodes": {"__class__": "x"}},
    {**VISION, "return_nodes": ["layer1.__class__"]},
    {**VISION, "return_nodes": {}},
    {**VISION, "return_nodes": []},
    {**VISION, "replace_stride_with_dilation": [True] * 1000},
    {**VISION, "image_size": 10**9},
    {**VISION, "num_classes": -1},
]


@pytest.mark.parametrize(
    "config", WILD, ids=lambda config: str(config)[:60].encode("ascii", "replace").decode()
)
def test_a_config_beyond_all_bounds_is_refused(
    besieged: Besieged, unmoved: None, config: dict[str, Any]
) -> None:
    started = time.monotonic()
    assert_refused(besieged.both(config), 400, 413, 422)
    assert time.monotonic() - started < 5


def test_a_network_of_every_bound_at_once_is_refused_in_little_time(besieged: Besieged) -> None:
    attention = {
        "type": "detectron2.ViT",
        "img_size": 1024,
        "embed_dim": 768,
        "depth": 64,
        "num_heads": 128,
        "window_size": 256,
        "window_block_indexes": [0, 1, 3, 4, 6, 7, 9, 10],
    }
    layers = {
        "type": "mmyolo.PPYOLOECSPPAFPN",
        "in_channels": [512, 1024, 2048],
        "out_channels": [192, 384, 768],
        "deepen_factor": 4.0,
        "num_csplayer": 4,
        "num_blocks_per_layer": 16,
    }
    started = time.process_time()
    assert_refused([besieged.inspect({**attention, "use_rel_pos": True})], 413)
    assert_refused(
        [besieged.inspect({"type": "ResNet", "depth": 50, "out_indices": [1, 2, 3]}, neck=layers)], 413
    )
    assert time.process_time() - started < 8  # about 2; either took 3 to 5 before


NUMBERS = [
    "1e308",
    "1e400",
    "-1e400",
    "1" + "0" * 400,
    "NaN",
    "Infinity",
    "-0",
    "0x10",
    "1_8",
    "01",
    "1e-400",
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
def test_a_number_that_is_none_is_refused(besieged: Besieged, unmoved: None, number: str) -> None:
    config = f'{{"type": "ResNet", "depth": {number}}}'
    body = f'{{"backbone": {config}}}'
    request = multipart(config, image=SMALL)
    inspected = besieged.http.post("/backbones/inspect", content=body.encode(), headers=JSON)
    assert_refused([besieged.http.post("/features", **request), inspected], 400, 422)


@pytest.mark.parametrize(
    "preprocess",
    [
        {"size": 10**9},
        {"size": [1, 10**9]},
        {"size": -1},
        {"size": True},
        {"size": 4096, "crop_pct": 1e-300},
        {"crop_pct": -1},
        {"mean": [1e308] * 3},
        {"std": [1e-300] * 3},
        {"mean": [0] * 10**4},
        {"mean": "0,0,0"},
        {"mode": "native", "size_divisor": 10**9},
        {"mode": "native", "size_divisor": 0},
        {"interpolation": "os.system"},
        {"data_preprocessor": {"type": "subprocess.Popen"}},
        {"data_preprocessor": deep(20)},
        {"pixel_mean": [None] * 3},
        deep(20),
        "../x",
        [1],
    ],
    ids=lambda value: str(value)[:40],
)
def test_preprocessing_beyond_all_bounds_is_refused(
    besieged: Besieged, unmoved: None, preprocess: Any
) -> None:
    reply = besieged.features(THIN, preprocess=preprocess)
    assert_refused([reply], 422)
    assert pointers(reply.json())[0].startswith("#/preprocess")


def test_json_of_a_million_brackets_or_values_is_refused(besieged: Besieged, unmoved: None) -> None:
    for junk in (b"[" * 10**6, b'{"a":' * 10**6, b"[" * 10**6 + b"]" * 10**6, b"[" + b"0," * 10**6 + b"0]"):
        body = b'{"backbone":' + junk + b"}"
        assert_refused([besieged.http.post("/backbones/inspect", content=body, headers=JSON)], 400, 422)
        assert_refused([besieged.http.post("/features", content=body, headers=JSON)], 400, 422)


# --- checkpoints that are somewhere else --------------------------------------------------------

ELSEWHERE = [
    "../secret.pth", "../../secret.pth", "..\\secret.pth", "link.pth", "sub/secret.pth", "folder.pth", "./link.pth",
    "/etc/passwd", "/etc/passwd.pth", "//etc/x.pth", "~/x.pth", "~root/x.pth", "a\0b.pth", "a\nb.pth",
    "", " ", ".", "..",
    "hub/x.pth", "url/x.pth", ".hidden.pth", "a//b.pth", "a/./b.pth", "$HOME/x.pth", "x.pth;id",
    "x.pkl", "x.py", "x.zip",
    "file:///etc/passwd", "file:x.pth", "http://download.pytorch.org/x.pth", "ftp://x/x.pth", "data:,x.pth", "s3://b/x.pth",
    "petrel://x/x.pth", "gopher://127.0.0.1/x.pth", "hf-hub:../../x", "hf-hub:a/../b", "hf-hub:evil/x", "hf-hub:evil",
    "hf-hub:evil/x/../../y.pth", "hf-hub:evil/x@../..", "hf-hub:http://evil.example/x", "local-dir:/etc",
    "https://127.0.0.1/x.pth", "https://localhost/x.pth", "https://[::1]/x.pth", "https://0x7f000001/x.pth",
    "https://169.254.169.254/latest/meta-data/x.pth", "https://evil.example/x.pth", "https://user:word@evil.example/x.pth",
    "https://download.pytorch.org@evil.example/x.pth", "https://download.pytorch.org.evil.example/x.pth",
    "https://download.pytorch.org/../x.pth", "https://download.pytorch.org/%2e%2e/x.pth", "https://",
    "https://download.pytorch.org:22/x.pth", "https://evil.example\\@download.pytorch.org/x.pth", "HTTPS://EVIL/x.pth",
    "torchvision://../x", "mmcls://../x", "open-mmlab://../x", "detectron2://../x", "x" * 500 + ".pth",
    "é.pth", "\u202e.pth",
]  # fmt: skip


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: {**THIN, "checkpoint": name},
        lambda name: {**THIN, "init_cfg": {"type": "Pretrained", "checkpoint": name}},
        lambda name: {**TIMM, "checkpoint": name},
        lambda name: {**VISION, "checkpoint": name},
    ],
)
def test_a_checkpoint_elsewhere_is_refused(besieged: Besieged, unmoved: None, spell: Any) -> None:
    for name in ELSEWHERE:
        reply = besieged.features(spell(name))
        assert_refused([reply], 422)
        assert pointers(reply.json())[0].endswith("checkpoint")


def test_what_is_outside_reads_as_what_is_not_there(besieged: Besieged, unmoved: None) -> None:
    def told(name: str) -> str:
        return assert_problem(besieged.features({**THIN, "checkpoint": name}), 422)["detail"].replace(
            name, "NAME"
        )

    names = (
        "../secret.pth",
        "../absent1.pth",
        "/etc/hosts.pth",
        "/etc/absent.pth",
        "~/x.pth",
        "sub/secret.pth",
        "sub/absent.pth",
    )
    texts = {told(name).partition(";")[0] for name in names}
    assert len(texts) == 1


# --- bodies that are not what they seem ---------------------------------------------------------


def form(*parts: tuple[bytes, bytes], boundary: bytes = b"x") -> bytes:
    lines = [b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts]
    return b"".join(lines) + b"--" + boundary + b"--\r\n"


def field(name: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"'


CONFIG = (field(b"backbone"), orjson.dumps(THIN))
IMAGE = (field(b"image") + b'; filename="a"', SMALL)
FORMS = {
    "no part": (form(), "x"),
    "no boundary at the end": (form(CONFIG, IMAGE)[:-6], "x"),
    "another boundary": (form(CONFIG, IMAGE), "y"),
    "a boundary of 10 kB": (form(CONFIG, IMAGE, boundary=b"x" * 10_000)[:-9], "x" * 10_000),
    "5000 images": (form(CONFIG, *[IMAGE] * 5000), "x"),
    "5000 fields": (form(*[(field(b"pool"), b"avg")] * 5000), "x"),
    "9 images": (form(CONFIG, *[IMAGE] * 9), "x"),
    "2 tensors": (
        form(
            CONFIG, *[(field(b"tensor") + b'; filename="a"', npy(np.zeros((1, 3, 32, 32), np.float32)))] * 2
        ),
        "x",
    ),
    "an image and a tensor": (form(CONFIG, IMAGE, (field(b"tensor") + b'; filename="a"', b"x")), "x"),
    "an image as text": (form(CONFIG, (field(b"image"), b"no file")), "x"),
    "a part without a name": (form(CONFIG, IMAGE, (b"Content-Disposition: form-data", b"x")), "x"),
    "a part without a disposition": (form(CONFIG, IMAGE, (b"A: b", b"x")), "x"),
    "a part with a huge name": (form(CONFIG, IMAGE, (field(b"n" * 10**5), b"x")), "x"),
    "a part with a huge header": (form((CONFIG[0] + b"\r\nX-A: " + b"a" * 10**6, b"{"), IMAGE), "x"),
    "a part with many headers": (form((CONFIG[0] + b"\r\nX-A: a" * 10**4, b"{"), IMAGE), "x"),
    "a part with an empty name": (form(CONFIG, IMAGE, (field(b""), b"x")), "x"),
    "a part with a name of odd bytes": (form(CONFIG, IMAGE, (field(b"\xff\x00\n"), b"x")), "x"),
    "a part twice": (form(CONFIG, CONFIG, IMAGE), "x"),
    "a huge text": (form((CONFIG[0], b" " * 300_000), IMAGE), "x"),
    "a huge text as a file": (form((CONFIG[0] + b'; filename="a"', b" " * 300_000), IMAGE), "x"),
    "a text that is no UTF-8": (form((CONFIG[0] + b'; filename="a"', b"\xff\xfe"), IMAGE), "x"),
    "an unknown part": (form(CONFIG, IMAGE, (field(b"__proto__"), b"x")), "x"),
    "an unknown file": (form(CONFIG, IMAGE, (field(b"config") + b'; filename="../../x.py"', b"x")), "x"),
    "a charset that cannot decode": (form(CONFIG, IMAGE), "x; charset=undefined"),
    "a charset that fails": (form((CONFIG[0], b"+\xff\\"), IMAGE), "x; charset=punycode"),
    "a charset of surrogates": (form((field(b"+2AA-"), b"+2AA-"), IMAGE), "x; charset=utf-7"),
    "a charset of escapes": (form((CONFIG[0], b"\\ud800"), IMAGE), "x; charset=unicode_escape"),
    "a transfer encoding": (
        form((CONFIG[0] + b"\r\nContent-Transfer-Encoding: base64", b"e30="), IMAGE),
        "x",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_hostile_form_is_refused(besieged: Besieged, unmoved: None, name: str) -> None:
    body, boundary = FORMS[name]
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert_refused([besieged.http.post("/features", content=body, headers=headers)], 400, 404, 413, 415, 422)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary="',
        "multipart/form-data;;;",
        "multipart/form-data; boundary=\xe9", "application/json; charset=utf-7", "application/json, text/plain",
        ";", "/", "a" * 8000,
        "application/x-www-form-urlencoded", "image/", "image/svg+xml", "application/x-npy; x",
        "application/octet-stream",
        "APPLICATION/JSON", "multipart/form-data; boundary=x; boundary=y", "application/x-python-pickle", "*/*",
    ],
)  # fmt: skip
def test_a_content_type_of_any_kind_is_answered(besieged: Besieged, unmoved: None, content_type: str) -> None:
    for body in (b"", b"junk", b"{}", form(CONFIG)):
        for path in ("/features", "/backbones/inspect", "/models"):
            reply = besieged.http.post(
                path, content=body, headers={b"Content-Type": content_type.encode("latin-1")}
            )
            assert_refused([reply], 400, 415, 422)


BODIES = {
    "an empty object": b"{}",
    "no image": orjson.dumps({"backbone": THIN}),
    "null images": orjson.dumps({"backbone": THIN, "images": None}),
    "an object of images": orjson.dumps({"backbone": THIN, "images": {"0": {"base64": ""}}}),
    "empty base64": orjson.dumps({"backbone": THIN, "images": [{"base64": ""}]}),
    "base64 that is none": orjson.dumps({"backbone": THIN, "images": [{"base64": "\u00e9" * 100}]}),
    "base64 without padding": orjson.dumps({"backbone": THIN, "images": [{"base64": "AAAAA"}]}),
    "a data URL that is none": orjson.dumps({"backbone": THIN, "images": [{"base64": "data:text/html,<b>"}]}),
    "a data URL of text": orjson.dumps(
        {"backbone": THIN, "images": [{"base64": "data:text/plain;base64,aGVsbG8="}]}
    ),
    "a URL": orjson.dumps({"backbone": THIN, "images": [{"url": "http://169.254.169.254/latest"}]}),
    "a URL of a file": orjson.dumps({"backbone": THIN, "images": [{"url": "file:///etc/passwd"}]}),
    "a URL and base64": orjson.dumps(
        {"backbone": THIN, "images": [{"url": "https://x/y", "base64": "AAAA"}]}
    ),
    "9 images": orjson.dumps(
        {"backbone": THIN, "images": [{"base64": base64.b64encode(SMALL).decode()}] * 9}
    ),
    "10,000 images": orjson.dumps({"backbone": THIN, "images": [{"base64": "AAAA"}] * 10**4}),
    "an unknown key": orjson.dumps({"backbone": THIN, "images": [{"base64": "AAAA"}], "__class__": "x"}),
    "an unknown key of an image": orjson.dumps(
        {"backbone": THIN, "images": [{"base64": "AAAA", "path": "/etc/passwd"}]}
    ),
    "a lone surrogate": b'{"backbone": "\\ud800"}',
    "a NUL": b'{"backbone": "\\u0000", "images": [{"base64": "AAAA"}]}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "two documents": b"{}{}",
    "a string": b'"resnet50"',
    "null": b"null",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_json_body_is_refused(besieged: Besieged, unmoved: None, name: str) -> None:
    assert_refused(
        [besieged.http.post("/features", content=BODIES[name], headers=JSON)], 400, 404, 413, 415, 422
    )


def test_of_a_key_given_twice_in_json_only_one_counts_and_it_is_checked(
    besieged: Besieged, unmoved: None
) -> None:
    good, bad = orjson.dumps(THIN), b'{"type": "subprocess.Popen"}'
    replies = [
        besieged.http.post(
            "/backbones/inspect", content=b'{"backbone":' + one + b',"backbone":' + two + b"}", headers=JSON
        )
        for one, two in ((good, bad), (bad, good))
    ]
    assert [reply.status_code for reply in replies] == [404, 200]
    assert replies[1].json()["type"] == "mmpretrain.ResNet"


@pytest.mark.parametrize(
    "query",
    [
        "",
        "backbone=resnet50&backbone=resnet50",
        "backbone=resnet50&pool=avg&pool=max",
        "backbone=resnet50&evil=1",
        "backbone=resnet50&" + "&".join(f"key{number}=1" for number in range(2000)),
        "backbone=%7B",
        "backbone=%00",
        "backbone=%ff%fe",
        "backbone=..%2f..%2fx",
        "backbone=" + "a" * 30_000,
        "backbone[type]=ResNet",
        "backbone=%7B%22type%22%3A%22os.system%22%7D",
        "backbone=resnet50;pool=avg",
        "=&=&=",
        "&&&&",
        "%",
    ],
    ids=lambda query: query[:30],
)
def test_a_hostile_query_is_refused(besieged: Besieged, unmoved: None, query: str) -> None:
    reply = besieged.http.post(f"/features?{query}", content=SMALL, headers={"Content-Type": "image/png"})
    assert_refused([reply], 400, 404, 422)


def pickled() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return sink.getvalue()


def headed(header: str, data: bytes = b"") -> bytes:
    """A `.npy` with a header of one's own."""
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


GOOD_NPY = npy(np.zeros((1, 3, 32, 32), np.float32))
TENSORS = {
    "nothing": b"",
    "text": b"not an array",
    "a magic": b"\x93NUMPY",
    "a truncated one": GOOD_NPY[:-1],
    "a longer one": GOOD_NPY + b"\0",
    "objects": pickled(),
    "a shape of 10**12": headed(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, 1000000, 1000000)}"
    ),
    "a shape of 10**5000": headed(
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, {10**4000}, 1)}}"
    ),
    "a negative shape": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, -1, -1)}"),
    "a shape of nothing": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3, 9, 9)}"),
    "a shape of booleans": headed(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, True, True, True)}", bytes(4)
    ),
    "a header that is code": headed("__import__('os').system('id')"),
    "a header that calls": headed(
        "{'descr': open('/etc/passwd').read(), 'fortran_order': False, 'shape': ()}"
    ),
    "a header of brackets": headed("(" * 3000),
    "a long header": headed("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3, 9, 9)}" + " " * 30_000),
    "fields": headed("{'descr': [('a', '<f4'), ('b', 'O')], 'fortran_order': False, 'shape': (1, 3, 9, 9)}"),
    "another version": b"\x93NUMPY\x09\x00" + GOOD_NPY[8:],
    "float64": npy(np.zeros((1, 3, 32, 32))),
    "complex": npy(np.zeros((1, 3, 32, 32), np.complex64)),
    "strings": npy(np.zeros((1, 3, 9, 9), "U9")),
    "3 dimensions": npy(np.zeros((3, 32, 32), np.float32)),
    "33 dimensions": headed(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(1,) * 33}}}", bytes(4)),
    "4 channels": npy(np.zeros((1, 4, 32, 32), np.float32)),
    "NaN": npy(np.full((1, 3, 32, 32), np.nan, np.float32)),
    "9 images": npy(np.zeros((9, 3, 32, 32), np.float32)),
    "a zip": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_hostile_array_is_refused(besieged: Besieged, unmoved: None, name: str) -> None:
    query = {"backbone": json.dumps(THIN)}
    raw = besieged.http.post(
        "/features", content=TENSORS[name], params=query, headers={"Content-Type": "application/x-npy"}
    )
    assert_refused([raw], 400, 413, 415, 422)
    parts = {"tensor": ("a", TENSORS[name]), "backbone": (None, json.dumps(THIN))}
    assert_refused([besieged.http.post("/features", files=parts)], 400, 413, 415, 422)


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept": "," * 8000},
        {"Accept": "*/*;q=" + "9" * 4000},
        {"Accept": '"' * 4000},
        {"Accept": "\xff\xfe"},
        {"If-None-Match": "W/" * 4000},
        {"If-None-Match": '"' + "x" * 20_000},
        {"Range": "bytes=0-0,1-1"},
        {"X-HTTP-Method-Override": "DELETE"},
        {"X-Forwarded-For": "127.0.0.1," * 500},
        {"Authorization": "Bearer " + "k" * 10_000},
        {"Expect": "100-continue"},
        {"Content-Language": "\x80"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_header_is_no_crash(besieged: Besieged, unmoved: None, headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    reply = besieged.http.post("/features", headers=raw, **multipart(THIN, image=SMALL))
    assert reply.status_code in (200, 406)
    if reply.status_code != 200:
        assert_any_problem(reply)


def test_a_file_with_halves_of_characters_in_its_names_is_refused_in_whole_ones(besieged: Besieged) -> None:
    folder = besieged.outside / "checkpoints"
    torch.save({"conv1.weight": torch.zeros(1), "a\ud800": torch.zeros(1)}, folder / "half.pth")
    text = "a\ud800".encode("utf-8", "surrogatepass")
    named = b"\x8c" + bytes([len(text)]) + text
    (folder / "half.pkl").write_bytes(b"\x80\x04" + named + named + b"\x93.")  # a global of that name
    for name in ("half.pth", "half.pkl"):
        assert_refused([besieged.features({**THIN, "checkpoint": name})], 422)
