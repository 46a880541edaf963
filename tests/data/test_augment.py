"""The augmentation: its recipe, its geometry, its randomness, and that it repeats to the bit."""

import pickle
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from rtmdet_fast.data import augment
from rtmdet_fast.data.augment import Augmenter, Batch, collate
from rtmdet_fast.data.coco import CocoDataset, Sample
from rtmdet_fast.data.masks import MaskStore, Segmentation
from rtmdet_fast.data.plan import PlanSampler, SamplePlan
from rtmdet_fast.data.recipes import AugmentRecipe, recipe_for
from rtmdet_fast.data.workers import init_worker
from rtmdet_fast.errors import UserError

S = 96
PLAIN = {"hsv_gains": (0, 0, 0), "flip_prob": 0.0, "mixup_prob": 0.0}


@dataclass
class Images:
    """A dataset in memory that counts its decodes."""

    samples: list[Sample]
    loads: list[int] = field(default_factory=list)

    def __len__(self):
        return len(self.samples)

    def load(self, index):
        self.loads.append(index)
        return self.samples[index]


def rectangles(sizes, seed=0, per_image=1):
    """Black images with white rectangles that do not touch, and their boxes."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, (w, h) in enumerate(sizes):
        image, boxes = np.zeros((h, w, 3), np.uint8), []
        for k in range(per_image):
            left = w * k // per_image
            x0, x1 = left + 2 + rng.integers(w // per_image // 3), left + w // per_image - 3
            y0, y1 = 2 + rng.integers(h // 3), h - 3 - rng.integers(h // 4)
            image[y0:y1, x0:x1] = 255
            boxes.append((x0, y0, x1, y1))
        samples.append(Sample(image, np.array(boxes, np.float32), np.full(per_image, i), i, f"{i}.png"))
    return Images(samples)


def photos(n, seed=0):
    """Textured colour images of various sizes with a few boxes."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        h, w = rng.integers(30, 200, 2)
        image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (int(w), int(h)))
        corner = rng.uniform(0, 0.6, (3, 2)) * (w, h)
        boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, (3, 2)) * (w, h)], 1).astype(np.float32)
        samples.append(Sample(image, boxes, rng.integers(0, 5, 3), i, f"{i}.png"))
    return Images(samples)


def angles(sizes, seed=0):
    """Black images with a white L in each, whose box is much larger than either of its arms; box and mask."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, (w, h) in enumerate(sizes):
        x0, y0, x1, y1 = (int(v) for v in rng.uniform((0.05, 0.05, 0.6, 0.6), (0.3, 0.3, 0.95, 0.95)) * (w, h, w, h))
        x, y = x0 + max((x1 - x0) // 4, 3), y1 - max((y1 - y0) // 4, 3)
        ring = np.array([[x0, y0], [x, y0], [x, y], [x1, y], [x1, y1], [x0, y1]], np.float32)
        image = np.zeros((h, w, 3), np.uint8)
        image[y0:y1, x0:x] = image[y:y1, x0:x1] = 255
        masks = MaskStore([Segmentation([ring])]).load(0, 1, w, h)
        boxes = np.array([[x0, y0, x1, y1]], np.float32)
        samples.append(Sample(image, boxes, np.array([i]), i, f"{i}.png", masks))
    return Images(samples)


def plans(recipe, length, epochs=1, seed=0, stage2=False):
    sampler = PlanSampler(length, 4, recipe, seed, 0, drop_last=False)
    sampler.set_stage2(stage2)
    return [p for _ in range(epochs) for batch in sampler for p in batch]


def hwc(image):
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("size", "resize_range", "mosaic_cache", "mixup_cache", "random_pop", "mixup_prob"),
    [
        ("nano", (0.5, 2.0), 20, 10, False, 0.5),
        ("tiny", (0.5, 2.0), 20, 10, False, 0.5),
        ("s", (0.5, 2.0), 40, 20, True, 1.0),
        ("m", (0.1, 2.0), 40, 20, True, 1.0),
        ("l", (0.1, 2.0), 40, 20, True, 1.0),
        ("x", (0.1, 2.0), 40, 20, True, 1.0),
    ],
)
def test_recipes(size, resize_range, mosaic_cache, mixup_cache, random_pop, mixup_prob):
    assert recipe_for(size, 640) == AugmentRecipe(
        image_size=640,
        resize_range=resize_range,
        mosaic_cache=mosaic_cache,
        mixup_cache=mixup_cache,
        random_pop=random_pop,
        mixup_prob=mixup_prob,
        mosaic_center_range=(0.5, 1.5),
        hsv_gains=(5, 30, 30),
        flip_prob=0.5,
        pad_value=114,
    )


def test_recipe_errors():
    with pytest.raises(UserError, match="huge"):
        recipe_for("huge", 640)
    with pytest.raises(UserError, match="16"):
        recipe_for("tiny", 16)


def assert_drawn_where_boxed(image, boxes, margin, plan):
    """The white pixels are those inside the boxes, to `margin` pixels at the edges."""
    white = (image.min(2) > 127).astype(np.uint8)
    inner, outer = np.zeros_like(white), np.zeros_like(white)
    height, width = white.shape
    for box in boxes:
        assert (box >= 0).all() and (box[:2] < box[2:]).all() and (box[2:] <= (width, height)).all()
        x0, y0, x1, y1 = (max(int(v), 0) for v in (*np.floor(box[:2] - margin), *np.ceil(box[2:] + margin)))
        outer[y0:y1, x0:x1] = 1
        x0, y0, x1, y1 = (max(int(v), 0) for v in (*np.ceil(box[:2] + margin), *np.floor(box[2:] - margin)))
        inner[y0:y1, x0:x1] = 1
    assert not (white & ~outer & 1).any(), plan
    assert not (inner & ~white & 1).any(), plan


SIZES = [(S, S), (2 * S, S), (S // 2, S), (300, 211), (64, 200), (97, 95), (33, 40), (S, 70)]


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("stage2", [False, True])
@pytest.mark.parametrize("resize_range", [(0.1, 0.5), (0.5, 1.0), (1.0, 1.0), (1.0, 2.0), (2.0, 3.0)])
def test_boxes_and_pixels_agree(resize_range, stage2, flip):
    recipe = AugmentRecipe(image_size=S, **{**PLAIN, "flip_prob": flip}, resize_range=resize_range)
    dataset = rectangles(SIZES)
    augmenter = Augmenter(dataset, recipe)
    for plan in plans(recipe, len(dataset), epochs=6, stage2=stage2):
        image, boxes, labels = augmenter[plan]
        assert image.shape == (3, S, S) and image.dtype == torch.uint8
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64 and len(boxes) == len(labels) > 0
        # the first resize, to the size of a tile, blurs or shifts an edge by half a pixel; the second may enlarge that
        assert_drawn_where_boxed(hwc(image), boxes.numpy(), 0.6 * max(resize_range[1], 1), plan)


def test_boxes_and_pixels_agree_with_many_boxes():
    recipe = AugmentRecipe(image_size=S, **{**PLAIN, "flip_prob": 0.5})
    dataset = rectangles([(200, 160)] * 6 + [(160, 200)] * 6, per_image=4)
    augmenter = Augmenter(dataset, recipe)
    counts = []
    for plan in plans(recipe, len(dataset), epochs=4):
        image, boxes, labels = augmenter[plan]
        assert_drawn_where_boxed(hwc(image), boxes.numpy(), 1.2, plan)
        counts.append(len(set(labels.tolist())))
    assert max(counts) == 4  # all four tiles are seen


def test_plain_resize_is_the_references():
    """Where nothing is cropped, the pixels are those of imrescale and pad."""
    recipe = AugmentRecipe(image_size=S, **PLAIN, resize_range=(0.6, 0.6))
    dataset = photos(6)
    augmenter = Augmenter(dataset, recipe)
    for plan in plans(recipe, 6, stage2=True):
        sample = dataset.samples[plan.index]
        h, w = sample.image.shape[:2]
        scale = int(S * 0.6) / max(h, w)
        new_w, new_h = int(w * scale + 0.5), int(h * scale + 0.5)
        expected = np.full((S, S, 3), 114, np.uint8)
        expected[:new_h, :new_w] = cv2.resize(sample.image, (new_w, new_h))
        image, boxes, labels = augmenter[plan]
        assert np.array_equal(hwc(image), expected)
        scaled = sample.boxes * np.array([new_w / w, new_h / h] * 2)
        np.testing.assert_allclose(boxes.numpy(), scaled, atol=1e-3)
        assert labels.tolist() == sample.labels.tolist()


def test_mosaic_is_the_references():
    """At ratio 1 the output is a window of the canvas that the reference builds, and no pixel is resampled."""
    recipe = AugmentRecipe(image_size=S, **PLAIN, resize_range=(1.0, 1.0), mosaic_center_range=(1.0, 1.0))
    colours = [30, 80, 150, 200, 250]
    dataset = Images(
        [
            Sample(np.full((60, S, 3), c, np.uint8), np.array([[0, 0, S, 60]], np.float32), np.array([i]), i, "")
            for i, c in enumerate(colours)
        ]
    )
    augmenter = Augmenter(dataset, recipe)
    seen = set()
    for plan in plans(recipe, 5, epochs=12)[4:]:
        image, boxes, labels = augmenter[plan]
        seen |= set(image.unique().tolist())
        for (x0, y0, x1, y1), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            assert (hwc(image)[y0:y1, x0:x1] == colours[label]).all()
        areas = boxes[:, 2:] - boxes[:, :2]
        assert areas.prod(1).sum() == (image[0] != 114).sum()  # tiles and nothing else
    assert seen == {114, *colours}


def test_mosaic_centres_are_uniform():
    recipe = AugmentRecipe(image_size=S, **PLAIN, resize_range=(0.5, 0.5))
    dataset = rectangles([(S, S)] * 5)
    augmenter = Augmenter(dataset, recipe)
    centres = []
    for seed in range(2000):
        parts, width, height = augmenter._compose(0, (0, 1, 2, 3, 4), np.random.default_rng(seed))
        assert (width, height) == (S, S) and len(parts) == 4
        assert parts[0].target[2:] == parts[3].target[:2]  # neighbours share their edges
        assert (parts[1].target[0], parts[1].target[3]) == (parts[2].target[2], parts[2].target[1])
        centres.append(parts[3].target[:2])
    centres = np.array(centres) * 2 / S
    assert centres.min() >= 0.5 - 0.02 and centres.max() <= 1.5
    np.testing.assert_allclose(centres.mean(0), 1, atol=0.03)
    np.testing.assert_allclose(centres.std(0), 12**-0.5, atol=0.02)
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.08


def test_mosaic_waits_for_more_than_four_cached_images():
    recipe = AugmentRecipe(image_size=S, **PLAIN, resize_range=(0.5, 0.5))
    dataset = rectangles([(S, S)] * 8)
    augmenter = Augmenter(dataset, recipe)
    for plan in plans(recipe, 8):
        labels = augmenter[plan][2]
        if len(plan.mosaic_cache) <= 4:
            assert labels.tolist() == [plan.index]
        else:
            assert (
                len(labels) == 4 and labels[0] == plan.index and set(labels[1:].tolist()) <= set(plan.mosaic_cache[:-1])
            )


def test_ratios_and_crops_are_uniform():
    recipe = AugmentRecipe(image_size=S, **PLAIN, resize_range=(0.5, 2.0))
    image = np.zeros((4 * S, 4 * S, 3), np.uint8)
    dataset = Images([Sample(image, np.array([[0, 0, 4 * S, 4 * S]], np.float32), np.array([0]), 0, "")])
    augmenter = Augmenter(dataset, recipe)
    ratios, offsets = [], []
    for seed in range(2000):
        parts, width, _ = augmenter._compose(0, (), np.random.default_rng(seed))
        x0, _, x1, _ = parts[0].source
        ratios.append((width / (x1 - x0)) * 4)
        if ratios[-1] > 1.5:
            offsets.append(x0 / (4 * S - (x1 - x0)))
    hist, _ = np.histogram(ratios, 5, (0.5, 2.0))
    assert (abs(hist - 400) < 75).all()
    assert np.mean(offsets) == pytest.approx(0.5, abs=0.04) and min(offsets) < 0.02 and max(offsets) > 0.98


def test_padding_is_at_the_right_and_the_bottom_and_not_recoloured():
    recipe = AugmentRecipe(image_size=S, mixup_prob=0.0, resize_range=(0.5, 0.5), flip_prob=1.0)
    dataset = rectangles([(60, 40)] * 4)
    augmenter = Augmenter(dataset, recipe)
    for plan in plans(recipe, 4, stage2=True):
        image = hwc(augmenter[plan][0])
        assert (image[32:] == 114).all() and (image[:, 48:] == 114).all() and (image[:32, :48] != 114).any()


def test_a_crop_without_a_box_is_refused():
    """Of ten images one has a tiny box, which most crops miss; the others have one that no crop misses."""
    samples = rectangles([(S, S)] * 10).samples
    for i, sample in enumerate(samples):
        sample.boxes = np.array([[0, 0, 2, 2] if i == 0 else [0, 0, S, S]], np.float32)
    recipe = AugmentRecipe(image_size=S, **PLAIN, resize_range=(2.0, 2.0))
    augmenter = Augmenter(Images(samples), recipe)
    taken = [augmenter[SamplePlan(0, seed)][2] for seed in range(200)]
    assert all(len(labels) == 1 for labels in taken)
    labels = torch.cat(taken)
    assert (labels == 0).sum() < 20
    assert set(labels.tolist()) == set(range(10))  # the substitute is any image


def test_without_any_box_it_ends():
    samples = rectangles([(S, S)] * 6).samples
    for sample in samples:
        sample.boxes, sample.labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    recipe = AugmentRecipe(image_size=S, resize_range=(0.5, 0.5))
    augmenter = Augmenter(Images(samples), recipe)
    batch = collate([augmenter[p] for p in plans(recipe, 6)])
    assert batch.gt_boxes.shape == (6, 1, 4) and batch.gt_counts.tolist() == [0] * 6
    assert (batch.gt_labels == -1).all()


def reference_hsv(image, hue, saturation, value):
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.int16)
    hsv[..., 0] = (hsv[..., 0] + hue) % 180
    hsv[..., 1] = np.clip(hsv[..., 1] + saturation, 0, 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + value, 0, 255)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)


class Fixed:
    """A generator that shifts by what it was told."""

    def __init__(self, shift):
        self.shift = shift

    def uniform(self, low, high, size):
        return np.array(self.shift, float)

    def integers(self, high, size):
        return np.ones(size, int)


@pytest.mark.parametrize("hue", [-4, -1, 0, 1, 4])
@pytest.mark.parametrize(("saturation", "value"), [(0, 1), (29, -29), (-29, 29), (7, 0)])
def test_hsv(hue, saturation, value):
    image = cv2.resize(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8), (130, 130))
    expected = reference_hsv(image, hue, saturation, value).astype(int)
    shifted = np.full((150, 150, 3), 9, np.uint8)
    shifted[:130, :130] = image
    augment._shift_hsv(shifted[:130, :130], (1, 1, 1), Fixed((hue, saturation, value)))
    difference = np.abs(shifted[:130, :130] - expected)
    assert difference.max() <= (1 if hue >= 0 else 9) and difference.mean() < (0.01 if hue >= 0 else 1)
    assert (shifted[130:] == 9).all() and (shifted[:, 130:] == 9).all()


def test_hsv_gains():
    grey = np.full((1, 1, 3), 100, np.uint8)
    values = []
    for seed in range(3000):
        image = grey.copy()
        augment._shift_hsv(image, (0, 0, 30), np.random.default_rng(seed))
        values.append(int(image[0, 0, 0]) - 100)
    assert min(values) == -29 and max(values) == 29
    assert np.mean([v == 0 for v in values]) == pytest.approx(0.5 + 0.5 / 30, abs=0.03)
    assert np.mean(values) == pytest.approx(0, abs=0.6)


def test_mixup():
    recipe = AugmentRecipe(image_size=S)
    dataset = photos(12)
    augmenter, apart = Augmenter(dataset, recipe), Augmenter(dataset, replace(recipe, mixup_prob=0.0))
    kinds = set()
    for plan in plans(recipe, 12, epochs=3):
        image, boxes, labels = augmenter[plan]
        own, own_boxes, own_labels = apart[plan]
        if len(plan.mixup_cache) == 1:
            assert torch.equal(image, own)
            continue
        n = len(own_boxes)
        assert torch.equal(boxes[:n], own_boxes) and torch.equal(labels[:n], own_labels) and len(boxes) > n
        for cached in plan.mixup_cache[:-1]:  # never itself
            partner, partner_boxes, partner_labels = apart[cached]
            flipped = partner_boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([S, 0, S, 0])
            for kind, other, other_boxes in (("as is", partner, partner_boxes), ("flipped", partner.flip(2), flipped)):
                blend = ((own.int() + other.int()) // 2).to(torch.uint8)
                if torch.equal(blend, image) and len(boxes) == n + len(other_boxes):
                    torch.testing.assert_close(boxes[n:], other_boxes)
                    assert torch.equal(labels[n:], partner_labels)
                    kinds.add(kind)
                    break
            else:
                continue
            break
        else:
            raise AssertionError("no cached image was mixed in")
    assert kinds == {"as is", "flipped"}


def test_mixup_probability():
    recipe = replace(recipe_for("tiny", 32), hsv_gains=(0, 0, 0))
    dataset = rectangles([(32, 32)] * 30)
    augmenter, apart = Augmenter(dataset, recipe), Augmenter(dataset, replace(recipe, mixup_prob=0.0))
    mixed = [len(augmenter[p][1]) > len(apart[p][1]) for p in plans(recipe, 30, epochs=20)]
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.07)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", ["tiny", "l"])
def test_repeats_to_the_bit(size):
    """Whatever is kept from before, the sample is the same: alone, after others, twice, and resumed half-way."""
    recipe, dataset = recipe_for(size, 64), photos(25)
    todo = plans(recipe, 25, epochs=3)
    augmenter = Augmenter(dataset, recipe)
    made = [augmenter[p] for p in todo]
    assert all(same(made[i], Augmenter(dataset, recipe)[todo[i]]) for i in range(0, len(todo), 4))
    assert same(augmenter[todo[3]], made[3])
    resumed = Augmenter(dataset, recipe)
    assert all(same(resumed[p], m) for p, m in zip(todo[40:], made[40:], strict=True))
    assert not any(same(a, b) for a, b in zip(made[:25], made[25:50], strict=True))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("stage2", [False, True])
@pytest.mark.parametrize("resize_range", [(0.3, 0.6), (1.0, 1.0), (1.0, 2.0)])
def test_masks_boxes_and_pixels_agree(resize_range, stage2, flip):
    recipe = AugmentRecipe(image_size=S, **{**PLAIN, "flip_prob": flip}, resize_range=resize_range)
    dataset = angles(SIZES * 2)
    augmenter = Augmenter(dataset, recipe)
    margin = 2 * int(np.ceil(0.6 * max(resize_range[1], 1))) + 1  # as for boxes
    kernel = np.ones((margin, margin), np.uint8)
    cut = 0
    for plan in plans(recipe, len(dataset), epochs=4, stage2=stage2):
        image, boxes, _, centers, masks = augmenter[plan]
        assert masks.shape == (len(boxes), S // 4, S // 4) and masks.dtype == torch.uint8
        assert centers.shape == (len(boxes), 2) and centers.dtype == torch.float32
        white = (hwc(image).min(2) > 127).astype(np.uint8)
        found = masks.numpy().any(0)
        surely, perhaps = (f(white, kernel)[2::4, 2::4] > 0 for f in (cv2.erode, cv2.dilate))
        assert not (surely & ~found).any() and not (found & ~perhaps).any(), plan
        for box, center in zip(boxes.numpy(), centers.numpy(), strict=True):
            left, top = np.floor(box[:2]).astype(int)
            part = hwc(image)[top : int(np.ceil(box[3])), left : int(np.ceil(box[2])), 0] / 255
            y, x = np.nonzero(part > 0.3)  # an arm may be thinner than a pixel
            extents = np.array([left + x.min(), top + y.min(), left + x.max() + 1, top + y.max() + 1])
            assert np.abs(box - extents).max() < margin, plan
            y, x = np.mgrid[: part.shape[0], : part.shape[1]]
            mean = (left + (part * x).sum() / part.sum(), top + (part * y).sum() / part.sum())
            assert np.abs(center - mean).max() < (1.5 if resize_range[0] == 1 else 2), plan  # shrinking skips pixels
            cut += box.min() == 0 or box.max() == S
    assert cut > 10 or resize_range[1] < 2


def test_mixup_keeps_the_masks_of_both():
    recipe = AugmentRecipe(image_size=S)
    dataset = angles(SIZES * 2)
    augmenter, apart = Augmenter(dataset, recipe), Augmenter(dataset, replace(recipe, mixup_prob=0.0))
    mixed = 0
    for plan in plans(recipe, len(dataset), epochs=2):
        sample, own = augmenter[plan], apart[plan]
        n = len(own[1])
        assert len(sample[1]) == len(sample[3]) == len(sample[4]) >= n
        assert all(torch.equal(a[:n], b) for a, b in zip(sample[1:], own[1:], strict=True))
        mixed += len(sample[1]) > n
        for box, center, mask in zip(sample[1][n:], sample[3][n:], sample[4][n:], strict=True):
            assert (box[:2] - 1 <= center).all() and (center <= box[2:]).all()
            _, x = mask.nonzero(as_tuple=True)
            assert not len(x) or (4 * x.min() + 3 >= box[0] and 4 * x.max() + 2 <= box[2])
    assert mixed > 10


def test_masked_samples_repeat_to_the_bit():
    recipe, dataset = recipe_for("l", 64, masks=True), angles(SIZES * 3)
    todo = plans(recipe, len(dataset), epochs=2)
    augmenter = Augmenter(dataset, recipe)
    made = [augmenter[p] for p in todo]
    assert all(same(made[i], Augmenter(dataset, recipe)[todo[i]]) for i in range(0, len(todo), 4))


def test_crops_without_an_object_are_kept_for_masks():
    assert [recipe_for(size, 64, masks=True).negative_crops for size in ("tiny", "s", "l")] == [False, True, True]
    assert not recipe_for("l", 64).negative_crops
    dataset = angles([(64, 64)] * 8)
    for sample in dataset.samples:  # far from most crops
        sample.image = np.pad(sample.image, ((0, 600), (0, 600), (0, 0)))
    recipe = replace(recipe_for("l", 64, masks=True), resize_range=(2.0, 2.0), mixup_prob=0.0)
    samples = [Augmenter(dataset, recipe)[p] for p in plans(recipe, 8, stage2=True)]
    assert min(len(s[1]) for s in samples) == 0
    batch = collate(samples)
    assert batch.gt_masks.shape[0] == 8 and batch.gt_masks.shape[2:] == (16, 16)


def test_objects_of_a_pixel_are_none():
    dataset = angles([(64, 64)] * 6)
    recipe = replace(recipe_for("l", 64, masks=True), resize_range=(0.02, 0.02))
    for plan in plans(recipe, 6, stage2=True):
        _, boxes, *others = Augmenter(dataset, recipe)[plan]
        assert boxes.shape == (0, 4) and all(len(values) == 0 for values in others)


@pytest.mark.parametrize("size", ["tiny", "l"])
def test_memory_is_bounded_and_images_are_decoded_once(size):
    recipe, dataset = recipe_for(size, 32), photos(60)
    augmenter = Augmenter(dataset, recipe)
    todo = plans(recipe, 60, epochs=3)
    for plan in todo:
        augmenter[plan]
        assert set(augmenter._tiles) <= set(plan.mosaic_cache)
        assert set(augmenter._augmented) <= {p.seed for p in plan.mixup_cache}
        assert all(max(t.image.shape) == 32 for t in augmenter._tiles.values())
    assert len(dataset.loads) < 1.25 * len(todo)  # crops refused take other images
    augmenter[SamplePlan(0, 1)]  # stage 2 lets go of everything
    assert not augmenter._tiles and not augmenter._augmented


def test_the_dataset_is_not_written_to():
    recipe, dataset = recipe_for("l", 64), photos(10)
    before = [(s.image.copy(), s.boxes.copy(), s.labels.copy()) for s in dataset.samples]
    augmenter = Augmenter(dataset, recipe)
    for plan in plans(recipe, 10, epochs=3) + plans(recipe, 10, stage2=True):
        augmenter[plan]
    for sample, arrays in zip(dataset.samples, before, strict=True):
        assert all(map(np.array_equal, (sample.image, sample.boxes, sample.labels), arrays))


def test_collate():
    samples = [
        (torch.full((3, 4, 6), i, dtype=torch.uint8), torch.full((n, 4), float(i)), torch.full((n,), i))
        for i, n in ((1, 2), (2, 0), (3, 3))
    ]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 4, 6) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert batch.gt_counts.tolist() == [2, 0, 3] and batch.gt_counts.dtype == torch.int64
    assert batch.gt_boxes.shape == (3, 3, 4) and batch.gt_boxes.dtype == torch.float32
    assert batch.gt_boxes[:, :, 0].tolist() == [[1, 1, 0], [0, 0, 0], [3, 3, 3]]
    assert batch.gt_labels.tolist() == [[1, 1, -1], [-1, -1, -1], [3, 3, 3]]
    moved = batch.to("cpu")
    assert isinstance(moved, Batch) and torch.equal(moved.images, batch.images)


def test_collate_masks():
    samples = [
        (
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.zeros(n, 4),
            torch.zeros(n).long(),
            torch.full((n, 2), 5.0),
            torch.ones(n, 2, 2, dtype=torch.uint8),
        )
        for n in (2, 0, 1)
    ]
    batch = collate(samples).to("cpu")
    assert batch.gt_centers[:, :, 0].tolist() == [[5, 5], [0, 0], [5, 0]]
    assert batch.gt_masks.dtype == torch.uint8 and batch.gt_masks.sum((2, 3)).tolist() == [[4, 4], [0, 0], [4, 0]]
    plain = collate([sample[:3] for sample in samples]).to("cpu")
    assert plain.gt_centers is None and plain.gt_masks is None


@pytest.mark.parametrize("persistent", [True, False])
def test_loader_workers_make_what_the_plans_say(persistent):
    recipe, dataset = recipe_for("l", 32), photos(23)

    def sampler():
        return PlanSampler(len(dataset), 4, recipe, 5, num_workers=2)

    loader = DataLoader(
        Augmenter(dataset, recipe),
        batch_sampler=sampler(),
        num_workers=2,
        collate_fn=collate,
        worker_init_fn=init_worker,
        persistent_workers=persistent,
    )
    by_hand, augmenter = sampler(), Augmenter(dataset, recipe)
    for _ in range(2):
        expected = [collate([augmenter[p] for p in batch]) for batch in by_hand]
        for batch, wanted in zip(loader, expected, strict=True):
            assert torch.equal(batch.images, wanted.images) and torch.equal(batch.gt_boxes, wanted.gt_boxes)
            assert torch.equal(batch.gt_labels, wanted.gt_labels) and torch.equal(batch.gt_counts, wanted.gt_counts)


def test_pickles():
    """Workers may be spawned, and plans travel to them."""
    recipe, dataset = recipe_for("l", 32), photos(8)
    todo = plans(recipe, 8, epochs=2)
    clone, copies = pickle.loads(pickle.dumps((Augmenter(dataset, recipe), todo)))
    assert copies == todo
    assert same(clone[copies[-1]], Augmenter(dataset, recipe)[todo[-1]])


@pytest.mark.parametrize("name", ["coco_tiny", "bccd"])
def test_real_images(shared, name):
    root = shared / "data" / name
    file, folder = ("instances_train.json", "train") if name == "coco_tiny" else ("train.json", "images")
    dataset = CocoDataset(root / file, root / folder, training=True)
    for size, stage2 in (("tiny", False), ("l", False), ("s", True)):
        recipe = recipe_for(size, 160)
        augmenter = Augmenter(dataset, recipe)
        for plan in plans(recipe, len(dataset), stage2=stage2)[:30]:
            image, boxes, labels = augmenter[plan]
            assert len(boxes) == len(labels) > 0 and image.shape == (3, 160, 160)
            assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 160
            assert labels.min() >= 0 and labels.max() < len(dataset.class_names)


def test_real_masks(shared):
    root = shared / "data/coco_tiny"
    dataset = CocoDataset(root / "instances_train.json", root / "train", training=True, masks=True)
    for size, stage2 in (("tiny", False), ("l", False), ("s", True)):
        recipe = recipe_for(size, 160, masks=True)
        augmenter, plain = Augmenter(dataset, recipe), Augmenter(Plain(dataset), recipe)
        for plan in plans(recipe, len(dataset), stage2=stage2)[:30]:
            image, boxes, labels, centers, masks = augmenter[plan]
            assert len(boxes) == len(labels) == len(centers) == len(masks) and masks.shape[1:] == (40, 40)
            assert (boxes[:, 2:] - boxes[:, :2] > 1).all() and boxes.min() >= 0 and boxes.max() <= 160
            assert (centers >= boxes[:, :2] - 2).all() and (centers <= boxes[:, 2:] + 2).all()
            if size != "tiny":  # which takes another image where a crop has nothing; the others keep it
                assert torch.equal(image, plain[plan][0])


@dataclass
class Plain:
    """A dataset without its masks."""

    dataset: CocoDataset

    def __len__(self):
        return len(self.dataset)

    def load(self, index):
        return replace(self.dataset.load(index), masks=None)


def test_a_batch_is_resized_with_its_boxes():
    """Each pixel is the one in the middle of which it lies: 32 columns of 16 make pairs, and 8 are every other one."""
    image = torch.arange(16, dtype=torch.uint8).expand(3, 16, 16)
    batch = collate([(image, torch.tensor([[2.0, 4, 8, 16]]), torch.tensor([1]))])
    assert batch.resized(16) is batch
    for side, columns in ((32, torch.arange(16).repeat_interleave(2)), (8, torch.arange(0, 16, 2))):
        resized = batch.resized(side)
        assert resized.images.dtype == torch.uint8 and resized.images.shape == (1, 3, side, side)
        assert torch.equal(resized.images, columns.to(torch.uint8).expand(1, 3, side, side))
        assert torch.equal(resized.gt_boxes, batch.gt_boxes * side / 16)
        assert resized.gt_labels is batch.gt_labels and resized.gt_counts is batch.gt_counts
