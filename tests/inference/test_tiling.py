"""Windows that cover an image, and detections that come out as from the whole of it."""

import itertools

import numpy as np
import pytest
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.geometry.windows import crop, window_starts, windows
from rtmdet_fast.inference.tiling import merge, predict_tiled


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("overlap", [0, 1, 6, 20])
def test_windows_cover_and_overlap(size, overlap):
    if overlap >= size:
        with pytest.raises(UserError, match="overlap"):
            window_starts(100, size, overlap)
        return
    for length in (1, size - 1, size, size + 1, 2 * size - overlap, 2 * size - overlap + 1, 501):
        starts = window_starts(max(length, 1), size, overlap)
        assert starts[0] == 0 and starts == sorted(set(starts))
        assert len(starts) == 1 or starts[-1] == length - size
        assert all(b - a <= size - overlap for a, b in itertools.pairwise(starts))
        # one fewer would not do
        assert len(starts) == 1 or (len(starts) - 2) * (size - overlap) + size < length


def test_windows_go_row_by_row():
    assert windows(10, 8, 6, 2) == [(0, 0), (4, 0), (0, 2), (4, 2)]
    assert windows(3, 3, 6, 2) == [(0, 0)]


def test_crop_pads_with_grey():
    image = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    patch = crop(image, 1, 2, 4)
    assert patch.shape == (4, 4, 3) and (patch[:3, :3] == image[2:, 1:]).all()
    assert (patch[3:] == 114).all() and (patch[:, 3:] == 114).all()


def dots(rng, shape, n):
    """An image of bright dots at least 6 px apart: [n] positions (x, y) and classes 0 (blue), 1, 2 by their channel."""
    image = np.zeros((*shape, 3), np.uint8)
    spots: list = []
    while len(spots) < n:
        x, y, label = int(rng.integers(shape[1])), int(rng.integers(shape[0])), int(rng.integers(3))
        if all(abs(x - a) + abs(y - b) > 6 for a, b, _ in spots):
            image[y, x, label] = 100 + len(spots)
            spots.append((x, y, label))
    return image, spots


def detector(box_dim, calls):
    def detect(patches):
        calls.append(len(patches))
        out = []
        for patch in patches:
            assert patch.shape == (64, 64, 3) and patch.dtype == np.uint8
            y, x, c = np.nonzero((patch >= 100) & (patch != 114))
            x, y = torch.tensor(x).float() + 0.5, torch.tensor(y).float() + 0.5
            if box_dim == 4:
                boxes = torch.stack([x - 2, y - 3, x + 2, y + 3], 1)
            else:
                boxes = torch.stack([x, y, torch.full_like(x, 6), torch.full_like(x, 4), torch.full_like(x, 0.7)], 1)
            scores = torch.tensor(patch[patch >= 100][patch[patch >= 100] != 114]).float() / 255
            out.append((boxes, scores, torch.tensor(c), "more"))
        return out

    return detect


@pytest.mark.parametrize("box_dim", [4, 5])
@pytest.mark.parametrize("shape", [(150, 201), (40, 100), (30, 30), (64, 64)])
def test_every_object_is_found_once(box_dim, shape):
    image, spots = dots(np.random.default_rng(1), shape, 10)
    image[image == 114] = 99  # the padding's grey
    calls: list[int] = []
    boxes, scores, labels = predict_tiled(
        detector(box_dim, calls),
        image,
        patch_size=64,
        overlap=20,
        batch_size=4,
        iou_threshold=0.5,
        max_detections=50,
    )
    assert boxes.shape == (10, box_dim) and (scores.diff() < 0).all()
    centres = boxes[:, :2] if box_dim == 5 else (boxes[:, :2] + boxes[:, 2:]) / 2
    assert [(x - 0.5, y - 0.5, c) for (x, y), c in zip(centres.tolist(), labels.tolist(), strict=True)] == spots[::-1]
    assert sum(calls) == len(windows(shape[1], shape[0], 64, 20)) and max(calls) <= 4
    if box_dim == 5:
        assert torch.allclose(boxes[:, 2:], torch.tensor([6.0, 4.0, 0.7]))


@pytest.mark.parametrize("box_dim", [4, 5])
def test_merging_is_by_class_and_limited(box_dim):
    box = torch.tensor([[10.0, 10, 20, 20]] if box_dim == 4 else [[15.0, 15, 10, 10, 0.3]])
    found = [
        (box, torch.tensor([0.5]), torch.tensor([0])),
        (box - torch.tensor([5.0, 0, 5, 0][:box_dim] if box_dim == 4 else [5.0, 0, 0, 0, 0]), *_one(0.9, 0)),
        (box, *_one(0.7, 1)),
        (box + torch.tensor([0.0, 200, 0, 200] if box_dim == 4 else [0.0, 200, 0, 0, 0]), *_one(0.8, 1)),
        (torch.zeros(0, box_dim), torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
    ]
    places = [(0, 0), (5, 0), (0, 0), (0, 0), (50, 50)]
    boxes, scores, labels = merge(found, places, 0.5, 10, (100, 100))
    assert torch.allclose(boxes, box.expand(2, -1)) and labels.tolist() == [0, 1]
    assert torch.allclose(scores, torch.tensor([0.9, 0.7]))
    assert len(merge(found, places, 0.5, 1, (100, 100))[0]) == 1


def _one(score, label):
    return torch.tensor([score]), torch.tensor([label])


def test_nothing_found():
    def detect(patches):
        return [(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0, dtype=torch.int64))] * len(patches)

    boxes, scores, labels = predict_tiled(
        detect,
        np.zeros((90, 70, 3), np.uint8),
        patch_size=64,
        overlap=8,
        batch_size=3,
        iou_threshold=0.1,
        max_detections=5,
    )
    assert boxes.shape == (0, 5) and scores.shape == labels.shape == (0,)
