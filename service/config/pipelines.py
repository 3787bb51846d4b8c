"""What an OpenMMLab `test_pipeline` does to images, in the words of `preprocess`, as far as these can say it.

Said are the short edge and a central crop of classifiers (mmpretrain's ResizeEdge and CenterCrop; mmcls 0.x wrote
Resize(size=(256, -1))), a resize to one size, Normalize and the divisor of Pad. What a pipeline does beyond that is
told in a note: the image keeps its own size then, or the service's default is used. mmyolo's LetterResize pads to a
size that its networks' largest stride divides: that much is said of it.

`scale` and `img_scale` are (width, height) in these libraries, mmcls 0.x' `size` and `crop_size` (height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INTERPOLATIONS = frozenset({"nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"})
EFFICIENTNET_PADDING = 32
LETTERBOX_DIVISOR = 32  # of mmyolo's scales and of its batch_shapes_cfg
MAX_STEPS = 64
# Steps that look like a size but only annotate, load, pack or normalise are not listed: they say nothing of it.
SIZING = frozenset(
    (
        *("Resize", "ResizeEdge", "CenterCrop", "EfficientNetCenterCrop", "RandomCrop", "RandomResizedCrop"),
        *("LetterResize", "YOLOv5KeepRatioResize", "Pad", "MultiScaleFlipAug", "TestTimeAug"),
        *("FixScaleResize", "FixShapeResize", "ResizeShortestEdge", "RandomChoiceResize", "TenCrop"),
    )
)
SHOWN = ("scale", "size", "keep_ratio", "edge", "crop_size", "pad_to_square")
Step = Mapping[str, Any]


@dataclass(frozen=True)
class PipelineFacts:
    """What a pipeline says: keys of `preprocess`, keys of a `data_preprocessor`, and what they leave out.

    `divisor` is what image sides are padded to a multiple of where a note says that a step is left out.
    """

    placing: Mapping[str, Any] = field(default_factory=dict)
    divisor: int | None = None
    normalising: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_pipeline(pipeline: Any) -> PipelineFacts:
    """The facts of a pipeline; a value that is none says nothing."""
    steps = list(_steps(pipeline))[:MAX_STEPS]
    placing, note = _placing([step for step in steps if _kind(step) in SIZING])
    notes = [note] if note else []
    if placing and any(step.get("backend", "cv2") != "pillow" for step in steps if _resizes(step)):
        notes.append("the library resizes with OpenCV there, which does not smooth; here it is Pillow")
    is_letterboxed = note != "" and any(_kind(step) == "LetterResize" for step in steps)
    divisor = LETTERBOX_DIVISOR if is_letterboxed else None
    return PipelineFacts(placing, divisor, _normalising(steps), tuple(notes))


def _steps(pipeline: Any, scale: Any = None) -> Iterator[Step]:
    """The steps in order, those of mmdet 2.x' MultiScaleFlipAug with its scale."""
    for step in pipeline if isinstance(pipeline, (list, tuple)) else ():
        if not isinstance(step, dict):
            continue
        if _kind(step) == "MultiScaleFlipAug":
            yield from _steps(step.get("transforms"), step.get("img_scale"))
        elif _kind(step) == "Resize" and scale is not None:
            yield {"scale": scale, **step}
        else:
            yield step


def _kind(step: Step) -> str:
    kind = step.get("type")
    return kind.rpartition(".")[2] if isinstance(kind, str) else ""


def _resizes(step: Step) -> bool:
    kind = _kind(step)
    return kind in ("Resize", "ResizeEdge", "EfficientNetCenterCrop") or "efficientnet_style" in step


def _normalising(steps: Sequence[Step]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in steps:
        if _kind(step) == "Normalize":
            found |= {key: step[key] for key in ("mean", "std") if key in step}
            found["to_rgb"] = step.get("to_rgb", True)
        if _kind(step) == "Pad" and isinstance(step.get("size_divisor"), int):
            found["pad_size_divisor"] = step["size_divisor"]
    return found if "mean" in found else {}


def _placing(steps: Sequence[Step]) -> tuple[dict[str, Any], str]:
    """Keys of `preprocess` for the steps that change an image's size, and a note of what those cannot say."""
    sizing = [step for step in steps if not (_kind(step) == "Pad" and "size_divisor" in step)]
    rule = PLACINGS.get(tuple(_kind(step) for step in sizing))
    placing = rule(*sizing) if rule is not None else None
    if placing is not None:
        return placing, ""
    shown = " and ".join(_shown(step) for step in sizing)
    return {}, f"of the test pipeline, {shown} cannot be said here and is left out" if shown else ""


def _shown(step: Step) -> str:
    keys = ", ".join(f"{key}={step[key]}"[:64] for key in SHOWN if key in step)
    return f"{_kind(step)}({keys})"


def _edge_and_crop(resize: Step, crop: Step) -> dict[str, Any] | None:
    edge, size = _short_edge(resize), _pair(crop.get("crop_size"))
    if edge is None or size is None or max(size) > edge:
        return None
    return {"mode": "crop", "size": list(size), "crop_pct": _crop_pct(min(size), edge), **_filter(resize)}


def _short_edge(resize: Step) -> int | None:
    """The length that the short edge is resized to; None where it is something else that is resized."""
    if _kind(resize) == "ResizeEdge":
        return _side(resize.get("scale")) if resize.get("edge", "short") == "short" else None
    size = resize.get("size")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or size[1] != -1:
        return None
    return _side(size[0]) if resize.get("adaptive_side", "short") == "short" else None


def _crop_pct(size: int, edge: int) -> float:
    """The fraction that makes `edge` of `size` again when it is divided and cut to an integer."""
    fraction = size / edge
    return fraction if int(size / fraction) == edge else size / (edge + 0.01)


def _exact(resize: Step) -> dict[str, Any] | None:
    """A resize that does not keep the aspect; mmcv's `scale` is (width, height)."""
    if resize.get("keep_ratio", False) or "scale_factor" in resize:
        return None
    size = _pair(resize.get("size")) or _reversed(_pair(resize.get("scale")))
    return None if size is None else {"mode": "resize", "size": list(size), **_filter(resize)}


def _efficientnet_crop(crop: Step) -> dict[str, Any] | None:
    """The crop first and the resize after, of the same part of the image as the other way round."""
    size, padding = _pair(crop.get("crop_size")), crop.get("crop_padding", EFFICIENTNET_PADDING)
    by_style = crop.get("efficientnet_style", _kind(crop) == "EfficientNetCenterCrop")
    if size is None or size[0] != size[1] or not by_style or not isinstance(padding, int) or padding < 0:
        return None
    pct = _crop_pct(size[0], size[0] + padding)
    return {"mode": "crop", "size": list(size), "crop_pct": pct, **_filter(crop)}


def _filter(step: Step) -> dict[str, Any]:
    name = step.get("interpolation", "bicubic" if _kind(step) == "EfficientNetCenterCrop" else "bilinear")
    return {"interpolation": name} if name in INTERPOLATIONS else {}


def _pair(value: Any) -> tuple[int, int] | None:
    pair = (value, value) if _side(value) else value
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(_side(side) for side in pair):
        return pair[0], pair[1]
    return None


def _reversed(pair: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if pair is None else pair[::-1]


def _side(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= 4096 else None


PLACINGS: Mapping[tuple[str, ...], Callable[..., dict[str, Any] | None]] = {
    ("ResizeEdge", "CenterCrop"): _edge_and_crop,
    ("Resize", "CenterCrop"): _edge_and_crop,
    ("Resize",): _exact,
    ("CenterCrop",): _efficientnet_crop,
    ("EfficientNetCenterCrop",): _efficientnet_crop,
}
