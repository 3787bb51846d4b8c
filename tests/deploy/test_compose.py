"""`docker-compose.yml`: the service behind its gateway, and nothing else to be reached."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from service.cli import make_parser
from service.settings import Settings
from tests.deploy.dockerfile import environment_of_the_image
from tests.processes import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BACKBONE = SERVICES["backbone"]
OVERRIDES = {
    name: yaml.safe_load((ROOT / f"docker-compose.{name}.yml").read_text()) for name in ("cuda", "downloads")
}
STOP_S = 5  # at most, after the drain
DRAIN_MARGIN_S = 5


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in (environment_of_the_image() | BACKBONE["environment"]).items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    return Settings()


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "cpus"} <= set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_named_in_full(name: str) -> None:
    tag = SERVICES[name]["image"].rpartition(":")[2]
    assert tag == "cpu" if name == "backbone" else re.match(r"v?\d+\.\d+\.\d+", tag)


def test_the_service_is_not_published_and_has_no_way_out() -> None:
    assert "ports" not in BACKBONE
    assert [COMPOSE["networks"][network]["internal"] for network in BACKBONE["networks"]] == [True]


def test_what_is_published_is_on_loopback_unless_told() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"gateway", "grafana"}
    assert all("127.0.0.1:" in port for ports in published.values() for port in ports)


def test_the_service_takes_its_settings(settings: Settings) -> None:
    own = {name for name in BACKBONE["environment"] if name.startswith("BACKBONE_")}
    assert own <= {f"BACKBONE_{name.upper()}" for name in Settings.model_fields}
    assert settings.allow_anonymous
    assert BACKBONE["expose"] == [str(settings.port)]


def test_it_has_time_to_drain_before_it_is_killed(settings: Settings) -> None:
    needed_s = settings.drain_delay + settings.drain_seconds + STOP_S + DRAIN_MARGIN_S
    assert seconds(BACKBONE["stop_grace_period"]) >= needed_s


def test_the_gateway_outlives_the_service() -> None:
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) >= seconds(BACKBONE["stop_grace_period"])


def test_what_the_service_writes_is_on_volumes(settings: Settings) -> None:
    targets = {volume.split(":")[1] for volume in BACKBONE["volumes"]}
    assert str(settings.checkpoint_dir) in targets
    assert str(settings.engine_cache.parent) in targets
    assert str(settings.config_dir) in targets


def test_its_health_check_is_a_command_of_the_service() -> None:
    kind, program, *arguments = BACKBONE["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "backbone-service")
    assert make_parser().parse_args(arguments).ready


def test_every_file_and_volume_that_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_an_override_changes_services_that_there_are() -> None:
    for name, override in OVERRIDES.items():
        assert set(override["services"]) <= set(SERVICES), name
    cuda = OVERRIDES["cuda"]["services"]["backbone"]
    assert set(cuda["environment"]) <= {f"BACKBONE_{setting.upper()}" for setting in Settings.model_fields}
    assert cuda["build"]["args"]["VARIANT"] == "cuda"
