"""What replies and `GET /models` say of networks and levels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from service.checkpoints.resolve import CheckpointFile
from service.protocol.reply import (
    FloatArray,
    FrozenInfo,
    LevelArray,
    ModelInfo,
    NeckInfo,
    WeightsInfo,
)
from service.runtime.cache import Entry
from service.runtime.model import LoadedModel, LoadedNeck, LoadedNetwork, Weights
from service.runtime.plan import LevelShape, pooled_fact
from service.runtime.postprocess import Pool
from service.runtime.query import Prepared


def reply_levels(
    levels: Sequence[LevelShape], arrays: Sequence[FloatArray], pool: Pool
) -> tuple[LevelArray, ...]:
    facts = [pooled_fact(level.fact, pool) for level in levels]
    return tuple(
        LevelArray(fact.index, fact.name, fact.layout, fact.stride, fact.channels, array)
        for fact, array in zip(facts, arrays, strict=True)
    )


def model_entry(entry: Entry[LoadedNetwork]) -> dict[str, Any]:
    network = entry.model
    return {
        "id": network.id,
        "type": network.type,
        "device": str(network.device),
        "dtype": "float32",
        "bytes": entry.bytes,
        "weights": _weights_info(network, network.checkpoint).describe(),
        "engine": network.engine.name if isinstance(network, LoadedModel) else "torch",
        "hits": entry.hits,
        "in_use": entry.leases,
        "last_used": entry.last_used,
        "load_seconds": round(entry.load_seconds, 3),
    }


def loading_entry(key: str, type_name: str, weights: Weights | None) -> dict[str, Any]:
    """A network whose file is here and that is being built, or waits for its turn; from now on."""
    return {
        "id": key,
        "type": type_name,
        "state": "loading",
        "checkpoint": None if weights is None else weights.file.name,
        "received": None if weights is None else weights.file.size,
        "total": None if weights is None else weights.file.size,
        "started": time.time(),
    }


def model_info(prepared: Prepared, model: LoadedModel, neck: LoadedNeck | None) -> ModelInfo:
    report = prepared.plan.frozen
    frozen = FrozenInfo(report.stages, len(report.parameters), report.of)
    return ModelInfo(
        id=model.id,
        type=prepared.plan.type,
        device=str(model.device),
        engine=model.engine.name,
        precision=prepared.query.precision,
        weights=_weights_info(model, _asked(prepared.weights)),
        frozen=frozen,
        neck=None if neck is None else _neck_info(prepared, neck),
    )


def _neck_info(prepared: Prepared, neck: LoadedNeck) -> NeckInfo:
    # The backbone's checkpoint was looked into for a neck, and may have none.
    file = None if neck.checkpoint is None else _asked(prepared.neck_weights)
    return NeckInfo(neck.id, neck.type, _weights_info(neck, file))


def _asked(weights: Weights | None) -> CheckpointFile | None:
    """The checkpoint by the name that this client gave it; another may have loaded the same bytes before."""
    return None if weights is None else weights.file


def _weights_info(network: LoadedNetwork, file: CheckpointFile | None) -> WeightsInfo:
    keys = network.keys
    if file is None:
        return WeightsInfo("random")
    return WeightsInfo(
        file.source,
        file.name,
        file.sha256,
        keys.loaded,
        tuple(keys.missing),
        tuple(keys.unexpected),
        keys.prefix,
        keys.layout,
    )
