"""What OpenMMLab's convolutional backbones share: layers with mmcv's key names, keys of their configs, the family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import Backbone, BackboneConfig, Family, Indices, levels_by_index
from service.backbones.freezing import freeze_report, in_module_order, is_under
from service.backbones.norms import NORMS, NormConfig, NormSpec, make_norm
from service.backbones.tracing import at_least_zero, ceil_div
from service.checkpoints.layouts import Naming
from service.checkpoints.load import load_strict, never
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    LoadedKeys,
    WeightsRef,
)

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

Activation = Literal[
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "hardswish",
    "hard_sigmoid",
    "silu",
    "swish",
    "gelu",
    "sigmoid",
    "tanh",
    "none",
]


def make_divisible(value: float, divisor: int, *, at_least: int | None = None, floor: float = 0.9) -> int:
    """Channels rounded to a multiple of `divisor`, never below `floor` of what was asked."""
    rounded = max(at_least or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < floor * value else rounded


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationSpec:
    """An activation; `slope` is that of a leaky ReLU below 0."""

    kind: Activation = "relu"
    slope: float = 0.01


class HardSigmoid(nn.Module):
    """clip((x + bias) / divisor, 0, 1), which is mmcv's `HSigmoid`."""

    def __init__(self, bias: float = 3.0, divisor: float = 6.0) -> None:
        super().__init__()
        self.bias, self.divisor = bias, divisor

    def forward(self, maps: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return ((maps + self.bias) / self.divisor).clamp(0, 1)


class Swish(nn.Module):
    """SiLU in mmcv's two steps: deep networks with gates enlarge what one step rounds differently."""

    def forward(self, maps: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return maps * torch.sigmoid(maps)


ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
    "hard_sigmoid": HardSigmoid,
    "silu": nn.SiLU,
    "swish": Swish,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


def make_activation(spec: ActivationSpec) -> nn.Module:
    """An activation layer."""
    return nn.LeakyReLU(spec.slope) if spec.kind == "leaky_relu" else ACTIVATIONS[spec.kind]()


class SamePadConv2d(nn.Conv2d):
    """Pads like TensorFlow's SAME: the output is the input over the stride, rounded up; the odd pixel last."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, c, h, w] to [n, outputs, ceil(h / stride), ceil(w / stride)]."""
        rows, columns = (self._padding_of(axis, input.shape[2 + axis]) for axis in (0, 1))
        padded = F.pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _padding_of(self, axis: int, size: int) -> int:
        stride, reach = self.stride[axis], self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return at_least_zero((ceil_div(size, stride) - 1) * stride + reach - size)


class ConvModule(nn.Module):
    """mmcv's convolution, norm and activation; keys `conv` and the norm's kind (`bn`).

    The convolution has a bias where there is no norm, unless `bias` says otherwise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm: NormSpec | None,
        activation: ActivationSpec,
        same_pad: bool = False,
    ) -> None:
        super().__init__()
        make = SamePadConv2d if same_pad else nn.Conv2d
        self.conv = make(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=0 if same_pad else kernel // 2 * dilation if padding is None else padding,
            dilation=dilation,
            groups=groups,
            bias=norm is None if bias is None else bias,
        )
        self.norm_name = norm.kind if norm is not None else None
        if norm is not None:
            self.add_module(norm.kind, make_norm(norm, outputs))
        self.activate = make_activation(activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        maps = self.conv(maps)
        if self.norm_name is not None:
            maps = getattr(self, self.norm_name)(maps)
        activated: Tensor = self.activate(maps)
        return activated


class SqueezeExcite(nn.Module):
    """Channels weighed by a gate of their means (Hu et al., arXiv:1709.01507); keys `conv1.conv`, `conv2.conv`."""

    def __init__(self, channels: int, hidden: int, *, first: ActivationSpec, gate: ActivationSpec) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, hidden, 1, norm=None, activation=first)
        self.conv2 = ConvModule(hidden, channels, 1, norm=None, activation=gate)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        gate: Tensor = self.conv2(self.conv1(F.adaptive_avg_pool2d(maps, 1)))
        return maps * gate


class Scale(nn.Module):
    """Base of modules with parameters of their own, which say where training starts."""

    @abstractmethod
    def start(self) -> None:
        """Fill the module's own parameters."""


class Computed(nn.Module):
    """Base of modules with buffers that are computed and no weights: they are made after the memory is."""

    @abstractmethod
    def compute(self) -> None:
        """Fill the module's own buffers."""


def initialise(network: nn.Module) -> None:
    """Kaiming normal for convolutions, truncated normal for linear layers, 1 and 0 for norms."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, NORMS):
            module.reset_parameters()
        elif isinstance(module, Scale):
            module.start()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


# --- configs --------------------------------------------------------------------------------------

ACTIVATION_NAMES: dict[str, Activation] = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "HSwish": "hardswish",
    "Hardswish": "hardswish",
    "Swish": "swish",
    "SiLU": "silu",
    "GELU": "gelu",
    "ELU": "elu",
    "Sigmoid": "sigmoid",
    "HSigmoid": "hard_sigmoid",
    "Tanh": "tanh",
}


class ActivationConfig(BaseModel):
    """OpenMMLab's `act_cfg`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal[
        "ReLU",
        "ReLU6",
        "LeakyReLU",
        "HSwish",
        "Hardswish",
        "Swish",
        "SiLU",
        "GELU",
        "ELU",
        "Sigmoid",
        "HSigmoid",
        "Tanh",
    ]
    negative_slope: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="LeakyReLU only.")
    inplace: bool | None = Field(None, description="Saves memory; changes nothing here.")

    def spec(self) -> ActivationSpec:
        """The neutral spelling."""
        return ActivationSpec(
            ACTIVATION_NAMES[self.type], 0.01 if self.negative_slope is None else self.negative_slope
        )


class ConvConfig(BaseModel):
    """OpenMMLab's `conv_cfg`: the plain convolution, or one that pads like TensorFlow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv", "Conv2dAdaptivePadding"]


class PlainConvConfig(BaseModel):
    """OpenMMLab's `conv_cfg` where only the plain convolution is served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["Conv2d", "Conv"]


def pads_same(config: ConvConfig | None) -> bool:
    """Whether convolutions pad like TensorFlow's SAME."""
    return config is not None and config.type == "Conv2dAdaptivePadding"


class Spec(Protocol):
    """The neutral spelling of a network: a frozen dataclass that decides the numbers and the names of the weights."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def in_channels(self) -> int:
        """Channels of the images."""

    def features(self) -> tuple[FeatureInfo, ...]:
        """What the network gives."""


class SpecConfig(BackboneConfig):
    """A config that has a neutral spelling. `NETWORK` names the network that scopes share."""

    NETWORK: ClassVar[str]

    @abstractmethod
    def spec(self) -> Spec:
        """The neutral spelling."""

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that what only training or the reply reads makes no second model."""
        return {"type": self.NETWORK, **asdict(self.spec())}


class SharedConfig(SpecConfig):
    """The keys that all of OpenMMLab's backbones have in common."""

    norm_eval: bool = Field(False, description="True keeps every batch norm in eval mode.")
    with_cp: bool = Field(False, description="Saves memory in training; changes nothing here.")

    def freeze(self) -> Freeze:
        """OpenMMLab's `norm_eval` and `norm_cfg.requires_grad`."""
        norm = getattr(self, "norm_cfg", None)
        takes_gradient = norm is None or norm.requires_grad
        return Freeze(norm_eval=self.norm_eval, all_norms=not takes_gradient)


class OpenMMLabConfig(SharedConfig):
    """The keys of a backbone whose outputs have indices and whose stages can be frozen."""

    out_indices: Indices
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=64)] = -1

    def freeze(self) -> Freeze:
        """OpenMMLab's `frozen_stages`, `norm_eval` and `norm_cfg.requires_grad`."""
        return replace(super().freeze(), stages=self.frozen_stages if self.frozen_stages >= 0 else None)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`."""
        return levels_by_index(self.out_indices, description.features)


def batch_norm(eps: float = 1e-5) -> NormConfig:
    """The default `norm_cfg` of most types."""
    return NormConfig(type="BN", eps=eps)


def norm_fault(norm: NormConfig, widths: Iterable[int]) -> tuple[str, str] | None:
    """What is wrong with a `norm_cfg` on layers of these widths, as (key, detail)."""
    if (fault := norm.fault()) is not None:
        return "norm_cfg/num_groups", fault
    groups = norm.num_groups or 1
    uneven = next((width for width in widths if width % groups), None)
    if uneven is not None:
        return "norm_cfg/num_groups", f"{groups} groups do not divide {uneven} channels"
    return None


def named_arch(names: Iterable[str], *, fold: bool = True) -> BeforeValidator:
    """A validator of `arch`: a known name, in lower case where the library folds it; an unknown one lists them."""
    known = tuple(names)

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name = value.lower() if fold else value
        if name not in known:
            raise ValueError(f"is not one of {', '.join(known)}")
        return name

    return BeforeValidator(check)


MAX_EQUALS = 64


def _one_of_equals(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        return value
    if not 0 < len(value) <= MAX_EQUALS or any(other != value[0] for other in value):
        raise ValueError(
            f"a list has 1 to {MAX_EQUALS} entries, which are all the same; no others are served"
        )
    return value[0]


# Of an object that all layers or stages have: a list with one for each is taken where these are the same.
OneForAll = BeforeValidator(_one_of_equals)


# --- families -------------------------------------------------------------------------------------


def frozen_by_stage(
    network: Backbone,
    freeze: Freeze,
    names: Callable[[int], Sequence[str]],
    *,
    configured: Sequence[str] | None = None,
) -> FreezeReport:
    """The report of a family that freezes `names(k)` for `frozen_stages` k, and nothing below 0.

    `configured` names the modules whose norms follow `norm_cfg`; None is the network.
    """
    stages = freeze.stages
    return freeze_report(network, freeze, () if stages is None else names(stages), configured=configured)


def frozen_with_live_stem_norms(
    network: Backbone, freeze: Freeze, stem: str, names: Callable[[int], Sequence[str]]
) -> FreezeReport:
    """The same, where `stem` loses its gradient from 0 on and its norms stay in train mode."""
    layers = frozen_by_stage(network, freeze, names)
    if freeze.stages is None:
        return layers
    first = [name for name, _ in network.named_parameters() if is_under(name, (stem,))]
    return in_module_order(network, freeze, (*first, *layers.parameters), layers.norms)


def map_features(channels: Sequence[int], strides: Sequence[int]) -> tuple[FeatureInfo, ...]:
    """One map an index, counted from 0."""
    pairs = zip(channels, strides, strict=True)
    return tuple(FeatureInfo(i, str(i), width, stride, "NCHW") for i, (width, stride) in enumerate(pairs))


def deepest(nodes: Sequence[str]) -> int:
    """The largest index among nodes that are named by index."""
    return max(int(node) for node in nodes)


C = TypeVar("C", bound=SpecConfig)
B = TypeVar("B", bound=Backbone)


def allocated(make: Callable[[], B]) -> B:
    """The network with memory that a checkpoint fills, and its computed buffers."""
    network = building.unset(make)
    for module in network.modules():
        if isinstance(module, Computed):
            module.compute()
    return network


def settle_computed(network: nn.Module, state: StateDict, keys: LoadedKeys) -> LoadedKeys:
    """`keys` with what the file has of the computed buffers counted as loaded, where the numbers are those."""
    kept = set(network.state_dict())
    buffers = network.named_buffers(remove_duplicate=False)
    computed = {name: buffer for name, buffer in buffers if name not in kept}
    same = {
        name
        for name in keys.unexpected
        if (buffer := computed.get(name.removeprefix(keys.prefix))) is not None
        and buffer.shape == state[name].shape
        and torch.allclose(buffer.double(), state[name].double(), rtol=1e-5, atol=1e-6)
    }
    unexpected = tuple(name for name in keys.unexpected if name not in same)
    return replace(keys, loaded=keys.loaded + len(same), unexpected=unexpected)


def _as_written(config: Any, state: StateDict) -> StateDict:  # noqa: ARG001 - most families change nothing
    return state


def _all_needed(config: Any, state: StateDict) -> Callable[[str], bool]:  # noqa: ARG001 - as above
    return never


def _no_tokens(spec: Any) -> int:  # noqa: ARG001 - maps have none
    return 0


def make_family(
    config: type[C],
    network: Callable[[Any], B],
    *,
    example: Mapping[str, Any],
    architectures: Sequence[str] = (),
    adapt: Callable[[C, StateDict], StateDict] = _as_written,
    optional: Callable[[C, StateDict], Callable[[str], bool]] = _all_needed,
    prefix_tokens: Callable[[Any], int] = _no_tokens,
    naming: Naming | None = None,
    library: str = "",
) -> Family[C]:
    """The family of a network that is built from its config's `spec()`.

    Args:
        config: the spelling.
        network: makes the network of a spec.
        example: a config that works as it stands, without its type.
        architectures: names for the documentation.
        adapt: a file's tensors by the network's names and shapes.
        optional: which entries a file may leave out; they start at 1 and 0 as norms do.
        prefix_tokens: how many tokens come before those of the patches, by the spec.
        naming: the names of the weights in other libraries.
        library: which of these names the network has; the first of them where it is empty.
    """

    def describe(given: C) -> Description:
        spec = given.spec()
        return building.description(
            building.on_meta(lambda: network(spec)),
            spec.features(),
            in_channels=spec.in_channels,
            input_defaults=given.input_defaults(),
            prefix_tokens=prefix_tokens(spec),
        )

    def build(given: C) -> B:
        spec = given.spec()
        made = allocated(lambda: network(spec))
        initialise(made)
        return made

    def load(given: C, state: StateDict, ref: WeightsRef) -> tuple[B, LoadedKeys]:
        spec = given.spec()
        made = allocated(lambda: network(spec))
        for module in made.modules():
            if isinstance(module, NORMS):
                module.reset_parameters()
        adapted = adapt(given, state)
        keys = load_strict(made, adapted, ref, optional=optional(given, adapted))
        return made, settle_computed(made, adapted, keys)

    return Family(
        config=config,
        describe=describe,
        build=build,
        load=load,
        example=lambda type_name: {"type": type_name, **example},
        architectures=lambda type_name: architectures,  # noqa: ARG005 - the same for every spelling
        naming=naming,
        key_library=library,
    )
