"""How images become the tensor of a network: what a client may say, and what it then means.

Two foreign spellings are understood beside our own: OpenMMLab's `data_preprocessor` and detectron2's
`pixel_mean`, `pixel_std`, `input_format`. Both give means in units of 0–255 and in the channel order that the
network sees; OpenMMLab loads BGR and turns it with `to_rgb` or `bgr_to_rgb`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from service.config.spec import PreprocessDefaults
from service.errors import InvalidConfig
from service.validation import invalid

Mode = Literal["crop", "resize", "native"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Order = Literal["rgb", "bgr"]
MODES = ("crop", "resize", "native")

Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Number = Annotated[float, Field(ge=-1e4, le=1e4)]
Positive = Annotated[float, Field(gt=0, le=1e4)]
Mean = tuple[Number, Number, Number]
Std = tuple[Positive, Positive, Positive]

IMAGENET = PreprocessDefaults(
    size=(224, 224),
    crop_pct=0.875,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def _square(value: Any) -> Any:
    """One side means a square."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[tuple[Side, Side], BeforeValidator(_square)]


@dataclass(frozen=True)
class PreprocessRequest:
    """What a client said, in neutral words; None where it said nothing. Mean and std are in units of 0–1."""

    mode: Mode | None = None
    size: tuple[int, int] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channel_order: Order | None = None
    size_divisor: int | None = None


@dataclass(frozen=True)
class PreprocessSpec:
    """What is done to every image of a request.

    `size` is [height, width], None for `native`. `mean` and `std` are in units of 0–1, in the order of the
    channels that the network sees.
    """

    mode: Mode
    size: tuple[int, int] | None
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: Order
    size_divisor: int

    def as_json(self) -> dict[str, Any]:
        """Plain data in the words of the request; only what has an effect."""
        unused = {"crop": (), "resize": ("crop_pct",), "native": ("size", "crop_pct", "interpolation")}[
            self.mode
        ]
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in unused}


class _Form(BaseModel):
    """One of the spellings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OwnForm(_Form):
    """The service's own keys. `mean` and `std` are in units of 0–1, or of 0–255 where one of them is over 1."""

    mode: Mode | None = None
    size: Size | None = None
    crop_pct: Annotated[float, Field(ge=0.05, le=1)] | None = None
    interpolation: Interpolation | None = None
    mean: Mean | None = None
    std: Std | None = None
    channel_order: Order | None = None
    size_divisor: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None

    def neutral(self) -> PreprocessRequest:
        """In neutral words."""
        scale = 255.0 if max(map(abs, (*(self.mean or ()), *(self.std or ()))), default=0) > 1 else 1.0
        given = self.model_dump(exclude={"mean", "std"})
        return PreprocessRequest(**given, mean=_scaled(self.mean, scale), std=_scaled(self.std, scale))


class DataPreprocessor(_Form):
    """OpenMMLab's `data_preprocessor`; keys about labels and augmentation say nothing here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Annotated[str, Field(max_length=128)] | None = None
    mode: Mode | None = None
    size: Size | None = None
    crop_pct: Annotated[float, Field(ge=0.05, le=1)] | None = None
    interpolation: Interpolation | None = None
    mean: Mean | None = None
    std: Std | None = None
    to_rgb: StrictBool = False
    bgr_to_rgb: StrictBool = False
    pad_size_divisor: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    pad_value: Literal[0] = 0

    def neutral(self) -> PreprocessRequest:
        """In neutral words. A detector's images keep their size."""
        detects = (self.type or "").rpartition(".")[2].startswith("Det")
        given = self.model_dump(include={"size", "crop_pct", "interpolation"})
        return PreprocessRequest(
            **given,
            mode=self.mode or ("native" if detects else None),
            mean=_scaled(self.mean, 255.0),
            std=_scaled(self.std, 255.0),
            channel_order="rgb" if self.to_rgb or self.bgr_to_rgb else "bgr",
            size_divisor=self.pad_size_divisor,
        )


class PixelForm(_Form):
    """detectron2's and detrex' keys; images keep their size."""

    mode: Mode = "native"
    size: Size | None = None
    pixel_mean: Mean
    pixel_std: Std = (1.0, 1.0, 1.0)
    input_format: Literal["RGB", "BGR"] = "BGR"
    size_divisor: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None

    def neutral(self) -> PreprocessRequest:
        """In neutral words."""
        return PreprocessRequest(
            mode=self.mode,
            size=self.size,
            mean=_scaled(self.pixel_mean, 255.0),
            std=_scaled(self.pixel_std, 255.0),
            channel_order="rgb" if self.input_format == "RGB" else "bgr",
            size_divisor=self.size_divisor,
        )


def _scaled(values: Sequence[float] | None, scale: float) -> tuple[float, ...] | None:
    return None if values is None else tuple(value / scale for value in values)


OPENMMLAB_KEYS = frozenset({"type", "to_rgb", "bgr_to_rgb", "pad_size_divisor"})


def _form_of(raw: Mapping[str, Any]) -> type[OwnForm] | type[DataPreprocessor] | type[PixelForm]:
    if "pixel_mean" in raw or "pixel_std" in raw:
        return PixelForm
    return DataPreprocessor if OPENMMLAB_KEYS & set(raw) else OwnForm


def parse_preprocess(raw: object, *, pointer: str = "#/preprocess") -> PreprocessRequest:
    """A client's `preprocess` in neutral words: an object in one of the three spellings, or a mode.

    Raises:
        InvalidConfig: what is wrong and where.
    """
    if raw is None:
        return PreprocessRequest()
    if isinstance(raw, str):
        raw = {"mode": raw}
    if not isinstance(raw, Mapping):
        raise InvalidConfig(pointer, f"must be an object or one of {', '.join(MODES)}")
    if set(raw) == {"data_preprocessor"}:
        return parse_preprocess(raw["data_preprocessor"], pointer=f"{pointer}/data_preprocessor")
    form = _form_of(raw)
    try:
        return form.model_validate(dict(raw)).neutral()
    except ValidationError as error:
        raise invalid(error, pointer, form.model_fields) from error


T = TypeVar("T")


def resolve_preprocess(request: PreprocessRequest, defaults: Sequence[PreprocessDefaults]) -> PreprocessSpec:
    """What a request means: what it leaves out comes from the first of `defaults` that says it, else ImageNet's.

    A default mean is in RGB; a request that asks for BGR without a mean gets it turned.
    """
    order: Order = request.channel_order or "rgb"

    def settled(pick: Callable[[Any], T | None]) -> T:
        values = (pick(source) for source in (request, *defaults, IMAGENET))
        return next(value for value in values if value is not None)

    def in_order(
        given: tuple[float, ...] | None, pick: Callable[[Any], tuple[float, ...] | None]
    ) -> tuple[float, ...]:
        if given is not None:
            return given
        found = settled(pick)
        return found[::-1] if order == "bgr" else found

    mode: Mode = request.mode or "crop"
    return PreprocessSpec(
        mode=mode,
        size=None if mode == "native" else settled(lambda source: source.size),
        crop_pct=settled(lambda source: source.crop_pct),
        interpolation=settled(lambda source: source.interpolation),
        mean=in_order(request.mean, lambda source: source.mean),
        std=in_order(request.std, lambda source: source.std),
        channel_order=order,
        size_divisor=request.size_divisor or 1,
    )
