"""Mutations of annotation files: of their content, anywhere or where it hurts, and of their bytes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from fuzzing import Drawn as Rng

SIZE = 64  # of the images, in pixels


def pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NAMES = (
    "",
    " ",
    "a\nb",
    "nul\0",
    "\ud83d",
    "\udcff",
    "円",
    "👩\u200d🚒",
    "circle",
    " circle\n",
    "\u2028",
    "../x",
    "a" * 300,
)
NUMBERS = (0, -1, 1, 2, 0.5, 1e-320, 1e7, 1e9, 1e308, -1e308, math.inf, -math.inf, math.nan, 2**31, 2**63, -(2**63) - 1)
NUMBERS += (10**30, 10**400)
VALUES = (None, True, False, "0", "1", "true", "no", [], {}, [[]], [None], [1, 2, 3, 4], {"size": 1}, *NAMES, *NUMBERS)


def hostile(rng: Rng) -> Any:
    if rng.random() < 0.05:
        return nested(int(rng.choice((10, 100, 400, 900, 940, 960, 980))))
    return copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])


def mutate_anywhere(rng: Rng, content: Any) -> None:
    """One structural change at a random place: another value or type, a key or entry less, more or elsewhere."""
    holder = content
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = pick(rng, keys)
        inner = holder[key]
        if not (isinstance(inner, (dict, list)) and inner) or rng.random() < 0.1:
            break
        holder = inner
    kind = int(rng.integers(6))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(int(rng.integers(len(holder) + 1)), copy.deepcopy(inner))
    elif kind == 2 and isinstance(inner, (int, float)):
        holder[key] = pick(rng, (-inner, inner * 1000, inner + 0.5, str(inner), [inner], inner * 10**12, float(inner)))
    elif kind == 3:
        holder[key] = [inner]
    elif kind == 4 and isinstance(holder, dict):
        holder[key] = pick(rng, list(holder.values()))
    else:
        holder[key] = hostile(rng)


def damage(rng: Rng, data: bytes) -> bytes:
    """A change of the bytes of a text."""
    kind = int(rng.integers(7))
    at = int(rng.integers(len(data) + 1))
    if kind == 0:
        return data[:at]
    if kind == 1 and data:
        changed = bytearray(data)
        for place in rng.integers(0, len(data), int(rng.integers(1, 9))).tolist():
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 2:
        return b"\xef\xbb\xbf" + data
    if kind == 3:
        return data.decode(errors="replace").encode(pick(rng, ("utf-16", "utf-16-le", "utf-32", "latin-1")), "replace")
    if kind == 4:
        return data[:at] + pick(rng, (b"\0", b"\xff", b"[" * 5000, b"9" * 5000, b"NaN", b'"', b"\n", b"{}")) + data[at:]
    if kind == 5:  # an integer that Python does not read
        place = data.find(b": ", at)
        return data[: place + 2] + b"9" * 5000 + data[place + 2 :] if place >= 0 else data
    return data[:at] + data[at + int(rng.integers(1, 50)) :]


def dumps(rng: Rng, content: Any) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=bool(rng.random() < 0.7)).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 3000 + b"]" * 3000


def anywhere(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    mutate_anywhere(rng, content)


def entries(content: Any, key: str) -> list[dict[str, Any]]:
    """The images, annotations or categories that an earlier mutation left."""
    return [e for e in content[key] if isinstance(e, dict)] if isinstance(content.get(key), list) else []


def entry_of(rng: Rng, content: Any, key: str) -> dict[str, Any]:
    """One of them, or an empty one where there is none."""
    found = entries(content, key)
    return pick(rng, found) if found else {}


def box(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    a = entry_of(rng, content, "annotations")
    values = rng.uniform(-20, 90, 4).round(1).tolist()
    if rng.random() < 0.5:
        values[int(rng.integers(4))] = hostile(rng)
    a["bbox"] = values[: int(rng.choice((4, 4, 4, 4, 3)))] + [1] * int(rng.random() < 0.1)


def rotated_box(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    a = entry_of(rng, content, "annotations")
    key = pick(rng, ("rbox", "bbox"))
    values = [*rng.uniform(-30, 90, 4).round(1).tolist(), float(rng.uniform(-7, 7))]
    kind = int(rng.integers(5))
    if kind == 0:
        values[int(rng.integers(5))] = hostile(rng)
    elif kind == 1:
        values = rng.uniform(-30, 100, int(rng.choice((4, 6, 8, 8, 8, 10)))).round(1).tolist()
    elif kind == 2:
        values = [5.0] * int(rng.choice((5, 8)))
    a[key] = values
    if rng.random() < 0.5:
        a.pop("rbox" if key == "bbox" else "bbox", None)


def corners(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    for a in entries(content, "annotations"):
        if isinstance(a.get("bbox"), list) and len(a["bbox"]) == 4:
            x, y, w, h = a["bbox"]
            if all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in a["bbox"]):
                a["bbox"] = [x, y, x + w, y + h]


def polygon(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    a = entry_of(rng, content, "annotations")
    points = rng.uniform(-30, 100, int(rng.integers(0, 13))).round(int(rng.integers(3))).tolist()
    kind = int(rng.integers(5))
    if kind == 0 and points:
        points[int(rng.integers(len(points)))] = hostile(rng)
    elif kind == 1:
        points = [5.0, 5.0] * (len(points) // 2)
    elif kind == 2:
        points = [1e6 * p / 100 for p in points]
    a["segmentation"] = pick(rng, ([points], [points, points], points, [points, hostile(rng)], hostile(rng)))


def run_lengths(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    a = entry_of(rng, content, "annotations")
    size: list[Any] = pick(
        rng, ([SIZE, SIZE], [SIZE, SIZE], [32, 128], [1, SIZE * SIZE], [2**20, 2**10], [SIZE, hostile(rng)])
    )
    total = SIZE * SIZE
    cuts = sorted(rng.integers(0, total + 1, int(rng.integers(0, 9))).tolist())
    counts: Any = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    kind = int(rng.integers(7))
    if kind == 0:
        counts[int(rng.integers(len(counts)))] = hostile(rng)
    elif kind == 1:
        counts = "".join(map(chr, rng.integers(40, 120, int(rng.integers(0, 30))).tolist()))
    elif kind == 2:
        counts = [2**62, 2**62, 2**62, 2**62 + total]
    elif kind == 3:
        counts = hostile(rng)
    elif kind == 4:
        counts = [-5, *counts, 5]
    a["segmentation"] = {"size": size, "counts": counts}


def flag(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    entry_of(rng, content, "annotations")[pick(rng, ("iscrowd", "ignore", "difficult"))] = hostile(rng)


def identifier(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    key = pick(rng, ("images", "annotations", "categories"))
    a, b = entry_of(rng, content, key), entry_of(rng, content, key)
    which = pick(rng, ("id", "id", "image_id", "category_id"))
    a[which] = b.get(which) if rng.random() < 0.5 else hostile(rng)


def image(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    entry = entry_of(rng, content, "images")
    kind = int(rng.integers(4))
    if kind == 0:
        entry["file_name"] = pick(rng, odd)
    elif kind == 1:
        entry["file_name"] = pick(rng, ("../train/000000.jpg", "/etc/passwd", "a/../000001.jpg", ".", "", *VALUES))
    elif kind == 2:
        entry[pick(rng, ("width", "height"))] = pick(rng, (1, 7, 63, 65, 2**20, 2**20 + 1, 63.9, hostile(rng)))
    else:
        entry.pop(pick(rng, ("width", "height")), None)


def category(rng: Rng, content: Any, odd: tuple[str, ...]) -> None:
    entry_of(rng, content, "categories")["name"] = pick(rng, ("circle", " star", "star\n", math.nan, *VALUES))


MUTATIONS = (anywhere, anywhere, anywhere, box, corners, polygon, run_lengths, flag, identifier, image, category)
