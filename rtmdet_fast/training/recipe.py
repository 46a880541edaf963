"""How each family of models is trained: all that the loop does not share between them.

The criterion and what it makes of the targets are the model's own: in training mode it turns images and targets into
losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from rtmdet_fast.data.augment import Augmenter
from rtmdet_fast.data.augment_detr import DetrAugmenter
from rtmdet_fast.data.augment_rotated import RotatedAugmenter
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.recipes import AugmentRecipe, DetrRecipe, multi_scale_sizes, recipe_for, rotated_recipe
from rtmdet_fast.errors import UserError
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.rtdetr.decoder import Sampling
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtdetr.recipe import LR, training_recipe
from rtmdet_fast.models.rtmdet.detection_head import ASSIGNERS
from rtmdet_fast.models.rtmdet.model import RTMDet, default_image_size
from rtmdet_fast.training.schedule import ema_share, learning_rate_factor, parameter_groups, warmup_factor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The published training of a model, whose every number a run's settings may replace."""

    size: str
    version: int | None = None
    """Of the model; None where a family has but one."""
    build: Callable[..., Detector]
    """`class_names=` → a fresh model."""
    needs_init: bool = False
    """Whether parts that training leaves as they are, frozen batch norms, come from other weights."""
    image_size: int
    """Side of the training images in pixels."""
    epochs: int
    stage2_of: Callable[[int], int] = lambda epochs: 0
    """Epochs of a run → the last ones of them, without strong augmentation."""
    batch_size: int
    """Images per process."""
    lr: float
    """At `lr_batch` images per step of all processes; as the square root of their number elsewhere."""
    lr_batch: int
    lr_steps: int = 0
    """Steps of the published run; in one of fewer the rate is higher, by what 720 steps were best with
    (docs/figures.md). 0 where it is the same."""
    lr_factor: Callable[[int, int, int], float]
    """Iteration from 0, iterations of the run, those of warm-up → factor on the base rate."""
    warmup: int
    """Iterations of warm-up."""
    weight_decay: float
    parameter_groups: Callable[[nn.Module, float], list[dict[str, Any]]]
    """Model, weight decay → groups of AdamW, each with an `lr_factor` on its rate."""
    clip_norm: float | None = None
    """Greatest norm of the gradient of all parameters."""
    ema_share: Callable[[int, int, float | None], float]
    """Step from 0, steps of the run, momentum (None: by the length of the run) → share of the new weights then."""
    batch_sides: Callable[[int], tuple[int, ...]]
    """Image size → sides in pixels, to one of which each batch is resized at random under strong augmentation."""
    caches: AugmentRecipe | None = None
    """Which says what the caches of plans hold; None where there are none."""
    empty_images: bool = False
    """Whether images without objects are trained on."""
    augment: Callable[[CocoDataset, int], Dataset]
    """Data set, image size in pixels → training samples by their plans."""

    def lr_of(self, images: int, steps: int | None = None) -> float:
        """The learning rate at that many images per step of all processes, in a run of so many steps, or of as many as
        published."""
        shorter = 1.0 if steps is None else min(max(self.lr_steps / steps, 1.0) ** (1 / 8), 2.0)
        return self.lr * math.sqrt(images / self.lr_batch) * shorter


def rtmdet_recipe(
    size: str | None,
    version: int | None,
    task: str,
    queries: int | None,
    sampling: str | None = None,
    assigner: str | None = None,
) -> Recipe:
    """Of RTMDet; the size is tiny where not given. UserError where there is no such model."""
    size = "tiny" if size is None else size
    for name, value in (("version", version), ("queries", queries), ("sampling", sampling)):
        if value is not None:
            raise UserError(f"--{name} {value} is for --model rtdetr: rtmdet has no such thing")
    if assigner not in (None, *ASSIGNERS):
        raise UserError(f"--assigner {assigner!r} is unknown; choose one of {', '.join(ASSIGNERS)}")
    image_size = default_image_size(size, task)
    shared: dict[str, Any] = dict(
        size=size,
        build=partial(_build_rtmdet, size, task, assigner or ASSIGNERS[0]),
        image_size=image_size,
        lr_factor=learning_rate_factor,
        warmup=1000,
        weight_decay=0.05,
        parameter_groups=parameter_groups,
        ema_share=partial(_rtmdet_share, DOTA_STEPS if task == "rotated" else COCO_STEPS),
        batch_sides=_one_side,
    )
    if task == "rotated":
        return Recipe(**shared, epochs=36, batch_size=8, lr=2.5e-4, lr_batch=8, augment=_augment_rotated)
    return Recipe(
        **shared,
        epochs=300,
        stage2_of=_rtmdet_stage2,
        batch_size=32,
        lr=2e-3 if size == "x" else 4e-3,
        lr_batch=256,
        lr_steps=COCO_STEPS,
        caches=recipe_for(size, image_size),
        augment=partial(_augment, size),
    )


def _build_rtmdet(size: str, task: str, assigner: str, **options: Any) -> RTMDet:
    model = RTMDet(size, task, **options)
    model.bbox_head.assigner = assigner
    return model


def _one_side(image_size: int) -> tuple[int, ...]:
    return (image_size,)


def _augment(size: str, dataset: CocoDataset, image_size: int) -> Augmenter:
    return Augmenter(dataset, recipe_for(size, image_size, masks=dataset.has_masks))


def _augment_rotated(dataset: CocoDataset, image_size: int) -> RotatedAugmenter:
    return RotatedAugmenter(dataset, rotated_recipe(image_size, dataset.class_names))


COCO_STEPS = 137_000
"""Of the published training: 300 epochs of COCO's 117,266 images with objects, 256 at a step."""
DOTA_STEPS = 40_000
"""Likewise, 36 epochs of DOTA's windows, 8 at a step; rather few, as their number hangs on how DOTA was split."""


def _rtmdet_stage2(epochs: int) -> int:
    """As many as published, not their share of the run: short runs learn more from images as they are."""
    return min(20, epochs // 2)


def _rtmdet_share(published: int, step: int, total: int, momentum: float | None) -> float:
    """As published in a run of as many steps; a shorter one is averaged by the same schedule, compressed to its length.

    The first update takes the model over whole.
    """
    if step == 0:
        return 1.0
    if momentum is not None:
        return ema_share(step, momentum)
    shorter = max(published / total, 1.0)
    return ema_share(step, min(2e-4 * shorter, 1.0), 2000 / shorter)


def rtdetr_recipe(
    size: str | None,
    version: int | None,
    task: str,
    queries: int | None,
    sampling: str | None = None,
    assigner: str | None = None,
) -> Recipe:
    """Of RT-DETR; r18, version 1 (h: 2) and bilinear where not given. UserError where there is no such model."""
    size = "r18" if size is None else size
    if version is None:
        version = 2 if size == "h" else 1
    if task != "det":
        raise UserError(f"--task {task} is for --model rtmdet: rtdetr finds boxes, det, alone")
    if assigner is not None:
        raise UserError(f"--assigner {assigner} is for --model rtmdet: rtdetr matches each object with one query")
    if sampling not in (None, "bilinear", "discrete"):
        raise UserError(f"--sampling {sampling!r} is unknown; choose bilinear or discrete")
    if sampling == "discrete" and version == 1:
        raise UserError("--sampling discrete is for --version 2")
    method: Sampling = "discrete" if sampling == "discrete" else "bilinear"
    published = training_recipe(size, version, method)
    return Recipe(
        size=size,
        version=version,
        build=partial(RTDETR, size, version=version, num_queries=300 if queries is None else queries, sampling=method),
        needs_init=size not in ("r18", "r34"),
        image_size=640,
        epochs=published.epochs,
        stage2_of=partial(_rtdetr_stage2, published.plain_epochs, published.epochs),
        batch_size=16,
        lr=LR,
        lr_batch=16,
        lr_factor=warmup_factor,
        warmup=published.warmup,
        weight_decay=1e-4,
        parameter_groups=published.parameter_groups,
        clip_norm=0.1,
        ema_share=_rtdetr_share,
        batch_sides=multi_scale_sizes if published.multi_scale else _one_side,
        empty_images=True,
        augment=_augment_detr,
    )


def _rtdetr_stage2(plain: int, published: int, epochs: int) -> int:
    """In proportion to those published, of which some models have none."""
    return max(round(epochs * plain / published), 1) if plain and epochs > 1 else 0


def _augment_detr(dataset: CocoDataset, image_size: int) -> DetrAugmenter:
    return DetrAugmenter(dataset, DetrRecipe(image_size=image_size))


def _rtdetr_share(step: int, total: int, momentum: float | None) -> float:
    """As published in a run of 200,000 steps or more; in a shorter one its horizon is a 20th of the run."""
    if momentum is None:
        momentum = min(max(1e-4, 20 / total), 1.0)
    return ema_share(step, momentum, min(2000, total / 100))


RECIPES: dict[str, Callable[[str | None, int | None, str, int | None, str | None, str | None], Recipe]] = {
    "rtmdet": rtmdet_recipe,
    "rtdetr": rtdetr_recipe,
}
"""By the names that a user gives the families: size, version, task, queries, sampling, assigner → recipe; None:
not given."""
