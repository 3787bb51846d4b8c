"""How images become the tensor of a network: what a client may say, and what it then means.

Two foreign spellings are understood beside our own: OpenMMLab's `data_preprocessor` and detectron2's
`pixel_mean`, `pixel_std`, `input_format`. Both give means in units of 0–255 and in the channel order that the
network sees; OpenMMLab loads BGR and turns it with `to_rgb` or `bgr_to_rgb`. Our own `mean` and `std` are in units
of 0–1 unless a number of either is over 1 (`[123.675, …]`, or YOLO's `std` of 255): then both are in 0–255.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator

from service.config.spec import PreprocessDefaults
from service.errors import InvalidConfig
from service.validation import invalid, pointer_to

Mode = Literal["crop", "resize", "native"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Order = Literal["rgb", "bgr"]
MODES = ("crop", "resize", "native")

Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Size = Side | tuple[Side, Side]
Divisor = Annotated[int, Field(strict=True, ge=1, le=1024)]
CropPct = Annotated[float, Field(strict=True, ge=0.05, le=1)]
Number = Annotated[float, Field(strict=True, ge=-1e4, le=1e4, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, ge=1e-3, le=1e4, allow_inf_nan=False)]
Mean = Annotated[tuple[Number, ...], Field(min_length=3, max_length=3)]
Std = Annotated[tuple[Positive, ...], Field(min_length=3, max_length=3)]

IMAGENET = PreprocessDefaults(
    size=(224, 224),
    crop_pct=0.875,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
# What the type of a `data_preprocessor` says of the size of images: those of detectors keep it.
IMPLIED_MODES: Mapping[str, Mode | None] = {
    "ImgDataPreprocessor": None,
    "ClsDataPreprocessor": None,
    "ReIDDataPreprocessor": None,
    "SelfSupDataPreprocessor": None,
    "TwoNormDataPreprocessor": None,
    "CAEDataPreprocessor": None,
    "RelativeLocDataPreprocessor": None,
    "RotationPredDataPreprocessor": None,
    "DetDataPreprocessor": "native",
    "BoxInstDataPreprocessor": "native",
    "TrackDataPreprocessor": "native",
    "PPYOLOEDetDataPreprocessor": "native",
    "YOLOv5DetDataPreprocessor": "native",
}
# What it does to labels, masks, training batches and a training target's images says nothing here.
IGNORED_KEYS = frozenset(
    (
        *("num_classes", "to_onehot", "batch_augments", "boxtype2tensor", "non_blocking"),
        *("pad_mask", "mask_pad_value", "pad_seg", "seg_pad_value", "mask_stride"),
        *("pairwise_size", "pairwise_dilation", "pairwise_color_thresh", "bottom_pixels_removed"),
        *("second_mean", "second_std", "use_det_processor"),
    )
)


WITHOUT_EFFECT: Mapping[Mode, tuple[str, ...]] = {
    "crop": (),
    "resize": ("crop_pct",),
    "native": ("size", "crop_pct", "interpolation", "fast_decode"),
}


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
    fast_decode: bool | None = None


@dataclass(frozen=True)
class PreprocessSpec:
    """What is done to every image of a request.

    `size` is [height, width], None for `native`. `mean` and `std` are in units of 0–1, in the order of the
    channels that the network sees. `fast_decode` allows a JPEG to be decoded no larger than it is needed, which
    changes values a little.
    """

    mode: Mode
    size: tuple[int, int] | None
    crop_pct: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: Order
    size_divisor: int
    fast_decode: bool

    def as_json(self) -> dict[str, Any]:
        """Plain data in the words of the request, which asks for this very spec; only what has an effect."""
        unused = WITHOUT_EFFECT[self.mode]
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in unused}


class _Form(BaseModel):
    """One of the spellings, with the keys that may stand beside those of any library."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode | None = None
    size: Size | None = None
    crop_pct: CropPct | None = None
    interpolation: Interpolation | None = None
    fast_decode: StrictBool | None = None

    def neutral(self, pointer: str) -> PreprocessRequest:
        """In neutral words; `pointer` is where the form is in the request."""
        raise NotImplementedError

    def _placed(self, implied: Mode | None = None) -> PreprocessRequest:
        """What the shared keys say; `implied` is the mode where none is given."""
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        return PreprocessRequest(
            mode=self.mode or implied,
            size=size,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            fast_decode=self.fast_decode,
        )


class OwnForm(_Form):
    """The service's own keys. `mean` and `std` are in units of 0–1, or of 0–255 where one of them is over 1."""

    mean: Mean | None = None
    std: Std | None = None
    channel_order: Order | None = None
    size_divisor: Divisor | None = None

    def neutral(self, pointer: str) -> PreprocessRequest:
        """In neutral words."""
        scale = self._scale(pointer)
        return replace(
            self._placed(),
            mean=_scaled(self.mean, scale),
            std=_scaled(self.std, scale),
            channel_order=self.channel_order,
            size_divisor=self.size_divisor,
        )

    def _scale(self, pointer: str) -> float:
        mean, std = max(map(abs, self.mean or (0.0,))), max(self.std or (0.0,))
        if (mean > 1 and 0 < std < 1) or (std > 1 and 0 < mean <= 1):
            detail = "mean and std are in different units, one in 0–1 and one in 0–255"
            raise InvalidConfig(pointer_to(pointer, "std"), detail)
        return 255.0 if max(mean, std) > 1 else 1.0


class DataPreprocessor(_Form):
    """OpenMMLab's `data_preprocessor`. Without `mean` and `std` it does not normalise: the network sees 0–255."""

    type: Annotated[str, Field(max_length=128)] | None = None
    mean: Mean | None = None
    std: Std | None = None
    to_rgb: StrictBool = False
    bgr_to_rgb: StrictBool = False
    rgb_to_bgr: StrictBool = False
    pad_size_divisor: Divisor | None = None
    pad_value: Annotated[float, Field(strict=True, ge=0, le=0)] = 0.0

    @field_validator("type")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        """The type without its scope."""
        bare = None if value is None else value.rpartition(".")[2]
        if bare is not None and bare not in IMPLIED_MODES:
            raise ValueError(f"no such data preprocessor; known: {', '.join(IMPLIED_MODES)}")
        return bare

    def neutral(self, pointer: str) -> PreprocessRequest:
        """In neutral words. A detector's images keep their size."""
        turned = self.to_rgb or self.bgr_to_rgb
        if turned and self.rgb_to_bgr:
            raise InvalidConfig(pointer_to(pointer, "rgb_to_bgr"), "contradicts bgr_to_rgb")
        if (self.mean is None) != (self.std is None):
            missing = pointer_to(pointer, "mean" if self.mean is None else "std")
            raise InvalidConfig(missing, "mean and std are given together, or neither")
        return replace(
            self._placed(implied=None if self.type is None else IMPLIED_MODES[self.type]),
            mean=_scaled(self.mean or (0.0, 0.0, 0.0), 255.0),
            std=_scaled(self.std or (1.0, 1.0, 1.0), 255.0),
            channel_order="rgb" if turned else "bgr",
            size_divisor=self.pad_size_divisor,
        )


class PixelForm(_Form):
    """detectron2's and detrex' keys with detectron2's defaults; images keep their size."""

    pixel_mean: Mean = (103.53, 116.28, 123.675)
    pixel_std: Std = (1.0, 1.0, 1.0)
    input_format: Literal["RGB", "BGR"] = "BGR"
    size_divisor: Divisor | None = None

    def neutral(self, pointer: str) -> PreprocessRequest:  # noqa: ARG002 - nothing in it can contradict
        """In neutral words."""
        return replace(
            self._placed(implied="native"),
            mean=_scaled(self.pixel_mean, 255.0),
            std=_scaled(self.pixel_std, 255.0),
            channel_order="rgb" if self.input_format == "RGB" else "bgr",
            size_divisor=self.size_divisor,
        )


def _scaled(values: Sequence[float] | None, scale: float) -> tuple[float, ...] | None:
    return None if values is None else tuple(value / scale for value in values)


# Keys that no other spelling has.
FORMS: tuple[tuple[frozenset[str], type[_Form]], ...] = (
    (frozenset({"pixel_mean", "pixel_std", "input_format"}), PixelForm),
    (
        frozenset({"type", "to_rgb", "bgr_to_rgb", "rgb_to_bgr", "pad_size_divisor", "pad_value"})
        | IGNORED_KEYS,
        DataPreprocessor,
    ),
)


def _form_of(raw: Mapping[Any, Any]) -> type[_Form]:
    return next((form for keys, form in FORMS if not keys.isdisjoint(raw)), OwnForm)


def parse_preprocess(raw: object, *, pointer: str = "#/preprocess") -> PreprocessRequest:
    """A client's `preprocess` in neutral words: an object in one of the three spellings, or a mode.

    Raises:
        InvalidConfig: what is wrong and where.
    """
    if raw is None:
        return PreprocessRequest()
    if isinstance(raw, str) and raw in MODES:
        raw = {"mode": raw}
    if not isinstance(raw, Mapping):
        raise InvalidConfig(pointer, f"must be an object or one of {', '.join(MODES)}")
    request = _read_nested(raw, pointer) if "data_preprocessor" in raw else _read(_form_of(raw), raw, pointer)
    _refuse_contradictions(request, pointer)
    return request


def _read(form: type[_Form], raw: Mapping[Any, Any], pointer: str) -> PreprocessRequest:
    ignored = IGNORED_KEYS if form is DataPreprocessor else frozenset()
    try:
        read = form.model_validate({key: value for key, value in raw.items() if key not in ignored})
    except ValidationError as error:
        raise invalid(error, pointer, form.model_fields) from error
    return read.neutral(pointer)


def _read_nested(raw: Mapping[Any, Any], pointer: str) -> PreprocessRequest:
    """A `data_preprocessor` under that key; `mode`, `size` and their like stand beside it, not in it."""
    place, inner = pointer_to(pointer, "data_preprocessor"), raw["data_preprocessor"]
    if not isinstance(inner, Mapping):
        raise InvalidConfig(place, "must be an object")
    for key in _Form.model_fields.keys() & inner.keys():
        raise InvalidConfig(pointer_to(place, key), "belongs beside data_preprocessor, not into it")
    beside = _read(_Beside, {key: value for key, value in raw.items() if key != "data_preprocessor"}, pointer)
    request = _read(DataPreprocessor, inner, place)
    return replace(
        request,
        mode=beside.mode or request.mode,
        size=beside.size,
        crop_pct=beside.crop_pct,
        interpolation=beside.interpolation,
        fast_decode=beside.fast_decode,
    )


class _Beside(_Form):
    """The shared keys alone."""

    def neutral(self, pointer: str) -> PreprocessRequest:  # noqa: ARG002 - nothing in it can contradict
        """In neutral words."""
        return self._placed()


def _refuse_contradictions(request: PreprocessRequest, pointer: str) -> None:
    if request.mode == "native" and request.size is not None:
        detail = "native keeps each image's own size; give mode crop or resize, or no size"
        raise InvalidConfig(pointer_to(pointer, "size"), detail)
    if request.mode in ("native", "resize") and request.crop_pct is not None:
        raise InvalidConfig(pointer_to(pointer, "crop_pct"), f"mode {request.mode} does not crop")
    if request.mode == "native" and request.fast_decode:
        detail = "native keeps each image's own size; a JPEG is only decoded smaller for mode crop or resize"
        raise InvalidConfig(pointer_to(pointer, "fast_decode"), detail)


T = TypeVar("T")


def resolve_preprocess(request: PreprocessRequest, defaults: Sequence[PreprocessDefaults]) -> PreprocessSpec:
    """What a request means: what it leaves out comes from the first of `defaults` that says it, else ImageNet's.

    A default mean is in RGB; a request that asks for BGR without a mean gets it turned.
    """
    order: Order = request.channel_order or "rgb"

    def settled(pick: Callable[[Any], T | None]) -> T:
        values = (pick(source) for source in (request, *map(_of_images, defaults), IMAGENET))
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
        fast_decode=bool(request.fast_decode),
    )


def _of_images(defaults: PreprocessDefaults) -> PreprocessDefaults:
    """The defaults without a mean or std of other than three channels, which is not one of images."""
    mean = defaults.mean if defaults.mean is not None and len(defaults.mean) == 3 else None
    std = defaults.std if defaults.std is not None and len(defaults.std) == 3 else None
    return replace(defaults, mean=mean, std=std)
