"""Exported files detect what the model detects; they predict and evaluate in its place; bad input is one sentence."""

import copy
import json
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from busy import assert_alike, busy, images, without_like
from torch import nn

from benches.confident import confident
from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.export import export as export_module
from rtmdet_fast.export.agreement import EXACT, INT8, Agreement, compare
from rtmdet_fast.export.engine import load_detector, load_engine
from rtmdet_fast.export.export import export
from rtmdet_fast.export.graph import WithoutNMS
from rtmdet_fast.export.int8 import calibration_canvases, quantize, stays_float
from rtmdet_fast.export.openvino import SignalStack, convert_to_openvino
from rtmdet_fast.models.rtmdet.model import HEADS

pytest.importorskip("onnx", reason="extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra `export` is not installed")


@pytest.fixture(scope="module", params=HEADS)
def exported(request, tmp_path_factory):
    """A model, and its file with open sides and batch."""
    model = busy(request.param)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    agreement = export(model, path, dynamic=True, score_threshold=0.05, candidates=500)
    assert agreement.detections > 20 and agreement.unmatched == 0 and agreement.box_error < 1e-2
    return model, path


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


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("side", [128, 96])
def test_predictions_on_real_images(exported, batch_size, side, shared):
    model, path = exported
    photos = sorted((shared / "data/coco206/val").iterdir())[:20]
    settings = dict(score_threshold=0.1, image_size=side, batch_size=batch_size, patch_size=0)
    expected = model.predict(photos, **settings)
    found = load_engine(path, threads=1).predict(photos, **settings)
    total = sum(map(len, [*expected, *found]))
    assert total > 200
    # random weights give many scores and IoUs so alike that rounding decides which box NMS keeps
    assert sum(without_like(one, truth) for one, truth in zip(found, expected, strict=True)) <= 0.01 * total


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
    found = load_engine(path, threads=1, dtype="bf16").predict(images(3), max_detections=20)
    for one, expected in zip(found, engine.predict(images(3), max_detections=20), strict=True):
        best = float(expected.scores.max())
        assert float(one.scores.max()) == pytest.approx(best, abs=0.05)


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


def test_a_disk_without_room_leaves_nothing_but_what_was_there(exported, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    from full_disk import room_for

    model, path = exported
    (tmp_path / "a.onnx").write_bytes(b"good")
    monkeypatch.setattr(export_module, "export_onnx", lambda graph, to, *rest: to.write_bytes(path.read_bytes()))
    with room_for(10_000), pytest.raises(UserError, match=r"^cannot write .*a\.onnx: File too large$"):
        model.export(tmp_path / "a.onnx")
    monkeypatch.setattr(export_module, "export_onnx", lambda graph, to, *rest: to.symlink_to(path))
    with room_for(10_000), pytest.raises(UserError, match=r"^cannot write .*a\.xml: the disk may be full$"):
        model.export(tmp_path / "a.xml")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"good"]


def test_without_nms(tmp_path):
    model, path = busy("rotated"), tmp_path / "a.onnx"
    agreement = model.export(path, nms=False, batch_size=2)
    assert agreement.detections == 2 * (144 + 36 + 9) and agreement.unmatched == 0
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    boxes, scores = onnxruntime.InferenceSession(str(path)).run(["boxes", "scores"], {"input": x.numpy()})
    with torch.no_grad():
        logits, expected, _ = model.bbox_head.decode(model(x))
    torch.testing.assert_close(torch.from_numpy(boxes), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(scores), logits.sigmoid(), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="was exported without NMS"):
        load_detector(str(path))


def test_what_a_model_cannot_be_exported_as(tmp_path):
    with pytest.raises(UserError, match="a model with masks is exported with its NMS only"):
        export(RTMDet("nano", "ins"), tmp_path / "a.onnx", nms=False)
    assert not list(tmp_path.iterdir())


def left_in_float(network, task):
    """The operations that 8 bits are to leave alone: the last convolutions, and all after them."""
    in_float = {*stays_float(network)}
    convolutions = [op for op in network.get_ops() if "Convolution" in op.get_type_name()]
    last = {"det": 6, "rotated": 9, "ins": 10}[task]  # of the branches on three levels, and of the mask features
    assert sum(op.get_friendly_name() in in_float for op in convolutions) == last
    assert any("TopK" in op.get_type_name() and op.get_friendly_name() in in_float for op in network.get_ops())
    return in_float


def test_what_int8_is_to_leave_in_float(exported, tmp_path):
    openvino = pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    model, path = exported
    convert_to_openvino(path, tmp_path / "a.xml", load_engine(path).metadata)
    assert left_in_float(openvino.Core().read_model(str(tmp_path / "a.xml")), model.task)


def test_calibration_takes_the_images_of_a_folder_that_can_be_read(tmp_path):

    model = busy("det")
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for i, image in enumerate(images(4)):
        cv2.imwrite(str(photos / ("more" if i % 2 else "") / f"{i}.png"), image)
    (photos / "3.png").write_bytes(b"noise")
    with pytest.warns(UserWarning, match=r"1 calibration images are unreadable, the first: .*3\.png"):
        canvases = calibration_canvases(model, photos, 96, 128)
    assert [canvas.shape for canvas in canvases] == [(96, 96, 3)] * 4
    assert len(calibration_canvases(model, photos / "more", 96, 1)) == 1
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        calibration_canvases(model, tmp_path / "empty", 96, 1)
    (tmp_path / "damaged/1.jpg").touch()
    with pytest.raises(UserError, match=r"none of the images of .*damaged can be read, the first: .*1\.jpg"):
        calibration_canvases(model, tmp_path / "damaged", 96, 1)


@pytest.mark.parametrize(
    "exported", ["ins", *(pytest.param(task, marks=pytest.mark.slow) for task in ("det", "rotated"))], indirect=True
)
def test_int8_leaves_the_last_convolutions_and_all_after_them_in_float(exported, tmp_path):
    openvino = pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    pytest.importorskip("nncf", reason="extra `openvino` is not installed")
    model, path = exported
    canvases = [model.to_canvas(image, 96)[0] for image in images(2)]
    written = tmp_path / "a.xml"
    convert_to_openvino(
        path, written, load_engine(path).metadata, lambda network: quantize(network, model, canvases, 1)
    )
    network = openvino.Core().read_model(str(written))
    quantized = {op.get_friendly_name() for op in network.get_ops() if op.get_type_name() == "FakeQuantize"}
    assert len(quantized) > 50 and not quantized & left_in_float(network, model.task)


def test_what_runs_in_other_dtypes(exported, tmp_path):
    model, path = exported
    with pytest.raises(UserError, match=r"model\.onnx cannot run in bf16: files of OpenVINO"):
        load_engine(path, dtype="bf16")
    model.save(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth cannot run in fp16: files of OpenVINO"):
        load_detector(str(tmp_path / "a.pth"), dtype="fp16")


def test_a_masks_disagreement_counts():
    good = Agreement(100, 0.0, 0.0, 0.0, 0)
    assert good.is_within(EXACT) and not good._replace(mask_error=0.02).is_within(EXACT)
    assert good._replace(unmatched=1).is_within(EXACT) and not good._replace(unmatched=2).is_within(EXACT)


def test_boxes_without_nms_are_judged_by_what_is_clear():
    """In 8 bits by a share of their side, where their score is half the best of the image or more; else all alike."""
    boxes = torch.tensor([[[0.0, 0, 100, 60], [10, 10, 20, 20], [0, 0, 40, 40]]])
    scores = torch.tensor([[[0.9, 0.1], [0.1, 0.8], [0.02, 0.3]]])
    moved = boxes + torch.tensor([[[10.0, 0, 0, 0], [2.4, 0, 0, 0], [30, 0, 0, 0]]])

    class Fixed(WithoutNMS):
        def forward(self, images):
            return boxes, scores

    graph = Fixed(nn.Linear(1, 1))
    run = dict(boxes=moved.numpy(), scores=scores.numpy() - 0.01).copy
    rough = compare(graph, lambda images: run(), [torch.zeros(1, 3, 32, 32)], INT8)
    assert (rough.detections, rough.unmatched, rough.box_error) == (2, 0, 10.0)
    exact = compare(graph, lambda images: run(), [torch.zeros(1, 3, 32, 32)], EXACT)
    assert (exact.detections, exact.unmatched, exact.box_error) == (3, 3, 30.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(path="a.engine"), "should end in .onnx, .xml .* or .pt2"),
        (dict(format="openvino"), "should end in .xml, as files of format openvino do"),
        (dict(format="tensorrt"), "format 'tensorrt' is unknown"),
        (dict(image_size=100), "multiple of 32"),
        (dict(image_size=96, dynamic=True), "exclude each other"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(score_threshold=2), "score_threshold is 2"),
        (dict(iou_threshold=-1), "iou_threshold is -1"),
        (dict(max_detections=0), "max_detections 0"),
        (dict(candidates=0), "candidates 0"),
        (dict(int8=True), "cannot hold int8, which is for OpenVINO"),
        (dict(int8=True, path="a.xml"), "int8 takes images to calibrate with"),
        (dict(calibrate="photos"), "calibrate is for int8 alone"),
        (dict(int8=True, path="a.xml", calibrate="photos"), "photos is no folder"),
        (dict(int8=True, path="a.xml", calibrate=".", calibration_images=0), "calibration_images is 0"),
    ],
)
def test_bad_settings_are_named(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export(RTMDet("nano"), tmp_path / settings.pop("path", "a.onnx"), **settings)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    """A file of them would find nothing, as the model does, and so agree with it."""
    model = RTMDet("nano")
    model.bbox_head.rtm_cls[1].bias.data[3] = torch.nan
    with pytest.raises(UserError, match=r"weights are not finite.* bbox_head\.rtm_cls\.1\.bias"):
        export(model, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_engines(tmp_path):
    import onnx

    for name, content in (("noise.onnx", b"\x00\x01noise"), ("empty.onnx", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read by ONNX Runtime"):
            load_detector(str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        load_detector(str(tmp_path / "nowhere.onnx"))
    (tmp_path / "noise.pt2").write_bytes(b"noise")
    with zipfile.ZipFile(tmp_path / "empty.pt2", "w") as package:
        package.writestr("a_metadata.json", "{}")
    told = {"noise": "is no package of AOTInductor", "empty": "was not exported by rtmdet_fast"}
    for name, part, words in (
        ("nested", b"[" * 100_000, "is no package of AOTInductor"),
        ("bomb", bytes(2**25), "would take more than 16 MiB"),  # 32 KB in the file
        ("device", b'{"rtmdet_fast": "{\\"device\\": \\"x\\"}"}', "was not exported by rtmdet_fast"),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.pt2", "w", zipfile.ZIP_DEFLATED) as package:
            package.writestr("a_metadata.json", part)
        told[name] = words
    for name, words in told.items():
        with pytest.raises(UserError, match=words):
            load_detector(str(tmp_path / f"{name}.pt2"))
    value = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["input"], ["out"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    for number, metadata in enumerate((None, "x", "[]", '{"task": "pose"}', "[" * 100_000)):
        if metadata is not None:
            onnx.helper.set_model_props(model, {"rtmdet_fast": metadata})
        onnx.save(model, tmp_path / f"{number}.onnx")
        with pytest.raises(UserError, match="was not exported by rtmdet_fast"):
            load_detector(str(tmp_path / f"{number}.onnx"))
    # what an old runtime lacks
    graph.node[0].op_type = "OperatorOfTomorrow"
    onnx.save(onnx.helper.make_model(graph, ir_version=8), tmp_path / "tomorrow.onnx")
    with pytest.raises(UserError, match=r"cannot be read by ONNX Runtime: .*OperatorOfTomorrow"):
        load_detector(str(tmp_path / "tomorrow.onnx"))


def test_files_that_are_none_of_openvino(tmp_path):
    openvino = pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    values = openvino.opset13.constant(np.arange(64, dtype=np.float32))
    path = tmp_path / "a.xml"
    openvino.save_model(openvino.Model([openvino.opset13.negative(values)], []), str(path))
    (tmp_path / "a.bin").unlink()
    whole = path.read_bytes()
    for content, words in (
        (whole, "bin file"),
        (whole[: len(whole) // 2], "Error parsing"),
        (b"<html>", "it does not begin as its files do"),
        (b"\x89PNG", "it does not begin as its files do"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.xml cannot be read by OpenVINO: .*{words}"):
            load_detector(str(path))


def test_an_exported_file_is_no_weights(exported, tmp_path):
    _, path = exported
    with pytest.raises(UserError, match=r"model\.onnx is an exported file, and no weights"):
        RTMDet.from_pretrained(path)


def test_compiled_files_are_for_machines_of_their_kind(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def write(**told):
        with zipfile.ZipFile(tmp_path / "a.pt2", "w") as package:
            package.writestr("a_metadata.json", json.dumps({"rtmdet_fast": json.dumps(told)}))

    write(device="cpu", cpu="of tomorrow", outputs=[])
    with pytest.raises(UserError, match="was compiled for a processor with of tomorrow, and this one has"):
        load_detector(str(tmp_path / "a.pt2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write(device="cuda", cpu="", outputs=[])
    with pytest.raises(UserError, match="was compiled for a GPU, which this machine has not"):
        load_detector(str(tmp_path / "a.pt2"))

    def no_compiler():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with pytest.raises(UserError, match=r"b\.pt2: no C\+\+ compiler was found.*install g\+\+"):
        RTMDet("nano").export(tmp_path / "b.pt2")
    assert not (tmp_path / "b.pt2").exists()


@pytest.mark.slow  # a minute or more of g++ each
@pytest.mark.parametrize("task", [*HEADS, "rtdetr"])
def test_compiled_files_detect_the_same(task, tmp_path):
    model, path = busy(task), tmp_path / "a.pt2"
    agreement = model.export(path, dynamic=True, score_threshold=0.05, candidates=500)
    assert agreement.detections > 20 and agreement.unmatched == 0
    engine = load_engine(path)
    for side in (96, 64):
        for batch_size in (1, 4):
            settings = dict(score_threshold=0.1, image_size=side, batch_size=batch_size)
            for found, truth in zip(
                engine.predict(images(5), **settings), model.predict(images(5), **settings), strict=True
            ):
                assert_alike(found, truth)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_rtdetr_is_exported_without_nms(suffix, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    model = busy("rtdetr")
    agreement = model.export(tmp_path / f"a{suffix}", dynamic=suffix == ".onnx", score_threshold=0.05)
    assert agreement.detections > 50 and agreement.unmatched == 0
    engine = load_engine(tmp_path / f"a{suffix}", threads=1)
    assert engine.title == model.title
    for side in (96, 160) if suffix == ".onnx" else (96,):
        settings = dict(score_threshold=0.1, image_size=side)
        for found, truth in zip(
            engine.predict(images(3), **settings), model.predict(images(3), **settings), strict=True
        ):
            assert len(found) > 10
            assert_alike(found, truth)
    if suffix == ".xml":  # 8 bits would leave the decoder in float, from its own convolutions of the three levels on
        import openvino

        network = openvino.Core().read_model(str(tmp_path / "a.xml"))
        in_float = {*stays_float(network)}
        left = [op for op in network.get_ops() if op.get_friendly_name() in in_float]
        assert sum("Convolution" in op.get_type_name() for op in left) == 3
        samples = [op for op in network.get_ops() if op.get_type_name() == "GridSample"]
        assert len(samples) == 6 and all(op.get_friendly_name() in in_float for op in samples)
        after = {op.get_friendly_name() for op in network.get_ops() if op.get_type_name() == "TopK"}
        assert after and after <= in_float


@pytest.mark.slow
def test_int8_of_rtdetr_leaves_its_decoder_in_float(tmp_path):
    openvino = pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    pytest.importorskip("nncf", reason="extra `openvino` is not installed")
    model = confident("rtdetr", "r18", 96, num_queries=40)
    for i, image in enumerate(images(4)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    agreement = model.export(tmp_path / "a.xml", int8=True, calibrate=tmp_path, score_threshold=0.05)
    network = openvino.Core().read_model(str(tmp_path / "a.xml"))
    quantized = {op.get_friendly_name() for op in network.get_ops() if op.get_type_name() == "FakeQuantize"}
    samples = [op for op in network.get_ops() if op.get_type_name() == "GridSample"]
    assert len(quantized) > 50 and len(samples) == 9  # three levels in each of three layers
    in_float = {*stays_float(network)}
    assert not quantized & in_float and all(op.get_friendly_name() in in_float for op in samples)
    assert agreement.detections > 5 and agreement.unmatched <= 0.3 * agreement.detections
    found = load_engine(tmp_path / "a.xml", threads=1).predict(images(3), score_threshold=0.05)
    assert all(len(one) and one.boxes.isfinite().all() for one in found)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no such stack")
@pytest.mark.parametrize("exported", ["det"], indirect=True)
def test_openvino_leaves_the_stack_for_signals_alone(exported, tmp_path):
    pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    _, path = exported
    before = SignalStack.of_this_thread()
    convert_to_openvino(path, tmp_path / "a.xml", load_engine(path).metadata)
    load_engine(tmp_path / "a.xml", threads=1).predict(images(1))
    after = SignalStack.of_this_thread()
    assert (after.address, after.size) == (before.address, before.size)


@pytest.mark.parametrize("exported", ["det"], indirect=True)
def test_the_command_line_refuses_formats_that_do_not_fit(exported, tmp_path, capsys):
    """What it exports, predicts and evaluates: tests/cli/test_cli_report.py."""

    model, path = exported
    model.save(tmp_path / "a.pth")
    cv2.imwrite(str(tmp_path / "image.png"), images(1)[0])
    assert main(["predict", str(tmp_path / "image.png"), "--weights", str(path), "--format", "dota"]) == 2
    assert "--format dota needs a model of rotated boxes" in capsys.readouterr().err
    wrong = ["--out", str(tmp_path / "b.onnx"), "--format", "openvino"]
    assert main(["export", "--weights", str(tmp_path / "a.pth"), *wrong]) == 2
    assert "should end in .xml" in capsys.readouterr().err
