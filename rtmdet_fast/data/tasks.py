"""The data set that a task reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.layout import find_dota_split, find_split


def open_dataset(task: str, annotations: Path, images: Path, **options: Any) -> CocoDataset:
    """COCO JSON ("ins": with its masks), or for "rotated" DOTA text files or JSON with rotated boxes.

    `options` are those of CocoDataset.
    """
    if task == "rotated":
        return DotaDataset(annotations, images, **options)
    return CocoDataset(annotations, images, masks=task == "ins", **options)


def find_task_split(task: str, folder: Path, split: str) -> tuple[Path, Path]:
    """Annotations and image folder of `split` ("train", "val") in a folder laid out like COCO (rotated: or DOTA)."""
    return (find_dota_split if task == "rotated" else find_split)(folder, split)
