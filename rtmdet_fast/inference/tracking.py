"""Which detections of a video's frames are the same object: ByteTrack (arXiv:2110.06864), by the package trackers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.sources import DEFAULT_FPS, Frame

LOW_SCORE = 0.1
"""Detections from here on may continue a track, as published; below the score threshold none begins."""


class Tracker:
    """Gives the detections of one video's frames the ids of their objects: `results = tracker.update(results)`.

    It goes by boxes alone (of rotated ones the upright boxes around them), whatever their classes. An object has its id
    from its second frame on, and keeps it for a second in which it is not seen.

    Args:
        score_threshold: least score of an object that is new.
        fps: frames a second of the video.
        first_id: of the first object.

    Raises UserError where the package trackers is not installed.
    """

    def __init__(self, score_threshold: float = 0.3, fps: float = DEFAULT_FPS, first_id: int = 1) -> None:
        try:
            from trackers import ByteTrackTracker
        except ImportError:
            raise UserError("tracking needs the package trackers: pip install 'rtmdet-fast[track]'") from None
        self.score_threshold, self.next_id = score_threshold, first_id
        self._ids: dict[int, int] = {}
        self._tracker = ByteTrackTracker(
            frame_rate=fps,
            track_activation_threshold=score_threshold,
            high_conf_det_threshold=score_threshold,
        )

    def update(self, results: Results) -> Results:
        """The next frame's detections with `track_ids`, in their order; those below the score threshold are dropped
        but where they continue a track, for which a model's `score_threshold` should be 0.1."""
        from supervision import Detections

        tracked = self._tracker.update(
            Detections(
                xyxy=results.xyxy().astype(np.float32),
                confidence=results.scores.numpy(),
                class_id=results.labels.numpy(),
                data={"index": np.arange(len(results))},
            )
        )
        ids = np.full(len(results), -1)
        if len(tracked):
            assert tracked.tracker_id is not None
            ids[tracked.data["index"]] = [self._id(int(track)) for track in tracked.tracker_id]
        kept = np.flatnonzero((ids >= 0) | (results.scores.numpy() >= self.score_threshold))
        found = results[kept]
        found.track_ids = torch.from_numpy(ids[kept])
        return found

    def _id(self, track: int) -> int:
        """Counted from `first_id` on, whatever the package counts from."""
        if track < 0:
            return -1
        if track not in self._ids:
            self._ids[track] = self.next_id
            self.next_id += 1
        return self._ids[track]


def track_frames(score_threshold: float) -> Callable[[Frame, Results], Results]:
    """What tracks the frames of a source, in their order; each of its videos anew, and its images as one more.

    No two objects of the source have the same id.
    """
    tracker = Tracker(score_threshold)  # that it is installed is seen at once
    video: Any = None

    def update(frame: Frame, results: Results) -> Results:
        nonlocal tracker, video
        if frame.video != video or frame.index == 0:
            first = 1 if frame.index == 0 else tracker.next_id
            tracker, video = Tracker(score_threshold, frame.fps or DEFAULT_FPS, first), frame.video
        return tracker.update(results)

    return update
