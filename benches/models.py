"""Whole models and layers for the benches: ours and mmdet's with the same weights, and ours in plain PyTorch."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benches import bench_assign
from benches.harness import Absent
from rtmdet_fast import RTMDet
from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet import detection_head

LEARNING_RATE, WEIGHT_DECAY, EMA_MOMENTUM = 1e-4, 0.05, 2e-4


@cache
def weights(size: str, classes: int) -> dict[str, Tensor]:
    """Weights of a seeded model whose outputs are in the range of a trained one's, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RTMDet(size, num_classes=classes).train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        head, width = model.bbox_head, model.bbox_head.rtm_reg[0].in_channels
        for cls, reg in zip(head.rtm_cls, head.rtm_reg, strict=True):
            nn.init.normal_(cls.weight, std=1.5 * width**-0.5)
            nn.init.constant_(cls.bias, -4.6)
            nn.init.normal_(reg.weight, std=0.5 * width**-0.5)
            nn.init.constant_(reg.bias, 0.7 if head.exponential else 2.0)
        with torch.no_grad():  # statistics of its own activations, or they would die out in inference
            model(torch.randn(2, 3, 128, 128))
    return {key: value.clone() for key, value in model.state_dict().items()}


def ours(size: str, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> RTMDet:
    model = RTMDet(size, num_classes=classes)
    model.load_state_dict(weights(size, classes))
    return model.to(device, dtype)


def mmdet_config(size: str) -> Any:
    """mmdet's config of a size, with its modules registered; raises Absent without mmdet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import mmdet  # type: ignore[import-not-found]
            from mmdet.utils import register_all_modules  # type: ignore[import-not-found]
            from mmengine.config import Config  # type: ignore[import-not-found]
            from mmengine.logging import MMLogger  # type: ignore[import-not-found]
        except (ImportError, AssertionError) as error:  # mmdet asserts on the version of mmcv
            raise Absent(str(error)) from error
        register_all_modules()
        MMLogger.get_current_instance().setLevel("ERROR")
        return Config.fromfile(
            next((Path(mmdet.__file__).parent / ".mim/configs/rtmdet").glob(f"rtmdet_{size}_8xb32*"))
        )


def mmdet_model(size: str, classes: int, device: torch.device, *, image_size: int = 640) -> tuple[nn.Module, Any]:
    """mmdet's model with our weights, and its config."""
    config = mmdet_config(size)
    from mmdet.registry import MODELS  # type: ignore[import-not-found]

    settings = resized(config.model.to_dict(), image_size)
    settings["backbone"].pop("init_cfg", None)
    settings["bbox_head"]["num_classes"] = classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS.build(settings)
    model.load_state_dict(weights(size, classes))
    return model.to(device), config


def resized(settings: Any, image_size: int) -> Any:
    """A config of mmdet for another image size than 640, without synchronisation of a single process's statistics."""
    if isinstance(settings, dict):
        return {key: resized(value, image_size) for key, value in settings.items() if key != "backend_args"}
    if isinstance(settings, (list, tuple)):
        return type(settings)(resized(value, image_size) for value in settings)
    return {640: image_size, 1280: 2 * image_size, "SyncBN": "BN"}.get(settings, settings)


def plain(function: Callable[..., Any], *, per_image: bool = False) -> Callable[..., Any]:
    """`function` with PyTorch in place of the kernels; `per_image`: with the assigner as published, too."""

    def assign(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        gt, iou = bench_assign.eager(*inputs[:6])  # the seventh are centres of masks, of which there are none
        labels = inputs[4].gather(1, gt.clamp(min=0)).where(gt >= 0, -1)
        return gt, iou, labels

    def run(*inputs: Any) -> Any:
        backend, assigner = _dispatch.BACKEND, detection_head.dynamic_soft_label_assign
        _dispatch.BACKEND = "torch"
        if per_image:
            detection_head.dynamic_soft_label_assign = assign
        try:
            return function(*inputs)
        finally:
            _dispatch.BACKEND, detection_head.dynamic_soft_label_assign = backend, assigner

    return run


def pictures(batch: int, side: int, device: torch.device, seed: int) -> Tensor:
    """[B, 3, S, S] uint8: smooth colours and some noise."""
    g = torch.Generator(device).manual_seed(seed)
    coarse = torch.rand(batch, 3, side // 32, side // 32, generator=g, device=device)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.randn(batch, 3, side, side, generator=g, device=device)
    return (255 * smooth + 10 * noise).clamp(0, 255).byte()


def objects(batch: int, count: int, classes: int, side: int, device: torch.device, seed: int) -> Targets:
    """Boxes of 8 to half of `side` pixels, at random places."""
    g = torch.Generator(device).manual_seed(seed)
    rand = partial(torch.rand, generator=g, device=device)
    center, half = rand(batch, count, 2) * side, 4 * (side / 16) ** rand(batch, count, 2)
    boxes = torch.cat([center - half, center + half], -1).clamp(0, side)
    labels = torch.randint(classes, (batch, count), generator=g, device=device)
    return Targets(boxes, labels, torch.full((batch,), count, device=device))


def gradients(model: nn.Module) -> Tensor:
    """All gradients of a model in one vector, by the parameters' names."""
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


@cache
def drawn(count: int, side: int) -> Any:
    """A data set of drawn shapes; raises Absent without OpenCV."""
    try:
        from rtmdet_fast.data.shapes import make_shapes
    except ImportError as error:
        raise Absent(str(error)) from error
    root = Path(tempfile.gettempdir()) / f"rtmdet_fast_bench_{os.getuid()}_{count}_{side}"
    return make_shapes(root, num_train=count, num_val=1, image_size=side)


def forever(source: Iterable[Any]) -> Iterable[Any]:
    while True:
        yield from source
