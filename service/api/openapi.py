"""The parts of the OpenAPI description that FastAPI cannot derive: bodies in several media types, and examples.

Every example works as it stands; a test sends each to a running service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.api.access import Access, rule_for
from service.api.errors import PROBLEM_JSON, problem_type, status_of
from service.errors import ServiceError

Spec = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

RESNET50 = {"type": "ResNet", "depth": 50, "out_indices": [0, 1, 2, 3], "frozen_stages": 1}
RESNET18 = {"type": "timm.resnet18", "out_indices": [4]}
RESNET18_TEXT = '{"type":"timm.resnet18","out_indices":[2,3,4]}'
# A 1x1 PNG, so that the JSON example works as it stands.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"

TAGS = [
    {"name": "features", "description": "Images and a backbone config in, multi-scale features out."},
    {"name": "backbones", "description": "What can be asked for, and what a config would give."},
    {"name": "configs", "description": "Named configs: files of the operator's config directory."},
    {"name": "models", "description": "The models in memory. Loading and unloading may need an admin key."},
    {"name": "health", "description": "For probes and operators."},
]


# --- schemas ------------------------------------------------------------------------------------

PROBLEM: Spec = {
    "type": "object",
    "description": "RFC 9457. `type` names the kind of problem; docs/errors.md explains each.",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what, which, and the limit"},
        "request_id": {"type": "string", "description": "also in X-Request-ID, and in the server's log"},
        "trace_id": {
            "type": "string",
            "description": "32 hex digits: the caller's by `traceparent`, else a new one",
        },
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "detail"],
                "properties": {
                    "pointer": {"type": "string", "description": "JSON pointer into the request"},
                    "detail": {"type": "string"},
                },
            },
        },
    },
}
BACKBONE: Spec = {
    "description": "A backbone config, spelled as its library spells it, or the name of one of `GET /configs`.",
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
ONE_NECK: Spec = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"type": "string", "maxLength": 128}},
}
NECK: Spec = {
    "description": 'A neck config, such as `{"type": "GlobalAveragePooling"}`, or a list: one behind the other.',
    "oneOf": [ONE_NECK, {"type": "array", "items": ONE_NECK, "minItems": 1, "maxItems": 4}],
}
PREPROCESS: Spec = {
    "description": "How images become tensors: a mode (`crop`, `resize`, `native`), or an object with `mode`, `size`, "
    "`crop_pct`, `interpolation`, `mean`, `std`, `channel_order`, `size_divisor`, `fast_decode`; OpenMMLab's "
    "`data_preprocessor` and detectron2's `pixel_mean` are understood. Default: the checkpoint's own, else ImageNet's.",
    "oneOf": [{"type": "object"}, {"type": "string", "enum": ["crop", "resize", "native"]}],
}
COMPONENTS: Spec = {
    "schemas": {"Problem": PROBLEM, "Backbone": BACKBONE, "Neck": NECK, "Preprocess": PREPROCESS},
    "securitySchemes": {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    },
}
KEYS: list[Spec] = [{"bearer": []}, {"header": []}]


def _reference(name: str) -> Spec:
    return {"$ref": f"#/components/schemas/{name}"}


PARAMETERS: dict[str, Spec] = {
    "backbone": _reference("Backbone"),
    "neck": _reference("Neck"),
    "preprocess": _reference("Preprocess"),
    "precision": {
        "type": "string",
        "enum": ["float32", "bfloat16", "float16"],
        "description": "of the computation",
    },
    "return": {
        "enum": ["shapes", "tensors"],
        "description": "what a JSON reply holds of each level: shape, stride, channels and min, max, mean, std; or "
        "all numbers. Binary replies are always tensors. Default: shapes.",
    },
    "dtype": {"type": "string", "enum": ["float32", "float16"], "description": "of what is returned"},
    "pool": {
        "type": "string",
        "enum": ["none", "avg", "max", "gem", "cls"],
        "description": "over each map or all tokens",
    },
    "normalize": {"type": "boolean", "description": "L2 over channels, after pooling"},
    "encoding": {
        "type": "string",
        "enum": ["list", "base64"],
        "description": "of tensors in JSON; base64 is little-endian",
    },
}
DEFAULTS: Mapping[str, Any] = {
    "precision": "float32",
    "dtype": "float32",
    "pool": "none",
    "normalize": False,
    "encoding": "list",
}
BINARY: Spec = {"type": "string", "format": "binary"}
IMAGE: Spec = {
    "type": "object",
    "properties": {
        "base64": {"type": "string", "format": "byte"},
        "url": {
            "type": "string",
            "format": "uri",
            "description": "fetched from hosts that the operator allows; without any it is refused",
        },
    },
    "minProperties": 1,
    "maxProperties": 1,
}


def _with_default(name: str, schema: Spec) -> Spec:
    return {**schema, "default": DEFAULTS[name]} if name in DEFAULTS else schema


def _text(name: str, schema: Spec) -> Spec:
    """A parameter as a part of a form or a key of a query: a plain word or JSON."""
    if "$ref" not in schema:
        return _with_default(name, schema)
    described = COMPONENTS["schemas"][name.capitalize()]["description"]
    return {"type": "string", "description": f"{described} As JSON."}


TEXTS: dict[str, Spec] = {name: _text(name, schema) for name, schema in PARAMETERS.items()}
FORM: Spec = {
    "type": "object",
    "required": ["backbone"],
    "properties": {
        "image": {"type": "array", "items": BINARY, "description": "one image file or more"},
        "backbone": {**TEXTS["backbone"], "example": RESNET18_TEXT},
        # The page fills a text without an example with the word "string", and would send it.
        "neck": {**TEXTS["neck"], "example": ""},
        "preprocess": {**TEXTS["preprocess"], "example": ""},
        **{name: schema for name, schema in TEXTS.items() if name not in ("backbone", "neck", "preprocess")},
        "tensor": {**BINARY, "description": "instead of images: one .npy, float32, NCHW, already normalised"},
    },
    "additionalProperties": False,
}
JSON_BODY: Spec = {
    "type": "object",
    "required": ["backbone", "images"],
    "properties": {
        "images": {"type": "array", "items": IMAGE, "minItems": 1},
        **{name: _with_default(name, schema) for name, schema in PARAMETERS.items()},
    },
    "additionalProperties": False,
}


# --- replies ------------------------------------------------------------------------------------


def _subclasses(error_class: type[ServiceError]) -> list[type[ServiceError]]:
    """The tree below a class, parents first."""
    below = [error_class]
    for child in error_class.__subclasses__():
        below += _subclasses(child)
    return below


def problem_classes() -> list[type[ServiceError]]:
    """The errors that a reply may name."""
    return _subclasses(ServiceError)[1:]


def problems(*statuses: int) -> Responses:
    """One response for each status, which lists the problem types it stands for."""
    content = {PROBLEM_JSON: {"schema": _reference("Problem")}}
    titles: dict[int, list[str]] = {}
    for error_class in problem_classes():
        status = status_of(error_class)
        titles.setdefault(status, []).append(f"`{problem_type(error_class)}`: {error_class.title}")
    return {
        status: {"description": "  \n".join(titles[status]), "content": content}
        for status in sorted(statuses)
    }


def json_content(description: str, example: Any) -> Spec:
    """A JSON response with an example."""
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {"description": description, "content": content}


WHO = (401, 403, 429)
BODY = (400, 408, 413, 415, 422)
LOADING = (502, 503, 504)

ROW_EXAMPLE = {
    "type": "timm.resnet18",
    "scope": "timm",
    "aliases": [],
    "summary": "timm resnet, 11.2 M parameters, 224x224, 5 maps of stride 2, 4, 8, 16, 32",
    "href": "/backbones/timm.resnet18",
}
LEVEL_EXAMPLE = {
    "index": 4,
    "name": "4",
    "layout": "NCHW",
    "stride": 32,
    "channels": 512,
    "shape": [1, 512, 7, 7],
}
# FastAPI drops keys that are null from the document, so the examples have none.
WEIGHTS_EXAMPLE: Spec = {
    "source": "checkpoint",
    "checkpoint": "resnet18.safetensors",
    "sha256": "9f2c" * 16,
    "loaded": 120,
    "missing": [],
    "unexpected": ["fc.bias", "fc.weight"],
}
FEATURES_EXAMPLE = {
    "model": {
        "id": "dc44b5df001be2fabf68",
        "type": "timm.resnet18",
        "device": "cpu",
        "precision": "float32",
        "weights": WEIGHTS_EXAMPLE,
        "frozen": {"stages": 0, "parameters": 0, "of": 60},
    },
    "images": [{"width": 500, "height": 375, "format": "JPEG", "input": [224, 224], "valid": [224, 224]}],
    "levels": [
        {**LEVEL_EXAMPLE, "dtype": "float32", "stats": {"min": 0.0, "max": 5.1, "mean": 0.9, "std": 0.8}}
    ],
    "timings_ms": {"load": 0.05, "decode": 1.9, "queue": 0.07, "forward": 9.4, "encode": 0.3},
    "preprocess": {
        "mode": "crop",
        "size": [224, 224],
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "channel_order": "rgb",
        "size_divisor": 1,
        "fast_decode": False,
    },
}
MODEL_EXAMPLE = {
    "id": "dc44b5df001be2fabf68",
    "type": "timm.resnet18",
    "device": "cpu",
    "dtype": "float32",
    "bytes": 44744608,
    "weights": WEIGHTS_EXAMPLE,
    "engine": "torch",
    "hits": 1,
    "in_use": 0,
    "last_used": 1767225600.0,
    "load_seconds": 0.41,
}
TYPE_EXAMPLE = {
    **ROW_EXAMPLE,
    "schema": {"type": "object", "properties": {"out_indices": {"type": "array"}}},
    "architectures": ["resnet18"],
    "checkpoint_layouts": ["timm"],
    "indices": {"permitted": [0, 1, 2, 3, 4], "default": [0, 1, 2, 3, 4]},
    "example": {"type": "timm.resnet18", "out_indices": [1, 2, 3, 4]},
}
INSPECT_EXAMPLE = {
    "type": "timm.resnet18",
    "input_size": [224, 224],
    "levels": [LEVEL_EXAMPLE],
    "parameters": 11176512,
    "bytes": 44744608,
    "neck": {"type": "mmpretrain.GlobalAveragePooling", "parameters": 0, "bytes": 0},
    "weights": {"checkpoint": "resnet18.safetensors", "prefix": ""},
    "frozen": {"stages": 0, "parameters": [], "norms": [], "of": 60},
}
RESNET50_C5 = {"type": "ResNet", "depth": 50, "out_indices": [3], "frozen_stages": 1, "norm_eval": True}
CONFIG_EXAMPLE = {
    "name": "resnet50_c5",
    "as_written": {"_base_": "resnet50.yaml", "out_indices": [3]},
    "resolved": {"backbone": RESNET50_C5},
}
VERSION_EXAMPLE = {
    "service": "0.1.0",
    "torch": "2.10.0",
    "timm": "1.0.31",
    "torchvision": "0.25.0",
    "python": "3.12.3",
    "device": "cpu",
    "device_name": "x86_64",
    "build": "source",
}
TYPES_REPLY: Responses = {
    200: json_content("One page.", {"types": [ROW_EXAMPLE], "total": 2, "next": "timm.resnet18"}),
    **problems(*WHO, 422),
}
TYPE_REPLY: Responses = {200: json_content("The type.", TYPE_EXAMPLE), **problems(*WHO, 404, 422)}
INSPECT_REPLY: Responses = {
    200: json_content("What the config would build.", INSPECT_EXAMPLE),
    **problems(*WHO, *BODY, 404),
}
CONFIGS_REPLY: Responses = {
    200: json_content("All names.", {"configs": [{"name": "resnet50_c5", "href": "/configs/resnet50_c5"}]}),
    **problems(*WHO),
}
CONFIG_REPLY: Responses = {200: json_content("The config.", CONFIG_EXAMPLE), **problems(*WHO, 404, 422)}
BUDGET_EXAMPLE = {"bytes": 4000000000, "used": 44744608, "device": "cpu"}
LOADING_EXAMPLE = {
    "id": None,
    "type": "detectron2.build_resnet_backbone",
    "state": "downloading",
    "checkpoint": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "received": 41943040,
    "total": 102502400,
    "started": 1767225600.0,
}
MODELS_REPLY: Responses = {
    200: json_content(
        "What is in memory, and what is on its way: `queued` and `downloading` (bytes received, of the total if it is "
        "known), then `loading`.",
        {"models": [MODEL_EXAMPLE], "loading": [LOADING_EXAMPLE], "budget": BUDGET_EXAMPLE},
    ),
    **problems(*WHO),
}
LOAD_REPLY: Responses = {
    200: json_content("It was there already.", MODEL_EXAMPLE),
    201: json_content("It is loaded.", MODEL_EXAMPLE),
    **problems(*WHO, *BODY, *LOADING, 404),
}
UNLOAD_REPLY: Responses = {
    200: json_content("It is unloaded.", {"id": MODEL_EXAMPLE["id"], "state": "unloaded"}),
    202: json_content(
        "It goes with the request that uses it last.", {"id": "dc44b5df", "state": "unloading"}
    ),
    **problems(*WHO, 404),
}
ALIVE_REPLY: Responses = {
    200: json_content("It works.", {"status": "ok"}),
    503: json_content("It should be restarted.", {"status": "failing", "reason": "the device worker ended"}),
}
READY_REPLY: Responses = {
    200: json_content("Send requests.", {"status": "ready"}),
    503: json_content(
        "Not now; Retry-After says when to ask.", {"status": "not ready", "reason": "draining"}
    ),
}
METRICS_REPLY: Responses = {
    200: {
        "description": "Prometheus' text format, version 0.0.4.",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "backbone_models 1.0\n"}},
    },
    **problems(*WHO),
}
VERSION_REPLY: Responses = {200: json_content("Versions.", VERSION_EXAMPLE), **problems(*WHO)}
FEATURES_REPLY: Responses = {
    200: {
        "description": "Levels in the order of their library. Binary replies carry the same description as metadata.",
        "headers": {
            "ETag": {"schema": {"type": "string"}, "description": "send it as If-None-Match"},
            "X-Model-ID": {"schema": {"type": "string"}},
            "RateLimit": {
                "schema": {"type": "string"},
                "description": "what is left of this client's quotas, if it has any; RateLimit-Policy has them",
            },
            "Server-Timing": {"schema": {"type": "string"}, "description": "milliseconds by stage"},
            "Content-Encoding": {
                "schema": {"type": "string", "enum": ["zstd", "gzip"]},
                "description": "where Accept-Encoding asks for it otherwise than HTTP libraries do unasked",
            },
        },
        "content": {
            "application/json": {"schema": {"type": "object"}, "example": FEATURES_EXAMPLE},
            "application/x-npz": {"schema": BINARY},
            "application/x-npy": {"schema": BINARY},
            "application/vnd.safetensors": {"schema": BINARY},
            "application/vnd.apache.arrow.stream": {"schema": BINARY},
        },
    },
    304: {"description": "Nothing changed since the ETag of If-None-Match."},
    **problems(*WHO, *BODY, *LOADING, 404, 406),
}


# --- bodies -------------------------------------------------------------------------------------

# One exploded parameter: on the wire `?backbone=…&pool=avg`, on the page one row that other bodies leave alone.
RAW_QUERY: Spec = {
    "name": "raw",
    "in": "query",
    "required": False,
    "style": "form",
    "explode": True,
    "description": "With a raw body only: the parts of the form, each as a key of the query "
    "(`?backbone=resnet50&pool=avg`). Leave it empty for multipart and JSON.",
    "schema": {"type": "object", "properties": TEXTS, "additionalProperties": False},
    "examples": {
        "empty": {"summary": "multipart or JSON body: nothing", "value": {}},
        "raw": {"summary": "raw body", "value": {"backbone": RESNET18_TEXT, "pool": "avg"}},
    },
}
REQUEST_TIMEOUT: Spec = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "seconds in which the reply is wanted, such as 2.5; shortens the service's own deadline",
    "schema": {"type": "string", "pattern": r"^[1-9][0-9]{0,8}(\.[0-9]{1,9})?$"},
    "example": "30",
}
FEATURES_OPERATION: Spec = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": FORM},
            "application/json": {
                "schema": JSON_BODY,
                "examples": {
                    "shapes": {
                        "summary": "a one-pixel PNG, the last level",
                        "value": {"backbone": RESNET18, "images": [{"base64": PIXEL}]},
                    },
                    "embedding": {
                        "summary": "an embedding by a named config",
                        "value": {
                            "backbone": "resnet50_c5",
                            "images": [{"base64": PIXEL}],
                            "pool": "avg",
                            "normalize": True,
                            "return": "tensors",
                        },
                    },
                },
            },
            **{f"image/{form}": {"schema": BINARY} for form in ("jpeg", "png", "webp")},
            "application/x-npy": {"schema": BINARY},
        },
    },
    "parameters": [RAW_QUERY, REQUEST_TIMEOUT],
}


def _config_body(properties: Spec, examples: Mapping[str, Any]) -> Spec:
    schema = {
        "type": "object",
        "required": ["backbone"],
        "properties": properties,
        "additionalProperties": False,
    }
    shown = {name: {"summary": name, "value": value} for name, value in examples.items()}
    return {"required": True, "content": {"application/json": {"schema": schema, "examples": shown}}}


INPUT_SIZE: Spec = {
    "type": "array",
    "description": "[height, width] in pixels",
    "items": {"type": "integer", "minimum": 1},
    "minItems": 2,
    "maxItems": 2,
}
INSPECT_OPERATION: Spec = {
    "requestBody": _config_body(
        {"backbone": PARAMETERS["backbone"], "neck": PARAMETERS["neck"], "input_size": INPUT_SIZE},
        {
            "timm": {"backbone": RESNET18},
            "OpenMMLab, at a size": {"backbone": RESNET50, "input_size": [480, 640]},
            "named, with a neck": {"backbone": "resnet50", "neck": {"type": "GlobalAveragePooling"}},
        },
    )
}
LOAD_OPERATION: Spec = {
    "requestBody": _config_body(
        {name: PARAMETERS[name] for name in ("backbone", "neck", "preprocess")},
        {"timm": {"backbone": RESNET18}, "named": {"backbone": "resnet50"}},
    )
}


# --- the document -------------------------------------------------------------------------------


def operation_id(route: APIRoute) -> str:
    """The handler's name: what generated clients call the operation."""
    return route.name


def _without_fastapi_errors(responses: Spec) -> Spec:
    """FastAPI adds its 422 to whatever has a parameter; ours are problems, and a path cannot be invalid."""
    return {
        status: response
        for status, response in responses.items()
        if status != "422" or PROBLEM_JSON in response["content"]
    }


class DescribedApp(FastAPI):
    """FastAPI with our components instead of those of its own validation errors."""

    def openapi(self) -> Spec:
        """The document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"] = COMPONENTS
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    operation["responses"] = _without_fastapi_errors(operation["responses"])
                    operation["security"] = self._security(path, method.upper())
        return self.openapi_schema or {}

    def _security(self, path: str, method: str) -> list[Spec]:
        """The keys that an operation takes; `{}` says that a request without one is fine here."""
        access: Access = self.state.access
        rule = rule_for(path, method)
        assert rule is not None, f"{method} {path} has no decision in service/api/access.py"
        who = rule.who[method]
        if access.is_for_anyone(who):
            return []
        return KEYS if access.asks_for_key(who) else [{}, *KEYS]
