"""What annotation files hold, of which any entry may be of any type: JSON, numbers, ids, sizes, flags."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeGuard

from rtmdet_fast.errors import UserError
from rtmdet_fast.images import OPENCV_MAX_SIDE, open_regular

FARTHEST = 1e7  # pixels: float32 still tells neighbours apart there


def read_json(path: Path) -> dict[str, Any]:
    """A COCO annotation file, of which the lists of images, annotations and categories are there."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read this annotation file: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a JSON file: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply for a COCO annotation file") from None
    except ValueError:  # Python refuses to read them
        raise UserError(f"{path}: holds an integer of thousands of digits") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: is a JSON {type(content).__name__}, where COCO has an object of images and annotations"
        )
    for key in ("images", "annotations", "categories"):
        # files of unannotated test images leave the annotations out
        if not isinstance(content.get(key), list) and not (key == "annotations" and content.get(key) is None):
            raise UserError(f'{path}: lacks the list "{key}" of a COCO annotation file')
    return content


def image_size(entry: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of an image entry, or (0, 0) where it tells none that an image can have."""
    width, height = entry.get("width"), entry.get("height")
    if is_number(width) and is_number(height) and all(1 <= side <= OPENCV_MAX_SIDE for side in (width, height)):
        return int(width), int(height)
    return 0, 0


def is_id(value: Any) -> bool:
    """Whether a value is an integer of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, but for NaN, the infinite and integers that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_numbers(value: Any, count: int) -> TypeGuard[list[float]]:
    """Whether a value is a list of so many finite numbers."""
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))


FLAGS = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}  # False is 0, and 1.0 is 1
LEVELS = {**FLAGS, 2: 2, "2": 2}


def read_flag(entry: dict[str, Any], key: str, known: dict[Any, int] = FLAGS) -> int:
    """A flag such as iscrowd as 0 or 1, or what else is `known`; 0 where it is absent.

    Raises ValueError, saying what is wrong, where its value is none.
    """
    value = entry.get(key)
    try:
        return known[value.lower() if isinstance(value, str) else value]
    except (KeyError, TypeError):  # TypeError: a list
        raise ValueError(f"{key} is none of 0, 1, true and false") from None
