"""YOLO's text files: a class number and shares of the image's sides, a line each; boxes, polygons or four corners."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rtmdet_fast.class_names import class_name
from rtmdet_fast.data.formats.data_yaml import Value, read_yaml
from rtmdet_fast.data.formats.files import (
    NAMES_FILES,
    box_around,
    find_images_below,
    find_names,
    numbers,
    read_names,
    read_text,
    settled,
)
from rtmdet_fast.data.source import Content, Lose, Notes, Picture, Shape, Source
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import IMAGE_SUFFIXES, open_regular, read_size

LOOKED_FOR = "YOLO: data.yaml, images/{0} beside labels/{0}, {0}/images beside {0}/labels, or a list {0}.txt"
SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
KEYS = ("path", "names", "nc", "kpt_shape", *SPLIT_KEYS)
YAMLS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
IMAGES, IMAGES_WHOLE = "images/{0}", "images"
"""Where the writer puts the images of a split, and those of a data set that is not divided."""
LEAST, MOST = -1.0, 2.0  # of what is a share of a side: what lies farther out was written in pixels


def find(folder: Path, split: str) -> list[Source]:
    """The split's images, each of which has its labels where the name of its folder, images, is read as labels.

    folder: or a data.yaml. Raises UserError for places in it that are not there.
    """
    path, settings = _yaml(folder)
    if path is not None and any(settings.get(key) is not None for key in SPLIT_KEYS):
        return [
            Source(format="yolo", annotations=path, images=place, names=path, root=path.parent)
            for place in _places(path, settings, split)
        ]
    for images, labels in ((f"images/{split}", f"labels/{split}"), (f"{split}/images", f"{split}/labels")):
        if (folder / images).is_dir() and (folder / labels).is_dir():
            names = path or find_names(folder / labels, folder)
            return [Source(format="yolo", annotations=folder / labels, images=folder / images, names=names)]
    listing = folder / f"{split}.txt"
    if listing.is_file() and Path(_first_line(listing)).suffix.lower() in IMAGE_SUFFIXES:
        names = path or find_names(folder, folder)
        return [Source(format="yolo", annotations=listing, images=listing, names=names, root=folder)]
    return []


def find_whole(folder: Path) -> list[Source]:
    """Those of a data set that is not divided: images beside labels, or label files beside images."""
    path, _ = _yaml(folder)
    for images, labels in ((folder / "images", folder / "labels"), (folder, folder)):
        if images.is_dir() and labels.is_dir() and any(_is_labels(file) for file in sorted(labels.glob("*.txt"))[:20]):
            names = path or find_names(labels, folder)
            return [Source(format="yolo", annotations=labels, images=images, names=names)]
    return []


def read(source: Source, notes: Notes) -> Content:
    """All images, in order of their names or of a list; those without a label file have no objects.

    Raises UserError where not one image has a label file.
    """
    names, keypoints = _read_names(source.names)
    found = _images(source, notes)
    image_dir = source.images
    if not image_dir.is_dir():
        image_dir = Path(os.path.commonpath([os.path.abspath(path.parent) for path in found]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    top = source.annotations if source.annotations.is_dir() else source.annotations.parent
    used: set[Path] = set()
    for path in found:
        name = os.path.relpath(os.path.abspath(path), os.path.abspath(image_dir))
        labels = _label_file(source, path)
        used.add(labels)
        rows: list[tuple[int, int, list[float]]] = []
        if not os.path.isfile(labels):
            notes.notice(name, "image without a label file, taken for one without objects")
        else:
            try:
                rows = _read_rows(labels, os.path.relpath(labels, top), names, keypoints, notes)
            except UserError as error:
                if not notes.skip_bad:
                    raise
                notes.bad(name, "unreadable label file", str(error))
                continue
        width, height = read_size(path)
        if not width and os.path.isfile(path):
            notes.bad(name, "unreadable image", "its header tells no size, which its labels are shares of")
            continue
        ident = len(images) + 1
        images.append({"id": ident, "file_name": name, "width": width, "height": height})
        for line, category, values in rows:
            a: dict[str, Any] = {"id": f"{name}:{line}", "image_id": ident, "category_id": category}
            if len(values) == 4:
                x, y, w, h = (v * side for v, side in zip(values, (width, height) * 2, strict=True))
                a["bbox"] = [settled(v) for v in (x - w / 2, y - h / 2, w, h)]
            else:
                sides = (width, height) * (len(values) // 2)
                points = [settled(v * side) for v, side in zip(values, sides, strict=True)]
                a |= {"bbox": box_around(points), "segmentation": [points]}
            annotations.append(a)
    there = {path for path in used if os.path.isfile(path)}
    if not there:
        example = shown(str(_label_file(source, found[0])))
        raise UserError(f"{source.annotations}: none of its {len(found)} images has a label file, such as {example}")
    if source.images.is_dir():  # a list may leave any out
        for folder in sorted({path.parent for path in there}):
            for path in sorted(folder.glob("*.txt")):
                if path not in used and path.name not in NAMES_FILES:
                    notes.skip(path.name, "label file without an image")
    if not names:
        for number in range(max((a["category_id"] for a in annotations), default=-1) + 1):
            names[number] = str(number)
            notes.notice(f"class {number}", "class without a name, called by its number")
    return Content(image_dir, images, annotations, [{"id": i, "name": name} for i, name in names.items()])


def _yaml(folder: Path) -> tuple[Path | None, dict[str, Value]]:
    """The data.yaml of a folder, or that which is one, and what it holds."""
    if folder.is_file():
        settings = read_yaml(folder, KEYS)
        if settings.get("names") is None and settings.get("nc") is None:
            raise UserError(f"{folder}: has no names, as the data.yaml of a data set has")
        return folder, settings
    for name in YAMLS:
        if (folder / name).is_file():
            return folder / name, read_yaml(folder / name, KEYS)
    for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        try:
            settings = read_yaml(path, KEYS)
        except UserError:  # it may be anything
            continue
        if settings.get("names") is not None and settings.keys() & set(SPLIT_KEYS):
            return path, settings
    return None, {}


def _places(path: Path, settings: dict[str, Value], split: str) -> list[Path]:
    """Folders or lists of images that a data.yaml names for a split."""
    value = settings.get(split)
    if value is None:
        return []
    given = settings.get("path")
    if isinstance(value, dict) or not isinstance(given, (str, type(None))):
        raise UserError(f"{path}: path and {split} are to be folders, lists of images, or several of these")
    bases = [path.parent]
    if given is not None:
        bases = [path.parent / given, Path(given), path.parent]
    places = []
    for place in [value] if isinstance(value, str) else value:
        # Roboflow writes ../train/images for what lies beside the file
        tried = [base / name for base in bases for name in (place, place.removeprefix("../"))]
        there = next((candidate for candidate in tried if os.path.exists(candidate)), None)
        if there is None:
            raise UserError(f"{path}: {split} is {shown(place)}, which is not there (looked for {tried[0]})")
        places.append(there)
    return places


def _read_names(path: Path | None) -> tuple[dict[int, str], int]:
    """Class names by number, none where there is no file of them, and the numbers of an object's keypoints."""
    if path is None:
        return {}, 0
    if path.suffix.lower() not in (".yaml", ".yml"):
        return dict(enumerate(read_names(path))), 0
    settings = read_yaml(path, KEYS)
    names, count = settings.get("names"), settings.get("nc")
    keypoints = 0
    try:
        if isinstance(names, dict):
            by_number = {int(number): name for number, name in names.items()}
        elif isinstance(names, list):
            by_number = dict(enumerate(names))
        elif names is None and isinstance(count, str):
            by_number = {number: str(number) for number in range(min(int(count), 10**5))}
        else:
            raise ValueError
        if min(by_number, default=0) < 0:
            raise ValueError
        shape = settings.get("kpt_shape")
        if isinstance(shape, list):
            keypoints = int(shape[0]) * int(shape[1])
    except (ValueError, IndexError):
        raise UserError(f"{path}: names is neither a list of class names nor a map of their numbers") from None
    return {number: class_name(name) for number, name in sorted(by_number.items())}, keypoints


def _images(source: Source, notes: Notes) -> list[Path]:
    if source.images.is_dir():
        found = find_images_below(source.images, notes.skip)
    else:
        found = []
        seen: set[Path] = set()
        lines = [line.strip() for line in read_text(source.images).split("\n")]
        bases = [base for base in (source.images.parent, source.root) if base is not None]
        for number, line in enumerate(lines, start=1):
            if line and Path(line).suffix.lower() in IMAGE_SUFFIXES and "\0" not in line:
                base = next((base for base in bases if os.path.isfile(base / line)), bases[0])
                bases = [base, *(other for other in bases if other != base)]
                if base / line in seen:
                    notes.skip(f"{source.images.name}, line {number}", "image listed twice")
                else:
                    found.append(base / line)
                seen.add(base / line)
            elif line:
                notes.bad(f"{source.images.name}, line {number}", "malformed, it is no name of an image", line)
    if not found:
        raise UserError(f"{source.images}: holds no images")
    return found


def _label_file(source: Source, image: Path) -> Path:
    if source.annotations.is_dir():
        return source.annotations / image.relative_to(source.images).with_suffix(".txt")
    parts = list(image.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    labels, beside = Path(*parts), image.with_suffix(".txt")
    return beside if os.path.isfile(beside) and not os.path.isfile(labels) else labels


def _read_rows(
    path: Path, told: str, names: dict[int, str], keypoints: int, notes: Notes
) -> list[tuple[int, int, list[float]]]:
    """Line, class number and 4 (box) or 2 k (polygon) shares of the image's sides, of each proper line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        if keypoints and len(fields) == 5 + keypoints:
            fields = fields[:5]
        row = _row(fields)
        if isinstance(row, str):
            notes.bad(f"{told}, line {number}", "malformed line", f"{row}: {line.strip()[:80]!r}")
        elif names and row[0] not in names:
            notes.bad(f"{told}, line {number}", "class number without a name", row[0])
        else:
            rows.append((number, *row))
    return rows


def _row(fields: list[str]) -> tuple[int, list[float]] | str:
    """Class number and shares, or what is wrong."""
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        return f"{len(fields)} fields, not class x y width height, nor class x1 y1 x2 y2 …"
    try:
        category, *values = map(float, fields)
    except ValueError as error:
        return str(error)
    if "_" in "".join(fields):  # which Python reads over
        return "an underscore in a number"
    if not (category.is_integer() and 0 <= category < 10**5):
        return "the class is no number of one"
    if not all(LEAST <= v <= MOST for v in values):
        return "a number that is no share of the image's side, from 0 to 1; were they written in pixels?"
    if len(values) == 4 and min(values[2:]) < 0:
        return "a negative side"
    return int(category), values


def _first_line(path: Path) -> str:
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
            return next((line.strip() for line in lines if line.strip()), "")
    except (OSError, UnicodeDecodeError):
        return ""


def _is_labels(path: Path) -> bool:
    return path.name not in NAMES_FILES and not isinstance(_row(_first_line(path).split()), str)


def write(folder: Path, split: str, names: Sequence[str], pictures: Iterable[Picture], lose: Lose) -> None:
    """Writes the label files of a split, or of all ("all"), with all digits of the numbers.

    Crowd regions and what is to be ignored are left out, and so are boxes outside the image or without area, and images
    of unknown size; boxes are cut at the image's edges. That an object is difficult or truncated is lost. Images whose
    order is not that of their names get a list, which keeps it.
    """
    labels = folder / ("labels" if split == "all" else f"labels/{split}")
    labels.mkdir(parents=True, exist_ok=True)
    order = []
    for picture in pictures:
        order.append(picture.name)
        lines = []
        for shape in picture.shapes:
            if shape.difficult > 1:
                lose(picture.name, "crowd region or object to be ignored")
                continue
            if shape.difficult:
                lose(picture.name, "that an object is difficult")
            shares = _shares(shape, *picture.size)
            if shares is None:
                lose(picture.name, "box outside the image or without area")
            else:
                lines.append(f"{shape.label} {numbers(shares)}\n")
        (labels / picture.name).with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
    if order != sorted(order) and split != "all":
        listed = "".join(f"./images/{split}/{name}\n" for name in order)
        (folder / f"{split}.txt").write_text(listed, encoding="utf-8")


def finish(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Writes what all splits share: data.yaml."""
    places = {split: f"{split}.txt" if (folder / f"{split}.txt").is_file() else f"images/{split}" for split in splits}
    lines = [f"{split}: {place}" for split, place in places.items() if split != "all"]
    lines += [f"nc: {len(names)}", "names:"]
    # JSON's text in quotation marks is YAML's
    lines += [f"  {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(names)]
    (folder / "data.yaml").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _shares(shape: Shape, width: int, height: int) -> list[float] | None:
    """The numbers of an object's line: those of its polygon or corners, or else of its box, where it has any."""
    points = shape.polygon or shape.quad
    if points is not None:
        return [v / side for v, side in zip(points, (width, height) * (len(points) // 2), strict=True)]
    x, y, w, h = shape.bbox
    if x < 0 or y < 0 or x + w > width or y + h > height:
        x1, y1 = min(x + w, width), min(y + h, height)
        x, y = max(x, 0), max(y, 0)
        w, h = x1 - x, y1 - y
    if w <= 0 or h <= 0:
        return None
    return [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
