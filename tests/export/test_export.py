"""Exported files detect what the model detects; they predict and evaluate in its place; bad input is one sentence."""

import copy
import importlib.util
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.evaluation.evaluate import evaluate
from rtmdet_fast.export import export as export_module
from rtmdet_fast.export.engine import load_detector, load_engine
from rtmdet_fast.export.export import export
from rtmdet_fast.export.openvino import convert_to_openvino
from rtmdet_fast.models.rtmdet.model import HEADS

pytest.importorskip("onnx", reason="extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra `export` is not installed")


def busy(task: str) -> RTMDet:
    """A model of random weights that finds much of every class, of every angle, no two scores alike."""
    torch.manual_seed(0)
    model = RTMDet("nano", task, class_names=["a", "b", "ç"])
    head = model.bbox_head
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.02, 0.1)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    noise = torch.randn(4, 3, 96, 96)
    predicted = {"logits": (head.rtm_cls, 2, -2), "distances": (head.rtm_reg, 0.3, 1.2)}
    predicted |= {"angles": (head.rtm_ang, 1, 0)} if task == "rotated" else {}
    predicted |= {"kernels": (head.rtm_kernel, 1, 0)} if task == "ins" else {}
    with torch.no_grad():
        for layers, _, _ in predicted.values():
            for layer in layers:
                nn.init.normal_(layer.weight)
        output = model.eval()(noise)
        for name, (layers, spread, mean) in predicted.items():
            for level, layer in enumerate(layers):
                values = getattr(output, name)[level]
                layer.weight.mul_(spread * (8 * 2**level if name == "distances" else 1) / values.std())
                nn.init.constant_(layer.bias, mean)
    model.image_size = 96
    return model


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(96, 96), (60, 96), (96, 33), (200, 150), (17, 40)]
    return [rng.integers(0, 256, (*shapes[i % len(shapes)], 3), np.uint8) for i in range(count)]


@pytest.fixture(scope="module", params=HEADS)
def exported(request, tmp_path_factory):
    """A model, and its file with open sides and batch."""
    model = busy(request.param)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    agreement = export(model, path, dynamic=True, score_threshold=0.05, candidates=500)
    assert agreement.detections > 20 and agreement.unmatched == 0 and agreement.box_error < 1e-2
    return model, path


def assert_alike(found, expected):
    """The same detections; those whose scores differ by rounding may have changed places."""
    assert len(found) == len(expected)
    away = (found.boxes[:, None] - expected.boxes).abs().amax(2) + (found.labels[:, None] != expected.labels) * 1e9
    nearest: list[int] = []
    for row in away:
        row[nearest] = torch.inf
        nearest.append(int(row.argmin()))
    expected = expected[nearest]
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert found.labels.tolist() == expected.labels.tolist()
    if expected.predicted_masks is not None:
        logits, other = expected.predicted_masks.logits, found.predicted_masks.logits
        torch.testing.assert_close(other, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
        for field in ("scale", "shape", "stride", "offset"):
            assert getattr(found.predicted_masks, field) == getattr(expected.predicted_masks, field)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("side", [96, 64])
def test_predictions_are_those_of_the_model(exported, batch_size, side):
    model, path = exported
    engine = load_engine(path, threads=1)
    assert (engine.task, engine.size, engine.class_names) == (model.task, model.size, model.class_names)
    settings = dict(score_threshold=0.1, image_size=side, batch_size=batch_size)
    expected = model.predict(images(5), **settings)
    assert sum(map(len, expected)) > 20
    for found, truth in zip(engine.predict(images(5), **settings), expected, strict=True):
        assert_alike(found, truth)


def test_file_is_what_clients_of_mmdeploy_expect(exported):
    import onnx

    model, path = exported
    graph = onnx.load(path).graph
    onnx.checker.check_model(str(path), full_check=True)
    assert [value.name for value in graph.input] == ["input"]
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    names = [value.name for value in graph.output]
    assert names[:2] == ["dets", "labels"] and ("masks" in names) == (model.task == "ins")
    last = [axis.dim_value for axis in graph.output[0].type.tensor_type.shape.dim][-1]
    assert last == (6 if model.task == "rotated" else 5)
    operators = {node.op_type for node in graph.node}
    assert ("NonMaxSuppression" in operators) == (model.task != "rotated")
    assert "BatchNormalization" not in operators


def test_a_client_without_this_library_detects_the_same(exported):
    model, path = exported
    if model.task != "det":
        pytest.skip("the client is one for boxes")
    client = runpy.run_path(str(Path(__file__).parents[2] / "examples/onnx_client.py"))
    session = onnxruntime.InferenceSession(str(path))
    for image, expected in zip(images(5), load_engine(path, threads=1).predict(images(5)), strict=True):
        dets, labels = client["detect"](session, image, model.image_size)
        h, w = image.shape[:2]
        dets[:, :4] = dets[:, :4].clip(0, (w, h, w, h))
        inside = (dets[:, 2:4] > dets[:, :2]).all(1)
        np.testing.assert_allclose(dets[inside, :4], expected.boxes, atol=1e-3)
        np.testing.assert_allclose(dets[inside, 4], expected.scores, atol=1e-6)
        assert labels[inside].tolist() == expected.labels.tolist()


def test_full_size_masks_are_those_of_the_logits(exported):
    model, path = exported
    if model.task != "ins":
        pytest.skip("a model without masks")
    session = onnxruntime.InferenceSession(str(path))
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    masks, logits = session.run(["masks", "mask_logits"], {"input": x.numpy()})
    assert masks.shape == (2, model.test_settings.max_detections, 64, 96)
    expected = nn.functional.interpolate(torch.from_numpy(logits), scale_factor=8, mode="bilinear").sigmoid()
    torch.testing.assert_close(torch.from_numpy(masks), expected, rtol=0, atol=0.01)


def test_fixed_sides_and_batch(tmp_path):
    pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    model, path = busy("det"), tmp_path / "model.xml"
    export(model, path, batch_size=2, score_threshold=0.05, max_detections=20, candidates=500)
    engine = load_engine(path, threads=1)
    # three images in batches of two
    found = engine.predict(images(3), max_detections=20)
    for one, expected in zip(found, model.predict(images(3), max_detections=20), strict=True):
        assert_alike(one, expected)
    with pytest.raises(UserError, match="images of 96 pixels, not 64"):
        engine.predict(images(1), image_size=64, max_detections=20)
    with pytest.raises(UserError, match=r"iou_threshold of 0\.65, and 0\.5"):
        engine.predict(images(1), iou_threshold=0.5, max_detections=20)
    with pytest.raises(UserError, match=r"score_threshold of 0.05: 0.01 is below"):
        engine.predict(images(1), score_threshold=0.01, max_detections=20)
    with pytest.raises(UserError, match="max_detections of 20: 21 is above"):
        engine.predict(images(1), max_detections=21)
    with pytest.raises(UserError, match="save the model"):
        engine.save(tmp_path / "a.pth")


def test_an_export_that_disagrees_leaves_what_was_there(exported, tmp_path, monkeypatch):
    model, path = exported
    monkeypatch.setattr(export_module, "export_onnx", lambda graph, to, *rest: shutil.copy(path, to))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bbox_head.rtm_reg[0].bias += 0.05
    (tmp_path / "model.onnx").write_bytes(b"good")
    with pytest.raises(UserError, match="would not detect what the model does, and is not written"):
        other.export(tmp_path / "model.onnx", score_threshold=0.05, candidates=500)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"good"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(path="a.engine"), "should end in .onnx or .xml"),
        (dict(image_size=100), "multiple of 32"),
        (dict(image_size=96, dynamic=True), "exclude each other"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(score_threshold=2), "score_threshold is 2"),
        (dict(iou_threshold=-1), "iou_threshold is -1"),
        (dict(max_detections=0), "max_detections 0"),
        (dict(candidates=0), "candidates 0"),
    ],
)
def test_bad_settings_are_named(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export(RTMDet("nano"), tmp_path / settings.pop("path", "a.onnx"), **settings)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_engines(tmp_path):
    import onnx

    for name, content in (("noise.onnx", b"\x00\x01noise"), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read by ONNX Runtime"):
            load_detector(str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        load_detector(str(tmp_path / "nowhere.onnx"))
    value = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input"], ["out"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    for number, metadata in enumerate((None, "x", "[]", '{"task": "pose"}')):
        if metadata is not None:
            onnx.helper.set_model_props(model, {"rtmdet_fast": metadata})
        onnx.save(model, tmp_path / f"{number}.onnx")
        with pytest.raises(UserError, match="was not exported by rtmdet_fast"):
            load_detector(str(tmp_path / f"{number}.onnx"))


def test_the_command_line_exports_predicts_and_evaluates(tmp_path, capsys):
    import cv2

    model = busy("det")
    model.save(tmp_path / "a.pth")
    out = tmp_path / "a.onnx"
    options = ["--score-threshold", "0.05", "--candidates", "500", "--json", str(tmp_path / "a.json")]
    assert main(["export", "--weights", str(tmp_path / "a.pth"), "--out", str(out), *options]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["unmatched"] == 0
    cv2.imwrite(str(tmp_path / "image.png"), images(1)[0])
    found = {}
    for weights in ("a.pth", "a.onnx"):
        folder = tmp_path / weights.replace(".", "_")
        assert (
            main(["predict", str(tmp_path / "image.png"), "--weights", str(tmp_path / weights), "--out", str(folder)])
            == 0
        )
        found[weights] = json.loads((folder / "predictions.json").read_text())["annotations"]
    assert len(found["a.pth"]) == len(found["a.onnx"]) > 0
    assert main(["export", "--weights", str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.pt2")]) == 2
    assert "should end in .onnx or .xml" in capsys.readouterr().err


def test_average_precision_is_that_of_the_checkpoint(shared, tmp_path):
    model = RTMDet.from_pretrained(shared / "reference/mmdet_checkpoint_bccd_rtmdet_tiny.pth")
    paths = [tmp_path / "bccd.onnx"]
    export(model, paths[0], image_size=256)
    if importlib.util.find_spec("openvino"):
        paths.append(tmp_path / "bccd.xml")
        convert_to_openvino(paths[0], paths[1], load_engine(paths[0]).metadata)
    dataset = CocoDataset(shared / "data/bccd/val.json", shared / "data/bccd/images")
    for path in paths:
        found = evaluate(load_engine(path, threads=1), dataset, progress=False)
        assert found.metrics["AP"] == pytest.approx(0.478, abs=1e-3)
