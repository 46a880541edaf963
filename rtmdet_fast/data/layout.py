"""Finding out what lies in a folder: which format, which splits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from rtmdet_fast.data.formats import FORMATS, dota
from rtmdet_fast.data.formats.files import NAMES_FILES, read_text
from rtmdet_fast.data.source import Source, Splits
from rtmdet_fast.errors import UserError, shown

NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What a split is called, the first name that is there being the one."""
LAST_RESORT = {"train": "trainval", "val": "test"}
"""What stands in for a split that is not there, with a warning."""
TITLES = {"coco": "COCO", "yolo": "YOLO", "voc": "Pascal VOC", "dota": "DOTA"}

Data = str | Path | Sequence[str | Path]
"""A folder or a data.yaml, or several of them, which are taken together."""


def find_sources(data: Data, split: str) -> tuple[Source, ...]:
    """What to train on ("train") or to evaluate on ("val"), for `Task.open_dataset`; of several sets all that have it.

    A set without validation images is evaluated on its test images, one without training images trained on its
    trainval, with a warning. Raises UserError where no set has the split, where files of several formats could be it,
    and for a folder whose layout is not known, saying what was looked for.
    """
    folders = _folders(data)
    found = [_find(folder, split) for folder in folders]
    if split != "train" and any(found):  # a set may be there to train on alone
        return tuple(source for sources in found for source in sources)
    for folder, sources in zip(folders, found, strict=True):
        if not sources:
            raise UserError(_missing(folder, split))
    return tuple(source for sources in found for source in sources)


def find_dataset(data: Data) -> Splits:
    """Every split that there is ("train", "val", "test"), or "all" of a data set that is not divided.

    Raises UserError as `find_sources` does, but for splits that are not there.
    """
    found: dict[str, tuple[Source, ...]] = {}
    for folder in _folders(data):
        splits = {split: _named(folder, names) for split, names in NAMES.items()}
        if not any(splits.values()):
            splits = {"train": _named(folder, (LAST_RESORT["train"],))}
        if not any(splits.values()):
            splits = {"all": _whole(folder)}
        if not any(splits.values()):
            raise UserError(_missing(folder, "train"))
        for split, sources in splits.items():
            if sources:
                found[split] = (*found.get(split, ()), *sources)
    return found


def training_images(data: Data) -> Path | None:
    """The folder of the (first) data set's training images; None of what is none, such as a folder of images."""
    try:
        images = find_sources(data, "train")[0].images
    except UserError:
        return None
    return images if images.is_dir() else images.parent


def source_of(annotations: Path, images: Path) -> Source:
    """Annotations and images named one by one: a JSON file, or a folder of VOC's XML, DOTA's or YOLO's text files."""
    if not annotations.is_dir():
        return Source(format="coco", annotations=annotations, images=images)
    if next(annotations.glob("*.xml"), None):
        return Source(format="voc", annotations=annotations, images=images)
    names = _class_names_near(annotations)
    for path in sorted(annotations.rglob("*.txt")):
        for line in read_text(path).split("\n"):
            fields = line.split()
            if len(fields) in (9, 10) and not _is_number(fields[8]):
                return Source(format="dota", annotations=annotations, images=images, names=names)
            if fields and all(map(_is_number, fields)):
                return Source(format="yolo", annotations=annotations, images=images, names=names)
    return Source(format="dota", annotations=annotations, images=images, names=names)


def find_dota_splits(folder: Path) -> dict[str, tuple[Path | None, Path]]:
    """Label folder, None where there is none, and image folder of each split in a folder laid out like DOTA."""
    found: dict[str, tuple[Path | None, Path]] = {}
    for split in ("train", "val", "trainval", "test"):
        if sources := dota.find(folder, split):
            found[split] = sources[0].annotations, sources[0].images
        elif split == "test" and (folder / split / "images").is_dir():  # its labels are not published
            found[split] = None, folder / split / "images"
    if not found:
        raise UserError(f"{folder} has no train/images with label files in train/labelTxt, nor val or test likewise")
    return found


def _folders(data: Data) -> list[Path]:
    folders = [Path(data)] if isinstance(data, (str, Path)) else [Path(folder) for folder in data]
    if not folders:
        raise UserError("--data names no folder")
    for folder in folders:
        if not folder.exists():
            raise UserError(f"--data {shown(str(folder))} is not there: give a folder or a data.yaml")
        if folder.is_file() and folder.suffix.lower() not in (".yaml", ".yml"):
            raise UserError(
                f"--data {shown(str(folder))} is neither a folder nor a data.yaml; name annotation files and image "
                "folders one by one"
            )
    return folders


def _find(folder: Path, split: str) -> tuple[Source, ...]:
    sources = _named(folder, NAMES[split])
    if not sources and split in LAST_RESORT and (sources := _named(folder, (LAST_RESORT[split],))):
        warnings.warn(
            f"{folder}: has no {' or '.join(NAMES[split])}; its {LAST_RESORT[split]} is taken for it", stacklevel=4
        )
    return sources


def _named(folder: Path, names: Sequence[str]) -> tuple[Source, ...]:
    """The sources of the first of the names that there is anything of."""
    for place in _places(folder):
        for name in names:
            formats = ["yolo"] if place.is_file() else FORMATS
            found = {key: FORMATS[key].find(place, name) for key in formats}
            if sources := _one(place, name, {key: sources for key, sources in found.items() if sources}):
                return sources
    return ()


def _whole(folder: Path) -> tuple[Source, ...]:
    """The sources of a data set that is not divided."""
    for place in _places(folder):
        if place.is_dir():
            found = {key: module.find_whole(place) for key, module in FORMATS.items()}
            if sources := _one(place, "", {key: sources for key, sources in found.items() if sources}):
                return sources
    return ()


def _one(folder: Path, name: str, found: dict[str, list[Source]]) -> tuple[Source, ...]:
    """The sources of the only format that has any. Raises UserError where several have."""
    if len(found) > 1:
        held = " and ".join(f"{TITLES[key]} ({_told(sources[0], folder)})" for key, sources in found.items())
        raise UserError(
            f"{folder}: its {name or 'annotations'} could be {held}: give its data.yaml, name annotations and images "
            "one by one, or move one of them away"
        )
    return tuple(next(iter(found.values()), ()))


def _places(folder: Path) -> list[Path]:
    """The folder, and the one in it where that is all that an archive holds."""
    if folder.is_file():
        return [folder]
    inside = [path for path in folder.iterdir() if path.name[0] not in "._"]
    return [folder, *(inside if len(inside) == 1 and inside[0].is_dir() else ())]


def _missing(folder: Path, split: str) -> str:
    if folder.is_file():
        return f"{folder}: names no {NAMES[split][0]}"
    if whole := _whole(folder):
        return (
            f"{folder}: holds {TITLES[whole[0].format]} annotations ({_told(whole[0], folder)}) that are not divided "
            "into train and val"
        )
    names = ", ".join((*NAMES[split], *([LAST_RESORT[split]] if split in LAST_RESORT else [])))
    looked_for = "; ".join(module.LOOKED_FOR.format(NAMES[split][0]) for module in FORMATS.values())
    return f"{folder}: no {NAMES[split][0]} found under the names {names}; looked for {looked_for}"


def _told(source: Source, folder: Path) -> str:
    return shown(str(source.annotations.relative_to(folder)))


def _class_names_near(folder: Path) -> Path | None:
    """A data.yaml or a file of class names in the folder or the two above it."""
    for place in (folder, *list(folder.resolve().parents)[:2]):
        for name in ("data.yaml", *NAMES_FILES):
            if (place / name).is_file():
                return place / name
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
