"""What the formats of a file an image share: texts, class lists, images by name, boxes around corners."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rtmdet_fast.class_names import class_name
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import IMAGE_SUFFIXES, open_regular

NAMES_FILES = ("classes.txt", "labels.txt", "classes.names", "obj.names")
"""Class names, a line each, as LabelImg, Label Studio and darknet have them."""


def read_text(path: Path) -> str:
    """A text file. Raises UserError where it cannot be read, is a pipe or device, or is not UTF-8."""
    try:
        with open_regular(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            return text.read()
    except OSError as error:
        raise UserError(f"{shown(str(path))}: cannot read this label file: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown(str(path))}: this label file is not UTF-8 text") from None


def find_names(start: Path, top: Path) -> Path | None:
    """The file of class names in a folder or one above it, as far as `top`."""
    for folder in (start, *start.parents):
        for name in NAMES_FILES:
            if (folder / name).is_file():
                return folder / name
        if folder == top:
            break
    return None


def read_names(path: Path) -> list[str]:
    """Class names, a line each; empty lines at the end are none. Raises UserError where two are the same."""
    names = [class_name(line) for line in read_text(path).rstrip().split("\n")]
    for name in names:
        if not name or names.count(name) > 1:
            raise UserError(f"{shown(str(path))}: lists the class {name!r} twice, or a line without a name")
    return names


def in_order(found: Sequence[str], listed: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Class names in the order of a list; without one in that of the wanted, where any is found or none at all.

    A small part of a data set may lack some classes: so their ids are the same in all parts.
    """
    first = listed or (wanted if not found or set(found) & set(wanted) else ())
    return [*first, *(name for name in found if name not in set(first))]


def find_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder by name without suffix, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def find_images_below(folder: Path, skip: Callable[[str, str], None]) -> list[Path]:
    """The image files of a folder and the folders in it, sorted; what is hidden is left alone.

    Links to folders are followed, but into each folder once: they may lead to one above. What leads to one again is
    given to `skip`, and the reason. Raises UserError where a folder cannot be listed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    found = []
    waiting = [folder]
    seen: set[tuple[int, int]] = set()
    while waiting:
        place = waiting.pop()
        try:
            told = place.stat()
            with os.scandir(place) as scanned:
                entries = sorted((entry.name, entry.is_dir()) for entry in scanned if entry.name[0] != ".")
        except OSError as error:
            raise UserError(f"{shown(str(place))}: cannot list this folder: {error.strerror or error}") from None
        if (told.st_dev, told.st_ino) in seen:
            skip(os.path.relpath(place, folder), "folder that a link leads to again")
            continue
        seen.add((told.st_dev, told.st_ino))
        waiting += [place / name for name, is_folder in reversed(entries) if is_folder]
        images = (name for name, is_folder in entries if not is_folder)
        found += [place / name for name in images if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


def box_of(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """x, y, width, height of a box with these corners, which x + width and y + height give back to the bit."""
    return [x0, y0, _side(x0, x1), _side(y0, y1)]


def box_around(polygon: Sequence[float]) -> list[float]:
    """x, y, width, height of the box around x, y, x, y, …"""
    xs, ys = polygon[0::2], polygon[1::2]
    return box_of(min(xs), min(ys), max(xs), max(ys))


def corners_of(bbox: Sequence[float]) -> list[float]:
    """The eight coordinates of the corners of x, y, width, height."""
    x, y, w, h = bbox
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _side(start: float, end: float) -> float:
    side = end - start
    for _ in range(2):
        if start + side != end:
            side = math.nextafter(side, math.inf if start + side < end else -math.inf)
    return side


def settled(value: float) -> float:
    """A coordinate as it was before a division by an image's side and a multiplication with it.

    What is within 1e-9 of a number with six digits behind the point is that number: so boxes that were drawn in pixels
    come back as these, and those of one pixel stay one pixel wide.
    """
    rounded = round(value, 6)
    return rounded if abs(rounded - value) < 1e-9 else value


def numbers(values: Iterable[float]) -> str:
    """Numbers in a line, with all their digits and no more."""
    return " ".join(number(v) for v in values)


def number(value: float) -> str:
    """One number, with all its digits and no more, a negative zero too."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else repr(float(value))
