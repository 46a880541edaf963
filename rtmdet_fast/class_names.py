"""Class names: the one form that every reader gives them, and those of the published models."""

from __future__ import annotations

import unicodedata


def class_name(text: str) -> str:
    """A name as it is compared, drawn and written: one line without control characters; empty where nothing is left.

    Runs of white space, line breaks among them, become a space, at the ends nothing; control characters and lone
    surrogates, which no file or font takes, become U+FFFD.
    """
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in " ".join(text.split()))


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
