"""What sets a task apart outside the network, where its head does: data, figure of merit, training recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from rtmdet_fast.data.augment import Augmenter
from rtmdet_fast.data.augment_rotated import RotatedAugmenter
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.layout import find_dota_split, find_split
from rtmdet_fast.data.recipes import recipe_for, rotated_recipe


def _augment(dataset: CocoDataset, size: str, image_size: int) -> Augmenter:
    return Augmenter(dataset, recipe_for(size, image_size, masks=dataset.has_masks))


def _augment_rotated(dataset: CocoDataset, size: str, image_size: int) -> RotatedAugmenter:
    return RotatedAugmenter(dataset, rotated_recipe(image_size, dataset.class_names))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; the defaults are those of boxes. Figures of training are the published ones of RTMDet."""

    open_dataset: Callable[..., CocoDataset] = CocoDataset
    """Annotations, image folder and CocoDataset's options → data set."""
    find_split: Callable[[Path, str], tuple[Path, Path]] = find_split
    """Folder and "train" or "val" → annotations and image folder."""
    criterion: str = "AP"
    """The figure by which an epoch is the best."""
    augment: Callable[[CocoDataset, str, int], Dataset] = _augment
    """Data set, model size, image size in pixels → training samples by their plans."""
    two_stages: bool = True
    """Whether mosaic and mixup are for all epochs but the last; without it for none."""
    epochs: int = 300
    batch_size: int = 32
    """Images per process."""
    lr: float = 4e-3
    """At `lr_batch` images per step of all processes."""
    lr_of_size: Mapping[str, float] = field(default_factory=dict)
    """In place of `lr`."""
    lr_batch: int = 256


DET = Task(lr_of_size={"x": 2e-3})
TASKS = {
    "det": DET,
    "ins": replace(DET, open_dataset=partial(CocoDataset, masks=True), criterion="segm_AP"),
    "rotated": Task(
        open_dataset=DotaDataset,
        find_split=find_dota_split,
        criterion="AP50",  # DOTA's mAP is at 0.5
        augment=_augment_rotated,
        two_stages=False,
        epochs=36,
        batch_size=8,
        lr=2.5e-4,
        lr_batch=8,
    ),
}
