"""Finding annotations and images in a folder laid out like COCO or DOTA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtmdet_fast.data.source import Source, Splits
from rtmdet_fast.errors import UserError

DEEPER = ("/labelTxt", "")  # an archive may hold a folder of its own


def find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of `split` ("train", "val") in `folder`.

    Looks for annotations/instances_{split}*.json, instances_{split}*.json or {split}*.json, and for images in a folder
    of the same suffix (train2017), in {split}, images/{split} or images. Raises UserError saying what is missing.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder")
    patterns = (f"annotations/instances_{split}*.json", f"instances_{split}*.json", f"{split}*.json")
    found = next((sorted(folder.glob(pattern)) for pattern in patterns if any(folder.glob(pattern))), [])
    if not found:
        raise UserError(f"{folder} has no annotations/instances_{split}*.json and no {split}.json")
    if len(found) > 1:
        raise UserError(f"{folder} has several {split} annotation files ({', '.join(f.name for f in found)}); name one")
    name = found[0].stem.removeprefix("instances_")
    for place in (name, split, f"images/{name}", f"images/{split}", "images"):
        if (folder / place).is_dir():
            return found[0], folder / place
    raise UserError(f"{folder} has {found[0].name} but no image folder {name} or images")


def find_dota_split(folder: Path, split: str) -> tuple[Path, Path]:
    """Annotations (a folder of text files, or a JSON file) and image folder of `split` in `folder`.

    Looks for {split}/images beside {split}/labelTxt, as in DOTA (its labelTxt-v1.0 and labelTxt-v1.0/labelTxt too) and
    in `rtmdet-fast split`'s output, or {split}/annfiles, as mmrotate's tool names it; then for images/{split} with
    labelTxt/{split}; last for JSON as `find_split` does. Raises UserError saying what is missing.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder")
    found = _dota_text(folder, split)
    if found:
        return found
    try:
        return find_split(folder, split)
    except UserError as error:
        wanted = f"{split}/images with label files in {split}/labelTxt"
        raise UserError(f"{folder} has no {wanted}, and no COCO-style JSON either: {error}") from None


def find_dota_splits(folder: Path) -> dict[str, tuple[Path | None, Path]]:
    """Label folder, None where there is none, and image folder of each split in a folder laid out like DOTA."""
    found: dict[str, tuple[Path | None, Path]] = {}
    for split in ("train", "val", "trainval", "test"):
        if text := _dota_text(folder, split):
            found[split] = text
        elif split == "test" and (folder / split / "images").is_dir():  # its labels are not published
            found[split] = None, folder / split / "images"
    if not found:
        raise UserError(f"{folder} has no train/images with label files in train/labelTxt, nor val or test likewise")
    return found


def _dota_text(folder: Path, split: str) -> tuple[Path, Path] | None:
    places = [(f"{split}/images", f"{split}/{name}") for name in ("labelTxt", "annfiles")]
    places += [(f"{split}/images", f"{split}/labelTxt-v{v}{deeper}") for v in ("1.0", "1.5") for deeper in DEEPER]
    places += [(f"images/{split}", f"labelTxt/{split}")]
    for images, labels in places:
        if (folder / images).is_dir() and any((folder / labels).glob("*.txt")):
            return folder / labels, folder / images
    return None


def find_dataset(data: str | Path | Sequence[str | Path]) -> Splits:
    """Every split of a data set, of any format, in a folder or by a data.yaml; of several sets those of all together.

    Raises UserError for a tie between formats and for a layout that is not known, saying what was looked for.
    """
    raise NotImplementedError


def find_sources(data: str | Path | Sequence[str | Path], split: str) -> tuple[Source, ...]:
    """What to train on ("train") or to evaluate on ("val", by the names val, valid and validation, last test).

    As `find_dataset`; for `Task.open_dataset(sources, **options)`.
    """
    raise NotImplementedError
