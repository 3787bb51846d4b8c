"""Images that go to the device as bytes are answered as those that were normalised on the host."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.config.preprocess import parse_preprocess, resolve_preprocess
from service.errors import DeadlineExceeded
from service.metrics import Metrics
from service.runtime.batcher import Pace
from service.runtime.device_images import Upload, Uploads
from service.runtime.engine import Engine
from service.runtime.intake import ByteBatch, Intake, Limits
from service.runtime.model import LoadedModel, build_model
from service.runtime.plan import Plan
from service.runtime.work import DeviceRunner, Done, Work, WorkJob
from tests.conftest import RunningService, encoded, settings_for

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]
SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 3]}


def photos(*sizes: tuple[int, int]) -> list[bytes]:
    rng = np.random.default_rng(5)
    return [encoded(rng.integers(0, 255, (height, width, 3), np.uint8)) for height, width in sizes]


@pytest.fixture(scope="module", params=DEVICES)
def taking_bytes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """A service that normalises on its device."""
    settings = settings_for(tmp_path_factory.mktemp("bytes"), device=request.param)
    engine = Engine(settings, Metrics(), takes_bytes=True)
    with RunningService(settings, engine) as service:
        yield service
    asyncio.run(engine.stop())


def post(service: RunningService, files: list[bytes], **parts: str) -> dict[str, Any]:
    data = {"backbone": '{"type":"ResNet","depth":18,"base_channels":8,"out_indices":[0,3]}', **parts}
    reply = service.http.post(
        "/features", data={**data, "return": "tensors"}, files=[("image", ("image", file)) for file in files]
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (photos((90, 120)), {}),
        (photos((90, 120), (300, 80)), {"preprocess": '{"size":64,"channel_order":"bgr"}'}),
        (
            photos((70, 50), (33, 100)),
            {"preprocess": '{"mode":"native","size_divisor":32}', "pool": "avg", "dtype": "float16"},
        ),
        (photos((700, 900)), {"preprocess": '{"mode":"native"}', "pool": "gem", "normalize": "true"}),
    ],
    ids=["one", "two", "padded", "large"],
)
def test_bytes_give_the_numbers_of_floats(
    taking_bytes: RunningService, service: RunningService, files: list[bytes], parts: dict[str, str]
) -> None:
    found, expected = post(taking_bytes, files, **parts), post(service, files, **parts)
    assert found["images"] == expected["images"]
    tolerance = 1e-3 if "dtype" in parts else 1e-5
    for mine, theirs in zip(found["levels"], expected["levels"], strict=True):
        assert mine["dtype"] == theirs["dtype"]
        difference = np.linalg.norm(np.asarray(mine["data"]) - np.asarray(theirs["data"]))
        assert difference <= tolerance * np.linalg.norm(np.asarray(theirs["data"]))


def job(plan: Plan, model: LoadedModel, images: np.ndarray | Upload, count: int) -> WorkJob:
    work = Work(
        model=model,
        neck=None,
        names=tuple(level.name for level in plan.levels),
        layouts=("NCHW", "NCHW"),
        levels=plan.levels,
        prefix_tokens=0,
        images=images,
        precision="float32",
        pool="none",
        normalize=False,
        dtype="float32",
        valid=None,
        at_once=count,
    )
    return WorkJob("group", count, work, deadline=float("inf"))


def done(result: Done | BaseException) -> Done:
    assert isinstance(result, Done)
    return result


@pytest.mark.parametrize("device", DEVICES)
async def test_tensors_and_bytes_share_a_batch(tmp_path: Path, device: str) -> None:
    engine = Engine(settings_for(tmp_path, device=device), Metrics())
    plan = await engine.plan("me", SMALL)
    model = build_model(plan, None, torch.device(device))
    spec = resolve_preprocess(parse_preprocess({"size": 64}), [])
    with ThreadPoolExecutor(1) as executor:
        intake = Intake(executor, Limits(10**6, 8, 10**7))
        batch: ByteBatch = await intake.byte_images(photos((80, 64), (64, 99)), spec, 3)
    tensor = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    runner, uploads = (
        DeviceRunner(max_batch=2, cores=1, make_room=lambda: None),
        Uploads(torch.device(device)),
    )
    jobs = [job(plan, model, tensor, 1), job(plan, model, uploads.begin(batch), 2)]
    together = runner(jobs, Pace(0, crowded=False))
    for alone, shared in zip(jobs, together, strict=True):
        [expected] = runner([alone], Pace(0, crowded=False))
        for mine, theirs in zip(done(shared).arrays, done(expected).arrays, strict=True):
            assert mine.shape[0] == alone.images
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    await engine.stop()


async def test_what_nobody_waits_for_ends_after_its_forward_pass(tmp_path: Path) -> None:
    engine = Engine(settings_for(tmp_path), Metrics())
    plan = await engine.plan("me", SMALL)
    model = build_model(plan, None, torch.device("cpu"))
    runner = DeviceRunner(max_batch=2, cores=1, make_room=lambda: None)

    def asked(
        images: int, deadline: float = float("inf"), waiter: asyncio.Future[Any] | None = None
    ) -> WorkJob:
        tensor = np.zeros((images, 3, 64, 64), np.float32)
        return replace(job(plan, model, tensor, images), deadline=deadline, waiter=waiter)

    gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    gone.cancel()
    for left in (asked(3, deadline=0.0), asked(3, waiter=gone)):
        with pytest.raises(DeadlineExceeded):
            runner([left], Pace(0, crowded=False))
        [_, found] = runner([left, asked(1)], Pace(0, crowded=False))
        assert len(done(found).arrays[0]) == 1  # somebody else's is computed beside it
    [found] = runner([asked(2, deadline=0.0)], Pace(0, crowded=False))
    assert len(done(found).arrays[0]) == 2
    await engine.stop()


@pytest.mark.gpu
@NO_CUDA
async def test_what_waits_on_the_device_is_bounded() -> None:
    spec = resolve_preprocess(parse_preprocess({"size": 64}), [])
    with ThreadPoolExecutor(1) as executor:
        intake = Intake(executor, Limits(10**6, 8, 10**7))
        batch = await intake.byte_images(photos((80, 64)), spec, 3)
    device = torch.device("cuda")
    uploads = Uploads(device, max_bytes=batch.images.nbytes)
    before = torch.cuda.memory_allocated(device)
    first, second = uploads.begin(batch), uploads.begin(batch)
    assert torch.cuda.memory_allocated(device) - before <= 2 * batch.images.nbytes
    torch.testing.assert_close(first.images(), second.images())
