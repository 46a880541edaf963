"""The path of a CUDA graph: uncaptured on a CPU and a device that is none, captured where there is a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from busy import assert_alike, busy, images

from rtmdet_fast.kernels._dispatch import AVAILABLE
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtmdet.model import HEADS
from rtmdet_fast.predictor import graphs
from rtmdet_fast.predictor.graphs import FrameGraph, GraphDetector

MODELS = [*HEADS, "rtdetr"]
SETTINGS = dict(score_threshold=0.3, max_detections=30)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return busy(request.param).fold()


@pytest.mark.parametrize("candidates", [1000, 5])  # with fewer than there are, the path without a graph is taken
def test_finds_what_predict_finds(model, candidates, monkeypatch):
    monkeypatch.setattr(model, "max_candidates", candidates)
    expected = model.predict(images(5), **SETTINGS)
    detector, postprocess, without = GraphDetector(model, batch_size=4), model.postprocess, []
    monkeypatch.setattr(model, "postprocess", lambda *args, **kw: without.append(1) or postprocess(*args, **kw))
    assert sum(map(len, expected)) > 20
    # Pillow's resize is met to a grey level, and the random network makes much of it
    tolerance = 2e-3 if isinstance(model, RTDETR) else 1e-4
    for found, truth in zip(detector.predict(images(5), batch_size=4, **SETTINGS), expected, strict=True):
        assert_alike(found, truth, tolerance)
    for i in range(5):
        assert_alike(detector.predict(images(5)[i], **SETTINGS), expected[i], tolerance)
    assert len(without) == (7 if candidates == 5 else 0)


@pytest.mark.skipif(not AVAILABLE, reason="without Triton no kernel is chosen")
@pytest.mark.parametrize("task", MODELS)
def test_nothing_that_is_captured_makes_the_host_wait(task):
    script = Path(__file__).parents[1] / "fake_gpu.py"
    environment = {**os.environ, "RTMDET_FAST_KERNELS": "torch"}
    done = subprocess.run([sys.executable, script, "graph", task], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "fine", done.stderr


def test_a_missing_frame_is_none_of_an_earlier_call(model):
    detector = GraphDetector(model, batch_size=4)
    detector.predict(images(4), batch_size=4)
    detector.predict(images(3), batch_size=4)
    (graph,) = detector._graphs.values()
    assert graph.sizes.tolist() == [*(list(image.shape[:2]) for image in images(3)), [0, 0]]


def test_graphs_are_few(model, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    detector = GraphDetector(model, batch_size=3)
    for count in (1, 2, 3):  # frames of all sizes share a graph
        detector.predict(images(count), batch_size=3)
    assert [key[0] for key in detector._graphs] == [1, 2, 3]
    detector.predict(images(1))
    detector.predict(images(1), image_size=64)
    assert [key[:2] for key in detector._graphs] == [(3, 96), (1, 96), (1, 64)]
    large = np.zeros((1000, 1100, 3), np.uint8)
    found = detector.predict([large, *images(1)], batch_size=3, **SETTINGS)
    ((key, graph),) = detector._graphs.items()  # of larger frames
    assert key[:2] == (2, 96) and graph.frames.shape == (2, 2**22)
    assert_alike(found[1], model.predict(images(1)[0], **SETTINGS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("task", MODELS)
def test_a_replay_is_the_eager_path_to_the_bit(task, dtype):
    """Two contrasting inputs, every output checked; the first replay is not the second input's, nor the reverse."""
    model = busy(task).fold().to("cuda", dtype)
    settings = replace(model.test_settings, **SETTINGS)
    captured, eager = (FrameGraph(model, 2, 2**16, 96, settings) for _ in range(2))
    rng = np.random.default_rng(0)
    dark, light = (rng.integers(low, low + 60, (2, 80, 96, 3), np.uint8) for low in (0, 190))
    with torch.no_grad():
        expected = []
        for pair in (dark, light):
            found = eager.detect(list(pair))
            expected.append((found, eager.packed.clone(), [x.clone() for x in leaves(eager.output)]))
        captured.capture(None)
        for turn in (0, 1, 0):
            found = captured.detect(list((dark, light)[turn]))
            truth, packed, output = expected[turn]
            assert torch.equal(captured.packed, packed) and not torch.equal(packed, expected[1 - turn][1])
            for one, other, opposite in zip(leaves(captured.output), output, expected[1 - turn][2], strict=True):
                assert torch.equal(one, other) and not torch.equal(one, opposite)
            for one, other in zip(found, truth, strict=True):
                assert all(map(torch.equal, one[:4], other[:4]))
                assert task != "ins" or torch.equal(one.masks.logits, other.masks.logits)
    assert not model.training and any(len(one.scores) for one in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("task", MODELS)
def test_a_predictor_on_a_gpu(task, dtype):
    model = busy(task)
    expected = model.predict(images(5), **SETTINGS)
    predictor = model.predictor(device="cuda", dtype=dtype, batch_size=2, **SETTINGS)
    assert isinstance(predictor.detector, GraphDetector)
    streamed = predictor.predict(images(5))
    for found, truth, single in zip(streamed, expected, images(5), strict=True):
        assert abs(len(found) - len(truth)) <= 5 and found.boxes.device.type == "cpu"
        if dtype == "fp32":
            assert abs(len(found) - len(truth)) <= 1
        alone = predictor.predict(single)
        assert abs(len(alone) - len(found)) <= 5
    pools = {graph._replay.__self__.pool() for graph in predictor.detector._graphs.values()}
    assert len(predictor.detector._graphs) == 2 and len(pools) == 1


def leaves(output):
    return [x for field in output for x in ([field] if isinstance(field, torch.Tensor) else field)]
