"""What the network will see: augmented batches of a run, drawn with their boxes, masks or rotated boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from rtmdet_fast.data.augment import Batch, collate
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.masks import MASK_STRIDE
from rtmdet_fast.data.plan import PlanSampler, SamplePlan, repeat_factors
from rtmdet_fast.data.workers import init_worker
from rtmdet_fast.geometry.masks import Region
from rtmdet_fast.images import write_image
from rtmdet_fast.inference.drawing import draw_detections
from rtmdet_fast.training.config import Settings, TrainConfig, resolve
from rtmdet_fast.training.schedule import random_side

BATCHES = 2  # of each stage
IMAGES = 16  # of a batch that are drawn


class Preview(NamedTuple):
    """A drawn batch."""

    path: Path
    stage: int
    """1, or 2 without strong augmentation."""
    images: int
    """In the batch, of which up to IMAGES are drawn."""
    objects: int
    side: int
    """Of its images in pixels."""


def write_previews(config: TrainConfig) -> list[Preview]:
    """Draws batches of both stages of a run, as far as it has both, into `preview` in its folder; trains nothing.

    The batches are of the run's data, settings and seed, and made as its own are, mosaics from full caches; they are
    not the very batches it will begin with. Raises UserError for bad input.
    """
    settings = resolve(config)
    made = []
    for drawn in draw_batches(settings, settings.open_training_data(), BATCHES):
        path = settings.out / "preview" / f"stage{drawn.stage}_{drawn.number}.jpg"
        write_image(path, drawn.picture)
        made.append(Preview(path, drawn.stage, drawn.images, drawn.objects, drawn.side))
    return made


class DrawnBatch(NamedTuple):
    """A batch as one picture [H, W, 3] uint8 BGR; `number` from 1, of its stage. See `Preview`."""

    picture: np.ndarray
    stage: int
    number: int
    images: int
    objects: int
    side: int

    @property
    def told(self) -> str:
        """In words."""
        stage = "the first stage" if self.stage == 1 else "the last stage, without strong augmentation"
        return f"{min(self.images, IMAGES)} of {self.images} images of {self.side} px, in {stage}"


def draw_batches(settings: Settings, dataset: CocoDataset, batches: int) -> Iterator[DrawnBatch]:
    """So many batches of each stage of a run, as far as it has both, of its training data."""
    recipe = settings.recipe
    stages = [stage2 for stage2 in (False, True) if (settings.stage2_epochs if stage2 else _has_first(settings))]
    plans = {stage2: _plans(dataset, settings, stage2, batches) for stage2 in stages}
    loader = DataLoader(
        recipe.augment(dataset, settings.image_size),
        batch_sampler=[plan for of in plans.values() for plan in of],  # type: ignore[arg-type]  # plans for indices
        collate_fn=collate,
        num_workers=min(settings.num_workers, batches * len(stages)),
        worker_init_fn=init_worker,
    )
    numbers = [(stage2, number) for stage2, of in plans.items() for number in range(len(of))]
    bar = tqdm(loader, desc="preview", total=len(numbers), disable=not settings.progress, leave=False)
    for (stage2, number), batch in zip(numbers, bar, strict=True):
        sides = (settings.image_size,) if stage2 else recipe.batch_sides(settings.image_size)
        batch = batch.resized(random_side(sides, settings.seed, number, 0))
        picture = sheet(draw_batch(batch, dataset.class_names, IMAGES))
        count, side = len(batch.images), batch.images.shape[-1]
        yield DrawnBatch(picture, 1 + stage2, number + 1, count, int(batch.gt_counts.sum()), side)


def draw_batch(batch: Batch, class_names: Sequence[str], most: int = IMAGES) -> list[np.ndarray]:
    """The first images of a batch with their ground truth, each [H, W, 3] uint8 BGR."""
    drawn = []
    for b, count in enumerate(batch.gt_counts.tolist()[:most]):
        image = np.ascontiguousarray(batch.images[b].permute(1, 2, 0).cpu().numpy())
        masks = None if batch.gt_masks is None else _Masks(batch.gt_masks[b, :count].cpu().numpy())
        boxes, labels = batch.gt_boxes[b, :count], batch.gt_labels[b, :count]
        drawn.append(draw_detections(image, boxes, labels, None, class_names, masks=masks))
    return drawn


def sheet(images: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Images of one size [H, W, 3] in rows, on white, nearly as many rows as columns."""
    columns = math.ceil(math.sqrt(len(images)))
    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    made = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        made[y : y + height, x : x + width] = image
    return made


class _Masks:
    """Masks [n, H / 4, W / 4], as a batch has them, at full size."""

    def __init__(self, masks: np.ndarray) -> None:
        self._masks = masks

    def region(self, i: int) -> Region:
        small = self._masks[i]
        return Region(0, 0, small.repeat(MASK_STRIDE, 0).repeat(MASK_STRIDE, 1).astype(bool))


def _has_first(settings: Settings) -> bool:
    return settings.stage2_epochs < settings.epochs


def _plans(dataset: CocoDataset, settings: Settings, stage2: bool, batches: int) -> list[list[SamplePlan]]:
    """Of batches in the middle of a stage, when the caches of mosaic and mixup are full."""
    caches = settings.recipe.caches
    repeats = None
    if settings.repeat_threshold is not None:
        repeats = repeat_factors(dataset.labels_by_image, settings.repeat_threshold)
    sampler = PlanSampler(len(dataset), settings.batch_size, caches, settings.seed, num_workers=0, repeats=repeats)
    sampler.set_stage2(stage2)
    before = math.ceil(caches.mosaic_cache / settings.batch_size) if caches is not None and not stage2 else 0
    plans: list[list[SamplePlan]] = []
    while len(plans) < before + batches:
        plans += sampler  # an epoch
    return plans[before : before + batches]
