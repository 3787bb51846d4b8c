"""The Kubernetes manifests: valid, and of one mind with the service, the image and one another."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.conftest import ROOT, RunningService
from tests.deploy.dockerfile import environment_of_the_image
from tests.deploy.kustomize import KUBERNETES, Manifest, faults, identity, merged, rendered, roots
from tests.docs.test_documented import routes

OVERLAYS = [path for path in roots() if path.parent.name == "overlays"]
STOP_S = 5  # at most, after the drain
DRAIN_MARGIN_S = 5
LONGEST_START_S = 60
ROUTES = routes()  # before any test sets variables of the service


def ids(path: Path) -> str:
    return path.name


@pytest.fixture(params=OVERLAYS, ids=ids)
def manifests(request: pytest.FixtureRequest) -> dict[str, Manifest]:
    """The manifests of an overlay by kind; there is one of each."""
    found = rendered(request.param)
    by_kind = {manifest["kind"]: manifest for manifest in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture
def pod(manifests: dict[str, Manifest]) -> Manifest:
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    [only] = pod["containers"]
    return only


@pytest.fixture
def environment(manifests: dict[str, Manifest], container: Manifest) -> dict[str, str]:
    """The variables of a replica, the image's own among them."""
    given = {entry["name"]: entry["value"] for entry in container.get("env", [])}
    return environment_of_the_image() | manifests["ConfigMap"]["data"] | given


@pytest.fixture
def settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.mark.parametrize("folder", roots(), ids=ids)
def test_every_manifest_fits_kubernetes_own_schemas(folder: Path) -> None:
    assert [fault for manifest in rendered(folder) for fault in faults(manifest)] == []


def test_a_misspelled_field_is_a_fault() -> None:
    [claim] = rendered_file("base/checkpoints.yaml")
    assert faults(claim) == []
    assert faults(merged(claim, {"spec": {"accessMode": ["ReadWriteOnce"]}}))


def rendered_file(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", OVERLAYS, ids=ids)
def test_kubectl_makes_the_same_of_an_overlay(folder: Path) -> None:
    made = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout

    def by_identity(found: list[Manifest]) -> dict[tuple[str, str], Manifest]:
        return {identity(manifest): manifest for manifest in found}

    [digested] = [name for kind, name in by_identity(list(yaml.safe_load_all(made))) if kind == "ConfigMap"]
    plain = list(yaml.safe_load_all(made.replace(digested, "backbone-settings")))
    assert by_identity(plain) == by_identity(rendered(folder))


def test_a_replica_has_time_to_drain_before_it_is_killed(pod: Manifest, settings: Settings) -> None:
    needed_s = settings.drain_delay + settings.drain_seconds + STOP_S + DRAIN_MARGIN_S
    assert pod["terminationGracePeriodSeconds"] >= needed_s


def test_nothing_new_is_sent_by_the_end_of_the_delay(container: Manifest, settings: Settings) -> None:
    probe = container["readinessProbe"]
    noticed_s = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert settings.drain_delay >= noticed_s


def test_probes_ask_routes_that_there_are(container: Manifest, settings: Settings) -> None:
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert {("GET", probe["path"]) for probe in probes} == {
        ("GET", "/healthz"),
        ("GET", "/readyz"),
    } & ROUTES
    [port] = container["ports"]
    assert {probe["port"] for probe in probes} == {port["name"]}
    assert port["containerPort"] == settings.port


def test_a_start_is_given_up_after_the_time_that_it_may_take(container: Manifest) -> None:
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == LONGEST_START_S


def test_every_variable_is_a_setting_that_the_service_takes(
    manifests: dict[str, Manifest], container: Manifest, settings: Settings
) -> None:
    given = set(manifests["ConfigMap"]["data"]) | {entry["name"] for entry in container.get("env", [])}
    assert given <= {f"BACKBONE_{name.upper()}" for name in Settings.model_fields}
    assert settings.keys_file
    assert not settings.allow_anonymous


def test_the_service_of_the_same_name_sets_no_variables(
    manifests: dict[str, Manifest], pod: Manifest
) -> None:
    assert manifests["Service"]["metadata"]["name"] == "backbone"  # whose links would begin with BACKBONE_
    assert pod["enableServiceLinks"] is False


def test_a_pod_keeps_to_the_restricted_standard(pod: Manifest, container: Manifest) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


def test_what_the_service_writes_is_on_volumes(
    pod: Manifest, container: Manifest, settings: Settings
) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(volume["name"] for volume in pod["volumes"])
    for written in (settings.checkpoint_dir, settings.engine_cache, Path("/tmp")):
        assert {str(folder) for folder in [written, *written.parents]} & set(mounts)


def test_what_is_converted_fits_into_its_volume(pod: Manifest, settings: Settings) -> None:
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "engines"]
    assert settings.engine_cache_bytes <= quantity(volume["emptyDir"]["sizeLimit"])


def quantity(text: str) -> int:
    """Bytes of a quantity such as 10Gi."""
    return int(text[:-2]) << {"Mi": 20, "Gi": 30}[text[-2:]]


def test_everything_selects_the_pods(manifests: dict[str, Manifest]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selected = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selected)


def test_no_way_out_but_names(manifests: dict[str, Manifest]) -> None:
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert ports == {53}
    assert all("to" in rule for rule in policy["egress"])


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.20.0.1", "192.168.1.1"]
)
def test_downloads_come_from_public_addresses_over_https_only(address: str) -> None:
    [policy] = rendered(KUBERNETES / "components" / "downloads")
    [rule] = policy["spec"]["egress"]
    assert [port["port"] for port in rule["ports"]] == [443]
    for peer in rule["to"]:
        kept_out = [ipaddress.ip_network(cidr) for cidr in peer["ipBlock"]["except"]]
        assert any(ipaddress.ip_address(address) in network for network in kept_out)


def test_the_way_in_is_the_services_port(manifests: dict[str, Manifest], settings: Settings) -> None:
    [rule] = manifests["NetworkPolicy"]["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [settings.port]
    [port] = manifests["Service"]["spec"]["ports"]
    assert port["port"] == settings.port


def test_the_autoscaler_asks_for_a_number_that_the_service_and_the_adapter_have(
    manifests: dict[str, Manifest], service: RunningService
) -> None:
    spec = manifests["HorizontalPodAutoscaler"]["spec"]
    assert spec["scaleTargetRef"]["name"] == manifests["Deployment"]["metadata"]["name"]
    assert "replicas" not in manifests["Deployment"]["spec"]  # two would fight over it
    [metric] = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"\n{name} " in service.http.get("/metrics").text
    [adapter] = rendered_file("prometheus-adapter.yaml")
    [rule] = adapter["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert rule["name"]["matches"] == name


def test_one_replica_at_a_time_may_be_away(manifests: dict[str, Manifest]) -> None:
    assert manifests["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert manifests["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2
    assert manifests["Deployment"]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_a_gpu_is_asked_for_by_the_overlay_for_cuda_alone() -> None:
    def limits(overlay: str) -> dict[str, Any]:
        [deployment] = [m for m in rendered(KUBERNETES / "overlays" / overlay) if m["kind"] == "Deployment"]
        return deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]

    assert limits("cuda")["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits("cpu")


def test_the_readme_makes_the_secret_that_the_pods_read(pod: Manifest, settings: Settings) -> None:
    [secret] = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
    assert settings.keys_file
    command = f"kubectl create secret generic {secret} --from-file={settings.keys_file.name}"
    assert command in (ROOT / "README.md").read_text()


def test_nobody_else_may_read_the_keys(pod: Manifest) -> None:
    [mode] = [volume["secret"]["defaultMode"] for volume in pod["volumes"] if "secret" in volume]
    assert not mode & 0o007
