"""Pascal VOC's XML, a file an image, as it, LabelImg, CVAT and Roboflow write it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, TreeBuilder, indent, tostring
from xml.parsers import expat

from rtmdet_fast.class_names import class_name
from rtmdet_fast.data.annotation_file import FARTHEST, LEVELS, read_flag
from rtmdet_fast.data.formats.files import box_around, box_of, find_names, in_order, number, read_names, read_text
from rtmdet_fast.data.source import Content, Lose, Notes, Picture, Shape, Source
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import IMAGE_SUFFIXES, open_regular, read_size

LOOKED_FOR = "Pascal VOC: Annotations, JPEGImages and ImageSets/Main/{0}.txt, or {0}/*.xml beside images"
IMAGES = IMAGES_WHOLE = "JPEGImages"
"""Where the writer puts the images, of whatever split."""
DEEPEST = 32  # elements in each other


def find(folder: Path, split: str) -> list[Source]:
    """The split's XML files and images; of VOCdevkit those of all its years."""
    found = []
    for base in _bases(folder):
        listing = base / "ImageSets" / "Main" / f"{split}.txt"
        if listing.is_file() and (pair := _pair(base)):
            found.append(_source(folder, *pair, listing))
    if found:
        return found
    if pair := _pair(folder / split):
        return [_source(folder, *pair)]
    for labels in ("Annotations", "annotations"):
        for images in ("JPEGImages", "images"):
            if _holds_xml(folder / labels / split) and (folder / images / split).is_dir():
                return [_source(folder, folder / labels / split, folder / images / split)]
    return []


def find_whole(folder: Path) -> list[Source]:
    """Those of a data set that is not divided."""
    return [_source(folder, *pair) for base in _bases(folder) if (pair := _pair(base))]


def _bases(folder: Path) -> Iterator[Path]:
    yield folder
    for above in (folder, folder / "VOCdevkit"):
        yield from sorted(path for path in above.glob("VOC20*") if path.is_dir())


def _pair(base: Path) -> tuple[Path, Path] | None:
    """Folders of XML files and of their images."""
    for labels in ("Annotations", "annotations", "."):
        if _holds_xml(base / labels):
            for images in ("JPEGImages", "images", "."):
                if (base / images).is_dir():
                    return base / labels, base / images
    return None


def _holds_xml(folder: Path) -> bool:
    return any(folder.glob("*.xml"))


def _source(folder: Path, annotations: Path, images: Path, listing: Path | None = None) -> Source:
    names = find_names(annotations, folder)
    return Source(format="voc", annotations=annotations, images=images, listing=listing, names=names)


def read(source: Source, notes: Notes) -> Content:
    """The images of the list, or all that have an XML file, in order of their names.

    Coordinates are pixels from the image's corner on; in files of the VOC challenge itself (`database`), where the
    first pixel is 1 and a box includes its last, they are made so. `difficult` 1 is trained on, and in an evaluation
    neither to be found nor wrong to find; `truncated` makes no difference. A `polygon` (x1, y1, x2, …) is a mask or an
    oriented box, a `robndbox` (cx, cy, w, h, angle) an oriented box. Classes in the order of a file of names; without
    one by name.
    """
    images_dir = source.images
    if not images_dir.is_dir():
        raise UserError(f"{images_dir}: no such folder of images (for {source.annotations})")
    files = {path.name: path for path in sorted(images_dir.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    stems: dict[str, str] = {}
    for name, path in files.items():
        stems.setdefault(path.stem, name)
    unused = dict.fromkeys(files)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path in _xml_files(source, notes):
        try:
            root = read_xml(path)
        except UserError as error:
            if not notes.skip_bad:
                raise
            notes.bad(path.name, "unreadable label file", str(error))
            unused.pop(stems.get(path.stem, ""), None)
            continue
        name = Path((root.findtext("filename") or "").strip().replace("\\", "/")).name
        if name not in files:  # it may be another's, before the images were renamed
            name = stems.get(path.stem, name or f"{path.stem}.jpg")
        unused.pop(name, None)
        width, height = read_size(files[name]) if name in files else (0, 0)
        ident = len(images) + 1
        images.append({"id": ident, "file_name": name, "width": width, "height": height})
        one_based = (root.findtext("source/database") or "").strip().startswith("The VOC")
        for at, element in enumerate(root.iter("object"), start=1):
            a = _annotation(element, one_based)
            if isinstance(a, str):
                notes.bad(f"{path.name}, object {at}", "malformed object", a)
            else:
                annotations.append({"id": f"{path.name}:{at}", "image_id": ident, **a})
    if source.listing is None:
        for name in unused:
            notes.skip(name, "image without a label file")
    names = sorted({a["category_id"] for a in annotations})
    listed = read_names(source.names) if source.names else []
    ids = {name: i for i, name in enumerate(in_order(names, listed, notes.wanted), start=1)}
    for a in annotations:
        a["category_id"] = ids[a["category_id"]]
    return Content(images_dir, images, annotations, [{"id": i, "name": name} for name, i in ids.items()])


def read_xml(path: Path) -> Element:
    """The root of an XML file. Raises UserError; for a DOCTYPE too, so that no entity is ever looked up or expanded."""
    name = shown(str(path))
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise UserError(f"{name}: is nested too deeply for a VOC annotation")
        builder.start(tag, {})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def doctype(*_: object) -> None:
        raise UserError(f"{name}: has a DOCTYPE, which a VOC annotation does not need: take that line out")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = doctype
    try:
        with open_regular(path) as file:
            parser.Parse(file.read(), True)
    except OSError as error:
        raise UserError(f"{name}: cannot read this label file: {error.strerror or error}") from None
    except (expat.ExpatError, LookupError, ValueError) as error:  # the last two of an encoding
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: is not valid XML: {error}") from None
    root = builder.close()
    if root.tag != "annotation":
        raise UserError(f"{name}: is no VOC annotation: its root is <{shown(root.tag)}>, not <annotation>")
    return root


def _xml_files(source: Source, notes: Notes) -> list[Path]:
    if source.listing is None:
        found = sorted(source.annotations.glob("*.xml"))
        if not found:
            raise UserError(f"{source.annotations}: holds no label files (*.xml)")
        return found
    found = []
    seen: set[Path] = set()
    for at, line in enumerate(read_text(source.listing).split("\n"), start=1):
        fields = line.split()  # lists of one class have 1, 0 or -1 behind the name
        name = line.strip() if len(fields) != 2 or fields[1] not in ("1", "0", "-1") else fields[0]
        if not name:
            continue
        if "/" in name or "\\" in name or "\0" in name:
            notes.bad(f"{source.listing.name}, line {at}", "malformed, it is no name of an image", name)
            continue
        path = source.annotations / f"{name}.xml"
        if not os.path.isfile(path) and Path(name).suffix.lower() in IMAGE_SUFFIXES:
            path = source.annotations / f"{Path(name).stem}.xml"
        if path in seen:
            notes.skip(f"{source.listing.name}, line {at}", "image listed twice")
        elif os.path.isfile(path):
            found.append(path)
        else:
            notes.bad(f"{source.listing.name}, line {at}", "missing label file", f"{path} does not exist")
        seen.add(path)
    if not found:
        raise UserError(f"{source.listing}: names no label file")
    return found


def _annotation(element: Element, one_based: bool) -> dict[str, Any] | str:
    """A `category_id` (the name), box, flags and shape of an <object>, or what is wrong with it."""
    name = class_name(element.findtext("name") or "")
    if not name:
        return "it has no name"
    a: dict[str, Any] = {"category_id": name}
    try:
        for flag in ("difficult", "truncated"):
            a[flag] = read_flag({flag: (element.findtext(flag) or "0").strip()}, flag, LEVELS)
        shift = 1 if one_based else 0
        if (rotated := element.find("robndbox")) is not None:
            a["rbox"] = [_number(rotated, tag) for tag in ("cx", "cy", "w", "h", "angle")]
        if (polygon := element.find("polygon")) is not None:
            count = 0
            while polygon.find(f"x{count + 1}") is not None:
                count += 1
            points = [_number(polygon, f"{axis}{i}") for i in range(1, count + 1) for axis in "xy"]
            if count >= 3:
                a["segmentation"] = [points]
        if (box := element.find("bndbox")) is not None:
            x0, y0, x1, y1 = (_number(box, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
            a["bbox"] = box_of(x0 - shift, y0 - shift, x1, y1)
        elif "segmentation" in a:
            a["bbox"] = box_around(a["segmentation"][0])
        elif "rbox" in a:
            cx, cy, w, h, angle = a["rbox"]
            dx, dy = (
                abs(w / 2 * math.cos(angle)) + abs(h / 2 * math.sin(angle)),
                abs(w / 2 * math.sin(angle)) + abs(h / 2 * math.cos(angle)),
            )
            a["bbox"] = box_of(cx - dx, cy - dy, cx + dx, cy + dy)
        else:
            return "it has no bndbox, polygon or robndbox"
    except ValueError as error:
        return str(error)
    return a


def _number(element: Element, tag: str) -> float:
    text = (element.findtext(tag) or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{tag} of its {element.tag} is no number: {text[:40]!r}") from None
    if not abs(value) <= FARTHEST or "_" in text:
        raise ValueError(f"{tag} of its {element.tag} is not finite, beyond 10,000,000 pixels or oddly written")
    return value


def write(folder: Path, split: str, names: Sequence[str], pictures: Iterable[Picture], lose: Lose) -> None:
    """Writes the XML files and the list of a split, or the files of all ("all"), with all digits of the numbers.

    Crowd regions and what is to be ignored are left out. Coordinates are those of LabelImg, CVAT and Roboflow, pixels
    from the image's corner on. A mask is a `polygon`, an oriented box a `polygon` or a `robndbox`, beside the `bndbox`
    around it.
    """
    (folder / "Annotations").mkdir(exist_ok=True)
    listed = []
    for picture in pictures:
        listed.append(f"{Path(picture.name).stem}\n")
        root = Element("annotation")
        SubElement(root, "filename").text = picture.name
        size = SubElement(root, "size")
        for tag, value in zip(("width", "height", "depth"), (*picture.size, 3), strict=True):
            SubElement(size, tag).text = str(value)
        for shape in picture.shapes:
            if shape.difficult > 1:
                lose(picture.name, "crowd region or object to be ignored")
            else:
                _add(SubElement(root, "object"), shape, names[shape.label])
        indent(root)
        path = (folder / "Annotations" / picture.name).with_suffix(".xml")
        path.write_bytes(tostring(root, encoding="utf-8") + b"\n")
    if split != "all":
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(listed), encoding="utf-8")


def finish(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Writes what all splits share: the order of the classes."""
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _add(element: Element, shape: Shape, name: str) -> None:
    SubElement(element, "name").text = name
    for flag in ("truncated", "difficult"):
        SubElement(element, flag).text = str(int(shape.flags.get(flag) or 0))
    x, y, w, h = shape.bbox
    box = SubElement(element, "bndbox")
    for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), (x, y, x + w, y + h), strict=True):
        SubElement(box, tag).text = number(value)
    if shape.rbox is not None:
        rotated = SubElement(element, "robndbox")
        for tag, value in zip(("cx", "cy", "w", "h", "angle"), shape.rbox, strict=True):
            SubElement(rotated, tag).text = number(value)
    elif points := shape.polygon or shape.quad:
        polygon = SubElement(element, "polygon")
        for i, value in enumerate(points):
            SubElement(polygon, f"{'xy'[i % 2]}{i // 2 + 1}").text = number(value)
