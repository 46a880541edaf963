"""Detect with an exported ONNX file, by numpy, OpenCV and onnxruntime alone.

python examples/onnx_client.py MODEL.onnx IMAGE [OUT.jpg]
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

MEAN = np.array((103.53, 116.28, 123.675), np.float32)  # BGR
STD = np.array((57.375, 57.12, 58.395), np.float32)


def detect(session, image, size, score_threshold=0.3):
    """BGR image [H, W, 3] -> dets [n, 5] (x1, y1, x2, y2, score) in its pixels, labels [n]."""
    height, width = image.shape[:2]
    ratio = size / max(height, width)
    w, h = max(int(width * ratio + 0.5), 1), max(int(height * ratio + 0.5), 1)
    canvas = np.full((size, size, 3), 114, np.uint8)
    canvas[:h, :w] = cv2.resize(image, (w, h))
    blob = ((canvas.astype(np.float32) - MEAN) / STD).transpose(2, 0, 1)[None]
    dets, labels = session.run(["dets", "labels"], {"input": np.ascontiguousarray(blob)})
    dets, labels = dets[0], labels[0]
    found = (labels >= 0) & (dets[:, 4] > score_threshold)
    dets, labels = dets[found], labels[found]
    dets[:, :4] /= (w / width, h / height, w / width, h / height)
    return dets, labels


def main(model, path, out=None):
    session = onnxruntime.InferenceSession(model)
    about = json.loads(session.get_modelmeta().custom_metadata_map["rtmdet_fast"])
    image = cv2.imread(path)
    dets, labels = detect(session, image, about["image_size"])
    for (x1, y1, x2, y2, score), label in zip(dets, labels, strict=True):
        print(f"{about['class_names'][label]} {score:.3f} at {x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}")
        cv2.rectangle(image, (round(x1), round(y1)), (round(x2), round(y2)), (0, 200, 255), 2)
    if out:
        cv2.imwrite(out, image)


if __name__ == "__main__":
    main(*sys.argv[1:])
