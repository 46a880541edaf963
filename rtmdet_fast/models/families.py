"""The families of detectors, and which of them a weights file is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.rtmdet.model import RTMDet

FAMILIES: dict[str, type[Detector]] = {"rtmdet": RTMDet}
"""By the names that a user gives."""


def load_model(path_or_name: str | Path, **options: Any) -> Detector:
    """The model of a weights file or published name, of whichever family it is; see `Detector.from_pretrained`."""
    return RTMDet.from_pretrained(path_or_name, **options)
