"""Augmentation of rotated boxes: that pixels and boxes move together, and as often as in the published pipeline."""

import math

import numpy as np
import pytest

from rtmdet_fast.class_names import DOTA_CLASSES
from rtmdet_fast.data.augment import collate
from rtmdet_fast.data.augment_rotated import RotatedAugmenter, transform_boxes
from rtmdet_fast.data.coco import Sample
from rtmdet_fast.data.plan import SamplePlan
from rtmdet_fast.data.recipes import RotatedRecipe, rotated_recipe
from rtmdet_fast.geometry.rotated import boxes_to_quads
from rtmdet_fast.inference.preprocess import letterbox


class Images:
    """One image, as often as wanted."""

    def __init__(self, image, boxes, labels=None):
        self.image, self.boxes = image, np.array(boxes, np.float32).reshape(-1, 5)
        self.labels = np.zeros(len(self.boxes), np.int64) if labels is None else np.array(labels)

    def __len__(self):
        return 1

    def load(self, index):
        return Sample(self.image, self.boxes, self.labels, 1, "image.png")


def augmented(images, seed, **recipe):
    image, boxes, labels = RotatedAugmenter(images, RotatedRecipe(**recipe))[SamplePlan(0, seed)]
    return image.permute(1, 2, 0).numpy(), boxes.numpy(), labels.numpy()


def drawn(width, height, box):
    """A grey image with a bright rotated rectangle, a pixel of which is as bright as it is covered (nearly)."""
    x, y = np.meshgrid(np.arange(width) + 0.5 - box[0], np.arange(height) + 0.5 - box[1])
    cos, sin = math.cos(box[4]), math.sin(box[4])
    depth_u, depth_v = box[2] / 2 - np.abs(x * cos + y * sin), box[3] / 2 - np.abs(y * cos - x * sin)
    covered = np.clip(depth_u + 0.5, 0, 1) * np.clip(depth_v + 0.5, 0, 1)
    return np.repeat(np.round(40 + 200 * covered)[..., None], 3, 2).astype(np.uint8)


@pytest.mark.parametrize("size", [(240, 150), (150, 240), (128, 128)])
def test_pixels_and_boxes_move_together(size):
    width, height = size
    box = (width * 0.55, height * 0.47, 60, 24, 0.5)
    images = Images(drawn(width, height, box), [box])
    turned = 0
    for seed in range(40):
        image, boxes, _ = augmented(images, seed, image_size=160)
        assert image.shape == (160, 160, 3) and boxes.shape == (1, 5) and boxes.dtype == np.float32
        bright = np.argwhere(image[..., 0] > 140)[:, ::-1] + 0.5
        mean = bright.mean(0)
        assert np.abs(mean - boxes[0, :2]).max() < 0.4
        values, vectors = np.linalg.eigh(np.cov((bright - mean).T))
        # the variance of a uniform distribution over a side of length s is s^2 / 12
        assert np.abs(np.sqrt(12 * values[::-1]) - boxes[0, 2:4]).max() < 0.6
        angle = math.atan2(vectors[1, 1], vectors[0, 1]) - boxes[0, 4]
        assert abs((angle + math.pi / 2) % math.pi - math.pi / 2) < 0.04
        assert -math.pi / 2 <= boxes[0, 4] < math.pi / 2 and boxes[0, 2] >= boxes[0, 3]
        turned += bool((image == 0).all(-1).any())
    assert 10 < turned < 30


def motions(label, count=3000, **recipe):
    """What happened to a box right of and above the middle of a square: (mirrored, degrees turned) of each plan."""
    image = np.zeros((32, 32, 3), np.uint8)
    # An arrow of two boxes: their long sides tell the turn modulo 180 degrees, their places the rest.
    images = Images(image, [[18, 16, 4, 1, 0], [16, 15, 4, 1, 0]], [label, label])
    found = []
    for seed in range(count):
        _, boxes, _ = augmented(images, seed, image_size=32, **recipe)
        (ax, ay), (bx, by) = boxes[:, :2] - 16  # images of (2, 0) and (0, -1)
        mirrored = ax * by - ay * bx > 0  # their determinant is -2 times that of the map
        found.append((mirrored, math.degrees(math.atan2(ay, ax)) % 360))
    mirrored, degrees = np.array(found).T
    return mirrored.astype(bool), degrees


def test_as_often_as_published():
    """RandomFlip(.75, horizontal | vertical | diagonal), then RandomRotate(.5, within 180 degrees)."""
    mirrored, degrees = motions(0)
    nearest = np.round(degrees / 90) * 90
    straight = np.abs(degrees - nearest) < 1e-3
    assert straight.mean() == pytest.approx(0.5, abs=0.03)
    assert set(nearest[straight] % 360) == {0, 180}
    # left to right and upside down mirror, both together turn by 180 degrees
    for mirror, degree in ((False, 0), (True, 180), (True, 0), (False, 180)):
        share = ((mirrored == mirror) & (nearest % 360 == degree))[straight].mean()
        assert share == pytest.approx(0.25, abs=0.04), (mirror, degree)
    assert mirrored[~straight].mean() == pytest.approx(0.5, abs=0.05)
    counts, _ = np.histogram(degrees[~straight], 12, (0, 360))
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_upright_classes_turn_by_right_angles_only():
    """RandomRotate(rect_obj_labels=[9, 11]) draws from 90, 180, -90 and -180 degrees."""
    mirrored, degrees = motions(3, flip_prob=0.0, upright_labels=(3,))
    nearest = np.round(degrees / 90) * 90
    assert np.abs(degrees - nearest).max() < 1e-3 and not mirrored.any()
    shares = [(nearest % 360 == degree).mean() for degree in (0, 90, 180, 270)]
    assert shares == pytest.approx([0.5, 0.125, 0.25, 0.125], abs=0.03)


def test_recipe_finds_the_upright_classes_by_name():
    assert rotated_recipe(1024, DOTA_CLASSES).upright_labels == (9, 11)
    assert rotated_recipe(512, ["roundabout", "car"]).upright_labels == (0,)
    recipe = rotated_recipe(384, ["car"])
    assert (recipe.upright_labels, recipe.image_size) == ((), 384)
    assert (recipe.flip_prob, recipe.rotate_prob, recipe.border_value, recipe.pad_value) == (0.75, 0.5, 0, 114)


def test_without_flip_and_rotation_it_is_the_letterbox_of_the_tests():
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(70, 121, 3), dtype=np.uint8)
    images = Images(image, [[60, 30, 20, 10, 0.3]])
    found, boxes, _ = augmented(images, 0, image_size=96, flip_prob=0.0, rotate_prob=0.0)
    canvas, (sx, sy) = letterbox(image, 96)
    assert np.array_equal(found, canvas)
    assert boxes[0, :2] == pytest.approx([60 * sx, 30 * sy]) and boxes[0, 4] == pytest.approx(0.3, abs=0.01)


def test_right_angles_move_the_pixels_of_a_square_image_unchanged():
    image = np.random.default_rng(0).integers(1, 256, size=(48, 48, 3), dtype=np.uint8)
    images = Images(image, [[10, 20, 6, 3, 0]])
    turns = {np.rot90(image, k).tobytes(): k for k in (1, 2, 3)}
    seen = set()
    for seed in range(12):
        found, boxes, _ = augmented(images, seed, image_size=48, flip_prob=0.0, rotate_prob=1.0, upright_labels=(0,))
        k = turns[found.tobytes()]
        assert boxes[0, :2] == pytest.approx({1: (20, 38), 2: (38, 28), 3: (28, 10)}[k], abs=1e-4)
        seen.add(k)
    assert seen == {1, 2, 3}


def test_corners_that_a_rotation_opens_are_black_and_the_padding_is_grey():
    images = Images(np.full((60, 100, 3), 200, np.uint8), [[50, 30, 10, 5, 0]])
    for seed in range(20):
        image, _, _ = augmented(images, seed, image_size=100, rotate_prob=1.0)
        assert (image[60:] == 114).all()
        assert {0, 200} <= set(np.unique(image[:60]))


def test_boxes_whose_centre_leaves_the_image_are_dropped():
    # at the far corners: a turn by 90 degrees of a 3:1 image takes them out
    images = Images(
        np.zeros((40, 120, 3), np.uint8), [[3, 3, 30, 10, 0], [60, 20, 9, 5, 0], [118, 38, 4, 2, 1]], [0, 1, 2]
    )
    counts = set()
    for seed in range(30):
        _, boxes, labels = augmented(images, seed, image_size=120, rotate_prob=1.0)
        assert len(boxes) == len(labels) and 1 in labels
        assert ((boxes[:, :2] >= 0) & (boxes[:, :2] <= [120, 40])).all()
        counts.add(len(boxes))
    assert {1, 3} & counts and min(counts) < 3
    lonely = Images(np.zeros((40, 120, 3), np.uint8), [[3, 3, 30, 10, 0]])
    samples = [
        RotatedAugmenter(lonely, RotatedRecipe(image_size=64, rotate_prob=1.0))[SamplePlan(0, seed)]
        for seed in range(8)
    ]
    batch = collate(samples)
    assert batch.gt_boxes.shape == (8, 1, 5) and batch.images.shape == (8, 3, 64, 64)
    assert 0 in batch.gt_counts.tolist()


def test_the_plan_decides_the_sample():
    images = Images(np.random.default_rng(0).integers(256, size=(50, 64, 3), dtype=np.uint8), [[30, 20, 9, 5, 0]])
    first, again, other = (augmented(images, seed, image_size=64) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_boxes_under_unequal_scales_keep_their_long_direction():
    matrix = np.diag([2.0, 2.02, 1.0])
    box = np.array([[10, 20, 30, 8, 0.4]], np.float32)
    found = transform_boxes(box, matrix)
    ends = boxes_to_quads(box).reshape(4, 2) @ matrix[:2, :2].T
    made = boxes_to_quads(found).reshape(4, 2)
    assert made[1] - made[0] == pytest.approx(ends[1] - ends[0], abs=1e-3)
    assert made.mean(0) == pytest.approx(ends.mean(0), abs=1e-3)
