"""What users install. `make test-package` runs this on the wheel and on the sdist, where no source is in sight."""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sysconfig
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import rtmdet_fast
import rtmdet_fast.compat.mmcv_ext
import rtmdet_fast.ops.torchvision
from rtmdet_fast import RTMDet
from rtmdet_fast.data.shapes import draw_scene, make_shapes

if (Path(__file__).resolve().parents[1] / "rtmdet_fast").exists():
    pytest.skip("the sources are beside this file: make test-package", allow_module_level=True)

DISTRIBUTION = importlib.metadata.distribution("rtmdet-fast")
FILES = [Path(file) for file in DISTRIBUTION.files or ()]
PACKAGE = Path(sysconfig.get_path("purelib")) / "rtmdet_fast"
COMMAND = Path(sysconfig.get_path("scripts")) / "rtmdet-fast"


def command(*arguments, **options):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def test_the_installed_package_is_what_is_tested():
    assert Path(rtmdet_fast.__file__) == PACKAGE / "__init__.py"
    assert "archive_info" in json.loads(DISTRIBUTION.read_text("direct_url.json"))


def test_every_module_imports():
    modules = [".".join(file.with_suffix("").parts) for file in FILES if file.suffix == ".py"]
    assert {"rtmdet_fast.kernels.assign", "rtmdet_fast.models.rtmdet.__init__"} <= set(modules)
    of_extras = {"rtmdet_fast.compat.mmdet": "mmdet", "rtmdet_fast.export.onnx_ops": "onnxscript"}
    for module in modules:
        if importlib.util.find_spec(of_extras.get(module, "torch")):
            importlib.import_module(module.removesuffix(".__init__"))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (rtmdet_fast, "Acceleration RTMDet Results UserError accelerate revert"),
        (
            rtmdet_fast.ops,
            "atss_assign batched_nms batched_nms_padded bn_silu box_iou_rotated dwconv_bn_silu dynamic_mask_dice_loss "
            "dynamic_mask_logits dynamic_soft_label_assign nms nms_rotated quality_focal_loss rotated_iou_loss "
            "simota_assign soft_nms task_aligned_assign",
        ),
        (rtmdet_fast.ops.torchvision, "batched_nms nms"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_names_that_users_import(module, names):
    assert set(names.split()) <= set(module.__all__)
    assert all(callable(getattr(module, name)) for name in names.split())


def test_mmcv_ext_takes_the_place_of_the_compiled_module():
    assert callable(rtmdet_fast.compat.mmcv_ext.install)


def test_what_is_packed():
    tops = {file.parts[0] for file in FILES} - {".."}  # the command lies in ../../../bin
    assert tops == {"rtmdet_fast", f"rtmdet_fast-{rtmdet_fast.__version__}.dist-info"}
    assert {file.suffix for file in FILES if file.parts[0] == "rtmdet_fast"} <= {".py", ".pyc", ".typed"}
    assert (PACKAGE / "py.typed").is_file()
    kernels = PACKAGE / "kernels"  # a link to ../kernels in the sources
    assert not kernels.is_symlink() and (kernels / "assign.py").is_file()


def test_metadata():
    told = DISTRIBUTION.metadata
    assert (told["Version"], told["License-Expression"]) == (rtmdet_fast.__version__, "Apache-2.0")
    (licence,) = [file for file in DISTRIBUTION.files or () if file.name == "LICENSE"]
    assert "Apache License" in licence.read_text(encoding="utf-8")
    assert {"test", "bench", "openmmlab", "docs"} <= set(told.get_all("Provides-Extra"))
    needs = {re.match(r"[\w-]+", line)[0] for line in told.get_all("Requires-Dist") if "extra ==" not in line}
    assert needs == {  # each is told in CONTRIBUTING.md with its reason
        "matplotlib", "numpy", "opencv-python", "pillow", "pycocotools", "pyyaml", "safetensors", "scipy",
        "tensorboard", "torch", "tqdm", "triton", "tyro",
    }  # fmt: skip
    readme = told["Description"]
    assert told["Description-Content-Type"] == "text/markdown" and readme.startswith("# rtmdet_fast")
    links = re.findall(r"\]\(\s*([^)]*)\)|(?:src|href)=[\"']([^\"']*)|^\[[^]]+\]:\s*(\S+)", readme, re.MULTILINE)
    assert links and all(re.match("https?:", "".join(link)) for link in links), links


def test_predict_in_three_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    seeded = RTMDet("nano", class_names=("a", "b"))
    for conv in seeded.bbox_head.rtm_reg:  # boxes of some size around every prior
        torch.nn.init.constant_(conv.bias, 1.5)
    seeded.save("mine.pth")
    picture, _ = draw_scene(np.random.default_rng(0), 320)
    cv2.imwrite("street.png", picture)

    model = RTMDet.from_pretrained("mine.pth")
    result = model.predict("street.png", score_threshold=0)
    result.save("street_boxes.png")

    assert len(result.boxes) and set(result.names) <= {"a", "b"}
    assert torch.equal(result.boxes, seeded.predict(picture, score_threshold=0).boxes)
    assert (cv2.imread("street_boxes.png") != picture).any()


def test_the_command(tmp_path):
    assert command("--version").stdout == f"rtmdet-fast {rtmdet_fast.__version__}\n"
    told = command("--help").stdout
    assert all(name in told for name in ("data", "train", "eval", "predict", "split", "demo", "info"))
    mistake = command("demo", "--task", "bogus", cwd=tmp_path)
    assert mistake.returncode == 2 and mistake.stderr.startswith("error: ")
    shapes = make_shapes(tmp_path / "data", num_train=4, num_val=2, image_size=64)
    small = ["--size", "nano", "--epochs", 1, "--batch-size", 2, "--image-size", 64, "--num-workers", 0]
    done = command("train", "--data", shapes.root, *small, "--device", "cpu", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()
    done = command("predict", "--weights", "run/best.pth", shapes.val_images, "--out", "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures/predictions.json").is_file()
