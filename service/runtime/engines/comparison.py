"""Whether two engines give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from service.config.spec import Precision
from service.runtime.engines.base import BackboneEngine
from service.runtime.engines.samples import Sample

# Relative L2 distance of a level from torch's. Both compute in this precision, neither more exactly than the other.
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference over that of `expected`; infinite for other shapes and for NaN."""
    if found.shape != expected.shape:
        return math.inf
    distance = float(torch.linalg.vector_norm(found - expected))
    norm = float(torch.linalg.vector_norm(expected))
    ratio = distance / norm if norm else distance
    return math.inf if math.isnan(ratio) else ratio


def difference(engine: BackboneEngine, samples: Iterable[Sample]) -> str | None:
    """In what an engine differs from torch's answers beyond the tolerance; None if it does not."""
    for sample in samples:
        found = engine.run(sample.images, tuple(sample.features), sample.precision, crowded=True)
        for node, expected in sample.features.items():
            distance = relative_distance(found[node], expected)
            if distance > TOLERANCES[sample.precision]:
                size = "x".join(map(str, sample.size))
                return f"it differs from torch by {distance:.1e} at {node}, on a request of {size}"
    return None
