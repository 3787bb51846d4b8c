"""What a client asks of `POST /features`, before and after it is resolved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from service.config.preprocess import PreprocessSpec
from service.config.spec import Precision
from service.runtime.model import Weights, network_id
from service.runtime.plan import Plan
from service.runtime.postprocess import Pool
from service.runtime.threads import Deadline


@dataclass(frozen=True)
class FeatureQuery:
    """What a client asks of `POST /features`, bounded but not yet resolved.

    `urls` are where images are fetched from, by their index in `images`, which are empty there until then. Clients take
    turns by `client`.
    """

    backbone: Any
    images: tuple[bytes, ...] = ()
    tensor: bytes | None = None
    urls: Mapping[int, str] = field(default_factory=dict)
    neck: Any = None
    preprocess: Any = None
    precision: Precision = "float32"
    dtype: Literal["float32", "float16"] = "float32"
    pool: Pool = "none"
    normalize: bool = False
    client: str = ""

    @property
    def bytes(self) -> int:
        """Of its images or its tensor, as they came."""
        return len(self.tensor or b"") + sum(len(image) for image in self.images)


@dataclass(frozen=True)
class Prepared:
    """A query resolved as far as it goes without decoding an image or reading a weight.

    `fingerprint` identifies its answer; `fetch_ms` is what it took to fetch its images, 0 without URLs.
    """

    query: FeatureQuery
    plan: Plan
    spec: PreprocessSpec
    weights: Weights | None
    neck_weights: Weights | None
    model_id: str
    fingerprint: str
    deadline: Deadline
    fetch_ms: float = 0.0


def fingerprint(
    query: FeatureQuery,
    plan: Plan,
    identity: str,
    neck_weights: Weights | None,
    extra: str,
) -> str:
    """A digest of everything that decides the answer: weights, config, images, and how they are prepared.

    The engine is no part of it: all of them give the same numbers to within the tolerance that is promised, and the
    ETag that this becomes is a weak one.
    """
    parts = (
        identity,
        None if plan.neck is None else network_id(plan.neck.key, neck_weights),
        query.precision,
        query.dtype,
        query.pool,
        query.normalize,
        plan.spec.as_json() if query.tensor is None else None,
        extra,
    )
    digest = hashlib.sha256(plan.answer_key)
    digest.update(repr(parts).encode())
    for data in (query.tensor or b"", *query.images):
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:32]
