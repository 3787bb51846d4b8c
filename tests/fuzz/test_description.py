"""schemathesis over the OpenAPI description: what it allows and what it forbids, against a real server.

Random bytes are no images and random text is no form, so that images and forms have strategies of their own; the rest
is made from the schemas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import schemathesis
from hypothesis import settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.api.app import create_app
from service.settings import Settings
from tests.conftest import RunningService, npy
from tests.fuzz.effort import PROFILE, examples
from tests.fuzz.strategies import FILES, PARAMETERS, configs, dumped, mutated_files

IMAGES = st.sampled_from(sorted(FILES.values())) | mutated_files()
for media_type in ("image/jpeg", "image/png", "image/webp", "image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(media_type, IMAGES)
TENSOR = npy(np.zeros((1, 3, 32, 32), np.float32))
schemathesis.openapi.media_type("application/x-npy", st.just(TENSOR) | st.binary(max_size=200))

BODIES_WITH_PARAMETERS = ("multipart/form-data", "application/json")
SCHEMA = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@st.composite
def forms(draw: st.DrawFn) -> dict[str, Any]:
    """The parts of a form: an image, a config that may be none, parameters."""
    texts = {"backbone": draw(configs()), **draw(PARAMETERS)}
    return {"image": [draw(IMAGES)], **{name: dumped(value) for name, value in texts.items()}}


@SCHEMA.hook("flatmap_body").apply_to(method="POST", path="/features")
def _own_forms(context: schemathesis.HookContext, body: Any) -> st.SearchStrategy[Any]:
    """Most forms are ours: the images of the schema's are none. No JSON has an `image` or a `tensor`."""
    is_form = isinstance(body, dict) and not body.keys().isdisjoint(("image", "tensor"))
    return st.just(body) | forms() | forms() if is_form else st.just(body)


@SCHEMA.hook("flatmap_query").apply_to(method="POST", path="/features")
def _own_queries(context: schemathesis.HookContext, query: Any) -> st.SearchStrategy[Any]:
    """Half of the queries have a config that may be one: a text of the schema never is."""
    asked = configs().map(lambda config: {**(query or {}), "backbone": dumped(config)})
    return st.just(query) | asked


def validate(case: schemathesis.Case, service: RunningService) -> None:
    """A reply that is described, and no crash: 502, 503 and 504 are promised of what asks too much, or for no time."""
    response = case.call_and_validate(base_url=service.url, checks=CHECKS)
    assert response.status_code != 500


@SCHEMA.exclude(path="/features", method="POST").parametrize()
@settings(PROFILE, max_examples=examples(20))
def test_replies_are_as_described(case: schemathesis.Case, service: RunningService) -> None:
    validate(case, service)


@SCHEMA.include(path="/features", method="POST").parametrize()
@settings(PROFILE, max_examples=examples(100))
def test_replies_of_features_are_as_described(case: schemathesis.Case, service: RunningService) -> None:
    if case.media_type in BODIES_WITH_PARAMETERS:
        case.query = {}  # it is refused beside them, and they would never be read
    validate(case, service)
