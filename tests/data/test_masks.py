"""Masks: outlines of ground truth against pycocotools and brute force, predicted ones against torch's interpolation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from rtmdet_fast.data.augment import Augmenter
from rtmdet_fast.data.coco import Sample
from rtmdet_fast.data.masks import MaskStore, Outlines, Segmentation, concatenate, read_segmentation
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.data.recipes import recipe_for
from rtmdet_fast.geometry.masks import Region, encode, outline
from rtmdet_fast.inference.masks import PredictedMasks

H, W = 96, 128


def star(rng, center, radius, k) -> np.ndarray:
    """A polygon [k, 2] around a centre, which is not convex."""
    angle = np.sort(rng.uniform(0, 2 * math.pi, k))
    return np.array(center) + np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(0.3, 1, (k, 1)) * radius


def outlines(*segmentations, width=W, height=H) -> Outlines:
    read = [read_segmentation(s, width, height)[0] for s in segmentations]
    return MaskStore(read).load(0, len(read), width, height)


def bitmap(region: Region, height=H, width=W) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[region.y : region.y + region.pixels.shape[0], region.x : region.x + region.pixels.shape[1]] = region.pixels
    return mask


def inside(ring, height=H, width=W) -> np.ndarray:
    """Brute force: pixels whose centre has an odd number of edges to its left."""
    y, x = np.mgrid[:height, :width] + 0.5
    odd = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0), strict=True):
        if y0 != y1:
            odd ^= ((y0 <= y) != (y1 <= y)) & (x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x)
    return odd


def test_filling_is_the_even_odd_rule_at_pixel_centres():
    rng = np.random.default_rng(0)
    for k in (3, 4, 9, 30):
        # float32, as they are stored; also points outside the image, and rings that cross themselves
        rings = [star(rng, rng.uniform(0, (W, H)), 50, k).astype(np.float32) for _ in range(3)]
        rings.append(rng.uniform(-20, 140, (k, 2)).astype(np.float32))
        found = outlines(*([ring.ravel().tolist()] for ring in rings))
        for i, ring in enumerate(rings):
            assert np.array_equal(bitmap(found.region(i)), inside(ring.astype(np.float64)))


def test_parts_of_an_instance_are_united():
    a, b = (np.array([[x, 10.0], [x + 30, 10], [x + 30, 50], [x, 50]]) for x in (10, 25))
    union = outlines([a.ravel().tolist(), b.ravel().tolist()])
    assert np.array_equal(bitmap(union.region(0)), inside(a) | inside(b))
    assert union.render(H, W).areas.tolist() == [45 * 40]


def test_polygons_are_filled_as_pycocotools_does():
    rng = np.random.default_rng(1)
    pixels = differing = 0
    for _ in range(60):
        rings = [star(rng, rng.uniform(30, 90, 2), 40, 12) for _ in range(rng.integers(1, 3))]
        polygons = [ring.ravel().tolist() for ring in rings]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, H, W))).astype(bool)
        found = bitmap(outlines(polygons).region(0))
        pixels, differing = pixels + expected.sum(), differing + (expected ^ found).sum()
    assert differing < 0.01 * pixels  # pycocotools rounds to fifths of a pixel


def random_mask(rng, kind) -> np.ndarray:
    if kind == "noise":
        return rng.random((H, W)) < 0.5
    if kind == "full":
        return np.ones((H, W), bool)
    if kind == "empty":
        return np.zeros((H, W), bool)
    if kind == "edges":  # runs that go on from column to column
        mask = rng.random((H, W)) < 0.2
        mask[:, 20:90] |= True
        return mask
    return inside(star(rng, (60, 50), 60, 20))


KINDS = ["noise", "full", "empty", "edges", "star"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["compressed", "bytes", "list"])
def test_rle_is_read_exactly(kind, form):
    mask = random_mask(np.random.default_rng(2), kind)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if form == "list":
        flat = mask.T.ravel()
        ends = np.flatnonzero(np.diff(flat, prepend=False)) if flat.any() else np.zeros(0, int)
        counts = np.diff(ends, prepend=0, append=flat.size).tolist()
    else:
        counts = rle["counts"] if form == "bytes" else rle["counts"].decode()
    found = outlines({"size": [H, W], "counts": counts})
    assert np.array_equal(bitmap(found.region(0)), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_needs_of_a_mask(kind):
    mask = random_mask(np.random.default_rng(3), kind)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    found = outlines({"size": [H, W], "counts": rle["counts"]}).render(H, W)
    assert found.masks.dtype == np.uint8 and found.masks.flags.c_contiguous
    assert np.array_equal(found.masks[0], mask[2::4, 2::4])
    assert found.areas[0] == mask.sum()
    y, x = np.nonzero(mask)
    if len(x):
        np.testing.assert_allclose(found.centers[0], [x.mean(), y.mean()], rtol=1e-6)
        assert found.extents[0].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    else:
        assert found.centers[0].tolist() == [0, 0] and found.extents[0].tolist() == [0, 0, 0, 0]


def test_no_instances():
    empty = outlines()
    assert len(empty) == 0
    found = concatenate([empty, empty]).resized((0.5, 0.5)).flipped(W).render(H, W)
    assert found.masks.shape == (0, H // 4, W // 4) and found.centers.shape == (0, 2)
    assert concatenate([]).render(H, W).masks.shape == (0, H // 4, W // 4)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.37, 0.61), (2.5, 1.9)])
@pytest.mark.parametrize("flip", [False, True])
def test_resized_cropped_and_flipped(scale, flip):
    """The pixels that a window shows are those of the moved polygon filled anew."""
    rng = np.random.default_rng(4)
    rings = [star(rng, (60, 50), 50, 15).astype(np.float32) for _ in range(4)]
    window = (9, 13, 70, 77)
    moved = outlines(*([r.ravel().tolist()] for r in rings)).resized(scale, (-20.0, 7.5)).seen_through(window)
    if flip:
        moved = moved.flipped(W)
    found = moved.render(H, W)
    for i, ring in enumerate(rings):
        expected = np.zeros((H, W), bool)
        points = ring * np.array(scale, np.float32) + np.array([-20, 7.5], np.float32)
        expected[13:77, 9:70] = inside(points.astype(np.float64))[13:77, 9:70]
        if flip:
            expected = expected[:, ::-1]
        assert (bitmap(moved.region(i)) ^ expected).sum() <= 2  # a pixel's centre on an edge, to the last bit
        assert (found.masks[i].astype(bool) ^ expected[2::4, 2::4]).sum() <= 1


def test_rle_is_resized_by_its_pixels():
    mask = random_mask(np.random.default_rng(5), "noise")
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    twice = outlines({"size": [H, W], "counts": rle["counts"]}).resized((2.0, 2.0)).seen_through((0, 0, 2 * W, 2 * H))
    assert np.array_equal(bitmap(twice.region(0), 2 * H, 2 * W), mask.repeat(2, 0).repeat(2, 1))


def test_taking_and_joining_instances():
    rng = np.random.default_rng(6)
    polygons = [[star(rng, rng.uniform(20, 80, 2), 30, 8).ravel().tolist() for _ in range(n)] for n in (1, 3, 2, 1, 2)]
    all_of_them = outlines(*polygons)
    kept = np.array([True, False, True, False, True])
    expected = all_of_them.render(H, W).masks[kept]
    assert np.array_equal(all_of_them.take(kept).render(H, W).masks, expected)
    joined = concatenate([outlines(*polygons[:2]), outlines(), outlines(*polygons[2:])])
    assert np.array_equal(joined.render(H, W).masks, all_of_them.render(H, W).masks)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "polygon of fewer than 3 points"),
        ([[]], "polygon of fewer than 3 points"),
        ([[200, 10, 220, 10, 220, 30]], "polygon outside the image"),
        ([[10, -9, 20, -5, 20, 0]], "polygon outside the image"),
    ],
)
def test_polygons_that_are_none(segmentation, reason):
    good = [10, 10, 20, 10, 20, 20]
    read, left_out = read_segmentation([*segmentation, good], W, H)
    assert left_out == [reason] and [ring.ravel().tolist() for ring in read.rings] == [good]
    assert read_segmentation(segmentation, W, H)[0].is_empty()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (7, "neither"),
        ("abc", "neither"),
        ([[1, 1, 5, 5, math.nan, 2]], "finite"),
        ([[1, 1, 5, 5, math.inf, 2]], "finite"),
        ([[1, 1, 5, 5, 3, 2, 9]], "finite"),
        ([[[1, 1], [5, 5], [3, 2]]], "finite"),
        ([["a", "b"]], "list of numbers"),
        ([[1, [2], 3]], "list of numbers"),
        ([["1", "1", "5", "5", "3", "2"]], "list of numbers"),
        ([[True, True, False, False, True, False]], "list of numbers"),
        ([[1, 1, 5, 5, 3, 10**400]], "list of numbers"),
        ([[1, 1, 5, 5, 3, 1e39]], "beyond 1,000,000 pixels"),
        ([[1, 1, 5, 5, 3, -1000001]], "beyond 1,000,000 pixels"),
        ([3.0], "finite"),
        ({}, "size"),
        ({"size": [H], "counts": [1]}, "size"),
        ({"size": [W, H], "counts": [W * H]}, f"{H}x{W} pixels in an image of {W}x{H}"),
        ({"size": [H, W], "counts": [1, 2]}, "add up"),
        ({"size": [H, W], "counts": [-1, H * W + 1]}, "add up"),
        ({"size": [H, W], "counts": ["x"]}, "cannot be read"),
        ({"size": [H, W], "counts": [0.5, W * H - 0.5]}, "cannot be read"),
        ({"size": [H, W], "counts": "\x01"}, "cannot be read"),
        ({"size": [H, W], "counts": "o" * 40}, "cannot be read"),
        ({"size": [H, W], "counts": "é"}, "cannot be read"),
        ({"size": [H, W], "counts": ""}, "add up"),
        ({"size": [H, W]}, "counts"),
    ],
)
def test_malformed_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        read_segmentation(segmentation, W, H)


def test_masks_without_a_pixel():
    """Random slivers, specks and polygons beyond the image against what filling them tells."""
    rng = np.random.default_rng(0)
    middle = rng.uniform(-4, (W + 4, H + 4), (3000, 1, 2))
    spread = np.exp(rng.uniform(-3, 3, (3000, 1, 2))) * [1, 0.2]
    turn = rng.uniform(0, 6.3, (3000, 1))
    offset = rng.normal(size=(3000, 5, 2)) * spread
    x, y = offset[..., 0], offset[..., 1]
    points = middle + np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], -1)
    rings = [ring.astype(np.float32) for ring in points]
    sizes = np.tile([W, H], (len(rings), 1))
    store = MaskStore([Segmentation([ring]) for ring in rings])
    empty = store.load(0, len(rings), W, H).render(H, W, pixels=False).areas == 0
    assert 100 < empty.sum() < 2900
    assert np.array_equal(store.without_pixels(sizes, store.self_crossing()), empty)
    pairs = MaskStore([Segmentation(rings[i : i + 2]) for i in range(0, 3000, 2)] + [Segmentation([])])
    expected = [*(empty[0:3000:2] & empty[1:3000:2]), False]  # without polygons: not theirs to say
    assert np.array_equal(pairs.without_pixels(sizes[: len(expected)], pairs.self_crossing()), expected)


def test_rings_that_cross_themselves():
    def store(*rings):
        return MaskStore([Segmentation([np.array(ring, np.float32)]) for ring in rings])

    bow_tie = [[0, 0], [10, 10], [10, 0], [0, 10]]
    square = [[0, 0], [10, 0], [10, 10], [0, 10]]
    touching = [[0, 0], [10, 0], [5, 5], [10, 10], [0, 10], [5, 5]]  # in a point: no crossing
    doubled = [*square, *square]
    arrow = [[0, 0], [10, 0], [3, 3], [0, 10]]
    pentagram = [[math.cos(a), math.sin(a)] for a in np.arange(5) * 4 * math.pi / 5]
    found = store(bow_tie, square, touching, doubled, arrow, pentagram).self_crossing()
    assert found.tolist() == [True, False, False, False, False, True]
    rng = np.random.default_rng(7)
    assert not store(*(star(rng, (60, 50), 40, 25) for _ in range(50))).self_crossing().any()
    assert store(*(rng.uniform(0, 90, (25, 2)) for _ in range(50))).self_crossing().all()


def test_caches_of_crowded_images_are_small():
    """The l recipe's caches (40 and 20 images of 640 px) with 100 masks an image, half of them RLEs: below 300 MB."""
    rng = np.random.default_rng(8)
    samples = []
    for index in range(44):
        segmentations = []
        for i in range(100):
            polygon = [star(rng, rng.uniform(100, 540, 2), rng.uniform(40, 100), 60).ravel().tolist()]
            rle = {"size": [640, 640], "counts": coco_mask.frPyObjects(polygon, 640, 640)[0]["counts"]}
            segmentations.append(polygon if i % 2 else rle)
        masks = outlines(*segmentations, width=640, height=640)
        boxes = masks.render(640, 640, pixels=False).extents
        image = np.zeros((640, 640, 3), np.uint8)
        samples.append(Sample(image, boxes, np.zeros(100, np.int64), index, "", masks))

    class Images(list):
        load = list.__getitem__

    recipe = recipe_for("l", 640, masks=True)
    augmenter = Augmenter(Images(samples), recipe)
    for batch in PlanSampler(len(samples), 1, recipe, 0, 0):
        found = augmenter[batch[0]]
        assert found[4].shape[1:] == (160, 160)
    cached = [*augmenter._tiles.values(), *augmenter._augmented.values()]
    assert len(cached) > 55 and np.mean([len(c.boxes) for c in cached]) > 80
    assert sum(c.image.nbytes + c.boxes.nbytes + c.labels.nbytes + c.masks.nbytes for c in cached) < 300e6


def smooth_logits(n, h, w, seed=0) -> torch.Tensor:
    torch.manual_seed(seed)
    return F.interpolate(torch.randn(1, n, max(h // 4, 2), max(w // 4, 2)), size=(h, w), mode="bicubic")[0] - 0.3


def at_image(logits, scale, shape, stride=8) -> torch.Tensor:
    """float64 oracle: bilinear at every pixel centre of the image, by grid_sample with the border's value beyond."""
    h, w = logits.shape[1:]
    y, x = (
        ((torch.arange(n, dtype=torch.float64) + 0.5) * s / stride / size * 2 - 1)
        for n, s, size in zip(shape, scale[::-1], (h, w), strict=True)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    return F.grid_sample(logits.double()[None], grid, padding_mode="border", align_corners=False)[0]


@pytest.mark.parametrize(
    ("size", "scale", "shape"),
    [
        ((20, 20), (1.0, 1.0), (160, 160)),
        ((20, 20), (0.5, 0.502), (190, 320)),  # a wide image: padding below
        ((20, 20), (160 / 107, 161 / 107), (107, 61)),  # a high one, enlarged
        ((10, 24), (2.7, 1.3), (33, 70)),
        ((1, 1), (1.0, 1.0), (8, 8)),
    ],
)
def test_predicted_masks_are_one_bilinear_interpolation(size, scale, shape):
    logits = smooth_logits(12, *size)
    masks = PredictedMasks(logits, scale, shape)
    exact = at_image(logits, scale, shape)
    found = masks.to_bool()
    assert found.shape == (12, *shape) and found.dtype == torch.bool
    assert torch.equal(found[exact.abs() > 1e-5], (exact > 0)[exact.abs() > 1e-5])
    for rle, mask in zip(masks.rles(), found.numpy(), strict=True):
        assert isinstance(rle["counts"], str) and rle["size"] == list(shape)
        assert np.array_equal(coco_mask.decode(rle), mask)
        assert rle["counts"] == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_at_the_networks_size_masks_are_torchs():
    logits = smooth_logits(5, 12, 20)
    expected = F.interpolate(logits[None], scale_factor=8, mode="bilinear")[0].sigmoid() > 0.5
    assert torch.equal(PredictedMasks(logits, (1.0, 1.0), (96, 160)).to_bool(), expected)


def test_empty_full_and_no_masks():
    logits = torch.stack([torch.full((6, 8), -1.0), torch.full((6, 8), 1.0), torch.full((6, 8), math.nan)])
    masks = PredictedMasks(logits, (1.0, 1.0), (48, 64))
    assert masks.to_bool().float().mean((1, 2)).tolist() == [0, 1, 0]
    assert [coco_mask.area(rle) for rle in masks.rles()] == [0, 48 * 64, 0]
    assert [len(p) for p in masks.polygons()] == [0, 1, 0]
    none = masks[torch.zeros(3, dtype=torch.bool)]
    assert none.to_bool().shape == (0, 48, 64) and none.rles() == [] and none.polygons() == []


def test_picking_and_resizing_predicted_masks():
    logits = smooth_logits(6, 20, 20)
    masks = PredictedMasks(logits, (0.5, 0.5), (320, 320))
    assert torch.equal(masks[torch.tensor([4, 1])].to_bool(), masks.to_bool()[[4, 1]])
    small = masks.resized(0.5, (160, 160)).to_bool()
    assert torch.equal(small, PredictedMasks(logits, (1.0, 1.0), (160, 160)).to_bool())


@pytest.mark.parametrize("kind", KINDS)
def test_encoding(kind):
    mask = random_mask(np.random.default_rng(9), kind)
    for region in (Region(0, 0, mask), Region(7, 5, mask[5:90, 7:100])):
        full = bitmap(region)
        assert np.array_equal(coco_mask.decode(encode(region, (H, W))).astype(bool), full)


def test_polygons_of_masks_fill_to_the_masks():
    masks = PredictedMasks(smooth_logits(20, 30, 30), (0.7, 0.8), (200, 230))
    for polygons, mask in zip(masks.polygons(), masks.to_bool().numpy(), strict=True):
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 200, 230))).astype(bool)
        assert (drawn & mask).sum() > 0.97 * (drawn | mask).sum()


def test_polygons_of_a_ring_leave_its_hole():
    y, x = np.mgrid[:60, :60] - 30
    ring = (x**2 + y**2 < 625) & (x**2 + y**2 > 144)
    polygons = outline(Region(5, 9, ring))
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, H, W))).astype(bool)
    full = bitmap(Region(5, 9, ring))
    assert (drawn & full).sum() > 0.95 * (drawn | full).sum()
