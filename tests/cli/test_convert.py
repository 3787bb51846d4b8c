"""`backbone-service convert`, as a process of its own, on files as other libraries write them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torchvision

from service.client import BackboneClient
from tests.cli.test_cli import run
from tests.conftest import Serve
from tests.parity.recipe import make_input


def swin(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "swin_t.pth"
    torch.save(torchvision.models.swin_t().state_dict(), path)
    return path


def test_a_converted_file_gives_the_features_of_the_one_it_was_made_of(tmp_path: Path, serve: Serve) -> None:
    source, target = swin(tmp_path), tmp_path / "swin_t_mm.safetensors"
    done = run("convert", "--to", "mmpretrain", "--prefix", "backbone.", str(source), str(target))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "SwinTransformer: 171 tensors from torchvision's names to mmpretrain's; left out: "
    )
    theirs = {"type": "torchvision.swin_t", "checkpoint": source.name, "return_nodes": {"norm": "last"}}
    given = {"type": "Pretrained", "checkpoint": target.name, "prefix": "backbone."}
    ours = {"type": "SwinTransformer", "arch": "tiny", "init_cfg": given}
    direct = {"type": "SwinTransformer", "arch": "tiny", "checkpoint": source.name}
    images = make_input("input", (1, 3, 224, 224))
    with BackboneClient(serve().url, timeout_s=120) as client:
        replies = [client.features(backbone=backbone, tensor=images) for backbone in (theirs, ours, direct)]
    expected, converted, read = (next(iter(reply.arrays.values())) for reply in replies)
    np.testing.assert_array_equal(read, converted)
    # torchvision gives it with the channels last until the end.
    assert np.linalg.norm(converted - expected) / np.linalg.norm(expected) < 1e-5
    assert replies[2].model["weights"]["layout"] == "torchvision"
    assert "layout" not in replies[1].model["weights"]


def test_a_conversion_and_its_return_give_the_same_tensors(tmp_path: Path) -> None:
    source = swin(tmp_path)
    for library, name in (
        ("timm", "t.pth"),
        ("official", "o.safetensors"),
        ("torchvision", "back.safetensors"),
    ):
        target = tmp_path / name
        assert run("convert", "--to", library, str(source), str(target)).returncode == 0
        source = target
    before = torch.load(tmp_path / "swin_t.pth", weights_only=True)
    after = safetensors.torch.load_file(source)
    assert after.keys() < before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_what_is_asked_for_wrongly_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    source, target = swin(tmp_path), tmp_path / "out.safetensors"
    unknown = tmp_path / "unknown.safetensors"
    safetensors.torch.save_file({"a.weight": torch.zeros(1)}, unknown)
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    cases = (
        (("--to", "caffe", str(source), str(target)), 2, "--to: 'caffe' is none of "),
        (("--to", "detectron2", str(source), str(target)), 1, "detectron2 has no names for SwinTransformer"),
        (("--to", "timm", "--from", "detectron2", str(source), str(target)), 1, "detectron2's names"),
        (("--to", "timm", str(unknown), str(target)), 1, "is not a network that is known"),
        (("--to", "timm", str(tmp_path / "broken.pth"), str(target)), 1, "is not a whole checkpoint file"),
        (("--to", "timm", str(tmp_path / "none.pth"), str(target)), 1, "no file "),
        (("--to", "timm", str(source), str(tmp_path / "out.npz")), 1, "the output is one of .safetensors"),
        (("--to", "timm", str(source), str(unknown)), 1, "unknown.safetensors is there already"),
        (("--to", "timm", str(source), str(tmp_path / "none" / "out.pth")), 1, "No such file or directory"),
    )
    before = sorted(os.listdir(tmp_path))
    for arguments, status, text in cases:
        done = run("convert", *arguments)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.startswith("backbone-service: ")
        assert text in done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
