"""What the service says of itself over HTTP: which engine it came to use, what its stages cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.failures import NotPromoted
from benchmarks.processes import Server

SETTLED = ("promoted", "stays")
PROMOTION_PATIENCE_S = 120.0


@dataclass(frozen=True)
class EngineFact:
    """What a model runs on, after its promotion is decided."""

    engine: str
    reason: str | None


def models(server: Server) -> list[dict[str, Any]]:
    """The entries of `GET /models`."""
    listed: list[dict[str, Any]] = httpx.get(f"{server.url}/models", trust_env=False, timeout=30).json()[
        "models"
    ]
    return listed


def _is_settled(model: Mapping[str, Any]) -> bool:
    promotion = model.get("promotion")
    return promotion is None or promotion.get("state") in SETTLED


def settled(server: Server, patience_s: float) -> bool:
    """Wait until every model in memory is promoted or told to stay; whether they came to it in time."""
    until = time.perf_counter() + patience_s
    while not all(map(_is_settled, models(server))):
        if time.perf_counter() > until:
            return False
        time.sleep(0.1)  # another process: there is nothing to wait on
    return True


def wait_for_engine(server: Server) -> EngineFact:
    """The engine of the first model, once it is decided.

    Raises:
        NotPromoted: not decided within two minutes.
    """
    if not settled(server, PROMOTION_PATIENCE_S):
        states = [model.get("promotion") for model in models(server)]
        raise NotPromoted(f"after {PROMOTION_PATIENCE_S:g} s: {states}")
    first = models(server)[0]
    return EngineFact(str(first["engine"]), (first.get("promotion") or {}).get("reason"))


def engines(server: Server) -> str:
    """How many of the models in memory are on which engine: `8 openvino, 2 torch`."""
    counts = Counter(str(model["engine"]) for model in models(server))
    return ", ".join(f"{count} {engine}" for engine, count in sorted(counts.items()))


def counters(server: Server) -> dict[tuple[str, str], float]:
    """Every sample of `GET /metrics`, by its name and its first label's value."""
    text = httpx.get(f"{server.url}/metrics", trust_env=False, timeout=30).text
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def stage_ms(
    before: Mapping[tuple[str, str], float], after: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """Mean milliseconds of each stage between two readings."""
    name = "backbone_stage_seconds"
    found = {}
    for (sample, stage), total in after.items():
        if sample != f"{name}_sum":
            continue
        count = after[f"{name}_count", stage] - before.get((f"{name}_count", stage), 0.0)
        if count:
            found[stage] = 1000 * (total - before.get((sample, stage), 0.0)) / count
    return found


def mean_batch(before: Mapping[tuple[str, str], float], after: Mapping[tuple[str, str], float]) -> float:
    """Images in one forward pass, on average, between two readings; 0 if there was none."""
    total, count = (
        after.get((f"backbone_batch_images_{part}", ""), 0.0)
        - before.get((f"backbone_batch_images_{part}", ""), 0.0)
        for part in ("sum", "count")
    )
    return total / count if count else 0.0
