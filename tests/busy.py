"""A model of random weights that finds much, for tests that compare two ways to detect."""

import numpy as np
import torch

from benches.confident import confident
from rtmdet_fast.models.detector import Detector


def busy(task: str) -> Detector:
    """A small model that finds much, as `confident` makes it: of RTMDet by its task, or with "rtdetr" of RT-DETR."""
    names = ["a", "b", "ç"]
    if task == "rtdetr":
        return confident(task, "r18", 96, names, num_queries=40, num_decoder_layers=2)
    return confident(task, "nano", 96, names)


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(96, 96), (60, 96), (96, 33), (200, 150), (17, 40)]
    return [rng.integers(0, 256, (*shapes[i % len(shapes)], 3), np.uint8) for i in range(count)]


def assert_alike(found, expected, score_tolerance=1e-4):
    """The same detections; those whose scores differ by rounding may have changed places."""
    assert len(found) == len(expected)
    away = (found.boxes[:, None] - expected.boxes).abs().amax(2) + (found.labels[:, None] != expected.labels) * 1e9
    nearest: list[int] = []
    for row in away:
        row[nearest] = torch.inf
        nearest.append(int(row.argmin()))
    expected = expected[nearest]
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=score_tolerance)
    assert found.labels.tolist() == expected.labels.tolist()
    if expected.predicted_masks is not None:
        logits, other = expected.predicted_masks.logits, found.predicted_masks.logits
        torch.testing.assert_close(other, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
        for field in ("scale", "shape", "stride", "offset"):
            assert getattr(found.predicted_masks, field) == getattr(expected.predicted_masks, field)


def without_like(found, expected):
    """How many of either have no detection of the other within 0.05 pixels and 1e-4 of score, of the same label."""
    if not len(found) or not len(expected):
        return len(found) + len(expected)
    near = (found.boxes[:, None] - expected.boxes).abs().amax(2) <= 0.05
    near &= (found.scores[:, None] - expected.scores).abs() <= 1e-4
    near &= found.labels[:, None] == expected.labels
    return int((~near.any(1)).sum() + (~near.any(0)).sum())
