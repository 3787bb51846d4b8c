"""What `kubectl kustomize` makes of `deploy/kubernetes/`, for machines that have none.

Only what is used there: resources, components, patches by strategic merge, and generated config maps, whose names
stay without their digest. Anything else raises. `python -m tests.deploy.kustomize` checks the overlays against
Kubernetes' own schemas (`make lint`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from tests.processes import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.33", "1.37")  # the oldest and the newest that the manifests are for
READ = {"apiVersion", "kind", "resources", "components", "patches", "configMapGenerator"}
# By which key the elements of a list are the same ones (kubernetes.io, "strategic merge patch").
MERGED_BY = {"containers": "name", "env": "name", "volumes": "name"}
OWN_KINDS = ("monitoring.coreos.com/",)  # schemas that an operator brings

Manifest = dict[str, Any]


def rendered(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization.

    Raises:
        ValueError: it uses something that is not understood here, or a patch fits no manifest.
    """
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(plan) - READ:
        raise ValueError(f"{folder}: not understood here: {sorted(unknown)}")
    found: list[Manifest] = []
    for name in [*plan.get("resources", []), *plan.get("components", [])]:
        path = (folder / name).resolve()
        found += rendered(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    found += [_config_map(entry) for entry in plan.get("configMapGenerator", [])]
    for entry in plan.get("patches", []):
        found = _patched(found, yaml.safe_load((folder / entry["path"]).read_text()))
    return found


def _config_map(entry: Manifest) -> Manifest:
    data = dict(literal.split("=", 1) for literal in entry["literals"])
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def identity(manifest: Manifest) -> tuple[str, str]:
    """Kind and name."""
    return manifest["kind"], manifest["metadata"]["name"]


def _patched(manifests: list[Manifest], patch: Manifest) -> list[Manifest]:
    if identity(patch) not in map(identity, manifests):
        raise ValueError(f"a patch of {identity(patch)}, which is not there")
    return [merged(old, patch) if identity(old) == identity(patch) else old for old in manifests]


def merged(old: Any, new: Any, key: str = "") -> Any:
    """Kubernetes' strategic merge: objects by their keys, some lists by their elements' names, all else replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: merged(old[name], new[name], name) if name in old else new[name] for name in new}
    if isinstance(old, list) and isinstance(new, list) and key in MERGED_BY:
        return _merged_lists(old, new, MERGED_BY[key])
    return new


def _merged_lists(old: list[Manifest], new: list[Manifest], key: str) -> list[Manifest]:
    changes = {element[key]: element for element in new}
    names = {element[key] for element in old}
    added = [element for element in new if element[key] not in names]  # kustomize puts them first
    return added + [merged(element, changes.get(element[key], {})) for element in old]


def roots() -> list[Path]:
    """What one would hand to kubectl, and the components that add to it."""
    return sorted(
        path.parent
        for folder in ("overlays", "components")
        for path in (KUBERNETES / folder).glob("*/kustomization.yaml")
    )


def faults(manifest: Manifest) -> list[str]:
    """What Kubernetes' schemas have against a manifest."""
    if manifest["apiVersion"].startswith(OWN_KINDS):
        return []
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{'/'.join(identity(manifest))}, Kubernetes {version}: {error.message}")
    return found


def main() -> int:
    """Check every overlay and component; the exit status."""
    status = 0
    for folder in roots():
        manifests = rendered(folder)
        found = [fault for manifest in manifests for fault in faults(manifest)]
        status = 1 if found else status
        print(
            f"{folder.relative_to(ROOT)}: {len(manifests)} manifests, {len(found)} faults", *found, sep="\n  "
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
