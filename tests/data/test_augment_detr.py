"""RT-DETR's augmentation: pixels as Pillow makes them, boxes as published, draws by the published rules."""

import runpy

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from rtmdet_fast.data.augment import collate
from rtmdet_fast.data.augment_detr import (
    DetrAugmenter,
    Distortion,
    distort,
    draw_crop,
    draw_distortion,
    draw_zoom_out,
    project,
    resize_into,
)
from rtmdet_fast.data.coco import Sample
from rtmdet_fast.data.plan import SamplePlan
from rtmdet_fast.data.recipes import DetrRecipe, multi_scale_sizes
from rtmdet_fast.errors import UserError
from rtmdet_fast.inference.preprocess import squash

RECIPE = DetrRecipe(image_size=64)
TRANSFORMS = ("brightness", "contrast", "saturation", "hue", "permutation")


@pytest.fixture(scope="module")
def reference(shared):
    return torch.load(shared / "reference" / "rtdetr" / "preprocess_cases.pt", weights_only=True)


class Images:
    """One image, as often as wanted."""

    def __init__(self, image, boxes=()):
        self.image, self.boxes = image, np.array(boxes, np.float32).reshape(-1, 4)

    def __len__(self):
        return 1

    def load(self, index):
        return Sample(self.image, self.boxes, np.arange(len(self.boxes)), 1, "image.png")


def augmented(images, seed, stage2=False, **recipe):
    image, boxes, labels = DetrAugmenter(images, DetrRecipe(**{"image_size": 64, **recipe}))[
        SamplePlan(0, seed, stage2=stage2)
    ]
    return image.permute(1, 2, 0).numpy(), boxes.numpy(), labels.numpy()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def whole(image):
    return (0, 0, image.shape[1], image.shape[0])


def levels(a, b):
    """The largest difference of two images."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


class TorchDraws:
    """What the augmentation asks of a NumPy generator, from torch's: the published transforms draw from that."""

    def __init__(self, seed, window=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.window = window

    def random(self, shape=None):
        if shape is None:
            return torch.rand(1, generator=self.generator).item()
        drawn = np.zeros(shape)
        width, height = self.window[2] - self.window[0], self.window[3] - self.window[1]
        for trial in drawn.T:
            trial[:2] = torch.rand(2, generator=self.generator)
            # a crop of another aspect ratio has no place drawn for it
            if 0.5 <= int(width * (0.3 + 0.7 * trial[0])) / int(height * (0.3 + 0.7 * trial[1])) <= 2:
                trial[2:] = torch.rand(2, generator=self.generator)
        return drawn

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def integers(self, high):
        return torch.randint(0, high, (1,), generator=self.generator).item()

    def permutation(self, n):
        return torch.randperm(n, generator=self.generator).numpy()


def test_draws_are_the_published_ones(reference):
    seen = set()
    for case in reference["draws"]:
        height, width = case.get("size", (0, 0))
        rng = TorchDraws(case["seed"], (0, 0, width, height))
        if case["op"] == "zoom_out":
            left, top, right, bottom = case["padding"]
            expected = (-left, -top, width + right, height + bottom)
            assert draw_zoom_out(RECIPE, width, height, rng) == expected
        elif case["op"] == "iou_crop":
            r = case["result"]
            expected = (r["left"], r["top"], r["left"] + r["width"], r["top"] + r["height"])
            boxes = case["boxes"].numpy()
            assert draw_crop(RECIPE, (0, 0, width, height), boxes, rng) == expected
            _, kept = project(boxes, expected, 64, 1)
            assert kept.tolist() == r["is_within_crop_area"].tolist()
        else:
            drawn, r = draw_distortion(RECIPE, rng), case["result"]
            found = (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)
            expected = tuple(r[f"{name}_factor"] for name in TRANSFORMS[:4])
            assert [v is None for v in found] == [v is None for v in expected]
            assert [v for v in found if v is not None] == pytest.approx(
                [v for v in expected if v is not None], rel=1e-6, abs=1e-8
            )
            assert drawn.contrast_first == r["contrast_before"]
            permutation = r["channel_permutation"]
            assert drawn.permutation == (None if permutation is None else tuple(permutation.tolist()))
        seen.add(case["op"])
    assert seen == {"zoom_out", "iou_crop", "photometric"}


def test_colours_are_the_published_ones(reference, shared):
    uniform = runpy.run_path(str(shared / "reference" / "rtdetr" / "fixture_recipe.py"))["uniform"]
    for case in reference["colour"]:
        op = {"permute": "permutation"}.get(case["op"], case["op"])
        image = np.floor(256 * uniform("colour", (*case["size"], 3))).astype(np.uint8)[..., ::-1]
        value = tuple(case["value"]) if op == "permutation" else case["value"]
        found = distort(image, Distortion(**{op: value}), whole(image))[..., ::-1]
        tolerance = 0 if op in ("hue", "permutation", "brightness") else 1
        assert levels(found, case["output"].numpy()) <= tolerance, (op, value)


def published(image, d):
    """The distortion step by step with Pillow, of an image BGR."""
    pil = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))

    def contrast(pil, first):
        wanted = d.contrast is not None and d.contrast_first == first
        return ImageEnhance.Contrast(pil).enhance(d.contrast) if wanted else pil

    if d.brightness is not None:
        pil = ImageEnhance.Brightness(pil).enhance(d.brightness)
    pil = contrast(pil, True)
    if d.saturation is not None:
        pil = ImageEnhance.Color(pil).enhance(d.saturation)
    if d.hue is not None:
        hsv = np.array(pil.convert("HSV"))
        hsv[..., 0] += np.array(int(d.hue * 255)).astype(np.uint8)
        pil = Image.merge("HSV", [Image.fromarray(hsv[..., i]) for i in range(3)]).convert("RGB")
    pil = contrast(pil, False)
    rgb = np.asarray(pil)
    return rgb[..., list(d.permutation)][..., ::-1] if d.permutation is not None else rgb[..., ::-1]


def test_a_distorted_part_is_that_part_of_the_distorted_image():
    image = cv2.GaussianBlur(noise(60, 80), (0, 0), 3)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    part = (13, 7, 70, 41)
    kinds = set()
    for seed in range(60):
        drawn = draw_distortion(RECIPE, np.random.default_rng(seed))
        found, expected = distort(image, drawn, part), published(image, drawn)[7:41, 13:70]
        # a level of saturation may become one of hue, which is up to 6 levels of a channel; but for few pixels
        apart = np.abs(found.astype(int) - expected)
        assert (apart > 1).mean() < 0.01 and apart.max() <= 6, drawn
        kinds.add((drawn.contrast is None, drawn.contrast_first, drawn.hue is None, drawn.saturation is None))
    assert len(kinds) == 16


def test_distortion_leaves_its_input_alone():
    image = noise(20, 30)
    before = image.copy()
    for seed in range(20):
        distort(image, draw_distortion(RECIPE, np.random.default_rng(seed)), (2, 3, 20, 15))
    assert np.array_equal(image, before)


def test_boxes_move_as_published(reference):
    case = reference["boxes"]
    boxes, (height, width) = case["input"].numpy(), case["canvas"]

    def moved(window, min_size=0.0):
        """In pixels of the window, the resize undone."""
        found, kept = project(boxes, window, 64, min_size)
        return found * np.array([window[2] - window[0], window[3] - window[1]] * 2) / 64, kept

    c = case["crop"]
    found, kept = moved((c["left"], c["top"], c["left"] + c["width"], c["top"] + c["height"]), 1.0)
    assert kept.tolist() == [True, True, False]  # nothing is left of the third
    assert found == pytest.approx(case["cropped"].numpy()[:2], abs=1e-5)
    left, top, right, bottom = case["padding"]
    assert moved((-left, -top, width + right, height + bottom))[0] == pytest.approx(case["padded"].numpy(), abs=1e-5)
    assert case["resized_to"] == (64, 64)
    assert project(boxes, (0, 0, width, height), 64, 1.0)[0] == pytest.approx(case["resized"].numpy(), abs=1e-5)
    images = Images(np.zeros((height, width, 3), np.uint8), boxes)
    flipped = augmented(images, 0, stage2=True, flip_prob=1.0)[1] * np.array([width, height] * 2) / 64
    assert flipped == pytest.approx(case["flipped"].numpy(), abs=1e-5)


def test_boxes_of_less_than_a_pixel_are_dropped_before_and_after_the_resize():
    boxes = np.array([[0, 0, 0.9, 9], [0, 0, 1, 9], [5, 5, 6.5, 7], [9, 9, 19, 19]], np.float32)
    enlarged, kept = project(boxes, (0, 0, 20, 20), 64, 1.0)
    assert kept.tolist() == [False, True, True, True] and len(enlarged) == 3
    assert project(boxes, (0, 0, 20, 20), 10, 1.0)[1].tolist() == [False, False, False, True]
    # a centre on the border is outside
    assert project(boxes, (14, 9, 20, 20), 64, 1.0)[1].tolist() == [False, False, False, False]
    assert project(boxes, (13, 9, 20, 20), 64, 1.0)[1].tolist() == [False, False, False, True]


def test_one_resize_of_the_part_is_the_resize_of_the_whole_canvas():
    rng = np.random.default_rng(0)
    placed, values, by_two = set(), 0, 0
    for _ in range(600):
        h, w = rng.integers(1, 90, 2).tolist()
        image = noise(h, w, int(rng.integers(1000)))
        ratio, size = rng.uniform(1, 4), int(rng.integers(4, 100))
        width, height = (int(side * ratio) for side in (w, h))
        left, top = int((width - w) * rng.random()), int((height - h) * rng.random())
        x0, y0 = (int(side * rng.uniform(0, 0.5)) for side in (width, height))
        x1, y1 = max(x0 + 1, int(width * rng.uniform(0.6, 1))), max(y0 + 1, int(height * rng.uniform(0.6, 1)))
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[top : top + h, left : left + w] = image
        crop = Image.fromarray(canvas[y0:y1, x0:x1].copy())
        expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))
        u0, v0, u1, v1 = max(left, x0), max(top, y0), min(left + w, x1), min(top + h, y1)
        if u0 >= u1 or v0 >= v1:
            continue
        found = resize_into(canvas[v0:v1, u0:u1], (u0 - x0, v0 - y0), (x1 - x0, y1 - y0), size)
        assert levels(found, expected) <= 2
        values, by_two = values + found.size, by_two + int((np.abs(found.astype(int) - expected) == 2).sum())
        placed.add((x1 - x0 > size, (u0, v0, u1, v1) == (x0, y0, x1, y1), u0 > x0, u1 < x1))
    assert len(placed) > 8 and by_two < 1e-5 * values


def test_a_whole_sample_is_the_published_pipeline_of_its_draws():
    image = cv2.GaussianBlur(noise(90, 120), (0, 0), 2)
    boxes = np.array([[10, 20, 70, 80], [60, 10, 115, 50], [100, 70, 104, 75]], np.float32)
    kinds = set()
    for seed in range(40):
        found, found_boxes, labels = augmented(Images(image, boxes), seed)
        # the same draws in the same order
        rng = np.random.default_rng(seed)
        drawn = draw_distortion(RECIPE, rng)
        canvas, corner = Image.fromarray(np.ascontiguousarray(published(image, drawn))), (0, 0)
        window = whole(image)
        if rng.random() < 0.5:
            window = draw_zoom_out(RECIPE, 120, 90, rng)
            corner = (-window[0], -window[1])
            black = Image.new("RGB", (window[2] - window[0], window[3] - window[1]))
            black.paste(canvas, corner)
            canvas = black
        kept = np.ones(3, bool)
        moved = boxes + np.array([*corner, *corner])
        if rng.random() < 0.8 and (crop := draw_crop(RECIPE, window, boxes, rng)) != window:
            x0, y0, x1, y1 = np.array(crop) - np.array([*window[:2]] * 2)
            canvas = canvas.crop((x0, y0, x1, y1))
            center = (moved[:, :2] + moved[:, 2:]) / 2
            kept = ((center > [x0, y0]) & (center < [x1, y1])).all(1)
            moved = np.clip(moved - [x0, y0, x0, y0], 0, [x1 - x0, y1 - y0] * 2)
        moved, names = moved[kept], np.arange(3)[kept]
        if flipped := bool(rng.random() < 0.5):
            canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            moved[:, [0, 2]] = canvas.width - moved[:, [2, 0]]
        large = (moved[:, 2:] - moved[:, :2] >= 1).all(1)
        moved = moved * np.array([64 / canvas.width, 64 / canvas.height] * 2)
        large &= (moved[:, 2:] - moved[:, :2] >= 1).all(1)
        assert np.array_equal(labels, names[large]) and found_boxes == pytest.approx(moved[large], abs=1e-4)
        expected = np.asarray(canvas.resize((64, 64), Image.Resampling.BILINEAR))
        apart = np.abs(found.astype(int) - expected)
        assert (apart > 1).mean() < 0.01 and apart.max() <= 6
        kinds.add((corner == (0, 0), canvas.size == (120, 90), flipped))
    assert len(kinds) >= 6


def test_pixels_and_boxes_move_together():
    image = np.zeros((120, 160, 3), np.uint8)
    image[..., 0] = 40
    boxes = [[20, 30, 90, 100], [100, 20, 150, 60]]
    image[30:100, 20:90, 1] = 255
    image[20:60, 100:150, 2] = 255
    seen = 0
    for seed in range(60):
        found, moved, labels = augmented(Images(image, boxes), seed, image_size=128, distort_prob=0.0)
        assert found.shape == (128, 128, 3) and moved.dtype == np.float32 and labels.dtype == np.int64
        assert len(moved) and (moved >= 0).all() and (moved <= 128).all()
        for box, label in zip(moved, labels, strict=True):
            rows, columns = np.nonzero(found[..., 1 + label] > 127)
            bright = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(box - bright).max() <= 1
            seen += 1
    assert seen > 60


def test_as_often_as_published():
    image = np.zeros((100, 100, 3), np.uint8)
    image[...] = (10, 100, 200)
    rng = np.random.default_rng(1)
    drawn = [draw_distortion(RECIPE, rng) for _ in range(4000)]
    for name in TRANSFORMS:
        assert np.mean([getattr(d, name) is not None for d in drawn]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([d.contrast_first for d in drawn]) == pytest.approx(0.5, abs=0.03)
    for name, low, high in [("brightness", 0.875, 1.125), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)]:
        values = [getattr(d, name) for d in drawn if getattr(d, name) is not None]
        assert low <= min(values) and max(values) <= high
        assert np.mean(values) == pytest.approx(1, abs=0.02 * (high - low) * 2)
        assert np.std(values) == pytest.approx((high - low) / 12**0.5, rel=0.05)
    counts = np.unique([d.permutation for d in drawn if d.permutation], axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 0.7 * counts.mean()
    # One box that nearly fills the image: whole, zoomed out, or cropped can be told by its area alone
    images = Images(image, [[1, 1, 99, 99]])
    areas, mirrored = [], 0
    left = Images(image, [[10, 10, 20, 90]])
    for seed in range(1500):
        areas.append(np.prod(np.ptp(augmented(images, seed, crop_prob=0.0)[1].reshape(2, 2), 0)) / 64**2)
        mirrored += augmented(left, seed, crop_prob=0.0, zoom_out_prob=0.0)[1][0, 0] > 32
    assert np.mean(np.array(areas) > 0.95) == pytest.approx(0.5 + 0.5 * 0.01, abs=0.04)
    assert mirrored / 1500 == pytest.approx(0.5, abs=0.04)


def test_crops_hold_what_they_must():
    rng = np.random.default_rng(0)
    window, boxes = (-20, -10, 180, 110), np.array([[10, 10, 60, 80], [100, 50, 130, 90]], np.float32)
    whole_windows = 0
    for _ in range(600):
        x0, y0, x1, y1 = crop = draw_crop(RECIPE, window, boxes, rng)
        whole_windows += crop == window
        assert -20 <= x0 < x1 <= 180 and -10 <= y0 < y1 <= 110
        assert x1 - x0 >= int(0.3 * 200) and y1 - y0 >= int(0.3 * 120) and 0.5 <= (x1 - x0) / (y1 - y0) <= 2
        assert project(boxes, crop, 64, 0.0)[1].any()
    # an IoU of .9 cannot be had of these, and .7 hardly
    assert 1 / 7 < whole_windows / 600 < 0.35
    for least in (0.3, 0.5):
        recipe = DetrRecipe(image_size=64, crop_ious=(least,))
        for _ in range(50):
            x0, y0, x1, y1 = draw_crop(recipe, window, boxes, rng)
            ious = []
            for bx0, by0, bx1, by1 in boxes[project(boxes, (x0, y0, x1, y1), 64, 0.0)[1]].tolist():
                w, h = min(x1, bx1) - max(x0, bx0), min(y1, by1) - max(y0, by0)
                overlap = max(w, 0) * max(h, 0)
                ious.append(overlap / ((x1 - x0) * (y1 - y0) + (bx1 - bx0) * (by1 - by0) - overlap))
            assert max(ious) >= least


@pytest.mark.parametrize("size", [(40, 64), (30, 20), (200, 90)])
def test_stage_2_is_the_squash_of_validation_perhaps_flipped(size):
    image = noise(*size)
    images = Images(image, [[4, 5, 15, 20]])
    canvas, (sx, sy) = squash(image, 64)
    outcomes = set()
    for seed in range(12):
        found, boxes, _ = augmented(images, seed, stage2=True)
        flipped = levels(found, canvas) > 1
        if flipped:
            found, boxes[:, [0, 2]] = found[:, ::-1], 64 - boxes[:, [2, 0]]
        assert levels(found, canvas) <= 1
        assert boxes[0] == pytest.approx([4 * sx, 5 * sy, 15 * sx, 20 * sy], abs=1e-4)
        outcomes.add(flipped)
    assert outcomes == {True, False}


def test_the_plan_decides_the_sample():
    images = Images(noise(50, 64), [[20, 10, 40, 30]])
    first, again, other = (augmented(images, seed) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2)])
@pytest.mark.parametrize("objects", [0, 1])
def test_tiny_images_and_images_without_objects(size, objects):
    height, width = size
    images = Images(noise(*size), [[0, 0, width, height]] * objects)
    augmenter = DetrAugmenter(images, RECIPE)
    samples = [augmenter[SamplePlan(0, seed, stage2=seed > 20)] for seed in range(24)]
    assert len(augmenter) == 1
    batch = collate(samples)
    assert batch.images.shape == (24, 3, 64, 64) and batch.gt_boxes.shape == (24, 1, 4)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.gt_counts.max() == objects


def test_multi_scale_sizes():
    assert multi_scale_sizes(640) == (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)
    assert multi_scale_sizes(256) == (192, 224, 256, 256, 256, 288, 320)
    assert multi_scale_sizes(320) == (256, 288, 320, 320, 320, 352, 384)
    assert multi_scale_sizes(32) == (32, 32, 32)
    for size in (0, 31, 650):
        with pytest.raises(UserError, match=f"image size {size} is no multiple of 32"):
            multi_scale_sizes(size)
