"""torchvision's classification models: `torchvision.<model>`, with features by the names of graph nodes.

The model stays whole, with the names of its checkpoints; features are subgraphs of its trace that share its weights
and stop at the deepest node asked for. Node names are those of `torchvision.models.feature_extraction`
(`layer2.1.relu_1`; `layer2` is the last node in it).
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import AfterValidator, Field, StrictBool, model_validator
from torch import Tensor, fx, nn

from service.backbones import building, dependencies
from service.backbones.base import Backbone, BackboneConfig, Family
from service.backbones.building import SkipInitialisers
from service.backbones.freezing import FROZEN_BATCH_NORM, norm_names
from service.backbones.norms import BATCH_NORMS
from service.backbones.shapes import shapes_only
from service.backbones.tables import TorchvisionEntry, nearest, torchvision_models
from service.checkpoints.keys import guess_prefix, strip_prefix
from service.checkpoints.load import load_strict
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Layout,
    Level,
    LoadedKeys,
    PreprocessDefaults,
    WeightsRef,
)
from service.errors import Fault, InvalidConfig, UnknownBackbone

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

MAX_NODES = 64
MAX_EXTRACTORS = 16
NODES_POINTER = "#/backbone/return_nodes"
# Height and width unlike each other and unlike any channel count at any stride up to 32.
PROBE_SIZE = (256, 448)
VALID_PADDING_LOSS = 3

NodeName = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$")]


def _unlike(names: Any) -> Any:
    values = list(names.values()) if isinstance(names, Mapping) else list(names)
    if len(set(values)) != len(values):
        raise ValueError("two levels have the same name")
    return names


NodeMap = Annotated[
    dict[NodeName, NodeName], Field(min_length=1, max_length=MAX_NODES), AfterValidator(_unlike)
]
NodeList = Annotated[tuple[NodeName, ...], Field(min_length=1, max_length=MAX_NODES), AfterValidator(_unlike)]

# Names in torchvision's own files that its modules rename when they load them.
RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "densenet": ((r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
    "vision_transformer": ((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),
}


@dataclass(frozen=True)
class Architecture:
    """What torchvision builds: a model's name and what its builder is given, as plain JSON values."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """[height, width] of the input it is made for, in pixels."""
        given = dict(self.arguments).get("image_size")
        return (given, given) if given is not None else torchvision_models()[self.name].size


# --- config ---------------------------------------------------------------------------------------


class TorchvisionConfig(BackboneConfig):
    """`torchvision.<model>`: a classification model, and the nodes of its graph to return."""

    VIEW: ClassVar[frozenset[str]] = BackboneConfig.VIEW | {
        "named_weights",
        "pretrained",
        "return_nodes",
        "progress",
        "num_classes",
    }
    # Keys that only some builders take.
    BUILDER_KEYS: ClassVar[tuple[str, ...]] = (
        "replace_stride_with_dilation",
        "norm_layer",
        "image_size",
        "transform_input",
    )

    named_weights: Annotated[str, Field(max_length=128)] | None = Field(
        None,
        alias="weights",
        description="torchvision's own weights: DEFAULT, IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2, …",
    )
    pretrained: StrictBool = Field(False, description="torchvision's former spelling of its first weights.")
    return_nodes: NodeMap | NodeList | None = Field(
        None, description="Nodes to return: a list of names, or names and what to call their levels."
    )
    replace_stride_with_dilation: tuple[StrictBool, StrictBool, StrictBool] | None = None
    norm_layer: Literal["FrozenBatchNorm2d", "BatchNorm2d"] | None = None
    image_size: Annotated[int, Field(strict=True, ge=1, le=2048)] | None = None
    transform_input: StrictBool | None = Field(
        None,
        description="Undo another normalisation of the input; torchvision's default with its own weights.",
    )
    progress: StrictBool = Field(True, description="No effect.")
    num_classes: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = Field(
        None, description="No effect on features."
    )

    @model_validator(mode="after")
    def _taken_by_the_builder(self) -> TorchvisionConfig:
        entry = self.entry()
        given = [key for key in self.BUILDER_KEYS if getattr(self, key) is not None]
        refused = [key for key in given if key not in entry.keys]
        faults = [Fault(f"#/backbone/{key}", f"{entry.name} does not take {key}") for key in refused]
        if faults:
            raise InvalidConfig(faults[0].pointer, faults[0].detail, *faults[1:])
        self._weights_member()
        return self

    def entry(self) -> TorchvisionEntry:
        """What the table knows of the model.

        Raises:
            UnknownBackbone: torchvision has no such model.
        """
        name = self.type.removeprefix("torchvision.")
        entry = torchvision_models().get(name)
        if entry is None:
            names = nearest(name, torchvision_models())
            raise UnknownBackbone("torchvision model", name[:128], names, pointer="#/backbone/type")
        return entry

    def arguments(self) -> dict[str, Any]:
        """What the builder is given; empty for the model as torchvision defines it."""
        entry = self.entry()
        given: dict[str, Any] = {}
        if self.replace_stride_with_dilation is not None and any(self.replace_stride_with_dilation):
            given["replace_stride_with_dilation"] = self.replace_stride_with_dilation
        image_size = self._image_size()
        if image_size is not None and (image_size, image_size) != entry.size:
            given["image_size"] = image_size
        if self.norm_layer is not None and entry.module == "mobilenetv3":
            # Only there does a plain batch norm differ from the builder's own: in its epsilon.
            given["norm_layer"] = "BatchNorm2d"
        if self._transforms_input():
            given["transform_input"] = True
        return given

    def _image_size(self) -> int | None:
        """The side of the input, for models that fix it; some of torchvision's weights do that too."""
        member = self._weights_member()
        if "image_size" not in self.entry().keys or member is None:
            return self.image_size
        side = int(_weights_enum(self.entry().name)[member].meta["min_size"][0])
        if self.image_size not in (None, side):
            raise InvalidConfig("#/backbone/image_size", f"the weights {member} are for {side} pixels")
        return side

    def _transforms_input(self) -> bool:
        if "transform_input" not in self.entry().keys:
            return False
        named = self._weights_member() is not None
        return named if self.transform_input is None else self.transform_input

    def architecture(self) -> dict[str, Any]:
        """The network; the same for every spelling of it."""
        return {"type": f"torchvision.{self.entry().name}"} | self.arguments()

    def built(self) -> Architecture:
        """The network as `build` wants it."""
        return Architecture(self.entry().name, tuple(sorted(self.arguments().items())))

    def _weights_member(self) -> str | None:
        """The name of torchvision's own weights that the config asks for.

        Raises:
            InvalidConfig: the model has no weights of this name.
        """
        entry = self.entry()
        if self.named_weights is None:
            # What `pretrained=True` meant before torchvision had several weights for a model.
            first = "IMAGENET1K_V1" if "IMAGENET1K_V1" in entry.weights else "DEFAULT"
            return first if self.pretrained else None
        member = self.named_weights.removeprefix(f"{entry.weights_class}.")
        if member != "DEFAULT" and member not in entry.weights:
            known = ", ".join(("DEFAULT", *entry.weights))
            raise InvalidConfig("#/backbone/weights", f"{entry.name} has the weights {known}")
        return member

    def weights(self) -> WeightsRef | None:
        """torchvision's own weights, as the URL that it names, or the checkpoint named.

        Raises:
            InvalidConfig: both are named.
        """
        named, member = super().weights(), self._weights_member()
        if member is None:
            return named
        pointer = f"#/backbone/{'pretrained' if self.named_weights is None else 'weights'}"
        if named is not None:
            raise InvalidConfig(pointer, "give torchvision's own weights or a checkpoint, not both")
        return WeightsRef(_weights_enum(self.entry().name)[member].url, pointer=pointer)

    def freeze(self) -> Freeze:
        """The batch norms, where they are asked for as frozen ones."""
        return Freeze(all_norms=self.norm_layer == FROZEN_BATCH_NORM)

    def input_defaults(self) -> PreprocessDefaults:
        """What torchvision's own weights were trained with; empty where the config names none."""
        member = self._weights_member()
        if member is None:
            return PreprocessDefaults()
        preset = _weights_enum(self.entry().name)[member].transforms()
        crop, resize = preset.crop_size[0], preset.resize_size[0]
        return PreprocessDefaults(
            size=(crop, crop),
            crop_pct=crop / resize,
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The nodes of `return_nodes` in the order given, or the last of each stride.

        Raises:
            InvalidConfig: no such node, or one that gives nothing that can be returned.
        """
        if self.return_nodes is None:
            return tuple(Level(found.index, found.node, found.node) for found in description.features)
        pairs = self.return_nodes
        named = pairs if isinstance(pairs, dict) else {node: node for node in pairs}
        known = {feature.node for feature in description.features}
        if not known.issuperset(named):
            _facts(self.built(), tuple(sorted(named)))
        return tuple(Level(index, name, node) for index, (node, name) in enumerate(named.items()))


def _weights_enum(name: str) -> Any:
    from torchvision.models import get_model_weights

    return get_model_weights(name)


# --- building -------------------------------------------------------------------------------------

_PATCHING = threading.Lock()


def _create(architecture: Architecture) -> nn.Module:
    """The whole classification model on the current default device; downloads nothing.

    Raises:
        InvalidConfig: torchvision cannot build it from these arguments.
    """
    from torchvision.models import get_model

    _let_regnet_count()
    arguments = _builder_arguments(architecture)
    try:
        net: nn.Module = get_model(architecture.name, weights=None, **arguments)
    except building.CONSTRUCTOR_ERRORS as error:
        if not architecture.arguments:
            raise
        key = architecture.arguments[0][0]
        detail = f"torchvision cannot build {architecture.name} with this {key}"
        raise InvalidConfig(f"#/backbone/{key}", detail) from error
    return net.eval()


def _builder_arguments(architecture: Architecture) -> dict[str, Any]:
    arguments = dict(architecture.arguments)
    if "norm_layer" in arguments:
        arguments["norm_layer"] = nn.BatchNorm2d
    if "replace_stride_with_dilation" in arguments:
        arguments["replace_stride_with_dilation"] = list(arguments["replace_stride_with_dilation"])
    if torchvision_module(architecture.name) in ("googlenet", "inception"):
        # Their own default; given, it keeps them from warning about it.
        arguments["init_weights"] = True
    return arguments


def torchvision_module(name: str) -> str:
    """The file of torchvision that a model comes from, without `.py`."""
    from torchvision.models import get_model_builder

    return str(get_model_builder(name).__module__).rpartition(".")[2]


def _let_regnet_count() -> None:
    """Let RegNets be built on the meta device.

    torchvision works out their widths with tensors on the default device and reads the numbers, which the meta
    device has not; done on the CPU it is the same everywhere.
    """
    from torchvision.models.regnet import BlockParams

    with _PATCHING:
        if hasattr(BlockParams, "counted_on_cpu"):
            return
        counted: Any = BlockParams.from_init_params

        def from_init_params(_: type, *args: Any, **kwargs: Any) -> Any:
            with torch.device("cpu"):
                return counted(*args, **kwargs)

        BlockParams.from_init_params = classmethod(from_init_params)
        BlockParams.counted_on_cpu = True


@lru_cache(maxsize=4)
def twin(architecture: Architecture) -> TorchvisionBackbone:
    """The model on the meta device: for shapes, dependencies and its graph."""
    with torch.inference_mode(False), torch.device("meta"), SkipInitialisers():
        return TorchvisionBackbone(_create(architecture), architecture, ())


# --- the graph ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Traced:
    """The graph of a model in eval mode, and its nodes by every name that means them."""

    graph: fx.Graph
    nodes: Mapping[str, fx.Node]


@lru_cache(maxsize=16)
def _traced(architecture: Architecture) -> _Traced:
    tracer, net = _tracer(), twin(architecture).net
    # While torch.fx traces, its hooks are on the modules of all threads: see `_tracer`.
    with _PATCHING:
        graph = tracer.trace(net)
    nodes: dict[str, fx.Node] = {}
    for node, name in tracer.node_to_qualname.items():
        if node.op == "output" or "tensor_constant" in str(node):
            continue
        # `layer1` means the last node in `layer1`, so later ones overwrite earlier ones.
        parts = name.split(".")
        nodes.update({".".join(parts[:depth]): node for depth in range(1, len(parts) + 1)})
    return _Traced(graph, nodes)


def _tracer() -> Any:
    """torchvision's tracer, with its defaults, deaf to what other threads do meanwhile."""
    import torchvision.ops
    from torchvision.models.feature_extraction import NodePathTracer

    class OwnThreadTracer(NodePathTracer):  # type: ignore[misc]  # untyped base
        """torch.fx patches `nn.Module` itself; a model that runs in another thread must not be traced."""

        thread = threading.get_ident()
        # MaxViT computes with its buffers: else what it makes of the traced model's would be constants of the graph.
        proxy_buffer_attributes = True

        def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return forward(*args, **kwargs)
            return super().call_module(m, forward, args, kwargs)

        def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
            if threading.get_ident() != self.thread:
                return attr_val
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    members = vars(torchvision.ops).values()
    leaves = [member for member in members if isinstance(member, type) and issubclass(member, nn.Module)]
    return OwnThreadTracer(autowrap_modules=(math, torchvision.ops), leaf_modules=leaves)


def _extractor(net: nn.Module, traced: _Traced, names: Sequence[str]) -> fx.GraphModule:
    """The part of a model up to the deepest of these nodes; its parameters are the model's own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(traced.graph, copies)
    graph.output({name: copies[traced.nodes[name]] for name in names})
    module = fx.GraphModule(net, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module.eval()


def _known_nodes(architecture: Architecture, names: Sequence[str]) -> _Traced:
    """The graph, which has all of these nodes.

    Raises:
        InvalidConfig: it has not; carries the nearest names.
    """
    traced = _traced(architecture)
    faults = [_no_such_node(name, traced) for name in names if name not in traced.nodes]
    if faults:
        raise InvalidConfig(faults[0].pointer, faults[0].detail, *faults[1:])
    return traced


def _no_such_node(name: str, traced: _Traced) -> Fault:
    near = nearest(name, traced.nodes, score=50)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return Fault(NODES_POINTER, f"no node named {name!r}{hint}")


@dataclass(frozen=True)
class _NodeFacts:
    """What a node gives for one image at the native size, and how: maps may have their channels last."""

    shape: tuple[int, ...]
    channels_last: bool

    @property
    def layout(self) -> Layout:
        return LAYOUTS[len(self.shape) + 1]


LAYOUTS: Mapping[int, Layout] = {4: "NCHW", 3: "NLC", 2: "NC"}


@lru_cache(maxsize=256)
def _facts(architecture: Architecture, names: tuple[str, ...]) -> Mapping[str, _NodeFacts]:
    """What these nodes give, from passes on the meta device.

    Raises:
        InvalidConfig: no such node, or one that gives no batch of maps, tokens or vectors.
    """
    extractor = _extractor(twin(architecture).net, _known_nodes(architecture, names), names)
    native = _meta_pass(extractor, architecture.size)
    for name, output in native.items():
        _refuse_unreturnable(name, output)
    fixed = torchvision_models()[architecture.name].fixed
    probed = native if fixed else _meta_pass(extractor, PROBE_SIZE)
    last = {name for name, output in probed.items() if not fixed and _has_channels_last(output)}
    shapes = {
        name: output.movedim(-1, 1).shape if name in last else output.shape for name, output in native.items()
    }
    return {name: _NodeFacts(tuple(shape[1:]), name in last) for name, shape in shapes.items()}


def _meta_pass(module: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    with shapes_only():
        outputs: dict[str, Any] = module(torch.empty(2, 3, *size))
    return outputs


def _refuse_unreturnable(name: str, output: Any) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise InvalidConfig(NODES_POINTER, f"{name} gives no numbers")
    if output.ndim not in LAYOUTS or output.shape[0] != 2:
        detail = f"{name} gives neither maps nor tokens nor vectors: {output.ndim} dimensions for 2 images"
        raise InvalidConfig(NODES_POINTER, f"{detail}, the first of {output.shape[0]}")


def _has_channels_last(output: Tensor) -> bool:
    """Whether a map is [n, h, w, c]: its second and third dimension follow the sides of the image."""
    if output.ndim != 4:
        return False
    return not _follow_sides(output.shape[2:]) and _follow_sides(output.shape[1:3])


def _follow_sides(sides: Sequence[int]) -> bool:
    height, width = sides
    return abs(width - height * PROBE_SIZE[1] / PROBE_SIZE[0]) <= VALID_PADDING_LOSS


# --- the module -----------------------------------------------------------------------------------

_EXTRACTORS = threading.Lock()


class TorchvisionBackbone(Backbone):
    """A torchvision classification model that gives the outputs of its graph's nodes.

    Attributes:
        net: the whole model.
        architecture: what it was built from.
    """

    def __init__(self, net: nn.Module, architecture: Architecture, features: tuple[FeatureInfo, ...]) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.features = features
        self._extractors: OrderedDict[tuple[str, ...], fx.GraphModule] = OrderedDict()

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Compute features.

        Args:
            images: [n, 3, h, w], float, already normalised.
            nodes: names of nodes, in full or cut off after a module.

        Returns:
            one tensor a node: maps as [n, c, h, w], tokens as [n, l, c], vectors as [n, c].

        Raises:
            InvalidConfig: no such node, or one that gives none of these.
        """
        return self.bound(nodes)(images)

    def bound(self, nodes: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
        """As `Backbone.bound`; raises what `forward` raises."""
        names = tuple(sorted(set(nodes)))
        facts = _facts(self.architecture, names)
        extractor = self._extractor(names)

        def features(images: Tensor) -> dict[str, Tensor]:
            # Called as a module it would print a traceback to stderr for every size that the network does not take.
            outputs = extractor.forward(images)
            return {name: _channels_first(outputs[name], facts[name]) for name in nodes}

        return features

    def _extractor(self, names: tuple[str, ...]) -> fx.GraphModule:
        with _EXTRACTORS:
            found = self._extractors.pop(names, None)
            if found is None:
                found = _extractor(self.net, _known_nodes(self.architecture, names), names)
            self._extractors[names] = found
            if len(self._extractors) > MAX_EXTRACTORS:
                self._extractors.popitem(last=False)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchvisionBackbone:
        # Extractors hold the model's buffers; moved elsewhere, the model has others.
        self._extractors.clear()
        return cast("TorchvisionBackbone", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]  # torch's

    def checkpoint_entries(self) -> Mapping[str, Tensor]:
        """The weights by torchvision's own names."""
        return self.net.state_dict()

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Freeze every batch norm if frozen ones were asked for; torchvision's models freeze nothing else."""
        everything = [name for name, _ in self.net.named_parameters()]
        norms = tuple(norm_names(self.net, BATCH_NORMS)) if freeze.all_norms or freeze.norm_eval else ()
        frozen = [name for name in everything if freeze.all_norms and name.rpartition(".")[0] in norms]
        return FreezeReport(stages=None, parameters=tuple(frozen), norms=norms, of=len(everything))

    def needs(self, node: str) -> frozenset[str]:
        """The entries of a checkpoint that a node cannot do without."""
        return _needs(self.architecture, node)


@lru_cache(maxsize=256)
def _needs(architecture: Architecture, node: str) -> frozenset[str]:
    whole = twin(architecture)
    extractor = _extractor(whole.net, _known_nodes(architecture, [node]), [node])
    with torch.inference_mode(False):
        images = torch.empty(1, 3, *architecture.size, device="meta")
    output: Tensor = dependencies.forward_with_graph(extractor, images)[node]
    return dependencies.entries_behind(dependencies.parameters_behind(output, whole.net), whole.net)


def _channels_first(output: Tensor, facts: _NodeFacts) -> Tensor:
    # Swin gives NHWC until its last permutation; the service promises NCHW.
    return output.permute(0, 3, 1, 2) if facts.channels_last else output


# --- the family -----------------------------------------------------------------------------------


def build(config: TorchvisionConfig) -> TorchvisionBackbone:
    """The network with random weights on the current default device."""
    architecture, features = config.built(), describe(config).features
    net = building.initialised(lambda: _create(architecture))
    return TorchvisionBackbone(net, architecture, features)


def load(
    config: TorchvisionConfig, state: StateDict, ref: WeightsRef
) -> tuple[TorchvisionBackbone, LoadedKeys]:
    """The network with the tensors of a checkpoint of the whole model.

    What no selected node depends on (a classifier, auxiliary heads) may be missing; it is reported.

    Raises:
        CheckpointMismatch: an entry that a selected node needs is missing, or one has the wrong shape.
    """
    architecture, description = config.built(), describe(config)
    with SkipInitialisers():
        backbone = TorchvisionBackbone(_create(architecture), architecture, description.features)
    needed = frozenset[str]().union(*(backbone.needs(level.node) for level in config.levels(description)))
    counted = [name for name in needed if not name.endswith("num_batches_tracked")]
    bare, prefix, foreign = strip_prefix(
        state, ref.prefix or guess_prefix(state, counted), pointer=ref.pointer
    )
    fitting, other = _without_other_head(_renamed(bare, config.entry().module), backbone.net, needed)
    keys = load_strict(
        backbone.net, fitting, replace(ref, prefix=None), optional=lambda name: name not in needed
    )
    return backbone, replace(keys, unexpected=(*keys.unexpected, *other, *foreign), prefix=prefix)


def _without_other_head(
    state: StateDict, net: nn.Module, needed: frozenset[str]
) -> tuple[StateDict, tuple[str, ...]]:
    """The state without what has another shape and is not needed: a classifier for other classes."""
    own = net.state_dict()
    other = [n for n, t in state.items() if n in own and n not in needed and own[n].shape != t.shape]
    return {name: tensor for name, tensor in state.items() if name not in other}, tuple(other)


def _renamed(state: StateDict, module: str) -> StateDict:
    """The names that the model's modules have now, for those that torchvision's own files have."""
    return {_present_name(name, RENAMED.get(module, ())): tensor for name, tensor in state.items()}


def _present_name(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def describe(config: TorchvisionConfig) -> Description:
    """Features and sizes: from the table, or from a network on the meta device if the config changes it."""
    entry, architecture = config.entry(), config.built()
    if not {"replace_stride_with_dilation", "image_size"} & dict(architecture.arguments).keys():
        return entry.description()
    return building.description(
        twin(architecture),
        node_features(architecture, [feature.node for feature in entry.features]),
        in_channels=3,
        input_defaults=PreprocessDefaults(size=architecture.size),
        fixed_input=entry.fixed,
        prefix_tokens=entry.prefix_tokens,
    )


def node_features(architecture: Architecture, nodes: Sequence[str]) -> tuple[FeatureInfo, ...]:
    """What nodes give at the native size, numbered in the order given."""
    facts = _facts(architecture, tuple(nodes))
    return tuple(_feature(index, node, facts[node], architecture.size[0]) for index, node in enumerate(nodes))


def _feature(index: int, node: str, facts: _NodeFacts, height: int) -> FeatureInfo:
    if facts.layout != "NCHW":
        return FeatureInfo(index, node, facts.shape[-1], None, facts.layout, facts.shape)
    # Valid padding loses a few rows: 299 pixels become 73 at stride 4.
    stride = 2 ** round(math.log2(height / facts.shape[1]))
    return FeatureInfo(index, node, facts.shape[0], stride, "NCHW", facts.shape)


def _example(type: str) -> Mapping[str, Any]:
    features = torchvision_models()[type.removeprefix("torchvision.")].features
    return {"type": type, "return_nodes": {feature.node: f"f{feature.index}" for feature in features[-2:]}}


TORCHVISION = Family(
    config=TorchvisionConfig,
    describe=describe,
    build=build,
    load=load,
    example=_example,
    key_library="torchvision",
)
