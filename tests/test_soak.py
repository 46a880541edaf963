"""Thousands of steps and a hundred thousand frames: memory, open files and threads stay what they were."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
import torch
from footprint import Watch

from rtmdet_fast import RTMDet
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.train import train

ITERATIONS = int(os.environ.get("RTMDET_FAST_SOAK_ITERATIONS", "3000"))
FRAMES = int(os.environ.get("RTMDET_FAST_SOAK_FRAMES", "100000"))


def test_a_leak_is_seen():
    """Of memory, of files, of threads: the watch that the others rely on."""
    # In a process that holds little else, and in which nothing ends meanwhile.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for leak in ("memory", "files", "threads"):
            assert list(pool.submit(_growing, leak).result()) == [leak]


def _growing(leak):
    watch, held, end = Watch(), [], threading.Event()
    for _ in range(10):
        if leak == "memory":
            held.append(np.ones(2**22))
        elif leak == "files":
            held.append(open(os.devnull))  # noqa: SIM115
        else:
            held.append(threading.Thread(target=end.wait))
            held[-1].start()
        watch.look()
    with pytest.raises(AssertionError, match=leak):
        watch.assert_constant()
    end.set()
    for each in held:
        getattr(each, "close", getattr(each, "join", lambda: None))()
    return {name: growth for name, growth in watch.growth().items() if growth > (0.05 if name == "memory" else 0)}


FAMILIES = {
    "rtmdet": (ITERATIONS, dict(size="nano", save_every="2s", keep=3)),
    # whose matching is the host's, and of different sizes in each step; a checkpoint of it has 400 MB
    "rtdetr": (ITERATIONS // 6, dict(model="rtdetr", size="r18", queries=20, save_every="15s")),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_holds_no_more_at_its_end_than_after_warm_up(family, tmp_path, record_property, capsys):
    """With validation, checkpoints, mosaic and mixup (of RTMDet), loader processes and cached images."""
    least, settings = FAMILIES[family]
    shapes = make_shapes(tmp_path / "shapes", num_train=120, num_val=12, image_size=96)
    epochs = -(-least // (116 // 4))  # some scenes have no objects, and are left out
    config = TrainConfig(
        data=(tmp_path / "shapes",), out=tmp_path / "run", epochs=epochs, stage2_epochs=epochs // 10, batch_size=4,
        image_size=64, num_workers=1, cache="ram", device="cpu", val_interval=5, progress=False, report=False,
        **settings,
    )  # fmt: skip
    assert shapes.train_ann.exists()
    watch = Watch()

    class Look(Callback):
        def on_step(self, progress):
            if progress.iteration % max(least // 100, 1) == 0:
                watch.look()

    result = train(config, callbacks=[Look()])
    iterations = torch.load(result.last, weights_only=True)["training"]["iteration"]
    assert iterations >= least
    with capsys.disabled():
        print(f"\n{iterations:,} iterations: {watch.told()}")
    record_property("iterations watched", iterations)
    watch.assert_constant()


@pytest.mark.slow
def test_a_stream_holds_no_more_at_its_end_than_after_warm_up(tmp_path, record_property, capsys):
    each = 1000
    writer = cv2.VideoWriter(str(tmp_path / "video.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for i in range(each):
        writer.write(np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    torch.manual_seed(0)
    model = RTMDet("nano", num_classes=2)
    for conv in model.bbox_head.rtm_reg:  # boxes of some size around every prior
        torch.nn.init.constant_(conv.bias, 1.5)
    predictor = model.predictor(image_size=32, batch_size=16, score_threshold=0, max_detections=5)
    watch, count, written = Watch(), 0, []
    videos = [tmp_path / f"{number}.avi" for number in range(FRAMES // each)]
    for video in videos:
        os.link(tmp_path / "video.avi", video)
    stream = predictor.stream(videos, write=lambda frame, results: written.append(frame.index))
    for count, results in enumerate(stream, 1):
        assert len(results) == 5
        if count % (FRAMES // 100) == 0:
            watch.look()
            written.clear()
    assert count == FRAMES // each * each
    with capsys.disabled():
        print(f"\n{count:,} frames: {watch.told()}")
    record_property("frames watched", count)
    watch.assert_constant()
