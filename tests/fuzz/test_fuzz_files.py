"""Altered images, videos and weights of every kind: they are read, or refused in a sentence, in little memory."""

from __future__ import annotations

import io
import logging
import pickle

import cv2
import numpy as np
import pytest
import torch
from fuzzing import PARTS, Drawn, fuzz, told_in_a_line
from PIL import Image
from safetensors.torch import save

from rtmdet_fast.images import check_image, has_several, read_image, read_size
from rtmdet_fast.inference.sources import VideoWriter, iter_sources
from rtmdet_fast.models.checkpoint import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Pillow warns of what it finds damaged
MOST_PIXELS = 1_000_000


def altered(rng: Drawn, data: bytes) -> bytes:
    """With bits turned, bytes set, left out, doubled, cut off, or a number of a header made large."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        # half of the time near the start, where headers are
        at = rng.integers(min(len(changed), 200) if rng.random() < 0.5 else len(changed)) if changed else 0
        match rng.integers(7):
            case 0 if changed:
                changed[at] ^= 1 << rng.integers(8)
            case 1 if changed:
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[at : at + rng.integers(1, 40)]
            case 3:
                changed[at:at] = changed[at : at + rng.integers(1, 40)]
            case 4:
                changed[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff" * 4, bytes(4)))
            case 5:
                del changed[at:]
            case _:
                changed[at:at] = bytes(rng.integers(256) for _ in range(rng.integers(1, 9)))
    return bytes(changed)


@pytest.fixture(scope="module")
def pictures():
    """The bytes of images of every format."""
    y, x = np.mgrid[:24, :32]
    smooth = np.stack([7 * x, 10 * y, 250 - 3 * x - 6 * y], -1).clip(0, 255).astype(np.uint8)
    first, other = Image.fromarray(smooth), Image.fromarray(255 - smooth)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {suffix: cv2.imencode(suffix, smooth)[1].tobytes() for suffix in (".jpg", ".png", ".bmp", ".ppm", ".webp")}
    for name, picture, options in (
        ("turned.jpg", first, {"exif": exif, "progressive": True}),
        ("cmyk.jpg", first.convert("CMYK"), {}),
        ("grey.png", Image.fromarray(smooth[:, :, 0].astype(np.uint16) << 8), {"exif": exif}),
        ("palette.png", first.quantize(9), {}),
        ("moving.png", first, {"save_all": True, "append_images": [other]}),
        ("moving.webp", first, {"save_all": True, "append_images": [other], "exif": exif}),
        ("moving.gif", first, {"save_all": True, "append_images": [other]}),
        ("pages.tiff", first, {"save_all": True, "append_images": [other], "compression": "tiff_lzw"}),
        ("turned.tiff", first.convert("CMYK"), {"exif": exif}),
    ):
        file = io.BytesIO()
        picture.save(file, Image.registered_extensions()[name[name.rindex(".") :]], **options)
        found[name] = file.getvalue()
    return list(found.values())


@pytest.mark.parametrize("part", range(PARTS))
def test_altered_images(pictures, tmp_path, part, record_property, monkeypatch):
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", str(MOST_PIXELS))
    path = tmp_path / "a.jpg"

    def case(rng, outcomes):
        path.write_bytes(altered(rng, rng.choice(pictures)))
        with told_in_a_line(outcomes):
            image = read_image(path)
            assert image.dtype == np.uint8 and image.shape[2] == 3 and image.shape[0] * image.shape[1] <= MOST_PIXELS
        with told_in_a_line({}):
            check_image(path)
        assert len(read_size(path)) == 2 and has_several(path) in (False, True)

    outcomes = fuzz(part, 4000, case)
    record_property("images fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder, noise = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    found = []
    for suffix in (".mp4", ".avi"):
        with VideoWriter(folder / f"a{suffix}") as video:
            for _ in range(8):
                video.write(noise.integers(0, 255, (48, 64, 3), np.uint8))
        found.append((suffix, (folder / f"a{suffix}").read_bytes()))
    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_altered_videos(videos, tmp_path, part, record_property, monkeypatch, caplog):
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", str(MOST_PIXELS))

    def case(rng, outcomes):
        suffix, data = rng.choice(videos)
        path = tmp_path / f"a{suffix}"
        path.write_bytes(altered(rng, data))
        caplog.clear()
        with caplog.at_level(logging.WARNING), told_in_a_line(outcomes):
            frames = list(iter_sources(path))
            told = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)
            assert len(frames) >= told or "could be read" in caplog.text  # never cut off without a word

    outcomes = fuzz(part, 400, case)
    record_property("videos fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}


@pytest.fixture(scope="module")
def weights():
    """Small ones by suffix, in every format that is read."""
    tensors = {f"backbone.stem.{i}.weight": torch.randn(3, 4) for i in range(3)}
    content = {"state_dict": tensors, "meta": {"epoch": 3, "classes": ("a", "b"), "log": {1, 2}}}
    found = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save(content, file, **options)
        found.append((".pth", file.getvalue()))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    found += [(".pdparams", pickle.dumps(arrays, protocol)) for protocol in (2, 4)]
    return [*found, (".safetensors", save(tensors))]


@pytest.mark.parametrize("part", range(PARTS))
def test_altered_weights(weights, tmp_path, part, record_property):
    def case(rng, outcomes):
        suffix, data = rng.choice(weights)
        path = tmp_path / f"a{suffix}"
        path.write_bytes(altered(rng, data))
        with told_in_a_line(outcomes):
            read = read_checkpoint(path)
            assert all(bool(value.float().isfinite().all()) for value in read.state_dict.values())
        assert {found.suffix for found in tmp_path.iterdir()} <= {suffix for suffix, _ in weights}

    outcomes = fuzz(part, 4000, case)
    record_property("weights fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}
