"""A model of random weights that finds much, for tests that compare two ways to detect."""

import numpy as np
import torch
from torch import nn

from rtmdet_fast import RTMDet


def busy(task: str) -> RTMDet:
    """A model of random weights that finds much of every class, of every angle, no two scores alike."""
    torch.manual_seed(0)
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


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(96, 96), (60, 96), (96, 33), (200, 150), (17, 40)]
    return [rng.integers(0, 256, (*shapes[i % len(shapes)], 3), np.uint8) for i in range(count)]


def assert_alike(found, expected):
    """The same detections; those whose scores differ by rounding may have changed places."""
    assert len(found) == len(expected)
    away = (found.boxes[:, None] - expected.boxes).abs().amax(2) + (found.labels[:, None] != expected.labels) * 1e9
    nearest: list[int] = []
    for row in away:
        row[nearest] = torch.inf
        nearest.append(int(row.argmin()))
    expected = expected[nearest]
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    assert found.labels.tolist() == expected.labels.tolist()
    if expected.predicted_masks is not None:
        logits, other = expected.predicted_masks.logits, found.predicted_masks.logits
        torch.testing.assert_close(other, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
        for field in ("scale", "shape", "stride", "offset"):
            assert getattr(found.predicted_masks, field) == getattr(expected.predicted_masks, field)
