"""Writing data sets in the formats that are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rtmdet_fast.data.coco import CocoDataset


def write_dataset(
    splits: Mapping[str, CocoDataset], format: str, out: str | Path, *, overwrite: bool = False, progress: bool = False
) -> dict[str, list[str]]:
    """Writes data sets, images and all, as the splits of one in another format, laid out as `find_dataset` finds it.

    Args:
        splits: by name ("train", "val", "test", or "all"), made without training=True, of one task and with the same
            classes in the same order.
        format: coco, yolo, voc or dota.
        out: the folder to write to; one that is not empty is refused, or with `overwrite` emptied first if it was
            written by this function.

    Returns what the format cannot hold and was left out or changed, by reason. Raises UserError.
    """
    raise NotImplementedError
