"""The dashboard and the alerts ask for numbers that the service has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT, RunningService, multipart

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "backbone.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
# Grafana fills these in before it asks.
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*"}
# Prometheus adds these itself, to every number that it collects.
OF_PROMETHEUS = {"up"}
LABELS_OF_PROMETHEUS = {"instance", "job"}


def queries() -> dict[str, str]:
    """Every query by where it is from."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }
    found |= {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}
    for variable, value in VARIABLES.items():
        found = {name: query.replace(variable, value) for name, query in found.items()}
    return found


QUERIES = queries()


def selectors(query: Any) -> Iterator[Any]:
    """Every place of a parsed query that names a metric."""
    if isinstance(query, promql_parser.VectorSelector):
        yield query
        return
    parts = [getattr(query, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    for part in [*parts, *getattr(query, "args", [])]:
        if part is not None:
            yield from selectors(part)


@pytest.fixture(scope="module")
def samples(service: RunningService) -> dict[str, set[str]]:
    """The labels of each name in `/metrics`, once an image has been answered for."""
    import numpy as np

    tensor = np.zeros((1, 3, 32, 32), np.float32)
    config = {"type": "ResNet", "depth": 18}
    assert service.http.post("/features", **multipart(config, tensor=tensor)).status_code == 200
    text = service.http.get("/metrics").text
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_names_metrics_and_labels_that_the_service_has(
    name: str, samples: dict[str, set[str]]
) -> None:
    asked = list(selectors(promql_parser.parse(QUERIES[name])))
    assert asked
    for selector in asked:
        if selector.name in OF_PROMETHEUS:
            continue
        assert selector.name in samples
        labels = {matcher.name for matcher in selector.matchers.matchers} | legend_labels(name)
        assert labels <= samples[selector.name] | LABELS_OF_PROMETHEUS


def legend_labels(name: str) -> set[str]:
    """The labels by which a panel tells its lines apart."""
    legends = {
        f"{panel['title']} {target['refId']}": target["legendFormat"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }
    return set(re.findall(r"\{\{(\w+)\}\}", legends.get(name, "")))


def test_no_two_panels_have_one_place() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) > 1


def test_prometheus_reads_the_rules_and_asks_the_services_port() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all((DEPLOY / "prometheus" / file).is_file() for file in prometheus["rule_files"])
    [job] = prometheus["scrape_configs"]
    [target] = job["dns_sd_configs"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert set(target["names"]) <= set(compose["services"])
    assert compose["services"]["backbone"]["expose"] == [str(target["port"])]
