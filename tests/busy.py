"""A model of random weights that finds much, for tests that compare two ways to detect."""

import numpy as np
import torch
from torch import nn

from rtmdet_fast import RTDETR, RTMDet
from rtmdet_fast.models.detector import Detector


def busy(task: str) -> Detector:
    """A model of random weights that finds much of every class, of every angle, no two scores alike.

    Of RTMDet by its task, or with "rtdetr" of RT-DETR.
    """
    torch.manual_seed(0)
    if task == "rtdetr":
        return busy_rtdetr()
    model = RTMDet("nano", task, class_names=["a", "b", "ç"])
    head = model.bbox_head
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.02, 0.1)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    noise = torch.randn(4, 3, 96, 96)
    predicted = {"logits": (head.rtm_cls, 2, -2), "distances": (head.rtm_reg, 0.3, 1.2)}
    predicted |= {"angles": (head.rtm_ang, 1, 0)} if task == "rotated" else {}
    predicted |= {"kernels": (head.rtm_kernel, 1, 0)} if task == "ins" else {}
    with torch.no_grad():
        for layers, _, _ in predicted.values():
            for layer in layers:
                nn.init.normal_(layer.weight)
        output = model.eval()(noise)
        for name, (layers, spread, mean) in predicted.items():
            for level, layer in enumerate(layers):
                values = getattr(output, name)[level]
                layer.weight.mul_(spread * (8 * 2**level if name == "distances" else 1) / values.std())
                nn.init.constant_(layer.bias, mean)
    model.image_size = 96
    return model


def busy_rtdetr() -> RTDETR:
    model = RTDETR("r18", class_names=["a", "b", "ç"], num_queries=40, num_decoder_layers=2).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.02, 0.1)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    decoder = model.decoder
    with torch.no_grad():
        for head, spread, mean in ((decoder.dec_score_head[-1], 2, -1), (decoder.dec_bbox_head[-1].layers[-1], 0.7, 0)):
            nn.init.normal_(head.weight)
            nn.init.zeros_(head.bias)
            seen = []
            hook = head.register_forward_hook(lambda _, __, values, seen=seen: seen.append(values))
            model(torch.rand(4, 3, 96, 96))
            hook.remove()
            # as far apart as that, though all queries are much alike
            away = seen[0] - seen[0].mean((0, 1))
            factor = spread / away.std()
            head.weight.mul_(factor)
            head.bias.copy_(mean - factor * seen[0].mean((0, 1)))
    model.image_size = 96
    return model


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
