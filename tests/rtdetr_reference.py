"""The fixtures of RT-DETR's published implementation, and its ground truths as this library takes them."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rtmdet_fast.models.detector import Targets


def fixture_recipe(shared: Path) -> ModuleType:
    """The module that makes the fixtures' weights, images and boxes out of names."""
    spec = importlib.util.spec_from_file_location("fixture_recipe", shared / "reference/rtdetr/fixture_recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(shared: Path, name: str) -> Any:
    return torch.load(shared / "reference/rtdetr" / name, weights_only=True)


def padded(targets: list[dict[str, torch.Tensor]]) -> Targets:
    """Ground truths of images, boxes cxcywh; the padding is such that whoever looks at it is found out."""
    counts = torch.tensor([len(image["labels"]) for image in targets])
    boxes = torch.full((len(targets), int(counts.max()), 4), math.nan)
    labels = torch.full(boxes.shape[:2], -1)
    for i, image in enumerate(targets):
        boxes[i, : counts[i]], labels[i, : counts[i]] = image["boxes"], image["labels"]
    return Targets(boxes, labels, counts)


def pairs_by_target(pairs: list[tuple[torch.Tensor, torch.Tensor]], width: int) -> torch.Tensor:
    """[B, M] queries of the ground truths, -1 without one, from each image's (queries, ground truths)."""
    out = torch.full((len(pairs), width), -1)
    for image, (query, target) in zip(out, pairs, strict=True):
        image[target] = query
    return out
