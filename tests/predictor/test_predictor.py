"""Predictors find what the model finds, by any engine; in other processes too; bad input is one sentence."""

import logging
import multiprocessing
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from busy import assert_alike, busy, images

from rtmdet_fast import UserError
from rtmdet_fast.cli import main
from rtmdet_fast.export import export as export_module
from rtmdet_fast.inference.sources import Frame, iter_sources
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtmdet.model import HEADS
from rtmdet_fast.predictor.graphs import GraphDetector
from rtmdet_fast.predictor.predictor import Predictor

ODD = {
    "a pixel": np.full((1, 1, 3), 200, np.uint8),
    "grey": images(1)[0][:, :, 0],
    "grey with an axis": images(1)[0][:, :, :1],
    "RGBA": np.concatenate([images(1)[0], images(1)[0][:, :, :1]], 2),
    "16 bits": images(1)[0].astype(np.uint16) * 257,
    "a line": images(1)[0][:1],
}


@pytest.fixture(scope="module", params=[*HEADS, "rtdetr"])
def model(request):
    return busy(request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a model of boxes, and exported files of it for batches of two, by engine."""
    from rtmdet_fast.export.export import export
    from rtmdet_fast.export.openvino import convert_to_openvino

    pytest.importorskip("onnxruntime", reason="extra `export` is not installed")
    pytest.importorskip("openvino", reason="extra `openvino` is not installed")
    folder, model = tmp_path_factory.mktemp("files"), busy("det")
    model.save(folder / "a.pth")
    found = {"torch": folder / "a.pth", "onnxruntime": folder / "a.onnx", "openvino": folder / "a.xml"}
    export(model, found["onnxruntime"], batch_size=2, score_threshold=0.05, max_detections=40, candidates=500)
    metadata = Predictor(found["onnxruntime"], max_detections=40).detector.metadata
    convert_to_openvino(found["onnxruntime"], found["openvino"], metadata)
    return found


@pytest.mark.parametrize("options", [{}, dict(batch_size=3), dict(image_size=64), dict(iou_threshold=0.3)])
def test_finds_what_the_model_finds(model, options):
    settings = dict(score_threshold=0.1, max_detections=30, **options)
    expected = model.predict(images(5), **settings)
    predictor = model.predictor(**settings)
    assert sum(map(len, expected)) > 20
    for found, truth in zip(predictor.predict(images(5)), expected, strict=True):
        assert_alike(found, truth)
    assert_alike(predictor.predict(images(1)[0]), expected[0])


def test_the_network_is_folded_in_the_dtype_asked_for(model):
    predictor = model.predictor(dtype="bf16", score_threshold=0.1)
    weights = [p for p in predictor.detector.parameters() if p.ndim == 4]
    assert predictor.detector.is_folded and not model.is_folded
    assert all(p.dtype == torch.bfloat16 and p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    found, expected = predictor.predict(images(1)[0]), model.predict(images(1)[0], score_threshold=0.1)
    assert 0.8 < len(found) / len(expected) < 1.25 and found.boxes.dtype == torch.float32


def test_room_for_few_candidates_is_a_setting(model):
    """What is found then, by the path of a GPU: test_graphs.py."""
    predictor = model.predictor(candidates=5, score_threshold=0.1)
    for made in (predictor, pickle.loads(pickle.dumps(predictor))):
        assert made.detector.max_candidates == 5 and model.max_candidates == 1000
        detector = GraphDetector(made.detector, batch_size=1)
        found, expected = (x.predict(images(1)[0], score_threshold=0.1) for x in (detector, model))
        assert len(found) > 5
        assert_alike(found, expected, 2e-3 if isinstance(model, RTDETR) else 1e-4)


def test_windows(model):
    if model.task != "rotated":
        pytest.skip("of rotated boxes")
    image = np.random.default_rng(0).integers(0, 255, (150, 200, 3), np.uint8)
    expected = model.predict(image, patch_size=96, score_threshold=0.1)
    assert_alike(model.predictor(patch_size=96, score_threshold=0.1, batch_size=2).predict(image), expected)


def test_later_changes_of_the_weights_do_not_matter():
    model, image = busy("det"), images(1)[0]
    predictor = model.predictor()
    before = predictor.predict(image)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert len(before) and torch.equal(predictor.predict(image).boxes, before.boxes)
    assert torch.equal(pickle.loads(pickle.dumps(predictor)).predict(image).boxes, before.boxes)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_engines_find_the_same_in_every_kind_of_image(files, engine):
    predictor = Predictor(files[engine], batch_size=2, score_threshold=0.1, max_detections=40, threads=1)
    expected = busy("det").predict([*images(3), *ODD.values()], score_threshold=0.1, max_detections=40)
    found = predictor.predict([*images(3), *ODD.values()])
    assert sum(map(len, expected)) > 60
    for one, truth in zip(found, expected, strict=True):
        assert_alike(one, truth)
        assert np.array_equal(one.image, truth.image)
    for odd, truth in zip(ODD.values(), expected[3:], strict=True):
        assert_alike(predictor.predict(odd), truth)
    again = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(again.predict(images(1)[0]).boxes, predictor.predict(images(1)[0]).boxes)
    assert (again.task, again.class_names) == ("det", ("a", "b", "ç"))


@pytest.fixture(scope="module")
def export_once():
    """`export_onnx`, which takes half a minute, and makes one file of the same settings but once."""
    made, make = {}, export_module.export_onnx

    def export_onnx(graph, path, *settings):
        if str(settings) not in made:
            make(graph, path, *settings)
            made[str(settings)] = path.read_bytes()
        path.write_bytes(made[str(settings)])

    return export_onnx


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_weights_are_exported_for_another_runtime(files, dtype, caplog, tmp_path, monkeypatch, export_once):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(export_module, "export_onnx", export_once)
    settings = dict(score_threshold=0.1, max_detections=40, image_size=64)
    with caplog.at_level(logging.WARNING):
        predictor = Predictor(files["torch"], engine="openvino", dtype=dtype, batch_size=2, **settings)
    assert "exporting to a temporary file for openvino" in caplog.text
    expected = busy("det").predict(images(3), **settings)
    for found, truth in zip(predictor.predict(images(3)), expected, strict=True):
        if dtype == "auto":
            assert_alike(found, truth)
        else:
            assert len(truth) == len(found) == 40 or 0.8 < len(found) / len(truth) < 1.25
    assert list(tmp_path.iterdir())
    del predictor
    assert not list(tmp_path.iterdir())


def test_a_pool_of_processes_holds_one_each(files, tmp_path):
    paths = []
    for i, image in enumerate(images(4)):
        paths.append(str(tmp_path / f"{i}.png"))
        cv2.imwrite(paths[-1], image)
    predictor = busy("det").predictor(batch_size=2, score_threshold=0.1, max_detections=40)
    batches = [{"image": paths[:2], "id": [7, 8]}, {"image": np.array(paths[2:]), "id": np.array([9, 10])}]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        columns = pool.map(predictor, batches, chunksize=1)
    assert [list(found["id"]) for found in columns] == [[7, 8], [9, 10]]
    expected = predictor.predict(paths)
    for name in ("boxes", "scores", "labels"):
        column = np.concatenate([found[name] for found in columns])
        assert column.dtype == object and column.shape == (4,)
        for one, truth in zip(column, expected, strict=True):
            np.testing.assert_array_equal(one, getattr(truth, name).numpy())
    assert all("image" not in found and "rles" not in found for found in columns)


def test_columns_of_masks_and_of_arrays_of_one_size(model):
    predictor = model.predictor(score_threshold=0.1, max_detections=5)
    same = np.stack([images(1)[0]] * 3)
    columns = predictor({"image": same})
    expected = predictor.predict(list(same))
    assert columns.keys() == {"boxes", "scores", "labels"} | ({"rles"} if model.has_masks else set())
    assert [column.shape for column in columns.values()] == [(3,)] * len(columns)
    assert columns["boxes"][1].shape == (5, 5 if model.task == "rotated" else 4)
    if model.has_masks:
        assert columns["rles"][2] == expected[2].rles()


def test_bad_input_is_one_sentence(files, tmp_path):
    (tmp_path / "noise.onnx").write_bytes(b"\x00\x01noise")
    (tmp_path / "noise.pth").write_bytes(b"\x00\x01noise")
    model, onnx, xml = busy("det"), files["onnxruntime"], files["openvino"]
    for weights, options, words in (
        (model, dict(engine="tensorrt"), "engine 'tensorrt' is unknown; choose one of auto, torch, onnx"),
        (model, dict(dtype="int4"), "dtype 'int4' is unknown"),
        (model, dict(dtype="fp16"), "dtype 'fp16' is for GPUs: on a CPU take fp32 or bf16"),
        (model, dict(batch_size=0), "batch_size is 0"),
        (model, dict(candidates=0), "candidates is 0"),
        (onnx, dict(candidates=5), r"a\.onnx has its candidates from its export"),
        (model, dict(image_size=63), "multiple of 32"),
        (model, dict(score_threshold=2), "score_threshold is 2"),
        (model, dict(device="abacus"), "--device 'abacus' cannot be used"),
        (onnx, dict(batch_size=4), r"a\.onnx was exported for a batch_size of 2: 4 is more"),
        (xml, dict(batch_size=4), r"a\.xml was exported for a batch_size of 2: 4 is more"),
        (onnx, dict(engine="openvino"), r"a\.onnx is run by onnxruntime, not by openvino"),
        (xml, dict(engine="torch"), r"a\.xml is run by openvino, not by torch"),
        (onnx, dict(dtype="bf16"), r"a\.onnx cannot run in bf16: files of OpenVINO \(\.xml\) can"),
        (xml, dict(device="cuda"), r"--device 'cuda' cannot be used: .*a\.xml is run by OpenVINO, on the CPU"),
        (onnx, dict(device="cuda:1"), r"--device 'cuda:1' cannot be used: .*a\.onnx is run by ONNX Runtime, which"),
        (onnx, dict(device="abacus"), r"--device 'abacus' cannot be used: .*a\.onnx"),
        (tmp_path / "noise.onnx", {}, r"noise\.onnx cannot be read by ONNX Runtime"),
        (tmp_path / "noise.pth", {}, r"noise\.pth"),
        (tmp_path / "nowhere.xml", {}, r"nowhere\.xml does not exist"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            Predictor(weights, **options)
        assert "\n" not in str(raised.value)
    for batch in ([images(1)[0]], {"images": []}):
        with pytest.raises(UserError, match='a column "image"'):
            model.predictor()(batch)
    with pytest.raises(UserError, match=r"score_threshold of 0\.05: 0\.01 is below"):
        Predictor(onnx, score_threshold=0.01, max_detections=40).predict(images(1))
    with pytest.raises(UserError, match="96 pixels, not 64"):
        Predictor(onnx, image_size=64, max_detections=40).predict(images(1))


def test_an_engine_by_its_detector(files):
    engine = Predictor(files["onnxruntime"], max_detections=40).detector
    predictor = engine.predictor(max_detections=40)
    assert_alike(predictor.predict(images(1)[0]), engine.predict(images(1)[0], max_detections=40))
    assert pickle.loads(pickle.dumps(predictor)).detector.path == Path(files["onnxruntime"])


def test_the_command_line_takes_engine_dtype_and_batch_size(files, tmp_path, capsys):
    for i, image in enumerate(images(3)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    common = ["predict", f"{tmp_path}/*.png", "--out", str(tmp_path / "out"), "--weights"]
    assert main([*common, str(files["torch"]), "--batch-size", "2", "--dtype", "bf16"]) == 0
    assert main([*common, str(files["torch"]), "--engine", "torch", "--device", "cpu"]) == 0
    for options, words in (
        (["--dtype", "fp16"], "dtype 'fp16' is for GPUs"),
        (["--batch-size", "0"], "batch_size is 0"),
    ):
        assert main([*common, str(files["torch"]), *options]) == 2
        assert words in capsys.readouterr().err
    for options, words in (
        (["--batch-size", "3"], "exported for a batch_size of 2"),
        (["--engine", "openvino"], "is run by onnxruntime, not by openvino"),
        (["--device", "cuda:0"], "cannot be used"),
        (["--format", "dota"], "--format dota needs a model of rotated boxes"),
    ):
        assert main([*common, str(files["onnxruntime"]), *options]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1


def test_rgb_arrays_frames_and_columns(tmp_path):
    bgr = images(1)[0]
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    settings = dict(score_threshold=0.1, max_detections=30)
    predictor = busy("det").predictor(**settings, color="rgb")
    expected = busy("det").predictor(**settings).predict(bgr)
    cv2.imwrite(str(tmp_path / "a.png"), bgr)
    (of_file,) = predictor.stream(tmp_path / "a.png")
    (of_source,) = predictor.stream(iter_sources(tmp_path / "a.png"))
    (of_frame,) = predictor.stream([Frame("a.png", rgb, None, 0, is_video=False)])
    for found in (predictor.predict(rgb), predictor.predict(bgr, color="bgr"), of_file, of_source, of_frame):
        assert torch.equal(found.scores, expected.scores) and np.array_equal(found.image, bgr)
    assert torch.equal(torch.from_numpy(predictor({"image": [rgb]})["scores"][0]), expected.scores)
    again = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(again.predict(rgb).scores, expected.scores)
    with pytest.raises(UserError, match="color 'grb' is unknown"):
        busy("det").predictor(color="grb")


def test_a_stream_of_some_classes():
    predictor = busy("det").predictor(score_threshold=0.1, max_detections=30)
    frames = [Frame(f"{i}.png", image, None, i, is_video=False) for i, image in enumerate(images(3))]
    written = []
    found = list(predictor.stream(frames, classes=["ç", "A"], write=lambda frame, results: written.append(results)))
    expected = [results.only("a", "ç") for results in predictor.predict(images(3))]
    assert [results.labels.tolist() for results in found] == [results.labels.tolist() for results in expected]
    assert [results.labels.tolist() for results in written] == [results.labels.tolist() for results in expected]
    with pytest.raises(UserError, match="class 'd' is none of the model's: there are a, b, ç"):
        predictor.stream(frames, classes=["d"])


def test_a_stream_that_is_tracked_sees_low_scores_too(files):
    pytest.importorskip("trackers", reason="extra `track` is not installed")
    frames = [Frame(f"a_{i:06d}.jpg", images(1)[0], None, i, is_video=True, fps=25.0) for i in range(3)]
    for weights, low in ((busy("det"), 0.1), (files["onnxruntime"], 0.1)):
        predictor = Predictor(weights, score_threshold=0.5, max_detections=40)
        asked = []
        predict = predictor.detector.predict
        predictor.detector.predict = lambda batch, predict=predict, asked=asked, **options: (
            asked.append(options["score_threshold"]) or predict(batch, **options)
        )
        first, *later = list(predictor.stream(frames, track=True))
        assert set(asked) == {low}
        assert (first.track_ids == -1).all() and (first.scores >= 0.5).all()
        assert all((results.track_ids > 0).any() for results in later)
        assert all(((results.scores >= 0.5) | (results.track_ids > 0)).all() for results in later)
    engine = predictor.detector  # as if it had been exported for high scores alone
    engine.test_settings = replace(engine.test_settings, score_threshold=0.3)
    assert predictor._low_score(0.5) == 0.3
