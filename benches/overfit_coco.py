"""A proof that the whole chain learns real masks: RTMDet-Ins-tiny over-fits 16 images of COCO, from scratch.

    python -m benches.overfit_coco ANNOTATIONS IMAGES --out runs/overfit [--epochs 420]

The images are the first 16 of the file without a crowd of which every object measures 12 pixels or more (the square
root of its area) at the network's size. They are trained on and evaluated on: the figures say that what is taught is
learnt, not that it generalises. Writes overfit.json and overfit.jpg (truth above, detections below).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from rtmdet_fast import RTMDet
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.images import write_image
from rtmdet_fast.inference.drawing import draw_detections
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.train import train

IMAGES = 16
LEAST_OBJECT = 12  # pixels, at the network's size


def subset(annotations: Path, size: int) -> dict:
    """The COCO content of the images that are over-fitted."""
    content = json.loads(annotations.read_text())
    kept = []
    for image in content["images"]:
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        scale = size / max(image["width"], image["height"])
        if own and not any(a["iscrowd"] for a in own) and min(a["area"] for a in own) ** 0.5 * scale >= LEAST_OBJECT:
            kept.append(image)
    kept = kept[:IMAGES]
    ids = {image["id"] for image in kept}
    own = [a for a in content["annotations"] if a["image_id"] in ids]
    seen = {a["category_id"] for a in own}
    return {
        "images": kept,
        "annotations": own,
        "categories": [c for c in content["categories"] if c["id"] in seen],
    }


def picture(model: RTMDet, dataset: CocoDataset, indices: list[int], height: int = 240) -> np.ndarray:
    """Truth above, detections below; images side by side at one height."""
    import cv2

    columns = []
    for index in indices:
        sample = dataset.load(index)
        truth = draw_detections(
            sample.image, sample.boxes, sample.labels, None, dataset.class_names, masks=sample.masks
        )
        both = (truth, model.predict(sample.image).plot())
        width = round(height * truth.shape[1] / truth.shape[0])
        columns.append(np.vstack([cv2.resize(p, (width, height), interpolation=cv2.INTER_AREA) for p in both]))
    return np.hstack(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/overfit"))
    parser.add_argument("--epochs", type=int, default=420)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--show", type=int, nargs="*", default=[0, 1, 2, 3], help="images in the picture")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "overfit_instances.json"
    file.write_text(json.dumps(subset(arguments.annotations, arguments.image_size)))
    result = train(
        TrainConfig(
            train=file,
            train_images=arguments.images,
            val=file,
            val_images=arguments.images,
            out=arguments.out,
            size="tiny",
            task="ins",
            epochs=arguments.epochs,
            stage2_epochs=arguments.epochs,
            batch_size=4,  # the images are few: steps count
            image_size=arguments.image_size,
            lr=arguments.lr,
            num_workers=0,
            val_interval=max(arguments.epochs // 6, 1),
            device="cpu",
            overwrite=True,
            report=False,
        )
    )
    dataset = CocoDataset(file, arguments.images, masks=True)
    figures = {
        "images": len(dataset),
        "objects": sum(len(dataset.load(i).boxes) for i in range(len(dataset))),
        "classes": len(dataset.class_names),
        **{key: round(value, 4) for key, value in result.metrics.items()},
        "seconds": round(result.seconds),
    }
    (arguments.out / "overfit.json").write_text(json.dumps(figures, indent=1))
    model = RTMDet.from_pretrained(result.best)
    write_image(arguments.out / "overfit.jpg", picture(model, dataset, arguments.show))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
