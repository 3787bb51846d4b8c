"""docs/metrics.md has every metric, as `GET /metrics` has it, and every label's values."""

from __future__ import annotations

import re

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from service import metrics
from service.api.errors import reason_of
from service.errors import ServiceError
from service.logs import FIELDS
from tests.conftest import ROOT, RunningService

TEXT = (ROOT / "docs" / "metrics.md").read_text()
HIDDEN = {"le", "quantile"}


def rows() -> dict[str, tuple[str, str, str]]:
    """Type, labels and meaning of every metric in the text."""
    found = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", TEXT, re.MULTILINE)
    return {name: (kind, labels.replace("`", ""), meaning) for name, kind, labels, meaning in found}


def described(family: Metric) -> tuple[str, tuple[str, str, str]]:
    """The row that a metric should have."""
    labels = {label for sample in family.samples for label in sample.labels} - HIDDEN
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return name, (family.type, ", ".join(sorted(labels)), family.documentation)


@pytest.fixture(scope="module")
def served(service: RunningService) -> dict[str, tuple[str, str, str]]:
    """Every metric of a service that has been asked something and has refused something."""
    service.http.get("/backbones/NoSuchNet")
    text = service.http.get("/metrics").text
    return dict(described(family) for family in text_string_to_metric_families(text))


def test_every_metric_is_documented_and_no_other(served: dict[str, tuple[str, str, str]]) -> None:
    own = {name: row for name, row in rows().items() if name.startswith("backbone_")}
    assert own == {name: row for name, row in served.items() if name.startswith("backbone_")}


def test_the_metrics_that_operators_are_told_to_watch_are_there(
    served: dict[str, tuple[str, str, str]],
) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"\b(backbone_\w+?)(?:_sum|_count|_bucket)?\b(?=[`{\[])", text))
    assert named
    assert named <= set(served)
    reasons = {reason_of(error) for error in descendants(ServiceError)}
    assert set(re.findall(r'rejected_total\{reason="(\w+)"\}', text)) <= reasons


def descendants(error: type[ServiceError]) -> list[type[ServiceError]]:
    """An error class and all that are made of it."""
    return [error, *(found for kind in error.__subclasses__() for found in descendants(kind))]


def test_the_process_metrics_that_are_named_are_there(served: dict[str, tuple[str, str, str]]) -> None:
    named = set(re.findall(r"`((?:process|python)_\w+)`", TEXT))
    assert named
    assert named <= set(served)


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("method", [*metrics.METHODS, metrics.OTHER]),
        ("media_type", [*metrics.MEDIA_TYPES, metrics.OTHER]),
        ("format", metrics.FORMATS),
        ("stage", metrics.STAGES),
        ("reason", [*metrics.ACCESS_REFUSALS, *metrics.DROPS]),
        ("outcome", [*metrics.LOADS, *metrics.PROMOTIONS, *metrics.IMAGE_FETCHES]),
    ],
)
def test_the_values_of_a_label_are_documented(label: str, values: list[str]) -> None:
    section = re.search(rf"^- `{label}`: (.*(?:\n  .*)*)", TEXT, re.MULTILINE)
    assert section
    assert set(re.findall(r"`([^`]+)`", section[1])) == set(values)


def test_every_member_of_a_log_line_is_documented() -> None:
    named = set(re.findall(r"^\| `(\w+)` \| [^|]*\|$", TEXT, re.MULTILINE))
    always = {"time", "level", "logger", "message", "request_id", "trace_id", "span_id", "exception"}
    assert named == {*FIELDS, *always}
