"""How the service's cost grows: with image size, clients, models under a budget, images of a request, formats."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.contestants import service_launch
from benchmarks.images import PHOTO_SIZE, normalised_batch, photo, photos
from benchmarks.jobs import JOBS, JPEG, JSON, Job
from benchmarks.load import LoadResult
from benchmarks.processes import Launch, Server, own_process, running
from benchmarks.rounds import LoadProcess
from benchmarks.service_facts import counters, engines, mean_batch, models, settled, stage_ms, wait_for_engine
from benchmarks.wire import json_message, multipart_message, raw_message

Query = Mapping[str, str]
NPY = "application/x-npy"


@dataclass(frozen=True)
class Extent:
    """How far the tables go: seconds of a line, the fewest answers of one, and what is varied."""

    seconds: float
    least: int
    sizes: tuple[tuple[int, int], ...]
    clients: tuple[int, ...]
    models: tuple[int, ...]
    images: tuple[int, ...]


FULL = Extent(
    seconds=1.5,
    least=3,
    sizes=((224, 224), (500, 375), (1000, 750), (2000, 1500), (3000, 2250), (4000, 3000)),
    clients=(1, 2, 4, 8, 16, 32, 64),
    models=(1, 5, 10, 20, 50),
    images=(1, 2, 4, 8, 16, 32),
)
QUICK = Extent(
    seconds=0.3, least=1, sizes=((224, 224), (1000, 750)), clients=(1, 8), models=(1, 3), images=(1, 4)
)
BUDGET_MODELS = 10
MANY_MODELS_PATIENCE_S = 10.0  # converting fifty models would take minutes; the table says what they ran on
SMALL, LARGE = JOBS["J3"], JOBS["J1"]


@dataclass(frozen=True)
class Row:
    """One line of a growth table: what was varied, what came of it, mean milliseconds of each stage."""

    label: str
    load: LoadResult
    stages_ms: dict[str, float]
    mean_batch: float
    memory_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Growth:
    """One table; `images` is how many images each answer is of, by row."""

    title: str
    varies: str
    rows: tuple[Row, ...]
    images: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """A service that is up, and the load generator."""

    server: Server
    load: LoadProcess
    seconds: float
    least: int

    def row(self, label: str, messages: Sequence[bytes], clients: int, least: int = 1) -> Row:
        """Measure one line; the first answers, of new shapes, are not counted."""
        self.load.run(self.server, messages, min(clients, 2), 0.0)
        before = counters(self.server)
        result = self.load.run(self.server, messages, clients, self.seconds, max(least, self.least))
        after = counters(self.server)
        evicted = _evictions(after) - _evictions(before)
        note = f"{evicted:.0f} evictions, " if evicted else ""
        memory = self.server.memory_bytes()
        return Row(label, result, stage_ms(before, after), mean_batch(before, after), memory, note)


def _evictions(samples: Mapping[tuple[str, str], float]) -> float:
    return samples.get(("backbone_model_evictions_total", ""), 0.0)


def _message(job: Job, image: bytes, **parameters: str) -> bytes:
    return raw_message("/features", {**job.service_query(), **parameters}, image, JPEG, JSON)


def image_size(probe: Probe, extent: Extent, job: Job, mode: str) -> Growth:
    """One client; `crop` shows what decoding costs, `native` computes at the image's own size."""
    rows = []
    preprocess = json.dumps({"mode": mode, **({"size_divisor": 32} if mode == "native" else {})})
    for width, height in extent.sizes:
        image = photo((width, height))
        label = f"{width}x{height}, {len(image) / 1000:.0f} kB"
        rows.append(probe.row(label, [_message(job, image, preprocess=preprocess)], 1))
    return Growth(f"Image size, mode `{mode}`, {job.model}, 1 client", "JPEG", tuple(rows), (1,) * len(rows))


def concurrency(probe: Probe, extent: Extent, job: Job) -> Growth:
    """Clients at the same time."""
    messages = [job.service_message(image) for image in photos(8)]
    rows = tuple(probe.row(str(clients), messages, clients) for clients in extent.clients)
    return Growth(
        f"Clients at a time, {job.model}, {PHOTO_SIZE[0]}x{PHOTO_SIZE[1]}", "clients", rows, (1,) * len(rows)
    )


def images_per_request(probe: Probe, extent: Extent, job: Job) -> Growth:
    """Images of one request, by one client."""
    rows = []
    for count in extent.images:
        message = multipart_message("/features", job.service_query(), photos(count), JSON)
        rows.append(probe.row(str(count), [message], 1))
    return Growth(f"Images in one request, {job.model}, 1 client", "images", tuple(rows), extent.images)


def ways_in(probe: Probe, extent: Extent, job: Job) -> Growth:  # noqa: ARG001  # one signature
    """The same image by each way in."""
    query, image = job.service_query(), photo()
    encoded = {"base64": base64.b64encode(image).decode()}
    body = {**query, "backbone": json.loads(query["backbone"]), "images": [encoded]}
    ways = {
        "raw body": raw_message("/features", query, image, JPEG, JSON),
        "form": multipart_message("/features", query, [image], JSON),
        "JSON, base64": json_message("/features", body, JSON),
        "normalised tensor, raw body": raw_message("/features", query, normalised_batch(1), NPY, JSON),
    }
    rows = tuple(probe.row(label, [message], 8) for label, message in ways.items())
    return Growth(f"Ways in, {job.model}, 8 clients", "way", rows, (1,) * len(rows))


def replies(probe: Probe, extent: Extent, job: Job) -> Growth:  # noqa: ARG001  # one signature
    """The same four maps in each format."""
    image = photo()
    kinds = {
        "shapes and statistics": (JSON, {"return": "shapes"}),
        "safetensors": ("application/vnd.safetensors", {}),
        "safetensors, float16": ("application/vnd.safetensors", {"dtype": "float16"}),
        "npz": ("application/x-npz", {}),
        "Arrow": ("application/vnd.apache.arrow.stream", {}),
        "JSON, base64": (JSON, {"encoding": "base64"}),
        "JSON, numbers": (JSON, {}),
    }
    rows = []
    for label, (accept, parameters) in kinds.items():
        message = raw_message("/features", {**job.service_query(), **parameters}, image, JPEG, accept)
        rows.append(probe.row(label, [message], 1))
    return Growth("Four maps of ResNet-50, 1 client", "reply", tuple(rows), (1,) * len(rows))


TABLES: tuple[Callable[[Probe, Extent], Growth], ...] = (
    partial(image_size, job=SMALL, mode="crop"),
    partial(image_size, job=SMALL, mode="native"),
    partial(image_size, job=LARGE, mode="native"),
    partial(concurrency, job=SMALL),
    partial(concurrency, job=LARGE),
    partial(images_per_request, job=SMALL),
    partial(images_per_request, job=LARGE),
    partial(ways_in, job=SMALL),
    partial(replies, job=JOBS["J2"]),
)


@contextmanager
def _probe(folder: Path, extent: Extent, **settings: str) -> Iterator[Probe]:
    """A service on CPU, with the job's models promoted."""

    def launch(port: int) -> Launch:
        return service_launch(folder, port, device="cpu", request_timeout="120", **settings)

    with own_process() as load, running(launch, folder) as server:
        server.wait_until_up()
        yield Probe(server, LoadProcess(load), extent.seconds, extent.least)


def _promoted(probe: Probe, messages: Sequence[bytes]) -> None:
    probe.load.run(probe.server, messages, 2, probe.seconds, least=4 * len(messages))
    wait_for_engine(probe.server)


def service_growth(folder: Path, extent: Extent, say: Callable[[str], None]) -> list[Growth]:
    """Every table, with one service; then models under a budget, with others."""
    found = []
    with _probe(folder, extent) as probe:
        _promoted(probe, [job.service_message(photo()) for job in JOBS.values()])
        for table in TABLES:
            found.append(table(probe, extent))
            say(f"measured: {found[-1].title}")
    return [*found, many_models(folder, extent, say)]


def _write_checkpoints(folder: Path, count: int) -> None:
    """Networks of one architecture with weights of their own, as fine-tuned ones would be."""
    import timm
    import torch
    from safetensors.torch import save_file

    for number in range(count):
        torch.manual_seed(number)
        save_file(timm.create_model(SMALL.model).state_dict(), folder / f"tuned-{number}.safetensors")


def _tuned_messages(count: int) -> list[bytes]:
    """One request to each of so many models."""
    messages = []
    for number in range(count):
        query = SMALL.service_query()
        config = {**json.loads(query["backbone"]), "checkpoint": f"tuned-{number}.safetensors"}
        query["backbone"] = json.dumps(config)
        messages.append(raw_message("/features", query, photo(seed=number), JPEG, JSON))
    return messages


def _bytes_of_a_model(folder: Path, extent: Extent) -> int:
    """What one of the models takes, once promoted."""
    with _probe(folder, extent) as probe:
        _promoted(probe, _tuned_messages(1))
        return int(models(probe.server)[0]["bytes"])


def many_models(folder: Path, extent: Extent, say: Callable[[str], None]) -> Growth:
    """Models in turn, under a budget that holds ten of them; each request goes to the next model."""
    with own_process() as writer:
        (folder / "checkpoints").mkdir(exist_ok=True)
        writer.submit(_write_checkpoints, folder / "checkpoints", max(extent.models)).result()
    budget = int(_bytes_of_a_model(folder, extent) * (BUDGET_MODELS + 0.5))
    rows = []
    with _probe(folder, extent, model_budget=str(budget), min_residency="0") as probe:
        for count in extent.models:
            messages = _tuned_messages(count)
            probe.load.run(probe.server, messages, 8, probe.seconds, least=count)
            settled(probe.server, MANY_MODELS_PATIENCE_S)
            row = probe.row(str(count), messages, 8, least=count)
            rows.append(replace(row, note=f"{row.note}{engines(probe.server)} in memory"))
            say(f"measured: {count} models")
    title = f"Models in turn, {SMALL.model}, 8 clients, a budget of {BUDGET_MODELS}"
    return Growth(title, "models", tuple(rows), (1,) * len(rows))
