"""What names of checkpoints lead to, before anything is opened or fetched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from service.checkpoints.names import FileName, HubName, RefusedNameError, UrlName, digest_in, parse_name
from service.config.spec import WeightsRef
from service.errors import CheckpointUnavailable


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("a.pth", FileName("a.pth", ("a.pth",))),
        ("deep/er/a.safetensors", FileName("deep/er/a.safetensors", ("deep", "er", "a.safetensors"))),
        ("hf-hub:timm/r18.a1", HubName("hf-hub:timm/r18.a1", "timm", "r18.a1", "main", None)),
        ("hf-hub:timm/r18@v1.0", HubName("hf-hub:timm/r18@v1.0", "timm", "r18", "v1.0", None)),
        ("hf-hub:o/n/x/y.bin", HubName("hf-hub:o/n/x/y.bin", "o", "n", "main", "x/y.bin")),
        (
            "https://Download.pytorch.org/models/r-0676ba61.pth",
            UrlName(
                "https://Download.pytorch.org/models/r-0676ba61.pth",
                "download.pytorch.org",
                "/models/r-0676ba61.pth",
                "r-0676ba61.pth",
                "0676ba61",
            ),
        ),
    ],
)
def test_names_are_taken_apart(name: str, parsed: object) -> None:
    assert parse_name(name) == parsed


@pytest.mark.parametrize(
    "name",
    [
        "",
        "http://download.pytorch.org/a.pth",
        "file:///etc/passwd",
        "file:a.pth",
        "s3://bucket/a.pth",
        "c:\\a.pth",
        "HTTPS://download.pytorch.org/a.pth",
        "https:download.pytorch.org/a.pth",
        "https://download.pytorch.org",
        "https://download.pytorch.org/",
        "https://user:password@download.pytorch.org/a.pth",
        "https://download.pytorch.org:8443/a.pth",
        "https://download.pytorch.org/a.pth?x=1",
        "https://download.pytorch.org/a.pth#x",
        "https://download.pytorch.org/%2e%2e/a.pth",
        "https://download.pytorch.org/x%2fa.pth",
        "https://download.pytorch.org/../a.pth",
        "https://download.pytorch.org//a.pth",
        "https://[::1]/a.pth",
        "https://[/a.pth",
        "https://exa mple/a.pth",
        "https://download.pytorch.org/a.exe",
        "hf-hub:",
        "hf-hub:only",
        "hf-hub:/name",
        "hf-hub:org/",
        "hf-hub:../name",
        "hf-hub:org/..",
        "hf-hub:org/a--b",
        "hf-hub:org/name@",
        "hf-hub:org/name@../x",
        "hf-hub:org/name/",
        "hf-hub:org/name/../x.bin",
        "hf-hub:org/name/config.json",
        "hf-hub:org/name/x.pickle",
        "hf-hub:org/name?x",
        "R-50.pickle",
        "detectron2:R-50.pkl",
        "detectron2://",
        "detectron2://R-50.txt",
        "detectron2://../R-50.pkl",
        "detectron2:///R-50.pkl",
        "detectron2://a/R-50.pkl?x=1",
        "detectron2://user@evil.example/../../R-50.pkl",
        "catalog:ImageNetPretrained/MSRA/R-50",
        "https://download.pytorch.org/a:b.pth",
        "https://download.pytorch.org/:b/a.pth",
        "a.txt",
        "a",
        "x" * 600 + ".pth",
    ],
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(RefusedNameError):
        parse_name(name)


def test_a_refused_scheme_lists_those_that_are_served() -> None:
    with pytest.raises(RefusedNameError, match=r"hf-hub:ORGANISATION/NAME, https://HOST/FILE"):
        parse_name("ftp://x/a.pth")


def test_a_refused_extension_says_which_are_served() -> None:
    with pytest.raises(RefusedNameError, match=r"'\.pickle' files are not served; .*\.safetensors.*\.pkl"):
        parse_name("R-50.pickle")


@pytest.mark.parametrize(
    ("file", "digest"),
    [
        ("resnet50-0676ba61.pth", "0676ba61"),
        ("resnet50_8xb32_in1k_20210831-ea4938fc.pth", "ea4938fc"),
        ("vit-in1k-384-20210928.pth", ""),
        ("resnet50-abc.pth", ""),
        ("model.safetensors", ""),
    ],
)
def test_the_digest_in_a_file_name_is_no_date(file: str, digest: str) -> None:
    assert digest_in(file) == digest


@pytest.fixture
def outside(directory: Path) -> Path:
    """A directory with an operator's file, and things around and in it that nobody may read."""
    (directory / "sub").mkdir()
    (directory / "sub" / "resnet50.pth").write_bytes(b"inside")
    secret = directory.parent / "secret.pth"
    secret.write_bytes(b"secret")
    (directory / "link.pth").symlink_to(secret)
    (directory / "out").symlink_to(directory.parent)
    (directory / "good.pth").symlink_to("sub/resnet50.pth")
    (directory / "loop.pth").symlink_to("loop.pth")
    (directory / "folder.pth").mkdir()
    (directory / ".hidden.pth").write_bytes(b"hidden")
    (directory / "hub").mkdir()
    (directory / "hub" / "raw.pth").write_bytes(b"unchecked")
    os.mkfifo(directory / "pipe.pth")
    return secret


@pytest.mark.parametrize(
    "name",
    [
        "../secret.pth",
        "sub/../../secret.pth",
        "sub/../sub/resnet50.pth",
        "link.pth",
        "out/secret.pth",
        "loop.pth",
        "folder.pth",
        "pipe.pth",
        ".hidden.pth",
        "hub/raw.pth",
        "~/secret.pth",
        "~root/secret.pth",
        "sub//resnet50.pth",
        "./sub/resnet50.pth",
        "sub\\resnet50.pth",
        "sub/resnet50.pth\x00.pth",
        "sub/resnet50.pth\n",
        "sub/resnet50.pth/x.pth",
        "nothing.pth",
        "é" * 200 + ".pth",
        "/etc/secret.pth",
    ],
)
def test_outside_and_not_there_have_one_text(outside, make_store, name: str) -> None:
    with pytest.raises(CheckpointUnavailable) as raised:
        make_store().resolve(WeightsRef(name, pointer="#/backbone/checkpoint"))
    fault = raised.value.faults[0]
    assert fault.pointer == "#/backbone/checkpoint"
    assert fault.detail.startswith("no checkpoint named ")
    assert str(outside.parent) not in raised.value.detail
    assert "secret" not in fault.detail.partition(";")[2]


def test_an_absolute_path_is_no_name_even_of_a_file_inside(outside, make_store, directory) -> None:
    with pytest.raises(CheckpointUnavailable, match="no checkpoint named"):
        make_store().resolve(WeightsRef(str(directory / "sub" / "resnet50.pth")))


def test_a_file_below_the_directory_resolves(outside, make_store, directory) -> None:
    file = make_store().resolve(WeightsRef("sub/resnet50.pth"))
    assert file.path.read_bytes() == b"inside"
    assert (file.source, file.name, file.size) == ("checkpoint", "sub/resnet50.pth", 6)
    assert file.sha256 == hashlib.sha256(b"inside").hexdigest()


def test_a_link_that_stays_inside_resolves(outside, make_store) -> None:
    assert make_store().resolve(WeightsRef("good.pth")).path.name == "resnet50.pth"


def test_a_mistyped_name_has_its_nearest(outside, make_store) -> None:
    with pytest.raises(CheckpointUnavailable, match=r"'resnet5.pth'; nearest: .*sub/resnet50\.pth"):
        make_store().resolve(WeightsRef("resnet5.pth"))


def test_a_directory_that_is_not_there_has_no_files(make_store, directory) -> None:
    directory.rmdir()
    with pytest.raises(CheckpointUnavailable, match=r"no checkpoint named 'a\.pth'$"):
        make_store().resolve(WeightsRef("a.pth"))


def test_the_digest_follows_the_file(make_store, directory) -> None:
    store = make_store()
    (directory / "a.pth").write_bytes(b"one")
    first = store.resolve(WeightsRef("a.pth"))
    assert store.resolve(WeightsRef("a.pth")) == first
    fresh = directory / "fresh"
    fresh.write_bytes(b"two")
    fresh.replace(directory / "a.pth")
    second = store.resolve(WeightsRef("a.pth"))
    assert second.sha256 != first.sha256
    assert second.identity != first.identity
