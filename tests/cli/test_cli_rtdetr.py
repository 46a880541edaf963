"""The commands with weights of RT-DETR."""

import json

import pytest
import torch

from rtmdet_fast import RTDETR, RTMDet
from rtmdet_fast.cli import main
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.images import read_image
from rtmdet_fast.models.rtdetr import published


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


def test_info_tells_of_weights_and_checks_official_ones(shapes, weights, tmp_path, monkeypatch, capsys):
    assert run("info", "--weights", weights) == 0
    told = capsys.readouterr().out
    assert "RT-DETRv2-r18" in told and "triangle" in told and "image_size     64" in told
    model, (image, other, _) = RTDETR.from_pretrained(weights), sorted(shapes.val_images.iterdir())
    canvas = torch.from_numpy(model.to_canvas(read_image(image), 640)[0]).permute(2, 0, 1)[None]
    with torch.no_grad():
        output = model.eval()(model.normalize(canvas))
    first = [values[0, :3, :3].flatten().tolist() for values in output]
    monkeypatch.setitem(published.FIRST, "rtdetrv2-r18-other", published.FIRST["rtdetrv2-r18"])
    monkeypatch.setitem(published.FIRST, "rtdetrv2-r18", first)
    RTDETR.from_pretrained(weights, decoder_layers=1).save(tmp_path / "one.pth")  # published figures are of all layers
    assert run("info", "--weights", tmp_path / "one.pth", "--check", image) == 0
    assert "gives what is published of rtdetrv2-r18: logits 0.0e+00" in capsys.readouterr().out
    assert run("info", "--weights", weights, "--check", other) == 2
    told = capsys.readouterr().err
    assert "does not give what is published of rtdetrv2-r18" in told and told.count("\n") == 1

    RTMDet("nano").save(tmp_path / "rtmdet.pth")
    RTDETR("r18", 1, num_classes=3, num_queries=30).save(tmp_path / "r18.pth")
    for name in ("rtdetr-r18", "rtdetr-r18-coco-objects365"):
        monkeypatch.delitem(published.FIRST, name)
    for arguments, words in (
        (["--check", image], "is for weights of rtdetr: give them as --weights"),
        (["--check", image, "--weights", tmp_path / "rtmdet.pth"], "of RTMDet-nano"),
        (["--check", image, "--weights", tmp_path / "r18.pth"], "of RT-DETR-r18 no outputs are published"),
    ):
        assert run("info", *arguments) == 2
        assert words in capsys.readouterr().err


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
