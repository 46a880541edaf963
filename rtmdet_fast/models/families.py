"""The families of detectors, and which of them a weights file is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.checkpoint import read_checkpoint, resolve_weights
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtmdet.model import RTMDet

FAMILIES: dict[str, type[Detector]] = {"rtmdet": RTMDet, "rtdetr": RTDETR}
"""By the names that a user gives."""


def load_model(path_or_name: str | Path, **options: Any) -> Detector:
    """The model of a weights file or published name, of whichever family it is; see `Detector.from_pretrained`."""
    checkpoint = read_checkpoint(resolve_weights(path_or_name))
    for family in FAMILIES.values():
        if family.translate(checkpoint) is not None:
            return family.from_checkpoint(checkpoint, **options)
    known = ", ".join(family.weights_of for family in FAMILIES.values())
    first = next(iter(checkpoint.state_dict))
    raise UserError(f"{checkpoint.path} holds none of {known} weights (its first key is {first[:60]!r})")
