"""DOTA's text files: four corners, a class and how difficult it is, a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rtmdet_fast.class_names import DOTA_CLASSES, class_name
from rtmdet_fast.data.annotation_file import FARTHEST
from rtmdet_fast.data.formats.files import (
    box_around,
    corners_of,
    find_images,
    find_names,
    in_order,
    numbers,
    read_names,
    read_text,
)
from rtmdet_fast.data.source import Content, Lose, Notes, Picture, Source
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import read_size

Report = Callable[[str, str, object], None]  # what, the reason it is bad, detail


class Label(NamedTuple):
    """A line of a DOTA text file."""

    line: int
    quad: list[float]
    """x1 y1 … x4 y4, pixels."""
    name: str
    difficult: int


LOOKED_FOR = "DOTA: {0}/images beside {0}/labelTxt, or images/{0} beside labelTxt/{0}"
DEEPER = ("/labelTxt", "")  # an archive may hold a folder of its own
FOLDERS = ("labelTxt", "annfiles", *(f"labelTxt-v{v}{deeper}" for v in ("1.0", "1.5") for deeper in DEEPER))
"""Of label files, as DOTA, mmrotate's tool and `rtmdet-fast split` name them."""
IMAGES, IMAGES_WHOLE = "{0}/images", "images"
"""Where the writer puts the images of a split, and those of a data set that is not divided."""


def find(folder: Path, split: str) -> list[Source]:
    """The split's label files and images."""
    places = [(f"{split}/images", f"{split}/{name}") for name in FOLDERS]
    return _find(folder, [*places, (f"images/{split}", f"labelTxt/{split}")])


def find_whole(folder: Path) -> list[Source]:
    """Those of a data set that is not divided."""
    return _find(folder, [("images", name) for name in FOLDERS])


def _find(folder: Path, places: list[tuple[str, str]]) -> list[Source]:
    for images, labels in places:
        if (folder / images).is_dir() and any((folder / labels).glob("*.txt")):
            names = find_names(folder / labels, folder)
            return [Source(format="dota", annotations=folder / labels, images=folder / images, names=names)]
    return []


def read(source: Source, notes: Notes) -> Content:
    """The images that have label files, in order of their names; an oriented box is its four corners.

    Classes in the order of a file of names; without one in that of DOTA-v1.0 if they are all of its 15, else by name.
    """
    label_files = sorted(source.annotations.glob("*.txt"))
    if not label_files:
        raise UserError(f"{source.annotations}: holds no label files (*.txt)")
    files = find_images(source.images)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in label_files:
        found = files.pop(path.stem, [])
        if len(found) > 1:
            notes.bad(path.name, "several images of this name", ", ".join(f.name for f in found))
            continue
        try:
            labels = read_labels(path, notes.bad)
        except UserError as error:
            if not notes.skip_bad:
                raise
            notes.bad(path.name, "unreadable label file", str(error))
            continue
        name = found[0].name if found else f"{path.stem}.png"  # which is then reported as missing
        width, height = read_size(found[0]) if found else (0, 0)
        ident = len(images) + 1
        images.append({"id": ident, "file_name": name, "width": width, "height": height})
        annotations += [
            {
                "id": f"{path.name}:{label.line}",
                "image_id": ident,
                "category_id": label.name,
                "bbox": box_around(label.quad),
                "segmentation": [label.quad],
                "difficult": min(label.difficult, 2),
            }
            for label in labels
        ]
    for rest in files.values():
        notes.skip(rest[0].name, "image without a label file")
    names = {a["category_id"] for a in annotations}
    listed = read_names(source.names) if source.names else []
    by_rule = [name for name in DOTA_CLASSES if name in names] if names <= set(DOTA_CLASSES) else sorted(names)
    ids = {name: i for i, name in enumerate(in_order(by_rule, listed, notes.wanted), start=1)}
    for a in annotations:
        a["category_id"] = ids[a["category_id"]]
    return Content(source.images, images, annotations, [{"id": i, "name": name} for name, i in ids.items()])


def read_labels(path: Path, bad: Report | None = None) -> list[Label]:
    """The lines of a DOTA text file.

    Malformed lines go to `bad`, which may raise; without it they raise UserError, as a file does that is no text.
    """
    labels = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        fields = line.split()
        if not fields or fields[0].lower().startswith(("imagesource:", "gsd:")):
            continue
        fault = None
        if len(fields) not in (9, 10):
            fault = f"{len(fields)} fields, not x1 y1 x2 y2 x3 y3 x4 y4 class difficult"
        else:
            try:
                quad = [float(field) for field in fields[:8]]
                difficult = int(fields[9]) if len(fields) == 10 else 0
            except ValueError as error:
                fault = str(error)
            else:
                if not all(abs(value) <= FARTHEST for value in quad) or difficult < 0:
                    fault = "a coordinate that is not finite or beyond 10,000,000 pixels, or difficult below 0"
                elif class_name(fields[8]) != fields[8]:
                    fault = "a control character in the name of the class"
        if fault is None:
            labels.append(Label(number, quad, fields[8], difficult))
            continue
        detail = f"{fault}: {line.strip()[:80]!r}"
        if bad is None:
            raise UserError(f"{shown(str(path))}, line {number}: malformed line ({detail})")
        bad(f"{path.name}, line {number}", "malformed line", detail)
    return labels


def write(folder: Path, split: str, names: Sequence[str], pictures: Iterable[Picture], lose: Lose) -> None:
    """Writes the label files of a split, or of all ("all"); a box is its four corners.

    Masks are lost, but for the oriented box around each. White space in a name of a class becomes "-". Crowd regions
    and what is to be ignored become difficult 2, which is read as such here; to other tools that is difficult.
    """
    told = _without_spaces(names)
    for name, new in zip(names, told, strict=True):
        if name != new:
            lose(name, f"white space in the name of a class, written as {new}")
    labels = folder / ("labelTxt" if split == "all" else f"{split}/labelTxt")
    labels.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        lines = []
        for shape in picture.shapes:
            if shape.polygon is not None:
                lose(picture.name, "mask, of which DOTA has the oriented box around it")
            quad = shape.quad or corners_of(shape.bbox)
            lines.append(f"{numbers(quad)} {told[shape.label]} {shape.difficult}\n")
        (labels / picture.name).with_suffix(".txt").write_text("".join(lines), encoding="utf-8")


def finish(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Writes what all splits share: the order of the classes."""
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in _without_spaces(names)), encoding="utf-8")


def _without_spaces(names: Sequence[str]) -> list[str]:
    """Raises UserError where two become the same."""
    told = ["-".join(name.split()) for name in names]
    for name in told:
        if told.count(name) > 1:
            raise UserError(f"two classes would be named {name!r} in DOTA's files, which have no spaces in names")
    return told
