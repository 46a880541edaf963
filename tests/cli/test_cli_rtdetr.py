"""The commands with weights of RT-DETR."""

import json

import pytest
import torch

from rtmdet_fast import RTDETR, RTMDet
from rtmdet_fast.cli import main
from rtmdet_fast.data.shapes import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=2, num_val=3, image_size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, shapes):
    torch.manual_seed(0)
    names = [c["name"] for c in json.loads(shapes.val_ann.read_text())["categories"]]
    model = RTDETR("r18", 2, class_names=names, num_queries=30)
    for head in model.decoder.dec_bbox_head:  # each layer moves boxes
        torch.nn.init.normal_(head.layers[-1].weight, std=0.05)
    model.image_size = 64
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    model.save(path)
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_eval_and_predict_by_all_layers_and_by_one(shapes, weights, tmp_path):
    found, drawn = {}, {}
    for layers in (None, 1, 3):
        options = [] if layers is None else ["--decoder-layers", layers]
        ground_truth = ["--ann", shapes.val_ann, "--images", shapes.val_images, "--detections", tmp_path / "d.json"]
        assert run("eval", "--weights", weights, *ground_truth, "--json", tmp_path / "e.json", *options) == 0
        assert json.loads((tmp_path / "e.json").read_text())["images"] == 3
        found[layers] = json.loads((tmp_path / "d.json").read_text())
        out = tmp_path / f"out{layers}"
        assert (
            run("predict", shapes.val_images, "--weights", weights, "--out", out, "--score-threshold", 0, *options) == 0
        )
        drawn[layers] = json.loads((out / "predictions.json").read_text())["annotations"]
    assert found[None] == found[3] != found[1] and drawn[None] == drawn[3] != drawn[1]
    assert (
        len(found[1]) == len(found[3]) == 3 * min(300, 30 * len(json.loads(shapes.val_ann.read_text())["categories"]))
    )


def test_info_lists_the_published_weights(capsys):
    assert run("info") == 0
    assert {"rtdetr-r50,", "rtdetrv2-r18,", "hgnetv2-l,"} <= {*capsys.readouterr().out.split()}


@pytest.mark.parametrize("command", ["eval", "predict", "export"])
@pytest.mark.parametrize(
    ("family", "layers", "words"),
    [("rtdetr", 4, "decoder_layers is 4; this model has 3"), ("rtmdet", 2, "no option 'decoder_layers'")],
)
def test_layers_that_there_are_not(shapes, weights, tmp_path, capsys, command, family, layers, words):
    if family == "rtmdet":
        weights = tmp_path / "nano.pth"
        RTMDet("nano", num_classes=2).save(weights)
    arguments = {
        "eval": ["--ann", shapes.val_ann, "--images", shapes.val_images],
        "predict": [shapes.val_images, "--out", tmp_path / "out"],
        "export": ["--out", tmp_path / "w.onnx"],
    }[command]
    assert run(command, *arguments, "--weights", weights, "--decoder-layers", layers) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.strip().splitlines()) == 1


def test_an_exported_file_takes_no_layers(tmp_path, shapes, capsys):
    exported = tmp_path / "w.onnx"
    exported.touch()
    arguments = ["--ann", shapes.val_ann, "--images", shapes.val_images, "--decoder-layers", 1]
    assert run("eval", "--weights", exported, *arguments) == 2
    assert "w.onnx is an exported file" in capsys.readouterr().err
