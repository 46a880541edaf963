"""Letterbox, squash and normalisation, against the reference's canvas."""

import hashlib
import runpy
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch

from rtmdet_fast.inference.preprocess import MEAN, STD, letterbox, normalize, squash


def test_letterbox_is_the_references_pixel_for_pixel(shared):
    fixture = torch.load(shared / "reference" / "preprocess.pt", weights_only=True)
    canvas, scale = letterbox(fixture["image_bgr"].numpy(), 640)
    assert np.array_equal(canvas.transpose(2, 0, 1), fixture["uint8"].numpy())
    assert scale == pytest.approx(fixture["meta"]["scale_factor"], abs=0)


@pytest.mark.parametrize(
    ("height", "width", "new_height", "new_width"),
    [(64, 64, 64, 64), (100, 33, 64, 21), (33, 100, 21, 64), (1, 1, 64, 64), (1000, 1, 64, 1), (1, 1000, 1, 64)],
)
def test_letterbox_sizes(height, width, new_height, new_width):
    canvas, scale = letterbox(np.full((height, width, 3), 7, np.uint8), 64)
    assert canvas.shape == (64, 64, 3) and canvas.dtype == np.uint8
    assert (canvas[:new_height, :new_width] == 7).all()
    assert (canvas[new_height:] == 114).all() and (canvas[:, new_width:] == 114).all()
    assert scale == (new_width / width, new_height / height)


def test_letterbox_leaves_its_input_alone_and_pads_as_told():
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    before = image.copy()
    canvas, _ = letterbox(image, 8, pad_value=3)
    canvas[:] = 0
    assert np.array_equal(image, before)
    assert (letterbox(image, 8, pad_value=3)[0][4:] == 3).all()


def test_squash_is_the_published_resize_pixel_for_pixel(shared):
    recipe = runpy.run_path(str(shared / "reference" / "rtdetr" / "fixture_recipe.py"))
    cases = torch.load(shared / "reference" / "rtdetr" / "preprocess_cases.pt", weights_only=True)["resize"]
    squares = 0
    for case in cases:
        (h, w), (height, width) = case["size"], case["target"]
        if height != width:
            continue
        squares += 1
        if case["vertical_first"] and int(PIL.__version__.split(".")[0]) < 13:  # which rounds in the other order
            continue
        if case["kind"] == "noise":
            image = np.floor(256 * recipe["uniform"](case["name"], (h, w, 3))).astype(np.uint8)
        else:
            image = (255 * recipe["image"](case["name"], h, w)).round().byte().permute(1, 2, 0).numpy()
        canvas, scale = squash(image, width)
        assert hashlib.sha256(canvas.tobytes()).hexdigest() == case["sha256"], case["name"]
        assert scale == (width / w, height / h)
    assert squares == 5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (64, 64)])
def test_squash_sizes(height, width):
    image = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    before = image.copy()
    canvas, scale = squash(image, 64)
    assert canvas.shape == (64, 64, 3) and canvas.dtype == np.uint8 and scale == (64 / width, 64 / height)
    assert np.array_equal(image, before) and canvas.flags.writeable
    if (height, width) == (64, 64):
        assert np.array_equal(canvas, image)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize(memory_format):
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8).contiguous(memory_format=memory_format)
    before = images.clone()
    out = normalize(images)
    expected = (images.double() - torch.tensor(MEAN).view(3, 1, 1).double()) / torch.tensor(STD).view(3, 1, 1).double()
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=memory_format) and images.equal(before)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_imports_without_opencv():
    code = "import sys; sys.modules['cv2'] = None; import rtmdet_fast.inference.preprocess as p; p.normalize"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 3, 1, 4), (2, 3, 4, 1), (1, 3, 1, 1)], ids=str)
def test_normalize_gives_the_same_bits_in_every_layout_and_of_float32(shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    last, wide = images.contiguous(memory_format=torch.channels_last), torch.zeros(*shape[:3], 2 * shape[3]).byte()
    wide[..., ::2] = images
    floats = images.float()
    for other in (last, wide[..., ::2], floats, last.float()):
        assert normalize(other).equal(normalize(images))
    assert floats.equal(images.float())


def test_normalize_in_float64():
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    try:
        torch.set_default_dtype(torch.float64)
        exact = normalize(images.contiguous(memory_format=torch.channels_last))
    finally:
        torch.set_default_dtype(torch.float32)
    assert exact.dtype == torch.float64 and (exact - normalize(images)).abs().max() < 1e-6
