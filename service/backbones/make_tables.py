"""Writes the tables of timm's and torchvision's models that ship with the service.

    python -m service.backbones.make_tables [timm|torchvision ...]

Every model is built on the meta device and run once there: no weights, about ten minutes on one core.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import nn

TABLES = Path(__file__).parent / "tables"
Row = dict[str, Any]


def write(name: str, rows: Mapping[str, Any]) -> None:
    """One line a row, so that a new version of a library makes a readable difference."""
    lines = (orjson.dumps(key) + b":" + orjson.dumps(row) for key, row in rows.items())
    TABLES.mkdir(exist_ok=True)
    (TABLES / name).write_bytes(b"{\n" + b",\n".join(lines) + b"\n}\n")


def timm_tables() -> None:
    """`timm.json` and `timm-renamed.json`."""
    import timm
    from timm.models import get_deprecated_models

    rows = {}
    for position, name in enumerate(timm.list_models()):
        rows[name] = timm_row(name)
        if position % 50 == 0:
            gc.collect()
            sys.stderr.write(f"{position} {name}\n")
    write("timm.json", rows)
    renamed = {old: new for old, new in get_deprecated_models().items() if new}
    write("timm-renamed.json", dict(sorted(renamed.items())))


def timm_row(name: str) -> Row:
    """What the table says of one architecture."""
    import timm
    from timm.models import model_entrypoint

    cfg: Any = timm.get_pretrained_cfg(name)
    tags = _timm_tags(name)
    size = list(cfg.input_size[1:])
    row: Row = {"module": model_entrypoint(name).__module__.rpartition(".")[2], "tags": tags}
    if any(_is_another_network(timm.get_pretrained_cfg(f"{name}.{tag}"), cfg) for tag in tags):
        raise ValueError(f"the tags of {name} are for several networks; the families take them for one")
    try:
        return row | _timm_facts(name, (size[0], size[1]), row["module"], fixed=cfg.fixed_input_size)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return row | _refused(row, "its shapes depend on the numbers in its input")


def _refused(row: Row, reason: str) -> Row:
    return {"summary": f"timm {row['module']}, not served", "unsupported": reason}


def _timm_tags(name: str) -> list[str]:
    """Its pretrained tags, timm's default first."""
    from timm.models import get_arch_pretrained_cfgs

    tags = [full.partition(".")[2] for full in get_arch_pretrained_cfgs(name)]
    return [tag for tag in tags if tag]


def _is_another_network(cfg: Any, default: Any) -> bool:
    """Whether timm builds something else for these weights than for the default ones, or not for RGB."""
    resized = cfg.fixed_input_size and cfg.input_size != default.input_size
    return bool(resized or cfg.input_size[0] != 3)


def _timm_facts(name: str, size: tuple[int, int], module: str, *, fixed: bool) -> Row:
    from service.backbones.building import SkipInitialisers, size_of
    from service.backbones.timm_creation import Architecture, Capture
    from service.backbones.timm_network import assemble, feature_indices

    architecture = Architecture(name, features_only=True, arguments=(), in_channels=3, size=size)
    with torch.device("meta"), SkipInitialisers(), torch.inference_mode():
        indices = feature_indices(architecture)
        backbone = assemble(architecture, Capture(), indices)
        outputs = backbone(torch.empty(1, 3, *size), [feature.node for feature in backbone.features])
    shapes = [list(output.shape[2:]) for output in outputs.values()]
    channels = [feature.channels for feature in backbone.features]
    if [output.shape[1] for output in outputs.values()] != channels:
        raise ValueError(f"{name} says {channels} channels and gives {list(outputs.values())}")
    strides = [feature.stride for feature in backbone.features]
    counted = size_of(backbone)
    return {
        "summary": _timm_summary(module, counted.parameters, size, strides),
        "channels": channels,
        "strides": strides,
        "shapes": shapes,
        "default": _timm_default(name),
        "size": list(size),
        "fixed": bool(fixed),
        "parameters": counted.parameters,
        "tensors": counted.tensors,
        "bytes": counted.bytes,
    } | ({} if indices[0] == 0 else {"indices": indices})


def _timm_summary(module: str, parameters: int, size: tuple[int, int], strides: list[int | None]) -> str:
    given = ", ".join(str(stride) for stride in sorted({stride for stride in strides if stride}))
    height, width = size
    maps = f"{len(strides)} maps of stride {given}"
    return f"timm {module}, {parameters / 1e6:.1f} M parameters, {height}x{width}, {maps}"


def _timm_default(name: str) -> list[int]:
    """The indices that timm returns when none are asked for."""
    import timm

    with torch.device("meta"):
        info: Any = timm.create_model(name, features_only=True).feature_info
    return [index % len(info) for index in info.out_indices]


# --- torchvision ----------------------------------------------------------------------------------

# Modules that hold the stages of a network, where it does not hold them itself.
STAGE_HOLDERS = ("features", "trunk_output", "blocks", "layers")
USUAL_STRIDES = (4, 8, 16, 32)
# Keys that some builders take, the modules where they mean something (others swallow them), a value to try.
BUILDER_KEYS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "replace_stride_with_dilation": (("resnet",), (False, False, True)),
    "norm_layer": (("efficientnet", "mobilenetv2", "mobilenetv3", "regnet", "resnet"), nn.BatchNorm2d),
    "image_size": (("vision_transformer",), 448),
    "transform_input": (("googlenet", "inception"), True),
}


def torchvision_tables() -> None:
    """`torchvision.json`, in two steps: the second asks the family, which reads the first."""
    from torchvision import models

    from service.backbones.tables import torchvision_models

    rows = {name: _torchvision_facts(name) for name in models.list_models(module=models)}
    write("torchvision.json", rows)
    torchvision_models.cache_clear()
    for name, row in rows.items():
        row["features"] = _torchvision_features(name, row["module"])
        nodes = ", ".join(feature[0] for feature in row["features"])
        millions = f"{row['parameters'] / 1e6:.1f} M parameters"
        row["summary"] = f"torchvision {row['module']}, {millions}, {nodes} by default"
    write("torchvision.json", rows)


def _torchvision_facts(name: str) -> Row:
    from torchvision.models import get_model_weights

    from service.backbones import torchvision as family
    from service.backbones.building import size_of

    weights: Any = get_model_weights(name)
    members = [member.name for member in weights]
    default = weights.DEFAULT.name
    module = family.torchvision_module(name)
    net = family.twin(family.Architecture(name)).net
    counted = size_of(net)
    image_size = getattr(net, "image_size", None) or weights[members[0]].transforms().crop_size[0]
    return {
        "module": module,
        "summary": "",
        "features": [],
        "size": [image_size, image_size],
        "fixed": _takes_one_size(net),
        "keys": [key for key in BUILDER_KEYS if _takes(name, module, key)],
        "weights_class": weights.__name__,
        "weights": [default, *(member for member in members if member != default)],
        "parameters": counted.parameters,
        "tensors": counted.tensors,
        "bytes": counted.bytes,
    }


def _takes_one_size(net: nn.Module) -> bool:
    from service.backbones.torchvision import PROBE_SIZE

    try:
        with torch.inference_mode(), torch.device("meta"):
            net(torch.empty(1, 3, *PROBE_SIZE))
    except (RuntimeError, AssertionError):
        return True
    return False


def _takes(name: str, module: str, key: str) -> bool:
    from torchvision.models import get_model

    modules, value = BUILDER_KEYS[key]
    if module not in modules:
        return False
    try:
        with torch.device("meta"):
            get_model(name, weights=None, **{key: value})
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def _torchvision_features(name: str, module: str) -> list[list[Any]]:
    """The last module of each usual stride; the tokens of a vision transformer."""
    from service.backbones import torchvision as family

    architecture = family.Architecture(name)
    if module == "vision_transformer":
        chosen = family.node_features(architecture, ["encoder.ln"])
    else:
        candidates = _stages(family.twin(architecture).net)
        maps = {f.stride: f for f in family.node_features(architecture, candidates) if f.layout == "NCHW"}
        chosen = tuple(maps[stride] for stride in USUAL_STRIDES if stride in maps)
    return [[f.node, f.channels, f.stride, f.layout, f.shape] for f in chosen]


def _stages(net: nn.Module) -> list[str]:
    holders = [(holder, child) for holder, child in net.named_children() if holder in STAGE_HOLDERS]
    inner = [f"{holder}.{name}" for holder, child in holders for name, _ in child.named_children()]
    if inner:
        return inner
    heads = ("avgpool", "fc", "classifier", "dropout", "aux1", "aux2", "AuxLogits")
    return [name for name, _ in net.named_children() if name not in heads]


MAKERS: Mapping[str, Callable[[], None]] = {"timm": timm_tables, "torchvision": torchvision_tables}


def main() -> None:
    """Write the tables named on the command line, by default all."""
    for library in sys.argv[1:] or MAKERS:
        MAKERS[library]()


if __name__ == "__main__":
    main()
