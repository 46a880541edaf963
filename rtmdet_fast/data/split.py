"""Cutting large annotated images into overlapping patches, named and labelled as by the DOTA devkit."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rtmdet_fast.data.formats.dota import Label, read_labels
from rtmdet_fast.data.formats.files import find_images
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.files import write_json, write_one_of_many
from rtmdet_fast.geometry.rotated import boxes_to_quads, edges_cross, quads_to_boxes
from rtmdet_fast.geometry.windows import crop, windows
from rtmdet_fast.images import OPENCV_MAX_PIXELS, read_image, read_size, write_image

MARKER = "split.json"
PATCH = "*__*__*___*"  # names of patches, without suffix
# A patch has to hold at least this share of image, where any does; a small image at a small scale adds nothing else.
MIN_IMAGE = 0.6
DIFFICULT = 2  # of a box of which too little is in the patch


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How images are cut; a scale of 0.5 halves the image before 1024 x 1024 patches are taken from it."""

    size: int = 1024
    """Side of the patches in pixels."""
    overlap: int = 256
    """Pixels that neighbours share, after scaling."""
    rates: tuple[float, ...] = (1.0,)
    """Scales that the image is cut at."""
    min_visible: float = 0.7
    """Share of a box's area in the patch below which it is marked difficult (2), as in the DOTA devkit."""

    def __post_init__(self) -> None:
        if self.size < 32 or not 0 <= self.overlap < self.size:
            raise UserError(
                f"patches of {self.size} pixels with an overlap of {self.overlap} cannot be cut: "
                "give a size of at least 32 and an overlap below it"
            )
        if not self.rates or len(set(self.rates)) < len(self.rates) or not all(0.05 <= r <= 20 for r in self.rates):
            raise UserError(f"rates {' '.join(map(str, self.rates))}: give different scales from 0.05 to 20")
        if not 0 < self.min_visible <= 1:
            raise UserError(f"min_visible is {self.min_visible}; it must lie in (0, 1]")


@dataclass
class SplitSummary:
    images: int = 0
    patches: int = 0
    """Of these images."""
    written: int = 0
    """Of these patches; the others are of an earlier run that was interrupted."""
    boxes: int = 0
    """Written to label files, an object once for each patch that shows enough of it."""
    cut: int = 0
    """Written as difficult, because the patch shows less than `min_visible`."""
    no_area: int = 0
    """Boxes of the source without area, left out."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """What was left out, by reason."""


@dataclass(frozen=True)
class _Job:
    image: Path
    labels: Path | None
    out: Path
    settings: SplitSettings
    skip_bad: bool


def split_images(
    images: Path,
    labels: Path | None,
    out: Path,
    settings: SplitSettings,
    *,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> SplitSummary:
    """Cuts every image of a folder into patches out/images/NAME__RATE__X___Y.png, as the DOTA devkit names them.

    X and Y are the patch's corner in the scaled image. With `labels`, a folder of DOTA text, out/labelTxt gets a file
    for each patch; images without one are left out and counted. Corners of boxes may lie beyond the patch.

    Each process holds one image and one patch. An interrupted run goes on where it was, with the same arguments.

    Raises UserError where `out` holds anything else than an unfinished split of the same images and settings, or a
    split at all and `overwrite` is set; and, unless `skip_bad`, for unreadable images and malformed lines.
    """
    jobs, skipped = _jobs(images, labels, out, settings, skip_bad)
    if not jobs:
        raise UserError(f"{images}: holds no image to split" + (f" with a label file in {labels}" if labels else ""))
    _prepare(images, labels, out, settings, overwrite)
    summary = SplitSummary(skipped=skipped)
    with _results(jobs, workers) as results, tqdm(total=len(jobs), unit="img", disable=not progress) as bar:
        for part in results:
            for name in ("images", "patches", "written", "boxes", "cut", "no_area"):
                setattr(summary, name, getattr(summary, name) + getattr(part, name))
            for reason, what in part.skipped.items():
                summary.skipped.setdefault(reason, []).extend(what)
            bar.update()
            bar.set_postfix(patches=summary.patches, refresh=False)
    return summary


def scaled_windows(width: int, height: int, settings: SplitSettings) -> list[tuple[float, int, int]]:
    """(rate, x, y) of an image's patches; x and y are pixels of the scaled image."""
    found = []
    for rate in settings.rates:
        w, h = max(round(width * rate), 1), max(round(height * rate), 1)
        for x, y in windows(w, h, settings.size, settings.overlap):
            filled = min(settings.size, w - x) * min(settings.size, h - y) / settings.size**2
            found.append((filled, (rate, x, y)))
    fullest = max(filled for filled, _ in found)
    least = MIN_IMAGE if fullest > MIN_IMAGE else 0.99 * fullest
    return [place for filled, place in found if filled > least]


def cut_patch(image: np.ndarray, rate: float, x: int, y: int, size: int) -> np.ndarray:
    """[size, size, 3], the window at (x, y) of `image` scaled by `rate`, padded where it ends.

    Only what the window shows is scaled: whole, a large image would take gigabytes.
    """
    import cv2

    if rate == 1:
        return crop(image, x, y, size)
    height, width = image.shape[:2]
    margin = math.ceil(3 / min(rate, 1)) + 1
    x0, y0 = (max(math.floor(v / rate) - margin, 0) for v in (x, y))
    x1, y1 = (math.ceil((v + size) / rate) + margin for v in (x, y))
    part = image[y0:y1, x0:x1]
    if rate < 1:  # against aliasing
        part = cv2.GaussianBlur(part, (0, 0), 0.5 * math.sqrt(1 / rate**2 - 1))
    # pixel centres: patch pixel i lies at (x + i + 0.5) / rate - 0.5 of the image
    shift = [[1 / rate, 0, (x + 0.5) / rate - 0.5 - x0], [0, 1 / rate, (y + 0.5) / rate - 0.5 - y0]]
    filled = (min(size, max(round(width * rate), 1) - x), min(size, max(round(height * rate), 1) - y))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    scaled = cv2.warpAffine(part, np.array(shift), filled, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return crop(scaled, 0, 0, size)


def visible_area(quads: np.ndarray, x: float, y: float, size: float) -> np.ndarray:
    """Area [n] of the parts of quadrilaterals [n, 8], of any shape without crossing edges, in the square at (x, y).

    Green's theorem: going round the edges, the integral of y clamped to the square over dx where x is in the square.
    """
    half = size / 2
    p = np.asarray(quads, np.float64).reshape(-1, 4, 2) - (x + half, y + half)
    x0, y0 = p[..., 0], p[..., 1]
    x1, y1 = np.roll(x0, -1, 1), np.roll(y0, -1, 1)
    run = np.where(x1 == x0, 1.0, x1 - x0)
    xs, xe = np.clip(x0, -half, half), np.clip(x1, -half, half)
    ys, ye = y0 + (xs - x0) / run * (y1 - y0), y0 + (xe - x0) / run * (y1 - y0)
    # where the edge passes the square's top and bottom, as shares of its way from xs to xe
    rise = np.where(ye == ys, 1.0, ye - ys)
    t, u = (np.clip((side - ys) / rise, 0, 1) for side in (-half, half))
    t, u = np.minimum(t, u), np.maximum(t, u)
    middle = np.clip(ys + (t + u) / 2 * (ye - ys), -half, half)
    mean = t * np.clip(ys, -half, half) + (u - t) * middle + (1 - u) * np.clip(ye, -half, half)
    return np.abs(((xe - xs) * mean).sum(1))


def polygon_area(quads: np.ndarray) -> np.ndarray:
    """Area [n] of quadrilaterals [n, 8] without crossing edges."""
    p = quads.reshape(-1, 4, 2) - quads.reshape(-1, 4, 2)[:, :1]
    q = np.roll(p, -1, 1)
    return np.abs((p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1)) / 2


def _jobs(
    images: Path, labels: Path | None, out: Path, settings: SplitSettings, skip_bad: bool
) -> tuple[list[_Job], dict[str, list[str]]]:
    skipped: dict[str, list[str]] = {}
    jobs = []
    if labels is not None and not labels.is_dir():
        raise UserError(f"{labels}: no such folder of label files")
    for name, files in find_images(images).items():
        file = labels / f"{name}.txt" if labels else None
        if len(files) > 1:
            if not skip_bad:
                raise UserError(f"{images}: {' and '.join(f.name for f in files)} would give patches of the same names")
            skipped.setdefault("several images of this name", []).append(name)
        elif file is not None and not file.is_file():
            skipped.setdefault("image without a label file", []).append(files[0].name)
        else:
            jobs.append(_Job(files[0], file, out, settings, skip_bad))
    known = {job.image.stem for job in jobs}.union(*skipped.values()) if labels else set()
    for file in sorted(labels.glob("*.txt")) if labels else ():
        if file.stem not in known:
            if not skip_bad:
                raise UserError(f"{file}: there is no image of this name in {images}; --skip-bad leaves it out")
            skipped.setdefault("label file without an image", []).append(file.name)
    return jobs, skipped


def _prepare(images: Path, labels: Path | None, out: Path, settings: SplitSettings, overwrite: bool) -> None:
    """Makes the folders, or finds those of the same split."""
    for name, source in (("images", images), ("labelTxt", labels)):
        if source is not None and (out / name).resolve() == source.resolve():
            raise UserError(f"{out} holds the images to split: give another folder for the patches")
    described = {
        "images": str(images.resolve()),
        "labels": str(labels.resolve()) if labels else None,
        **asdict(settings),
        "rates": list(settings.rates),
    }
    marker = out / MARKER
    if marker.is_file():
        if overwrite:
            for path in (*out.glob(f"images/{PATCH}.png"), *out.glob(f"labelTxt/{PATCH}.txt")):
                path.unlink()  # and nothing else that may lie there
        elif _read_marker(marker) != described:
            raise UserError(
                f"{out} holds patches of other images or settings: give another folder, or --overwrite to replace them"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty, and is no folder of patches: give another one")
    (out / "images").mkdir(parents=True, exist_ok=True)
    if labels:
        (out / "labelTxt").mkdir(exist_ok=True)
    write_json(marker, described)


def _read_marker(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        return None


@contextmanager
def _results(jobs: list[_Job], workers: int) -> Iterator[Iterator[SplitSummary]]:
    """The summaries of the jobs, in whatever order they end."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield map(_split_image, jobs)
        return
    # not forked from this process, whose threads may hold locks, but from one that has only imported this module
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_one_thread)
    try:
        yield (done.result() for done in as_completed([pool.submit(_split_image, job) for job in jobs]))
    except BrokenProcessPool:
        hint = f"the memory may not have sufficed for {workers} images at a time; try fewer --workers"
        raise UserError(f"a process that splits images was killed: {hint}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)


def _split_image(job: _Job) -> SplitSummary:
    summary = SplitSummary(images=1)
    settings = job.settings

    def bad(what: str, reason: str, detail: object) -> None:
        if not job.skip_bad:
            folder = (job.labels or job.image).parent
            text = f"{shown(str(folder / what))}: {reason} ({shown(detail):.400})"
            raise UserError(f"{text}; correct it, or leave such entries out with --skip-bad")
        summary.skipped.setdefault(reason, []).append(what)

    try:
        all_labels = read_labels(job.labels, bad) if job.labels else []
        width, height = read_size(job.image)
        patches = _patches(job, width, height) if width else []
        image = np.empty((0, 0, 3), np.uint8)
        if not all(done for *_, done in patches) or not width:
            image = read_image(job.image, max_pixels=OPENCV_MAX_PIXELS)  # to cut such images is what this is for
            if image.shape[:2] != (height, width):
                patches = _patches(job, image.shape[1], image.shape[0])
    except UserError:
        if not job.skip_bad:
            raise
        return SplitSummary(skipped={"unreadable image or label file": [job.image.name]})
    labels, quads, areas = _usable(all_labels, summary)
    for picture, rate, x, y, done in patches:
        lines = _patch_labels(labels, quads * rate, areas * rate**2, x, y, settings, summary)
        summary.patches += 1
        if done:
            continue
        write_image(picture, cut_patch(image, rate, x, y, settings.size))
        if job.labels:  # last: where it is, the patch is done
            write_one_of_many(_label_file(job, picture), "".join(lines).encode())
        summary.written += 1
    return summary


def _patches(job: _Job, width: int, height: int) -> list[tuple[Path, float, int, int, bool]]:
    """(file, rate, x, y, whether it was written before) of an image's patches."""
    patches = []
    for rate, x, y in scaled_windows(width, height, job.settings):
        picture = job.out / "images" / f"{job.image.stem}__{rate:g}__{x}___{y}.png"
        done = picture.is_file() and (job.labels is None or _label_file(job, picture).is_file())
        patches.append((picture, rate, x, y, done))
    return patches


def _label_file(job: _Job, picture: Path) -> Path:
    return job.out / "labelTxt" / f"{picture.stem}.txt"


def _usable(labels: list[Label], summary: SplitSummary) -> tuple[list[Label], np.ndarray, np.ndarray]:
    """Labels with area, their corners [n, 8] and areas [n]; where edges cross, the smallest rectangle around them."""
    quads = np.array([label.quad for label in labels], np.float64).reshape(-1, 8)
    crossing = edges_cross(quads)
    quads[crossing] = boxes_to_quads(quads_to_boxes(quads[crossing]))
    areas = polygon_area(quads)
    solid = areas > 1e-6
    summary.no_area = int((~solid).sum())
    return [label for label, s in zip(labels, solid, strict=True) if s], quads[solid], areas[solid]


def _patch_labels(
    labels: list[Label],
    quads: np.ndarray,
    areas: np.ndarray,
    x: int,
    y: int,
    settings: SplitSettings,
    summary: SplitSummary,
) -> list[str]:
    """The lines of a patch, and their numbers added to the summary."""
    corners = quads.reshape(-1, 4, 2)
    low, high = corners.min(1, initial=np.inf), corners.max(1, initial=-np.inf)
    near = np.flatnonzero(((high > (x, y)) & (low < (x + settings.size, y + settings.size))).all(1))
    share = visible_area(quads[near], x, y, settings.size) / areas[near]
    lines = []
    for i, visible in zip(near.tolist(), share.tolist(), strict=True):
        if visible < 1e-6:
            continue
        whole = visible >= settings.min_visible - 1e-9
        summary.boxes += 1
        summary.cut += not whole
        numbers = " ".join(f"{v:.2f}" for v in (corners[i] - (x, y)).ravel())
        lines.append(f"{numbers} {labels[i].name} {labels[i].difficult if whole else DIFFICULT}\n")
    return lines
