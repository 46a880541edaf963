"""`--batch-size auto`: how many images of a step a GPU's memory has room for."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from rtmdet_fast.data.augment import collate
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.distributed import gather, process_count
from rtmdet_fast.training.config import Settings
from rtmdet_fast.training.step import targets_of

ON_CPU = 8  # where larger steps are no faster, and batch norm has enough
STEPS_PER_EPOCH = 16  # at least
LEAST = 4  # however few images there are: batch norm needs some
SHARE = 0.8  # of the memory that is free: crowded images take more than those tried, and the allocator's gaps some
TRIED = (2, 6)


def find_batch_size(settings: Settings, dataset: CocoDataset) -> int:
    """Images per step and process; of a run to be resumed what it had.

    On a GPU as many as its memory holds, judged by a step of two sizes; never more than the published number a step,
    for which the learning rate is known, and no more than leave an epoch 16 steps, but 4 at least. All processes have
    the same.
    """
    if settings.resume:
        try:
            return int(json.loads((settings.out / "config.json").read_text())["batch_size"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # what is found then may be another number, which is told
    steps = settings.accumulate * process_count()
    by_data = max(len(dataset) // (STEPS_PER_EPOCH * steps), LEAST)
    most = max(min(settings.recipe.lr_batch // steps, by_data), 1)
    if torch.device(settings.device).type != "cuda":
        return min(ON_CPU, most)
    peak = step_memory(settings, dataset)
    free, _ = torch.cuda.mem_get_info(torch.device(settings.device))
    return min(gather(min(fitting(peak, SHARE * free), most), process_count()))


def fitting(peak: Callable[[int], int], free: float) -> int:
    """Images whose step fits into `free` bytes, where `peak` tells what that of a few takes; 1 or more.

    What a step takes is a constant and as much again for each image. From 8 on it is a multiple of 8.
    """
    few, more = TRIED
    try:
        first, second = peak(few), peak(more)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return 1
    per_image = max((second - first) / (more - few), 1)
    fits = int((free - (first - few * per_image)) / per_image)
    return max(fits if fits < 8 else fits // 8 * 8, 1)


def step_memory(settings: Settings, dataset: CocoDataset) -> Callable[[int], int]:
    """Batch size → bytes that a training step on real images takes at most, its parameters and moments included."""
    device, recipe = torch.device(settings.device), settings.recipe
    samples = recipe.augment(dataset, settings.image_size)
    side = max(recipe.batch_sides(settings.image_size))

    def peak(images: int) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model = recipe.build(class_names=dataset.class_names).to(device).train()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        plans = next(iter(PlanSampler(len(dataset), images, recipe.caches, settings.seed, 1)))
        batch = collate([samples[plans[i % len(plans)]] for i in range(images)]).to(device).resized(side)
        dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
        for _ in range(2):  # the first chooses algorithms, which takes memory of its own
            with torch.autocast(device.type, dtype, enabled=settings.amp != "none"):
                losses = model(model.normalize(batch.images), targets_of(batch))
            sum(losses.values()).backward()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        moments = 4 * weights  # two of AdamW, the averaged weights, what processes send each other
        return torch.cuda.max_memory_allocated(device) - before + moments

    return peak
