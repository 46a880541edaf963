"""Writing data sets in the formats that are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.data.annotation_file import is_number
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import polygon_box
from rtmdet_fast.data.formats import FORMATS
from rtmdet_fast.data.formats.files import box_around
from rtmdet_fast.data.layout import NAMES
from rtmdet_fast.data.source import Lose, Picture, Shape
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import folder_beside, write_json
from rtmdet_fast.geometry.rotated import boxes_to_quads
from rtmdet_fast.images import read_image, read_size, write_image

MARKER = ".rtmdet_fast.json"


def write_dataset(
    splits: Mapping[str, CocoDataset], format: str, out: str | Path, *, overwrite: bool = False, progress: bool = False
) -> dict[str, list[str]]:
    """Writes data sets, images and all, as the splits of one in another format, laid out as `find_dataset` finds it.

    What is read from the copy trains alike, to the bit, but for what is lost: see the `write` of each of the formats.
    In all of them images get new names where two have the same one but for folder or suffix; one that is turned by its
    EXIF and was annotated as stored becomes a PNG; the order of images whose names are not in order is kept by lists
    (yolo, voc), and lost in dota. Masks of several parts that overlap become what an odd number of them covers (yolo,
    voc).

    Args:
        splits: by name ("train", "val", "test", or "all" alone), made without training=True, of one task and with the
            same classes in the same order.
        format: coco, yolo, voc or dota.
        out: the folder to write to, which appears once all is written. One that is not empty is refused, or with
            `overwrite` replaced if this function has written it.

    Returns what was left out or changed, by reason, for each object or image the name of its image. Raises UserError.
    """
    if format not in FORMATS:
        raise UserError(f"{format!r} is no format that can be written; choose one of {', '.join(FORMATS)}")
    if not splits or not (splits.keys() <= NAMES.keys() or splits.keys() == {"all"}):
        raise UserError(f"the splits to write are {', '.join(splits) or 'none'}, not of train, val and test, or all")
    names = next(iter(splits.values())).class_names
    for split, dataset in splits.items():
        if dataset.class_names != names:
            raise UserError(f"{split} has other classes than {next(iter(splits))}: {', '.join(dataset.class_names)}")
    target = Path(os.path.realpath(out))
    _check_out(target, overwrite)
    for dataset in splits.values():
        if Path(os.path.realpath(dataset.image_dir)).is_relative_to(target):
            raise UserError(f"{out} holds the images to write: give another folder")
    lost: dict[str, list[str]] = {}

    def lose(what: str, reason: str) -> None:
        lost.setdefault(reason, []).append(what)

    module = FORMATS[format]
    with folder_beside(target) as beside:
        folder = beside / "data"
        folder.mkdir()
        taken: set[str] = set()
        for split, dataset in splits.items():
            images = folder / (module.IMAGES_WHOLE if split == "all" else module.IMAGES.format(split))
            images.mkdir(parents=True, exist_ok=True)
            module.write(folder, split, names, _pictures(dataset, split, images, taken, lose, progress), lose)
        module.finish(folder, names, tuple(splits))
        write_json(folder / MARKER, {"format": format, "splits": list(splits)})
        if target.exists():
            os.replace(target, beside / "before")
        os.replace(folder, target)
    return lost


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARKER).is_file():
        raise UserError(f"{out} is not empty, and was not written by a conversion: give another folder")
    if not overwrite:
        raise UserError(f"{out} holds a data set already: give another folder, or --overwrite to replace it")


def _pictures(
    dataset: CocoDataset, split: str, folder: Path, taken: set[str], lose: Lose, progress: bool
) -> Iterator[Picture]:
    """Copies the images, and tells what is to be written of each."""
    from tqdm import tqdm

    label_of = {category: label for label, category in enumerate(dataset.category_ids) if category >= 0}
    shapes: dict[int, list[Shape]] = {}
    for a in dataset.content["annotations"]:
        if a["category_id"] in label_of:
            shape = _shape(a, label_of[a["category_id"]], dataset.box_dim == 5)
            shapes.setdefault(a["image_id"], []).append(shape)
    entries = dataset.content["images"]
    for entry in tqdm(entries, desc=f"write {split}", unit="img", disable=not progress, leave=False):
        source = dataset.image_dir / entry["file_name"]
        size, told = read_size(source), (entry["width"], entry["height"])
        turned = size != told and size == told[::-1] and size[0] > 0
        if not size[0]:
            size = told
        if not size[0]:
            lose(entry["file_name"], "image of unknown size")
            continue
        name = _new_name(Path(entry["file_name"]), ".png" if turned else None, taken)
        if turned and read_image(source, told).shape[1::-1] == told:
            write_image(folder / name, read_image(source, told))
            size = told
            lose(entry["file_name"], "image annotated as stored, not as turned by its EXIF, written as PNG")
        else:
            shutil.copyfile(source, folder / name)
        yield Picture(name, size, shapes.get(entry["id"], []))


def _new_name(file: Path, suffix: str | None, taken: set[str]) -> str:
    """A name without folders that no image has yet, nor but for its suffix; of letters that can be printed."""
    suffix = suffix or file.suffix
    candidates = [file.stem, "_".join((*file.parts[:-1], file.stem))]
    for i in range(len(taken) + 3):
        stem = candidates[i] if i < len(candidates) else f"{candidates[1]}_{i}"
        stem = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in stem).strip() or "_"
        if stem.casefold() not in taken:
            break
    taken.add(stem.casefold())
    return stem + suffix


def _shape(a: dict[str, Any], label: int, rotated: bool) -> Shape:
    """What the formats write of a checked annotation."""
    flags = {"iscrowd": a["iscrowd"], **{key: a[key] for key in ("ignore", "difficult") if a[key]}}
    if a.get("truncated") in (1, True):
        flags["truncated"] = 1
    difficult = 2 if a["iscrowd"] or a["ignore"] else a["difficult"]
    if rotated:
        given, around, area = a["given"], a["bbox"], {"area": a["area"]}
        if len(given) == 8:
            return Shape(label, box_around(given), None, None, given, None, difficult, flags | area)
        quad = boxes_to_quads(np.array([a["rbox"]]))[0].tolist()
        if len(given) == 5:
            return Shape(label, around, None, None, quad, given, difficult, flags | area)
        return Shape(label, around, None, [given], quad, None, difficult, flags | area)
    if is_number(a.get("area")):
        flags["area"] = a["area"]
    segmentation, polygon, quad = a.get("segmentation"), None, None
    if segmentation is not None and difficult < 2:
        rings = traced(segmentation) if isinstance(segmentation, dict) else segmentation
        polygon = joined(rings)
        quad = boxes_to_quads(polygon_box(polygon)[None])[0].tolist()
    return Shape(label, a["bbox"], polygon, segmentation, quad, None, difficult, flags)


def joined(rings: list[list[float]]) -> list[float]:
    """Polygons x, y, x, y, … as one, from which to which lines lead there and back, that enclose nothing."""
    path = list(rings[0])
    for ring in rings[1:]:
        path += [*path[:2], *ring] if len(path) == len(rings[0]) else ring
        path += ring[:2]
    for ring in rings[-2:0:-1]:
        path += ring[:2]
    return path


def traced(rle: dict[str, Any]) -> list[list[float]]:
    """The outlines of a COCO RLE along its pixels' edges, those of holes too: by the even-odd rule the same pixels."""
    import cv2
    from pycocotools import mask

    size = rle["size"]
    pixels = mask.decode(mask.frPyObjects(rle, *size) if isinstance(rle["counts"], list) else rle)
    # twice as large, the pixels of an outline tell on which side of their edge they lie: even ones left and upper
    large = cv2.resize(pixels, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for outline in outlines:
        points = (outline.reshape(-1, 2) + 1) // 2
        before, after = np.roll(points, 1, 0), np.roll(points, -1, 0)
        kept = ~((points == after).all(1))
        points = points[kept]
        before, after = np.roll(points, 1, 0), np.roll(points, -1, 0)
        straight = ((before == points) & (points == after)).any(1)
        rings.append(points[~straight].ravel().astype(float).tolist())
    return [ring for ring in rings if len(ring) >= 6]
