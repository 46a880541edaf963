"""Where the annotations of a data set lie, and what a reader of any format makes of them: COCO's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Source:
    """The annotations and images of one split of one data set."""

    format: str
    """A key of `formats.FORMATS`: coco, yolo, voc or dota."""
    annotations: Path
    """A JSON file (coco), or the folder of the label files; of a list of images (yolo) the list."""
    images: Path
    """The folder of the images, or a list of them (yolo)."""
    names: Path | None = None
    """The file of the class names, if there is one (yolo: data.yaml or classes.txt; voc and dota: classes.txt)."""
    listing: Path | None = None
    """The file that names the split's images (voc: ImageSets/Main/train.txt), where not all are meant."""
    root: Path | None = None
    """The folder of the data set, which file names may be relative to too (coco)."""


class Content(NamedTuple):
    """What a reader found, in COCO's form, of which nothing was checked but what makes it COCO's form.

    image_dir: the folder that the images' `file_name`s are relative to
    images: `id`, `file_name`, `width`, `height`, both 0 where not known
    annotations: `id`, `image_id`, `category_id`, `bbox` (x, y, w, h in pixels), and where the format has them
        `segmentation` (polygons or RLE; of oriented boxes the four corners), `rbox` (cx, cy, w, h, radians),
        `iscrowd`, `ignore`, `difficult`, `truncated`, `area`
    categories: `id`, `name`
    """

    image_dir: Path
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


@dataclass(frozen=True)
class Notes:
    """Where a reader tells what it leaves out."""

    bad: Callable[[str, str, object], None]
    """What, the reason it is bad, detail: raises UserError, or counts it as left out (`skip_bad`)."""
    skip: Callable[[str, str], None]
    """What is left out in any case, and the reason."""
    notice: Callable[[str, str], None]
    """What is odd and used all the same, and why it is odd."""
    skip_bad: bool
    wanted: Sequence[str] = ()
    """Class names that the caller will ask for, whose order readers of formats without a list of classes take."""


class Shape(NamedTuple):
    """An object as the formats write it; one of polygon, quad and rbox, or none of them.

    label: index of its class
    bbox: x, y, w, h in pixels
    polygon: x, y, x, y, … of its mask, whose parts are joined by lines there and back
    segmentation: the mask as COCO has it
    quad: the eight coordinates of an oriented box
    rbox: cx, cy, w, h, radians of one
    difficult: 0, 1, or 2 where it is no object to train on
    """

    label: int
    bbox: list[float]
    polygon: list[float] | None
    segmentation: Any
    quad: list[float] | None
    rbox: list[float] | None
    difficult: int
    flags: dict[str, Any]
    """As the annotation has them: iscrowd, ignore, difficult, truncated, area."""


class Picture(NamedTuple):
    """An image to write: its new name, (width, height), its objects."""

    name: str
    size: tuple[int, int]
    shapes: list[Shape]


Lose = Callable[[str, str], None]
"""What is left out or changed by writing, and the reason."""


Splits = Mapping[str, tuple[Source, ...]]
"""By "train", "val", "test", or "all" where the data set is not divided."""
