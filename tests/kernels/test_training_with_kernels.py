"""A short training with the Triton kernels forced on equals the one with the references, loss by loss."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.detection_head import DetectionHead
from rtmdet_fast.models.rtmdet.layers import ConvModule, CSPNeXtBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = _dispatch.AVAILABLE and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
pytestmark = pytest.mark.skipif(not runs_triton, reason="needs CUDA or TRITON_INTERPRET=1")


class MiniDetector(nn.Module):
    """All kinds of layers of RTMDet once: dense, depth-wise and point-wise convolutions, an identity, the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvModule(3, 8, 3, 2), nn.AvgPool2d(2), ConvModule(8, 8, 3, 2))
        self.block = CSPNeXtBlock(8, identity=True)
        self.head = DetectionHead(8, num_classes=2)
        for cls, reg in zip(self.head.rtm_cls, self.head.rtm_reg, strict=True):  # so that boxes and scores matter
            nn.init.constant_(cls.bias, -1.0)
            nn.init.constant_(reg.bias, 1.5)

    def forward(self, images: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        x = self.block(self.stem(images))
        return self.head.loss(self.head((x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4))), targets)


def losses_of_a_run(backend: str, monkeypatch: pytest.MonkeyPatch, steps: int) -> torch.Tensor:
    monkeypatch.setattr(_dispatch, "BACKEND", backend)
    torch.manual_seed(0)
    model = MiniDetector().to(DEVICE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    boxes = torch.tensor([[[4.0, 6, 40, 60], [20, 4, 56, 28]], [[0, 0, 60, 52], [0, 0, 0, 0]]], device=DEVICE)
    targets = Targets(boxes, torch.tensor([[0, 1], [1, -1]], device=DEVICE), torch.tensor([2, 1], device=DEVICE))
    history = []
    for _ in range(steps):
        losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack(list(losses.values())).detach())
    return torch.stack(history).cpu()


def test_losses_are_those_of_the_references(monkeypatch):
    steps = 10 if DEVICE == "cuda" else 3
    expected = losses_of_a_run("torch", monkeypatch, steps)
    found = losses_of_a_run("triton", monkeypatch, steps)
    assert (expected[0] - expected[-1]).abs().max() > 1e-3  # the weights do move
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
