"""The command line as a user meets it: results, files, exit codes, one-line errors."""

import io
import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from full_disk import room_for
from stream_servers import mjpeg_server

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
    error = capsys.readouterr().err
    assert "bad.jpg" in error and "--skip-bad" in error and not (tmp_path / "p/predictions.json").exists()
    (tmp_path / "bad.jpg").rename(tmp_path / "worse.jpg")
    assert run("predict", "--weights", weights, tmp_path, "--out", tmp_path / "p") == 2
    assert "what was found before that is in " in capsys.readouterr().err
    images = json.loads((tmp_path / "p/predictions.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["good.png"]
    assert run("predict", "--weights", weights, tmp_path, "--out", tmp_path / "p", "--skip-bad") == 0
    assert "1 unreadable" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")  # the command line shows warnings
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
    assert "1 of its 6 images cannot be read" in capsys.readouterr().err


def test_predict_takes_images_folders_patterns_and_videos_at_once(weights, shapes, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "in.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for value in range(3):
        writer.write(np.full((48, 64, 3), 40 * value, np.uint8))
    writer.release()
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40, 3), np.uint8))
    images = sorted(shapes.val_images.iterdir())
    sources = [tmp_path / "a.png", tmp_path / "in.mp4", images[0], shapes.val_images / "*.jpg", shapes.val_images]
    assert run("predict", "--weights", weights, *sources, "--out", tmp_path / "p") == 0
    told = json.loads((tmp_path / "p/predictions.json").read_text())["images"]
    names = [os.path.basename(image["file_name"]) for image in told]
    assert names == ["a.png", *(f"in_{i:06d}.jpg" for i in range(3)), *(path.name for path in images)]
    assert all((tmp_path / "p" / image["file_name"]).exists() for image in told if "in_" not in image["file_name"])


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
def test_dotas_files_name_any_image(tmp_path, capsys):
    torch.manual_seed(0)
    for name, code in (("ship", 0), ("a/b", 2)):
        model = RTMDet("nano", "rotated", class_names=[name])
        for conv in model.bbox_head.rtm_reg:
            torch.nn.init.constant_(conv.bias, 1.5)
        model.image_size = 64
        model.save(tmp_path / "w.pth")
        path = os.path.join(os.fsencode(tmp_path), b"\xff.png")
        with open(path, "wb") as file:
            file.write(cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes())
        arguments = ["--weights", tmp_path / "w.pth", os.fsdecode(path), "--out", tmp_path / "p"]
        assert run("predict", *arguments, "--format", "dota", "--score-threshold", 0) == code
    assert (tmp_path / "p/Task1/Task1_ship.txt").read_bytes().startswith(b"\xff 0.")
    assert "names a file after each class" in capsys.readouterr().err


def test_an_interrupted_predict_keeps_what_it_found(weights, shapes, tmp_path, monkeypatch):
    saved = []

    def save(*args):
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("rtmdet_fast.Results.save", save)
    assert run("predict", "--weights", weights, shapes.val_images, "--out", tmp_path / "p") == 130
    assert len(json.loads((tmp_path / "p/predictions.json").read_text())["images"]) == 2


def test_a_full_disk_is_told_of_a_video(weights, tmp_path, capsys):
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(12):
        writer.write(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    arguments = ["predict", "--weights", weights, tmp_path / "in.avi", "--score-threshold", 1, "--out", tmp_path / "p"]
    with room_for(3000):
        assert run(*arguments) == 2
    assert "in.mp4 lacks some of its 12 frames: the disk may be full" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "p/predictions.json").read_text())["images"]) == 12


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory\nmore"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_one_sentence_that_says_what_to_lower(
    weights, shapes, tmp_path, monkeypatch, capsys, error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(RTMDet, "forward", fail)
    evaluated = ["--ann", shapes.val_ann, "--images", shapes.val_images]
    trained = ["--train", shapes.train_ann, "--train-images", shapes.train_images, "--size", "nano", "--num-workers", 0]
    for arguments, hint in (
        (["eval", "--weights", weights, *evaluated], "--batch-size or --image-size or --num-workers"),
        (
            ["predict", "--weights", weights, shapes.val_images, "--out", tmp_path / "p"],
            "--batch-size or --image-size",
        ),
        (
            ["train", *trained, "--out", tmp_path / "t", "--no-progress"],
            "--batch-size or --image-size or --num-workers",
        ),
    ):
        assert run(*arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: out of memory (") and line.endswith(f"); a smaller {hint} needs less")


def test_another_runtime_error_stays_one(weights, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(RTMDet, "forward", lambda *args: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        run("predict", "--weights", weights, shapes.val_images, "--out", tmp_path / "p")


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "--weights", "WEIGHTS", "ODD", "--out", "OUT"],
        ["predict", "--weights", "ODD", "IMAGES", "--out", "OUT"],
        ["predict", "--weights", "WEIGHTS", "IMAGES", "--out", "ODD"],
        ["eval", "--weights", "ODD", "--ann", "a", "--images", "b"],
        ["eval", "--weights", "WEIGHTS", "--ann", "ODD", "--images", "IMAGES"],
        ["eval", "--weights", "WEIGHTS", "--ann", "ANN", "--images", "ODD"],
        ["eval", "--weights", "WEIGHTS", "--data", "ODD"],
        ["train", "--data", "ODD", "--out", "OUT"],
        ["train", "--train", "ODD", "--train-images", "IMAGES", "--out", "OUT"],
        ["train", "--train", "ANN", "--train-images", "ODD", "--out", "OUT", "--size", "nano", "--epochs", "1"],
        ["train", "--train", "ANN", "--train-images", "IMAGES", "--out", "ODD", "--size", "nano", "--epochs", "1"],
        ["train", "--train", "ANN", "--train-images", "IMAGES", "--out", "OUT", "--init", "ODD"],
        ["data", "ODD"],
        ["data", "SET", "--page", "ODD", "--samples", "1"],
        ["data", "SET", "--convert", "yolo", "--out", "ODD"],
        ["split", "--images", "ODD", "--out", "OUT"],
        ["split", "--images", "IMAGES", "--labels", "ODD", "--out", "OUT"],
        ["split", "--data", "ODD", "--out", "OUT"],
        ["split", "--images", "IMAGES", "--out", "ODD"],
        ["demo", "--out", "ODD"],
        ["info", "--json", "ODD"],
    ],
)
@pytest.mark.parametrize("odd", ["x" * 300, "\0", "file/below", "\udcff\n"], ids=["long", "NUL", "file", "bytes"])
def test_an_odd_path_is_one_sentence(weights, shapes, tmp_path, monkeypatch, capsys, command, odd):
    written = next((option for option in ("--out", "--page", "--json") if option in command), None)
    if odd == "\udcff\n" and written and command[command.index(written) + 1] == "ODD":
        pytest.skip("a file or folder may be named so")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    places = {
        "WEIGHTS": weights,
        "IMAGES": shapes.val_images,
        "ANN": shapes.val_ann,
        "SET": shapes.root,
        "OUT": tmp_path / "out",
        "ODD": odd,
    }
    assert run(*(places.get(word, word) for word in command)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


def test_a_sentence_of_several_lines_is_told_whole(monkeypatch, capsys):
    def fail(config):
        raise rtmdet_fast.UserError("the first line\n  and the second")

    monkeypatch.setattr("rtmdet_fast.cli.run_info", fail)
    assert run("info") == 2
    assert capsys.readouterr().err == "error: the first line and the second\n"


@pytest.mark.parametrize("command", ["eval", "predict", "info"])
def test_json_is_written_before_anything_is_printed(weights, shapes, tmp_path, monkeypatch, command):
    """A console that is full, or that nobody reads, takes no results away."""

    class FullConsole(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", FullConsole())
    arguments = {
        "eval": ["--weights", weights, "--ann", shapes.val_ann, "--images", shapes.val_images],
        "predict": ["--weights", weights, shapes.val_images, "--out", tmp_path / "p"],
        "info": [],
    }[command]
    detections = ["--detections", tmp_path / "d.json"] if command == "eval" else []
    assert run(command, *arguments, *detections, "--json", tmp_path / "found.json") == 2
    assert json.loads((tmp_path / "found.json").read_text())
    assert not detections or isinstance(json.loads((tmp_path / "d.json").read_text()), list)


def test_figures_are_printed_where_json_cannot_be_written(weights, shapes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--weights", weights, "--ann", shapes.val_ann, "--images", shapes.val_images]
    assert run("eval", *arguments, "--json", tmp_path / "file/found.json") == 2
    told = capsys.readouterr()
    assert "AP50" in told.out and "error: cannot write" in told.err


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
        (["train", "--num-workers", "257"], "--num-workers"),
        (["train", "--epochs", "9" * 20], "--epochs"),
        (["train", "--train", "a", "--train-images", "b", "--image-size", "1000000"], "image size 1000000"),
        (["eval", "--weights", "WEIGHTS", "--ann", "a", "--images", "b", "--num-workers", "257"], "--num-workers"),
        (["eval", "--weights", "WEIGHTS", "--ann", "a", "--images", "b", "--batch-size", "0"], "--batch-size"),
        (["predict", "--weights", "WEIGHTS", "IMAGES", "--limit", "0"], "--limit is 0"),
        (["predict", "--weights", "WEIGHTS", "IMAGES", "--limit", "-3"], "--limit is -3"),
        (["predict", "--weights", "WEIGHTS", "IMAGES", "0"], "0 is a camera"),
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


def moving(path, frames=8):
    """A video in which a bright square goes to the right, and a model that finds it and no more."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for i in range(frames):
        frame = np.zeros((64, 96, 3), np.uint8)
        frame[20:44, 8 + 4 * i : 32 + 4 * i] = 255
        writer.write(frame)
    writer.release()
    return path


@pytest.fixture
def finds_squares(monkeypatch):
    """In place of the network: the bright square as class 1, a weaker one of class 0 at the corner."""
    from rtmdet_fast.inference.detections import Detections

    def detect_whole(self, images, image_size, settings):
        found = []
        for image in images:
            y, x = np.nonzero(image[:, :, 0] > 128)
            boxes = torch.tensor([[x.min(), y.min(), x.max() + 1, y.max() + 1], [0, 0, 10, 10]]).float()
            scores = torch.tensor([0.9, 0.4])
            kept = scores > settings.score_threshold
            found.append(Detections(boxes[kept], scores[kept], torch.tensor([1, 0])[kept], torch.zeros(2).long()[kept]))
        return found

    monkeypatch.setattr(RTMDet, "detect_whole", detect_whole)


def test_predict_tracks_and_writes_labels_and_crops_of_the_classes_asked_for(weights, finds_squares, tmp_path, capsys):
    pytest.importorskip("trackers", reason="extra `track` is not installed")
    arguments = ["predict", moving(tmp_path / "in.avi"), "--weights", weights, "--out", tmp_path / "p", "--track"]
    arguments += ["--save-txt", "--save-crops", "--classes", "Rectangle", "--json", tmp_path / "p.json"]
    for _ in range(2):  # over what the first wrote
        assert run(*arguments) == 0
        assert "1 objects in" in capsys.readouterr().out
    head, *rows = [line.split(",") for line in (tmp_path / "p/tracks.csv").read_text().splitlines()]
    assert head == ["file_name", "frame", "track_id", "class", "score", "x1", "y1", "x2", "y2"]
    assert [row[:4] for row in rows] == [[f"in_{i:06d}.jpg", str(i), "1", "rectangle"] for i in range(1, 8)]
    assert [float(row[5]) for row in rows] == pytest.approx([8 + 4 * i for i in range(1, 8)], abs=1)
    predictions = json.loads((tmp_path / "p/predictions.json").read_text())
    assert [entry.get("track_id") for entry in predictions["annotations"]] == [None, *[1] * 7]
    assert json.loads((tmp_path / "p.json").read_text())["objects"] == 1
    labels = sorted(path.name for path in (tmp_path / "p/labels").iterdir())
    assert labels == [f"in_{i:06d}.txt" for i in range(8)]
    (line,) = (tmp_path / "p/labels/in_000000.txt").read_text().splitlines()
    assert [float(value) for value in line.split()] == pytest.approx([1, 20 / 96, 0.5, 24 / 96, 24 / 64], abs=0.02)
    crops = sorted(path.relative_to(tmp_path / "p/crops").as_posix() for path in (tmp_path / "p/crops").rglob("*.jpg"))
    assert crops == [f"rectangle/in_{i:06d}_001.jpg" for i in range(8)]
    crop = cv2.imread(str(tmp_path / "p/crops" / crops[0]))
    assert crop.shape[0] == pytest.approx(24, abs=2) and crop.mean() > 230


def test_labels_of_images_without_objects_are_empty_files(weights, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40, 3), np.uint8))
    arguments = ["--weights", weights, tmp_path / "a.png", "--out", tmp_path / "p", "--score-threshold", 1]
    assert run("predict", *arguments, "--save-txt", "--save-crops") == 0
    assert (tmp_path / "p/labels/a.txt").read_bytes() == b"" and not (tmp_path / "p/crops").exists()


def test_predict_never_writes_over_labels_of_others(weights, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "p/labels").mkdir(parents=True)
    (tmp_path / "p/labels/a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert run("predict", "--weights", weights, tmp_path / "a.png", "--out", tmp_path / "p", "--save-txt") == 2
    assert "labels is there already, and no prediction wrote it" in capsys.readouterr().err
    assert (tmp_path / "p/labels/a.txt").read_text() == "0 0.5 0.5 0.1 0.1\n"
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((40, 40, 3), np.uint8))
    arguments = ["--weights", weights, tmp_path / "a.png", tmp_path / "a.jpg", "--out", tmp_path / "q"]
    assert run("predict", *arguments, "--save-txt") == 2
    assert "a.png and a.jpg would both be 'a' in the files written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--classes", "circel"], "class 'circel' is none of the model's: the nearest is 'circle'"),
        (["--classes", "zzz"], "there are circle, rectangle, triangle, star, ellipse"),
        (["--show"], "there is no display to show pictures on"),
        (["--track"], "tracking needs the package trackers: pip install 'rtmdet-fast[track]'"),
    ],
)
def test_what_cannot_be_had_is_told_before_anything_is_read(weights, tmp_path, capsys, monkeypatch, option, told):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "trackers", None)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 40, 3), np.uint8))
    assert run("predict", "--weights", weights, tmp_path / "a.png", "--out", tmp_path / "p", *option) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
    assert not [*(tmp_path / "p").glob("*")]


def test_show_ends_where_the_window_is_closed(weights, shapes, tmp_path, monkeypatch):
    shown = []

    class Screen:
        def __init__(self, title):
            pass

        def show(self, image):
            shown.append(image.shape)
            return len(shown) < 2

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *exc: None  # noqa: E731

    monkeypatch.setattr("rtmdet_fast.inference.window.Window", Screen)
    assert run("predict", "--weights", weights, shapes.val_images, "--out", tmp_path / "p", "--show") == 0
    assert shown == [(64, 64, 3)] * 2
    assert 2 <= len(json.loads((tmp_path / "p/predictions.json").read_text())["images"]) <= 3


def test_of_a_stream_with_a_password_nothing_but_its_host_is_written(weights, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr("rtmdet_fast.inference.sources.RECONNECT_AFTER", (0.01,))
    with mjpeg_server([[10, 60, 110, 90]], user="bob:geheim") as (host, asked):
        address = f"http://bob:geheim@{host}/live?token=geheim"
        arguments = ["--weights", weights, address, "--out", tmp_path / "p", "--json", tmp_path / "p/p.json"]
        arguments += ["--save-txt", "--score-threshold", 0.0]
        assert run("predict", *arguments) == 0
        assert run("predict", *arguments, "--out", tmp_path / "q") == 2  # it is over
    assert "geheim" in asked[0]
    told = "".join([caplog.text, *capfd.readouterr()])
    assert host in told and "4 detections in" not in told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"stream.mp4", "predictions.json", "p.json", "stream_000003.txt"} <= {path.name for path in written}
    for secret in ("bob", "geheim"):
        assert secret not in told and not any(secret in str(path) for path in written)
        assert not any(secret.encode() in path.read_bytes() for path in written)
