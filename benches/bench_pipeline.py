"""The training input pipeline (decoding, mosaic, resize, crop, HSV, flip, mixup) on drawn images, in one process.

A call is 16 images. Ours includes stacking them into a batch; mmdet stacks later, in its data preprocessor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benches.bench_training import DRAWN_CLASSES
from benches.harness import Case, Contender, Parity
from benches.models import drawn, mmdet_config, resized

SIDE, IMAGES, FIRST = 640, 16, 256  # the first call fills the caches; its images are compared


def cases(device: torch.device) -> list[Case]:
    return [_case(size) for size in ("tiny", "l")]


def _case(size: str) -> Case:
    return Case(
        op="pipeline",
        name=f"recipe of RTMDet-{size}, {IMAGES} images of 3 x {SIDE} x {SIDE} from drawn scenes of 512 px",
        shapes={"images": [IMAGES, 3, SIDE, SIDE]},
        inputs=lambda seed: (),
        expected=lambda: statistics(ours(size, seed=1)()),
        compare=_compare,
        least=15,
        contenders=[
            Contender(name="reference", build=lambda: ours(size), result=statistics),
            Contender(name="mmdet", build=lambda: mmdet(size), result=statistics),
        ],
    )


def ours(size: str, seed: int = 0) -> Callable[[], Any]:
    paths = drawn(200, 512)
    from rtmdet_fast.data.augment import Augmenter, collate
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.data.plan import PlanSampler
    from rtmdet_fast.data.recipes import recipe_for

    data, recipe = CocoDataset(paths.train_ann, paths.train_images, training=True), recipe_for(size, SIDE)
    sampler, augmenter = PlanSampler(len(data), IMAGES, recipe, seed, 0), Augmenter(data, recipe)

    def images() -> Iterator[Any]:
        while True:
            for batch in sampler:
                for plan in batch:
                    yield augmenter[plan]

    return _calls(images(), collate)


def mmdet(size: str) -> Callable[[], Any]:
    paths = drawn(200, 512)
    config = mmdet_config(size)
    from mmdet.datasets import CocoDataset  # type: ignore[import-not-found]

    from rtmdet_fast.data.shapes import CLASSES

    data = CocoDataset(
        ann_file=str(paths.train_ann),
        data_prefix=dict(img=str(paths.train_images)),
        metainfo=dict(classes=CLASSES),
        pipeline=resized([dict(step) for step in config.train_pipeline], SIDE),
        filter_cfg=dict(filter_empty_gt=True, min_size=8),
    )

    def images() -> Iterator[Any]:
        while True:
            for i in np.random.default_rng(0).permutation(len(data)):
                yield data[int(i)]

    return _calls(images(), list)


def _calls(images: Iterator[Any], stack: Callable[[list[Any]], Any]) -> Callable[[], Any]:
    sizes = itertools.chain([FIRST], itertools.repeat(IMAGES))
    return lambda: stack(list(itertools.islice(images, next(sizes))))


def statistics(found: Any) -> dict[str, float]:
    """What two pipelines of one recipe must share, and that images and boxes are sound."""
    if isinstance(found, list):
        pictures = torch.stack([one["inputs"] for one in found])
        instances = [one["data_samples"].gt_instances for one in found]
        boxes = [getattr(one.bboxes, "tensor", one.bboxes) for one in instances]
        labels = torch.cat([one.labels for one in instances])
    else:
        pictures = found.images
        boxes = [box[:count] for box, count in zip(found.gt_boxes, found.gt_counts, strict=True)]
        labels = torch.cat([one[:count] for one, count in zip(found.gt_labels, found.gt_counts, strict=True)])
    every = torch.cat(boxes)
    side = every[:, 2:] - every[:, :2]
    if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != (3, SIDE, SIDE):
        raise Parity(f"images are {pictures.dtype} {tuple(pictures.shape)}")
    if not ((every >= 0) & (every <= SIDE)).all() or not (side > 0).all():
        raise Parity("boxes outside the image or empty")
    if not ((labels >= 0) & (labels < DRAWN_CLASSES)).all():
        raise Parity("labels that are no classes")
    return {
        "boxes per image": len(every) / len(boxes),
        "px of a box's side": side.prod(1).sqrt().mean().item(),
        "grey level": pictures.float().mean().item(),
    }


def _compare(result: dict[str, float], expected: dict[str, float]) -> str:
    for name, value in result.items():
        if abs(value - expected[name]) > 0.2 * expected[name]:
            raise Parity(f"{value:.3g} {name} instead of {expected[name]:.3g}")
    return ", ".join(f"{value:.3g} {name}" for name, value in result.items()) + f" over {FIRST} images"
