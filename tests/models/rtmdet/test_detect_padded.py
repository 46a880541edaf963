"""Detections of a fixed size are those of `detect`, to the bit; NMS in plain operators is that of the kernels."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet
from rtmdet_fast.export.graph import rotated_nms_padded
from rtmdet_fast.inference.detections import PaddedDetections
from rtmdet_fast.kernels.dynamic_mask import dynamic_mask_logits
from rtmdet_fast.kernels.nms import batched_nms_padded
from rtmdet_fast.models.rtmdet.instance_head import InstanceOutput
from rtmdet_fast.models.rtmdet.model import HEADS


@pytest.fixture(scope="module", params=HEADS)
def found(request):
    """A head and what its convolutions might have given for two images, the second with hardly a candidate, if any."""
    torch.manual_seed(0)
    model = RTMDet("nano", request.param, num_classes=5)
    output = model.eval()(torch.randn(2, 3, 64, 96))
    logits = tuple(2 * torch.randn_like(level) - 3 for level in output.logits)
    logits[0][1] -= 3
    logits[1][1] = logits[2][1] = -20
    for level in logits:  # equal scores, which come by prior
        level[0, 0] = level[0, 1] = level.mean()
    distances = tuple(10 * torch.randn_like(level) + 8 for level in output.distances)  # some boxes have no area
    output = output._replace(logits=logits, distances=distances)
    if request.param == "rotated":
        output = output._replace(angles=tuple(torch.randn_like(level) for level in output.angles))
    return model.bbox_head, output


@pytest.mark.parametrize("max_detections", [7, 300])
@pytest.mark.parametrize("capacity", [400, 5000])  # of 630 pairs
def test_they_are_those_of_detect(found, capacity, max_detections):
    head, output = found
    settings = replace(head.test_settings, score_threshold=0.2, max_detections=max_detections, nms_pre=5000)
    padded = head.detect_padded(output, (64, 96), settings, capacity)
    assert padded.candidates.tolist() == [
        sum(int((level[i].sigmoid() > 0.2).sum()) for level in output.logits) for i in range(2)
    ]
    assert 10 < padded.candidates.max() <= capacity
    for i, expected in enumerate(head.detect(output, (64, 96), settings)):
        count = int(padded.counts[i])
        assert count == len(expected.scores) and (i == 1 or count > 5)
        for name in ("boxes", "scores", "labels", "priors"):
            assert torch.equal(getattr(padded, name)[i, :count], getattr(expected, name))
        assert not padded.scores[i, count:].any() and (padded.labels[i, count:] == -1).all()
        assert not padded.boxes[i, count:].any()


def test_the_best_candidates_take_part_where_there_are_too_many(found):
    head, output = found
    settings = replace(head.test_settings, score_threshold=0.0, max_detections=10, nms_pre=5000)
    few = head.detect_padded(output, (64, 96), settings, 40)
    assert (few.candidates > 40).all()  # which tells that some may be missing
    best = torch.cat([level.flatten(1) for level in output.logits], 1).sigmoid().amax(1)
    assert torch.equal(few.scores.amax(1) <= best, torch.tensor([True, True])) and (few.counts > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_rotated_nms_of_plain_operators(seed):
    torch.manual_seed(seed)
    boxes = torch.cat((torch.rand(2, 150, 2) * 60, torch.rand(2, 150, 2) * 30 + 1, torch.randn(2, 150, 1)), 2)
    scores, labels = torch.rand(2, 150), torch.randint(0, 3, (2, 150))
    scores[0, 20:40] = scores[1, :5] = -torch.inf
    for keep in (10, 200):
        expected = batched_nms_padded(boxes, scores, labels, 0.1, keep)
        for a, b in zip(rotated_nms_padded(boxes, scores, labels, 0.1, keep), expected, strict=True):
            assert torch.equal(a, b)
    nothing = rotated_nms_padded(boxes, torch.full_like(scores, -torch.inf), labels, 0.1, 3)
    assert (nothing[0] == -1).all() and not nothing[1].any()


def test_mask_logits_of_plain_operators():
    torch.manual_seed(0)
    head = RTMDet("nano", "ins", num_classes=2).bbox_head
    kernels = tuple(torch.randn(2, 169, 48 // stride, 72 // stride) for stride in (8, 16, 24))
    output = InstanceOutput(kernels, kernels, kernels, torch.randn(2, 8, 6, 9))
    prior = torch.tensor([[0, 53, 54, 70], [3, 71, 30, 54]])
    padded = PaddedDetections(*(prior,) * 6)
    priors, flat = head.priors(output)[prior.flatten()], torch.cat([level.flatten(2) for level in kernels], 2).mT
    image = torch.arange(2).repeat_interleave(4)
    expected = dynamic_mask_logits(output.features, flat[image, prior.flatten()], priors[:, :2], priors[:, 2], image)
    torch.testing.assert_close(head.mask_logits(output, padded).flatten(0, 1), expected)


def test_small_inputs_have_fewer_pairs_than_there_is_room_for():
    model = RTMDet("nano", num_classes=1).eval()
    for cls in model.bbox_head.rtm_cls:
        nn.init.zeros_(cls.bias)
    padded = model.bbox_head.detect_padded(
        model(torch.randn(1, 3, 32, 32)), (32, 32), model.test_settings, capacity=1000
    )
    assert padded.candidates.tolist() == [21] and padded.boxes.shape == (1, 300, 4)


def test_priors_are_made_once_for_inference(found):
    head, output = found
    with torch.inference_mode():
        kept = head.priors(output)
    assert not kept.is_inference()
    with torch.no_grad():
        assert head.priors(output) is kept
    made = head.priors(output)
    assert made is not kept and torch.equal(made, kept)
