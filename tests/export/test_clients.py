"""The client in C++ detects what the one in Python does; it takes ONNX Runtime's headers, which its wheel lacks."""

import runpy
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from benches.confident import confident

pytest.importorskip("onnxscript", reason="extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra `export` is not installed")

from rtmdet_fast.export.export import export  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIDE = 128


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The compiled client."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ is installed")
    has_header = [compiler, "-E", "-x", "c++", "-include", "onnxruntime_c_api.h", "/dev/null"]
    if subprocess.run(has_header, capture_output=True).returncode:
        pytest.skip("g++ does not find onnxruntime_c_api.h: CPATH=FOLDER of ONNX Runtime's headers")
    folder = tmp_path_factory.mktemp("client")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-rpath," + str(folder)]
    source = str(EXAMPLES / "onnx_client.cpp")
    command = [compiler, *options, source, str(folder / "libonnxruntime.so.1"), "-o", str(folder / "onnx_client")]
    subprocess.run(command, check=True)
    return folder / "onnx_client"


@pytest.fixture(scope="module")
def model(client, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(confident("det", "nano", SIDE), path, score_threshold=0.05, candidates=500)
    return path


def run(client, *arguments):
    return subprocess.run([client, *map(str, arguments)], capture_output=True, text=True)


def found_by_both(client, model, image, folder):
    """Detections [D, 6] of the client in C++ and [E, 6] of that in Python: label, score, box."""
    cv2.imwrite(str(folder / "image.ppm"), image)
    done = run(client, model, folder / "image.ppm", 0.3)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(str(model))
    dets, labels = runpy.run_path(str(EXAMPLES / "onnx_client.py"))["detect"](session, image, SIDE)
    assert len(dets) > 10
    found = np.array([line.split() for line in done.stdout.splitlines()], np.float64)
    return found, np.concatenate([labels[:, None], dets[:, 4:], dets[:, :4]], 1)


def picture(height, width):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (5, 5), 0)


@pytest.mark.parametrize("height", [SIDE, 90])
def test_the_client_in_cpp_detects_what_that_in_python_does(client, model, height, tmp_path):
    found, expected = found_by_both(client, model, picture(height, SIDE), tmp_path)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_client_in_cpp_resizes_as_opencv_does(client, model, tmp_path):
    """But for a grey level here and there, as OpenCV rounds its weights first; so a detection in 50 may be another."""
    found, expected = found_by_both(client, model, picture(200, 150), tmp_path)
    away = np.abs(found[:, None, 2:] - expected[None, :, 2:]).max(2)
    alike = (found[:, None, 0] == expected[None, :, 0]) & (np.abs(found[:, None, 1] - expected[None, :, 1]) < 0.01)
    near = alike & (away < 0.5)
    assert near.any(0).mean() >= 0.98 and near.any(1).mean() >= 0.98


@pytest.mark.parametrize(
    "content", [b"", b"P6 4 4 255\n1", b"P5 1 1 255\n1", b"P6 1 1 65535\n123456", b"P6 -1 1 255\n"]
)
def test_the_client_in_cpp_refuses_what_is_no_picture(client, model, content, tmp_path):
    (tmp_path / "image.ppm").write_bytes(content)
    done = run(client, model, tmp_path / "image.ppm")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}/image.ppm is "), done
    assert run(client, tmp_path / "image.ppm", tmp_path / "image.ppm").returncode == 2
    assert run(client).returncode == 2
