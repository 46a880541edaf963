"""Models of random weights that find much, for tests and benches that compare two ways to detect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtmdet_fast import RTDETR, RTMDet
from rtmdet_fast.export.export import noise
from rtmdet_fast.models.detector import Detector


@torch.no_grad()
def confident(
    task: str, size: str, image_size: int, class_names: Sequence[str] = ("a", "b", "c"), **options: Any
) -> Detector:
    """A model in eval mode that finds much of every class, of every angle, no two scores alike.

    task: RTMDet's, or "rtdetr". options: of RT-DETR's constructor.
    """
    torch.manual_seed(0)
    if task == "rtdetr":
        model: Detector = RTDETR(size, class_names=class_names, **options).eval()
    else:
        model = RTMDet(size, task, class_names=class_names).eval()
    model.image_size = image_size
    if task == "rtdetr":
        # what is selected decides what the decoder sees
        _spread(model, [([model.decoder.enc_score_head], 1.5, -2.0)])
        layer = model.decoder.num_layers - 1
        score, box = model.decoder.dec_score_head[layer], model.decoder.dec_bbox_head[layer].layers[-1]
        _spread(model, [([score], 1.5, -2.0), ([box], 0.3, 0.0)])
        return model
    # such that activations do not die out over the layers; they grow, in x less, where they would leave float32
    variances = (0.08, 0.24) if size == "x" else (0.02, 0.1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, *variances)  # type: ignore[arg-type]
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    head = model.bbox_head
    sides = (0.3, 0.2) if head.exponential else (0.3, 1.2)  # in strides, or their logarithm
    wanted = [(head.rtm_cls, 1.5, -2.0), (head.rtm_reg, *sides)]
    wanted += [(head.rtm_ang, 1.0, 0.0)] if task == "rotated" else []
    wanted += [(head.rtm_kernel, 1.0, 0.0)] if task == "ins" else []
    _spread(model, wanted)
    return model


def _spread(model: Detector, wanted: Sequence[tuple[Any, float, float]]) -> None:
    """Random weights in layers, such that on noise each channel of their outputs has that deviation and mean."""
    found: dict[nn.Module, Tensor] = {}

    def look(layer: nn.Module, _: Any, values: Tensor) -> None:
        found[layer] = (values.transpose(0, 1) if values.dim() == 4 else values.movedim(-1, 0)).flatten(1)

    for layers, _, _ in wanted:
        for layer in layers:
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.register_forward_hook(look)
    model(noise(2, model.image_size))
    for layers, spread, mean in wanted:
        for layer in layers:
            layer._forward_hooks.clear()
            scale = spread / found[layer].std(1)
            assert scale.isfinite().all(), "what the layer gives has left float32"
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.copy_(mean - scale * found[layer].mean(1))
