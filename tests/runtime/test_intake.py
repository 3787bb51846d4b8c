"""From encoded images to what the device takes: in one go for one image, side by side for many, as bytes for a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.config.preprocess import PreprocessSpec, parse_preprocess, resolve_preprocess
from service.errors import InvalidConfig, TooLarge, UndecodableImage
from service.runtime.device_images import normalise_on_device
from service.runtime.intake import Intake, Limits
from tests.conftest import encoded

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


class CountingExecutor(ThreadPoolExecutor):
    """Two threads that remember how many jobs they were given."""

    def __init__(self) -> None:
        super().__init__(2)
        self.jobs = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs += 1
        return super().submit(fn, *args, **kwargs)


@pytest.fixture
def executor() -> Iterator[CountingExecutor]:
    with CountingExecutor() as executor:
        yield executor


@pytest.fixture
def intake(executor: CountingExecutor) -> Intake:
    return Intake(executor, Limits(max_pixels=1_000_000, max_images=32, max_elements=1_000_000))


def spec_of(**keys: Any) -> PreprocessSpec:
    return resolve_preprocess(parse_preprocess(keys), [])


def image(width: int, height: int, form: str = "JPEG") -> bytes:
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return encoded(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), form)


async def test_one_image_is_one_job(intake: Intake, executor: CountingExecutor) -> None:
    batch = await intake.images([image(120, 90)], spec_of(size=64), 3)
    assert (batch.images.shape, batch.images.dtype) == ((1, 3, 64, 64), np.float32)
    assert executor.jobs == 1


async def test_many_images_are_decoded_side_by_side_and_stay_in_order(
    intake: Intake, executor: CountingExecutor
) -> None:
    files = [image(100 + step, 80) for step in range(5)]
    batch = await intake.images(files, spec_of(size=32), 3)
    assert executor.jobs == 7  # the headers, the images, and putting them together
    assert [info.width for info in batch.infos] == [100, 101, 102, 103, 104]
    for position, file in enumerate(files):
        alone = await intake.images([file], spec_of(size=32), 3)
        np.testing.assert_array_equal(batch.images[position], alone.images[0])


async def test_one_image_is_padded_like_many(intake: Intake) -> None:
    spec = spec_of(mode="native", size_divisor=32)
    batch = await intake.images([image(50, 40)], spec, 3)
    assert batch.images.shape == (1, 3, 64, 64)
    assert batch.valid == ((40 / 64, 50 / 64),)
    assert not batch.images[:, :, 40:].any()


@pytest.mark.parametrize("count", [1, 3])
async def test_what_is_wrong_with_an_image_is_said_of_that_image(intake: Intake, count: int) -> None:
    files = [image(50, 40)] * (count - 1) + [image(50, 40)[:200]]
    with pytest.raises(UndecodableImage, match=f"image {count - 1}: "):
        await intake.images(files, spec_of(), 3)


class ByHand(Executor):
    """Runs one job each time it is told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.came = asyncio.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append((Future(), partial(fn, *args, **kwargs)))
        self.came.set()
        return self.jobs[-1][0]

    async def run_next(self) -> None:
        await self.came.wait()
        self.came.clear()
        future, function = self.jobs.pop(0)
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function())
        except UndecodableImage as error:
            future.set_exception(error)


async def test_the_others_are_not_decoded_once_one_is_known_to_be_damaged() -> None:
    by_hand = ByHand()
    intake = Intake(by_hand, Limits(max_pixels=1_000_000, max_images=32, max_elements=1_000_000))
    whole = image(200, 150)
    files = [whole[: len(whole) // 2], *[whole] * 3]
    asking = asyncio.create_task(intake.images(files, spec_of(), 3))
    await by_hand.run_next()  # the headers
    await by_hand.run_next()
    with pytest.raises(UndecodableImage, match="image 0: "):
        await asking
    assert len(by_hand.jobs) == 3
    assert all(future.cancelled() for future, _ in by_hand.jobs)


@pytest.mark.parametrize("count", [1, 2])
async def test_limits_hold_for_bytes_as_for_floats(intake: Intake, count: int) -> None:
    files = [image(900, 700, "PNG")] * count
    spec = spec_of(mode="native", size_divisor=1024)
    for take in (intake.images, intake.byte_images):
        with pytest.raises(TooLarge, match="after preprocessing exceed 1 megapixels"):
            await take(files, spec, 3)
        with pytest.raises(InvalidConfig, match="takes 4"):
            await take(files, spec, 4)


# --- scaled decoding -----------------------------------------------------------------------------


async def test_fast_decoding_reports_the_size_of_the_file_and_changes_little(intake: Intake) -> None:
    photo = image(1000, 800)
    whole = await intake.images([photo], spec_of(size=64), 3)
    fast = await intake.images([photo], spec_of(size=64, fast_decode=True), 3)
    assert fast.infos == whole.infos
    difference = np.abs(fast.images - whole.images)
    assert 0 < difference.max() < 0.1


async def test_fast_decoding_changes_nothing_where_it_cannot(intake: Intake) -> None:
    for file in (image(1000, 800, "PNG"), image(140, 130)):
        whole = await intake.images([file], spec_of(size=64), 3)
        fast = await intake.images([file], spec_of(size=64, fast_decode=True), 3)
        np.testing.assert_array_equal(fast.images, whole.images)


# --- bytes for a device --------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mode": "resize", "size": [48, 80], "channel_order": "bgr"},
        {"mode": "native", "size_divisor": 32},
        {"mode": "native", "size_divisor": 32, "channel_order": "bgr", "mean": [103.53, 116.28, 123.675]},
        {"size": 100, "size_divisor": 64},
    ],
)
@pytest.mark.parametrize("count", [1, 3])
async def test_bytes_normalised_on_the_device_are_what_the_host_would_make(
    intake: Intake, keys: dict[str, Any], count: int, device: str
) -> None:
    files = [image(90 + 40 * step, 120 - 30 * step) for step in range(count)]
    expected = await intake.images(files, spec_of(**keys), 3)
    batch = await intake.byte_images(files, spec_of(**keys), 3)
    assert batch.images.dtype == np.uint8
    assert (batch.infos, batch.valid) == (expected.infos, expected.valid)
    normalised = normalise_on_device(batch, torch.device(device))
    assert normalised.dtype == torch.float32
    assert normalised.device.type == device
    torch.testing.assert_close(normalised.cpu(), torch.from_numpy(expected.images), rtol=1e-6, atol=1e-6)
    for pixels, info in zip(normalised, batch.infos, strict=True):
        assert not pixels[:, info.valid[0] :].any()
        assert not pixels[:, :, info.valid[1] :].any()
