"""The parts of the OpenAPI description that FastAPI cannot derive: bodies in several media types, and examples."""

from __future__ import annotations

from typing import Any

from service.api.errors import PROBLEM_JSON, STATUS

RESNET50 = {"type": "ResNet", "depth": 50, "out_indices": [0, 1, 2, 3], "frozen_stages": 1}
RESNET18 = {"type": "timm.resnet18", "out_indices": [4]}
# A 1x1 PNG, so that the JSON example works as it stands.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
PROBLEM: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"pointer": {"type": "string"}, "detail": {"type": "string"}},
            },
        },
    },
}
BACKBONE: dict[str, Any] = {
    "description": "A backbone config, or the name of one of `GET /configs`.",
    "oneOf": [
        {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"type": "string", "maxLength": 128}},
            "additionalProperties": True,
        },
        {"type": "string", "maxLength": 256},
    ],
}
OBJECT_OR_NAME: dict[str, Any] = {"oneOf": [{"type": "object"}, {"type": "string"}]}
PARAMETERS: dict[str, Any] = {
    "backbone": BACKBONE,
    "neck": {**OBJECT_OR_NAME, "description": 'A neck config, such as `{"type": "GlobalAveragePooling"}`.'},
    "preprocess": {
        **OBJECT_OR_NAME,
        "description": "How images become tensors: `mode` (crop, resize, native), `size`, `crop_pct`, `interpolation`, "
        "`mean`, `std`, `channel_order`, `size_divisor`; OpenMMLab's `data_preprocessor` and detectron2's "
        "`pixel_mean` are understood.",
    },
    "precision": {"enum": ["float32", "bfloat16", "float16"], "default": "float32"},
    "return": {"enum": ["shapes", "tensors"], "default": "shapes"},
    "dtype": {"enum": ["float32", "float16"], "default": "float32"},
    "pool": {"enum": ["none", "avg", "max", "gem", "cls"], "default": "none"},
    "normalize": {"type": "boolean", "default": False},
    "encoding": {"enum": ["list", "base64"], "default": "list"},
}
BINARY = {"type": "string", "format": "binary"}
IMAGE = {
    "type": "object",
    "properties": {
        "base64": {"type": "string", "format": "byte"},
        "url": {"type": "string", "format": "uri"},
    },
    "minProperties": 1,
    "maxProperties": 1,
}


def _text(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter as a part of a form or a query: a plain word or JSON."""
    return schema if "enum" in schema or schema.get("type") == "boolean" else {"type": "string"}


FORM = {
    "type": "object",
    "required": ["backbone"],
    "properties": {
        "image": {"type": "array", "items": BINARY, "description": "one image or more"},
        "tensor": {**BINARY, "description": "one .npy: float32, NCHW, already normalised"},
        **{name: _text(schema) for name, schema in PARAMETERS.items()},
    },
}
JSON_BODY = {
    "type": "object",
    "required": ["backbone", "images"],
    "properties": {"images": {"type": "array", "items": IMAGE}, **PARAMETERS},
}


def _problems() -> dict[int | str, dict[str, Any]]:
    """One entry a status that a request may fail with."""
    content = {PROBLEM_JSON: {"schema": PROBLEM}}
    titles: dict[int, list[str]] = {}
    for error_class, status in STATUS.items():
        titles.setdefault(status, []).append(error_class.title)
    return {
        str(status): {"description": "; ".join(names), "content": content} for status, names in titles.items()
    }


def _json(description: str, example: Any = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"type": "object"}}
    if example is not None:
        content["example"] = example
    return {"description": description, "content": {"application/json": content}}


JSON_REPLY: dict[int | str, dict[str, Any]] = {200: _json("As described."), **_problems()}
TEXT_REPLY: dict[int | str, dict[str, Any]] = {
    200: {"description": "As described.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
LEVELS_EXAMPLE = {
    "levels": [
        {
            "index": 4,
            "name": "4",
            "layout": "NCHW",
            "stride": 32,
            "channels": 512,
            "shape": [1, 512, 7, 7],
            "dtype": "float32",
            "stats": {"min": 0.0, "max": 5.1, "mean": 0.9, "std": 0.8},
        }
    ]
}
FEATURES_OPERATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": FORM, "example": {"backbone": '{"type":"timm.resnet18"}'}},
            "application/json": {
                "schema": JSON_BODY,
                "example": {"backbone": RESNET18, "images": [{"base64": PIXEL}]},
            },
            "image/*": {"schema": BINARY},
            "application/x-npy": {"schema": BINARY},
        },
    },
    "parameters": [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": _text(schema),
            "description": "for raw bodies",
        }
        for name, schema in PARAMETERS.items()
    ],
    "responses": {
        "200": {
            "description": "Levels in the order asked.",
            "content": {
                "application/json": {"schema": {"type": "object"}, "example": LEVELS_EXAMPLE},
                "application/x-npz": {"schema": BINARY},
                "application/x-npy": {"schema": BINARY},
                "application/vnd.safetensors": {"schema": BINARY},
                "application/vnd.apache.arrow.stream": {"schema": BINARY},
            },
        },
        "304": {"description": "Nothing changed since the ETag of If-None-Match."},
        **_problems(),
    },
}


def _config_body(properties: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": ["backbone"],
        "properties": properties,
        "additionalProperties": False,
    }
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


INPUT_SIZE = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2}
INSPECT_OPERATION: dict[str, Any] = {
    "requestBody": _config_body(
        {"backbone": BACKBONE, "neck": PARAMETERS["neck"], "input_size": INPUT_SIZE},
        {"backbone": RESNET50, "input_size": [224, 224]},
    )
}
LOAD_OPERATION: dict[str, Any] = {
    "requestBody": _config_body(
        {name: PARAMETERS[name] for name in ("backbone", "neck", "preprocess")}, {"backbone": RESNET18}
    ),
    "responses": {"200": _json("It was there already."), "201": _json("It is loaded."), **_problems()},
}
