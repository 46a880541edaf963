"""COCO's JSON, as it, Roboflow, CVAT, FiftyOne and Label Studio lay it out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rtmdet_fast.data.annotation_file import read_json
from rtmdet_fast.data.source import Content, Lose, Notes, Picture, Source
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_json

LOOKED_FOR = "COCO: annotations/instances_{0}*.json or {0}*.json with images in {0}, or {0}/_annotations.coco.json"
BESIDE = ("_annotations.coco.json", "annotations.json", "labels.json")
"""Names of a split's file in its own folder, as Roboflow and FiftyOne have them."""
WHOLE = ("annotations/instances_default.json", "_annotations.coco.json", "annotations.json", "instances.json")
WHOLE += ("labels.json", "result.json")
"""Of a data set that is not divided; the first is CVAT's, the last Label Studio's."""

IMAGES, IMAGES_WHOLE = "{0}", "images"
"""Where the writer puts the images of a split, and those of a data set that is not divided."""


def find(folder: Path, split: str) -> list[Source]:
    """The split's annotation file and image folder. Raises UserError where one of both is missing or several are."""
    name = re.compile(rf"(instances_)?({re.escape(split)}(?![A-Za-z]).*)\.json")
    for place in (folder / "annotations", folder):
        found = [path for path in sorted(place.glob("*.json")) if name.fullmatch(path.name)]
        named = [path for path in found if path.name.startswith("instances_")]  # not captions_train or the like
        if found := named or found:
            break
    if len(found) > 1:
        raise UserError(f"{folder} has several {split} annotation files ({', '.join(f.name for f in found)}); name one")
    if found:
        stem = found[0].stem.removeprefix("instances_")
        return [_source(folder, found[0], (stem, split, f"images/{stem}", f"images/{split}", "images", "data"))]
    for beside in BESIDE:
        if (folder / split / beside).is_file():
            places = (f"{split}/images", f"{split}/data", split)
            return [_source(folder, folder / split / beside, places)]
    return []


def find_whole(folder: Path) -> list[Source]:
    """Those of a data set that is not divided."""
    for name in WHOLE:
        if (folder / name).is_file():
            return [_source(folder, folder / name, ("images/default", "images", "data", "."))]
    return []


def _source(folder: Path, annotations: Path, places: tuple[str, ...]) -> Source:
    for place in places:
        if (folder / place).is_dir():
            return Source(format="coco", annotations=annotations, images=folder / place, root=folder)
    raise UserError(f"{folder} has {annotations.name} but no image folder {places[0]} or images")


def read(source: Source, notes: Notes) -> Content:
    """As the file has it. Raises UserError where that is no JSON of COCO's form, or the image folder is missing."""
    if not source.images.is_dir():
        raise UserError(f"{source.images}: no such folder of images (for {source.annotations})")
    content = read_json(source.annotations)
    image_dir = source.images
    if source.root is not None:
        # some tools write file names from the data set's folder on
        entries = (e for e in content["images"] if isinstance(e, dict) and isinstance(e.get("file_name"), str))
        first = next(entries, {"file_name": ""})["file_name"]
        if "\0" not in first and not os.path.isfile(image_dir / first) and os.path.isfile(source.root / first):
            image_dir = source.root
    return Content(image_dir, content["images"], content.get("annotations") or [], content["categories"])


def write(folder: Path, split: str, names: Sequence[str], pictures: Iterable[Picture], lose: Lose) -> None:
    """Writes the annotation file of a split, or of all ("all"). Nothing is lost."""
    images, annotations = [], []
    for picture in pictures:
        width, height = picture.size
        images.append({"id": len(images) + 1, "file_name": picture.name, "width": width, "height": height})
        for shape in picture.shapes:
            a: dict[str, Any] = {"id": len(annotations) + 1, "image_id": len(images), "category_id": shape.label + 1}
            a |= {"bbox": shape.bbox, **shape.flags}
            a.setdefault("area", shape.bbox[2] * shape.bbox[3])
            if shape.segmentation is not None:
                a["segmentation"] = shape.segmentation
            elif shape.quad is not None:
                a["segmentation"] = [shape.quad]
            if shape.rbox is not None:
                a["rbox"] = shape.rbox
            annotations.append(a)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
    write_json(folder / (WHOLE[2] if split == "all" else f"annotations/instances_{split}.json"), content, indent=None)


def finish(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Writes what all splits share: nothing."""
