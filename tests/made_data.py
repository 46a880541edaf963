"""Data sets of a few made images, with whatever is to be wrong with them."""

import json

import cv2
import numpy as np

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.inspection import inspect

CLASSES = ("car", "bus")


def noise(seed, width=64, height=48):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class Maker:
    """Splits of made images, as COCO JSON."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, split, images, classes=CLASSES, sizes=None):
        """images: by file name pixels, or the bytes of the file, and boxes x, y, w, h, class; sizes: as annotated."""
        (self.folder / split).mkdir()
        entries, annotations = [], []
        for name, (content, boxes) in images.items():
            if isinstance(content, bytes):
                (self.folder / split / name).write_bytes(content)
                width, height = 64, 48
            else:
                cv2.imwrite(str(self.folder / split / name), content)
                height, width = content.shape[:2]
            width, height = (sizes or {}).get(name, (width, height))
            entries.append({"id": len(entries) + 1, "file_name": name, "width": width, "height": height})
            for x, y, w, h, label in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(entries),
                        "category_id": classes.index(label) + 1,
                        "bbox": [x, y, w, h],
                    }
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        (self.folder / f"{split}.json").write_text(json.dumps(content))

    def inspect(self, *splits, image_size=64, **options):
        datasets = {
            split: CocoDataset(
                self.folder / f"{split}.json",
                self.folder / split,
                skip_bad=True,
                training=split == "train",
                keep_empty=True,
            )
            for split in splits
        }
        return inspect(datasets, image_size, **{"nms_iou": 0.65, **options})
