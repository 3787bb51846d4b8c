"""How detectron2 and detrex spell their ResNets; all of it becomes one `ResNetSpec`.

- `stem` and `stages` as objects, which is what a LazyConfig instantiates: `make_default_stages`, detrex's
  `make_stage`, or a list of detectron2's `ResNet.make_stage`;
- flat: `depth`, `norm`, `res5_dilation`, … beside `out_features` and `freeze_at`;
- detectron2's keys for yacs: `MODEL.RESNETS.DEPTH`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictBool, Tag

from service.backbones import building
from service.backbones.base import (
    BackboneConfig,
    CheckpointName,
    Family,
    InputChannels,
    levels_by_stride,
)
from service.backbones.detectron2_resnet import (
    GROUPS_OF_NORM,
    BlockKind,
    BlockSpec,
    NormKind,
    ResNet,
    ResNetSpec,
    StemSpec,
    build,
    load,
)
from service.backbones.lazyconfig import short_class
from service.backbones.resnet import RESNET_NAMES, is_classifier
from service.checkpoints.published import style_of
from service.config.spec import Description, Freeze, Level, LoadedKeys, WeightsRef
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

Depth = Literal[18, 34, 50, 101, 152]
BLOCKS_OF_DEPTH: dict[int, tuple[int, ...]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
FIRST_BOTTLENECK_DEPTH = 50
LAST_STAGE = 5
MAX_WIDTH = 65_536
NORM_KINDS: dict[str, NormKind] = {
    "FrozenBN": "frozen",
    "BN": "bn",
    "SyncBN": "bn",
    "nnSyncBN": "bn",
    "naiveSyncBN": "bn",
    "naiveSyncBN_N": "bn",
    "GN": "gn",
    "LN": "ln",
    "": "none",
}
BLOCK_KINDS: dict[str, BlockKind] = {
    "BasicBlock": "basic",
    "BottleneckBlock": "bottleneck",
    "DeformBottleneckBlock": "deform",
}


def _norm_name(value: Any) -> Any:
    return "" if value is None else short_class(value)


NormKey = Literal["FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "GN", "LN", ""]
NormName = Annotated[NormKey, BeforeValidator(_norm_name)]
BlockName = Annotated[
    Literal["BasicBlock", "BottleneckBlock", "DeformBottleneckBlock"], BeforeValidator(short_class)
]
Channels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Groups = Annotated[int, Field(strict=True, ge=1, le=1024)]
Dilation = Annotated[int, Field(strict=True, ge=1, le=16)]
BlockStride = Literal[1, 2]
Res5Dilation = Literal[1, 2]
OnStages = tuple[StrictBool, StrictBool, StrictBool, StrictBool]
FeatureName = Literal["stem", "res2", "res3", "res4", "res5", "linear"]
FeatureNames = Annotated[tuple[FeatureName, ...], Field(min_length=1, max_length=6)]
FreezeAt = Annotated[int, Field(strict=True, ge=0, le=LAST_STAGE)]
FREEZE_AT = "0 nothing, 1 the stem, k the stem and res2 to res{k}; 5 is everything."
OUT_FEATURES = "Features to return, in this order; stages behind the deepest of them are not built."
Classes = Annotated[int, Field(strict=True, ge=1, le=100_000)]
# What is wrong with which parameter of the stages.
Fault = tuple[str, str]


class _Part(BaseModel):
    """An object inside a config."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- stages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regular:
    """Four stages of a depth that double their channels and halve the map: what most spellings mean."""

    depth: int
    norm: str
    inputs: int
    outputs: int
    width: int
    groups: int = 1
    dilation: int = 1
    res5_dilation: int = 1
    stride_in_1x1: bool = False
    deform: Sequence[bool] = (False,) * 4
    modulated: bool = False
    deform_groups: int = 1

    @property
    def basic(self) -> bool:
        """Whether the blocks are basic ones."""
        return self.depth < FIRST_BOTTLENECK_DEPTH

    def faults(self) -> Iterator[Fault]:
        """What the libraries refuse of basic blocks."""
        if not self.basic:
            return
        for name, value in (
            ("num_groups", self.groups),
            ("dilation", self.dilation),
            ("res5_dilation", self.res5_dilation),
        ):
            if value != 1:
                yield name, f"must be 1 for depth {self.depth}"
        if any(self.deform):
            yield "deform_on_per_stage", f"depth {self.depth} has no deformable blocks"
        if self.stride_in_1x1:
            yield "stride_in_1x1", f"depth {self.depth} has no 1x1 convolutions"

    def stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """Every block of every stage."""
        inputs = (self.inputs, *(self.outputs * 2**stage for stage in range(3)))
        return tuple(self._stage(stage, channels) for stage, channels in enumerate(inputs))

    def _stage(self, stage: int, inputs: int) -> tuple[BlockSpec, ...]:
        last = stage == len(BLOCKS_OF_DEPTH[self.depth]) - 1
        outputs = self.outputs * 2**stage
        stride = 1 if stage == 0 or (last and self.res5_dilation > 1) else 2
        kind: BlockKind = "basic" if self.basic else "deform" if self.deform[stage] else "bottleneck"
        modulated = kind == "deform" and self.modulated
        return tuple(
            BlockSpec(
                kind=kind,
                inputs=inputs if position == 0 else outputs,
                outputs=outputs,
                width=0 if self.basic else self.width * 2**stage,
                norm=NORM_KINDS[self.norm],
                stride=stride if position == 0 else 1,
                # Of all blocks of res5, the first included.
                dilation=self.dilation * (self.res5_dilation if last else 1),
                groups=self.groups,
                stride_in_1x1=self.stride_in_1x1,
                modulated=modulated,
                deform_groups=self.deform_groups if kind == "deform" else 1,
            )
            for position in range(BLOCKS_OF_DEPTH[self.depth][stage])
        )


def default_outputs(depth: int) -> int:
    """The channels of `res2`."""
    return 64 if depth < FIRST_BOTTLENECK_DEPTH else 256


class StemConfig(_Part):
    """`BasicStem`."""

    type: Literal["BasicStem"] = "BasicStem"
    in_channels: InputChannels = 3
    out_channels: Channels = 64
    norm: NormName = "BN"

    def spec(self) -> StemSpec:
        """The neutral spelling."""
        return StemSpec(self.in_channels, self.out_channels, NORM_KINDS[self.norm])


class DefaultStages(_Part):
    """`ResNet.make_default_stages`."""

    type: Literal["make_default_stages", "ResNet.make_default_stages"]
    depth: Depth
    block_class: BlockName | None = None
    norm: NormName = "BN"
    num_groups: Groups = 1
    stride_in_1x1: StrictBool = False
    dilation: Dilation = 1
    deform_modulated: StrictBool = False
    deform_num_groups: Groups = 1

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the stages do not."""
        if self.block_class and (self.block_class == "BasicBlock") != self.regular().basic:
            yield "block_class", f"{self.block_class} is not for depth {self.depth}"
        yield from self.regular().faults()

    def regular(self) -> Regular:
        """The neutral spelling."""
        outputs = default_outputs(self.depth)
        return Regular(
            depth=self.depth,
            norm=self.norm,
            inputs=64,
            outputs=outputs,
            width=outputs // 4,
            groups=self.num_groups,
            dilation=self.dilation,
            stride_in_1x1=self.stride_in_1x1,
            deform=(self.block_class == "DeformBottleneckBlock",) * 4,
            modulated=self.deform_modulated,
            deform_groups=self.deform_num_groups,
        )

    def stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """Every block of every stage."""
        return self.regular().stages()


class MakeStage(_Part):
    """detrex's `make_stage`, which makes all four."""

    type: Literal["make_stage"]
    depth: Depth = 50
    norm: NormName = "FrozenBN"
    num_groups: Groups = 1
    width_per_group: Channels = 64
    in_channels: Channels = 64
    out_channels: Channels = 256
    stride_in_1x1: StrictBool = False
    res5_dilation: Res5Dilation = 1
    deform_on_per_stage: OnStages = (False, False, False, False)
    deform_modulated: StrictBool = False
    deform_num_groups: Groups = 1

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the stages do not."""
        if self.regular().basic and self.out_channels != default_outputs(self.depth):
            yield "out_channels", f"must be {default_outputs(self.depth)} for depth {self.depth}"
        yield from self.regular().faults()

    def regular(self) -> Regular:
        """The neutral spelling."""
        return Regular(
            depth=self.depth,
            norm=self.norm,
            inputs=self.in_channels,
            outputs=self.out_channels,
            width=self.num_groups * self.width_per_group,
            groups=self.num_groups,
            res5_dilation=self.res5_dilation,
            # Basic blocks have no 1x1 to stride in; the library leaves it unread.
            stride_in_1x1=self.stride_in_1x1 and self.depth >= FIRST_BOTTLENECK_DEPTH,
            deform=self.deform_on_per_stage,
            modulated=self.deform_modulated,
            deform_groups=self.deform_num_groups,
        )

    def stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """Every block of every stage."""
        return self.regular().stages()


BlockStrides = Annotated[tuple[BlockStride, ...], Field(min_length=1, max_length=64)]
BlockDilations = Annotated[tuple[Dilation, ...], Field(min_length=1, max_length=64)]


class OneStage(_Part):
    """detectron2's `ResNet.make_stage`: one stage, for a list of them."""

    type: Literal["make_stage", "ResNet.make_stage"]
    block_class: BlockName
    num_blocks: Annotated[int, Field(strict=True, ge=1, le=64)]
    in_channels: Channels
    out_channels: Channels
    bottleneck_channels: Channels | None = None
    stride: BlockStride = 1
    stride_per_block: BlockStrides | None = None
    dilation: Dilation = 1
    dilation_per_block: BlockDilations | None = None
    norm: NormName = "BN"
    num_groups: Groups = 1
    stride_in_1x1: StrictBool = False
    deform_modulated: StrictBool = False
    deform_num_groups: Groups = 1

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the stage does not."""
        for name in ("stride_per_block", "dilation_per_block"):
            given = getattr(self, name)
            if given is not None and len(given) != self.num_blocks:
                yield name, f"has {len(given)} entries for {self.num_blocks} blocks"
        if self.block_class != "BasicBlock" and self.bottleneck_channels is None:
            yield "bottleneck_channels", f"{self.block_class} needs it"
        basic_only = ("bottleneck_channels", "dilation", "dilation_per_block", "num_groups", "stride_in_1x1")
        deform_only = ("deform_modulated", "deform_num_groups")
        refused = {"BasicBlock": basic_only + deform_only, "BottleneckBlock": deform_only}
        for name in refused.get(self.block_class, ()):
            if name in self.model_fields_set:
                yield name, f"{self.block_class} does not take it"

    def blocks(self) -> tuple[BlockSpec, ...]:
        """Every block of the stage."""
        strides = self.stride_per_block or (self.stride,) * self.num_blocks
        dilations = self.dilation_per_block or (self.dilation,) * self.num_blocks
        return tuple(
            BlockSpec(
                kind=BLOCK_KINDS[self.block_class],
                inputs=self.in_channels if position == 0 else self.out_channels,
                outputs=self.out_channels,
                width=self.bottleneck_channels or 0,
                norm=NORM_KINDS[self.norm],
                stride=stride,
                dilation=dilation,
                groups=self.num_groups,
                stride_in_1x1=self.stride_in_1x1,
                modulated=self.deform_modulated,
                deform_groups=self.deform_num_groups,
            )
            for position, (stride, dilation) in enumerate(zip(strides, dilations, strict=True))
        )


def _stages_tag(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, (Mapping, BaseModel)):
        kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
        return "MakeStage" if kind == "make_stage" else "DefaultStages"
    return "str"


Stages = Annotated[
    Annotated[Literal["make_default_stages", "make_stage"], Tag("str")]
    | Annotated[DefaultStages, Tag("DefaultStages")]
    | Annotated[MakeStage, Tag("MakeStage")]
    | Annotated[tuple[OneStage, ...], Field(min_length=1, max_length=4), Tag("list")],
    Discriminator(_stages_tag),
]


def block_faults(block: BlockSpec) -> Iterator[Fault]:
    """What a block cannot be built from."""
    if block.stride > 1 and block.inputs == block.outputs:
        yield "out_channels", f"a stage that strides cannot keep its {block.inputs} channels"
    if block.kind != "basic" and block.width == 0:
        yield "out_channels", f"a quarter of {block.outputs} leaves a bottleneck no channels"
    if block.width > MAX_WIDTH:
        yield "width_per_group", f"a bottleneck of {block.width:,} channels; the limit is {MAX_WIDTH:,}"
    if block.width % block.groups:
        yield "num_groups", f"{block.groups} groups do not divide {block.width} channels"
    if block.kind == "deform" and block.width % block.deform_groups:
        yield "deform_num_groups", f"{block.deform_groups} groups do not divide {block.width} channels"
    uneven = [width for width in (block.width, block.outputs) if width % GROUPS_OF_NORM]
    if block.norm == "gn" and uneven:
        yield "norm", f"the {GROUPS_OF_NORM} groups of GN do not divide {uneven[0]} channels"


# --- configs --------------------------------------------------------------------------------------


class _ResNetConfig(BackboneConfig):
    """What all spellings have in common."""

    # Every spelling of a network shares its models.
    TYPE: ClassVar[str] = "detectron2.ResNet"

    def spec(self) -> ResNetSpec:
        """The neutral spelling: the stages up to the deepest feature asked for."""
        stages = self.all_stages()
        numbers = [int(name[3:]) for name in self.features_asked() or () if name.startswith("res")]
        built = stages if self.features_asked() is None else stages[: max(numbers, default=1) - 1]
        return ResNetSpec(self.stem_spec(), built, self.classes())

    @abstractmethod
    def stem_spec(self) -> StemSpec:
        """The stem."""

    @abstractmethod
    def all_stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """`res2` and on, asked for or not."""

    @abstractmethod
    def features_asked(self) -> tuple[str, ...] | None:
        """`out_features`."""

    @abstractmethod
    def frozen_stages(self) -> int:
        """`freeze_at`."""

    def classes(self) -> int | None:
        """`num_classes`."""
        return None

    def features_key(self) -> str:
        """Where `out_features` is in the config."""
        return "out_features"

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that all spellings of a network share its models."""
        return {"type": self.TYPE, **asdict(self.spec())}

    def misreads(self, checkpoint: str) -> str | None:
        """Bottlenecks that stride elsewhere have the same names and shapes, and other numbers."""
        theirs = style_of(checkpoint)
        blocks = [block for stage in self.spec().stages for block in stage if block.kind != "basic"]
        ours = "caffe" if any(block.stride_in_1x1 for block in blocks) else "pytorch"
        if theirs in (None, ours) or not blocks:
            return None
        needed = "true" if theirs == "caffe" else "false"
        return (
            f"these weights are of a ResNet with stride_in_1x1 {needed}: they have the same names and shapes here "
            "but would give wrong features"
        )

    def misfits(self, library: str, checkpoint: str, state: StateDict) -> str | None:
        """torchvision's and timm's bottlenecks stride in the 3x3 convolution; OpenMMLab's files do not tell."""
        striding = any(block.stride_in_1x1 for stage in self.spec().stages for block in stage)
        if not library or not striding or style_of(checkpoint) == "caffe" or not is_classifier(state):
            return None
        return (
            "a torchvision or timm file fits a ResNet with stride_in_1x1 and would give wrong features: its "
            "bottlenecks stride in the 3x3 convolution"
        )

    def freeze(self) -> Freeze:
        """`freeze_at`, and the norms that are frozen ones from the start."""
        spec = self.spec()
        kinds = {spec.stem.norm, *(block.norm for blocks in spec.stages for block in blocks)}
        return Freeze(self.frozen_stages() or None, norm_eval="frozen" in kinds)

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return, named as the features are."""
        if self.strides is None:
            return self.selected(description)
        found = levels_by_stride(self.strides, description.features)
        return tuple(Level(level.index, level.node, level.node) for level in found)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_features`, or the last one.

        Raises:
            InvalidConfig: a feature that the network has not.
        """
        known = {feature.node: feature.index for feature in description.features}
        asked = self.features_asked() or (description.features[-1].node,)
        for position, name in enumerate(asked):
            if name not in known:
                pointer = f"#/backbone/{self.features_key()}/{position}"
                raise InvalidConfig(pointer, f"this backbone has {', '.join(known)}")
        return tuple(Level(known[name], name, name) for name in asked)

    def network_faults(self) -> Iterator[Fault]:
        """What is wrong with the features asked for."""
        asked = self.features_asked()
        if asked is None:
            return
        key = self.features_key()
        if len(set(asked)) != len(asked):
            yield key, f"a feature is asked for twice: {', '.join(asked)}"
        # The library drops every stage then, and has nothing left to put the classifier on.
        if self.classes() is not None and not any(name.startswith("res") for name in asked):
            yield key, "needs a feature of res2 to res5 beside the classifier"
        if "linear" in asked and self.classes() is None:
            yield key, "linear needs num_classes"


class ResNetConfig(_ResNetConfig):
    """`detectron2.ResNet`, which is also `detrex.ResNet`; `stem` and `stages`, or flat."""

    # How a parameter of a stage is spelled flat, where that is not its own name.
    FLAT: ClassVar[tuple[str, ...]] = (
        "depth",
        "norm",
        "in_channels",
        "out_channels",
        "stem_out_channels",
        "stride_in_1x1",
        "num_groups",
        "width_per_group",
        "res5_dilation",
        "deform_on_per_stage",
        "deform_modulated",
        "deform_num_groups",
    )

    stem: StemConfig | None = Field(None, description="BasicStem; needed where stages are objects.")
    stages: Stages | None = Field(
        None,
        description="make_default_stages or make_stage with their parameters, a list of ResNet.make_stage; "
        "or the name alone of the first two, with their parameters beside it.",
    )
    num_classes: Classes | None = Field(
        None, description="Adds the classifier, whose output is the feature linear."
    )
    out_features: FeatureNames | None = Field(None, description=OUT_FEATURES)
    freeze_at: FreezeAt = Field(0, description=FREEZE_AT)
    depth: Depth | None = Field(None, description="Number of layers.")
    norm: NormName | None = Field(
        None, description="Of the stem and the stages: FrozenBN, BN, SyncBN, GN, LN, none if empty."
    )
    in_channels: Channels | None = Field(
        None, description="Channels of the image; with stages: make_stage, those that go into res2."
    )
    out_channels: Channels | None = Field(None, description="Channels of res2.")
    stem_out_channels: Channels | None = None
    stride_in_1x1: StrictBool | None = Field(
        None, description="Whether a bottleneck strides on its first 1x1 (MSRA's weights) or on its 3x3."
    )
    num_groups: Groups | None = None
    width_per_group: Channels | None = None
    res5_dilation: Res5Dilation | None = Field(
        None, description="2 dilates all of res5 instead of striding (DC5)."
    )
    deform_on_per_stage: OnStages | None = None
    deform_modulated: StrictBool | None = None
    deform_num_groups: Groups | None = None

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        structural = list(self._form_faults())
        yield from structural
        if structural:
            return
        yield from self._stage_faults()
        yield from self._channel_faults()
        yield from self.network_faults()

    def _form_faults(self) -> Iterator[Fault]:
        """Keys that do not belong together."""
        if isinstance(self.stages, (DefaultStages, MakeStage, tuple)):
            for key in self.FLAT:
                if getattr(self, key) is not None:
                    yield key, "belongs into stages, which is an object here"
            if self.stem is None:
                yield "stem", "is needed beside stages"
            return
        if self.depth is None and self.stages != "make_stage":
            yield "depth", "is needed, or stages"
        if self.stem is not None:
            for key in ("stem_out_channels", *(("in_channels",) if self.stages != "make_stage" else ())):
                if getattr(self, key) is not None:
                    yield key, "belongs into stem, which is an object here"
        elif self.stages != "make_stage" and (self.in_channels or 0) > 64:
            yield "in_channels", "images have at most 64 channels"

    def _stage_faults(self) -> Iterator[Fault]:
        if isinstance(self.stages, tuple):
            for position, stage in enumerate(self.stages):
                found = list(stage.faults()) or [
                    fault for block in stage.blocks() for fault in block_faults(block)
                ]
                yield from ((f"stages/{position}/{key}", detail) for key, detail in found)
            return
        made = self._made()
        under = "stages/" if isinstance(self.stages, (DefaultStages, MakeStage)) else ""
        found = list(made.faults()) or [
            fault for blocks in made.stages() for block in blocks for fault in block_faults(block)
        ]
        yield from ((under + key, detail) for key, detail in found)

    def _channel_faults(self) -> Iterator[Fault]:
        """Whether each stage takes what the one before it gives."""
        if isinstance(self.stages, tuple) and any(list(stage.faults()) for stage in self.stages):
            return
        stem, given = self.stem_spec(), self.stem_spec().outputs
        for position, blocks in enumerate(self.all_stages()):
            if blocks[0].inputs != given:
                detail = f"{blocks[0].inputs} channels go in and {given} come out of what is before it"
                yield self._inputs_key(position), detail
            given = blocks[-1].outputs
        if stem.norm == "gn" and stem.outputs % GROUPS_OF_NORM:
            yield (
                "stem/norm" if self.stem else "norm",
                f"the {GROUPS_OF_NORM} groups of GN do not divide {stem.outputs} channels",
            )

    def _inputs_key(self, position: int) -> str:
        if isinstance(self.stages, tuple):
            return f"stages/{position}/in_channels"
        if isinstance(self.stages, MakeStage):
            return "stages/in_channels"
        if self.stem is not None:
            return "stem/out_channels"
        return "stem_out_channels" if self.stem_out_channels is not None else "in_channels"

    def _made(self) -> DefaultStages | MakeStage | _Flat:
        if isinstance(self.stages, (DefaultStages, MakeStage)):
            return self.stages
        if self.stages == "make_stage":
            keys = self.model_dump(include=set(MakeStage.model_fields), exclude={"type"}, exclude_none=True)
            return MakeStage.model_validate({"type": "make_stage", **keys})
        return _Flat(self)

    def stem_spec(self) -> StemSpec:
        """`stem`, or what the flat keys say of it."""
        if self.stem is not None:
            return self.stem.spec()
        if self.stages == "make_stage":
            made = self._made()
            assert isinstance(made, MakeStage)
            return StemSpec(3, self.stem_out_channels or made.in_channels, NORM_KINDS[made.norm])
        norm = "BN" if self.norm is None else self.norm
        return StemSpec(self.in_channels or 3, self.stem_out_channels or 64, NORM_KINDS[norm])

    def all_stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """`res2` and on, asked for or not."""
        if isinstance(self.stages, tuple):
            return tuple(stage.blocks() for stage in self.stages)
        return self._made().stages()

    def features_asked(self) -> tuple[str, ...] | None:
        """`out_features`."""
        return self.out_features

    def frozen_stages(self) -> int:
        """`freeze_at`."""
        return self.freeze_at

    def classes(self) -> int | None:
        """`num_classes`."""
        return self.num_classes


@dataclass(frozen=True)
class _Flat:
    """The flat keys as stages, with the defaults of `make_default_stages`."""

    config: ResNetConfig

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the stages do not."""
        config, regular = self.config, self.regular()
        if regular.basic and config.out_channels not in (None, regular.outputs):
            yield "out_channels", f"must be {regular.outputs} for depth {regular.depth}"
        yield from regular.faults()

    def regular(self) -> Regular:
        """The neutral spelling."""
        config, depth = self.config, self.config.depth or FIRST_BOTTLENECK_DEPTH
        outputs = config.out_channels or default_outputs(depth)
        groups = config.num_groups or 1
        return Regular(
            depth=depth,
            norm="BN" if config.norm is None else config.norm,
            inputs=config.stem.out_channels if config.stem else config.stem_out_channels or 64,
            outputs=outputs,
            width=groups * config.width_per_group if config.width_per_group else outputs // 4,
            groups=groups,
            res5_dilation=config.res5_dilation or 1,
            stride_in_1x1=bool(config.stride_in_1x1),
            deform=config.deform_on_per_stage or (False,) * 4,
            modulated=bool(config.deform_modulated),
            deform_groups=config.deform_num_groups or 1,
        )

    def stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """Every block of every stage."""
        return self.regular().stages()


# --- yacs -----------------------------------------------------------------------------------------


class YacsBackbone(_Part):
    """`MODEL.BACKBONE`."""

    NAME: Literal["build_resnet_backbone"] = "build_resnet_backbone"
    FREEZE_AT: FreezeAt = Field(2, description=FREEZE_AT)


class YacsResNets(_Part):
    """`MODEL.RESNETS`, with detectron2's defaults."""

    DEPTH: Depth = 50
    OUT_FEATURES: FeatureNames = Field(("res4",), description=OUT_FEATURES)
    NUM_GROUPS: Groups = 1
    NORM: NormName = "FrozenBN"
    WIDTH_PER_GROUP: Channels = 64
    STRIDE_IN_1X1: StrictBool = True
    RES5_DILATION: Res5Dilation = 1
    RES2_OUT_CHANNELS: Channels = 256
    STEM_OUT_CHANNELS: Channels = 64
    DEFORM_ON_PER_STAGE: OnStages = (False, False, False, False)
    DEFORM_MODULATED: StrictBool = False
    DEFORM_NUM_GROUPS: Groups = 1


class YacsFpn(_Part):
    """`MODEL.FPN`, which this builder does not read."""

    IN_FEATURES: Annotated[tuple[FeatureName, ...], Field(max_length=6)] = ()
    OUT_CHANNELS: Channels = 256
    NORM: NormName = ""
    FUSE_TYPE: Literal["sum", "avg"] = "sum"


class YacsModel(_Part):
    """`MODEL`, as far as it is about the backbone."""

    WEIGHTS: Annotated[CheckpointName, Field(min_length=0)] = Field("", description="Short for checkpoint.")
    BACKBONE: YacsBackbone = YacsBackbone()
    RESNETS: YacsResNets = YacsResNets()
    FPN: YacsFpn = Field(YacsFpn(), description="No effect: the backbone is without FPN.")


def weights_of_yacs(given: str, named: WeightsRef | None) -> WeightsRef | None:
    """`MODEL.WEIGHTS`, or the checkpoint named as in every type.

    Raises:
        InvalidConfig: both are named.
    """
    pointer = "#/backbone/MODEL/WEIGHTS"
    if not given:
        return named
    if named is not None:
        raise InvalidConfig(pointer, f"give WEIGHTS or {named.pointer.split('/')[2]}, not both")
    return WeightsRef(given, pointer=pointer)


# What `block_faults` and `MakeStage` call it, and what yacs does.
YACS_NAMES = {"out_channels": "RES2_OUT_CHANNELS", "in_channels": "STEM_OUT_CHANNELS"}


class YacsConfig(_ResNetConfig):
    """`detectron2.build_resnet_backbone`: `MODEL.RESNETS` and `MODEL.BACKBONE.FREEZE_AT`, nested or dotted."""

    MODEL: YacsModel = YacsModel()

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        made, stem = self._made(), self.stem_spec()
        found = list(made.faults()) or [
            fault for blocks in made.stages() for block in blocks for fault in block_faults(block)
        ]
        if stem.norm == "gn" and stem.outputs % GROUPS_OF_NORM:
            found.append(("in_channels", f"the groups of GN do not divide {stem.outputs} channels"))
        for key, detail in found:
            yield f"MODEL/RESNETS/{YACS_NAMES.get(key, key.upper())}", detail
        yield from self.network_faults()

    def weights(self) -> WeightsRef | None:
        """`MODEL.WEIGHTS`, or the checkpoint named as in every type.

        Raises:
            InvalidConfig: both are named.
        """
        return weights_of_yacs(self.MODEL.WEIGHTS, super().weights())

    def _made(self) -> MakeStage:
        given = self.MODEL.RESNETS
        return MakeStage(
            type="make_stage",
            depth=given.DEPTH,
            norm=given.NORM,
            num_groups=given.NUM_GROUPS,
            width_per_group=given.WIDTH_PER_GROUP,
            in_channels=given.STEM_OUT_CHANNELS,
            out_channels=given.RES2_OUT_CHANNELS,
            stride_in_1x1=given.STRIDE_IN_1X1,
            res5_dilation=given.RES5_DILATION,
            deform_on_per_stage=given.DEFORM_ON_PER_STAGE,
            deform_modulated=given.DEFORM_MODULATED,
            deform_num_groups=given.DEFORM_NUM_GROUPS,
        )

    def stem_spec(self) -> StemSpec:
        """Three channels: detectron2 counts those of `MODEL.PIXEL_MEAN`."""
        given = self.MODEL.RESNETS
        return StemSpec(3, given.STEM_OUT_CHANNELS, NORM_KINDS[given.NORM])

    def all_stages(self) -> tuple[tuple[BlockSpec, ...], ...]:
        """`res2` and on, asked for or not."""
        return self._made().stages()

    def features_asked(self) -> tuple[str, ...] | None:
        """`OUT_FEATURES`."""
        return self.MODEL.RESNETS.OUT_FEATURES

    def features_key(self) -> str:
        """Where `OUT_FEATURES` is in the config."""
        return "MODEL/RESNETS/OUT_FEATURES"

    def frozen_stages(self) -> int:
        """`FREEZE_AT`."""
        return self.MODEL.BACKBONE.FREEZE_AT


# --- the families ---------------------------------------------------------------------------------


def _describe(config: _ResNetConfig) -> Description:
    spec = config.spec()
    return building.describe(lambda: ResNet(spec), in_channels=spec.stem.inputs)


def _build(config: _ResNetConfig) -> ResNet:
    return build(config.spec())


def _load(config: _ResNetConfig, state: StateDict, ref: WeightsRef) -> tuple[ResNet, LoadedKeys]:
    return load(config.spec(), state, ref)


def _example(type_name: str) -> Mapping[str, Any]:
    return {
        "type": type_name,
        "stem": {"type": "BasicStem", "in_channels": 3, "out_channels": 64, "norm": "FrozenBN"},
        "stages": {
            "type": "make_default_stages",
            "depth": 50,
            "stride_in_1x1": False,
            "norm": "FrozenBN",
        },
        "out_features": ["res2", "res3", "res4", "res5"],
        "freeze_at": 1,
    }


def _yacs_example(type_name: str) -> Mapping[str, Any]:
    resnets = {"DEPTH": 50, "OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    return {"type": type_name, "MODEL": {"BACKBONE": {"FREEZE_AT": 2}, "RESNETS": resnets}}


def _depths(type_name: str) -> Sequence[str]:  # noqa: ARG001 - the same for every spelling
    return [str(depth) for depth in BLOCKS_OF_DEPTH]


RESNET = Family(
    config=ResNetConfig,
    describe=_describe,
    build=_build,
    load=_load,
    example=_example,
    architectures=_depths,
    naming=RESNET_NAMES,
    key_library="detectron2",
)
YACS_RESNET = Family(
    config=YacsConfig,
    describe=_describe,
    build=_build,
    load=_load,
    example=_yacs_example,
    architectures=_depths,
    naming=RESNET_NAMES,
    key_library="detectron2",
)
