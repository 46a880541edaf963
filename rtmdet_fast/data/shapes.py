"""A detection data set that is drawn instead of downloaded: shapes on textured backgrounds.

Each class leans to a hue of its own, as many real things do, so that minutes on a CPU are enough to learn it; the
backgrounds come in all hues, with lines, arcs and grey blobs that are no objects, and objects hide parts of each other.
"""

from __future__ import annotations

import colorsys
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_json
from rtmdet_fast.geometry.masks import Region, outline

CLASSES = ("circle", "rectangle", "triangle", "star", "ellipse")

# A change of what is drawn raises this, so that a data set of an older version is drawn anew.
VERSION = 1

# An object is placed only where at least this share of it, and of each object that it covers, stays visible:
# so nothing is drawn that is not annotated.
MIN_VISIBLE = 0.65

# Objects differ from what lies behind them by at least so many grey levels in one channel.
MIN_CONTRAST = 90

# Standard deviation of an object's hue around its class's, in degrees; the classes are 360 / 5 = 72 apart.
HUE_SPREAD = 10

FILE_NAME = re.compile(r"[0-9]{6,}\.jpg")  # of what is drawn


@dataclass(frozen=True, slots=True)
class ShapesPaths:
    root: Path
    train_ann: Path
    train_images: Path
    val_ann: Path
    val_images: Path


def shapes_paths(root: str | Path) -> ShapesPaths:
    """Where `make_shapes` puts what it draws."""
    root = Path(root)
    annotations = root / "annotations"
    return ShapesPaths(
        root=root,
        train_ann=annotations / "instances_train.json",
        train_images=root / "train",
        val_ann=annotations / "instances_val.json",
        val_images=root / "val",
    )


@dataclass(frozen=True, slots=True)
class _Recipe:
    num_train: int
    num_val: int
    image_size: int
    seed: int
    version: int = VERSION


def make_shapes(
    root: str | Path, *, num_train: int = 600, num_val: int = 120, image_size: int = 160, seed: int = 0
) -> ShapesPaths:
    """Draws `num_train` + `num_val` square scenes of `image_size` pixels under `root`, laid out like COCO.

    Each annotation tells of the visible part of its object: `bbox` [x, y, w, h], `area`, `segmentation`
    (polygons), and `rbox` [cx, cy, w, h, radians] along the object's own axes with w >= h and the angle in
    [-pi/2, pi/2); all but the angle in pixels.
    The same arguments give the same files; a complete data set of the same arguments is left as it is.
    Raises UserError where `root` holds annotations or images of something else, or leads elsewhere by a link.
    """
    if min(num_train, num_val) < 1 or image_size < 64:
        raise UserError(
            "shapes need num_train and num_val of at least 1 and image_size of at least 64, "
            f"not {num_train}, {num_val} and {image_size}"
        )
    if seed < 0:
        raise UserError(f"the seed of shapes is {seed}; it must be at least 0")
    recipe = _Recipe(num_train, num_val, image_size, seed)
    paths = shapes_paths(root)
    splits = ((paths.train_ann, paths.train_images, num_train), (paths.val_ann, paths.val_images, num_val))
    old = [_drawn_before(ann, folder, recipe) for ann, folder, _ in splits]
    if all(complete for _, complete in old):
        return paths

    for names, _ in old:
        for name in names:
            name.unlink(missing_ok=True)
    for split, (ann, folder, count) in enumerate(splits):
        _write_split(ann, folder, count, split, recipe)
    return paths


def _drawn_before(ann: Path, folder: Path, recipe: _Recipe) -> tuple[list[Path], bool]:
    """The images drawn into `folder` by an earlier call, and whether they are all that `recipe` asks for.

    Raises UserError where anything there was not drawn: what is not ours is neither deleted nor overwritten.
    """
    for path in (ann.parent, ann, folder):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, which may lead to what is not ours: draw the shapes into an empty folder"
            )
    names: list[str] = []
    complete = False
    if ann.exists():
        try:
            found = json.loads(ann.read_text())
            names = [image["file_name"] for image in found["images"]]
            complete = found["info"]["shapes"] == asdict(recipe) and "annotations" in found
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"{ann} belongs to another data set: draw the shapes into an empty folder") from None
    # Only names such as were drawn: an annotation file from elsewhere may name anything, ../../victim.txt too.
    if not all(isinstance(name, str) and FILE_NAME.fullmatch(name) for name in names):
        raise UserError(f"{ann} belongs to another data set: draw the shapes into an empty folder")
    if folder.exists() and (rest := sorted({path.name for path in folder.iterdir()} - set(names))):
        raise UserError(f"{folder / rest[0]} was not drawn here: draw the shapes into an empty folder")
    paths = [folder / name for name in names]
    return paths, complete and all(path.is_file() for path in paths)


def _write_split(ann: Path, folder: Path, count: int, split: int, recipe: _Recipe) -> None:
    size = recipe.image_size
    content: dict[str, Any] = {
        "info": {"description": "shapes drawn by rtmdet_fast", "shapes": asdict(recipe)},
        "images": [{"id": i + 1, "file_name": f"{i:06d}.jpg", "width": size, "height": size} for i in range(count)],
        "categories": [{"id": c + 1, "name": name, "supercategory": "shape"} for c, name in enumerate(CLASSES)],
    }
    # Without annotations yet: after an interruption it tells which images are ours.
    write_json(ann, content, indent=None)
    folder.mkdir(parents=True, exist_ok=True)
    annotations: list[dict[str, Any]] = []
    for i, image in enumerate(content["images"]):
        # One generator per image: it does not depend on how many there are.
        scene, objects = draw_scene(np.random.default_rng([recipe.seed, split, i]), size)
        path = folder / image["file_name"]
        if not cv2.imwrite(str(path), scene, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise UserError(f"cannot write {path}: check the space and rights there")
        for obj in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, "iscrowd": 0, **obj})
    write_json(ann, {**content, "annotations": annotations}, indent=None)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One scene: [size, size, 3] uint8 BGR, and its annotations without ids."""
    scene = _background(rng, size)
    masks: list[np.ndarray] = []  # visible parts, [size, size] bool, back to front
    areas: list[float] = []  # of the whole objects, also what lies outside the image
    labels: list[int] = []
    angles: list[float] = []
    wanted = 0 if rng.random() < 0.03 else 1 + min(int(rng.exponential(3.5)), 9)
    for _ in range(3 * wanted):
        if len(masks) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        diameter = max(size * math.exp(rng.uniform(math.log(0.14), math.log(0.5))), 10.0)
        polygon, angle = _outline(rng, CLASSES[label], diameter)
        polygon += rng.uniform(0.02, 0.98, 2) * size
        alpha = _filled(polygon, size)
        mask = alpha > 127
        area = float(cv2.contourArea(polygon.astype(np.float32)))
        if mask.sum() < MIN_VISIBLE * area or any(
            (m & ~mask).sum() < MIN_VISIBLE * a for m, a in zip(masks, areas, strict=True)
        ):
            continue
        _paint(rng, scene, alpha, polygon, diameter, label)
        masks = [m & ~mask for m in masks] + [mask]
        areas.append(area)
        labels.append(label)
        angles.append(angle)
    scene = _camera(rng, scene)
    objects = [_annotation(m, c, t) for m, c, t in zip(masks, labels, angles, strict=True)]
    return scene, objects


def _outline(rng: np.random.Generator, name: str, diameter: float) -> tuple[np.ndarray, float]:
    """Vertices [k, 2] around the origin, and the angle of their box (one of those that symmetry allows)."""
    r = diameter / 2
    angle = rng.uniform(-math.pi, math.pi)
    t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    if name == "circle":
        angle = 0.0
        points = r * np.stack([np.cos(t), np.sin(t)], 1)
    elif name == "ellipse":
        points = r * np.stack([1.15 * np.cos(t), rng.uniform(0.42, 0.6) * np.sin(t)], 1)
    elif name == "rectangle":
        points = r * np.array([1.0, rng.uniform(0.4, 0.9)]) * [[-1, -1], [1, -1], [1, 1], [-1, 1]]
    elif name == "triangle":
        points = r * np.array([rng.uniform(0.75, 1.1), 1.0]) * [[-1, 0.8], [1, 0.8], [0, -1]]
    else:
        angle = rng.uniform(-math.pi / 5, math.pi / 5)
        radius = 1.1 * r * np.where(np.arange(10) % 2, rng.uniform(0.38, 0.5), 1.0)
        t = np.arange(10) * math.pi / 5
        points = radius[:, None] * np.stack([np.sin(t), -np.cos(t)], 1)
    return points @ _rotation(angle).T, angle


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def _annotation(mask: np.ndarray, label: int, angle: float) -> dict[str, Any]:
    y, x = np.nonzero(mask)
    # Extents along the shape's own axes, with half a pixel on either side: a pixel is an area.
    along = np.stack([x + 0.5, y + 0.5], 1) @ _rotation(angle)
    low, high = along.min(0) - 0.5, along.max(0) + 0.5
    cx, cy = _rotation(angle) @ (low + high) / 2
    w, h = high - low
    if w < h:
        w, h, angle = h, w, angle + math.pi / 2
    angle = (angle + math.pi / 2) % math.pi - math.pi / 2
    x0, y0 = int(x.min()), int(y.min())
    width, height = int(x.max()) + 1 - x0, int(y.max()) + 1 - y0
    return {
        "category_id": label + 1,
        "bbox": [x0, y0, width, height],
        "area": len(x),
        "segmentation": outline(Region(x0, y0, mask[y0 : y0 + height, x0 : x0 + width])),
        "rbox": [round(float(v), 4) for v in (cx, cy, w, h)] + [round(float(angle), 6)],
    }


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Any BGR colour [3] float32."""
    return rng.uniform(15, 240, 3).astype(np.float32)


def _class_colour(rng: np.random.Generator, label: int) -> np.ndarray:
    """A BGR colour [3] float32 of the class's hue."""
    hue = (label * 360 / len(CLASSES) + rng.normal(0, HUE_SPREAD)) % 360
    rgb = colorsys.hsv_to_rgb(hue / 360, rng.uniform(0.5, 1), rng.uniform(0.4, 1))
    return np.array(rgb[::-1], np.float32) * 255


def _contrasting(rng: np.random.Generator, label: int, behind: np.ndarray) -> np.ndarray:
    """A colour of the class that differs from what lies behind the object."""
    for _ in range(20):
        colour = _class_colour(rng, label)
        if np.abs(colour - behind).max() >= MIN_CONTRAST:
            return colour
    return colour


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in [-1, 1], [size, size] float32, with `cells` bumps along a side."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A pattern in [-1, 1], [size, size] float32: gradient, stripes, squares, dots or clouds."""
    a = rng.uniform(0, math.pi)
    x = np.arange(size, dtype=np.float32)
    u = x[None] * math.cos(a) + x[:, None] * math.sin(a)
    v = x[:, None] * math.cos(a) - x[None] * math.sin(a)
    k = 2 * math.pi / rng.uniform(5, 28)
    kind = rng.integers(5)
    if kind == 0:
        return 2 * (u - u.min()) / (u.max() - u.min()) - 1
    if kind == 1:
        return np.clip(rng.uniform(1, 6) * np.sin(k * u), -1, 1)
    if kind == 2:
        return np.sign(np.sin(k * u) * np.sin(k * v))
    if kind == 3:
        return np.clip(4 * (np.sin(k * u) * np.sin(k * v) - 0.5), -1, 1)
    return np.clip(sum(_noise(rng, size, cells) / (i + 1) for i, cells in enumerate((4, 9, 21))), -1, 1)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """[size, size, 3] float32 with a texture and clutter that is no object."""
    base = _colour(rng)
    scene = base + _texture(rng, size)[..., None] * rng.uniform(-22, 22, 3).astype(np.float32)
    scene += _noise(rng, size, 3)[..., None] * rng.uniform(-25, 25, 3).astype(np.float32)
    for _ in range(rng.poisson(2)):  # lines and arcs
        alpha = np.zeros((size, size), np.uint8)
        width = int(rng.integers(1, max(size // 50, 2)))
        p, q = rng.integers(0, size, (2, 2)).tolist()
        if rng.random() < 0.5:
            cv2.line(alpha, p, q, 255, width, cv2.LINE_AA)
        else:
            axes = rng.integers(size // 16, size // 3, 2).tolist()
            tilt, start, sweep = rng.uniform((0, 0, 40), (180, 360, 140)).tolist()
            cv2.ellipse(alpha, p, axes, tilt, start, start + sweep, 255, width, cv2.LINE_AA)
        _blend(scene, alpha, _colour(rng))
    for _ in range(rng.poisson(0.6)):  # blobs with a bumpy outline
        t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        bumps = np.ones_like(t)
        for n in (2, 3, 5):
            bumps += rng.uniform(0.1, 0.3) * np.cos(n * t + rng.uniform(0, 2 * math.pi))
        points = rng.uniform(0.04, 0.16) * size * bumps[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
        grey = rng.uniform(30, 225) + rng.uniform(-20, 20, 3)  # such as stones: in a class's hue they would mislead
        _blend(scene, _filled(points + rng.uniform(0, size, 2), size), grey.astype(np.float32))
    return np.clip(scene, 0, 255)


def _filled(polygon: np.ndarray, size: int) -> np.ndarray:
    """Opacity, [size, size] uint8, of a polygon [k, 2] in pixels with smooth edges."""
    alpha = np.zeros((size, size), np.uint8)
    cv2.fillPoly(alpha, [_fixed_point(polygon)], 255, cv2.LINE_AA, shift=4)
    return alpha


def _fixed_point(polygon: np.ndarray) -> np.ndarray:
    """Vertices in sixteenths of a pixel, as cv2 draws them with shift=4."""
    return np.round(polygon * 16).astype(np.int32)


def _blend(scene: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> None:
    """Lays `colour` ([3] or [size, size, 3]) over the scene with an opacity of 0 to 255, in place."""
    scene += (alpha.astype(np.float32) / 255)[..., None] * (colour - scene)


def _paint(
    rng: np.random.Generator, scene: np.ndarray, alpha: np.ndarray, polygon: np.ndarray, diameter: float, label: int
) -> None:
    size = len(scene)
    behind = scene[alpha > 127].mean(0)
    colour = _contrasting(rng, label, behind)
    fill = np.broadcast_to(colour, scene.shape)
    if rng.random() < 0.5:
        # Small steps against the contrast to what lies behind: a texture must not dissolve the form.
        fill = colour + _texture(rng, size)[..., None] * rng.uniform(-18, 18, 3).astype(np.float32)
    if rng.random() < 0.3:  # shadow
        offset = rng.uniform(-0.12, 0.12, 2) * diameter
        shift = np.column_stack([np.eye(2), offset])
        shadow = cv2.warpAffine(alpha, shift, (size, size))
        shadow = cv2.GaussianBlur(shadow, (0, 0), max(0.05 * diameter, 1.0))
        _blend(scene, shadow // 2, np.zeros(3, np.float32))
    _blend(scene, alpha, fill)
    if rng.random() < 0.35:  # a rim, inside the outline
        rim = np.zeros_like(alpha)
        width = max(round(0.08 * diameter), 1)
        cv2.polylines(rim, [_fixed_point(polygon)], True, 255, width, cv2.LINE_AA, shift=4)
        _blend(scene, np.minimum(rim, alpha), colour * rng.uniform(0.35, 0.8))


def _camera(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """Uneven light, blur and sensor noise; uint8."""
    size = len(scene)
    scene = scene * (1 + rng.uniform(0, 0.25) * _noise(rng, size, 2))[..., None]
    if rng.random() < 0.3:
        scene = cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.4, 1.0))
    scene = scene + rng.normal(0, rng.uniform(1, 4), scene.shape).astype(np.float32)
    return np.clip(scene, 0, 255).astype(np.uint8)
