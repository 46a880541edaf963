"""Letterbox and normalisation, against the reference's canvas."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from rtmdet_fast.inference.preprocess import MEAN, STD, letterbox, normalize


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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize(memory_format):
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8).contiguous(memory_format=memory_format)
    out = normalize(images)
    expected = (images.double() - torch.tensor(MEAN).view(3, 1, 1).double()) / torch.tensor(STD).view(3, 1, 1).double()
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_imports_without_opencv():
    code = "import sys; sys.modules['cv2'] = None; import rtmdet_fast.inference.preprocess as p; p.normalize"
    subprocess.run([sys.executable, "-c", code], check=True)
