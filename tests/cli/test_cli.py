"""The command line as a user meets it: results, files, exit codes, one-line errors."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

import rtmdet_fast
from rtmdet_fast import RTMDet
from rtmdet_fast.cli import main
from rtmdet_fast.data.shapes import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=6, num_val=3, image_size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, shapes):
    torch.manual_seed(0)
    names = [c["name"] for c in json.loads(shapes.val_ann.read_text())["categories"]]
    model = RTMDet("nano", class_names=names)
    model.image_size = 64
    for conv in model.bbox_head.rtm_reg:  # boxes of some size around every prior
        torch.nn.init.constant_(conv.bias, 1.5)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    model.save(path)
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_train_eval_predict(shapes, weights, tmp_path, capsys):
    out = tmp_path / "run"
    common = [
        "--size",
        "nano",
        "--epochs",
        1,
        "--batch-size",
        2,
        "--image-size",
        64,
        "--num-workers",
        0,
        "--device",
        "cpu",
    ]
    code = run(
        "train", "--data", shapes.root, *common, "--out", out, "--no-progress", "--json", tmp_path / "train.json"
    )
    assert code == 0
    told = json.loads((tmp_path / "train.json").read_text())
    assert told["report"] == str(out / "report.html") and "AP50" in told["metrics"]
    best = out / "best.pth"
    code = run(
        "eval", "--weights", best, "--ann", shapes.val_ann, "--images", shapes.val_images, "--json", tmp_path / "e.json"
    )
    assert code == 0
    figures = json.loads((tmp_path / "e.json").read_text())
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "per_class"} <= figures.keys()
    assert figures["AP"] == pytest.approx(told["metrics"]["AP"], abs=1e-9)
    code = run("predict", "--weights", weights, shapes.val_images, "--out", tmp_path / "p", "--score-threshold", 0.0)
    assert code == 0
    assert "pictures in" in capsys.readouterr().out
    pictures = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert pictures == [*sorted(path.name for path in shapes.val_images.iterdir()), "predictions.json"]
    predictions = json.loads((tmp_path / "p/predictions.json").read_text())
    assert {"images", "annotations", "categories"} == predictions.keys()
    assert len(predictions["images"]) == 3 and predictions["annotations"]
    from pycocotools.coco import COCO

    coco = COCO(tmp_path / "p/predictions.json")
    assert len(coco.getImgIds()) == 3


def test_predict_on_a_video_writes_a_video(weights, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for value in range(5):
        writer.write(np.full((48, 64, 3), 40 * value, np.uint8))
    writer.release()
    assert run("predict", "--weights", weights, tmp_path / "in.avi", "--out", tmp_path / "p") == 0
    capture = cv2.VideoCapture(str(tmp_path / "p/in.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 5
    assert len(json.loads((tmp_path / "p/predictions.json").read_text())["images"]) == 5


def test_predict_never_writes_over_what_it_looks_at(weights, shapes, tmp_path, capsys):
    images, videos = tmp_path / "images", tmp_path / "videos"
    shutil.copytree(shapes.val_images, images)
    videos.mkdir()
    writer = cv2.VideoWriter(str(videos / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for value in range(3):
        writer.write(np.full((48, 64, 3), 40 * value, np.uint8))
    writer.release()
    for folder in (images, videos):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert run("predict", "--weights", weights, folder, "--out", folder) == 2
        assert "--out" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_unreadable_images_stop_or_are_skipped(weights, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "good.png"), np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 not really")
    assert run("predict", "--weights", weights, tmp_path, "--out", tmp_path / "p") == 2
    assert "bad.jpg" in capsys.readouterr().err
    assert run("predict", "--weights", weights, tmp_path, "--out", tmp_path / "p", "--skip-bad") == 0
    assert "1 unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_training_image_is_one_sentence(shapes, tmp_path, capsys, num_workers):
    images = shutil.copytree(shapes.train_images, tmp_path / "images")
    victim = sorted(images.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:200])
    arguments = ["--train", shapes.train_ann, "--train-images", images, "--size", "nano", "--epochs", 1]
    arguments += ["--batch-size", 2, "--image-size", 64, "--device", "cpu", "--num-workers", num_workers, "--no-report"]
    assert run("train", *arguments, "--out", tmp_path / "a", "--no-progress") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and victim.name in error and len(error.strip().splitlines()) == 1
    assert run("train", *arguments, "--out", tmp_path / "b", "--no-progress", "--skip-bad") == 0


def test_info(tmp_path, capsys):
    assert run("info", "--json", tmp_path / "i.json") == 0
    told = json.loads((tmp_path / "i.json").read_text())
    assert told["torch"] == torch.__version__ or told["torch"] in torch.__version__
    assert "rtmdet-tiny" in told["weights"] and "rtmdet-tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["eval", "--weights", "nothing.pth", "--ann", "a.json", "--images", "."], "nothing.pth"),
        (["eval", "--weights", "WEIGHTS", "--ann", "a.json", "--images", "."], "a.json"),
        (["eval", "--weights", "WEIGHTS"], "--ann FILE"),
        (["eval", "--weights", "WEIGHTS", "--data", "nowhere"], "nowhere"),
        (["predict", "--weights", "WEIGHTS", "no such file.jpg"], "no such file.jpg"),
        (["predict", "--weights", "WEIGHTS", ".", "--device", "abacus"], "abacus"),
        (["predict", "--weights", "WEIGHTS", "IMAGES", "--image-size", "63"], "multiple of 32"),
        (["predict", "--weights", "WEIGHTS", "IMAGES", "--score-threshold", "7"], "score_threshold"),
        (["train", "--epochs", "1"], "--train FILE"),
        (["train", "--lr", "0"], "--lr"),
        (["train", "--lr", "nan"], "--lr"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--seed", str(2**33)], "--seed"),
        (["train", "--num-workers", "-1"], "--num-workers"),
        (["train", "--val-interval", "0"], "--val-interval"),
        (["train", "--ema-momentum", "2"], "--ema-momentum"),
        (["train", "--weight-decay", "nan"], "--weight-decay"),
        (["predict", "--weights", "WEIGHTS", "IMAGES", "--image-size", "0"], "multiple of 32"),
    ],
)
def test_every_mistake_is_one_sentence_and_exit_code_2(arguments, word, weights, shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"WEIGHTS": weights, "IMAGES": shapes.val_images}
    assert run(*(places.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and word in error


def test_a_folder_that_cannot_be_made_is_one_sentence(weights, shapes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("predict", "--weights", weights, shapes.val_images, "--out", tmp_path / "file/p") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: Not a directory: ")


def test_unknown_option_has_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "--epoch", 3)
    assert stop.value.code == 2


def test_installed_command_shows_help():
    done = subprocess.run([sys.executable, "-m", "rtmdet_fast", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "eval", "predict", "demo", "info"))


def test_masks_from_end_to_end(shapes, tmp_path, capsys):
    torch.manual_seed(0)
    names = [c["name"] for c in json.loads(shapes.val_ann.read_text())["categories"]]
    model = RTMDet("nano", "ins", class_names=names)
    model.image_size = 64
    for kernel in model.bbox_head.rtm_kernel:  # masks that are not empty
        torch.nn.init.constant_(kernel.bias, 0.1)
    model.save(tmp_path / "w.pth")
    out = tmp_path / "p"
    assert run("predict", "--weights", tmp_path / "w.pth", shapes.val_images, "--out", out, "--score-threshold", 0) == 0
    from pycocotools.coco import COCO

    coco = COCO(out / "predictions.json")
    annotations = coco.loadAnns(coco.getAnnIds())
    assert annotations and all(coco.annToMask(a).sum() == a["area"] for a in annotations)
    assert any(a["area"] for a in annotations)
    code = run(
        "eval", "--weights", tmp_path / "w.pth", "--ann", shapes.val_ann, "--images", shapes.val_images,
        "--json", tmp_path / "e.json", "--detections", tmp_path / "d.json",
    )  # fmt: skip
    assert code == 0
    assert {"AP", "segm_AP", "segm_AP50"} <= json.loads((tmp_path / "e.json").read_text()).keys()
    assert "segm_AP50" in capsys.readouterr().out
    boxes_only = json.loads(shapes.val_ann.read_text())
    for annotation in boxes_only["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes_only))
    code = run("eval", "--weights", tmp_path / "w.pth", "--ann", tmp_path / "boxes.json", "--images", shapes.val_images)
    assert code == 2 and "has no segmentation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "program", (["-m", "rtmdet_fast"], ["-m", "rtmdet_fast.cli"], ["-c", "from rtmdet_fast.cli import main; main()"])
)
def test_tells_its_version(program):
    done = subprocess.run([sys.executable, *program, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"rtmdet-fast {rtmdet_fast.__version__}\n"), done.stderr


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rtmdet_fast", "predict"], capture_output=True, text=True)
    assert done.returncode == 2 and "--weights" in done.stderr + done.stdout


@pytest.mark.filterwarnings("default:.*taken for the same ones")  # the command prints it
def test_classes_of_other_names_are_asked_about(shapes, tmp_path, capsys):
    names = [f"other {i}" for i in range(len(json.loads(shapes.val_ann.read_text())["categories"]))]
    RTMDet("nano", class_names=names).save(tmp_path / "w.pth")
    arguments = ["eval", "--weights", tmp_path / "w.pth", "--ann", shapes.val_ann, "--images", shapes.val_images]
    arguments += ["--image-size", 64]
    assert run(*arguments) == 2
    assert "--match-by-position" in capsys.readouterr().err
    assert run(*arguments, "--match-by-position") == 0
    assert "taken for the same ones" in capsys.readouterr().err


def test_a_console_that_lacks_letters_ends_no_command(shapes, tmp_path):
    content = json.loads(shapes.val_ann.read_text())
    for category in content["categories"]:
        category["name"] = f"円 {category['id']}"
    (tmp_path / "val.json").write_text(json.dumps(content))
    RTMDet("nano", class_names=[c["name"] for c in content["categories"]]).save(tmp_path / "w.pth")
    command = [sys.executable, "-m", "rtmdet_fast", "eval", "--weights", "w.pth", "--ann", "val.json"]
    command += ["--images", str(shapes.val_images), "--image-size", "64", "--json", "found.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "円 1" in json.loads((tmp_path / "found.json").read_text())["per_class"]
    assert b"-1.000" not in done.stdout
