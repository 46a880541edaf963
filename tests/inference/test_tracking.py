"""Objects keep their ids over frames, gaps and low scores; videos are tracked each for itself."""

import sys

import numpy as np
import pytest
import torch

from rtmdet_fast import Results, UserError
from rtmdet_fast.inference.masks import PredictedMasks
from rtmdet_fast.inference.sources import Frame
from rtmdet_fast.inference.tracking import Tracker, track_frames

NAMES = ("a", "b")


def found(boxes, scores, **kwargs):
    """Detections by falling score, as a model gives them."""
    order = np.argsort(scores)[::-1].copy()
    columns = len(boxes[0]) if len(boxes) else 4
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, columns)[order]
    scores = torch.tensor(scores, dtype=torch.float32)[order]
    return Results(None, boxes, scores, torch.zeros(len(scores)).long(), NAMES, shape=(200, 300), **kwargs)


def at(x, y=50.0):
    return [x, y, x + 30, y + 40]


@pytest.fixture
def trackers():
    return pytest.importorskip("trackers", reason="extra `track` is not installed")


def test_an_object_keeps_its_id(trackers):
    tracker = Tracker(0.5, fps=25)
    seen = [tracker.update(found([at(10 + 4 * i), at(250 - 4 * i, 120)], [0.9 - 0.001 * i, 0.8])) for i in range(8)]
    assert seen[0].track_ids.tolist() == [-1, -1]
    assert all(results.track_ids.tolist() == [1, 2] for results in seen[1:])
    assert seen[3].boxes[0].tolist() == at(22) and seen[3].track_ids.dtype == torch.int64


def test_a_low_score_continues_a_track_and_begins_none(trackers):
    tracker = Tracker(0.5, fps=25)
    for i in range(4):
        tracker.update(found([at(10 + 4 * i)], [0.9]))
    weak = tracker.update(found([at(26), at(200)], [0.2, 0.3]))
    assert weak.track_ids.tolist() == [1] and weak.scores.tolist() == pytest.approx([0.2])
    assert len(tracker.update(found([], []))) == 0
    assert tracker.update(found([at(34)], [0.9])).track_ids.tolist() == [1]
    for _ in range(40):  # after which it is another object
        tracker.update(found([], []))
    again = [tracker.update(found([at(34)], [0.9])).track_ids.tolist() for _ in range(3)]
    assert again == [[-1], [2], [2]]


def test_rotated_boxes_and_masks_are_tracked_and_stay_as_they_are(trackers):
    tracker = Tracker(0.3)
    for i in range(3):
        rotated = found([[100 + 3 * i, 60, 30, 8, 1.2]], [0.9])
        tracked = tracker.update(rotated)
        assert torch.equal(tracked.boxes, rotated.boxes)
    assert tracked.track_ids.tolist() == [1]
    tracker = Tracker(0.3)
    masks = PredictedMasks(torch.randn(3, 25, 38), (1.0, 1.0), (200, 300))
    for _ in range(2):
        before = found([at(10), at(100), at(200)], [0.9, 0.8, 0.2], predicted_masks=masks)
        tracked = tracker.update(before)
    assert tracked.track_ids.tolist() == [1, 2] and torch.equal(tracked.masks, before.masks[:2])


def test_each_video_is_tracked_for_itself_and_no_id_comes_twice(trackers):
    update = track_frames(0.3)

    def frames(name, count, first, is_video=True):
        for i in range(count):
            frame = Frame(
                f"{name}_{i:06d}.jpg" if is_video else f"{name}{i}.jpg", None, None, first + i, is_video, 25.0
            )
            yield update(frame, found([at(10 + 2 * i)], [0.9])).track_ids.tolist()

    for _ in range(2):  # the same source once more
        assert list(frames("a", 3, 0)) == [[-1], [1], [1]]
        assert list(frames("b", 3, 3)) == [[-1], [2], [2]]
        assert list(frames("c", 3, 6, is_video=False)) == [[-1], [3], [3]]


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match=r"^tracking needs the package trackers: pip install 'rtmdet-fast\[track\]'$"):
        Tracker()
