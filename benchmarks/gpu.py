"""`python -m benchmarks.gpu`: the service on a CUDA device beside a raw `torch.compile` loop.

Images arrive decoded (`tensor`), which shows what HTTP and batching cost, and as JPEG, which shows how many threads
of decoding keep the device busy. Without the device it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import service_launch
from benchmarks.failures import BenchmarkFailed
from benchmarks.growth import NPY
from benchmarks.images import normalised_batch, photos
from benchmarks.jobs import JPEG, JSON
from benchmarks.load import LoadResult, percentile
from benchmarks.machine import describe
from benchmarks.networks import SIDE
from benchmarks.processes import ROOT, Launch, Server, own_process, running
from benchmarks.rounds import LoadProcess
from benchmarks.service_facts import wait_for_engine
from benchmarks.tables import markdown, number
from benchmarks.wire import multipart_message, raw_message

PAGE = ROOT / "docs" / "performance-gpu.md"
WARM_STEPS = 2
STEPS_AHEAD = 8
SATURATED = 0.95
IMAGES_OF_A_REQUEST = 32
PREPROCESS = json.dumps({"mode": "crop", "size": SIDE})
HEAD = """# Measured speed on a GPU

Written by `python -m benchmarks.gpu --write`; every number is of that one run.

{machine} Device: {device}.

The raw loop is `torch.compile` (mode `{mode}`, channels_last, images already on the device) of the same network and
the same level, without HTTP. **of raw** is images a second of the service over the raw loop's best batch at the same
precision. Weights are random; the reply is one pooled vector an image, as JSON.
"""


@dataclass(frozen=True)
class Network:
    """A timm network and the feature index of its deepest level."""

    title: str
    model: str
    node: int


@dataclass(frozen=True)
class Range:
    """How much is tried."""

    networks: tuple[Network, ...]
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    clients: tuple[int, ...]
    decode_threads: tuple[int, ...]
    seconds: float
    mode: str


NETWORKS = (
    Network("ResNet-50", "resnet50", 4),
    Network("ViT-B/16", "vit_base_patch16_224", 11),
    Network("ConvNeXt-T", "convnext_tiny", 3),
    Network("Swin-T", "swin_tiny_patch4_window7_224", 3),
)
FULL = Range(
    NETWORKS,
    ("float32", "bfloat16"),
    (1, 4, 16, 64, 256),
    (1, 4, 16, 64, 256),
    (1, 2, 4, 8, 16, 32),
    3.0,
    "reduce-overhead",
)
QUICK = Range(
    (Network("MobileNetV3-S", "mobilenetv3_small_100", 4),),
    ("float32",),
    (1, 4),
    (1, 4),
    (1, 2),
    0.3,
    "default",
)


@dataclass(frozen=True)
class Line:
    """One measurement: images a second and, for the service, what a client saw."""

    label: str
    images_per_second: float
    load: LoadResult | None = None


def raw_rates(
    network: Network, precision: str, batches: Sequence[int], seconds: float, mode: str, device: str
) -> list[float]:
    """Images a second of the compiled network for each batch size; runs in a process of its own."""
    import timm

    torch.backends.cudnn.benchmark = True
    model: Any = timm.create_model(network.model, features_only=True, out_indices=(network.node,)).eval()
    model = model.to(device, getattr(torch, precision), memory_format=torch.channels_last)
    return [
        _raw_rate(torch.compile(model, mode=mode, dynamic=False), batch, precision, seconds, device)
        for batch in batches
    ]


def _raw_rate(model: Callable[..., object], batch: int, precision: str, seconds: float, device: str) -> float:
    images = torch.randn(batch, 3, SIDE, SIDE, device=device, dtype=getattr(torch, precision))
    images = images.contiguous(memory_format=torch.channels_last)
    wait: Callable[[], object] = torch.cuda.synchronize if device.startswith("cuda") else _nothing

    def step() -> None:
        for _ in range(
            STEPS_AHEAD
        ):  # the device never waits for this loop, and this loop not far ahead of it
            model(images)
        wait()

    with torch.inference_mode():
        for _ in range(WARM_STEPS):
            step()
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            step()
            steps += STEPS_AHEAD
    return steps * batch / (time.perf_counter() - started)


def _nothing() -> None:
    """What there is to wait for on a CPU."""


def _query(network: Network, precision: str) -> dict[str, str]:
    config = {"type": f"timm.{network.model}", "out_indices": [network.node]}
    return {"backbone": json.dumps(config), "return": "tensors", "pool": "avg", "precision": precision}


@contextmanager
def _service(folder: Path, device: str, **settings: str) -> Iterator[tuple[Server, LoadProcess]]:
    def launch(port: int) -> Launch:
        roomy = {"max_batch": "256", "queue_size": "4096", "request_timeout": "120"}
        return service_launch(folder, port, device=device, **{**roomy, **settings})

    with running(launch, folder) as server, own_process() as load:
        server.wait_until_up()
        yield server, LoadProcess(load)


def service_lines(
    server: Server, load: LoadProcess, network: Network, precision: str, extent: Range
) -> list[Line]:
    """One image a request by so many clients, as tensor and as JPEG; then many images a request."""
    query = _query(network, precision)
    jpeg_query = {**query, "preprocess": PREPROCESS}
    many = IMAGES_OF_A_REQUEST
    tensors = [
        raw_message("/features", query, normalised_batch(1, seed=seed), NPY, JSON) for seed in range(4)
    ]
    jpegs = [raw_message("/features", jpeg_query, image, JPEG, JSON) for image in photos(16)]
    tensor_batch = [raw_message("/features", query, normalised_batch(many), NPY, JSON)]
    jpeg_batch = [multipart_message("/features", jpeg_query, photos(many), JSON)]
    load.run(server, tensors, max(extent.clients), extent.seconds)
    wait_for_engine(server)
    ways = [
        *((f"tensor, {clients} clients", tensors, clients, 1) for clients in extent.clients),
        *((f"JPEG, {clients} clients", jpegs, clients, 1) for clients in extent.clients),
        (f"tensor of {many} images, 8 clients", tensor_batch, 8, many),
        (f"{many} JPEGs a request, 8 clients", jpeg_batch, 8, many),
    ]
    return [_line(server, load, way, extent.seconds) for way in ways]


def _line(server: Server, load: LoadProcess, way: tuple[str, list[bytes], int, int], seconds: float) -> Line:
    label, messages, clients, images = way
    load.run(server, messages, clients, seconds / 2)  # shapes and batch sizes that are new to it
    result = load.run(server, messages, clients, seconds)
    return Line(label, result.per_second * images, result)


def decode_lines(folder: Path, device: str, extent: Range) -> list[Line]:
    """JPEGs of as many clients as were tried, by threads that decode: where more of them bring nothing."""
    network, precision = extent.networks[0], extent.precisions[-1]
    query = {**_query(network, precision), "preprocess": PREPROCESS}
    jpegs = [raw_message("/features", query, image, JPEG, JSON) for image in photos(16)]
    lines = []
    for threads in extent.decode_threads:
        with _service(folder, device, decode_threads=str(threads)) as (server, load):
            load.run(server, jpegs, max(extent.clients), extent.seconds)
            wait_for_engine(server)
            lines.append(_line(server, load, (str(threads), jpegs, max(extent.clients), 1), extent.seconds))
    return lines


def saturating_threads(lines: Sequence[Line]) -> str:
    """The fewest threads that reach 95 % of the best."""
    best = max(line.images_per_second for line in lines)
    return next(line.label for line in lines if line.images_per_second >= SATURATED * best)


def network_section(network: Network, precision: str, raw: Sequence[Line], service: Sequence[Line]) -> str:
    """The raw loop and the service at one network and precision."""
    best = max(line.images_per_second for line in raw)
    rows = [_cells(line, best) for line in [*raw, *service]]
    head = ["", "images/s", "of raw", "p50 ms", "p99 ms", "CPU ms/request"]
    return f"## {network.title}, {precision}\n\n{markdown(head, rows)}\n"


def _cells(line: Line, best: float) -> list[str]:
    shared = [line.label, number(line.images_per_second), f"{line.images_per_second / best:.2f}"]
    if line.load is None:
        return [*shared, "", "", ""]
    latencies = line.load.latencies_ms
    seen = [number(percentile(latencies, 50)), number(percentile(latencies, 99))]
    return [*shared, *seen, number(line.load.server_cpu_ms)]


def decode_section(lines: Sequence[Line], extent: Range) -> str:
    """How many threads of decoding saturate."""
    rows = [[line.label, number(line.images_per_second)] for line in lines]
    title = f"{extent.networks[0].title}, {extent.precisions[-1]}, {max(extent.clients)} clients"
    found = f"{saturating_threads(lines)} threads reach 95 % of the best."
    return f"## Threads that decode JPEGs: {title}\n\n{markdown(['threads', 'images/s'], rows)}\n\n{found}\n"


def measure(extent: Range, device: str, folder: Path) -> Iterator[str]:
    """Each section when it is there."""
    for network in extent.networks:
        for precision in extent.precisions:
            with own_process() as process:
                rates = process.submit(
                    raw_rates, network, precision, extent.batches, extent.seconds, extent.mode, device
                ).result()
            raw = [
                Line(f"raw loop, batch {batch}", rate)
                for batch, rate in zip(extent.batches, rates, strict=True)
            ]
            with _service(folder, device) as (server, load):
                yield network_section(
                    network, precision, raw, service_lines(server, load, network, precision, extent)
                )
    yield decode_section(decode_lines(folder, device, extent), extent)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the command itself")
    titles = [network.model for network in NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=titles, default=titles, help="which networks")
    parser.add_argument(
        "--precisions", nargs="+", choices=FULL.precisions, default=FULL.precisions, help="which precisions"
    )
    parser.add_argument("--quick", action="store_true", help="one small network: does it work at all")
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    return parser


def _extent(options: argparse.Namespace) -> Range:
    if options.quick:
        return QUICK
    networks = tuple(network for network in NETWORKS if network.model in options.networks)
    return replace(FULL, networks=networks, precisions=tuple(options.precisions))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status, 0 where there is no device to measure."""
    options = make_parser().parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        return 0
    with own_process() as process:  # this one takes no memory of the device
        device_name = process.submit(_device_name, options.device).result()
    extent = _extent(options)
    sections = [HEAD.format(machine=describe(), device=device_name, mode=extent.mode)]
    print(sections[0], flush=True)
    with tempfile.TemporaryDirectory(prefix="backbone-benchmark-") as folder:
        try:
            for section in measure(extent, options.device, Path(folder)):
                print(section, flush=True)
                sections.append(section)
        except BenchmarkFailed as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    if options.write:
        PAGE.write_text("\n".join(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
