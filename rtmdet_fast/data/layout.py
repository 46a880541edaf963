"""Finding annotation files and images in a folder laid out like COCO."""

from __future__ import annotations

from pathlib import Path

from rtmdet_fast.errors import UserError


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
