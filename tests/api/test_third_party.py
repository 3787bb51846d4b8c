"""Backbones of other packages: found by their entry points, served as the shipped ones are."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.client import BackboneClient
from tests.api.problems import assert_problem, pointers
from tests.conftest import ROOT, RunningService, Serve, multipart

DOCUMENT = (ROOT / "docs" / "add-a-backbone.md").read_text()
# The document's own example is what is installed and served here.
[TINY_NET] = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
SHAPES = [[1, 4, 16, 24], [1, 8, 8, 12]]
Install = Callable[..., Path]


def write_package(folder: Path, name: str, source: str, entry_points: dict[str, str]) -> None:
    """Lay a package out as an installer would."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    lines = [f"{type_name} = {value}" for type_name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[backbone_service.backbones]", *lines, ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages can be put into, and that Python finds them in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def tiny(site: Path, serve: Serve) -> RunningService:
    """A service beside which TinyNet is installed."""
    write_package(site, "acme_tinynet", TINY_NET, {"acme.TinyNet": "acme_tinynet:FAMILY"})
    return serve()


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, 32, 48), np.float32)


def expected_maps(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    network = importlib.import_module("acme_tinynet").TinyNet(4)
    network.load_state_dict(state)
    with torch.inference_mode():
        return {node: maps.numpy() for node, maps in network(torch.from_numpy(images()), ["0", "1"]).items()}


def trained() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "stage1.weight": (4, 3, 3, 3),
        "stage1.bias": (4,),
        "stage2.weight": (8, 4, 3, 3),
        "stage2.bias": (8,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_type_of_another_package_is_listed_and_described(tiny: RunningService) -> None:
    listed = tiny.http.get("/backbones", params={"scope": "acme"}).json()
    assert listed["types"] == [
        {
            "type": "acme.TinyNet",
            "scope": "acme",
            "aliases": [],
            "summary": "from the package acme-tinynet",
            "href": "/backbones/acme.TinyNet",
        }
    ]
    page = tiny.http.get("/backbones/acme.TinyNet").json()
    assert page["indices"] == {"permitted": [0, 1], "default": [0, 1]}
    assert page["schema"]["properties"]["width"]["maximum"] == 64
    assert page["example"] == {"type": "acme.TinyNet", "width": 8}
    assert "acme.TinyNet" in tiny.http.get("/backbones/acme.TinyNets").json()["nearest"]


def test_it_is_inspected_as_it_is_served(tiny: RunningService) -> None:
    config = {"type": "acme.TinyNet", "frozen_stages": 1, "out_indices": [1, 0]}
    with BackboneClient(tiny.url) as client:
        inspected = client.inspect(config, input_size=(32, 48))
        features = client.features(backbone=config, tensor=images())
    assert [level["shape"] for level in inspected["levels"]] == SHAPES
    assert inspected["frozen"]["parameters"] == ["stage1.weight", "stage1.bias"]
    assert [list(level.shape) for level in features.levels.values()] == SHAPES
    assert [level.stride for level in features.levels.values()] == [2, 4]
    assert features.model["weights"]["source"] == "random"
    assert features.model["frozen"] == {"stages": 1, "parameters": 2, "of": 4}


def test_its_views_share_a_model_and_the_scope_may_be_left_out(tiny: RunningService) -> None:
    configs: list[dict[str, Any]] = [
        {"type": "acme.TinyNet"},
        {"type": "TinyNet", "out_indices": [1]},
        {"type": "TinyNet", "strides": [2], "frozen_stages": 2},
    ]
    replies = [tiny.http.post("/features", **multipart(config, tensor=images())) for config in configs]
    assert [reply.status_code for reply in replies] == [200] * 3
    assert len({reply.headers["x-model-id"] for reply in replies}) == 1


def test_its_checkpoint_is_loaded_strictly(tiny: RunningService, tmp_path: Path) -> None:
    state = trained()
    torch.save(
        {"state_dict": {f"backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pth"
    )
    torch.save({name: tensor for name, tensor in state.items() if name != "stage2.bias"}, tmp_path / "b.pth")
    config = {"type": "acme.TinyNet", "checkpoint": "a.pth"}
    with BackboneClient(tiny.url) as client:
        features = client.features(backbone=config, tensor=images())
    assert features.model["weights"]["loaded"] == 4
    assert features.model["weights"]["missing"] == features.model["weights"]["unexpected"] == []
    for name, maps in expected_maps(state).items():
        np.testing.assert_allclose(features.arrays[name], maps, rtol=1e-5, atol=1e-6)
    refused = tiny.http.post("/features", **multipart({**config, "checkpoint": "b.pth"}, tensor=images()))
    assert assert_problem(refused, 422, "checkpoint-mismatch")["missing"] == ["stage2.bias"]


def test_its_parameters_are_checked(tiny: RunningService) -> None:
    for key, value in (("width", 65), ("depth", 50), ("out_indices", [2])):
        refused = tiny.http.post(
            "/backbones/inspect", json={"backbone": {"type": "acme.TinyNet", key: value}}
        )
        assert pointers(assert_problem(refused, 422))[0].startswith(f"#/backbone/{key}")


def test_a_bare_name_of_two_packages_is_ambiguous(site: Path, serve: Serve) -> None:
    write_package(site, "acme_tinynet", TINY_NET, {"acme.TinyNet": "acme_tinynet:FAMILY"})
    write_package(site, "zoo_tinynet", TINY_NET, {"zoo.TinyNet": "zoo_tinynet:FAMILY"})
    http = serve().http
    body = assert_problem(http.post("/backbones/inspect", json={"backbone": {"type": "TinyNet"}}), 422)
    assert pointers(body) == ["#/backbone/type"]
    assert "acme.TinyNet" in body["detail"]
    assert "zoo.TinyNet" in body["detail"]
    for type_name in ("acme.TinyNet", "zoo.TinyNet"):
        reply = http.post("/backbones/inspect", json={"backbone": {"type": type_name}})
        assert reply.json()["type"] == type_name


BROKEN = {
    "import": ("import a_package_that_nobody_has\n", "broken_net:FAMILY"),
    "syntax": ("def (\n", "broken_net:FAMILY"),
    "exit": ("raise RuntimeError('secret')\n", "broken_net:FAMILY"),
    "attribute": ("OTHER = 1\n", "broken_net:FAMILY"),
    "class": ("FAMILY = 'not a family'\n", "broken_net:FAMILY"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_package_that_cannot_be_loaded_takes_no_other_type_with_it(
    kind: str, site: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    source, value = BROKEN[kind]
    write_package(site, "broken_net", source, {"acme.Broken": value})
    write_package(site, "acme_tinynet", TINY_NET, {"acme.TinyNet": "acme_tinynet:FAMILY"})
    http = serve().http
    refusals = [
        http.post("/backbones/inspect", json={"backbone": {"type": "acme.Broken"}}),
        http.post("/features", **multipart({"type": "Broken"}, tensor=images())),
        http.get("/backbones/acme.Broken"),
    ]
    for refused in refusals:
        body = assert_problem(refused, 422, "invalid-config")
        assert "acme.Broken is not served" in body["detail"]
        assert "secret" not in refused.text
        assert "broken_net" not in refused.text
    assert any("acme.Broken cannot be loaded from broken_net:FAMILY" in text for text in caplog.messages)
    for type_name in ("acme.TinyNet", "timm.resnet18"):
        assert http.get(f"/backbones/{type_name}").status_code == 200
    assert http.get("/backbones", params={"search": "acme"}).json()["total"] == 2


@pytest.mark.parametrize(
    ("type_name", "said"),
    [
        ("mmpretrain.ResNet", "mmpretrain.ResNet is registered twice"),
        ("mmcls.VisionTransformer", "mmcls.VisionTransformer is registered twice"),
        ("timm.resnet50", "timm.resnet50 is registered twice"),
        ("TinyNet", "one is written scope.Name"),
    ],
)
def test_a_name_that_cannot_be_told_apart_keeps_the_service_from_starting(
    type_name: str, said: str, site: Path
) -> None:
    write_package(site, "acme_tinynet", TINY_NET, {type_name: "acme_tinynet:FAMILY"})
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(site), "BACKBONE_CHECKPOINT_DIR": str(site)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "acme_tinynet:FAMILY" in ended.stderr
    assert "Traceback" not in ended.stderr
