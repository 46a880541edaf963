"""Exported files of trained weights: their average precision, and their detections in real images.

`RTMDET_FAST_WEIGHTS=FILE RTMDET_FAST_DATA=FOLDER` takes weights of your own, of whatever task, beside the two published
ones (`-m slow -k own`).
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from busy import assert_alike
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rtmdet_fast import RTMDet
from rtmdet_fast.cli import main
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.evaluation.evaluate import evaluate
from rtmdet_fast.export.engine import load_engine
from rtmdet_fast.export.export import export
from rtmdet_fast.export.openvino import convert_to_openvino
from rtmdet_fast.models.families import load_model
from rtmdet_fast.tasks import TASKS

pytest.importorskip("onnx", reason="extra `export` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra `export` is not installed")

AP = {"bccd": 0.478, "nano": 0.3616}
"""Of the checkpoints that `trained` opens: mmdet's figure, and that of `rtmdet-fast eval`."""


def trained(name, shared, folder):
    """A model, and its validation images: RTMDet-tiny of blood cells, the official nano, or one's own."""
    if name == "own":
        weights, data = (os.environ.get(f"RTMDET_FAST_{what}") for what in ("WEIGHTS", "DATA"))
        if weights is None or data is None:
            pytest.skip("RTMDET_FAST_WEIGHTS and RTMDET_FAST_DATA name no weights and data of your own")
        model = load_model(weights)
        sources = find_sources((Path(data),), "val")
        return model, TASKS[model.task].open_dataset(sources, class_names=model.class_names)
    if name == "bccd":
        model = RTMDet.from_pretrained(shared / "reference/mmdet_checkpoint_bccd_rtmdet_tiny.pth")
        model.image_size = 256
        annotations, images = shared / "data/bccd/val.json", shared / "data/bccd/images"
    else:
        model = official_nano(shared / "reference/weights", folder)
        annotations, images = shared / "data/coco206/instances.json", folder / "data"
        link_coco206(shared, images)
    return model, CocoDataset(annotations, images, class_names=model.class_names)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("nano", "own")]


@pytest.fixture(scope="module", params=["bccd", *SLOW])
def exported_checkpoint(request, shared, tmp_path_factory):
    """Its name, model and data set, and its file with open sides and batch."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model, dataset = trained(request.param, shared, folder)
    export(model, folder / "a.onnx", dynamic=True)
    return request.param, model, dataset, folder / "a.onnx"


@pytest.mark.parametrize("side", [256, 320])
def test_predictions_of_trained_weights_on_real_images(exported_checkpoint, side):
    _, model, dataset, path = exported_checkpoint
    photos = [dataset.image_dir / file for file in dataset.files[:20]]
    settings = dict(score_threshold=0.05, image_size=side)
    expected = model.predict(photos, **settings)
    assert len(photos) == 20 and sum(map(len, expected)) > 200
    for batch_size in (1, 4):
        found = load_engine(path, threads=1).predict(photos, batch_size=batch_size, **settings)
        for one, truth in zip(found, expected, strict=True):
            assert_alike(one, truth)


def test_average_precision_is_that_of_the_checkpoint(exported_checkpoint, tmp_path):
    weights, model, dataset, path = exported_checkpoint
    engines = {"onnxruntime": (load_engine(path, threads=1), 1e-3)}
    if importlib.util.find_spec("openvino"):
        import openvino

        convert_to_openvino(path, tmp_path / "a.xml", engines["onnxruntime"][0].metadata)
        engines["openvino"] = load_engine(tmp_path / "a.xml", threads=1), 1e-3
        if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            engines["openvino, bf16"] = load_engine(tmp_path / "a.xml", threads=1, dtype="bf16"), 3e-3
    criterion = TASKS[model.task].criterion
    expected = AP[weights] if weights in AP else evaluate(model, dataset, progress=False).metrics[criterion]
    found = {}
    for name, (engine, _) in engines.items():
        found[name] = evaluate(engine, dataset, progress=False).metrics[criterion]
    print(f"{weights}, {criterion} {expected:.4f}: {', '.join(f'{name} {ap:.4f}' for name, ap in found.items())}")
    for name, (_, tolerance) in engines.items():
        assert found[name] == pytest.approx(expected, abs=tolerance), name


@pytest.mark.slow  # g++ takes a minute and more
@pytest.mark.parametrize("weights", AP)
def test_average_precision_of_compiled_files(weights, shared, tmp_path):
    model, dataset = trained(weights, shared, tmp_path)
    model.export(tmp_path / "a.pt2")
    found = evaluate(load_engine(tmp_path / "a.pt2"), dataset, progress=False).metrics["AP"]
    print(f"{weights} by aotinductor: AP {found:.4f}")
    assert found == pytest.approx(AP[weights], abs=1e-3)


def official_nano(folder, tmp_path):
    """The person detector that was published as an ONNX file."""
    subprocess.run([sys.executable, folder / "nano_from_onnx.py", tmp_path / "nano.pth"], check=True)
    return RTMDet.from_pretrained(tmp_path / "nano.pth")


def link_coco206(shared, folder):
    folder.mkdir(exist_ok=True)
    for source in ("coco206", "coco_tiny"):
        for image in (shared / "data" / source / "val").iterdir():
            (folder / image.name).symlink_to(image)


@pytest.mark.slow
def test_detections_are_those_of_the_file_that_mmdeploy_exported(shared, tmp_path):
    """Weights of an official end-to-end file, at its settings, on 206 images: what differs is what NMS clips first."""
    import onnx
    from onnx import numpy_helper

    official, names = (
        onnx.load(shared / f"reference/weights/{name}.onnx") for name in ("end2end", "rtmdet_nano_person_rawheads")
    )
    weights, renamed = ({w.name: w for w in file.graph.initializer} for file in (official, names))
    convs = ([node for node in file.graph.node if node.op_type == "Conv"] for file in (official, names))
    for theirs, ours in zip(*convs, strict=True):
        for source, target in zip(theirs.input[1:], ours.input[1:], strict=True):
            assert weights[source].dims == renamed[target].dims
            renamed[target].raw_data = numpy_helper.to_array(weights[source]).tobytes()
    folder = tmp_path / "weights"
    folder.mkdir()
    onnx.save(names, folder / "rtmdet_nano_person_rawheads.onnx")
    shutil.copy(shared / "reference/weights/nano_from_onnx.py", folder)
    settings = dict(score_threshold=0.05, iou_threshold=0.6, max_detections=100)
    official_nano(folder, tmp_path).export(tmp_path / "ours.onnx", **settings, candidates=5000)

    link_coco206(shared, tmp_path / "images")
    detect = runpy.run_path(str(Path(__file__).parents[2] / "examples/onnx_client.py"))["detect"]
    sessions = [
        onnxruntime.InferenceSession(str(path))
        for path in (shared / "reference/weights/end2end.onnx", tmp_path / "ours.onnx")
    ]
    truth = COCO(str(shared / "data/coco206/instances.json"))
    rows, alone, total = ([], []), 0, 0
    for info in truth.loadImgs(truth.getImgIds()):
        image = cv2.imread(str(tmp_path / "images" / info["file_name"]))
        height, width = image.shape[:2]
        side = max(height, width)  # of the square that the network sees
        found = [detect(session, image, 320, 0.05)[0].clip(0, side) for session in sessions]
        near = np.abs(found[0][:, None] - found[1]) < (0.05, 0.05, 0.05, 0.05, 1e-4)
        alone += int((~near.all(2).any(1)).sum() + (~near.all(2).any(0)).sum())
        total += sum(map(len, found))
        for dets, result in zip(found, rows, strict=True):
            result += [[info["id"], x1, y1, x2 - x1, y2 - y1, score, 1] for x1, y1, x2, y2, score in dets.tolist()]
    assert total > 20_000 and alone <= 0.005 * total
    ap = [_person_ap(truth, np.array(result)) for result in rows]
    assert ap[0] == pytest.approx(0.3562, abs=1e-3) and ap[1] == pytest.approx(ap[0], abs=1e-3)


def _person_ap(truth, rows):
    scored = COCOeval(truth, truth.loadRes(rows), "bbox")
    scored.params.catIds = [1]
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    return scored.stats[0]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "room"), [("bccd", 0.005), ("nano", 0.012), ("own", 0.01)])
def test_average_precision_in_8_bits(weights, room, shared, tmp_path):
    pytest.importorskip("nncf", reason="extra `openvino` is not installed")
    model, dataset = trained(weights, shared, tmp_path)
    if weights == "own":
        data = Path(os.environ["RTMDET_FAST_DATA"])
        photos = data / "train"
    else:
        data = tmp_path / "set"
        (data / "annotations").mkdir(parents=True)
        shutil.copy(dataset.annotation_path, data / "annotations/instances_val.json")
        (data / "val").symlink_to(dataset.image_dir)
        photos = shared / "data/coco_tiny/train"
    if weights == "bccd":
        photos, source = tmp_path / "photos", shared / "data/bccd"
        photos.mkdir()
        for image in json.loads((source / "train.json").read_text())["images"]:
            (photos / image["file_name"]).symlink_to(source / "images" / image["file_name"])
    model.save(tmp_path / "w.pth")
    options = ["--int8", "--calibrate", photos, "--data", data, "--json", tmp_path / "told.json"]
    assert main([*map(str, ["export", "--weights", tmp_path / "w.pth", "--out", tmp_path / "a.xml", *options])]) == 0
    told, criterion = json.loads((tmp_path / "told.json").read_text()), TASKS[model.task].criterion
    before, after = (told[when][criterion] for when in ("before", "after"))
    print(f"{weights}, {criterion} {before:.4f}, in 8 bits {after:.4f}")
    expected = AP.get(weights, before)
    assert before == pytest.approx(expected, abs=1e-3)
    assert after == pytest.approx(expected, abs=room)
