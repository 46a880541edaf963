"""rtmdet-fast data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from rtmdet_fast.cli.output import Outcome, skipped_lines
from rtmdet_fast.errors import UserError

if TYPE_CHECKING:
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.data.inspection import Inspection
    from rtmdet_fast.data.source import Source, Splits

NAMED = 3  # files in a line of the console
CLASSES = 40  # rows of its table


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Look at a data set before training on it: a summary, and a page with charts and drawn images, the worst first.
    With --convert or --split: write it to --out in another format, or divided into train and val."""

    source: tyro.conf.Positional[tuple[Path, ...]]
    """Folder or data.yaml of a data set in any format that `train --data` takes; several are taken together."""
    task: str | None = None
    """What is to be detected: det (boxes), ins (boxes and masks) or rotated (rotated boxes); where not given rotated
    for DOTA text and det for any other format."""
    image_size: int | None = None
    """Side of the network's input in pixels, which objects are measured at; 640 (rotated: 1024) where not given."""
    page: Path = Path("data.html")
    """The page to write."""
    samples: int = 12
    """Images of each split that the page shows, beside the worst."""
    convert: Literal["coco", "yolo", "voc", "dota"] | None = None
    """Write the data set in this format to --out, images and all."""
    split: float | None = None
    """Write the data set to --out with this share of its images as train and the others as val, by their classes; what
    is train, val or undivided is dealt out anew, a test split stays as it is. (To cut large images into patches is
    another command, `split`.)"""
    out: Path | None = None
    """Folder for --convert and --split."""
    seed: int = 0
    """Of --split."""
    overwrite: bool = False
    """Replace what an earlier --convert or --split wrote to --out."""
    skip_bad: bool = False
    """With --convert and --split: leave out, and count, what cannot be read; else it is an error. A look counts it in
    any case."""
    json: Path | None = None
    """Write what was found to this file, every name included."""


def run_data(config: DataConfig) -> Outcome:
    from rtmdet_fast.data.layout import find_dataset
    from rtmdet_fast.tasks import TASKS

    writes = config.convert is not None or config.split is not None
    if writes != (config.out is not None):
        raise UserError("--out FOLDER goes with --convert FORMAT or --split SHARE, and these with it")
    if config.split is not None and not 0 < config.split < 1:
        raise UserError(f"--split is {config.split}; it must lie between 0 and 1, as 0.8 does")
    if config.task is not None and config.task not in TASKS:
        raise UserError(f"--task {config.task!r} is unknown; choose one of {', '.join(TASKS)}")
    if config.image_size is not None and not 32 <= config.image_size <= 2**16:
        raise UserError(f"--image-size is {config.image_size}; it must lie between 32 and {2**16}")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"--seed is {config.seed}; it must lie between 0 and {2**32 - 1}")
    if not 0 <= config.samples <= 1000:
        raise UserError(f"--samples is {config.samples}; it must lie between 0 and 1000")
    splits = find_dataset(config.source)
    formats = {source.format for sources in splits.values() for source in sources}
    task = config.task or ("rotated" if formats == {"dota"} else "det")
    if writes:
        return _write(config, splits, task, formats)
    return _look(config, splits, task, formats)


def _look(config: DataConfig, splits: Splits, task: str, formats: set[str]) -> Outcome:
    from rtmdet_fast.data.data_page import write_data_page
    from rtmdet_fast.data.inspection import inspect
    from rtmdet_fast.models.rtmdet.model import HEADS, default_image_size
    from rtmdet_fast.tasks import TASKS

    image_size = config.image_size or default_image_size("tiny", task)
    datasets = {
        name: TASKS[task].open_dataset(
            sources,
            skip_bad=True,
            training=name in ("train", "all"),  # as the one is trained on, and the other evaluated
            keep_empty=True,
        )
        for name, sources in sorted(splits.items(), key=lambda item: _place(item[0]))
    }
    inspection = inspect(datasets, image_size, nms_iou=HEADS[task].test_settings.iou_threshold, progress=True)
    title = f"Data: {', '.join(map(str, config.source))}"
    page = write_data_page(config.page, inspection, title=title, samples=config.samples)
    found = {"task": task, "formats": sorted(formats), **inspection.as_json(), "page": str(page)}
    return Outcome(found, [*_summary(inspection), f"page {page}"])


def _place(split: str) -> tuple[int, str]:
    order = ("train", "all", "val", "test")
    return order.index(split) if split in order else len(order), split


def _summary(inspection: Inspection) -> list[str]:
    lines = []
    for split in inspection.splits:
        counts = split.counts
        lines.append(
            f"{split.name}: {len(counts):,} images, {int((counts == 0).sum()):,} of them without objects; "
            f"{len(split.labels):,} objects, {counts.mean() if len(counts) else 0:.1f} an image, "
            f"at most {counts.max(initial=0):,}"
        )
    lines += ["", *_class_table(inspection.per_class(), [split.name for split in inspection.splits]), ""]
    for finding in inspection.findings:
        names = ", ".join(finding.names[:NAMED]) + (", …" if len(finding.names) > NAMED else "")
        lines.append(f"{finding.level}: {finding.text}" + (f": {names}" if names else ""))
    return lines


def _class_table(per_class: Mapping[str, Mapping[str, tuple[int, int]]], splits: Sequence[str]) -> list[str]:
    """Objects and images of each class; of many classes those with the most objects and with the fewest."""
    ranked = sorted(per_class, key=lambda name: -sum(objects for objects, _ in per_class[name].values()))
    shown = ranked if len(ranked) <= CLASSES else [*ranked[: CLASSES // 2], *ranked[-CLASSES // 2 :]]
    width = max([len("class"), *map(len, shown)])
    head = f"{'class':{width}} " + " ".join(f"{f'{split} objects':>14} {'images':>8}" for split in splits)
    rows = [
        f"{name:{width}} " + " ".join(f"{per_class[name][s][0]:>14,} {per_class[name][s][1]:>8,}" for s in splits)
        for name in shown
    ]
    if len(shown) < len(ranked):
        rows.insert(CLASSES // 2, f"… {len(ranked) - len(shown)} classes in between")
    return [head, *rows]


def _write(config: DataConfig, splits: Splits, task: str, formats: set[str]) -> Outcome:
    from rtmdet_fast.data.convert import write_dataset
    from rtmdet_fast.data.inspection import class_counts

    assert config.out is not None
    format: str = config.convert or (next(iter(formats)) if len(formats) == 1 else "coco")
    if config.split is not None:
        datasets, read = _divided(config, splits, task)
    else:
        datasets = read = _opened(splits, task, config.skip_bad)
    changed = write_dataset(datasets, format, config.out, overwrite=config.overwrite, progress=True)
    lines: list[str] = []
    counts_of: dict[str, dict[str, int]] = {}
    per_class: dict[str, dict[str, tuple[int, int]]] = {}
    for name, dataset in datasets.items():
        starts, _, labels = dataset.objects()
        counts_of[name] = {"images": len(dataset), "objects": len(labels)}
        apart = f", {dataset.apart_count:,} more that are difficult or to be ignored" if dataset.apart_count else ""
        lines.append(f"{config.out}, {name}: {len(dataset):,} images, {len(labels):,} objects{apart}")
        for class_name, *counts in zip(
            dataset.class_names, *class_counts(starts, labels, len(dataset.class_names)), strict=True
        ):
            per_class.setdefault(class_name, {})[name] = counts[0], counts[1]
    lines += ["", *_class_table(per_class, list(datasets)), ""]
    skipped: Counter[str] = Counter()
    for dataset in read.values():
        skipped.update({reason: len(what) for reason, what in dataset.skipped.items()})
    lines += skipped_lines(dict(skipped), {reason: len(what) for reason, what in changed.items()})
    found = {"out": str(config.out), "format": format, "task": task, "splits": counts_of, "per_class": per_class}
    return Outcome({**found, "left_out": dict(skipped), "changed": changed}, lines)


def _opened(splits: Splits, task: str, skip_bad: bool) -> dict[str, CocoDataset]:
    """The data sets with the classes of all of them in one order."""
    from rtmdet_fast.tasks import TASKS

    def opened(sources: Sequence[Source], names: Sequence[str] | None) -> CocoDataset:
        return TASKS[task].open_dataset(sources, skip_bad=skip_bad, class_names=names)

    datasets = {name: opened(splits[name], None) for name in sorted(splits, key=_place)}
    names = tuple(dict.fromkeys(name for dataset in datasets.values() for name in dataset.class_names))
    return {
        name: dataset if dataset.class_names == names else opened(splits[name], names)
        for name, dataset in datasets.items()
    }


def _divided(config: DataConfig, splits: Splits, task: str) -> tuple[dict[str, CocoDataset], dict[str, CocoDataset]]:
    """Train and val of all images but those of a test split, which stays; and the data sets that they were taken of."""
    import numpy as np

    from rtmdet_fast.data.inspection import same_pixels, scan_images
    from rtmdet_fast.data.partition import partition

    assert config.split is not None
    pooled = tuple(source for name, sources in splits.items() if name != "test" for source in sources)
    if not pooled:
        raise UserError(
            f"{', '.join(map(str, config.source))}: has test images alone, and --split leaves these as they are"
        )
    together = {"all": pooled, **({"test": splits["test"]} if "test" in splits else {})}
    datasets = _opened(together, task, config.skip_bad)
    pool = datasets["all"]
    scan = scan_images([pool], progress=True)[0]
    if scan.faults and not config.skip_bad:
        raise UserError(f"{next(iter(scan.faults.values()))}; replace it, or leave such images out with --skip-bad")
    pool.leave_out(list(scan.faults))
    kept = [i for i in range(len(pool)) if i not in scan.faults]
    starts, _, labels = pool.objects()
    held = [np.unique(labels[starts[i] : starts[i + 1]]).tolist() for i in kept]
    to_train = partition(held, same_pixels([scan])[kept], config.split, config.seed)
    train, val = ([i for i, chosen in zip(kept, to_train, strict=True) if chosen == side] for side in (True, False))
    divided = {"train": pool.subset(train), "val": pool.subset(val)}
    return divided | {name: dataset for name, dataset in datasets.items() if name == "test"}, datasets
