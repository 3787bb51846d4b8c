"""Neutral facts that the rooms hand to each other. No library's spelling gets past this point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# NCL are tokens whose channels come first, as MlpMixer gives them.
Layout = Literal["NCHW", "NLC", "NCL", "NC"]
# What a forward pass computes in.
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class FeatureInfo:
    """One feature that a backbone can give.

    `node` is what `Backbone.forward` calls it. `stride` is the nominal reduction of a map in input pixels,
    None for tokens and vectors. `shape`, where it is known without building, is that of one image at the
    description's input size, without the batch dimension.
    """

    index: int
    node: str
    channels: int
    stride: int | None
    layout: Layout
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Level:
    """One feature of a reply: `name` on the wire (`3`, `4.cls`, `p2`), `node` in the backbone."""

    index: int
    name: str
    node: str


@dataclass(frozen=True)
class Freeze:
    """What to freeze, in the numbers of the config's own library.

    `stages` is None where a config freezes nothing. `to_index` (timm types) freezes everything that the
    feature of this index depends on. `norm_eval` puts every batch norm into eval mode. `all_norms` takes the
    gradient from the weight and bias of every norm layer. `constant` are modules and parameters that the network
    never trains, frozen or not.
    """

    stages: int | None = None
    to_index: int | None = None
    norm_eval: bool = False
    all_norms: bool = False
    constant: tuple[str, ...] = ()


@dataclass(frozen=True)
class FreezeReport:
    """What is frozen: parameter names without gradient, norm layers kept in eval mode, out of `of` parameters."""

    stages: int | None
    parameters: tuple[str, ...]
    norms: tuple[str, ...]
    of: int


@dataclass(frozen=True)
class WeightsRef:
    """Weights as a config names them.

    `name` is a file of the checkpoint directory or a scheme (`hf-hub:org/name`, `timm://resnet50.a1_in1k`,
    `torchvision://resnet50/IMAGENET1K_V2`); `prefix` is stripped from its keys; `pointer` says which
    key of the request to blame.
    """

    name: str
    prefix: str | None = None
    pointer: str = "#/backbone/init_cfg/checkpoint"


@dataclass(frozen=True)
class LoadedKeys:
    """How a checkpoint went into a network: every key of either side is accounted for.

    `loaded` counts the entries of the network that were filled, `missing` are entries that the file has not
    (`num_batches_tracked` is never counted), `unexpected` are keys of the file that the network has no use for.
    `prefix` is what was stripped. `layout` is the library whose names the file has, empty where they are the
    network's own.
    """

    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    prefix: str = ""
    layout: str = ""


@dataclass(frozen=True)
class PreprocessDefaults:
    """What a checkpoint or an architecture asks of its input images; None where it does not say.

    `size` is [height, width] in pixels; `mean` and `std` are RGB in units of 0–1.
    """

    size: tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Description:
    """What is known of an architecture without its weights: features, size, and the input it is made for.

    `parameters` counts numbers, `tensors` the parameters they are in (0 where nobody counted); `bytes` is
    parameters and buffers. `prefix_tokens` says how many tokens of an NLC feature come before those of the
    patches; the first of them is the class token.
    """

    features: tuple[FeatureInfo, ...]
    parameters: int
    bytes: int
    in_channels: int
    input: PreprocessDefaults
    fixed_input: bool = False
    tensors: int = 0
    prefix_tokens: int = 0
