"""What a run is made of before its first step: the model with its weights, room for decoded images."""

from __future__ import annotations

import warnings
from pathlib import Path

from tqdm import tqdm

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.image_cache import ImageCache, room_for_images
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.distributed import process_count
from rtmdet_fast.errors import UserError
from rtmdet_fast.models.checkpoint import Checkpoint, read_checkpoint, resolve_weights
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.training.config import Settings, TrainConfig


def make_model(settings: Settings, dataset: CocoDataset, start: Detector | None) -> Detector:
    """The model to train on `dataset`, with the weights that it starts from: those of `start` where it is given."""
    recipe = settings.recipe
    given, options = None, {}
    if start is not None:
        meta = {"rtmdet_fast": start.saved_options()}
        given = Checkpoint(Path("the model given"), start.state_dict(), start.class_names, meta)
        options = {name: value for name, value in start.inspect(given).options.items() if value is not None}
    model = recipe.build(class_names=dataset.class_names, **options)
    if recipe.needs_init and settings.init is None and start is None and not settings.resume:
        warnings.warn(
            f"{model.title} has frozen batch norms, which without weights to start from (--init) normalise nothing",
            stacklevel=2,
        )
    if settings.freeze and settings.init is None and start is None and not settings.resume:
        raise UserError(f"--freeze {settings.freeze} keeps weights as they are: give those to start from with --init")
    checkpoint = given
    if settings.init is not None:
        checkpoint = read_checkpoint(resolve_weights(settings.init))
    if checkpoint is not None:
        model.load_weights(checkpoint)
        before = checkpoint.class_names
        if before and before != model.class_names and len(before) == len(model.class_names):
            warnings.warn(
                f"{checkpoint.path}: its classes ({', '.join(before[:8])}, …) are taken for those of the training data "
                f"({', '.join(model.class_names[:8])}, …) in that order",
                stacklevel=2,
            )
    model.image_size = settings.image_size
    if model.patch_size is not None:
        model.patch_size = dataset.longest_side  # what an object's size in pixels was seen relative to
    return model


def image_cache(amount: str, dataset: CocoDataset, *, told: bool) -> ImageCache | None:
    """Of the size that the images need or that there is room for; None, with a warning, where there is none."""
    needed, processes = dataset.decoded_bytes, process_count()
    room = room_for_images(amount, processes)
    try:
        cache = ImageCache(len(dataset), min(needed, room))
    except MemoryError as error:
        warnings.warn(f"--cache {amount}: {error}; images are decoded each time", stacklevel=2)
        return None
    if told:
        share = f"all {len(dataset)}" if room >= needed else f"{room / needed:.0%} of {len(dataset)}"
        each = f" in each of {processes} processes" if processes > 1 else ""
        tqdm.write(f"cache: {min(needed, room) / 1e9:.2f} GB of memory, shared by loaders{each}, for {share} images")
    return cache


def tell_settings(config: TrainConfig, settings: Settings, sampler: PlanSampler) -> None:
    """Says what was worked out for the run and decides much."""
    recipe, images = settings.recipe, settings.images_per_step
    if config.lr is None:
        rate = f"learning rate {settings.lr:.3g}: {recipe.lr:g} at {recipe.lr_batch} images a step, here {images}"
        if (more := settings.lr / recipe.lr_of(images)) > 1.005:
            rate += f", and {more:.2f} times that in so few steps"
        tqdm.write(f"batch size {settings.batch_size}{' (auto)' if config.batch_size == 'auto' else ''}, {rate}")
    elif config.batch_size == "auto":
        tqdm.write(f"batch size {settings.batch_size} (auto)")
    if sampler.repeats is not None:
        more = int((sampler.repeats > 1).sum())
        tqdm.write(
            f"an epoch shows {sampler.epoch_length} images: of {sampler.dataset_length} there are {more} repeated"
        )
