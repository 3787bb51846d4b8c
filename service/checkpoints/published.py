"""The names that libraries give to published checkpoints (`open-mmlab://NAME`, …), and the URLs behind them.

`open-mmlab.json` and `mmcls.json` are mmengine 0.10.7's tables; `torchvision.json` is written by
`make_catalogues`. A name of torchvision is a model's, which means its first weights, or has the weights after
a dot, as in mmengine: `resnet50.imagenet1k_v2`, `resnet50.default`; a slash will do. `detectron2.json` is the table
behind `catalog://NAME` (detectron2's `checkpoint/catalog.py`); `detectron2://PATH` is a path on its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Final, Literal

import orjson
from rapidfuzz import fuzz, process

Style = Literal["pytorch", "caffe"]

SCHEMES: Final[Mapping[str, str]] = {
    "open-mmlab:": "open-mmlab",
    "openmmlab:": "open-mmlab",
    "mmcls:": "mmcls",
    "torchvision:": "torchvision",
    "modelzoo:": "torchvision",  # mmengine's deprecated spelling
    "catalog:": "detectron2",
}
# Names that are a path below an address (detectron2's `utils/file_io.py`).
FOLDERS: Final[Mapping[str, str]] = {"detectron2:": "https://dl.fbaipublicfiles.com/detectron2/"}
# mmengine takes this off the names of such a file and drops the rest.
PREFIXES: Final[Mapping[str, str]] = {"mmcls:": "backbone."}
NEAREST: Final = 3
NEAREST_SCORE: Final = 50

_DETECTRON: Final = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/"
_DETECTRON2: Final = "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/"
# "MSRA models have STRIDE_IN_1X1=True. False otherwise" (detectron2's `checkpoint/catalog.py`).
_PRETRAINED: Final[Mapping[str, Style]] = {
    f"{_DETECTRON}MSRA/R-50.pkl": "caffe",
    f"{_DETECTRON}MSRA/R-101.pkl": "caffe",
    f"{_DETECTRON2}MSRA/R-50.pkl": "caffe",
    f"{_DETECTRON2}MSRA/R-101.pkl": "caffe",
    f"{_DETECTRON2}torchvision/R-50.pkl": "pytorch",
    f"{_DETECTRON2}FAIR/X-101-32x8d.pkl": "pytorch",
}
_RESIDUAL: Final = ("resnet", "resnext", "wide_resnet", "se-resnet")
_CAFFE: Final = (
    "detectron/resnet50_caffe",
    "detectron/resnet101_caffe",
    "detectron2/resnet50_caffe",
    "detectron2/resnet101_caffe",
)


def url_of(scheme: str, name: str) -> str | None:
    """The URL behind a name without its scheme (`open-mmlab:`), deprecated names too; None if unknown."""
    if scheme in FOLDERS:
        return FOLDERS[scheme] + name
    catalogue = SCHEMES[scheme]
    if catalogue == "torchvision":
        model, slash, weights = name.partition("/")
        name = f"{model}.{weights}".lower() if slash else name.lower()
    name = _read("aliases.json").get(catalogue, {}).get(name, name)
    return _urls(catalogue).get(name)


def nearest_names(scheme: str, name: str) -> list[str]:
    """The known names closest to one that is not, with their scheme."""
    known = _urls(SCHEMES[scheme])
    found = process.extract(name, list(known), scorer=fuzz.WRatio, limit=NEAREST, score_cutoff=NEAREST_SCORE)
    return [f"{scheme}//{choice}" for choice, _, _ in found]


def own_prefix(name: str, prefix: str | None) -> str | None:
    """The prefix of a checkpoint's keys: the one asked for, below the one that its scheme takes off itself."""
    outer = PREFIXES.get(name.partition("//")[0])
    if outer is None or (prefix is not None and prefix.rstrip(".") + "." == outer):
        return outer or prefix
    return outer + (prefix or "")


def style_of(name: str) -> Style | None:
    """Where the bottlenecks of a published ResNet stride: `pytorch` on the 3x3, `caffe` on the first 1x1.

    The two have the same names and shapes, so that a file cannot tell. None for everything else.

    Args:
        name: of the checkpoint, by its scheme or as the URL itself.
    """
    scheme, slashes, rest = name.partition("//")
    url = url_of(scheme, rest) if slashes and (scheme in SCHEMES or scheme in FOLDERS) else name
    return _styles().get(url or "")


@cache
def _styles() -> dict[str, Style]:
    residual = (
        url
        for catalogue in ("torchvision", "mmcls", "open-mmlab")
        for name, url in _urls(catalogue).items()
        if name.startswith(_RESIDUAL)
    )
    caffe: dict[str, Style] = {_urls("open-mmlab")[name]: "caffe" for name in _CAFFE}
    fair: dict[str, Style] = {
        url: "pytorch"
        for name, url in _urls("detectron2").items()
        if name.startswith("ImageNetPretrained/FAIR")
    }
    return {**dict.fromkeys(residual, "pytorch"), **fair, **caffe, **_PRETRAINED}


def _urls(catalogue: str) -> dict[str, str]:
    return _read(f"{catalogue}.json")


@cache
def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(
        resources.files("service.checkpoints").joinpath("catalogues", name).read_bytes()
    )
    return found
