"""timm's models: `timm.<model>` and `<model>.<tag>`, and OpenMMLab's `TIMMBackbone` around them.

A model is built once with every feature that timm's `features_only` can give, so that configs that differ in
`out_indices` share it; `forward` runs no deeper than the deepest feature asked for. Features are numbered as timm
numbers them (0 is the stem of a ResNet) and always come as [n, c, h, w], also where timm gives [n, h, w, c].

Checkpoints have the names of the whole timm model. They go in through timm's own conversion (old names, first
convolution for other channel counts, position embeddings of other sizes), and every key is accounted for.

Here are the spellings and the families. `timm_creation` calls timm's constructors, `timm_network` makes backbones
of what they give, `timm_forward` runs them, `timm_loading` fills them from files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from service.backbones import building
from service.backbones.base import (
    MAX_INDICES,
    BackboneConfig,
    Family,
    Index,
    InputChannels,
    levels_by_index,
)
from service.backbones.freezing import FROZEN_BATCH_NORM
from service.backbones.tables import TimmEntry, nearest, timm_models, timm_renamed
from service.backbones.timm_creation import Architecture, Capture, follows_pretrained
from service.backbones.timm_loading import load_checkpoint
from service.backbones.timm_network import TimmBackbone, assemble, measured_features
from service.config.spec import Description, Freeze, Level, LoadedKeys, PreprocessDefaults, WeightsRef
from service.errors import InvalidConfig, UnknownBackbone

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

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
LastN = Annotated[int, Field(strict=True, ge=1, le=MAX_INDICES)]
IndexList = Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_INDICES)]


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
        if follows_pretrained(name):
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
        return levels_by_index(self.out_indices or default, description.features, as_asked=True)


class TimmConfig(_TimmArguments):
    """`timm.<model>`: `timm.create_model(<model>, features_only=True)` with its own parameters."""

    in_chans: InputChannels = 3

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
    in_channels: InputChannels = 3

    def written_name(self) -> str:
        """`model_name`."""
        return self.model_name

    def channels(self) -> int:
        """`in_channels`."""
        return self.in_channels


# --- names ----------------------------------------------------------------------------------------


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
        raise UnknownBackbone("timm model", written[:128], nearest(name, known), pointer=pointer)
    if entry.unsupported is not None:
        raise InvalidConfig(pointer, f"{arch} is not served: {entry.unsupported}")
    return name


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


# --- the families ---------------------------------------------------------------------------------


def _known_indices(config: _TimmArguments) -> tuple[int, ...] | None:
    """The indices of all features, from the table: no argument that a config may give changes how many there are."""
    if not config.features_only:
        return None
    return tuple(feature.index for feature in config.entry().features)


def build(config: _TimmArguments) -> TimmBackbone:
    """The network with random weights on the current default device."""
    return building.initialised(lambda: assemble(config.built(), Capture(), _known_indices(config)))


def load(config: _TimmArguments, state: StateDict, ref: WeightsRef) -> tuple[TimmBackbone, LoadedKeys]:
    """The network with the tensors of a checkpoint.

    Raises:
        CheckpointMismatch: an entry that a selected feature needs is missing, or one has the wrong shape.
    """

    def nodes() -> list[str]:
        return [level.node for level in config.levels(describe(config))]

    return load_checkpoint(config.built(), _known_indices(config), state, ref, nodes=nodes)


def describe(config: _TimmArguments) -> Description:
    """Features and sizes: from the table, or from a network on the meta device if the config changes it.

    Raises:
        InvalidConfig: timm cannot build the model with these arguments, or what it builds does not run.
    """
    if config.is_default():
        return config.entry().description()
    backbone = building.on_meta(lambda: build(config))
    return building.description(
        backbone,
        measured_features(backbone),
        in_channels=config.channels(),
        input_defaults=PreprocessDefaults(size=config.built().size),
        fixed_input=config.takes_one_size(),
        prefix_tokens=backbone.prefix_tokens,
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
    config=TimmConfig,
    describe=describe,
    build=build,
    load=load,
    example=_example,
    architectures=_tags,
    key_library="timm",
)
TIMM_BACKBONE = Family(
    config=TimmBackboneConfig,
    describe=describe,
    build=build,
    load=load,
    example=_example_openmmlab,
    architectures=_served,
    key_library="timm",
)
