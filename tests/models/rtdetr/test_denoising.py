"""Denoising queries against the published ones, the same where the draws are, to the last digit of a logarithm."""

import math

import pytest
import torch
from rtdetr_reference import load, padded

from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.boxes import inverse_sigmoid
from rtmdet_fast.models.rtdetr.denoising import Noise, denoising_queries, draw_noise


def noise_of(case):
    """The stored draws, of which the published implementation makes those that it needs."""
    draws, settings = list(case["draws"]), case["settings"]
    labels = [draws.pop(0), draws.pop(0)] if settings["label_noise_ratio"] > 0 else [None, None]
    return Noise(*labels, *(draws if settings["box_noise_scale"] > 0 else (None, None)))


def scene(counts=(3, 0, 5), classes=80, seed=0):
    """Boxes about the middle, none of them half as large as the image."""
    g = torch.Generator().manual_seed(seed)
    least, more = torch.tensor([0.4, 0.4, 0.05, 0.05]), torch.tensor([0.2, 0.2, 0.2, 0.2])
    return padded(
        [
            {"boxes": least + more * torch.rand(n, 4, generator=g), "labels": torch.randint(classes, (n,), generator=g)}
            for n in counts
        ]
    )


@pytest.mark.parametrize("version", [1, 2])
def test_the_published_queries(shared, version):
    cases = load(shared, "unit_cases.pt")[f"v{version}"]["dn"]
    assert len(cases) == {1: 9, 2: 8}[version]
    for case in cases:
        targets = padded(case["targets"])
        noise = noise_of(case) if case["draws"] else None
        found = denoising_queries(targets, 80, 300, **case["settings"], noise=noise, dummy=version == 2)
        if case.get("none"):
            assert found is None
            continue
        boxes = case["boxes_unact"]
        if case["settings"]["box_noise_scale"] == 0:  # the published ones are not made logits
            boxes = inverse_sigmoid(boxes)
        assert torch.equal(found.labels, case["labels"].long())
        # the last digit of MKL's logarithm is not the same on every processor (it is with MKL_CBWR=COMPATIBLE)
        torch.testing.assert_close(found.boxes_unact, boxes, rtol=2**-23, atol=0)
        assert torch.equal(found.attn_mask, case["attn_mask"])
        assert found.positives.shape[1] == case["num_group"]
        for positives, expected in zip(found.positives, case["positive_idx"], strict=True):
            assert positives[positives >= 0].tolist() == expected.tolist()


@pytest.mark.parametrize(("label_noise_ratio", "box_noise_scale"), [(0.5, 1.0), (0.0, 0.4), (1.0, 0.0)])
def test_draws_are_in_the_published_order(label_noise_ratio, box_noise_scale):
    labels = torch.zeros(2, 6, dtype=torch.int64)
    torch.manual_seed(1)
    expected = [None] * 4
    if label_noise_ratio > 0:
        expected[:2] = torch.rand(2, 6), torch.randint(0, 80, (2, 6), dtype=torch.int32)
    if box_noise_scale > 0:
        expected[2:] = torch.randint_like(torch.zeros(2, 6, 4), 0, 2), torch.rand(2, 6, 4)
    torch.manual_seed(1)
    for found, drawn in zip(draw_noise(labels, 80, label_noise_ratio, box_noise_scale), expected, strict=True):
        assert (found is None) == (drawn is None)
        assert found is None or (found == drawn).all()


def test_the_mask_by_its_rules():
    found = denoising_queries(scene((2, 1)), 80, 5, num_denoising=6)
    half, N = 2, 12
    for i in range(N + 5):
        for j in range(N + 5):
            of_denoising = j < N  # others may be looked at by all
            same_group = i < N and i // (2 * half) == j // (2 * half)
            assert found.attn_mask[i, j] == (of_denoising and not same_group)


def test_how_far_edges_move():
    """Positives by up to half a box, negatives by half to a whole."""
    targets = scene()
    found = denoising_queries(targets, 80, 300)
    groups, width = found.positives.shape[1:]
    x, y, w, h = found.boxes_unact.sigmoid().unbind(-1)
    edges = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1).view(3, groups, 2, width, 4)
    for image, count in ((0, 3), (2, 5)):
        cx, cy, gw, gh = targets.boxes[image, :count].unbind(-1)
        true = torch.stack((cx - gw / 2, cy - gh / 2, cx + gw / 2, cy + gh / 2), -1)
        moved = (edges[image, :, :, :count] - true).abs() / torch.stack((gw, gh, gw, gh), -1)
        # where edges cross, the negative size is clamped to 0
        crossed = (torch.stack((w, h), -1).view(3, groups, 2, width, 2)[image, :, :, :count] < 1e-4).any(-1)
        assert not crossed[:, 0].any() and 0 < crossed[:, 1].float().mean() < 0.8
        positive, negative = moved[:, 0], moved[:, 1][~crossed[:, 1]]
        assert (positive < 0.5 + 1e-3).all() and positive.min() < 0.1 and positive.max() > 0.4
        assert ((negative > 0.5 - 1e-3) & (negative < 1 + 1e-3)).all() and negative.min() < 0.6 and negative.max() > 0.9
    assert 0.2 < (found.labels.view(3, -1, width)[2] != targets.labels[2]).float().mean() < 0.3


def test_without_noise_they_are_the_ground_truths():
    targets = scene()
    found = denoising_queries(targets, 80, 300, label_noise_ratio=0, box_noise_scale=0)
    for image, count in enumerate(targets.counts.tolist()):
        for query in found.positives[image, :, :count].flatten(), found.positives[image, :, :count].flatten() + 5:
            torch.testing.assert_close(
                found.boxes_unact[image, query].sigmoid(), targets.boxes[image, :count].repeat(20, 1)
            )
            assert torch.equal(found.labels[image, query], targets.labels[image, :count].repeat(20))
    padding = found.labels == 80
    assert padding.sum() == 200 * 3 - 2 * 20 * (3 + 5)
    assert (found.boxes_unact[padding] == inverse_sigmoid(torch.tensor(0.0))).all()


def test_noise_is_new_every_time():
    targets = scene()
    first, second = denoising_queries(targets, 80, 300), denoising_queries(targets, 80, 300)
    assert not torch.equal(first.boxes_unact, second.boxes_unact)


@pytest.mark.parametrize("classes", [1, 365])
def test_any_number_of_classes(classes):
    found = denoising_queries(scene(classes=classes), classes, 10, label_noise_ratio=2)
    assert found.labels.max() == classes
    assert (found.labels[found.labels != classes] < classes).all()


def test_a_batch_without_objects_has_a_pair_of_padding():
    """Else the class embedding has no gradient, for which other processes wait."""
    targets = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    found = denoising_queries(targets, 3, 5)
    assert found.labels.tolist() == [[3, 3], [3, 3]]
    assert found.positives.shape == (2, 1, 0)
    assert found.boxes_unact.isfinite().all()
    assert denoising_queries(targets, 3, 5, dummy=False) is None


def test_the_logit():
    values = torch.tensor([0.0, 1e-7, 0.25, 0.5, 1.0, -3.0, 3.0])
    low = math.log(1e-5)
    expected = torch.tensor([low, low, math.log(1 / 3), 0.0, -low, low, -low])
    torch.testing.assert_close(inverse_sigmoid(values), expected)
