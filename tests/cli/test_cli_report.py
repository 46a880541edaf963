"""The report by the command line: of any weights, of runs side by side; and the score thresholds that it found."""

import json
import shutil

import numpy as np
import pytest
import torch

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.export import export as export_module
from rtmdet_fast.export.agreement import Agreement
from rtmdet_fast.export.engine import load_engine
from rtmdet_fast.models.families import load_model


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=5, image_size=64)


@pytest.fixture(scope="module")
def weights(shapes, tmp_path_factory):
    """A model that finds something everywhere, with thresholds of its own, by task."""
    names = [c["name"] for c in json.loads(shapes.val_ann.read_text())["categories"]]
    folder = tmp_path_factory.mktemp("weights")
    for task in ("det", "ins", "rotated"):
        torch.manual_seed(0)
        model = RTMDet("nano", task, class_names=names)
        model.image_size = 64
        for name, parameter in model.bbox_head.named_parameters():
            if "rtm_reg" in name and name.endswith("bias"):
                torch.nn.init.constant_(parameter, 1.5)
            elif "rtm_cls" in name:
                torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 1.0)
        model.score_thresholds = tuple(np.linspace(0.3, 0.6, len(names)).tolist())
        model.save(folder / f"{task}.pth")
    return folder


@pytest.mark.parametrize("task", ["det", "ins", "rotated"])
def test_eval_writes_the_report(shapes, weights, tmp_path, capsys, task):
    page = tmp_path / "new/eval.html"
    arguments = ("--weights", weights / f"{task}.pth", "--data", shapes.root, "--device", "cpu")
    assert run("eval", *arguments, "--report", page, "--json", tmp_path / "e.json") == 0
    assert f"report {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    for expected in ("Confusion matrix", "What goes wrong", "Which score to ask for", "The worst images", "By size"):
        assert expected in text
    assert "<script" not in text and 10 <= text.count("data:image/jpeg") <= 20
    told = json.loads((tmp_path / "e.json").read_text())
    assert sum(told["analysis"]["errors"].values()) > 0 and told["analysis"]["score_thresholds"]


def test_the_report_of_an_exported_file(shapes, weights, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="extra `export` is not installed")
    file = tmp_path / "det.onnx"
    options = ("--score-threshold", 0.05, "--candidates", 500, "--json", tmp_path / "x.json", "--data", shapes.root)
    assert run("export", "--weights", weights / "det.pth", "--out", file, *options) == 0
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["unmatched"] == 0 and "detections on real images 0 differ from the model's" in capsys.readouterr().out
    assert load_engine(file).metadata["settings"]["score_threshold"] == 0.05
    # AP before and after are those that `eval` finds of either
    for made, told_ap in ((weights / "det.pth", told["before"]), (file, told["after"])):
        page = ("--report", tmp_path / "e.html", "--json", tmp_path / "e.json")
        assert run("eval", "--weights", made, "--data", shapes.root, *page) == 0
        evaluated = json.loads((tmp_path / "e.json").read_text())
        assert told_ap == pytest.approx({name: evaluated[name] for name in told_ap}, abs=1e-6)
    assert told["before"]["AR100"] > 0.05 and told["after"]["AR100"] > 0.05
    assert "Confusion matrix" in (tmp_path / "e.html").read_text(encoding="utf-8")
    # it carries the thresholds, and finds by them what the weights do
    found = []
    for made in (weights / "det.pth", file):
        out = tmp_path / made.suffix[1:]
        assert run("predict", shapes.val_images, "--weights", made, "--out", out) == 0
        found.append(json.loads((out / "predictions.json").read_text())["annotations"])
    assert found[0] and [a["category_id"] for a in found[0]] == [a["category_id"] for a in found[1]]
    for one, other in zip(*found, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.05)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_export_in_8_bits_calibrates_on_the_training_images(shapes, weights, tmp_path, monkeypatch, capsys):
    """What it makes of them: tests/export/test_trained_weights.py."""
    asked = {}

    def export(model, path, **options):
        asked.update(options)
        return Agreement(9, 0.0, 0.0, 0.0, 0)

    monkeypatch.setattr(export_module, "export", export)
    common = ("export", "--weights", weights / "det.pth", "--out", tmp_path / "a.xml")
    for data in (shapes.root, shapes.train_images):
        assert run(*common, "--int8", "--calibrate", data, "--calibration-images", 7) == 0
        assert asked["int8"] and asked["calibrate"] == shapes.train_images and asked["calibration_images"] == 7
    assert "of 9 detections on real images 0 differ" in capsys.readouterr().out
    assert run(*common) == 0 and not asked["int8"] and asked["calibrate"] is None
    assert run(*common, "--no-nms", "--data", shapes.root) == 2
    assert "--data needs detections" in capsys.readouterr().err


def test_predict_takes_the_thresholds_of_the_weights_and_says_so(shapes, weights, tmp_path, capsys):
    model = load_model(weights / "det.pth")
    assert model.score_thresholds is not None and model.least_score == pytest.approx(0.3)
    image = str(next(shapes.val_images.iterdir()))
    every, own = model.predict(image, score_threshold=0.3), model.predict(image)
    least = np.array(model.score_thresholds)[every.labels.numpy()]
    kept = every.scores.double().numpy() >= least
    assert 0 < kept.sum() < len(every)
    assert own.scores.tolist() == every.scores[kept].tolist() and own.boxes.tolist() == every.boxes[kept].tolist()
    assert model.predictor().predict(image).scores.tolist() == pytest.approx(own.scores.tolist(), abs=1e-4)
    assert run("predict", image, "--weights", weights / "det.pth", "--out", tmp_path / "a") == 0
    told = capsys.readouterr().out
    assert f"score thresholds of the weights: {model.class_names[0]} 0.30" in told
    assert len(json.loads((tmp_path / "a/predictions.json").read_text())["annotations"]) == kept.sum()
    asked = ("--score-threshold", 0.3, "--weights", weights / "det.pth")
    assert run("predict", image, *asked, "--out", tmp_path / "b") == 0
    assert "score thresholds" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "b/predictions.json").read_text())["annotations"]) == len(every)


@pytest.mark.parametrize("task", ["ins", "rotated"])
def test_masks_and_rotated_boxes_have_thresholds_too(shapes, weights, task):
    model = load_model(weights / f"{task}.pth")
    image = str(next(shapes.val_images.iterdir()))
    every, own = model.predict(image, score_threshold=model.least_score), model.predict(image)
    kept = every.scores.double().numpy() >= np.array(model.score_thresholds)[every.labels.numpy()]
    assert 0 < len(own) == kept.sum() < len(every)
    if task == "ins":
        assert own.rles() == [rle for rle, k in zip(every.rles(), kept, strict=True) if k]


def test_without_thresholds_the_default_is_as_before(shapes):
    torch.manual_seed(0)
    model = RTMDet("nano", num_classes=2)
    assert model.score_thresholds is None and model.least_score == 0.3


def test_thresholds_of_other_classes_are_not_taken_over(weights, tmp_path):
    path = tmp_path / "w.pth"
    shutil.copy(weights / "det.pth", path)
    with pytest.warns(UserWarning):
        assert RTMDet.from_pretrained(path, class_names=("other",)).score_thresholds is None
    content = torch.load(path, weights_only=False)
    for damaged in ("high", [2.0], [0.1, None], {0: 0.1}):
        content["meta"]["rtmdet_fast"]["score_thresholds"] = damaged
        torch.save(content, path)
        with pytest.raises(UserError, match="score_thresholds"):
            load_model(path)


def test_runs_side_by_side(shapes, tmp_path, capsys):
    common = "--size nano --epochs 2 --batch-size 4 --image-size 64 --num-workers 0 --device cpu".split()
    for name, lr in (("a", 1e-3), ("b", 2e-3)):
        assert run("train", "--data", shapes.root, *common, "--lr", lr, "--out", tmp_path / name, "--no-progress") == 0
    text = (tmp_path / "a/report.html").read_text(encoding="utf-8")
    for expected in ("Confusion matrix", "Training batches", "in the first stage", "Objects of training"):
        assert expected in text
    model = load_model(tmp_path / "a/best.pth")
    analysis = json.loads((tmp_path / "a/metrics.json").read_text())["analysis"]
    told = {name: row["threshold"] for name, row in analysis["score_thresholds"].items()}
    own = dict(zip(model.class_names, model.score_thresholds, strict=True))
    assert told and told.items() <= own.items()
    assert "best score thresholds, which predict takes: " in capsys.readouterr().out
    out = tmp_path / "c/compare.html"
    assert run("compare", tmp_path / "a", tmp_path / "b", "--out", out, "--json", tmp_path / "c.json") == 0
    printed = capsys.readouterr().out
    assert "lr: a 0.001, b 0.002" in printed and f"page {out}" in printed
    assert json.loads((tmp_path / "c.json").read_text())["settings"] == {"lr": {"a": 0.001, "b": 0.002}}
    assert "<script" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("folders", [["a"], ["a", "nowhere"], ["a", "a"]])
def test_compare_needs_runs(tmp_path, capsys, folders):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.json").write_text('{"AP": 0.5}')
    assert run("compare", *(tmp_path / name for name in folders), "--out", tmp_path / "c.html") == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "c.html").exists()
