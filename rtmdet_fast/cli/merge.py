"""rtmdet-fast merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import tyro

from rtmdet_fast.cli.output import Outcome
from rtmdet_fast.cli.predict import area_of
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_atomically

if TYPE_CHECKING:
    from rtmdet_fast.inference.shards import Row

BATCH = 1000
"""Rows in memory at once."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Join what the shards of `predict --shard` found in one file, provided that none is missing or unfinished."""

    folder: tyro.conf.Positional[Path]
    """The --out of `predict --shard`."""
    to: Path | None = None
    """File to write: .jsonl or .parquet, a row for each image, or .json, as `predict` writes predictions.json (COCO
    results form). Where not given, predictions.jsonl or .parquet in the folder, as its shards are."""
    json: Path | None = None
    """Write a summary to this file."""


def run_merge(config: MergeConfig) -> Outcome:
    from tqdm import tqdm

    from rtmdet_fast.inference.shards import Merged, row_writer

    if config.to is not None and config.to.suffix not in (".jsonl", ".parquet", ".json"):
        raise UserError(f"--to is {config.to}: give a name that ends in .jsonl, .parquet or .json")
    merged = Merged(config.folder, progress=True)
    target = config.to or config.folder / f"predictions.{merged.made_with['format']}"

    def rows() -> Iterator[Row]:
        return iter(tqdm(merged.rows(), desc="merge", unit="image", total=merged.total))

    if target.suffix == ".json":
        with write_atomically(target) as file:
            _write_coco(file, rows, merged.made_with["class_names"])
    else:
        with row_writer(target) as write:
            left = rows()
            while batch := list(islice(left, BATCH)):
                write(batch)
    unreadable = f", {merged.unreadable} unreadable files" if merged.unreadable else ""
    s = "s" * (merged.shards != 1)
    repeated = f", {merged.repeated} that stood twice kept once" if merged.repeated else ""
    lines = [
        f"{merged.detections} detections in {merged.images} images of {merged.shards} shard{s}{unreadable}{repeated}"
    ]
    names = ("shards", "images", "unreadable", "detections", "repeated")
    summary = {**{name: getattr(merged, name) for name in names}, "out": str(target)}
    return Outcome(summary, [*lines, f"written to {target}"])


def _write_coco(file: IO[bytes], rows: Callable[[], Iterator[Row]], class_names: list[str]) -> None:
    """What `predict` writes into predictions.json, with an image and an annotation in memory at a time."""
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)]
    for name, entries in (("images", _images), ("annotations", _annotations)):
        file.write(f'{"{" if name == "images" else ","}"{name}": ['.encode())
        for i, entry in enumerate(entries(rows())):
            file.write(f"{',' if i else ''}\n {json.dumps(entry)}".encode())
        file.write(b"\n]")
    file.write(f', "categories": {json.dumps(categories)}}}\n'.encode())


def _images(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    image_id = 0
    for row in rows:
        if "error" not in row:
            image_id += 1
            size = {"width": row["width"], "height": row["height"]}
            yield {"id": image_id, "file_name": row["file_name"], **size}


def _annotations(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """As `Results.to_coco` makes them."""
    image_id = annotation_id = 0
    for row in rows:
        image_id += "error" not in row
        for found in row.get("detections", ()):
            annotation_id += 1
            x1, y1, x2, y2 = found["box"]
            entry = {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": found["label"] + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": found["score"],
            }
            if "mask" in found:
                entry["segmentation"] = found["mask"]
            if "rbox" in found:
                corners = [value for corner in found["corners"] for value in corner]
                width, height = found["rbox"][2:4]
                entry |= {"rbox": found["rbox"], "segmentation": [corners], "area": width * height}
            yield {**entry, "area": area_of(entry), "iscrowd": 0}
