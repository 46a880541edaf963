"""Frames in order and stages side by side; however the iteration ends, no thread is left."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast import Results, RTMDet, UserError
from rtmdet_fast.inference.sources import Frame
from rtmdet_fast.predictor.stream import Stream

PATIENCE = 60  # seconds after which a test that hangs fails


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def frames(count, error=None):
    for i in range(count):
        yield Frame(f"{i}.png", np.full((2, 3, 3), i, np.uint8), f"/pictures/{i}.png", i, False)
    if error is not None:
        raise error


def detect(images):
    """One detection each, whose score tells the image."""
    return [
        Results(x, torch.zeros(1, 4), torch.tensor([float(x.max())]), torch.zeros(1).long(), ("a",)) for x in images
    ]


def numbers(results):
    return [int(result.scores) for result in results]


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_frame_in_order(count, batch_size):
    sizes, written = [], []

    def counted(images):
        sizes.append(len(images))
        return detect(images)

    stream = Stream(frames(count), counted, batch_size=batch_size, write=lambda frame, result: written.append(frame))
    results = list(stream)
    assert numbers(results) == list(range(count))
    assert [result.path for result in results] == [f"/pictures/{i}.png" for i in range(count)]
    assert sizes == [batch_size] * (count // batch_size) + [count % batch_size] * bool(count % batch_size)
    assert [frame.index for frame in written] == list(range(count))
    assert set(stream.waited) == ({"read", "detect", "write"} if count else set())
    assert all(0 <= share <= 1 for share in stream.waited.values())


def test_the_next_frame_is_read_and_the_last_is_written_meanwhile():
    third_is_read, second_is_detected = threading.Event(), threading.Event()

    def read():
        for frame in frames(4):
            yield frame
            if frame.index == 1:  # asked for the third
                third_is_read.set()

    def slow(images):
        if images[0].max() == 0:
            assert third_is_read.wait(PATIENCE)
        if images[0].max() == 1:
            second_is_detected.set()
        return detect(images)

    def write(frame, result):
        assert frame.index > 0 or second_is_detected.wait(PATIENCE)

    assert numbers(Stream(read(), slow, write=write)) == [0, 1, 2, 3]


def test_a_slow_consumer_holds_up_the_reader():
    read, most = [], 0

    def counted():
        for frame in frames(60):
            read.append(frame)
            yield frame

    for taken, _ in enumerate(Stream(counted(), detect, batch_size=2), start=1):
        most = max(most, len(read) - taken)
    # two queues of 4, a batch in the detector's hands, which hands out another, a frame in the reader's
    assert len(read) == 60 and most <= 4 + 4 + 2 + 1


def test_the_end_by_the_consumer_ends_the_threads():
    closed = []

    def endless():
        try:
            while True:
                yield from frames(3)
        finally:
            closed.append(threading.current_thread().name)

    for taken, _ in enumerate(Stream(endless(), detect, write=lambda *pair: None)):
        if taken == 4:
            break
    assert closed == ["stream: read"]
    with pytest.raises(ZeroDivisionError):
        for _ in Stream(frames(9), detect):
            _ = 1 / 0


@pytest.mark.parametrize("stage", ["read", "detect", "write"])
@pytest.mark.parametrize("error", [UserError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_error_of_a_stage_comes_after_what_was_found_before(stage, error, batch_size):
    def failing(images):
        if stage == "detect" and images[0].max() == 4:
            raise error
        return detect(images)

    def write(frame, result):
        if stage == "write" and frame.index == 4:
            raise error

    found = []
    with pytest.raises(type(error)) as raised:
        for result in Stream(
            frames(6, error if stage == "read" else None), failing, batch_size=batch_size, write=write
        ):
            found.append(result)  # noqa: PERF402
    assert raised.value is error
    assert numbers(found) == list(range(6 if stage == "read" else 4))


CTRL_C = """
import os, signal, threading
from test_stream import Stream, detect, frames

def interrupted(images):
    if images[0].max() == 2:
        os.kill(os.getpid(), signal.SIGINT)
        assert arrived.wait(60)  # the stream, as it ends, waits for this frame
    return detect(images)

def told(*arguments):
    arrived.set()
    signal.default_int_handler(*arguments)

arrived, found = threading.Event(), []
signal.signal(signal.SIGINT, told)
try:
    for result in Stream(frames(9), interrupted):
        found.append(result)
except KeyboardInterrupt:
    assert len(found) <= 2 and not [t for t in threading.enumerate() if t.name.startswith("stream")]
    print("stopped")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_ctrl_c():
    # OpenVINO gives threads a stack for signals, which goes with its model: after that a signal ends the process
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "stopped", done.stderr


def test_a_limit_reads_no_frame_more():
    asked = []

    def camera():
        for i in range(9):
            asked.append(i)
            yield next(frames(1))

    stream = Stream(camera(), detect, limit=3)
    assert len(list(stream)) == 3 and asked == [0, 1, 2] and stream.total == 3
    assert Stream(camera(), detect, limit=3, total=2).total == 2


def test_the_bar_tells_which_stage_waits(capsys):
    list(Stream(frames(3), detect, total=3, write=lambda *pair: None, progress=True))
    bar = capsys.readouterr().err
    assert "3/3" in bar and "frame/s" in bar
    assert all(f"{stage} " in bar.rpartition("waits: ")[2] for stage in ("read", "detect", "write"))


def test_a_predictor_streams_files_videos_and_frames(tmp_path, caplog):
    torch.manual_seed(0)
    model = RTMDet("nano", num_classes=2)
    for conv in model.bbox_head.rtm_reg:  # boxes of some size around every prior
        torch.nn.init.constant_(conv.bias, 1.5)
    pictures = [np.random.default_rng(i).integers(0, 255, (40, 30 + i, 3), np.uint8) for i in range(4)]
    for i, picture in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture)
    predictor = model.predictor(image_size=64, score_threshold=0, max_detections=3, batch_size=3)
    expected = predictor.predict(pictures)
    found = list(predictor.stream(tmp_path))
    assert [result.path for result in found] == [str(tmp_path / f"{i}.png") for i in range(4)]
    for result, truth in zip(found, expected, strict=True):
        assert torch.equal(result.boxes, truth.boxes) and len(result) == 3
        assert np.array_equal(result.image, truth.image)
    assert len(list(predictor.stream([tmp_path / "0.png", str(tmp_path / "1.png")], limit=1))) == 1
    assert len(list(predictor.stream(frames(5)))) == 5
    (tmp_path / "2.png").write_bytes(b"not an image")
    found = []
    with pytest.raises(UserError, match=r"2\.png"):
        for result in predictor.stream(tmp_path):
            found.append(result)
    assert len(found) == 2
    with caplog.at_level(logging.ERROR):
        assert len(list(predictor.stream(tmp_path, skip_bad=True))) == 3
