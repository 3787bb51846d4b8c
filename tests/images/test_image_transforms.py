"""Images are resized, cropped and normalised as torchvision and timm do it, and nothing explodes on the way."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms import functional as F

from service.config.preprocess import parse_preprocess, resolve_preprocess
from service.images.decode import DecodedImage
from service.images.transforms import (
    enough_pixels,
    fit_image,
    planned_size,
    scale_and_shift,
    stack_images,
    transform_image,
)

MODES = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
    "box": InterpolationMode.BOX,
    "hamming": InterpolationMode.HAMMING,
}
SIZES = ((500, 375), (375, 500), (224, 224), (256, 256), (31, 47), (1, 1), (3, 200), (641, 2), (1023, 333))


def image_of(width, height, seed=0):
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return DecodedImage(rgb, width, height, "PNG")


def spec_of(**keys):
    return resolve_preprocess(parse_preprocess(keys), [])


def raw_pixels(image, **keys):
    """What the network would see without normalisation, as whole numbers."""
    array = transform_image(image, spec_of(**keys, mean=[0, 0, 0], std=[1, 1, 1])).array * 255
    np.testing.assert_allclose(array, np.rint(array), atol=1e-3)
    return np.rint(array).astype(np.uint8).transpose(1, 2, 0)


def assert_same_image(ours, expected, interpolation):
    """Bit for bit, or within one grey level by the filters that are not Pillow's own code."""
    levels = 1 if interpolation in ("bilinear", "bicubic") else 0
    assert np.abs(ours.astype(int) - expected).max() <= levels


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_crop_is_torchvisions(size, interpolation):
    image = image_of(*size)
    for side, crop_pct in ((224, 0.875), (33, 0.9), (64, 1.0)):
        resized = Resize(int(side / crop_pct), MODES[interpolation])(Image.fromarray(image.rgb))
        expected = np.asarray(CenterCrop(side)(resized))
        ours = raw_pixels(image, size=side, crop_pct=crop_pct, interpolation=interpolation)
        assert_same_image(ours, expected, interpolation)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [224, (192, 320), (96, 33)])
def test_crop_is_timms(size, target):
    spec = spec_of(
        size=list(target) if isinstance(target, tuple) else target, crop_pct=0.95, interpolation="bicubic"
    )
    image = image_of(*size)
    transform = create_transform(
        (3, *spec.size), interpolation="bicubic", crop_pct=0.95, mean=spec.mean, std=spec.std
    )
    expected = transform(Image.fromarray(image.rgb)).numpy()
    grey_level = 1 / 255 / min(spec.std)
    np.testing.assert_allclose(transform_image(image, spec).array, expected, atol=grey_level + 2e-6)


@pytest.mark.parametrize("interpolation", MODES)
def test_resize_is_torchvisions_and_does_not_keep_the_aspect(interpolation):
    image = image_of(123, 77)
    expected = np.asarray(Resize((48, 160), MODES[interpolation])(Image.fromarray(image.rgb)))
    ours = raw_pixels(image, mode="resize", size=[48, 160], interpolation=interpolation)
    assert_same_image(ours, expected, interpolation)


def test_native_leaves_every_pixel():
    image = image_of(13, 7)
    np.testing.assert_array_equal(raw_pixels(image, mode="native"), image.rgb)


@pytest.mark.parametrize("raw", [{}, {"mode": "native"}, {"mode": "resize", "size": 32}])
def test_the_result_is_float32_contiguous_and_says_what_is_valid(raw):
    transformed = transform_image(image_of(50, 40), spec_of(**raw))
    assert transformed.array.dtype == np.float32
    assert transformed.array.flags.c_contiguous
    assert transformed.array.flags.writeable
    assert transformed.array.shape == (3, *transformed.valid)


def test_normalisation_is_torchvisions():
    image, spec = image_of(19, 17), spec_of(mode="native")
    expected = F.normalize(F.to_tensor(Image.fromarray(image.rgb)), list(spec.mean), list(spec.std))
    torch.testing.assert_close(
        torch.from_numpy(transform_image(image, spec).array), expected, rtol=1e-5, atol=2e-6
    )


def test_bgr_lists_mean_and_std_as_the_network_sees_them():
    rgb = np.zeros((1, 1, 3), np.uint8) + np.array([10, 20, 30], np.uint8)
    spec = spec_of(mode="native", channel_order="bgr", mean=[30, 20, 0], std=[1, 2, 5])
    array = transform_image(DecodedImage(rgb, 1, 1, "PNG"), spec).array
    np.testing.assert_allclose(array[:, 0, 0], [0, 0, 2], atol=1e-4)


def test_caffes_numbers_and_detectron2s_are_the_same():
    image, mean = image_of(9, 8), [103.53, 116.28, 123.675]
    own = spec_of(mode="native", channel_order="bgr", mean=mean, std=[1, 1, 1])
    detectron2 = spec_of(pixel_mean=mean, pixel_std=[1.0, 1.0, 1.0])
    np.testing.assert_array_equal(transform_image(image, own).array, transform_image(image, detectron2).array)
    expected = image.rgb[..., ::-1].astype(np.float64) - mean
    np.testing.assert_allclose(transform_image(image, own).array, expected.transpose(2, 0, 1), atol=1e-4)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_bytes_scaled_and_shifted_are_the_normalised_image(order):
    image, spec = image_of(90, 60), spec_of(size=32, channel_order=order)
    pixels, (scale, shift) = fit_image(image, spec).array, scale_and_shift(spec)
    assert pixels.dtype == np.uint8
    ours = pixels.astype(np.float32) * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_array_equal(ours, transform_image(image, spec).array)


def test_twice_what_is_resized_to_is_enough_to_decode():
    assert enough_pixels(4000, 3000, spec_of()) == (512, 682)
    assert enough_pixels(3000, 4000, spec_of(size=[64, 32], crop_pct=1)) == (128, 96)
    assert enough_pixels(4000, 3000, spec_of(mode="resize", size=[64, 32])) == (128, 64)


# --- batches -------------------------------------------------------------------------------------


def test_native_images_are_padded_right_and_bottom_with_zeros():
    spec = spec_of(mode="native", size_divisor=32)
    images = [transform_image(image_of(*size), spec) for size in ((50, 40), (20, 70), (64, 96))]
    batch = stack_images(images, spec)
    assert batch.shape == (3, 3, 96, 64)
    assert batch.dtype == np.float32
    for padded, image in zip(batch, images, strict=True):
        height, width = image.valid
        np.testing.assert_array_equal(padded[:, :height, :width], image.array)
        assert not padded[:, height:].any()
        assert not padded[:, :, width:].any()
    assert [image.valid for image in images] == [(40, 50), (70, 20), (96, 64)]


def test_cropped_images_are_padded_to_the_divisor_too():
    spec = spec_of(size=100, size_divisor=64)
    batch = stack_images([transform_image(image_of(120, 130), spec)] * 2, spec)
    assert batch.shape == (2, 3, 128, 128)
    assert not batch[:, :, 100:].any()


def test_images_of_one_size_are_stacked_without_padding():
    spec = spec_of(size=64)
    images = [transform_image(image_of(70, 80, seed), spec) for seed in (1, 2)]
    np.testing.assert_array_equal(stack_images(images, spec), np.stack([image.array for image in images]))
    assert stack_images(images[:1], spec).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("raw", [{}, {"size": [64, 96]}, {"mode": "resize", "size": 40}, {"mode": "native"}])
def test_the_planned_size_is_the_size(raw):
    spec, image = spec_of(**raw), image_of(51, 33)
    assert planned_size(image.width, image.height, spec) == transform_image(image, spec).valid


def test_a_plan_costs_nothing_whatever_the_size():
    assert planned_size(10**9, 10**9, spec_of(mode="native")) == (10**9, 10**9)


# --- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (1, 65500), (65500, 3), (65500, 37)])
@pytest.mark.parametrize("raw", [{}, {"size": 512, "crop_pct": 0.05}, {"size": [32, 64]}, {"size": 1}])
def test_thin_images_do_not_explode(size, raw):
    transformed = transform_image(image_of(*size), spec_of(**raw))
    assert transformed.array.shape == (3, *transformed.valid)
    assert np.isfinite(transformed.array).all()
    assert transformed.array.nbytes < 100_000_000


def test_the_smallest_crop_of_the_largest_size_does_not_explode():
    spec = spec_of(size=4096, crop_pct=0.05)
    started = time.monotonic()
    assert transform_image(image_of(8, 6), spec).valid == (4096, 4096)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [(601, 7), (5, 403), (64, 48)])
def test_a_window_is_what_the_whole_would_show(size, interpolation, monkeypatch):
    image = image_of(*size)
    whole = raw_pixels(image, size=32, crop_pct=0.6, interpolation=interpolation).astype(int)
    monkeypatch.setattr("service.images.transforms.MAX_RESIZED_PIXELS", 0)
    window = raw_pixels(image, size=32, crop_pct=0.6, interpolation=interpolation).astype(int)
    if interpolation in ("nearest", "box"):  # a pixel between two may go to either
        assert (whole != window).mean() < 0.05
    elif interpolation == "lanczos":  # Pillow clips between its two passes, whose order goes by the sizes
        assert np.abs(whole - window).mean() < 0.5
    else:
        assert np.abs(whole - window).max() <= 1


def test_the_middle_of_a_thin_image_is_what_is_seen():
    rgb = np.zeros((1, 30001, 3), np.uint8)
    rgb[:, 15000] = 255
    seen = transform_image(DecodedImage(rgb, 30001, 1, "PNG"), spec_of(mean=[0, 0, 0], std=[1, 1, 1])).array
    assert seen[:, :, 110:114].min() > 0.9
    np.testing.assert_allclose(seen, seen[:, :, ::-1], atol=0.02)
