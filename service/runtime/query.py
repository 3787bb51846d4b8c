"""What a client asks of `POST /features`, before and after it is resolved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from service.config.preprocess import PreprocessSpec
from service.runtime.model import Precision, Weights, network_id
from service.runtime.plan import Plan
from service.runtime.postprocess import Pool


@dataclass(frozen=True)
class FeatureQuery:
    """What a client asks of `POST /features`, bounded but not yet resolved."""

    backbone: Any
    images: tuple[bytes, ...] = ()
    tensor: bytes | None = None
    neck: Any = None
    preprocess: Any = None
    precision: Precision = "float32"
    dtype: Literal["float32", "float16"] = "float32"
    pool: Pool = "none"
    normalize: bool = False


@dataclass(frozen=True)
class Prepared:
    """A query resolved as far as it goes without an image or a weight; `fingerprint` identifies its answer."""

    query: FeatureQuery
    plan: Plan
    spec: PreprocessSpec
    weights: Weights | None
    neck_weights: Weights | None
    model_id: str
    fingerprint: str
    deadline: float


def fingerprint(
    query: FeatureQuery,
    plan: Plan,
    spec: PreprocessSpec,
    identity: str,
    neck_weights: Weights | None,
    extra: str,
) -> str:
    """A digest of everything that decides the answer: weights, config, images, and how they are prepared."""
    parts = [
        identity,
        repr(plan.levels),
        repr(plan.config.freeze()),
        None if plan.neck is None else network_id(plan.neck.key, neck_weights),
        query.precision,
        query.dtype,
        query.pool,
        query.normalize,
        spec.as_json() if query.tensor is None else None,
        extra,
    ]
    digest = hashlib.sha256(orjson.dumps(parts))
    for data in (query.tensor or b"", *query.images):
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:32]
