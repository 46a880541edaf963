"""What the official weights give first for one image of COCO, for seeing whether a file gives the same here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.rtdetr.model import RTDETR

IMAGE = "val2017/000000039769.jpg"
TOLERANCE = 1e-3
"""Of logits and boxes: the figures have four digits after the point at least, and implementations differ by 5e-4."""
# Of the first three queries: logits of the first three classes, then x, y and width of the box. From the scripts that
# convert these weights for Hugging Face's transformers, which runs all layers of the decoder.
FIRST = {
    "rtdetr-r18": (
        (-4.3364253, -6.465683, -3.6130402, -4.083815, -6.4039373, -6.97881, -4.192215, -7.3410473, -6.9027247),
        (0.16868353, 0.19833282, 0.21182671, 0.25559652, 0.55121744, 0.47988364, 0.7698693, 0.4124569, 0.46036878),
    ),
    "rtdetr-r34": (
        (-4.3727384, -4.7921476, -5.7299604, -4.840536, -8.455345, -4.1745796, -4.1277084, -5.2154565, -5.7852697),
        (0.258278, 0.5497808, 0.4732004, 0.16889669, 0.19890057, 0.21138911, 0.76632994, 0.4147879, 0.46851268),
    ),
    "rtdetr-r50m": (
        (-4.319764, -6.1349025, -6.094794, -5.1056995, -7.744766, -4.803956, -4.7685347, -7.9278393, -4.5751696),
        (0.2582739, 0.55071366, 0.47660282, 0.16811174, 0.19954777, 0.21292639, 0.54986024, 0.2752091, 0.0561416),
    ),
    "rtdetr-r50": (
        (-4.6476398, -5.001154, -4.9785104, -4.1593494, -4.7038546, -5.946485, -4.4374595, -4.658361, -6.2352347),
        (0.16880608, 0.19992264, 0.21225442, 0.76837635, 0.4122631, 0.46368608, 0.2595386, 0.5483334, 0.4777486),
    ),
    "rtdetr-r101": (
        (-4.6162, -4.9189, -4.6656, -4.4701, -4.4997, -4.9659, -5.6641, -7.9000, -5.0725),
        (0.7707, 0.4124, 0.4585, 0.2589, 0.5492, 0.4735, 0.1688, 0.1993, 0.2108),
    ),
    "rtdetr-r18-coco-objects365": (
        (-4.8726, -5.9066, -5.2450, -4.8157, -6.8764, -5.1656, -4.7492, -5.7006, -5.1333),
        (0.2552, 0.5501, 0.4773, 0.1685, 0.1986, 0.2104, 0.7692, 0.4141, 0.4620),
    ),
    "rtdetr-r50-coco-objects365": (
        (-4.6491, -3.9252, -5.3163, -4.1386, -5.0348, -3.9016, -4.4778, -4.5423, -5.7356),
        (0.2583, 0.5492, 0.4747, 0.5501, 0.2754, 0.0574, 0.7693, 0.4137, 0.4613),
    ),
    "rtdetr-r101-coco-objects365": (
        (-4.5152, -5.6811, -5.7311, -4.5358, -7.2422, -5.0941, -4.6919, -5.5834, -6.0145),
        (0.7703, 0.4140, 0.4583, 0.1686, 0.1991, 0.2107, 0.2570, 0.5496, 0.4750),
    ),
    "rtdetrv2-r18": (
        (-3.7045, -5.1913, -6.1787, -4.0106, -9.3450, -5.2043, -4.1287, -4.7463, -5.8634),
        (0.2582, 0.5497, 0.4764, 0.1684, 0.1985, 0.2120, 0.7665, 0.4146, 0.4669),
    ),
    "rtdetrv2-r34": (
        (-4.6108, -5.9453, -3.8505, -3.8702, -6.1136, -5.5677, -3.7790, -6.4538, -5.9449),
        (0.1691, 0.1984, 0.2118, 0.2594, 0.5506, 0.4736, 0.7669, 0.4136, 0.4654),
    ),
    "rtdetrv2-r50m": (
        (-2.7453, -5.4595, -7.3702, -3.1858, -5.3803, -7.9838, -5.0293, -7.0083, -4.2888),
        (0.7711, 0.4135, 0.4577, 0.2570, 0.5480, 0.4755, 0.1694, 0.1992, 0.2127),
    ),
    "rtdetrv2-r50": (
        (-4.7881, -4.6754, -6.1624, -5.4441, -6.6486, -4.3840, -3.5455, -4.9318, -6.3544),
        (0.2588, 0.5487, 0.4747, 0.5497, 0.2760, 0.0573, 0.7688, 0.4133, 0.4634),
    ),
}
FIRST["rtdetrv2-r101"] = FIRST["rtdetr-r101"]  # which are the same weights


class Difference(NamedTuple):
    """The greatest differences of logits and of boxes, in units of the image, from what is published of `name`."""

    name: str
    logits: float
    boxes: float


@torch.no_grad()
def difference_from_published(model: RTDETR, image: np.ndarray) -> Difference:
    """How far the model's first logits and boxes are from those of the nearest official weights of its kind.

    image: COCO's val2017/000000039769.jpg, [H, W, 3] uint8 BGR. UserError where nothing is published of the kind.
    """
    kind = model.title.lower().replace("rt-detr", "rtdetr")
    names = [name for name in FIRST if name == kind or name.startswith(f"{kind}-")]
    if not names:
        raise UserError(f"of {model.title} no outputs are published to compare with; they are of {', '.join(FIRST)}")
    canvas = torch.from_numpy(model.to_canvas(image, 640)[0]).permute(2, 0, 1)[None]
    decoder_layers, training = model.decoder_layers, model.training
    model.decoder_layers = len(model.decoder.dec_score_head)
    try:
        output = model.eval()(model.normalize(canvas))
    finally:
        model.decoder_layers = decoder_layers
        model.train(training)
    found = torch.stack((output.logits[0, :3, :3], output.boxes[0, :3, :3])).flatten(1)
    differences = [Difference(name, *(found - torch.tensor(FIRST[name])).abs().amax(1).tolist()) for name in names]
    return min(differences, key=lambda difference: difference.logits)
