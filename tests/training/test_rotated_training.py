"""Rotated boxes from the folder to the submission: training, evaluation, prediction on images of any size."""

import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.evaluation.evaluate import evaluate
from rtmdet_fast.geometry.rotated import boxes_to_quads
from rtmdet_fast.inference.detections import Detections
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.config import TrainConfig, resolve
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=10, num_val=4, image_size=64)


@pytest.fixture(scope="module")
def dota(shapes, tmp_path_factory):
    """The same scenes as DOTA has them: train and val with images and labelTxt."""
    root = tmp_path_factory.mktemp("dota")
    for split, ann, images in (
        ("train", shapes.train_ann, shapes.train_images),
        ("val", shapes.val_ann, shapes.val_images),
    ):
        content = json.loads(ann.read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        (root / split / "labelTxt").mkdir(parents=True)
        (root / split / "images").symlink_to(images)
        for image in content["images"]:
            lines = ["imagesource:shapes", "gsd:1"]
            for a in content["annotations"]:
                if a["image_id"] == image["id"]:
                    quad = boxes_to_quads(np.array([a["rbox"]]))[0]
                    lines.append(f"{' '.join(f'{v:.3f}' for v in quad)} {names[a['category_id']]} 0")
            path = root / split / "labelTxt" / image["file_name"]
            path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def config(dota, tmp_path):
    return TrainConfig(
        task="rotated",
        data=dota,
        out=tmp_path / "run",
        size="nano",
        epochs=2,
        batch_size=4,
        image_size=64,
        num_workers=0,
        device="cpu",
        val_interval=1,
        progress=False,
        report=False,
    )


@pytest.fixture(scope="module")
def model():
    """Untrained, with boxes of some 24 x 24 px (angle 0.2) around every prior."""
    torch.manual_seed(0)
    model = RTMDet("nano", "rotated", class_names=["ship", "plane"])
    model.image_size = model.patch_size = 64
    for cls, reg, angle in zip(model.bbox_head.rtm_cls, model.bbox_head.rtm_reg, model.bbox_head.rtm_ang, strict=True):
        torch.nn.init.constant_(cls.bias, 0.0)
        torch.nn.init.normal_(cls.weight, std=0.3)
        torch.nn.init.constant_(reg.bias, 1.5)
        torch.nn.init.constant_(angle.bias, 0.2)
    return model.eval()


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_the_published_recipe_is_the_default(dota, tmp_path):
    config = resolve(TrainConfig(task="rotated", data=dota, out=tmp_path))
    assert (config.epochs, config.batch_size, config.image_size, config.lr) == (36, 8, 1024, 2.5e-4)
    assert config.stage2_epochs == 0
    assert [source.annotations for source in config.train_sources] == [dota / "train/labelTxt"]
    assert resolve(TrainConfig(task="rotated", data=dota, out=tmp_path, batch_size=32)).lr == pytest.approx(5e-4)
    detection = resolve(TrainConfig(train=tmp_path, train_images=tmp_path))
    assert (detection.epochs, detection.batch_size, detection.image_size, detection.stage2_epochs) == (300, 32, 640, 20)
    with pytest.raises(UserError, match=r"--task 'pose' is unknown; choose one of det, .*rotated"):
        resolve(TrainConfig(task="pose", data=dota))


def test_train_eval_predict_from_the_command_line(dota, tmp_path):
    out = tmp_path / "run"
    arguments = ["--task", "rotated", "--data", dota, "--size", "nano", "--epochs", 2, "--batch-size", 4]
    arguments += ["--image-size", 64, "--num-workers", 0, "--device", "cpu", "--no-progress"]
    assert run("train", *arguments, "--out", out, "--json", tmp_path / "train.json") == 0
    told = json.loads((tmp_path / "train.json").read_text())
    assert {"AP", "AP50", "AP75"} <= told["metrics"].keys()
    html = (out / "report.html").read_text()
    assert "AP50" in html and [html.count(f'alt="{what}: ') for what in ("truth", "prediction")] == [4, 4]
    assert html.count('src="data:image') == 8 + 1  # that of training batches
    rows = read_metrics(out / "metrics.csv")
    assert [row["AP50"] != "" for row in rows if row["AP"]] == [True, True]
    model = RTMDet.from_pretrained(out / "best.pth")
    assert (model.task, model.image_size, model.patch_size) == ("rotated", 64, 64)

    code = run("eval", "--weights", out / "best.pth", "--data", dota, "--json", tmp_path / "eval.json")
    assert code == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["AP50"] == pytest.approx(told["metrics"]["AP50"], abs=1e-9) and figures["images"] == 4


def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(config, tmp_path, monkeypatch):
    config = replace(config, epochs=3)
    unbroken = train(config)
    broken = replace(config, out=tmp_path / "broken")
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train_module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.setattr(train_module, "evaluate", evaluate)
    resumed = train(replace(broken, resume=True))
    first, second = (torch.load(r.last, weights_only=True)["training"]["model"] for r in (unbroken, resumed))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.metrics == unbroken.metrics


def test_the_best_epoch_is_that_of_the_best_ap50(config, monkeypatch):
    figures = iter([(0.3, 0.1), (0.2, 0.4), (0.4, 0.35)])

    def told(model, dataset, **kwargs):
        ap, ap50 = next(figures)
        return replace(evaluate(model, dataset, **kwargs), metrics={"AP": ap, "AP50": ap50, "AP75": 0.0})

    monkeypatch.setattr(train_module, "evaluate", told)
    result = train(replace(config, epochs=3))
    assert result.best_epoch == 2 and result.metrics["AP50"] == 0.4


@pytest.mark.parametrize("form", ["text", "json"])
def test_evaluation_matches_classes_by_name(shapes, dota, form, monkeypatch):
    """Detections that are the ground truth score 1, whatever the order of the model's classes."""
    if form == "text":
        dataset = DotaDataset(dota / "val/labelTxt", dota / "val/images")
    else:
        dataset = DotaDataset(shapes.val_ann, shapes.val_images)
    names = dataset.class_names[::-1]
    model = RTMDet("nano", "rotated", class_names=names)
    model.image_size = 64
    truth = {dataset.load(i).image.tobytes(): dataset.ground_truth(i) for i in range(len(dataset))}

    def oracle(images, image_size, batch_size):
        found = []
        for image in images:
            boxes, labels, _ = truth[image.tobytes()]
            own = torch.tensor([names.index(dataset.class_names[label]) for label in labels], dtype=torch.int64)
            found.append(Detections(torch.from_numpy(boxes), torch.linspace(1, 0.5, len(own)), own, own))
        return found

    monkeypatch.setattr(model, "detect_images", oracle)
    found = evaluate(model, dataset, progress=False)
    assert found.metrics["AP50"] == found.metrics["AP"] == 1.0
    assert set(found.per_class) == set(dataset.class_names)
    assert len(found.detections) == sum(len(t.labels) for t in truth.values())
    entry = found.detections[0]
    assert entry.keys() == {"rbox", "bbox", "score", "category_id", "image_id", "segmentation", "area"}
    assert dataset.category_ids[dataset.ground_truth(0).labels[0]] == entry["category_id"]


def test_evaluation_of_an_unreadable_image_stops_or_leaves_it_out(shapes, model, tmp_path):
    for path in shapes.val_images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = sorted(tmp_path.iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:100])
    names = [c["name"] for c in json.loads(shapes.val_ann.read_text())["categories"]]
    model = RTMDet("nano", "rotated", class_names=names)
    model.image_size = 64
    with pytest.raises(UserError, match=victim.name):
        evaluate(model, DotaDataset(shapes.val_ann, tmp_path), progress=False)
    assert evaluate(model, DotaDataset(shapes.val_ann, tmp_path, skip_bad=True), progress=False).skipped == 1


def test_large_images_are_cut_into_windows(model):
    image = np.random.default_rng(0).integers(256, size=(100, 150, 3), dtype=np.uint8)
    small = image[:64, :64]
    tiled, single, again = model.predict([image, small, image], score_threshold=0.2)
    assert len(tiled) > 0 and torch.equal(tiled.boxes, again.boxes) and tiled.shape == (100, 150)
    assert (tiled.boxes[:, 0] > 80).any() and (tiled.boxes[:, 1] > 70).any()
    assert (tiled.boxes[:, 2] >= tiled.boxes[:, 3]).all() and tiled.boxes[:, 4].abs().max() <= math.pi / 2
    alone = model.predict(small, score_threshold=0.2)
    assert torch.equal(alone.boxes, single.boxes)
    # seen whole, at 64 / 150 of its size, its boxes are as much larger
    whole = model.predict(image, score_threshold=0.2, patch_size=0)
    assert whole.boxes[:, 2].median() > 1.8 * tiled.boxes[:, 2].median()
    assert torch.equal(model.predict(image, score_threshold=0.2, patch_size=150).boxes, whole.boxes)


def test_predict_writes_task_1_files(model, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    model.save(weights)
    image = np.random.default_rng(0).integers(256, size=(90, 120, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images/P0001.png"), image)
    out = tmp_path / "out"
    arguments = ["predict", "--weights", weights, tmp_path / "images", "--out", out, "--score-threshold", 0.2]
    assert run(*arguments, "--format", "dota") == 0
    lines = [
        (path.stem, *line.split())
        for path in sorted((out / "Task1").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert {path.name for path in (out / "Task1").iterdir()} == {"Task1_ship.txt", "Task1_plane.txt"}
    predictions = json.loads((out / "predictions.json").read_text())
    assert len(lines) == len(predictions["annotations"]) > 0
    assert {line[1] for line in lines} == {"P0001"} and all(len(line) == 11 for line in lines)
    # predictions.json is a data set of rotated boxes itself
    dataset = DotaDataset(out / "predictions.json", tmp_path / "images")
    expected = model.predict(image, score_threshold=0.2)
    assert dataset.ground_truth(0).boxes == pytest.approx(expected.boxes.numpy(), abs=1e-3)
    assert cv2.imread(str(out / "P0001.png")).shape == image.shape

    (tmp_path / "images/more").mkdir()
    cv2.imwrite(str(tmp_path / "images/more/P0001.png"), image)
    arguments[3] = tmp_path / "images" / "**" / "*.png"
    assert run(*arguments, "--format", "dota") == 2
    assert "would both be 'P0001' in the files written" in capsys.readouterr().err
    RTMDet("nano", "rotated", class_names=["a/b", "c"]).save(weights)
    assert run(*arguments, "--format", "dota") == 2
    assert "'a/b'" in capsys.readouterr().err
    with pytest.raises(UserError, match="patch_size is -5"):
        model.predict(image, patch_size=-5)

    RTMDet("nano", class_names=["ship"]).save(weights)
    assert run(*arguments, "--format", "dota") == 2
    assert "--format dota" in capsys.readouterr().err
