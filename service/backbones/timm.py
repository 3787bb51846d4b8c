"""timm's models: `timm.<model>` and `<model>.<tag>`, and OpenMMLab's `TIMMBackbone` around them.

A model is built once with every feature that timm's `features_only` can give, so that configs that differ in
`out_indices` share it; `forward` runs no deeper than the deepest feature asked for. Features are numbered as timm
numbers them (0 is the stem of a ResNet) and always come as [n, c, h, w], also where timm gives [n, h, w, c].

Checkpoints have the names of the whole timm model. They go in through timm's own conversion (old names, first
convolution for other channel counts, position embeddings of other sizes), and every key is accounted for.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, StrictBool, model_validator
from rapidfuzz import process
from torch import Tensor, nn

from service.backbones import dependencies
from service.backbones.base import (
    MAX_INDICES,
    Backbone,
    BackboneConfig,
    Family,
    Index,
    levels_by_index,
)
from service.backbones.dependencies import SkipInitialisers
from service.backbones.tables import TimmEntry, timm_models, timm_renamed
from service.checkpoints.keys import strip_prefix
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    LoadedKeys,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import CheckpointMismatch, InvalidConfig, UnknownBackbone

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

NAMED_KEYS = 8
FROZEN_BATCH_NORM = "FrozenBatchNorm2d"

# Norms by the names that timm's and OpenMMLab's users write; the values are timm's own names for them.
NORM_LAYERS = {
    "BN": "batchnorm2d", "BN2d": "batchnorm2d", "BatchNorm2d": "batchnorm2d",
    "GN": "groupnorm", "GroupNorm": "groupnorm", "GroupNorm1": "groupnorm1",
    "LN": "layernorm", "LayerNorm": "layernorm", "LN2d": "layernorm2d", "LayerNorm2d": "layernorm2d",
    "RmsNorm": "rmsnorm", "RmsNorm2d": "rmsnorm2d",
}  # fmt: skip
NormName = Literal[
    "FrozenBatchNorm2d", "BN", "BN2d", "BatchNorm2d", "GN", "GroupNorm", "GroupNorm1",
    "LN", "LayerNorm", "LN2d", "LayerNorm2d", "RmsNorm", "RmsNorm2d",
]  # fmt: skip
ActName = Literal[
    "silu", "swish", "mish", "relu", "relu6", "leaky_relu", "elu", "celu", "selu",
    "gelu", "gelu_tanh", "quick_gelu", "sigmoid", "tanh", "hard_sigmoid", "hard_swish", "hard_mish",
]  # fmt: skip
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Side = Annotated[int, Field(strict=True, ge=1, le=2048)]
Chans = Annotated[int, Field(strict=True, ge=1, le=64)]
LastN = Annotated[int, Field(strict=True, ge=1, le=MAX_INDICES)]
IndexList = Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_INDICES)]

# What timm's constructors raise when they are given arguments that they cannot build from.
CONSTRUCTOR_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    NotImplementedError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
# Networks that list positions in Python when they are built or run: their time grows steeply with the side.
SLOW_WITH_SIZE = frozenset({"efficientvit_msra", "maxxvit", "sequencer", "tiny_vit"})
MAX_SLOW_SIDE = 512
STEM_NAMES = ("patch_embed.", "patch_embeds.0.", "stem.")


@dataclass(frozen=True)
class Architecture:
    """What timm builds, hashable.

    Attributes:
        name: `arch` or `arch.tag`, as timm spells it now.
        arguments: what is given to timm's constructor, as plain JSON values.
        size: [height, width] of the input it is made for, in pixels.
        pretrained: whether timm would be asked for its own weights, which changes the network of `fbnetc_100`.
    """

    name: str
    features_only: bool
    arguments: tuple[tuple[str, Any], ...]
    in_channels: int
    size: tuple[int, int]
    pretrained: bool = False

    @property
    def entry_name(self) -> str:
        """The name without its tag."""
        return self.name.partition(".")[0]


# --- configs --------------------------------------------------------------------------------------


class _TimmArguments(BackboneConfig):
    """The parameters that `timm.create_model` and OpenMMLab's wrapper of it have in common."""

    VIEW: ClassVar[frozenset[str]] = BackboneConfig.VIEW | {
        "out_indices",
        "pretrained",
        "checkpoint_path",
        "drop_rate",
        "drop_path_rate",
        "attn_drop_rate",
        "proj_drop_rate",
        "pos_drop_rate",
        "num_classes",
        "global_pool",
        "frozen_stages",
        "freeze_to_index",
    }
    # Config key → timm's constructor argument, for the keys that change the network.
    ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "img_size",
        "output_stride",
        "dynamic_img_size",
        "dynamic_img_pad",
        "strict_img_size",
        "always_partition",
        "act_layer",
        "norm_layer",
    )
    CHANNELS_KEY: ClassVar[str] = "in_chans"
    NAME_KEY: ClassVar[str] = "type"

    features_only: StrictBool = True
    pretrained: StrictBool = Field(
        False, description="timm's own weights for the tag, or for its default tag."
    )
    out_indices: LastN | IndexList | None = Field(
        None,
        description="Features to return, in this order; negative ones count from the end; n means the last n.",
    )
    img_size: Side | tuple[Side, Side] | None = Field(None, description="Input size, for models that fix it.")
    output_stride: Literal[8, 16, 32] | None = None
    dynamic_img_size: StrictBool | None = None
    dynamic_img_pad: StrictBool | None = None
    strict_img_size: StrictBool | None = None
    always_partition: StrictBool | None = None
    act_layer: ActName | None = None
    norm_layer: NormName | None = Field(
        None,
        description="FrozenBatchNorm2d keeps the model's own norms and counts its batch norms as frozen.",
    )
    drop_rate: Rate | None = Field(None, description="No effect: features are computed in eval mode.")
    drop_path_rate: Rate | None = Field(None, description="No effect in eval mode.")
    attn_drop_rate: Rate | None = Field(None, description="No effect in eval mode.")
    proj_drop_rate: Rate | None = Field(None, description="No effect in eval mode.")
    pos_drop_rate: Rate | None = Field(None, description="No effect in eval mode.")
    num_classes: Annotated[int, Field(strict=True, ge=0, le=100_000)] | None = Field(
        None, description="No effect: the classifier is left out."
    )
    global_pool: Annotated[str, Field(pattern=r"^[a-z0-9_]{0,32}$")] | None = Field(
        None, description="No effect: features are not pooled."
    )
    checkpoint_path: Annotated[str, Field(max_length=512)] = Field("", description="Short for checkpoint.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=MAX_INDICES)] | None = Field(
        None, description="-1 none, 0 the stem, k the stem and k stages."
    )
    freeze_to_index: Annotated[int, Field(strict=True, ge=0, le=1024)] | None = Field(
        None, description="Freeze everything that the feature of this index depends on."
    )

    @model_validator(mode="after")
    def _known_model(self) -> _TimmArguments:
        _resolve(self.written_name(), f"#/backbone/{self.NAME_KEY}")
        return self

    def written_name(self) -> str:
        """The model's name as the client wrote it."""
        raise NotImplementedError

    def channels(self) -> int:
        """How many channels the images have."""
        raise NotImplementedError

    def name(self) -> str:
        """`arch` or `arch.tag`, as timm spells it now."""
        return _resolve(self.written_name(), f"#/backbone/{self.NAME_KEY}")

    def entry(self) -> TimmEntry:
        """What the table knows of the architecture."""
        return timm_models()[self.name().partition(".")[0]]

    def arguments(self) -> dict[str, Any]:
        """What timm's constructor is given beside the channel count; empty for the model as timm defines it."""
        dumped = self.model_dump(include=set(self.ARGUMENTS), exclude_none=True)
        if dumped.get("norm_layer") == FROZEN_BATCH_NORM:
            # Its numbers are those of the model's own norms in eval mode, and few timm models build with it.
            del dumped["norm_layer"]
        if self.img_size is not None:
            height, width = self._size()
            dumped["img_size"] = height if height == width else (height, width)
        return dumped

    def is_default(self) -> bool:
        """Whether the network is the one that the table describes."""
        return self.features_only and not self.arguments() and self.channels() == 3

    def architecture(self) -> dict[str, Any]:
        """The network; the same for every spelling of it."""
        # A tag names weights; but it may choose the pooling of a whole model, and with it which norms there are.
        name = self.entry().name if self.features_only else self.name()
        facts = {"type": f"timm.{name}", "features_only": self.features_only, "in_chans": self.channels()}
        if _follows_pretrained(name):
            facts["pretrained"] = self.pretrained
        return facts | self.arguments()

    def built(self) -> Architecture:
        """The network as `build` wants it."""
        arguments = tuple(sorted(self.arguments().items()))
        return Architecture(
            self.name(),
            self.features_only,
            arguments,
            self.channels(),
            self._size(),
            pretrained=self.pretrained,
        )

    def _size(self) -> tuple[int, int]:
        if self.img_size is None:
            return self.entry().size
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    def takes_one_size(self) -> bool:
        """Whether images of another size than the network's own are refused by it."""
        return self.entry().fixed and not self.dynamic_img_size and self.strict_img_size is not False

    def weights(self) -> WeightsRef | None:
        """timm's own weights, or the checkpoint named.

        Raises:
            InvalidConfig: several sources, or `pretrained` for a tag without weights on the hub.
        """
        named = super().weights()
        if self.checkpoint_path:
            _refuse_second(named, "checkpoint_path")
            named = WeightsRef(self.checkpoint_path, pointer="#/backbone/checkpoint_path")
        if self.pretrained:
            _refuse_second(named, "pretrained")
            return WeightsRef(_hub_name(self.name()), pointer="#/backbone/pretrained")
        return named

    def freeze(self) -> Freeze:
        """Up to a stage, up to a feature, or the batch norms."""
        stages = self.frozen_stages if self.frozen_stages != -1 else None
        if self.freeze_to_index is not None and self.frozen_stages is not None:
            raise InvalidConfig(
                "#/backbone/freeze_to_index", "give frozen_stages or freeze_to_index, not both"
            )
        if not self.features_only and stages is not None:
            raise InvalidConfig("#/backbone/frozen_stages", "needs features_only: true")
        return Freeze(stages, self.freeze_to_index, all_norms=self.norm_layer == FROZEN_BATCH_NORM)

    def input_defaults(self) -> PreprocessDefaults:
        """What the weights of the tag were trained with, as timm has it; empty where no tag is meant."""
        if not self.pretrained and "." not in self.name():
            return PreprocessDefaults()
        cfg = _pretrained_cfg(self.name())
        rgb = self.channels() == len(cfg.mean)
        return PreprocessDefaults(
            size=self._size() if self.img_size is not None else tuple(cfg.input_size[1:]),
            crop_pct=cfg.crop_pct,
            interpolation=cfg.interpolation,
            mean=tuple(cfg.mean) if rgb else None,
            std=tuple(cfg.std) if rgb else None,
        )

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The features of `out_indices`, or those that timm returns when none are given."""
        if not self.features_only:
            if self.out_indices is not None:
                raise InvalidConfig("#/backbone/out_indices", "needs features_only: true")
            return levels_by_index([0], description.features)
        known = [feature.index for feature in description.features]
        if isinstance(self.out_indices, int):
            if self.out_indices > len(known):
                detail = f"{self.out_indices} of {len(known)} features asked for"
                raise InvalidConfig("#/backbone/out_indices", detail)
            return levels_by_index(known[-self.out_indices :], description.features)
        default = [index for index in self.entry().default if index in known]
        return levels_by_index(self.out_indices or default, description.features)


class TimmConfig(_TimmArguments):
    """`timm.<model>`: `timm.create_model(<model>, features_only=True)` with its own parameters."""

    in_chans: Chans = 3

    def written_name(self) -> str:
        """The type without its scope."""
        return self.type.removeprefix("timm.")

    def channels(self) -> int:
        """`in_chans`."""
        return self.in_chans


class TimmBackboneConfig(_TimmArguments):
    """OpenMMLab's `TIMMBackbone`: a timm model, by default without `features_only`: one unpooled map or tokens."""

    CHANNELS_KEY: ClassVar[str] = "in_channels"
    NAME_KEY: ClassVar[str] = "model_name"

    model_name: Annotated[str, Field(min_length=1, max_length=128)]
    features_only: StrictBool = False
    in_channels: Chans = 3

    def written_name(self) -> str:
        """`model_name`."""
        return self.model_name

    def channels(self) -> int:
        """`in_channels`."""
        return self.in_channels


def _refuse_second(named: WeightsRef | None, key: str) -> None:
    if named is not None:
        raise InvalidConfig(f"#/backbone/{key}", f"give {key} or {named.pointer.split('/')[2]}, not both")


def _resolve(written: str, pointer: str) -> str:
    """timm's present name of a model, from a closed table: nothing else is ever handed to timm.

    Raises:
        UnknownBackbone: no such model or tag; carries the nearest names.
        InvalidConfig: the model is known but cannot be served.
    """
    name = timm_renamed().get(written, written)
    arch, _, tag = name.partition(".")
    entry = timm_models().get(arch)
    if entry is None or (tag and tag not in entry.tags):
        known = list(timm_models()) if entry is None else [f"{arch}.{known}" for known in entry.tags]
        near = [match for match, _, _ in process.extract(name[:128], known, limit=5, score_cutoff=60)]
        raise UnknownBackbone("timm model", written[:128], near, pointer=pointer)
    if entry.unsupported is not None:
        raise InvalidConfig(pointer, f"{arch} is not served: {entry.unsupported}")
    return name


def _follows_pretrained(name: str) -> bool:
    # timm gives this one another batch norm epsilon when it is asked for its own weights.
    return name.partition(".")[0] == "fbnetc_100"


def _pretrained_cfg(name: str) -> Any:
    """timm's facts about the weights of a tag (of the default tag, where the name has none)."""
    import timm

    return timm.get_pretrained_cfg(name)


def _hub_name(name: str) -> str:
    """Where the weights of a tag are: `hf-hub:<repository>` with the file, if it is not the usual one."""
    cfg = _pretrained_cfg(name)
    # "hf" marks files that are arrays of another framework.
    if cfg is None or not cfg.hf_hub_id or (cfg.custom_load == "hf" and cfg.hf_hub_filename):
        raise InvalidConfig("#/backbone/pretrained", f"timm has no weights on the hub for {name}")
    return f"hf-hub:{cfg.hf_hub_id}" + (f"/{cfg.hf_hub_filename}" if cfg.hf_hub_filename else "")


def hub_architecture(config_json: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model and the constructor arguments that a hub repository's `config.json` names.

    Raises:
        UnknownBackbone: timm has no such architecture.
        InvalidConfig: `architecture` is not a string, or an argument that a config cannot have.
    """
    pointer = "#/backbone/model_name"
    name, arguments = config_json.get("architecture"), config_json.get("model_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise InvalidConfig(pointer, "the repository's config.json names no timm architecture")
    refused = [str(key)[:64] for key in arguments if key not in TimmConfig.model_fields]
    if refused:
        raise InvalidConfig(pointer, f"the repository's model_args are not served: {', '.join(refused[:5])}")
    return _resolve(name, pointer), dict(arguments)


# --- building -------------------------------------------------------------------------------------


@dataclass
class Capture:
    """What is seen of the whole model between its construction and its wrapping, and what goes into it."""

    state: StateDict | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    first_stage: nn.Module | None = None
    offered: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    failure: Exception | None = None


_CAPTURE: ContextVar[Capture | None] = ContextVar("timm_capture", default=None)
_INSTALL = threading.Lock()


def _install_capture() -> None:
    """Let `_load_captured` see models that timm builds.

    timm makes the whole model, loads weights and then prunes and renames it for `features_only`; only in between
    do the parameters have the names of its checkpoints, and only there does timm convert checkpoints. The one
    function that timm calls there is `load_pretrained`. Ours takes its place for good, looks at nothing but builds
    that this module started (a context variable, so per thread) and hands all others on.
    """
    from timm.models import _builder

    with _INSTALL:
        if not hasattr(_builder.load_pretrained, "handed_on"):
            original = _builder.load_pretrained

            def load_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
                capture = _CAPTURE.get()
                if capture is None:
                    original(model, *args, **kwargs)
                else:
                    _load_captured(capture, original, model, kwargs)

            load_pretrained.handed_on = original  # type: ignore[attr-defined]  # marks ours
            _builder.load_pretrained = load_pretrained
            # timm logs every key that it does not expect; here they are in the reply.
            logging.getLogger(_builder.__name__).addFilter(lambda _: _CAPTURE.get() is None)


def _load_captured(
    capture: Capture, original: Callable[..., None], model: nn.Module, kwargs: Mapping[str, Any]
) -> None:
    capture.tensors = model.state_dict(keep_vars=True)
    capture.first_stage = _module_of_first_feature(model)
    if capture.state is None:
        return
    no_source = dict.fromkeys(("url", "file", "hf_hub_id", "hf_hub_filename", "source"))
    # A copy: timm's conversions take keys out of the dict that they get.
    offer = {"state_dict": dict(capture.state), "custom_load": False}
    cfg = kwargs["pretrained_cfg"] | no_source | offer
    # No class count fits zero, so timm drops the classifier's weights instead of comparing their shapes.
    arguments = {**kwargs, "pretrained_cfg": cfg, "num_classes": 0, "strict": False}
    with _watched(model, capture):
        try:
            original(model, **arguments)
        except CONSTRUCTOR_ERRORS as error:
            # Reported once it is known whether the names of the wrapped model fit.
            capture.failure = error


@contextmanager
def _watched(model: Any, capture: Capture) -> Iterator[None]:
    """Note what `model.load_state_dict` is given and what it makes of it."""

    def before(_: nn.Module, state: StateDict, *__: Any) -> None:
        capture.offered = tuple(state)
        shapes = {name: tensor.shape for name, tensor in capture.tensors.items()}
        wrong = [name for name, tensor in state.items() if shapes.get(name, tensor.shape) != tensor.shape]
        capture.wrong_shape = tuple(wrong)
        for name in wrong:
            del state[name]

    def after(_: nn.Module, keys: Any) -> None:
        wrong = set(capture.wrong_shape)
        capture.missing = tuple(name for name in keys.missing_keys if name not in wrong)
        capture.unexpected = tuple(keys.unexpected_keys)

    handles = (
        model.register_load_state_dict_pre_hook(before),
        model.register_load_state_dict_post_hook(after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module_of_first_feature(model: nn.Module) -> nn.Module | None:
    info = getattr(model, "feature_info", None) or ()
    paths = (info[index].get("module") for index in range(len(info)))
    first = next((path for path in paths if path), None)
    return dict(model.named_modules()).get(first) if first else None


def _layer(kind: str, value: Any) -> Any:
    """A constructor argument from its JSON: layers are named there."""
    from timm.layers.create_act import get_act_layer
    from timm.layers.create_norm import get_norm_layer

    match kind:
        case "norm_layer":
            return get_norm_layer(NORM_LAYERS[value])  # type: ignore[no-untyped-call]  # timm's
        case "act_layer":
            return get_act_layer(value)
        case _:
            return value


def _constructor_arguments(architecture: Architecture) -> dict[str, Any]:
    arguments = {key: _layer(key, value) for key, value in architecture.arguments}
    if architecture.in_channels != 3:
        arguments["in_chans"] = architecture.in_channels
    if (
        _follows_pretrained(architecture.name)
        and not architecture.pretrained
        and "norm_layer" not in arguments
    ):
        arguments["bn_eps"] = 1e-5
    return arguments


def _create(architecture: Architecture, capture: Capture, features: Mapping[str, Any]) -> nn.Module:
    """timm's module, seen by `capture` before it is wrapped; downloads and opens nothing."""
    import timm

    _install_capture()
    token = _CAPTURE.set(capture)
    arguments = _constructor_arguments(architecture)
    try:
        # `pretrained` is what makes timm call the function that `capture` listens to.
        net: nn.Module = timm.create_model(architecture.name, pretrained=True, **features, **arguments)
    except CONSTRUCTOR_ERRORS as error:
        if not arguments:
            raise
        raise _refusal(architecture, error) from error
    finally:
        _CAPTURE.reset(token)
    return net.eval()


def _refusal(architecture: Architecture, error: Exception) -> InvalidConfig:
    """The client's words for an error of a constructor."""
    given = [key for key, _ in architecture.arguments]
    if architecture.in_channels != 3:
        given.append("in_chans")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown and unknown[1] in given:
        return InvalidConfig(
            f"#/backbone/{unknown[1]}", f"{architecture.entry_name} does not take {unknown[1]}"
        )
    pointer = f"#/backbone/{given[0]}" if len(given) == 1 else "#/backbone"
    settings = ", ".join(f"{key}={value}" for key, value in architecture.arguments) or f"{given[0]}"
    return InvalidConfig(pointer, f"timm cannot build and run {architecture.entry_name} with {settings}")


@lru_cache(maxsize=256)
def feature_indices(architecture: Architecture) -> tuple[int, ...]:
    """The indices of all features that `features_only` can give; known only once something is built."""
    last = {"features_only": True, "out_indices": (-1,)}
    with torch.device("meta"), SkipInitialisers():
        info: Any = _create(architecture, Capture(), last).feature_info
    # A feature without a module is numbered but cannot be had (the stem of TResNet).
    return tuple(index for index in range(len(info)) if info[index]["module"])


def assemble(
    architecture: Architecture, capture: Capture, indices: tuple[int, ...] | None = None
) -> TimmBackbone:
    """The backbone on the current default device, with every feature."""
    _refuse_slow(architecture)
    if not architecture.features_only:
        return _assemble_whole(architecture, capture)
    indices = indices or feature_indices(architecture)
    net = _create(architecture, capture, {"features_only": True, "out_indices": indices})
    return TimmBackbone(net, architecture, _features(net, indices), capture)


def _features(net: nn.Module, indices: Sequence[int]) -> tuple[FeatureInfo, ...]:
    info: Any = net.feature_info
    return tuple(
        FeatureInfo(index, str(index), int(info[index]["num_chs"]), int(info[index]["reduction"]), "NCHW")
        for index in indices
    )


def _assemble_whole(architecture: Architecture, capture: Capture) -> TimmBackbone:
    """The whole model without classifier and pooling, as OpenMMLab's wrapper resets it."""
    feature = _whole_feature(architecture)
    net = _without_head(architecture, capture)
    return TimmBackbone(net, architecture, (feature,), capture)


def _without_head(architecture: Architecture, capture: Capture) -> nn.Module:
    net: Any = _create(architecture, capture, {})
    try:
        net.reset_classifier(0, "")
    except CONSTRUCTOR_ERRORS as error:
        detail = f"{architecture.entry_name} cannot be left unpooled; set it to true"
        raise InvalidConfig("#/backbone/features_only", detail) from error
    return cast("nn.Module", net)


def _refuse_slow(architecture: Architecture) -> None:
    if "img_size" not in dict(architecture.arguments) or max(architecture.size) <= MAX_SLOW_SIDE:
        return
    if timm_models()[architecture.entry_name].module in SLOW_WITH_SIZE:
        detail = f"{max(architecture.size)} exceeds {MAX_SLOW_SIDE} pixels for {architecture.entry_name}"
        raise InvalidConfig("#/backbone/img_size", detail)


@lru_cache(maxsize=256)
def _whole_feature(architecture: Architecture) -> FeatureInfo:
    """The one feature of a model that is not wrapped, from a forward pass on the meta device."""
    try:
        with torch.inference_mode(), torch.device("meta"), SkipInitialisers():
            net = _without_head(architecture, Capture())
            output = _unpooled(net, torch.empty(1, architecture.in_channels, *architecture.size))
    except CONSTRUCTOR_ERRORS as error:
        detail = f"{architecture.entry_name} cannot be run unpooled; set it to true"
        raise InvalidConfig("#/backbone/features_only", detail) from error
    if output.ndim == 4:
        stride = round(architecture.size[0] / output.shape[2])
        return FeatureInfo(0, "0", output.shape[1], stride, "NCHW")
    return FeatureInfo(0, "0", output.shape[-1], None, "NLC" if output.ndim == 3 else "NC")


def _unpooled(net: Any, images: Tensor) -> Tensor:
    output: Tensor = net(images)
    # timm says so on the model when its maps have channels last.
    last = output.ndim == 4 and getattr(net, "output_fmt", "NCHW") == "NHWC"
    return output.permute(0, 3, 1, 2) if last else output


# --- the module -----------------------------------------------------------------------------------


class TimmBackbone(Backbone):
    """A timm model that gives features by timm's indices; nodes are the indices as text.

    Attributes:
        net: timm's module.
        architecture: what it was built from.
        names: entry of the module's state → its name in timm's own checkpoints.
        first_stage: where the module of the first feature is, None if timm does not say.
    """

    def __init__(
        self, net: nn.Module, architecture: Architecture, features: tuple[FeatureInfo, ...], capture: Capture
    ) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.features = features
        full = {id(tensor): name for name, tensor in capture.tensors.items()}
        state = net.state_dict(keep_vars=True)
        self.names = {name: full.get(id(tensor), name) for name, tensor in state.items()}
        self.first_stage = _path_of(capture.first_stage, self)
        # Only whole models give tokens, and only they say how many come before the patches'.
        self.prefix_tokens = int(getattr(net, "num_prefix_tokens", 0))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Compute features.

        Args:
            images: [n, c, h, w], float, already normalised.
            nodes: indices of features as text.

        Returns:
            maps as [n, c, h, w]; without `features_only` whatever the model gives unpooled, channels first.
        """
        if not self.architecture.features_only:
            return {node: _unpooled(self.net, images) for node in nodes}
        wanted = sorted({int(node) for node in nodes})
        collect = COLLECTORS.get(type(self.net).__name__, _collect_all)
        maps = collect(self.net, images, wanted)
        return {node: maps[int(node)] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Freeze all that a feature depends on, and the batch norms among it.

        Stages count as in mmdetection: 0 is the stem, k is the stem and k stages.

        Raises:
            InvalidConfig: no such stage or index.
        """
        parameters = self._frozen_parameters(freeze)
        norms = dependencies.batch_norms_of(parameters, self.net)
        if freeze.all_norms or freeze.norm_eval:
            norms = dependencies.batch_norms(self.net)
        everything = [name for name, _ in self.net.named_parameters(remove_duplicate=False)]
        if freeze.all_norms:
            of_norms = {name for name in everything if name.rpartition(".")[0] in norms}
            parameters |= of_norms
        return FreezeReport(
            stages=freeze.stages,
            parameters=tuple(self.names[name] for name in everything if name in parameters),
            norms=tuple(self._full_path(path) for path in norms),
            of=len(everything),
        )

    def needs(self, node: str) -> frozenset[str]:
        """The entries of a checkpoint that a feature cannot do without, by their names in timm's checkpoints."""
        entries = self._dependencies().entries[int(node)]
        return frozenset(self.names[name] for name in entries if name in self.names)

    def _frozen_parameters(self, freeze: Freeze) -> frozenset[str]:
        index = self._index_to_freeze(freeze)
        if index is None:
            return frozenset()
        behind = self._dependencies()
        if index >= 0:
            # A later map need not depend on all that an earlier one does (HRNet's branches have their own ends).
            upto = (found for known, found in behind.parameters.items() if known <= index)
            return frozenset[str]().union(*upto)
        if behind.stem is None:
            raise InvalidConfig(
                "#/backbone/frozen_stages", f"{self.architecture.entry_name} has no separate stem"
            )
        return behind.stem

    def _dependencies(self) -> _Dependencies:
        indices = tuple(feature.index for feature in self.features)
        return _dependencies(self.architecture, indices)

    def _index_to_freeze(self, freeze: Freeze) -> int | None:
        """The deepest feature to freeze; -1 is the stem of a network whose first feature is a stage."""
        indices = [feature.index for feature in self.features]
        if freeze.to_index is not None:
            if freeze.to_index not in indices:
                detail = f"{freeze.to_index} is not an index of {indices[0]} to {indices[-1]}"
                raise InvalidConfig("#/backbone/freeze_to_index", detail)
            return freeze.to_index
        if freeze.stages is None or freeze.stages < 0:
            return None
        # Where the first map is reduced by 2 or not at all it is the stem; by 4 or more it is the first stage.
        by_stage = indices if (self.features[0].stride or 4) < 4 else [-1, *indices]
        if freeze.stages >= len(by_stage):
            detail = f"{freeze.stages} is not a stage of -1 to {len(by_stage) - 1}"
            raise InvalidConfig("#/backbone/frozen_stages", detail)
        return by_stage[freeze.stages]

    def _full_path(self, path: str) -> str:
        for entry in ("weight", "running_mean"):
            full = self.names.get(f"{path}.{entry}")
            if full is not None:
                return full.rpartition(".")[0]
        return path


def _path_of(module: nn.Module | None, root: nn.Module) -> str | None:
    return next((path for path, found in root.named_modules() if found is module), None)


@dataclass(frozen=True)
class _Dependencies:
    """By feature index: the parameters behind it, and all entries of a checkpoint that it needs.

    `stem` are the parameters behind what goes into the first feature's module, None where that cannot be found.
    The names are the wrapped module's.
    """

    parameters: Mapping[int, frozenset[str]]
    entries: Mapping[int, frozenset[str]]
    stem: frozenset[str] | None


@lru_cache(maxsize=64)
def _dependencies(architecture: Architecture, indices: tuple[int, ...]) -> _Dependencies:
    with torch.inference_mode(False), torch.device("meta"), SkipInitialisers():
        twin = assemble(architecture, Capture(), indices)
        images = torch.empty(1, architecture.in_channels, *architecture.size)
    nodes = [str(index) for index in indices]
    entering: list[Tensor] = []
    with _inputs_of(twin, twin.first_stage, entering):
        outputs = dependencies.forward_with_graph(twin, images, nodes)
    parameters = {int(node): dependencies.parameters_behind(outputs[node], twin.net) for node in nodes}
    entries = {index: dependencies.entries_behind(behind, twin.net) for index, behind in parameters.items()}
    stem = dependencies.parameters_behind(entering[0], twin.net) if entering else _stem_by_name(twin)
    return _Dependencies(parameters, entries, stem or None)


def _stem_by_name(backbone: TimmBackbone) -> frozenset[str]:
    """The parameters of the patch embedding, where timm does not say which module gives the first feature."""
    return frozenset(name for name, full in backbone.names.items() if full.startswith(STEM_NAMES))


@contextmanager
def _inputs_of(root: nn.Module, path: str | None, found: list[Tensor]) -> Iterator[None]:
    """Collect the tensors that go into the submodule at `path`."""
    if path is None:
        yield
        return

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.extend(value for value in inputs if isinstance(value, Tensor))

    handle = root.get_submodule(path).register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


# --- features by timm's kinds of wrapper ----------------------------------------------------------

Maps = dict[int, Tensor]
# timm's hooks leave their tensors in one place per device, so that two passes at once would mix them up.
_HOOKS = threading.Lock()


def _collect_list(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """FeatureListNet: modules in a row, some of which give a feature."""
    maps: Maps = {}
    current: Any = images
    for name, module in net.items():
        current = module(current)
        index = int(net.return_layers.get(name, -1))
        if index in wanted:
            maps[index] = _channels_first(net, _one_tensor(net, current))
        if len(maps) == len(wanted):
            break
    return maps


def _one_tensor(net: Any, output: Any) -> Tensor:
    """Some modules hand on several tensors; timm says whether the feature is the first or all of them."""
    if isinstance(output, tuple | list):
        return torch.cat(output, 1) if net.concat else output[0]
    tensor: Tensor = output
    return tensor


def _collect_getter(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """FeatureGetterNet: the model itself gives intermediate features, and stops after the last one."""
    features = net.model.forward_intermediates(
        images,
        indices=list(wanted),
        norm=net.norm,
        stop_early=True,
        output_fmt=net.output_fmt,
        intermediates_only=True,
    )
    return dict(zip(wanted, features, strict=True))


def _collect_efficientnet(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """EfficientNetFeatures and MobileNetV3Features: a stem (stage 0) and stages of blocks."""
    if net.feature_hooks is not None:
        return _collect_hooked(net, images, wanted)
    index_of = {info["stage"]: info["index"] for info in net.feature_info.get_dicts()}
    current = net.bn1(net.conv_stem(images))
    if hasattr(net, "act1"):
        current = net.act1(current)
    maps: Maps = {}
    for stage, block in enumerate([nn.Identity(), *net.blocks]):
        current = block(current)
        if index_of.get(stage) in wanted:
            maps[index_of[stage]] = current
        if len(maps) == len(wanted):
            break
    return maps


def _collect_hooked(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """FeatureHookNet: hooks note the features of a full pass."""
    with _HOOKS:
        return _collect_all(net, images, wanted)


def _collect_all(net: Any, images: Tensor, wanted: Sequence[int]) -> Maps:
    """Any other wrapper (HRNet): every feature is computed, in the order of the indices."""
    features = dict(zip(net.feature_info.out_indices, net(images), strict=True))
    return {index: _channels_first(net, features[index]) for index in wanted}


def _channels_first(net: Any, feature: Tensor) -> Tensor:
    # Swin and its like give NHWC, and the wrapper says so; the service promises NCHW.
    return feature.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else feature


COLLECTORS: Mapping[str, Callable[[Any, Tensor, Sequence[int]], Maps]] = {
    "FeatureListNet": _collect_list,
    "FeatureGetterNet": _collect_getter,
    "EfficientNetFeatures": _collect_efficientnet,
    "MobileNetV3Features": _collect_efficientnet,
    "FeatureHookNet": _collect_hooked,
}


# --- loading --------------------------------------------------------------------------------------

OPENMMLAB_PREFIX = "timm_model."
MAX_PREFIX_PARTS = 4


def load(config: _TimmArguments, state: StateDict, ref: WeightsRef) -> tuple[TimmBackbone, LoadedKeys]:
    """The network with the tensors of a checkpoint.

    Names may be those of the whole timm model, of its `features_only` form (`stages_0.…`), or what timm converts
    by itself; OpenMMLab's `timm_model.` before them is taken off. Entries that only features other than the
    selected ones need may be missing: they are reported.

    Raises:
        CheckpointMismatch: an entry that a selected feature needs is missing, or one has the wrong shape.
    """
    bare, prefix, foreign = _without_prefix(state, ref)
    backbone, fits = _filled(config, bare)
    if fits is not None and not fits.loaded:
        names = (*backbone.names, *backbone.names.values())
        bare, guessed, foreign = strip_prefix(bare, _likeliest_prefix(bare, names), pointer=ref.pointer)
        prefix += guessed
        backbone, fits = _filled(config, bare) if guessed else (backbone, fits)
    if fits is None:
        raise CheckpointMismatch(
            ref.pointer, "timm cannot convert the names of this file to those of the model"
        )
    _refuse_misfit(config, backbone, fits, ref)
    return backbone, LoadedKeys(fits.loaded, fits.missing, (*fits.unexpected, *foreign), prefix)


def _filled(config: _TimmArguments, state: StateDict) -> tuple[TimmBackbone, _Fits | None]:
    """The network with what fits of a file in it; None in place of the fit if timm could not convert the names."""
    capture = Capture(state=state)
    with SkipInitialisers():
        backbone = assemble(config.built(), capture, _known_indices(config))
    if _names_are_wrapped(backbone, state):
        return backbone, _fit_wrapped(backbone, state)
    return backbone, _fit_whole(backbone, capture)


@dataclass(frozen=True)
class _Fits:
    loaded: int
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    unexpected: tuple[str, ...]


def _without_prefix(state: StateDict, ref: WeightsRef) -> tuple[StateDict, str, tuple[str, ...]]:
    """What the config's prefix and OpenMMLab's wrapper put before the names, taken off."""
    bare, prefix, foreign = strip_prefix(state, ref.prefix, pointer=ref.pointer)
    if not any(name.startswith(OPENMMLAB_PREFIX) for name in bare):
        return bare, prefix, foreign
    inner, wrapper, beside = strip_prefix(bare, OPENMMLAB_PREFIX, pointer=ref.pointer)
    return inner, prefix + wrapper, (*foreign, *(prefix + name for name in beside))


def _likeliest_prefix(state: StateDict, names: Collection[str]) -> str:
    """The prefix under which most of the file's keys are names of the network; empty if there is none."""
    known, found = set(names), Counter[str]()
    for name in state:
        parts = name.split(".")
        depths = range(1, min(len(parts), MAX_PREFIX_PARTS + 1))
        found.update(".".join(parts[:depth]) for depth in depths if ".".join(parts[depth:]) in known)
    return found.most_common(1)[0][0] if found else ""


def _names_are_wrapped(backbone: TimmBackbone, state: StateDict) -> bool:
    """Whether more keys of the file are names of the wrapped module than names of the whole model."""
    whole = set(backbone.names.values())
    return sum(name in backbone.names for name in state) > sum(name in whole for name in state)


def _fit_wrapped(backbone: TimmBackbone, state: StateDict) -> _Fits:
    """Load a file that was saved from the `features_only` form."""
    own = backbone.net.state_dict()
    fitting = {n: t for n, t in state.items() if n in own and own[n].shape == t.shape}
    backbone.net.load_state_dict(fitting, strict=False)
    return _Fits(
        loaded=len(fitting),
        missing=_counted(backbone.names[name] for name in own if name not in state),
        wrong_shape=tuple(name for name in state if name in own and name not in fitting),
        unexpected=tuple(name for name in state if name not in own),
    )


def _fit_whole(backbone: TimmBackbone, capture: Capture) -> _Fits | None:
    """What timm's own loading made of a file; None if it could not convert it."""
    if capture.failure is not None or capture.state is None:
        return None
    kept = set(backbone.names.values())
    without = {*capture.missing, *capture.wrong_shape}
    cut = [name for name in capture.offered if name in capture.tensors and name not in kept]
    dropped = [
        n for n in capture.state if n in capture.tensors and n not in capture.offered and n not in kept
    ]
    return _Fits(
        loaded=len(kept - without),
        missing=_counted(name for name in capture.missing if name in kept),
        wrong_shape=tuple(name for name in capture.wrong_shape if name in kept),
        unexpected=tuple(dict.fromkeys((*capture.unexpected, *cut, *dropped))),
    )


def _counted(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.endswith("num_batches_tracked"))


def _refuse_misfit(config: _TimmArguments, backbone: TimmBackbone, fits: _Fits, ref: WeightsRef) -> None:
    lacking = _needed(config, backbone, fits.missing) if fits.missing else ()
    if not lacking and not fits.wrong_shape:
        return
    parts = [("missing", lacking), ("of the wrong shape", fits.wrong_shape)]
    detail = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts if names)
    raise CheckpointMismatch(
        ref.pointer, detail, missing=lacking, wrong_shape=fits.wrong_shape, unexpected=fits.unexpected
    )


def _needed(config: _TimmArguments, backbone: TimmBackbone, missing: Sequence[str]) -> tuple[str, ...]:
    """Those of `missing` that a selected level depends on."""
    levels = config.levels(describe(config))
    needed = frozenset[str]().union(*(backbone.needs(level.node) for level in levels))
    return tuple(name for name in missing if name in needed)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:NAMED_KEYS])
    return shown + (f" and {len(names) - NAMED_KEYS} more" if len(names) > NAMED_KEYS else "")


# --- the families ---------------------------------------------------------------------------------


def _known_indices(config: _TimmArguments) -> tuple[int, ...] | None:
    """The indices of all features, where the table knows them."""
    if not config.is_default():
        return None
    return tuple(feature.index for feature in config.entry().features)


def build(config: _TimmArguments) -> TimmBackbone:
    """The network with random weights on the current default device."""
    architecture, indices = config.built(), _known_indices(config)
    if torch.get_default_device().type != "meta":
        return assemble(architecture, Capture(), indices)
    with SkipInitialisers():
        return assemble(architecture, Capture(), indices)


def describe(config: _TimmArguments) -> Description:
    """Features and sizes: from the table, or from a network on the meta device if the config changes it.

    Raises:
        InvalidConfig: timm cannot build the model with these arguments, or what it builds does not run.
    """
    if config.is_default():
        return config.entry().description()
    with torch.device("meta"):
        backbone = build(config)
    tensors = [*backbone.parameters(), *backbone.buffers()]
    return Description(
        features=_measured(backbone),
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        bytes=sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors),
        in_channels=config.channels(),
        input=PreprocessDefaults(size=config.built().size),
        fixed_input=config.takes_one_size(),
    )


def _measured(backbone: TimmBackbone) -> tuple[FeatureInfo, ...]:
    """The features with their shapes at the native size, from a pass on the meta device."""
    architecture = backbone.architecture
    nodes = [feature.node for feature in backbone.features]
    try:
        with torch.inference_mode(), torch.device("meta"):
            outputs = backbone(torch.empty(1, architecture.in_channels, *architecture.size), nodes)
    except CONSTRUCTOR_ERRORS as error:
        if not architecture.arguments:
            raise
        raise _refusal(architecture, error) from error
    shapes = (tuple(outputs[feature.node].shape[1:]) for feature in backbone.features)
    return tuple(
        replace(feature, shape=shape) for feature, shape in zip(backbone.features, shapes, strict=True)
    )


def _example(type: str) -> Mapping[str, Any]:
    return {"type": type, "out_indices": [-2, -1]}


def _example_openmmlab(type: str) -> Mapping[str, Any]:
    return {"type": type, "model_name": "resnet50", "features_only": True, "out_indices": [1, 2, 3, 4]}


def _tags(type: str) -> Sequence[str]:
    arch = _resolve(type.removeprefix("timm."), "#/backbone/type").partition(".")[0]
    return [f"{arch}.{tag}" for tag in timm_models()[arch].tags]


def _served(_: str) -> Sequence[str]:
    return [name for name, entry in timm_models().items() if entry.unsupported is None]


TIMM = Family(
    config=TimmConfig, describe=describe, build=build, load=load, example=_example, architectures=_tags
)
TIMM_BACKBONE = Family(
    config=TimmBackboneConfig,
    describe=describe,
    build=build,
    load=load,
    example=_example_openmmlab,
    architectures=_served,
)
