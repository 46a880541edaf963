"""What sets a task apart outside the network, where its head does: data and figure of merit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; the defaults are those of boxes."""

    open_dataset: Callable[..., CocoDataset] = CocoDataset
    """Sources (data.layout.find_sources) and CocoDataset's options → data set."""
    criterion: str = "AP"
    """The figure by which an epoch is the best."""


TASKS = {
    "det": Task(),
    "ins": Task(open_dataset=partial(CocoDataset, masks=True), criterion="segm_AP"),
    "rotated": Task(open_dataset=DotaDataset, criterion="AP50"),  # DOTA's mAP is at 0.5
}
