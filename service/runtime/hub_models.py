"""timm models that are named by a repository of the hub: `"model_name": "hf-hub:organisation/name"`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.backbones.tables import timm_models
from service.backbones.timm import hub_architecture
from service.checkpoints.names import HUB_SCHEME
from service.checkpoints.resolve import CheckpointStore

# TIMMBackbone's own word for a key of timm's constructor.
RENAMED = {"in_chans": "in_channels"}


def is_hub_model(backbone: Any) -> bool:
    """Whether a raw config names its architecture by a repository."""
    name = backbone.get("model_name") if isinstance(backbone, Mapping) else None
    return isinstance(name, str) and name.startswith(HUB_SCHEME)


def with_architecture(backbone: Mapping[str, Any], store: CheckpointStore) -> dict[str, Any]:
    """The config with the architecture that the repository's `config.json` names, as timm reads it.

    `pretrained: true` becomes the repository's weights. What the client gives goes before what the repository says.
    Fetches at most one small file; for a worker thread.

    Raises:
        CheckpointUnavailable, RemoteFailed, RemoteTimeout: the repository cannot be read.
        UnknownBackbone, InvalidConfig: it names nothing that is served.
    """
    repository = backbone["model_name"]
    described = store.hub_config(repository)
    architecture, arguments = hub_architecture(described)
    own = {RENAMED.get(key, key): value for key, value in arguments.items()}
    resolved = {**own, **backbone, "model_name": _tagged(architecture, described)}
    if backbone.get("pretrained") is True:
        resolved.update(pretrained=False, checkpoint=repository)
    return resolved


def _tagged(architecture: str, described: Mapping[str, Any]) -> str:
    """The architecture with the tag of its weights, where timm knows it: it says how images are prepared."""
    weights = described.get("pretrained_cfg")
    tag = weights.get("tag") if isinstance(weights, Mapping) else None
    known = timm_models()[architecture.partition(".")[0]].tags
    return f"{architecture}.{tag}" if "." not in architecture and tag in known else architecture
