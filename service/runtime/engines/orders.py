"""What the service tells the converter, which is another process, as JSON lines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from service.checkpoints.resolve import CheckpointFile
from service.config.spec import WeightsRef
from service.runtime.model import Weights
from service.runtime.plan import Plan


@dataclass(frozen=True)
class Order:
    """One network to convert.

    Attributes:
        backbone: its config as the planner took it.
        model_id: what `network_id` gives for it.
        weights: its checkpoint; None for random weights.
        nodes: features to convert beside those that the config's architecture lists.
        size: [height, width] that is asked of it.
        path: of the `.xml` to write.
        one_size: whether to convert for `size` alone. OpenVINO does not check every access of a network whose shapes
            are open: one that has sizes built in may end the converter.
        whatever_speed: whether a network that is slower than torch is wanted too.
    """

    backbone: Any
    model_id: str
    weights: Weights | None
    nodes: tuple[str, ...]
    size: tuple[int, int]
    path: Path
    one_size: bool = False
    whatever_speed: bool = False

    @classmethod
    def of(
        cls,
        plan: Plan,
        model_id: str,
        weights: Weights | None,
        size: tuple[int, int],
        path: Path,
        *,
        whatever_speed: bool = False,
    ) -> Order:
        """The order for what a plan builds."""
        return cls(plan.backbone, model_id, weights, plan.nodes, size, path, whatever_speed=whatever_speed)

    def to_line(self) -> bytes:
        """One line of JSON."""
        described = {**vars(self), "path": str(self.path), "weights": None}
        if self.weights is not None:
            file = {**asdict(self.weights.file), "path": str(self.weights.file.path)}
            described["weights"] = {"ref": asdict(self.weights.ref), "file": file}
        return orjson.dumps(described) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Order:
        """The order of a line that `to_line` wrote."""
        known = orjson.loads(line)
        weights = known["weights"]
        return cls(
            backbone=known["backbone"],
            model_id=known["model_id"],
            weights=None if weights is None else _weights(weights),
            nodes=tuple(known["nodes"]),
            size=(known["size"][0], known["size"][1]),
            path=Path(known["path"]),
            one_size=known["one_size"],
            whatever_speed=known["whatever_speed"],
        )


def _weights(known: dict[str, Any]) -> Weights:
    file = known["file"]
    file.update(path=Path(file["path"]), identity=tuple(file["identity"]))
    return Weights(WeightsRef(**known["ref"]), CheckpointFile(**file))
