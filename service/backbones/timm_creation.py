"""One call of `timm.create_model`: what it is given, and what is seen of the model before timm wraps it.

timm builds the whole model, loads weights into it, and only then prunes and renames it for `features_only`. The
names of its checkpoints are those of the whole model, so a `Capture` looks on in between.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from service.backbones import building
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

# Norms by the names that timm's and OpenMMLab's users write; the values are timm's own names for them.
NORM_LAYERS = {
    "BN": "batchnorm2d", "BN2d": "batchnorm2d", "BatchNorm2d": "batchnorm2d",
    "GN": "groupnorm", "GroupNorm": "groupnorm", "GroupNorm1": "groupnorm1",
    "LN": "layernorm", "LayerNorm": "layernorm", "LN2d": "layernorm2d", "LayerNorm2d": "layernorm2d",
    "RmsNorm": "rmsnorm", "RmsNorm2d": "rmsnorm2d",
}  # fmt: skip
# What timm's constructors raise when they are given arguments that they cannot build from.
CONSTRUCTOR_ERRORS = (*building.CONSTRUCTOR_ERRORS, LookupError, AttributeError)


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


def follows_pretrained(name: str) -> bool:
    """Whether the network is another one when timm is asked for its own weights: in its batch norms' epsilon."""
    return name.partition(".")[0] == "fbnetc_100"


@dataclass
class Capture:
    """What is seen of the whole model between its construction and its wrapping, and what goes into it."""

    state: StateDict | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    first_stage: nn.Module | None = None
    offered: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()
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
    capture.classifiers = _classifiers(cfg)
    # No class count fits zero, so timm drops the classifier's weights instead of comparing their shapes.
    arguments = {**kwargs, "pretrained_cfg": cfg, "num_classes": 0, "strict": False}
    with _watched(model, capture):
        try:
            original(model, **arguments)
        except CONSTRUCTOR_ERRORS as error:
            # Reported once it is known whether the names of the wrapped model fit.
            capture.failure = error


def _classifiers(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that timm drops when the classes are others, whether or not the model has them."""
    found = cfg.get("classifier") or ()
    names = (found,) if isinstance(found, str) else found
    return tuple(f"{name}.{leaf}" for name in names for leaf in ("weight", "bias"))


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
        follows_pretrained(architecture.name)
        and not architecture.pretrained
        and "norm_layer" not in arguments
    ):
        arguments["bn_eps"] = 1e-5
    return arguments


def create(architecture: Architecture, capture: Capture, features: Mapping[str, Any]) -> nn.Module:
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
        raise refusal(architecture, error) from error
    finally:
        _CAPTURE.reset(token)
    return net.eval()


def refusal(architecture: Architecture, error: Exception) -> InvalidConfig:
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
