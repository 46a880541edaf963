"""What sets a task apart outside the network, where its head does: data and figure of merit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.layout import find_dota_split, find_split


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; the defaults are those of boxes."""

    open_dataset: Callable[..., CocoDataset] = CocoDataset
    """Annotations, image folder and CocoDataset's options → data set."""
    find_split: Callable[[Path, str], tuple[Path, Path]] = find_split
    """Folder and "train" or "val" → annotations and image folder."""
    criterion: str = "AP"
    """The figure by which an epoch is the best."""


TASKS = {
    "det": Task(),
    "ins": Task(open_dataset=partial(CocoDataset, masks=True), criterion="segm_AP"),
    "rotated": Task(open_dataset=DotaDataset, find_split=find_dota_split, criterion="AP50"),  # DOTA's mAP is at 0.5
}
