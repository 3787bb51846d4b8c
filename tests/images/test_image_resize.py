"""Images are resized as Pillow resizes them, whoever does it, and on the calling thread alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from service.images.resize import FILTERS, resize, resize_window
from tests.conftest import ROOT

BY_TORCH = ("bilinear", "bicubic")
SIZES = ((1, 1), (1, 7), (2, 255), (33, 33), (48, 500), (375, 500), (500, 375), (641, 90), (1000, 3))
TARGETS = ((1, 1), (3, 300), (300, 1), (64, 96), (224, 224), (256, 341), (341, 256))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def edges(height, width, seed=0):
    """Black and white and nothing between: the most that a filter can overshoot."""
    return (np.random.default_rng(seed).integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)


def by_pillow(rgb, size, interpolation):
    return np.asarray(Image.fromarray(rgb).resize(size[::-1], FILTERS[interpolation]))


def grey_levels_apart(rgb, size, interpolation):
    ours = resize(rgb, size, interpolation)
    assert (ours.shape, ours.dtype) == ((*size, 3), np.uint8)
    return int(np.abs(ours.astype(int) - by_pillow(rgb, size, interpolation)).max())


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", SIZES)
def test_every_filter_is_pillows_within_one_grey_level(shape, interpolation):
    allowed = 1 if interpolation in BY_TORCH else 0
    for size in TARGETS:
        assert grey_levels_apart(noise(*shape), size, interpolation) <= allowed, size


@pytest.mark.parametrize("interpolation", BY_TORCH)
@pytest.mark.parametrize("shape", [(700, 200), (300, 290), (400, 900), (900, 130)])
@pytest.mark.parametrize("size", [(40, 60), (200, 60), (64, 128), (90, 640)])
def test_what_overshoots_is_clipped_where_pillow_clips_it(shape, size, interpolation):
    assert grey_levels_apart(edges(*shape), size, interpolation) <= 1


@pytest.mark.parametrize("interpolation", BY_TORCH)
def test_a_thin_image_of_the_longest_side_is_pillows(interpolation):
    for shape in ((65500, 2), (2, 65500)):
        assert grey_levels_apart(noise(*shape), (224, 224), interpolation) <= 1


@pytest.mark.parametrize("interpolation", BY_TORCH)
@pytest.mark.parametrize("view", ["turned", "part", "read-only"])
def test_any_view_of_an_array_is_resized_and_left_as_it_is(view, interpolation):
    whole = noise(120, 90)
    rgb = {"turned": whole.transpose(1, 0, 2), "part": whole[10:70, 5:80], "read-only": whole}[view]
    rgb.flags.writeable = False
    before = rgb.copy()
    assert grey_levels_apart(rgb, (32, 48), interpolation) <= 1
    np.testing.assert_array_equal(rgb, before)


def test_the_same_size_is_the_same_image():
    rgb = noise(20, 30)
    assert resize(rgb, (20, 30), "bicubic") is rgb


def test_a_window_of_the_whole_is_the_whole():
    rgb = noise(50, 70)
    window = resize_window(rgb, (20, 30), (0, 0, 70, 50), "bicubic")
    np.testing.assert_array_equal(window, by_pillow(rgb, (20, 30), "bicubic"))


def in_a_process(code, **environment):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_thread_is_started_whatever_torch_is_set_to():
    code = """
        import numpy as np, psutil, torch
        from service.images.resize import resize
        torch.set_num_threads(4)
        before = psutil.Process().num_threads()
        for shape in ((375, 500), (3000, 2000), (65500, 1), (1, 65500), (900, 100)):
            for size in ((256, 341), (1, 300), (64, 64)):
                for interpolation in ("bilinear", "bicubic"):
                    resize(np.zeros((*shape, 3), np.uint8), size, interpolation)
        print(psutil.Process().num_threads() - before)
        torch.zeros(4000, 4000).add_(1)
        print(psutil.Process().num_threads() - before)
    """
    by_resizing, by_what_does_start_some = map(int, in_a_process(code).split())
    assert by_resizing == 0
    assert by_what_does_start_some > 0


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no such kernel on this processor",
)
def test_where_torch_has_no_kernel_for_bytes_pillow_resizes():
    code = """
        import numpy as np
        from PIL import Image
        from service.images.resize import FILTERS, resize
        rgb = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
        for name in ("bilinear", "bicubic"):
            pillow = np.asarray(Image.fromarray(rgb).resize((300, 200), FILTERS[name]))
            print((resize(rgb, (200, 300), name) == pillow).all())
    """
    assert in_a_process(code, ATEN_CPU_CAPABILITY="default").split() == ["True", "True"]
    assert in_a_process(code).split() == ["False", "False"]


def test_decoding_and_transforming_do_not_import_torch_before_it_is_needed():
    code = """
        import sys
        import service.images.decode, service.images.transforms
        print("torch" in sys.modules, "torchvision" in sys.modules)
    """
    assert in_a_process(code).split() == ["False", "False"]
