"""rtmdet-fast split."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rtmdet_fast.cli.output import Outcome, skipped_lines
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Cut large images with rotated boxes (DOTA text) into overlapping patches to train and evaluate on. (What divides
    a data set into train and val is `data --split`.)"""

    out: Path
    """Folder for the patches: images and labelTxt, or these in train, val, … with --data."""
    data: Path | None = None
    """Folder with train/images and train/labelTxt, likewise val and test, in place of --images and --labels."""
    images: Path | None = None
    """Folder of the images."""
    labels: Path | None = None
    """Folder of their label files; without it only images are cut."""
    size: int = 1024
    """Side of the patches in pixels."""
    overlap: int = 256
    """Pixels that neighbouring patches share; 500 is usual with several rates."""
    rates: tuple[float, ...] = (1.0,)
    """Scales to cut the images at, such as 0.5 1 1.5."""
    min_visible: float = 0.7
    """Share of a box's area that a patch must show; else the box is marked difficult there."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes, each of which holds an image; all cores by default."""
    skip_bad: bool = False
    """Go on over unreadable images and malformed lines, and count them."""
    overwrite: bool = False
    """Replace the patches of an earlier split in --out."""
    json: Path | None = None
    """Write the figures to this file."""


def run_split(config: SplitConfig) -> Outcome:
    from rtmdet_fast.data.layout import find_dota_splits
    from rtmdet_fast.data.split import SplitSettings, split_images

    if (config.data is None) == (config.images is None) or (config.data is not None and config.labels is not None):
        raise UserError("give --images FOLDER and --labels FOLDER, or --data FOLDER")
    settings = SplitSettings(
        size=config.size, overlap=config.overlap, rates=config.rates, min_visible=config.min_visible
    )
    if config.images is not None:
        sources = {"": (config.labels, config.images)}
    else:
        assert config.data is not None
        sources = find_dota_splits(config.data)
    found: dict[str, Any] = {}
    lines = []
    for name, (labels, images) in sources.items():
        out = config.out / name
        summary = split_images(
            images,
            labels,
            out,
            settings,
            workers=config.workers,
            skip_bad=config.skip_bad,
            overwrite=config.overwrite,
        )
        before = f" ({summary.patches - summary.written} there before)" if summary.written < summary.patches else ""
        lines.append(
            f"{out}: {summary.patches} patches{before} of {summary.images} images, {summary.boxes} boxes, "
            f"{summary.cut} of them marked difficult for being cut off"
        )
        skipped = {reason: len(what) for reason, what in summary.skipped.items()}
        lines += skipped_lines(skipped | ({"box without area": summary.no_area} if summary.no_area else {}), {})
        found[name or "patches"] = asdict(summary)
    return Outcome({**found, "out": str(config.out)}, lines)
