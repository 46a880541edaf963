"""The engines take turns on the same images; each one's figures are its own; what does not run is told in a line."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from busy import busy

from benches.confident import confident
from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.cli.benchmark import BenchmarkConfig
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.shapes import CLASSES as SHAPES
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.evaluation import benchmark as module
from rtmdet_fast.evaluation.benchmark import ENGINES, benchmark
from rtmdet_fast.evaluation.evaluate import evaluate
from rtmdet_fast.inference.detections import DetectSettings
from rtmdet_fast.predictor.graphs import GraphDetector


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a model that finds much."""
    model = confident("det", "nano", 64, SHAPES)
    path = tmp_path_factory.mktemp("weights") / "a.pth"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def shapes(weights, tmp_path_factory):
    """Drawn scenes in which the best of what the model finds is the truth."""
    found = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_val=3, image_size=64)
    dataset = CocoDataset(found.val_ann, found.val_images)
    detections = evaluate(RTMDet.from_pretrained(weights), dataset, progress=False).detections
    inside = [d for d in detections if min(d["bbox"][:2]) >= 0 and sum(d["bbox"][::2]) <= 64 >= sum(d["bbox"][1::2])]
    best = sorted((d for d in inside if min(d["bbox"][2:]) > 4), key=lambda d: -d["score"])[:12]
    truth = json.loads(found.val_ann.read_text())
    truth["annotations"] = [
        {**d, "id": i + 1, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0} for i, d in enumerate(best)
    ]
    found.val_ann.write_text(json.dumps(truth))
    return found


def test_the_command_measures_every_engine_that_is_asked_for(shapes, weights, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="extra `export` is not installed")
    out, engines = tmp_path / "found.json", ["pytorch", "folded", "onnxruntime"]
    options = ["--data", str(shapes.root), "--engines", *engines, "--rounds", "2", "--json", str(out)]
    assert main(["benchmark", "--weights", str(weights), "--device", "cpu", *options]) == 0
    found = json.loads(out.read_text())
    assert [engine["engine"] for engine in found["engines"]] == engines and found["absent"] == {}
    expected = evaluate(
        RTMDet.from_pretrained(weights), CocoDataset(shapes.val_ann, shapes.val_images), progress=False
    ).metrics
    assert expected["AP"] > 0.1
    for engine in found["engines"]:
        assert engine["metrics"] == pytest.approx(expected, abs=2e-3)
        assert engine["rounds"] == 2 and 0 < engine["median_ms"] <= engine["p95_ms"] and engine["images_per_second"] > 0
    sizes = [engine["bytes"] for engine in found["engines"]]
    assert sizes[0] == sizes[1] == weights.stat().st_size != sizes[2]
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["engine", "median", "ms", "p95", "ms", "images/s", "MB", "AP"]
    assert [row.split()[0] for row in rows] == engines


def test_the_command_measures_rtdetr(tmp_path):
    model, out = busy("rtdetr"), tmp_path / "found.json"
    model.save(tmp_path / "a.pth")
    options = [
        "--engines",
        "pytorch",
        "folded",
        "cuda-graph",
        "--rounds",
        "2",
        "--image-size",
        "64",
        "--batch-size",
        "2",
    ]
    command = ["benchmark", "--weights", str(tmp_path / "a.pth"), *options, "--device", "cpu", "--json", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert [engine["engine"] for engine in found["engines"]] == ["pytorch", "folded"] and found["batch_size"] == 2
    assert all(engine["median_ms"] > 0 for engine in found["engines"])
    assert found["absent"] == {"cuda-graph": "CUDA graphs need a GPU"}


class Recorder:
    """A detector that only remembers what it was asked."""

    image_size, test_settings = (
        64,
        DetectSettings(score_threshold=0.001, iou_threshold=0.6, nms_pre=9, max_detections=9),
    )

    def __init__(self, name, log):
        self.name, self.log = name, log

    def detect_images(self, images, image_size, patch_size, *, settings, batch_size):
        self.log.append((self.name, [int(image.sum()) for image in images], settings.score_threshold))


def test_engines_take_turns_there_and_back_on_the_same_images(monkeypatch, tmp_path):
    log = []
    (tmp_path / "a.pth").write_bytes(b"12345")
    monkeypatch.setattr(module, "load_model", lambda name: Recorder("model", log))
    engines = {name: lambda model, setup, name=name: (Recorder(name, log), setup.weights) for name in "abc"}
    monkeypatch.setattr(module, "ENGINES", engines)
    found, absent = benchmark([str(tmp_path / "a.pth")], tmp_path, batch_size=2, rounds=3, progress=False)
    assert [(x["engine"], x["rounds"], x["bytes"]) for x in found] == [("a", 3, 5), ("b", 3, 5), ("c", 3, 5)]
    assert not absent
    timed = log[3 * module.WARM_UPS :]
    assert [name for name, _, _ in timed] == list("abccbaabc")
    sums = [images for _, images, _ in timed]
    rounds = [sums[start : start + 3] for start in (0, 3, 6)]
    assert all(a == b == c and len(a) == 2 for a, b, c in rounds)
    assert rounds[0][0] != rounds[1][0] != rounds[2][0]
    assert {score for _, _, score in log} == {module.SCORE_THRESHOLD}


def test_figures_are_those_of_the_clock():
    contender = SimpleNamespace(seconds=[0.1, 0.3, 0.1, 0.1], bytes=7, dataset=None)
    found = module.figures(contender, batch_size=2, progress=False)
    assert found == {
        "median_ms": pytest.approx(100),
        "p95_ms": pytest.approx(270),
        "images_per_second": pytest.approx(8 / 0.6),
        "rounds": 4,
        "bytes": 7,
    }


def test_a_graph_is_for_gpus_and_evaluated_as_its_network_is(weights, shapes, tmp_path):
    _, absent = benchmark([str(weights)], tmp_path, engines=["folded", "cuda-graph"], rounds=1, device="cpu")
    assert absent == {"cuda-graph": "CUDA graphs need a GPU"}
    model, dataset = RTMDet.from_pretrained(weights), CocoDataset(shapes.val_ann, shapes.val_images)
    contender = module.Contender(
        detector=GraphDetector(model.fold(), 1), image_size=64, bytes=1, dataset=dataset, seconds=[1.0]
    )
    contender.call([dataset.load(0).image])
    metrics = module.figures(contender, 1, False)["metrics"]
    assert metrics == pytest.approx(evaluate(model, dataset, progress=False).metrics, abs=2e-3) and metrics["AP"] > 0.1


def test_an_engine_that_does_not_run_is_told_in_a_line(weights, monkeypatch, tmp_path, capsys):
    def broken(model, setup):
        raise RuntimeError("no operator of that name\nand a page of it")

    monkeypatch.setitem(ENGINES, "compiled", broken)

    def not_installed(*_, **__):
        raise UserError("onnx is not installed")

    monkeypatch.setattr(module, "export", not_installed)
    options = ["--rounds", "1", "--device", "cpu", "--json", str(tmp_path / "found.json"), "--engines"]
    command = ["benchmark", "--weights", str(weights), *options]
    assert main([*command, "folded", "compiled", "onnxruntime"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "compiled    does not run here: no operator of that name",
        "onnxruntime does not run here: onnx is not installed",
    ]
    assert json.loads((tmp_path / "found.json").read_text())["absent"].keys() == {"compiled", "onnxruntime"}
    assert main([*command, "compiled"]) == 2
    assert capsys.readouterr().err.endswith("error: no engine can be run here: compiled: no operator of that name\n")


def test_exports_are_made_once_and_int8_of_the_training_images(shapes, weights, monkeypatch, tmp_path):
    made, loaded = [], []

    def export(model, path, **settings):
        made.append((path.name, settings["int8"], settings["calibrate"]))
        path.parent.mkdir(exist_ok=True)
        for part in (path, path.with_suffix(".bin")):
            part.write_bytes(b"1")

    def load_engine(path, threads, dtype):
        loaded.append((path.name, threads, dtype))
        return Recorder(path.name, [])

    processor = SimpleNamespace(get_property=lambda device, name: ["FP32", "BF16"])
    monkeypatch.setattr(module, "import_openvino", lambda: SimpleNamespace(Core=lambda: processor))
    monkeypatch.setattr(module, "export", export)
    monkeypatch.setattr(module, "load_engine", load_engine)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: SimpleNamespace(metrics={"AP": 0.5}))
    options = ["--weights", str(weights), "--device", "cpu", "--rounds", "1", "--threads", "1", "--engines"]
    engines = ["openvino", "openvino-bf16", "openvino-int8", "pt2"]
    assert main(["benchmark", "--data", str(shapes.root), *options, *engines]) == 0
    assert made == [
        ("model.xml", False, None),
        ("int8.xml", True, shapes.train_images),
        ("model.pt2", False, None),
    ]
    assert loaded == [
        ("model.xml", 1, "auto"),
        ("model.xml", 1, "bf16"),
        ("int8.xml", 1, "auto"),
        ("model.pt2", 1, "auto"),
    ]
    processor.get_property = lambda device, name: ["FP32"]
    _, absent = benchmark([str(weights)], tmp_path, rounds=1, engines=["pytorch", *engines[1:3]], progress=False)
    assert absent == {
        "openvino-bf16": "this processor does not compute in bfloat16",
        "openvino-int8": "give images to calibrate with: --calibrate FOLDER, or --data FOLDER with a training split",
    }


def test_exported_files_and_several_weights_have_their_names(weights, monkeypatch, tmp_path):
    log = []
    monkeypatch.setattr(module, "load_engine", lambda name, threads: Recorder("file", log))
    for name in ("b.xml", "b.bin"):
        (tmp_path / name).write_bytes(b"123")
    found, _ = benchmark(
        [str(weights), str(tmp_path / "b.xml")], tmp_path, engines=["folded"], rounds=1, device="cpu", progress=False
    )
    assert [(x["engine"], x["bytes"]) for x in found] == [("a.pth folded", weights.stat().st_size), ("b.xml", 6)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engines", "bogus"], "--engines 'bogus' is unknown; choose of pytorch, "),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--threads", "-1"], "--threads is -1; it must be at least 1"),
        (["--image-size", "100"], "image size 100 is not a positive multiple of 32"),
        (["--data", "nowhere"], "--data nowhere is not there: give a folder or a data.yaml"),
    ],
)
def test_bad_options_are_named(weights, options, words, capsys):
    assert main(["benchmark", "--weights", str(weights), *options]) == 2
    assert words in capsys.readouterr().err


def test_help_names_the_engines():
    told = " ".join(inspect.getsource(BenchmarkConfig).split())
    assert f'"""{", ".join(ENGINES)}; all where not given."""' in told


def test_images_are_repeated_where_a_data_set_has_fewer(shapes):
    dataset = CocoDataset(shapes.val_ann, shapes.val_images)
    images = module.sample_images(dataset, 64, 7)
    assert all(np.array_equal(images[i], dataset.load(i % 3).image) for i in range(7))
