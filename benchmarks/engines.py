"""`make engines`: which networks go over to OpenVINO, how exact and how fast, for `docs/engines.md`.

Every type with its own example and random weights, beside a fixed sample of timm's and torchvision's networks, goes
through the converter of the service. What is found is kept as JSON lines, so that a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.machine import describe
from benchmarks.processes import ROOT
from benchmarks.tables import markdown, median, number
from service.backbones.catalogue import TYPES, backbone_registry
from service.config.files import ConfigCatalogue
from service.errors import ServiceError
from service.necks.catalogue import neck_registry
from service.runtime.engines.artefacts import Facts
from service.runtime.engines.conversion import ConversionFailed, Converter
from service.runtime.engines.orders import Order
from service.runtime.model import network_id
from service.runtime.plan import Planner

PAGE = ROOT / "docs" / "engines.md"
STATE = ROOT / ".engines.jsonl"
# One order is worked on and one waits, so that the converter stays.
ORDERS_AT_ONCE = 2
# Small members of many families.
TIMM_NAMES = """
cait_xxs24_224 coat_lite_tiny convit_tiny convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_s davit_tiny
deit_tiny_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small efficientformerv2_s0 efficientnet_b0
efficientnetv2_rw_t efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf
gcvit_xxtiny gernet_s ghostnet_100 halonet26t hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 levit_128s
maxvit_rmlp_pico_rw_256 mixer_s16_224 mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mobilevit_xxs
mvitv2_tiny nest_tiny nf_regnet_b0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0 repvit_m1 res2net50_26w_4s
resnest14d resnet18 resnet50 resnetv2_18 rexnet_100 skresnet18 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
tiny_vit_5m_224 twins_svt_small vgg11 vit_tiny_patch16_224 xcit_nano_12_p16_224
"""
TORCHVISION_NAMES = """
alexnet convnext_tiny densenet121 efficientnet_b0 googlenet mobilenet_v3_small regnet_y_400mf resnet18
shufflenet_v2_x0_5 squeezenet1_0 swin_t vgg11 vit_b_32
"""
SAMPLES = {"timm": TIMM_NAMES.split(), "torchvision": TORCHVISION_NAMES.split()}
GROUPS = {"mmpretrain": "OpenMMLab", "mmdet": "OpenMMLab", "mmyolo": "OpenMMLab", "mmselfsup": "OpenMMLab"}

TEMPLATE = """# Engines

Written by `python -m benchmarks.engines --write`; `make engines` prints the same.

{machine}

Every model starts on **torch**. On a CPU, **OpenVINO** takes over (`BACKBONE_ENGINE=auto`): a process of its own
traces the network, converts it in float32 and compares it with torch at several sizes and numbers of images; then real
requests are compared. What differs by more than 1e-4 (relative L2, any level), is slower, or cannot be traced stays on
torch, and `GET /models` says why. With `BACKBONE_ENGINE=openvino` a slower network is taken as well. On CUDA devices
the other engine is **inductor**, which is not in these tables.

- *Sizes*: what the converted network takes: any that torch takes, only multiples of 32 (torch answers others), or one
  (another is made for each of the sizes that are asked for, at most four).
- *Error*: relative L2 distance from torch of the worst level, white noise of the network's own size.
- *CPU ms*: of one image to the deepest level on one thread, float32; *faster* is torch's over OpenVINO's.
- *Seconds*: of the conversion with all of its comparisons, at the lowest priority.

Weights are random: each type's own initialisation. {sample}

## Summary

{summary}

## What stays on torch

{staying}

{untried}{tables}"""


@dataclass(frozen=True)
class Row:
    """What came of one network; `sizes`, errors and times are empty where nothing was converted.

    `cpu_ms` is of one image by engine.
    """

    type: str
    promoted: bool
    reason: str = ""
    sizes: str = ""
    error: float | None = None
    cpu_ms: Mapping[str, float] | None = None
    seconds: float = 0.0

    @property
    def scope(self) -> str:
        """The library that the type is from."""
        return self.type.partition(".")[0]

    @property
    def faster(self) -> float | None:
        """Torch's time over OpenVINO's."""
        return self.cpu_ms["torch"] / self.cpu_ms["openvino"] if self.cpu_ms else None

    @classmethod
    def of(cls, type_name: str, facts: Facts) -> Row:
        """What a conversion found out."""
        sizes = "any" if facts.divisor == 1 else f"multiples of {facts.divisor}"
        if facts.size is not None:
            sizes = f"{facts.size[0]}x{facts.size[1]}"
        return cls(
            type=type_name,
            promoted=facts.outcome == "converted",
            reason=facts.reason,
            sizes=sizes if facts.cpu_ms else "",
            error=max(facts.errors.values(), default=None),
            cpu_ms=facts.cpu_ms or None,
            seconds=facts.seconds,
        )


# --- what is tried --------------------------------------------------------------------------------


def subjects() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Types and their configs."""
    registry = backbone_registry()
    for type_name, _, _ in TYPES:
        yield type_name, registry.resolve(type_name).family.example(type_name)
    for scope, names in SAMPLES.items():
        for name in names:
            yield f"{scope}.{name}", {"type": f"{scope}.{name}"}


class Trials:
    """Conversions one after the other, in the service's own converter.

    Args:
        state: where each finding is added.
        folder: for what is converted, which is not kept.
    """

    def __init__(self, state: Path, folder: Path) -> None:
        self._state = state
        self._folder = folder
        self._converter = Converter()
        self._planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(Path()))
        self._places = asyncio.Semaphore(ORDERS_AT_ONCE)

    async def run(self, wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Try all of them."""
        async with asyncio.TaskGroup() as tasks:
            for position, (type_name, config) in enumerate(wanted, 1):
                tasks.create_task(self._one(f"{position}/{len(wanted)}", type_name, config))

    async def _one(self, place: str, type_name: str, config: Mapping[str, Any]) -> None:
        async with self._places:
            row = await self._tried(type_name, config)
        with self._state.open("ab") as file:
            file.write(orjson.dumps(asdict(row)) + b"\n")
        say(f"{place} {type_name}: {'promoted' if row.promoted else row.reason} ({row.seconds:.1f} s)")

    async def _tried(self, type_name: str, config: Mapping[str, Any]) -> Row:
        path = self._folder / f"{type_name}.xml"
        try:
            plan = self._planner.plan(config)
            order = Order.of(plan, network_id(plan.key, None), None, plan.input_size, path)
            return Row.of(type_name, await self._converter.convert(order))
        except ConversionFailed as error:
            return Row(type_name, promoted=False, reason=str(error))
        except ServiceError as error:
            return Row(type_name, promoted=False, reason=error.detail)
        finally:
            for suffix in (".xml", ".bin"):
                path.with_suffix(suffix).unlink(missing_ok=True)


def known(state: Path) -> dict[str, Row]:
    """The rows of earlier runs, the last of each type."""
    lines = state.read_bytes().splitlines() if state.exists() else []
    rows = [Row(**orjson.loads(line)) for line in lines]
    return {row.type: row for row in rows}


# --- the page -------------------------------------------------------------------------------------


def document(rows: Sequence[Row], untried: Sequence[str], machine: str) -> str:
    """The text of docs/engines.md."""
    scopes = list(dict.fromkeys(row.scope for row in rows))
    sections = [f"\n## {scope}\n\n{table([row for row in rows if row.scope == scope])}\n" for scope in scopes]
    counted = " and of ".join(f"{scope} {len(names)}" for scope, names in SAMPLES.items())
    return TEMPLATE.format(
        machine=machine,
        sample=f"Of {counted} networks are tried, over their families.",
        summary=summary(rows),
        staying=staying(rows),
        untried=f"Not tried in this run: {', '.join(f'`{name}`' for name in untried)}.\n" if untried else "",
        tables="".join(sections),
    )


def summary(rows: Sequence[Row]) -> str:
    """How many go over, by library."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(GROUPS.get(row.scope, row.scope), []).append(row)
    head = ("library", "tried", "promoted", "at any size", "multiples of 32", "one size", "faster (median)")
    return markdown(head, [_summary_line(name, found) for name, found in {**groups, "all": rows}.items()])


def _summary_line(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    promoted = [row for row in rows if row.promoted]
    ratios = [row.faster for row in promoted if row.faster is not None]
    anywhere = sum(row.sizes == "any" for row in promoted)
    multiples = sum(row.sizes.startswith("multiples") for row in promoted)
    counts = (len(rows), len(promoted), anywhere, multiples, len(promoted) - anywhere - multiples)
    return name, *map(str, counts), number(median(ratios)) if ratios else ""


def staying(rows: Sequence[Row]) -> str:
    """What does not go over, and why."""
    kept = [(f"`{row.type}`", row.reason.replace("|", "\\|")) for row in rows if not row.promoted]
    return markdown(("type", "why"), kept) if kept else "Nothing."


def table(rows: Iterable[Row]) -> str:
    """A line for each network."""
    head = ("type", "outcome", "sizes", "error", "torch CPU ms", "OpenVINO CPU ms", "faster", "seconds")
    return markdown(head, map(_line, rows))


def _line(row: Row) -> tuple[str, ...]:
    times = row.cpu_ms or {}
    return (
        f"`{row.type}`",
        "promoted" if row.promoted else "stays",
        row.sizes,
        "" if row.error is None or math.isinf(row.error) else f"{row.error:.0e}",
        *(number(times[engine]) if engine in times else "" for engine in ("torch", "openvino")),
        "" if row.faster is None else number(row.faster),
        f"{row.seconds:.1f}" if row.seconds else "",
    )


# --- the command ----------------------------------------------------------------------------------


def say(line: str) -> None:
    """Progress, apart from the tables."""
    print(line, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="types to try, as 'mmdet.*'")
    parser.add_argument(
        "--state", type=Path, default=STATE, help="file of what was found so far; without it all is tried"
    )
    parser.add_argument(
        "--as-is", action="store_true", help="try nothing more: the page of what was found so far"
    )
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Try what was not tried before; print the page, or write it."""
    given = make_parser().parse_args(arguments)
    everything = {name: config for name, config in subjects() if fnmatch.fnmatch(name, given.only)}
    missing = [(name, config) for name, config in everything.items() if name not in known(given.state)]
    if given.as_is:
        missing = []
    with tempfile.TemporaryDirectory(prefix="backbone-engines-") as folder:
        asyncio.run(Trials(given.state, Path(folder)).run(missing))
    found = known(given.state)
    rows = [found[name] for name in everything if name in found]
    text = document(rows, [name for name in everything if name not in found], describe())
    if given.write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
