"""How long fuzzing lasts: a moment in `make test`, as long as `make fuzz` says."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

VARIABLE = "BACKBONE_FUZZ_TIMES"
TIMES = int(os.environ.get(VARIABLE, "1"))
PROFILE = settings(
    deadline=None,
    derandomize="CI" in os.environ and TIMES == 1,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


def examples(count: int) -> int:
    """So many examples in `make test`."""
    return count * TIMES
