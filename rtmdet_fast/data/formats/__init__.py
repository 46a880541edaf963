"""Annotation formats, one a module: where its files lie (`find`, `find_whole`), reading them, writing them."""

from __future__ import annotations

from types import ModuleType

from rtmdet_fast.data.formats import coco, dota, voc, yolo

FORMATS: dict[str, ModuleType] = {"coco": coco, "yolo": yolo, "voc": voc, "dota": dota}
