"""Class names: the one form that every reader gives them, and those of the published models."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from rtmdet_fast.errors import UserError


def class_name(text: str) -> str:
    """A name as it is compared, drawn and written: one line without control characters; empty where nothing is left.

    Runs of white space, line breaks among them, become a space, at the ends nothing; control characters and lone
    surrogates, which no file or font takes, become U+FFFD.
    """
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in " ".join(text.split()))


def find_classes(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """The indices in `names` of the classes that are wanted, ascending; small and capital letters are alike where
    nothing else fits. UserError, with the nearest name, for one that is none of them."""
    if isinstance(wanted, str):
        raise UserError(f"classes is {wanted!r}; a list of names is expected")
    found: set[int] = set()
    for text in wanted:
        name = class_name(str(text))
        at = [i for i, other in enumerate(names) if other == name]
        at = at or [i for i, other in enumerate(names) if other.casefold() == name.casefold()]
        if not at:
            lower = {other.casefold(): other for other in names}
            near = difflib.get_close_matches(name.casefold(), lower, 1)
            hint = f"the nearest is {lower[near[0]]!r}" if near else f"there are {_some(names)}"
            raise UserError(f"class {name!r} is none of the model's: {hint}")
        found.update(at)
    return sorted(found)


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)


DOTA_CLASSES = (  # version 1.0, in the official order
    "plane",
    "baseball-diamond",
    "bridge",
    "ground-track-field",
    "small-vehicle",
    "large-vehicle",
    "ship",
    "tennis-court",
    "basketball-court",
    "storage-tank",
    "soccer-ball-field",
    "roundabout",
    "harbor",
    "swimming-pool",
    "helicopter",
)
